from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.engine.neighbours import Neighbours
from holotensor_net.engine.priority import PrioritizedFragment
from holotensor_net.values import LoadRequest, Priority, RangeRequest, Validator

WIDE = {"gap": 1 << 30, "length": 1 << 30}


def fragment(
    start: int,
    stop: int,
    path: str = "a",
    *,
    validator: Validator | None = None,
    lane: int = 0,
    priority: Priority = Priority.NORMAL,
) -> PrioritizedFragment:
    request = LoadRequest(f"{start}", path, byte_range=(start, stop), validator=validator, priority=priority)  # type: ignore[arg-type]
    made = PrioritizedFragment(request)
    made.lane = lane
    return made


def span(one: PrioritizedFragment) -> RangeRequest:
    assert one.request.byte_range is not None
    return one.request.byte_range


def filled(*fragments: PrioritizedFragment) -> Neighbours:
    neighbours = Neighbours()
    for one in fragments:
        neighbours.add(one, span(one))
    return neighbours


def test_they_come_in_order_whatever_order_they_were_queued_in() -> None:
    row = [fragment(start, start + 10) for start in range(0, 200, 10)]
    neighbours = filled(*random.Random(7).sample(row, len(row)))
    anchor = row[9]
    neighbours.discard(anchor)
    assert neighbours.joined(anchor, span(anchor), **WIDE) == [*row[:9], *row[10:]]
    assert neighbours.joined(anchor, span(anchor), gap=0, length=30) == row[10:12]


def test_objects_versions_hosts_and_levels_are_kept_apart() -> None:
    anchor = fragment(0, 10, validator=Validator('"v"', None, True))
    others = [
        fragment(10, 20),
        fragment(10, 20, "b", validator=Validator('"v"', None, True)),
        fragment(10, 20, validator=Validator('"w"', None, True)),
        fragment(10, 20, validator=Validator('"v"', None, True), lane=1),
        fragment(10, 20, validator=Validator('"v"', None, True), priority=Priority.LOW),
    ]
    same = fragment(10, 20, validator=Validator('"v"', None, True))
    neighbours = filled(*others, same)
    assert neighbours.joined(anchor, span(anchor), **WIDE) == [same]
    assert len(neighbours) == 5


def test_of_one_range_each_is_found_for_itself() -> None:
    twins = [fragment(0, 10) for _ in range(3)]
    neighbours = filled(*twins)
    neighbours.discard(twins[1])
    neighbours.discard(twins[1])
    assert [one in neighbours for one in twins] == [True, False, True]
    neighbours.discard_all([twins[0]])
    assert [one in neighbours for one in twins] == [False, False, True]
    neighbours.clear()
    assert (twins[2] in neighbours, len(neighbours)) == (False, 0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
def test_what_is_taken_out_is_gone_and_the_rest_stays(places: list[tuple[int, int]], draw: random.Random) -> None:
    there = [fragment(start, start + length) for start, length in places]
    neighbours = filled(*there)
    while there:
        gone = sorted(draw.sample(there, draw.randint(1, len(there))), key=span)
        neighbours.discard_all(gone)
        there = [one for one in there if one not in gone]
        assert not any(one in neighbours for one in gone)
        assert all(one in neighbours for one in there)
    assert len(neighbours) == 0
