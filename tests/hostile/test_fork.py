"""Children of a process whose loader is warm and at work: they get right bytes of their own, and they end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from blake3 import blake3
from servers import Nginx

from holotensor_net.config import ClientConfig, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import NetworkError
from holotensor_net.transport.client import HttpClient
from holotensor_net.values import LoadRequest, RangeRequest

MIB = 1 << 20
SIZE = 2 * MIB  # large enough for a digest to be made on all cores
LONGEST = 60.0  # seconds that a child may take on a machine that is busy with other things

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # that is the subject here
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
]


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(51).randbytes(SIZE)


@pytest.fixture
def server(data: bytes, tmp_path_factory: pytest.TempPathFactory, nginx: Callable[..., Nginx]) -> Nginx:
    root = tmp_path_factory.mktemp("www")
    (root / "object").write_bytes(data)
    for number in range(100):
        os.link(root / "object", root / f"object-{number}")  # so that the log tells which process asked
    return nginx(root)


def check_connections(server: Nginx) -> None:
    """No connection was used by two processes: a range that comes twice would not be told from its twin."""
    asked: dict[int, set[str]] = {}
    for access in server.accesses():
        asked.setdefault(access.connection, set()).add(access.path)
    assert len(asked) > 100
    shared = [paths for paths in asked.values() if len(paths) > 1]
    assert not shared, f"{len(shared)} connections were shared: {shared[0]}"


class Child:
    """A forked process that does ``work`` with its number and ends; what it raises is read through a pipe."""

    def __init__(self, number: int, work: Callable[[int], None]) -> None:
        self._told, telling = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(telling)
            return
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, file=telling, chain=True)  # whatever it waits for, it tells where
            signal.alarm(int(LONGEST))
            work(number)
            status = 0
        except BaseException:
            os.write(telling, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(status)

    def result(self) -> str:
        """What went wrong; "" if nothing did. Waits for its end."""
        with os.fdopen(self._told, "rb") as pipe:
            told = pipe.read().decode()
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if status == -signal.SIGALRM:
            return f"it hung\n{told}"
        return told or ("" if status == 0 else f"it ended with {status}")


def run_children(count: int, work: Callable[[int], None], *, at_once: int = 20) -> None:
    """Fork that many, not all at once, and fail with what any of them has to complain of."""
    children: list[Child] = []
    complaints = []
    for number in range(count):
        if len(children) == at_once:
            complaints.append(children.pop(0).result())
        children.append(Child(number, work))
    complaints += [child.result() for child in children]
    assert not any(complaints), f"{sum(map(bool, complaints))} of {count}: {max(complaints, key=len)}"


@contextmanager
def at_work(work: Callable[[random.Random], None], threads: int = 3) -> Iterator[None]:
    """Have the parent do ``work`` in threads meanwhile, so that forks find its locks held; its failures count too."""
    stop, failures = threading.Event(), []

    def go_on(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not stop.is_set():
                work(draw)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=go_on, args=(seed,)) for seed in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join()
    assert not failures, failures[0]


def compare(loader: NetworkLoader, data: bytes, draw: random.Random, path: str = "object") -> None:
    """One random range: the answer is right, or this raises."""
    start = draw.randrange(SIZE - 1)
    stop = min(SIZE, start + draw.choice((1, 1000, 100_000, MIB + MIB // 2)))
    got = loader.load_range(LoadRequest(f"{start}-{stop}", path), start, stop)
    assert got.data == data[start:stop], f"wrong bytes at {start}-{stop}"


def test_a_hundred_children_of_a_warm_loader_get_right_bytes(server: Nginx, data: bytes, tmp_path: Path) -> None:
    config = NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "cache", chunk_size=256 << 10, max_concurrent=8)
    whole = LoadRequest("whole", "object", checksum=f"blake3:{blake3(data).hexdigest()}")
    with NetworkLoader(config) as loader:
        assert loader.load(whole).data == data  # warm: connections, threads, cache, and BLAKE3's own threads

        def child(number: int) -> None:
            draw = random.Random(number)
            for _ in range(3):
                compare(loader, data, draw, f"object-{number}")
            if number % 10 == 0:
                fresh = NetworkConfig.custom_cdn(server.url, cache_dir=False)
                with NetworkLoader(fresh) as own:
                    assert (
                        own.load(replace(whole, path=f"object-{number}")).data == data
                    )  # checks the digest, without its parent's threads
            if number % 2:
                loader.close()

        with at_work(lambda draw: compare(loader, data, draw)):
            run_children(100, child)
        compare(loader, data, random.Random(1000))
    check_connections(server)


def test_a_hundred_children_of_a_warm_client_get_right_bytes(server: Nginx, data: bytes) -> None:
    with HttpClient(server.url, ClientConfig()) as client:

        def fetch(draw: random.Random, path: str = "object") -> None:
            start = draw.randrange(SIZE - 1)
            stop = min(SIZE, start + draw.choice((1, 1000, 100_000)))
            assert client.fetch_range(path, RangeRequest(start, stop)) == data[start:stop]

        def child(number: int) -> None:
            draw = random.Random(number)
            for _ in range(4):
                fetch(draw, f"object-{number}")

        fetch(random.Random(1))
        with at_work(fetch):
            run_children(100, child)
    check_connections(server)


def test_a_child_fetches_what_its_parent_is_waiting_for(server: Nginx, data: bytes, tmp_path: Path) -> None:
    """What was on its way at the fork belongs to the parent: its books are not the child's."""
    config = NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "cache", chunk_size=64 << 10)
    with NetworkLoader(config) as loader:
        requests = [LoadRequest(str(k), "object", byte_range=RangeRequest(k, k + 50_000)) for k in range(200)]
        futures = loader.enqueue_many(requests)

        def child(number: int) -> None:
            mine = requests[number * 20]
            assert loader.load(mine).data == data[number * 20 : number * 20 + 50_000]
            assert loader.stats().queued == 0

        run_children(8, child)
        for k, future in enumerate(futures):
            assert future.result(timeout=LONGEST).data == data[k : k + 50_000]


