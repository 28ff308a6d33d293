"""Which fragment is most urgent.

A fragment's score is ``level + 0.5 · (1 − importance) − urgency of its deadline``; the lower goes first. Importance is
worth half a level at most, so that it never crosses one. A deadline is worth half a level more each time that the
seconds left fall to one of ``DEADLINE_STEPS``::

    seconds left   > 8   ≤ 8   ≤ 4   ≤ 2   ≤ 1 or past
    urgency          0   0.5     1   1.5     2           levels

The steps halve, because what counts is the time left against the time that a transfer takes, which is not known here.
Two levels at most: a late NORMAL stands among the CRITICAL, a late LOW never does.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from ..errors import ConfigurationError, without_query
from ..values import LoadRequest, Priority, level_of, must_be
from ..waits import Latch

__all__ = ["DEADLINE_STEPS", "PrioritizedFragment", "PriorityQueue"]

DEADLINE_STEPS = (8.0, 4.0, 2.0, 1.0)
"""Seconds left at which a deadline promotes its fragment by half a level."""

_NOT_QUEUED = -1


class PrioritizedFragment:
    """A request, and how urgent it is.

    ``priority`` is the level now in force, ``request.priority`` the one first asked for. ``queued_at`` and
    ``deadline_at`` (None if there is none) are seconds on the queue's clock. ``effective_priority`` is the score as it
    was frozen at the last push, move or promotion. ``lane`` and ``state`` are for whoever runs the queues; subclasses
    may add more. ``weight``: how many fragments it counts as, where it stands for several.
    """

    __slots__ = (
        *("_arrival", "deadline_at", "effective_priority", "lane", "priority", "queued_at", "request", "state"),
        "weight",
    )

    def __init__(self, request: LoadRequest, *, queued_at: float = 0.0) -> None:
        must_be("request", request, LoadRequest)
        self.request = request
        self.priority = request.priority
        self.queued_at = queued_at
        self.deadline_at = None if request.deadline is None else queued_at + request.deadline
        self.effective_priority = self.score_at(queued_at)
        self.lane = 0
        self.state: object = None
        self.weight = 1
        self._arrival = _NOT_QUEUED

    @property
    def fragment_id(self) -> str:
        return self.request.fragment_id

    @property
    def importance(self) -> float:
        return self.request.importance

    @property
    def is_queued(self) -> bool:
        return self._arrival != _NOT_QUEUED

    @property
    def place(self) -> int:
        """Where it stands among those of equal urgency, as long as it is queued."""
        return self._arrival

    def score_at(self, now: float) -> float:
        """The score that it would have if it were pushed ``now``."""
        score = self.priority + 0.5 * (1.0 - self.request.importance)
        if self.deadline_at is not None:
            score -= 0.5 * sum(now >= self.deadline_at - step for step in DEADLINE_STEPS)
        return score

    def next_promotion(self, now: float) -> float | None:
        """When after ``now`` the score will fall next; None if it never will."""
        if self.deadline_at is None:
            return None
        return next((due for step in DEADLINE_STEPS if now < (due := self.deadline_at - step)), None)

    def __repr__(self) -> str:
        name = without_query(self.fragment_id)
        return f"{type(self).__name__}({name!r}, {self.priority.name}, {self.effective_priority:.3f})"


class PriorityQueue:
    """Fragments, most urgent first; equal urgency in order of arrival.

    Thread-safe: one lock guards everything. ``update_priority`` marks the old place stale and pushes anew: O(log n).
    Several fragments may bear one id; what is asked by id concerns all of them. Queues that share ``arrivals`` can be
    compared by ``effective_priority`` and ``place``.
    """

    # A rank holds the arrivals of one score. It names its fragments and does not hold them, so that a stale place keeps
    # no buffers alive. An arrival is stale if no fragment has it, or one that has another score by now; the same
    # arrival twice in a rank does no harm. Scores and arrivals apart are compared several times as fast as pairs of
    # them, and most fragments share their score with others.
    def __init__(self, *, clock: Callable[[], float] = time.monotonic, arrivals: Iterator[int] | None = None) -> None:
        self._clock = clock
        self._lock = Latch()
        self._arrivals = itertools.count() if arrivals is None else arrivals
        self._queued = _Index()
        self._ranks = _Ranks()
        self._promotions: list[tuple[float, int]] = []
        self._more = 0  # fragments beside those that are counted here

    @property
    def weight(self) -> int:
        """How many fragments there are, those that something queued stands for included."""
        return len(self._queued) + self._more

    def push(self, fragment: PrioritizedFragment | LoadRequest, *, place: int | None = None) -> PrioritizedFragment:
        """Queue a fragment, or a request as from now; ``place``: one that it had here before, to have again.

        Raises ConfigurationError if the fragment is queued already.
        """
        must_be("fragment", fragment, LoadRequest, PrioritizedFragment)
        now = self._clock()
        if isinstance(fragment, LoadRequest):
            fragment = PrioritizedFragment(fragment, queued_at=now)
        with self._lock:
            self._push(fragment, now, place)
        return fragment

    def push_all(self, fragments: Iterable[PrioritizedFragment]) -> None:
        """:meth:`push` for each."""
        now = self._clock()
        with self._lock:
            for fragment in fragments:
                self._push(fragment, now, None)

    def pop(self) -> PrioritizedFragment | None:
        """Take out the most urgent; None when the queue is empty."""
        with self._lock:
            fragment = self._most_urgent()
            if fragment is not None:
                self._forget(fragment)
            return fragment

    def peek(self) -> PrioritizedFragment | None:
        """The most urgent, left where it is; None when the queue is empty."""
        with self._lock:
            return self._most_urgent()

    def eldest(self) -> PrioritizedFragment | None:
        """The one that has been here for longest, left where it is; None when the queue is empty. O(n)."""
        with self._lock:
            return next(iter(self._queued), None)

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move all fragments of this id to another level. False if there is none."""
        level = level_of(priority)
        with self._lock:
            found = self._queued.of(fragment_id)
            for fragment in found:
                if fragment.priority != level:
                    fragment.priority = level
                    self._place(fragment, self._clock())
            self._sweep()
            return bool(found)

    def remove(self, fragment_id: str) -> list[PrioritizedFragment]:
        """Take out all fragments of this id, in order of arrival."""
        with self._lock:
            found = self._queued.of(fragment_id)
            for fragment in found:
                self._forget(fragment)
            return found

    def discard(self, fragment: PrioritizedFragment) -> bool:
        """Take out exactly this fragment. False if it was not here."""
        if fragment._arrival == _NOT_QUEUED:
            return False
        with self._lock:
            is_here = self._queued.find(fragment._arrival) is fragment
            if is_here:
                self._forget(fragment)
            return is_here

    def discard_all(self, fragments: Iterable[PrioritizedFragment]) -> None:
        """:meth:`discard` for each."""
        with self._lock:
            for fragment in fragments:
                if self._queued.find(fragment._arrival) is fragment:
                    self._queued.remove(fragment)
                    fragment._arrival = _NOT_QUEUED
                    self._more -= fragment.weight - 1
            self._sweep()

    def clear(self) -> list[PrioritizedFragment]:
        """Take out everything, in no order."""
        with self._lock:
            found = list(self._queued)
            for fragment in found:
                fragment._arrival = _NOT_QUEUED
            self._queued, self._ranks, self._promotions, self._more = _Index(), _Ranks(), [], 0
            return found

    def get_by_priority(self, min_priority: Priority) -> list[PrioritizedFragment]:
        """What is at least as urgent as the least of that level, most urgent first, and stays queued: O(n log n)."""
        least = Priority(min_priority) + 0.5
        with self._lock:
            self._promote()
            found = [((f.effective_priority, f._arrival), f) for f in self._queued if f.effective_priority <= least]
        return [fragment for _, fragment in sorted(found, key=lambda item: item[0])]

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, fragment_id: object) -> bool:
        with self._lock:
            return fragment_id in self._queued

    # What follows, and all of the index and of the ranks, runs under the lock.

    def _push(self, fragment: PrioritizedFragment, now: float, place: int | None) -> None:
        if fragment._arrival != _NOT_QUEUED:
            raise ConfigurationError(f"{fragment!r} is queued already: pop or discard it before it is pushed again")
        fragment._arrival = next(self._arrivals) if place is None else place
        self._more += fragment.weight - 1
        self._queued.add(fragment)
        self._place(fragment, now)
        if fragment.deadline_at is not None:
            self._expect(fragment, now)

    def _most_urgent(self) -> PrioritizedFragment | None:
        self._promote()
        while (first := self._ranks.first()) is not None:
            score, arrival = first
            fragment = self._queued.find(arrival)
            if fragment is not None and fragment.effective_priority == score:
                return fragment
            self._ranks.drop_first()
        return None

    def _promote(self) -> None:
        now = self._clock() if self._promotions else 0.0
        while self._promotions and self._promotions[0][0] <= now:
            _, arrival = heapq.heappop(self._promotions)
            fragment = self._queued.find(arrival)
            if fragment is not None:
                self._place(fragment, now)
                self._expect(fragment, now)

    def _place(self, fragment: PrioritizedFragment, now: float) -> None:
        fragment.effective_priority = score = fragment.score_at(now)
        self._ranks.add(score, fragment._arrival)

    def _expect(self, fragment: PrioritizedFragment, now: float) -> None:
        if fragment.deadline_at is not None and (due := fragment.next_promotion(now)) is not None:
            heapq.heappush(self._promotions, (due, fragment._arrival))

    def _forget(self, fragment: PrioritizedFragment) -> None:
        self._queued.remove(fragment)
        fragment._arrival = _NOT_QUEUED
        self._more -= fragment.weight - 1
        self._sweep()

    def _sweep(self) -> None:
        """Drop the stale places once they outnumber the live ones: O(1) amortised."""
        enough = 2 * len(self._queued) + 16
        if len(self._ranks) > enough:
            self._ranks = _Ranks()
            for fragment in self._queued:
                self._ranks.add(fragment.effective_priority, fragment._arrival)
        if len(self._promotions) > enough:
            self._promotions = [p for p in self._promotions if self._queued.find(p[1]) is not None]
            heapq.heapify(self._promotions)


