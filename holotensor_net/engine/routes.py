"""Which endpoint to ask next, and whether there is one worth asking. Pure: times are arguments.

An endpoint that cannot be reached is set aside and asked again by one probe at a time, with growing pauses. One that
has answered before gets ``outage`` seconds without an answer until loads fail because of it: a cable that is pulled
and plugged in again, or a server that restarts, costs time and no error. One that never answered fails its loads at
once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..config import CdnEndpoint
from ..errors import ConnectionFailed, NetworkError, RetriesExhausted, StalledTransfer, Timeout

__all__ = ["Routes", "Wait", "is_unreachable"]

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Wait:
    """No endpoint may be asked now; ask again in ``seconds``."""

    seconds: float


@dataclass(slots=True)
class _Health:
    failures: int = 0
    retry_at: float = 0.0
    answered_at: float | None = None
    probing: bool = False
    error: NetworkError | None = None


def is_unreachable(error: NetworkError) -> bool:
    """Whether the error says that the endpoint cannot be reached at all, rather than that it answers badly."""
    last = error.last_error if isinstance(error, RetriesExhausted) else error
    if isinstance(last, ConnectionFailed):
        return not last.established
    return isinstance(last, Timeout) and not isinstance(last, StalledTransfer)


class Routes:
    """The endpoints of a loader by priority, and how each of them has been doing. Not thread-safe: its owner has a
    lock."""

    def __init__(self, endpoints: Sequence[CdnEndpoint], *, outage: float) -> None:
        self._order = sorted(range(len(endpoints)), key=lambda index: endpoints[index].priority)
        self._health = [_Health() for _ in endpoints]
        self._outage = outage

    def choose(self, tried: Collection[int], now: float) -> int | Wait | NetworkError | None:
        """The endpoint to ask: its index; or a wait; or the error that all that are left have; None if none is left.

        Whoever is sent to an endpoint that was set aside is its probe, and must tell how it went.
        """
        left = [index for index in self._order if index not in tried]
        for index in left:
            if not self._health[index].failures:
                return index
        wait: float | None = None
        for index in left:
            health = self._health[index]
            if not health.probing and now >= health.retry_at:
                health.probing = True
                return index
            if self._is_outage(health, now):
                pause = _FIRST_PAUSE if health.probing else health.retry_at - now
                wait = pause if wait is None else min(wait, pause)
        if wait is not None:
            return Wait(wait)
        return self._health[left[0]].error if left else None

    def answered(self, index: int, now: float) -> None:
        """The endpoint delivered bytes, or an answer that can be trusted."""
        health = self._health[index]
        health.failures, health.probing, health.error, health.answered_at = 0, False, None, now

    def released(self, index: int) -> None:
        """A request to the endpoint ended without telling anything of its health."""
        self._health[index].probing = False

    def unreachable(self, index: int, error: NetworkError, now: float) -> bool:
        """The endpoint could not be reached: set it aside. True if its loads should wait for it rather than fail."""
        health = self._health[index]
        if now >= health.retry_at:  # else a request that was under way already tells the same again
            health.retry_at = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(health.failures, 8))
            health.failures += 1
        health.probing, health.error = False, error
        return self._is_outage(health, now)

    def _is_outage(self, health: _Health, now: float) -> bool:
        return health.answered_at is not None and now - health.answered_at < self._outage
