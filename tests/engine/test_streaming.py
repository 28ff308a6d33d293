"""Results as they come, no faster than they are taken."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Nginx
from wire import HOLD, Wire

from holotensor_net.config import NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.engine.streaming import StreamingLoader
from holotensor_net.errors import Cancelled, ConfigurationError, InvalidUrl, NotFound, Timeout
from holotensor_net.origin import Behaviour, Origin
from holotensor_net.values import LoadRequest, LoadResult, LoadSuccess, Priority, RangeRequest, blake3_of

CHUNK = 4096
DATA = random.Random(3).randbytes(3 * CHUNK)
NEVER = 5.0


def until(is_so: Callable[[], bool]) -> None:
    """Return once it is so; it has to be soon."""
    end, tick = time.monotonic() + NEVER, threading.Event()
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        tick.wait(0.002)


# --- against a loader that only takes notes


class Desk:
    """Takes requests, and answers them when a test says so."""

    def __init__(self, **settings: Any) -> None:
        self.config = NetworkConfig(endpoints="https://cdn.example.com", chunk_size=CHUNK, **settings)
        self.asked: dict[str, Future[LoadResult]] = {}
        self.requests: list[LoadRequest] = []
        self.refuses: Exception | None = None
        self.watched: list[StreamingLoader] = []

    def enqueue(self, request: LoadRequest, *, shared: bool = True) -> Future[LoadResult]:
        assert not shared  # others could cancel it
        if self.refuses is not None:
            raise self.refuses
        self.requests.append(request)
        future: Future[LoadResult] = Future()
        self.asked[request.fragment_id] = future
        return future

    def answer(self, name: str, data: bytes = b"") -> None:
        self.asked.pop(name).set_result(LoadSuccess(name, memoryview(data or name.encode())))

    def _watch(self, stream: StreamingLoader) -> None:
        self.watched.append(stream)

    def stream(self, **options: Any) -> StreamingLoader:
        return StreamingLoader(self, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("buffer", [0, -1, 1.5, "5", None, True])
def test_a_buffer_holds_one_fragment_or_more(buffer: Any) -> None:
    with pytest.raises(ConfigurationError, match="buffer"):
        Desk().stream(buffer=buffer)


def test_nothing_asked_for_is_an_end_at_once() -> None:
    stream = Desk().stream()
    assert stream.next(timeout=0) is None
    assert list(stream.start([])) == []


def test_a_string_stands_for_the_fragment_of_that_name_at_that_path() -> None:
    desk = Desk()
    desk.stream().start(["a/b", LoadRequest("id", "c")])
    assert [(request.fragment_id, request.path) for request in desk.requests] == [("a/b", "a/b"), ("id", "c")]


def test_a_prefix_comes_before_every_path_and_no_name() -> None:
    desk = Desk()
    desk.stream(path_prefix="models/").start(["a", LoadRequest("id", "b", priority=Priority.LOW)])
    assert [(r.fragment_id, r.path) for r in desk.requests] == [("a", "models/a"), ("id", "models/b")]


def test_the_most_urgent_are_asked_for_first_and_come_when_they_come() -> None:
    desk = Desk()
    stream = desk.stream(buffer=3)
    stream.start(
        LoadRequest(name, name, priority=level, importance=importance)
        for name, level, importance in [
            ("bulk", Priority.LOW, 1.0),
            ("less", Priority.NORMAL, 0.1),
            ("more", Priority.NORMAL, 0.9),
            ("now", Priority.CRITICAL, 0.0),
        ]
    )
    assert list(desk.asked) == ["now", "more", "less"]
    for name in ("less", "now", "more"):
        desk.answer(name)
    assert [result.fragment_id for result in (next(stream), next(stream), next(stream))] == ["less", "now", "more"]
    desk.answer("bulk")
    assert [result.fragment_id for result in stream] == ["bulk"]
    assert stream.next() is None


def test_nothing_in_time_says_so_and_loses_nothing() -> None:
    desk = Desk()
    stream = desk.stream().start(["a"])
    for timeout in (0, 0.01):
        with pytest.raises(Timeout):
            stream.next(timeout=timeout)
    desk.answer("a")
    assert [result.fragment_id for result in stream] == ["a"]


def test_more_can_be_added_before_and_after_the_end() -> None:
    desk = Desk()
    stream = desk.stream(buffer=1).start(["a"])
    stream.start(["b"])
    for name in "ab":
        desk.answer(name)
        assert next(stream).fragment_id == name
    assert list(stream) == []
    stream.start(["c"])
    desk.answer("c")
    assert [result.fragment_id for result in stream] == ["c"]


def sized(name: str, size: int | None, *, is_range: bool) -> LoadRequest:
    if is_range and size is not None:
        return LoadRequest(name, name, byte_range=RangeRequest(5, 5 + size))
    return LoadRequest(name, name, expected_size=size)


@pytest.mark.parametrize("is_range", [True, False])
@pytest.mark.parametrize(
    ("budget", "sizes", "asked"),
    [
        (100, [40, 40, 40], 2),
        (100, [50, 50, 1], 2),
        (100, [1000, 1], 1),  # one at least
        (100, [1, 1000, 1], 1),
        (2 * CHUNK, [None, None, None], 2),  # of unknown size: a piece
    ],
)
def test_no_more_bytes_are_asked_for_than_the_budget_allows(
    budget: int, sizes: list[int | None], asked: int, is_range: bool
) -> None:
    desk = Desk(memory_budget=budget)
    stream = desk.stream().start(sized(str(n), size, is_range=is_range) for n, size in enumerate(sizes))
    assert len(desk.requests) == asked
    for number in range(len(sizes)):
        desk.answer(str(number))
        assert next(stream).fragment_id == str(number)
    assert list(stream) == []


def test_what_arrives_and_is_not_taken_counts() -> None:
    desk = Desk()
    stream = desk.stream(buffer=2).start([*"abcd"])
    desk.answer("a")
    desk.answer("b")
    assert len(desk.requests) == 2
    next(stream)
    assert len(desk.requests) == 3


def test_what_turns_out_to_be_long_counts_as_that() -> None:
    desk = Desk(memory_budget=4 * CHUNK)
    stream = desk.stream().start([*"abcdef"])
    assert len(desk.requests) == 4  # of unknown size: a piece each
    for name, size in (("b", 1), ("c", 1), ("a", 3 * CHUNK)):
        desk.answer(name, bytes(size))
    for name in "bc":
        assert next(stream).fragment_id == name
        assert len(desk.requests) == 4
    assert next(stream).fragment_id == "a"
    assert len(desk.requests) == 6


def test_what_is_of_unknown_size_may_be_as_long_as_others_were() -> None:
    desk = Desk(memory_budget=4 * CHUNK)
    stream = desk.stream().start([*"abcdef"])
    desk.answer("a", bytes(3 * CHUNK))
    assert next(stream).fragment_id == "a"
    assert len(desk.requests) == 4
    desk.answer("b", bytes(CHUNK))
    desk.answer("c", bytes(CHUNK))
    assert next(stream).fragment_id == "b"
    assert len(desk.requests) == 5  # one with 5/3 of a piece, on average


def test_what_waits_can_be_moved() -> None:
    desk = Desk()
    stream = desk.stream(buffer=1).start([*"abc"])
    assert stream.update_priority("c", Priority.CRITICAL) is True
    assert stream.update_priority("a", Priority.CRITICAL) is False  # asked for already
    assert stream.update_priority("d", Priority.CRITICAL) is False
    desk.answer("a")
    next(stream)
    assert [request.fragment_id for request in desk.requests] == ["a", "c"]
    assert desk.requests[1].priority is Priority.CRITICAL


def test_a_cancelled_stream_drops_everything_and_ends() -> None:
    desk = Desk()
    stream = desk.stream(buffer=2).start([*"abcd"])
    desk.answer("a")
    stream.cancel()
    stream.cancel()
    assert list(stream) == []
    assert desk.asked["b"].cancelled()
    assert len(desk.requests) == 2
    assert list(stream.start(["e"])) == []


def test_leaving_the_block_cancels() -> None:
    desk = Desk()
    with desk.stream() as stream:
        stream.start(["a"])
    assert desk.asked["a"].cancelled()


def test_whoever_waits_is_told_that_it_was_cancelled() -> None:
    stream = Desk().stream().start(["a"])
    ended = threading.Event()
    waiting = threading.Thread(target=lambda: (list(stream), ended.set()))
    waiting.start()
    until(lambda: bool(stream._arrived._waiters))  # type: ignore[attr-defined]
    stream.cancel()
    assert ended.wait(NEVER)
    waiting.join(NEVER)


def test_what_is_asked_for_while_it_is_cancelled_is_cancelled_too() -> None:
    desk = Desk()
    stream = desk.stream()
    ask = desk.enqueue

    def meanwhile(request: LoadRequest, *, shared: bool = True) -> Future[LoadResult]:
        future = ask(request, shared=shared)
        stream.cancel()
        return future

    desk.enqueue = meanwhile  # type: ignore[method-assign]
    stream.start([*"ab"])
    assert [future.cancelled() for future in desk.asked.values()] == [True]
    assert list(stream) == []


def test_what_arrives_after_it_was_cancelled_is_dropped() -> None:
    desk = Desk()
    stream = desk.stream().start(["a"])
    desk.asked["a"].set_running_or_notify_cancel()  # too late to be cancelled
    stream.cancel()
    desk.answer("a")
    assert list(stream) == []


def test_a_request_that_is_refused_ends_in_a_result_all_the_same() -> None:
    desk = Desk()
    stream = desk.stream(buffer=1).start(["a", "b", "c"])
    desk.answer("a")
    desk.refuses = Cancelled("the loader is closed")
    results = list(stream)
    assert [result.fragment_id for result in results] == ["a", "b", "c"]
    assert [result.is_success for result in results] == [True, False, False]


def test_a_result_is_held_by_whoever_took_it_alone() -> None:
    desk = Desk()
    stream = desk.stream().start(["a"])
    future = desk.asked["a"]
    desk.answer("a")
    known = weakref.ref(future)
    gc.collect()
    gc.disable()
    try:
        del future
        assert next(stream).fragment_id == "a"
        assert known() is None
    finally:
        gc.enable()


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(Priority)), max_size=25),
    st.integers(1, 6),
    st.integers(20, 200),
    st.randoms(use_true_random=False),
)
def test_whatever_arrives_in_whatever_order_is_delivered_once_and_within_bounds(
    wanted: list[tuple[int, Priority]], buffer: int, budget: int, dice: random.Random
) -> None:
    desk = Desk(memory_budget=budget)
    sizes = {str(number): size for number, (size, _) in enumerate(wanted)}
    stream = desk.stream(buffer=buffer)
    stream.start(
        LoadRequest(str(number), "a", expected_size=size, priority=level) for number, (size, level) in enumerate(wanted)
    )
    taken: list[str] = []
    answered: set[str] = set()
    while len(taken) < len(wanted):
        undelivered = [r.fragment_id for r in desk.requests if r.fragment_id not in taken]
        assert len(undelivered) <= buffer
        assert len(undelivered) == 1 or sum(sizes[name] or CHUNK for name in undelivered) <= budget
        ready = answered - set(taken)
        if desk.asked and (not ready or dice.random() < 0.6):
            name = dice.choice(sorted(desk.asked))
            answered.add(name)
            desk.answer(name)
        else:
            result = stream.next(timeout=0)
            assert result is not None
            assert result.fragment_id in ready
            taken.append(result.fragment_id)
    assert stream.next(timeout=0) is None
    assert sorted(taken) == sorted(sizes)


# --- over sockets


Make = Callable[..., NetworkLoader]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as running:

        def start(url: str, **settings: Any) -> NetworkLoader:
            fixed: dict[str, Any] = {"cache_dir": False, "chunk_size": CHUNK, "timeout": 5.0}
            retry = RetryConfig(initial_backoff=0.01, max_backoff=0.05)
            return running.enter_context(NetworkLoader(NetworkConfig(endpoints=url, retry=retry, **fixed, **settings)))

        yield start


def content(name: str) -> bytes:
    return random.Random(name).randbytes(500)


NAMES = [f"file-{number}" for number in range(40)]


@pytest.fixture
def served(tmp_path: Path, origin: Callable[..., Origin]) -> Callable[..., Origin]:
    """Starts an origin that has a file of DATA, and forty short ones."""

    def start(**behaviour: Any) -> Origin:
        folder = tmp_path / "www"
        folder.mkdir()
        (folder / "data").write_bytes(DATA)
        for name in NAMES:
            (folder / name).write_bytes(content(name))
        return origin(folder, behaviour=Behaviour(**behaviour))

    return start


def test_everything_arrives_right_and_once(make: Make, served: Callable[..., Origin]) -> None:
    results = list(make(served().url).stream(NAMES))
    assert sorted(result.fragment_id for result in results) == sorted(NAMES)
    assert all(result.data == content(result.fragment_id) for result in results)


def test_failures_arrive_too_and_harm_no_others(make: Make, served: Callable[..., Origin]) -> None:
    wanted = [*NAMES[:5], "nowhere", "../outside", "data"]
    results = {result.fragment_id: result for result in make(served().url).stream(wanted)}
    assert isinstance(results.pop("nowhere").error, NotFound)
    assert isinstance(results.pop("../outside").error, InvalidUrl)
    assert all(result.is_success for result in results.values())


@pytest.mark.parametrize("buffer", [1, 4])
def test_a_consumer_that_stops_stops_the_network(make: Make, served: Callable[..., Origin], buffer: int) -> None:
    server = served()
    stream = make(server.url).stream(NAMES, buffer=buffer)
    first = next(stream)
    until(lambda: len(stream._ready) == buffer)
    threading.Event().wait(0.1)  # in which more could come
    assert {record.path for record in server.requests()} <= {f"/{name}" for name in NAMES}
    assert server.stats().requests == 1 + buffer
    results = [first, *stream]
    assert sorted(result.fragment_id for result in results) == sorted(NAMES)
    assert all(result.data == content(result.fragment_id) for result in results)


def test_a_budget_bounds_what_is_under_way(make: Make, served: Callable[..., Origin]) -> None:
    server = served()
    loader = make(server.url, memory_budget=1200)
    stream = loader.stream(LoadRequest(name, name, expected_size=500) for name in NAMES)
    until(lambda: len(stream._ready) == 2)
    threading.Event().wait(0.1)  # in which more could come
    assert server.stats().requests == 2
    assert all(result.data == content(result.fragment_id) for result in stream)


def test_two_streams_of_the_same_take_nothing_from_each_other(make: Make, served: Callable[..., Origin]) -> None:
    server = served(latency=0.05)
    loader = make(server.url)
    one, other = (loader.stream(NAMES[:10]) for _ in range(2))
    shared = loader.enqueue(LoadRequest(NAMES[0], NAMES[0]))
    shared.cancel()
    one.cancel()
    results = list(other)
    assert sorted(result.fragment_id for result in results) == sorted(NAMES[:10])
    assert all(result.is_success for result in results)
    assert server.stats().requests == 10


def test_what_is_cancelled_by_name_arrives_as_cancelled(make: Make) -> None:
    with Wire(always=[HOLD]) as server:
        loader = make(server.url)
        stream = loader.stream(["a"])
        server.await_requests(1)
        assert loader.cancel("a")
        (result,) = stream
        assert isinstance(result.error, Cancelled)


def test_a_loader_that_closes_ends_its_streams(make: Make) -> None:
    with Wire(always=[HOLD]) as server:
        loader = make(server.url)
        stream = loader.stream(NAMES, buffer=3)
        server.await_requests(1)
        loader.close()
        results = list(stream)
        assert sorted(result.fragment_id for result in results) == sorted(NAMES)
        assert all(isinstance(result.error, Cancelled) for result in results)


def test_a_block_that_is_left_early_stops_the_network(make: Make, served: Callable[..., Origin]) -> None:
    server = served(latency=0.05)
    loader = make(server.url, max_concurrent=2)
    with loader.stream(NAMES, buffer=10) as stream:
        next(stream)
    until(lambda: loader.stats().connections == 0)
    assert loader.stats().queued == 0
    assert server.stats().requests <= 6


@pytest.mark.parametrize("place", ["the fetcher", "the scheduler", "the alarms", "the stream"])
def test_a_generator_that_is_collected_while_its_thread_has_a_lock_holds_nothing_up(
    make: Make, served: Callable[..., Origin], place: str
) -> None:
    """The garbage collector may come at any allocation, in the midst of what the engine does under its locks."""
    server = served(latency=0.05)
    loader = make(server.url, max_concurrent=2)

    def results() -> Iterator[LoadResult]:
        with loader.stream(NAMES, buffer=10) as stream:
            held.append(stream)
            yield from stream

    held: list[StreamingLoader] = []
    generator = results()
    next(generator)
    locks: dict[str, Any] = {
        "the fetcher": loader._fetcher._lock,
        "the scheduler": loader.scheduler._changed,
        "the alarms": loader._fetcher._alarms._changed,
        "the stream": held[0]._arrived,
    }

    def collect() -> None:
        with locks[place]:
            generator.close()

    collecting = threading.Thread(target=collect, daemon=True)
    collecting.start()
    collecting.join(10.0)
    assert not collecting.is_alive()
    until(lambda: loader.stats().connections == 0 and loader.stats().queued == 0)
    assert server.stats().requests <= 12


def test_a_move_reaches_what_waits_what_is_queued_and_what_is_between_pieces(
    make: Make, served: Callable[..., Origin]
) -> None:
    server = served(latency=0.05)
    loader = make(server.url, max_concurrent=1)
    long = LoadRequest("long", "data", priority=Priority.HIGH)  # its further pieces are queued once the first is there
    stream = loader.stream([long, *NAMES[:6]], buffer=4)
    until(lambda: loader.stats().connections == 1)
    assert loader.update_priority("long", Priority.IDLE) is True  # handed out, to go on later
    assert loader.update_priority(NAMES[2], Priority.CRITICAL) is True  # queued
    assert loader.update_priority(NAMES[5], Priority.CRITICAL) is True  # waits in the stream
    assert loader.update_priority("nowhere", Priority.CRITICAL) is False
    results = [result.fragment_id for result in stream]
    order = [record.path.strip("/") for record in server.requests()]
    assert order[0] == "data"
    assert order[1] == NAMES[2]
    assert order.index(NAMES[5]) < order.index(NAMES[1])  # asked for as soon as one has been taken
    assert order[-2:] == ["data", "data"]
    assert results[-1] == "long"


def test_a_stream_that_is_forgotten_goes_once_nothing_of_it_is_on_its_way(
    make: Make, served: Callable[..., Origin]
) -> None:
    loader = make(served().url)
    stream = loader.stream(NAMES[:2], buffer=1)
    ready = stream._ready
    until(lambda: len(ready) == 1)
    assert loader.update_priority(NAMES[1], Priority.HIGH) is True
    del stream
    until(lambda: loader.update_priority(NAMES[1], Priority.HIGH) is False)


# --- a consumer that rests, in a process of its own, whose memory is looked at

BUDGET = 32 << 20
WHOLE = 128 << 20
RESTING = """\
import json, sys, threading, time
from blake3 import blake3
from holotensor_net import CdnEndpoint, LoadRequest, NetworkConfig, NetworkLoader

