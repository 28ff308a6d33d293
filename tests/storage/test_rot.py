"""Rot: a share of the cache is damaged in every way that a disk knows; all of it is found, and none is handed out."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from holotensor_net.config import CacheConfig
from holotensor_net.storage import blobs as blobs_room
from holotensor_net.storage.cache import CacheEntry, FragmentCache

LARGE = 1 << 18  # from here on a blob is trusted by its file's time
FRESH = {"cache-control": "max-age=1000000000"}


def payload(number: int) -> bytes:
    return hashlib.shake_128(b"%d" % number).digest(LARGE + number if number % 50 == 0 else 40 + number)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def flip_unseen(path: Path) -> None:
    """The disk itself lets a bit go: no time of a file tells."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def make_newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))


BLOBS: list[Callable[[Path], None]] = [flip, flip_unseen, cut, zero, Path.unlink]
ENTRIES: list[Callable[[Path], None]] = [flip, cut, zero, make_newer]


def blob_of(root: Path, number: int) -> Path:
    digest = blake3(payload(number)).hexdigest()
    return root / "blobs" / digest[:2] / digest


def entry_of(root: Path, number: int) -> Path:
    name = hashlib.sha256(b"%d" % number).hexdigest()
    return root / "entries" / name[:2] / f"{name}.json"


def filled(root: Path, count: int) -> CacheConfig:
    config = CacheConfig(directory=root, memory_size=0)
    with FragmentCache(config) as cache:
        for number in range(count):
            cache.put(f"{number}", payload(number), CacheEntry(f"{number}", 0, headers=FRESH))
    return config


def damage(root: Path, count: int, rng: random.Random) -> tuple[set[int], set[int]]:
    """Damage a hundredth of the blobs, and of the entries, at least one in each way; gives their numbers."""
    share = max(count // 100, len(BLOBS) + 2)
    chosen = rng.sample(range(1, count), 2 * share)
    blobs, entries = {0, *chosen[:share]}, set(chosen[share:])
    for turn, number in enumerate(sorted(blobs)):
        BLOBS[(turn + 1) % len(BLOBS)](blob_of(root, number))  # the first is large: its rot cannot be seen
    for turn, number in enumerate(sorted(entries)):
        ENTRIES[turn % len(ENTRIES)](entry_of(root, number))
    return blobs, entries


COUNTS = [400, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]


@pytest.mark.parametrize("count", COUNTS)
def test_verify_finds_all_of_it_and_nothing_else(tmp_path: Path, count: int) -> None:
    config = filled(tmp_path, count)
    blobs, entries = damage(tmp_path, count, random.Random(7))
    with FragmentCache(config) as cache:
        broken = cache.verify()
        assert sorted(broken) == sorted([*map(str, blobs), *(entry_of(tmp_path, n).stem for n in entries)])
        assert cache.verify() == []
        assert {entry.fragment_id for entry in cache} == {str(n) for n in set(range(count)) - blobs - entries}


@pytest.mark.parametrize("verify_on_open", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_what_is_read_is_right_or_a_miss_and_a_second_fetch_heals_it(
    tmp_path: Path, count: int, verify_on_open: bool
) -> None:
    config = replace(filled(tmp_path, count), verify_on_open=verify_on_open)
    blobs, entries = damage(tmp_path, count, random.Random(8))
    unseen: set[int] = set()
    if not verify_on_open:  # what a disk does behind the back of a durable blob's time is for verify to find
        unseen = {n for n in blobs if len(payload(n)) >= LARGE and blob_of(tmp_path, n).exists()}
    with FragmentCache(config) as cache:
        for number in sorted(set(range(count)) - unseen):
            data = cache.get(f"{number}")
            assert (data is None) is (number in blobs | entries)
            if data is None:
                data = cache.put(f"{number}", payload(number), CacheEntry(f"{number}", 0, headers=FRESH))
            assert data == payload(number)
        assert set(cache.verify()) <= set(map(str, unseen))
        assert all(cache.get(f"{number}") == payload(number) for number in set(range(count)) - unseen)


def test_who_verifies_on_open_hashes_once_and_what_came_here_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def digest_of(data: memoryview) -> str:
        hashed.append(len(data))
        return blake3(data).hexdigest()

    config = filled(tmp_path, 1)
    monkeypatch.setattr(blobs_room, "digest_of", digest_of)
    for verify_on_open, count in ((False, 0), (True, 1)):
        with FragmentCache(replace(config, verify_on_open=verify_on_open)) as cache:
            for _ in range(3):
                assert cache.get("0") == payload(0)
            assert hashed == [LARGE] * count
            cache.put("new", payload(50 + 50 * count), CacheEntry("new", 0))
            assert cache.get("new") == payload(50 + 50 * count)
            assert hashed == [LARGE] * count
