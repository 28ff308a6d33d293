"""A path on which nothing moves is not full: a climb goes on without another look."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from holotensor_net import LoadRequest
from holotensor_net.engine.lanes import Lane
from holotensor_net.engine.pacing import ConcurrencyController, Interval
from holotensor_net.engine.priority import PrioritizedFragment, PriorityQueue

NAMES = itertools.count()


def lane(ceiling: int = 64, **settings: bool) -> Lane:
    """One that has much to do."""
    queue = PriorityQueue()
    for number in range(200):
        queue.push(PrioritizedFragment(LoadRequest(f"{number}", "path"), queued_at=0.0))
    return Lane(queue, ceiling, now=0.0, **{"is_adaptive": True, **settings})


def begun(at: Lane, now: float, *, until: int | None = None) -> list[int]:
    """As many pieces as may begin."""
    pieces = []
    while at.delay(now) == 0 and (until is None or at.active < until):
        pieces.append(next(NAMES))
        at.begin(pieces[-1], now)
        at.record(1000, pieces[-1], now)
    return pieces


def moved(at: Lane, pieces: Iterable[int], times: Iterable[float]) -> None:
    for now in times:
        for piece in pieces:
            at.record(100_000, piece, now)


def test_twice_as_many_are_tried_once_a_path_has_been_silent_for_as_long_as_it_moved() -> None:
    at = lane()
    pieces = begun(at, 0.001)
    moved(at, pieces, (0.01, 0.02, 0.03))
    assert (len(pieces), at.limit) == (4, 4)
    assert at.wanted == 5  # one who waits for the silence
    assert at.delay(0.03) == pytest.approx(0.029)
    assert at.delay(0.05) == pytest.approx(0.009)
    assert at.delay(0.06) == 0.0
    at.begin("fifth", 0.06)
    assert (at.active, at.limit) == (5, 8)
    assert at.controller.is_climbing


@pytest.mark.parametrize(("answered", "ahead"), [(4, 2), (16, 2), (32, 4), (64, 8)])
def test_the_more_were_answered_the_more_are_begun_before_the_next_is(answered: int, ahead: int) -> None:
    at = lane(128)
    at.controller = ConcurrencyController(128, initial=128)
    while at.active < answered:
        begun(at, 0.0, until=answered)
    for number in range(ahead):
        assert at.delay(0.0) == 0.0
        at.begin(f"ahead {number}", 0.0)
    assert at.delay(0.0) == pytest.approx(0.005)
    assert at.wanted == answered + ahead + 1


def test_a_silence_of_less_than_some_round_trips_tells_nothing() -> None:
    at = lane()
    pieces = begun(at, 0.0)
    at.monitor.record_round_trip(0.05)
    moved(at, pieces, (0.001,))
    assert at.delay(0.001) == pytest.approx(0.2)


def test_what_passes_before_the_first_bytes_is_no_movement() -> None:
    at = lane()
    pieces = [next(NAMES) for _ in range(4)]
    for piece in pieces:
        at.begin(piece, 0.001)
    moved(at, pieces, (0.02, 0.03))
    assert at.delay(0.03) == pytest.approx(0.01)


def test_as_long_as_one_is_not_answered_a_silence_tells_nothing() -> None:
    at = lane()
    begun(at, 0.001, until=3)
    at.begin("slow", 0.001)
    assert at.delay(1.0) is None
    assert at.wanted == 4


@pytest.mark.parametrize(
    "reason", ["our own rate", "what is urgent", "a fixed number", "the ceiling", "a refusal", "rest"]
)
def test_a_silence_has_other_reasons_where(reason: str) -> None:
    settings = {"is_paced": reason == "our own rate", "is_adaptive": reason != "a fixed number"}
    at = lane(4 if reason == "the ceiling" or reason == "a fixed number" else 64, **settings)
    if reason == "rest":
        while at.controller.is_climbing:
            at.controller.revise(Interval(0.1, 10**7, float(at.limit), True))
    pieces = begun(at, 0.001)
    moved(at, pieces, (0.002,))
    if reason == "what is urgent":
        at.disturb()
    if reason == "a refusal":
        at.refuse(0.003)
        at.refuse(0.004)
        moved(at, pieces, (0.005,))
    limit = at.limit
    assert at.active >= limit
    assert at.delay(0.9) is None
    at.begin("urgent", 0.9)
    assert at.limit <= limit


def test_what_came_before_the_silence_is_what_the_next_number_is_compared_with() -> None:
    controller = ConcurrencyController(64)
    controller.revise(Interval(0.02, 10**6, 4.0, True))  # 50 MB/s
    controller.rouse()
    assert controller.limit == 8
    assert controller.revise(Interval(0.02, 2 * 10**6, 8.0, True)) == 16


def test_a_silence_before_anything_was_measured_is_believed_and_nothing_compared_with_it() -> None:
    controller = ConcurrencyController(64)
    controller.rouse()
    assert controller.limit == 8
    for _ in range(2):
        controller.revise(Interval(0.02, 10**6, 8.0, True))
    assert controller.limit == 16


def test_a_controller_at_rest_is_not_roused() -> None:
    controller = ConcurrencyController(64)
    while controller.is_climbing:
        controller.revise(Interval(0.1, 10**7, float(controller.limit), True))
    limit = controller.limit
    controller.rouse()
    assert controller.limit == limit


def test_where_files_take_most_of_the_time_fewer_connections_bring_as_much() -> None:
    at = lane()
    pieces = begun(at, 0.0)
    assert len(pieces) == 4
    for step in range(1, 40):
        for piece in pieces:
            at.record(100_000, piece, step / 100, spent=0.009)
    assert at.limit == 1
    for piece in pieces[1:]:
        at.end(piece, 0.4)
    for step in range(40, 80):
        at.record(100_000, pieces[0], step / 100, spent=0.001)
    assert at.limit > 1  # they do no more


def test_a_silence_in_which_files_are_written_tells_nothing_of_the_path() -> None:
    at = lane()
    pieces = begun(at, 0.001)
    for now in (0.003, 0.005, 0.007):
        for piece in pieces:
            at.record(100_000, piece, now, spent=0.0015)
    assert at.wanted == 4
    assert at.delay(0.03) is None
