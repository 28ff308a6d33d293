"""The threads: one load for all who ask, failover, restarts, deadlines, and an end to everything.

First with a scripted line in the client's place, where the order of events is the subject; then over real sockets.
"""

from __future__ import annotations

import concurrent.futures
import gc
import hashlib
import logging
import os
import queue
import random
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wire
from wire import HOLD, RESET, Request, Wire, answer, black_hole, chunked, closed_port, part

from holotensor_net.config import CacheConfig, CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.books import Books, identity_of
from holotensor_net.engine.fetcher import Fetcher
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.engine.loads import Share
from holotensor_net.engine.request_cache import Destination, RequestCache
from holotensor_net.engine.scheduler import Part, Scheduler
from holotensor_net.errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    NetworkError,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RangeNotSupported,
    RateLimited,
    RetriesExhausted,
    Timeout,
)
from holotensor_net.origin import Behaviour, Origin, OriginProcess
from holotensor_net.storage.cache import FragmentCache
from holotensor_net.storage.memory import MemoryPart
from holotensor_net.transport.client import Answer, Ask
from holotensor_net.values import (
    HeadInfo,
    LoadFailure,
    LoadRequest,
    LoadResult,
    LoadSuccess,
    Priority,
    RangeRequest,
    Validator,
)

CHUNK = 4096
V1 = Validator('"v1"', None, True)
V2 = Validator('"v2"', None, True)
WEAK = Validator('W/"v1"', None, False)
OLD = random.Random(1).randbytes(3 * CHUNK)
NEW = random.Random(2).randbytes(3 * CHUNK)
NEVER = 5.0  # seconds after which a test that waits has failed


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def pinned(size: int = len(OLD), **fields: Any) -> LoadRequest:
    """A request whose pieces may all be asked for at once."""
    return LoadRequest("id", "file", byte_range=RangeRequest(0, size), validator=V1, **fields)


# --- the scripted line


@dataclass(eq=False)
class Call:
    """One transfer that the fetcher has begun: a test says how it goes, the worker's thread obeys."""

    endpoint: int
    ask: Ask
    _open: Callable[..., Any]
    _patience: Any
    _on_bytes: Callable[[int], None]
    _orders: queue.Queue[Callable[[], Answer | None]] = field(default_factory=queue.Queue)

    def run(self) -> Answer:
        while True:
            self._patience.check()
            try:
                result = self._orders.get(timeout=0.005)()
            except queue.Empty:
                continue
            if result is not None:
                return result

    @property
    def bounds(self) -> tuple[int, int]:
        assert self.ask.byte_range is not None
        return self.ask.byte_range.start, self.ask.byte_range.stop

    def answer(self, data: bytes, validator: Validator = V1, *, size: int | None = -1, whole: bool = False) -> None:
        """Deliver what was asked for, out of an object that is ``data``."""
        self._orders.put(lambda: self._deliver(data, validator, len(data) if size == -1 else size, whole))

    def fail(self, error: Exception, after: bytes = b"", validator: Validator = V1) -> None:
        """Fail, after a beginning of what was asked for has come."""

        def order() -> None:
            if after:
                start = self.ask.byte_range.start if self.ask.byte_range else 0
                self._open(HeadInfo(len(OLD), validator), None)(start, memoryview(after))
            raise error

        self._orders.put(order)

    def not_modified(self, validator: Validator = V1) -> None:
        self._orders.put(
            lambda: Answer(HeadInfo(None, validator, headers={"etag": validator.etag or ""}), None, True, 1)
        )

    def do(self, work: Callable[[], object]) -> None:
        """Do it on the worker's thread, in the middle of the transfer."""
        self._orders.put(lambda: (work(), None)[1])

    def receive(self, size: int) -> None:
        """Have so many bytes arrive that are never looked at."""
        self.do(lambda: self._on_bytes(size))

    def _deliver(self, data: bytes, validator: Validator, size: int | None, whole: bool) -> Answer:
        wanted = None if whole else self.ask.byte_range
        start, stop = (wanted.start, min(wanted.stop, len(data))) if wanted is not None else (0, len(data))
        head = HeadInfo(size, validator)
        if start < stop:
            write = self._open(head, RangeRequest(start, stop))
            middle = (start + stop) // 2
            for low, high in ((start, middle), (middle, stop)):
                write(low, memoryview(data)[low:high])
                self._on_bytes(high - low)
        return Answer(head, RangeRequest(start, stop), False, 1)


class Line:
    """A client whose transfers go as the test says, one by one."""

    may_begin = False

    def __init__(self, endpoint: int, calls: queue.Queue[Call]) -> None:
        self._endpoint = endpoint
        self._calls = calls

    def transfer(
        self,
        ask: Ask,
        open_sink: Any,
        patience: Any,
        *,
        on_bytes: Any,
        **_: Any,
    ) -> Answer:
        call = Call(self._endpoint, ask, open_sink, patience, on_bytes)
        self._calls.put(call)
        return call.run()

    def close(self) -> None:
        pass


class Bench:
    """A fetcher with scripted lines, and all that it stands on."""

    def __init__(self, cache: FragmentCache, supports_range: tuple[bool, ...], **settings: Any) -> None:
        fixed: dict[str, Any] = {"chunk_size": CHUNK, "monitor_bandwidth": False, "max_concurrent": 8}
        endpoints = [
            CdnEndpoint(f"https://cdn{n}.example.com", supports_range=does) for n, does in enumerate(supports_range)
        ]
        config = NetworkConfig(endpoints=tuple(endpoints), **(fixed | settings))
        self.scheduler = Scheduler(config)
        self.requests = RequestCache(cache, config.endpoints)
        self.fetcher = Fetcher(config, self.scheduler, self.requests)
        self.calls: queue.Queue[Call] = queue.Queue()
        self.fetcher._courier._clients = [Line(index, self.calls) for index in range(len(config.endpoints))]  # type: ignore[misc]

    def submit(self, request: LoadRequest, **options: Any) -> Future[LoadResult]:
        return self.fetcher.submit(request, **options)

    def call(self) -> Call:
        """The next transfer that begins."""
        return self.calls.get(timeout=NEVER)

    def call_for(self, *starts: int) -> list[Call]:
        """The next transfers, by where their ranges start."""
        found = {call.bounds[0]: call for call in (self.call() for _ in starts)}
        return [found[start] for start in starts]

    def is_quiet(self) -> bool:
        """Whether nothing is under way and nothing is left in the books."""
        fetcher = self.fetcher
        return not (fetcher._books or fetcher._books._by_name or self.scheduler.queue_len or self.scheduler._parked)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with ExitStack() as running:

        def make(
            endpoints: int = 1,
            *,
            supports_range: tuple[bool, ...] = (),
            cache: FragmentCache | None = None,
            **settings: Any,
        ) -> Bench:
            cache = cache or FragmentCache(CacheConfig(directory=tmp_path / "cache"))
            made = Bench(cache, supports_range or (True,) * endpoints, **settings)
            running.callback(made.fetcher.close)
            return made

        yield make


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads are switched a thousand times as often, so that what can come between two steps does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def got(future: Future[LoadResult]) -> bytes:
    """The bytes that a future ends in; raises what it failed with."""
    return bytes(future.result(NEVER).data)


def test_all_pieces_of_a_pinned_version_are_asked_for_at_once_and_by_that_version(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(pinned())
    calls = it.call_for(0, CHUNK, 2 * CHUNK)
    assert [call.bounds for call in calls] == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 3 * CHUNK)]
    assert [call.ask.pinned for call in calls] == [V1] * 3
    for call in reversed(calls):
        assert not future.done()
        call.answer(OLD)
    assert got(future) == OLD
    assert it.is_quiet()


