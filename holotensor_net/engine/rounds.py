"""Rounds: brief pieces on their way, all of which one worker waits for."""

from __future__ import annotations

import contextlib
import select
import socket

from .races import Trip

__all__ = ["Round"]


class Round:
    """The trips that a worker waits for. For one thread, but for ``wake``, which has it look up.

    Which of them something has come for, it is told at once; how often that is asked costs no more for many.
    """

    def __init__(self) -> None:
        self._trips: dict[int, Trip] = {}  # by what is waited for, in the order in which they began
        self._poll = select.poll()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._poll.register(self._bell, select.POLLIN)
        self._is_woken = False

    def __len__(self) -> int:
        return len(self._trips)

    @property
    def trips(self) -> list[Trip]:
        return list(self._trips.values())

    def add(self, trip: Trip) -> None:
        self._trips[trip.fd] = trip
        self._poll.register(trip.fd, select.POLLOUT if trip.begun.call.may_send else select.POLLIN)

    def remove(self, trip: Trip) -> None:
        del self._trips[trip.fd]
        self._poll.unregister(trip.fd)

    def wait(self, seconds: float) -> list[Trip]:
        """Those for which something has come, once there is one, or after so many seconds, or once woken; what could
        not be sent at once is sent on the way."""
        ready = []
        for fd, _ in self._poll.poll(max(0.0, seconds * 1e3)):
            trip = self._trips.get(fd)
            if trip is None:
                with contextlib.suppress(BlockingIOError):
                    self._bell.recv(64)
            elif trip.begun.call.may_send:
                trip.begun.call.send()
                self.add(trip)
                if trip.begun.call.is_unusual:
                    ready.append(trip)
            else:
                ready.append(trip)
        return ready

    def eldest(self) -> float | None:
        """When the first of them began."""
        return next((trip.began for trip in self._trips.values()), None)

    def look_up(self) -> None:
        """It looks, from now on, for what it may be woken for."""
        self._is_woken = False

    def wake(self) -> None:
        """Have it look up from its wait, if it waits, or as soon as it does."""
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(OSError):  # it is over
                self._rope.send(b"!")

    def close(self) -> None:
        self._bell.close()
        self._rope.close()
