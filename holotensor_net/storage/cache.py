"""Fragments that are at hand: in memory, and on the disk with what the server said of them.

::

    root/entries/<2 hex>/<64 hex>.json    what the network said, named by the SHA-256 of the key
    root/blobs/…                          the bytes (see blobs)
    root/claims                           an empty file, whose bytes are locked (see claims)
    root/news                             what was added and deleted of late (see news)

The file system is the index: there is no database, and no lock is needed for right answers, only to save work. Whoever
reads finds the old entry, the new one, or none. An entry names its bytes by their digest, so that equal bytes from
several places are stored once. A disk that fails costs speed, never an answer.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cachetools import LRUCache

from ..config import CacheConfig, NetworkConfig
from ..errors import CacheError, ConfigurationError
from ..forks import renew_in_children
from ..values import must_be
from .claims import Claims
from .disk import DiskTier
from .entries import CacheEntry, Held, Usage
from .files import Buffer, digest_of, fixed, flat
from .freshness import State, is_same_entity
from .parts import PartFile

__all__ = ["CacheEntry", "CacheStats", "FragmentCache", "name_of"]

_log = logging.getLogger("holotensor_net.cache")

_LARGEST_BUFFER = 0.125
"""Share of the memory tier: of a buffer that would take more, parts are copied."""

_MOST_COPIED = 0.5
"""Share of a buffer: what is more of it is not worth a copy. Buffers are of whole pages, and most fragments are not."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A moment's figures. Sizes in bytes; ``evictions``: entries that had to go for lack of room."""

    entries: int = 0
    disk_size: int = 0
    memory_size: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among all questions, 0 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits else 0.0


def _unheard(name: str) -> None:
    pass


