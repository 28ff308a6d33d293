"""Fetcher: the threads. Takes pieces from the scheduler, brings their bytes, and resolves the futures that wait for
them.

Equal requests in flight share one load (single flight). A load that fails at one endpoint goes on at the next; what
it has is kept only if a digest or the same strong validator proves that it belongs together.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from ..config import NetworkConfig
from ..errors import (
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    HttpError,
    NetworkError,
    ObjectChanged,
    RateLimited,
    RetriesExhausted,
    Timeout,
    redact_url,
)
from ..storage.memory import MemoryPart
from ..transport.client import Answer, Ask, HttpClient, Write
from ..transport.digests import check_digests
from ..transport.guards import check_checksum
from ..transport.retry import LONGEST_RETRY_AFTER, Patience
from ..transport.sockets import Interrupt
from ..values import (
    HeadInfo,
    LoadFailure,
    LoadRequest,
    LoadResult,
    LoadSuccess,
    Priority,
    RangeRequest,
)
from .alarms import Alarms
from .hedging import Hedging, Versions
from .loads import Attempt, Books, Fragment, Load, Share, Waiter
from .priority import PrioritizedFragment
from .races import Private, Prize, Race
from .recovery import Again, Gone, Moved, Recovery, is_failing, is_refusal, silence_of, summary
from .request_cache import Destination, Found, RequestCache, Resumed, contradicts
from .routes import Routes, is_bad_answer, is_unreachable
from .scheduler import Piece, Scheduler
from .sinks import Bounded, Scatter
from .turns import Move, Turns

__all__ = ["Fetcher", "FetcherStats"]


_log = logging.getLogger("holotensor_net.engine")

_WORTH_RELIEF = 1 << 20
"""Bytes of a fragment from which publishing it takes longer than starting another worker."""

_DELIVERED_TOGETHER = 32
"""Fragments of one piece that are told of at once: the first should not wait for the last to be on the disk."""

_CROWDED = 0.1
"""Seconds until a piece is asked for again that was refused while the endpoint served others."""

_SHORTEST_LOOK = 0.01
"""Seconds until a piece that rests is looked at again, at least."""

_SHORTER_THAN_TO_MOVE = 1.0
"""Seconds of silence that are waited for rather than that a load goes to another endpoint."""


@dataclass(frozen=True, slots=True)
class FetcherStats:
    """A snapshot. ``requests`` that were sent for what came, as an ``Answer`` counts them; ``retries`` after a failure,
    ``hedges`` beside one that was slow, ``workers`` at work; ``confirmed_bytes`` were in the cache and did not have to
    come again."""

    requests: int
    retries: int
    hedges: int
    workers: int
    confirmed_bytes: int


class Fetcher:
    """Runs loads on a pool of threads whose size follows the scheduler's limit.

    Thread-safe; its one lock guards the loads, their attempts and the routes. ``close`` leaves no thread.
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
        self._clients = [HttpClient(endpoint, config.client, clock=clock) for endpoint in config.endpoints]
        self._routes = Routes(config.endpoints, outage=config.timeout, region=config.region)
        self._hedging = Hedging(len(config.endpoints))
        self._versions = Versions()
        self._races: set[Race] = set()
        self._second_at = Counter[int]()  # how many requests are at each endpoint besides
        self._may_hedge = len(config.endpoints) > 1 if config.hedging is None else config.hedging
        rangeless = {index for index, endpoint in enumerate(config.endpoints) if not endpoint.supports_range}
        self._recovery = Recovery(len(config.endpoints), rangeless)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # routes changed
        self._books = Books()
        self._alarms = Alarms("holotensor-alarms", clock=clock)
        self._turns = Turns(
            cache, scheduler, self._lock, seconds=config.timeout, rate=config.min_bandwidth, clock=clock
        )
        self._workers = 0
        self._requests = 0
        self._retries = 0
        self._hedges = 0
        self._confirmed_bytes = 0
        self._here = threading.local()
        # As many as work may be publishing what they brought.
        self._executor = ThreadPoolExecutor(2 * config.max_concurrent, thread_name_prefix="holotensor-fetch")
        # Weakly, here and below: a loader that nobody holds any more, and that has nothing to do, has to go at once.
        known = weakref.ref(self)
        scheduler.dropped = lambda fragment: _dropped(known, fragment)

    # -- what the loader asks for

    def submit(self, request: LoadRequest, held: Found | None = None, *, shared: bool = True) -> Future[LoadResult]:
        """A future for the result. An equal request that is in flight is joined; ``shared``: its future may be given
        to both, so that whoever cancels it cancels it for all. Raises Cancelled once closed."""
        [future] = self.submit_all([(request, held)], shared=shared)
        self._spawn()
        return future

    def submit_all(
        self, asked: Sequence[tuple[LoadRequest, Found | None]], *, shared: bool = True
    ) -> list[Future[LoadResult]]:
        """:meth:`submit` for each, without a beginning: more may come that is joined with these, and ``start`` will
        follow."""
        may_resume = [held is None and self._cache.has_part(request) for request, held in asked]
        now = self._clock()
        futures, opened = [], []
        with self._lock:
            if self._closing.is_set():
                raise Cancelled("the loader is closed: make a new one")
            for (request, held), is_begun in zip(asked, may_resume, strict=True):
                load = self._books.find(request)
                if load is not None:
                    futures.append(self._join(load, request, now, shared))
                    continue
                load = self._books.open(request, held, now, whole=self._recovery.is_without_ranges)
                load.may_resume = is_begun and not load.whole
                opened.append(load)
                futures.append(self._wait_for(load, request, now, shared))
        try:
            self._queue([load for load in opened if not (load.is_repeated and self._is_there(load))])
        except BaseException:  # an interrupt, while the queue was full
            for load in opened:
                self._resolve(load, Cancelled("interrupted before it was queued"))
            raise
        return futures

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
        self._resolve(load, LoadSuccess(load.request.fragment_id, data, from_cache=True, head=found.head))
        return True

    def update_priority(self, fragment_id: str, priority: Priority) -> bool:
        """Move a load to another level; False if none of that name is in flight."""
        with self._lock:
            loads = self._books.named(fragment_id)
            for load in loads:
                self._scheduler.move(load.fragment, priority)
        return bool(loads)

    def cancel(self, fragment_id: str) -> bool:
        """Resolve whoever waits for this fragment with Cancelled; nobody else's load is touched."""
        with self._lock:
            waiters = [
                w for load in self._books.named(fragment_id) for w in load.waiters if w.fragment_id == fragment_id
            ]
        told = [self._dismiss(waiter, Cancelled("cancelled on request")) for waiter in waiters]
        return any(told)

    def head(self, path: str) -> HeadInfo:
        """What the first endpoint that answers says of an object. Raises what the last one did."""
        failures: list[NetworkError] = []
        with self._lock:
            order = self._routes.in_order(self._clock())
        for endpoint in order:
            try:
                return self._clients[endpoint].head(path)
            except Cancelled:
                raise
            except NetworkError as error:
                failures.append(error)
        raise summary(failures)

    def stats(self) -> FetcherStats:
        with self._lock:
            return FetcherStats(self._requests, self._retries, self._hedges, self._workers, self._confirmed_bytes)

    def close(self) -> None:
        """Stop everything now: interrupt the transfers, join the threads, resolve what is left with Cancelled."""
        with self._lock:
            self._closing.set()
            self._changed.notify_all()
            races = list(self._races)
        self._scheduler.close()
        for race in races:
            race.stop()
        for client in self._clients:
            client.close()
        is_own = getattr(self._here, "is_own", False)  # called back by a future: a thread cannot wait for its own end
        self._executor.shutdown(wait=not is_own, cancel_futures=True)
        self._alarms.close(wait=not is_own)
        with self._lock:
            left = self._books.all()
        for load in left:
            self._resolve(load, Cancelled("the loader was closed"))

    # -- loads

    def _join(self, load: Load, request: LoadRequest, now: float, shared: bool) -> Future[LoadResult]:
        """One more who waits for a load in flight. With the lock held."""
        if request.priority < load.fragment.priority:
            self._scheduler.move(load.fragment, request.priority)
        if shared and request.deadline is None:
            for waiter in load.waiters:
                is_alike = waiter.is_shared and waiter.fragment_id == request.fragment_id
                if is_alike and not waiter.future.cancelled():
                    return waiter.future
        return self._wait_for(load, request, now, shared)

    def _wait_for(self, load: Load, request: LoadRequest, now: float, shared: bool) -> Future[LoadResult]:
        """A future for the end of a load. With the lock held."""
        limits = [limit for limit in (self._config.retry.deadline, request.deadline) if limit is not None]
        until = now + min(limits) if limits else None
        waiter = Waiter(load, request, now, until, is_shared=shared and request.deadline is None)
        self._books.enter(waiter)
        # Future and waiter would hold each other, and so the bytes, until garbage is collected.
        waiter.future.add_done_callback(partial(_ended, weakref.ref(self), weakref.ref(waiter)))
        if until is not None:
            waiter.alarm = self._alarms.at(until, waiter, self._overdue)
        return waiter.future

    def _overdue(self, waiter: Waiter) -> None:
        """Tell a caller that its time is over, wherever its load is held up."""
        self._here.is_own = True
        self._dismiss(waiter, DeadlineExceeded("the deadline passed before the bytes were there"))

    def _dismiss(self, waiter: Waiter, error: NetworkError) -> bool:
        """One waits no longer, and is told; a load that nobody waits for is dropped. False if it was told already."""
        load = waiter.load
        with self._lock:
            if not self._books.leave(waiter):
                return False
            is_dropped = not load.waiters
            if is_dropped:
                _, ending = self._books.close(load)
                idle = self._idle_races()
        if is_dropped:
            self._scheduler.settle(load.fragment, success=False)
            self._turns.end(load)
        self._answer(waiter, error)
        if is_dropped:
            for race in idle:
                race.stop()
            ending()
        return True

    def _resolve(self, load: Load, outcome: LoadSuccess | NetworkError) -> None:
        """End a load: everyone who waits for it is told."""
        self._resolve_all([(load, outcome)])

    def _resolve_all(self, ended: Sequence[tuple[Load, LoadSuccess | NetworkError]]) -> None:
        with self._lock:
            closed = [(load, outcome, *self._books.close(load)) for load, outcome in ended if not load.done]
            idle = self._idle_races() if closed else []
        self._scheduler.settle_all(
            [(load.fragment, isinstance(outcome, LoadSuccess)) for load, outcome, _, _ in closed]
        )
        for load, outcome, waiters, _ in closed:
            self._turns.end(load)
            for waiter in waiters:
                self._answer(waiter, outcome)
        for race in idle:
            race.stop()
        for _, _, _, ending in closed:
            ending()

    def _idle_races(self) -> list[Race]:
        """The pieces on their way that nobody wants any more: they are to be cut, lest a server that is silent holds
        their connections and their workers. With the lock held."""
        return [race for race in self._races if race.is_idle]

    def _answer(self, waiter: Waiter, outcome: LoadSuccess | NetworkError) -> None:
        """Tell one who waits. Whoever took it off the load's list calls this, and so nobody else."""
        if waiter.alarm is not None:
            self._alarms.cancel(waiter.alarm)
        duration = self._clock() - waiter.since
        name = waiter.fragment_id
        if isinstance(outcome, LoadSuccess):
            result: LoadResult = LoadSuccess(name, outcome.data, duration, outcome.from_cache, outcome.head)
        else:
            result = LoadFailure(name, outcome, duration)
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_result(result)

    # -- workers

    def _spawn(self) -> None:
        """Have as many workers as the scheduler wants, the limit at most."""
        if self._workers >= self._scheduler.crew:  # a glance: whoever leaves looks for what was queued meanwhile
            return
        with self._lock:
            if self._closing.is_set() or not self._scheduler.queue_len:
                return
            more = self._scheduler.crew - self._workers
            self._workers += max(0, more)
            for _ in range(more):
                self._executor.submit(self._work)

    def _work(self) -> None:
        """A worker: pieces until there are none, or the limit has fallen. It leaves rather than wait, so that an idle
        loader holds nothing up."""
        self._here.is_own = True
        try:
            while self._workers <= self._scheduler.crew and (piece := self._scheduler.next()) is not None:
                self._run(piece)
                self._spawn()
        finally:
            with self._lock:
                self._workers -= 1
            self._spawn()  # something may have been queued between the last look and now

    def _run(self, piece: Piece) -> None:
        if self._is_held_back(piece) or self._resumes(piece):
            return
        shares = self._begin(piece)
        endpoint: int | None = None
        outcome: Answer | NetworkError = Cancelled("nobody waits for it any more")
        try:
            if shares:
                endpoint = self._choose(shares)
                self._scheduler.give_way(piece)
                endpoint, outcome = self._transfer(piece, shares, endpoint)
        except NetworkError as error:
            outcome = error
        except Exception as error:
            outcome = _defect(error)
        finally:
            self._scheduler.release(piece)
        try:
            if isinstance(outcome, NetworkError):
                self._failed(shares, outcome, endpoint)
            elif endpoint is not None:
                self._arrived(shares, outcome, endpoint)
        except Exception as error:
            for share in shares:
                self._resolve(share.load, _defect(error))

    def _is_held_back(self, piece: Piece) -> bool:
        """Whether a piece is not begun with, as another process brings something of it, or has; the rest of it is
        queued again."""
        parts = [part.fragment for part in piece.parts if not part.is_stale]
        loads = [fragment.load for fragment in parts if isinstance(fragment, Fragment) and not fragment.load.done]
        ours = [load for load in loads if self._is_ours(load)]
        if len(ours) == len(loads):
            return False
        for load in ours:
            self._scheduler.restart(load.fragment, alone=False)
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
        fragment = piece.parts[0].fragment
        if not isinstance(fragment, Fragment) or not fragment.load.may_resume:
            return False
        load = fragment.load
        load.may_resume = False
        try:
            self._go_on(load, self._cache.resume(load.request))
        except Exception as error:
            self._resolve(load, _defect(error))
        finally:
            self._scheduler.release(piece)
        return True

    def _go_on(self, load: Load, resumed: Resumed | None) -> None:
        """Queue what a load lacks: all of it, where nothing is resumed."""
        if resumed is None:
            self._scheduler.restart(load.fragment, whole=load.whole)
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
        if is_wanted:
            self._scheduler.restart(load.fragment, rest=resumed.missing, stop=resumed.wanted.stop)
        else:
            resumed.destination.keep()

    def _begin(self, piece: Piece) -> list[Share]:
        """What a piece does for loads that still want it."""
        with self._lock:
            shares = []
            for part in piece.parts:
                if isinstance(part.fragment, Fragment) and not part.fragment.load.done and not part.is_stale:
                    load = part.fragment.load
                    load.attempt.in_flight += 1
                    shares.append(Share(load, load.attempt, part))
            return shares

    def _alternative(self, shares: list[Share], endpoint: int) -> int | None:
        """Another endpoint that may be asked and is well, if there is one. With the lock held."""
        excluded = set().union(*(self._recovery.excluded(share.load) for share in shares))
        return self._routes.other(endpoint, excluded, self._clock())

    def _choose(self, shares: list[Share]) -> int:
        """The endpoint to ask, once there is one. Raises what all of them suffer from."""
        patience = self._patience(shares)
        with self._lock:
            while True:
                excluded = set().union(*(self._recovery.excluded(share.load) for share in shares))
                choice = self._routes.choose(excluded, self._clock(), keep=self._home(shares[0].load))
                if isinstance(choice, int):
                    return choice
                if isinstance(choice, NetworkError):
                    raise copy.copy(choice)
                if choice is None:
                    raise RetriesExhausted(message="no endpoint is left to ask")
                self._changed.wait(patience.remaining(choice.seconds))
                patience.check()

    @staticmethod
    def _home(load: Load) -> int | None:
        """Where what a load has came from: the rest is there, too, and elsewhere perhaps not. With the lock held."""
        is_begun = load.attempt.head is not None and load.request.checksum is None
        return load.attempt.endpoint if is_begun else None

    def _transfer(self, piece: Piece, shares: list[Share], endpoint: int) -> tuple[int, Answer]:
        """Bring a piece from an endpoint, or from another one where that is slow; gives which, and what it said."""
        race = Race(shares, self._ask(piece, shares[0], endpoint), endpoint, self._clock())
        with self._lock:
            is_alone = self._alternative(shares, endpoint) is None
        patience = self._patience(
            shares, race.first, silence=LONGEST_RETRY_AFTER if is_alone else _SHORTER_THAN_TO_MOVE
        )

        def open_sink(head: HeadInfo, _: RangeRequest | None) -> Write:
            race.headed = race.headed or self._clock()
            self._scheduler.monitor.record_round_trip(race.headed - race.began)
            return self._open(shares, head)

        self._start(race)
        try:
            answer = self._clients[endpoint].transfer(
                race.ask,
                open_sink,
                patience,
                on_bytes=lambda size: self._pace(size, piece, patience, race),
                on_retry=self._note_retry,
                interrupt=race.first,
                window=partial(self._scheduler.window, piece),
            )
            if race.is_doubled:
                self._check_sealed(shares)
        except NetworkError as error:
            if isinstance(error, ChecksumMismatch):
                race.await_second(patience.remaining(self._config.timeout))
            prize = race.end()
            if prize is None:
                raise
            if isinstance(error, ChecksumMismatch):
                with self._lock:
                    self._report(endpoint, error)
            self._time(race, has_delivered=False)
            return prize.endpoint, self._take_over(race, prize)
        finally:
            race.end()
            with self._lock:
                self._races.discard(race)
            if race.alarm is not None:
                self._alarms.cancel(race.alarm)
        self._time(race, has_delivered=True)
        return endpoint, answer

    def _ask(self, piece: Piece, lead: Share, endpoint: int) -> Ask:
        """What to ask the endpoint for."""
        load, attempt, wanted = lead.load, lead.attempt, piece.byte_range
        request = load.request
        # The whole object, where a range was asked for, does only if no other piece is to be had, or on its way.
        is_all = request.byte_range is None and (wanted.start, wanted.stop) == (0, lead.part.plan.stop)
        with self._lock:
            moved = attempt.endpoint is not None and attempt.endpoint != endpoint
            if moved and not load.is_provable:
                raise Moved("another endpoint may have another version")
            attempt.endpoint = endpoint
            attempt.asked_at = attempt.asked_at or self._cache.now()
            # Only the endpoint that gave a validator can confirm it.
            held = load.held if load.held is not None and load.held.endpoint == endpoint else None
            return Ask(
                path=request.path,
                byte_range=None if load.whole else wanted,
                size=attempt.head.size if attempt.head is not None else _known_size(request),
                pinned=None if moved and request.checksum is not None else load.version,
                held=held.entry.validator if held is not None and attempt.head is None else None,
                allow_short=request.allow_short,
                or_whole=is_all,
            )

    # -- what is slow is asked for twice

    def _start(self, race: Race) -> None:
        wanted = race.ask.byte_range
        with self._lock:
            if self._closing.is_set():
                raise Cancelled("the loader is closed: make a new one")
            self._races.add(race)
            if wanted is None or race.ask.held is not None or race.ask.allow_short or not self._may_hedge:
                return
            pause = self._hedging.begin(race.endpoint, wanted.length)
            if pause is not None:
                race.pause = pause
                race.alarm = self._alarms.at(race.began + pause, race, self._is_slow)

    def _time(self, race: Race, *, has_delivered: bool) -> None:
        """Learn from how long the first of a race took, were it cut or not."""
        now, wanted = self._clock(), race.ask.byte_range
        with self._lock:
            if has_delivered:
                self._routes.delivered(race.endpoint, (race.headed or now) - race.began, now)
            if wanted is not None:
                headed = race.headed or now
                body = now - headed - race.rested
                self._hedging.measured(race.endpoint, headed - race.began, wanted.length, body)

    def _is_slow(self, race: Race) -> None:
        """A piece takes longer than nearly all others did: ask another endpoint too, if that is safe and allowed."""
        now = self._clock()
        with self._lock:
            if race.is_over or self._closing.is_set():
                return
            if (left := race.pause - race.seconds(now)) > 0:
                race.alarm = self._alarms.at(now + max(left, _SHORTEST_LOOK), race, self._is_slow)
                return
            ask, second = self._as_proven(race, now), self._second(race)
            if ask is not None and second is not None and self._is_worth_asking(second, ask, now):
                self._hedges += 1
                self._second_at[second] += 1
                race.is_doubled = True
                self._executor.submit(self._hedge, race, second, ask)
                return
            race.pause *= 2
            race.alarm = self._alarms.at(now + race.pause, race, self._is_slow)

    def _second(self, race: Race) -> int | None:
        """Whom to ask for a piece that is slow. With the lock held."""
        second = self._alternative(race.shares, race.endpoint)
        if second is None and self._config.hedging:
            second = race.endpoint
        there = sum(one.endpoint == second for one in self._races) + self._second_at[second or 0]
        return second if there < self._config.max_concurrent else None

    def _as_proven(self, race: Race, now: float) -> Ask | None:
        """How to ask another endpoint for a piece so that it can bring no other bytes; None if nothing would prove
        that: all that the piece is for has a digest, or its version is known. With the lock held."""
        if all(_is_sealed(share) for share in race.shares):
            return replace(race.ask, pinned=None)
        versions = {share.load.version for share in race.shares} - {None}
        version = versions.pop() if versions else self._versions.of(race.ask.path, now)
        return None if versions or version is None or version.etag is None else replace(race.ask, pinned=version)

    def _is_worth_asking(self, endpoint: int, ask: Ask, now: float) -> bool:
        """Whether another request is spent on an endpoint that may have what it is asked for. With the lock held."""
        may_have = ask.pinned is None or self._versions.may_have(ask.path, endpoint, now)
        return may_have and self._hedging.spend()

    def _hedge(self, race: Race, endpoint: int, ask: Ask) -> None:
        """Bring a piece from a second endpoint into a place of its own."""
        self._here.is_own = True
        assert ask.byte_range is not None
        place = Private(ask.byte_range)
        patience = self._patience(race.shares, race.second)
        began = headed = self._clock()

        def open_sink(_: HeadInfo, __: RangeRequest | None) -> Write:
            nonlocal headed
            headed = self._clock()
            return place.write

        try:
            answer = self._clients[endpoint].transfer(
                ask,
                open_sink,
                patience,
                on_bytes=lambda size: patience.sleep(self._note_bytes(size, None, endpoint)),
                on_retry=self._note_retry,
                interrupt=race.second,
            )
            for share in race.shares:
                if _is_sealed(share) and share.load.request.checksum is not None:
                    check_checksum(place.view(share.part.byte_range), share.load.request.checksum)
        except NetworkError as error:
            with self._lock:
                self._report(endpoint, error)
                if isinstance(error, ObjectChanged):
                    self._versions.differs(ask.path, endpoint, self._clock())
        except Exception:
            _log.exception("asking a second time failed")
        else:
            with self._lock:
                self._routes.delivered(endpoint, headed - began, self._clock())
                self._requests += answer.requests
            race.win(Prize(endpoint, ask, answer, place))
        finally:
            race.second_ended.set()
            with self._lock:
                self._second_at[endpoint] -= 1

    def _check_sealed(self, shares: list[Share]) -> None:
        """Raises ChecksumMismatch if the first of two brought what its digest refutes: the second is not cut then."""
        for share in shares:
            checksum, destination = share.load.request.checksum, share.attempt.destination
            if checksum is not None and destination is not None and _is_sealed(share) and not share.attempt.abandoned:
                check_checksum(destination.view(), checksum)

    def _take_over(self, race: Race, prize: Prize) -> Answer:
        """What the second brought goes where the first would have put it."""
        came = prize.answer.byte_range
        with self._lock:
            self._routes.overtaken(race.endpoint, self._clock())
            versions = {share.load.version for share in race.shares} - {None, prize.ask.pinned}
        if versions and not all(_is_sealed(share) for share in race.shares):
            raise ObjectChanged("the endpoints have different versions of the object")
        write = self._open(race.shares, prize.answer.head)
        if came is not None:
            write(came.start, prize.place.view(came))
        return replace(prize.answer, requests=0)

    # -- patience

    def _patience(
        self, shares: list[Share], interrupt: Interrupt | None = None, *, silence: float = LONGEST_RETRY_AFTER
    ) -> Patience:
        """As long as the most patient of those who wait, and only while somebody does."""
        with self._lock:
            ends = [waiter.until for share in shares for waiter in share.load.waiters]
        known = [end for end in ends if end is not None]
        return Patience(
            deadline=max(known) if known and len(known) == len(ends) else None,
            silence=silence,
            closing=self._closing if interrupt is None else interrupt.fired,
            cancelled=lambda: self._closing.is_set() or all(share.attempt.abandoned for share in shares),
            clock=self._clock,
        )

    def _pace(self, size: int, piece: Piece, patience: Patience, race: Race) -> None:
        """Bytes of a piece have come: rest, before more are read, for as long as others go first or the rate wants."""
        delay = self._note_bytes(size, piece, race.endpoint)
        if delay > 0 or self._scheduler.gives_way(piece):
            with race.resting(self._clock):
                self._scheduler.give_way(piece)
                patience.sleep(delay)

    def _note_bytes(self, size: int, piece: Piece | None, endpoint: int) -> float:
        """Bytes have come; gives the seconds until more may be read."""
        delay = self._scheduler.record(size, piece)
        self._heard(endpoint)
        if self._workers < self._scheduler.crew:
            self._spawn()
        return delay

    def _heard(self, endpoint: int) -> None:
        """The endpoint is there: those who wait for it need not any longer."""
        now = self._clock()
        if self._routes.is_known_well(endpoint, now):  # a glance without the lock, for which every block would queue
            return
        with self._lock:
            self._routes.answered(endpoint, now)
            self._changed.notify_all()

    def _note_retry(self, error: NetworkError) -> None:
        with self._lock:
            self._retries += 1
        if isinstance(error, RateLimited | Timeout):
            self._scheduler.refused()

    # -- bytes

    def _open(self, shares: list[Share], head: HeadInfo) -> Write:
        """Where an answer's bytes go: each load's share to its own place, what lies between to nowhere."""
        spans = [_span(share, head) for share in shares]
        made: list[Destination | None] = []
        places: list[tuple[RangeRequest, Destination]] = []
        try:
            for share, span in zip(shares, spans, strict=True):
                made.append(self._made(share, span, head))
            with self._lock:
                for share, span, new in zip(shares, spans, made, strict=True):
                    place = self._place(share, span, head, new)
                    if place is not None:
                        places.append(place)
        finally:
            used = {id(destination) for _, destination in places}
            for new in made:
                if new is not None and id(new) not in used:
                    new.discard()
        scatter = Scatter(places)
        if head.size is not None:
            return scatter
        is_in_memory = any(isinstance(destination, MemoryPart) for _, destination in places)
        return Bounded(scatter, self._config.memory_budget if is_in_memory else self._config.max_cache_size)

    def _made(self, share: Share, span: RangeRequest, head: HeadInfo) -> Destination | None:
        """A place for a load's bytes, None if it has one."""
        load, attempt = share.load, share.attempt
        if attempt.destination is not None:
            return None
        size = None if _is_open_ended(load.request, head) else span.length
        if "no-store" in head.headers.get("cache-control", "").lower():
            self._turns.end(load)  # there will be nothing to wait for
        if load.in_memory:
            return MemoryPart(size, spare=self._config.memory_budget)
        return self._cache.destination(size, head, load.request, attempt.endpoint or 0)

    def _place(
        self, share: Share, span: RangeRequest, head: HeadInfo, made: Destination | None
    ) -> tuple[RangeRequest, Destination] | None:
        """The range of the object that a load wants, and the one place where its bytes go, ``made`` if it had none;
        None if nobody waits. With the lock held."""
        load, attempt, held = share.load, share.attempt, share.load.held
        if attempt.destination is not None and attempt.wanted is not None:
            if attempt.is_resumed:
                attempt.head, attempt.is_resumed = head, False
            return attempt.wanted, attempt.destination
        if attempt.destination is None and made is not None and not attempt.abandoned:
            attempt.destination, attempt.is_open_ended = made, _is_open_ended(load.request, head)
            attempt.head, attempt.wanted, attempt.missing = head, span, span.length
        if held is not None and held.endpoint == attempt.endpoint and contradicts(head.validator, held.head.validator):
            load.held = None  # replaced, whatever becomes of the new version
        return None if attempt.destination is None else (attempt.wanted or span, attempt.destination)

    def _arrived(self, shares: list[Share], answer: Answer, endpoint: int) -> None:
        """A piece is there: see what each of its loads still lacks."""
        self._heard(endpoint)
        complete: list[Share] = []
        rest: list[Share] = []
        with self._lock:
            self._versions.note(shares[0].load.request.path, answer.head.validator, self._clock())
            self._requests += answer.requests
            for share in shares:
                is_all = not share.attempt.abandoned and self._advance(share, answer)
                (complete if is_all else rest).append(share)
        for share in rest:
            self._settle(share, answer)
        self._leave(rest)
        size = sum(share.attempt.wanted.length for share in complete if share.attempt.wanted is not None)
        with self._relieved() if size >= _WORTH_RELIEF else contextlib.nullcontext():
            for first in range(0, len(complete), _DELIVERED_TOGETHER):
                self._deliver(complete[first : first + _DELIVERED_TOGETHER], answer, endpoint)

    def _deliver(self, complete: list[Share], answer: Answer, endpoint: int) -> None:
        """Verify and publish what is all there, and tell whoever waits."""
        ended: list[tuple[Load, LoadSuccess]] = []
        try:
            for share in complete:
                outcome = self._complete(share, answer, endpoint)
                if outcome is not None:
                    ended.append((share.load, outcome))
        finally:
            self._resolve_all(ended)
            self._leave(complete)

    def _leave(self, shares: list[Share]) -> None:
        """A piece has ended for these loads; whoever is the last to leave an attempt that was given up tidies up."""
        with self._lock:
            endings = [share.attempt.leave() for share in shares]
        for ending in endings:
            ending()

    def _settle(self, share: Share, answer: Answer) -> None:
        """What a piece has brought will not change any more, if others may add to it."""
        attempt, came = share.attempt, answer.byte_range
        wanted, destination = attempt.wanted, attempt.destination
        if came is None or wanted is None or destination is None or attempt.is_open_ended or answer.head.size is None:
            return
        if share.load.is_provable:
            destination.settle(max(came.start, wanted.start) - wanted.start, min(came.stop, wanted.stop) - wanted.start)

    @contextlib.contextmanager
    def _relieved(self) -> Iterator[None]:
        """While a worker hashes and flushes a long fragment, another may have its connection."""
        with self._lock:
            self._workers -= 1
        self._spawn()
        try:
            yield
        finally:
            with self._lock:
                self._workers += 1

    def _advance(self, share: Share, answer: Answer) -> bool:
        """Book what a piece brought; True if the load now has everything. With the lock held."""
        load, attempt, came = share.load, share.attempt, answer.byte_range
        if came is None:
            return True
        attempt.digests |= answer.unproved
        if attempt.wanted is None:  # nothing had to be written: there is nothing where the range begins
            attempt.head, attempt.wanted = answer.head, came
            return True
        if answer.head.size is None or attempt.is_open_ended:
            return self._ends(load, answer.head, came)
        part = _overlap(came, attempt.wanted)
        if not load.is_provable:
            attempt.head = answer.head
            if part < attempt.wanted.length:
                # Nothing proves that the rest would be of the same version: all of it has to come in one answer.
                self._scheduler.extend(load.fragment, [attempt.wanted], whole=True)
                return False
        attempt.missing -= part
        planned = share.part.plan.stop
        if attempt.missing and planned < attempt.wanted.stop:
            rest = RangeRequest(planned, attempt.wanted.stop)
            self._scheduler.extend(load.fragment, [rest], whole=False)
        return attempt.missing == 0

    def _ends(self, load: Load, head: HeadInfo, came: RangeRequest) -> bool:
        """Whether a body ended where the object does, of which no answer, or not the first, had told how long it is.
        With the lock held."""
        size = came.stop if head.size is None else head.size
        if came.stop < size:  # now it comes in parts, which nothing joins: ask for all of it
            load.whole = True
            self._restart(load)
            return False
        attempt, wanted = load.attempt, load.request.byte_range or RangeRequest(0, size)
        attempt.head, attempt.missing = head, 0
        attempt.wanted = RangeRequest(min(wanted.start, size), min(wanted.stop, size))
        return True

    def _complete(self, share: Share, answer: Answer, endpoint: int) -> LoadSuccess | None:
        """All pieces of a load are there: verify and publish it. None if that failed, and has been seen to."""
        load = share.load
        try:
            return self._confirmed(load, answer) if answer.not_modified else self._verified(share, endpoint)
        except NetworkError as error:
            share.attempt.is_sound = False
            if error.url is None:
                error.url = redact_url(self._config.endpoints[endpoint].url_of(load.request.path))
                error.byte_range = load.request.byte_range
            with self._lock:
                self._report(endpoint, error)
            self._recover(share, error, endpoint)
            return None

    def _confirmed(self, load: Load, answer: Answer) -> LoadSuccess:
        assert load.held is not None
        data = self._cache.confirm(load.held, answer.head, load.request, asked_at=load.attempt.asked_at)
        if data is None:
            raise Gone("the cached bytes are gone")
        with self._lock:
            self._confirmed_bytes += len(data)
        return LoadSuccess(load.request.fragment_id, data, from_cache=True, head=self._cache.told(load.held))

    def _verified(self, share: Share, endpoint: int) -> LoadSuccess:
        load, attempt = share.load, share.attempt
        request, head, wanted = load.request, attempt.head, attempt.wanted
        assert head is not None
        assert wanted is not None
        if request.byte_range is not None and wanted.length < request.byte_range.length and not request.allow_short:
            raise HttpError(416, f"the object has {wanted.stop} bytes and ends before the range asked for")
        if attempt.destination is None:
            attempt.destination = self._cache.destination(wanted.length, head)
        destination = attempt.destination
        data = destination.view()
        if len(data) > wanted.length:  # an earlier go was longer
            destination.truncate(wanted.length)
            data = destination.view()
        if len(data) < wanted.length:
            raise ObjectChanged(f"the object has {wanted.length} bytes now, not {len(data)}")
        if request.expected_size is not None and len(data) != request.expected_size:
            raise ObjectChanged(f"the fragment has {len(data)} bytes, not the {request.expected_size} expected")
        if request.checksum is not None:
            _check(destination, data, request.checksum)
        if request.byte_range is None:
            check_digests(data, attempt.digests)
        if head.size is None and request.byte_range is None:
            head = replace(head, size=len(data))
        kept = self._cache.keep(request, endpoint, head, wanted, destination, asked_at=attempt.asked_at)
        return LoadSuccess(request.fragment_id, kept, head=head)

    # -- when it goes wrong

    def _failed(self, shares: list[Share], error: NetworkError, endpoint: int | None) -> None:
        with self._lock:
            outage = endpoint is not None and (
                self._report(endpoint, error)
                or (silence_of(error) > _SHORTER_THAN_TO_MOVE and self._alternative(shares, endpoint) is not None)
            )
            is_crowded = endpoint is not None and is_refusal(error) and self._is_serving(endpoint)
            self._changed.notify_all()
        if is_refusal(error):
            self._scheduler.refused()
        if is_crowded:
            self._closing.wait(_CROWDED)
        for share in shares:
            try:
                self._recover(share, error, endpoint, shared=len(shares) > 1, outage=outage or is_crowded)
            finally:
                self._leave([share])

    def _is_serving(self, endpoint: int) -> bool:
        """Whether the endpoint is answering others: who is refused there was one too many, and is asked for again when
        fewer are. With the lock held."""
        return any(race.endpoint == endpoint and race.headed and not race.is_over for race in self._races)

    def _report(self, endpoint: int, error: NetworkError) -> bool:
        """Tell the routes how an endpoint did; True if its loads should wait for it. With the lock held."""
        now = self._clock()
        if is_unreachable(error):
            return self._routes.unreachable(endpoint, error, now)
        last = error.last_error if isinstance(error, RetriesExhausted) else error
        if isinstance(last, HttpError):
            self._routes.answered(endpoint, now)
        if is_bad_answer(error):
            self._routes.failed(endpoint, error, now)
        self._routes.released(endpoint)
        return False

    def _recover(
        self, share: Share, error: NetworkError, endpoint: int | None, *, shared: bool = False, outage: bool = False
    ) -> None:
        """After a failed piece: ask again, for it or for all, or give up."""
        load = share.load
        with self._lock:
            if load.done or share.attempt.abandoned:
                return  # another piece of it has failed before, and has been seen to
            # A passing one: the endpoint comes back; or another of joined ranges is to blame, so each is asked alone.
            again = self._recovery.again(load, error, endpoint, is_passing=shared or outage, now=self._clock())
            if again is Again.PIECE:
                self._scheduler.extend(load.fragment, [share.part.byte_range])
            elif again is Again.ALL:
                self._restart(load)
        if again is Again.NOTHING:
            is_final = isinstance(error, Cancelled | DeadlineExceeded)
            self._resolve(load, error if is_final else self._stale(load) or summary(load.failures))

    def _stale(self, load: Load) -> LoadSuccess | None:
        """What the cache has of it, where its server fails and has allowed that."""
        held = load.held if any(map(is_failing, load.failures)) else None
        data = self._cache.stale(held, load.request) if held is not None else None
        if data is None or held is None:
            return None
        return LoadSuccess(load.request.fragment_id, data, from_cache=True, head=held.head)

    def _restart(self, load: Load) -> None:
        """Begin a load anew. With the lock held; the piece that this is about has not left the attempt yet, and tidies
        up when it does."""
        load.attempt.abandon()
        load.attempt = Attempt()
        self._scheduler.restart(load.fragment, whole=load.whole)


