"""Alarms ring in time and in order, for those that somebody still holds, and leave no thread."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from holotensor_net.engine.alarms import Alarms

NEVER = 10.0


class Subject:
    """Something that can be waited for."""


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    made = Alarms("test-alarms")
    yield made
    made.close()


def test_each_rings_once_in_the_order_of_their_times(alarms: Alarms) -> None:
    rung: SimpleQueue[tuple[Subject, float]] = SimpleQueue()
    late, soon = Subject(), Subject()
    now = time.monotonic()
    for subject, wait in ((late, 0.05), (soon, 0.01)):
        alarms.at(now + wait, subject, lambda it: rung.put((it, time.monotonic())))
    first, then = rung.get(timeout=NEVER), rung.get(timeout=NEVER)
    assert [first[0], then[0]] == [soon, late]
    assert first[1] >= now + 0.01
    assert then[1] >= now + 0.05
    assert rung.empty()


def test_what_nobody_holds_any_more_does_not_ring(alarms: Alarms) -> None:
    rung: SimpleQueue[str] = SimpleQueue()
    gone, kept, now = Subject(), Subject(), time.monotonic()
    alarms.at(now + 0.02, gone, lambda _: rung.put("gone"))
    alarms.at(now + 0.04, kept, lambda _: rung.put("kept"))
    del gone
    gc.collect()
    assert rung.get(timeout=NEVER) == "kept"


def test_a_callback_may_set_another_alarm_and_may_fail(alarms: Alarms, caplog: pytest.LogCaptureFixture) -> None:
    rung = threading.Event()
    subject = Subject()

    def ring(it: Subject) -> None:
        alarms.at(time.monotonic(), it, lambda _: rung.set())
        raise ValueError("on purpose")

    alarms.at(time.monotonic(), subject, ring)
    assert rung.wait(NEVER)
    assert "on purpose" in caplog.text


def test_the_thread_ends_with_the_last_alarm_and_begins_anew(alarms: Alarms) -> None:
    subject = Subject()
    for _ in range(3):
        rung = threading.Event()
        alarms.at(time.monotonic(), subject, lambda _, rung=rung: rung.set())  # type: ignore[misc]
        assert rung.wait(NEVER)
        for thread in threading.enumerate():
            if thread.name == "test-alarms":
                thread.join(NEVER)
        assert "test-alarms" not in [thread.name for thread in threading.enumerate()]


def test_closing_ends_every_wait(alarms: Alarms) -> None:
    subject = Subject()
    alarms.at(time.monotonic() + 1e9, subject, lambda _: None)
    alarms.close()
    assert "test-alarms" not in [thread.name for thread in threading.enumerate()]
    alarms.at(time.monotonic(), subject, lambda _: pytest.fail("it rang"))
    assert "test-alarms" not in [thread.name for thread in threading.enumerate()]


def test_what_is_cancelled_does_not_ring_and_holds_nothing(alarms: Alarms) -> None:
    rung: SimpleQueue[int] = SimpleQueue()
    subject, now = Subject(), time.monotonic()
    set_up = [alarms.at(now + 60 * (number < 99), subject, lambda _, n=number: rung.put(n)) for number in range(100)]  # type: ignore[misc]
    for alarm in set_up[:99]:
        alarms.cancel(alarm)
        alarms.cancel(alarm)
    assert len(alarms._times) < 4
    assert rung.get(timeout=NEVER) == 99
    alarms.cancel(set_up[99])
    assert rung.empty()


def test_the_thread_ends_though_the_time_of_what_was_cancelled_is_far_off(alarms: Alarms) -> None:
    subject = Subject()
    alarms.cancel(alarms.at(time.monotonic() + 1e9, subject, lambda _: None))
    for thread in threading.enumerate():
        if thread.name == "test-alarms":
            thread.join(NEVER)
    assert "test-alarms" not in [thread.name for thread in threading.enumerate()]


def test_where_no_thread_can_be_started_the_next_alarm_rings_for_both(
    alarms: Alarms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rung: SimpleQueue[str] = SimpleQueue()
    first, second, now = Subject(), Subject(), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        alarms.at(now, first, lambda _: rung.put("first"))
    assert "can't start new thread" in caplog.text
    assert rung.empty()
    alarms.at(now + 0.01, second, lambda _: rung.put("second"))
    assert [rung.get(timeout=NEVER), rung.get(timeout=NEVER)] == ["first", "second"]
