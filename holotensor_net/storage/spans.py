"""Spans: which ranges of objects are at hand, so that any part of one is found, however it was asked for."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

from ..values import RangeRequest

__all__ = ["Span", "Spans"]

_FEW = 64
"""Ranges that are not looked through for such as are gone."""


class Span(NamedTuple):
    """A range of an object, and the ``key`` of its bytes."""

    start: int
    stop: int
    key: str


class Spans:
    """Ranges by the object that they are of; none of one object overlap. ``is_there`` tells of a key whether its bytes
    still are; what is gone is forgotten when it is met with.

    Not thread-safe: its owner has a lock. O(log n) to find, and to add in order.
    """

    def __init__(self, is_there: Callable[[str], bool]) -> None:
        self._is_there = is_there
        self._rows: dict[str, list[Span]] = {}
        self._length = 0
        self._enough = _FEW

    def __len__(self) -> int:
        """How many ranges are known, those that are gone included."""
        return self._length

    def covering(self, name: str, wanted: RangeRequest) -> Span | None:
        """The range of an object that holds all of another one."""
        row = self._rows.get(name)
        if row is None:
            return None
        index = bisect.bisect_left(row, (wanted.start + 1,)) - 1
        if index < 0 or row[index].stop < wanted.stop:
            return None
        if self._is_there(row[index].key):
            return row[index]
        self._cut(name, row, index, index + 1)
        return None

    def has_any(self, name: str, start: int, stop: int) -> bool:
        """Whether any byte from ``start`` up to ``stop`` is at hand."""
        row = self._rows.get(name)
        if row is None:
            return False
        first, end = self._touched(row, start, stop)
        there = first
        while there < end and not self._is_there(row[there].key):
            there += 1
        self._cut(name, row, first, there)
        return there < end

    def add(self, name: str, span: Span) -> None:
        """A range of an object is at hand now, in place of those that it overlaps."""
        row = self._rows.setdefault(name, [])
        first, end = self._touched(row, span.start, span.stop)
        row[first:end] = [span]
        self._length += 1 - (end - first)
        if self._length > self._enough:
            self._sweep()

    @staticmethod
    def _touched(row: list[Span], start: int, stop: int) -> tuple[int, int]:
        """Which of a row overlap a range: from the first of these numbers up to the second."""
        first = bisect.bisect_left(row, (start,))
        if first and row[first - 1].stop > start:
            first -= 1
        return first, bisect.bisect_left(row, (stop,), lo=first)

    def _cut(self, name: str, row: list[Span], first: int, end: int) -> None:
        del row[first:end]
        self._length -= end - first
        if not row:
            del self._rows[name]

    def _sweep(self) -> None:
        """Forget whatever is gone, once that may be half of it: O(1) amortised."""
        there = {name: [each for each in row if self._is_there(each.key)] for name, row in self._rows.items()}
        self._rows = {name: row for name, row in there.items() if row}
        self._length = sum(map(len, self._rows.values()))
        self._enough = max(_FEW, 2 * self._length)
