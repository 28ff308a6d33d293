"""Processes that share a cache bring each fragment once where locks work, and as often as they like where not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from servers import Nginx

from holotensor_net.config import CdnEndpoint, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import Cancelled, DeadlineExceeded
from holotensor_net.storage import claims
from holotensor_net.storage.claims import Claims
from holotensor_net.values import LoadFailure, LoadRequest, LoadResult, Priority, RangeRequest

pytestmark = pytest.mark.skipif(claims._SET is None, reason="this system has no locks of open files")

LIMIT = 30.0  # seconds for what takes no time, on a machine that is busy with other things
FRESH = 'add_header Cache-Control "max-age=600";'

LOAD = """
    import json, random, sys
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.storage import claims
    from holotensor_net.values import LoadRequest

    url, cache, seed, keys, locks = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    if not locks:
        claims._SET = None
    names = [f"k{number}" for number in range(keys)]
    random.Random(seed).shuffle(names)
    config = NetworkConfig(endpoints=(CdnEndpoint(url),), cache_dir=cache, max_concurrent=8)
    with NetworkLoader(config) as loader:
        input()
        futures = loader.enqueue_many([LoadRequest(name, name) for name in names])
        wrong = [name for name, future in zip(names, futures) if bytes(future.result().data) != name[1:].encode()]
    print(json.dumps(wrong))
