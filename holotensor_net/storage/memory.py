"""A fragment's bytes while they arrive in memory: what a part file is, for those that have no disk."""

from __future__ import annotations

import mmap

from ..errors import NetworkError
from ..values import blake3_of

__all__ = ["MemoryPart"]

_MAPPING_PAYS_FROM = 1 << 20


class MemoryPart:
    """Takes bytes at offsets, from any number of threads where they are disjoint; gives one read-only view in the end.

    With a known ``size`` the memory is touched for the first time when the bytes come; with None it grows, and is to be
    written in order. Raises NetworkError where there is no room for so many.
    """

    def __init__(self, size: int | None) -> None:
        try:
            self._fixed = _memory(size) if size else None
        except (OSError, OverflowError, MemoryError) as error:
            raise NetworkError(
                f"there is no memory for {size} bytes: keep them on disk (cache_dir=, max_cache_size=), or load ranges"
            ) from error
        self._growing = bytearray() if size is None else None
        self._stop = size

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
        return memoryview(whole).toreadonly()[: self._stop]

    def truncate(self, size: int) -> None:
        """Cut it to ``size`` bytes: a second go may have been shorter than the first."""
        self._stop = size

    def settle(self, start: int, stop: int) -> None:
        """These bytes will not change any more."""

    def digest(self) -> str:
        """The BLAKE3 digest of all bytes, 64 hex digits."""
        return blake3_of(self.view())

    def keep(self) -> None:
        """Memory is of use to nobody else: :meth:`discard`."""
        self.discard()

    def discard(self) -> None:
        """Let the memory go; views that are held keep it."""
        self._fixed, self._growing = None, None


def _memory(size: int) -> mmap.mmap | bytearray:
    """Memory of our own, mapped where it is large. Pages of 2 MiB would take two to three times as long to touch first,
    where the system has to make them (measured on a virtual machine: 1.6–3.2 s/GB; 0.9–1.1 with 4 KiB)."""
    if size < _MAPPING_PAYS_FROM:
        return bytearray(size)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, size, **private)
