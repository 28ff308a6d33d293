"""Rounds: brief pieces on their way, all of which one worker waits for.

A thread for each would spend most of its time on taking turns with the others. So one worker at a time asks for as many
as may be under way, takes in what has come, and asks for more. What is unusual, or slow, is given a worker of its own.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..transport.client import BRIEF, Answer
from ..values import Priority
from .courier import Courier
from .loads import Call, Load, Share, calling_later
from .priority import PrioritizedFragment
from .races import Trip
from .scheduler import Piece, Scheduler

__all__ = ["TOLD_TOGETHER", "Hands", "Rounds"]

TOLD_TOGETHER = 32
"""Fragments that are told of at once: the first should not wait for the last to be on the disk."""

_SLOW = 0.5
"""Seconds after which a brief piece that is waited for with others is given a worker of its own, at most."""

_SOON = 0.002
"""Seconds for which what has come may wait for more: to tell a thread that waits costs as much as another piece."""

_MOST_AT_ONCE = 256
"""Brief pieces that one worker waits for."""


class Hands(NamedTuple):
    """What a round leaves to the fetcher.

    ``sets_aside``: whether a piece is not to be begun, and has been seen to; ``begin``: what a piece does for loads
    that want it; ``run`` and ``bring``: the ordinary way, from the beginning and from the request on; ``take_in``: what
    has come; ``fail``: a defect is told to whoever waits for a piece; ``apart``: another worker does it; ``call_back``:
    another thread makes these calls, which may take as long as they like; ``spawn``: there may be work for others.
    """

    sets_aside: Callable[[Piece], bool]
    begin: Callable[[Piece], list[Share]]
    run: Callable[[Piece], object]
    bring: Callable[[Piece, list[Share], Trip | None], object]
    take_in: Callable[[Sequence[tuple[Share, Answer]]], object]
    fail: Callable[[Piece, Sequence[Share], Exception], object]
    apart: Callable[[Call], object]
    call_back: Callable[[Sequence[Call]], object]
    spawn: Call


class Rounds:
    """Whether a worker is on a round: one is at most. Thread-safe."""

    def __init__(self, scheduler: Scheduler, courier: Courier, clock: Callable[[], float], *, timeout: float) -> None:
        self._scheduler = scheduler
        self._courier = courier
        self._clock = clock
        self._slow = min(_SLOW, timeout / 4)
        self._lock = threading.Lock()
        self._watch: _Watch | None = None

    @property
    def is_on(self) -> bool:
        return self._watch is not None

    @property
    def carried(self) -> int:
        """Pieces on the way beside the one that any worker has."""
        watch = self._watch
        return 0 if watch is None else max(0, len(watch) - 1)

    @property
    def is_next(self) -> bool:
        """Whether what is most urgent may go with others."""
        return _is_next(self._scheduler, self._courier)

    def wake(self) -> bool:
        """There is more to take along; False if nobody is on a round."""
        watch = self._watch
        if watch is not None:
            watch.wake()
        return watch is not None

    def go(self, piece: Piece, hands: Hands) -> bool:
        """Go with a piece that is brief, and with all that are; False if it is none, or another worker does."""
        if not (self._courier.may_go_round and _goes_along(piece)):
            return False
        with self._lock:
            if self._watch is not None:
                return False
            try:
                self._watch = watch = _Watch()
            except OSError:  # there is no file descriptor to spare
                return False
        try:
            _Round(self._scheduler, self._courier, watch, hands, self._clock, self._slow).go(piece)
        finally:
            self._watch = None
            watch.close()
        return True


class _Round:
    """One round, on its worker's thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        courier: Courier,
        watch: _Watch,
        hands: Hands,
        clock: Callable[[], float],
        slow: float,
    ) -> None:
        self._scheduler = scheduler
        self._courier = courier
        self._watch = watch
        self._hands = hands
        self._clock = clock
        self._slow = slow
        self._taken: dict[Piece, list[Share]] = {}  # that have not been begun
        self._came: list[tuple[Trip, Answer]] = []  # that nobody has been told of
        self._since = 0.0  # when the first of these came
        self._pause: float | None = None  # seconds until more may be taken
        self._calls: list[Call] = []  # that nobody has made

    def go(self, piece: Piece) -> None:
        """Have brief pieces on the way, as many as may be, until there are none. Whoever is called back may wait for
        what comes on this very round: that is another thread's."""
        self._taken[piece] = []
        with calling_later() as self._calls:
            self._go()
        self._call_back()

    def _go(self) -> None:
        try:
            while self._taken or self._watch or self._came:
                self._depart()
                self._look()
                self._take()
        except Exception as error:  # a defect of ours, of which whoever waits has to be told
            for piece, shares in self._taken.items():
                self._hands.fail(piece, shares, error)
            for trip, _ in self._came:
                self._courier.end(trip)
                self._hands.fail(trip.piece, trip.shares, error)
        finally:
            for trip in self._watch.trips:
                self._hand_over(trip)

    def _take(self) -> None:
        """Take what else may be begun."""
        self._watch.look_up()
        pieces, self._pause = self._scheduler.next_all(_is_brief, _MOST_AT_ONCE - len(self._watch))
        self._taken = {piece: [] for piece in pieces}
        if not _is_next(self._scheduler, self._courier):
            self._hands.spawn()

    def _depart(self) -> None:
        """Begin with what was taken: what is brief goes on the way, each other is given a worker."""
        hands, taken = self._hands, self._taken
        for piece in list(taken):
            if not _goes_along(piece):
                del taken[piece]
                hands.apart(partial(hands.run, piece))
            elif hands.sets_aside(piece):
                del taken[piece]
            elif shares := hands.begin(piece):
                taken[piece] = shares
            else:
                del taken[piece]
                self._scheduler.release(piece)
        going = list(taken.items())
        for trip, (piece, shares) in zip(self._courier.depart(going) if going else (), going, strict=True):
            if trip is not None:
                self._watch.add(trip)
            del taken[piece]
            if trip is None:
                hands.apart(partial(hands.bring, piece, shares, None))
        self._call_back()

    def _look(self) -> None:
        """Wait until something has come, and tell of it once that is enough."""
        now = self._clock()
        ready = self._watch.wait(0.0) if self._came else []
        if self._came and not (ready and len(self._came) < TOLD_TOGETHER and now < self._since + _SOON):
            self._tell()
        if not ready and (eldest := self._watch.eldest()) is not None:
            left = eldest + self._slow - now
            ready = self._watch.wait(left if self._pause is None else min(left, self._pause))
            now = self._clock()
        if ready:
            self._since = self._since if self._came else now
            self._read(ready)
        while (eldest := self._watch.eldest()) is not None and eldest <= now - self._slow:
            self._hand_over(self._watch.trips[0])

    def _read(self, ready: list[Trip]) -> None:
        """Read what has come by now, once nothing more urgent does."""
        known = len(self._came)
        if all(self._scheduler.gives_way(trip.piece) for trip in self._watch.trips):
            self._scheduler.give_way(ready[0].piece)
        for trip in ready:
            answer = None if trip.begun.call.is_unusual else self._courier.read(trip)
            if answer is not None:
                self._watch.remove(trip)
                self._came.append((trip, answer))
            elif trip.begun.call.is_unusual:
                self._hand_over(trip)
        if came := self._came[known:]:
            self._courier.returned(came)

    def _tell(self) -> None:
        """Hand in what has come."""
        came, self._came = self._came, []
        self._hands.take_in([(trip.shares[0], answer) for trip, answer in came])
        self._call_back()

    def _call_back(self) -> None:
        """Have those called back who have been told."""
        if calls := self._calls[:]:
            del self._calls[: len(calls)]
            self._hands.call_back(calls)

    def _hand_over(self, trip: Trip) -> None:
        """Have another worker go on with a trip."""
        self._watch.remove(trip)
        self._hands.apart(partial(self._hands.bring, trip.piece, trip.shares, trip))


