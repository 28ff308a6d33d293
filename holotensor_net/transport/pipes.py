"""Pipes of the kernel's, through which bytes go from a socket to a file without being copied on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["Pipe"]

_ROOM = 1 << 20
_LEAST = 1 << 16
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)


class Pipe:
    """A pipe that gathers bytes until they are moved on, and is made when it is first used; a context manager that
    closes it.

    ``take`` is given the descriptor of its end, how many bytes it has, and whether all of them are to be moved, or as
    many as it likes to; it gives how many those were. ``held``: bytes in it.
    """

    LEAST = _LEAST
    """Bytes that every one has room for."""

    _are_filled = True  # by the kernel, as far as this process has met

    def __init__(self, take: Callable[[int, int, bool], int]) -> None:
        self._take = take
        self.held = 0
        self._ends: tuple[int, int] | None = None
        self._is_tried = False

    @property
    def is_there(self) -> bool:
        """Whether it can be used: not where the system has no such pipes, or would give one of a page or two, as it
        does to users who have many."""
        if not self._is_tried:
            self._is_tried = True
            self._ends = _made()
        return self._ends is not None

    @classmethod
    def can_take_from(cls, sock: Any) -> bool:
        """Whether what the socket receives is what was sent: what TLS has encrypted is not."""
        return type(sock) is socket.socket and hasattr(os, "splice") and cls._are_filled

    def fill(self, sock: socket.socket, most: int) -> int:
        """Have the kernel take in what the socket has received, ``most`` bytes at most; gives their number, 0 if it
        does not give any.

        That may be the end, or not: what stands behind a byte of TCP's urgent data is never given, and a sandbox may
        not let it. Only reading tells.
        """
        assert self._ends is not None
        for _ in range(2):
            try:
                size = os.splice(sock.fileno(), self._ends[1], most, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:  # the pipe may be full: it holds fewer bytes where packets are short
                if not self.held:
                    break
                self._empty(is_all=False)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                Pipe._are_filled = False
                break
            else:
                self.held += size
                return size
        return 0

    def pour(self, block: bytes | memoryview) -> int:
        """Take in a block of :attr:`LEAST` bytes at most; gives their number."""
        assert self._ends is not None
        if not block:
            return 0
        self.empty()
        self.held = os.write(self._ends[1], block)
        return self.held

    def empty(self) -> None:
        """Have all bytes moved on."""
        if self.held:
            self._empty(is_all=True)

    def _empty(self, *, is_all: bool) -> None:
        assert self._ends is not None
        size, self.held = self.held, 0  # not again, should it fail
        self.held = size - self._take(self._ends[0], size, is_all)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends or ():
            os.close(end)
        self._ends = None


def _made() -> tuple[int, int] | None:
    try:
        from fcntl import F_GETPIPE_SZ, F_SETPIPE_SZ, fcntl

        ends = os.pipe()
    except (OSError, ImportError):
        return None
    with contextlib.suppress(OSError):
        fcntl(ends[1], F_SETPIPE_SZ, _ROOM)
    with contextlib.suppress(OSError):
        if fcntl(ends[1], F_GETPIPE_SZ) >= _LEAST:
            return ends
    for end in ends:
        os.close(end)
    return None