class _Ranks:
    """Arrivals by score: the lowest score first, and within it the earliest.

    A lone arrival stands for itself, several in a heap: a list for each would cost as much again as all the rest.
    """

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._ranks: dict[float, int | list[int]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, score: float, arrival: int) -> None:
        self._length += 1
        rank = self._ranks.get(score)
        if rank is None:
            self._ranks[score] = arrival
            heapq.heappush(self._scores, score)
        elif isinstance(rank, list):
            heapq.heappush(rank, arrival)
        else:
            self._ranks[score] = [rank, arrival] if rank < arrival else [arrival, rank]

    def first(self) -> tuple[float, int] | None:
        if not self._scores:
            return None
        rank = self._ranks[self._scores[0]]
        return self._scores[0], rank[0] if isinstance(rank, list) else rank

    def drop_first(self) -> None:
        self._length -= 1
        rank = self._ranks[self._scores[0]]
        if isinstance(rank, list):
            heapq.heappop(rank)
        if not isinstance(rank, list) or not rank:
            del self._ranks[heapq.heappop(self._scores)]


class _Index:
    """Fragments by arrival, and by id: a lone one stands for itself there, several in a dict."""

    def __init__(self) -> None:
        self._by_arrival: dict[int, PrioritizedFragment] = {}
        self._by_id: dict[str, PrioritizedFragment | dict[int, PrioritizedFragment]] = {}

    def __len__(self) -> int:
        return len(self._by_arrival)

    def add(self, fragment: PrioritizedFragment) -> None:
        self._by_arrival[fragment._arrival] = fragment
        there = self._by_id.setdefault(fragment.request.fragment_id, fragment)
        if isinstance(there, dict):
            there[fragment._arrival] = fragment
        elif there is not fragment:
            self._by_id[fragment.fragment_id] = {there._arrival: there, fragment._arrival: fragment}

    def remove(self, fragment: PrioritizedFragment) -> None:
        del self._by_arrival[fragment._arrival]
        name = fragment.request.fragment_id
        there = self._by_id[name]
        if isinstance(there, dict):
            del there[fragment._arrival]
        if there is fragment or not there:
            del self._by_id[name]

    def find(self, arrival: int) -> PrioritizedFragment | None:
        return self._by_arrival.get(arrival)

    def of(self, fragment_id: str) -> list[PrioritizedFragment]:
        there = self._by_id.get(fragment_id)
        if isinstance(there, dict):
            return list(there.values())
        return [] if there is None else [there]

    def __contains__(self, fragment_id: object) -> bool:
        return fragment_id in self._by_id

    def __iter__(self) -> Iterator[PrioritizedFragment]:
        return iter(self._by_arrival.values())
