"""Where results are: in memory, on the disk, or on their way."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from cachetools import LRUCache

from ..errors import FormatError, NetworkError
from ..storage.results import ResultStore
from .frozen import Frozen, freeze
from .keys import CacheKey
from .portable import pack, unpack

__all__ = ["DiskTier", "Flight", "Held", "MemoryTier", "StreamCacheStats"]

_log = logging.getLogger("holotensor_net.stream_cache")

_STRIPES = 64


@dataclass(frozen=True, slots=True)
class StreamCacheStats:
    """A moment's figures. ``chunks`` and ``memory_size`` (bytes) are held in memory; ``states`` are loaded.

    ``evictions``: results that had to leave the memory; ``seconds_saved``: what the functions took that a hit made
    unnecessary to call.
    """

    chunks: int = 0
    states: int = 0
    memory_size: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    seconds_saved: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits among all questions, 0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits else 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """A result, and the seconds that it took to compute."""

    value: Frozen
    seconds: float = 0.0


class Flight:
    """A result that one thread, its leader, finds or computes, and others wait for.

    The lock is free once the flight has landed: then ``held`` or ``error`` is there, or neither, if the leader alone
    was stopped, by Ctrl-C for one. ``land`` is a single step, so that no interrupt can come before its effect.
    """

    def __init__(self) -> None:
        self.leader = threading.get_ident()
        self.held: Held | None = None
        self.error: Exception | None = None
        self._landing = threading.Lock()
        self._landing.acquire()
        self.land = self._landing.release

    @property
    def has_landed(self) -> bool:
        return not self._landing.locked()

    def outcome(self) -> Held | None:
        """The result, once it is there; None if there is to be none. Raises what the computation raised."""
        with self._landing:
            pass
        try:
            if self.error is not None:
                raise self.error
            return self.held
        finally:
            del self  # the error holds this frame, which must not hold the error


class _Counting(LRUCache[bytes, Held]):
    """The least recently used goes first, and is counted."""

    evictions = 0

    def popitem(self) -> tuple[bytes, Held]:
        self.evictions += 1
        return super().popitem()


class MemoryTier:
    """The results used last, ``max_chunks`` and ``max_bytes`` of them at most; those on their way; the count of all.

    Named by the digests of their keys. The lock guards everything, for the time of a move. ``epoch`` changes with
    :meth:`clear`; whatever began in an earlier one comes too late to be held.
    """

    def __init__(self, max_chunks: int, max_bytes: float) -> None:
        self.epoch = 0
        self._max_chunks = max_chunks
        self._held = _Counting(max_bytes, getsizeof=lambda held: held.value.nbytes)
        self._flights: dict[bytes, Flight] = {}
        self._hits = self._misses = 0
        self._seconds_saved = 0.0
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> Held | None:
        """The result, counted as a hit if it is here; an absence is not counted yet."""
        with self._lock:
            return self._find(digest)

    def peek(self, digest: bytes) -> Held | None:
        """The result, uncounted."""
        with self._lock:
            return self._held.get(digest)

    def put(self, digest: bytes, held: Held, epoch: int | None = None) -> bool:
        """Hold it, or, where it is too large, at least not what was there before; False if it comes too late."""
        with self._lock:
            if epoch not in (None, self.epoch):
                return False
            self._held.pop(digest, None)
            with contextlib.suppress(ValueError):
                self._held[digest] = held
            while len(self._held) > self._max_chunks:
                self._held.popitem()
            return True

    def join(self, digest: bytes, mine: Flight) -> Held | Flight:
        """The result, as in :meth:`get`; or the flight that it is on: ``mine`` if there is none."""
        with self._lock:
            held = self._find(digest)
            if held is not None:
                return held
            flight = self._flights.get(digest)
            if flight is None or flight.has_landed:
                flight = self._flights[digest] = mine
            return flight

    def leave(self, digest: bytes, mine: Flight) -> None:
        """Let the next to ask begin anew, where it was ``mine`` that was joined."""
        with self._lock:
            if self._flights.get(digest) is mine:
                del self._flights[digest]

    def count(self, held: Held | None) -> None:
        """One more question: answered by ``held``, or missed."""
        with self._lock:
            if held is None:
                self._misses += 1
            else:
                self._hits += 1
                self._seconds_saved += held.seconds

    def clear(self) -> None:
        """Hold nothing, neither now nor when what is on its way arrives."""
        with self._lock:
            self.epoch += 1
            self._held.clear()
            self._flights.clear()

    def stats(self, states: int) -> StreamCacheStats:
        with self._lock:
            return StreamCacheStats(
                chunks=len(self._held),
                states=states,
                memory_size=int(self._held.currsize),
                hits=self._hits,
                misses=self._misses,
                evictions=self._held.evictions,
                seconds_saved=self._seconds_saved,
            )

    def _find(self, digest: bytes) -> Held | None:
        try:
            held = self._held[digest]
        except KeyError:
            return None
        self._hits += 1
        self._seconds_saved += held.seconds
        return held


class DiskTier:
    """Results in files, as far as the disk plays along: one that fails is worth a line in the log, never an error.

    Whoever moves a result between tiers takes its :meth:`turn`, so that no old one can overtake a new one on the way.
    """

    def __init__(self, store: ResultStore) -> None:
        self.store = store
        self._turns = [threading.Lock() for _ in range(_STRIPES)]
        self._warned: set[object] = set()

    def turn(self, key: CacheKey) -> threading.Lock:
        """The lock for moving the result of a key; some keys share one."""
        return self._turns[key.digest[0] % _STRIPES]

    def get(self, key: CacheKey) -> Held | None:
        with self._tolerant():
            stored = self.store.get(key.hex)
            if stored is not None:
                match stored.document:
                    case {"value": document, "seconds": float(seconds)}:
                        return Held(freeze(unpack(document, stored.files)), seconds)
                raise FormatError("a stored result is of another making: remove it, and compute it again")
        return None

    def put(self, key: CacheKey, held: Held) -> None:
        """Keep the result; where that fails, at least not what was there before."""
        packed = pack(held.value.thaw())
        with self._tolerant():
            if packed is not None:
                value, files = packed
                self.store.put(key.hex, {"value": value, "seconds": float(held.seconds)}, files)
                return
            self._warn(type(held.value), "a result stays in memory, for a file cannot hold it without a pickle")
        self.remove(key)

    def remove(self, key: CacheKey) -> None:
        with self._tolerant():
            self.store.remove(key.hex)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except NetworkError as error:
            self._warn((type(error), getattr(error.__cause__, "errno", None)), f"results stay in memory: {error}")

    def _warn(self, cause: object, message: str) -> None:
        """Say it once for each cause."""
        if cause not in self._warned:
            self._warned.add(cause)
            _log.warning("%s", message)
