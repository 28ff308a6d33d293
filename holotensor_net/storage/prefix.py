"""The digest of bytes that arrive in any order, taken while they do."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from ..values import blake3_hasher
from .journal import MOST_APART, Mark, Span, span_of

__all__ = ["Prefix"]

_FREE = 0.1  # seconds that may be spent on the digests of spans in any case

Read: TypeAlias = Callable[[int, int], Iterator[memoryview]]
"""Gives the bytes from a start to a stop, in blocks that are good until the next one."""


class Prefix:
    """The digest of a file's bytes from its start, taken as they come, and of spans that have come before their turn.

    The lock guards all, but is not held to hash: one thread at a time does, between :meth:`claim` and :meth:`release`.
    Beside that, what is written where the hashed bytes end is hashed while it is at hand, and counts if it is settled
    as it is: to read it once more takes as long as to hash it.
    """

    def __init__(self, hasher: Any = None, length: int = 0, apart: Iterable[Span] = ()) -> None:
        self._hasher = hasher
        self.length = self._reach = length
        self._apart: dict[int, int] = {span.start: span.stop for span in apart}
        self._hashed: dict[int, Span] = {span.start: span for span in apart}
        self._began = time.monotonic()
        self._spent = 0.0
        self._is_busy = False
        self._added = self._seeing = self._seen = 0
        self._ahead: Any = None  # a hasher that has taken in what was written up to
        self._end = length
        self._changed = threading.Condition()

    @property
    def mark(self) -> Mark:
        """What has been hashed; for whoever has claimed."""
        apart = tuple(span for span in self._hashed.values() if span.start >= self.length)
        return Mark(Span(0, self.length, (self._hasher or blake3_hasher()).hexdigest()), apart)

    def spans(self) -> list[tuple[int, int]]:
        with self._changed:
            return [(0, self._reach)] * (self._reach > 0) + sorted(self._apart.items())

    def add(self, start: int, stop: int) -> int:
        """These bytes will not change any more; gives the number of this call."""
        with self._changed:
            if start < stop:
                self._apart[start] = stop
            self._added += 1
            while (reach := self._apart.pop(self._reach, None)) is not None:
                self._reach = reach
            return self._added

    def follow(self, start: int, block: memoryview) -> None:
        """These bytes are about to be written. One thread at a time does that, in the order in which the file gets
        them: what goes over bytes that were hashed ahead has all of those forgotten."""
        with self._changed:
            if self._ahead is None or not self.length <= self._end <= start:
                self._ahead, self._end = None, self.length
            if start != self._end or (self._ahead is None and self._is_busy):
                return
            hasher, self._ahead = self._ahead or self._copy(), None
            self._end += len(block)
        hasher.update(block)
        with self._changed:
            self._ahead = hasher

    def _catch_up(self, stop: int) -> None:
        """Take what was hashed ahead for hashed, unless it goes beyond what is settled."""
        with self._changed:
            if self._ahead is not None and self.length < self._end <= stop:
                self._hasher, self._ahead, self.length = self._ahead, None, self._end

    def _copy(self) -> Any:
        return blake3_hasher(is_threaded=False) if self._hasher is None else self._hasher.copy()

    def claim(self, number: int) -> bool:
        """Wait until what was added with this number has been seen to; or is the caller's to see to, with all that was
        added since, until :meth:`release`."""
        with self._changed:
            self._changed.wait_for(lambda: self._seen >= number or not self._is_busy)
            if self._seen >= number:
                return False
            self._is_busy, self._seeing = True, self._added
            return True

    def release(self) -> None:
        with self._changed:
            self._is_busy, self._seen = False, self._seeing
            self._changed.notify_all()

    def hash(self, read: Read) -> None:
        """Take in what there is now. Raises OSError."""
        self._hasher = self._hasher or blake3_hasher(is_threaded=False)
        stop = self._reach
        self._catch_up(stop)
        for block in read(self.length, stop):
            self._hasher.update(block)
            self.length += len(block)
        if self.length < stop:
            raise OSError(errno.EIO, "the bytes end before they should")
        # Not before: what more has come meanwhile may reach over them, while the mark does not yet.
        self._hashed = {start: span for start, span in self._hashed.items() if start >= stop}

    def hash_apart(self, read: Read) -> None:
        """Hash what has come before its turn, which will be hashed once more then: so only as long as that costs little
        of the time, and a fast network does without."""
        with self._changed:
            apart = [span for span in self._apart.items() if span[0] not in self._hashed]
        for start, stop in apart:
            if self._spent > _FREE + (time.monotonic() - self._began) / 10 or len(self._hashed) >= MOST_APART:
                return
            began = time.thread_time()
            span = span_of(read(start, stop), start)
            self._spent += time.thread_time() - began
            self._hashed[start] = span

    def digest(self, read: Read, size: int) -> str:
        """The digest of the first ``size`` bytes, the rest of them hashed now. Raises OSError."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy)
            self._is_busy = True
            self._reach = size
        try:
            if self.length > size:
                self._hasher, self.length = None, 0
            self.hash(read)
            return str(self._hasher.hexdigest())
        finally:
            self.release()
