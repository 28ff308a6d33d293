"""Runs: plain short neighbours that were asked for together, one after the other, and come as one load.

What is kept of a fragment in a run is its future alone. The run ends for all of them at once; each then makes its
result of what the run has brought, when it is asked for that.
"""

from __future__ import annotations

import _thread
import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from typing import Any, Generic, TypeVar

from ..errors import NetworkError
from ..values import LoadFailure, LoadRequest, LoadResult, LoadSuccess, RangeRequest, Validator
from .loads import FINISHED, PENDING, Gate, Load, Waiter, Whole

__all__ = ["Member", "Rows", "Run", "runs_in"]

T = TypeVar("T")

_FEWEST = 8
"""Fragments from which a run saves more than it costs."""


def runs_in(requests: Sequence[LoadRequest], *, short: int, most: int) -> Iterator[Sequence[LoadRequest]]:
    """The requests in their order, those that make a run together: fragments of at most ``short`` bytes, and ``most``
    in all, with nothing to tell them apart but their names and ranges, each of which begins where the last one ends."""
    first, begin, end = 0, 0, -1
    lead: LoadRequest | None = None
    for index, request in enumerate(requests):
        wanted = request.byte_range
        is_plain = (
            wanted is not None
            and request.checksum is None
            and request.deadline is None
            and not request.allow_short
            and 0 < (length := wanted.stop - wanted.start) <= short
            and (request.expected_size is None or request.expected_size == length)
        )
        if is_plain and lead is not None and wanted is not None:
            goes_on = (
                wanted.start == end
                and wanted.stop - begin <= most
                and request.priority is lead.priority
                and request.validator is lead.validator
                and request.path == lead.path
                and request.importance == lead.importance
            )
            if goes_on:
                end = wanted.stop
                continue
        yield from _divided(requests[first:index])
        first, lead = index, None
        if is_plain and wanted is not None:
            lead, begin, end = request, wanted.start, wanted.stop
    yield from _divided(requests[first:])


def _divided(requests: Sequence[LoadRequest]) -> Iterator[Sequence[LoadRequest]]:
    """A run, or each for itself if they are few."""
    if len(requests) >= _FEWEST:
        yield requests
    else:
        for request in requests:
            yield (request,)


class Run(Load):
    """A load of all that lies in a row, for the ``members``, of which each wants its own ``requests``; others who want
    the same as one of them may join.

    ``outcome`` is what it ended in, ``ended`` when. The lock guards both, and who is ``watched``: the members of whom
    somebody may have to be told, as they have been waited for, or have callbacks.
    """

    def __init__(self, requests: Sequence[LoadRequest], identity: object, now: float) -> None:
        lead, first, last = requests[0], requests[0].byte_range, requests[-1].byte_range
        assert first is not None
        assert last is not None
        span = RangeRequest(first.start, last.stop)
        whole = LoadRequest(
            lead.fragment_id,
            lead.path,
            priority=lead.priority,
            importance=lead.importance,
            byte_range=span,
            validator=lead.validator,
        )
        super().__init__(whole, identity, None, now, whole=False)
        self.span = span
        self.requests = requests
        self.members = [Member(self, index) for index in range(len(requests))]
        self.waiters = list(self.members)
        self.weight = len(requests)
        self.has_others = False
        self.on_cancel: Callable[[Waiter], object] | None = None
        self.outcome: Whole | NetworkError | None = None
        self.ended = now
        self.lock = _thread.RLock()
        self.watched: list[Member] = []

    def find(self, wanted: RangeRequest) -> Member | None:
        """The member of just that range."""
        if self.requests[0].byte_range is None:
            return None
        index = bisect.bisect_left(self.requests, wanted.start, key=_start_of)
        if index < len(self.requests) and self.requests[index].byte_range == wanted:
            return self.members[index]
        return None

    def end(self, outcome: Whole | NetworkError, now: float) -> None:
        """It is over for all who are members still."""
        with self.lock:
            watched = [member for member in self.watched if "load" not in member.__dict__]  # that have not left
            for member in watched:  # these are told one by one, as any other future is
                member.__dict__.setdefault("_state", PENDING)
            self.ended = now
            self.outcome = outcome
            self.watched.clear()
        for member in watched:
            with contextlib.suppress(InvalidStateError):  # it was cancelled
                member.set_result(self.result_of(member.request, outcome))

    def unwatch(self) -> None:
        """Its members leave it: each is told by whom it waits for then."""
        with self.lock:
            self.watched.clear()

    def let_go(self) -> list[Waiter]:
        """It ends: forget who waits; gives those who are no members."""
        others = [one for one in self.waiters if not isinstance(one, Member)] if self.has_others else []
        self.waiters, self.members = [], []
        return others

    def part_of(self, request: LoadRequest, outcome: Whole | NetworkError) -> Whole | NetworkError:
        """What of an outcome is one request's."""
        wanted = request.byte_range
        if not isinstance(outcome, Whole) or wanted is None:
            return outcome
        begin = self.span.start
        return Whole(outcome.data[wanted.start - begin : wanted.stop - begin], outcome.head, outcome.from_cache)

    def result_of(self, request: LoadRequest, outcome: Whole | NetworkError) -> LoadResult:
        name, duration = request.fragment_id, self.ended - self.queued_at
        if not isinstance(outcome, Whole):
            return LoadFailure(name, outcome, duration)
        wanted, begin = request.byte_range or self.span, self.span.start
        data = outcome.data[wanted.start - begin : wanted.stop - begin]
        return LoadSuccess(name, data, duration, outcome.from_cache, outcome.head)


