"""Brief pieces on their way together: what befalls one of them is nothing to its neighbours."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from wire import END, HOLD, Request, Resolver, Script, Wire, answer, part

from holotensor_net import CdnEndpoint, LoadRequest, LoadResult, NetworkConfig, NetworkLoader, Priority, RetryConfig
from holotensor_net.errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RateLimited,
    RetriesExhausted,
)

LENGTH, APART, COUNT = 100, 1 << 20, 24
DATA = bytes(range(251)) * 4
TAG = '"one"'
SIZE = COUNT * APART
BAD = 5


def body(start: int) -> bytes:
    return DATA[start // APART : start // APART + LENGTH]


def good(request: Request, **headers: Any) -> bytes:
    start, stop = asked(request)
    own = {"content_range": f"bytes {start}-{stop - 1}/{SIZE}", "etag": TAG}
    offset = start % APART
    return answer(body(start - offset)[offset : offset + stop - start], 206, **(own | headers))


def asked(request: Request) -> tuple[int, int]:
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


def is_bad(request: Request) -> bool:
    return asked(request)[0] // APART == BAD


@pytest.fixture
def loader() -> Iterator[Callable[..., NetworkLoader]]:
    made: list[NetworkLoader] = []

    def make(wire: Wire, **more: Any) -> NetworkLoader:
        own: dict[str, Any] = {"endpoints": (CdnEndpoint(wire.url),), "cache_dir": False, "timeout": 5.0}
        own["retry"] = RetryConfig(max_retries=1, initial_backoff=0.01)
        made.append(NetworkLoader(NetworkConfig(**(own | more))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def requests(count: int = COUNT, **more: Any) -> list[LoadRequest]:
    starts = [APART * number for number in range(count)]
    return [LoadRequest(f"{start}", "file", byte_range=(start, start + LENGTH), **more) for start in starts]


def scripted(bad: Callable[[Request], Script], *, once: bool = False) -> Callable[[Request], Script]:
    """All is well but the answer for one range, the first time or each time."""
    struck: list[Request] = []

    def told(request: Request) -> Script:
        if not is_bad(request) or (once and struck):
            return good(request)
        struck.append(request)
        return bad(request)

    return told


def test_many_are_on_the_way_at_once_for_one_thread(loader: Callable[..., NetworkLoader]) -> None:
    together = threading.Event()
    came: list[Request] = []

    def told(request: Request) -> Script:
        came.append(request)
        if len(came) >= 4:
            together.set()
        return [together, good(request)]  # nothing is answered before several were asked for

    with Wire(always=told) as wire:
        it = loader(wire, max_concurrent=8)
        futures = it.enqueue_many(requests())
        threads = set()
        for future in futures:
            assert future.result(10).is_success
            threads |= {thread.name for thread in threading.enumerate() if "holotensor-fetch" in thread.name}
        assert [bytes(future.result().data) for future in futures] == [body(APART * n) for n in range(COUNT)]
        assert len(threads) <= 2  # of the eight that there might be; one may have come in vain
        assert it.stats().requests == len(wire.requests) == COUNT
        assert wire.connections <= 8


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda request: answer(status=404), NotFound),
        (lambda request: answer(b"no", status=429, retry_after=100), RateLimited),
        (lambda request: good(request, etag='"two"', content_range="bytes 7-106/1000"), ProtocolError),
        (lambda request: good(request, content_range=f"bytes {BAD * APART}-{BAD * APART + 99}/99999999"), None),
        (lambda request: good(request, content_encoding="gzip"), ProtocolError),
        (lambda request: [good(request) + b"more"], ProtocolError),
        (lambda request: good(request, content_type="multipart/byteranges; boundary=a"), ProtocolError),
        (lambda request: [good(request)[:-1], END], ConnectionFailed),
        (lambda request: [good(request)[:20], END], ConnectionFailed),
        (lambda request: [END], ConnectionFailed),
    ],
)
@pytest.mark.parametrize("once", [False, True])
def test_what_is_wrong_with_one_is_told_of_that_one_alone(
    loader: Callable[..., NetworkLoader], bad: Callable[[Request], Script], error: type[Exception] | None, once: bool
) -> None:
    with Wire(always=scripted(bad, once=once)) as wire:
        it = loader(wire, max_concurrent=8)
        results = [future.result(10) for future in it.enqueue_many(requests())]
        for number, result in enumerate(results):
            if number != BAD:
                assert result.is_success or isinstance(result.error, RateLimited)
            if result.is_success:
                assert bytes(result.data) == body(APART * number)
        failed = results[BAD]
        repeats = sum(is_bad(request) for request in wire.requests)
        if failed.is_success:
            assert error is None or (once and error in (ProtocolError, ConnectionFailed))
            assert repeats == 1 if error is None else 2
        else:
            last = failed.error.last_error if isinstance(failed.error, RetriesExhausted) else failed.error
            assert error is not None
            assert isinstance(last, error)
            assert repeats <= 2  # the answer was read, and not asked for again; then one retry at most
            if error in (NotFound, RateLimited):
                assert repeats == 1


def test_another_version_is_refused_where_one_is_pinned(loader: Callable[..., NetworkLoader]) -> None:
    from holotensor_net import Validator

    pinned = Validator(TAG, None, True)
    with Wire(always=scripted(lambda request: good(request, etag='"two"'))) as wire:
        results = [future.result(10) for future in loader(wire).enqueue_many(requests(validator=pinned))]
        assert isinstance(results[BAD].error, ObjectChanged)
        assert all(result.is_success for number, result in enumerate(results) if number != BAD)


def test_one_that_is_silent_holds_nobody_up_and_is_cut_once_nobody_wants_it(
    loader: Callable[..., NetworkLoader],
) -> None:
    with Wire(always=scripted(lambda request: [HOLD])) as wire:
        it = loader(wire, max_concurrent=8, timeout=60.0)
        futures = it.enqueue_many(requests())
        assert all(future.result(10).is_success for number, future in enumerate(futures) if number != BAD)
        assert not futures[BAD].done()
        futures[BAD].cancel()
        deadline = time.monotonic() + 5
        while it.stats().connections and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert it.stats().connections == 0


def test_one_that_comes_late_comes(loader: Callable[..., NetworkLoader]) -> None:
    late = threading.Event()
    with Wire(always=scripted(lambda request: [good(request)[:30], late, good(request)[30:]])) as wire:
        futures = loader(wire, max_concurrent=8, timeout=1.0).enqueue_many(requests())  # it is given a worker meanwhile
        assert all(future.result(10).is_success for number, future in enumerate(futures) if number != BAD)
        threading.Timer(0.5, late.set).start()
        assert bytes(futures[BAD].result(10).data) == body(BAD * APART)
        assert sum(is_bad(request) for request in wire.requests) == 1


def test_closing_ends_all_that_is_on_the_way_at_once(loader: Callable[..., NetworkLoader]) -> None:
    with Wire(always=lambda request: [HOLD]) as wire:
        it = loader(wire, max_concurrent=8, timeout=60.0)
        futures = it.enqueue_many(requests())
        wire.await_requests(2)
        began = time.monotonic()
        it.close()
        assert time.monotonic() - began < 2
        assert all(isinstance(future.result(1).error, Cancelled) for future in futures)
        wire.await_closed()


@pytest.mark.parametrize("end", ["close", "answer", "deadline"])
def test_a_name_that_nobody_resolves_holds_no_round_up(
    loader: Callable[..., NetworkLoader], resolver: Resolver, end: str
) -> None:
    with Wire(always=good) as wire:
        named = (CdnEndpoint(wire.url.replace("127.0.0.1", "models.example")),)
        it = loader(wire, endpoints=named, max_concurrent=8, timeout=60.0)
        futures = it.enqueue_many(requests(deadline=0.2 if end == "deadline" else None))
        assert resolver.is_asked.wait(5) or end == "deadline"  # on a slow machine that may be over before
        began = time.monotonic()
        if end == "answer":
            resolver.may_answer.set()
            assert [bytes(future.result(5).data) for future in futures] == [DATA[n : n + LENGTH] for n in range(COUNT)]
        elif end == "deadline":
            assert all(isinstance(future.result(5).error, DeadlineExceeded) for future in futures)
        else:
            it.close()
            assert all(isinstance(future.result(0).error, Cancelled) for future in futures)
            assert resolver.asked == ["models.example"]
        assert time.monotonic() - began < 5.0


def test_what_is_critical_goes_before_those_that_wait(loader: Callable[..., NetworkLoader]) -> None:
    gate = threading.Event()
    with Wire(always=lambda request: [gate, good(request)]) as wire:
        it = loader(wire, max_concurrent=4)
        futures = it.enqueue_many(requests(20, priority=Priority.LOW))
        wire.await_requests(2)
        urgent = LoadRequest("u", "file", byte_range=(21 * APART, 21 * APART + LENGTH), priority=Priority.CRITICAL)
        future = it.enqueue(urgent)
        gate.set()
        assert future.result(10).is_success
        assert all(one.result(10).is_success for one in futures)
        order = [asked(request)[0] for request in wire.requests]
        assert order.index(21 * APART) <= 8


def test_no_more_connections_than_an_endpoint_may_have(loader: Callable[..., NetworkLoader]) -> None:
    with Wire(always=good) as wire:
        config = NetworkConfig(endpoints=(CdnEndpoint(wire.url, max_connections=2),), cache_dir=False)
        with NetworkLoader(config) as it:
            assert all(future.result(10).is_success for future in it.enqueue_many(requests()))
        assert wire.connections <= 2


def test_one_connection_is_one_whatever_is_asked_for(loader: Callable[..., NetworkLoader]) -> None:
    def told(request: Request) -> Script:
        start, stop = asked(request)
        return part(bytes(SIZE), start, stop, etag=TAG)

    with Wire(always=told) as wire:
        it = loader(wire, endpoints=(CdnEndpoint(wire.url, max_connections=1),))
        for length in (LENGTH, 1 << 18, LENGTH, 1 << 18):  # a server with one thread would never see a second
            assert it.load(LoadRequest(f"{length}", "file", byte_range=(0, length))).is_success
        assert wire.connections == 1


@pytest.mark.parametrize("step", ["depart", "returned"])
def test_a_defect_on_the_way_is_told_and_gives_the_connections_back(
    loader: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Wire(always=good) as wire:
        it = loader(wire, max_concurrent=8)
        courier = it._fetcher._courier
        whole, struck = getattr(courier, step), []

        def once(those: Any) -> Any:
            if not struck:
                struck.append(len(those))
                raise RuntimeError("a defect")
            return whole(those)

        monkeypatch.setattr(courier, step, once)
        results = [future.result(10) for future in it.enqueue_many(requests())]
        failed = [result for result in results if not result.is_success]
        assert len(failed) == struck[0]
        assert all("a defect" in str(result.error) for result in failed)
        assert it.load(LoadRequest("again", "file", byte_range=(0, LENGTH - 1))).is_success
        it.close()
        assert it.stats().connections == 0


@pytest.mark.parametrize("most", [1, 64])
@pytest.mark.parametrize("length", [LENGTH - 1, 1 << 18])
def test_who_is_called_back_may_wait_for_another(loader: Callable[..., NetworkLoader], most: int, length: int) -> None:
    def told(request: Request) -> Script:
        start, stop = asked(request)
        return part(bytes(SIZE), start, stop, etag=TAG)

    with Wire(always=told) as wire:
        it = loader(wire, max_concurrent=most)
        told_of: list[bool] = []
        over = threading.Event()

        def ask(_: object) -> None:
            if not told_of:
                told_of.append(False)
                told_of[0] = it.enqueue(LoadRequest("another", "file", byte_range=(0, length))).result(5).is_success
                over.set()

        for request in requests():
            it.enqueue(request).add_done_callback(ask)
        assert over.wait(10)
        assert told_of == [True]


def test_who_is_told_of_what_another_process_has_brought_may_wait_for_another(
    loader: Callable[..., NetworkLoader], tmp_path: Path
) -> None:
    gate, told_of, over = threading.Event(), list[bool](), threading.Event()

    def told(request: Request) -> Script:
        fresh = good(request, cache_control="max-age=100")
        return [gate, fresh] if asked(request)[0] == 0 else fresh

    def ask(future: Future[LoadResult]) -> None:
        told_of.append(future.result().from_cache)
        told_of.append(it.load(one_more).is_success)
        over.set()

    with Wire(always=told) as wire:
        first, common, one_more = requests(3)
        it = loader(wire, max_concurrent=1, cache_dir=tmp_path)
        it.enqueue(first)
        wire.await_requests(1)
        it.enqueue(common).add_done_callback(ask)
        assert loader(wire, cache_dir=tmp_path).load(common).is_success
        gate.set()
        assert over.wait(10)
        assert told_of == [True, True]


def test_callbacks_of_a_batch_are_called_in_turn_though_one_is_wrong(loader: Callable[..., NetworkLoader]) -> None:
    gate, told, over = threading.Event(), list[object](), threading.Event()

    def fail(_: object) -> None:
        told.append("wrong")
        raise ValueError("a callback's own")

    with Wire(always=lambda request: [gate, good(request)]) as wire:
        future = loader(wire).enqueue(requests(1)[0])
        future.add_done_callback(fail)
        future.add_done_callback(lambda one: told.append(one))
        future.add_done_callback(lambda _: over.set())
        gate.set()
        assert over.wait(10)
        assert told == ["wrong", future]


def test_what_is_to_be_called_back_is_though_the_loader_is_closed_meanwhile(
    loader: Callable[..., NetworkLoader],
) -> None:
    with Wire(always=good) as wire:
        it = loader(wire)
        told: list[object] = []
        futures = it.enqueue_many(requests())
        for future in futures:
            future.add_done_callback(told.append)
        futures[0].result(10)
        it.close()
        assert len(told) == COUNT


def test_without_a_file_descriptor_to_spare_each_comes_by_itself(
    loader: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with Wire(always=good) as wire:
        results = [future.result(10) for future in loader(wire).enqueue_many(requests())]
        assert [bytes(result.data) for result in results] == [body(APART * n) for n in range(COUNT)]


def test_where_no_thread_can_be_started_what_is_slow_comes_once(
    loader: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, start, refused = threading.Event(), threading.Thread.start, list[str]()

    def refuse(thread: threading.Thread) -> None:
        if "holotensor-fetch" in thread.name:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    with Wire(always=scripted(lambda request: [good(request)[:30], late, good(request)[30:]])) as wire:
        it = loader(wire, max_concurrent=8, timeout=2.0)
        futures = it.enqueue_many(requests()[BAD : BAD + 1])  # one worker
        wire.await_requests(1)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        while not refused:  # it is slow: another worker is wanted
            threading.Event().wait(0.01)
        monkeypatch.undo()
        late.set()
        assert futures[0].result(10).is_success
        assert all(future.result(10).is_success for future in it.enqueue_many(requests()))
        assert sum(is_bad(request) for request in wire.requests) <= 2  # the second time it was asked for anew
        deadline = time.monotonic() + 5
        while it._fetcher.stats().workers and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert it._fetcher.stats().workers == 0


def test_what_was_asked_for_comes_though_somebody_wants_silence_since(loader: Callable[..., NetworkLoader]) -> None:
    silent, late = threading.Event(), threading.Event()

    def told(request: Request) -> Script:
        if is_bad(request):
            return [late, answer(b"no", status=429, retry_after=100)]
        return [silent, good(request)]

    with Wire(always=told) as wire:
        it = loader(wire, max_concurrent=8, timeout=1.0, retry=RetryConfig(max_retries=0))
        futures = it.enqueue_many(requests()[BAD : BAD + 2])
        wire.await_requests(2)
        late.set()
        assert isinstance(futures[0].result(10).error, RateLimited)
        while it._fetcher._rounds.is_on:  # it is slow, and given a worker of its own
            threading.Event().wait(0.01)
        silent.set()
        assert futures[1].result(10).is_success


def test_who_is_refused_while_others_are_served_is_not_to_blame(loader: Callable[..., NetworkLoader]) -> None:
    has_served = threading.Event()
    with Wire(always=scripted(lambda request: [has_served, answer(b"no", status=503)], once=True)) as wire:
        futures = loader(wire, retry=RetryConfig(max_retries=0)).enqueue_many(requests())
        assert all(future.result(10).is_success for number, future in enumerate(futures) if number != BAD)
        has_served.set()
        assert futures[BAD].result(10).is_success
        assert sum(is_bad(request) for request in wire.requests) == 2


def test_a_server_that_serves_few_at_a_time_serves_all(loader: Callable[..., NetworkLoader]) -> None:
    lock, busy = threading.Lock(), list[Request]()

    def told(request: Request) -> Iterator[Any]:
        with lock:
            is_one_too_many = len(busy) >= 2
            if not is_one_too_many:
                busy.append(request)
        if is_one_too_many:
            yield answer(b"no", status=503)
            return
        yield 0.01
        with lock:
            busy.remove(request)
        yield good(request)

    with Wire(always=told) as wire:
        it = loader(wire, max_concurrent=16, retry=RetryConfig(max_retries=1, initial_backoff=0.3, jitter=False))
        results = [future.result(60) for future in it.enqueue_many(requests())]
        assert all(result.is_success for result in results), [r.error for r in results if not r.is_success][:3]
