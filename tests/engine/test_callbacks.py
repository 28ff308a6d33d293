"""Who is called back may wait for what others are told, load again, and be held up: nobody else is for that."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from wire import HOLD, Request, Script, Wire, answer, part

from holotensor_net import CdnEndpoint, LoadRequest, LoadResult, NetworkConfig, NetworkLoader, Priority
from holotensor_net.errors import Cancelled, DeadlineExceeded

DATA = bytes(range(256)) * 4096
LENGTH = 100_000  # too long for a round of brief pieces, short enough to be joined with neighbours
LONG = 60.0  # seconds that nothing here takes, unless it hangs


@pytest.fixture
def loader() -> Iterator[Callable[..., NetworkLoader]]:
    made: list[NetworkLoader] = []

    def make(wire: Wire, **more: Any) -> NetworkLoader:
        own: dict[str, Any] = {"endpoints": (CdnEndpoint(wire.url),), "cache_dir": False, "timeout": LONG}
        made.append(NetworkLoader(NetworkConfig(**(own | more))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def request(number: int, name: str = "", *, path: str = "file", **more: Any) -> LoadRequest:
    start = number * LENGTH
    return LoadRequest(name or f"{number}", path, byte_range=(start, start + LENGTH), **more)


def good(asked: Request) -> bytes:
    first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
    return part(DATA, int(first), int(last) + 1, etag='"one"')


class Asker:
    """Waits for another future as soon as it is called back."""

    def __init__(self) -> None:
        self.other: Callable[[], LoadResult] | None = None
        self.told: LoadResult | None = None
        self.is_over = threading.Event()

    def __call__(self, _: Future[LoadResult]) -> None:
        assert self.other is not None
        try:
            self.told = self.other()
        finally:
            self.is_over.set()

    def of(self) -> LoadResult:
        assert self.is_over.wait(10)
        assert self.told is not None, "it was not told before it gave up"
        return self.told


def joined(it: NetworkLoader, *, path: str = "file") -> list[Future[LoadResult]]:
    return it.enqueue_many([request(number, path=path) for number in range(4)])


def alike(it: NetworkLoader) -> list[Future[LoadResult]]:
    return [it.enqueue(request(0, name)) for name in "abcd"]


@pytest.mark.parametrize("ask", [joined, alike])
@pytest.mark.parametrize("first", range(2))
def test_one_may_wait_for_another_that_the_same_answer_is_for(
    loader: Callable[..., NetworkLoader], ask: Callable[[NetworkLoader], list[Future[LoadResult]]], first: int
) -> None:
    gate = threading.Event()
    with Wire(always=lambda asked: [gate, good(asked)]) as wire:
        asker = Asker()
        futures = ask(loader(wire))
        asker.other = lambda: futures[3 if first == 0 else 0].result(5)
        futures[first].add_done_callback(asker)
        gate.set()
        assert asker.of().is_success
        assert len(wire.requests) == 1


def test_one_may_wait_for_another_of_a_run(loader: Callable[..., NetworkLoader]) -> None:
    gate = threading.Event()
    with Wire(always=lambda asked: [gate, good(asked)]) as wire:
        asker = Asker()
        brief = [LoadRequest(f"{n}", "file", byte_range=(100 * n, 100 * n + 100)) for n in range(20)]
        futures = loader(wire).enqueue_many(brief)
        asker.other = lambda: futures[5].result(5)
        for number, callback in ((0, asker), (5, lambda _: None)):
            futures[number].add_done_callback(callback)
        gate.set()
        assert asker.of().is_success
        assert len(wire.requests) == 1


def test_one_may_wait_for_another_that_fails_together_with_it(loader: Callable[..., NetworkLoader]) -> None:
    gate = threading.Event()
    with Wire(always=lambda _: [gate, answer(b"no", 404)]) as wire:
        asker = Asker()
        futures = joined(loader(wire))
        asker.other = lambda: futures[3].result(5)
        futures[0].add_done_callback(asker)
        gate.set()
        assert isinstance(asker.of().error, FileNotFoundError)


@pytest.mark.parametrize("most", [1, 2])
def test_each_worker_may_be_held_up_by_a_callback_that_loads(loader: Callable[..., NetworkLoader], most: int) -> None:
    """There are as many threads again as connections for those."""
    gate = threading.Event()
    with Wire(always=lambda asked: [gate, good(asked)]) as wire:
        it = loader(wire, max_concurrent=most, hedging=False)
        askers = [Asker() for _ in range(most)]
        for number, asker in enumerate(askers):
            asker.other = lambda number=number: it.enqueue(request(5 + 2 * number)).result(5)  # type: ignore[misc]
            it.enqueue(request(2 * number)).add_done_callback(asker)
        gate.set()
        assert all(asker.of().is_success for asker in askers)


def test_close_tells_a_callback_that_waits_for_what_is_queued(loader: Callable[..., NetworkLoader]) -> None:
    def told(asked: Request) -> Script:
        return good(asked) if asked.target == "/file" else [HOLD]

    with Wire(always=told) as wire:
        it, asker = loader(wire, max_concurrent=1), Asker()
        queued = threading.Event()

        def load() -> LoadResult:
            it.enqueue(request(0, path="silent"))
            future = it.enqueue(request(1, path="later"))
            queued.set()
            return future.result(5)

        asker.other = load
        it.enqueue(request(0)).add_done_callback(asker)
        assert queued.wait(10)
        wire.await_requests(2)
        it.close()
        assert isinstance(asker.of().error, Cancelled)
        assert not [one for one in threading.enumerate() if one.name.startswith("holotensor-fetch")]


def test_close_tells_all_before_it_calls_anybody_back(loader: Callable[..., NetworkLoader]) -> None:
    with Wire(always=[HOLD]) as wire:
        it, asker = loader(wire), Asker()
        futures = [it.enqueue(request(0, path=f"{number}")) for number in range(4)]
        asker.other = lambda: futures[3].result(5)
        futures[0].add_done_callback(asker)
        it.close()
        assert isinstance(asker.of().error, Cancelled)


def test_cancelling_a_name_tells_all_that_bear_it_before_it_calls_anybody_back(
    loader: Callable[..., NetworkLoader],
) -> None:
    with Wire(always=[HOLD]) as wire:
        it, asker = loader(wire), Asker()
        futures = [it.enqueue(request(number, "one")) for number in range(2)]
        asker.other = lambda: futures[1].result(5)
        futures[0].add_done_callback(asker)
        assert it.cancel("one")
        assert isinstance(asker.of().error, Cancelled)


def test_clearing_the_queue_tells_all_before_it_calls_anybody_back(loader: Callable[..., NetworkLoader]) -> None:
    with Wire(always=[HOLD]) as wire:
        it, askers = loader(wire, max_concurrent=1), [Asker(), Asker()]
        it.enqueue(request(0, path="silent"))
        wire.await_requests(1)
        futures = [it.enqueue(request(0, path=f"{number}")) for number in range(2)]
        for asker, own, other in zip(askers, futures, reversed(futures), strict=True):
            asker.other = partial(other.result, 5)
            own.add_done_callback(asker)
        it.scheduler.clear()
        assert all(isinstance(asker.of().error, Cancelled) for asker in askers)


def test_a_callback_of_one_deadline_may_wait_for_the_next(loader: Callable[..., NetworkLoader]) -> None:
    with Wire(always=[HOLD]) as wire:
        it, asker = loader(wire, max_concurrent=1), Asker()
        it.enqueue(LoadRequest("at work", "at work"))
        wire.await_requests(1)  # what follows is queued, and nobody but the clock can tell of it
        asker.other = lambda: it.enqueue(LoadRequest("second", "second", deadline=0.05)).result(5)
        it.enqueue(LoadRequest("first", "first", deadline=0.05)).add_done_callback(asker)
        assert isinstance(asker.of().error, DeadlineExceeded)


def test_whoever_is_told_is_called_back_though_something_fails_meanwhile(
    loader: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with Wire(always=lambda asked: [gate, good(asked)]) as wire:
        it = loader(wire)
        over = threading.Event()
        future = it.enqueue(request(0))
        future.add_done_callback(lambda _: over.set())

        deliver = it._fetcher._deliver

        def fail(*told: Any) -> None:
            deliver(*told)
            raise ValueError("a defect")

        monkeypatch.setattr(it._fetcher, "_deliver", fail)
        gate.set()
        assert over.wait(10)
        assert future.result(0).is_success


def test_a_stream_is_told_though_a_worker_is_held_up_by_a_callback(loader: Callable[..., NetworkLoader]) -> None:
    gate, stop = threading.Event(), threading.Event()
    with Wire(always=lambda asked: [gate, good(asked)]) as wire:
        it = loader(wire, max_concurrent=1, hedging=False)
        is_held = threading.Event()

        def hold(_: object) -> None:
            is_held.set()
            stop.wait(20)

        it.enqueue(request(0)).add_done_callback(hold)
        gate.set()
        assert is_held.wait(10)
        with it.stream([request(3), request(5)]) as results:
            assert results.next(5) is not None
            assert results.next(5) is not None
        stop.set()


@pytest.mark.parametrize("interrupted", ["leave", "close", "dissolve"])
@pytest.mark.parametrize("ask", ["cancel", "update_priority"])
def test_an_interrupt_leaves_nobody_untold(
    loader: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch, interrupted: str, ask: str
) -> None:
    silence = threading.Event()
    with Wire(always=lambda asked: [silence, good(asked)]) as wire:
        it, over = loader(wire, max_concurrent=1), threading.Event()
        it.enqueue(request(0, path="silent"))
        wire.await_requests(1)
        brief = [LoadRequest(f"{n}", "file", byte_range=(100 * n, 100 * n + 100)) for n in range(20)]
        futures = it.enqueue_many(brief)
        futures[3].add_done_callback(lambda _: over.set())
        real = getattr(it._fetcher._books, interrupted)

        def struck(*args: Any) -> None:
            real(*args)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(it._fetcher._books, interrupted, struck)
        if ask == "cancel":
            with contextlib.suppress(KeyboardInterrupt):
                it.cancel("3")
        else:
            with contextlib.suppress(KeyboardInterrupt):
                it.update_priority("3", Priority.HIGH)
        silence.set()
        assert over.wait(10)
        assert all(future.result(10).is_success for future in it.enqueue_many(brief))  # nothing is left that stays
        it.close()
        assert all(future.done() for future in futures)