class _Watch:
    """The trips that a worker waits for. For one thread, but for ``wake``, which has it look up.

    Which of them something has come for, it is told at once; how often that is asked costs no more for many. Raises
    OSError where there is no file descriptor to spare.
    """

    def __init__(self) -> None:
        self._trips: dict[int, Trip] = {}  # by what is waited for, in the order in which they began
        self._poll = select.poll()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._poll.register(self._bell, select.POLLIN)
        self._is_woken = False
        self._lock = threading.Lock()  # what is rung must not be another's file by then

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
            with self._lock, contextlib.suppress(OSError):  # it is over
                self._rope.send(b"!")

    def close(self) -> None:
        with self._lock:
            self._bell.close()
            self._rope.close()


def _is_next(scheduler: Scheduler, courier: Courier) -> bool:
    """Whether what is most urgent may go with others, all of which one worker waits for."""
    first = scheduler.first() if courier.may_go_round else None
    return first is not None and _is_brief(first)


def _is_brief(fragment: PrioritizedFragment) -> bool:
    """Whether a fragment is one that comes at one go, and for which there is nothing to think about."""
    wanted = fragment.request.byte_range
    return (
        isinstance(fragment, Load)
        and wanted is not None
        and wanted.length <= BRIEF
        and fragment.priority is not Priority.CRITICAL
        and fragment.held is None
        and not (fragment.failures or fragment.whole or fragment.may_resume or fragment.request.allow_short)
    )


def _goes_along(piece: Piece) -> bool:
    """Whether a piece is a brief fragment, and no more."""
    return len(piece.parts) == 1 and piece.byte_range.length <= BRIEF and _is_brief(piece.fragment)
