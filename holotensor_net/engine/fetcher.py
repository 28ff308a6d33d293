"""Fetcher: the threads. Takes pieces from the scheduler, has the courier bring and the assembly place their bytes, and
resolves the futures that wait for them.

Equal requests in flight share one load (single flight). A load that fails at one endpoint goes on at the next; what
it has is kept only if a digest or the same strong validator proves that it belongs together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ..config import NetworkConfig
from ..errors import Cancelled, DeadlineExceeded, NetworkError
from ..transport.client import Answer
from ..values import HeadInfo, LoadFailure, LoadRequest, LoadResult, LoadSuccess, Priority
from ..waits import Latch
from .alarms import Alarms
from .assembly import Assembly
from .books import Books, identity_of
from .confirmations import Confirmations, Told
from .courier import Courier
from .loads import Attempt, Call, Load, Share, Waiter, Whole, calling_later
from .priority import PrioritizedFragment
from .races import Trip
from .recovery import Again, Recovery, is_overtaxed, summary
from .request_cache import Found, Proven, RequestCache, Resumed
from .rounds import TOLD_TOGETHER, Hands, Rounds
from .runs import Member, Run
from .scheduler import Piece, Scheduler
from .turns import Move, Turns

__all__ = ["Fetcher", "FetcherStats"]

_log = logging.getLogger("holotensor_net.engine")

_WORTH_RELIEF = 1 << 20
"""Bytes of a fragment from which publishing it takes longer than starting another worker."""


@dataclass(frozen=True, slots=True)
class FetcherStats:
    """A snapshot. ``requests`` that were sent for what came, as an ``Answer`` counts them; ``retries`` after a failure,
    ``hedges`` beside one that was slow, ``workers`` at work; ``confirmed_bytes`` were in the cache, or
    left there by a transfer that was cut off, and did not have to come again."""

    requests: int
    retries: int
    hedges: int
    workers: int
    confirmed_bytes: int


class Fetcher:
    """Runs loads on a pool of threads whose size follows the scheduler's limit.

    Thread-safe; its one lock, which the courier and the assembly share, guards the loads, their attempts and the
    routes. ``close`` leaves no thread.
    """

    def __init__(
        self,
        config: NetworkConfig,
        scheduler: Scheduler,
        cache: RequestCache,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._cache = cache
        self._clock = clock
        self._closing = threading.Event()
        rangeless = {index for index, endpoint in enumerate(config.endpoints) if not endpoint.supports_range}
        self._recovery = Recovery(len(config.endpoints), rangeless)
        self._lock = Latch()
        self._books = Books()
        self._alarms = Alarms("holotensor-alarms", clock=clock)
        self._turns = Turns(
            cache, scheduler, self._lock, seconds=config.timeout, rate=config.min_bandwidth, clock=clock
        )
        self._workers = 0
        self._jobs = deque[Call]()  # each of a worker that was asked for, besides those that take pieces
        self._late = 0  # workers for which there was no thread when they were to begin
        self._confirmed_bytes = 0
        self._here = threading.local()
        # As many as work may be publishing what they brought.
        self._executor = ThreadPoolExecutor(2 * config.max_concurrent, "holotensor-fetch", partial(_join, self._here))
        # Weakly, here and below: a loader that nobody holds any more, and that has nothing to do, has to go at once.
        known = weakref.ref(self)
        self._cancelled = partial(_cancelled, known)
        self._confirmations = Confirmations(scheduler, self._lock, released=lambda: _grow(known), clock=clock)
        self._assembly = Assembly(config, scheduler, cache, self._turns, self._confirmations, self._lock)
        self._courier = Courier(
            config,
            scheduler,
            self._assembly,
            self._recovery,
            self._alarms,
            self._lock,
            closing=self._closing,
            submit=self._executor.submit,
            on_rise=lambda: _grow(known),
            now=cache.now,
            clock=clock,
        )
        self._rounds = Rounds(scheduler, self._courier, clock, timeout=config.timeout)
        scheduler.dropped = lambda fragments: _dropped(known, fragments)
        scheduler.moves = lambda fragment_id, level: _moved(known, fragment_id, level)

    # -- what the loader asks for

    def submit(self, request: LoadRequest, held: Found | None = None, *, shared: bool = True) -> Future[LoadResult]:
        """A future for the result. An equal request that is in flight is joined; ``shared``: its future may be given
        to both, so that whoever cancels it cancels it for all. Raises Cancelled once closed."""
        [future] = self.submit_all([((request,), held)], shared=shared)
        self._spawn()
        return future

    def submit_all(
        self, asked: Sequence[tuple[Sequence[LoadRequest], Found | None]], *, shared: bool = True
    ) -> list[Future[LoadResult]]:
        """:meth:`submit` for each, without a beginning: more may come that is joined with these, and ``start`` will
        follow. Several requests in one place make a run."""
        may_resume = [len(requests) == 1 and self._cache.has_part(requests[0]) for requests, _ in asked]
        now = self._clock()
        futures: list[Future[LoadResult]] = []
        opened: dict[object, Load | None] = {}  # by identity; None for one that is about to be
        try:
            with self._lock:
                if self._closing.is_set():
                    raise Cancelled("the loader is closed: make a new one")
                for (requests, held), is_begun in zip(asked, may_resume, strict=True):
                    run = self._open_run(requests, opened, now) if len(requests) > 1 else None
                    if run is not None:
                        futures += run.members
                        continue
                    for request in requests:
                        future, load = self._open(request, held, opened, now, shared)
                        futures.append(future)
                        if load is not None and is_begun and not load.whole:
                            load.may_resume = True
            made = [load for load in opened.values() if load is not None]
            self._queue([load for load in made if not (load.is_repeated and self._is_there(load))])
        except BaseException:  # an interrupt, while the queue was full perhaps
            for identity, load in opened.items():
                if load is None:
                    with self._lock:
                        load = self._books.find(identity)
                if load is not None:
                    self._resolve(load, Cancelled("interrupted before it was queued"))
            raise
        return futures

    def _open(
        self, request: LoadRequest, held: Found | None, opened: dict[object, Load | None], now: float, shared: bool
    ) -> tuple[Future[LoadResult], Load | None]:
        """A future for one request, and the load that was opened for it, if there was none. With the lock held."""
        member = self._books.member(request)
        if member is not None:
            if not member.run.is_queued or request.priority >= member.run.priority:
                return self._join(member.run, [member], request, now, shared), None
            self._dissolve(member.run)
        identity = identity_of(request)
        load = self._books.find(identity)
        if load is not None:
            return self._join(load, load.waiters, request, now, shared), None
        opened[identity] = None
        load = self._books.open(request, identity, held, now, whole=self._recovery.is_without_ranges)
        opened[identity] = load
        load.lane = self._courier.next_for(load)
        return self._wait_for(load, request, now, shared), load

    def _open_run(self, requests: Sequence[LoadRequest], opened: dict[object, Load | None], now: float) -> Run | None:
        """A load for requests that make a run, unless something of it is on its way. With the lock held."""
        identity = object()
        opened[identity] = None
        run = self._books.open_run(requests, identity, now)
        if run is None:
            del opened[identity]
            return None
        opened[identity] = run
        run.lane = self._courier.next_for(run)
        run.on_cancel = self._cancelled
        return run

    def _dissolve(self, run: Run, *, alone: bool = False) -> None:
        """Have each fragment of a run come for itself. ``alone``: not joined with others either. With the lock held."""
        waiters = run.waiters
        try:
            loads, ending = self._books.dissolve(run)
            for load in loads:
                load.lane = self._courier.next_for(load)
            self._scheduler.replace(run, loads, alone=alone)
            if ending is not None:
                ending()
        except BaseException:
            self._abandon(waiters, {waiter.load for waiter in waiters if waiter.load is not None})
            raise

    def _abandon(self, waiters: Sequence[Waiter], loads: Collection[Load] = ()) -> None:
        """An interrupt has come while these passed from hand to hand: nobody else may have them now."""
        error = Cancelled("interrupted on its way from one queue to another")
        with calling_later() as calls:
            for waiter in waiters:
                self._answer(waiter, error, self._clock())
            self._resolve_all([(load, error) for load in loads])
        self.soon(partial(self._call_all, calls))

    def _queue(self, loads: list[Load]) -> None:
        """Queue loads; where there is no room for them, work begins, and the caller waits."""
        entries = [_queued_as(load) for load in loads]
        left = self._scheduler.push_all(entries)
        if left or self._scheduler.is_half_full:
            self._spawn()
        for fragment, alone, whole in left:
            self._scheduler.push(fragment, alone=alone, whole=whole)
            self._spawn()

    def start(self) -> None:
        """Begin with what was not to begin at once."""
        self._spawn()

    def _is_there(self, load: Load) -> bool:
        """Whether an equal load, of this process or of another, has brought the bytes since the caller looked into the
        cache."""
        found, turn = self._cache.find(load.request), load.turn
        if found is None:
            return False
        is_new = turn is not None and turn.has_waited and self._cache.came_since(found, turn.since)
        data = self._cache.data(found) if found.is_fresh or is_new else None
        if data is None:
            return False
        with self._lock:
            self._confirmed_bytes += len(data)
        self._resolve(load, Whole(data, found.head, from_cache=True))
        return True

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move a load to another level; False if none of that name is in flight."""
        with self._lock:
            for load in self._books.named(fragment_id):
                if isinstance(load, Run) and load.is_queued:
                    self._dissolve(load)
            loads = self._books.named(fragment_id)
            for load in loads:
                if not isinstance(load, Run) or priority < load.priority:  # what is on its way with it is not held up
                    self._scheduler.move(load, priority)
        return bool(loads)

    def cancel(self, fragment_id: str) -> bool:
        """Resolve whoever waits for this fragment with Cancelled; nobody else's load is touched."""
        with self._lock:
            waiters = [
                w for load in self._books.named(fragment_id) for w in load.waiters if w.fragment_id == fragment_id
            ]
        with self._telling():
            told = [self._dismiss(waiter, Cancelled("cancelled on request")) for waiter in waiters]
        return any(told)

    def soon(self, call: Callable[[], object]) -> None:
        """Call this on a thread of ours, at once; for whoever may be called while this thread has any lock."""
        self._alarms.soon(partial(self._call, call))

    def head(self, path: str) -> HeadInfo:
        """What the first endpoint that answers says of an object. Raises what the last one did."""
        return self._courier.head(path)

    def stats(self) -> FetcherStats:
        with self._lock:
            courier = self._courier
            return FetcherStats(courier.requests, courier.retries, courier.hedges, self._workers, self._confirmed_bytes)

    def close(self) -> None:
        """Stop everything now: interrupt the transfers, resolve what is left with Cancelled, join the threads. One of
        them may be a callback's that waits for what is left."""
        with self._lock:
            self._closing.set()
        self._scheduler.close()
        self._courier.close()
        with self._telling():
            while left := self._books.all():  # a run may fall apart meanwhile
                self._resolve_all([(load, Cancelled("the loader was closed")) for load in left])
        is_own = getattr(self._here, "is_own", False)  # called back by a future: a thread cannot wait for its own end
        self._executor.shutdown(wait=not is_own, cancel_futures=True)
        self._alarms.close(wait=not is_own)
        while self._jobs:  # of which there will be no worker
            self._work_apart()

    # -- loads

    def _join(
        self, load: Load, alike: Sequence[Waiter], request: LoadRequest, now: float, shared: bool
    ) -> Future[LoadResult]:
        """One more who waits for what these wait for of a load in flight. With the lock held."""
        if request.priority < load.priority:
            self._scheduler.move(load, request.priority)
        if shared and request.deadline is None:
            for waiter in alike:
                is_alike = waiter.is_shared and waiter.load is load and waiter.fragment_id == request.fragment_id
                if is_alike and not waiter.cancelled():
                    return waiter
        return self._wait_for(load, request, now, shared)

    def _wait_for(self, load: Load, request: LoadRequest, now: float, shared: bool) -> Future[LoadResult]:
        """A future for the end of a load. With the lock held."""
        limit, own = self._config.retry.deadline, request.deadline
        if limit is None or (own is not None and own < limit):
            limit = own
        until = None if limit is None else now + limit
        is_shared = shared and own is None
        waiter = Waiter(load, request, now, until, is_shared=is_shared)
        waiter.on_cancel = self._cancelled
        self._books.enter(waiter, load)
        if isinstance(load, Run):
            load.has_others = True
        if until is not None:
            waiter.alarm = self._alarms.at(until, waiter, self._overdue)
        return waiter

    def _overdue(self, waiter: Waiter) -> None:
        """Tell a caller that its time is over, wherever its load is held up."""
        self._here.is_own = True
        with self._telling(apart=True):
            self._dismiss(waiter, DeadlineExceeded("the deadline passed before the bytes were there"))

    def _call(self, call: Callable[[], object]) -> None:
        self._here.is_own = True
        call()

    def _dismiss(self, waiter: Waiter, error: NetworkError) -> bool:
        """One waits no longer, and is told; a load that nobody waits for is dropped. False if it was told already."""
        try:
            return self._parts(waiter, error)
        except BaseException:
            self._abandon((waiter,))
            raise

    def _parts(self, waiter: Waiter, error: NetworkError) -> bool:
        with self._lock:
            load = self._books.leave(waiter)
            if load is None:
                return False
            is_dropped = not load.waiters
            if is_dropped:
                _, ending = self._books.close(load)
                idle = self._courier.idle_races()
            elif isinstance(load, Run) and isinstance(waiter, Member):
                if load.is_queued:
                    self._dissolve(load)
                else:
                    self._scheduler.count_out(load)
        if is_dropped:
            self._scheduler.settle(load, success=False)
            self._turns.end(load)
            self._confirmations.forget(load)
        self._answer(waiter, error, self._clock())
        if is_dropped:
            for race in idle:
                race.stop()
            if ending is not None:
                ending()
        return True

    def _resolve(self, load: Load, outcome: Whole | NetworkError) -> None:
        """End a load: everyone who waits for it is told."""
        self._resolve_all([(load, outcome)])

    def _resolve_all(self, ended: Sequence[tuple[Load, Whole | NetworkError]]) -> None:
        with self._lock:
            closed = [(load, outcome, *self._books.close(load)) for load, outcome in ended if not load.done]
            idle = self._courier.idle_races() if closed else []
        self._scheduler.settle_all([(load, isinstance(outcome, Whole)) for load, outcome, _, _ in closed])
        now = self._clock()
        with self._telling():
            for load, outcome, waiters, _ in closed:
                if load.turn is not None:
                    self._turns.end(load)
                self._confirmations.answered(load)
                if isinstance(load, Run):
                    load.end(outcome, now)
                for waiter in waiters:
                    own = load.part_of(waiter.request, outcome) if isinstance(load, Run) else outcome
                    self._answer(waiter, own, now)
            for race in idle:
                race.stop()
            for _, _, _, ending in closed:
                if ending is not None:
                    ending()

    def _answer(self, waiter: Waiter, outcome: Whole | NetworkError, now: float) -> None:
        """Tell one who waits. Whoever took it off the load's list calls this, and so nobody else."""
        if waiter.alarm is not None:
            self._alarms.cancel(waiter.alarm)
        name, duration = waiter.request.fragment_id, now - waiter.since
        if isinstance(outcome, Whole):
            data, head, from_cache = outcome
            result: LoadResult = LoadSuccess(name, data, duration, from_cache, head)
        else:
            result = LoadFailure(name, outcome, duration)
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            waiter.set_result(result)

    @contextlib.contextmanager
    def _telling(self, *, apart: bool = False) -> Iterator[None]:
        """Whoever is told meanwhile is called back at the end, once all have been told: one may wait for another's
        result. ``apart``: by a worker, as others wait for this thread to tell them."""
        calls: list[Call] = []
        try:
            with calling_later() as calls:
                yield
        finally:
            if calls and apart:
                self._apart(partial(self._call_all, calls))
            elif calls:
                self._call_all(calls)

    # -- workers

    def _spawn(self) -> None:
        """Have as many workers as the scheduler wants, the limit at most."""
        crew = self._scheduler.crew
        if self._workers + self._rounds.carried >= crew:  # a glance: whoever leaves looks for what was queued meanwhile
            return
        is_round = self._rounds.is_next
        if is_round and self._rounds.wake():
            return
        with self._lock:
            if self._closing.is_set() or not self._scheduler.queue_len:
                return
            more = self._scheduler.crew - self._workers - self._rounds.carried
            failure = self._begin_work(min(1, more) if is_round else more)
            stranded = self._books.all() if failure is not None and not self._workers else []
        for load in stranded:
            told = NetworkError(f"no thread could be started: {failure}; end some, or raise the limit (ulimit -u)")
            told.__cause__ = failure
            self._resolve(load, told)

    def _begin_work(self, more: int) -> RuntimeError | None:
        """Have so many more workers, or as many as the machine gives; why it gave no more. With the lock held."""
        for _ in range(more):
            self._workers += 1
            try:
                self._executor.submit(self._work)
            except RuntimeError as error:
                self._workers -= 1
                self._late += 1  # it is in the executor's queue, and will be run should there ever be a thread
                return error
        return None

    def _work(self) -> None:
        """A worker: pieces until there are none, or the limit has fallen. It leaves rather than wait, so that an idle
        loader holds nothing up."""
        with self._lock:
            if self._late:
                self._late -= 1
                self._workers += 1
        try:
            while self._has_work() and (piece := self._scheduler.next()) is not None:
                if self._rounds.go(piece, self._hands()):
                    continue
                self._spawn()  # the next one may have to wait for its turn
                self._run(piece)
        finally:
            with self._lock:
                self._workers -= 1
            self._spawn()  # something may have been queued between the last look and now

    def _has_work(self) -> bool:
        """Whether a worker should go on, and not leave what is next to the one that is on a round."""
        if self._workers + self._rounds.carried > self._scheduler.crew:
            return False
        return not (self._rounds.is_on and self._rounds.is_next)

    def _hands(self) -> Hands:
        """What we do for a round. It has them while it goes, and no longer, lest we hold ourselves."""
        return Hands(
            sets_aside=self._sets_aside,
            begin=self._begin,
            run=self._run,
            bring=self._bring,
            take_in=self._take_in,
            fail=self._fail,
            apart=self._apart,
            call_back=lambda calls: self._apart(partial(self._call_all, calls)),
            spawn=self._spawn,
        )

    def _apart(self, job: Call) -> None:
        """Have another worker do this; this one, where there is no other."""
        with self._lock:
            self._workers += 1
        self._jobs.append(job)
        try:
            self._executor.submit(self._work_apart)
        except RuntimeError:  # it may be in the executor's queue all the same
            self._work_apart()

    def _work_apart(self) -> None:
        try:
            job = self._jobs.popleft()
        except IndexError:  # it was done where there seemed to be no thread for it
            return
        try:
            job()
        finally:
            with self._lock:
                self._workers -= 1
            self._spawn()

    def _call_all(self, calls: Sequence[Call]) -> None:
        """Call whoever was to be called back, one after the other, as a future does."""
        with self._relieved():
            for call in calls:
                try:
                    call()
                except Exception:
                    _log.exception("a callback of a future failed")

    def _run(self, piece: Piece) -> None:
        if not self._sets_aside(piece):
            self._bring(piece, self._begin(piece))

    def _bring(self, piece: Piece, shares: list[Share], trip: Trip | None = None) -> None:
        """Have a piece brought, and see to what becomes of it; ``trip``: what has begun with it, if anything has."""
        endpoint, since = None, self._clock() if trip is None else trip.began
        outcome: Answer | NetworkError = Cancelled("nobody waits for it any more")
        try:
            if trip is not None:
                endpoint = trip.endpoint  # who is to blame, should it fail
                endpoint, outcome = self._courier.transfer(piece, shares, endpoint, trip)
            elif shares:
                endpoint = self._courier.choose(shares)
                if not self._courier.is_accepted(piece, endpoint):
                    self._leave(shares)
                    return
                self._scheduler.give_way(piece)
                endpoint, outcome = self._courier.transfer(piece, shares, endpoint)
        except NetworkError as error:
            outcome = error
        except Exception as error:
            outcome = _defect(error)
        finally:
            if trip is not None:
                self._courier.end(trip)
            self._scheduler.release(piece)
        try:
            if isinstance(outcome, NetworkError):
                self._failed(shares, outcome, endpoint, since)
            elif endpoint is not None:
                self._courier.arrived(shares[0].load.request.path, outcome, endpoint)
                self._arrived([(share, outcome) for share in shares], endpoint)
        except Exception as error:
            self._resolve_all([(share.load, _defect(error)) for share in shares])

    def _take_in(self, came: Sequence[tuple[Share, Answer]]) -> None:
        """What a round has brought, from the only endpoint."""
        try:
            self._arrived(came, 0)
        except Exception as error:
            self._resolve_all([(share.load, _defect(error)) for share, _ in came])

    def _fail(self, piece: Piece, shares: Sequence[Share], error: Exception) -> None:
        """A defect of ours keeps a piece from being brought."""
        loads = [part.fragment for part in piece.parts if isinstance(part.fragment, Load)]
        self._resolve_all([(load, _defect(error)) for load in loads])
        self._leave(shares)
        self._scheduler.release(piece)

    # -- what a piece waits for, or goes on with

    def _sets_aside(self, piece: Piece) -> bool:
        """Whether a piece is not to be brought as it is: something else was done about it."""
        return self._is_answered(piece) or self._is_held_back(piece) or self._resumes(piece)

    def _is_answered(self, piece: Piece) -> bool:
        """Whether a piece need not be asked for, as another load's question is about the same version of its object."""
        part = piece.parts[0]
        load = part.fragment
        if not isinstance(load, Load) or load.held is None:
            return False
        answer = self._confirmations.take(load, part)
        if answer is True or (isinstance(answer, Told) and not self._is_confirmed(load, answer)):
            return False
        self._scheduler.release(piece)
        return True

    def _is_confirmed(self, load: Load, told: Told) -> bool:
        """Whether the cache still has what was confirmed: then it is delivered."""
        held = load.held
        try:
            data = None
            if held is not None:
                data = self._cache.confirm(held, told.head, load.request, asked_at=told.asked_at)
            if data is None or held is None:
                with self._lock:
                    load.held = None
                return False
            whole = Whole(data, self._cache.told(held), from_cache=True)
        except Exception as error:
            self._resolve(load, _defect(error))
            return True
        with self._lock:
            self._confirmed_bytes += len(data)
        self._resolve(load, whole)
        return True

    def _is_held_back(self, piece: Piece) -> bool:
        """Whether a piece is not begun with, as another process brings something of it, or has; the rest of it is
        queued again."""
        if not self._turns.are_taken:
            return False
        parts = [part.fragment for part in piece.parts if not part.is_stale]
        loads = [load for load in parts if isinstance(load, Load) and not load.done]
        with self._telling():
            ours = [load for load in loads if self._is_ours(load)]
            if len(ours) == len(loads):
                return False
            for load in ours:
                self._scheduler.restart(load, alone=False)
            self._scheduler.release(piece)
        return True

    def _is_ours(self, load: Load) -> bool:
        """Whether this process is to bring a load, now."""
        try:
            move = self._turns.take(load)
            if move is Move.WAIT:
                self._look_again(load)
            return move is Move.BEGIN or (move is Move.LOOK and not self._is_there(load))
        except Exception as error:
            self._resolve(load, _defect(error))
            return False

    def _look_again(self, load: Load) -> None:
        """Go on with a load that waits for another process, or look again later."""
        pause = self._turns.wake(load)
        if pause is None:
            self._spawn()
        else:
            self._alarms.at(self._clock() + pause, load, self._look_again)

    def _resumes(self, piece: Piece) -> bool:
        """Whether the piece stood for a load that may go on where another was cut off: what is left of it is queued."""
        part = piece.parts[0]
        load = part.fragment
        if not isinstance(load, Load) or not load.may_resume:
            return False
        with self._lock:
            if not load.may_resume or part.is_stale:  # that is another worker's, which has the piece that is not
                return False
            load.may_resume = False
        try:
            self._go_on(load, self._cache.resume(load.request, load.held))
        except Exception as error:
            self._resolve(load, _defect(error))
        finally:
            self._scheduler.release(piece)
        return True

    def _go_on(self, load: Load, resumed: Resumed | None) -> None:
        """Queue what a load lacks: all of it, where nothing is resumed."""
        if resumed is None:
            self._scheduler.restart(load, whole=load.whole)
            return
        attempt = Attempt(
            endpoint=resumed.endpoint if load.request.checksum is None else None,
            head=resumed.head,
            wanted=resumed.wanted,
            missing=sum(part.length for part in resumed.missing),
            destination=resumed.destination,
            is_resumed=True,
        )
        with self._lock:
            is_wanted = not load.done
            if is_wanted:
                load.attempt = attempt
                self._confirmed_bytes += resumed.wanted.length - attempt.missing
        if is_wanted:
            self._scheduler.restart(load, rest=resumed.missing, stop=resumed.wanted.stop)
        else:
            resumed.destination.keep()

    def _begin(self, piece: Piece) -> list[Share]:
        """What a piece does for loads that still want it."""
        with self._lock:
            shares = []
            for part in piece.parts:
                load = part.fragment
                if isinstance(load, Load) and load.state is part.plan and not load.done:
                    load.attempt.in_flight += 1
                    shares.append(Share(load, load.attempt, part))
            return shares

    # -- bytes

    def _arrived(self, came: Sequence[tuple[Share, Answer]], endpoint: int) -> None:
        """Pieces are there: see what each of their loads still lacks."""
        complete: list[tuple[Share, Answer]] = []
        rest: list[tuple[Share, Answer]] = []
        with self._lock:
            for share, answer in came:
                is_all = not share.attempt.abandoned and self._assembly.advance(share, answer)
                (complete if is_all else rest).append((share, answer))
        for share, answer in rest:
            self._assembly.settle(share, answer)
        self._leave([share for share, _ in rest])
        size = sum(share.attempt.wanted.length for share, _ in complete if share.attempt.wanted is not None)
        with self._relieved() if size >= _WORTH_RELIEF else contextlib.nullcontext():
            for first in range(0, len(complete), TOLD_TOGETHER):
                batch = complete[first : first + TOLD_TOGETHER]
                with self._telling(apart=batch[-1] is not complete[-1]):
                    self._deliver(batch, endpoint)

    def _deliver(self, complete: Sequence[tuple[Share, Answer]], endpoint: int) -> None:
        """Verify and publish what is all there, and tell whoever waits."""
        ended: list[tuple[Load, Whole]] = []
        proven: list[Proven] = []
        loads: list[Load] = []
        try:
            for share, answer in complete:
                try:
                    outcome = self._complete(share, answer, endpoint)
                except Exception as error:  # the others are right all the same
                    self._resolve(share.load, _defect(error))
                    continue
                if isinstance(outcome, Whole):
                    ended.append((share.load, outcome))
                elif outcome is not None:
                    proven.append(outcome)
                    loads.append(share.load)
            ended += zip(loads, self._assembly.kept(proven, endpoint), strict=True)
        finally:
            self._resolve_all(ended)
            self._leave([share for share, _ in complete])

    def _leave(self, shares: Sequence[Share]) -> None:
        """A piece has ended for these loads; whoever is the last to leave an attempt that was given up tidies up."""
        with self._lock:
            endings = [ending for share in shares if (ending := share.attempt.leave()) is not None]
        for ending in endings:
            ending()

    @contextlib.contextmanager
    def _relieved(self) -> Iterator[None]:
        """While a worker hashes and flushes a long fragment, or calls others back, another may have its connection."""
        if not getattr(self._here, "is_at_work", False):  # no worker, or relieved already
            yield
            return
        self._here.is_at_work = False
        with self._lock:
            self._workers -= 1
        self._spawn()
        try:
            yield
        finally:
            self._here.is_at_work = True
            with self._lock:
                self._workers += 1

    def _complete(self, share: Share, answer: Answer, endpoint: int) -> Whole | Proven | None:
        """All pieces of a load are there: verify it, and publish it unless others can be published with it. None if
        that failed, and has been seen to."""
        load = share.load
        try:
            if not answer.not_modified:
                proven = self._assembly.proven(share)
                return proven if proven.is_in_memory else self._assembly.kept([proven], endpoint)[0]
            outcome = self._assembly.confirmed(load, answer)
        except NetworkError as error:
            share.attempt.is_sound = False
            if error.url is None:
                error.url = self._courier.redacted(load.request.path, endpoint)
                error.byte_range = load.request.byte_range
            self._courier.blame(endpoint, error)
            self._recover(share, error, endpoint)
            return None
        self._confirmations.answered(load, Told(answer.head, load.attempt.asked_at))
        with self._lock:
            self._confirmed_bytes += len(outcome.data)
        return outcome

    # -- when it goes wrong

    def _failed(self, shares: list[Share], error: NetworkError, endpoint: int | None, since: float) -> None:
        """A piece that was begun at ``since`` has not come."""
        is_passing = endpoint is not None and self._courier.failed(shares, error, endpoint, since)
        with self._telling():
            for share in shares:
                try:
                    self._recover(share, error, endpoint, is_passing=len(shares) > 1 or is_passing)
                finally:
                    self._leave([share])

    def _recover(self, share: Share, error: NetworkError, endpoint: int | None, *, is_passing: bool = False) -> None:
        """After a failed piece: ask again, for it or for all, or give up."""
        load = share.load
        with self._lock:
            if load.done or share.attempt.abandoned:
                return  # another piece of it has failed before, and has been seen to
            if isinstance(load, Run) and not (is_passing or isinstance(error, Cancelled)):
                self._dissolve(load, alone=not is_overtaxed(error))  # where one is to blame, the others are right
                return
            # A passing one: the endpoint comes back; or another of joined ranges is to blame, so each is asked alone.
            again = self._recovery.again(load, error, endpoint, is_passing=is_passing, now=self._clock())
            if again is not Again.NOTHING:
                self._scheduler.send_to(self._courier.next_for(load), load)
            if again is Again.PIECE:
                self._scheduler.extend(load, [share.part.byte_range])
            elif again is Again.ALL:
                self._assembly.restart(load)
        if again is Again.NOTHING:
            is_final = isinstance(error, Cancelled | DeadlineExceeded)
            self._resolve(load, error if is_final else self._assembly.stale(load) or summary(load.failures))


