"""Courier: one piece, from an endpoint that can bring it.

Which endpoint to ask, and for which version; another one too where the first is slow; when to rest. How endpoints
answer and fail goes to the routes. What becomes of the loads is not decided here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

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
from ..transport.client import Answer, Ask, HttpClient, Write
from ..transport.guards import check_checksum
from ..transport.retry import LONGEST_RETRY_AFTER, Patience
from ..transport.sockets import Interrupt
from ..values import HeadInfo, LoadRequest, Priority, RangeRequest
from ..waits import Latch
from .alarms import Alarms
from .assembly import Assembly
from .hedging import Hedging, Versions
from .loads import Load, Share, is_sealed
from .races import Private, Prize, Race, Second, Trip
from .rations import Sender
from .recovery import Moved, Recovery, is_refusal, silence_of, summary
from .routes import Routes, is_bad_answer, is_unreachable
from .scheduler import Piece, Scheduler

__all__ = ["Courier"]

_log = logging.getLogger("holotensor_net.engine")

_CROWDED = 0.1
"""Seconds until a piece is asked for again that was refused while the endpoint served others."""

_SHORTEST_LOOK = 0.01
"""Seconds until a piece that rests is looked at again, at least."""

_SHORTER_THAN_TO_MOVE = 1.0
"""Seconds of silence that are waited for rather than that a load goes to another endpoint."""


class Courier:
    """Brings pieces. ``lock``, the fetcher's, guards the loads, the routes and the counts: ``requests`` that were sent
    for what came, ``retries`` after a failure, ``hedges`` beside one that was slow. ``submit`` runs what is asked for
    twice on a thread of the pool; ``on_rise`` is told whenever more connections may be used; ``closing`` ends every
    wait."""

    def __init__(
        self,
        config: NetworkConfig,
        scheduler: Scheduler,
        assembly: Assembly,
        recovery: Recovery,
        alarms: Alarms,
        lock: Latch,
        *,
        closing: threading.Event,
        submit: Callable[..., Any],
        on_rise: Callable[[], None],
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._assembly = assembly
        self._recovery = recovery
        self._alarms = alarms
        self._lock = lock
        self._changed = lock.condition()  # routes changed
        self._closing = closing
        self._submit = submit
        self._on_rise = on_rise
        self._rises = 0  # that it has been told of
        self._now = now
        self._clock = clock
        self._clients = [HttpClient(endpoint, config.client, clock=clock) for endpoint in config.endpoints]
        self._routes = Routes(config.endpoints, outage=config.timeout, region=config.region)
        self._hedging = Hedging(len(config.endpoints))
        self._versions = Versions()
        self._races: set[Race | Trip] = set()
        self._served_at = [-math.inf] * len(config.endpoints)  # when each brought something, the last time
        self._second_at = Counter[int]()  # how many requests are at each endpoint besides
        self._may_hedge = len(config.endpoints) > 1 if config.hedging is None else config.hedging
        # What may be asked for twice, or has to wait for its turn, has a worker of its own; and so has all where there
        # is to be one connection, as a round has others than workers have.
        self._may_go_round = (
            len(config.endpoints) == 1
            and config.endpoints[0].max_connections > 1
            and not self._may_hedge
            and config.scheduler.max_bandwidth is None
            and config.scheduler.max_requests_per_second is None
        )
        self.requests = 0
        self.retries = 0
        self.hedges = 0

    def head(self, path: str) -> HeadInfo:
        """What the first endpoint that answers says of an object, within ``retry.deadline``. Raises what the last one
        did."""
        limit = self._config.retry.deadline
        patience = Patience(
            deadline=None if limit is None else self._clock() + limit, closing=self._closing, clock=self._clock
        )
        failures: list[NetworkError] = []
        with self._lock:
            order = self._routes.in_order(self._clock())
        for endpoint in order:
            try:
                return self._clients[endpoint].describe(
                    path, patience, on_request=lambda: self._keep_rate(patience, Priority.NORMAL)
                )
            except (Cancelled, DeadlineExceeded):
                raise
            except NetworkError as error:
                failures.append(error)
        raise summary(failures)

    def close(self) -> None:
        """Cut what is on its way, once ``closing`` is set."""
        with self._lock:
            self._changed.notify_all()
            races = list(self._races)
        for race in races:
            race.stop()
        for client in self._clients:
            client.close()

    def idle_races(self) -> list[Race | Trip]:
        """The pieces on their way that nobody wants any more: they are to be cut, lest a server that is silent holds
        their connections and their workers. With the lock held."""
        return [race for race in self._races if race.is_idle]

    # -- whom to ask, and for what

    def choose(self, shares: list[Share]) -> int:
        """The endpoint to ask, once there is one. Raises what all of them suffer from."""
        patience: Patience | None = None
        while True:
            with self._lock:
                choice = self._routes.choose(self._excluded(shares), self._clock(), keep=self._home(shares[0].load))
                if isinstance(choice, int):
                    return choice
                if isinstance(choice, NetworkError):
                    raise copy.copy(choice)
                if choice is None:
                    raise RetriesExhausted(message="no endpoint is left to ask")
                if patience is None:
                    patience = self._patience(shares)
                    continue
                self._changed.wait(patience.remaining(choice.seconds))
            patience.check()

    def is_accepted(self, piece: Piece, endpoint: int) -> bool:
        """Whether an endpoint that was chosen may be asked now; else the piece is queued for it, and done with."""
        if self._scheduler.assign(piece, endpoint):
            return True
        with self._lock:
            self._routes.released(endpoint)
        return False

    def next_for(self, load: Load) -> int:
        """The endpoint that a load will be asked of, as things stand. With the lock held."""
        if len(self._clients) == 1:
            return 0
        home, excluded = self._home(load), self._recovery.excluded(load)
        order = self._routes.in_order(self._clock())
        left = [endpoint for endpoint in order if endpoint not in excluded] or order
        return home if home in left else left[0]

    def _alternative(self, shares: list[Share], endpoint: int) -> int | None:
        """Another endpoint that may be asked and is well, if there is one. With the lock held."""
        if len(self._clients) == 1:
            return None
        return self._routes.other(endpoint, self._excluded(shares), self._clock())

    def _excluded(self, shares: list[Share]) -> Collection[int]:
        """The endpoints that are not to be asked for one of these. With the lock held."""
        return self._recovery.excluded(*[share.load for share in shares])

    @staticmethod
    def _home(load: Load) -> int | None:
        """Where what a load has came from: the rest is there, too, and elsewhere perhaps not. With the lock held."""
        is_begun = load.attempt.head is not None and load.request.checksum is None
        return load.attempt.endpoint if is_begun else None

    def _ask(self, piece: Piece, shares: list[Share], endpoint: int) -> Ask:
        """What to ask the endpoint for. With the lock held."""
        lead, now = shares[0], self._now()
        load, attempt, wanted = lead.load, lead.attempt, piece.byte_range
        request = load.request
        # The whole object, where a range was asked for, does only if no other piece is to be had, or on its way.
        is_all = request.byte_range is None and (wanted.start, wanted.stop) == (0, lead.part.plan.stop)
        moved = attempt.endpoint is not None and attempt.endpoint != endpoint
        if moved and not load.is_provable:
            raise Moved("another endpoint may have another version")
        attempt.endpoint = endpoint
        for share in shares:
            share.attempt.asked_at = share.attempt.asked_at or now
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

    # -- brief pieces, many at once

    @property
    def may_go_round(self) -> bool:
        """Whether brief pieces may be asked for together, as far as is known."""
        return self._may_go_round and self._clients[0].may_begin

    def depart(self, pieces: Sequence[tuple[Piece, list[Share]]]) -> list[Trip | None]:
        """Ask for brief pieces, and wait for none; None for each that has to be brought the ordinary way."""
        with self._lock:
            now = self._clock()
            if self._closing.is_set() or not self._routes.is_well(0):
                return [None] * len(pieces)
            asks = [self._ask(piece, shares, 0) for piece, shares in pieces]
        trips: list[Trip | None] = [
            None if begun is None else Trip(piece, shares, 0, now, begun, begun.call.fd)
            for (piece, shares), begun in zip(pieces, self._clients[0].begin_all(asks), strict=True)
        ]
        with self._lock:
            self._races.update([trip for trip in trips if trip is not None])
        return trips

    def read(self, trip: Trip) -> Answer | None:
        """What a trip has brought, if that is all of it: it is in its place. None if more is to come, or if its call
        ``is_unusual``."""
        return self._clients[0].read(trip.begun, partial(self._assembly.open, trip.shares))

    def returned(self, came: Sequence[tuple[Trip, Answer]]) -> None:
        """Trips are over, and well, all of them just now."""
        now = self._clock()
        self._scheduler.lanes[0].monitor.record_round_trip(now - max(trip.began for trip, _ in came))
        self._heard(0)
        _, answer = came[-1]
        with self._lock:
            self._served_at[0] = now
            for trip, _ in came:
                self._races.discard(trip)
                self._routes.delivered(0, now - trip.began, now)
            self.requests += len(came)
            self._versions.note(came[-1][0].shares[0].load.request.path, answer.head.validator, now)
        self._scheduler.came([trip.piece for trip, _ in came])

    def end(self, trip: Trip) -> None:
        """A trip is over, however it ended."""
        self._clients[0].forget(trip.begun)
        with self._lock:
            self._races.discard(trip)

    # -- one piece

    def transfer(
        self, piece: Piece, shares: list[Share], endpoint: int, trip: Trip | None = None
    ) -> tuple[int, Answer]:
        """Bring a piece from an endpoint, or from another one where that is slow; gives which, and what it said.
        ``trip``: one that is to be ended."""
        with self._lock:
            began = self._clock() if trip is None else trip.began
            race = Race(shares, self._ask(piece, shares, endpoint), endpoint, began)
            is_alone = self._alternative(shares, endpoint) is None
            patience = self._patience(
                shares, race.first, silence=LONGEST_RETRY_AFTER if is_alone else _SHORTER_THAN_TO_MOVE
            )
            self._start(race)

        def open_sink(head: HeadInfo, coming: RangeRequest | None) -> Write:
            race.headed = race.headed or self._clock()
            self._scheduler.lanes[endpoint].monitor.record_round_trip(race.headed - race.began)
            race.write = self._assembly.open(shares, head, coming)
            return race.write

        has_delivered = False
        try:
            answer = self._clients[endpoint].transfer(
                race.ask,
                open_sink,
                patience,
                on_request=lambda: self._keep_rate(patience, piece.priority, piece, race),
                on_bytes=lambda size: self._pace(size, piece, patience, race),
                on_retry=lambda error: self._note_retry(error, endpoint),
                may_retry=lambda error: not self._is_crowded(shares, error, endpoint, race.began),
                interrupt=race.first,
                window=partial(self._scheduler.window, piece),
                stride=self._scheduler.stride,
                begun=None if trip is None else trip.begun,
            )
            if race.second is not None:
                self._check_sealed(shares)
            has_delivered = True
        except NetworkError as error:
            if is_refusal(error):  # before its connection is given to another piece
                self._scheduler.refused(endpoint)
            if isinstance(error, ChecksumMismatch):
                race.await_second(patience.remaining(self._config.timeout))
            prize = race.end()
            if prize is None:
                raise
            if isinstance(error, ChecksumMismatch):
                with self._lock:
                    self._report(endpoint, error)
            with self._lock:
                self._time(race)
            return prize.endpoint, self._take_over(race, prize)
        finally:
            race.end()
            with self._lock:
                self._races.discard(race)
                if has_delivered:
                    self._served_at[endpoint] = self._clock()
                    self._routes.delivered(endpoint, (race.headed or self._clock()) - race.began, self._clock())
                    self._time(race)
            if race.alarm is not None:
                self._alarms.cancel(race.alarm)
        return endpoint, answer

    # -- what is slow is asked for twice

    def _start(self, race: Race) -> None:
        """A piece is about to be asked for. With the lock held."""
        if self._closing.is_set():
            raise Cancelled("the loader is closed: make a new one")
        self._races.add(race)
        wanted = race.ask.byte_range
        if wanted is None or race.ask.held is not None or race.ask.allow_short or not self._may_hedge:
            return
        pause = self._hedging.begin(race.endpoint, wanted.length)
        if pause is not None:
            race.pause = pause
            race.alarm = self._alarms.at(race.began + pause, race, self._is_slow)

    def _time(self, race: Race) -> None:
        """Learn from how long the first of a race took, were it cut or not. With the lock held."""
        now, wanted = self._clock(), race.ask.byte_range
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
                self.hedges += 1
                self._second_at[second] += 1
                self._submit(self._hedge, race, race.double(), second, ask)
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
        if all(is_sealed(share) for share in race.shares):
            return replace(race.ask, pinned=None)
        versions = {share.load.version for share in race.shares} - {None}
        version = versions.pop() if versions else self._versions.of(race.ask.path, now)
        return None if versions or version is None or version.etag is None else replace(race.ask, pinned=version)

    def _is_worth_asking(self, endpoint: int, ask: Ask, now: float) -> bool:
        """Whether another request is spent on an endpoint that may have what it is asked for. With the lock held."""
        may_have = ask.pinned is None or self._versions.may_have(ask.path, endpoint, now)
        return may_have and not self._scheduler.is_rationed and self._hedging.spend()

    def _hedge(self, race: Race, own: Second, endpoint: int, ask: Ask) -> None:
        """Bring a piece from a second endpoint into a place of its own."""
        assert ask.byte_range is not None
        place = Private(ask.byte_range)
        with self._lock:
            patience = self._patience(race.shares, own.interrupt)
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
                on_request=lambda: self._keep_rate(patience, race.shares[0].part.fragment.priority),
                on_bytes=lambda size: patience.sleep(self._note_bytes(size, None, endpoint)),
                on_retry=lambda error: self._note_retry(error, endpoint),
                interrupt=own.interrupt,
                stride=self._scheduler.stride,
            )
            for share in race.shares:
                if is_sealed(share) and share.load.request.checksum is not None:
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
                self.requests += answer.requests
            race.win(Prize(endpoint, ask, answer, place))
        finally:
            own.ended.set()
            with self._lock:
                self._second_at[endpoint] -= 1

    def _check_sealed(self, shares: list[Share]) -> None:
        """Raises ChecksumMismatch if the first of two brought what its digest refutes: the second is not cut then."""
        for share in shares:
            checksum, destination = share.load.request.checksum, share.attempt.destination
            if checksum is not None and destination is not None and is_sealed(share) and not share.attempt.abandoned:
                check_checksum(destination.view(), checksum)

    def _take_over(self, race: Race, prize: Prize) -> Answer:
        """What the second brought goes where the first would have put it."""
        came = prize.answer.byte_range
        with self._lock:
            self._routes.overtaken(race.endpoint, self._clock())
            versions = {share.load.version for share in race.shares} - {None, prize.ask.pinned}
        if versions and not all(is_sealed(share) for share in race.shares):
            raise ObjectChanged("the endpoints have different versions of the object")
        write = self._assembly.open(race.shares, prize.answer.head, came)
        if came is not None:
            write(came.start, prize.place.view(came))
        return replace(prize.answer, requests=0)

    # -- patience

    def _patience(
        self, shares: list[Share], interrupt: Interrupt | None = None, *, silence: float = LONGEST_RETRY_AFTER
    ) -> Patience:
        """As long as the most patient of those who wait, and only while somebody does. With the lock held."""

        def is_pointless() -> bool:
            return self._closing.is_set() or _are_given_up(shares)

        ends = [waiter.until for share in shares for waiter in share.load.waiters]
        known = [end for end in ends if end is not None]
        return Patience(
            deadline=max(known) if known and len(known) == len(ends) else None,
            silence=silence,
            closing=self._closing if interrupt is None else interrupt.fired,
            cancelled=is_pointless,
            clock=self._clock,
        )

    def _keep_rate(
        self, patience: Patience, level: Priority, piece: Piece | None = None, race: Race | None = None
    ) -> None:
        """Before a request: wait until ``max_requests_per_second`` allows it. What is asked for besides the pieces is
        told at once if it would wait beyond its deadline; a piece may find others who wait for longer."""
        if self._config.max_requests_per_second is None:
            return
        sender = Sender(level, piece)
        try:
            while (delay := self._scheduler.charge(sender)) > 0:
                if race is None and not patience.outlasts(delay):
                    raise DeadlineExceeded("max_requests_per_second allows another request only after the deadline")
                with contextlib.nullcontext() if race is None else race.resting(self._clock):
                    patience.sleep(delay)
        except BaseException:
            self._scheduler.forgo(sender)
            raise

    def _pace(self, size: int, piece: Piece, patience: Patience, race: Race) -> None:
        """Bytes of a piece have come: rest, before more are read, for as long as others go first or the rate wants."""
        delay = self._note_bytes(size, piece, race.endpoint, spent=race.spent())
        if delay > 0 or self._scheduler.gives_way(piece):
            with race.resting(self._clock):
                self._scheduler.give_way(piece)
                patience.sleep(delay)

    def _note_bytes(self, size: int, piece: Piece | None, endpoint: int, *, spent: float = 0.0) -> float:
        """Bytes have come; gives the seconds until more may be read."""
        delay = self._scheduler.record(size, piece, lane=endpoint, spent=spent)
        self._heard(endpoint)
        if (rises := self._scheduler.rises) != self._rises:
            self._rises = rises
            self._on_rise()
        return delay

    # -- how endpoints do

    def arrived(self, path: str, answer: Answer, endpoint: int) -> None:
        """An endpoint has answered for an object."""
        self._heard(endpoint)
        with self._lock:
            self._versions.note(path, answer.head.validator, self._clock())
            self.requests += answer.requests

    def failed(self, shares: list[Share], error: NetworkError, endpoint: int, since: float) -> bool:
        """An endpoint has failed to bring a piece that was begun at ``since``; True if that is not the last word, and
        it may be asked again."""
        _log.info("%s failed: %s", redact_url(self._config.endpoints[endpoint].url), error)
        is_crowded = self._is_crowded(shares, error, endpoint, since)
        with self._lock:
            if is_crowded:
                self._routes.released(endpoint)
            is_passing = is_crowded or self._report(endpoint, error)
            if not is_passing and silence_of(error) > _SHORTER_THAN_TO_MOVE:
                is_passing = self._alternative(shares, endpoint) is not None
            self._changed.notify_all()
        if is_crowded:
            self._closing.wait(_CROWDED)
        return is_passing

    def blame(self, endpoint: int, error: NetworkError) -> None:
        """What an endpoint brought was not what it should be."""
        with self._lock:
            self._report(endpoint, error)

    def redacted(self, path: str, endpoint: int) -> str:
        """The address of an object at an endpoint, as it may be told."""
        return redact_url(self._config.endpoints[endpoint].url_of(path))

    def _heard(self, endpoint: int) -> None:
        """The endpoint is there: those who wait for it need not any longer."""
        now = self._clock()
        if self._routes.is_known_well(endpoint, now):  # a glance without the lock, for which every block would queue
            return
        with self._lock:
            self._routes.answered(endpoint, now)
            self._changed.notify_all()

    def _note_retry(self, error: NetworkError, endpoint: int) -> None:
        _log.info("%s is asked again: %s", redact_url(self._config.endpoints[endpoint].url), error)
        with self._lock:
            self.retries += 1
        if isinstance(error, RateLimited | Timeout):
            self._scheduler.refused(endpoint)

    def _is_crowded(self, shares: list[Share], error: NetworkError, endpoint: int, since: float) -> bool:
        """Whether the endpoint has refused a piece while it serves others: that was one too many. It does not ask
        again by itself, but gives its connection up; it is asked for again when fewer are, and nobody is to blame."""
        if not is_refusal(error):
            return False
        with self._lock:
            if self._served_at[endpoint] >= since:
                return True
            others = [race for race in self._races if race.endpoint == endpoint and race.shares is not shares]
            return any(race.is_served for race in others)

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


def _are_given_up(shares: list[Share]) -> bool:
    """Whether nobody wants any of these. A loop, as it is asked with every block."""
    for share in shares:  # noqa: SIM110
        if not share.attempt.abandoned:
            return False
    return True


def _known_size(request: LoadRequest) -> int | None:
    return request.expected_size if request.byte_range is None else None