class FragmentCache:
    """Bytes by key, from memory or from the disk; a context manager that writes its statistics when closed.

    A key is any string; its hash names the file. Nothing that is stored can be changed through what was put in or
    handed out, and a view stays valid whatever is evicted. Reading never needs to write, so that a read-only folder
    serves. Thread-safe, and safe beside other processes; in a child of a fork it goes on with an empty memory and new
    counters. ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self, config: CacheConfig | NetworkConfig | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        if config is not None:
            must_be("config", config, CacheConfig, NetworkConfig)
        self.config = config.cache if isinstance(config, NetworkConfig) else config or CacheConfig()
        self._clock = clock
        root = self.config.root
        self._root = None if root is None else fixed(root)
        self._open()
        renew_in_children(self)

    def _open(self) -> None:
        """Everything that has locks."""
        root = self._root
        self._usage = Usage()
        self._tolerant = _Tolerance()
        # Where there is a disk, uses are written to it, though memory has let go of the bytes.
        self._memory = _MemoryTier(self.config.memory_size, self._usage.forget if root is None else _unheard)
        self._name = _itself if root is None else name_of  # nothing but files needs names that are short and harmless
        self.claims = None if root is None else Claims(root / "claims")
        self._forget = functools.partial(_forget, self._memory, self._usage)  # no method: no cycle
        self._disk = None if root is None else DiskTier(root, self.config, self._usage, self._clock, self._forget)

    def __enter__(self) -> FragmentCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def get(self, key: str, entry: CacheEntry | None = None) -> memoryview | None:
        """The bytes, read-only; None if they are not there. :meth:`needs_revalidation` tells if they may be old.

        With the ``entry`` that :meth:`find` gave, they are those of that version, and it is not read again.
        """
        name = self._name(key)
        held = self._memory.get(name)
        if held is None:
            held = self._from_disk(name, entry)
            if held is not None:
                self._memory.put(name, held)
        elif entry is not None and held.entry.version != entry.version:
            held = self._from_disk(name, entry)
        if held is None:
            self._usage.miss()
            return None
        self._usage.hit(name, self._clock())
        return held.view[:]  # a view of the caller's own, which may be released

    def put(self, key: str, data: Buffer, entry: CacheEntry | None = None) -> memoryview:
        """Store a copy of the bytes; gives a read-only view of it. A disk that fails is logged; memory has to do."""
        if entry is not None:
            must_be("entry", entry, CacheEntry)
        row = flat(data)
        own = memoryview(data if type(data) is bytes else bytes(row))
        return self.take(key, own, replace(entry or CacheEntry(key, 0), size=len(row), digest=digest_of(row)))

    def take(self, key: str, data: memoryview, entry: CacheEntry) -> memoryview:
        """:meth:`put` without a copy, of bytes that nobody will change. The caller answers for ``entry.digest``.

        Raises CacheError if the sizes differ.
        """
        if len(data) != entry.size:
            raise CacheError(f"there are {len(data)} bytes, their entry says {entry.size}: fetch them again")
        if self._disk is not None and entry.digest is None:
            entry = replace(entry, digest=digest_of(data))
        return self._keep(key, entry, data.toreadonly(), data)

    def take_all(self, taken: Sequence[tuple[str, memoryview, CacheEntry]]) -> list[memoryview]:
        """:meth:`take` for each; where there is no disk, memory takes them at one go, and an entry that tells when it
        was cached as it is."""
        told = {id(entry.headers): entry for _, _, entry in taken}.values()  # parts of one answer share its headers
        is_plain = self._disk is None and all(entry.is_storable for entry in told)
        if not is_plain or not all(len(data) == entry.size for _, data, entry in taken):
            return [self.take(*each) for each in taken]
        now = self._clock()
        held = [
            (self._name(key), Held(entry if entry.cached_at else entry.stored(now), data.toreadonly()))
            for key, data, entry in taken
        ]
        for name, _ in held:
            self._usage.forget(name)
        self._memory.put_all(held)
        return [each.view[:] for _, each in held]

    def create(
        self, size: int | None, *, key: str | None = None, note: Mapping[str, Any] | None = None
    ) -> PartFile | None:
        """A part file for :meth:`adopt`, of ``size`` bytes if that is known; None where the disk does not take part.

        With a ``note``, what JSON can say, :meth:`resume` finds it by its ``key`` should it never be finished. Raises
        CacheError, or InsufficientDisk if there is no room.
        """
        if self._disk is None or (size or 0) > self.config.max_size:
            return None
        subject = "" if key is None else self._name(key)
        return self._disk.create(size, subject=subject, note=note if subject else None)

    def has_part(self, key: str) -> bool:
        """Whether there may be something to resume."""
        found = False
        if self._disk is not None:
            with self._tolerant:
                found = self._disk.blobs.has_part(self._name(key))
        return found

    def resume(self, key: str) -> tuple[PartFile, Mapping[str, Any]] | None:
        """The part file of a transfer that was never finished, the caller's from now on, and its note.

        Its first ``settled`` bytes have just been hashed and found right.
        """
        if self._disk is not None:
            with self._tolerant:
                return self._disk.blobs.resume(self._name(key))
        return None

    def has_appeared(self, name: str) -> bool:
        """Whether there is an entry on the disk, whatever it says; much faster than to read it."""
        return self._disk is not None and self._disk.entries.exists(name)

    def adopt(self, key: str, part: PartFile, entry: CacheEntry) -> memoryview:
        """Publish a part file that is complete; gives a read-only view of it. The caller answers for ``entry.digest``.

        A disk that fails is logged, and the view holds all the same: where bytes could not be flushed, it is of a copy
        in memory. Raises ChecksumMismatch if some are lost by then, CacheError if the sizes differ.
        """
        with part:
            if part.size != entry.size:
                raise CacheError(f"the part file has {part.size} bytes, its entry says {entry.size}: fetch it again")
            view = part.view()
            return self._keep(key, replace(entry, digest=entry.digest or part.digest()), view, part)

    def find(self, key: str, *, unseen: bool = False) -> CacheEntry | None:
        """What is known of a fragment; of its uses, what was written down. ``unseen``: without a look whether its bytes
        are there, for whoever wants them in any case."""
        return self._entry(self._name(key), unseen=unseen)

    def get_entry(self, key: str) -> CacheEntry | None:
        """What is known of a fragment, its latest uses included."""
        name = self._name(key)
        entry = self._entry(name)
        return None if entry is None else self._usage.applied(name, entry)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._entry(self._name(key)) is not None

    def __iter__(self) -> Iterator[CacheEntry]:
        """Every entry whose bytes are there; whether they have been cut or have rotted is for :meth:`verify` to say."""
        remembered = self._memory.names()
        for name in remembered:
            entry = self._entry(name)
            if entry is not None:
                yield self._usage.applied(name, entry)
        if self._disk is not None:
            with self._tolerant:
                for name, entry in self._disk.listed(remembered, self._tolerant.warn):
                    yield self._usage.applied(name, entry)

    def needs_revalidation(self, key: str, etag: str | None = None) -> bool:
        """Whether the server must be asked before the bytes are used: not if ``etag``, its present one, is theirs."""
        entry = self._entry(self._name(key))
        if entry is None:
            return True
        if etag is not None:
            return not is_same_entity(etag, entry.etag)
        return entry.freshness.state(self._clock(), self.config.heuristic_freshness) is not State.FRESH

    def revalidated(
        self,
        key: str,
        headers_of_304: Mapping[str, str],
        *,
        requested_at: float | None = None,
        known: CacheEntry | None = None,
    ) -> bool:
        """Take a 304 into the entry; False, and nothing is freshened, if it speaks of other bytes than those at hand.

        ``requested_at``: when the server was asked; None: now. ``known``: the entry whose version it was asked for.
        """
        name, now = self._name(key), self._clock()
        entry = self._entry(name)
        if entry is not None and known is not None and entry.version != known.version:
            return False  # another has come meanwhile
        if entry is not None:
            entry = entry.confirmed(headers_of_304, now if requested_at is None else requested_at, now)
        if entry is None:
            return False
        if not entry.freshness.is_storable:
            self.remove(key)
            return True
        self._memory.update(name, entry)
        if self._disk is not None:
            with self._tolerant:
                self._disk.rewrite(name, entry)
        return True

    def remove(self, key: str) -> bool:
        """Forget a fragment; whether there was one. Its bytes go with the last entry that names them."""
        name = self._name(key)
        existed = self._entry(name) is not None
        self._forget([name])
        if self._disk is not None:
            with self._tolerant:
                self._disk.remove(name)
        return existed

    def clear(self) -> None:
        """Forget everything. Views that are held stay valid; counters go on. Raises CacheError."""
        self._forget(self._names())
        if self._disk is not None:
            self._disk.clear()

    def prune(self, max_size: int) -> int:
        """Evict until at most ``max_size`` bytes are on the disk; gives the bytes freed. Raises CacheError, and
        ConfigurationError for a size that is none."""
        if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 0:
            raise ConfigurationError(f"max_size must be a whole number, 0 or more, not {max_size!r}")
        if self._disk is None:
            return 0
        return self._disk.shrink(max_size)

    def verify(self) -> list[str]:
        """Hash every blob on the disk, and drop the entries whose bytes are damaged; gives their fragment ids.

        An entry that cannot be read is named by its file. Raises CacheError.
        """
        if self._disk is None:
            return []
        broken = self._disk.verify()
        self._forget(broken)
        return list(broken.values())

    def stats(self) -> CacheStats:
        hits, misses, evictions = self._usage.totals()
        if self._disk is None:
            evictions += self._memory.evictions
        disk_size = 0
        if self._disk is not None:
            with self._tolerant:
                disk_size = self._disk.size()
        return CacheStats(len(self._names()), disk_size, self._memory.size, hits, misses, evictions)

    def sync(self) -> None:
        """Write how often and when entries were used, and delete blobs that no entry names any more."""
        if self._disk is None:
            return
        for name, (count, last) in self._usage.take():
            held = self._memory.get(name)
            if held is not None:
                self._memory.update(name, held.entry.used(count, last))
            with self._tolerant:
                self._disk.note(name, count, last)
        with self._tolerant:
            self._disk.tidy()

    def close(self) -> None:
        """:meth:`sync`, and let go of what is held in memory, and of claims."""
        self.sync()
        if self.claims is not None:
            self.claims.close()
        if self._disk is not None:
            self._disk.close()
        self._memory.clear()

    def _names(self) -> set[str]:
        names = self._memory.names()
        if self._disk is not None:
            with self._tolerant:
                names.update(self._disk.entries.names())
        return names

    def _entry(self, name: str, *, unseen: bool = False) -> CacheEntry | None:
        held = self._memory.get(name)
        if held is not None:
            return held.entry
        if self._disk is not None:
            with self._tolerant:
                return self._disk.entry(name, unseen=unseen)
        return None

    def _from_disk(self, name: str, known: CacheEntry | None) -> Held | None:
        if self._disk is not None:
            with self._tolerant:
                return self._disk.get(name, known)
        return None

    def _keep(self, key: str, entry: CacheEntry, view: memoryview, data: PartFile | memoryview) -> memoryview:
        """Let both tiers take the bytes, as far as they may and can."""
        name, now = self._name(key), self._clock()
        entry = entry.stored(now)
        if not entry.is_storable:
            self.remove(key)
            return _lasting(view, data, entry)
        self._usage.forget(name)
        held = Held(entry, view)
        if self._disk is not None and entry.size <= self.config.max_size:
            with self._tolerant:
                held = self._disk.adopt(name, data, entry)
        if held.view is view:
            held.view = _lasting(view, data, entry)
        self._memory.put(name, held)
        return held.view[:]


class _Tolerance:
    """A context in which a disk that fails is worth a line in the log, one for each cause, and no more."""

    def __init__(self) -> None:
        self._warned: set[object] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, CacheError):
            self.warn(error)
            return True
        return False

    def warn(self, error: CacheError) -> None:
        cause = type(error), getattr(error.__cause__, "errno", None)
        if cause not in self._warned:
            self._warned.add(cause)
            _log.warning("the disk cache does not take part: %s", error)


class _Buffer:
    """Memory that entries look into: one, or fragments that came together. All of it is there for as long as one of
    them is, and so it is used, counted and let go of as a whole."""

    __slots__ = ("held", "number", "size")

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.held: dict[str, Held] = {}


class _MemoryTier:
    """The buffers used last, as many as fit into ``limit`` bytes, by their entries; 0 for none. ``evicted`` is called
    with the name of each that had to go. The lock guards all."""

    def __init__(self, limit: int, evicted: Callable[[str], None] = _unheard) -> None:
        # An empty fragment counts as a byte: no number of them shall fit into nothing.
        self._buffers: LRUCache[int, _Buffer] = LRUCache(limit, getsizeof=lambda buffer: buffer.size or 1)
        self._by_name: dict[str, _Buffer] = {}
        self._latest: _Buffer | None = None
        self._lock = threading.Lock()
        self._evicted = evicted
        self.evictions = 0

    @property
    def size(self) -> int:
        return int(self._buffers.currsize)

    def get(self, name: str) -> Held | None:
        if name not in self._by_name:  # a glance without the lock
            return None
        with self._lock:
            buffer = self._by_name.get(name)
            if buffer is None:
                return None
            self._buffers.get(buffer.number)  # it is used
            return buffer.held[name]

    def put(self, name: str, held: Held) -> None:
        """Hold it, or, where it is too large, at least not what was there before."""
        self.put_all([(name, held)])

    def put_all(self, items: Iterable[tuple[str, Held]]) -> None:
        """:meth:`put` for each."""
        with self._lock:
            for name, held in items:
                latest = self._latest
                if latest is None or latest.number != id(held.view.obj) or not latest.held:
                    held, latest = self._placed(held)
                before = self._by_name.get(name)
                if before is not None and before is not latest:
                    self._remove(name, before)
                if latest is not None:
                    latest.held[name] = held
                    self._by_name[name] = latest
                self._latest = latest

    def _placed(self, held: Held) -> tuple[Held, _Buffer | None]:
        """Bytes in the buffer that is counted for them, None where it is too large. Of one that would take much of all
        the room, or more, a part is copied rather than that it keeps the whole, unless it is most of it."""
        known = self._buffers.get(id(held.view.obj))
        if known is not None:
            return held, known
        size, room = memoryview(held.view.obj).nbytes, self._buffers.maxsize
        most = size - 1 if size > room else _MOST_COPIED * size
        if size > room * _LARGEST_BUFFER and held.view.nbytes <= min(most, room):
            held = Held(held.entry, memoryview(bytes(held.view)))
            size = held.view.nbytes
            known = self._buffers.get(id(held.view.obj))  # there is but one object without bytes
            if known is not None:
                return held, known
        buffer = _Buffer(id(held.view.obj), size)
        if (size or 1) > self._buffers.maxsize:
            return held, None
        while self._buffers.currsize + (size or 1) > self._buffers.maxsize:
            _, oldest = self._buffers.popitem()
            self.evictions += len(oldest.held)
            self._forget(oldest)
        self._buffers[buffer.number] = buffer
        return held, buffer

    def _forget(self, buffer: _Buffer) -> None:
        for name in buffer.held:
            del self._by_name[name]
            self._evicted(name)
        buffer.held.clear()

    def _remove(self, name: str, buffer: _Buffer) -> None:
        del self._by_name[name], buffer.held[name]
        if not buffer.held:
            del self._buffers[buffer.number]

    def update(self, name: str, entry: CacheEntry) -> None:
        """Replace what is known of bytes that are held; do nothing if they are not, or are others by now."""
        with self._lock:
            buffer = self._by_name.get(name)
            if buffer is not None and buffer.held[name].entry.version == entry.version:
                buffer.held[name].entry = entry

    def drop(self, name: str) -> None:
        with self._lock:
            buffer = self._by_name.get(name)
            if buffer is not None:
                self._remove(name, buffer)

    def clear(self) -> None:
        with self._lock:
            for buffer in self._buffers.values():
                buffer.held.clear()
            self._by_name.clear()
            self._buffers.clear()

    def names(self) -> set[str]:
        with self._lock:
            return set(self._by_name)


def _lasting(view: memoryview, data: PartFile | memoryview, entry: CacheEntry) -> memoryview:
    """The view, or one of a copy in memory, if it is of a file that the disk may have lost bytes of."""
    if isinstance(data, PartFile) and not data.flush():
        return data.rescued(entry.digest or "")
    return view


def _forget(memory: _MemoryTier, usage: Usage, names: Iterable[str]) -> None:
    for name in names:
        memory.drop(name)
        usage.forget(name)


@functools.lru_cache(256)
def name_of(key: str) -> str:
    """A file name for any key: long ones, and such as hold slashes or lone surrogates."""
    must_be("key", key, str)
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _itself(key: str) -> str:
    must_be("key", key, str)
    return key
