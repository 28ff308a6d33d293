"""Who of several processes is at what, told by locks of the kernel: they save work, and guard nothing."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import Any

from .files import Descriptor

try:
    import fcntl
except ImportError:  # not a POSIX system: there are no claims
    fcntl = None  # type: ignore[assignment]

__all__ = ["Claims"]

# Of the open file, not of the process: two loaders of one process exclude each other too, and closing one file does not
# lose the locks that another has (fcntl(2), "Open file description locks"). Not every system has them.
_SET = getattr(fcntl, "F_OFD_SETLK", None)
_GET = getattr(fcntl, "F_OFD_GETLK", None)

_WRITING = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_LOCK = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, process

_IN_USE = 1 << 61  # whoever has the file open shares this byte
_MOST = 1 << 56  # numbers; names are places below 1 << 60


_files: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _let_go() -> None:
    """A forked child shares the locks of its parent, and would keep them beyond its end: it closes the files, which
    frees nothing."""
    for file in list(_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class Claims:
    """What this process, or another, has claimed, by locking a byte of a file for each: a number of a name of 16 hex
    digits or more.

    Numbers of one name that follow each other cost the kernel no more than one, as it joins them; else each has to look
    through all that there are. Never waits. A claim goes with its process, however that ends. Where locks do not work,
    or the file cannot be written, everyone gets every claim. Thread-safe; the file is opened when a claim is first
    asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: Descriptor | None = None
        self._is_off = _SET is None

    def take(self, name: str, number: int = 0) -> bool:
        """Whether the claim is ours now; False only if somebody else has it."""
        return self._ask(_SET, "F_WRLCK", name, number) is not None

    def is_free(self, name: str, number: int = 0) -> bool:
        """Whether nobody else has the claim."""
        told = self._ask(_GET, "F_WRLCK", name, number)
        return not told or _LOCK.unpack(told)[0] == fcntl.F_UNLCK

    def release(self, name: str, number: int = 0) -> None:
        """Give up a claim."""
        self._ask(_SET, "F_UNLCK", name, number)

    def close(self) -> None:
        """Give up all claims; from then on everyone gets every claim. The last one to go takes the file along."""
        with self._lock:
            file, was_off = self._file, self._is_off
            self._is_off, self._file = True, None
        if file is not None and not was_off and self._lock_byte(file, _SET, "F_WRLCK", _IN_USE):
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _ask(self, command: Any, kind: str, name: str, number: int) -> bytes | None:
        """What the kernel says to a lock; None if somebody else has it, b"" where there are no locks."""
        file = self._file or self._opened()
        if file is None or self._is_off:
            return b""
        return self._lock_byte(file, command, kind, int(name[:15], 16) + number % _MOST)

    def _lock_byte(self, file: Descriptor, command: Any, kind: str, place: int) -> bytes | None:
        wanted = _LOCK.pack(getattr(fcntl, kind), os.SEEK_SET, place, 1, 0)
        try:
            return fcntl.fcntl(file, command, wanted)
        except (BlockingIOError, PermissionError):  # which of the two it is, is up to the system
            return None
        except (OSError, ValueError):  # ValueError: closed, in a forked child
            self._is_off = True
            return b""

    def _opened(self) -> Descriptor | None:
        if self._is_off:
            return None
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = Descriptor(os.open(self._path, _WRITING, 0o600))
            _files.add(file)
        except OSError:
            self._is_off = True
            return None
        with self._lock:  # of two that have opened it, one; none if it was closed meanwhile
            if self._is_off:
                return None
            file = self._file = self._file or file
        self._lock_byte(file, _SET, "F_RDLCK", _IN_USE)
        return file
