"""Waiting that Ctrl-C ends at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# A signal may be taken by another thread than the main one: one that has just been started, above all. Python runs the
# handler in the main thread all the same, but only once that comes back from what it waits for.
_LOOK_UP = 0.1


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
