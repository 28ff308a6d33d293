"""StreamCache: the same chunk through the same filter is never computed twice.

During inference a filter's trained state is fixed and only the data change. So a result is known by three things: how
the filter is configured, what it has learnt, and the chunk.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import GIB, default_cache_dir
from ..errors import ConfigurationError
from ..forks import renew_in_children
from ..storage.files import fixed
from ..storage.results import ResultStore
from .frozen import Frozen, freeze
from .functions import function_key
from .keys import CacheKey
from .tiers import DiskTier, Flight, Held, MemoryTier, StreamCacheStats

if TYPE_CHECKING:
    from ..values import LoadRequest, LoadResult

__all__ = ["StreamCache"]


class _Loads(Protocol):
    """What :meth:`StreamCache.load_state_from` needs of a NetworkLoader."""

    def load(self, request: LoadRequest, /) -> LoadResult: ...


class StreamCache:
    """Results of filters, by configuration, trained state and chunk; the trained states beside them.

    In memory are the ``max_chunks`` results that were used last, and at most ``max_bytes`` of them. With ``disk``, a
    folder (or True: one in the platform's cache folder), they are in files too, ``max_disk_size`` bytes of them at
    most, so that another process, or the next run, finds them; a disk that fails costs time, never an answer.

    What goes in is copied, and what comes out can do no harm: arrays are read-only, containers the caller's own. Values
    are NumPy arrays, numbers, text, bytes (for any bytes-like), and lists, tuples, sets and dicts of these; other
    objects are deep-copied for every caller, and stay in memory, as named tuples do. Thread-safe, and usable after a
    fork. ``clock`` gives seconds. Raises ConfigurationError for limits that are no whole numbers.
    """

    def __init__(
        self,
        max_chunks: int,
        *,
        max_bytes: int | None = None,
        disk: str | os.PathLike[str] | bool = False,
        max_disk_size: int = 10 * GIB,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._limits = _size("max_chunks", max_chunks), math.inf if max_bytes is None else _size("max_bytes", max_bytes)
        self._folder = default_cache_dir() / "results" if disk is True else fixed(Path(disk)) if disk else None
        self._max_disk_size = _size("max_disk_size", max_disk_size)
        self._clock = clock
        self._states: dict[str, tuple[CacheKey, Frozen]] = {}
        self._open()
        renew_in_children(self)

    def _open(self) -> None:
        self._memory = MemoryTier(*self._limits)
        self._disk = None if self._folder is None else DiskTier(ResultStore(self._folder, self._max_disk_size))

    def load_state(self, filter_id: str, state_key: CacheKey, state: object) -> None:
        """Give a filter its trained state, in place of the one that it had.

        ``state_key`` stands for the state in the keys of results (see :meth:`CacheKey.for_state`). An object of another
        kind than the values that the cache takes is kept as it is, and must not change any more.
        """
        _check_key(state_key)
        self._states[filter_id] = state_key, freeze(state, keep=True)

    def load_state_from(
        self,
        loader: _Loads,
        request: LoadRequest,
        filter_id: str,
        decode: Callable[[memoryview], Any] = bytes,
        *,
        version: object = None,
    ) -> Any:
        """Load a state that was trained elsewhere, verified and cached like any fragment; gives the state.

        ``decode`` makes it of the bytes; both are its key (for ``version`` see :meth:`run`). A filter that has this
        state already keeps it. Raises the loader's error, or what ``decode`` raises: the filter keeps what it had.
        """
        data = loader.load(request).data
        state_key = CacheKey.for_state(function_key(decode, version), CacheKey.of(data))
        present = self._states.get(filter_id)
        if present is None or present[0] != state_key:
            self.load_state(filter_id, state_key, decode(data))
        return self.get_state(filter_id)

    def get_state(self, filter_id: str) -> Any:
        """The state of a filter, as :meth:`run` hands it to the function; None if there is none."""
        present = self._states.get(filter_id)
        return None if present is None else present[1].thaw()

    def get_chunk(self, chunk_key: CacheKey) -> Any:
        """The result under a key; None if it is not there. Counts as a hit or a miss."""
        _check_key(chunk_key)
        memory = self._memory
        held = memory.get(chunk_key.digest)
        if held is None:
            held = self._from_disk(memory, chunk_key)
            memory.count(held)
            if held is None:
                return None
        return held.value.thaw()

    def put_chunk(self, chunk_key: CacheKey, value: object) -> None:
        """Keep a result under a key, in place of what was there. Raises TypeError for what cannot be copied."""
        _check_key(chunk_key)
        self._keep(self._memory, chunk_key, Held(freeze(value)))

    def key_of(
        self,
        filter_id: str,
        function: Callable[[Any, Any], Any],
        chunk: object,
        *,
        config: object = None,
        version: object = None,
        chunk_key: CacheKey | None = None,
    ) -> CacheKey:
        """The key under which :meth:`run` keeps its result, with the state that the filter has now."""
        return _key_of(self._states.get(filter_id), function, chunk_key or CacheKey.of(chunk), config, version)

    def run(
        self,
        filter_id: str,
        function: Callable[[Any, Any], Any],
        chunk: object,
        *,
        config: object = None,
        version: object = None,
        chunk_key: CacheKey | None = None,
    ) -> Any:
        """The result of ``function(state, chunk)``, computed if it is not there yet.

        ``state`` is what was loaded for the filter, None if nothing was; it and the chunk are the function's to read,
        not to change. However many threads ask at once, one computes; what it raises, all raise, and the next to ask
        computes anew.

        In the key: ``config`` and the chunk, by value (see :meth:`CacheKey.of`); the key of the state; the function's
        module and qualified name, and ``version``. Where there is no version, the function's compiled body stands for
        it, with the plain values (numbers, text, bytes, None) that it has as defaults or from an enclosing function;
        where there is one, results outlive another body, and another Python. ``chunk_key`` stands for the chunk, if
        its digest is known, and saves reading it.

        Not in the key: the ``filter_id``, globals, other functions that the body calls, other objects that it takes
        from around it, libraries, files, time, chance. What the result depends on belongs into ``config`` or
        ``version``. A bound method, a ``functools.partial`` or an object that can be called needs a version.

        Raises TypeError for what has no key, and for a result that cannot be copied.
        """
        loaded = self._states.get(filter_id)
        key = _key_of(loaded, function, chunk_key or CacheKey.of(chunk), config, version)

        def compute() -> Held:
            state = None if loaded is None else loaded[1].thaw()
            began = self._clock()
            value = function(state, chunk)
            return Held(freeze(value), self._clock() - began)

        return self._once(key, compute).value.thaw()

    @property
    def hits(self) -> int:
        """How often a result was there."""
        return self.stats().hits

    @property
    def misses(self) -> int:
        """How often it was not."""
        return self.stats().misses

    @property
    def hit_rate(self) -> float:
        """Hits among all questions, 0 before the first."""
        return self.stats().hit_rate

    def stats(self) -> StreamCacheStats:
        """The figures of this moment, this process's alone."""
        return self._memory.stats(len(self._states))

    def clear(self) -> None:
        """Forget all results, in memory and on the disk. States stay, counters go on.

        Of those that are being computed, each goes to whoever asked before, and is not kept. Raises CacheError.
        """
        self._memory.clear()
        if self._disk is not None:
            try:
                self._disk.store.clear()
            finally:
                self._memory.clear()  # of what was still read from the disk

    def _once(self, key: CacheKey, compute: Callable[[], Held]) -> Held:
        """What is there, or what one thread finds or computes while the others wait for it."""
        memory = self._memory
        while True:
            held = memory.get(key.digest) or self._join(memory, key, compute)
            if held is not None:
                return held

    def _join(self, memory: MemoryTier, key: CacheKey, compute: Callable[[], Held]) -> Held | None:
        """The result, waited for or computed; None if whoever was at it was interrupted."""
        mine, found = Flight(), None
        try:
            found = memory.join(key.digest, mine)
            if isinstance(found, Held):
                return found
            if found is mine:
                mine.held = self._found_or_computed(memory, key, compute)
                return mine.held
            if found.leader == mine.leader:  # the function asks for what it is about to give
                memory.count(None)
                return compute()
            return self._awaited(memory, found)
        except Exception as error:
            mine.error = error
            raise
        finally:
            mine.land()
            memory.leave(key.digest, mine)
            del mine, found  # an error holds this frame, which must not hold the error

    def _found_or_computed(self, memory: MemoryTier, key: CacheKey, compute: Callable[[], Held]) -> Held:
        epoch = memory.epoch
        held = self._from_disk(memory, key)
        memory.count(held)
        if held is None:
            held = compute()
            self._keep(memory, key, held, epoch)
        return held

    def _awaited(self, memory: MemoryTier, flight: Flight) -> Held | None:
        try:
            held = flight.outcome()
        except Exception:
            memory.count(None)
            raise
        finally:
            del flight
        if held is not None:
            memory.count(held)
        return held

    def _from_disk(self, memory: MemoryTier, key: CacheKey) -> Held | None:
        disk = self._disk
        if disk is None:
            return None
        with disk.turn(key):
            epoch = memory.epoch
            held = memory.peek(key.digest)  # by now
            if held is None:
                held = disk.get(key)
                if held is not None:
                    memory.put(key.digest, held, epoch)
            return held

    def _keep(self, memory: MemoryTier, key: CacheKey, held: Held, epoch: int | None = None) -> None:
        disk = self._disk
        if disk is None:
            memory.put(key.digest, held, epoch)
            return
        with disk.turn(key):
            disk.put(key, held)
            if not memory.put(key.digest, held, epoch):
                disk.remove(key)


def _key_of(
    loaded: tuple[CacheKey, Frozen] | None,
    function: Callable[..., Any],
    chunk_key: CacheKey,
    config: object,
    version: object,
) -> CacheKey:
    configured = function_key(function, version)
    if config is not None:
        configured = CacheKey.from_parts(configured.digest, CacheKey.of(config).digest)
    return CacheKey.for_chunk(configured, b"" if loaded is None else loaded[0], chunk_key)


def _check_key(key: object) -> None:
    if not isinstance(key, CacheKey):
        raise TypeError(f"a CacheKey is wanted here, not {type(key).__name__}: CacheKey.of makes one of a value")


def _size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"StreamCache.{name} must be a whole number, 0 or more, not {value!r}")
    return value
