from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.config import RetryConfig
from holotensor_net.errors import (
    Cancelled,
    ChecksumMismatch,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    InvalidUrl,
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
from holotensor_net.transport.retry import LONGEST_RETRY_AFTER, Allowance, Host, Hosts, Patience, persist
from holotensor_net.values import RangeRequest


class Clock:
    """A clock that only sleeping moves, and the event that sleeping waits on."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now


class Closing(threading.Event):
    """Waits by moving the clock; ``set_after``: set during the n-th wait."""

    def __init__(self, clock: Clock, set_after: int = 0) -> None:
        super().__init__()
        self._clock = clock
        self._set_after = set_after

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.slept.append(timeout)
        self._clock.now += timeout
        if len(self._clock.slept) == self._set_after:
            self.set()
        return self.is_set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def patience(clock: Clock, seconds: float | None = None, set_after: int = 0) -> Patience:
    deadline = None if seconds is None else clock.now + seconds
    return Patience(deadline=deadline, closing=Closing(clock, set_after), clock=clock)


def failing(*errors: BaseException) -> Callable[[], str]:
    """Raises one after the other, then returns."""
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def steady(**settings: object) -> RetryConfig:
    return RetryConfig(**{"initial_backoff": 1.0, "jitter": False, **settings})  # type: ignore[arg-type]


# -- patience


@pytest.mark.parametrize(
    ("deadline", "most", "expected"),
    [
        pytest.param(None, 30.0, 30.0, id="no end"),
        pytest.param(1005.0, 30.0, 5.0, id="the deadline is nearer"),
        pytest.param(1100.0, 30.0, 30.0, id="the limit is nearer"),
        pytest.param(990.0, 30.0, -10.0, id="over"),
        pytest.param(None, 1e300, 7 * 86400.0, id="no longer than timers can wait"),
    ],
)
def test_remaining_is_the_nearer_of_deadline_and_limit(
    clock: Clock, deadline: float | None, most: float, expected: float
) -> None:
    assert Patience(deadline=deadline, clock=clock).remaining(most) == expected


def test_a_sleep_longer_than_any_timer_is_cut_to_what_timers_take(clock: Clock) -> None:
    patience(clock).sleep(1e300)
    assert clock.slept == [7 * 86400.0]
    assert clock.slept[0] < threading.TIMEOUT_MAX


def test_check_raises_at_the_deadline_and_not_before(clock: Clock) -> None:
    until = patience(clock, 5.0)
    clock.now += 4.999
    until.check()
    clock.now += 0.001
    with pytest.raises(DeadlineExceeded):
        until.check()


def test_cancelling_and_closing_are_told_before_the_deadline(clock: Clock) -> None:
    closing = threading.Event()
    closing.set()
    for over in (Patience(closing=closing), Patience(deadline=0.0, cancelled=lambda: True, clock=clock)):
        with pytest.raises(Cancelled):
            over.check()


def test_sleep_lasts_as_long_as_asked(clock: Clock) -> None:
    patience(clock).sleep(3.0)
    assert clock.slept == [3.0]


def test_sleep_ends_at_the_deadline(clock: Clock) -> None:
    with pytest.raises(DeadlineExceeded):
        patience(clock, 2.0).sleep(10.0)
    assert clock.slept == [2.0]


def test_sleep_after_the_deadline_does_not_wait(clock: Clock) -> None:
    until = patience(clock, 2.0)
    clock.now += 5.0
    with pytest.raises(DeadlineExceeded):
        until.sleep(10.0)
    assert clock.slept == [0.0]


def test_closing_from_another_thread_ends_a_sleep() -> None:
    closing, asleep, ended = threading.Event(), threading.Event(), threading.Event()

    def sleep() -> None:
        asleep.set()
        with pytest.raises(Cancelled):
            Patience(closing=closing).sleep(60.0)
        ended.set()

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    assert asleep.wait(5)
    closing.set()
    assert ended.wait(1)
    sleeper.join()


# -- what is retried


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed(),
        Timeout("silence"),
        StalledTransfer("drip"),
        ProtocolError("nonsense"),
        ChecksumMismatch(),
        RateLimited(status=429),
        RateLimited(status=503),
        HttpError(status=408),
        HttpError(status=500),
        HttpError(status=502),
        HttpError(status=504),
    ],
    ids=str,
)
def test_passing_failures_are_tried_again(clock: Clock, error: NetworkError) -> None:
    assert persist(failing(error), steady(), patience(clock)) == "done"
    assert clock.slept == [1.0]


@pytest.mark.parametrize(
    "error",
    [
        NotFound(),
        NotFound(status=410),
        HttpError(status=400),
        HttpError(status=401),
        HttpError(status=416),
        HttpError(status=501),
        HttpError(status=505),
        InvalidUrl("no"),
        ObjectChanged("new"),
        RangeNotSupported("whole"),
        DeadlineExceeded("late"),
        Cancelled("stop"),
        ValueError("a defect"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_lasting_failures_are_raised_as_they_are_at_once(clock: Clock, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        persist(failing(error), steady(), patience(clock))
    assert caught.value is error
    assert clock.slept == []


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_attempts_are_capped(clock: Clock, retries: int) -> None:
    errors = [ConnectionFailed(str(number)) for number in range(10)]
    told: list[NetworkError] = []
    with pytest.raises(NetworkError) as caught:
        persist(failing(*errors), steady(max_retries=retries), patience(clock), on_retry=told.append)
    assert len(clock.slept) == retries
    assert told == errors[:retries]  # not of the last, which no attempt follows
    last = caught.value.last_error if isinstance(caught.value, RetriesExhausted) else caught.value
    assert last is errors[retries]


def test_exhaustion_says_how_often_where_and_why_and_keeps_the_last_error(clock: Clock) -> None:
    where = RangeRequest(0, 10)
    last = RateLimited(message="busy", url="http://host/path?secret=1", byte_range=where, retry_after=2.0)
    with pytest.raises(RetriesExhausted, match=r"gave up after 2 attempts.*busy") as caught:
        persist(failing(ConnectionFailed(), last), steady(max_retries=1), patience(clock))
    error = caught.value
    assert (error.attempts, error.last_error, error.__cause__) == (2, last, last)
    assert (error.url, error.byte_range, error.retry_after) == ("http://host/path?…", where, 2.0)
    assert not error.is_retryable


def test_the_only_attempt_ends_in_its_own_error(clock: Clock) -> None:
    error = ConnectionFailed("refused")
    with pytest.raises(ConnectionFailed) as caught:
        persist(failing(error), steady(max_retries=0), patience(clock))
    assert caught.value is error


# -- how long between


def test_backoff_grows_to_its_bound(clock: Clock) -> None:
    config = steady(max_retries=6, initial_backoff=0.5, multiplier=3.0, max_backoff=10.0)
    persist(failing(*[ConnectionFailed()] * 6), config, patience(clock))
    assert clock.slept == [0.5, 1.5, 4.5, 10.0, 10.0, 10.0]


def test_a_backoff_beyond_all_numbers_is_its_bound(clock: Clock) -> None:
    config = steady(max_retries=3, multiplier=1e300, max_backoff=7.0)
    persist(failing(*[ConnectionFailed()] * 3), config, patience(clock))
    assert clock.slept == [1.0, 7.0, 7.0]


def test_jitter_draws_from_zero_to_the_bound(clock: Clock) -> None:
    drawn: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return high / 4

    config = RetryConfig(initial_backoff=1.0, max_backoff=3.0)
    persist(failing(*[ConnectionFailed()] * 3), config, patience(clock), draw=draw)
    assert drawn == [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)]
    assert clock.slept == [0.25, 0.5, 0.75]


@given(
    initial=st.floats(1e-3, 1e3),
    bound=st.floats(1e-3, 1e3),
    multiplier=st.floats(1, 1e6),
    retry_after=st.none() | st.floats(0, LONGEST_RETRY_AFTER),
    jitter=st.booleans(),
)
def test_no_wait_undercuts_retry_after_or_exceeds_its_bounds(
    initial: float, bound: float, multiplier: float, retry_after: float | None, jitter: bool
) -> None:
    clock = Clock()
    config = RetryConfig(initial_backoff=initial, max_backoff=bound, multiplier=multiplier, jitter=jitter)
    persist(failing(*[RateLimited(retry_after=retry_after)] * 3), config, patience(clock))
    for wait in clock.slept:
        assert (retry_after or 0.0) <= wait <= max(bound, retry_after or 0.0)


def test_retry_after_outweighs_a_shorter_backoff(clock: Clock) -> None:
    persist(failing(RateLimited(retry_after=20.0), RateLimited(retry_after=0.5)), steady(), patience(clock))
    assert clock.slept == [20.0, 2.0]


def test_a_retry_after_that_nobody_sits_through_ends_it_at_once(clock: Clock) -> None:
    error = RateLimited(retry_after=LONGEST_RETRY_AFTER + 0.5)
    with pytest.raises(RateLimited) as caught:
        persist(failing(error), steady(), patience(clock))
    assert caught.value is error
    assert clock.slept == []


# -- never past the deadline


def test_no_wait_is_begun_that_would_end_past_the_deadline(clock: Clock) -> None:
    with pytest.raises(RetriesExhausted) as caught:
        persist(failing(*[ConnectionFailed()] * 10), steady(max_retries=9), patience(clock, 4.0))
    assert clock.slept == [1.0, 2.0]  # another 4 s would be too long
    assert caught.value.attempts == 3


def test_the_deadline_counts_the_time_that_attempts_take(clock: Clock) -> None:
    def attempt() -> None:
        clock.now += 3.0
        raise ConnectionFailed("slow")

    with pytest.raises(RetriesExhausted) as caught:
        persist(attempt, steady(max_retries=9, multiplier=1.0), patience(clock, 8.0))
    assert caught.value.attempts == 2


def test_closing_during_a_wait_ends_the_retries(clock: Clock) -> None:
    with pytest.raises(Cancelled):
        persist(failing(*[ConnectionFailed()] * 3), steady(), patience(clock, set_after=2))
    assert len(clock.slept) == 2


# -- what all who talk to a host share

BUSY = RateLimited(status=503)


def refused_until_the_end(host: Host, transfers: int, retries: int = 3) -> int:
    """How many retries so many transfers make, all of which are refused."""
    made = 0
    for _ in range(transfers):
        allowance = Allowance(host)
        for _ in range(retries):
            if not allowance.pays(BUSY):
                break
            made += 1
    return made


@pytest.mark.parametrize("transfers", [1, 10, 100, 5000])
def test_retries_that_lead_nowhere_are_a_tenth_of_the_transfers_and_a_reserve(transfers: int) -> None:
    assert refused_until_the_end(Host(), transfers) <= 0.1 * transfers + 32
    assert refused_until_the_end(Host(), 10) == 30  # a bad moment is nobody's end


def test_transfers_that_need_no_retry_earn_no_more_than_the_reserve() -> None:
    host = Host()
    for _ in range(5000):
        Allowance(host).give_back()
    assert refused_until_the_end(host, 100) <= 42


def test_retries_that_lead_to_success_are_given_back() -> None:
    host = Host()
    for _ in range(1000):
        allowance = Allowance(host)
        assert allowance.pays(BUSY)
        allowance.give_back()
        allowance.give_back()  # once
    assert refused_until_the_end(host, 100) <= 42


def test_what_is_not_the_hosts_burden_costs_nothing() -> None:
    host = Host()
    while host.spend():
        pass
    allowance = Allowance(host)
    for error in (ConnectionFailed(established=True), StalledTransfer(), ProtocolError(), ChecksumMismatch()):
        assert allowance.pays(error)
    for error in (BUSY, HttpError(500), Timeout(), ConnectionFailed(established=False)):
        assert not allowance.pays(error)


def test_another_attempt_is_paid_for_only_where_nothing_else_speaks_against_it(clock: Clock) -> None:
    asked: list[NetworkError] = []

    def pays(error: NetworkError) -> bool:
        asked.append(error)
        return len(asked) < 3

    errors = [ConnectionFailed(str(number)) for number in range(9)]
    with pytest.raises(RetriesExhausted) as caught:
        persist(failing(*errors), steady(max_retries=8), patience(clock), may_retry=pays)
    assert asked == errors[:3]
    assert caught.value.attempts == 3
    for last in (RateLimited(retry_after=LONGEST_RETRY_AFTER + 1), RateLimited(retry_after=30.0), NotFound()):
        with pytest.raises(NetworkError):
            persist(failing(last), steady(), patience(clock, 20.0), may_retry=pays)
    assert len(asked) == 3


def test_a_host_is_silent_as_long_as_it_asked_for() -> None:
    host = Host()
    assert host.refusal(100.0) is None
    host.silence(RateLimited(status=429, retry_after=20.0), 100.0)
    host.silence(RateLimited(status=503, retry_after=5.0), 101.0)  # a shorter silence does not end a longer one
    refusal = host.refusal(110.0)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after) == (429, 10.0)
    assert host.refusal(119.9) is not None
    assert host.refusal(120.0) is None


@pytest.mark.parametrize("retry_after", [None, 0.0])
def test_a_refusal_without_a_time_silences_nobody(retry_after: float | None) -> None:
    host = Host()
    host.silence(RateLimited(retry_after=retry_after), 100.0)
    assert host.refusal(100.0) is None


def test_a_silence_of_years_ends_within_the_hour() -> None:
    host = Host()
    host.silence(RateLimited(retry_after=1e9), 100.0)
    assert host.refusal(3600.0) is not None
    assert host.refusal(3700.0) is None


def test_a_host_is_the_same_for_all_who_name_it() -> None:
    hosts = Hosts()
    first = hosts.of("a")
    assert hosts.of("b") is not first
    assert hosts.of("a") is first
    hosts.forget()
    assert hosts.of("a") is not first


def test_of_many_hosts_the_latest_are_known() -> None:
    hosts = Hosts()
    first, second = hosts.of(0), hosts.of(1)
    for name in range(2, 256):
        hosts.of(name)
    assert hosts.of(0) is first
    hosts.of(256)
    assert hosts.of(0) is first
    assert hosts.of(1) is not second


def test_a_child_process_knows_no_host_and_needs_no_lock_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts()
    before = hosts.of("a")
    with hosts._lock:  # held by another thread as the parent forked
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert hosts.of("a") is not before