url, budget, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
spans = json.load(sys.stdin)

def resident():
    with open("/proc/self/status") as told:
        return sum(int(line.split()[1]) << 10 for line in told if line.startswith("VmRSS:"))

peaks, over = [resident()], threading.Event()

def watch():
    while not over.wait(0.01):
        peaks.append(resident())

config = NetworkConfig(endpoints=(CdnEndpoint(url),), cache_dir=False, memory_budget=budget)
requests = [LoadRequest(str(number), "object", byte_range=tuple(span)) for number, span in enumerate(spans)]
digests, taken = {}, 0
with NetworkLoader(config) as loader, loader.stream(requests) as stream:
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for result in stream:
        assert result.fragment_id not in digests
        digests[result.fragment_id] = blake3(result.data).hexdigest()
        taken += len(result.data)
        if len(digests) == 8:
            del result
            end, before_that = time.monotonic() + 30, -1
            while (at_rest := loader.stats()).connections or at_rest.bytes_fetched != before_that:
                assert time.monotonic() < end, "the network never rests"
                before_that = at_rest.bytes_fetched
                time.sleep(0.1)
            time.sleep(pause)
            still = loader.stats()
            ahead = still.bytes_fetched - taken
    over.set()
    watcher.join()
    told = {"digests": digests, "grown": max(peaks) - before, "ahead": ahead,
            "rest": [at_rest.bytes_fetched, still.bytes_fetched, still.connections]}
