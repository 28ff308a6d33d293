"""Where a model's bytes come from: a web server through a loader, or files of this machine."""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from ..config import CdnEndpoint, NetworkConfig
from ..engine.loader import LoaderStats, NetworkLoader
from ..errors import (
    ConfigurationError,
    HttpError,
    InvalidUrl,
    NetworkError,
    NotFound,
    RangeNotSupported,
    redact_url,
)
from ..formats.safetensors import FIRST_READ
from ..values import (
    HeadInfo,
    LoadFailure,
    LoadRequest,
    LoadResult,
    LoadSuccess,
    Priority,
    RangeRequest,
    Validator,
    must_be,
)

__all__ = ["FileSource", "NetworkSource", "Source", "endpoint_of", "source_of"]

_log = logging.getLogger("holotensor_net.model")


class Source(Protocol):
    """Files, by path: ranges of them at once, or as they come."""

    def prefetch(self, paths: Iterable[str]) -> None:
        """Begin to read the beginnings of files that will be asked for."""

    def read_range(self, path: str, start: int, stop: int) -> memoryview:
        """These bytes of a file, fewer only where it ends. Raises NetworkError."""

    def size_of(self, path: str) -> int | None:
        """Bytes of a file that was read from, if they are known."""

    def version_of(self, path: str) -> Validator | None:
        """The version of a file that was read from before, to which requests for more of it are to be held."""

    def is_cached(self, request: LoadRequest) -> bool:
        """Whether ``load`` would need no network."""

    def load(self, request: LoadRequest) -> LoadResult: ...
    def stream(self, requests: Iterable[LoadRequest]) -> Iterator[LoadResult]: ...
    def stats(self) -> LoaderStats: ...
    def close(self) -> None: ...


def source_of(where: str | os.PathLike[str], config: NetworkConfig | None) -> tuple[Source, str]:
    """The source that ``where`` names, and the path in it: a URL, a path below the configured endpoints, or a local
    file.

    Credentials go only to the endpoints that they were configured for. Raises InvalidUrl, NotFound, ConfigurationError.
    """
    text = os.fsdecode(where)
    if config is None:
        config = NetworkConfig()
    must_be("config", config, NetworkConfig)
    if "://" not in text and not config.endpoints and os.path.exists(text):
        folder, name = (text, "") if os.path.isdir(text) else os.path.split(text)
        return FileSource(Path(folder or ".")), name
    try:
        own, path = endpoint_of(text, config)
    except ConfigurationError as error:
        raise NotFound(f"{redact_url(text)!r} is neither a URL (http://, https://) nor a file that exists") from error
    return NetworkSource(NetworkLoader(own)), path


def endpoint_of(url: str, config: NetworkConfig) -> tuple[NetworkConfig, str]:
    """A configuration that can be asked for ``url``, and the path to ask for: below the endpoints of ``config`` if the
    URL is, or is none but a path; else below an endpoint of its own, the folder of the URL.

    Raises InvalidUrl, and ConfigurationError for a path without endpoints.
    """
    if "#" in url:
        raise InvalidUrl("leave out what follows '#'", url=url)
    if "://" not in url:
        try:
            return config.with_default_endpoint(), url
        except ConfigurationError as error:
            told = f"{redact_url(url)!r} is no URL (http://, https://)"
            raise ConfigurationError(f"{told}; a path needs NetworkConfig.endpoints or HOLOTENSOR_ENDPOINT") from error
    if config.endpoints or os.environ.get("HOLOTENSOR_ENDPOINT"):
        own = config.with_default_endpoint()
        for endpoint in own.endpoints:
            base = endpoint.url.rstrip("/") + "/"
            if url.startswith(base):
                return own, url[len(base) :]
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    endpoint = CdnEndpoint(parts._replace(path=folder, query="").geturl())
    return config.with_endpoint(endpoint), f"{name}?{parts.query}" if parts.query else name


