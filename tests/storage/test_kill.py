"""SIGKILL at a system call of a put, an eviction or a resumption, as the kernel sees it: old, new or nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from servers import tool, unavailable

from holotensor_net.config import CacheConfig
from holotensor_net.storage.cache import CacheEntry, FragmentCache

CALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "unlink", "ftruncate")
SIZE = 9 << 20
SHARE = 6
"""Of the system calls of each kind, one in so many is a place to die at in the ordinary run."""

PRELUDE = """
    import os, sys
    from holotensor_net.config import CacheConfig
    from holotensor_net.storage.cache import CacheEntry, FragmentCache

    SIZE = 9 << 20
    cache = FragmentCache(CacheConfig(directory=sys.argv[1], memory_size=0, max_size=3 * SIZE))
    def bytes_of(version, size=SIZE):
        return bytes([version]) * size
    def put(key, version, size=SIZE):
        cache.put(key, bytes_of(version, size), CacheEntry(key, size, f'"{version}"'))
    def part():
        made = cache.create(SIZE, key="resumed", note={"version": 1})
        for start in range(0, SIZE // 2, 1 << 20):
            made.write(start, bytes_of(1, 1 << 20))
            made.settle(start, start + (1 << 20))
        return made
    def adopt(made):
        with made:
            done = made.settled[-1][1]
            made.write(done, bytes_of(1, SIZE - done))
            made.settle(done, SIZE)
            cache.adopt("resumed", made, CacheEntry("resumed", SIZE, '"1"'))
"""
BEFORE = {
    "put": "put('a', 1); put('small', 1, 100)",
    "evict": "put('a', 1); put('small', 1, 100); put('c', 5)",
    "resume": "part().keep()",
}
DURING = {
    "put": "put('a', 2); put('small', 2, 100); cache.sync()",
    "evict": "put('d', 2); put('e', 3); cache.prune(0)",
    "resume": "adopt(cache.resume('resumed')[0])",
}
KEYS = ("a", "small", "c", "d", "e", "resumed")


def command(cache: Path, work: str) -> list[str]:
    script = textwrap.dedent(PRELUDE) + "os.write(2, b'begin')\n" + work + "\nos.write(2, b'end')\n"
    return [sys.executable, "-c", script, str(cache)]


def calls_of(cache: Path, work: str, log: Path) -> dict[str, range]:
    """Which calls of each kind the work consists of: their numbers in the life of the process."""
    names = ",".join(CALLS)
    traced = [tool("strace"), "-f", "-qq", "-e", f"trace={names}", "-o", str(log), *command(cache, work)]
    if subprocess.run(traced, capture_output=True, timeout=60).returncode:
        unavailable("no process may be traced here")
    seen = dict.fromkeys(CALLS, 0)
    first: dict[str, int] = {}
    for line in log.read_text().splitlines():
        match = re.search(r"\b(\w+)\(", line)
        if match is None or match[1] not in seen:
            continue
        if '"begin"' in line:
            first = dict(seen)
        elif '"end"' in line:
            break
        seen[match[1]] += 1
    return {name: range(first[name] + 1 + (name == "write"), seen[name] + 1) for name in CALLS}


def check(root: Path) -> None:
    cache = FragmentCache(CacheConfig(directory=root, memory_size=0))
    assert not [path for path in (root / "partial").glob("*") if path.name.startswith(".")], "orphans"
    for key in KEYS:
        entry, view = cache.get_entry(key), cache.get(key)
        if view is not None:
            assert entry is not None
            assert view == bytes([int((entry.etag or "").strip('"'))]) * entry.size
    assert cache.verify() == []
    resumed = cache.resume("resumed")
    if resumed is not None:
        with resumed[0] as part:
            view = part.view()
            assert all(view[start:stop] == bytes([1]) * (stop - start) for start, stop in part.settled)
    assert cache.put("a", b"after", CacheEntry("a", 5)) == b"after"
    cache.prune(0)
    assert not list((root / "partial").glob("*"))


def killed_everywhere(tmp_path: Path, work: str, share: int) -> int:
    def prepared(name: str) -> Path:
        root = tmp_path / name
        subprocess.run(command(root, BEFORE[work]), check=True, capture_output=True, timeout=60)
        return root

    places = calls_of(prepared("first"), DURING[work], tmp_path / "log")
    died = number = 0
    for name, numbers in places.items():
        for when in numbers:
            number += 1
            if number % share:
                continue
            root = prepared(f"{name}-{when}")
            inject = f"inject={name}:signal=SIGKILL:when={when}"
            traced = [tool("strace"), "-f", "-qq", "-e", f"trace={name}", "-e", inject, "-o", os.devnull]
            done = subprocess.run([*traced, *command(root, DURING[work])], capture_output=True, timeout=60)
            died += done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
            check(root)
    assert number >= 5
    return died


@pytest.mark.parametrize("work", sorted(DURING))
def test_killed_at_a_system_call(tmp_path: Path, work: str) -> None:
    assert killed_everywhere(tmp_path, work, SHARE) >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("work", sorted(DURING))
def test_killed_at_every_system_call(tmp_path: Path, work: str) -> None:
    assert killed_everywhere(tmp_path, work, 1) >= 5
