"""Which endpoint is asked: by priority, past those that cannot be reached, and one probe at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.config import CdnEndpoint
from holotensor_net.engine.routes import Routes, Wait, is_unreachable
from holotensor_net.errors import (
    ChecksumMismatch,
    ConnectionFailed,
    NetworkError,
    NotFound,
    RateLimited,
    RetriesExhausted,
    StalledTransfer,
    Timeout,
)

OUTAGE = 30.0
REFUSED = ConnectionFailed("refused")


def routes(*priorities: int) -> Routes:
    endpoints = [CdnEndpoint(f"https://cdn{n}.example.com", priority=p) for n, p in enumerate(priorities)]
    return Routes(endpoints, outage=OUTAGE)


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (ConnectionFailed(), True),
        (ConnectionFailed(established=True), False),
        (Timeout(), True),
        (StalledTransfer(), False),
        (RetriesExhausted(last_error=ConnectionFailed()), True),
        (RetriesExhausted(last_error=StalledTransfer()), False),
        (RetriesExhausted(last_error=OSError()), False),
        (NotFound(), False),
        (RateLimited(), False),
        (ChecksumMismatch(), False),
    ],
)
def test_what_counts_as_unreachable(error: NetworkError, says_so: bool) -> None:
    assert is_unreachable(error) is says_so


def test_the_lowest_priority_goes_first_and_equals_in_their_order() -> None:
    assert routes(5, 1, 1).choose((), 0.0) == 1
    assert routes(5, 1, 1).choose({1}, 0.0) == 2
    assert routes(5, 1, 1).choose({1, 2}, 0.0) == 0


def test_none_is_left_once_all_were_tried() -> None:
    assert routes(0, 1).choose({0, 1}, 0.0) is None


def test_one_that_never_answered_fails_its_loads_at_once() -> None:
    road = routes(0)
    assert road.unreachable(0, REFUSED, 1.0) is False
    assert road.choose((), 1.0) is REFUSED


def test_one_that_cannot_be_reached_is_passed_over() -> None:
    road = routes(0, 1)
    road.unreachable(0, REFUSED, 1.0)
    assert road.choose((), 1.0) == 1
    road.unreachable(1, REFUSED, 1.0)
    assert road.choose((), 1.0) is REFUSED


def test_one_that_is_back_is_first_again() -> None:
    road = routes(0, 1)
    road.unreachable(0, REFUSED, 1.0)
    road.answered(0, 2.0)
    assert road.choose((), 2.0) == 0


def test_only_one_probe_is_sent_at_a_time() -> None:
    road = routes(0)
    road.answered(0, 0.0)
    assert road.unreachable(0, REFUSED, 1.0) is True
    assert road.choose((), 2.0) == 0
    assert isinstance(road.choose((), 2.0), Wait)
    road.released(0)
    assert road.choose((), 2.0) == 0


def test_a_probe_that_is_answered_opens_the_road() -> None:
    road = routes(0)
    road.answered(0, 0.0)
    road.unreachable(0, REFUSED, 1.0)
    road.choose((), 2.0)
    road.answered(0, 2.5)
    assert [road.choose((), 2.5) for _ in range(3)] == [0, 0, 0]


def test_pauses_grow_to_a_second() -> None:
    road = routes(0)
    road.answered(0, 0.0)
    now, pauses = 0.0, []
    for _ in range(8):
        assert road.choose((), now) == 0
        road.unreachable(0, REFUSED, now)
        wait = road.choose((), now)
        assert isinstance(wait, Wait)
        pauses.append(wait.seconds)
        now += wait.seconds
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0])


def test_many_that_fail_at_once_count_as_one_failure() -> None:
    road = routes(0)
    road.answered(0, 0.0)
    for moment in (1.0, 1.01, 1.02, 1.03):
        road.unreachable(0, REFUSED, moment)
    assert road.choose((), 1.03) == Wait(pytest.approx(0.07))


def test_an_outage_is_waited_out_and_not_longer() -> None:
    road = routes(0)
    road.answered(0, 0.0)
    assert road.unreachable(0, REFUSED, OUTAGE - 1) is True
    assert road.choose((), OUTAGE - 1) == Wait(pytest.approx(0.1))
    assert road.unreachable(0, REFUSED, OUTAGE) is False
    assert road.choose((), OUTAGE) is REFUSED


def test_during_an_outage_of_two_the_shorter_wait_counts() -> None:
    road = routes(0, 1)
    for index in (0, 1):
        road.answered(index, 0.0)
    road.unreachable(0, REFUSED, 1.0)
    road.unreachable(1, REFUSED, 1.05)
    assert road.choose((), 1.05) == Wait(pytest.approx(0.05))


Step = tuple[str, int, float]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["choose", "answered", "unreachable", "released"]), st.integers(0, 2), st.floats(0.0, 3.0)
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_happens_no_load_waits_for_ever(steps: list[Step]) -> None:
    """From any state, answering every probe leads back to an endpoint or an error within an outage's time."""
    road, now = routes(0, 1, 0), 0.0
    for step, index, seconds in steps:
        now += seconds
        match step:
            case "choose":
                chosen = road.choose({index}, now)
                assert chosen != index
                assert not isinstance(chosen, Wait) or 0 < chosen.seconds <= 1.0
            case "answered":
                road.answered(index, now)
                assert isinstance(road.choose((), now), int)
            case "unreachable":
                road.unreachable(index, REFUSED, now)
            case "released":
                road.released(index)
    for index in range(3):
        road.released(index)
    for _ in range(100):
        chosen = road.choose((), now)
        if not isinstance(chosen, Wait):
            break
        now += chosen.seconds
    assert isinstance(chosen, int | NetworkError)
