"""Waiting among threads: so that Ctrl-C ends it at once, and so that short waits for a lock do not become long ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Latch", "attentively"]

# A signal may be taken by another thread than the main one: one that has just been started, above all. Python runs the
# handler in the main thread all the same, but only once that comes back from what it waits for.
_LOOK_UP = 0.1  # seconds
_SHORTEST_NAP, _LONGEST_NAP = 20e-6, 1e-3  # seconds


def attentively(wait: Callable[[float], object], timeout: float | None = None) -> bool:
    """Call ``wait`` with a few seconds at most, until it gives something true, or ``timeout`` seconds are over; gives
    which of both it was. In between, the signals that have come are handled."""
    if threading.current_thread() is not threading.main_thread():  # where no signal is handled
        return bool(wait(threading.TIMEOUT_MAX if timeout is None else max(0.0, timeout)))
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        left = _LOOK_UP if end is None else end - time.monotonic()
        if wait(max(0.0, min(left, _LOOK_UP))):
            return True
        if left <= 0:
            return False


class Latch:
    """A lock that is held for microseconds, by many threads in turn. Threads of pools, in which no interrupt comes, may
    take it again while they have it.

    Who waits for a ``threading.Lock`` has it from the moment at which it is given up, but runs only when the
    interpreter comes round to that thread; the one that runs meanwhile wants the lock again, and stops in its turn.
    From then on each time that it is taken costs two switches of threads: a lock convoy, which does not dissolve by
    itself. Here, who does not get the lock looks for it again after a nap, and so has it only while it runs.
    """

    # An interrupt may come after each call, and where a function of Python begins. So what ends the block is no such
    # function, and what begins it makes up its mind.
    __slots__ = ("__exit__", "_is_owned", "_lock", "release")
    __exit__: Callable[..., None]

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._is_owned: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # a Condition needs it
        self.__exit__ = self._lock.__exit__
        self.release = self._lock.release

    def acquire(self) -> bool:
        nap = _SHORTEST_NAP
        try:
            while not self._lock.acquire(blocking=False):
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)
            return True
        except BaseException:
            if self._is_owned():
                self._lock.release()
            raise

    __enter__ = acquire

    def condition(self) -> threading.Condition:
        """One that stands on this lock."""
        return threading.Condition(self)  # type: ignore[arg-type]
