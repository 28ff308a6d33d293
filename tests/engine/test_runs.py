"""Fragments that come in one load: each future is as any other, whatever becomes of the others."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire import HOLD, RESET, Request, Wire, answer, part

from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.engine.runs import Member, runs_in
from holotensor_net.errors import Cancelled, DeadlineExceeded, HttpError
from holotensor_net.values import LoadRequest, LoadResult, Priority, Validator

SIZE = 100
MANY = 40
CHUNK = 8192  # a short fragment has a quarter of it at most
DATA = random.Random(5).randbytes(MANY * SIZE)
OTHER = random.Random(6).randbytes(MANY * SIZE)
NEVER = 10.0

Make = Callable[..., NetworkLoader]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes loaders that have memory alone; they are closed in the end."""
    with ExitStack() as running:

        def start(*urls: str, **settings: Any) -> NetworkLoader:
            fixed: dict[str, Any] = {
                "cache_dir": False,
                "chunk_size": CHUNK,
                "retry": RetryConfig(max_retries=0),
                "timeout": 5.0,
            }
            endpoints = [CdnEndpoint(url, max_connections=2) for url in urls]
            return running.enter_context(NetworkLoader(NetworkConfig(endpoints=endpoints, **(fixed | settings))))

        yield start


def fragment(number: int, name: str | None = None, **fields: Any) -> LoadRequest:
    own = {"byte_range": (number * SIZE, (number + 1) * SIZE)}
    return LoadRequest(name or f"{number}", "file", **(own | fields))


def fragments(count: int = MANY, **fields: Any) -> list[LoadRequest]:
    return [fragment(number, **fields) for number in range(count)]


def bytes_of(number: int, data: bytes = DATA) -> bytes:
    return data[number * SIZE : (number + 1) * SIZE]


def ranged(request: Request, data: bytes = DATA, tag: str = '"v1"', age: int = 600) -> bytes:
    start, stop = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
    return part(data, start, min(stop + 1, len(data)), etag=tag, cache_control=f"max-age={age}")


def spans(server: Wire) -> list[str]:
    return [request.headers["range"].removeprefix("bytes=") for request in server.requests]


def got(future: Future[LoadResult]) -> bytes:
    return bytes(future.result(NEVER).data)


