"""How far a part file has come, told at its own end, so that whoever takes the file over has both or neither.

::

    size bytes of data | a note of what they are | two slots: how many from the start are settled, and their digest

The slots are written in turn, so that one that is torn leaves the other. Nothing in a slot is believed before the
bytes have been hashed again: it may be ahead of a disk that has lost power, and what it tells may have rotted. One
slot in each :data:`SYNC_EVERY` bytes is written only after those are durable, and left alone until the next such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..values import blake3_of

__all__ = ["SYNC_EVERY", "TAIL", "Journal", "Mark", "believed"]

TAIL = 4096
SYNC_EVERY = 64 << 20

_SCHEMA = 1
_SLOT = 512
_NOTE = TAIL - 2 * _SLOT


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """The first ``length`` bytes are settled, and this is their BLAKE3 digest."""

    length: int
    digest: str


class Journal:
    """The end of a part file of ``size`` bytes of data. Not thread-safe. Raises OSError."""

    def __init__(self, size: int, note: Mapping[str, Any], *, durable: int = 0) -> None:
        self.size = size
        self.note = note
        self._durable = durable

    def begin(self, fd: int) -> bool:
        """Write the note; False if it is too long for its place, and so this is no file to resume."""
        page = _sealed(json.dumps({"schema": _SCHEMA, "size": self.size, "note": self.note}), _NOTE)
        return page is not None and os.pwrite(fd, page + bytes(2 * _SLOT), self.size) == TAIL

    def advance(self, fd: int, mark: Mark, *, sync: Callable[[int], None]) -> None:
        """Write a mark; ``sync`` makes data durable where that is due."""
        is_due = mark.length - self._durable >= SYNC_EVERY
        if is_due:
            sync(fd)
            self._durable = mark.length
        page = _sealed(json.dumps([mark.length, mark.digest]), _SLOT)
        if page is not None:
            os.pwrite(fd, page, self.size + _NOTE + _SLOT * is_due)

    @classmethod
    def read(cls, fd: int) -> tuple[Journal, list[Mark]] | None:
        """The journal of an open part file and its marks, least first; None if the file has none that is whole."""
        size = os.fstat(fd).st_size - TAIL
        if size <= 0:
            return None
        tail = os.pread(fd, TAIL, size)
        try:
            told = json.loads(_opened(tail[:_NOTE]))
            if told["schema"] != _SCHEMA or told["size"] != size:
                return None
            journal = cls(size, dict(told["note"]))
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        marks = set()
        for start in (_NOTE, _NOTE + _SLOT):
            try:
                length, digest = json.loads(_opened(tail[start : start + _SLOT]))
            except (ValueError, TypeError):
                continue
            if 0 < length < size:
                marks.add(Mark(length, str(digest)))
        return journal, sorted(marks)


def believed(fd: int, marks: list[Mark], hasher: Any) -> tuple[int, Any]:
    """The last mark that the bytes in the file bear out, 0 for none, and the hasher as it was there."""
    best = 0, hasher.copy()
    position = 0
    for mark in marks:
        while position < mark.length:
            data = os.pread(fd, min(_STEP, mark.length - position), position)
            if not data:
                return best
            hasher.update(data)
            position += len(data)
        if hasher.hexdigest() != mark.digest:
            return best
        best = position, hasher.copy()
    return best


_STEP = 1 << 20


def _sealed(text: str, room: int) -> bytes | None:
    """A page of ``room`` bytes that tells whether it is whole; None if the text is too long for it."""
    body = text.encode()
    page = blake3_of(body).encode() + b" " + body + b"\n"
    return page.ljust(room, b"\0") if len(page) <= room else None


def _opened(page: bytes) -> bytes:
    """The text of a page. Raises ValueError if it is damaged."""
    seal, _, body = page.rstrip(b"\0").removesuffix(b"\n").partition(b" ")
    if blake3_of(body).encode() != seal:
        raise ValueError("damaged")
    return body