print(json.dumps(told))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what memory is in use")
@pytest.mark.parametrize("pause", [0.5, pytest.param(10.0, marks=pytest.mark.slow)])
def test_who_rests_makes_the_network_rest_and_the_memory_stays_within_its_budget(
    nginx: Callable[..., Nginx], tmp_path: Path, pause: float
) -> None:
    chance = random.Random(11)
    noise = chance.randbytes(1 << 20)
    data = b"".join(number.to_bytes(8, "little") + noise[8:] for number in range(WHOLE >> 20))
    (tmp_path / "object").write_bytes(data)
    spans, start = [], 0
    while start < WHOLE:
        stop = min(WHOLE, start + chance.choice((200_000, 1 << 20, 1_500_000, 4 << 20)))
        spans.append((start, stop))
        start = stop
    ended = subprocess.run(
        [sys.executable, "-c", RESTING, nginx(tmp_path).url, str(BUDGET), str(pause)],
        input=json.dumps(spans),
        capture_output=True,
        text=True,
        timeout=90 + pause,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["digests"] == {str(number): blake3_of(data[slice(*span)]) for number, span in enumerate(spans)}
    first, last, connections = told["rest"]
    assert first == last
    assert connections == 0
    assert BUDGET // 2 < told["ahead"] <= BUDGET
    # What was handed over stays in memory as a cache, a quarter as much; the rest are threads, and the allocator's.
    assert told["grown"] < BUDGET * 5 // 4 + (48 << 20)
