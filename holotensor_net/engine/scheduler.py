"""Which piece next, when, and with how many connections at once."""

from __future__ import annotations

import bisect
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import NetworkConfig, SchedulerConfig
from ..errors import Timeout
from ..values import LoadRequest, Priority, RangeRequest, level_of, must_be
from ..waits import Latch, attentively
from .bandwidth import BandwidthMonitor
from .lanes import Lane, may_begin
from .neighbours import Neighbours
from .pacing import RateBudget
from .paths import host_of
from .planning import (
    cut,
    gap_worth_reading,
    piece_worth_asking,
    share_of_rest,
    window_worth_filling,
)
from .priority import PrioritizedFragment, PriorityQueue
from .rations import Ration, Sender

__all__ = ["Part", "Piece", "Plan", "Scheduler", "SchedulerStats"]

_ROUND_TRIP = 0.02  # until one has been seen
_LARGEST_GAP = 256 * 1024
_MODEST = 4 * 1024 * 1024
_LONGEST_PAUSE = 0.5  # seconds that a lower level waits at once for CRITICAL: nobody is held up for ever
_SILENCE = 1.0  # seconds without a byte after which CRITICAL holds nobody up: it would not come sooner
_STARVING = 5.0  # seconds in the queue, after which a fragment is given one in so many pieces, whatever its level is
_STARVING_SHARE = 16
_READ_SECONDS = 0.02  # of ``max_bandwidth``, that all connections may read beyond it
_SMALLEST_READ = 2048
_NEARLY = 0.8  # of ``max_bandwidth``: what gives as much is not what is slow
_SETTLED = object()  # the state of a fragment that is done with: whatever comes too late for it is ignored


@dataclass(slots=True, eq=False)
class Plan:
    """What is left to hand out of a fragment that has been begun, up to where, and whether the queue holds it.

    ``whole``: its ranges are handed out as they are; else in pieces, which are cut when they are taken.
    ``place`` is the one that it had in the queue, and will have again: what was begun is ended before its equals begin.
    """

    pending: tuple[RangeRequest, ...]
    stop: int
    whole: bool = False
    queued: bool = True
    place: int | None = None


@dataclass(slots=True, eq=False)
class Part:
    """The bytes of one fragment that a piece brings, as a range of the object.

    ``plan`` is the one that it was taken from; a fragment that was begun anew since then has another.
    """

    fragment: PrioritizedFragment
    byte_range: RangeRequest
    plan: Plan

    @property
    def is_stale(self) -> bool:
        """Whether the fragment was begun anew, or is done with, since the piece was handed out."""
        return self.fragment.state is not self.plan


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One range to ask for: part of a long fragment, a whole one, or several short neighbours joined."""

    parts: tuple[Part, ...]
    byte_range: RangeRequest

    @property
    def fragment(self) -> PrioritizedFragment:
        return self.parts[0].fragment

    @property
    def request(self) -> LoadRequest:
        return self.fragment.request

    @property
    def fragment_id(self) -> str:
        return self.request.fragment_id

    @property
    def priority(self) -> Priority:
        return self.fragment.priority


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot. ``queued``, ``completed``, ``failed`` count fragments, ``active`` and ``limit`` connections;
    rates in bytes/s."""

    queued: int
    active: int
    limit: int
    completed: int
    failed: int
    bandwidth: float
    total_bytes: int


