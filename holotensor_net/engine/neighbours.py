"""Neighbours: the short fragments that are queued, where they lie in their objects, and which of them come together."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TypeAlias

from ..values import RangeRequest, Validator
from .planning import join_neighbours
from .priority import PrioritizedFragment

__all__ = ["Neighbours"]

_Place: TypeAlias = tuple[int, int, int, PrioritizedFragment]
"""Where a fragment begins and ends, and what tells it from others of the same range: no two fragments are compared."""


class Neighbours:
    """The queued short fragments, in rows: those of one object and one version that are asked of one host, which may
    share a request, in order of their ranges.

    O(log n) to find those that stand near each other. Not thread-safe: its owner has a lock.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Validator | None, int], _Row] = {}
        self._latest: tuple[str, Validator | None, int, _Row] | None = None

    def __len__(self) -> int:
        """How many rows there are: none is empty."""
        return len(self._rows)

    def __contains__(self, fragment: PrioritizedFragment) -> bool:
        row, wanted = self._row(fragment), fragment.request.byte_range
        return row is not None and wanted is not None and row.find(fragment, wanted) is not None

    def add(self, fragment: PrioritizedFragment, wanted: RangeRequest) -> None:
        row = self._row(fragment)
        if row is None:
            request = fragment.request
            row = self._rows[request.path, request.validator, fragment.lane] = _Row()
        row.add((wanted.start, wanted.stop, id(fragment), fragment))

    def discard(self, fragment: PrioritizedFragment) -> None:
        row, wanted = self._row(fragment), fragment.request.byte_range
        if row is None or wanted is None or (index := row.find(fragment, wanted)) is None:
            return
        del row.places[index]
        self._drop_empty(row, fragment)

    def discard_all(self, fragments: Sequence[PrioritizedFragment]) -> None:
        """:meth:`discard` for fragments of one row in order, which mostly stand side by side."""
        row, wanted = self._row(fragments[0]), fragments[0].request.byte_range
        first = None if row is None or wanted is None else row.find(fragments[0], wanted)
        if row is not None and first is not None:
            end = first + len(fragments)
            if [place[3] for place in row.places[first:end]] == fragments:
                del row.places[first:end]
                self._drop_empty(row, fragments[0])
                return
        for fragment in fragments:
            self.discard(fragment)

    def clear(self) -> None:
        self._rows.clear()
        self._latest = None

    def joined(
        self, fragment: PrioritizedFragment, wanted: RangeRequest, *, gap: int, length: int
    ) -> list[PrioritizedFragment]:
        """Those of a fragment's level to bring along when it is asked for, in order, in a request that grows to
        ``length`` bytes at most, over gaps of at most ``gap`` bytes."""
        row = self._row(fragment)
        if row is None:
            return []
        places = row.around(fragment, wanted, gap, length)
        if not places:
            return []
        ranges = [place[3].request.byte_range or wanted for place in places]
        return [places[index][3] for index in join_neighbours(wanted, ranges, max_gap=gap, max_length=length)]

    def _row(self, fragment: PrioritizedFragment) -> _Row | None:
        request, latest = fragment.request, self._latest
        path, validator, lane = request.path, request.validator, fragment.lane
        if latest is not None and latest[0] is path and latest[1] is validator and latest[2] == lane:
            return latest[3]  # a glance: validators take long to hash, and mostly it is the same one again
        row = self._rows.get((path, validator, lane))
        if row is not None:
            self._latest = path, validator, lane, row
        return row

    def _drop_empty(self, row: _Row, fragment: PrioritizedFragment) -> None:
        if not row.places:
            request = fragment.request
            del self._rows[request.path, request.validator, fragment.lane]
            self._latest = None


class _Row:
    """Fragments of one object in order of their ranges."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self._longest = 0

    def add(self, place: _Place) -> None:
        places = self.places
        if not places or places[-1] < place:
            places.append(place)
        else:
            bisect.insort(places, place)
        self._longest = max(self._longest, place[1] - place[0])

    def find(self, fragment: PrioritizedFragment, wanted: RangeRequest) -> int | None:
        places = self.places
        index = bisect.bisect_left(places, (wanted.start, wanted.stop, id(fragment), fragment))
        return index if index < len(places) and places[index][3] is fragment else None

    def around(self, anchor: PrioritizedFragment, wanted: RangeRequest, gap: int, length: int) -> list[_Place]:
        """Those of its level that a request for ``wanted`` could come to bring along, in order and without overlaps, if
        it grows to ``length`` bytes at most, over gaps of at most ``gap`` bytes."""
        before = self._before(anchor, wanted, gap, length)
        before.reverse()
        return before + self._after(anchor, wanted, gap, length)

    def _after(self, anchor: PrioritizedFragment, wanted: RangeRequest, gap: int, length: int) -> list[_Place]:
        places, level = self.places, anchor.priority
        found, end, most = [], wanted.stop, wanted.start + length
        for index in range(bisect.bisect_left(places, (end, 0, 0, anchor)), len(places)):
            start, stop, _, fragment = place = places[index]
            if start - end > gap:
                break
            if start >= end and stop <= most and fragment.priority is level:
                found.append(place)
                end = stop
        return found

    def _before(self, anchor: PrioritizedFragment, wanted: RangeRequest, gap: int, length: int) -> list[_Place]:
        places, level = self.places, anchor.priority
        found, begin, least = [], wanted.start, wanted.stop - length
        for index in range(bisect.bisect_left(places, (begin, 0, 0, anchor)) - 1, -1, -1):
            start, stop, _, fragment = place = places[index]
            if begin - start > gap + self._longest:
                break
            if 0 <= begin - stop <= gap and start >= least and fragment.priority is level:
                found.append(place)
                begin = start
        return found
