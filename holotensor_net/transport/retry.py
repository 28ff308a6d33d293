"""Trying again: when, how often, how long between, and never past the caller's patience, or the host's.

Retries live here alone. An adapter's own would miss the body and sleep through a closing loader.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import tenacity

from ..config import RetryConfig
from ..errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    NetworkError,
    RateLimited,
    RetriesExhausted,
    StalledTransfer,
    Timeout,
)

__all__ = ["EARNED", "HOSTS", "LONGEST_RETRY_AFTER", "Allowance", "Host", "Hosts", "Patience", "persist"]

T = TypeVar("T")

LONGEST_RETRY_AFTER = 60.0
"""Seconds. A server that asks for more than this is not waited for: its error is handed up at once."""

_LONGEST_SILENCE = 3600.0  # seconds; a host that asked for years by mistake is asked again some day
_RESERVE = 32.0  # retries that a host is asked for before anything went well
_MOST_HOSTS = 256

EARNED = 0.1
"""Retries that a host may be asked for more, by each transfer."""

_LONGEST_WAIT = 7 * 86400.0  # seconds; beyond some 1e9, sockets and locks raise OverflowError


class Patience:
    """How long a caller waits, and whether it still does.

    ``deadline`` is absolute on ``clock``, None for no end. ``silence``: seconds for which it keeps away from a host
    that asks for that; to one that asks for more its error is handed up at once. ``closing`` interrupts every wait.
    ``cancelled`` is asked between reads.
    """

    def __init__(
        self,
        *,
        deadline: float | None = None,
        silence: float = LONGEST_RETRY_AFTER,
        closing: threading.Event | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline = deadline
        self.silence = silence
        self._closing = closing or threading.Event()
        self._cancelled = cancelled
        self._clock = clock

    def remaining(self, most: float) -> float:
        """Seconds until the deadline, at most ``most``, and never more than a timer of the system takes."""
        most = min(most, _LONGEST_WAIT)
        return most if self.deadline is None else min(most, self.deadline - self._clock())

    def outlasts(self, seconds: float) -> bool:
        """Whether the caller still waits when ``seconds`` are over."""
        return self.deadline is None or self._clock() + seconds < self.deadline

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded once either is due."""
        if self._closing.is_set() or self._cancelled():
            raise Cancelled("stopped on request")
        if self.deadline is not None and self._clock() >= self.deadline:
            raise DeadlineExceeded("the deadline passed before the bytes were there")

    def sleep(self, seconds: float) -> None:
        """Wait; closing and the deadline end the wait early, and raise."""
        self._closing.wait(max(0.0, self.remaining(seconds)))
        self.check()


class Host:
    """What all of this process that talk to a host share: the retries that it may still be asked for, and the silence
    that it asked for. Thread-safe: its lock guards both. Times are arguments, in seconds.

    Retries that lead nowhere are at most a tenth of the transfers and a small reserve.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._retries = _RESERVE
        self._silent_until = float("-inf")
        self._status = 503

    def earn(self, retries: float) -> None:
        if self._retries >= _RESERVE:  # a glance: nearly all transfers go well
            return
        with self._lock:
            self._retries = min(_RESERVE, self._retries + retries)

    def spend(self) -> bool:
        """Whether there is a retry left; it is spent."""
        with self._lock:
            is_left = self._retries >= 1
            self._retries -= is_left
            return is_left

    def silence(self, refusal: RateLimited, now: float) -> None:
        """The host asked for no requests for a while, whoever makes them."""
        until = now + min(refusal.retry_after or 0.0, _LONGEST_SILENCE)
        with self._lock:
            if until > self._silent_until:
                self._silent_until, self._status = until, refusal.status

    def refusal(self, now: float) -> RateLimited | None:
        """What the host would say to a request now, with the seconds that are left; None if it may be asked."""
        if self._silent_until <= now:  # a glance, as it is asked before each request
            return None
        with self._lock:
            seconds = self._silent_until - now
            return RateLimited(status=self._status, retry_after=seconds) if seconds > 0 else None


class Hosts:
    """The hosts that this process has talked to, the latest of them. Thread-safe, and new in a child process: its lock
    guards the table."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._known: dict[Hashable, Host] = {}
        self._process = os.getpid()

    def of(self, name: Hashable) -> Host:
        if os.getpid() != self._process:
            self.forget()
        with self._lock:
            host = self._known.pop(name) if name in self._known else Host()
            self._known[name] = host
            while len(self._known) > _MOST_HOSTS:
                del self._known[next(iter(self._known))]
            return host


HOSTS = Hosts()
"""Those of this process."""


