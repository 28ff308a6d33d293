"""Fragments that are at hand: in memory, and on the disk with what the server said of them.

::

    root/entries/<2 hex>/<64 hex>.json    what the network said, named by the SHA-256 of the key
    root/blobs/…                          the bytes (see blobs)

The file system is the index: there is no database, and no lock is needed for right answers, only to save work. Whoever
reads finds the old entry, the new one, or none. An entry names its bytes by their digest, so that equal bytes from
several places are stored once. A disk that fails costs speed, never an answer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from ..config import CacheConfig
from ..errors import CacheError
from ..values import RangeRequest, Validator
from .blobs import BlobStore, Buffer, PartFile, digest_of, flat, opened, read_all, scan, translated
from .freshness import Freshness, State, is_same_entity, kept, refreshed

__all__ = ["CacheEntry", "CacheStats", "FragmentCache"]

_log = logging.getLogger("holotensor_net.cache")

_SCHEMA = 1
_MOST_ENTRY_BYTES = 1 << 20
_ORPHANED_AFTER = 3600.0  # seconds without a write, for part files of other processes
_ENTRY_DUE_WITHIN = 60.0  # seconds from publishing a blob
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class CacheEntry:
    """What is known of one cached fragment. Sizes in bytes, times in seconds since the epoch.

    ``byte_range`` is the part that it is of an object of ``object_size`` bytes; None: all of it. ``url`` is kept as
    given: redact it first. Of ``headers`` only those are kept that say how long, and for whom, the bytes are good.
    ``requested_at`` and ``received_at`` are the times of the answer (None: ``cached_at``); ``stamp`` is the blob's file
    time when its bytes were known to be right.
    """

    fragment_id: str
    size: int
    etag: str | None = None
    last_modified: str | None = None
    cached_at: float = 0.0
    last_accessed: float = 0.0
    access_count: int = 0
    _: KW_ONLY
    digest: str | None = None
    url: str | None = None
    byte_range: RangeRequest | None = None
    object_size: int | None = None
    validator_is_strong: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    requested_at: float | None = None
    received_at: float | None = None
    stamp: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", kept(self.headers))

    @property
    def validator(self) -> Validator:
        return Validator(self.etag, self.last_modified, self.validator_is_strong)

    @property
    def freshness(self) -> Freshness:
        received = self.cached_at if self.received_at is None else self.received_at
        return Freshness(self.headers, received if self.requested_at is None else self.requested_at, received)

    def eviction_score(self, now: float) -> float:
        """How dispensable it is: seconds without use over the number of uses. The highest goes first."""
        return (max(0.0, now - self.last_accessed) + 1.0) / (1.0 + self.access_count)

    def used(self, count: int, last: float) -> CacheEntry:
        """This entry after ``count`` more uses, the last of them at ``last``."""
        return replace(self, access_count=self.access_count + count, last_accessed=max(self.last_accessed, last))

    def confirmed(self, headers: Mapping[str, str], requested_at: float, received_at: float) -> CacheEntry | None:
        """This entry as a 304 leaves it; None if the 304 speaks of another version (RFC 9111 §4.3.4).

        The validator stays that of the bytes.
        """
        etag, modified = headers.get("etag"), headers.get("last-modified")
        if etag is not None and self.etag is not None:
            if not is_same_entity(etag, self.etag):
                return None
        elif None not in (modified, self.last_modified) and modified != self.last_modified:
            return None
        merged = refreshed(self.headers, headers)
        return replace(self, headers=merged, requested_at=requested_at, received_at=received_at)


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


class FragmentCache:
    """Bytes by key, from memory or from the disk; a context manager that writes its statistics when closed.

    A key is any string; its hash names the file. Nothing that is stored can be changed through what was put in or
    handed out, and a view stays valid whatever is evicted. Reading never needs to write, so that a read-only folder
    serves. Thread-safe, and safe beside other processes. ``clock`` gives seconds since the epoch.
    """

    def __init__(self, config: CacheConfig | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.config = config or CacheConfig()
        self._clock = clock
        self._memory = _MemoryTier(self.config.memory_size)
        self._usage = _Usage()
        self._warned: set[object] = set()
        root = self.config.root
        self._disk = None if root is None else _DiskTier(root, self.config.max_size, self._usage, clock)

    def __enter__(self) -> FragmentCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def get(self, key: str) -> memoryview | None:
        """The bytes, read-only; None if they are not there. :meth:`needs_revalidation` tells if they may be old."""
        name = _name_of(key)
        held = self._memory.get(name) or self._from_disk(name)
        if held is None:
            self._usage.miss()
            return None
        self._usage.hit(name, self._clock())
        return held.view

    def put(self, key: str, data: Buffer, entry: CacheEntry | None = None) -> memoryview:
        """Store a copy of the bytes; gives a read-only view of it. A disk that fails is logged; memory has to do."""
        row = flat(data)
        entry = replace(entry or CacheEntry(key, 0), size=len(row), digest=digest_of(row))
        with self._tolerant():
            part = self.create(entry.size)
            if part is not None:
                with part:
                    part.write(0, row)
                    return self.adopt(key, part, entry)
        return self._keep(key, entry, memoryview(data if type(data) is bytes else bytes(row)))

    def create(self, size: int | None) -> PartFile | None:
        """A part file for :meth:`adopt`, of ``size`` bytes if that is known; None where the disk does not take part.

        Raises CacheError, or InsufficientDisk if there is no room.
        """
        if self._disk is None or (size or 0) > self.config.max_size:
            return None
        return self._disk.blobs.create(size)

    def adopt(self, key: str, part: PartFile, entry: CacheEntry) -> memoryview:
        """Publish a part file that is complete; gives a read-only view of it. The caller answers for ``entry.digest``.

        A disk that fails is logged, and the view holds all the same. Raises CacheError if the sizes differ.
        """
        with part:
            if part.size != entry.size:
                raise CacheError(f"the part file has {part.size} bytes, its entry says {entry.size}: fetch it again")
            view = part.view()
            return self._keep(key, replace(entry, digest=entry.digest or digest_of(view)), view, part)

    def get_entry(self, key: str) -> CacheEntry | None:
        """What is known of a fragment, its latest uses included."""
        name = _name_of(key)
        entry = self._entry(name)
        return None if entry is None else self._usage.applied(name, entry)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._entry(_name_of(key)) is not None

    def __iter__(self) -> Iterator[CacheEntry]:
        for name in self._names():
            entry = self._entry(name)
            if entry is not None:
                yield self._usage.applied(name, entry)

    def needs_revalidation(self, key: str, etag: str | None = None) -> bool:
        """Whether the server must be asked before the bytes are used: not if ``etag``, its present one, is theirs."""
        entry = self._entry(_name_of(key))
        if entry is None:
            return True
        if etag is not None:
            return not is_same_entity(etag, entry.etag)
        return entry.freshness.state(self._clock()) is not State.FRESH

    def revalidated(self, key: str, headers_of_304: Mapping[str, str], *, requested_at: float | None = None) -> bool:
        """Take a 304 into the entry; False, and nothing is freshened, if it speaks of other bytes than those at hand.

        ``requested_at``: when the server was asked; None: now.
        """
        name, now = _name_of(key), self._clock()
        entry = self._entry(name)
        if entry is not None:
            entry = entry.confirmed(headers_of_304, now if requested_at is None else requested_at, now)
        if entry is None:
            return False
        if not entry.freshness.is_storable:
            self.remove(key)
            return True
        self._memory.update(name, entry)
        if self._disk is not None:
            with self._tolerant():
                self._disk.rewrite(name, entry)
        return True

    def remove(self, key: str) -> bool:
        """Forget a fragment; whether there was one. Its bytes go with the last entry that names them."""
        name = _name_of(key)
        existed = self._entry(name) is not None
        self._forget([name])
        if self._disk is not None:
            with self._tolerant():
                self._disk.remove(name)
        return existed

    def clear(self) -> None:
        """Forget everything. Views that are held stay valid; counters go on. Raises CacheError."""
        self._forget(self._names())
        if self._disk is not None:
            self._disk.clear()

    def prune(self, max_size: int) -> int:
        """Evict until at most ``max_size`` bytes are on the disk; gives the bytes freed. Raises CacheError."""
        if self._disk is None:
            return 0
        dropped, freed = self._disk.shrink(max_size)
        self._forget(dropped)
        return freed

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
            with self._tolerant():
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
            with self._tolerant():
                self._disk.note(name, count, last)
        with self._tolerant():
            self._disk.collect()

    def close(self) -> None:
        """:meth:`sync`, and let go of what is held in memory."""
        self.sync()
        self._memory.clear()

    def _names(self) -> set[str]:
        names = self._memory.names()
        if self._disk is not None:
            with self._tolerant():
                names |= self._disk.entries.names()
        return names

    def _entry(self, name: str) -> CacheEntry | None:
        held = self._memory.get(name)
        if held is not None:
            return held.entry
        if self._disk is not None:
            with self._tolerant():
                return self._disk.entry(name)
        return None

    def _from_disk(self, name: str) -> _Held | None:
        if self._disk is not None:
            with self._tolerant():
                held = self._disk.get(name)
                if held is not None:
                    self._memory.put(name, held)
                return held
        return None

    def _keep(self, key: str, entry: CacheEntry, view: memoryview, part: PartFile | None = None) -> memoryview:
        """Let both tiers take the bytes, as far as they may and can."""
        name, now = _name_of(key), self._clock()
        received = now if entry.received_at is None else entry.received_at
        requested = received if entry.requested_at is None else entry.requested_at
        entry = replace(entry, cached_at=now, last_accessed=now, received_at=received, requested_at=requested)
        if not entry.freshness.is_storable:
            self.remove(key)
            return view
        self._usage.forget(name)
        held = _Held(entry, view)
        if self._disk is not None and part is not None and entry.size <= self.config.max_size:
            with self._tolerant():
                held, dropped = self._disk.adopt(name, part, entry)
                self._forget(dropped)
        self._memory.put(name, held)
        return held.view

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._memory.drop(name)
            self._usage.forget(name)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A disk that fails is worth a line in the log, one for each cause, and no more."""
        try:
            yield
        except CacheError as error:
            cause = type(error), getattr(error.__cause__, "errno", None)
            if cause not in self._warned:
                self._warned.add(cause)
                _log.warning("the disk cache does not take part: %s", error)