def test_grandchildren_get_right_bytes(server: Nginx, data: bytes, tmp_path: Path) -> None:
    config = NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "cache")
    with NetworkLoader(config) as loader:
        compare(loader, data, random.Random(1))

        def child(number: int) -> None:
            compare(loader, data, random.Random(number))
            run_children(2, lambda k: compare(loader, data, random.Random(10 * number + k)))

        run_children(4, child)


def test_a_closed_loader_is_closed_in_a_child(server: Nginx, tmp_path: Path) -> None:
    loader = NetworkLoader(NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "cache"))
    loader.close()

    def child(_: int) -> None:
        with pytest.raises(NetworkError, match="closed"):
            loader.load(LoadRequest("a", "object"))

    run_children(1, child)


def _in_worker(loader: NetworkLoader, data: bytes, number: int, results: Connection) -> None:
    try:
        compare(loader, data, random.Random(number))
        results.send("")
    except BaseException:
        results.send(traceback.format_exc())


def test_workers_of_multiprocessing_get_right_bytes_and_end(server: Nginx, data: bytes, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    config = NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "cache")
    with NetworkLoader(config) as loader:
        compare(loader, data, random.Random(1))
        workers = []
        for number in range(8):
            mine, theirs = fork.Pipe(duplex=False)
            worker = fork.Process(target=_in_worker, args=(loader, data, number, theirs))
            worker.start()
            theirs.close()
            workers.append((worker, mine))
        try:
            for worker, pipe in workers:
                assert pipe.poll(LONGEST), "it hung"
                assert pipe.recv() == ""
                worker.join(LONGEST)
                assert worker.exitcode == 0
        finally:
            for worker, pipe in workers:
                pipe.close()
                worker.kill()
                worker.join()
                worker.close()


SCRIPT = """
import os, random, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from holotensor_net import LoadRequest, NetworkConfig, NetworkLoader

url, folder, path = sys.argv[1:]
data = open(path, "rb").read()
loader = NetworkLoader(NetworkConfig.custom_cdn(url, cache_dir=folder))
check = lambda k: loader.load_range(LoadRequest("f", "object"), k, k + 1000).data == data[k : k + 1000] or sys.exit(9)
check(0)
children = []
for k in range(1, 9):
    child = os.fork()
    if not child:
        check(k)
        sys.exit(0)  # the interpreter's own end, with a loader that nobody closed
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes))
"""


def test_children_that_never_close_end_with_their_interpreter(server: Nginx, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(data)
    command = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path / "cache"), str(tmp_path / "object")]
    ended = subprocess.run(command, timeout=LONGEST, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