class Scheduler:
    """Hands out pieces, most urgent first, as many at a time as the path needs.

    Thread-safe. The first piece of a fragment goes alone until an answer has told which version the object has,
    unless the request pins one or knows its digest: pieces of two versions never meet. ``dropped`` is told of the
    fragments that ``clear`` forgets; ``moves`` moves those that go by names of which nothing is known here, and tells
    whether there is one. Each endpoint of a NetworkConfig has a lane of its own, which a fragment is in by
    the number of its ``lane``. Its one lock, which three Conditions share, guards everything but the queues, which have
    one each.
    """

    def __init__(
        self,
        config: SchedulerConfig | NetworkConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if config is not None:
            must_be("config", config, SchedulerConfig, NetworkConfig)
        ends = config.endpoints if isinstance(config, NetworkConfig) else ()
        own = config.scheduler if isinstance(config, NetworkConfig) else config or SchedulerConfig()
        hosts: list[tuple[int, str | None]] = [(end.max_connections, host_of(end.url)) for end in ends]
        hosts = hosts or [(own.max_concurrent, None)]
        self.config = replace(own, max_concurrent=min(own.max_concurrent, sum([ceiling for ceiling, _ in hosts])))
        self._clock = clock
        self.dropped: Callable[[Sequence[PrioritizedFragment]], object] = lambda fragments: None
        self.moves: Callable[[str, Priority], bool] = lambda fragment_id, level: False
        self._lock = lock = Latch()  # not one of its Conditions: an interrupt may leave those locked
        self._changed = lock.condition()  # for whoever waits for a piece
        self._room = lock.condition()  # for whoever waits for the queue to grow shorter
        # Bytes of a piece that goes alone, or brings others along, or is of a path that is hardly known: where the rate
        # does not tell what is long.
        self._modest = min(self.config.chunk_size, _MODEST)
        self._short = self._modest // 4
        arrivals, is_adaptive = itertools.count(), self.config.monitor_bandwidth
        self.lanes = [
            Lane(
                PriorityQueue(clock=clock, arrivals=arrivals),
                min(ceiling, self.config.max_concurrent),
                is_adaptive=is_adaptive,
                now=clock(),
                host=host,
                is_paced=self.config.max_bandwidth is not None,
            )
            for ceiling, host in hosts
        ]
        self._latest = self.lanes[0]  # of which a piece was begun
        self._shorts = Neighbours()
        self._parked: set[PrioritizedFragment] = set()
        self._withdrawn: set[PrioritizedFragment] = set()
        self._budget = RateBudget(self.config.max_bandwidth)
        self._ration = Ration(self.config.max_requests_per_second)
        self._pieces = 0  # since one went to who had waited for longest
        self._looked_at = clock()  # when it was looked for
        self.rises = 0  # how often more connections could be used than before, as bytes have told
        self._total_bytes = 0
        self._completed = 0
        self._failed = 0
        self._closed = False
        self._sleeping = 0  # threads that wait for a piece
        self._calm = lock.condition()  # for whoever gives way to CRITICAL
        self._in_flight: dict[Piece, Lane] = {}
        self._urgent = 0  # pieces of level CRITICAL in flight
        self._urgent_at = clock()  # when the last byte of theirs came
        self._is_urgent_queued = False
        self._has_been_urgent = False

    # -- in

    def enqueue(
        self, request: LoadRequest, *, alone: bool = False, timeout: float | None = None
    ) -> PrioritizedFragment:
        """Queue a fragment. A full queue makes the caller wait, up to ``timeout`` seconds; then Timeout is raised.

        ``alone``: never join it with neighbours (its request carries conditions of its own).
        """
        fragment = PrioritizedFragment(request, queued_at=self._clock())
        self.push(fragment, alone=alone, timeout=timeout)
        return fragment

    def push(
        self,
        fragment: PrioritizedFragment,
        *,
        alone: bool = False,
        whole: bool = False,
        timeout: float | None = None,
    ) -> None:
        """``enqueue``, for a fragment that exists already. ``whole``: hand it out in one piece, however long it is."""
        with self._lock:
            if not attentively(
                lambda seconds: self._room.wait_for(lambda: fragment.state is _SETTLED or self._has_room(), seconds),
                timeout,
            ):
                raise Timeout(
                    f"the queue holds {self.config.queue_limit} fragments: wait for results before adding more"
                )
            if not self._closed and fragment.state is not _SETTLED:
                self._put(fragment, alone=alone, whole=whole)
                self._changed.notify()

    def push_all(
        self, entries: Sequence[tuple[PrioritizedFragment, bool, bool]]
    ) -> Sequence[tuple[PrioritizedFragment, bool, bool]]:
        """``push`` for fragments, each with its ``alone`` and ``whole``, without a wait; gives those for which there
        is no room."""
        with self._lock:
            room = self.room
            left: Sequence[tuple[PrioritizedFragment, bool, bool]] = ()
            queued: dict[int, list[PrioritizedFragment]] = {}
            for index, (fragment, alone, whole) in enumerate(entries):
                if fragment.state is _SETTLED or self._closed:
                    continue
                if room <= 0:
                    left = entries[index:]
                    break
                room -= fragment.weight
                self._prepare(fragment, alone=alone, whole=whole)
                queued.setdefault(fragment.lane, []).append(fragment)
            for lane, fragments in queued.items():
                self.lanes[lane].queue.push_all(fragments)
            self._changed.notify(len(entries) - len(left))
            return left

    def enqueue_many(self, requests: Iterable[LoadRequest]) -> list[PrioritizedFragment]:
        """Queue fragments, in order."""
        return [self.enqueue(request) for request in requests]

    def extend(
        self, fragment: PrioritizedFragment, ranges: Iterable[RangeRequest], *, whole: bool | None = None
    ) -> None:
        """Queue further ranges of a fragment that was begun. ``whole``: hand them out as they are, or in pieces; None:
        as it was."""
        with self._lock:
            if self._closed or fragment.state is _SETTLED:
                return
            plan = self._plan(fragment)
            plan.whole = plan.whole if whole is None else whole
            further = tuple(ranges)
            plan.pending += further
            plan.stop = max([plan.stop, *[byte_range.stop for byte_range in further]])
            self._parked.discard(fragment)
            self._withdrawn.discard(fragment)
            if not plan.queued:
                plan.queued = True
                self._queue_of(fragment).push(fragment, place=plan.place)
            self._changed.notify_all()

    def withdraw(self, fragment: PrioritizedFragment) -> None:
        """Hand out nothing of a fragment until :meth:`restart`; what was handed out is stale."""
        with self._lock:
            if self._closed or fragment.state is _SETTLED:
                return
            self._drop(fragment)
            fragment.state = Plan((), 0, queued=False)
            self._parked.add(fragment)
            self._withdrawn.add(fragment)
            self._room.notify_all()
            self._changed.notify_all()  # nothing may be queued now; or what its lane might have had is left to others

    def restart(
        self,
        fragment: PrioritizedFragment,
        *,
        alone: bool = True,
        whole: bool = False,
        rest: Iterable[RangeRequest] = (),
        stop: int = 0,
    ) -> None:
        """Queue a fragment that was begun as if it had not been, at once, however full the queue is; or only the
        ``rest`` of it, if it ends at ``stop``. Not ``alone``: it may be joined with neighbours."""
        with self._lock:
            if self._closed or fragment.state is _SETTLED:
                return
            self._drop(fragment)
            left = tuple(rest)
            fragment.state = Plan(left, stop) if left else None
            self._put(fragment, alone=alone, whole=whole)
            self._changed.notify()

    # -- out

    def next(self, timeout: float | None = None) -> Piece | None:
        """The most urgent piece, once there is a connection to spare and the rate budget allows; None if nothing is
        queued (or the wait was longer than ``timeout`` seconds). ``release`` gives the connection back.
        """
        end = None if timeout is None else self._clock() + timeout
        with self._lock:
            while True:
                if self._closed or not self.queue_len:
                    return None
                now = self._clock()
                lane, wait = self._next_lane(now)
                if lane is not None:
                    wait = self._wait_for_rates(lane, now)
                    if wait <= 0:
                        piece = self._take(lane, now)
                        self._pass_on(now)
                        return piece
                if end is not None:
                    wait = end - now if wait is None else min(wait, end - now)
                    if wait <= 0:
                        return None
                self._sleeping += 1
                try:
                    self._changed.wait(wait)
                finally:
                    self._sleeping -= 1

    def next_all(self, suits: Callable[[PrioritizedFragment], bool], most: int) -> tuple[list[Piece], float | None]:
        """The most urgent pieces that may be begun now, ``most`` at most, as long as what is most urgent ``suits``; and
        the seconds until there may be more, None for until something changes. A piece may bring others along, and stand
        for one that does not suit: it is the last then."""
        taken: list[Piece] = []
        with self._lock:
            now = self._clock()
            wait = self._take_all(suits, most, taken, now)
            if not self.queue_len:
                self._changed.notify_all()  # nobody needs to wait for a turn any more
            else:
                self._pass_on(now)
        return taken, wait

    def _take_all(
        self, suits: Callable[[PrioritizedFragment], bool], most: int, taken: list[Piece], now: float
    ) -> float | None:
        while len(taken) < most and not self._closed:
            lane, wait = self._next_lane(now)
            first = None if lane is None else lane.queue.peek()
            if lane is None or first is None or not suits(first):
                return wait
            if (wait := self._wait_for_rates(lane, now)) > 0:
                return wait
            piece = self._take(lane, now)
            taken.append(piece)
            if len(piece.parts) > 1 or piece.fragment is not first:
                return 0.0
        return None

    def first(self) -> PrioritizedFragment | None:
        """The most urgent fragment that is queued for the first host."""
        return self.lanes[0].queue.peek()

    def came(self, pieces: Iterable[Piece]) -> None:
        """``record`` all bytes of pieces, and ``release`` them, whoever has come with them taking more at once."""
        with self._lock:
            now = self._clock()
            for piece in pieces:
                size = piece.byte_range.length
                self._total_bytes += size
                self._budget.spend(size, now)
                lane = self._in_flight[piece]
                if lane.record(size, piece, now):
                    self.rises += 1
                    self._changed.notify_all()
                self._end(piece, now)

    def release(self, piece: Piece) -> None:
        """Give back the connection of a piece, if it has one still."""
        with self._lock:
            if piece in self._in_flight:
                self._end(piece, self._clock())
                self._changed.notify()

    def assign(self, piece: Piece, lane: int) -> bool:
        """A piece is to be asked of this host. True if it may be; else it is over, and what it was to bring is queued
        there: that host has no connection to spare."""
        with self._lock:
            at, now = self.lanes[lane], self._clock()
            if self._in_flight[piece] is at:
                return True
            if at.delay(now) is not None and may_begin(at, self.lanes, self.config.max_concurrent):
                self._in_flight[piece].end(piece, now)
                self._begin(piece, at, now)
                self._count_urgent()
                self._changed.notify_all()  # there is room where it was
                return True
            self._end(piece, now)
            for part in piece.parts:
                if not part.is_stale:
                    self._move_to(lane, part.fragment)
                    if len(piece.parts) > 1:
                        self.restart(part.fragment, alone=False)
                    else:
                        self.extend(part.fragment, [part.byte_range])
            self._changed.notify_all()
            return False

    def refused(self, lane: int = 0) -> None:
        """A host wanted fewer connections (429, 503, a timeout)."""
        with self._lock:
            if self.lanes[lane].refuse(self._clock()):
                self.rises += 1
                self._changed.notify_all()

    def settle(self, fragment: PrioritizedFragment, *, success: bool) -> None:
        """The fragment is done with: count it, and drop what is left of it."""
        self.settle_all([(fragment, success)])

    def settle_all(self, ended: Iterable[tuple[PrioritizedFragment, bool]]) -> None:
        """``settle`` for fragments, each with its ``success``."""
        with self._lock:
            was_queued = False
            for fragment, success in ended:
                was_queued |= self._drop(fragment)
                fragment.state = _SETTLED
                if success:
                    self._completed += fragment.weight
                else:
                    self._failed += fragment.weight
            if was_queued:
                self._changed.notify_all()
            self._room.notify_all()

    def replace(self, fragment: PrioritizedFragment, others: Sequence[PrioritizedFragment], *, alone: bool) -> None:
        """Queue these in place of the one that stood for them, however full the queue is; what was handed out of it is
        stale. ``alone``: none of them is joined with neighbours."""
        with self._lock:
            self._drop(fragment)
            fragment.state = _SETTLED
            if not self._closed:
                for other in others:
                    self._put(other, alone=alone, whole=False)
            self._room.notify_all()
            self._changed.notify_all()

    def count_out(self, fragment: PrioritizedFragment) -> None:
        """One of those that a fragment stands for is not wanted any more; its bytes are on their way."""
        with self._lock:
            if not fragment.is_queued and fragment.weight > 1:
                fragment.weight -= 1
                self._failed += 1

    def record(self, size: int, piece: Piece | None = None, *, lane: int = 0, spent: float = 0.0) -> float:
        """Bytes have arrived, of a piece or else from a host; gives the seconds to pause before the next read, so that
        ``max_bandwidth`` holds. ``spent``: seconds that files have taken of the piece's time, since the last."""
        with self._lock:
            now = self._clock()
            if self._urgent and piece is not None and _is_urgent(piece):
                self._urgent_at = now
            at = None if piece is None else self._in_flight.get(piece)
            self._total_bytes += size
            self._budget.spend(size, now)
            if (at or self.lanes[lane]).record(size, None if at is None else piece, now, spent):
                self.rises += 1
                self._changed.notify_all()
            return self._budget.delay(now)

    def charge(self, sender: Sender) -> float:
        """To be asked before each request, so that ``max_requests_per_second`` holds. 0: it may be sent, and counts.
        Else the seconds after which to ask again, or to tell that it will not be sent (``forgo``)."""
        if self.config.max_requests_per_second is None:
            return 0.0
        with self._lock:
            return self._ration.send(sender, self._clock())

    def forgo(self, sender: Sender) -> None:
        """A request that had to wait is not sent."""
        with self._lock:
            self._ration.leave(sender)
            self._changed.notify_all()

    def stride(self) -> int:
        """Bytes of one read at most: what is read at once cannot be held to a rate."""
        rate = self.config.max_bandwidth
        if rate is None:
            return sys.maxsize
        return max(_SMALLEST_READ, int(rate * _READ_SECONDS / max(1, self.active)))

    def gives_way(self, piece: Piece) -> bool:
        """Whether ``give_way`` might have to wait."""
        return self._urgent > 0 and not _is_urgent(piece)

    def give_way(self, piece: Piece) -> None:
        """Wait, before a piece is asked for and before each read, while one of level CRITICAL comes in: half a second
        at most."""
        if not self.gives_way(piece):
            return
        with self._lock:
            now = self._clock()
            end = now + _LONGEST_PAUSE
            while now < end and self._must_give_way(now) and not _is_urgent(piece):
                self._disturb()
                self._calm.wait(end - now)
                now = self._clock()

    def window(self, piece: Piece) -> int | None:
        """Bytes of a piece that may be on the way and unread; None for any number.

        Whoever pauses stops reading, but the kernel goes on receiving until its buffer is full. So work of low priority
        has little room there, and once anything was CRITICAL, all has that would have to give way. Where there is a
        rate to be kept, everything has as much as that rate fills.
        """
        most = self.config.max_bandwidth
        if most is None and (_is_urgent(piece) or (piece.priority < Priority.LOW and not self._has_been_urgent)):
            return None
        lane = self._in_flight.get(piece, self._latest)
        rate, round_trip = lane.monitor.current_bandwidth, lane.monitor.round_trip
        if most is not None:
            rate, round_trip = most, round_trip or _ROUND_TRIP
        return window_worth_filling(round_trip, rate, connections=lane.active)

    # -- what is going on

    @property
    def queue_len(self) -> int:
        """Fragments of which something is still to be handed out."""
        return sum([lane.queue.weight for lane in self.lanes])

    @property
    def room(self) -> int:
        """Fragments that may be added without a wait."""
        return self.config.queue_limit - self.queue_len

    @property
    def longest_joined(self) -> tuple[int, int]:
        """Bytes of a short fragment, and of several that are asked for together, at the most."""
        return self._short, self._modest

    @property
    def is_half_full(self) -> bool:
        """Whether whoever adds more may soon have to wait."""
        return 2 * self.queue_len >= self.config.queue_limit

    @property
    def active(self) -> int:
        """Pieces being fetched."""
        return sum([lane.active for lane in self.lanes])

    @property
    def limit(self) -> int:
        """Connections that may be used at once, now, at the hosts that are used, or were last."""
        used = [lane.limit for lane in self.lanes if lane.active or len(lane.queue)]
        return min(self.config.max_concurrent, sum(used) or self._latest.limit)

    @property
    def crew(self) -> int:
        """Workers that there may be: as many as the hosts want, or still have, and one for each urgent piece that lower
        ones give way to."""
        urgent = self._urgent + self._is_urgent_queued
        extra = max(0, min(self.active - self._urgent, urgent)) if urgent else 0
        crews = [min(lane.most, max(lane.wanted, lane.active - lane.urgent) + extra) for lane in self.lanes]
        return min(self.config.max_concurrent, sum(crews))

    @property
    def completed(self) -> int:
        """Fragments that arrived."""
        return self._completed

    @property
    def failed(self) -> int:
        """Fragments that did not."""
        return self._failed

    @property
    def bandwidth(self) -> float:
        """Bytes/s, lately, from the hosts that are used, or were last."""
        used = [lane for lane in self.lanes if lane.active] or [self._latest]
        return sum(lane.monitor.current_bandwidth for lane in used)

    @property
    def monitor(self) -> BandwidthMonitor:
        """What was measured of the host that was begun with last."""
        return self._latest.monitor

    @property
    def is_rationed(self) -> bool:
        """Whether anything waits for ``max_bandwidth`` or ``max_requests_per_second``."""
        with self._lock:
            now = self._clock()
            is_short = self._budget.delay(now) > 0 or self._ration.delay(Priority.IDLE, now) > 0
            return is_short and (self.queue_len > 0 or self._ration.has_line)

    def should_throttle(self) -> bool:
        """Whether whoever makes requests ought to hold back, as more of them would only wait: what is queued waits for
        a rate limit, the queue is half full, or the network is in use and gives less than ``min_bandwidth``, or than
        nearly all of ``max_bandwidth`` where that is the lower one.

        It says nothing for good: ask again before the next.
        """
        is_used = self.config.monitor_bandwidth and self.active > 0
        wanted = min(self.config.min_bandwidth, _NEARLY * (self.config.max_bandwidth or math.inf))
        is_slow = is_used and 0 < self.bandwidth < wanted
        return is_slow or self.is_half_full or self.is_rationed

    def stats(self) -> SchedulerStats:
        """A snapshot of everything that is counted here."""
        with self._lock:
            return SchedulerStats(
                queued=self.queue_len,
                active=self.active,
                limit=self.limit,
                completed=self._completed,
                failed=self._failed,
                bandwidth=self.bandwidth,
                total_bytes=self._total_bytes,
            )

    # -- changes of mind

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move all fragments of this id that are not done to another level; False if there is none."""
        level = level_of(priority)
        moved = self.moves(fragment_id, level)
        with self._lock:
            for lane in self.lanes:
                moved |= lane.queue.update_priority(fragment_id, level)
            self._is_urgent_queued |= moved and level == Priority.CRITICAL
            for fragment in self._parked:
                if fragment.fragment_id == fragment_id and fragment.weight == 1:
                    fragment.priority = level
                    moved = True
            self._count_urgent()
            self._changed.notify_all()
            return moved

    def move(self, fragment: PrioritizedFragment, priority: Priority) -> None:
        """Move exactly this fragment to another level, wherever it is."""
        level = level_of(priority)
        with self._lock:
            if fragment.priority != level:
                place = fragment.place
                is_queued = self._queue_of(fragment).discard(fragment)
                fragment.priority = level
                if is_queued:
                    self._queue_of(fragment).push(fragment, place=place)
                    self._is_urgent_queued |= level == Priority.CRITICAL
                self._count_urgent()
                self._changed.notify_all()

    def clear(self) -> None:
        """Forget everything that is queued or was withdrawn; what is being fetched goes on."""
        self.dropped(self._forget_queued())

    def close(self) -> None:
        """Hand out nothing more; whoever waits for a piece gets None."""
        with self._lock:
            if not self._closed:
                for lane in self.lanes:
                    lane.keep(self._clock())
            self._closed = True
            self._forget_queued()
            self._calm.notify_all()

    # -- inside: all of it with the Condition held

    def _queue_of(self, fragment: PrioritizedFragment) -> PriorityQueue:
        return self.lanes[fragment.lane].queue

    def _next_lane(self, now: float) -> tuple[Lane | None, float | None]:
        """That of the most urgent fragment that may be begun; else the seconds until one may, or None for until
        something changes."""
        best: tuple[float, int] | None = None
        chosen, wait = None, None
        for lane in self.lanes:
            first = lane.queue.peek()
            delay = None if first is None else lane.delay(now)
            if first is None or delay is None or not may_begin(lane, self.lanes, self.config.max_concurrent):
                continue
            order = first.effective_priority, first.place
            if delay > 0:
                wait = delay if wait is None else min(wait, delay)
            elif best is None or order < best:
                best, chosen = order, lane
        return chosen, wait

    def _wait_for_rates(self, lane: Lane, now: float) -> float:
        """Seconds until the rate limits allow the next piece of a lane."""
        if self.config.max_bandwidth is None and self.config.max_requests_per_second is None:
            return 0.0
        first = lane.queue.peek()
        level = Priority.IDLE if first is None else first.priority
        return max(self._budget.delay(now), self._ration.delay(level, now))

    def _pass_on(self, now: float) -> None:
        """A piece was taken. If another may be, one more thread is woken: a fragment may have several,
        and a lane without more work leaves its room to others."""
        if self._sleeping and self._next_lane(now) != (None, None):
            self._changed.notify()

    def _must_give_way(self, now: float) -> bool:
        return not self._closed and self._urgent > 0 and now < self._urgent_at + _SILENCE

    def _count_urgent(self) -> None:
        for lane in self.lanes:
            lane.urgent = 0
        for piece, lane in self._in_flight.items():
            lane.urgent += _is_urgent(piece)
        self._urgent = sum([lane.urgent for lane in self.lanes])
        if not self._urgent:
            self._calm.notify_all()

    def _disturb(self) -> None:
        for lane in self.lanes:
            lane.disturb()

    def _has_room(self) -> bool:
        return self._closed or self.queue_len < self.config.queue_limit

    def _put(self, fragment: PrioritizedFragment, *, alone: bool, whole: bool) -> None:
        self._prepare(fragment, alone=alone, whole=whole)
        self._queue_of(fragment).push(fragment)

    def _prepare(self, fragment: PrioritizedFragment, *, alone: bool, whole: bool) -> None:
        """Have ready what has to be known of a fragment that is about to be queued."""
        wanted = fragment.request.byte_range
        if whole:
            opening = _opening(fragment.request, self._modest)
            fragment.state = Plan((opening,), opening.stop, whole=True)
        elif not alone and wanted is not None and wanted.length <= self._short and not fragment.request.allow_short:
            self._shorts.add(fragment, wanted)
        self._is_urgent_queued |= fragment.priority == Priority.CRITICAL

    def _plan(self, fragment: PrioritizedFragment) -> Plan:
        """The plan of a fragment; if it has none yet, all of its ranges where that is safe, else the first."""
        if fragment.state is None:
            wanted = _opening(fragment.request, self._modest)
            is_safe = _is_safe(fragment.request)
            if not is_safe:
                wanted = RangeRequest(wanted.start, min(wanted.stop, wanted.start + self._modest))
            fragment.state = Plan((wanted,), wanted.stop, whole=not is_safe)
        assert isinstance(fragment.state, Plan)
        return fragment.state

    def _next_fragment(self, lane: Lane, now: float) -> PrioritizedFragment:
        """The most urgent; but nobody waits for ever, unless for CRITICAL."""
        fragment = lane.queue.peek()
        assert fragment is not None
        self._pieces += 1
        is_turn = self._pieces >= _STARVING_SHARE and now >= self._looked_at + _STARVING / _STARVING_SHARE
        if not is_turn or fragment.priority == Priority.CRITICAL:
            return fragment
        self._pieces, self._looked_at = 0, now
        eldest = lane.queue.eldest()
        return fragment if eldest is None or now < eldest.queued_at + _STARVING else eldest

    def _begin(self, piece: Piece, lane: Lane, now: float) -> None:
        self._latest = lane
        self._in_flight[piece] = lane
        lane.begin(piece, now)
        lane.urgent += _is_urgent(piece)

    def _end(self, piece: Piece, now: float) -> None:
        lane = self._in_flight.pop(piece)
        self._ration.end(piece, now)
        has_risen = lane.end(piece, now)
        if self._urgent:
            self._count_urgent()
        if has_risen or len(self.lanes) > 1:  # or there is more room for others
            self._changed.notify_all()

    def send_to(self, lane: int, fragment: PrioritizedFragment) -> None:
        """Have a fragment wait for another host."""
        if fragment.lane != lane:
            with self._lock:
                self._move_to(lane, fragment)
                self._changed.notify_all()

    def _move_to(self, lane: int, fragment: PrioritizedFragment) -> None:
        place = fragment.place
        is_queued = self._queue_of(fragment).discard(fragment)
        self._shorts.discard(fragment)
        fragment.lane = lane
        if is_queued:
            self._queue_of(fragment).push(fragment, place=place)

    def _take(self, lane: Lane, now: float) -> Piece:
        fragment = self._next_fragment(lane, now)
        if fragment in self._shorts:
            parts = self._take_shorts(self._with_neighbours(fragment))
        else:
            parts = [self._part(fragment, self._take_range(fragment))]
        piece = Piece(tuple(parts), RangeRequest(parts[0].byte_range.start, parts[-1].byte_range.stop))
        self._ration.hand_out(piece, now)
        self._begin(piece, lane, now)
        if fragment.priority == Priority.CRITICAL:
            self._urgent += 1
            self._urgent_at = now
            self._has_been_urgent = True
            following = [lane.queue.peek() for lane in self.lanes]
            self._is_urgent_queued = any(one is not None and one.priority == Priority.CRITICAL for one in following)
            if self.active > self._urgent:
                self._disturb()
        return piece

    def _part(self, fragment: PrioritizedFragment, wanted: RangeRequest) -> Part:
        return Part(fragment, wanted, self._plan(fragment))

    def _take_range(self, fragment: PrioritizedFragment) -> RangeRequest:
        plan = self._plan(fragment)
        wanted, *rest = plan.pending
        if not plan.whole and wanted.length and fragment not in self._shorts:  # shorts are joined as they are
            lane = self.lanes[fragment.lane]
            size = self._piece_size(lane)
            if len(lane.queue) == 1:
                size = min(size, share_of_rest(wanted.length, lane.limit))
            request = fragment.request
            first = cut(wanted, size, start=request.byte_range.start if request.byte_range is not None else 0)
            if first.stop < wanted.stop:
                rest.insert(0, RangeRequest(first.stop, wanted.stop))
                wanted = first
        plan.pending = tuple(rest)
        if not rest:
            plan.place = fragment.place
            self._queue_of(fragment).discard(fragment)
            plan.queued = False
            self._parked.add(fragment)
            self._room.notify_all()
        self._shorts.discard(fragment)
        return wanted

    def _piece_size(self, lane: Lane) -> int:
        """Bytes of the next piece."""
        if not self.config.monitor_bandwidth:
            return self.config.chunk_size
        most = self._modest if lane.is_new else self.config.chunk_size
        return piece_worth_asking(lane.round_trip, lane.each, most=most, connections=max(1, lane.active))

    def _with_neighbours(self, fragment: PrioritizedFragment) -> list[PrioritizedFragment]:
        """A short fragment, and those of the same object and level that are cheaper to bring along than to ask for
        later, in order."""
        lane, wanted = self.lanes[fragment.lane], fragment.request.byte_range
        assert wanted is not None
        gap = min(_LARGEST_GAP, gap_worth_reading(lane.round_trip or _ROUND_TRIP, lane.each))
        found = self._shorts.joined(fragment, wanted, gap=gap, length=self._modest)
        if found:
            bisect.insort(found, fragment, key=_start)
        return found or [fragment]

    def _take_shorts(self, fragments: list[PrioritizedFragment]) -> list[Part]:
        """Hand out neighbours as they are: what is done for each fragment alone is done for all of them at once."""
        begun = [self._part(each, self._take_range(each)) for each in fragments if each.state is not None]
        whole = [each for each in fragments if each.state is None] if begun else fragments
        parts = []
        for fragment in whole:
            wanted = fragment.request.byte_range
            assert wanted is not None
            plan = Plan((), wanted.stop, not _is_safe(fragment.request), False, fragment.place)
            fragment.state = plan
            parts.append(Part(fragment, wanted, plan))
        if whole:
            self._queue_of(whole[0]).discard_all(whole)
            self._parked.update(whole)
            self._room.notify_all()
            self._shorts.discard_all(whole)
        if begun:
            parts = sorted(begun + parts, key=lambda part: part.byte_range.start)
        return parts

    def _forget_queued(self) -> list[PrioritizedFragment]:
        with self._lock:
            found = [fragment for lane in self.lanes for fragment in lane.queue.clear()]
            found += self._withdrawn
            self._parked -= self._withdrawn
            self._withdrawn.clear()
            for fragment in found:
                fragment.state = _SETTLED
            self._shorts.clear()
            self._changed.notify_all()
            self._room.notify_all()
            return found

    def _drop(self, fragment: PrioritizedFragment) -> bool:
        """Forget a fragment; whether something of it was still to be handed out."""
        self._parked.discard(fragment)
        if self._withdrawn:
            self._withdrawn.discard(fragment)
        was_queued = fragment.is_queued and self._queue_of(fragment).discard(fragment)
        if was_queued:
            self._shorts.discard(fragment)
        return was_queued


def _start(fragment: PrioritizedFragment) -> int:
    wanted = fragment.request.byte_range
    return 0 if wanted is None else wanted.start


def _is_urgent(piece: Piece) -> bool:
    return piece.priority == Priority.CRITICAL


def _opening(request: LoadRequest, chunk_size: int) -> RangeRequest:
    """What to ask for first. Of an object that may be empty, a byte: nothing at all cannot be asked for."""
    if request.byte_range is not None:
        return request.byte_range
    return RangeRequest(0, chunk_size if request.expected_size is None else max(1, request.expected_size))


def _is_safe(request: LoadRequest) -> bool:
    """Whether pieces may be asked for before an answer has told the version: one is pinned, or a digest will tell."""
    is_known = request.byte_range is not None or request.expected_size is not None
    is_pinned = request.validator is not None and request.validator.is_strong
    return is_known and not request.allow_short and (is_pinned or request.checksum is not None)
