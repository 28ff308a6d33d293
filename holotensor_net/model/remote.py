"""open_model and RemoteModel: a model on a web server, used as if it were here; only headers are read at first."""

from __future__ import annotations

import difflib
import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from ..config import NetworkConfig
from ..errors import ConfigurationError, FormatError, HttpError, NetworkError, NotFound, OfflineError
from ..formats.dtypes import frombytes
from ..formats.safetensors import (
    FIRST_READ,
    MAX_HEADER,
    Index,
    merge,
    read_header,
    read_index,
    shards_of,
    slice_range,
)
from ..formats.tensors import BytesLike, ModelHeader, TensorInfo
from ..values import LoadFailure, LoadRequest, LoadResult, LoadSuccess, Priority, RangeRequest
from .importance import layer_order, rank_names
from .sources import NetworkSource, Source, source_of

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["LoadPlan", "LoadReport", "RemoteModel", "TensorSlice", "index_of", "open_model", "places_in"]

Patterns: TypeAlias = str | Iterable[str] | None
Order: TypeAlias = Literal["importance", "layer", "file"] | Callable[[str], Any] | Mapping[str, Any]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NO_FILE = (403, 404, 410)
"""What servers answer who is asked for a folder as if it were a file; or they send a list of what is in it."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a stream would cost: ``requests`` to make at most, ``bytes`` in all, ``cached_bytes`` of them here already,
    ``seconds`` at the bandwidth measured so far (inf while nothing has been measured)."""

    requests: int
    bytes: int
    cached_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the last stream did: ``tensors`` handed over and their ``bytes``; ``fetched_bytes`` over the network, in
    ``requests``, with ``retries``; seconds until the first tensor, until all CRITICAL ones, and until the last (None:
    not yet, or there were none). ``critical_fetched_bytes``: what had been fetched when all CRITICAL ones were there.
    """

    tensors: int = 0
    bytes: int = 0
    fetched_bytes: int = 0
    requests: int = 0
    retries: int = 0
    first_seconds: float | None = None
    critical_seconds: float | None = None
    critical_fetched_bytes: int | None = None
    seconds: float | None = None


def open_model(
    url_or_path: str | os.PathLike[str],
    *,
    config: NetworkConfig | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> RemoteModel:
    """A model at a URL, at a path below the configured endpoints, or in a local file; only its headers are read.

    Takes a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder that has ``model.safetensors`` or its
    index: where its URL does not end in a slash, that takes a request more. ``include`` and ``exclude`` are glob
    patterns of tensor names. Raises NetworkError: FormatError if it is no such model.
    """
    source, path = source_of(url_or_path, config)
    try:
        header = _header_at(source, path)
    except BaseException:
        source.close()
        raise
    return RemoteModel(source, header, include=include, exclude=exclude)


def _header_at(source: Source, path: str) -> ModelHeader:
    name = urlsplit(path).path
    if name.endswith(".json"):
        return _sharded(source, path, _all_of(source, path))
    if not name or name.endswith("/"):
        return _of_folder(source, path)
    try:
        return _single(source, path)
    except (HttpError, FormatError, OfflineError) as error:
        is_no_file = not isinstance(error, HttpError) or error.status in _NO_FILE
        if is_no_file and not name.endswith(".safetensors"):
            with suppress(NetworkError):  # what the file itself gave says more
                return _of_folder(source, _beside(path, "/"))
        raise


def _of_folder(source: Source, folder: str) -> ModelHeader:
    index, single = places_in(folder)
    try:
        data = _all_of(source, index)
    except (NotFound, OfflineError):
        try:
            return _single(source, single)
        except NotFound as error:
            raise NotFound(f"there is neither {_INDEX} nor {_SINGLE}: name the file", url=error.url) from error
    return _sharded(source, index, data)


def _sharded(source: Source, path: str, data: bytes) -> ModelHeader:
    index = index_of(data, path)
    shards = shards_of(index)
    source.prefetch(shards)
    return merge(index, {shard: _single(source, shard) for shard in shards})


def _single(source: Source, path: str) -> ModelHeader:
    source.read_range(path, 0, FIRST_READ)  # tells the size, so that a file that was cut short is known before it fails
    return read_header(source.read_range, path, size=source.size_of(path))


def index_of(data: BytesLike, path: str) -> Index:
    """The index in ``data``; the query that ``path`` ends in, a signature for example, is sent for the shards too.
    Raises FormatError."""
    index = read_index(data, path)
    _, mark, query = path.partition("?")
    return replace(index, weight_map={name: shard + mark + query for name, shard in index.weight_map.items()})


def places_in(folder: str) -> tuple[str, str]:
    """Where the model in a folder may lie: its index, or the one file that it is."""
    return _beside(folder, _INDEX), _beside(folder, _SINGLE)


def _beside(folder: str, name: str) -> str:
    """The path of a file in a folder, whose query it keeps."""
    path, mark, query = folder.partition("?")
    return path + name + mark + query


def _all_of(source: Source, path: str) -> bytes:
    """The whole of a small file; FORMATS allows an index of 100 MiB."""
    data = bytes(source.read_range(path, 0, FIRST_READ))
    size = source.size_of(path)
    if size is not None and size > len(data):
        if size > MAX_HEADER:
            raise FormatError(f"the index has {size} bytes, {MAX_HEADER} at most are read", url=path)
        data += bytes(source.read_range(path, len(data), size))
    return data


class RemoteModel:
    """The tensors of a model, by name, as NumPy arrays; follows ``safetensors.safe_open``.

    Arrays are read-only views of verified bytes: no copy is made, and the cache stays what it is. A context manager;
    ``close`` stops whatever is being fetched, and arrays that are held stay valid.
    """

    def __init__(
        self, source: Source, header: ModelHeader, *, include: Patterns = None, exclude: Patterns = None
    ) -> None:
        self._source = source
        self._metadata = dict(header.metadata)
        # Ranks come from all names: the first and the last block are the model's, not a selection's.
        self._sizes = {name: info.nbytes for name, info in header.tensors.items()}
        names = _selected(header.tensors, include, exclude)
        self._tensors = {name: header.tensors[name] for name in names}
        self._report: LoadReport | None = None

    def __enter__(self) -> RemoteModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"<RemoteModel: {len(self)} tensors, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._tensors.values())

    @property
    def source(self) -> Source:
        """Where the bytes come from; its ``stats`` tell how that goes."""
        return self._source

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        """The free text that the files carry."""
        return dict(self._metadata)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor. Raises KeyError, with the names that come near."""
        try:
            return self._tensors[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._tensors, n=3)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"the model has no tensor {name!r}{hint}") from None

    def get_tensor(self, name: str) -> npt.NDArray[Any]:
        """One tensor, ahead of everything else that is being fetched. Raises KeyError, NetworkError."""
        info = self.info(name)
        result = self._source.load(self._request(info, Priority.CRITICAL, 1.0))
        return frombytes(result.data, info)

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor that is indexed before it is fetched: ``model.get_slice(name)[10:20]`` moves those rows only."""
        return TensorSlice(self, self.info(name))

    def stream(
        self,
        order: Order = "importance",
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        quality: float | None = None,
        until: float = 0.0,
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield ``(name, array)`` as tensors arrive, so that work begins long before the download ends.

        ``order``: ``"importance"`` (embeddings, norms, first and last blocks first), a function or mapping that gives
        names their importance in [0, 1], or strictly ``"layer"`` after layer, or as in the ``"file"``. ``quality``
        and ``until`` (relative errors) concern tensors that are stored in levels; others are yielded once, exact.
        Raises NetworkError.
        """
        _check_fraction("quality", quality)
        _check_fraction("until", until)
        return self._arrays(self._requests(order, include, exclude), strictly=order in ("layer", "file"))

    def explain(self, order: Order = "importance", *, include: Patterns = None, exclude: Patterns = None) -> LoadPlan:
        """What ``stream`` with the same arguments would cost, before any of it is fetched."""
        requests = self._requests(order, include, exclude)
        total = cached = count = 0
        piece = self._source.loader.config.chunk_size if isinstance(self._source, NetworkSource) else 1
        for request in requests:
            size = request.expected_size or 0
            total += size
            if not size or self._source.is_cached(request):
                cached += size
            else:
                count += -(-size // piece)
        seconds = 0.0
        if total > cached and isinstance(self._source, NetworkSource):
            seconds = self._source.loader.scheduler.monitor.estimate_time(total - cached)
        return LoadPlan(count, total, cached, seconds)

    def report(self) -> LoadReport | None:
        """What the last ``stream`` did, so far; None before the first."""
        return self._report

    def close(self) -> None:
        """Stop; idempotent."""
        self._source.close()

    def _arrays(self, requests: list[LoadRequest], *, strictly: bool) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        results = self._watched(requests)
        if strictly:
            results = _in_order(results, [request.fragment_id for request in requests])
        for result in results:
            if isinstance(result, LoadFailure):
                raise result.error
            yield result.fragment_id, frombytes(result.data, self._tensors[result.fragment_id])

    def _requests(self, order: Order, include: Patterns, exclude: Patterns) -> list[LoadRequest]:
        """A request for each selected tensor, in the order given for ``layer`` and ``file``, else by rank."""
        names = _selected(self._tensors, include, exclude)
        if order == "importance" or callable(order) or isinstance(order, Mapping):
            ranks = rank_names(self._sizes, None if order == "importance" else order)
            names.sort(key=lambda name: (ranks[name].priority, -ranks[name].importance))
            return [self._request(self._tensors[n], ranks[n].priority, ranks[n].importance) for n in names]
        if order not in ("layer", "file"):
            raise ConfigurationError(
                f"order must be 'importance', 'layer', 'file', a function or a mapping, not {order!r}"
            )
        if order == "layer":
            names = layer_order(names)
        step = 1.0 / max(1, len(names))
        return [
            self._request(self._tensors[name], Priority.NORMAL, 1.0 - index * step) for index, name in enumerate(names)
        ]

    def _request(self, info: TensorInfo, priority: Priority, importance: float) -> LoadRequest:
        fragment = info.fragments[0]
        return LoadRequest(
            info.name,
            fragment.file,
            priority=priority,
            importance=importance,
            expected_size=fragment.length,
            byte_range=RangeRequest(fragment.start, fragment.stop),
            checksum=fragment.checksum,
            validator=self._source.version_of(fragment.file),
        )

    def _watched(self, requests: list[LoadRequest]) -> Iterator[LoadResult]:
        """The results of the requests, while the report is kept."""
        critical = {request.fragment_id for request in requests if request.priority == Priority.CRITICAL}
        began, before = time.monotonic(), self._source.stats()
        self._report = report = LoadReport()
        for result in self._source.stream(requests):
            if isinstance(result, LoadSuccess):
                now, stats = time.monotonic() - began, self._source.stats()
                fetched = stats.bytes_fetched - before.bytes_fetched
                report = replace(
                    report,
                    tensors=report.tensors + 1,
                    bytes=report.bytes + len(result.data),
                    fetched_bytes=fetched,
                    requests=stats.requests - before.requests,
                    retries=stats.retries - before.retries,
                    seconds=now if report.tensors + 1 == len(requests) else None,
                )
                if report.first_seconds is None:
                    report = replace(report, first_seconds=now)
                if critical == {result.fragment_id}:
                    report = replace(report, critical_seconds=now, critical_fetched_bytes=fetched)
                critical.discard(result.fragment_id)
                self._report = report
            yield result


class TensorSlice:
    """A tensor that has not been fetched; indexing it fetches what the index needs.

    Whole numbers and slices along leading axes move only their rows; any other index moves the tensor, and picks here.
    """

    def __init__(self, model: RemoteModel, info: TensorInfo) -> None:
        self._model = model
        self._info = info

    def get_shape(self) -> list[int]:
        """The shape, as ``safe_open`` gives it."""
        return list(self._info.shape)

    def get_dtype(self) -> str:
        """The dtype's name in the file, e.g. ``BF16``."""
        return self._info.dtype

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        part = slice_range(self._info, index)
        source = self._model._source
        whole = self._model._request(self._info, Priority.CRITICAL, 1.0)
        if part is None or source.is_cached(whole):
            import numpy as np

            return np.asarray(self._model.get_tensor(self._info.name)[index])  # where NumPy gives a scalar, too
        if not part.fragments or not part.nbytes:
            return frombytes(memoryview(b""), part)
        fragment = part.fragments[0]
        name = f"{self._info.name}[{fragment.start}:{fragment.stop}]"
        wanted = LoadRequest(
            name,
            fragment.file,
            priority=Priority.CRITICAL,
            importance=1.0,
            expected_size=fragment.length,
            byte_range=RangeRequest(fragment.start, fragment.stop),
            validator=whole.validator,
        )
        return frombytes(source.load(wanted).data, part)


def _in_order(results: Iterator[LoadResult], names: list[str]) -> Iterator[LoadResult]:
    """Results in the order of ``names``; what arrives early is held."""
    early: dict[str, LoadResult] = {}
    for name in names:
        while name not in early:
            result = next(results)
            early[result.fragment_id] = result
        yield early.pop(name)


def _selected(names: Iterable[str], include: Patterns, exclude: Patterns) -> list[str]:
    """The names that match a pattern of ``include`` (all, if there is none) and none of ``exclude``."""
    wanted, unwanted = _patterns(include), _patterns(exclude)

    def is_selected(name: str) -> bool:
        if wanted is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            return False
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted or ())

    return [name for name in names if is_selected(name)]


def _patterns(given: Patterns) -> tuple[str, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def _check_fraction(name: str, value: float | None) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ConfigurationError(f"{name} must be a relative error from 0 to 1, not {value!r}")
