"""Sinks: where the bytes of an answer go."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable

from ..errors import NetworkError
from ..storage.memory import MemoryPart
from ..storage.parts import PartFile
from ..transport.client import Write
from ..values import RangeRequest
from .request_cache import Destination

__all__ = ["Bounded", "Scatter"]

_LONG = 64 * 1024
"""Bytes of a place from which a read of its own costs less than a copy."""


class Scatter:
    """Writes a stream of one object's bytes to the places that want parts of it. ``spent``: seconds in which files took
    long parts, or were waited for."""

    def __init__(
        self, places: list[tuple[RangeRequest, Destination]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spent = 0.0
        self._clock = clock
        self._places = sorted(places, key=lambda place: place[0].start)
        self._starts = [wanted.start for wanted, _ in self._places]

    def __call__(self, offset: int, data: memoryview) -> None:
        end = offset + len(data)
        first = max(0, bisect.bisect_right(self._starts, offset) - 1)
        for wanted, destination in self._places[first:]:
            low, high = max(wanted.start, offset), min(wanted.stop, end)
            if low < high:
                self._write(destination, low - wanted.start, data[low - offset : high - offset])
            if wanted.stop >= end:
                break

    def _write(self, destination: Destination, offset: int, data: memoryview) -> None:
        if len(data) < _LONG or not isinstance(destination, PartFile):
            destination.write(offset, data)
            return
        began = self._clock()
        destination.write(offset, data)
        self.spent += self._clock() - began

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
        """The memory where what comes from ``offset`` on belongs, if that is one place, and a long one."""
        match self._alone(offset, most):
            case wanted, MemoryPart() as destination, most:
                return destination.room(offset - wanted.start, most)
        return None

    def _alone(self, offset: int, most: int) -> tuple[RangeRequest, Destination, int] | None:
        """The one place where many bytes from ``offset`` on belong, and how many of ``most``; None if they are few, or
        belong to several."""
        index = bisect.bisect_right(self._starts, offset) - 1
        if index < 0:
            return None
        wanted, destination = self._places[index]
        most = min(most, wanted.stop - offset)
        is_alone = index + 1 == len(self._places) or self._starts[index + 1] >= offset + most
        return (wanted, destination, most) if most >= _LONG and is_alone else None


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
