"""Alarms: calls back at a given time, on a thread of its own that no transfer can keep busy."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

__all__ = ["Alarm", "Alarms"]

T = TypeVar("T")

_log = logging.getLogger("holotensor_net.engine")

_LINGER = 0.5
"""Seconds for which the thread stays when there is nothing to wait for: to start one costs more than an alarm."""


@dataclass(slots=True, eq=False)
class Alarm:
    """One that was set; ``is_over`` once it has rung, or need not any more."""

    subject: weakref.ref[Any]
    ring: Callable[[Any], object]
    is_over: bool = False


class Alarms:
    """Rings each subject at its time, unless it was cancelled, or nobody holds the subject any more by then.

    Thread-safe; its one lock guards the times, and no callback runs under it. The thread ends soon after there is
    nothing left to wait for, and with ``close``.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._changed = threading.Condition()
        self._times: list[tuple[float, int, Alarm]] = []
        self._soon: deque[Callable[[], object]] = deque()
        self._cancelled = 0  # how many of these are
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def at(self, moment: float, subject: T, ring: Callable[[T], object]) -> Alarm:
        """Call ``ring(subject)`` at ``moment`` on the clock; until then ``subject`` is held weakly."""
        alarm = Alarm(weakref.ref(subject), ring)
        with self._changed:
            if self._closed:
                return alarm
            entry = (moment, next(self._numbers), alarm)
            heapq.heappush(self._times, entry)
            if self._thread is None:
                self._begin()
            elif self._times[0] is entry:
                self._changed.notify()
        return alarm

    def soon(self, call: Callable[[], object]) -> None:
        """Have the thread call this, now.

        May be called from within anything, as the garbage collector calls: whatever lock this thread holds, and in the
        midst of any other method of this object (its lock may be taken again by who has it).
        """
        self._soon.append(call)
        with self._changed:
            if self._closed:
                self._soon.clear()
            elif self._thread is None:
                self._begin()
            else:
                self._changed.notify()

    def _begin(self) -> None:
        """Start the thread; where the machine gives none, the next alarm that is set asks for one again. With the lock
        held."""
        thread = threading.Thread(target=self._run, name=self._name)
        try:
            thread.start()
        except RuntimeError as error:
            _log.warning("deadlines are late, as no thread could be started for them: %s", error)
        else:
            self._thread = thread

    def cancel(self, alarm: Alarm) -> None:
        """Have it not ring, if it has not; O(log n), as what is cancelled is swept out only once it is the most."""
        with self._changed:
            if alarm.is_over or self._closed:
                return
            alarm.is_over = True
            self._cancelled += 1
            if 2 * self._cancelled > len(self._times):
                self._times = [entry for entry in self._times if not entry[2].is_over]
                heapq.heapify(self._times)
                self._cancelled = 0
                self._changed.notify()

    def close(self, *, wait: bool = True) -> None:
        """Ring no more. ``wait`` for the thread's end; never from a callback, which is on it."""
        with self._changed:
            self._closed = True
            self._times.clear()
            self._soon.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and wait:
            thread.join()

    def _run(self) -> None:
        while (due := self._next()) is not None:
            try:
                due()
            except Exception:
                _log.exception("an alarm failed")
            del due  # it holds its subject

    def _next(self) -> Callable[[], object] | None:
        """The next alarm, once it is due; None if there has been none for a while."""
        with self._changed:
            while not self._closed and self._changed.wait_for(self._has_work, _LINGER):
                if self._soon:
                    return self._soon.popleft()
                if not self._times:
                    break
                moment, _, alarm = self._times[0]
                left = moment - self._clock()
                subject = None if alarm.is_over else alarm.subject()
                if subject is not None and left > 0:
                    del subject
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._times)
                self._cancelled -= alarm.is_over
                alarm.is_over = True
                if subject is not None:
                    return partial(alarm.ring, subject)
            self._thread = None
            return None

    def _has_work(self) -> bool:
        return bool(self._times or self._soon or self._closed)
