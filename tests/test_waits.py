"""A signal that another thread takes ends the main thread's wait all the same, and soon."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager

import pytest
from wire import HOLD, Wire

from holotensor_net.config import NetworkConfig, SchedulerConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.engine.loads import Promise
from holotensor_net.engine.scheduler import Scheduler
from holotensor_net.engine.streaming import StreamingLoader
from holotensor_net.errors import NotFound
from holotensor_net.values import LoadFailure, LoadRequest
from holotensor_net.waits import Latch, attentively

LONG = 20.0
SOON = 2.0  # for a busy machine
REQUEST = LoadRequest("a", "a")


@contextmanager
def signal_elsewhere() -> Iterator[Callable[[], None]]:
    """Gives what has another thread take SIGINT before long: that does not end a system call of this thread."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    taker = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    try:
        yield taker.start
    finally:
        if taker.ident is not None:
            taker.join()
        signal.signal(signal.SIGINT, before)


def loads(loader: NetworkLoader) -> None:
    loader.load(REQUEST)


def takes(loader: NetworkLoader) -> None:
    next(StreamingLoader(loader).start([REQUEST]))


def asks_result(loader: NetworkLoader) -> None:
    loader.enqueue(REQUEST).result(LONG)


def asks_exception(loader: NetworkLoader) -> None:
    loader.enqueue(REQUEST).exception(LONG)


def finds_no_room(loader: NetworkLoader) -> None:
    scheduler = Scheduler(SchedulerConfig(queue_limit=1))
    for _ in range(2):
        scheduler.enqueue(REQUEST, timeout=LONG)


def send_and_wait(send: Callable[[], None], waits: Callable[[], None]) -> None:
    send()
    waits()


WAITS: list[Callable[[NetworkLoader], None]] = [*(loads, takes, asks_result, asks_exception, finds_no_room)]


@pytest.mark.parametrize("waits", WAITS, ids=lambda function: function.__name__)
def test_a_signal_that_another_thread_takes_ends_a_wait(
    waits: Callable[[NetworkLoader], None],
) -> None:
    with (
        Wire(always=[HOLD]) as server,
        NetworkLoader(NetworkConfig(endpoints=server.url)) as loader,
        signal_elsewhere() as send,
    ):
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            send_and_wait(send, lambda: waits(loader))
        assert time.monotonic() - began < SOON


def test_a_wait_ends_when_it_is_true_and_when_its_time_is_over() -> None:
    event = threading.Event()
    assert not attentively(event.wait, 0.0)
    assert not attentively(event.wait, -1.0)
    began = time.monotonic()
    assert not attentively(event.wait, 0.25)
    assert time.monotonic() - began >= 0.25
    threading.Timer(0.15, event.set).start()
    assert attentively(event.wait)


def test_other_threads_wait_at_one_go() -> None:
    asked: list[float] = []
    for timeout in (None, 7.0):
        thread = threading.Thread(target=attentively, args=(asked.append, timeout))
        thread.start()
        thread.join()
    assert asked == [threading.TIMEOUT_MAX, 7.0]


def test_a_promise_is_a_future() -> None:
    answer = LoadFailure("a", NotFound("gone"))
    pending, kept, broken, gone = Promise(), Promise(), Promise(), Promise()
    kept.set_result(answer)
    broken.set_exception(FutureTimeout("the work itself says so"))
    gone.cancel()
    for future in (Future(), pending):
        with pytest.raises(FutureTimeout):
            future.result(0.01)
        with pytest.raises(FutureTimeout):
            future.exception(0.01)
    assert kept.result() is answer
    assert kept.exception() is None
    assert str(broken.exception()) == "the work itself says so"
    with pytest.raises(FutureTimeout, match="the work itself"):
        broken.result()
    for ask in (gone.result, gone.exception):
        with pytest.raises(CancelledError):
            ask()
    threading.Timer(0.15, pending.set_result, (answer,)).start()
    assert pending.result() is answer
    stopped = Promise()
    threading.Timer(0.15, stopped.cancel).start()
    with pytest.raises(CancelledError):
        stopped.result()