def _dropped(known: weakref.ref[Fetcher], fragment: PrioritizedFragment) -> None:
    """The scheduler has forgotten a fragment: tell whoever waits for it."""
    fetcher = known()
    if fetcher is not None and isinstance(fragment, Fragment):
        fetcher._resolve(fragment.load, Cancelled("the queue was cleared"))


def _queued_as(load: Load) -> tuple[PrioritizedFragment, bool, bool]:
    """How a load is queued: its fragment, whether alone, and whether in one piece, for the worker that is to find out
    how much of it is left."""
    in_one = load.whole or load.may_resume
    return load.fragment, load.held is not None or in_one, in_one


def _ended(known: weakref.ref[Fetcher], waiting: weakref.ref[Waiter], future: Future[LoadResult]) -> None:
    """A future has ended: if that is because it was cancelled, its load may have to be dropped."""
    fetcher, waiter = known(), waiting()
    if fetcher is not None and waiter is not None and future.cancelled():
        fetcher._dismiss(waiter, Cancelled("cancelled on request"))


_UNTIL_ITS_END = RangeRequest(0, 1 << 62)


def _check(destination: Destination, data: memoryview, checksum: str) -> None:
    """Raises ChecksumMismatch unless the bytes have the digest that they should; what is known of it is used."""
    if not checksum.startswith("blake3:"):
        check_checksum(data, checksum)
    elif (actual := f"blake3:{destination.digest()}") != checksum:
        raise ChecksumMismatch(expected=checksum, actual=actual)


