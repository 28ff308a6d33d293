"""Many processes at one folder, at work and dying: every read is right or a miss, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from holotensor_net.config import CacheConfig
from holotensor_net.storage.cache import FragmentCache

QUOTA = 1 << 17  # about a quarter of what all keys take
LARGEST = (1 << 14) + 1  # bytes of an object

WORK = """
    import os, random, signal, sys, threading, time
    from blake3 import blake3
    from holotensor_net.config import CacheConfig
    from holotensor_net.storage.cache import CacheEntry, FragmentCache

    KEYS, VERSIONS = 64, 4
    MOTHER = os.getpid()
    root, quota, seed, locks = sys.argv[1], *map(int, sys.argv[2:5])
    if not locks:
        import fcntl
        def refuse(*_): raise OSError(38, "no locks here")
        fcntl.flock = fcntl.fcntl = refuse

    def bytes_of(key, version):
        draw = random.Random(key * 1000 + version)
        return draw.randbytes(draw.randrange(1, 1 << 14)) + bytes((key, version))

    CONTENT = {(key, version): bytes_of(key, version) for key in range(KEYS) for version in range(VERSIONS)}
    DIGESTS = {which: blake3(data).digest() for which, data in CONTENT.items()}

    def opened():
        return FragmentCache(CacheConfig(directory=root, memory_size=0, max_size=quota, free_space_reserve=0))

    def go(cache, draw, count, hits):
        for _ in range(count):
            if os.getppid() != MOTHER:
                os._exit(6)
            key, dice, version = draw.randrange(KEYS), draw.random(), draw.randrange(VERSIONS)
            if dice < 0.85:
                view = cache.get(str(key))
                if view is not None:
                    hits.append(key)
                    if view[-2] != key or blake3(view).digest() != DIGESTS[key, view[-1]]:
                        os._exit(3)
                continue
            data = CONTENT[key, version]
            if dice < 0.96:
                cache.put(str(key), data, CacheEntry(str(key), 0))
            elif dice < 0.98:
                cache.remove(str(key))
            else:
                part = cache.create(None)
                if part is not None:
                    part.write(0, data)
                    cache.adopt(str(key), part, CacheEntry(str(key), len(data)))

    def child(number, threads, count):
        pid = os.fork()
        if pid:
            return pid
        try:
            with opened() as cache:
                hits = []
                draws = [random.Random(f"{seed} {number} {each}") for each in range(threads)]
                workers = [threading.Thread(target=go, args=(cache, draw, count, hits)) for draw in draws]
                for worker in workers: worker.start()
                for worker in workers: worker.join()
            os._exit(0 if len(hits) > threads * count // 20 else 4)
        finally:
            os._exit(5)

    def bytes_there():
        found = 0
        for folder, _, names in os.walk(root):
            if os.path.relpath(folder, root).partition("/")[0] in ("blobs", "partial", "quarantine"):
                found += sum(os.lstat(f"{folder}/{name}").st_size for name in names)
        return found

    def crowd(processes, threads, count):
        '''While they work all are stopped now and then, so that what lies there is of one moment.'''
        running, most, looks = {child(number, threads, count) for number in range(processes)}, 0, 0
        while running:
            for pid in list(running):
                os.kill(pid, signal.SIGSTOP)
                status = os.waitpid(pid, os.WUNTRACED)[1]
                if not os.WIFSTOPPED(status):
                    assert status == 0
                    running.discard(pid)
            most, looks = max(most, bytes_there()), looks + 1
            for pid in running:
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)
        print(most - quota, looks)

    def die(kills):
        '''Four writers, of which one dies at a time, and is followed by another.'''
        draw = random.Random(seed)
        running = [child(number, 1, 10**9) for number in range(4)]
        for number in range(kills):
            time.sleep(draw.uniform(0.0, 0.01))  # where it is by then is the subject
            pid = running.pop(draw.randrange(4))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            opened().close()
            left = [name for name in os.listdir(f"{root}/partial") if f"-{pid}." in name]
            assert not left, left
            running.append(child(4 + number, 1, 10**9))
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL

    {"crowd": crowd, "die": die}[sys.argv[5]](*map(int, sys.argv[6:]))
"""


def run(root: Path, seed: int, way: str, *numbers: int, locks: bool = True, timeout: float = 280) -> list[int]:
    (root / "partial").mkdir(parents=True)
    arguments = [str(root), *map(str, (QUOTA, seed, int(locks))), way, *map(str, numbers)]
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WORK), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, "")
    check(root)
    return [int(number) for number in done.stdout.split()]


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
            assert view == draw.randbytes(draw.randrange(1, 1 << 14)) + bytes((int(entry.fragment_id), view[-1]))
        named = {entry.digest for entry in cache}
        assert {blob.name for blob in (root / "blobs").glob("*/*")} == named
        cache.prune(0)
    assert not list((root / "blobs").glob("*/*"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("locks", [True, False])
def test_every_read_is_right_at_a_quarter_of_the_room(tmp_path: Path, locks: bool) -> None:
    over, looks = run(tmp_path / "cache", 1, "crowd", 8, 8, 25_000 // 64, locks=locks)
    assert looks > 10
    assert over <= 64 * LARGEST


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("locks", [True, False])
def test_every_read_is_right_in_half_a_million(tmp_path: Path, locks: bool) -> None:
    over, _ = run(tmp_path / "cache", 2, "crowd", 8, 8, 500_000 // 64 + 1, locks=locks, timeout=1100)
    assert over <= 64 * LARGEST


@pytest.mark.timeout(300)
def test_killed_at_random_they_leave_old_new_or_nothing(tmp_path: Path) -> None:
    run(tmp_path / "cache", 7, "die", 200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("locks", [True, False])
def test_killed_at_random_two_thousand_times(tmp_path: Path, locks: bool) -> None:
    run(tmp_path / "cache", 8, "die", 2000, locks=locks, timeout=1100)


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
