"""StreamingLoader: results as they come, no faster than they are taken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, NetworkError, Timeout
from ..values import LoadFailure, LoadRequest, LoadResult, Priority, must_be
from ..waits import attentively
from .priority import PriorityQueue

if TYPE_CHECKING:
    from .loader import NetworkLoader

__all__ = ["StreamingLoader"]


class StreamingLoader:
    """Iterates over the results of many requests in the order in which they complete, the most urgent asked for first.

    At most ``buffer`` fragments, and ``memory_budget`` bytes of them (one at least), are asked for and not yet taken:
    a slow consumer slows the network, not the memory. What is of unknown size counts as a piece, or as what such had on
    average if that was more, until it has come. ``path_prefix`` is put before every path. To be used by one thread at a
    time; a context manager, which cancels on exit. Its lock guards the results.
    """

    def __init__(self, loader: NetworkLoader, path_prefix: str = "", buffer: int = 256) -> None:
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ConfigurationError(f"StreamingLoader.buffer must be a whole number, 1 or more, not {buffer!r}")
        if not hasattr(loader, "config"):
            raise ConfigurationError(f"loader must be NetworkLoader, not {type(loader).__name__}")
        must_be("path_prefix", path_prefix, str)
        self._loader = loader
        self._prefix = path_prefix
        self._buffer = buffer
        self._budget = loader.config.memory_budget
        self._waiting = PriorityQueue()
        self._lock = threading.RLock()  # not its Condition, which an interrupt may leave locked
        self._arrived = threading.Condition(self._lock)
        self._ready: deque[tuple[LoadResult, int]] = deque()
        self._futures: set[Future[LoadResult]] = set()
        self._asked = 0
        self._asked_bytes = 0
        self._guessed = self._guessed_bytes = 0  # fragments of unknown size that have come, and what they had
        self._cancelled = False

    def __enter__(self) -> StreamingLoader:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is GeneratorExit:
            # A generator was left with the stream in it, by the garbage collector perhaps: that may come in the midst
            # of anything, while this thread holds the very locks that cancelling takes.
            self._loader._soon(self.cancel)
        else:
            self.cancel()

    def __iter__(self) -> Iterator[LoadResult]:
        return self

    def __next__(self) -> LoadResult:
        result = self.next()
        if result is None:
            raise StopIteration
        return result

    def start(self, requests: Iterable[LoadRequest | str]) -> StreamingLoader:
        """Begin; a string stands for a fragment of that name at that path. May be called again to add more."""
        if isinstance(requests, str):
            raise ConfigurationError("requests must be several: put a single one into a list")
        for request in requests:
            if isinstance(request, str):
                request = LoadRequest(request, request)
            must_be("request", request, LoadRequest)
            self._waiting.push(replace(request, path=self._prefix + request.path) if self._prefix else request)
        self._loader._watch(self)
        self._ask()
        return self

    def next(self, timeout: float | None = None) -> LoadResult | None:
        """The next result; None at the end. Raises Timeout if there is none within ``timeout`` seconds."""
        self._ask()
        with self._lock:
            if not attentively(lambda seconds: self._arrived.wait_for(self._has_news, seconds), timeout):
                raise Timeout(f"no fragment arrived within {timeout} s")
            if self._cancelled or not self._ready:
                return None
            result, size = self._ready.popleft()
            self._asked -= 1
            self._asked_bytes -= size
        self._ask()
        return result

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move a fragment that has not been asked for yet to another level."""
        return self._waiting.update_priority(fragment_id, priority)

    def cancel(self) -> None:
        """Drop everything that has not been taken; iteration ends. Idempotent."""
        self._waiting.clear()
        with self._lock:
            self._cancelled = True
            self._ready.clear()
            futures, self._futures = self._futures, set()
            self._arrived.notify_all()
        for future in futures:
            future.cancel()

    def _has_news(self) -> bool:
        return bool(self._ready or self._cancelled or not (self._asked or len(self._waiting)))

    def _ask(self) -> None:
        """Ask for as much more as may be undelivered at once."""
        while not self._cancelled and self._asked < self._buffer:
            fragment = self._waiting.peek()
            if fragment is None:
                return
            known = _size_of(fragment.request)
            size = self._guess() if known is None else known
            if self._asked and self._asked_bytes + size > self._budget:
                return
            if not self._waiting.discard(fragment):
                continue
            with self._lock:
                self._asked += 1
                self._asked_bytes += size
            future = self._future_of(replace(fragment.request, priority=fragment.priority))
            with self._lock:
                self._futures.add(future)
            if self._cancelled:  # meanwhile, by another thread
                future.cancel()
            # Called at once, as the base class has it: others' callbacks may take long, and wait for a thread.
            Future.add_done_callback(future, partial(self._take_in, size=size, is_known=known is not None))

    def _future_of(self, request: LoadRequest) -> Future[LoadResult]:
        """A future of our own: a shared one could be cancelled by others, and we would wait for ever."""
        try:
            return self._loader.enqueue(request, shared=False)
        except NetworkError as error:  # the loader is closed: still, each request ends in a result
            future: Future[LoadResult] = Future()
            future.set_result(LoadFailure(request.fragment_id, error))
            return future

    def _take_in(self, future: Future[LoadResult], *, size: int, is_known: bool) -> None:
        if future.cancelled():
            return
        result = future.result()
        with self._lock:
            self._futures.discard(future)
            if self._cancelled:
                return
            if result.is_success and not is_known:
                self._guessed += 1
                self._guessed_bytes += len(result.data)
                more = max(0, len(result.data) - size)
                self._asked_bytes += more
                size += more
            self._ready.append((result, size))
            self._arrived.notify_all()

    def _guess(self) -> int:
        """Bytes that a fragment of unknown size will take, as far as can be told."""
        return max(self._loader.config.chunk_size, self._guessed_bytes // max(1, self._guessed))


def _size_of(request: LoadRequest) -> int | None:
    """Bytes that a fragment will take; None if that is not known."""
    return request.byte_range.length if request.byte_range is not None else request.expected_size or None
