"""Requests, so many a second: who is given a piece, and who may send."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ..values import Priority
from .pacing import RateBudget

__all__ = ["Ration", "Sender"]

_STARVING = 5.0  # seconds in line, after which only CRITICAL goes before a sender


@dataclass(frozen=True, slots=True, eq=False)
class Sender:
    """Who would send a request: of this level, for a ``piece`` that was handed out or for nothing of that kind."""

    level: Priority
    piece: object = None


class Ration:
    """Requests, ``rate`` of them a second; None is without limit.

    What counts is what is sent: ``send`` is asked before each request. But whoever waits there holds a connection, and
    whatever is more urgent finds it taken. So a piece is counted as well when it is handed out, and those that have to
    wait do so in the queue. One of which nothing is sent gives that back; some send late, and meet in a line: the most
    urgent goes first, and the queue waits for all that are as urgent as what it has. Not thread-safe. Times are
    arguments, in seconds.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = math.inf if rate is None else rate
        self._handed_out = RateBudget(rate)
        self._sent = RateBudget(rate)
        self._unsent: set[object] = set()  # pieces
        self._line: dict[Sender, tuple[int, float]] = {}  # which one it was to come, and when it came
        self._arrivals = itertools.count()

    @property
    def has_line(self) -> bool:
        """Whether anybody waits to send."""
        return bool(self._line)

    def delay(self, level: Priority, now: float) -> float:
        """Seconds until a piece of this level may be handed out; 0 for at once."""
        delay = self._handed_out.delay(now)
        ahead = sum(self._order(other, now)[0] <= level for other in self._line) if self._line else 0
        return max(delay, self._sent.delay(now, ahead=ahead)) if ahead else delay

    def hand_out(self, piece: object, now: float) -> None:
        """Count a piece, for its first request."""
        if self._rate < math.inf:
            self._handed_out.spend(1, now)
            self._unsent.add(piece)

    def end(self, piece: object, now: float) -> None:
        """A piece is no longer in flight: what was not sent was not spent."""
        if piece in self._unsent:
            self._unsent.discard(piece)
            self._handed_out.spend(-1, now)

    def send(self, sender: Sender, now: float) -> float:
        """0: the request may be sent, and is counted. Else the seconds after which to ask again; until then, or until
        ``leave``, the sender stands in line."""
        if sender not in self._line:
            self._line[sender] = next(self._arrivals), now
        place = self._order(sender, now)
        ahead = sum(self._order(other, now) < place for other in self._line)
        delay = self._sent.delay(now, ahead=ahead)
        if delay <= 0:
            del self._line[sender]
            self._sent.spend(1, now)
            if sender.piece in self._unsent:
                self._unsent.discard(sender.piece)
            else:
                self._handed_out.spend(1, now)
        return delay

    def leave(self, sender: Sender) -> None:
        """The sender does not wait any longer."""
        self._line.pop(sender, None)

    def _order(self, sender: Sender, now: float) -> tuple[Priority, int]:
        number, came = self._line[sender]
        level = sender.level if now < came + _STARVING else min(sender.level, Priority.HIGH)
        return level, number
