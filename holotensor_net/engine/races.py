"""A piece that is asked for twice: who has it first, and how the other is cut."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ..errors import ProtocolError
from ..transport.client import Answer, Ask, Begun, Write
from ..transport.sockets import Interrupt
from ..values import RangeRequest
from .alarms import Alarm
from .loads import Share
from .scheduler import Piece

__all__ = ["Private", "Prize", "Race", "Second", "Trip"]


class Private:
    """A place for the bytes of one range that nobody else sees."""

    def __init__(self, wanted: RangeRequest) -> None:
        self._wanted = wanted
        self._bytes = bytearray(wanted.length)

    def write(self, offset: int, data: memoryview) -> None:
        begin = offset - self._wanted.start
        if begin < 0 or begin + len(data) > len(self._bytes):
            raise ProtocolError("the answer holds more than a piece")
        self._bytes[begin : begin + len(data)] = data

    def view(self, part: RangeRequest) -> memoryview:
        """The bytes of ``part`` of the object, which lies within the range."""
        return memoryview(self._bytes)[part.start - self._wanted.start : part.stop - self._wanted.start]


@dataclass(frozen=True, slots=True, eq=False)
class Prize:
    """What the second brought, and as which version, if any, it was asked for."""

    endpoint: int
    ask: Ask
    answer: Answer
    place: Private


class Second:
    """The other one: how it is cut, and whether it has ended."""

    def __init__(self) -> None:
        self.interrupt = Interrupt()
        self.ended = threading.Event()

    def stop(self) -> None:
        self.interrupt.fire()
        self.ended.set()  # or it will never begin


@dataclass(eq=False)
class Race:
    """A piece on its way from ``endpoint`` since ``began``, and perhaps from another one too.

    Only the first writes to the destination, with ``write``, on the thread that began the piece; the second has a place
    of its own. If the second has everything, and it is verified, the first is cut; its thread then takes what the
    second brought in place of its own. ``pause``: seconds until the piece is looked at (again), by ``alarm``. The lock
    guards the outcome, and the ``second``, which there is once it has been asked.
    """

    shares: list[Share]
    ask: Ask
    endpoint: int
    began: float
    headed: float | None = None
    pause: float = 0.0
    alarm: Alarm | None = None
    first: Interrupt = field(default_factory=Interrupt)
    second: Second | None = None
    rested: float = 0.0
    write: Write | None = None
    _spent: float = 0.0
    _resting_since: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _prize: Prize | None = None
    _is_over: bool = False
    _is_stopped: bool = False

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def is_served(self) -> bool:
        """Whether its bytes are coming from the first."""
        return self.headed is not None and not self._is_over

    @contextlib.contextmanager
    def resting(self, clock: Callable[[], float]) -> Iterator[None]:
        """The reader of the first rests; before an answer has come, it is as if it had begun so much later."""
        self._resting_since = began = clock()
        try:
            yield
        finally:
            rest = clock() - began
            if self.headed is None:
                self.began += rest
            else:
                self.rested += rest
            self._resting_since = None

    def spent(self) -> float:
        """Seconds that files have taken since this was asked last: bytes waited for them, not they for bytes."""
        before, self._spent = self._spent, getattr(self.write, "spent", 0.0)
        return self._spent - before

    def seconds(self, now: float) -> float:
        """For how long it has been under way, without its rests. Another thread may be told a little too much."""
        since = self._resting_since
        return (now if since is None else since) - self.began - self.rested

    def win(self, prize: Prize) -> bool:
        """The second is there; False if it is too late."""
        with self._lock:
            if self._is_over:
                return False
            self._is_over, self._prize = True, prize
        self.first.fire()
        return True

    def end(self) -> Prize | None:
        """The first has ended, well or not: the second is cut. What it had brought before, if it had."""
        with self._lock:
            self._is_over = True
            prize, self._prize = self._prize, None
            second = self.second
        if second is not None:
            second.interrupt.fire()
        return prize

    @property
    def is_idle(self) -> bool:
        """Whether nobody wants the piece any more. Under the fetcher's lock."""
        return all(share.attempt.abandoned for share in self.shares)

    def stop(self) -> None:
        """Cut both."""
        self.first.fire()
        with self._lock:
            self._is_stopped = True
            second = self.second
        if second is not None:
            second.stop()

    def double(self) -> Second:
        """The second is about to be asked."""
        second = Second()
        with self._lock:
            self.second = second
            is_late = self._is_stopped or self._is_over
        if is_late:
            second.stop()
        return second

    def await_second(self, seconds: float) -> None:
        """The first is of no use: wait for the second, if there is one, so long at most."""
        if self.second is not None:
            self.second.ended.wait(max(0.0, seconds))


@dataclass(slots=True, eq=False)
class Trip:
    """A brief piece on its way since ``began``, among many that one thread waits for: as a race, but that nobody is to
    ask a second time. ``fd``: what to wait for."""

    piece: Piece
    shares: list[Share]
    endpoint: int
    began: float
    begun: Begun
    fd: int
    is_served: ClassVar = False  # as far as is known: it is looked at once all of it may be there

    @property
    def is_idle(self) -> bool:
        """Whether nobody wants the piece any more. Under the fetcher's lock."""
        return self.shares[0].attempt.abandoned

    def stop(self) -> None:
        """Cut it."""
        self.begun.call.cut()