class NetworkSource:
    """Files of a web server. A file that was begun is held to its version; it comes whole if it is short, or if the
    server sends no ranges."""

    def __init__(self, loader: NetworkLoader) -> None:
        self.loader = loader
        self._has_ranges = any(endpoint.supports_range for endpoint in loader.config.endpoints)
        self._has_warned = False
        self._heads: dict[str, HeadInfo] = {}
        self._whole: dict[str, memoryview] = {}
        self._begun: dict[str, Future[LoadResult]] = {}
        self._bytes = 0

    def prefetch(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path not in self._begun:
                request = _part(path, 0, FIRST_READ) if self._has_ranges else _all(path)
                self._begun[path] = self.loader.enqueue(request)

    def read_range(self, path: str, start: int, stop: int) -> memoryview:
        beginning = self._beginning(path)
        if path in self._whole:
            return self._whole[path][start:stop]
        if stop <= len(beginning):
            return beginning[start:stop]
        return self.load(self.request(_part(path, start, stop))).data

    def size_of(self, path: str) -> int | None:
        head = self._heads.get(path)
        return None if head is None else head.size

    def version_of(self, path: str) -> Validator | None:
        head = self._heads.get(path)
        return None if head is None or not head.validator.is_strong or path in self._whole else head.validator

    def request(self, request: LoadRequest) -> LoadRequest:
        """The request, held to the version of the file that was read from before."""
        version = self.version_of(request.path)
        return request if version is None else replace(request, validator=version)

    def is_cached(self, request: LoadRequest) -> bool:
        return request.path in self._whole or self.loader.is_cached(request)

    def load(self, request: LoadRequest) -> LoadResult:
        whole = self._whole.get(request.path)
        if whole is None:
            return self._or_of_whole(request, self.loader.load(request))
        self._bytes += request.byte_range.length if request.byte_range is not None else len(whole)
        return _sliced(request, whole, self._heads.get(request.path))

    def stream(self, requests: Iterable[LoadRequest]) -> Iterator[LoadResult]:
        here: list[LoadRequest] = []
        coming: dict[str, LoadRequest] = {}
        for request in requests:
            if request.path in self._whole:
                here.append(request)
            else:
                coming[request.fragment_id] = request
        yield from map(self.load, here)
        with self.loader.stream(coming.values()) as results:
            for result in results:
                yield self._or_of_whole(coming[result.fragment_id], result)

    def stats(self) -> LoaderStats:
        stats = self.loader.stats()
        return replace(stats, bytes_cached=stats.bytes_cached + self._bytes)

    def close(self) -> None:
        self.loader.close()

    def _beginning(self, path: str) -> memoryview:
        """The first bytes of a file, all if they are few; from then on its size and version are known."""
        self.prefetch([path])
        result = self._or_of_whole(_part(path, 0, FIRST_READ), self._begun[path].result())
        if isinstance(result, LoadSuccess) and result.head is not None and path not in self._heads:
            self._heads[path] = result.head
            if result.head.size == len(result.data):
                self._whole[path] = result.data
        return result.data

    def _or_of_whole(self, request: LoadRequest, result: LoadResult) -> LoadResult:
        """The result; or, from a server that sends no ranges, the part of the whole file that it should have been.
        Raises NetworkError."""
        if not (isinstance(result, LoadFailure) and _lacks_ranges(result.error)):
            return result
        if request.path not in self._whole:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s: the server sends no ranges, so that files have to come whole", result.error.url)
            whole = self.loader.load(self.request(_all(request.path)))
            self._whole[request.path] = whole.data
            if isinstance(whole, LoadSuccess) and whole.head is not None:
                self._heads[request.path] = replace(whole.head, size=len(whole.data))
        return self.load(request)


class FileSource:
    """Files below a folder of this machine, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, memoryview] = {}
        self._bytes = 0

    def prefetch(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._open(path)

    def read_range(self, path: str, start: int, stop: int) -> memoryview:
        return self._open(path)[start:stop]

    def size_of(self, path: str) -> int | None:
        return len(self._open(path))

    def version_of(self, path: str) -> Validator | None:
        return None

    def is_cached(self, request: LoadRequest) -> bool:
        return True

    def load(self, request: LoadRequest) -> LoadResult:
        whole = self._open(request.path)
        self._bytes += request.byte_range.length if request.byte_range is not None else len(whole)
        return _sliced(request, whole, None)

    def stream(self, requests: Iterable[LoadRequest]) -> Iterator[LoadResult]:
        for request in sorted(requests, key=lambda request: (request.priority, -request.importance)):
            yield self.load(request)

    def stats(self) -> LoaderStats:
        return LoaderStats(0, self._bytes, 0, 0, 0, 0, 0, 0, 0, 0.0)

    def close(self) -> None:
        self._files.clear()

    def _open(self, path: str) -> memoryview:
        view = self._files.get(path)
        if view is None:
            try:
                with open(self._folder / path, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
            except FileNotFoundError as error:
                raise NotFound(f"there is no file {str(self._folder / path)!r}") from error
            except OSError as error:
                raise NetworkError(f"cannot read {str(self._folder / path)!r}: {error.strerror}") from error
            self._files[path] = view
        return view


def _part(path: str, start: int, stop: int) -> LoadRequest:
    """Bytes of a header or an index: nothing else can begin without them."""
    return LoadRequest(
        f"{redact_url(path)}:{start}-{stop}",
        path,
        byte_range=RangeRequest(start, stop),
        priority=Priority.CRITICAL,
        importance=1.0,
        allow_short=True,
    )


def _all(path: str) -> LoadRequest:
    return LoadRequest(redact_url(path), path, priority=Priority.CRITICAL, importance=1.0)


def _sliced(request: LoadRequest, whole: memoryview, head: HeadInfo | None) -> LoadResult:
    began = time.monotonic()
    wanted = request.byte_range or RangeRequest(0, len(whole))
    if wanted.stop > len(whole) and not request.allow_short:
        error = HttpError(416, f"the file has {len(whole)} bytes and ends before the range asked for")
        return LoadFailure(request.fragment_id, error)
    data = whole[wanted.start : wanted.stop]
    return LoadSuccess(request.fragment_id, data, time.monotonic() - began, from_cache=True, head=head)


def _lacks_ranges(error: NetworkError) -> bool:
    return isinstance(error, RangeNotSupported) or isinstance(getattr(error, "last_error", None), RangeNotSupported)
