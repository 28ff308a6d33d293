"""Which endpoint is asked: by priority, past those that cannot be reached, and one probe at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.config import CdnEndpoint
from holotensor_net.engine.routes import Routes, Wait, is_bad_answer, is_unreachable
from holotensor_net.errors import (
    CacheError,
    ChecksumMismatch,
    ConnectionFailed,
    HttpError,
    NetworkError,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RangeNotSupported,
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


BROKEN = HttpError(500)


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (HttpError(500), True),
        (RateLimited(status=429), True),
        (RetriesExhausted(last_error=RateLimited(status=503)), True),
        (StalledTransfer(), True),
        (ConnectionFailed(established=True), True),
        (ProtocolError(), True),
        (ChecksumMismatch("blake3:0", "blake3:1"), True),
        (NotFound(404), False),
        (HttpError(403), False),
        (ObjectChanged(), False),
        (RangeNotSupported(), False),
        (CacheError(), False),
    ],
)
def test_what_counts_as_a_bad_answer(error: NetworkError, says_so: bool) -> None:
    assert is_bad_answer(error) is says_so


def test_one_that_recovers_is_probed_and_used_again_although_another_is_well() -> None:
    road = routes(0, 1)
    road.answered(1, 0.0)
    road.unreachable(0, REFUSED, 1.0)
    assert road.choose((), 1.05) == 1
    assert [road.choose((), 1.2) for _ in range(3)] == [0, 1, 1]  # one probe
    road.unreachable(0, REFUSED, 1.3)
    assert road.choose((), 1.4) == 1
    assert road.choose((), 1.6) == 0
    road.answered(0, 1.7)
    assert [road.choose((), 1.7) for _ in range(3)] == [0, 0, 0]


def test_beside_others_probes_become_rare() -> None:
    road, probes = routes(0, 1), []
    for now in range(200):
        if road.choose((), float(now)) == 0:
            probes.append(now)
            road.unreachable(0, REFUSED, float(now))
    assert len(probes) < 15
    assert max(after - before for before, after in pairwise(probes)) <= 31


def test_bad_answers_open_a_circuit_and_good_ones_and_time_outweigh_them() -> None:
    road = routes(0, 1)
    for now in (1.0, 2.0):
        road.failed(0, BROKEN, now)
    assert road.choose((), 2.0) == 0
    road.delivered(0, 0.01, 2.0)
    road.failed(0, BROKEN, 3.0)
    assert road.choose((), 3.0) == 0
    road.failed(0, BROKEN, 100.0)
    assert road.choose((), 100.0) == 0
    road.failed(0, BROKEN, 100.0)
    road.failed(0, BROKEN, 100.0)
    assert road.choose((), 100.0) == 1
    assert road.choose((), 100.2) == 0
    road.failed(0, BROKEN, 100.2)  # the probe
    assert road.choose((), 100.3) == 1
    assert road.choose((), 100.5) == 0
    road.delivered(0, 0.01, 100.6)
    assert road.choose((), 100.6) == 0


def test_one_that_asks_for_rest_gets_it_where_there_is_another() -> None:
    for road, asked in ((routes(0, 1), 1), (routes(0), 0)):
        road.failed(0, RateLimited(retry_after=20.0), 0.0)
        assert road.choose((), 19.0) == asked
        assert road.choose((), 20.0) == 0
    road = routes(0, 1)
    road.failed(0, RateLimited(retry_after=1e9), 0.0)
    assert road.choose((), 61.0) == 0


def test_one_that_answers_badly_is_asked_where_there_is_none_better() -> None:
    road = routes(0, 1)
    for _ in range(5):
        road.failed(0, BROKEN, 0.0)
    road.unreachable(1, REFUSED, 0.0)
    assert road.choose((), 0.0) == 0
    assert road.choose({0}, 0.0) is REFUSED


def test_the_callers_region_goes_first_among_equals() -> None:
    endpoints = [
        CdnEndpoint(f"https://cdn{n}.example.com", region=region, priority=priority)
        for n, (region, priority) in enumerate([("us", 0), (None, 0), ("eu", 0), ("eu", 1)])
    ]
    assert Routes(endpoints, outage=OUTAGE, region="eu").choose((), 0.0) == 2
    assert Routes(endpoints, outage=OUTAGE, region="eu").choose({2}, 0.0) == 0
    assert Routes(endpoints, outage=OUTAGE).choose((), 0.0) == 0


def test_one_that_is_much_slower_stands_behind_its_equals_while_that_is_known() -> None:
    road = routes(0, 0, 1)
    road.delivered(0, 0.5, 0.0)
    assert road.choose((), 0.0) == 0  # of the other nothing is known
    road.delivered(1, 0.1, 1.0)
    road.delivered(2, 0.01, 1.0)  # of another rank
    assert road.choose((), 1.0) == 1
    assert road.choose((), 60.5) == 0  # it may have changed


def test_a_load_stays_where_it_was_begun_while_that_is_well() -> None:
    road = routes(0, 1)
    assert road.choose((), 0.0, keep=1) == 1
    assert road.choose({1}, 0.0, keep=1) == 0
    road.unreachable(1, REFUSED, 0.0)
    assert road.choose((), 0.0, keep=1) == 0


def test_only_one_that_is_well_is_asked_besides() -> None:
    road = routes(0, 1, 2)
    assert road.other(0, (), 0.0) == 1
    assert road.other(1, (), 0.0) == 0
    road.unreachable(1, REFUSED, 0.0)
    assert road.other(0, (), 10.0) == 2
    assert road.other(0, {2}, 10.0) is None
    assert routes(0).other(0, (), 0.0) is None


def test_those_that_are_well_come_first_in_order() -> None:
    road = routes(2, 1, 0)
    assert road.in_order(0.0) == [2, 1, 0]
    road.unreachable(2, REFUSED, 0.0)
    assert road.in_order(0.0) == [1, 0, 2]


def test_a_probe_that_is_overtaken_keeps_the_circuit_open() -> None:
    road = routes(0, 1)
    road.unreachable(0, REFUSED, 0.0)
    assert road.choose((), 1.0) == 0
    road.overtaken(0, 1.5)
    assert road.choose((), 1.6) == 1
    assert road.choose((), 3.0) == 0


EVENTS = ("choose", "answered", "unreachable", "released", "failed", "delivered", "overtaken")
Step = tuple[str, int, float]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(EVENTS),
        st.integers(0, 2),
        st.floats(0.0, 3.0),
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
            case "failed":
                road.failed(index, BROKEN, now)
            case "delivered":
                road.delivered(index, seconds, now)
                assert isinstance(road.choose((), now), int)
            case "overtaken":
                road.overtaken(index, now)
    for index in range(3):
        road.released(index)
    for _ in range(100):
        chosen = road.choose((), now)
        if not isinstance(chosen, Wait):
            break
        now += chosen.seconds
    assert isinstance(chosen, int | NetworkError)


def test_an_endpoint_is_known_well_for_a_moment_after_it_answered() -> None:
    known = routes(0)
    assert not known.is_known_well(0, 5.0)
    known.answered(0, 5.0)
    assert known.is_known_well(0, 5.0)
    assert not known.is_known_well(0, 6.0)
    known.unreachable(0, REFUSED, 5.0)
    assert not known.is_known_well(0, 5.0)
