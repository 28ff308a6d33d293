"""Confirmations: one question for all parts of an object, whether it is still the version that was cached."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..values import HeadInfo
from ..waits import Latch
from .loads import Load
from .scheduler import Part, Scheduler

__all__ = ["Confirmations", "Told"]

_MOST_ANSWERS = 256


@dataclass(frozen=True, slots=True)
class Told:
    """What a server said of a version that still holds (304), and the wall clock's time when it was asked."""

    head: HeadInfo
    asked_at: float | None


@dataclass(slots=True)
class _Question:
    """The load that asks, and those that wait for the answer."""

    asker: Load
    others: list[Load] = field(default_factory=list)


class Confirmations:
    """Of the loads that would ask the same, one does; the others wait for the answer, outside the scheduler.

    A confirmation holds for all parts that have the same strong validator (RFC 9111 §4.3.4), and for everyone who was
    asking when it came, even if it is stale by then. After any other answer each goes on by itself. ``lock``, the
    fetcher's, guards the questions; ``released`` is called, without it, when there is something to do again.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lock: Latch,
        *,
        released: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._lock = lock
        self._released = released
        self._clock = clock
        self._asked: dict[object, _Question] = {}
        self._answers: OrderedDict[object, tuple[float, Told | None]] = OrderedDict()

    def take(self, load: Load, part: Part) -> bool | Told:
        """Whether a worker is to go on with a load; or the answer to what it would ask. False: it waits."""
        key = _key(load)
        if key is None:
            return True
        with self._lock:
            if load.done or part.is_stale:
                return True
            came_at, told = self._answers.get(key, (float("-inf"), None))
            if load.queued_at <= came_at:
                return True if told is None else told
            question = self._asked.get(key)
            if question is None:
                question = self._asked[key] = _Question(load)
                load.asks = key
            if question.asker is load:
                return True
            question.others.append(load)
            self._scheduler.withdraw(load)
            if load.priority < question.asker.priority:
                self._scheduler.move(question.asker, load.priority)
            return False

    def answered(self, load: Load, told: Told | None = None) -> None:
        """What a load has asked was answered, or will not be: what it has still holds, or ``None`` of that."""
        self._end(load, lambda key: self._note(key, told))

    def forget(self, load: Load) -> None:
        """Nobody wants a load any more: another asks, if it has asked."""
        self._end(load, lambda key: None)

    def _end(self, load: Load, note: Callable[[object], None]) -> None:
        if load.asks is None:  # a glance
            return
        with self._lock:
            key, load.asks = load.asks, None
            question = self._asked.pop(key, None)
            note(key)
            for other in question.others if question is not None else ():
                self._scheduler.restart(other, whole=other.whole or other.may_resume)
        self._released()

    def _note(self, key: object, told: Told | None) -> None:
        self._answers[key] = (self._clock(), told)
        self._answers.move_to_end(key)
        if len(self._answers) > _MOST_ANSWERS:
            self._answers.popitem(last=False)


def _key(load: Load) -> object:
    """What a load would ask with its next piece, and of whom; None if nobody else's answer would do."""
    held = load.held
    if held is None or load.attempt.head is not None or load.lane != held.endpoint:
        return None
    validator = held.entry.validator
    return (held.endpoint, load.request.path, validator) if validator.is_strong else None
