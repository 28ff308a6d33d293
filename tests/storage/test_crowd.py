"""Many processes at one folder, at work and dying: every read is right or a miss, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from holotensor_net.config import CacheConfig
from holotensor_net.storage.cache import FragmentCache

KEYS = 64
QUOTA = 1 << 20  # about a quarter of what all keys take

WORK = """
    import os, random, sys, threading
    from holotensor_net.config import CacheConfig
    from holotensor_net.storage.cache import CacheEntry, FragmentCache

    root, quota, seed, threads, count, locks = sys.argv[1], *map(int, sys.argv[2:])
    if not locks:
        import fcntl
        def refuse(*_): raise OSError(38, "no locks here")
        fcntl.flock = fcntl.fcntl = refuse
    cache = FragmentCache(CacheConfig(directory=root, memory_size=0, max_size=quota))
    hits = []

    def bytes_of(key, version):
        draw = random.Random(key * 1000 + version)
        return draw.randbytes(draw.randrange(1, 1 << 17)) + bytes((key, version))

    def go(number):
        draw = random.Random(seed * 100 + number)
        for _ in range(count):
            key = draw.randrange(64)
            if draw.random() < 0.7:
                view = cache.get(str(key))
                if view is not None:
                    hits.append(key)
                    if bytes(view) != bytes_of(key, view[-1]):
                        os._exit(3)
            elif draw.random() < 0.9:
                cache.put(str(key), bytes_of(key, draw.randrange(3)), CacheEntry(str(key), 0))
            elif draw.random() < 0.5:
                cache.remove(str(key))
            else:
                part = cache.create(None)
                if part is not None:
                    data = bytes_of(key, 3)
                    part.write(0, data)
                    cache.adopt(str(key), part, CacheEntry(str(key), len(data)))

    workers = [threading.Thread(target=go, args=(number,)) for number in range(threads)]
    print("begun", flush=True)
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    cache.close()
    print(len(hits))
"""


def start(root: Path, seed: int, *, threads: int, count: int, locks: bool = True) -> subprocess.Popen[str]:
    arguments = [str(root), *map(str, (QUOTA, seed, threads, count, int(locks)))]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORK), *arguments], stdout=subprocess.PIPE, text=True
    )


def check(root: Path) -> None:
    """Nothing wrong, and nothing left, once old orphans are due."""
    for blob in (root / "blobs").glob("*/*"):
        os.utime(blob, (1, 1))  # an entry is not due any more; and its bytes are hashed again
    with FragmentCache(CacheConfig(directory=root, memory_size=0, max_size=QUOTA)) as cache:
        assert not list((root / "partial").glob("*"))
        cache.verify()
        assert cache.verify() == []
        for entry in cache:
            view = cache.get(entry.fragment_id)
            assert view is not None
            draw = random.Random(int(entry.fragment_id) * 1000 + view[-1])
            assert view == draw.randbytes(draw.randrange(1, 1 << 17)) + bytes((int(entry.fragment_id), view[-1]))
        named = {entry.digest for entry in cache}
        assert {blob.name for blob in (root / "blobs").glob("*/*")} == named
        cache.prune(0)
    assert not list((root / "blobs").glob("*/*"))


def crowd(root: Path, processes: int, threads: int, operations: int, locks: bool) -> None:
    each = operations // processes // threads
    running = [start(root, seed, threads=threads, count=each, locks=locks) for seed in range(processes)]
    told = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    assert sum(int(one.split()[-1]) for one in told) > operations // 20
    check(root)


@pytest.mark.parametrize("locks", [True, False])
def test_every_read_is_right_at_a_quarter_of_the_room(tmp_path: Path, locks: bool) -> None:
    crowd(tmp_path / "cache", 3, 4, 1500, locks)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("locks", [True, False])
def test_every_read_is_right_in_half_a_million(tmp_path: Path, locks: bool) -> None:
    crowd(tmp_path / "cache", 8, 8, 500_000, locks)


def killed_at_random(root: Path, kills: int, seed: int) -> None:
    """Four writers, of which one dies at a time, and is followed by another."""
    draw = random.Random(seed)
    running = [start(root, number, threads=1, count=10**9) for number in range(4)]
    try:
        for number in range(kills):
            victim = running[0]
            assert victim.stdout is not None
            assert victim.stdout.readline() == "begun\n"
            time.sleep(draw.uniform(0.0, 0.1))  # where it is by then is the subject
            assert [process.poll() for process in running] == [None] * 4
            del running[0]
            victim.send_signal(signal.SIGKILL)
            assert victim.wait(60) == -signal.SIGKILL
            victim.communicate()
            running.append(start(root, 4 + number, threads=1, count=10**9))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    check(root)


def test_killed_at_random_they_leave_old_new_or_nothing(tmp_path: Path) -> None:
    killed_at_random(tmp_path / "cache", 8, 7)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_two_thousand_times(tmp_path: Path) -> None:
    killed_at_random(tmp_path / "cache", 2000, 8)


KILLED_BETWEEN = """
    import os, signal, sys
    from holotensor_net.config import CacheConfig
    from holotensor_net.storage.cache import FragmentCache
    from holotensor_net.storage.entries import EntryFiles

    EntryFiles.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    FragmentCache(CacheConfig(directory=sys.argv[1], memory_size=0)).put("a", b"orphan" * 100)
"""


@pytest.mark.parametrize("way", ["verify", "prune", "evict"])
def test_blob_of_one_killed_before_its_entry_is_collected_when_it_is_due(tmp_path: Path, way: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED_BETWEEN), str(tmp_path)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    (blob,) = (tmp_path / "blobs").glob("*/*")
    with FragmentCache(CacheConfig(directory=tmp_path, memory_size=0, max_size=1000)) as cache:
        cache.put("b", b"kept")
        assert cache.get("a") is None
        assert cache.verify() == []
        assert blob.exists()  # its entry may be on its way
        os.utime(blob, (1, 1))
        if way == "verify":
            assert cache.verify() == []
        elif way == "prune":
            assert cache.prune(900) == 600
        else:
            cache.put("c", bytes(900))
        assert not blob.exists()
        assert cache.get("b") == b"kept"


def test_together_they_keep_to_the_limit(tmp_path: Path) -> None:
    size, most = 1000, 0
    config = CacheConfig(directory=tmp_path, memory_size=0, max_size=100 * size)
    caches = [FragmentCache(config) for _ in range(4)]
    for number in range(250):
        key = str(number)
        caches[number % 4].put(key, key.encode().rjust(size))
        most = max(most, sum(blob.stat().st_size for blob in (tmp_path / "blobs").glob("*/*")))
    for cache in caches:
        cache.close()
    assert 90 * size <= most <= (100 + 4) * size
