"""Of a piece that is asked for twice, the second is cut when it is of no use, however late it begins."""

from __future__ import annotations

import threading

from holotensor_net.engine.races import Private, Prize, Race
from holotensor_net.transport.client import Answer, Ask
from holotensor_net.values import HeadInfo, RangeRequest

WANTED = RangeRequest(0, 4)
ASK = Ask("file", WANTED)
PRIZE = Prize(1, ASK, Answer(HeadInfo(4), WANTED, False, 1), Private(WANTED))


def race() -> Race:
    return Race([], ASK, 0, 0.0)


def test_a_second_that_has_begun_is_cut_at_the_end_of_the_first() -> None:
    it = race()
    second = it.double()
    assert not second.interrupt.fired.is_set()
    assert it.end() is None
    assert second.interrupt.fired.is_set()


def test_a_second_that_begins_after_the_end_is_cut_at_once() -> None:
    it = race()
    it.end()
    assert it.double().interrupt.fired.is_set()


def test_nobody_waits_for_a_second_of_a_race_that_was_stopped() -> None:
    for is_late in (False, True):
        it = race()
        second = None if is_late else it.double()
        it.stop()
        second = second or it.double()
        assert it.first.fired.is_set()
        assert second.interrupt.fired.is_set()
        assert second.ended.is_set()
        it.await_second(60.0)


def test_a_second_is_waited_for_until_it_has_ended() -> None:
    it = race()
    it.await_second(60.0)  # there is none
    second = it.double()
    threading.Timer(0.01, second.ended.set).start()
    it.await_second(60.0)
    assert second.ended.is_set()


def test_a_second_that_wins_cuts_the_first() -> None:
    it = race()
    it.double()
    assert it.win(PRIZE)
    assert it.first.fired.is_set()
    assert not it.win(PRIZE)
    assert it.end() is PRIZE