def _defect(error: Exception) -> NetworkError:
    """What a caller is told of a defect of ours, which must not leave it waiting for ever."""
    told = NetworkError(f"internal error: {error!r}; please report it")
    told.__cause__ = error
    return told


def _is_sealed(share: Share) -> bool:
    """Whether a piece is all of a fragment whose digest is known, so that its bytes prove themselves."""
    request = share.load.request
    is_all = share.part.byte_range == (request.byte_range or RangeRequest(0, request.expected_size or 0))
    return request.checksum is not None and is_all


def _is_open_ended(request: LoadRequest, head: HeadInfo) -> bool:
    """Whether nobody knows how many bytes will come for a request."""
    return head.size is None and (request.byte_range is None or request.allow_short)


def _span(share: Share, head: HeadInfo) -> RangeRequest:
    """The range of the object that a load wants, if the object is one that it may be of."""
    request = share.load.request
    pinned = request.validator
    if pinned is not None and not pinned.is_strong and contradicts(head.validator, pinned):
        raise ObjectChanged("the object was replaced: it is not the version that was asked for")
    return _wanted(request, head)


def _wanted(request: LoadRequest, head: HeadInfo) -> RangeRequest:
    """The range of the object that a request wants, now that its size is known (or known to be unknown)."""
    wanted, size = request.byte_range, head.size
    if wanted is None:
        return _UNTIL_ITS_END if size is None else RangeRequest(0, size)
    if size is None or wanted.stop <= size:
        return wanted
    if not request.allow_short:
        raise HttpError(416, f"the object has {size} bytes and ends before the range asked for")
    return RangeRequest(min(wanted.start, size), size)


def _known_size(request: LoadRequest) -> int | None:
    return request.expected_size if request.byte_range is None else None


def _overlap(one: RangeRequest, other: RangeRequest) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
