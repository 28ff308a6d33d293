"""One question for all parts of an object, whether it has changed since they were cached."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from wire import Request, Script, Wire, answer, part

from holotensor_net import (
    Cancelled,
    CdnEndpoint,
    DeadlineExceeded,
    LoadRequest,
    LoadResult,
    NetworkConfig,
    NetworkLoader,
    Priority,
    RetryConfig,
)

PARTS = 40
WIDTH = 100
OLD = bytes(range(200)) * (PARTS * WIDTH // 200)
NEW = OLD[::-1]
LIMIT = 30.0  # seconds for what takes no time, on a machine that is busy with other things


class Origin:
    """Serves ranges of one object, of version ``tag``; says 304 to whoever names that, 503 while it ``fails``."""

    def __init__(self, control: str) -> None:
        self.control = control
        self.tag, self.body = '"old"', OLD
        self.fails = False
        self.gate: threading.Event | None = None
        self.asked: list[Request] = []

    def __call__(self, request: Request) -> Script:
        self.asked.append(request)
        script = self._answer(request)
        return script if self.gate is None else [self.gate, script]

    def _answer(self, request: Request) -> bytes:
        headers = {"etag": self.tag, "cache_control": self.control}
        if self.fails:
            return answer(status=500)
        if request.headers.get("if-none-match") == self.tag:
            return answer(status=304, content_length=None, **headers)
        start, last = map(int, re.findall(r"\d+", request.headers["range"]))
        return part(self.body, start, min(last + 1, len(self.body)), **headers)

    @property
    def conditions(self) -> int:
        return sum("if-none-match" in request.headers for request in self.asked)


REQUESTS = [
    LoadRequest(f"part {number}", "model.bin", byte_range=(number * WIDTH, (number + 1) * WIDTH))
    for number in range(PARTS)
]


def loader(wire: Wire, folder: Path) -> NetworkLoader:
    retry = RetryConfig(max_retries=0)
    return NetworkLoader(NetworkConfig(endpoints=(CdnEndpoint(wire.url),), cache_dir=folder, retry=retry))


def bodies(results: Iterator[LoadResult] | list[LoadResult]) -> list[bytes]:
    return [bytes(result.data) for result in results]


def cut(body: bytes) -> list[bytes]:
    return [body[start : start + WIDTH] for start in range(0, len(body), WIDTH)]


@pytest.fixture(params=["no-cache", "max-age=0, must-revalidate"])
def origin(request: pytest.FixtureRequest) -> Origin:
    """Of an object whose every use has to be confirmed."""
    return Origin(request.param)


@pytest.fixture
def wire(origin: Origin, tmp_path: Path) -> Iterator[Wire]:
    """With all parts cached."""
    with Wire(always=origin) as wire:
        with loader(wire, tmp_path) as first:
            assert bodies([future.result() for future in first.enqueue_many(REQUESTS)]) == cut(OLD)
        origin.asked.clear()
        yield wire


def test_one_confirmation_does_for_all_who_are_asking(wire: Wire, origin: Origin, tmp_path: Path) -> None:
    with loader(wire, tmp_path) as second:
        results = [future.result(LIMIT) for future in second.enqueue_many(REQUESTS)]
        assert bodies(results) == cut(OLD)
        assert all(result.from_cache for result in results)
        assert (len(origin.asked), origin.conditions) == (1, 1)
        assert second.load(REQUESTS[0]).is_success
        assert (len(origin.asked), origin.conditions) == (2, 2)  # who asks later has to ask


def test_once_an_object_has_changed_its_parts_come_beside_each_other(
    wire: Wire, origin: Origin, tmp_path: Path
) -> None:
    origin.tag, origin.body = '"new"', NEW
    with loader(wire, tmp_path) as second:
        assert bodies([future.result(LIMIT) for future in second.enqueue_many(REQUESTS)]) == cut(NEW)
    assert len(origin.asked) <= PARTS


def test_where_the_one_that_asks_fails_the_others_ask_for_themselves(
    wire: Wire, origin: Origin, tmp_path: Path
) -> None:
    origin.fails = True
    with loader(wire, tmp_path) as second:
        results = [future.result(LIMIT) for future in second.enqueue_many(REQUESTS)]
    assert not any(result.is_success for result in results)
    assert len(origin.asked) == PARTS


def test_where_the_one_that_asks_is_cancelled_another_asks(wire: Wire, origin: Origin, tmp_path: Path) -> None:
    origin.gate = threading.Event()
    before = len(wire.requests)
    with loader(wire, tmp_path) as second:
        first, *others = second.enqueue_many(REQUESTS)
        wire.await_requests(before + 1)
        first.cancel()
        wire.await_requests(before + 2)
        origin.gate.set()
        assert bodies([future.result(LIMIT) for future in others]) == cut(OLD)[1:]
    assert len(origin.asked) == 2


def test_who_waits_for_the_answer_keeps_its_deadline_and_may_be_cancelled(
    wire: Wire, origin: Origin, tmp_path: Path
) -> None:
    origin.gate = threading.Event()
    with loader(wire, tmp_path) as second:
        futures = second.enqueue_many(REQUESTS)
        hurried = LoadRequest("hurried", "model.bin", byte_range=(WIDTH, 2 * WIDTH), deadline=0.2)
        assert isinstance(second.load(hurried).error, DeadlineExceeded)
        assert second.update_priority("part 9", Priority.CRITICAL)
        assert second.cancel("part 9")
        assert isinstance(futures[9].result(LIMIT).error, Cancelled)
        origin.gate.set()
        rest = [future.result(LIMIT) for number, future in enumerate(futures) if number != 9]
        assert bodies(rest) == cut(OLD)[:9] + cut(OLD)[10:]
    assert origin.conditions == 1


def test_close_does_not_wait_for_the_answer(wire: Wire, origin: Origin, tmp_path: Path) -> None:
    origin.gate = threading.Event()
    before = len(wire.requests)
    with loader(wire, tmp_path) as second:
        futures = second.enqueue_many(REQUESTS)
        wire.await_requests(before + 1)
        second.close()
        assert all(isinstance(future.result(LIMIT).error, Cancelled) for future in futures)