def _join(here: threading.local) -> None:
    """This thread is of the pool, and counts as a worker while it is at work."""
    here.is_own = here.is_at_work = True


def _dropped(known: weakref.ref[Fetcher], fragments: Sequence[PrioritizedFragment]) -> None:
    """The scheduler has forgotten fragments: tell whoever waits for them."""
    fetcher = known()
    if fetcher is not None:
        loads = [fragment for fragment in fragments if isinstance(fragment, Load)]
        fetcher._resolve_all([(load, Cancelled("the queue was cleared")) for load in loads])


def _moved(known: weakref.ref[Fetcher], fragment_id: str, level: Priority) -> bool:
    """Move what somebody waits for by this name, which need not be its load's."""
    fetcher = known()
    return fetcher is not None and fetcher.update_priority(fragment_id, level)


def _grow(known: weakref.ref[Fetcher]) -> None:
    """More connections may be used: there may be work for another worker."""
    fetcher = known()
    if fetcher is not None:
        fetcher._spawn()


def _queued_as(load: Load) -> tuple[PrioritizedFragment, bool, bool]:
    """How a load is queued: its fragment, whether alone, and whether in one piece, for the worker that is to find out
    how much of it is left."""
    in_one = load.whole or load.may_resume
    return load, load.held is not None or in_one, in_one


def _cancelled(known: weakref.ref[Fetcher], waiter: Waiter) -> None:
    """A future was cancelled: its load may have to be dropped."""
    fetcher = known()
    if fetcher is not None:
        fetcher._dismiss(waiter, Cancelled("cancelled on request"))


def _defect(error: Exception) -> NetworkError:
    """What a caller is told of a defect of ours, which must not leave it waiting for ever; or of what is none."""
    if isinstance(error, NetworkError):  # a path that cannot be asked for
        return error
    told = NetworkError(f"internal error: {error!r}; please report it")
    told.__cause__ = error
    return told
