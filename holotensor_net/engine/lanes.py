"""Lanes: one for each host, with what is queued for it, how fast it is, and how many connections it may have."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..values import Priority
from .bandwidth import BandwidthMonitor
from .pacing import ConcurrencyController, Interval
from .paths import PATHS, Path
from .priority import PriorityQueue

__all__ = ["Lane", "may_begin"]

_AHEAD = 2  # connections that may be begun before those that are as many as never before have been answered, at least
_AHEAD_SHARE = 8  # one for so many that have been answered at once, likewise
_SPACING = 0.005  # seconds after which another one may be begun all the same
_SILENCE = 0.008  # seconds without a byte, at least, that tell that the path is not full
_SILENT_TRIPS = 4.0  # round trips, likewise
_KEEP_EVERY = 1.0  # second, at most: to copy what is known costs some 0.1 ms
_FULL = 0.1  # seconds for which a host that refused gets no more than it was serving then


class Lane:
    """What goes to one host. Not thread-safe, but for its ``queue``: its owner has a lock. Times are arguments.

    ``active`` pieces are in flight, ``urgent`` ones among them of level CRITICAL. ``ceiling``: connections, at most;
    where it ``is_adaptive``, a controller finds the least that fill the path. A number that the host has not answered
    at yet is gone up to step by step: one that refuses any more has few to refuse. ``host``: the name under which what
    was found is kept for others, and what others found is looked up; None for neither. ``is_paced``: whether it is us
    who make bytes wait.
    """

    def __init__(
        self,
        queue: PriorityQueue,
        ceiling: int,
        *,
        is_adaptive: bool,
        now: float,
        host: str | None = None,
        is_paced: bool = False,
    ) -> None:
        self.queue = queue
        self.monitor = BandwidthMonitor()
        self._host = host if is_adaptive else None
        self._kept_at = now
        known = None if self._host is None else PATHS.recall(self._host, ceiling, now)
        self._expected = known or Path(ConcurrencyController(ceiling), 0.0, 0.0)
        self.controller = self._expected.controller
        self.active = 0
        self.urgent = 0
        self._ceiling = self._enough = ceiling
        self._is_adaptive = is_adaptive
        self._is_paced = is_paced
        self._heard_at = self._moves_since = now  # the last bytes, and from when on they came to as many as there are
        self._is_idle = True
        self._served: set[object] = set()  # those of which bytes have come
        self._most_served = 0  # at once, since the limit was changed
        self._ranks: dict[object, int] = {}  # how many there were with each that has not been answered yet
        self._answered = self.limit  # this many, at once
        self._usable = 0  # connections, and those that were answered at once, when bytes came last
        self._begun_at = now  # the last of those that are as many as never before
        self._full, self._full_until = 0, 0.0
        self._begin_interval(now)

    @property
    def limit(self) -> int:
        """Connections that may be used at once, now."""
        return min(self.controller.limit, self._enough) if self._is_adaptive else self._ceiling

    @property
    def each(self) -> float:
        """Bytes/s of a connection, as it was measured, or is expected; 0 if neither."""
        return self.monitor.current_bandwidth / max(1, self.active) or self._expected.each

    @property
    def is_new(self) -> bool:
        """Whether little is known of the path yet: the first bytes of a connection often come faster than the rest."""
        return self._is_adaptive and self.controller.is_climbing

    @property
    def round_trip(self) -> float:
        """Seconds, as they were measured, or are expected; 0 if neither."""
        return self.monitor.round_trip or self._expected.round_trip

    @property
    def most(self) -> int:
        """Connections that there may be for a moment."""
        return min(self._ceiling, self.controller.most)

    @property
    def wanted(self) -> int:
        """Connections that could be used, urgent ones beyond the limit aside: those that may be begun now, and the
        next."""
        if not len(self.queue):
            return min(self.active, self.limit)
        most = self.limit + self._may_be_roused
        return min(most, max(self._within_reach, self.active + 1))

    def delay(self, now: float) -> float | None:
        """Seconds until another piece may begin, as far as the host is concerned; None for until something changes.
        Lower levels give way to CRITICAL, so that their connections hardly count."""
        if self.active < self.limit:
            if now < self._full_until and self.active >= self._full:
                return self._full_until - now
            return 0.0 if self.active < self._within_reach else max(0.0, self._begun_at + _SPACING - now)
        if self._may_be_roused:
            return max(0.0, self._heard_at + self._silence - now)
        if self.active >= self.most or self.urgent >= self.limit:
            return None
        first = self.queue.peek()
        return 0.0 if first is not None and first.priority == Priority.CRITICAL else None

    @property
    def _within_reach(self) -> int:
        """Connections that may be begun without a wait: those that have been answered at once, and some more."""
        return self._answered + max(_AHEAD, self._answered // _AHEAD_SHARE)

    @property
    def _is_held_up(self) -> bool:
        """Whether connections were read from in less than half of their time, as files took the rest: then twice as
        many as were read from on average bring all that the files take."""
        return self._spent > self._busy / 2

    @property
    def _may_be_roused(self) -> bool:
        """Whether a silence would tell that the path is not full: all that may be there are, and have had bytes."""
        are_all = self.active == len(self._served) == self.limit
        is_ours = self._is_paced or self._is_disturbed or self._is_held_up
        return are_all and self._is_adaptive and not is_ours and self.controller.may_climb

    @property
    def _silence(self) -> float:
        """Seconds without a byte after which the path is not full: as many as it moved before, at least."""
        return max(_SILENCE, _SILENT_TRIPS * self.round_trip, self._heard_at - self._moves_since)

    # -- what happens

    def begin(self, piece: object, now: float) -> None:
        """Another piece is in flight."""
        if self._is_idle:
            self._is_idle = False
            self._moves_since = now
            self._begin_interval(now)
        self._account(now)
        if self._may_be_roused and now >= self._heard_at + self._silence:
            self._revise(now, force=True, is_silent=True)
        self.active += 1
        if self.active > self._answered:
            self._begun_at = now
            self._ranks[piece] = self.active

    def end(self, piece: object, now: float) -> bool:
        """A piece is no longer in flight; whether the limit has risen."""
        self._account(now)
        self.active -= 1
        self._served.discard(piece)
        self._ranks.pop(piece, None)
        # Between two pieces of a lone connection the interval goes on: it would never come to its end.
        self._is_idle = not self.active and not len(self.queue)
        has_risen = self._revise(now, force=self._is_idle)
        if self._is_idle and now >= self._kept_at + _KEEP_EVERY:
            self.keep(now)
        return has_risen

    def keep(self, now: float) -> None:
        """Tell others what was found."""
        self._kept_at = now
        if self._host is not None and self.controller.has_learnt:
            each = self.monitor.current_bandwidth / self.limit
            found = self.controller.heir(self._ceiling, after=0.0)
            PATHS.keep(self._host, Path(found, each, self.round_trip), now)

    def record(self, size: int, piece: object, now: float, spent: float = 0.0) -> bool:
        """Bytes have come, of a piece in flight or of none, which was not read for ``spent`` seconds of the time since
        the last: files were written to. Gives whether more connections may be used than before."""
        if piece is not None:
            if not self._most_served:
                self._moves_since = now  # the first bytes: what came before them was no movement
            self._served.add(piece)
            self._most_served = max(self._most_served, len(self._served))
            self._answered = max(self._answered, self._ranks.pop(piece, 0))
        self._account(now)
        self._heard_at = now
        self._spent += spent
        self._bytes += size
        self._squares += size * size
        has_risen = self._revise(now)
        before, self._usable = self._usable, self.limit + self._answered + self._may_be_roused
        return has_risen or self._usable > before

    def refuse(self, now: float) -> bool:
        """The host wanted fewer connections; whether the limit has risen nevertheless."""
        self._account(now)
        self._refusals += 1
        self._full, self._full_until = max(1, len(self._served)), now + _FULL
        return self._revise(now, force=True)

    def disturb(self) -> None:
        """Some give way: what is measured now is not the path."""
        self._is_disturbed = True

    # -- measuring

    def _begin_interval(self, now: float) -> None:
        """What is counted from here on: until the next revision."""
        self._began = self._accounted = now
        self._busy = self._spent = 0.0
        self._bytes = self._squares = 0
        self._refusals = 0
        self._saturated = False
        self._is_disturbed = False

    def _account(self, now: float) -> None:
        self._busy += self.active * (now - self._accounted)
        self._accounted = now
        if self.active >= self.limit and len(self.queue):
            self._saturated = True  # work waits for a connection

    def _revise(self, now: float, *, force: bool = False, is_silent: bool = False) -> bool:
        """At the end of an interval: tell the monitor what was measured, and let the controller revise the limit.
        ``is_silent``: nothing comes any more."""
        seconds = now - self._began
        is_long_enough = seconds >= self.controller.seconds
        if seconds <= 0 or not (is_long_enough or force):
            return False
        if self._bytes:
            self.monitor.record(self._bytes, seconds)
        before = self.limit
        if is_long_enough or self._refusals or is_silent:
            self.controller.revise(
                Interval(
                    seconds=seconds,
                    bytes=self._bytes,
                    active=self._busy / seconds,
                    saturated=self._saturated and not self._is_disturbed,
                    refusals=self._refusals,
                    round_trip=self.round_trip,
                    lump=self._squares / self._bytes if self._bytes else 0.0,
                    served=self._most_served,
                )
            )
            read_from = math.ceil(2 * (self._busy - self._spent) / seconds)
            self._enough = max(1, read_from) if self._is_held_up else min(self._ceiling, 2 * self._enough)
            if is_silent and self.limit == before:
                self.controller.rouse()
            if self.limit != before:
                self._moves_since = now
                self._most_served = len(self._served)
            if self._refusals:
                self._answered = min(self._answered, self.limit)
        self._begin_interval(now)
        return self.limit > before


def may_begin(lane: Lane, lanes: Sequence[Lane], ceiling: int) -> bool:
    """Whether a lane may begin another piece, if all together may have ``ceiling`` in flight.

    One that has less than its share may; one that has more leaves to the others that have work what they lack of
    theirs, up to their limits: a slow host does not hold another one down.
    """
    if len(lanes) == 1:
        return lane.active < ceiling
    working = [one for one in lanes if len(one.queue)]
    active = sum(one.active for one in lanes)
    share = max(1, ceiling // max(1, len(working)))
    lacking = sum(max(0, min(one.limit, share) - one.active) for one in working if one is not lane)
    return active < ceiling and (lane.active < share or active + lacking < ceiling)