class _OfRun(Generic[T]):
    """What a member has of its run, for as long as it has none of its own: there may be a million of them."""

    def __init__(self, look: Callable[[Member], T]) -> None:
        self._look = look

    def __get__(self, member: Member, _: object = None) -> T:
        return self._look(member)


class _Once(Generic[T]):
    """What a member has from when it is first needed on."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    def __set_name__(self, _: object, name: str) -> None:
        self._name = name

    def __get__(self, member: Member, _: object = None) -> T:
        made: T = member.__dict__.setdefault(self._name, self._make())
        return made


def _gate_of(member: Member) -> Any:
    """The lock of a member, which everyone takes who may have to be told: from now on it is watched."""
    run = member.run
    with run.lock:
        if run.outcome is None and not {"_condition", "load"} & member.__dict__.keys():
            run.watched.append(member)
        return member.__dict__.setdefault("_condition", Gate())


class Member(Waiter):
    """The future of a fragment in a run. All that it says is the run's, until it is told something of its own."""

    run: Run
    index: int
    is_shared = True
    until = None
    load = _OfRun[Any](lambda it: None if it.run.done else it.run)
    request = _OfRun[Any](lambda it: it.run.requests[it.index])
    since = _OfRun[Any](lambda it: it.run.queued_at)
    on_cancel = _OfRun[Any](lambda it: it.run.on_cancel)
    _state = _OfRun[Any](lambda it: PENDING if it.run.outcome is None else FINISHED)
    _result = _OfRun[Any](lambda it: it.run.result_of(it.request, it.run.outcome) if it.run.outcome else None)
    _exception = None
    _condition = _OfRun[Any](_gate_of)
    _waiters = _Once[Any](list)
    _done_callbacks = _Once[Any](list)

    def __init__(self, run: Run, index: int) -> None:
        self.run = run
        self.index = index

    def part_from(self) -> None:
        self.__dict__.setdefault("_state", PENDING)
        self.load = None


class Rows:
    """The runs in flight: those of one object and one version in order of their ranges, none of which overlap.

    Not thread-safe: its owner has a lock.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Validator | None], list[tuple[int, Run]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))  # an interrupt could come between a run and its count

    def __contains__(self, requests: Sequence[LoadRequest]) -> bool:
        """Whether anything of what these requests ask for, which lie in a row, is on its way in a run."""
        lead, first, last = requests[0], requests[0].byte_range, requests[-1].byte_range
        row = self._rows.get((lead.path, lead.validator))
        if row is None or first is None or last is None:
            return False
        index = bisect.bisect_left(row, (last.stop,)) - 1
        return index >= 0 and row[index][1].span.stop > first.start

    def add(self, run: Run) -> None:
        row = self._rows.setdefault((run.request.path, run.request.validator), [])
        bisect.insort(row, (run.span.start, run))

    def discard(self, run: Run) -> None:
        place = run.request.path, run.request.validator
        row = self._rows.get(place, [])
        index = bisect.bisect_left(row, (run.span.start,))
        if index < len(row) and row[index][1] is run:
            del row[index]
            if not row:
                del self._rows[place]

    def find(self, request: LoadRequest) -> Member | None:
        """The future that stands for the same bytes in a run that is on its way."""
        wanted = request.byte_range
        is_plain = request.checksum is None and not request.allow_short and wanted is not None
        if not self._rows or not is_plain or wanted is None or request.expected_size not in (None, wanted.length):
            return None
        row = self._rows.get((request.path, request.validator), [])
        index = bisect.bisect_left(row, (wanted.start + 1,)) - 1
        return row[index][1].find(wanted) if index >= 0 else None


def _start_of(request: LoadRequest) -> int:
    return -1 if request.byte_range is None else request.byte_range.start