@dataclass(frozen=True, slots=True)
class _Held:
    """An entry with its bytes."""

    entry: CacheEntry
    view: memoryview


class _Counting(LRUCache[str, _Held]):
    """The least recently used goes first, and is counted."""

    evictions = 0

    def popitem(self) -> tuple[str, _Held]:
        self.evictions += 1
        return super().popitem()


class _MemoryTier:
    """The entries used last, as many as fit into ``limit`` bytes; 0 for none. The lock guards the LRU."""

    def __init__(self, limit: int) -> None:
        # An empty fragment counts as a byte: no number of them shall fit into nothing.
        self._held = _Counting(limit, getsizeof=lambda held: max(1, held.view.nbytes))
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return int(self._held.currsize)

    @property
    def evictions(self) -> int:
        return self._held.evictions

    def get(self, name: str) -> _Held | None:
        with self._lock:
            return self._held.get(name)

    def put(self, name: str, held: _Held) -> None:
        """Hold it, or, where it is too large, at least not what was there before."""
        with self._lock:
            self._held.pop(name, None)
            with contextlib.suppress(ValueError):
                self._held[name] = held

    def update(self, name: str, entry: CacheEntry) -> None:
        """Replace what is known of bytes that are held; do nothing if they are not, or are others by now."""
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.entry.digest == entry.digest:
                self._held[name] = _Held(entry, held.view)

    def drop(self, name: str) -> None:
        with self._lock:
            self._held.pop(name, None)

    def clear(self) -> None:
        with self._lock:
            self._held.clear()

    def names(self) -> set[str]:
        with self._lock:
            return set(self._held)


