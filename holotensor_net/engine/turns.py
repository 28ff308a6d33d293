"""Turns: which of several processes that share a cache brings what, so that it comes once where locks work."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..values import Priority
from ..waits import Latch
from .loads import Load, Turn
from .request_cache import RequestCache
from .scheduler import Scheduler

__all__ = ["Move", "Turns"]

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25
_GROWTH = 1.5
_URGENT = 1.0
"""Seconds that what is urgent waits for another process, to which it may be anything but urgent."""


class Move(enum.Enum):
    """What to do about a load whose turn may have come."""

    BEGIN = enum.auto()
    LOOK = enum.auto()  # somebody else may have brought it meanwhile; else begin
    WAIT = enum.auto()


@dataclass(frozen=True, slots=True)
class _Limits:
    """How long another process is waited for: ``seconds``, and as long as the bytes take at ``rate`` per second."""

    seconds: float
    rate: float

    def of(self, load: Load) -> float:
        wanted = load.request.byte_range
        size = load.request.expected_size if wanted is None else wanted.length
        most = self.seconds + (size or 0) / self.rate
        return min(most, _URGENT) if load.priority == Priority.CRITICAL else most


class Turns:
    """Says of each load whether it is this process's to bring, or that of another one which has begun with it.

    One that has to wait is taken out of the scheduler, and has no thread; :meth:`wake` looks for the end of that, with
    pauses that grow, and a limit: a process that hangs holds nobody up for ever. ``lock``, the fetcher's, guards what
    loads say of their turns; nothing is asked of the file system under it.
    """

    def __init__(
        self,
        cache: RequestCache,
        scheduler: Scheduler,
        lock: Latch,
        *,
        seconds: float,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._claims = cache.claims
        self._scheduler = scheduler
        self._lock = lock
        self._limits = _Limits(seconds, rate)
        self._clock = clock

    @property
    def are_taken(self) -> bool:
        """Whether there may be other processes at all."""
        return self._claims is not None

    def take(self, load: Load) -> Move:
        """A worker is about to begin with a load, or with another piece of it."""
        turn = load.turn
        if self._claims is None or (turn is not None and turn.has_come):
            return Move.BEGIN
        made = turn or Turn(self._cache.name(load.request), self._cache.claim(load.request))
        is_taken = not made.is_late and self._claims.take(*made.claim)
        with self._lock:
            turn = load.turn = load.turn or made
            if turn.has_come and not load.done:  # another worker was faster
                return Move.BEGIN
            is_stray = is_taken and (load.done or turn.is_waiting)
            if not load.done and not turn.is_waiting:
                turn.is_claimed = is_taken
                turn.has_come = is_taken or turn.is_late
                if not turn.has_come:
                    self._wait(load, turn)
        if is_stray:
            self._claims.release(*turn.claim)
        if not turn.has_come:
            return Move.WAIT
        is_news = turn.has_waited or (load.held is None and self._cache.has_appeared(turn.name))
        return Move.LOOK if is_news else Move.BEGIN

    def _wait(self, load: Load, turn: Turn) -> None:
        """Take a load out of the queue. With the lock held."""
        turn.is_waiting = True
        if not turn.has_waited:
            turn.has_waited, turn.since, turn.began = True, self._cache.now(), self._clock()
        turn.pause = _FIRST_PAUSE
        self._scheduler.withdraw(load)

    def wake(self, load: Load) -> float | None:
        """Seconds after which to call this again for a load that waits; None if it is in the queue again, or done."""
        turn = load.turn
        if turn is None or self._claims is None or load.done or not turn.is_waiting:
            return None
        is_late = self._clock() >= turn.began + self._limits.of(load)
        if not is_late and not self._claims.is_free(*turn.claim):
            turn.pause = min(_GROWTH * turn.pause, _LONGEST_PAUSE)
            return turn.pause
        with self._lock:
            if not turn.is_waiting:  # several workers had pieces of it, and each looks again
                return None
            turn.is_waiting, turn.is_late = False, is_late
            # Whoever was at it may have been cut off.
            load.may_resume = not load.whole
            self._scheduler.restart(load, whole=load.whole or load.may_resume)
        return None

    def end(self, load: Load) -> None:
        """Nobody needs to wait for what this load brings."""
        turn = load.turn
        if turn is not None and turn.is_claimed and self._claims is not None:
            turn.is_claimed = False
            self._claims.release(*turn.claim)
