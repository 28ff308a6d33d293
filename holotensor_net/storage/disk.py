"""The disk tier of the cache: entries over blobs, within a quota.

Eviction is mark and sweep over the entries. No lock is needed for right answers, only to save work.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import CacheError
from .blobs import BlobStore, is_worth_a_sync
from .entries import CacheEntry, EntryFiles, Held, Usage
from .parts import PartFile

__all__ = ["DiskTier", "Ledger"]

_ORPHANED_AFTER = 3600.0  # seconds without a write, for part files of other processes
_RESUMABLE_FOR = 86400.0  # seconds since a part file that can be resumed was left
_ENTRY_DUE_WITHIN = 60.0  # seconds from publishing a blob
_UNKNOWN_SHARE = 8.0


class Ledger:
    """Which blobs lie on the disk, and how large they are: counted when that is first asked for, then kept up.

    What other processes do shows at the next count. That is due the sooner the more they have been seen to add, and the
    less room is left, so that all together hardly go beyond the limit; who has seen nobody else counts when the room is
    used up. Blobs that are pinned are being adopted; loose ones have lost an entry. The lock guards the collections.
    """

    def __init__(self, count: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self.is_counted = False
        self._count = count
        self._sizes: dict[str, int] = {}
        self._recent: dict[str, int] = {}
        self._total = 0
        self._grown = 0  # bytes added since the count
        self._share = _UNKNOWN_SHARE  # bytes that others add while this process adds one
        self._pins: Counter[str] = Counter()
        self._loose: set[str] = set()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return self._total

    def recount(self) -> None:
        """Look at the disk; what is added meanwhile counts too. Not for two threads at once."""
        with self._lock:
            self._recent, known = {}, dict(self._sizes)
        counted = dict(self._count())
        foreign = sum(size for digest, size in counted.items() if digest not in known)
        with self._lock:
            foreign -= sum(self._recent[digest] for digest in self._recent.keys() & (counted.keys() - known.keys()))
            if self.is_counted and self._grown:
                self._share = max(foreign / self._grown, self._share / 2 if foreign else 0.0)
            self._grown = 0
            self._sizes = {**counted, **self._recent}
            self._total = sum(self._sizes.values())
            self.is_counted = True

    def add(self, digest: str, size: int) -> None:
        with self._lock:
            more = size - self._sizes.get(digest, 0)
            self._total += more
            self._grown += max(0, more)
            self._sizes[digest] = self._recent[digest] = size
            self._loose.discard(digest)

    def is_due(self, limit: int) -> bool:
        """Whether, for all that is known, others may have added so much that there are ``limit`` bytes."""
        with self._lock:
            return self.is_counted and self._total + 2 * self._share * self._grown > limit

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


class DiskTier:
    """Entries over blobs, within ``max_size`` bytes. The lock lets one thread at a time sweep. Raises CacheError."""

    def __init__(self, root: Path, max_size: int, usage: Usage, clock: Callable[[], float]) -> None:
        self.blobs = BlobStore(root)
        self.entries = EntryFiles(self.blobs)
        self._max_size = max_size
        self._usage = usage
        self._clock = clock
        self._ledger = Ledger(self.blobs.digests)
        self._sweeping = threading.Lock()
        with contextlib.suppress(CacheError):
            self.sweep()

    def entry(self, name: str) -> CacheEntry | None:
        """What is known of bytes that are there; None without them."""
        entry = self.entries.read(name)
        return entry if entry is not None and self.blobs.has(_digest_in(entry), entry.size) else None

    def get(self, name: str, known: CacheEntry | None = None) -> Held | None:
        """The bytes, of the version that is ``known``, if that was read before."""
        entry = known or self.entries.read(name)
        if entry is None:
            return None
        view = self.blobs.open(_digest_in(entry), entry.size, stamp=entry.stamp)
        if view is not None:
            self.entries.touch(name, self._clock())
            return Held(entry, view)
        present = entry if known is None else self.entries.read(name)
        if present is not None and present.digest == entry.digest:
            self.entries.remove(name)
        return None

    def adopt(self, name: str, data: PartFile | memoryview, entry: CacheEntry) -> tuple[Held, list[str]]:
        """Publish blob and entry, then make room; gives the names of entries that had to go."""
        digest = _digest_in(entry)
        with self._ledger.pinned(digest):
            held = self._publish(name, data, entry)
            self._ledger.add(digest, entry.size)
            if self._ledger.is_due(self._max_size):
                with self._sweeping:
                    self._ledger.recount()
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
        """Add uses to the entry."""
        self.entries.note(name, count, last)

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
            self.sweep()
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
        """Drop entries that cannot be read, or whose bytes are damaged or gone; gives their names and fragment ids.

        Blobs without an entry, which a process that was killed between the two has left, go too.
        """
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
        with self._sweeping:
            self._ledger.recount()
            self._sweep_orphans(Counter(_digest_in(entry) for _, entry in self._all()))
        return broken

    def sweep(self) -> None:
        """Delete what processes that are gone have left, but for what is worth resuming."""
        self.blobs.sweep(_ORPHANED_AFTER, resumable_for=_RESUMABLE_FOR)

    def clear(self) -> None:
        with self._sweeping:
            self.blobs.sweep(_ORPHANED_AFTER)
            for name in self.entries.names():
                self.entries.remove(name)
            self._ledger.recount()
            for digest in self._ledger.digests():
                if not self._ledger.is_pinned(digest):
                    self._delete(digest)

    def _publish(self, name: str, data: PartFile | memoryview, entry: CacheEntry) -> Held:
        digest, is_durable = _digest_in(entry), is_worth_a_sync(entry.size)
        is_new, before = not self.blobs.has(digest, entry.size), self.entries.read(name)
        if isinstance(data, PartFile):
            view = data.publish(digest, durable=is_durable)
        else:
            view = data
            self.blobs.put(view, digest)
        entry = replace(entry, stamp=self.blobs.stamp(digest) if is_durable else None)
        try:
            self.entries.write(name, entry)
        except CacheError:
            if is_new:
                self.blobs.remove(digest)
            raise
        if before is not None and before.digest != digest:
            self._ledger.loosen(_digest_in(before))
        return Held(entry, view)

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


def _digest_in(entry: CacheEntry) -> str:
    return entry.digest or ""