class _Usage:
    """Hits, misses and evictions, and the uses of entries that their files do not tell of yet. The lock guards all."""

    def __init__(self) -> None:
        self._hits = self._misses = self._evictions = 0
        self._uses: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def hit(self, name: str, now: float) -> None:
        with self._lock:
            self._hits += 1
            self._uses[name] = (self._uses.get(name, (0, 0.0))[0] + 1, now)

    def miss(self) -> None:
        with self._lock:
            self._misses += 1

    def evicted(self, count: int) -> None:
        with self._lock:
            self._evictions += count

    def forget(self, name: str) -> None:
        with self._lock:
            self._uses.pop(name, None)

    def applied(self, name: str, entry: CacheEntry) -> CacheEntry:
        """The entry with its latest uses."""
        with self._lock:
            uses = self._uses.get(name)
        return entry.used(*uses) if uses else entry

    def take(self) -> list[tuple[str, tuple[int, float]]]:
        """Each entry's uses, their number and the last one's time, least recent first; they count as written now."""
        with self._lock:
            uses, self._uses = self._uses, {}
        return sorted(uses.items(), key=lambda item: item[1][1])

    def totals(self) -> tuple[int, int, int]:
        with self._lock:
            return self._hits, self._misses, self._evictions


class _EntryFiles:
    """One small JSON file for each entry; its modification time is when the entry was last used.

    What cannot be understood (torn, garbled, of a newer schema) is set aside and counts as absent. Raises CacheError.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._folder = blobs.root / "entries"

    def path_of(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.json"

    def names(self) -> set[str]:
        """The names of all entries."""
        with translated("look for entries", self._blobs.root):
            files = (item.name for folder in scan(self._folder) for item in scan(Path(folder.path)))
            return {match[1] for name in files if (match := _NAME.fullmatch(name))}

    def read(self, name: str) -> CacheEntry | None:
        path = self.path_of(name)
        with translated("read an entry", self._blobs.root):
            try:
                with opened(path) as (fd, status):
                    entry = _unpacked(read_all(fd, min(status.st_size, _MOST_ENTRY_BYTES)))
                    return replace(entry, last_accessed=status.st_mtime)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except _Garbled:
                pass
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        self._blobs.set_aside(path)
        return None

    def write(self, name: str, entry: CacheEntry, *, durable: bool = True) -> None:
        data = _packed(entry)
        with self._blobs.create(len(data)) as part:
            part.write(0, data)
            part.publish_as(self.path_of(name), durable=durable)
        self.touch(name, entry.last_accessed)

    def touch(self, name: str, when: float) -> None:
        """Note when the entry was last used, where that may be written."""
        with contextlib.suppress(OSError):
            os.utime(self.path_of(name), (when, when), follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """Whether the entry is gone now."""
        try:
            self.path_of(name).unlink(missing_ok=True)
        except OSError:
            return False
        return True


class _Ledger:
    """Which blobs lie on the disk, and how large they are: counted when that is first asked for, then kept up.

    What other processes do shows at the next count. Blobs that are pinned are being adopted; loose ones have lost an
    entry. The lock guards the collections.
    """

    def __init__(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self.is_counted = False
        self._count = count
        self._sizes: dict[str, int] = {}
        self._recent: dict[str, int] = {}
        self._total = 0
        self._pins: Counter[str] = Counter()
        self._loose: set[str] = set()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return self._total

    def recount(self) -> None:
        """Look at the disk; what is added meanwhile counts too. Not for two threads at once."""
        with self._lock:
            self._recent = {}
        counted = dict(self._count())
        with self._lock:
            self._sizes = {**counted, **self._recent}
            self._total = sum(self._sizes.values())
            self.is_counted = True

    def add(self, digest: str, size: int) -> None:
        with self._lock:
            self._total += size - self._sizes.get(digest, 0)
            self._sizes[digest] = self._recent[digest] = size
            self._loose.discard(digest)

    def drop(self, digest: str) -> int:
        """Strike the blob out; gives the size it had."""
        with self._lock:
            self._recent.pop(digest, None)
            self._loose.discard(digest)
            size = self._sizes.pop(digest, 0)
            self._total -= size
            return size

    def loosen(self, digest: str) -> None:
        with self._lock:
            self._loose.add(digest)

    @contextlib.contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        """Keep the blob while it is being adopted."""
        with self._lock:
            self._pins[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pins -= Counter((digest,))

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def digests(self) -> list[str]:
        with self._lock:
            return list(self._sizes)

    def loose(self) -> set[str]:
        with self._lock:
            return set(self._loose)


class _DiskTier:
    """Entries over blobs, within ``max_size`` bytes. The lock lets one thread at a time sweep. Raises CacheError."""

    def __init__(self, root: Path, max_size: int, usage: _Usage, clock: Callable[[], float]) -> None:
        self.blobs = BlobStore(root)
        self.entries = _EntryFiles(self.blobs)
        self._max_size = max_size
        self._usage = usage
        self._clock = clock
        self._ledger = _Ledger(self.blobs.digests)
        self._sweeping = threading.Lock()

    def entry(self, name: str) -> CacheEntry | None:
        """What is known of bytes that are there; None without them."""
        entry = self.entries.read(name)
        return entry if entry is not None and self.blobs.has(_digest_in(entry), entry.size) else None

    def get(self, name: str) -> _Held | None:
        entry = self.entries.read(name)
        if entry is None:
            return None
        view = self.blobs.open(_digest_in(entry), entry.size, stamp=entry.stamp)
        if view is None:
            self.entries.remove(name)
            return None
        self.entries.touch(name, self._clock())
        return _Held(entry, view)

    def adopt(self, name: str, part: PartFile, entry: CacheEntry) -> tuple[_Held, list[str]]:
        """Publish blob and entry, then make room; gives the names of entries that had to go."""
        digest = _digest_in(entry)
        if not self._ledger.is_counted:
            self.blobs.sweep(_ORPHANED_AFTER)
        with self._ledger.pinned(digest):
            held = self._publish(name, part, entry)
            self._ledger.add(digest, entry.size)
            dropped: list[str] = []
            if self.size() > self._max_size:
                # A little more than needed, so that not every fragment to come sweeps again.
                dropped, _ = self.shrink(self._max_size - self._max_size // 16, only_above=self._max_size)
        return held, dropped

    def rewrite(self, name: str, entry: CacheEntry) -> None:
        """Replace what is known of bytes that are there."""
        if self.entry(name) is not None:
            self.entries.write(name, entry)

    def note(self, name: str, count: int, last: float) -> None:
        """Add uses to the entry. They are not worth waiting for the disk."""
        entry = self.entries.read(name)
        if entry is not None:
            self.entries.write(name, entry.used(count, last), durable=False)

    def remove(self, name: str) -> None:
        entry = self.entries.read(name)
        if entry is not None and self.entries.remove(name):
            self._ledger.loosen(_digest_in(entry))
            self.collect()

    def size(self) -> int:
        """Bytes of all blobs."""
        if not self._ledger.is_counted:
            with self._sweeping:
                self._ledger.recount()
        return self._ledger.size

    def collect(self) -> None:
        """Delete blobs that no entry names any more."""
        if self._ledger.loose():
            with self._sweeping:
                self._sweep_orphans(Counter(_digest_in(entry) for _, entry in self._all()))

    def shrink(self, limit: int, *, only_above: int = 0) -> tuple[list[str], int]:
        """Drop the most dispensable entries until ``limit`` bytes are left, if there are more than ``only_above``.

        Gives the names of the entries dropped, and the number of bytes freed.
        """
        with self._sweeping:
            self.blobs.sweep(_ORPHANED_AFTER)
            self._ledger.recount()
            if self._ledger.size <= only_above:
                return [], 0
            now, marked = self._clock(), list(self._all())
            references = Counter(_digest_in(entry) for _, entry in marked)
            freed = self._sweep_orphans(references)
            if self._ledger.size > limit:
                freed += self._sweep_orphans(references, older_than=-math.inf)
            marked.sort(key=lambda item: self._usage.applied(*item).eviction_score(now))
            dropped = []
            while marked and self._ledger.size > limit:
                name, entry = marked.pop()
                digest = _digest_in(entry)
                if self._ledger.is_pinned(digest) or not self.entries.remove(name):
                    continue
                dropped.append(name)
                references[digest] -= 1
                if not references[digest]:
                    freed += self._delete(digest)
        self._usage.evicted(len(dropped))
        return dropped, freed

    def verify(self) -> dict[str, str]:
        """Drop entries that cannot be read, or whose bytes are damaged or gone; gives their names and fragment ids."""
        broken: dict[str, str] = {}
        sound: dict[tuple[str, int], bool] = {}
        for name in self.entries.names():
            entry = self.entries.read(name)
            blob = (_digest_in(entry), entry.size) if entry is not None else ("", 0)
            if entry is not None and blob not in sound:
                sound[blob] = self.blobs.check(*blob)
            if entry is None or not sound[blob]:
                self.entries.remove(name)
                broken[name] = name if entry is None else entry.fragment_id
        if broken and self._ledger.is_counted:
            with self._sweeping:
                self._ledger.recount()
        return broken

    def clear(self) -> None:
        with self._sweeping:
            for name in self.entries.names():
                self.entries.remove(name)
            self._ledger.recount()
            for digest in self._ledger.digests():
                if not self._ledger.is_pinned(digest):
                    self._delete(digest)

    def _publish(self, name: str, part: PartFile, entry: CacheEntry) -> _Held:
        digest = _digest_in(entry)
        is_new, before = not self.blobs.has(digest, entry.size), self.entries.read(name)
        view = part.publish(digest)
        entry = replace(entry, stamp=self.blobs.stamp(digest))
        try:
            self.entries.write(name, entry)
        except CacheError:
            if is_new:
                self.blobs.remove(digest)
            raise
        if before is not None and before.digest != digest:
            self._ledger.loosen(_digest_in(before))
        return _Held(entry, view)

    def _all(self) -> Iterator[tuple[str, CacheEntry]]:
        for name in self.entries.names():
            entry = self.entries.read(name)
            if entry is not None:
                yield name, entry

    def _sweep_orphans(self, references: Counter[str], older_than: float = _ENTRY_DUE_WITHIN) -> int:
        """Delete blobs without an entry, unless another process may be about to write it; gives the bytes freed."""
        loose, freed = self._ledger.loose(), 0
        for digest in loose.union(self._ledger.digests()):
            if references[digest] or self._ledger.is_pinned(digest):
                continue
            if digest in loose or self.blobs.age_of(digest) > older_than:
                freed += self._delete(digest)
        return freed

    def _delete(self, digest: str) -> int:
        return self._ledger.drop(digest) if self.blobs.remove(digest) else 0


class _Garbled(Exception):
    """An entry file that cannot be understood."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_moment(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _or_none(is_sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_sound(value)


