"""The disk tier of the cache: entries over blobs, within a quota.

Eviction is mark and sweep over the entries. No lock is needed for right answers, only to save work.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import CacheConfig
from ..errors import CacheError, InsufficientDisk
from .blobs import BlobStore, Left, is_worth_a_sync
from .entries import CacheEntry, EntryFiles, Garbled, Held, Usage, dispensability
from .files import is_hopeless
from .ledger import Ledger, Named
from .news import Item, Kind, News
from .parts import PartFile

__all__ = ["DiskTier"]

_ORPHANED_AFTER = 3600.0  # seconds without a write, for part files of other processes
_RESUMABLE_FOR = 86400.0  # seconds since a part file that can be resumed was left
_SOON = 60.0  # seconds after a use that another one need not be shown to other processes at once
_ENTRY_DUE_WITHIN = 60.0  # seconds from publishing a blob
_MOST_NEWS, _LEAST_NEWS = 1 << 20, 1 << 16  # bytes that the news may have, for large caches and for small ones
_FRESH_STARTS = 3  # of an eviction that misses what others tell meanwhile
_SPARED_SHARE = 16  # one in so many bytes goes beyond what has to, so that not every fragment to come sweeps again
_VAIN_FOR = 60.0  # seconds without another try after what was evicted has not shown as free space
_TICK = 1e-5  # seconds by which a file's time may differ from what it was set to
_MOST_RESERVE = 1 << 30  # bytes of the disk that are left free, where that is not set
_RESERVED_SHARE = 20  # one in so many bytes of the disk, if that is less


class DiskTier:
    """Entries over blobs, within the size that ``config`` allows. ``evicted`` is called with the names of entries that
    had to go. The lock lets one thread at a time sweep. Raises CacheError."""

    def __init__(
        self,
        root: Path,
        config: CacheConfig,
        usage: Usage,
        clock: Callable[[], float],
        evicted: Callable[[Iterable[str]], None],
    ) -> None:
        myself = weakref.ref(self)  # what is below does not keep it: descriptors are closed with the last reference
        self.blobs = BlobStore(root, verify_first=config.verify_on_open, on_left=functools.partial(_left, myself))
        news = min(_MOST_NEWS, max(_LEAST_NEWS, config.max_size >> 5))
        self._news = News(root / "news", news, self.blobs.spare)
        self.entries = EntryFiles(self.blobs)
        self._root = root
        self._config = config
        self._usage = usage
        self._clock = clock
        self._evicted = evicted
        named = functools.partial(_named, self.entries)
        self._ledger = Ledger(self._news, self.blobs.digests, self.blobs.left, named)
        self._sweeping = threading.Lock()
        self._may_be_full = False
        self._in_vain_until = 0.0  # by the monotonic clock
        with contextlib.suppress(CacheError):
            self.sweep()

    def entry(self, name: str, *, unseen: bool = False) -> CacheEntry | None:
        """What is known of bytes that are there; None without them. ``unseen``: without a look whether they are."""
        entry = self.entries.read(name)
        if entry is None or unseen or self.blobs.has(_digest_in(entry), entry.size):
            return entry
        return None

    def listed(self, but: Container[str], on_error: Callable[[CacheError], None]) -> Iterator[tuple[str, CacheEntry]]:
        """Every entry whose bytes are there, by its name, ``but`` for some; ``on_error`` hears of what cannot be read.

        What lies among the blobs is looked at once, and again for what is not among it: it may have come since."""
        there = self.blobs.names()
        for name in self.entries.names():
            if name not in but:
                try:
                    entry = self.entries.read(name)
                    if entry is not None and (entry.digest in there or self.blobs.has(_digest_in(entry), entry.size)):
                        yield name, entry
                except CacheError as error:
                    on_error(error)

    def get(self, name: str, known: CacheEntry | None = None) -> Held | None:
        """The bytes, of the version that is ``known``, if that was read before."""
        entry = known or self.entries.read(name)
        if entry is None:
            return None
        view = self.blobs.open(_digest_in(entry), entry.size, stamp=entry.stamp)
        if view is not None:
            if not 0 <= self._clock() - entry.last_accessed < _SOON:
                self.entries.touch(name, self._clock())
            return Held(entry, view)
        present = entry if known is None else self.entries.read(name)
        if present is not None and present.digest == entry.digest and self.entries.remove(name):
            self._ledger.tell(Item(Kind.NO_ENTRY, name), Item(Kind.NO_BLOB, other=_digest_in(entry)))
        return None

    def create(self, size: int | None, *, subject: str = "", note: Mapping[str, Any] | None = None) -> PartFile:
        """A part file of ``size`` bytes, for which others may have to go."""
        self._keep_free(size or 0)
        part = self.blobs.create(size, subject=subject, note=note, is_proved=True)
        self._keep_to_limit()
        return part

    def adopt(self, name: str, data: PartFile | memoryview, entry: CacheEntry) -> Held:
        """Make room, then publish blob and entry."""
        digest = _digest_in(entry)
        if not isinstance(data, PartFile):
            self._keep_free(entry.size)
        with self._ledger.pinned(digest, entry.size):
            blob = Item(Kind.BLOB, other=digest, number=entry.size)
            if isinstance(data, PartFile):
                data.land()
            self._make_room(blob)
            held = self._publish(name, data, entry)
            self._ledger.announce(blob, Item(Kind.ENTRY, name, digest, int(entry.last_accessed * 1e9)))
            return held

    def rewrite(self, name: str, entry: CacheEntry) -> None:
        """Replace what is known of bytes that are there, unless others have taken their place."""
        present = self.entry(name)
        if present is not None and present.version == entry.version:
            self.entries.write(name, entry)

    def note(self, name: str, count: int, last: float) -> None:
        """Add uses to the entry."""
        self.entries.note(name, count, last, self._clock())

    def remove(self, name: str) -> None:
        entry = self.entries.read(name)
        if entry is not None and self.entries.remove(name):
            self._ledger.tell(Item(Kind.NO_ENTRY, name))
            self._ledger.loosen(_digest_in(entry))
            self.collect()

    def size(self, *, is_urgent: bool = False) -> int:
        """Bytes of all blobs, of part files that may be resumed or are being filled here, and of what was set aside;
        of a file whose length is not known, nothing before it is published.
        ``is_urgent``: what is known by now, while another thread is at the folder."""
        if not self._ledger.is_counted() and self._sweeping.acquire(blocking=not is_urgent):
            try:
                if not self._ledger.is_counted():
                    self._ledger.count()
            finally:
                self._sweeping.release()
        return self._ledger.size + self.blobs.filling

    def collect(self) -> None:
        """Delete blobs that no entry names any more."""
        if self._ledger.loose():
            with self._sweeping:
                self._ledger.refresh()
                for digest in self._ledger.loose().intersection(self._ledger.unnamed()):
                    self._delete(digest)

    def tidy(self) -> None:
        """:meth:`collect`, and make room: for part files that were left, and where another thread was at the folder."""
        self.collect()
        if self._may_be_full:
            self._may_be_full = False
            self._keep_to_limit()

    def shrink(self, limit: int, *, only_above: int = 0, anew: bool = True, is_urgent: bool = False) -> int:
        """Drop the most dispensable entries and part files until ``limit`` bytes are left of what may go, if there are
        more than ``only_above``; gives the number of bytes freed. ``anew``: look at the folder first, as files may have
        gone. ``is_urgent``: unless another thread is at it."""
        dropped: list[str] = []
        if not self._sweeping.acquire(blocking=not is_urgent):
            self._may_be_full = True  # work for others
            return 0
        try:
            if anew:
                self.sweep()
            self._ledger.refresh(anew=anew)
            if self._ledger.size <= only_above:
                return 0
            freed = self._sweep_orphans(limit)
            for is_last in (*(False,) * _FRESH_STARTS, True):
                for name, bytes_freed in self._evictions(limit, in_the_dark=is_last):
                    dropped += [name] if name else []
                    freed += bytes_freed
                if self._ledger.size <= limit or not self._ledger.has_missed:
                    break
                self._ledger.refresh()
        finally:
            self._sweeping.release()
        self._usage.evicted(len(dropped))
        self._evicted(dropped)
        return freed

    def verify(self) -> dict[str, str]:
        """Drop entries that cannot be read, or whose bytes are damaged or gone; gives their names and fragment ids.

        Blobs without an entry, which a process that was killed between the two has left, go too.
        """
        broken: dict[str, str] = {}
        sound: set[tuple[str, int]] = set()
        for name in list(self.entries.names()):
            is_sound, entry = self._examined(name, sound)
            if not is_sound:
                self.entries.remove(name)
                gone = () if entry is None else (Item(Kind.NO_BLOB, other=_digest_in(entry)),)
                self._ledger.announce(Item(Kind.NO_ENTRY, name), *gone)
                broken[name] = name if entry is None else entry.fragment_id
        with self._sweeping:
            self._ledger.refresh(anew=True)
            self._sweep_orphans()
        return broken

    def _examined(self, name: str, sound: set[tuple[str, int]]) -> tuple[bool, CacheEntry | None]:
        """Whether an entry and its bytes are sound, and what it says; those that are ``sound`` were hashed before.

        One that has gone meanwhile is no damage, nor are bytes that have gone with the entry that named them: others
        evict and replace at any moment, the entry before its bytes."""
        before: CacheEntry | None = None
        while True:
            try:
                entry = self.entries.examined(name)
            except (Garbled, CacheError) as error:
                if isinstance(error, CacheError) and not is_hopeless(error):
                    raise
                self.blobs.set_aside(Path(self.entries.path_of(name)))
                return False, None
            if entry is None:
                return True, None
            blob = _digest_in(entry), entry.size
            if before is not None and before.version == entry.version:
                return False, entry
            if blob in sound or self.blobs.check(*blob):
                sound.add(blob)
                return True, entry
            before = entry

    def sweep(self) -> None:
        """Delete what processes that are gone have left, but for what is worth resuming."""
        self.blobs.sweep(_ORPHANED_AFTER, resumable_for=_RESUMABLE_FOR)

    def clear(self) -> None:
        with self._sweeping:
            self.blobs.sweep(_ORPHANED_AFTER)
            for name in list(self.entries.names()):
                self.entries.remove(name)
            self._ledger.count()
            for digest in self._ledger.blobs():
                if not self._ledger.is_pinned(digest):
                    self.blobs.remove(digest)
            for token, left in self._ledger.parts():
                self._drop_part(token, left)
            self._news.begin_anew()
            self._ledger.count()

    def close(self) -> None:
        """Let go of what is open."""
        self._news.close()
        self._ledger.close()

    def _make_room(self, blob: Item) -> None:
        """Let others go for what is about to be there, and tell of it before, unless there is room enough for many."""
        if self.size(is_urgent=True) + blob.number > self._low:
            self._ledger.announce(blob)
            try:
                self._keep_to_limit()
            except CacheError:
                if not self.blobs.has(blob.other, blob.number):
                    self._ledger.tell(Item(Kind.NO_BLOB, other=blob.other))
                raise

    def _keep_to_limit(self) -> None:
        """Let others go if there is too much. Nobody waits for another thread that is at it: if that one lets go of
        entries, it looks again, and then finds what was announced meanwhile; else :meth:`tidy` does."""
        freed = 1
        while freed and self.size(is_urgent=True) > self._config.max_size:
            filling = self.blobs.filling
            low, high = self._low - filling, self._config.max_size - filling
            freed = self.shrink(max(0, low), only_above=high, anew=False, is_urgent=True)

    @property
    def _low(self) -> int:
        """Bytes to shrink to: a few less than there may be, so that not every fragment to come sweeps again."""
        return self._config.max_size - self._config.max_size // _SPARED_SHARE

    def _keep_free(self, size: int) -> None:
        """Let others go if ``size`` more bytes would leave less of the disk free than is to be. Raises InsufficientDisk
        if that does not suffice."""
        if self._lacking(size) <= 0:
            return
        if time.monotonic() >= self._in_vain_until:
            held = self.size() - self.blobs.filling
            lacking = self._lacking(size)  # after that: what goes meanwhile is not counted twice
            if 0 < lacking <= held:
                self.shrink(max(0, held - lacking - held // _SPARED_SHARE), only_above=held - lacking, anew=False)
                if self._lacking(size) > 0:  # somebody maps what went, or the file system takes its time
                    self._in_vain_until = time.monotonic() + _VAIN_FOR
        if self._lacking(size) > 0:
            raise InsufficientDisk(
                f"no room for {size} bytes in {self._root}, where some of the disk is to stay free: free some"
                " space, set another cache folder (HOLOTENSOR_CACHE), or a smaller free_space_reserve"
            )

    def _lacking(self, size: int) -> int:
        """Bytes that are too few on the disk for ``size`` more; where that cannot be told, or nothing may be written at
        all, none."""
        folder = self._root
        while True:
            try:
                disk = shutil.disk_usage(folder)
            except FileNotFoundError:
                if folder == folder.parent:
                    return 0
                folder = folder.parent
            except OSError:
                return 0
            else:
                reserve = self._config.free_space_reserve
                if reserve is None:
                    reserve = min(_MOST_RESERVE, disk.total // _RESERVED_SHARE)
                lacking = size + reserve - disk.free
                return lacking if lacking > 0 and os.access(folder, os.W_OK) else 0

    def _publish(self, name: str, data: PartFile | memoryview, entry: CacheEntry) -> Held:
        digest, is_durable = _digest_in(entry), is_worth_a_sync(entry.size)
        is_new, before = not self.blobs.has(digest, entry.size), self._before(name)
        try:
            if isinstance(data, PartFile):
                view = data.publish(digest, durable=is_durable)
            else:
                view = data
                self.blobs.put(view, digest)
                if is_durable:  # its pages are the system's to take back, and the memory is free for others
                    view = self.blobs.open(digest, entry.size) or view
            entry = entry.stamped(self.blobs.stamp(digest) if is_durable else None)
            self.entries.write(name, entry)
        except CacheError:
            if is_new:
                self.blobs.remove(digest)
                self._ledger.tell(Item(Kind.NO_BLOB, other=digest))
            raise
        if before is not None and before.digest != digest:
            self._ledger.loosen(_digest_in(before))
        return Held(entry, view)

    def _before(self, name: str) -> CacheEntry | None:
        """The entry that another is to take the place of."""
        return self.entries.read(name, is_dispensable=True) if self.entries.exists(name) else None

    def _evictions(self, limit: int, *, in_the_dark: bool) -> Iterator[tuple[str, int]]:
        """Drop what is most dispensable until ``limit`` bytes are left; gives each entry's name, "" for a part file,
        and the bytes that went with it. What is known of its last use is looked up again when its turn comes.

        Ends as soon as something was missed, since others may have made room; ``in_the_dark``: goes on all the same.
        """
        now = self._clock()
        waiting: list[tuple[float, str, Left | Named]]
        waiting = [(-dispensability(now, left.last, 0), token, left) for token, left in self._ledger.parts()]
        waiting += [
            (-dispensability(now, *self._usage.latest(name, named.last, named.uses)), name, named)
            for name, named in self._ledger.entries()
        ]
        heapq.heapify(waiting)
        while waiting and self._ledger.size > limit and (in_the_dark or not self._ledger.has_missed):
            value, name, known = heapq.heappop(waiting)
            if isinstance(known, Left):
                yield "", self._drop_part(name, known)
                continue
            entry = self.entries.read(name, is_dispensable=True)
            if entry is None:
                self._ledger.miss(name)
                continue
            present = -self._usage.applied(name, entry).eviction_score(now)
            if present > value and waiting and present > waiting[0][0]:
                heapq.heappush(waiting, (present, name, known))
                continue
            digest = _digest_in(entry)
            if not self._ledger.is_pinned(digest) and self.entries.remove(name):
                self._ledger.tell(Item(Kind.NO_ENTRY, name))
                yield name, 0 if self._ledger.is_named(digest) else self._delete(digest)

    def _sweep_orphans(self, limit: float = math.inf) -> int:
        """Delete blobs without an entry, unless another process may be about to write it, and there are no more than
        ``limit`` bytes; gives the bytes freed."""
        loose, freed = self._ledger.loose(), 0
        orphans = [
            (math.inf if digest in loose else self.blobs.age_of(digest), digest) for digest in self._ledger.unnamed()
        ]
        for age, digest in sorted(orphans, reverse=True):
            if age > _ENTRY_DUE_WITHIN or self._ledger.size > limit:
                freed += self._delete(digest)
        return freed

    def _delete(self, digest: str) -> int:
        size = self._ledger.size_of(digest)
        if not self.blobs.remove(digest):
            return 0
        self._ledger.tell(Item(Kind.NO_BLOB, other=digest))
        return size

    def _drop_part(self, token: str, left: Left) -> int:
        gone = self.blobs.forget_part(token)
        self._ledger.tell(Item(Kind.NO_PART, left.subject, token))
        return left.size if gone else 0

    def left(self, subject: str, token: str, size: int | None) -> None:
        """A part file was left, with so many bytes, or taken up again (None); "" for the subject: a file was set aside,
        or is gone."""
        if size is None:
            self._ledger.tell(Item(Kind.NO_PART, subject, token))
        else:
            self._may_be_full = True
            self._ledger.tell(Item(Kind.PART if subject else Kind.ASIDE, subject, token, size))


def _left(tier: weakref.ref[DiskTier], subject: str, token: str, size: int | None) -> None:
    there = tier()
    if there is not None:
        there.left(subject, token, size)


def _named(entries: EntryFiles, known: Mapping[str, Named]) -> dict[str, Named]:
    """What all entries name. Of those that are ``known``, a file is read only if its time has changed."""
    found: dict[str, Named] = {}
    for name, last in entries.times():
        named = known.get(name)
        if named is None or abs(named.last - last) > _TICK:
            told = entries.glance(name)
            named = None if told is None else Named(*told)
        if named is not None:
            found[name] = named
    return found


def _digest_in(entry: CacheEntry) -> str:
    return entry.digest or ""