def test_a_latch_lets_one_thread_in_at_a_time() -> None:
    latch, inside, most, rounds = Latch(), 0, 0, 2000

    def work() -> None:
        nonlocal inside, most
        for number in range(rounds):
            with latch:
                inside += 1
                most = max(most, inside)
                if number % 200 == 0:
                    time.sleep(1e-4)  # lets the others run into it
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_a_condition_stands_on_a_latch() -> None:
    changed = Latch().condition()
    given: list[int] = []
    taken: list[int] = []

    def take() -> None:
        with changed:
            while not given:
                changed.wait(LONG)
            taken.append(given.pop())

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(4):
        with changed:
            given.append(number)
            changed.notify()
    for thread in threads:
        thread.join(LONG)
    assert sorted(taken) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError):
        changed.notify()


Uses = Callable[[], tuple[Callable[[], object], Callable[[], object]]]
"""Gives what uses something, and what needs it in another thread."""


def uses_a_latch() -> tuple[Callable[[], object], Callable[[], object]]:
    latch = Latch()

    def use() -> None:
        with latch:
            pass

    return use, use


def uses_a_scheduler() -> tuple[Callable[[], object], Callable[[], object]]:
    scheduler = Scheduler()
    return scheduler.should_throttle, scheduler.should_throttle


def uses_a_future() -> tuple[Callable[[], object], Callable[[], object]]:
    futures: list[Promise] = []

    def use() -> None:
        futures[:] = [Promise()]
        futures[0].cancel()

    return use, lambda: [future.cancelled() for future in futures]


def uses_a_stream() -> tuple[Callable[[], object], Callable[[], object]]:
    class Idle:
        config = NetworkConfig()

    stream = StreamingLoader(Idle())  # type: ignore[arg-type]
    return stream.next, lambda: stream.next(0)


@pytest.mark.parametrize("uses", [uses_a_latch, uses_a_scheduler, uses_a_future, uses_a_stream])
def test_an_interrupt_leaves_nothing_locked(
    uses: Callable[[], tuple[Callable[[], object], Callable[[], object]]],
) -> None:
    """Wherever it comes, in a loop that does nothing but use it."""
    use, look = uses()
    before, tracer = signal.signal(signal.SIGVTALRM, signal.default_int_handler), sys.gettrace()
    sys.settrace(None)  # where every line is traced, an interrupt may come between any two
    try:
        for _ in range(200):
            do_until_interrupted(use)
            assert can_be_done_elsewhere(look)
    finally:
        sys.settrace(tracer)
        signal.signal(signal.SIGVTALRM, before)


def do_until_interrupted(use: Callable[[], object]) -> None:
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(1e-5, 1e-3))
        while True:
            use()
    except KeyboardInterrupt:
        pass


def can_be_done_elsewhere(look: Callable[[], object]) -> bool:
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(SOON)
    return not thread.is_alive()


def test_threads_wait_crosswise_for_futures_of_two_batches() -> None:
    """Those who wait lock all futures that they wait for: in one order, whichever batches they come from."""
    requests = [[LoadRequest(f"{batch}{number}", f"{batch}{number}") for number in range(64)] for batch in "ab"]
    with (
        Wire(always=[HOLD]) as server,
        NetworkLoader(NetworkConfig(endpoints=server.url, cache_dir=False, max_concurrent=1)) as loader,
    ):
        one, other = (loader.enqueue_many(batch) for batch in requests)
        mixed = [future for pair in zip(one, other, strict=True) for future in pair]

        def work(seed: int) -> None:
            order = random.Random(seed)
            for _ in range(200):
                wait(order.sample(mixed, 8), timeout=0)

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert not any(thread.is_alive() for thread in threads)
