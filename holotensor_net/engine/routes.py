"""Which endpoint to ask next, and whether there is one worth asking. Pure: times are arguments.

The lowest ``priority`` goes first; among equals, those of the caller's region; among these, one that takes far
longer to answer than another (twice as long and 50 ms) stands behind it, as long as both are known.

Each endpoint has a circuit::

    closed ── cannot be reached, or answers badly again and again ──► open ── a pause ──► half-open
       ▲                                                                ▲                    │
       └─────────────────────────── the probe is answered ──────────────┴── it is not ◄──────┘

While it is open, others are asked. When its pause is over one request goes to it, however well the others do, so that
an endpoint which recovers is used again. Where there is no other, one that answers badly is asked all the same. One
that cannot be reached is not; but if it has answered before it gets ``outage`` seconds without an answer until loads
fail because of it: a cable that is pulled and plugged in again, or a server that restarts, costs time and no error.
One that never answered fails its loads at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..config import CdnEndpoint
from ..errors import (
    ChecksumMismatch,
    ConnectionFailed,
    HttpError,
    NetworkError,
    ObjectChanged,
    ProtocolError,
    RangeNotSupported,
    RetriesExhausted,
    StalledTransfer,
    Timeout,
)

__all__ = ["Routes", "Wait", "is_bad_answer", "is_unreachable"]

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
_LONGEST_PAUSE_BESIDE_OTHERS = 30.0  # a probe costs its load time, which is wasted where others would serve it
_LONGEST_COOLING = 60.0
_MOST_BAD = 3.0  # bad answers, of which each counts half after every half-life and every good one
_HALF_LIFE = 30.0
_MEMORY = 60.0  # seconds for which a measurement counts
_MUCH_SLOWER = 2.0
_MATTERS = 0.05  # seconds
_JUST_NOW = 0.1


@dataclass(frozen=True, slots=True)
class Wait:
    """No endpoint may be asked now; ask again in ``seconds``."""

    seconds: float


@dataclass(slots=True)
class _Health:
    """How an endpoint has been doing. Its circuit is closed while ``failures`` is 0; ``is_there``: it is open because
    of what is answered, not because nothing is."""

    failures: int = 0
    failed_at: float = 0.0
    cool_until: float = 0.0
    is_there: bool = False
    probing: bool = False
    error: NetworkError | None = None
    answered_at: float | None = None
    bad: float = 0.0
    bad_at: float = 0.0
    latency: float | None = None
    measured_at: float = 0.0

    def retry_at(self, longest: float) -> float:
        pause = min(longest, _FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16))
        return max(self.failed_at + float(pause), self.cool_until)

    def fail(self, now: float, error: NetworkError | None, *, is_there: bool) -> None:
        """Open the circuit, or keep it open for longer."""
        if not self.failures or now >= self.retry_at(
            _LONGEST_PAUSE
        ):  # else a request that was under way already tells the same again
            self.failures += 1
            self.failed_at = now
        self.probing, self.is_there = False, is_there
        self.error = error or self.error

    def close(self) -> None:
        self.failures, self.probing, self.is_there, self.error = 0, False, False, None
        self.cool_until = 0.0


def is_unreachable(error: NetworkError) -> bool:
    """Whether the error says that the endpoint cannot be reached at all, rather than that it answers badly."""
    last = _last(error)
    if isinstance(last, ConnectionFailed):
        return not last.established
    return isinstance(last, Timeout) and not isinstance(last, StalledTransfer)


def is_bad_answer(error: NetworkError) -> bool:
    """Whether the error says that the endpoint does not do its work, whatever it is asked for."""
    last = _last(error)
    if isinstance(last, HttpError):
        return last.status >= 500 or last.status == 429
    if isinstance(last, ObjectChanged | RangeNotSupported):
        return False
    return isinstance(last, ConnectionFailed | Timeout | ProtocolError | ChecksumMismatch)


def _last(error: NetworkError) -> BaseException | None:
    return error.last_error if isinstance(error, RetriesExhausted) else error


class Routes:
    """The endpoints of a loader, and how each of them has been doing. Not thread-safe: its owner has a lock.

    ``region``: the caller's; ``outage`` in seconds.
    """

    def __init__(self, endpoints: Sequence[CdnEndpoint], *, outage: float, region: str | None = None) -> None:
        self._ranks = [(e.priority, region is not None and e.region != region) for e in endpoints]
        self._health = [_Health() for _ in endpoints]
        self._outage = outage

    def choose(
        self, tried: Collection[int], now: float, *, keep: int | None = None
    ) -> int | Wait | NetworkError | None:
        """The endpoint to ask: its index; or a wait; or the error that all that are left have; None if none is left.

        ``keep``: where the load was begun, and stays while that is well. Whoever is sent to an endpoint whose circuit
        is open is its probe, and must tell how it went.
        """
        left = self._in_order(tried, now)
        closed = [index for index in left if not self._health[index].failures]
        if keep in closed:
            return keep
        if not closed:
            return self._last_resort(left, now)
        for index in left:
            health = self._health[index]
            if not health.failures:
                break
            if not health.probing and now >= health.retry_at(_LONGEST_PAUSE_BESIDE_OTHERS):
                health.probing = True
                return index
        return closed[0]

    def in_order(self, now: float) -> list[int]:
        """All endpoints, those that are well first."""
        return sorted(self._in_order((), now), key=lambda index: self._health[index].failures > 0)

    def other(self, index: int, tried: Collection[int], now: float) -> int | None:
        """The endpoint to ask as well as ``index``; None if none is well."""
        others = (other for other in self._in_order(tried, now) if other != index)
        return next((other for other in others if not self._health[other].failures), None)

    def is_known_well(self, index: int, now: float) -> bool:
        """Whether the endpoint has answered just now, so that there is nothing new to tell."""
        health = self._health[index]
        return not health.failures and health.answered_at is not None and now < health.answered_at + _JUST_NOW

    def is_well(self, index: int) -> bool:
        """Whether an endpoint's circuit is closed."""
        return not self._health[index].failures

    def answered(self, index: int, now: float) -> None:
        """The endpoint gave a sign of life: bytes, or an answer that can be trusted."""
        health = self._health[index]
        health.answered_at = now
        if not health.is_there:
            health.close()

    def delivered(self, index: int, latency: float, now: float) -> None:
        """The endpoint did what it was asked for; it took ``latency`` seconds to begin with it."""
        health = self._health[index]
        health.bad, health.bad_at = self._bad(health, now) / 2, now
        health.close()
        health.answered_at = now
        known = health.latency if self._is_known(health, now) and health.latency is not None else latency
        health.latency, health.measured_at = known + (latency - known) / 8, now

    def released(self, index: int) -> None:
        """A request to the endpoint ended without telling anything of its health."""
        self._health[index].probing = False

    def overtaken(self, index: int, now: float) -> None:
        """A request to the endpoint was cut, as another had brought the same before."""
        health = self._health[index]
        if health.failures and health.probing:
            health.fail(now, None, is_there=health.is_there)
        health.probing = False

    def failed(self, index: int, error: NetworkError, now: float) -> None:
        """The endpoint answered, and badly (``is_bad_answer``): often enough, or if it asks for that itself, others
        are asked first."""
        health = self._health[index]
        health.bad, health.bad_at = self._bad(health, now) + 1, now
        cooling = min(error.retry_after or 0.0, _LONGEST_COOLING)
        if health.bad >= _MOST_BAD or cooling or health.failures:
            health.fail(now, error, is_there=True)
            health.cool_until = max(health.cool_until, now + cooling)
        health.probing = False

    def unreachable(self, index: int, error: NetworkError, now: float) -> bool:
        """The endpoint could not be reached: set it aside. True if its loads should wait for it rather than fail."""
        health = self._health[index]
        health.fail(now, error, is_there=False)
        return self._is_outage(health, now)

    def _in_order(self, tried: Collection[int], now: float) -> list[int]:
        left = [index for index in range(len(self._health)) if index not in tried]
        if len(left) < 2:
            return left
        best: dict[object, float] = {}
        for index in left:
            health = self._health[index]
            if health.latency is not None and self._is_known(health, now):
                rank = self._ranks[index]
                best[rank] = min(best.get(rank, health.latency), health.latency)

        def place(index: int) -> tuple[int, bool, bool]:
            health, rank = self._health[index], self._ranks[index]
            is_slow = (
                health.latency is not None
                and self._is_known(health, now)
                and health.latency > _MUCH_SLOWER * best[rank] + _MATTERS
            )
            return *rank, is_slow

        return sorted(left, key=place)

    def _last_resort(self, left: list[int], now: float) -> int | Wait | NetworkError | None:
        """What to do where no circuit is closed."""
        wait: float | None = None
        for index in left:
            health = self._health[index]
            if health.is_there:
                return index
            retry_at = health.retry_at(_LONGEST_PAUSE)
            if not health.probing and now >= retry_at:
                health.probing = True
                return index
            if self._is_outage(health, now):
                pause = _FIRST_PAUSE if health.probing else retry_at - now
                wait = pause if wait is None else min(wait, pause)
        if wait is not None:
            return Wait(wait)
        return self._health[left[0]].error if left else None

    @staticmethod
    def _bad(health: _Health, now: float) -> float:
        """The bad answers of late."""
        return float(health.bad * 0.5 ** ((now - health.bad_at) / _HALF_LIFE))

    @staticmethod
    def _is_known(health: _Health, now: float) -> bool:
        return health.latency is not None and now - health.measured_at < _MEMORY

    def _is_outage(self, health: _Health, now: float) -> bool:
        return health.answered_at is not None and now - health.answered_at < self._outage
