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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .files import CREATING, Descriptor, disown

__all__ = ["Item", "Kind", "News", "Place"]

_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FLAGS |= getattr(os, "O_NONBLOCK", 0)
_ITEM = struct.Struct("<I4x32s32sq")
_CHECK = struct.Struct("<I4x")  # CRC-32 of the item before it
_LENGTH = _ITEM.size + _CHECK.size
_NUMBERS = 1 << 63
_MOST_AT_ONCE = 8 << 20  # bytes: to look at the folder costs less than to take in more


class Kind(enum.IntEnum):
    """What happened, and what the fields of the item hold."""

    BLOB = 1  # other: a digest; number: its size in bytes. It is there, or about to be.
    NO_BLOB = 2  # other: a digest
    ENTRY = 3  # name: an entry's; other: the digest that it names; number: when it was last used, ns
    NO_ENTRY = 4  # name: an entry's
    PART = 5  # name: the subject of a part file that was left; other: its token; number: its size in bytes
    NO_PART = 6  # name and other, as above
    FOLLOWS = 7  # number: the inode of the file that this one has taken the place of
    ASIDE = 8  # other: the token of a file that was set aside, whose end is a NO_PART; number: its size in bytes


class Item(NamedTuple):
    """One change. ``name`` and ``other`` are up to 64 hex digits."""

    kind: Kind
    name: str = ""
    other: str = ""
    number: int = 0


class _File(Descriptor):
    """Raises OSError for what is no regular file."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        self.identity = _identity(status)

    @property
    def number(self) -> int:
        """By which the file that follows names this one."""
        return self.identity[1] % _NUMBERS


class Place(NamedTuple):
    """How far somebody has read: which file, None if there was none, and how many bytes of it."""

    file: _File | None = None
    offset: int = 0


class News:
    """The file at ``path``, which is made when something is first told; one that has ``most`` bytes is followed by a
    new one, which says so. ``spare`` names a file for a moment, in the same folder or below.

    Never waits, never raises: a folder that cannot be written has no news. Thread-safe; the lock guards which file is
    open. Where appending is not atomic, on some network file systems, something may be lost.
    """

    def __init__(self, path: Path, most: int, spare: Callable[[], Path]) -> None:
        self._path = path
        self._name = str(path)
        self._most = most
        self._spare = spare
        self._file: _File | None = None
        self._lock = threading.Lock()

    def tell(self, items: Iterable[Item]) -> bool:
        """Whether the others, and :meth:`since`, will hear of it."""
        data = b"".join(map(_packed, items))
        for _ in range(3):  # another file may have followed, or the handle be stale
            try:
                file = self._file or self._opened(create=True)[0]
                if os.write(file.fileno(), data) < len(data):
                    return False
                latest, size = self._opened(create=True)
                if latest.identity == file.identity:
                    # Who writes across the limit begins the next file; should nobody have seen to it, anyone does.
                    if size - len(data) < self._most <= size or size > 2 * self._most:
                        with contextlib.suppress(OSError):
                            self._follow(file.number)
                    return True
            except OSError:
                self.close()
        return False

    def end(self) -> Place:
        """Where what is told from now on will be."""
        with contextlib.suppress(OSError):
            return Place(*self._opened())
        return Place()

    def since(self, place: Place) -> tuple[list[Item], Place] | None:
        """What was told after ``place``, and where that ends; None if something was missed."""
        file = place.file
        try:
            latest, size = self._opened()
            is_same = file is not None and file.identity == latest.identity
            if is_same and size == place.offset:
                return [], place
            if file is None or is_same:
                heard, offset = _read(latest, place.offset, size)
                is_missed = file is None and heard[:1] != [] and heard[0].kind is Kind.FOLLOWS
            else:
                heard, _ = _read(file, place.offset, os.fstat(file.fileno()).st_size)
                [follows, *more], offset = _read(latest, 0, size)
                # As long as the file that was followed is open, no other has its number.
                is_missed = follows.kind is not Kind.FOLLOWS or follows.number != file.number
                heard += more
        except OSError:
            self.close()  # the handle may be stale
            return ([], place) if file is None else None
        except ValueError:
            return None
        return None if is_missed else (heard, Place(latest, offset))

    def begin_anew(self) -> None:
        """Have everyone look for themselves, even who has found no news yet: a file comes that follows none."""
        try:
            if self._path.parent.is_dir():
                self._follow(0)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._file = None

    def _opened(self, *, create: bool = False) -> tuple[_File, int]:
        """The file that has the name now, and its size in bytes. Raises OSError."""
        before = self._file
        if before is not None:
            # The name is asked: on network file systems the handle does not tell that another file has got it.
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self._name)
                if _identity(status) == before.identity:
                    return before, status.st_size
        if create:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = _File(os.open(self._path, _FLAGS | (os.O_CREAT if create else 0), 0o600))
        with self._lock:  # of two that have opened it, one
            if self._file is before:
                self._file = file
            file = self._file or file
        return file, os.fstat(file.fileno()).st_size

    def _follow(self, number: int) -> None:
        """Put another file in the place of the one with this inode number. Raises OSError."""
        spare = self._spare()
        try:
            with Descriptor(os.open(spare, CREATING, 0o600)) as file:
                os.write(file.fileno(), _packed(Item(Kind.FOLLOWS, number=number)))
            os.replace(spare, self._path)
        finally:
            with contextlib.suppress(OSError):
                spare.unlink()
            disown(spare.name)


def _read(file: Descriptor, offset: int, size: int) -> tuple[list[Item], int]:
    """The items in a file of ``size`` bytes from ``offset`` on, and where they end.

    Raises OSError, or ValueError for what is no item, or too much.
    """
    if size - offset > _MOST_AT_ONCE:
        raise ValueError("too much")
    data = os.pread(file.fileno(), size - offset, offset) if size > offset else b""
    items = [_unpacked(data, start) for start in range(0, len(data) - _LENGTH + 1, _LENGTH)]
    return items, offset + len(items) * _LENGTH


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


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
