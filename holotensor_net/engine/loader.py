"""NetworkLoader: the one door to the engine."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from ..config import NetworkConfig, offline
from ..errors import Cancelled, ConfigurationError, NetworkError, ObjectChanged, OfflineError, redact_url
from ..storage.cache import FragmentCache
from ..transport.guards import check_checksum
from ..values import (
    HeadInfo,
    LoadFailure,
    LoadRequest,
    LoadResult,
    LoadSuccess,
    Priority,
    RangeRequest,
    level_of,
    must_be,
)
from .fetcher import Fetcher
from .request_cache import Found, RequestCache
from .runs import runs_in
from .scheduler import Scheduler
from .streaming import StreamingLoader

__all__ = ["LoaderStats", "NetworkLoader"]


_GATHERING = 0.1
"""Seconds for which what is enqueued together is gathered before it is begun with, if it is no batch by then."""

_BATCH = 1024
"""Fragments that are asked of the cache, queued, and begun with at one go: so many are joined in any case."""


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """A snapshot of a loader. Sizes in bytes, ``bandwidth`` in bytes/s.

    ``bytes_fetched`` came over the network, what was thrown away included; ``bytes_cached`` from the cache, or from
    what a transfer that was cut off had left there.
    ``connections`` are in use now, ``limit`` may be. ``queued``, ``completed`` and ``failed`` count fragments.
    ``requests`` were sent for what came: retries, redirects, and repeats with a fresh credential included. ``hedges``
    are requests beside one that was slow.
    """

    bytes_fetched: int
    bytes_cached: int
    requests: int
    retries: int
    queued: int
    completed: int
    failed: int
    connections: int
    limit: int
    bandwidth: float
    hedges: int = 0


class NetworkLoader:
    """Loads fragments: from the cache where it can, else over the network, most urgent first.

    Thread-safe, and a context manager: ``close`` interrupts what runs, resolves what is left with Cancelled, and
    leaves no thread. ``clock`` gives seconds since the epoch, by which cached answers age. Raises ConfigurationError
    if there is no endpoint to ask.
    """

    def __init__(self, config: NetworkConfig | None = None, *, clock: Callable[[], float] = time.time) -> None:
        if config is None:
            config = NetworkConfig()
        must_be("config", config, NetworkConfig)
        self._wall = clock
        self.config = config.with_default_endpoint()
        self._closed = False
        self._build()
        _watch_over(self)

    def _build(self) -> None:
        """Everything that has locks and threads; a child process builds its own."""
        self.cache = FragmentCache(self.config.cache, clock=self._wall)
        self.scheduler = Scheduler(self.config)
        self._requests = RequestCache(
            self.cache,
            self.config.endpoints,
            user_agent=self.config.user_agent,
            spare=self.config.memory_budget,
            clock=self._wall,
        )
        self._fetcher = Fetcher(self.config, self.scheduler, self._requests)
        self._lock = threading.Lock()  # guards what follows, and whether it is closed
        self._bytes_cached = 0
        self._streams: weakref.WeakSet[StreamingLoader] = weakref.WeakSet()

    def __enter__(self) -> NetworkLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, request: LoadRequest) -> LoadResult:
        """The fragment, or why there is none; waits for it, up to its deadline."""
        answer = self._at_once(request)
        if isinstance(answer, LoadSuccess | LoadFailure):
            return answer
        future = self._fetcher.submit(request, answer, shared=False)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt: do not go on for nobody
            raise

    def load_range(self, request: LoadRequest, start: int, stop: int) -> LoadResult:
        """Bytes ``[start, stop)`` of the fragment that ``request`` names; its checksum, being of the whole, is not
        checked. Raises ConfigurationError for bytes that are known to lie beyond its end."""
        must_be("request", request, LoadRequest)
        part = RangeRequest(start, stop)
        base = request.byte_range.start if request.byte_range is not None else 0
        length = request.byte_range.length if request.byte_range is not None else request.expected_size
        if length is not None and stop > length:
            raise ConfigurationError(f"stop must be at most {length}, where the fragment ends, not {stop!r}")
        wanted = RangeRequest(base + part.start, base + part.stop)
        return self.load(
            replace(request, byte_range=wanted, expected_size=wanted.length, checksum=None, allow_short=False)
        )

    def enqueue(self, request: LoadRequest, *, shared: bool = True) -> Future[LoadResult]:
        """A future for the result: done already if the cache has it fresh, the same if the same request is in flight.

        ``shared=False``: a future of the caller's own, which nobody else can cancel; the bytes come only once all the
        same. A full queue makes the caller wait. Raises Cancelled once the loader is closed.
        """
        answer = self._at_once(request)
        if answer is None or isinstance(answer, Found):
            return self._fetcher.submit(request, answer, shared=shared)
        return _done(answer)

    def _enqueue_all(self, requests: Sequence[LoadRequest]) -> Iterator[Future[LoadResult]]:
        """``enqueue`` for each, but nothing is begun with."""
        without: set[object] = set()
        is_offline = offline(self.config.offline)
        answers: list[LoadResult | int] = []
        asked: list[tuple[Sequence[LoadRequest], Found | None]] = []
        for group in self._grouped(requests, is_offline):
            answer = self._at_once(group[0], without, is_offline) if len(group) == 1 else None
            if answer is None or isinstance(answer, Found):
                asked.append((group, answer))
                answers.append(len(group))
            else:
                answers.append(answer)
        futures = iter(self._fetcher.submit_all(asked))
        for told in answers:
            if isinstance(told, int):
                yield from itertools.islice(futures, told)
            else:
                yield _done(told)

    def _grouped(self, requests: Sequence[LoadRequest], is_offline: bool) -> Iterator[Sequence[LoadRequest]]:
        """The requests in their order, those that make a run together, of which nothing can be in the cache."""
        is_plain = self.config.retry.deadline is None and any(each.supports_range for each in self.config.endpoints)
        if is_offline or not is_plain or self.scheduler.room < len(requests):
            yield from zip(requests)
            return
        short, most = self.scheduler.longest_joined
        for group in runs_in(requests, short=short, most=most):
            if len(group) == 1 or self._requests.knows_nothing_of(group):
                yield group
            else:
                yield from zip(group)

    def _at_once(
        self, request: LoadRequest, without: set[object] | None = None, is_offline: bool | None = None
    ) -> LoadSuccess | LoadFailure | Found | None:
        """What can be said without the network: a result, or what the network may confirm."""
        if self._closed:
            raise Cancelled("the loader is closed: make a new one")
        must_be("request", request, LoadRequest)
        try:
            return self._from_cache(
                request, without, offline(self.config.offline) if is_offline is None else is_offline
            )
        except NetworkError as error:  # a path that cannot be asked for
            return LoadFailure(request.fragment_id, error)

    def enqueue_many(self, requests: Iterable[LoadRequest]) -> list[Future[LoadResult]]:
        """A future for each request, in their order. The first ones wait a moment for neighbours to be joined with."""
        futures: list[Future[LoadResult]] = []
        gathered: list[LoadRequest] = []
        begin_at = time.monotonic() + _GATHERING
        try:
            for request in requests:
                must_be("request", request, LoadRequest)
                gathered.append(request)
                if len(gathered) >= _BATCH or time.monotonic() >= begin_at:
                    batch, gathered = gathered, []
                    futures.extend(self._enqueue_all(batch))
                    self._fetcher.start()
                    begin_at = time.monotonic() + _GATHERING
        except Exception:  # of whoever makes the requests: those that were made before are under way
            list(self._enqueue_all(gathered))
            raise
        else:
            futures.extend(self._enqueue_all(gathered))
        finally:
            self._fetcher.start()
        return futures

    def stream(self, requests: Iterable[LoadRequest | str], **options: Any) -> StreamingLoader:
        """Results as they come, most urgent first; ``options`` are those of StreamingLoader."""
        return StreamingLoader(self, **options).start(requests)

    def _soon(self, call: Callable[[], object]) -> None:
        """Call this at once, on a thread that has no lock."""
        self._fetcher.soon(call)

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move a fragment that has not arrived to another level; False if none of that name is on its way."""
        level = level_of(priority)
        with self._lock:
            streams = list(self._streams)
        moved = [stream.update_priority(fragment_id, level) for stream in streams]
        return self._fetcher.update_priority(fragment_id, level) or any(moved)

    def cancel(self, fragment_id: str) -> bool:
        """Stop waiting for a fragment: its result is a failure with Cancelled. False if none of that name is on its
        way."""
        return self._fetcher.cancel(fragment_id)

    def head(self, path: str) -> HeadInfo:
        """What an endpoint says of an object, without its body; offline, what the cache knows. Raises NetworkError."""
        if not offline(self.config.offline):
            return self._fetcher.head(path)
        found = self._requests.find(LoadRequest(path, path))
        if found is None:
            raise _not_cached(path)
        return found.head

    def is_cached(self, request: LoadRequest) -> bool:
        """Whether the fragment could be given without asking the network."""
        must_be("request", request, LoadRequest)
        found = self._requests.find(request)
        if found is None or not (found.is_fresh or offline(self.config.offline)):
            return self._slice_of_whole(request, offline(self.config.offline)) is not None
        return True

    def stats(self) -> LoaderStats:
        """What the loader has done so far, and is doing now."""
        scheduler, fetcher = self.scheduler.stats(), self._fetcher.stats()
        with self._lock:
            cached = self._bytes_cached
        return LoaderStats(
            bytes_fetched=scheduler.total_bytes,
            bytes_cached=cached + fetcher.confirmed_bytes,
            requests=fetcher.requests,
            retries=fetcher.retries,
            queued=scheduler.queued,
            completed=scheduler.completed,
            failed=scheduler.failed,
            connections=scheduler.active,
            limit=scheduler.limit,
            bandwidth=scheduler.bandwidth,
            hedges=fetcher.hedges,
        )

    def sync(self) -> None:
        """Make durable what the cache still holds in memory of its books."""
        self.cache.sync()

    def close(self) -> None:
        """Stop; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._fetcher.close()
        self.cache.close()

    def _watch(self, stream: StreamingLoader) -> None:
        """Let ``update_priority`` reach what a stream has not handed over yet."""
        with self._lock:
            self._streams.add(stream)

    def _from_cache(
        self, request: LoadRequest, without: set[object] | None, is_offline: bool
    ) -> LoadSuccess | LoadFailure | Found | None:
        """A result without the network, or what the cache has that the network may confirm."""
        began = time.monotonic()
        if request.byte_range is not None and not request.byte_range.length:
            return _nothing(request)
        found = self._requests.find(request, unseen=True)
        data = self._requests.data(found) if found is not None and (found.is_fresh or is_offline) else None
        if data is None:
            data, found = self._slice_of_whole(request, is_offline, without) or (None, found)
        if data is not None and found is not None:
            with self._lock:
                self._bytes_cached += len(data)
            duration = time.monotonic() - began
            return LoadSuccess(request.fragment_id, data, duration, from_cache=True, head=found.head)
        if is_offline:
            return LoadFailure(request.fragment_id, _not_cached(request.path), time.monotonic() - began)
        return None if found is None or found.is_fresh else found

    def _slice_of_whole(
        self, request: LoadRequest, is_offline: bool, without: set[object] | None = None
    ) -> tuple[memoryview, Found] | None:
        """The range out of the whole object, if that is cached; ``without`` takes note of objects that are not."""
        wanted, version = request.byte_range, (request.path, request.validator)
        if wanted is None or request.checksum is not None or (without and version in without):
            return None
        found = None
        if self._requests.may_have_whole(request.path):
            found = self._requests.find(replace(request, byte_range=None, expected_size=None))
        if found is None or not (found.is_fresh or is_offline):
            if without is not None:
                without.add(version)
            return None
        data = self._requests.data(found)
        if data is None or (wanted.stop > len(data) and not request.allow_short):
            return None
        part = data[wanted.start : wanted.stop]
        return (part, found) if request.expected_size in (None, len(part)) else None


def _done(answer: LoadResult) -> Future[LoadResult]:
    future: Future[LoadResult] = Future()
    future.set_result(answer)
    return future


def _nothing(request: LoadRequest) -> LoadSuccess:
    """The fragment of an empty range, which nobody has to be asked for. Raises what is wrong with it."""
    if request.expected_size:
        raise ObjectChanged(f"the fragment has 0 bytes, not the {request.expected_size} expected")
    nothing = memoryview(b"")
    if request.checksum is not None:
        check_checksum(nothing, request.checksum)
    return LoadSuccess(request.fragment_id, nothing)


def _not_cached(path: str) -> OfflineError:
    name = redact_url(path)
    return OfflineError(f"{name!r} is not in the cache: fetch it once without offline= and HOLOTENSOR_OFFLINE")


_hooked = False
_open: weakref.WeakSet[NetworkLoader | Fetcher] = weakref.WeakSet()


def _watch_over(loader: NetworkLoader) -> None:
    """Have the loader closed at the interpreter's end, and made anew in a child process, whose threads are gone.

    The end comes before the interpreter waits for threads, which it does before ``atexit`` runs. A loader that nobody
    holds any more leaves its fetcher behind until the last future is resolved.
    """
    global _hooked
    if not _hooked:
        _hooked = True
        register = getattr(threading, "_register_atexit", atexit.register)
        register(_close_all)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_build_all)
    _open.update((loader, loader._fetcher))


def _close_all() -> None:
    for one in list(_open):
        one.close()


def _build_all() -> None:
    loaders = [one for one in _open if isinstance(one, NetworkLoader)]
    _open.clear()
    for loader in loaders:
        if not loader._closed:
            loader._build()
            _open.update((loader, loader._fetcher))
