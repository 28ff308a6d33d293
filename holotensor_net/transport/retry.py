"""Trying again: when, how often, how long between, and never past the caller's patience.

Retries live here alone. An adapter's own would miss the body and sleep through a closing loader.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import tenacity

from ..config import RetryConfig
from ..errors import Cancelled, DeadlineExceeded, NetworkError, RetriesExhausted

__all__ = ["LONGEST_RETRY_AFTER", "Patience", "retrying"]

LONGEST_RETRY_AFTER = 60.0
"""Seconds. A server that asks for more than this is not waited for: its error is handed up at once."""

_LONGEST_WAIT = 7 * 86400.0  # seconds; beyond some 1e9, sockets and locks raise OverflowError


class Patience:
    """How long a caller waits, and whether it still does.

    ``deadline`` is absolute on ``clock``, None for no end. ``closing`` interrupts every wait. ``cancelled`` is asked
    between reads.
    """

    def __init__(
        self,
        *,
        deadline: float | None = None,
        closing: threading.Event | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline = deadline
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
    """Stop when the server asks for a wait that nobody would sit through."""

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return _retry_after(state) > LONGEST_RETRY_AFTER


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


def retrying(
    config: RetryConfig,
    patience: Patience,
    *,
    draw: Callable[[float, float], float] = random.uniform,
    on_retry: Callable[[NetworkError], None] = lambda _: None,
) -> tenacity.Retrying:
    """A tenacity policy: call it with a function, which is tried until it returns, or until trying makes no sense.

    ``on_retry`` is told of each failure that will be followed by another attempt. Raises what the function raised if
    that is not retryable or was the only attempt, else RetriesExhausted.
    """
    return tenacity.Retrying(
        before_sleep=lambda state: on_retry(_error_of(state)),
        stop=tenacity.stop_any(
            tenacity.stop_after_attempt(config.max_retries + 1),
            _StopBeforeDeadline(patience),
            _StopBeforeLongRetryAfter(),
        ),
        wait=_WaitAtLeastRetryAfter(config, draw),
        retry=tenacity.retry_if_exception(_worth_retrying),
        sleep=patience.sleep,
        retry_error_callback=_exhausted,
    )