"""


def requests_of(nginx: Callable[..., Nginx], folder: Path, keys: int, processes: int, locks: bool) -> Counter[str]:
    """How often each object was asked for by processes that ask for all of them, each in an order of its own."""
    root = folder / "www"
    root.mkdir()
    for number in range(keys):
        (root / f"k{number}").write_bytes(b"%d" % number)
    server = nginx(root, conf=FRESH)
    arguments = [server.url, str(folder / "cache")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(LOAD), *arguments, str(seed), str(keys), str(int(locks))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [json.loads(process.communicate(timeout=200)[0]) for process in running] == [[]] * processes
    return Counter(access.path for access in server.accesses())


def test_each_object_is_asked_for_once_by_all(nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    assert requests_of(nginx, tmp_path, 80, 4, True) == {f"/k{number}": 1 for number in range(80)}


def test_without_locks_each_process_asks_at_most_once(nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    asked = requests_of(nginx, tmp_path, 80, 3, False)
    assert set(asked) == {f"/k{number}" for number in range(80)}
    assert max(asked.values()) <= 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("locks", [True, False])
def test_a_thousand_objects_and_8_processes(nginx: Callable[..., Nginx], tmp_path: Path, locks: bool) -> None:
    asked = requests_of(nginx, tmp_path, 1000, 8, locks)
    assert len(asked) == 1000
    assert sum(asked.values()) <= (1000 if locks else 8000)


class Scene:
    """A loader beside somebody else who has claimed all that is asked for."""

    def __init__(self, server: Nginx, cache: Path, **settings: Any) -> None:
        self.cache = cache
        self.server = server
        self.config = NetworkConfig(endpoints=(CdnEndpoint(server.url),), cache_dir=cache, **settings)
        self.loader = NetworkLoader(self.config)
        self.other = Claims(cache / "claims")

    def claim(self, request: LoadRequest) -> tuple[str, int]:
        claim = self.loader._requests.claim(request)
        assert self.other.take(*claim)
        return claim

    def enqueue(self, request: LoadRequest) -> Future[LoadResult]:
        """A future for what is in the hands of somebody else, once that has been seen."""
        future = self.loader.enqueue(request)
        end = time.monotonic() + LIMIT
        while not any(load.turn and load.turn.is_waiting for load in self.loader._fetcher._books.all()):
            assert not future.done(), future.result()
            assert time.monotonic() < end
        return future


@pytest.fixture
def data() -> bytes:
    return random.Random(8).randbytes(3 << 20)


@pytest.fixture
def scene(nginx: Callable[..., Nginx], tmp_path: Path, data: bytes) -> Iterator[Callable[..., Scene]]:
    root = tmp_path / "www"
    root.mkdir()
    (root / "big").write_bytes(data)
    scenes: list[Scene] = []

    def made(*, conf: str = FRESH, limit_rate: int = 0, **settings: Any) -> Scene:
        shape = {"limit_rate": limit_rate} if limit_rate else {}
        scenes.append(Scene(nginx(root, conf=conf, **shape), tmp_path / "cache", **settings))
        return scenes[-1]

    yield made
    for one in scenes:
        one.loader.close()


WAYS = {
    "whole": LoadRequest("big", "big"),
    "range": LoadRequest("big", "big", byte_range=RangeRequest(5, 1005)),
    "long range": LoadRequest("big", "big", byte_range=RangeRequest(5, (2 << 20) + 5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_another_is_at_is_waited_for_and_then_fetched(scene: Callable[..., Scene], data: bytes, way: str) -> None:
    here, request = scene(), WAYS[way]
    claim = here.claim(request)
    future = here.enqueue(request)
    assert here.server.accesses() == []
    here.other.release(*claim)
    span = request.byte_range or RangeRequest(0, len(data))
    assert future.result(LIMIT).data == data[span.start : span.stop]
    assert here.other.take(*claim)  # it was given up in the end


@pytest.mark.parametrize("span", [(0, 2 << 20), (1_000_000, 1_001_000), (5, 1 << 62)])
def test_another_cut_of_the_same_bytes_is_not_waited_for(
    scene: Callable[..., Scene], data: bytes, span: tuple[int, int]
) -> None:
    here = scene(timeout=600.0)  # so long would it be waited for
    here.claim(LoadRequest("big", "big", byte_range=RangeRequest(*span)))
    request = LoadRequest("part", "big", byte_range=RangeRequest(1_000_500, 1_001_500))
    assert here.loader.enqueue(request).result(LIMIT).data == data[1_000_500:1_001_500]


@pytest.mark.parametrize("conf", [FRESH, ""], ids=["fresh", "stale at once"])
def test_what_another_has_brought_is_taken_from_the_cache(scene: Callable[..., Scene], data: bytes, conf: str) -> None:
    here, request = scene(conf=conf), WAYS["whole"]
    claim = here.claim(request)
    future = here.enqueue(request)
    other = NetworkLoader(here.config)
    other._requests.claims.close()  # type: ignore[union-attr]
    assert other.load(request).is_success
    other.close()
    here.other.release(*claim)
    result = future.result(LIMIT)
    assert result.data == data
    assert result.from_cache
    assert here.loader.stats().requests == 0


def test_pieces_of_one_that_is_waited_for_stay_away(scene: Callable[..., Scene], data: bytes) -> None:
    here = scene(chunk_size=1 << 18, max_concurrent=8, monitor_bandwidth=False)
    request = LoadRequest("big", "big", expected_size=len(data), checksum=f"sha256:{sha256(data).hexdigest()}")
    claim = here.claim(request)
    future = here.enqueue(request)
    assert here.loader.stats().requests == 0
    here.other.release(*claim)
    assert future.result(LIMIT).data == data
    assert here.loader.stats().bytes_fetched == len(data)


def test_two_that_look_again_at_once_queue_it_once(
    scene: Callable[..., Scene], data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = scene()
    claim = here.claim(WAYS["whole"])
    future = here.enqueue(WAYS["whole"])
    fetcher, claims = here.loader._fetcher, here.loader._requests.claims
    assert claims is not None
    (load,) = fetcher._books.all()
    is_free, restart, restarted = claims.is_free, fetcher._scheduler.restart, []

    def meets_another(name: str, number: int) -> bool:
        if not is_free(name, number):
            return False
        monkeypatch.setattr(claims, "is_free", is_free)
        fetcher._turns.wake(load)
        return True

    monkeypatch.setattr(claims, "is_free", meets_another)
    monkeypatch.setattr(
        fetcher._scheduler, "restart", lambda *of, **how: (restarted.append(how.get("whole")), restart(*of, **how))[1]
    )
    here.other.release(*claim)
    assert future.result(LIMIT).data == data
    assert restarted.count(True) == 1


def test_who_has_a_stale_piece_resumes_nothing(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    here = scene(chunk_size=1 << 18)
    fetcher, scheduler = here.loader._fetcher, here.loader.scheduler
    monkeypatch.setattr(fetcher, "_spawn", lambda: None)  # the test is the worker
    here.loader.enqueue(WAYS["long range"])
    (load,) = fetcher._books.all()
    load.may_resume = False
    stale = scheduler.next(0)
    assert stale is not None
    scheduler.withdraw(load)
    load.may_resume = True
    scheduler.restart(load, whole=True)
    assert not fetcher._resumes(stale)
    assert load.may_resume
    fresh = scheduler.next(0)
    assert fresh is not None
    assert fetcher._resumes(fresh)
    assert not load.may_resume
    scheduler.release(stale)


def test_neighbours_of_one_that_is_waited_for_come_at_once(scene: Callable[..., Scene], data: bytes) -> None:
    here = scene()
    spans = [RangeRequest(1000 * number, 1000 * number + 1000) for number in range(9)]
    requests = [LoadRequest(f"r{span.start}", "big", byte_range=span) for span in spans]
    claim = here.claim(requests[4])
    futures = here.loader.enqueue_many(requests)
    for number, (span, future) in enumerate(zip(spans, futures, strict=True)):
        if number != 4:
            assert future.result(LIMIT).data == data[span.start : span.stop]
    assert not futures[4].done()
    here.other.release(*claim)
    assert futures[4].result(LIMIT).data == data[4000:5000]


@pytest.mark.parametrize("end", ["cancel", "future", "deadline", "close", "clear"])
def test_who_waits_for_another_can_be_told_at_once(scene: Callable[..., Scene], end: str) -> None:
    here = scene()
    request = LoadRequest("big", "big", deadline=0.2 if end == "deadline" else None)
    here.claim(request)
    future = here.enqueue(request)
    if end == "future":
        assert future.cancel()
    elif end == "cancel":
        assert here.loader.cancel("big")
    elif end == "close":
        here.loader.close()
    elif end == "clear":
        here.loader.scheduler.clear()
    if end != "future":
        result = future.result(LIMIT)
        assert isinstance(result, LoadFailure)
        assert isinstance(result.error, DeadlineExceeded if end == "deadline" else Cancelled)
    assert here.server.accesses() == []
    assert not here.loader._fetcher._books.all()


def test_who_has_hung_is_not_waited_for_for_ever(scene: Callable[..., Scene], data: bytes) -> None:
    here = scene(timeout=0.3)
    here.claim(WAYS["whole"])
    future = here.enqueue(WAYS["whole"])
    assert here.loader.update_priority("big", Priority.CRITICAL)
    assert future.result(LIMIT).data == data


@pytest.mark.parametrize("is_promoted", [False, True])
def test_what_is_urgent_is_soon_fetched_though_another_is_at_it(
    scene: Callable[..., Scene], data: bytes, is_promoted: bool
) -> None:
    here = scene()
    priority = Priority.NORMAL if is_promoted else Priority.CRITICAL
    here.claim(WAYS["whole"])
    here.claim(WAYS["range"])
    waiting = here.enqueue(WAYS["range"])
    future = here.loader.enqueue(LoadRequest("now", "big", priority=priority))
    if is_promoted:
        assert here.loader.update_priority("now", Priority.CRITICAL)
    assert future.result(LIMIT / 2).data == data
    assert not waiting.done()  # for half a minute and more
    assert waiting.cancel()


def test_answer_that_may_not_be_stored_holds_nobody_up(scene: Callable[..., Scene]) -> None:
    here = scene(conf='add_header Cache-Control "no-store";', limit_rate=1 << 20)
    claim = here.loader._requests.claim(WAYS["whole"])
    future = here.loader.enqueue(WAYS["whole"])
    end = time.monotonic() + LIMIT
    while not here.loader.stats().bytes_fetched:
        assert time.monotonic() < end
    assert here.other.take(*claim)
    assert not future.done()
    future.cancel()


def test_without_a_disk_nothing_is_claimed(nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"k")
    config = NetworkConfig(endpoints=(CdnEndpoint(nginx(tmp_path).url),), cache_dir=False)
    with NetworkLoader(config) as loader:
        assert loader.load(LoadRequest("k", "k")).data == b"k"
        assert loader._requests.claims is None


HOLD = """
    import sys
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.values import LoadRequest

    with NetworkLoader(NetworkConfig(endpoints=(CdnEndpoint(sys.argv[1]),), cache_dir=sys.argv[2])) as loader:
        future = loader.enqueue(LoadRequest("big", "big"))
        while not loader.stats().bytes_fetched:
            pass
        print("begun", flush=True)
        future.result()
"""


def test_who_dies_is_followed_by_who_waits(scene: Callable[..., Scene], data: bytes) -> None:
    here = scene(limit_rate=1 << 20)
    command = [sys.executable, "-c", textwrap.dedent(HOLD), here.server.url, str(here.cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        future = here.enqueue(WAYS["whole"])
        assert here.loader.stats().bytes_fetched == 0
        process.send_signal(signal.SIGKILL)
    assert future.result(LIMIT).data == data
