"""Which ranges are at hand: any part of one is found, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.storage.spans import Span, Spans
from holotensor_net.values import RangeRequest

ranges = st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(ranges, max_size=30), st.lists(ranges, max_size=10), st.sets(st.integers(0, 29)))
def test_what_is_found_holds_all_of_what_was_wanted(added, wanted, gone) -> None:
    there = Spans(lambda key: int(key) not in gone)
    left: list[Span] = []
    for number, (start, stop) in enumerate(added):
        span = Span(start, stop, f"{number}")
        there.add("object", span)
        left = [one for one in left if one.stop <= start or stop <= one.start] + [span]
    for start, stop in wanted:
        expected = [one for one in left if one.start <= start and stop <= one.stop and int(one.key) not in gone]
        found = there.covering("object", RangeRequest(start, stop))
        assert ([] if found is None else [found]) == expected
        assert there.covering("other", RangeRequest(start, stop)) is None
        touched = any(one.start < stop and start < one.stop and int(one.key) not in gone for one in left)
        assert there.has_any("object", start, stop) == touched


def test_what_is_gone_is_forgotten() -> None:
    gone: set[str] = set()
    spans = Spans(lambda key: key not in gone)
    for number in range(1000):
        spans.add("object", Span(number, number + 1, f"{number}"))
        gone.add(f"{number}")
    assert len(spans) == len(spans._rows["object"]) < 100
    assert spans.covering("object", RangeRequest(999, 1000)) is None
    gone.clear()
    spans.add("one", Span(0, 5, "one"))
    gone.add("one")
    assert spans.covering("one", RangeRequest(0, 1)) is None
    assert not spans.has_any("one", 0, 5)
    assert "one" not in spans._rows


def test_objects_of_which_nothing_is_left_are_forgotten() -> None:
    gone: set[str] = set()
    spans = Spans(lambda key: key not in gone)
    for number in range(1000):
        spans.add(f"{number}", Span(0, 1, f"{number}"))
        gone.add(f"{number - 10}")
    assert len(spans) == len(spans._rows) < 100
    assert spans.covering("999", RangeRequest(0, 1)) == Span(0, 1, "999")
