"""How far a part file has come, told at its own end, so that whoever takes the file over has both or neither.

::

    size bytes of data | a note of what they are | two slots, each a Mark

One slot is written each time, the other only after what it tells is durable, once in :data:`SYNC_EVERY` bytes: so there
is one left if one is torn. Nothing in a slot is believed before the bytes have been hashed again: it may be ahead of a
disk that has lost power, and what it tells may have rotted.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..values import blake3_hasher, blake3_of

__all__ = ["MOST_APART", "SYNC_EVERY", "TAIL", "Journal", "Mark", "Span", "believed", "blocks", "span_of"]

TAIL = 1 << 16
SYNC_EVERY = 64 << 20
_FAR = 4  # times that
MOST_APART = 256

_SCHEMA = 1
_NOTE = 1 << 12
_SLOT = (TAIL - _NOTE) // 2
_STEP = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Bytes ``[start, stop)`` of a file, and their BLAKE3 digest."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What will not change any more: the file from its start, and spans apart from that."""

    prefix: Span
    apart: tuple[Span, ...] = ()


class Journal:
    """The end of a part file of ``size`` bytes of data. Raises OSError. Only :meth:`secure` may be called by several
    threads at once."""

    def __init__(self, size: int, note: Mapping[str, Any]) -> None:
        self.size = size
        self.note = note
        self._durable = 0
        self._syncing = threading.Lock()

    def begin(self, fd: int) -> bool:
        """Write the note; False if it is too long for its place, and so this is no file to resume."""
        page = _sealed({"schema": _SCHEMA, "size": self.size, "note": self.note})
        if len(page) > _NOTE:
            return False
        os.pwrite(fd, page.ljust(TAIL, b"\0"), self.size)
        return True

    def advance(self, fd: int, mark: Mark) -> None:
        """Write a mark, which outlives the process."""
        self._write(fd, mark, _NOTE)

    def secure(self, fd: int, mark: Mark, sync: Callable[[int], None]) -> None:
        """Where it is due, have ``sync`` make the data durable, and write a mark that outlives a loss of power.

        While one does that, no other waits, unless the disk is far behind.
        """
        ahead = mark.prefix.stop - self._durable
        if ahead >= SYNC_EVERY and self._syncing.acquire(blocking=ahead >= _FAR * SYNC_EVERY):
            try:
                if mark.prefix.stop - self._durable >= SYNC_EVERY:
                    sync(fd)
                    self._durable = mark.prefix.stop
                    self._write(fd, mark, _NOTE + _SLOT)
            finally:
                self._syncing.release()

    def _write(self, fd: int, mark: Mark, where: int) -> None:
        page = _sealed([[span.start, span.stop, span.digest] for span in (mark.prefix, *mark.apart)])
        if len(page) <= _SLOT:
            os.pwrite(fd, page, self.size + where)

    @classmethod
    def read(cls, fd: int) -> tuple[Journal, list[Mark]] | None:
        """The journal of an open part file and its marks; None if the file has none that is whole."""
        size = os.fstat(fd).st_size - TAIL
        if size <= 0:
            return None
        tail = os.pread(fd, TAIL, size)
        try:
            told = _opened(tail[:_NOTE])
            if told["schema"] != _SCHEMA or told["size"] != size:
                return None
            journal = cls(size, dict(told["note"]))
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        marks = []
        for start in (_NOTE, _NOTE + _SLOT):
            try:
                prefix, *apart = (_span(told, size) for told in _opened(tail[start : start + _SLOT]))
                marks.append(Mark(prefix, tuple(apart)))
            except (ValueError, TypeError, RecursionError):
                continue
        return journal, marks


def _span(told: Any, size: int) -> Span:
    """A span of a file of ``size`` bytes. Raises ValueError or TypeError for what is none."""
    start, stop, digest = told
    if not (type(start) is type(stop) is int and type(digest) is str and 0 <= start <= stop <= size):
        raise ValueError("no span")
    return Span(start, stop, digest)


def believed(fd: int, marks: list[Mark]) -> tuple[int, Any, list[Span]]:
    """What the bytes in the file bear out of its marks: how many from the start, the hasher that has taken them in,
    and the spans apart from them."""
    length, best, running = 0, blake3_hasher(is_threaded=False), blake3_hasher(is_threaded=False)
    position = 0
    for prefix in sorted(mark.prefix for mark in marks):
        for block in blocks(fd, position, prefix.stop):
            running.update(block)
            position += len(block)
        if position < prefix.stop or running.hexdigest() != prefix.digest:
            break
        length, best = position, running.copy()
    apart: list[Span] = []
    for span in sorted({span for mark in marks for span in mark.apart}):
        if (
            span.start >= max(length, apart[-1].stop if apart else 0)
            and span_of(blocks(fd, span.start, span.stop), span.start) == span
        ):
            apart.append(span)
    return length, best, apart


def span_of(read: Iterable[memoryview], start: int) -> Span:
    """What the blocks from ``start`` on hold, hashed."""
    hasher, stop = blake3_hasher(is_threaded=False), start
    for block in read:
        hasher.update(block)
        stop += len(block)
    return Span(start, stop, hasher.hexdigest())


def blocks(fd: int, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes of an open file, in pieces that are good until the next one; fewer only if the file ends before."""
    room = memoryview(bytearray(max(0, min(_STEP, stop - start))))
    while start < stop and (got := os.preadv(fd, [room[: stop - start]], start)):
        yield room[:got]
        start += got


def _sealed(told: Any) -> bytes:
    """A line of JSON that tells whether it is whole."""
    body = json.dumps(told).encode()
    return blake3_of(body).encode() + b" " + body + b"\n"


def _opened(page: bytes) -> Any:
    """What a line tells. Raises ValueError if it is damaged."""
    seal, _, body = page.partition(b"\n")[0].partition(b" ")
    if blake3_of(body).encode() != seal:
        raise ValueError("damaged")
    return json.loads(body)