class Allowance:
    """The retries of one transfer, paid by its host's budget. Those that led to success are given back."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._spent = 0
        host.earn(EARNED)

    def pays(self, error: NetworkError) -> bool:
        """Whether another attempt may be made after this error. Only what may be the host's burden costs anything: a
        body that was cut on the way does not."""
        if not _is_burden(error):
            return True
        is_paid = self._host.spend()
        self._spent += is_paid
        return is_paid

    def give_back(self) -> None:
        if self._spent:
            self._host.earn(self._spent)
            self._spent = 0


def _is_burden(error: NetworkError) -> bool:
    """Whether the host may have failed because too much is asked of it."""
    if isinstance(error, ConnectionFailed):
        return not error.established
    return isinstance(error, HttpError | Timeout) and not isinstance(error, StalledTransfer)


class _WaitAtLeastRetryAfter(tenacity.wait.wait_base):
    """Exponential backoff, with full jitter if asked, never less than the server's Retry-After."""

    def __init__(self, config: RetryConfig, draw: Callable[[float, float], float]) -> None:
        self._config = config
        self._draw = draw

    def __call__(self, state: tenacity.RetryCallState) -> float:
        config = self._config
        try:
            bound = min(config.max_backoff, config.initial_backoff * config.multiplier ** (state.attempt_number - 1))
        except OverflowError:
            bound = config.max_backoff
        wait = self._draw(0.0, bound) if config.jitter else bound
        return max(wait, _retry_after(state))


class _StopBeforeDeadline(tenacity.stop.stop_base):
    """Stop when the caller would be gone before the next attempt."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return not self._patience.outlasts(state.upcoming_sleep)


class _StopBeforeLongRetryAfter(tenacity.stop.stop_base):
    """Stop when the server asks for a longer wait than the caller sits through."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return _retry_after(state) > self._patience.silence


class _StopWithoutAllowance(tenacity.stop.stop_base):
    """Stop when nobody pays for another attempt. To be asked last: what it allows is paid for."""

    def __init__(self, may_retry: Callable[[NetworkError], bool]) -> None:
        self._may_retry = may_retry

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return not self._may_retry(_error_of(state))


def _error_of(state: tenacity.RetryCallState) -> NetworkError:
    """How the attempt failed; tenacity asks whether to stop and how long to wait only where it is worth retrying."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, NetworkError)
    return error


def _retry_after(state: tenacity.RetryCallState) -> float:
    return _error_of(state).retry_after or 0.0


def _worth_retrying(error: BaseException) -> bool:
    return isinstance(error, NetworkError) and error.is_retryable


def _exhausted(state: tenacity.RetryCallState) -> object:
    """The error to end with: the last one itself if it was the only one, else RetriesExhausted around it."""
    error = _error_of(state)
    if state.attempt_number == 1:
        raise error
    raise RetriesExhausted(
        state.attempt_number,
        error,
        f"gave up after {state.attempt_number} attempts; the last one: {error.message}",
        url=error.url,
        byte_range=error.byte_range,
        retry_after=error.retry_after,
    ) from error


def persist(
    attempt: Callable[[], T],
    config: RetryConfig,
    patience: Patience,
    *,
    draw: Callable[[float, float], float] = random.uniform,
    may_retry: Callable[[NetworkError], bool] = lambda _: True,
    on_retry: Callable[[NetworkError], None] = lambda _: None,
) -> T:
    """What ``attempt`` gives, which is tried until it gives something, or until trying makes no sense.

    ``may_retry`` is asked before another attempt that nothing else speaks against, and ``on_retry`` told of the failure
    that it follows. Raises what ``attempt`` raised if that is not retryable or was the only attempt, else
    RetriesExhausted.
    """
    try:
        return attempt()
    except NetworkError as error:
        failed = [error]  # to ask tenacity takes a tenth of all that a short range does: it is asked from here on

    def again() -> T:
        if failed:
            raise failed.pop()
        return attempt()

    result: T = _retrying(config, patience, draw, may_retry, on_retry)(again)
    return result


def _retrying(
    config: RetryConfig,
    patience: Patience,
    draw: Callable[[float, float], float],
    may_retry: Callable[[NetworkError], bool],
    on_retry: Callable[[NetworkError], None],
) -> tenacity.Retrying:
    """A tenacity policy: call it with a function."""
    return tenacity.Retrying(
        before_sleep=lambda state: on_retry(_error_of(state)),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(config.max_retries + 1),
            _StopBeforeDeadline(patience),
            _StopBeforeLongRetryAfter(patience),
            _StopWithoutAllowance(may_retry),
        ),
        wait=_WaitAtLeastRetryAfter(config, draw),
        retry=tenacity.retry_if_exception(_worth_retrying),
        sleep=patience.sleep,
        retry_error_callback=_exhausted,
    )