def test_what_follows_the_first_piece_is_asked_for_by_its_version(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    first = it.call()
    assert (first.ask.pinned, first.ask.size, first.ask.or_whole) == (None, None, True)
    first.answer(OLD)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        assert (call.ask.pinned, call.ask.size, call.ask.or_whole) == (V1, len(OLD), False)
        call.answer(OLD)
    result = future.result(NEVER)
    assert bytes(result.data) == OLD
    assert isinstance(result, LoadSuccess)
    assert result.head is not None
    assert (result.head.size, result.head.validator, result.from_cache) == (len(OLD), V1, False)


def test_without_a_strong_validator_all_comes_in_one_answer(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD, WEAK)
    second = it.call()
    assert (second.bounds, second.ask.or_whole) == ((0, len(OLD)), True)
    second.answer(NEW, replace(WEAK, etag='W/"v2"'))
    result = future.result(NEVER)
    assert bytes(result.data) == NEW
    assert isinstance(result, LoadSuccess)
    assert result.head is not None
    assert result.head.etag == 'W/"v2"'  # what is told is of the bytes, not of those thrown away


# --- one load for all who ask


def test_equal_requests_share_one_load_and_one_future(bench: Callable[..., Bench]) -> None:
    it = bench()
    futures = [it.submit(LoadRequest("id", "file")) for _ in range(3)]
    assert futures[0] is futures[1] is futures[2]
    it.call().answer(OLD[:10])
    assert got(futures[0]) == OLD[:10]
    assert it.calls.empty()


def test_the_same_bytes_by_other_names_share_one_load(bench: Callable[..., Bench]) -> None:
    it = bench()
    names = ["a", "b", "ä/../\0", "a" * 10_000]
    futures = [it.submit(LoadRequest(name, "file")) for name in names]
    assert len(set(futures)) == len(names)
    it.call().answer(OLD[:10])
    results = [future.result(NEVER) for future in futures]
    assert [result.fragment_id for result in results] == names
    assert all(result.data == OLD[:10] for result in results)
    assert it.calls.empty()
    assert it.is_quiet()


def test_a_failure_is_told_to_each_by_its_name(bench: Callable[..., Bench]) -> None:
    it = bench()
    futures = [it.submit(LoadRequest(name, "file")) for name in "ab"]
    it.call().fail(NotFound("gone"))
    assert [future.result(NEVER).fragment_id for future in futures] == ["a", "b"]
    assert all(isinstance(future.result().error, NotFound) for future in futures)


DISTINCT: list[dict[str, Any]] = [
    {},
    {"path": "other"},
    {"byte_range": RangeRequest(0, 5)},
    {"checksum": sha256(b"")},
    {"validator": V1},
    {"expected_size": 5},
    {"allow_short": True},
]


def test_requests_that_could_end_differently_share_nothing(bench: Callable[..., Bench]) -> None:
    it = bench()
    futures = [it.submit(LoadRequest("id", **({"path": "file"} | fields))) for fields in DISTINCT]
    assert len(set(futures)) == len(DISTINCT)
    calls = [it.call() for _ in DISTINCT]
    for call in calls:
        call.fail(NotFound())
    assert all(isinstance(future.result(NEVER), LoadFailure) for future in futures)


def test_a_future_of_one_s_own_is_shared_with_nobody(bench: Callable[..., Bench]) -> None:
    it = bench()
    shared, own, other = (it.submit(LoadRequest("id", "file"), shared=is_shared) for is_shared in (True, False, True))
    assert shared is other is not own
    call = it.call()
    assert own.cancel()
    call.answer(OLD[:10])
    assert got(shared) == OLD[:10]


def test_a_cancelled_future_is_not_handed_out_again(bench: Callable[..., Bench]) -> None:
    it = bench()
    first = it.submit(LoadRequest("id", "file"))
    other = it.submit(LoadRequest("other", "file"))
    first.cancel()
    again = it.submit(LoadRequest("id", "file"))
    assert again is not first
    it.call().answer(OLD[:10])
    assert got(again) == got(other) == OLD[:10]


def test_who_joins_with_more_urgency_takes_exactly_that_load_along(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    blocker = it.submit(LoadRequest("blocker", "blocker"))
    blocking = it.call()
    critical = it.submit(LoadRequest("id", "one", priority=Priority.CRITICAL))  # of the same name
    bulk = it.submit(LoadRequest("id", "two", priority=Priority.LOW))
    middle = it.submit(LoadRequest("middle", "three", priority=Priority.NORMAL))
    joined = it.submit(LoadRequest("joined", "two", priority=Priority.HIGH))
    late = it.submit(LoadRequest("late", "one", priority=Priority.IDLE))  # lowers nothing
    blocking.answer(OLD[:1])
    order = []
    for _ in range(3):
        call = it.call()
        order.append(call.ask.path)
        call.answer(OLD[:1])
    assert order == ["one", "two", "three"]
    concurrent.futures.wait([blocker, critical, bulk, middle, joined, late], NEVER)


# --- changes of mind


def test_cancelling_one_name_leaves_the_others_of_the_load_alone(bench: Callable[..., Bench]) -> None:
    it = bench()
    a, b = (it.submit(LoadRequest(name, "file")) for name in "ab")
    call = it.call()
    assert it.fetcher.cancel("a") is True
    assert isinstance(a.result(NEVER).error, Cancelled)
    assert it.fetcher.cancel("a") is False
    assert it.fetcher.update_priority("a", Priority.HIGH) is False
    assert it.fetcher.update_priority("b", Priority.HIGH) is True
    call.answer(OLD[:10])
    assert got(b) == OLD[:10]
    assert it.is_quiet()


def test_cancelling_the_last_stops_the_transfer(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    it.call()  # which never ends by itself
    assert it.fetcher.cancel("id") is True
    assert isinstance(future.result(0).error, Cancelled)
    assert it.is_quiet()
    _until(lambda: it.scheduler.active == 0)


def test_a_cancelled_future_counts_as_done_for_whoever_waits(bench: Callable[..., Bench]) -> None:
    it = bench()
    future, other = it.submit(LoadRequest("id", "file")), it.submit(LoadRequest("other", "file2"))
    assert future.cancel()
    done, _ = concurrent.futures.wait([future], NEVER)
    assert done == {future}
    assert next(concurrent.futures.as_completed([future, other], NEVER)) is future
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert it.fetcher.cancel("id") is False


def test_what_has_ended_cannot_be_cancelled(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    assert not future.cancel()
    assert it.fetcher.cancel("id") is False


def test_cancelling_one_of_several_joined_neighbours_leaves_the_others_alone(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    blocker = it.submit(LoadRequest("blocker", "blocker"))
    blocking = it.call()
    a, b, c = (
        it.submit(LoadRequest(str(start), "file", byte_range=RangeRequest(start, start + 100)))
        for start in (0, 100, 200)
    )
    blocking.answer(OLD[:1])
    call = it.call()
    assert call.bounds == (0, 300)
    it.fetcher.cancel("100")
    call.answer(OLD)
    assert (got(a), got(c)) == (OLD[:100], OLD[200:300])
    assert isinstance(b.result(NEVER).error, Cancelled)
    assert got(blocker)
    assert it.is_quiet()


def test_neighbours_that_came_together_share_memory(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    it.submit(LoadRequest("blocker", "blocker"))
    blocking = it.call()
    starts = (0, 100, 200)
    futures = [it.submit(LoadRequest(str(s), "file", byte_range=RangeRequest(s, s + 100))) for s in starts]
    blocking.answer(OLD[:1])
    it.call().answer(OLD)
    views = [future.result(NEVER).data for future in futures]
    assert views == [OLD[start : start + 100] for start in starts]
    assert len({id(view.obj) for view in views}) == 1


@pytest.mark.parametrize(("apart", "is_shared"), [(0, True), (40, True), (60, False)])
def test_memory_is_not_shared_where_much_of_it_would_be_for_what_lies_between(
    bench: Callable[..., Bench], apart: int, is_shared: bool
) -> None:
    assembly = bench().fetcher._assembly
    spans = [RangeRequest(start, start + 100) for start in range(0, 3 * (100 + apart), 100 + apart)]
    requests = [LoadRequest(str(span.start), "file", byte_range=span) for span in spans]
    loads = [Books().open(request, identity_of(request), None, 0.0, whole=False) for request in requests]
    parts = [Part(load, load.request.byte_range, None) for load in loads]  # type: ignore[arg-type]
    shares = [Share(load, load.attempt, part) for load, part in zip(loads, parts, strict=True)]
    assert (assembly._common(shares, spans) is not None) is is_shared


def test_the_neighbours_of_one_that_cannot_be_had_arrive(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    blocker = it.submit(LoadRequest("blocker", "blocker"))
    blocking = it.call()
    good, bad = (
        it.submit(LoadRequest(str(start), "file", byte_range=RangeRequest(start, start + 100))) for start in (0, 100)
    )
    blocking.answer(OLD[:1])
    call = it.call()
    assert call.bounds == (0, 200)
    call.fail(HttpError(416, "the object ends at 100"))
    for _ in range(2):
        alone = it.call()
        if alone.bounds == (0, 100):
            alone.answer(OLD[:100])
        else:
            alone.fail(HttpError(416, "the object ends at 100"))
    assert got(good) == OLD[:100]
    assert isinstance(bad.result(NEVER).error, HttpError)
    assert got(blocker)


def test_a_queue_that_is_cleared_leaves_nobody_waiting(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    begun = it.submit(LoadRequest("begun", "begun"))
    call = it.call()
    queued = it.submit(LoadRequest("queued", "queued"))
    it.scheduler.clear()
    assert isinstance(queued.result(NEVER).error, Cancelled)
    call.answer(OLD[:10])
    assert got(begun) == OLD[:10]


def test_what_others_put_into_the_queue_holds_nothing_up(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    it.scheduler.enqueue(LoadRequest("foreign", "foreign"))
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    _until(lambda: it.scheduler.active == 0)
    it.scheduler.enqueue(LoadRequest("foreign", "foreign"))
    it.scheduler.clear()


def test_only_levels_are_levels(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.submit(LoadRequest("id", "file"))
    with pytest.raises(ConfigurationError):
        it.fetcher.update_priority("id", 9)  # type: ignore[arg-type]


def test_priority_reaches_what_is_between_two_pieces(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    slow = it.submit(LoadRequest("slow", "slow", priority=Priority.LOW))
    first = it.call()
    other = it.submit(LoadRequest("other", "other"))
    assert it.fetcher.update_priority("slow", Priority.CRITICAL) is True
    first.answer(OLD)
    order = []
    for _ in range(3):
        call = it.call()
        order.append(call.ask.path)
        call.answer(OLD if call.ask.path == "slow" else OLD[:1])
    assert order == ["slow", "slow", "other"]
    assert got(slow) == OLD
    assert got(other) == OLD[:1]


# --- beginning again


def test_pieces_that_fail_together_because_the_object_was_replaced_begin_again_once(
    bench: Callable[..., Bench], restless: None
) -> None:
    it, size = bench(cache=FragmentCache(CacheConfig(directory=False, memory_size=0))), 9 * CHUNK
    old, new, together = OLD * 3, NEW * 3, threading.Barrier(8)
    for _ in range(20):
        future = it.submit(LoadRequest("id", "file"))
        it.call().answer(old)
        for call in [it.call() for _ in range(8)]:
            call.do(partial(together.wait, NEVER))
            call.fail(ObjectChanged("replaced"))
        it.call().answer(new, V2)
        for call in it.call_for(*range(CHUNK, size, CHUNK)):
            assert call.ask.pinned == V2
            call.answer(new, V2)
        assert got(future) == new


def test_an_object_that_is_replaced_again_and_again_is_given_up(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    for _ in range(2):
        it.call().fail(ObjectChanged("replaced"))
    assert isinstance(future.result(NEVER).error, ObjectChanged)
    assert it.calls.empty()


def test_a_pinned_object_that_is_replaced_is_given_up_at_once(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(pinned(10))
    it.call().fail(ObjectChanged("replaced"))
    assert isinstance(future.result(NEVER).error, ObjectChanged)
    assert it.calls.empty()


@pytest.mark.parametrize("validator", [replace(WEAK, etag='W/"v2"'), Validator('"v2"', None, True)])
def test_a_version_that_is_weakly_pinned_is_held_to_as_far_as_can_be(
    bench: Callable[..., Bench], validator: Validator
) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, 10), validator=WEAK))
    it.call().answer(NEW, validator)
    assert isinstance(future.result(NEVER).error, ObjectChanged)
    assert it.calls.empty()


def test_a_piece_that_was_taken_before_its_load_began_again_is_dropped(bench: Callable[..., Bench]) -> None:
    """Were it booked to the new attempt, its bytes would count twice, and others of them would be missing."""
    it = bench(max_concurrent=2, endpoints=2)
    blockers = [it.submit(LoadRequest(name, name)) for name in "xy"]
    blocking = [it.call() for _ in blockers]
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, len(OLD)), checksum=sha256(OLD)))
    it.scheduler.lanes[0].active -= 1  # a worker that is very slow between taking a piece and beginning it
    late = it.scheduler.next()
    assert late is not None
    assert late.byte_range == RangeRequest(0, CHUNK)
    blocking[0].answer(OLD[:1])
    failing = it.call()
    failing.fail(CacheError("the disk is full"))  # all begins again, in memory
    it.call().answer(OLD)
    it.fetcher._run(late)
    blocking[1].answer(OLD[:1])
    for call in (it.call() for _ in range(2)):
        call.answer(OLD)
    assert got(future) == OLD
    assert it.calls.empty()
    assert all(got(blocker) for blocker in blockers)


def test_no_answer_holds_the_whole_while_other_pieces_are_on_their_way(bench: Callable[..., Bench]) -> None:
    """It would be verified and handed out while they still write to it."""
    it = bench()
    request = LoadRequest("id", "file", expected_size=len(OLD), checksum=sha256(OLD))
    future = it.submit(request)
    calls = it.call_for(0, CHUNK, 2 * CHUNK)
    assert not any(call.ask.or_whole for call in calls)
    calls[1].answer(OLD)
    for call in (calls[0], calls[2]):
        call.fail(RangeNotSupported("the whole came"))
    whole = it.call()
    assert (whole.ask.byte_range, whole.ask.size) == (None, len(OLD))
    whole.answer(OLD, whole=True)
    assert got(future) == OLD
    assert it.calls.empty()


def test_a_server_that_knows_no_ranges_after_all_is_asked_for_the_whole_once(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        call.fail(RangeNotSupported("the whole came"))
    call = it.call()
    assert call.ask.byte_range is None
    call.fail(RangeNotSupported("nonsense"))
    assert isinstance(future.result(NEVER).error, RangeNotSupported)
    assert it.calls.empty()


def test_a_range_of_a_server_that_knows_none_is_given_up(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, 10)))
    it.call().fail(RangeNotSupported("the whole came"))
    assert isinstance(future.result(NEVER).error, RangeNotSupported)


def test_wrong_bytes_are_asked_for_once_more_and_no_more(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "dir/file?key=sesame", checksum=sha256(OLD[:10])))
    it.call().answer(NEW[:10])
    it.call().answer(NEW[:10])
    error = future.result(NEVER).error
    assert isinstance(error, ChecksumMismatch)
    assert (error.expected, error.actual) == (sha256(OLD[:10]), sha256(NEW[:10]))
    assert error.url == "https://cdn0.example.com/dir/file?…"
    assert it.calls.empty()


def test_nothing_unverified_is_kept(bench: Callable[..., Bench], tmp_path: Path) -> None:
    it = bench()
    request = LoadRequest("id", "file", checksum=sha256(OLD[:10]))
    future = it.submit(request)
    for _ in range(2):
        it.call().answer(NEW[:10])
    assert future.result(NEVER).error is not None
    assert it.requests.find(request) is None
    _until(lambda: not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size])


def test_cached_bytes_that_are_gone_once_they_are_confirmed_are_fetched(bench: Callable[..., Bench]) -> None:
    cache = FragmentCache(CacheConfig(directory=False))
    it = bench(cache=cache)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    held = it.requests.find(LoadRequest("id", "file"))
    assert held is not None
    again = it.submit(LoadRequest("id", "file"), held=held)
    asked = it.call()
    assert asked.ask.held == V1
    cache.clear()
    asked.not_modified()
    plain = it.call()
    assert plain.ask.held is None
    plain.answer(OLD[:10])
    assert got(again) == OLD[:10]
    assert it.fetcher.stats().confirmed_bytes == 0


def test_confirmed_bytes_come_from_the_cache(bench: Callable[..., Bench]) -> None:
    it = bench()
    first = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(first) == OLD[:10]
    again = it.submit(LoadRequest("id", "file"), held=it.requests.find(LoadRequest("id", "file")))
    it.call().not_modified()
    result = again.result(NEVER)
    assert (bytes(result.data), result.from_cache) == (OLD[:10], True)
    assert it.fetcher.stats().confirmed_bytes == 10


@pytest.mark.parametrize("error", [RateLimited(), RetriesExhausted(4, RateLimited())])
def test_who_was_one_too_many_is_asked_for_again(bench: Callable[..., Bench], error: NetworkError) -> None:
    it = bench()
    future = it.submit(pinned(2 * CHUNK))
    first, second = it.call_for(0, CHUNK)
    is_served = threading.Event()
    first.do(lambda: first._open(HeadInfo(len(OLD), V1), None))
    first.do(is_served.set)
    assert is_served.wait(NEVER)
    for _ in range(5):
        second.fail(error)
        second = it.call()
    first.answer(OLD)
    second.answer(OLD)
    assert got(future) == OLD[: 2 * CHUNK]


@pytest.mark.parametrize("error", [RateLimited(), RateLimited(retry_after=0.5), HttpError(500)])
def test_who_is_refused_alone_or_for_a_time_fails(bench: Callable[..., Bench], error: NetworkError) -> None:
    it = bench()
    future = it.submit(pinned(2 * CHUNK))
    first, second = it.call_for(0, CHUNK)
    if error.retry_after or not isinstance(error, RateLimited):
        is_served = threading.Event()
        first.do(lambda: first._open(HeadInfo(len(OLD), V1), None))
        first.do(is_served.set)
        assert is_served.wait(NEVER)
    second.fail(error)
    with pytest.raises(type(error)):
        got(future)


def test_only_who_gave_a_validator_is_asked_to_confirm_it(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    first = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(first) == OLD[:10]
    held = it.requests.find(LoadRequest("id", "file"))
    again = it.submit(LoadRequest("id", "file"), held=held)
    call = it.call()
    assert (call.endpoint, call.ask.held) == (0, V1)
    call.fail(ConnectionFailed("refused"))
    # It has answered before: it is an outage, so the load goes on, at the other endpoint.
    other = it.call()
    assert (other.endpoint, other.ask.held) == (1, None)
    other.answer(NEW[:10], V2)
    assert got(again) == NEW[:10]


# --- elsewhere


def test_what_has_come_is_kept_where_the_next_endpoint_has_the_same_version(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        call.fail(ProtocolError("nonsense"))
    for call in it.call_for(CHUNK, 2 * CHUNK):
        assert (call.endpoint, call.ask.pinned) == (1, V1)
        call.answer(OLD)
    assert got(future) == OLD


def test_what_has_come_is_dropped_where_nothing_proves_that_it_belongs_to_the_rest(
    bench: Callable[..., Bench],
) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD, WEAK)
    it.call().fail(ProtocolError("nonsense"))
    first = it.call()
    assert (first.endpoint, first.bounds, first.ask.size) == (1, (0, CHUNK), None)
    first.answer(NEW, V2)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        call.answer(NEW, V2)
    assert got(future) == NEW


def test_during_an_outage_what_came_from_elsewhere_is_dropped_too(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD, WEAK)
    call = it.call()
    assert call.endpoint == 0
    call.fail(ConnectionFailed("refused"))
    first = it.call()
    assert (first.endpoint, first.bounds) == (1, (0, CHUNK))
    first.answer(NEW[:10], V2)
    assert got(future) == NEW[:10]


def test_another_version_elsewhere_means_to_begin_again_there(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD)
    failing, other = it.call_for(CHUNK, 2 * CHUNK)
    failing.fail(ProtocolError("nonsense"))
    there = it.call()
    assert (there.endpoint, there.ask.pinned) == (1, V1)
    there.fail(ObjectChanged("412"))
    first = it.call()
    assert (first.endpoint, first.ask.pinned, first.bounds) == (1, None, (0, CHUNK))
    first.answer(NEW, V2)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        assert (call.endpoint, call.ask.pinned) == (1, V2)
        call.answer(NEW, V2)
    assert got(future) == NEW
    other.answer(OLD)  # too late: nobody listens


def test_a_digest_lets_pieces_of_two_endpoints_be_combined(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, len(OLD)), checksum=sha256(OLD)))
    first, second, third = it.call_for(0, CHUNK, 2 * CHUNK)
    first.answer(OLD, V1)
    third.answer(OLD, V1)
    second.fail(NotFound("not here"))
    elsewhere = it.call()
    assert (elsewhere.endpoint, elsewhere.bounds, elsewhere.ask.pinned) == (1, (CHUNK, 2 * CHUNK), None)
    elsewhere.answer(OLD, V2)
    assert got(future) == OLD


def test_all_that_failed_is_told_in_the_end(bench: Callable[..., Bench]) -> None:
    it = bench(3)
    future = it.submit(LoadRequest("id", "file"))
    it.call().fail(NotFound("gone", url="https://cdn0.example.com/file"))
    it.call().fail(ProtocolError("nonsense", attempts=4))
    it.call().fail(NotFound("gone"))
    error = future.result(NEVER).error
    assert isinstance(error, RetriesExhausted)
    assert isinstance(error.last_error, NotFound)
    assert error.attempts == 6
    assert "https://cdn0.example.com/file: gone; an endpoint: nonsense; an endpoint: gone" in str(error)


def test_the_last_error_stands_for_all_that_say_the_same(bench: Callable[..., Bench]) -> None:
    it = bench(2)
    future = it.submit(LoadRequest("id", "file"))
    it.call().fail(NotFound("gone"))
    it.call().fail(NotFound("gone there too"))
    error = future.result(NEVER).error
    assert isinstance(error, NotFound)
    assert str(error) == "gone there too"


def test_an_endpoint_without_ranges_comes_last_and_is_asked_for_the_whole(bench: Callable[..., Bench]) -> None:
    it = bench(supports_range=(False, True))
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(100, 200)))
    ranged = it.call()
    assert (ranged.endpoint, ranged.bounds) == (1, (100, 200))
    ranged.fail(NotFound("gone"))
    whole = it.call()
    assert (whole.endpoint, whole.ask.byte_range) == (0, None)
    whole.answer(OLD, whole=True)
    assert got(future) == OLD[100:200]


def test_an_endpoint_without_ranges_serves_where_the_others_cannot_be_reached(bench: Callable[..., Bench]) -> None:
    it = bench(supports_range=(True, False))
    first = it.submit(LoadRequest("id", "file"))
    it.call().fail(ConnectionFailed("refused"))
    whole = it.call()
    assert (whole.endpoint, whole.ask.byte_range) == (1, None)
    whole.answer(OLD, whole=True)
    assert got(first) == OLD


def test_without_any_ranges_each_fragment_is_cut_out_of_the_whole(bench: Callable[..., Bench]) -> None:
    it = bench(supports_range=(False,))
    wanted = [(0, 1), (10, 20), (CHUNK - 1, 3 * CHUNK), (0, 3 * CHUNK)]
    futures = [it.submit(LoadRequest(str(b), "file", byte_range=RangeRequest(*b))) for b in wanted]
    for _ in wanted:
        call = it.call()
        assert call.ask.byte_range is None
        call.answer(OLD, whole=True)
    assert [got(future) for future in futures] == [OLD[start:stop] for start, stop in wanted]


@pytest.mark.parametrize("validator", [V1, WEAK])
@pytest.mark.parametrize(
    ("bounds", "allow_short", "expected"),
    [
        ((5, 10), False, slice(5, 10)),
        ((5, 15), True, slice(5, 10)),
        ((20, 30), True, slice(0, 0)),
        ((5, 15), False, None),
        ((20, 30), False, None),
    ],
)
def test_an_object_whose_end_tells_its_size_is_delivered_as_far_as_it_goes(
    bench: Callable[..., Bench],
    validator: Validator,
    bounds: tuple[int, int],
    allow_short: bool,
    expected: slice | None,
) -> None:
    it = bench(supports_range=(False,))
    request = LoadRequest("id", "file", byte_range=RangeRequest(*bounds), allow_short=allow_short)
    future = it.submit(request)
    it.call().answer(OLD[:10], validator, size=None, whole=True)
    if expected is not None:
        assert got(future) == OLD[expected]
        return
    error = future.result(NEVER).error
    assert isinstance(error, HttpError)
    assert error.status == 416


def test_what_grew_in_a_first_go_does_not_stick_out_of_the_second(bench: Callable[..., Bench]) -> None:
    it = bench(supports_range=(False,))
    future = it.submit(LoadRequest("id", "file"))
    call = it.call()

    def order() -> Answer:
        write = call._open(HeadInfo(None, WEAK), None)
        write(0, memoryview(OLD[:500]))  # then the connection is cut, and the client begins anew
        write(0, memoryview(NEW[:100]))
        return Answer(HeadInfo(None, WEAK), RangeRequest(0, 100), False, 2)

    call._orders.put(order)
    result = future.result(NEVER)
    assert bytes(result.data) == NEW[:100]
    assert isinstance(result, LoadSuccess)
    assert result.head is not None
    assert result.head.size == 100


SIZES_TOLD: list[tuple[str, int | None, int | None]] = [
    ("never", None, None),
    ("at last", None, 100),
    ("at first", 500, None),
]


@pytest.mark.parametrize(("first", "second"), [case[1:] for case in SIZES_TOLD], ids=[case[0] for case in SIZES_TOLD])
@pytest.mark.parametrize("validators", [(V1, V1), (WEAK, WEAK), (V1, V2)], ids=["same", "weak", "another"])
@pytest.mark.parametrize("cached", [True, False], ids=["disk", "memory"])
def test_a_size_that_is_told_late_or_only_once_is_no_reason_for_wrong_bytes(
    bench: Callable[..., Bench],
    first: int | None,
    second: int | None,
    validators: tuple[Validator, Validator],
    cached: bool,
) -> None:
    """A body that is cut after 50 bytes, and another that comes to its end: within one transfer, as the client does."""
    it = bench(cache=None if cached else FragmentCache(CacheConfig(directory=False)))
    future = it.submit(LoadRequest("id", "file"))
    call = it.call()

    def order() -> Answer:
        write = call._open(HeadInfo(first, validators[0]), None)
        write(0, memoryview(OLD[: first or 500]))
        write(0, memoryview(NEW[:100]))
        return Answer(HeadInfo(second, validators[1]), RangeRequest(0, 100), False, 2)

    call._orders.put(order)
    result = future.result(NEVER)
    assert bytes(result.data) == NEW[:100]
    assert isinstance(result, LoadSuccess)
    assert result.head is not None
    assert (result.head.size, result.head.validator) == (100, validators[1])


def test_an_object_that_is_longer_than_was_told_is_fetched_anew(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    call = it.call()

    def order() -> Answer:
        call._open(HeadInfo(100, WEAK), None)(0, memoryview(NEW[:500]))
        return Answer(HeadInfo(None, WEAK), RangeRequest(0, 500), False, 2)

    call._orders.put(order)
    it.call().answer(NEW[:500])
    assert got(future) == NEW[:500]


def test_an_object_that_comes_in_parts_after_all_is_asked_for_whole(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    call = it.call()

    def order() -> Answer:
        write = call._open(HeadInfo(None, V1), None)
        write(0, memoryview(OLD[:CHUNK]))
        return Answer(HeadInfo(len(OLD), V1), RangeRequest(0, CHUNK), False, 2)

    call._orders.put(order)
    whole = it.call()
    assert whole.ask.byte_range is None
    whole.answer(OLD, whole=True)
    assert got(future) == OLD


def test_a_range_that_is_refused_once_it_was_begun_is_asked_for_anew_once(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        call.fail(HttpError(416, "no such range"))
    it.call().answer(OLD)
    for call in it.call_for(CHUNK, 2 * CHUNK):
        call.fail(HttpError(416, "no such range"))
    error = future.result(NEVER).error
    assert isinstance(error, HttpError)
    assert error.status == 416


# --- an outage


def test_a_server_that_was_there_is_waited_for(bench: Callable[..., Bench]) -> None:
    it = bench()
    first = it.submit(LoadRequest("a", "a"))
    it.call().answer(OLD[:10])
    assert got(first)
    future = it.submit(LoadRequest("b", "b"))
    for _ in range(3):
        it.call().fail(ConnectionFailed("refused"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]


def test_a_server_that_never_was_there_fails_its_loads_at_once(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("a", "a"))
    it.call().fail(ConnectionFailed("refused", url="https://cdn0.example.com/a"))
    assert isinstance(future.result(NEVER).error, ConnectionFailed)
    second = it.submit(LoadRequest("b", "b"))
    assert isinstance(second.result(NEVER).error, ConnectionFailed)
    assert it.calls.empty()  # it is too soon for a probe


def test_an_outage_ends_with_the_first_byte_and_not_with_the_last(bench: Callable[..., Bench]) -> None:
    it = bench()
    first = it.submit(LoadRequest("a", "a"))
    it.call().fail(ConnectionFailed("refused"))
    assert first.result(NEVER).error is not None
    it.fetcher._courier._routes._health[0].failed_at = 0.0
    probe = it.submit(LoadRequest("b", "b"))
    probing = it.call()
    early = it.submit(LoadRequest("c", "c"))
    assert isinstance(early.result(NEVER).error, ConnectionFailed)
    probing.receive(100)
    _until(lambda: not it.fetcher._courier._routes._health[0].failures)
    other = it.submit(LoadRequest("d", "d"))
    it.call().answer(OLD[:10])
    assert got(other) == OLD[:10]
    probing.answer(OLD[:10])
    assert got(probe) == OLD[:10]


def test_a_load_that_waits_for_an_outage_to_end_can_be_cancelled(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=2)
    first = it.submit(LoadRequest("a", "a"))
    it.call().answer(OLD[:10])
    assert got(first)
    waiting = it.submit(LoadRequest("b", "b"))
    it.call().fail(ConnectionFailed("refused"))
    assert it.fetcher.cancel("b")
    assert isinstance(waiting.result(NEVER).error, Cancelled)
    _until(lambda: it.scheduler.active == 0)


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (RateLimited(), True),
        (Timeout("silent"), True),
        (NotFound("gone"), True),
        (ProtocolError("no"), False),
    ],
)
def test_an_answer_that_refuses_is_a_sign_of_life(
    bench: Callable[..., Bench], error: NetworkError, is_told: bool
) -> None:
    it = bench(2)
    health = it.fetcher._courier._routes._health[0]
    future = it.submit(LoadRequest("a", "a"))
    it.call().fail(RetriesExhausted(last_error=error))
    it.call().answer(OLD[:10])
    assert got(future)
    assert (health.answered_at is not None or health.failures > 0) is is_told


# --- deadlines


def test_a_deadline_is_kept_while_the_line_is_silent(bench: Callable[..., Bench]) -> None:
    it = bench()
    began = time.monotonic()
    future = it.submit(LoadRequest("id", "file", deadline=0.1))
    result = future.result(NEVER)
    assert isinstance(result.error, DeadlineExceeded)
    assert 0.1 <= time.monotonic() - began < 1
    assert 0.1 <= result.duration < 1
    assert it.is_quiet()


def test_a_deadline_is_kept_in_the_queue(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=1)
    it.submit(LoadRequest("blocker", "blocker"))
    it.call()
    futures = {s: it.submit(LoadRequest(str(s), str(s), deadline=s)) for s in (0.15, 0.05, 0.1)}
    for seconds, future in futures.items():
        result = future.result(NEVER)
        assert isinstance(result.error, DeadlineExceeded)
        assert seconds <= result.duration < seconds + 1
    assert it.scheduler.queue_len == 0


def test_a_deadline_of_the_configuration_bounds_every_load(bench: Callable[..., Bench]) -> None:
    it = bench(retry=RetryConfig(deadline=0.1))
    future = it.submit(LoadRequest("id", "file", deadline=60))
    assert isinstance(future.result(NEVER).error, DeadlineExceeded)


def test_who_joins_with_more_patience_gets_the_bytes(bench: Callable[..., Bench]) -> None:
    it = bench()
    impatient = it.submit(LoadRequest("id", "file", deadline=0.4))
    it.call()  # begun with no more patience than that
    patient = it.submit(LoadRequest("id", "file"))
    assert isinstance(impatient.result(NEVER).error, DeadlineExceeded)
    again = it.call()
    assert not patient.done()
    again.answer(OLD[:10])
    assert got(patient) == OLD[:10]


def test_who_joins_with_less_patience_is_told_in_time(bench: Callable[..., Bench]) -> None:
    it = bench()
    patient = it.submit(LoadRequest("id", "file"))
    call = it.call()
    impatient = it.submit(LoadRequest("id", "file", deadline=0.05))
    assert isinstance(impatient.result(NEVER).error, DeadlineExceeded)
    assert not patient.done()
    call.answer(OLD[:10])
    assert got(patient) == OLD[:10]


def test_a_deadline_that_is_not_reached_holds_no_bytes(bench: Callable[..., Bench]) -> None:
    it = bench(cache=FragmentCache(CacheConfig(directory=False, memory_size=0)))
    future = it.submit(LoadRequest("id", "file", deadline=60.0))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    known = weakref.ref(future)
    gc.collect()
    gc.disable()
    try:
        del future
        _until(lambda: known() is None)
    finally:
        gc.enable()


def test_bytes_go_as_soon_as_nobody_holds_them(bench: Callable[..., Bench]) -> None:
    """Not when the garbage is collected: a model is larger than the memory that such a delay would need."""
    it = bench(cache=FragmentCache(CacheConfig(directory=False, memory_size=0)))
    gc.collect()
    gc.disable()
    try:
        future = it.submit(pinned())
        for call in it.call_for(0, CHUNK, 2 * CHUNK):
            call.answer(OLD)
        del call
        known = weakref.ref(future)
        assert got(future) == OLD
        del future
        _until(lambda: known() is None)
    finally:
        gc.enable()


# --- defects, ours and others'


class Broken(RequestCache):
    """A cache with a defect in one place."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__(FragmentCache(CacheConfig(directory=False)), (CdnEndpoint("https://cdn.example.com"),))
        setattr(self, place, self._fail)
        self._error = error

    def _fail(self, *_: object, **__: object) -> Any:
        raise self._error


def allow_threads(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Let the machine give a pool only so many threads more."""
    start, left = threading.Thread.start, [allowed]

    def start_if_allowed(thread: threading.Thread) -> None:
        if thread.name.startswith("holotensor-fetch"):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_allowed)


def test_where_no_thread_can_be_started_it_is_said_and_the_next_load_tries_anew(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench()
    with monkeypatch.context() as patch:
        allow_threads(patch, 0)
        error = it.submit(LoadRequest("id", "file")).result(NEVER).error
    assert isinstance(error, NetworkError)
    assert "no thread could be started" in str(error)
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    _until(lambda: it.fetcher.stats().workers == 0)


def test_where_few_threads_can_be_started_they_do_all_the_work(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench()
    with monkeypatch.context() as patch:
        allow_threads(patch, 1)
        futures = [it.submit(LoadRequest(name, name)) for name in "abc"]
        for _ in futures:
            it.call().answer(OLD[:10])
        assert [got(future) for future in futures] == [OLD[:10]] * 3
        _until(lambda: it.fetcher.stats().workers == 0)
        assert it.is_quiet()


def test_a_defect_in_keeping_costs_no_bytes(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    it = bench()
    it.fetcher._cache = it.fetcher._assembly._cache = Broken("keep", ZeroDivisionError("a defect"))
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]
    assert "ZeroDivisionError" in caplog.text


def test_a_defect_that_meets_one_of_joined_neighbours_leaves_the_others_alone(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench(max_concurrent=1)
    it.submit(LoadRequest("blocker", "blocker"))
    blocking = it.call()
    starts = (0, 100, 200)
    futures = [it.submit(LoadRequest(str(s), "file", byte_range=RangeRequest(s, s + 100))) for s in starts]
    proven = it.fetcher._assembly.proven

    def fail(share: Share) -> Any:
        if share.load.request.fragment_id == "100":
            raise MemoryError
        return proven(share)

    blocking.answer(OLD[:1])
    call = it.call()
    monkeypatch.setattr(it.fetcher._assembly, "proven", fail)
    call.answer(OLD)
    assert [got(futures[0]), got(futures[2])] == [OLD[:100], OLD[200:300]]
    assert "internal error" in str(futures[1].result(NEVER).error)
    assert it.is_quiet()


def test_a_defect_of_ours_leaves_nobody_waiting(bench: Callable[..., Bench]) -> None:
    it = bench()
    it.fetcher._cache = it.fetcher._assembly._cache = Broken("destination", ZeroDivisionError("a defect"))
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    error = future.result(NEVER).error
    assert "internal error" in str(error)
    assert isinstance(error, NetworkError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    _until(lambda: it.scheduler.active == 0)
    it.fetcher._cache = it.fetcher._assembly._cache = it.requests
    again = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(again) == OLD[:10]


def test_a_disk_that_fails_again_in_memory_is_given_up(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file"))
    for _ in range(2):
        it.call().fail(CacheError("it is broken"), after=b"x")
    assert isinstance(future.result(NEVER).error, CacheError)


def test_a_callback_that_fails_harms_nobody(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    it = bench(max_concurrent=1)
    futures = [it.submit(LoadRequest(name, "file")) for name in "ab"]
    over = threading.Event()
    futures[0].add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type]
    futures[1].add_done_callback(lambda _: over.set())
    it.call().answer(OLD[:10])
    assert [got(future) for future in futures] == [OLD[:10]] * 2
    assert over.wait(NEVER)
    told = [record.name for record in caplog.records if record.levelno >= logging.ERROR]
    assert told == ["holotensor_net.engine"]


def test_a_callback_may_close_everything(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=2)
    futures = [it.submit(LoadRequest(name, name)) for name in "abcd"]
    closed = threading.Event()

    def close(_: object) -> None:
        it.fetcher.close()
        closed.set()

    futures[0].add_done_callback(close)
    calls = {call.ask.path: call for call in (it.call(), it.call())}  # two workers: either may begin first
    calls["a"].answer(OLD[:10])
    assert closed.wait(NEVER)
    assert got(futures[0]) == OLD[:10]
    assert all(isinstance(future.result(NEVER).error, Cancelled) for future in futures[1:])


class Watched(MemoryPart):
    """Memory that notices if it is thrown away while somebody reads it, or is written to afterwards."""

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.in_use = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.faults: list[str] = []
        self.is_discarded = False

    def write(self, offset: int, data: memoryview | bytes) -> None:
        if self.is_discarded:
            self.faults.append("written to after it was discarded")
        super().write(offset, data)

    def view(self) -> memoryview:
        self.in_use.set()
        self.go_on.wait(NEVER)
        if self.is_discarded:
            self.faults.append("looked at after it was discarded")
        return super().view()

    def discard(self) -> None:
        if not self.go_on.is_set():
            self.faults.append("discarded while it was looked at")
        self.is_discarded = True
        super().discard()


class Watching(RequestCache):
    def __init__(self, *, holds: bool = False) -> None:
        super().__init__(
            FragmentCache(CacheConfig(directory=False, memory_size=holds << 20)),
            (CdnEndpoint("https://cdn0.example.com"),),
        )
        self.made: list[Watched] = []
        self._holds = holds

    def destination(
        self, size: int | None, head: HeadInfo, request: LoadRequest | None = None, endpoint: int = 0
    ) -> Destination:
        made = Watched(size)
        self.made.append(made)
        if self._holds:
            made.go_on.clear()
        return made


def test_what_is_cancelled_while_it_is_verified_is_not_pulled_away(bench: Callable[..., Bench]) -> None:
    """What was kept then would be nothing at all, under the name of the fragment."""
    it, watching = bench(), Watching(holds=True)
    it.fetcher._cache = it.fetcher._assembly._cache = watching
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    _until(lambda: bool(watching.made))
    (place,) = watching.made
    assert place.in_use.wait(NEVER)
    assert future.cancel()
    place.go_on.set()
    _until(lambda: place.is_discarded)
    assert place.faults == []
    found = watching.find(LoadRequest("id", "file"))
    assert found is not None
    assert watching.data(found) == OLD[:10]


def test_nothing_is_written_to_what_is_discarded_whatever_is_cancelled_when(
    bench: Callable[..., Bench], restless: None
) -> None:
    it, watching = bench(), Watching()
    it.fetcher._cache = it.fetcher._assembly._cache = watching
    dice = random.Random(7)
    for _ in range(100):
        future = it.submit(pinned())
        calls = it.call_for(0, CHUNK, 2 * CHUNK)
        dice.shuffle(calls)
        for call in calls[: dice.randrange(4)]:
            call.answer(OLD)
        if dice.random() < 0.5:
            calls[-1].fail(ProtocolError("nonsense"))
        future.cancel()
        _until(lambda: it.scheduler.active == 0)
    assert [part.faults for part in watching.made] == [[]] * len(watching.made)
    assert all(part.is_discarded for part in watching.made)
    assert it.is_quiet()


def test_every_future_ends_whoever_cancels_resolves_or_joins_it_at_once(
    bench: Callable[..., Bench], restless: None
) -> None:
    """No lock orders these; each has to be told exactly once all the same."""
    it = bench(max_concurrent=4, cache=FragmentCache(CacheConfig(directory=False, memory_size=0)))
    stop = threading.Event()
    futures: list[Future[LoadResult]] = []
    lock = threading.Lock()

    def serve() -> None:
        dice = random.Random(1)
        while not stop.is_set():
            try:
                call = it.calls.get(timeout=0.01)
            except queue.Empty:
                continue
            if dice.random() < 0.7:
                call.answer(OLD[: call.bounds[1]])
            else:
                call.fail(ProtocolError("nonsense"))

    def ask(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(150):
            start = dice.randrange(6)
            request = LoadRequest(
                dice.choice("abc"),
                "file",
                byte_range=RangeRequest(start, start + 5),
                deadline=dice.choice([None, None, 0.001, 60.0]),
                priority=dice.choice(list(Priority)),
            )
            future = it.submit(request, shared=dice.random() < 0.5)
            with lock:
                futures.append(future)
            match dice.randrange(4):
                case 0:
                    future.cancel()
                case 1:
                    it.fetcher.cancel(dice.choice("abc"))
                case 2:
                    it.fetcher.update_priority(dice.choice("abc"), dice.choice(list(Priority)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    server = threading.Thread(target=serve)
    for thread in (*threads, server):
        thread.start()
    for thread in threads:
        thread.join(30)
    done, left = concurrent.futures.wait(futures, 10)
    stop.set()
    server.join(NEVER)
    assert not left
    good = [f.result() for f in done if not f.cancelled() and f.result().is_success]
    assert good
    assert all(len(result.data) == 5 and bytes(result.data) in OLD[:12] for result in good)
    _until(it.is_quiet)
    _until(lambda: it.scheduler.active == 0)


# --- the pool


def test_there_are_no_more_workers_than_the_limit_and_none_when_idle(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=3)
    futures = [it.submit(LoadRequest(str(n), str(n))) for n in range(5)]
    calls = [it.call() for _ in range(3)]
    assert it.calls.empty()
    assert it.fetcher.stats().workers == 3
    calls[0].answer(OLD[:1])
    calls.append(it.call())
    for call in calls[1:]:
        call.answer(OLD[:1])
    it.call().answer(OLD[:1])
    assert all(got(future) for future in futures)
    _until(lambda: it.fetcher.stats().workers == 0)
    assert it.fetcher.stats().requests == 5


def test_while_a_long_fragment_is_verified_another_has_its_connection(bench: Callable[..., Bench]) -> None:
    it, watching, data = bench(max_concurrent=1, chunk_size=1 << 20), Watching(holds=True), bytes(1 << 20)
    it.fetcher._cache = it.fetcher._assembly._cache = watching
    first, second = it.submit(LoadRequest("first", "first")), it.submit(LoadRequest("second", "second"))
    it.call().answer(data)
    _until(lambda: bool(watching.made))
    assert watching.made[0].in_use.wait(NEVER)
    other = it.call()
    assert (other.ask.path, first.done(), it.fetcher.stats().workers) == ("second", False, 1)
    watching._holds = False
    other.answer(OLD[:10])
    assert got(second) == OLD[:10]
    watching.made[0].go_on.set()
    assert got(first) == data
    _until(lambda: it.fetcher.stats().workers == 0)


class Limit:
    """A controller that does as it is told."""

    seconds = 0.25
    most = 64
    has_learnt = is_climbing = may_climb = False

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def revise(self, _: object) -> int:
        return self.limit


def test_the_pool_grows_and_shrinks_with_the_limit(bench: Callable[..., Bench]) -> None:
    it = bench(monitor_bandwidth=True)
    it.scheduler.lanes[0].controller = limit = Limit(1)  # type: ignore[assignment]
    futures = [it.submit(LoadRequest(str(n), str(n))) for n in range(12)]
    first = it.call()
    assert it.calls.empty()
    limit.limit = 4
    first.receive(1)  # whoever brings bytes sees that there may be more
    calls = [first, *(it.call() for _ in range(3))]
    assert it.fetcher.stats().workers == 4
    limit.limit = 2
    for call in calls[:2]:
        call.answer(OLD[:1])
    _until(lambda: it.fetcher.stats().workers == 2)
    assert it.calls.empty()
    assert it.scheduler.active == 2
    calls[2].answer(OLD[:1])
    calls[3].answer(OLD[:1])
    for _ in range(8):
        it.call().answer(OLD[:1])
    assert all(got(future) for future in futures)


def test_nothing_is_left_in_the_queue_when_workers_leave(bench: Callable[..., Bench], restless: None) -> None:
    """A worker that has just found nothing, and a caller that has just queued something, must not miss each other."""
    it = bench(max_concurrent=2)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                it.calls.get(timeout=0.01).answer(b"x")
            except queue.Empty:
                continue

    server = threading.Thread(target=serve)
    server.start()
    try:
        for number in range(100):
            assert got(it.submit(LoadRequest(str(number), str(number)))) == b"x"
    finally:
        stop.set()
        server.join(NEVER)


# --- the end


def test_an_end_in_the_middle_of_everything_leaves_nobody_waiting(bench: Callable[..., Bench]) -> None:
    it = bench(max_concurrent=2)
    futures = [it.submit(replace(pinned(), path=str(n))) for n in range(3)]
    deadline = it.submit(LoadRequest("id", "file", deadline=60))
    it.call().answer(OLD)
    it.call()
    began = time.monotonic()
    it.fetcher.close()
    it.fetcher.close()
    assert time.monotonic() - began < 1
    assert all(isinstance(future.result(0).error, Cancelled) for future in [*futures, deadline])
    with pytest.raises(Cancelled, match="closed"):
        it.submit(LoadRequest("id", "file"))


def test_an_interrupt_while_the_queue_is_full_leaves_no_load_behind(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(it.scheduler, "push_all", lambda entries: entries)
        patched.setattr(it.scheduler, "push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            it.submit(LoadRequest("id", "file"))
    assert it.is_quiet()
    future = it.submit(LoadRequest("id", "file"))
    it.call().answer(OLD[:10])
    assert got(future) == OLD[:10]


# --- over real sockets


RETRY = RetryConfig(initial_backoff=0.01, max_backoff=0.05)
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]
DATA = random.Random(3).randbytes(3 * CHUNK)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., NetworkLoader]]:
    """Makes loaders without a disk, with small pieces and short pauses; they are closed in the end."""
    with ExitStack() as running:

        def make(*endpoints: str | CdnEndpoint, **settings: Any) -> NetworkLoader:
            fixed: dict[str, Any] = {"cache_dir": False, "chunk_size": CHUNK, "retry": RETRY, "timeout": 5.0}
            return running.enter_context(NetworkLoader(NetworkConfig(endpoints=endpoints, **(fixed | settings))))

        yield make


@pytest.fixture
def served(tmp_path: Path, origin: Callable[..., Origin]) -> Callable[..., Origin]:
    """Starts an origin that has a file of each size, named by it."""

    def start(**behaviour: Any) -> Origin:
        for size in SIZES:
            (tmp_path / str(size)).write_bytes(DATA[:size])
        return origin(behaviour=Behaviour(**behaviour))

    return start


WHAT_IS_KNOWN: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "nothing": lambda data: {},
    "the size": lambda data: {"expected_size": len(data)},
    "the digest": lambda data: {"checksum": sha256(data)},
    "both": lambda data: {"expected_size": len(data), "checksum": sha256(data)},
}
SERVERS: dict[str, tuple[dict[str, Any], bool]] = {
    "good": ({}, True),
    "without validators": ({"no_validators": True}, True),
    "without ranges": ({"ignore_range": True}, True),
    "without ranges, and said so": ({"ignore_range": True}, False),
    "cutting": ({"drop_after": 1000, "drop": 0.4}, True),
    "failing": ({"fail": 0.3}, True),
}


@pytest.mark.parametrize(("behaviour", "supports_range"), SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("known", WHAT_IS_KNOWN.values(), ids=WHAT_IS_KNOWN)
def test_whole_objects_of_every_size_arrive_right(
    load: Callable[..., NetworkLoader],
    served: Callable[..., Origin],
    known: Callable[[bytes], dict[str, Any]],
    behaviour: dict[str, Any],
    supports_range: bool,
) -> None:
    server = served(**behaviour)
    loader = load(CdnEndpoint(server.url, supports_range=supports_range), retry=replace(RETRY, max_retries=20))
    for size in SIZES:
        result = loader.load(LoadRequest(f"the {size}", str(size), **known(DATA[:size])))
        assert bytes(result.data) == DATA[:size]
        assert isinstance(result, LoadSuccess)
        assert result.head is not None
        assert result.head.size == size


def test_who_asks_for_silence_is_left_for_another(load: Callable[..., NetworkLoader]) -> None:
    """And is asked again when the silence is over, should the other be of no use."""
    busy = answer(status=429, retry_after=2)
    with (
        Wire(busy, always=part(DATA, 0, 100, etag='"v"')) as first,
        Wire(always=part(DATA, 0, 100, etag='"v"')) as second,
    ):
        loader = load(first.url, second.url)
        assert bytes(loader.load(LoadRequest("a", "a", byte_range=RangeRequest(0, 100))).data) == DATA[:100]
        assert (len(first.requests), len(second.requests)) == (1, 1)
    with Wire(busy, always=part(DATA, 0, 100, etag='"v"')) as first, Wire(always=answer(status=404)) as second:
        loader = load(first.url, second.url)
        began = time.monotonic()
        assert bytes(loader.load(LoadRequest("a", "a", byte_range=RangeRequest(0, 100))).data) == DATA[:100]
        assert time.monotonic() - began >= 2
        assert (len(first.requests), len(second.requests)) == (2, 1)


RANGES = [(0, 1), (0, CHUNK - 1), (1, CHUNK + 1), (5, CHUNK + 6), (0, 3 * CHUNK), (3 * CHUNK - 1, 3 * CHUNK), (7, 7)]


@pytest.mark.parametrize(
    ("behaviour", "supports_range"),
    [case for name, case in SERVERS.items() if name != "without ranges"],
    ids=[name for name in SERVERS if name != "without ranges"],
)
@pytest.mark.parametrize("known", WHAT_IS_KNOWN.values(), ids=WHAT_IS_KNOWN)
def test_ranges_of_every_size_arrive_right(
    load: Callable[..., NetworkLoader],
    served: Callable[..., Origin],
    known: Callable[[bytes], dict[str, Any]],
    behaviour: dict[str, Any],
    supports_range: bool,
) -> None:
    server = served(**behaviour)
    loader = load(CdnEndpoint(server.url, supports_range=supports_range), retry=replace(RETRY, max_retries=20))
    for start, stop in RANGES:
        request = LoadRequest("id", str(3 * CHUNK), byte_range=RangeRequest(start, stop), **known(DATA[start:stop]))
        assert bytes(loader.load(request).data) == DATA[start:stop]


@pytest.mark.parametrize("allow_short", [True, False])
@pytest.mark.parametrize(
    "bounds", [(0, CHUNK + 2), (CHUNK, CHUNK + 2), (CHUNK + 1, CHUNK + 5), (9 * CHUNK, 10 * CHUNK)]
)
def test_a_range_beyond_the_end_is_short_if_that_is_allowed(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin], bounds: tuple[int, int], allow_short: bool
) -> None:
    server = served()
    request = LoadRequest("id", str(CHUNK + 1), byte_range=RangeRequest(*bounds), allow_short=allow_short)
    result = load(server.url).load(request)
    if allow_short:
        assert bytes(result.data) == DATA[: CHUNK + 1][slice(*bounds)]
    else:
        assert isinstance(result.error, HttpError)
        assert result.error.status == 416


@pytest.mark.parametrize("size", [1, CHUNK, 3 * CHUNK])
@pytest.mark.parametrize("difference", [-1, 1])
def test_an_object_of_another_size_than_expected_is_an_error(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin], size: int, difference: int
) -> None:
    result = load(served().url).load(LoadRequest("id", str(size), expected_size=size + difference))
    assert isinstance(result.error, ObjectChanged)


def test_an_object_that_should_be_empty_and_is_not_is_an_error(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    assert isinstance(load(served().url).load(LoadRequest("id", "1", expected_size=0)).error, ObjectChanged)


def test_without_validators_a_long_fragment_takes_two_requests(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    server = served(no_validators=True)
    assert bytes(load(server.url).load(LoadRequest("id", str(3 * CHUNK))).data) == DATA
    assert [record.range for record in server.requests()] == [f"bytes=0-{CHUNK - 1}", f"bytes=0-{3 * CHUNK - 1}"]


def test_without_ranges_a_range_says_what_to_do(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    server = served(ignore_range=True)
    result = load(server.url).load(LoadRequest("id", str(CHUNK), byte_range=RangeRequest(5, 10)))
    assert isinstance(result.error, RangeNotSupported)
    assert "supports_range=False" in str(result.error)


def test_many_short_neighbours_take_few_requests(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    server = served(latency=0.02)
    loader = load(server.url, max_concurrent=2)
    bounds = [(start, start + 50) for start in range(0, 3 * CHUNK - 50, 60)]
    assert len(bounds) == 204
    requests = [LoadRequest(str(b), str(3 * CHUNK), byte_range=RangeRequest(*b)) for b in bounds]
    results = [future.result(NEVER) for future in loader.enqueue_many(requests)]
    assert [bytes(result.data) for result in results] == [DATA[start:stop] for start, stop in bounds]
    assert server.stats().requests < 30


# --- what changes under way


def put(path: Path, data: bytes) -> None:
    """Replace a file in one step, as a server's owner would."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)


@contextmanager
def slowly(server: Origin, **behaviour: Any) -> Iterator[None]:
    """Serve slowly inside, and fast again afterwards."""
    server.behaviour = Behaviour(rate=100_000, **behaviour)
    yield
    server.behaviour = Behaviour(**behaviour)


@pytest.mark.parametrize("no_validators", [False, True])
def test_an_object_that_is_replaced_between_two_loads_is_fetched_anew(
    load: Callable[..., NetworkLoader], tmp_path: Path, origin: Callable[..., Origin], no_validators: bool
) -> None:
    server = origin(behaviour=Behaviour(no_validators=no_validators))
    loader = load(server.url)
    for data in (OLD, NEW, OLD[:100]):
        put(tmp_path / "file", data)
        assert bytes(loader.load(LoadRequest("id", "file")).data) == data


def test_an_object_that_is_replaced_under_way_is_fetched_anew(
    load: Callable[..., NetworkLoader], tmp_path: Path, origin: Callable[..., Origin]
) -> None:
    put(tmp_path / "file", OLD)
    server = origin()
    loader = load(server.url, max_concurrent=1)
    with slowly(server):
        future = loader.enqueue(LoadRequest("id", "file"))
        _until(lambda: server.stats().requests >= 2)
        put(tmp_path / "file", NEW)
    assert got(future) == NEW
    assert server.stats().statuses[412] == 1


def test_a_pinned_object_that_is_replaced_under_way_is_an_error(
    load: Callable[..., NetworkLoader], tmp_path: Path, origin: Callable[..., Origin]
) -> None:
    put(tmp_path / "file", OLD)
    server = origin()
    loader = load(server.url, max_concurrent=1)
    version = loader.head("file").validator
    with slowly(server):
        future = loader.enqueue(pinned(len(OLD)).__class__("id", "file", expected_size=len(OLD), validator=version))
        _until(lambda: server.stats().requests >= 3)
        put(tmp_path / "file", NEW)
    assert isinstance(future.result(NEVER).error, ObjectChanged)


# --- servers that fail


def test_a_server_that_is_killed_and_started_again_costs_time_and_no_error(
    load: Callable[..., NetworkLoader], tmp_path: Path
) -> None:
    data = random.Random(5).randbytes(400_000)
    put(tmp_path / "file", data)
    with OriginProcess(tmp_path, behaviour=Behaviour(rate=400_000)) as server:
        loader = load(server.url, timeout=20.0, chunk_size=10_000)
        future = loader.enqueue(LoadRequest("id", "file"))
        _until(lambda: loader.stats().bytes_fetched > 100_000)
        server.kill()
        threading.Event().wait(2.0)
        assert not future.done()
        before = loader.stats().bytes_fetched
        with OriginProcess(tmp_path, port=server.port):
            assert got(future) == data
        assert loader.stats().bytes_fetched - before < len(data)  # what had come, stayed


@pytest.mark.parametrize("retry", [RETRY, RetryConfig()])
def test_a_dead_endpoint_is_told_soon(load: Callable[..., NetworkLoader], retry: RetryConfig) -> None:
    with closed_port() as port:
        began = time.monotonic()
        result = load(f"http://127.0.0.1:{port}", retry=retry).load(LoadRequest("id", "file"))
    assert isinstance(result.error, RetriesExhausted)
    assert isinstance(result.error.last_error, ConnectionFailed)
    assert time.monotonic() - began < 3


def test_the_next_endpoint_serves_where_the_first_is_dead(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    server = served()
    with closed_port() as port:
        loader = load(CdnEndpoint(server.url, priority=1), CdnEndpoint(f"http://127.0.0.1:{port}"))
        for size in SIZES:
            assert bytes(loader.load(LoadRequest("id", str(size))).data) == DATA[:size]


def test_the_next_endpoint_serves_what_the_first_does_not_have(
    load: Callable[..., NetworkLoader], tmp_path: Path, origin: Callable[..., Origin]
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    put(folders[1] / "file", OLD)
    servers = [origin(folder) for folder in folders]
    loader = load(*(server.url for server in servers))
    assert bytes(loader.load(LoadRequest("id", "file")).data) == OLD
    error = loader.load(LoadRequest("id", "nowhere")).error
    assert isinstance(error, NotFound)
    assert [server.stats().statuses[404] for server in servers] == [2, 1]


@pytest.mark.parametrize("is_ranged", [True, False])
def test_right_bytes_come_from_the_next_endpoint_where_the_first_has_wrong_ones(
    load: Callable[..., NetworkLoader], tmp_path: Path, origin: Callable[..., Origin], is_ranged: bool
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder, data in zip(folders, (NEW, OLD), strict=True):
        folder.mkdir()
        put(folder / "file", data)
    servers = [origin(folder) for folder in folders]
    loader = load(*(server.url for server in servers))
    bounds = RangeRequest(10, 2 * CHUNK) if is_ranged else RangeRequest(0, len(OLD))
    request = LoadRequest(
        "id",
        "file",
        byte_range=bounds if is_ranged else None,
        checksum=sha256(OLD[bounds.start : bounds.stop]),
    )
    assert bytes(loader.load(request).data) == OLD[bounds.start : bounds.stop]
    assert all(server.stats().requests for server in servers)


def test_wrong_bytes_of_a_lone_endpoint_are_an_error(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    server = served()
    error = load(server.url).load(LoadRequest("id", "1", checksum=sha256(b"other"))).error
    assert isinstance(error, ChecksumMismatch)
    assert (error.expected, error.actual) == (sha256(b"other"), sha256(DATA[:1]))
    assert (error.url, server.stats().requests) == (f"{server.url}/1", 2)


class Answering(Wire):
    """A server whose answer follows from the request."""

    def __init__(self, respond: Callable[[Request], wire.Answer]) -> None:
        self._respond = respond
        super().__init__(always=b"")

    def _answer_to(self, request: Request) -> wire.Answer:
        return self._respond(request)


def bounds_of(request: Request) -> tuple[int, int]:
    first, last = re.findall(r"[0-9]+", request.headers["range"])
    return int(first), int(last) + 1


def test_a_server_that_serves_ranges_only_at_times_is_asked_for_the_whole(load: Callable[..., NetworkLoader]) -> None:
    def respond(request: Request) -> bytes:
        if "range" in request.headers and bounds_of(request)[0] < 2 * CHUNK:
            return part(OLD, *bounds_of(request), etag='"v1"')
        return answer(OLD, etag='"v1"')

    with Answering(respond) as server:
        for known in ({}, {"expected_size": len(OLD), "checksum": sha256(OLD)}):
            assert bytes(load(server.url).load(LoadRequest("id", "file", **known)).data) == OLD


def test_a_body_without_a_length_arrives_whole(load: Callable[..., NetworkLoader]) -> None:
    with Answering(lambda _: chunked(OLD[:5000], OLD[5000:])) as server:
        result = load(server.url).load(LoadRequest("id", "file"))
        assert bytes(result.data) == OLD
        assert isinstance(result, LoadSuccess)
        assert result.head is not None
        assert result.head.size == len(OLD)


def test_a_body_without_a_length_that_is_cut_and_then_shorter_has_no_tail(load: Callable[..., NetworkLoader]) -> None:
    answers = [[chunked(OLD[:5000], end=b""), RESET], chunked(NEW[:100])]
    with Wire(*answers) as server:
        assert bytes(load(server.url).load(LoadRequest("id", "file")).data) == NEW[:100]


def test_a_version_that_changes_with_every_answer_is_never_mixed(load: Callable[..., NetworkLoader]) -> None:
    """A weak validator proves nothing, and each answer is of another version."""
    turn = iter(range(1000))

    def respond(request: Request) -> bytes:
        number = next(turn)
        return part((OLD, NEW)[number % 2], *bounds_of(request), etag=f'W/"{number}"')

    with Answering(respond) as server:
        loader = load(server.url)
        for _ in range(4):
            data = bytes(loader.load(LoadRequest("id", "file")).data)
            assert data in (OLD, NEW)


def test_a_revalidation_that_speaks_of_another_version_confirms_nothing(load: Callable[..., NetworkLoader]) -> None:
    def respond(request: Request) -> bytes:
        if "if-modified-since" in request.headers:
            return answer(status=304, content_length=None, last_modified="Fri, 18 Nov 1994 12:45:26 GMT")
        return answer(OLD[:10], last_modified="Tue, 15 Nov 1994 12:45:26 GMT")

    with Answering(respond) as server:
        loader = load(server.url)
        assert [loader.load(LoadRequest("id", "file")).from_cache for _ in range(2)] == [False, False]
        assert len(server.requests) == 3


ALLOWED = "max-age=0, stale-if-error=60"


@pytest.mark.parametrize(
    ("cache_control", "failure", "serves"),
    [
        (ALLOWED, answer(status=500), True),
        (ALLOWED, answer(status=503, retry_after=0), True),
        (ALLOWED, [RESET], True),
        (ALLOWED, answer(status=404), False),
        (ALLOWED, answer(status=403), False),
        (f"{ALLOWED}, must-revalidate", answer(status=500), False),
        (f"{ALLOWED}, no-cache", answer(status=500), False),
        ("max-age=0", answer(status=500), False),
    ],
)
def test_old_bytes_stand_in_for_a_server_that_fails_only_if_it_has_allowed_that(
    load: Callable[..., NetworkLoader], cache_control: str, failure: wire.Answer, serves: bool
) -> None:
    with Wire(answer(OLD[:10], etag='"v1"', cache_control=cache_control), always=failure) as server:
        loader = load(server.url, timeout=0.5)
        assert bytes(loader.load(LoadRequest("id", "file")).data) == OLD[:10]
        result = loader.load(LoadRequest("id", "file"))
        assert result.is_success is serves
        assert result.from_cache is serves
        assert not serves or bytes(result.data) == OLD[:10]


@pytest.mark.parametrize(
    ("own", "other", "serves"),
    [
        (answer(status=500), [RESET], True),
        ([RESET], answer(status=404), True),
        (answer(status=404), [RESET], False),
    ],
    ids=["500, cut", "cut, 404", "404, cut"],
)
def test_old_bytes_stand_in_though_another_endpoint_was_asked_in_vain(
    load: Callable[..., NetworkLoader], own: wire.Answer, other: wire.Answer, serves: bool
) -> None:
    with (
        Wire(answer(OLD[:10], etag='"v1"', cache_control=ALLOWED), always=own) as server,
        Wire(always=other) as mirror,
    ):
        loader = load(*(CdnEndpoint(url, priority=n) for n, url in enumerate((server.url, mirror.url))))
        assert bytes(loader.load(LoadRequest("id", "file")).data) == OLD[:10]
        result = loader.load(LoadRequest("id", "file"))
        assert (result.is_success, result.from_cache) == (serves, serves)
        assert mirror.requests
        assert not serves or bytes(result.data) == OLD[:10]


def test_a_version_that_was_seen_to_be_replaced_does_not_stand_in(load: Callable[..., NetworkLoader]) -> None:
    """The new version is told, and is cut off each time."""
    cut = [part(NEW, 0, CHUNK, etag='"v2"', cache_control=ALLOWED)[:-100], RESET]
    first = answer(OLD[:10], etag='"v1"', cache_control=ALLOWED)
    with Wire(first, cut, always=answer(status=500)) as server:
        loader = load(server.url)
        assert loader.load(LoadRequest("id", "file")).is_success
        assert not loader.load(LoadRequest("id", "file")).is_success


def test_new_bytes_that_cannot_be_had_whole_are_no_reason_for_old_ones(load: Callable[..., NetworkLoader]) -> None:
    first = answer(OLD[:10], etag='"v1"', cache_control=ALLOWED)
    with Wire(first, part(NEW, 0, CHUNK, etag='"v2"'), always=answer(status=404)) as server:
        loader = load(server.url)
        assert loader.load(LoadRequest("id", "file")).is_success
        assert isinstance(loader.load(LoadRequest("id", "file")).error, NotFound)


# --- a close, whatever is going on


def _silent() -> Any:
    return Wire(always=[HOLD])


def _stalled() -> Any:
    return Wire(always=[part(OLD, 0, CHUNK)[:-5], HOLD])


def _busy() -> Any:
    return Wire(always=answer(status=503, retry_after=30))


def _refusing() -> Any:
    return Wire(always=answer(status=500))


BUSY: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "an answer": (_silent, {}),
    "the rest of a body": (_stalled, {}),
    "the time that the server asked for": (_busy, {}),
    "the next attempt": (_refusing, {"retry": RetryConfig(initial_backoff=20, max_backoff=20, jitter=False)}),
    "a deadline": (_silent, {"retry": RetryConfig(deadline=60)}),
    "a connection that comes free": (_silent, {"max_concurrent": 1}),
}


@pytest.mark.parametrize(("serve", "settings"), BUSY.values(), ids=BUSY)
def test_closing_interrupts_whoever_waits_for(
    load: Callable[..., NetworkLoader], serve: Callable[[], Any], settings: dict[str, Any]
) -> None:
    with serve() as server:
        loader = load(server.url, timeout=30.0, **settings)
        futures = loader.enqueue_many(LoadRequest(str(n), str(n)) for n in range(8))
        server.await_requests(1)
        _closes_at_once(loader, futures)


def test_closing_interrupts_whoever_waits_for_a_connection(load: Callable[..., NetworkLoader]) -> None:
    with black_hole() as port:
        loader = load(f"http://127.0.0.1:{port}", connect_timeout=30.0)
        futures = loader.enqueue_many(LoadRequest(str(n), str(n)) for n in range(8))
        _until(lambda: loader.stats().connections > 0)
        _closes_at_once(loader, futures)


def test_closing_interrupts_whoever_waits_for_an_outage_to_end(load: Callable[..., NetworkLoader]) -> None:
    with Wire(answer(b"x")) as server:
        loader = load(server.url, timeout=30.0)
        assert loader.load(LoadRequest("id", "file")).is_success
    futures = loader.enqueue_many(LoadRequest(str(n), str(n)) for n in range(8))
    _until(lambda: loader._fetcher._courier._routes._health[0].failures > 1)
    _closes_at_once(loader, futures)


def test_closing_interrupts_whoever_is_held_to_a_rate(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    loader = load(served().url, max_bandwidth=100.0)
    futures = loader.enqueue_many(LoadRequest(str(n), str(3 * CHUNK), importance=n / 8) for n in range(8))
    _until(lambda: loader.stats().bytes_fetched > 0)
    _closes_at_once(loader, futures)


def _closes_at_once(loader: NetworkLoader, futures: list[Future[LoadResult]]) -> None:
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 1
    assert all(isinstance(future.result(0).error, Cancelled) for future in futures)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("holotensor")]


def _until(is_so: Callable[[], bool]) -> None:
    """Return once it is so; it has to be soon."""
    end, tick = time.monotonic() + NEVER, threading.Event()
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        tick.wait(0.002)


def test_critical_is_begun_while_all_workers_are_busy_with_less(bench: Callable[..., Bench]) -> None:
    it = bench(monitor_bandwidth=True, max_concurrent=8)
    limit = it.scheduler.limit
    assert limit < 8
    low = [
        it.submit(LoadRequest(f"{n}", f"{n}", byte_range=RangeRequest(0, CHUNK), priority=Priority.LOW))
        for n in range(limit)
    ]
    calls = [it.call() for _ in range(limit)]
    urgent = it.submit(LoadRequest("urgent", "urgent", byte_range=RangeRequest(0, CHUNK), priority=Priority.CRITICAL))
    call = it.call()
    assert call.ask.path == "urgent"
    for one in [call, *calls]:
        one.answer(OLD)
    assert {got(future) for future in [urgent, *low]} == {OLD[:CHUNK]}


def test_a_piece_that_nobody_wants_any_more_is_cut_though_its_server_is_silent(tmp_path: Path) -> None:
    with Wire([HOLD], answer(OLD)) as server:
        config = NetworkConfig(
            endpoints=(CdnEndpoint(server.url, proxies={}),), cache_dir=False, max_concurrent=1, timeout=60.0
        )
        with NetworkLoader(config) as loader:
            future = loader.enqueue(LoadRequest("silent", "silent"))
            server.await_requests(1)
            assert loader.cancel("silent")
            server.await_closed()
            assert isinstance(future.result(0).error, Cancelled)
            assert bytes(loader.load(LoadRequest("next", "next", deadline=NEVER)).data) == OLD


def test_no_lock_is_held_while_what_was_given_up_is_deleted(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench()
    held: queue.Queue[bool] = queue.Queue()
    discard = MemoryPart.discard

    def watched(part: MemoryPart) -> None:
        def look_in() -> None:
            with it.fetcher._lock:
                pass

        look = threading.Thread(target=look_in)
        look.start()
        look.join(NEVER)
        held.put(look.is_alive())
        discard(part)

    monkeypatch.setattr(MemoryPart, "discard", watched)
    long = LoadRequest("id", "file", byte_range=RangeRequest(0, CHUNK))
    future = it.submit(long)
    it.call().fail(ObjectChanged("for a test"), after=OLD[:100])
    assert held.get(timeout=NEVER) is False
    call = it.call()
    call.fail(ProtocolError("for a test"), after=OLD[:100])
    assert future.result(NEVER).error is not None
    assert held.get(timeout=NEVER) is False


@pytest.mark.parametrize("where", ["open", "enter", "next_for"])
def test_an_interrupt_while_it_is_asked_for_leaves_nothing_that_nobody_brings(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    it = bench()
    owner: object = it.fetcher._courier if where == "next_for" else it.fetcher._books
    does = getattr(owner, where)

    def interrupted(*given: object, **more: object) -> None:
        does(*given, **more)
        monkeypatch.setattr(owner, where, does)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        it.submit(pinned(CHUNK))
    assert it.is_quiet()
    future = it.submit(pinned(CHUNK))
    it.call().answer(OLD)
    assert got(future) == OLD[:CHUNK]


def test_the_alarm_of_a_deadline_ends_with_its_load(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(pinned(CHUNK, deadline=3600.0))
    assert len(it.fetcher._alarms._times) == 1
    it.call().answer(OLD)
    assert got(future) == OLD[:CHUNK]
    assert it.fetcher._alarms._times == []


def test_who_delivers_just_as_it_is_cut_is_no_probe_any_more(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(pinned(CHUNK))
    call = it.call()
    (race,) = it.fetcher._courier._races
    health = it.fetcher._courier._routes._health[0]
    health.failures, health.is_there, health.probing = 1, True, True
    answered = Answer(HeadInfo(len(OLD), V1), RangeRequest(0, CHUNK), False, 1)

    def last() -> Answer:
        call._open(answered.head, None)(0, memoryview(OLD)[:CHUNK])
        race.first.fire()
        return answered

    call._orders.put(last)
    assert got(future) == OLD[:CHUNK]
    assert (health.failures, health.probing) == (0, False)


def test_a_slow_endpoint_does_not_hold_another_down(bench: Callable[..., Bench]) -> None:
    it = bench(endpoints=2, max_concurrent=4)
    futures = [it.submit(LoadRequest(name, name)) for name in "abcdef"]
    calls = sorted((it.call() for _ in range(4)), key=lambda call: call.ask.path)
    assert [(call.endpoint, call.ask.path) for call in calls] == [(0, name) for name in "abcd"]
    calls[3].fail(NotFound("it is elsewhere"))
    other = it.call()
    assert (other.endpoint, other.ask.path) == (1, "d")
    for call in [other, *calls[:3]]:
        call.answer(OLD[:1])
    for _ in "ef":
        it.call().answer(OLD[:1])
    assert all(got(future) == OLD[:1] for future in futures)


def test_an_endpoint_that_refuses_has_fewer_connections_and_the_next_one_its_own(
    load: Callable[..., NetworkLoader], served: Callable[..., Origin]
) -> None:
    refusing, other = served(max_connections=1, refusal=429, latency=0.01), served(latency=0.01)
    loader = load(refusing.url, CdnEndpoint(other.url, priority=1, proxies={}))
    futures = loader.enqueue_many(
        LoadRequest(str(n), str(3 * CHUNK), byte_range=RangeRequest(n, 2 * CHUNK)) for n in range(64)
    )
    assert all(future.result(NEVER).is_success for future in futures)
    limits = [lane.limit for lane in loader.scheduler.lanes]
    assert limits[0] < 4 <= limits[1]


def test_the_rest_is_asked_for_as_soon_as_the_version_is_known(bench: Callable[..., Bench]) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, len(OLD))))
    first = it.call()
    first.do(lambda: first._open(HeadInfo(len(OLD), V1), RangeRequest(*first.bounds)))
    first.receive(1)
    others = sorted([it.call(), it.call()], key=lambda call: call.bounds)  # of two workers, either may be first
    assert [(call.bounds, call.ask.pinned) for call in others] == [((n * CHUNK, (n + 1) * CHUNK), V1) for n in (1, 2)]
    for call in [*others, first]:
        call.answer(OLD)
    assert got(future) == OLD
    assert it.calls.empty()


@pytest.mark.parametrize("version", [WEAK, Validator(None, None, False)], ids=["weak", "none"])
def test_nothing_more_is_asked_for_while_nothing_proves_that_it_would_be_of_the_same_version(
    bench: Callable[..., Bench], version: Validator
) -> None:
    it = bench()
    future = it.submit(LoadRequest("id", "file", byte_range=RangeRequest(0, len(OLD))))
    first = it.call()
    first.answer(OLD, version)
    again = it.call()
    assert (first.bounds, again.bounds) == ((0, CHUNK), (0, len(OLD)))
    again.answer(OLD, version)
    assert got(future) == OLD
    assert it.calls.empty()
