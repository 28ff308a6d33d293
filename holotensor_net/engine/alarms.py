"""Alarms: calls back at a given time, on a thread of its own that no transfer can keep busy."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

__all__ = ["Alarms"]

T = TypeVar("T")

_log = logging.getLogger("holotensor_net.engine")


class Alarms:
    """Rings each subject at its time, unless nobody holds it any more by then.

    Thread-safe; its one lock guards the times, and no callback runs under it. The thread ends when there is nothing
    left to wait for, and with ``close``.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._changed = threading.Condition()
        self._times: list[tuple[float, int, weakref.ref[Any], Callable[[Any], object]]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def at(self, moment: float, subject: T, ring: Callable[[T], object]) -> None:
        """Call ``ring(subject)`` at ``moment`` on the clock; until then ``subject`` is held weakly."""
        with self._changed:
            if self._closed:
                return
            entry = (moment, next(self._numbers), weakref.ref(subject), ring)
            heapq.heappush(self._times, entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name)
                self._thread.start()
            elif self._times[0] is entry:
                self._changed.notify()

    def close(self, *, wait: bool = True) -> None:
        """Ring no more. ``wait`` for the thread's end; never from a callback, which is on it."""
        with self._changed:
            self._closed = True
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
        """The next alarm, once it is due; None if there is none left."""
        with self._changed:
            while self._times and not self._closed:
                moment, _, known, ring = self._times[0]
                left = moment - self._clock()
                if known() is not None and left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                heapq.heappop(self._times)
                subject = known()
                if subject is not None:
                    return partial(ring, subject)
            self._thread = None
            return None