class Held:
    """A server that answers each request only once it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.server = Wire(always=lambda request: [self.go, ranged(request)])

    def __enter__(self) -> Held:
        self.server.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.go.set()
        self.server.__exit__(*exc)

    def blocked(self, loader: NetworkLoader) -> list[Future[LoadResult]]:
        """Two requests for something else take both connections."""
        futures = [loader.enqueue(LoadRequest(f"blocker {n}", f"blocker {n}", byte_range=(0, SIZE))) for n in range(2)]
        self.server.await_requests(2)
        return futures


@pytest.fixture
def held() -> Iterator[Held]:
    with Held() as server:
        yield server


# --- what makes a run


def sizes(requests: list[LoadRequest], short: int = 1000, most: int = 10**6) -> list[int]:
    return [len(run) for run in runs_in(requests, short=short, most=most)]


def test_what_lies_in_a_row_makes_a_run() -> None:
    assert sizes(fragments()) == [MANY]
    assert sizes(fragments(3)) == [1] * 3
    assert sizes([]) == []


def test_a_run_is_as_long_as_is_allowed() -> None:
    assert sizes(fragments(), most=20 * SIZE) == [20, 20]
    assert sizes(fragments(), short=SIZE - 1) == [1] * MANY


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": Priority.HIGH},
        {"importance": 0.75},
        {"validator": Validator('"v1"', None, True)},
        {"path": "other"},
        {"byte_range": (1, 2)},
        {"byte_range": (20 * SIZE, 20 * SIZE)},
        {"byte_range": None},
        {"checksum": f"blake3:{'0' * 64}"},
        {"deadline": 5.0},
        {"allow_short": True},
        {"expected_size": SIZE + 1},
    ],
    ids=str,
)
def test_what_is_unlike_its_neighbours_comes_alone(fields: dict[str, Any]) -> None:
    own: dict[str, Any] = {"path": "file", "byte_range": (20 * SIZE, 21 * SIZE)}
    odd = LoadRequest("20", **(own | fields))
    requests = fragments()
    requests[20] = odd
    assert sizes(requests) == [20, 1, MANY - 21]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 300))
def test_every_request_is_in_one_group_and_in_its_place(shape: list[tuple[int, int, bool]], most: int) -> None:
    requests, at = [], 0
    for number, (length, gap, is_likely) in enumerate(shape):
        at += 0 if is_likely else gap
        requests.append(LoadRequest(f"{number}", "file", byte_range=(at, at + length)))
        at += length
    groups = list(runs_in(requests, short=25, most=most))
    assert [request for group in groups for request in group] == requests
    for group in groups:
        ranges = [request.byte_range for request in group if request.byte_range is not None]
        if len(group) > 1:
            assert all(one.stop == other.start for one, other in itertools.pairwise(ranges))
            assert ranges[-1].stop - ranges[0].start <= most
            assert all(0 < each.length <= 25 for each in ranges)


# --- what comes of it


def test_a_run_comes_in_one_request_and_each_future_has_its_part(make: Make) -> None:
    with Wire(ranged) as server:
        loader = make(server.url)
        futures = loader.enqueue_many(fragments())
        results = [future.result(NEVER) for future in futures]
        assert [bytes(result.data) for result in results] == [bytes_of(n) for n in range(MANY)]
        assert [result.fragment_id for result in results] == [f"{n}" for n in range(MANY)]
        assert all(result.data.readonly and not result.from_cache and result.duration > 0 for result in results)
        assert futures[3].result() == results[3]
        assert futures[3].exception() is None
        assert spans(server) == [f"0-{MANY * SIZE - 1}"]
        stats = loader.stats()
        assert (stats.requests, stats.completed, stats.failed, stats.queued) == (1, MANY, 0, 0)


def test_a_pinned_run_comes_too(make: Make) -> None:
    with Wire(always=ranged) as server:
        futures = make(server.url).enqueue_many(fragments(validator=Validator('"v1"', None, True), expected_size=SIZE))
        assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]


def test_what_is_queued_counts_each_fragment(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragments())
    assert loader.stats().queued == MANY
    held.go.set()
    wait(futures, NEVER)
    assert (loader.stats().queued, loader.stats().completed) == (0, MANY + 2)


def test_all_ways_to_wait_see_the_end(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    futures = loader.enqueue_many(fragments())
    called: list[Future[LoadResult]] = []
    over = threading.Event()
    futures[1].add_done_callback(called.append)
    futures[1].add_done_callback(lambda _: over.set())
    assert not wait(futures[:5], 0).done
    assert not futures[0].done()
    assert not futures[0].running()
    with pytest.raises(TimeoutError):
        futures[2].result(0)
    seen: list[Future[LoadResult]] = []
    watching = threading.Thread(target=lambda: seen.extend(as_completed(futures, NEVER)))
    watching.start()
    held.go.set()
    assert wait(futures, NEVER).done == set(futures)
    watching.join(NEVER)
    assert len(seen) == MANY
    assert over.wait(NEVER)
    assert called == [futures[1]]
    futures[7].add_done_callback(called.append)
    assert called == [futures[1], futures[7]]
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]


def test_one_that_is_cancelled_leaves_the_others_alone(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    futures = loader.enqueue_many(fragments())
    held.server.await_requests(1)
    called: list[Future[LoadResult]] = []
    futures[4].add_done_callback(called.append)
    assert futures[4].cancel()
    assert loader.cancel("5")
    assert not loader.cancel("5")
    assert isinstance(futures[5].result(NEVER).error, Cancelled)
    held.go.set()
    assert [got(futures[n]) for n in range(MANY) if n not in (4, 5)] == [
        bytes_of(n) for n in range(MANY) if n not in (4, 5)
    ]
    with pytest.raises(CancelledError):
        futures[4].result(NEVER)
    assert futures[4].cancelled()
    assert called == [futures[4]]
    assert not futures[6].cancel()
    assert (loader.stats().completed, loader.stats().failed) == (MANY - 2, 2)


def test_a_run_that_nobody_waits_for_is_cut(make: Make) -> None:
    with Wire([HOLD]) as server:
        loader = make(server.url)
        futures = loader.enqueue_many(fragments())
        server.await_requests(1)
        for future in futures:
            assert future.cancel()
        server.await_closed()
        assert loader.stats().failed == MANY


def test_what_is_cancelled_before_it_was_begun_is_not_asked_for(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragments())
    for future in futures[:30]:
        assert future.cancel()
    held.go.set()
    assert [got(future) for future in futures[30:]] == [bytes_of(n) for n in range(30, MANY)]
    assert spans(held.server)[2:] == [f"{30 * SIZE}-{MANY * SIZE - 1}"]


def test_one_that_is_wanted_first_comes_first(make: Make, held: Held) -> None:
    loader = make(held.server.url, max_concurrent=1)
    blocker = loader.enqueue(LoadRequest("blocker", "blocker", byte_range=(0, SIZE)))
    held.server.await_requests(1)
    futures = loader.enqueue_many(fragments(priority=Priority.LOW))
    assert loader.update_priority("20", Priority.CRITICAL)
    held.go.set()
    assert got(blocker) == bytes_of(0)
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
    assert f"{20 * SIZE}-{21 * SIZE - 1}" in spans(held.server)[1:3]


def test_the_scheduler_moves_one_of_a_run_too(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragments(priority=Priority.LOW))
    assert loader.scheduler.update_priority("20", Priority.HIGH)
    assert loader.scheduler.update_priority("0", Priority.IDLE)
    assert not loader.scheduler.update_priority("no such", Priority.HIGH)
    held.go.set()
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
    assert f"{20 * SIZE}-{21 * SIZE - 1}" in spans(held.server)[2:4]  # both blockers may have ended at once
    assert f"0-{SIZE - 1}" in spans(held.server)[-2:]  # which two workers ask for at once
    assert not loader.scheduler.update_priority("20", Priority.HIGH)


def test_no_one_of_a_run_on_its_way_holds_up_the_others(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    futures = loader.enqueue_many(fragments())
    held.server.await_requests(1)
    [run] = loader._fetcher._books.all()
    assert loader.scheduler.update_priority("5", Priority.HIGH)
    assert loader.scheduler.update_priority("0", Priority.IDLE)  # the name of the first is that of all of it
    assert run.priority == Priority.HIGH
    held.go.set()
    assert got(futures[5]) == bytes_of(5)


def test_a_more_urgent_request_for_the_same_does_not_wait_for_the_run(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragments(priority=Priority.LOW))
    urgent = loader.enqueue(fragment(20, priority=Priority.HIGH))
    assert urgent is futures[20]
    held.go.set()
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
    assert f"{20 * SIZE}-{21 * SIZE - 1}" in spans(held.server)[2:4]  # two come free at once


def test_equal_requests_share_what_is_on_its_way(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    futures = loader.enqueue_many(fragments())
    held.server.await_requests(1)
    assert loader.enqueue(fragment(3)) is futures[3]
    assert loader.enqueue(fragment(3, expected_size=SIZE)) is futures[3]
    named = loader.enqueue(fragment(3, "another name"))
    own = loader.enqueue(fragment(3), shared=False)
    late = loader.enqueue(fragment(4, deadline=0.05))
    again = loader.enqueue_many(fragments())
    assert again == futures
    assert isinstance(late.result(NEVER).error, DeadlineExceeded)
    assert loader.update_priority("another name", Priority.HIGH)
    assert own.cancel()
    held.go.set()
    assert (named.result(NEVER).fragment_id, got(named)) == ("another name", bytes_of(3))
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
    assert len(held.server.requests) == 1


def test_a_run_goes_around_what_is_on_its_way(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    first = loader.enqueue(fragment(3))
    held.server.await_requests(1)
    futures = loader.enqueue_many(fragments())
    assert futures[3] is first
    held.go.set()
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]


def test_fragments_of_one_name_are_told_apart(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragment(n, "name") for n in range(MANY))
    elsewhere = loader.enqueue(LoadRequest("name", "elsewhere", byte_range=(0, SIZE)))
    assert loader.update_priority("name", Priority.HIGH)
    assert elsewhere.cancel()
    held.go.set()
    assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
    assert not loader.update_priority("name", Priority.LOW)


def test_what_fails_fails_alone(make: Make) -> None:
    """The object ends before some of what is asked of it."""
    data = DATA[: 35 * SIZE]

    def short(request: Request) -> bytes:
        start = int(request.headers["range"].removeprefix("bytes=").partition("-")[0])
        if start >= len(data):
            return answer(status=416, content_range=f"bytes */{len(data)}")
        return ranged(request, data)

    with Wire(always=short) as server:
        loader = make(server.url)
        futures = loader.enqueue_many(fragments())
        assert [got(future) for future in futures[:35]] == [bytes_of(n) for n in range(35)]
        for future in futures[35:]:
            error = future.result(NEVER).error
            assert isinstance(error, HttpError)
            assert error.status == 416
        assert (loader.stats().completed, loader.stats().failed) == (35, 5)


def test_a_failed_run_is_asked_for_in_parts(make: Make) -> None:
    with Wire(answer(status=404), always=ranged) as server:
        futures = make(server.url).enqueue_many(fragments())
        assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
        assert len(server.requests) == 1 + MANY


@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("status", [429, 503])
def test_a_run_that_was_one_connection_too_many_stays_together(
    make: Make, monkeypatch: pytest.MonkeyPatch, status: int, count: int
) -> None:
    begun, go = threading.Event(), threading.Event()

    def first(request: Request) -> Iterator[bytes | threading.Event]:
        whole = ranged(request)
        yield whole[:-1]
        begun.set()
        yield go
        yield whole[-1:]

    with Wire(first, answer(status=status), always=ranged) as server:
        loader = make(server.url)
        courier = loader._fetcher._courier
        failed = courier.failed

        def then_go(*told: Any) -> bool:
            is_passing = failed(*told)
            go.set()
            return is_passing

        monkeypatch.setattr(courier, "failed", then_go)
        other = loader.enqueue(LoadRequest("other", "other", byte_range=(0, SIZE)))
        assert begun.wait(NEVER)
        while not any(getattr(race, "headed", None) for race in list(courier._races)):
            time.sleep(0.001)
        futures = loader.enqueue_many(fragments(count))
        assert [got(future) for future in futures] == [bytes_of(n) for n in range(count)]
        assert got(other) == bytes_of(0)
        assert len(server.requests) == 3


@pytest.mark.parametrize("failure", [[RESET], answer(status=503), answer(status=429, retry_after=0)])
def test_what_says_nothing_of_a_run_leaves_it_joined(make: Make, failure: Any) -> None:
    with Wire(failure, always=ranged) as server:
        futures = make(server.url).enqueue_many(fragments())
        assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
        assert len(server.requests) < 5


def test_one_on_whom_the_server_breaks_down_leaves_the_others_right(make: Make) -> None:
    def fragile(request: Request) -> Any:
        start, stop = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        return [RESET] if start <= 7 * SIZE <= stop else ranged(request)

    with Wire(always=fragile) as server:
        loader = make(server.url)
        futures = loader.enqueue_many(fragments())
        results = [future.result(NEVER) for future in futures]
        assert [n for n in range(MANY) if not results[n].is_success] == [7]
        assert [bytes(results[n].data) for n in range(MANY) if n != 7] == [bytes_of(n) for n in range(MANY) if n != 7]
        assert (loader.stats().completed, loader.stats().failed) == (MANY - 1, 1)


def test_closing_ends_a_run(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    futures = loader.enqueue_many(fragments())
    watched = futures[0]
    watched.add_done_callback(lambda _: None)
    held.server.await_requests(1)
    loader.close()
    assert all(isinstance(future.result(NEVER).error, Cancelled) for future in futures)
    with pytest.raises(Cancelled):
        _ = futures[1].result().data


def test_a_cleared_queue_ends_a_run(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    futures = loader.enqueue_many(fragments())
    loader.scheduler.clear()
    assert all(isinstance(future.result(NEVER).error, Cancelled) for future in futures)


def test_nothing_is_kept_of_a_run_that_nobody_holds(make: Make) -> None:
    with Wire(always=ranged) as server:
        loader = make(server.url, memory_budget=1 << 20)
        futures = loader.enqueue_many(fragments())
        assert got(futures[0]) == bytes_of(0)
        known = weakref.ref(futures[1])
        del futures
        gc.collect()
        assert known() is None
        assert len(loader._fetcher._books) == 0
        assert not loader._fetcher._books._by_name


def test_a_run_that_fell_apart_goes_with_its_last_future(make: Make, held: Held) -> None:
    loader = make(held.server.url)
    held.blocked(loader)
    gc.collect()
    gc.disable()
    try:
        futures = loader.enqueue_many(fragments())
        futures[3].add_done_callback(lambda _: None)
        assert futures[7].cancel()
        futures[4].add_done_callback(lambda _: None)
        held.go.set()
        assert got(futures[3]) + got(futures[4]) == bytes_of(3) + bytes_of(4)
        wait([future for future in futures if not future.cancelled()], NEVER)
        loader.close()  # its threads hold what they had last
        known = weakref.ref(futures[3].run)
        del futures
        assert known() is None
    finally:
        gc.enable()


# --- what is kept


def test_any_part_of_what_came_is_found(make: Make) -> None:
    with Wire(ranged) as server:
        loader = make(server.url)
        assert got(loader.enqueue_many(fragments())[0]) == bytes_of(0)
        again = loader.enqueue_many(fragments())
        assert [got(future) for future in again] == [bytes_of(n) for n in range(MANY)]
        assert all(future.result().from_cache for future in again)
        other = LoadRequest("other", "file", byte_range=(150, 333))
        assert loader.is_cached(other)
        assert loader.load(other).data == DATA[150:333]
        assert len(server.requests) == 1


def test_what_is_stale_is_confirmed_in_part(make: Make) -> None:
    def once(request: Request) -> bytes:
        if request.headers.get("if-none-match") == '"v1"':
            return answer(status=304, etag='"v1"', cache_control="max-age=600")
        return ranged(request, age=0)

    with Wire(always=once) as server:
        loader = make(server.url)
        assert got(loader.enqueue_many(fragments())[0]) == bytes_of(0)
        result = loader.load(fragment(7))
        assert (bytes(result.data), result.from_cache) == (bytes_of(7), True)
        assert loader.load(fragment(8)).data == bytes_of(8)
        assert len(server.requests) == 2


def test_no_part_is_taken_of_what_has_become_shorter(make: Make) -> None:
    with Wire(
        lambda request: ranged(request, age=0), always=lambda r: ranged(r, DATA[: 8 * SIZE], '"short"')
    ) as server:
        loader = make(server.url)
        assert loader.load(LoadRequest("long", "file", byte_range=(0, 10 * SIZE))).data == DATA[: 10 * SIZE]
        rest = LoadRequest("short", "file", byte_range=(0, 10 * SIZE), allow_short=True)
        assert loader.load(rest).data == DATA[: 8 * SIZE]
        beyond = LoadRequest("beyond", "file", byte_range=(7 * SIZE, 9 * SIZE))
        assert not loader.is_cached(beyond)
        assert not loader.load(beyond).is_success
        assert loader.load(fragment(7)).data == bytes_of(7)


def test_what_has_been_evicted_comes_as_a_run_again(make: Make) -> None:
    with Wire(always=ranged) as server:
        loader = make(server.url)
        for _ in range(2):
            futures = loader.enqueue_many(fragments())
            assert {type(future) for future in futures} == {Member}
            assert [got(future) for future in futures] == [bytes_of(n) for n in range(MANY)]
            loader.cache.clear()


def test_versions_are_never_mixed(make: Make) -> None:
    with Wire(lambda request: ranged(request, age=0), always=lambda r: ranged(r, OTHER, '"v2"')) as server:
        loader = make(server.url)
        assert got(loader.enqueue_many(fragments())[0]) == bytes_of(0)
        assert loader.load(fragment(7)).data == bytes_of(7, OTHER)
        assert loader.load(fragment(8)).data == bytes_of(8, OTHER)
        futures = loader.enqueue_many(fragments())
        assert [got(future) for future in futures] == [bytes_of(n, OTHER) for n in range(MANY)]


# --- interrupts


def interrupted(loader: NetworkLoader, requests: list[LoadRequest], number: int) -> bool:
    """Enqueue them, and be interrupted after so many calls of ours; False if there are not so many."""
    left = number

    def interrupt(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        if event in ("call", "c_return") and "holotensor_net" in frame.f_code.co_filename:
            left -= 1
            if not left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(interrupt)
    try:
        loader.enqueue_many(requests)
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(before)
    return left <= 0


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("apart", [1, 50], ids=["a row", "apart"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may come as something is collected
def test_whoever_is_interrupted_can_ask_again(make: Make, apart: int, step: int) -> None:
    data = random.Random(7).randbytes(9 * 100 * SIZE)
    requests = [fragment(number * apart) for number in range(9)]
    with Wire(always=lambda request: ranged(request, data)) as server:
        for number in itertools.count(1, step):
            loader = make(server.url)
            was_interrupted = interrupted(loader, requests, number)
            again = loader.enqueue_many(requests)
            assert [got(future) for future in again] == [bytes_of(n * apart, data) for n in range(9)], number
            loader.close()
            if not was_interrupted:
                return
