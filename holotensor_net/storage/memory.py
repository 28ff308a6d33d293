"""A fragment's bytes while they arrive in memory: what a part file is, for those that have no disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import Any

from ..errors import CacheError, NetworkError
from ..values import blake3_hasher, blake3_of
from .prefix import Prefix

__all__ = ["MemoryPart"]

_MAPPING_PAYS_FROM = 1 << 20
_STEP = 1 << 22  # bytes that are hashed at one go


class MemoryPart:
    """Takes bytes at offsets, from any number of threads where they are disjoint; gives one read-only view in the end.

    With a known ``size`` the memory is touched for the first time when the bytes come; with None it grows, and is to be
    written in order. ``spare``: bytes that may be in use, and kept for others once nobody holds a view any more, here
    and elsewhere in the process. ``is_proved``: its BLAKE3 digest will be asked for, and is taken as the bytes come.
    Raises NetworkError where there is no room for so many.
    """

    _prefix: Prefix | None = None

    def __init__(self, size: int | None, *, spare: int = 0, is_proved: bool = False) -> None:
        try:
            self._fixed = _memory(size, spare) if size else None
        except (OSError, OverflowError, MemoryError) as error:
            raise NetworkError(
                f"there is no memory for {size} bytes: keep them on disk (cache_dir=, max_cache_size=), or load ranges"
            ) from error
        self._growing = bytearray() if size is None else None
        self._stop = size
        if size and is_proved:
            self._prefix = Prefix(blake3_hasher())

    @classmethod
    def of(cls, fd: int, size: int) -> MemoryPart:
        """The first ``size`` bytes of an open file, fewer only if it ends before. Raises OSError, or CacheError where
        there is no room for them."""
        try:
            copy, length = cls(size), 0
        except NetworkError as error:
            raise CacheError(error.message) from error
        while (room := copy.room(length, _STEP)) and (got := os.preadv(fd, [room], length)):
            length += got
        copy.truncate(length)
        return copy

    def part(self, start: int, stop: int) -> MemoryPart:
        """Another fragment's part, which is bytes ``start`` up to ``stop`` of this one; each view keeps all of it."""
        assert self._fixed is not None
        part = object.__new__(MemoryPart)
        part._fixed, part._growing, part._stop = memoryview(self._fixed)[start:stop], None, stop - start
        return part

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put ``data`` at ``offset``. Raises ValueError beyond a known size."""
        stop = offset + len(data)
        if self._growing is not None:
            self._growing[offset:stop] = data
        elif self._fixed is not None and stop <= len(self._fixed):
            self._fixed[offset:stop] = data
        elif data:
            raise ValueError(f"bytes {offset}–{stop} lie beyond the end")

    def room(self, offset: int, most: int) -> memoryview | None:
        """The memory from ``offset`` on, ``most`` bytes at most, to be filled from outside; None where it grows.

        It is there for as long as the view is held, whatever becomes of the part.
        """
        fixed = self._fixed
        return None if fixed is None or offset >= len(fixed) else memoryview(fixed)[offset : offset + most]

    def view(self) -> memoryview:
        """All bytes, read-only, without a copy."""
        whole = self._fixed if self._fixed is not None else self._growing or b""
        data = memoryview(whole).toreadonly()
        return data if len(data) == self._stop else data[: self._stop]

    def truncate(self, size: int) -> None:
        """Cut it to ``size`` bytes: a second go may have been shorter than the first."""
        self._stop = size

    def settle(self, start: int, stop: int) -> None:
        """These bytes will not change any more: take them into the digest, if that will be asked for."""
        if self._prefix is not None and self._prefix.claim(self._prefix.add(start, stop)):
            try:
                with contextlib.suppress(OSError):  # it was discarded
                    self._prefix.hash(self._blocks)
            finally:
                self._prefix.release()

    def digest(self) -> str:
        """The BLAKE3 digest of all bytes, 64 hex digits; those that were settled have been hashed already."""
        view = self.view()
        if self._prefix is None or not self._prefix.length:
            return blake3_of(view)
        return self._prefix.digest(self._blocks, len(view))

    def _blocks(self, start: int, stop: int) -> Iterator[memoryview]:
        rest = self.view()[start:stop]
        return (rest[at : at + _STEP] for at in range(0, len(rest), _STEP))

    def keep(self) -> None:
        """Memory is of use to nobody else: :meth:`discard`."""
        self.discard()

    def discard(self) -> None:
        """Let the memory go; views that are held keep it."""
        self._fixed, self._growing = None, None


class _Spare:
    """Mappings that nobody looks into any more, for whoever wants one next: to fill pages that have been touched takes
    a quarter of the processor's time that new ones take (measured: 0.25 and 1.05 s/GB, from a socket).

    The system may take the pages back whenever it lacks some. There is no lock, which a finalizer might find held by
    the very thread that it runs in; each step is a single one of a list's own.
    """

    def __init__(self) -> None:
        self._mappings: list[mmap.mmap] = []
        self._lent: list[mmap.mmap] = []

    def lend(self, size: int, most: int) -> mmap.mmap:
        """A mapping of ``size`` bytes or more, of which somebody else has no use, or a new one."""
        mapping = self.take(size)
        if mapping is None:
            self._trim(most - size)
            mapping = _mapping(size)
        self._lent.append(mapping)
        return mapping

    def take(self, size: int) -> mmap.mmap | None:
        """The shortest mapping of ``size`` bytes or more, unless it is twice as long."""
        while fitting := [each for each in tuple(self._mappings) if size <= len(each) <= 2 * size]:
            shortest = min(fitting, key=len)
            with contextlib.suppress(ValueError):  # another thread has just taken it
                self._mappings.remove(shortest)
                return shortest
        return None

    def keep(self, mapping: mmap.mmap, most: int) -> None:
        """Keep a mapping that was lent, and the latest of the others, up to ``most`` bytes with those that are lent."""
        with contextlib.suppress(ValueError):
            self._lent.remove(mapping)
        with contextlib.suppress(OSError):
            mapping.madvise(_RECLAIMABLE)
            self._mappings.append(mapping)
        self._trim(most)

    def _trim(self, most: int) -> None:
        """Let the oldest go until there are ``most`` bytes with those that are lent."""
        while self._mappings and sum(map(len, (*self._mappings, *self._lent))) > most:
            with contextlib.suppress(IndexError):
                del self._mappings[0]


_SPARE = _Spare()
_RECLAIMABLE: int = getattr(mmap, "MADV_FREE", -1)


def _memory(size: int, spare: int) -> bytearray | mmap.mmap | memoryview:
    """Memory of our own, mapped where it is large. Pages of 2 MiB would take two to three times as long to touch first,
    where the system has to make them (measured on a virtual machine: 1.6–3.2 s/GB; 0.9–1.1 with 4 KiB)."""
    if size < _MAPPING_PAYS_FROM:
        return bytearray(size)
    length = _rounded(size)
    if length > spare or _RECLAIMABLE < 0:
        return _mapping(size)
    mapping = _SPARE.lend(length, spare)
    try:
        lent = _lent(mapping)
    except (ImportError, OSError):  # a library cannot be opened when there are too many open files
        return mapping if len(mapping) == size else memoryview(mapping)[:size]
    weakref.finalize(lent, _SPARE.keep, mapping, spare).atexit = False  # others may still look into it at the exit
    return memoryview(lent).cast("B")[:size]


def _mapping(size: int) -> mmap.mmap:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **private)


def _rounded(size: int) -> int:
    """``size``, up to an eighth more, so that nearly equal ones may follow each other; what is not touched is free."""
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step


def _lent(mapping: mmap.mmap) -> Any:
    """An object over a mapping that every view of it keeps alive, and whose end is therefore theirs."""
    from ctypes import c_char  # takes 2 ms to import

    return (c_char * len(mapping)).from_buffer(mapping)
