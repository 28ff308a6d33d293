"""Sinks: where the bytes of an answer go."""

from __future__ import annotations

import bisect

from ..errors import NetworkError
from ..storage.memory import MemoryPart
from ..storage.parts import PartFile
from ..transport.client import Write
from ..values import RangeRequest
from .request_cache import Destination

__all__ = ["Bounded", "Scatter"]

_LONG = 64 * 1024
"""Bytes of a place from which a read of its own costs less than a copy."""

_PIPED = 512 * 1024
"""Bytes of which a pipe of a mebibyte can hold all, though pages of packets are not full."""


class Scatter:
    """Writes a stream of one object's bytes to the places that want parts of it."""

    def __init__(self, places: list[tuple[RangeRequest, Destination]]) -> None:
        self._places = sorted(places, key=lambda place: place[0].start)
        self._starts = [wanted.start for wanted, _ in self._places]

    def __call__(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        first = max(0, bisect.bisect_right(self._starts, offset) - 1)
        for wanted, destination in self._places[first:]:
            low, high = max(wanted.start, offset), min(wanted.stop, end)
            if low < high:
                destination.write(low - wanted.start, data[low - offset : high - offset])
            if wanted.stop >= end:
                break

    def block(self, offset: int, most: int) -> int:
        """How many of the bytes from ``offset`` on, of ``most``, should be written at once: up to the next multiple of
        ``most`` in the place where they belong.

        The system keeps a file in as large pages as it is written in, if they lie where such pages lie; then whoever
        maps it later meets less than half the page faults (measured: 600 with blocks of 1 MiB, 1500 with 256 KiB,
        5500 with 64 KiB), and writing takes less time too.
        """
        index = bisect.bisect_right(self._starts, offset) - 1
        return most - (offset - self._starts[max(0, index)]) % most

    def room(self, offset: int, most: int) -> memoryview | None:
        """The memory where what comes from ``offset`` on belongs, if that is one place, and a long one or the only
        one."""
        match self._alone(offset, most):
            case wanted, MemoryPart() as destination, most:
                return destination.room(offset - wanted.start, most)
        return None

    def piped(self, offset: int, most: int) -> int:
        """How many of the bytes from ``offset`` on, of ``most``, may come in a pipe to :meth:`take`: up to the next
        multiple of ``most``, if they belong into one file, and are many."""
        match self._alone(offset, most):
            case _, PartFile(), length if length >= _LONG:
                return min(length, self.block(offset, min(most, _PIPED)))
        return 0

    def take(self, offset: int, pipe: int, size: int) -> None:
        """Move bytes that :meth:`piped` has allowed from a pipe to their file."""
        wanted, destination = self._places[bisect.bisect_right(self._starts, offset) - 1]
        assert isinstance(destination, PartFile)
        destination.take(offset - wanted.start, pipe, size)

    def _alone(self, offset: int, most: int) -> tuple[RangeRequest, Destination, int] | None:
        """The one place where many bytes from ``offset`` on belong, and how many of ``most``; None if they are few, or
        belong to several."""
        index = bisect.bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        wanted, destination = self._places[index]
        most = min(most, wanted.stop - offset)
        is_alone = index + 1 == len(self._places) or self._starts[index + 1] >= offset + most
        is_long = most >= _LONG or len(self._places) == 1
        return (wanted, destination, most) if is_long and is_alone and most > 0 else None


class Bounded:
    """Writes a body of unknown size up to ``most`` bytes of it: a server may send for ever."""

    def __init__(self, write: Write, most: int) -> None:
        self._write = write
        self._most = most

    def __call__(self, offset: int, data: memoryview) -> None:
        if offset + len(data) > self._most:
            raise NetworkError(
                f"the server did not say how long the body is, and it is longer than {self._most} bytes: raise"
                " memory_budget, or max_cache_size if it goes to disk"
            )
        self._write(offset, data)
