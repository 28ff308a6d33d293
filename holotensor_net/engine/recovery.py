"""After a failure: what of a load to ask for again, and where not. Nothing here waits, reads or writes.

A load begins again where it was if its endpoint may still serve it; else it goes to the next one, with what it has if
a digest or a strong validator proves that it belongs together; else it ends, and what failed is told as one error.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence

from ..errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    NetworkError,
    ObjectChanged,
    RangeNotSupported,
    RateLimited,
    RetriesExhausted,
    Timeout,
)
from .loads import Load

__all__ = ["Again", "Gone", "Moved", "Recovery", "is_failing", "is_overtaxed", "is_refusal", "silence_of", "summary"]


class Again(enum.Enum):
    """What to ask for once more."""

    NOTHING = enum.auto()
    PIECE = enum.auto()
    ALL = enum.auto()


class Moved(ObjectChanged):
    """The endpoint of a load is gone, and nothing proves that the next one has the same bytes."""


class Gone(CacheError):
    """What the cache held of a load, and its server has confirmed, is there no more."""


class Recovery:
    """Decides for loads that may go to so many ``endpoints``, of which the ``rangeless`` serve no ranges.

    Not thread-safe: what it decides is noted in the load, which its owner's lock guards.
    """

    def __init__(self, endpoints: int, rangeless: Collection[int]) -> None:
        self._endpoints = endpoints
        self._rangeless = frozenset(rangeless)

    @property
    def is_without_ranges(self) -> bool:
        """Whether every endpoint has to be asked for whole objects."""
        return len(self._rangeless) == self._endpoints

    def excluded(self, *loads: Load) -> set[int]:
        """The endpoints that are not to be asked for one of these loads."""
        found: set[int] = set()
        for load in loads:
            found |= load.tried
        return found if all(load.whole for load in loads) else found | self._rangeless

    def again(self, load: Load, error: NetworkError, endpoint: int | None, *, is_passing: bool, now: float) -> Again:
        """What to ask for after an error, an endpoint's or nobody's; ``is_passing``: it says nothing of the load."""
        if isinstance(error, Cancelled):
            return Again.NOTHING
        if isinstance(error, DeadlineExceeded):  # of those who waited when the piece was begun; others may wait still
            is_passing = any(waiter.until is None or waiter.until > now for waiter in load.waiters)
            return Again.PIECE if is_passing else Again.NOTHING
        if is_passing:
            return Again.PIECE
        if self._begins_again(load, error):
            return Again.ALL
        if not self._goes_elsewhere(load, error, endpoint):
            return Again.NOTHING
        keeps = load.is_provable and not load.whole and not isinstance(error, ChecksumMismatch)
        return Again.PIECE if keeps else Again.ALL

    def _begins_again(self, load: Load, error: NetworkError) -> bool:
        """Whether to fetch all of it once more from the same endpoint: the disk failed, the object was replaced, or the
        server knows no ranges."""
        if isinstance(error, Moved):
            return True
        if isinstance(error, Gone):
            load.held = None
            return True
        if isinstance(error, CacheError):
            first, load.in_memory = not load.in_memory, True
            return first
        if isinstance(error, HttpError) and error.status == 416 and load.attempt.missing:
            error = ObjectChanged("the server refuses a range that it has begun to send")
        if isinstance(error, RangeNotSupported):
            first = load.request.byte_range is None and not load.whole
            load.whole = load.whole or first
            return first
        if isinstance(error, ObjectChanged | ChecksumMismatch):
            load.restarts += 1
            if load.restarts > self._endpoints:
                return False
            if isinstance(error, ObjectChanged):
                return load.request.validator is None
            return len(self.excluded(load)) + 1 >= self._endpoints
        return False

    def _goes_elsewhere(self, load: Load, error: NetworkError, endpoint: int | None) -> bool:
        """Whether there is another endpoint to ask; those without ranges come last."""
        load.failures += (error,)
        if load.held is not None and load.held.endpoint == endpoint and not is_failing(error):
            load.held = None  # its server does its work, and would not give it
        if endpoint is not None:
            load.tried |= {endpoint}
            if len(self.excluded(load)) < self._endpoints:
                return True
        if load.whole or not self._rangeless:
            return False
        load.whole = True
        return True


def is_failing(error: NetworkError) -> bool:
    """Whether the error says that a server does not do its work, rather than what it has."""
    last = _last(error)
    return isinstance(last, ConnectionFailed | Timeout) or (isinstance(last, HttpError) and last.status >= 500)


def is_overtaxed(error: NetworkError) -> bool:
    """Whether the error says nothing of what was asked for: the server does not do its work, or wants less of it."""
    return is_failing(error) or isinstance(_last(error), RateLimited)


def is_refusal(error: NetworkError) -> bool:
    """Whether the server wants fewer requests, and names no time for which to leave it alone."""
    return isinstance(_last(error), RateLimited) and not error.retry_after


def silence_of(error: NetworkError) -> float:
    """Seconds for which a server is to be left alone."""
    return (error.retry_after or 0.0) if isinstance(_last(error), RateLimited) else 0.0


def summary(errors: Sequence[NetworkError]) -> NetworkError:
    """One error for a load that failed at every endpoint: the error itself, if they all say the same."""
    last = errors[-1]
    if len({type(error) for error in errors}) == 1:
        return last
    told = "; ".join(f"{error.url or 'an endpoint'}: {error.message}" for error in errors)
    attempts = sum(error.attempts for error in errors)
    return RetriesExhausted(attempts, last, f"every endpoint failed: {told}")


def _last(error: NetworkError) -> BaseException | None:
    return error.last_error if isinstance(error, RetriesExhausted) else error
