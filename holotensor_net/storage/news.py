"""What processes that share a cache folder tell each other of it: one file, to which each appends, and which all read.

That saves counting, and guards nothing: whoever has missed something looks at the folder itself.
"""

from __future__ import annotations

import contextlib
import enum
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .files import Descriptor

__all__ = ["Item", "Kind", "News", "Place"]

_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)
_ITEM = struct.Struct("<I4x32s32sq")
_CHECK = struct.Struct("<I4x")  # CRC-32 of the item before it
_LENGTH = _ITEM.size + _CHECK.size


class Kind(enum.IntEnum):
    """What happened, and what the fields of the item hold."""

    BLOB = 1  # other: a digest; number: its size in bytes. It is there, or about to be.
    NO_BLOB = 2  # other: a digest
    ENTRY = 3  # name: an entry's; other: the digest that it names; number: when it was last used, seconds
    NO_ENTRY = 4  # name: an entry's
    PART = 5  # name: the subject of a part file that was left; other: its token; number: its size in bytes
    NO_PART = 6  # name and other, as above


class Item(NamedTuple):
    """One change. ``name`` and ``other`` are up to 64 hex digits."""

    kind: Kind
    name: str = ""
    other: str = ""
    number: int = 0


class Place(NamedTuple):
    """How far somebody has read: the file, counted as this process has met it, 0 for none, and the bytes in it."""

    file: int = 0
    offset: int = 0


class News:
    """The file at ``path``, which is made when something is first told, and begun anew once it has ``most`` bytes.

    Never waits, never raises: a folder that cannot be written has no news. Thread-safe; the lock guards which file is
    open. Where appending is not atomic, on some network file systems, something may be lost.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._open: tuple[int, Descriptor | None] = (0, None)
        self._lock = threading.Lock()

    def tell(self, items: Iterable[Item]) -> bool:
        """Whether the others, and :meth:`since`, will hear of it."""
        data = b"".join(map(_packed, items))
        with contextlib.suppress(OSError):
            for _ in range(2):
                _, file = self._opened(create=True)
                if os.write(file.fileno(), data) < len(data):
                    return False
                if os.fstat(file.fileno()).st_nlink:  # else somebody has begun anew meanwhile
                    return True
        return False

    def end(self) -> Place:
        """Where what is told from now on will be."""
        with contextlib.suppress(OSError):
            number, file = self._opened()
            return Place(number, os.fstat(file.fileno()).st_size)
        return Place()

    def since(self, place: Place) -> tuple[list[Item], Place] | None:
        """What was told after ``place``, and where that ends; None if something was missed."""
        try:
            number, file = self._opened()
            if place.file not in (0, number):
                return None
            size = os.fstat(file.fileno()).st_size
            if size <= place.offset:
                return [], Place(number, place.offset)
            data = os.pread(file.fileno(), size - place.offset, place.offset)
        except FileNotFoundError:
            return ([], place) if place == Place() else None
        except OSError:
            return [], place
        if size > self._most:
            self.begin_anew()
        try:
            items = [_unpacked(data, start) for start in range(0, len(data) - _LENGTH + 1, _LENGTH)]
        except ValueError:
            return None
        return items, Place(number, place.offset + len(items) * _LENGTH)

    def begin_anew(self) -> None:
        """Have everyone look for themselves."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._open = (self._open[0], None)

    def _opened(self, *, create: bool = False) -> tuple[int, Descriptor]:
        """The file that has the name now, and its number. Raises OSError."""
        number, file = self._open
        if file is not None and os.fstat(file.fileno()).st_nlink:
            return number, file
        if create:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = Descriptor(os.open(self._path, _FLAGS | (os.O_CREAT if create else 0), 0o600))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        with self._lock:  # of two that have opened it, one
            if self._open[0] == number:
                self._open = (number + 1, file)
            number, opened = self._open
        return number, opened or file


def _packed(item: Item) -> bytes:
    name, other = bytes.fromhex(item.name), bytes.fromhex(item.other)
    body = _ITEM.pack(item.kind, name, other, item.number)
    return body + _CHECK.pack(zlib.crc32(body))


def _unpacked(data: bytes, start: int) -> Item:
    """The item that begins there. Raises ValueError if there is none."""
    middle = start + _ITEM.size
    if _CHECK.unpack_from(data, middle)[0] != zlib.crc32(data[start:middle]):
        raise ValueError("not an item")
    kind, name, other, number = _ITEM.unpack_from(data, start)
    return Item(Kind(kind), name.hex(), other.hex(), number)
