"""Pipes of the kernel's, through which bytes go from a socket to a file without being copied on the way."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

__all__ = ["Pipe"]

_ROOM = 1 << 20
_LEAST = 1 << 16


class Pipe:
    """A pipe that is empty between two uses, and made for the first; a context manager that closes it."""

    def __init__(self) -> None:
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

    @property
    def source(self) -> int:
        """The descriptor that its bytes are to be taken from."""
        assert self._ends is not None
        return self._ends[0]

    @staticmethod
    def can_take_from(sock: Any) -> bool:
        """Whether what the socket receives is what was sent: what TLS has encrypted is not."""
        return type(sock) is socket.socket and hasattr(os, "splice")

    def fill(self, sock: socket.socket, most: int) -> int:
        """Take in what the socket has received, ``most`` bytes at most; gives their number, 0 at its end.

        Raises BlockingIOError if there is nothing.
        """
        assert self._ends is not None
        return os.splice(sock.fileno(), self._ends[1], most)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends or ():
            os.close(end)
        self._ends = None


def _made() -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ImportError, AttributeError):
        import fcntl

        ends = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _ROOM)
        if fcntl.fcntl(ends[1], fcntl.F_GETPIPE_SZ) >= _LEAST:
            return ends
        for end in ends:
            os.close(end)
    return None
