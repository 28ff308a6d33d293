"""Who is given a piece, and who may send, so that so many requests a second are sent."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holotensor_net.engine.rations import Ration, Sender
from holotensor_net.values import Priority

NORMAL = Priority.NORMAL


def send_all(ration: Ration, senders: list[Sender], now: float) -> list[tuple[Sender, float]]:
    """Let senders ask until each was allowed to send, each when it was told to; gives them in order, with the times."""
    due = dict.fromkeys(senders, now)
    sent = []
    while due:
        sender = min(due, key=due.__getitem__)
        now = max(now, due[sender])
        delay = ration.send(sender, now)
        if delay:
            due[sender] = now + delay + 1e-9
        else:
            sent.append((sender, now))
            del due[sender]
    return sent


def test_without_a_rate_nothing_ever_waits() -> None:
    ration = Ration(None)
    for number in range(100):
        assert ration.delay(Priority.IDLE, 0.0) == 0
        ration.hand_out(number, 0.0)
        assert ration.send(Sender(NORMAL, number), 0.0) == 0
        assert ration.send(Sender(NORMAL), 0.0) == 0


def test_a_piece_of_which_nothing_is_sent_costs_nothing() -> None:
    ration = Ration(0.01)
    for number in range(100):
        assert ration.delay(NORMAL, 0.0) == 0
        ration.hand_out(number, 0.0)
        assert ration.delay(NORMAL, 0.0) == pytest.approx(100)
        ration.end(number, 0.0)
    ration.hand_out("last", 0.0)
    assert ration.send(Sender(NORMAL, "last"), 0.0) == 0
    ration.end("last", 0.0)
    assert ration.delay(NORMAL, 0.0) == pytest.approx(100)


def test_what_is_given_back_late_is_not_saved_up() -> None:
    ration = Ration(10.0)
    for number in range(50):
        ration.hand_out(number, number / 10)
    for number in range(50):
        ration.end(number, 5.0)
    ration.hand_out("next", 5.0)
    assert ration.delay(NORMAL, 5.0) == pytest.approx(0.05)  # a twentieth of a second's was: half a request


def test_pieces_that_are_all_held_up_send_at_the_rate_and_not_at_once() -> None:
    ration = Ration(5.0)
    senders = []
    for number in range(15):
        ration.hand_out(number, number / 5)
        senders.append(Sender(NORMAL, number))
    times = [at for _, at in send_all(ration, senders, 3.0)]
    assert times[-1] - times[0] == pytest.approx(14 / 5, abs=0.01)
    assert all(sum(at <= other < at + 0.999 for other in times) <= 5 for at in times)


def test_a_second_request_for_a_piece_is_paid_for_by_the_pieces_that_follow() -> None:
    ration = Ration(10.0)
    ration.hand_out("a", 0.0)
    assert ration.send(Sender(NORMAL, "a"), 0.0) == 0
    assert ration.send(again := Sender(NORMAL, "a"), 0.0) == pytest.approx(0.1)
    assert ration.send(again, 0.101) == 0
    assert ration.delay(NORMAL, 0.101) == pytest.approx(0.099)


def test_the_most_urgent_sends_first_and_equals_in_the_order_in_which_they_came() -> None:
    ration = Ration(1.0)
    assert ration.send(Sender(NORMAL), 0.0) == 0
    low, normal, other = Sender(Priority.LOW), Sender(NORMAL), Sender(NORMAL)
    urgent = Sender(Priority.CRITICAL)
    assert [sender for sender, _ in send_all(ration, [low, normal, other, urgent], 0.1)] == [urgent, normal, other, low]


def test_a_piece_waits_for_those_in_line_that_are_as_urgent() -> None:
    ration = Ration(1.0)
    assert ration.send(Sender(NORMAL), 0.0) == 0
    waiting = Sender(NORMAL)
    assert ration.send(waiting, 0.0) == pytest.approx(1)
    assert ration.has_line
    assert ration.delay(NORMAL, 0.0) == pytest.approx(2)
    assert ration.delay(Priority.CRITICAL, 0.0) == pytest.approx(1)
    ration.leave(waiting)
    assert not ration.has_line
    assert ration.delay(NORMAL, 0.0) == pytest.approx(1)


def test_nobody_stands_in_line_for_ever_while_what_is_more_urgent_keeps_coming() -> None:
    ration, low, now = Ration(10.0), Sender(Priority.LOW), 0.0
    assert ration.send(Sender(NORMAL), now) == 0
    while ration.send(low, now):
        assert now < 5.5
        now += 0.05
        if ration.delay(Priority.HIGH, now) == 0:
            ration.hand_out(now, now)
            ration.send(Sender(Priority.HIGH, now), now)
    assert now > 4.9


@settings(max_examples=25)
@given(
    rate=st.floats(20.0, 200.0),
    lates=st.lists(st.floats(0.0, 0.04), min_size=1, max_size=50),
    extra=st.integers(0, 3),
    seconds=st.sampled_from([5.0, 6.0]),
)
def test_the_rate_holds_within_three_percent_over_five_seconds(
    rate: float, lates: list[float], extra: int, seconds: float
) -> None:
    """Pieces send a little late, each another time, and every so many send another request."""
    ration, now, sent, number = Ration(rate), 0.0, 0, 0
    due: list[tuple[float, int, Sender]] = []
    while True:
        hand_out = now + ration.delay(NORMAL, now)
        first = min(due, default=None)
        if first is None or hand_out <= first[0]:
            now = hand_out + 1e-9
            if now >= seconds:
                break
            if ration.delay(NORMAL, now):
                continue
            ration.hand_out(number, now)
            due.append((now + lates[number % len(lates)], number, Sender(NORMAL, number)))
            number += 1
            continue
        now = max(now, first[0])
        if now >= seconds:
            break
        due.remove(first)
        if delay := ration.send(first[2], now):
            due.append((now + delay + 1e-9, *first[1:]))
            continue
        sent += 1
        if extra and not first[1] % (extra + 1) and first[2].piece is not None:
            due.append((now, first[1], Sender(NORMAL)))
    assert sent == pytest.approx(seconds * rate, rel=0.03)