_PLAIN_FIELDS: dict[str, Callable[[Any], bool]] = {
    "fragment_id": _is_text,
    "size": _is_count,
    "digest": _is_digest,
    "etag": _or_none(_is_text),
    "last_modified": _or_none(_is_text),
    "validator_is_strong": lambda value: isinstance(value, bool),
    "url": _or_none(_is_text),
    "object_size": _or_none(_is_count),
    "cached_at": _is_moment,
    "access_count": _is_count,
    "stamp": _or_none(_is_count),
}


def _packed(entry: CacheEntry) -> bytes:
    """The entry as JSON."""
    span = entry.byte_range
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        **{name: getattr(entry, name) for name in _PLAIN_FIELDS},
        "byte_range": None if span is None else [span.start, span.stop],
        "freshness": entry.freshness.to_json(),
    }
    return json.dumps({**data, "check": _check(data)}).encode()


def _unpacked(text: bytes) -> CacheEntry:
    """The entry that :func:`_packed` wrote. Raises _Garbled for anything else."""
    try:
        data = json.loads(text)
        check = data.pop("check")
        if data["schema"] != _SCHEMA or check != _check(data):
            raise _Garbled
        plain = {name: data[name] for name in _PLAIN_FIELDS}
        if not all(is_sound(plain[name]) for name, is_sound in _PLAIN_FIELDS.items()):
            raise _Garbled
        span = None if data["byte_range"] is None else RangeRequest(*data["byte_range"])
        freshness = Freshness.from_json(data["freshness"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CacheError) as error:
        raise _Garbled from error
    return CacheEntry(
        **plain,
        byte_range=span,
        headers=freshness.headers,
        requested_at=freshness.request_time,
        received_at=freshness.response_time,
    )


def _check(data: dict[str, Any]) -> str:
    """A checksum over an entry: rot that leaves it readable shall not bless the wrong bytes."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _name_of(key: str) -> str:
    """A file name for any key: long ones, and such as hold slashes or lone surrogates."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_in(entry: CacheEntry) -> str:
    return entry.digest or ""
