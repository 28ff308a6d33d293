from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3
from cachetools import LRUCache

from holotensor_net.config import CacheConfig
from holotensor_net.errors import CacheError, ChecksumMismatch, InsufficientDisk
from holotensor_net.storage import cache as room
from holotensor_net.storage import disk, entries, journal
from holotensor_net.storage import files as owners
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.cache import CacheEntry, CacheStats, FragmentCache
from holotensor_net.storage.disk import DiskTier
from holotensor_net.storage.entries import EntryFiles, Held
from holotensor_net.storage.news import News
from holotensor_net.values import RangeRequest, Validator

LARGE = 1 << 17
FRESH = {"cache-control": "max-age=60"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def payload(key: str, size: int) -> bytes:
    return hashlib.shake_128(key.encode()).digest(size)


def files(root: Path) -> list[str]:
    """All files but the one by which processes tell each other what they do."""
    return sorted(str(path.relative_to(root)) for path in of("", root))


def of(kind: str, root: Path) -> list[Path]:
    return [path for path in (root / kind).rglob("*") if not path.is_dir() and path.name != "news"]


@contextlib.contextmanager
def tiny_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes of its own, where this machine lets us make one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield path
    finally:
        gc.collect()
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_cache(tmp_path: Path, clock: Clock) -> Callable[..., FragmentCache]:
    def opened(**settings: object) -> FragmentCache:
        defaults = {"directory": tmp_path / "cache", "memory_size": 0}
        return FragmentCache(CacheConfig(**{**defaults, **settings}), clock=clock)  # type: ignore[arg-type]

    return opened


Open = Callable[..., FragmentCache]


class TestEntry:
    def test_has_defaults_for_all_but_name_and_size(self) -> None:
        entry = CacheEntry(fragment_id="a", size=3)
        assert (entry.etag, entry.last_modified, entry.digest, entry.byte_range) == (None, None, None, None)
        assert (entry.cached_at, entry.last_accessed, entry.access_count) == (0.0, 0.0, 0)
        assert not entry.validator
        assert CacheEntry("a", 3) == entry
        with pytest.raises(FrozenInstanceError):
            entry.size = 4  # type: ignore[misc]
        assert pickle.loads(pickle.dumps(entry)) == entry
        assert hash(entry) == hash(CacheEntry("a", 3))

    def test_validator_is_what_was_seen(self) -> None:
        entry = CacheEntry("a", 3, '"e"', "date", validator_is_strong=True)
        assert entry.validator == Validator('"e"', "date", True)

    def test_recent_and_frequent_ones_stay(self) -> None:
        old, new = CacheEntry("a", 3, last_accessed=10.0), CacheEntry("a", 3, last_accessed=90.0)
        popular = replace(old, access_count=20)
        assert old.eviction_score(100.0) > new.eviction_score(100.0) > popular.eviction_score(100.0)
        assert old.eviction_score(5.0) == 1.0
        assert popular.eviction_score(10.0) < old.eviction_score(10.0)

    def test_uses_add_up_and_never_go_back_in_time(self) -> None:
        entry = CacheEntry("a", 3, last_accessed=50.0, access_count=2)
        assert entry.used(3, 40.0) == replace(entry, access_count=5)
        assert entry.used(1, 60.0) == replace(entry, access_count=3, last_accessed=60.0)

    def test_freshness_counts_from_the_answer_else_from_storing(self) -> None:
        assert CacheEntry("a", 3, cached_at=5.0).freshness.response_time == 5.0
        entry = CacheEntry("a", 3, cached_at=5.0, requested_at=1.0, received_at=2.0, headers=FRESH)
        assert (entry.freshness.request_time, entry.freshness.response_time) == (1.0, 2.0)
        assert entry.freshness.lifetime() == 60

    def test_keeps_no_header_that_could_be_a_secret(self) -> None:
        assert CacheEntry("a", 3, headers={"Set-Cookie": "s", "Age": "1"}).headers == {"age": "1"}


@pytest.mark.parametrize("way", ["put", "take"])
def test_what_is_safe_on_the_disk_takes_no_memory_of_ours(open_cache: Open, way: str) -> None:
    cache, data = open_cache(memory_size=1 << 20, max_size=1 << 20), os.urandom(1 << 18)
    if way == "put":
        view = cache.put("a", data)
    else:
        view = cache.take("a", memoryview(data), CacheEntry("a", len(data)))
    held = cache.get("a")
    assert held is not None
    assert view == held == data
    assert isinstance(view.obj, mmap.mmap)
    assert view.obj is held.obj


def test_a_view_that_its_holder_releases_is_the_holder_s_alone(open_cache: Open) -> None:
    with open_cache(memory_size=1 << 20) as cache:
        cache.put("k", b"bytes").release()
        first = cache.get("k")
        assert first is not None
        first.release()
        assert cache.get("k") == b"bytes"


@pytest.mark.parametrize("settings", [{"directory": False}, {}, {"memory_size": 0}], ids=["memory", "both", "disk"])
def test_what_is_taken_at_one_go_is_there_as_if_taken_one_by_one(open_cache: Open, settings: dict[str, Any]) -> None:
    with open_cache(**{"memory_size": 10, **settings}) as cache:
        entries = {key: CacheEntry(key, len(key), etag='"v"', headers=FRESH) for key in ("a", "bb", "ccc", "d" * 20)}
        taken = [(key, memoryview(key.encode()), entry) for key, entry in entries.items()]
        views = cache.take_all(taken)
        assert [bytes(view) for view in views] == [key.encode() for key in entries]
        assert all(view.readonly for view in views)
        there = ["a", "bb", "ccc"] if "directory" in settings else ["a", "bb", "ccc", "d" * 20]
        assert [key for key in entries if cache.get(key) == key.encode()] == there
        again = cache.get_entry("a")
        assert again is not None
        assert (again.etag, again.cached_at) == ('"v"', cache._clock())
        with pytest.raises(CacheError, match="fetch them again"):
            cache.take_all([taken[0], ("b", memoryview(b"b"), entries["bb"])])
        secret = CacheEntry("secret", 6, headers={"cache-control": "no-store"})
        assert cache.take_all([taken[0], ("secret", memoryview(b"secret"), secret)]) == [b"a", b"secret"]
        assert ("a" in cache, "secret" in cache) == (True, False)


class TestStats:
    def test_hit_rate_is_zero_before_the_first_question(self) -> None:
        assert CacheStats().hit_rate == 0.0
        assert CacheStats(misses=3).hit_rate == 0.0
        assert CacheStats(hits=3, misses=1).hit_rate == 0.75


@pytest.mark.parametrize(
    "settings",
    [{"directory": False, "memory_size": 1 << 20}, {"memory_size": 0}, {"memory_size": 1 << 20}, {"memory_size": 20}],
    ids=["memory", "disk", "both", "little memory"],
)
class TestEveryTier:
    @pytest.mark.parametrize("size", [0, 1, 20, 21, LARGE])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_gives_what_was_put(
        self, open_cache: Open, settings: dict[str, object], size: int, kind: type[bytes]
    ) -> None:
        cache = open_cache(**settings)
        data = payload("a", size)
        stored = cache.put("a", kind(data))
        got = cache.get("a")
        assert got is not None
        assert stored == got == data
        assert stored.readonly
        assert got.readonly
        assert "a" in cache
        assert "b" not in cache
        assert cache.get("b") is None

    def test_what_was_put_cannot_be_changed_from_outside(self, open_cache: Open, settings: dict[str, object]) -> None:
        cache = open_cache(**settings)
        data = bytearray(b"abc" * 5)
        stored = cache.put("a", data)
        data[:3] = b"xyz"
        assert stored == cache.get("a") == b"abc" * 5

    def test_later_put_replaces_the_earlier(self, open_cache: Open, settings: dict[str, object]) -> None:
        cache = open_cache(**settings)
        for data in (b"old", b"newer", b"x" * 1000, b"y"):
            cache.put("a", data)
            assert cache.get("a") == data
        cache.sync()
        stats = cache.stats()
        assert stats.entries == 1
        assert stats.disk_size in (0, 1)
        assert stats.memory_size in (0, 1)

    def test_keys_are_any_strings(self, open_cache: Open, settings: dict[str, object], tmp_path: Path) -> None:
        cache = open_cache(**{**settings, "memory_size": max(1000, int(str(settings["memory_size"])))})
        keys = ["", "../../x", "/etc/passwd", "a\0b", "é\ud800", "k" * 10_000, "con", "a/b", "a\\b", ".", "A", "a"]
        for number, key in enumerate(keys):
            cache.put(key, b"%d" % number)
        for number, key in enumerate(keys):
            assert cache.get(key) == b"%d" % number
            entry = cache.get_entry(key)
            assert entry is not None
            assert entry.fragment_id == key
        assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
        assert {entry.fragment_id for entry in cache} == set(keys)

    def test_counts_hits_misses_and_uses(self, open_cache: Open, settings: dict[str, object], clock: Clock) -> None:
        cache = open_cache(**settings)
        cache.put("a", b"abc", CacheEntry("fragment", 3, '"e"', "date", validator_is_strong=True))
        began = clock.now
        for _ in range(3):
            clock.now += 10
            cache.get("a")
        cache.get("b")
        assert "c" not in cache
        cache.sync()
        stats = cache.stats()
        assert (stats.entries, stats.hits, stats.misses, stats.hit_rate) == (1, 3, 1, 0.75)
        entry = cache.get_entry("a")
        assert entry is not None
        assert (entry.fragment_id, entry.size, entry.validator) == ("fragment", 3, Validator('"e"', "date", True))
        assert (entry.cached_at, entry.last_accessed, entry.access_count) == (began, began + 30, 3)
        assert entry.digest == blake3(b"abc").hexdigest()
        assert list(cache) == [entry]

    def test_forgets_on_request(self, open_cache: Open, settings: dict[str, object], tmp_path: Path) -> None:
        cache = open_cache(**settings)
        view = cache.put("a", payload("a", LARGE))
        cache.put("b", b"b")
        assert cache.remove("b")
        assert not cache.remove("b")
        cache.clear()
        assert "a" not in cache
        assert cache.get("b") is None
        assert view == payload("a", LARGE)
        stats = cache.stats()
        assert (stats.entries, stats.disk_size, stats.memory_size) == (0, 0, 0)
        assert files(tmp_path) == []

    def test_no_store_and_vary_star_leave_no_trace(
        self, open_cache: Open, settings: dict[str, object], tmp_path: Path
    ) -> None:
        cache = open_cache(**settings)
        cache.put("a", b"old")
        for headers in ({"cache-control": "no-store"}, {"vary": "*"}):
            assert cache.put("a", b"abc", CacheEntry("a", 3, headers=headers)) == b"abc"
            assert cache.get("a") is None
        assert files(tmp_path) == []

    def test_is_asked_again_unless_fresh_or_confirmed(
        self, open_cache: Open, settings: dict[str, object], clock: Clock
    ) -> None:
        cache = open_cache(**settings)
        assert cache.needs_revalidation("a")
        assert cache.needs_revalidation("a", '"e"')
        cache.put("a", b"abc")
        assert cache.needs_revalidation("a")
        assert cache.needs_revalidation("a", '"e"')
        cache.put("a", b"abc", CacheEntry("a", 3, '"e"', headers=FRESH))
        assert not cache.needs_revalidation("a")
        assert not cache.needs_revalidation("a", 'W/"e"')
        assert cache.needs_revalidation("a", '"f"')
        clock.now += 60
        assert cache.needs_revalidation("a")
        assert not cache.needs_revalidation("a", '"e"')

    def test_304_makes_it_fresh_again(self, open_cache: Open, settings: dict[str, object], clock: Clock) -> None:
        cache = open_cache(**settings)
        assert not cache.revalidated("a", FRESH)
        cache.put("a", b"abc", CacheEntry("a", 3, '"e"', headers={**FRESH, "age": "50"}, validator_is_strong=True))
        cached_at = clock.now
        clock.now += 1000
        assert cache.revalidated("a", {"cache-control": "max-age=30", "set-cookie": "s"}, requested_at=clock.now - 5)
        assert not cache.needs_revalidation("a")
        clock.now += 25
        assert cache.needs_revalidation("a")
        assert cache.revalidated("a", {"etag": 'W/"e"'})
        assert not cache.needs_revalidation("a")
        entry = cache.get_entry("a")
        assert entry is not None
        assert (entry.cached_at, entry.received_at, entry.requested_at) == (cached_at, clock.now, clock.now)
        assert entry.validator == Validator('"e"', None, True)
        assert cache.get("a") == b"abc"

    @pytest.mark.parametrize(
        ("stored", "answered"),
        [
            (CacheEntry("a", 3, '"e"'), {"etag": '"f"'}),
            (CacheEntry("a", 3, '"e"', "monday"), {"etag": 'W/"f"', "last-modified": "monday"}),
            (CacheEntry("a", 3, None, "monday"), {"last-modified": "tuesday"}),
        ],
    )
    def test_304_of_another_version_freshens_nothing(
        self, open_cache: Open, settings: dict[str, object], stored: CacheEntry, answered: dict[str, str]
    ) -> None:
        cache = open_cache(**settings)
        cache.put("a", b"abc", stored)
        before = cache.get_entry("a")
        assert not cache.revalidated("a", {**FRESH, **answered})
        assert cache.needs_revalidation("a")
        assert cache.get_entry("a") == before

    def test_304_that_forbids_storing_ends_it(self, open_cache: Open, settings: dict[str, object]) -> None:
        cache = open_cache(**settings)
        cache.put("a", b"abc")
        assert cache.revalidated("a", {"cache-control": "no-store"})
        assert "a" not in cache


class TestMemoryTier:
    def test_holds_what_was_used_last(self, open_cache: Open) -> None:
        cache = open_cache(directory=False, memory_size=30)
        for key in "abc":
            cache.put(key, bytes(10))
        cache.get("a")
        cache.put("d", bytes(10))
        assert [key in cache for key in "abcd"] == [True, False, True, True]
        stats = cache.stats()
        assert (stats.entries, stats.memory_size, stats.disk_size, stats.evictions) == (3, 30, 0, 1)

    def test_too_large_for_it_means_not_held_and_no_error(self, open_cache: Open) -> None:
        cache = open_cache(directory=False, memory_size=30)
        cache.put("a", b"old")
        assert cache.put("a", bytes(31)) == bytes(31)
        assert cache.get("a") is None
        assert cache.stats().memory_size == 0

    def test_zero_holds_not_even_the_empty(self, open_cache: Open) -> None:
        cache = open_cache(directory=False, memory_size=0)
        cache.put("a", b"")
        assert "a" not in cache

    def test_a_buffer_counts_as_long_as_a_part_of_it_is_held(self) -> None:
        tier = room._MemoryTier(1000)
        buffers = [bytearray(100) for _ in range(12)]
        views = {
            f"{number}-{part}": memoryview(buffers[number])[10 * part :][:10]
            for number in (*range(12),)
            for part in (0, 1)
        }
        for name, view in views.items():
            tier.put(name, Held(CacheEntry(name, 10), view))
        assert tier.names() == {name for name in views if int(name.partition("-")[0]) >= 2}
        assert tier.evictions == 4
        tier.drop("2-0")
        tier.put("new", Held(CacheEntry("new", 10), memoryview(bytes(10))))
        assert "2-1" not in tier.names()
        assert {"3-0", "new"} <= tier.names()
        for name in tier.names():
            tier.drop(name)
        assert (tier.size, len(tier._buffers)) == (0, 0)

    def test_of_a_large_buffer_a_part_is_copied(self) -> None:
        tier = room._MemoryTier(1000)
        buffer = bytearray(range(200))
        tier.put("a", Held(CacheEntry("a", 10), memoryview(buffer)[5:15]))
        tier.put("b", Held(CacheEntry("b", 200), memoryview(buffer)))
        held, whole = tier.get("a"), tier.get("b")
        assert held is not None
        assert whole is not None
        assert held.view == bytes(range(5, 15))
        assert held.view.obj is not buffer
        assert whole.view.obj is buffer

    @pytest.mark.parametrize(("size", "length", "is_copied"), [(900, 899, False), (900, 450, True), (1100, 999, True)])
    def test_what_is_most_of_a_buffer_that_fits_is_not_copied(self, size: int, length: int, is_copied: bool) -> None:
        tier = room._MemoryTier(1000)
        buffer = bytearray(size)
        tier.put("a", Held(CacheEntry("a", length), memoryview(buffer)[:length]))
        held = tier.get("a")
        assert held is not None
        assert (held.view.obj is not buffer) == is_copied
        assert tier.size == (length if is_copied else size)

    def test_late_news_of_other_bytes_is_not_attached_to_these(self) -> None:
        tier = room._MemoryTier(100)
        tier.put("a", Held(CacheEntry("a", 3, digest="new"), memoryview(b"new")))
        tier.update("a", CacheEntry("a", 3, '"e"', digest="old"))
        tier.update("b", CacheEntry("b", 3, '"e"', digest="new"))
        held = tier.get("a")
        assert held is not None
        assert held.entry.etag is None
        assert tier.names() == {"a"}

    def test_lru_is_never_touched_without_the_lock(self) -> None:
        """Unlocked, it breaks under threads, but too rarely for a test to wait for it."""
        tier = room._MemoryTier(2)
        touched: set[str] = set()

        class Watched(LRUCache[int, room._Buffer]):
            def __getattribute__(self, name: str) -> object:
                if name in ("get", "popitem", "clear"):
                    assert tier._lock.locked(), name
                    touched.add(name)
                return super().__getattribute__(name)

            def __setitem__(self, key: int, value: room._Buffer) -> None:
                assert tier._lock.locked()
                super().__setitem__(key, value)

            def __delitem__(self, key: int) -> None:
                assert tier._lock.locked()
                super().__delitem__(key)

        tier._buffers = Watched(2)
        entry = CacheEntry("a", 1)
        for name in "abc":
            tier.put(name, Held(entry, memoryview(name.encode())))
        assert tier.get("a") is None
        assert tier.get("b") is not None
        tier.update("b", entry)
        assert tier.names() == {"b", "c"}
        tier.drop("b")
        tier.clear()
        assert (tier.size, tier.evictions) == (0, 1)
        assert touched == {"get", "popitem", "clear"}

    def test_what_came_together_is_used_and_let_go_together(self) -> None:
        tier = room._MemoryTier(1000)

        def put(*names: str) -> None:
            buffer = bytes(100)
            tier.put_all([(name, Held(CacheEntry(name, 10), memoryview(buffer)[:10])) for name in names])

        put("a", "b")
        for number in range(9):
            put(f"{number}")
        assert tier.get("a") is not None
        put("new")
        assert {"a", "b"} <= tier.names()
        assert "0" not in tier.names()
        put("b")  # anew, from elsewhere
        assert ({"a", "b"} <= tier.names(), tier.size) == (True, 1000)
        for name in ("a", "b"):
            tier.drop(name)
        assert tier.size == 800

    def test_uses_of_what_is_gone_are_not_remembered(self, open_cache: Open) -> None:
        cache = open_cache(directory=False, memory_size=100)
        for number in range(50):
            cache.put(f"{number}", bytes(30))
            assert cache.get(f"{number}") is not None
        assert len(list(cache)) == 3
        assert len(cache._usage.take()) == 3

    def test_hit_needs_no_disk(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(memory_size=1000)
        cache.put("a", b"abc")
        for path in of("", tmp_path):
            path.unlink()
        assert cache.get("a") == b"abc"

    def test_alone_it_makes_no_part_files_and_has_nothing_to_check(self, open_cache: Open) -> None:
        cache = open_cache(directory=False, memory_size=1000)
        cache.put("a", b"abc")
        assert cache.create(10) is None
        assert cache.verify() == []
        assert cache.prune(0) == 0
        cache.sync()
        with cache:
            assert "a" in cache
        assert "a" not in cache


class TestDiskTier:
    def test_opening_and_asking_touch_nothing(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        assert cache.get("a") is None
        assert cache.stats() == CacheStats(misses=1)
        assert list(cache) == []
        assert cache.verify() == []
        assert not cache.remove("a")
        cache.close()
        assert list(tmp_path.iterdir()) == []

    def test_another_opening_finds_all_of_it(self, open_cache: Open, clock: Clock) -> None:
        entry = CacheEntry(
            "fragment\ud800",
            LARGE,
            '"é"',
            "Tue, 14 Nov 2023 22:13:20 GMT",
            digest="f" * 64,
            url="https://cdn.example.com/model",
            byte_range=RangeRequest(5, 5 + LARGE),
            object_size=1 << 40,
            validator_is_strong=True,
            headers={**FRESH, "set-cookie": "s"},
            requested_at=clock.now - 7,
            received_at=clock.now - 6,
        )
        data = payload("a", LARGE)
        with open_cache() as cache:
            cache.put("a", data, entry)
            clock.now += 5
            cache.get("a")
            before = cache.get_entry("a")
        again = open_cache()
        assert again.get_entry("a") == before
        assert before == replace(
            entry,
            digest=blake3(data).hexdigest(),
            cached_at=clock.now - 5,
            last_accessed=clock.now,
            access_count=1,
            stamp=before.stamp if before else None,
        )
        assert again.get("a") == data
        assert again.stats().disk_size == LARGE

    def test_stays_where_it_was_opened(self, open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with open_cache(directory="cache") as cache:
            cache.put("before", b"abc")
            part = cache.create(1000)
            assert part is not None
            monkeypatch.chdir(tmp_path / "there")
            part.discard()
            cache.put("after", b"def")
            assert cache.get("before") == b"abc"
            assert cache.stats().disk_size == 6
        assert of("there", tmp_path) == of("here/cache/partial", tmp_path) == []

    def test_layout_is_hashes_only(self, open_cache: Open, tmp_path: Path) -> None:
        open_cache().put("secret/../key", b"abc", CacheEntry("id", 3))
        digest, name = blake3(b"abc").hexdigest(), hashlib.sha256(b"secret/../key").hexdigest()
        root = tmp_path / "cache"
        assert files(root) == [f"blobs/{digest[:2]}/{digest}", f"entries/{name[:2]}/{name}.json"]
        text = (root / "entries" / name[:2] / f"{name}.json").read_text()
        assert json.loads(text)["schema"] == 1
        assert "secret" not in text

    def test_hit_does_not_rewrite_the_entry(self, open_cache: Open, tmp_path: Path, clock: Clock) -> None:
        cache = open_cache()
        cache.put("a", b"abc")
        (path,) = of("entries", tmp_path / "cache")
        before = path.stat()
        clock.now += 100
        cache.get("a")
        after = path.stat()
        assert (after.st_ino, after.st_mtime) == (before.st_ino, clock.now)
        cache.sync()
        assert path.stat().st_ino == before.st_ino
        assert path.stat().st_mtime == clock.now
        entry = open_cache().get_entry("a")
        assert entry is not None
        assert (entry.access_count, entry.last_accessed) == (1, clock.now)

    def test_a_use_soon_after_another_is_shown_to_others_with_the_next_sync(
        self, open_cache: Open, tmp_path: Path, clock: Clock
    ) -> None:
        cache = open_cache(memory_size=0)
        cache.put("a", b"abc")
        (path,) = of("entries", tmp_path / "cache")
        for seconds, is_shown in ((59, False), (1, True), (59, False)):
            clock.now += seconds
            assert cache.get("a") == b"abc"
            assert (path.stat().st_mtime == clock.now) == is_shown
        cache.sync()
        assert path.stat().st_mtime == clock.now

    def test_who_writes_its_uses_late_does_not_hide_later_ones(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache()
        cache.put("a", b"abc")
        cache.get("a")
        clock.now += 1000
        latest = clock.now
        with open_cache() as other:
            other.get("a")
        clock.now += 1000
        cache.sync()
        entry = open_cache().get_entry("a")
        assert entry is not None
        assert (entry.access_count, entry.last_accessed) == (2, pytest.approx(latest, rel=0, abs=0.001))

    def test_a_clock_that_was_set_back_is_shown_at_once(self, open_cache: Open, tmp_path: Path, clock: Clock) -> None:
        cache = open_cache(memory_size=0)
        cache.put("a", b"abc")
        (path,) = of("entries", tmp_path / "cache")
        clock.now -= 5
        assert cache.get("a") == b"abc"
        assert path.stat().st_mtime == clock.now

    def test_what_has_lost_its_bytes_is_not_listed(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(memory_size=0)
        for key in "ab":
            cache.put(key, key.encode(), CacheEntry(key, 1))
        (blob,) = (tmp_path / "cache" / "blobs").rglob(blake3(b"a").hexdigest())
        blob.unlink()
        assert [entry.fragment_id for entry in cache] == ["b"]

    def test_books_are_kept_for_memory_hits_too(self, open_cache: Open, clock: Clock) -> None:
        with open_cache(memory_size=1000) as cache:
            cache.put("a", b"abc")
            for _ in range(2):
                clock.now += 10
                cache.get("a")
                cache.sync()
            assert cache.get_entry("a") == open_cache().get_entry("a")
        entry = open_cache().get_entry("a")
        assert entry is not None
        assert (entry.access_count, entry.last_accessed) == (2, clock.now)

    def test_equal_bytes_are_stored_once_and_go_with_the_last_name(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        for key in "abc":
            cache.put(key, payload("x", 1000))
        assert len(of("blobs", tmp_path / "cache")) == 1
        assert cache.stats().disk_size == 1000
        cache.remove("a")
        cache.put("b", b"other")
        cache.sync()
        assert cache.get("c") == payload("x", 1000)
        cache.remove("c")
        assert [path.stat().st_size for path in of("blobs", tmp_path / "cache")] == [5]
        assert cache.stats().disk_size == 5

    def test_part_file_is_adopted_without_a_copy(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        data = payload("a", LARGE)
        part = cache.create(LARGE)
        assert part is not None
        inode = part.path.stat().st_ino
        part.write(LARGE // 2, data[LARGE // 2 :])
        part.write(0, data[: LARGE // 2])
        assert cache.adopt("a", part, CacheEntry("a", LARGE)) == data
        assert cache.get("a") == data
        assert [path.stat().st_ino for path in of("blobs", tmp_path / "cache")] == [inode]
        assert of("partial", tmp_path / "cache") == []

    def test_digest_that_is_given_is_not_computed_again(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = open_cache()
        part = cache.create(3)
        assert part is not None
        part.write(0, b"abc")
        monkeypatch.setattr(room, "digest_of", None)
        digest = blake3(b"abc").hexdigest()
        assert cache.adopt("a", part, CacheEntry("a", 3, digest=digest)) == b"abc"
        assert cache.get("a") == b"abc"

    @pytest.mark.parametrize("call", ["fsync", "fdatasync"])
    @pytest.mark.parametrize("headers", [FRESH, {"cache-control": "no-store"}])
    def test_what_could_not_be_flushed_is_held_in_memory(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, call: str, headers: dict[str, str]
    ) -> None:
        """The system may let go of it, and give what lies on the disk: here, zeros."""
        cache, data = open_cache(memory_size=4 * LARGE), payload("a", 3 * LARGE)
        other: list[int] = []

        def fail(fd: int) -> None:
            other.append(os.dup(fd))
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(journal, "SYNC_EVERY", LARGE)
        part = cache.create(len(data), key="a", note={"what": "this"})
        assert part is not None
        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            part.write(0, data)
            part.settle(0, 2 * LARGE)
            part.settle(2 * LARGE, len(data))
            view = cache.adopt("a", part, CacheEntry("a", len(data), headers=headers))
        assert other
        for fd in other:
            os.pwrite(fd, bytes(len(data)), 0)
            os.close(fd)
        assert view == data
        assert cache.get("a") == (data if headers is FRESH else None)
        assert open_cache().get("a") is None

    def test_what_the_disk_has_lost_is_not_handed_out(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        cache, data = open_cache(memory_size=4 * LARGE), payload("a", 3 * LARGE)

        def lose(fd: int) -> None:
            os.pwrite(fd, bytes(4096), LARGE)
            raise OSError(errno.EIO, "Input/output error")

        part = cache.create(len(data))
        assert part is not None
        part.write(0, data)
        part.settle(0, len(data))
        monkeypatch.setattr(os, "fsync", lose)
        with pytest.raises(ChecksumMismatch, match="the disk has lost"):
            cache.adopt("a", part, CacheEntry("a", len(data)))
        assert cache.get("a") is None
        assert of("partial", tmp_path / "cache") == []

    def test_part_of_another_size_is_not_adopted(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        part = cache.create(10)
        assert part is not None
        with pytest.raises(CacheError, match="10 bytes, its entry says 11"):
            cache.adopt("a", part, CacheEntry("a", 11))
        assert files(tmp_path) == []

    def test_put_does_not_believe_the_digest_of_an_older_entry(self, open_cache: Open) -> None:
        cache = open_cache()
        cache.put("a", b"abc")
        assert cache.put("a", b"xyz", cache.get_entry("a")) == b"xyz"
        assert open_cache().get("a") == b"xyz"


class TestDamage:
    @pytest.fixture
    def entry_file(self, open_cache: Open, tmp_path: Path) -> Path:
        open_cache().put("a", b"abc", CacheEntry("a", 3, '"e"', byte_range=RangeRequest(0, 3)))
        (path,) = of("entries", tmp_path / "cache")
        return path

    def assert_missed_and_healed(self, cache: FragmentCache, root: Path) -> None:
        assert cache.get("a") is None
        assert "a" not in cache
        assert of("entries", root) == []
        cache.put("a", b"abc")
        assert cache.get("a") == b"abc"

    @pytest.mark.parametrize(
        "text",
        [b"", b"\0" * 500, b"{", b"[]", b"null", b"1", b'"a"', b"{}", b"\xff\xfe", b"[" * 100_000, b'{"check": NaN}'],
    )
    def test_garbled_entry_is_a_miss_and_set_aside(
        self, open_cache: Open, entry_file: Path, tmp_path: Path, text: bytes
    ) -> None:
        entry_file.write_bytes(text)
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")
        assert len(of("quarantine", tmp_path / "cache")) == 1

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
    def test_torn_entry_is_a_miss(self, open_cache: Open, entry_file: Path, tmp_path: Path, share: float) -> None:
        text = entry_file.read_bytes()
        entry_file.write_bytes(text[: int(share * len(text))])
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("schema", 2),
            ("schema", None),
            ("fragment_id", None),
            ("size", -1),
            ("size", "3"),
            ("size", 3.0),
            ("digest", None),
            ("digest", "../" * 20),
            ("digest", "A" * 64),
            ("etag", 5),
            ("validator_is_strong", "yes"),
            ("object_size", -1),
            ("cached_at", "now"),
            ("cached_at", -1.0),
            ("cached_at", float("inf")),
            ("byte_range", [3, 0]),
            ("byte_range", [0]),
            ("byte_range", 5),
            ("freshness", None),
            ("freshness", {"headers": {"etag": None}, "request_time": 0, "response_time": 0}),
        ],
    )
    def test_entry_that_cannot_be_is_a_miss_though_it_adds_up(
        self, open_cache: Open, entry_file: Path, tmp_path: Path, field: str, value: object
    ) -> None:
        data = json.loads(entry_file.read_bytes())
        entry_file.write_bytes(entries._sealed({**data, field: value}))
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")

    @pytest.mark.parametrize(("before", "after"), [('\\"e\\"', '\\"f\\"'), ('"size": 3', '"size": 4')])
    def test_rot_that_still_reads_is_noticed(
        self, open_cache: Open, entry_file: Path, tmp_path: Path, before: str, after: str
    ) -> None:
        text = entry_file.read_text()
        assert before in text
        entry_file.write_text(text.replace(before, after))
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")

    def test_unknown_fields_of_the_same_schema_are_overlooked(self, open_cache: Open, entry_file: Path) -> None:
        entry_file.write_bytes(entries._sealed({**json.loads(entry_file.read_bytes()), "new": 1}))
        assert open_cache().get("a") == b"abc"

    def test_endless_entry_is_not_read(self, open_cache: Open, entry_file: Path, tmp_path: Path) -> None:
        os.truncate(entry_file, 1 << 40)
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")

    def test_planted_link_is_a_miss(self, open_cache: Open, entry_file: Path, tmp_path: Path) -> None:
        target = entry_file.rename(tmp_path / "elsewhere")
        entry_file.symlink_to(target)
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")
        assert target.exists()

    @pytest.mark.parametrize("damage", ["cut", "emptied", "rotted", "deleted"])
    def test_damaged_blob_is_a_miss_and_never_other_bytes(
        self, open_cache: Open, entry_file: Path, tmp_path: Path, damage: str
    ) -> None:
        (blob,) = of("blobs", tmp_path / "cache")
        if damage == "deleted":
            blob.unlink()
        else:
            blob.write_bytes({"cut": b"ab", "emptied": b"", "rotted": b"abd"}[damage])
        self.assert_missed_and_healed(open_cache(), tmp_path / "cache")

    def test_entry_without_its_blob_is_no_reason_to_revalidate(
        self, open_cache: Open, entry_file: Path, tmp_path: Path
    ) -> None:
        (blob,) = of("blobs", tmp_path / "cache")
        blob.unlink()
        cache = open_cache()
        assert cache.get_entry("a") is None
        assert cache.needs_revalidation("a", '"e"')
        assert not cache.revalidated("a", FRESH)

    def test_verify_names_what_is_broken_and_drops_it(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(memory_size=1000)
        root = tmp_path / "cache"
        for key in ("sound", "twin of rotted", "rotted", "gone"):
            cache.put(key, payload(key.removeprefix("twin of "), 50), CacheEntry(f"id of {key}", 50))
        assert cache.verify() == []
        cache.put("unreadable", b"x")
        unreadable = root / "entries" / (name := hashlib.sha256(b"unreadable").hexdigest())[:2] / f"{name}.json"
        unreadable.write_text("?")
        for key in ("rotted", "gone"):
            digest = blake3(payload(key, 50)).hexdigest()
            blob = root / "blobs" / digest[:2] / digest
            before = blob.stat()
            blob.write_bytes(bytes(50))
            os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
            if key == "gone":
                blob.unlink()
        broken = cache.verify()
        assert sorted(broken) == sorted([name, "id of gone", "id of rotted", "id of twin of rotted"])
        assert cache.verify() == []
        assert [entry.fragment_id for entry in cache] == ["id of sound"]
        assert cache.get("rotted") is None
        assert cache.get("sound") == payload("sound", 50)

    @pytest.mark.parametrize("meanwhile", ["evict", "replace"])
    def test_what_others_evict_or_replace_during_a_verification_is_no_damage(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, meanwhile: str
    ) -> None:
        cache, other, keys, check = open_cache(), open_cache(), "ab", BlobStore.check
        for key in keys:
            cache.put(key, payload(key, 50))

        def interrupted(store: BlobStore, digest: str, size: int) -> bool:
            monkeypatch.setattr(BlobStore, "check", check)
            if meanwhile == "evict":
                other.prune(0)
            else:
                for key in keys:
                    other.put(key, payload(f"new {key}", 60))
                other.sync()
            return store.check(digest, size)

        monkeypatch.setattr(BlobStore, "check", interrupted)
        assert cache.verify() == []
        expected = {"evict": None, "replace": payload("new a", 60)}
        assert cache.get("a") == expected[meanwhile]


class TestQuota:
    @pytest.mark.parametrize("memory_size", [0, 10_000])
    def test_most_dispensable_go_and_the_newest_never(self, open_cache: Open, clock: Clock, memory_size: int) -> None:
        cache = open_cache(max_size=1000, memory_size=memory_size)
        for number in range(10):
            clock.now += 1
            cache.put(f"k{number}", payload(f"k{number}", 100))
        clock.now += 1
        for _ in range(20):
            cache.get("k0")
        assert cache.stats().evictions == 0
        clock.now += 1
        cache.put("new", payload("new", 100))
        assert "new" in cache
        assert "k0" in cache
        assert "k1" not in cache
        stats = cache.stats()
        assert stats.disk_size <= 1000
        assert stats.disk_size == sum(entry.size for entry in cache)
        assert stats.evictions == 11 - stats.entries > 0

    def test_what_was_used_before_a_wrong_clock_was_set_right_is_old(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache(max_size=1000, free_space_reserve=0)
        clock.now += 400 * 86400
        for number in range(9):
            cache.put(f"ahead {number}", payload(f"ahead {number}", 100))
        clock.now -= 400 * 86400
        for number in range(9):
            clock.now += 60
            cache.put(f"now {number}", payload(f"now {number}", 100))
        assert {entry.fragment_id for entry in cache} >= {f"now {number}" for number in range(9)}

    def test_memory_lets_go_of_what_the_disk_evicts(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache(max_size=1000, memory_size=10_000)
        views = []
        for number in range(30):
            clock.now += 1
            views.append(cache.put(f"k{number}", payload(f"k{number}", 100)))
        stats = cache.stats()
        assert stats.entries <= 10
        assert stats.memory_size == stats.disk_size <= 1000
        assert all(view == payload(f"k{number}", 100) for number, view in enumerate(views))

    def test_larger_than_the_quota_is_given_back_and_not_stored(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(max_size=1000)
        cache.put("small", b"abc")
        assert cache.create(1001) is None
        assert cache.put("large", bytes(1001)) == bytes(1001)
        part = cache.create(None)
        assert part is not None
        part.write(0, bytes(1001))
        assert cache.adopt("large", part, CacheEntry("large", 1001)) == bytes(1001)
        assert "large" not in cache
        assert "small" in cache
        assert len(of("", tmp_path)) == 2
        assert cache.put("whole", bytes(1000)) == bytes(1000)
        assert "whole" in cache
        assert cache.stats().disk_size == 1000

    def test_prune_frees_what_it_says(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache(memory_size=10_000)
        for number in range(10):
            clock.now += 1
            cache.put(f"k{number}", payload(f"k{number}", 100))
        assert cache.prune(1000) == 0
        assert cache.prune(450) == 600
        assert sorted(entry.fragment_id for entry in cache) == ["k6", "k7", "k8", "k9"]
        assert open_cache().prune(0) == 400
        assert cache.prune(0) == 0
        assert cache.stats().disk_size == 0

    def test_shared_bytes_are_freed_once_and_last(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache()
        for key in "abc":
            cache.put(key, payload("x", 100))
        clock.now += 1
        cache.put("d", payload("y", 100))
        assert cache.prune(100) == 100
        assert [entry.fragment_id for entry in cache] == ["d"]

    def test_bytes_stay_while_another_entry_names_them(self, open_cache: Open, clock: Clock) -> None:
        cache = open_cache()
        for key, content in (("old", "x"), ("middle", "y"), ("new", "x")):
            clock.now += 1
            cache.put(key, payload(content, 100))
        assert cache.prune(100) == 100
        assert [entry.fragment_id for entry in cache] == ["new"]
        assert cache.get("new") == payload("x", 100)

    def test_planted_part_file_that_is_of_nothing_keeps_nobody_out(self, open_cache: Open, tmp_path: Path) -> None:
        planted = tmp_path / "cache" / "partial" / f"abc..{'0' * 32}"
        planted.parent.mkdir(parents=True)
        planted.write_bytes(bytes(1000))
        with open_cache() as cache:
            cache.put("a", b"abc")
            assert cache.prune(0) == cache.stats().disk_size + 3 == 3
            cache.clear()

    def test_opening_sweeps_what_dead_processes_left(self, open_cache: Open, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as dead:
            dead.wait()
        partial = tmp_path / "cache" / "partial"
        partial.mkdir(parents=True)
        token, machine = "0" * 32, owners._machine()
        kept = [f".{machine}-{os.getppid()}.{token}", f".0123456789ab-1.{token}", "strange"]
        for name in (f".{machine}-{dead.pid}.{token}", f"..{token}", f".{machine}-{os.getpid()}.{token}", *kept):
            (partial / name).write_bytes(b"abc")
        with open_cache().create(10) as part:  # type: ignore[union-attr]
            open_cache()
            assert sorted(path.name for path in partial.iterdir()) == sorted([part.path.name, *kept])

    def test_orphans_go_when_they_are_old(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        for key in "ab":
            cache.put(key, payload(key, 100))
        for path in of("entries", tmp_path / "cache"):
            path.unlink()
        assert cache.prune(1000) == 0
        old, young = of("blobs", tmp_path / "cache")
        os.utime(old, (1, 1))
        assert cache.prune(1000) == 100
        assert not old.exists()
        assert young.exists()

    def test_orphans_go_before_entries_do(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(max_size=1000)
        for number in range(10):
            cache.put(f"k{number}", payload(f"k{number}", 100))
            if number % 2:
                os.unlink(of("entries", tmp_path / "cache")[0])
        left = {entry.fragment_id for entry in cache}
        assert len(left) == 5
        cache.put("new", payload("new", 100))
        assert {entry.fragment_id for entry in cache} == left | {"new"}

    def test_blobs_are_measured_once_and_not_at_opening(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_cache().put("a", bytes(100))
        counted: list[Path] = []
        scan = BlobStore.digests

        def digests(self: BlobStore) -> Iterator[tuple[str, int]]:
            counted.append(self.root)
            return scan(self)

        monkeypatch.setattr(BlobStore, "digests", digests)
        cache = open_cache()
        cache.get("a")
        assert counted == []
        for number in range(5):
            cache.put(f"{number}", payload(f"{number}", 100))
            assert cache.stats().disk_size == 200 + 100 * number
        assert len(counted) == 1

    def test_what_another_cache_adds_counts_when_there_is_need(self, open_cache: Open, clock: Clock) -> None:
        one, other = open_cache(max_size=1000), open_cache(max_size=1000)
        for number in range(20):
            clock.now += 1
            (one, other)[number % 2].put(f"k{number}", payload(f"k{number}", 100))
        for cache in (one, other):
            assert all(cache.get(f"k{n}") in (None, payload(f"k{n}", 100)) for n in range(20))
        one.prune(1000)
        assert open_cache().stats().disk_size <= 1000

    def test_part_files_that_were_left_count_and_go_by_their_age(
        self, open_cache: Open, clock: Clock, tmp_path: Path
    ) -> None:
        def left(cache: FragmentCache, key: str, size: int) -> None:
            part = cache.create(size, key=key, note={"of": key})
            assert part is not None
            part.write(0, b"settled")
            part.settle(0, 7)
            part.keep()

        tail = 1 << 16
        cache, other = open_cache(max_size=4 * tail), open_cache(max_size=4 * tail)
        clock.now = time.time() - 100
        other.put("old", payload("old", tail))
        left(cache, "cut", 1000)
        assert cache.stats().disk_size == other.stats().disk_size == 2 * tail + 1000
        assert open_cache().stats().disk_size == 2 * tail + 1000  # who looks, sees it too
        clock.now += 200
        other.put("new", payload("new", 2 * tail))
        assert ("old" in cache, other.has_part("cut"), other.stats().disk_size) == (False, True, 3 * tail + 1000)
        other.put("newer", payload("newer", tail))
        assert not cache.has_part("cut")
        assert of("partial", tmp_path) == []
        assert cache.stats().disk_size == other.stats().disk_size == 3 * tail
        left(cache, "resumed", 1000)
        with other.resume("resumed")[0]:  # type: ignore[index]
            assert cache.stats().disk_size == tail  # room was made when it was begun, and another fills it now
            left(cache, "crashed", 1000)
        assert cache.prune(0) == 2 * tail + 1000
        for number in range(4):
            cache.put(f"{number}", payload(f"{number}", tail))
        left(cache, "late", 1000)
        assert cache.stats().disk_size == 3 * tail + 1000  # room was made when it was begun
        assert len(of("partial", tmp_path / "cache")) == 1
        assert len(of("blobs", tmp_path / "cache")) == 2

    def test_part_files_count_while_they_are_filled(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache(max_size=1000)
        for number in range(8):
            cache.put(f"{number}", payload(f"{number}", 100))
        with cache.create(500) as part:  # type: ignore[union-attr]
            assert len(of("blobs", tmp_path / "cache")) == 4  # what fits beside it, and a little less
            assert cache.stats().disk_size == 900
            cache.put("new", payload("new", 100))
            part.write(0, payload("part", 500))  # type: ignore[union-attr]
            assert cache.stats().disk_size == 1000
            assert cache.adopt("part", part, CacheEntry("part", 500)) == payload("part", 500)  # type: ignore[arg-type]
        assert len(of("blobs", tmp_path / "cache")) == 6
        assert cache.stats().disk_size == sum(path.stat().st_size for path in of("blobs", tmp_path / "cache"))

    def test_files_set_aside_count_and_go_first(self, open_cache: Open, tmp_path: Path) -> None:
        cache, other = open_cache(max_size=1000), open_cache(max_size=1000)
        for key in "abc":
            cache.put(key, payload(key, 300))
        [damaged] = [path for path in of("blobs", tmp_path / "cache") if path.read_bytes() == payload("b", 300)]
        damaged.write_bytes(bytes(300))
        assert other.stats().disk_size == 900
        assert cache.verify() == ["b"]
        assert [path.read_bytes() for path in of("quarantine", tmp_path / "cache")] == [bytes(300)]
        for each in (cache, other, open_cache()):
            assert each.stats().disk_size == 900
        other.put("d", payload("d", 300))
        assert of("quarantine", tmp_path / "cache") == []
        assert [key for key in "abcd" if key in other] == ["a", "c", "d"]
        assert cache.stats().disk_size == other.stats().disk_size == 900

    @pytest.mark.parametrize("stray", [".DS_Store", "x" * 64 + ".deadbeef", "notes.txt"])
    def test_stray_files_beside_those_set_aside_do_no_harm(self, open_cache: Open, tmp_path: Path, stray: str) -> None:
        aside = tmp_path / "cache" / "quarantine"
        aside.mkdir(parents=True)
        (aside / stray).write_bytes(bytes(1000))
        with open_cache(max_size=20_000, memory_size=0) as cache:
            for number in range(8):
                cache.put(f"k{number}", random.randbytes(4000))
            assert cache.stats().disk_size <= 20_000
            assert cache.stats().disk_size == sum(p.stat().st_size for p in (tmp_path / "cache/blobs").rglob("*/*"))
            cache.prune(0)
            cache.clear()
            assert cache.stats().disk_size == 0

    def test_clearing_takes_what_was_set_aside(self, open_cache: Open, tmp_path: Path) -> None:
        cache = open_cache()
        cache.put("a", bytes(300))
        of("blobs", tmp_path / "cache")[0].write_bytes(b"rot")
        assert cache.verify() == ["a"]
        cache.clear()
        assert cache.stats().disk_size == 0
        assert of("quarantine", tmp_path / "cache") == []

    def test_what_could_not_be_evicted_at_once_is_when_the_cache_is_tidied(self, open_cache: Open) -> None:
        cache = open_cache(max_size=1000)
        cache.put("old", payload("old", 900))
        with cache._disk._sweeping:  # type: ignore[union-attr]
            cache.put("new", payload("new", 900))
            assert cache.stats().disk_size == 1800
        cache.sync()
        assert cache.stats().disk_size == 900

    def test_nobody_waits_for_who_evicts(self, open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        evicting, done = threading.Event(), threading.Event()
        cache = open_cache(max_size=1000)
        for number in range(10):
            cache.put(f"{number}", payload(f"{number}", 90))
        remove = EntryFiles.remove

        def slowly(self: EntryFiles, name: str) -> bool:
            evicting.set()
            assert done.wait(30)
            return remove(self, name)

        monkeypatch.setattr(EntryFiles, "remove", slowly)
        first = threading.Thread(target=cache.put, args=("first", payload("first", 300)))
        first.start()
        try:
            assert evicting.wait(30)
            for key in ("second", "third"):
                cache.put(key, payload(key, 300))
                assert key in cache
        finally:
            done.set()
            first.join(30)
        assert not first.is_alive()
        assert cache.stats().disk_size <= 1000

    @pytest.mark.parametrize("is_part", [True, False])
    def test_some_of_the_disk_stays_free(
        self,
        open_cache: Open,
        clock: Clock,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        is_part: bool,
    ) -> None:
        root, others = tmp_path / "cache", 5000

        def usage(path: Path) -> SimpleNamespace:
            os.stat(path)  # raises what it should
            used = others + sum(file.stat().st_size for kind in ("blobs", "partial") for file in of(kind, root))
            return SimpleNamespace(total=100_000, free=10_000 - used)

        def keep(key: str, size: int) -> memoryview:
            data = payload(key, size)
            if not is_part:
                return cache.put(key, data)
            try:
                part = cache.create(size)
            except InsufficientDisk:
                return cache.put(key, data)
            assert part is not None
            part.write(0, data)
            return cache.adopt(key, part, CacheEntry(key, size))

        monkeypatch.setattr(shutil, "disk_usage", usage)
        cache = open_cache(free_space_reserve=2000)
        for number in range(5):
            clock.now += 1
            assert keep(f"{number}", 1000) == payload(f"{number}", 1000)
        assert [key for key in map(str, range(5)) if key in cache] == ["2", "3", "4"]
        assert caplog.records == []
        assert keep("large", 3001) == payload("large", 3001)  # nothing would make room for it: nothing has to go
        assert keep("large", 3002) == payload("large", 3002)
        assert "large" not in cache
        assert cache.stats().disk_size == 3000
        assert len(caplog.records) == 1
        assert "free_space_reserve" in caplog.text
        others = 9000
        assert keep("crowded", 1) == payload("crowded", 1)
        assert len(caplog.records) == 1
        cache = open_cache()  # a twentieth of the disk
        others = 4500
        assert keep("fits", 500) == payload("fits", 500)
        assert "fits" in cache
        assert keep("too much", 5001) == payload("too much", 5001)
        assert "too much" not in cache

    @pytest.mark.parametrize("way", ["missed", "torn"])
    def test_news_that_goes_astray_during_an_eviction_costs_no_more_than_a_look(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
    ) -> None:
        cache, other = open_cache(), open_cache()
        for number in range(40):
            cache.put(f"k{number}", payload(f"k{number}", 100))
        assert other.stats().disk_size == 4000
        remove, removed = EntryFiles.remove, []

        def stray(self: EntryFiles, name: str) -> bool:
            removed.append(name)
            if len(removed) == 5:  # others make room meanwhile, and that is not heard of
                assert other.prune(3000) > 0
                if way == "missed":
                    (tmp_path / "cache" / "news").unlink()
                else:
                    with (tmp_path / "cache" / "news").open("ab") as file:
                        file.write(b"half an item")
            return remove(self, name)

        monkeypatch.setattr(EntryFiles, "remove", stray)
        assert 1000 <= cache.prune(2000) <= 2000
        monkeypatch.undo()
        assert len(list(cache)) == len(of("blobs", tmp_path / "cache")) == 20
        assert cache.stats().disk_size == open_cache().stats().disk_size == 2000

    def test_eviction_that_misses_what_others_tell_at_every_step_comes_to_an_end(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        cache = open_cache()
        for number in range(40):
            cache.put(f"k{number}", payload(f"k{number}", 100))
        looks: list[Path] = []
        scan = BlobStore.digests
        monkeypatch.setattr(News, "since", lambda *_: None)
        monkeypatch.setattr(BlobStore, "digests", lambda self: looks.append(self.root) or scan(self))  # type: ignore[func-returns-value]
        assert cache.prune(2000) == 2000
        assert len(list(cache)) == len(of("blobs", tmp_path / "cache")) == 20
        assert len(looks) < 8

    def test_full_disk_is_not_swept_for_every_fragment(
        self, open_cache: Open, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def usage(_: Path) -> SimpleNamespace:
            used = sum(file.stat().st_size for file in of("blobs", tmp_path / "cache"))
            return SimpleNamespace(total=100_000, free=6400 - used)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        cache, sweeps = open_cache(free_space_reserve=0), 0
        shrink = DiskTier.shrink

        def counted(self: DiskTier, limit: int, **options: Any) -> int:
            nonlocal sweeps
            sweeps += 1
            return shrink(self, limit, **options)

        monkeypatch.setattr(DiskTier, "shrink", counted)
        for number in range(100):
            clock.now += 1
            cache.put(f"{number}", payload(f"{number}", 100))
            assert f"{number}" in cache
        assert 55 <= len(list(cache)) <= 64
        assert sweeps <= 15

    def test_what_goes_in_vain_goes_once(
        self, open_cache: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        free, now = 10_000, time.monotonic()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100_000, free=free))
        monkeypatch.setattr(disk, "time", SimpleNamespace(monotonic=lambda: now))
        cache = open_cache(free_space_reserve=2000)
        for number in range(64):
            cache.put(f"k{number}", payload(f"k{number}", 100))
        free = 1000  # and it stays at that, whatever is deleted
        for number in range(20):
            assert cache.put(f"new{number}", payload("new", 100)) == payload("new", 100)
        assert len(list(cache)) == 64 - 11 - 4  # what was lacking, and a sixteenth
        assert len(caplog.records) == 1
        free = 2100  # it shows at last
        cache.put("fits", payload("fits", 100))
        assert "fits" in cache
        free, now = 2000, now + 120
        cache.put("later", payload("later", 100))
        assert len(list(cache)) == 50 - 1 - 4

    def test_who_is_dropped_without_being_closed_leaves_nothing_open(self, open_cache: Open, tmp_path: Path) -> None:
        gc.collect()
        gc.disable()
        try:
            before = len(os.listdir("/dev/fd"))
            cache = open_cache(memory_size=1 << 20)
            cache.put("a", payload("a", 1000))
            assert cache.prune(0) == 1000
            part = cache.create(100, key="a", note={"of": "a"})
            assert part is not None
            part.discard()
            last = weakref.ref(cache)
            del cache, part
            assert last() is None
            assert len(os.listdir("/dev/fd")) == before
        finally:
            gc.enable()

    def test_fragment_being_adopted_is_not_collected(self, open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = open_cache()
        write = EntryFiles.write

        def prune_first(self: EntryFiles, name: str, entry: CacheEntry, **options: bool) -> None:
            assert cache.prune(0) == 0
            cache.clear()
            write(self, name, entry, **options)

        monkeypatch.setattr(EntryFiles, "write", prune_first)
        cache.put("a", b"abc")
        assert cache.get("a") == b"abc"
        monkeypatch.undo()
        assert cache.prune(0) == 3

    def test_threads_get_the_right_bytes_or_none_at_a_quarter_of_the_room(self, tmp_path: Path) -> None:
        sizes = {f"k{n}": 1000 + 97 * n for n in range(40)} | {"large": LARGE}
        quota = sum(sizes.values()) // 4 + LARGE
        cache = FragmentCache(CacheConfig(directory=tmp_path / "cache", max_size=quota, memory_size=quota // 8))
        wrong: list[str] = []

        def work(seed: int) -> None:
            choose = random.Random(seed)
            try:
                for _ in range(60):
                    key = choose.choice(list(sizes))
                    expected = payload(key, sizes[key])
                    view = cache.get(key)
                    if view is None:
                        view = cache.put(key, expected)
                    if view != expected:
                        wrong.append(key)
                    if choose.random() < 0.03:
                        cache.remove(key)
                    if choose.random() < 0.02:
                        cache.prune(quota // 2)
                        cache.sync()
                        if cache.stats().disk_size < 0:
                            wrong.append("size")
            except BaseException as error:
                wrong.append(repr(error))
                raise

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        cache.put("last", b"last")
        cache.sync()
        stats = cache.stats()
        assert stats.evictions > 0
        assert stats.hits > 0
        on_disk = sum(path.stat().st_size for path in of("blobs", tmp_path / "cache"))
        assert stats.disk_size == on_disk <= quota
        assert of("partial", tmp_path / "cache") == []
        assert of("quarantine", tmp_path / "cache") == []


class TestFailingDisk:
    def assert_serves_from_memory(self, cache: FragmentCache, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "holotensor_net.cache"):
            for number in range(5):
                assert cache.put(f"k{number}", payload(f"k{number}", 100)) == payload(f"k{number}", 100)
                assert cache.get(f"k{number}") == payload(f"k{number}", 100)
        assert len(caplog.records) == 1, caplog.text
        assert "does not take part" in caplog.text
        assert cache.stats().entries == 5
        assert cache.stats().hits == 5

    @pytest.mark.parametrize("place", ["", "partial", "blobs", "entries"])
    def test_file_in_a_folders_place(
        self, open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
    ) -> None:
        blocked = tmp_path / "cache" / place
        blocked.parent.mkdir(exist_ok=True)
        blocked.write_bytes(b"")
        cache = open_cache(memory_size=10_000)
        self.assert_serves_from_memory(cache, caplog)
        assert of("", tmp_path) == [blocked]
        cache.close()
        assert len(caplog.records) == 1
        if place in ("", "partial"):
            with pytest.raises(CacheError, match="make sure that it is a folder"):
                cache.create(10)

    @pytest.mark.parametrize("is_told", [True, False])
    def test_full_disk(
        self,
        open_cache: Open,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        is_told: bool,
    ) -> None:
        def refuse(_: Path) -> None:
            raise PermissionError(errno.EACCES, "how full the disk is, is a secret")

        if not is_told:
            monkeypatch.setattr(shutil, "disk_usage", refuse)
        with tiny_disk(tmp_path / "disk", 1 << 18) as disk:
            cache = open_cache(directory=disk / "cache", memory_size=1 << 20)
            cache.put("before", payload("before", 1000))
            before = files(disk)
            with pytest.raises(InsufficientDisk):
                cache.create(1 << 20)
            with caplog.at_level(logging.WARNING, "holotensor_net.cache"):
                for key in ("a", "b"):
                    assert cache.put(key, payload(key, 1 << 18)) == payload(key, 1 << 18)
                    assert cache.get(key) == payload(key, 1 << 18)
            assert len(caplog.records) == 1
            assert files(disk) == before
            assert open_cache(directory=disk / "cache").get("before") == payload("before", 1000)
            del cache

    def test_read_only_folder_serves(
        self, open_cache: Open, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        with tiny_disk(tmp_path / "disk", 1 << 20) as disk:
            with open_cache(directory=disk / "cache") as cache:
                cache.put("a", payload("a", LARGE), CacheEntry("a", LARGE, '"e"', headers=FRESH))
                cache.put("rotted", b"abc")
            digest = blake3(b"abc").hexdigest()
            (disk / "cache" / "blobs" / digest[:2] / digest).write_bytes(b"abd")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            cache = open_cache(directory=disk / "cache", memory_size=1000)
            assert cache.get("a") == payload("a", LARGE)
            assert cache.get("rotted") is None
            assert not cache.needs_revalidation("a")
            assert caplog.records == []
            assert cache.revalidated("a", FRESH)
            assert cache.put("b", b"b") == b"b"
            assert cache.get("b") == b"b"
            cache.remove("a")
            cache.clear()
            assert cache.prune(0) == 0
            cache.close()
            assert len(caplog.records) == 1
            del cache

    @pytest.fixture
    def forbid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
        """Let a file be another user's: it cannot be opened any more, be it found by this name or another."""
        theirs, opened = set(), os.open

        def forbidden(path: Path) -> None:
            os.link(path, tmp_path / "theirs")  # its number is given to no other file
            theirs.add(path.stat().st_ino)

        def refuse(path: Any, *arguments: Any, **options: Any) -> int:
            if os.path.lexists(path) and os.lstat(path).st_ino in theirs:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        return forbidden

    @pytest.mark.parametrize("size", [100, LARGE])
    @pytest.mark.parametrize("kind", ["entries", "blobs"])
    @pytest.mark.parametrize("way", ["put", "part"])
    def test_what_cannot_be_read_is_replaced(
        self, open_cache: Open, tmp_path: Path, forbid: Callable[[Path], None], size: int, kind: str, way: str
    ) -> None:
        cache, data = open_cache(), payload("a", size)
        cache.put("a", data)
        (theirs,) = of(kind, tmp_path / "cache")
        forbid(theirs)
        assert cache.get("a") is None
        if way == "put":
            cache.put("a", data)
        else:
            part = cache.create(size)
            assert part is not None
            part.write(0, data)
            cache.adopt("a", part, CacheEntry("a", size))
        assert cache.get("a") == data

    @pytest.mark.parametrize("kind", ["entries", "blobs"])
    def test_what_cannot_be_read_makes_way(
        self, open_cache: Open, tmp_path: Path, clock: Clock, forbid: Callable[[Path], None], kind: str
    ) -> None:
        cache = open_cache(max_size=1000, free_space_reserve=0)
        for number in range(5):
            cache.put(f"old {number}", payload(f"old {number}", 100))
        forbid(of(kind, tmp_path / "cache")[0])
        cache = open_cache(max_size=1000, free_space_reserve=0)
        for number in range(20):
            clock.now += 10
            cache.put(f"new {number}", payload(f"new {number}", 100))
        assert cache.get("new 19") == payload("new 19", 100)
        blobs = of("blobs", tmp_path / "cache")
        assert cache.stats().disk_size == sum(path.stat().st_size for path in blobs) <= 1000

    @pytest.mark.parametrize("kind", ["entries", "blobs"])
    def test_what_cannot_be_read_is_found_by_verification(
        self, open_cache: Open, tmp_path: Path, forbid: Callable[[Path], None], kind: str
    ) -> None:
        cache = open_cache()
        for key in "abc":
            cache.put(key, payload(key, 100))
        forbid(of(kind, tmp_path / "cache")[0])
        assert len(cache.verify()) == 1
        assert cache.verify() == []
        assert len([*cache]) == 2

    def test_what_there_was_no_room_for_is_not_counted(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(_: object) -> None:
            raise CacheError("no")

        cache, other = (open_cache(max_size=1000, free_space_reserve=0) for _ in range(2))
        cache.put("a", payload("a", 900))
        assert other.stats().disk_size == 900
        with monkeypatch.context() as broken:
            broken.setattr(EntryFiles, "times", fail)
            cache.put("b", payload("b", 900))
        assert len(caplog.records) == 1
        assert [each.stats().disk_size for each in (cache, other)] == [900, 900]

    def test_too_many_open_files(self, open_cache: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = open_cache(memory_size=10_000)
        cache.put("a", b"abc")
        cache.clear()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = os.open(os.devnull, os.O_RDONLY)
        os.close(taken)
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        try:
            self.assert_serves_from_memory(cache, caplog)
            for use in (lambda: cache.prune(0), cache.clear, cache.verify):
                with pytest.raises(CacheError, match="ulimit"):
                    use()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert files(tmp_path) == []

    @pytest.mark.parametrize("call", ["replace", "write", "utime"])
    def test_disk_that_gives_errors(
        self,
        open_cache: Open,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        call: str,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, call, fail)
        self.assert_serves_from_memory(open_cache(memory_size=10_000), caplog)
        assert files(tmp_path) == []

    def test_entry_that_cannot_be_written_takes_its_blob_along_unless_shared(
        self, open_cache: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = open_cache()
        cache.put("a", b"shared")
        before = files(tmp_path)

        def fail(*_: object, **__: object) -> None:
            raise CacheError("no")

        monkeypatch.setattr(EntryFiles, "write", fail)
        assert cache.put("b", b"shared") == b"shared"
        assert cache.put("c", b"own") == b"own"
        assert files(tmp_path) == before
        assert cache.get("a") == b"shared"

    def test_each_cause_is_told_once(
        self, open_cache: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = open_cache(memory_size=1000)
        for number in (errno.EIO, errno.ENOSPC, errno.EIO, errno.ENOSPC):

            def fail(*_: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, "replace", fail)
            cache.put("a", b"abc")
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert "free some space" in caplog.records[1].getMessage()


class TestKill:
    def test_killed_at_any_step_leaves_old_new_or_nothing(self, tmp_path: Path) -> None:
        """A driver forks writers that kill themselves at their n-th system call, or are killed at any moment."""
        script = """
            import hashlib, os, random, signal, sys, time
            from pathlib import Path
            from holotensor_net.config import CacheConfig
            from holotensor_net.storage.cache import CacheEntry, FragmentCache

            def payload(key, version):
                return hashlib.shake_128(f"{key} {version}".encode()).digest(3000)

            def cache():
                return FragmentCache(CacheConfig(directory=sys.argv[1], memory_size=0, max_size=20_000))

            def doomed(step):
                calls = 0
                def wrap(name):
                    call = getattr(os, name)
                    def counted(*args, **options):
                        nonlocal calls
                        calls += 1
                        if calls == step:
                            if name in ("write", "pwrite"):
                                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                            os.kill(os.getpid(), signal.SIGKILL)
                        return call(*args, **options)
                    setattr(os, name, counted)
                for name in "open write pwrite fsync replace utime mkdir unlink close".split():
                    wrap(name)

            def write(version):
                writer = cache()
                for key in "abcdefgh":
                    writer.put(key, payload(key, version), CacheEntry(key, 3000, f'"{version}"'))
                    writer.get("a")
                writer.sync()

            def check():
                reader, right, seen = cache(), 0, 0
                for key in "abcdefgh":
                    entry, view = reader.get_entry(key), reader.get(key)
                    if view is not None:
                        seen += 1
                        right += entry is not None and view == payload(key, int(entry.etag.strip('"')))
                    elif entry is not None:
                        print("entry without bytes", key)
                orphans = list((Path(sys.argv[1]) / "partial").glob("*"))
                if orphans:
                    print("orphans", orphans)
                if seen != right or reader.verify():
                    print("wrong bytes", seen, right)
                return seen

            killed, seen, choose = 0, 0, random.Random(1)
            for version in range(100):
                child = os.fork()
                if not child:
                    if version < 70:
                        doomed(1 + version * 2)
                        write(version)
                        os._exit(0)
                    while True:
                        write(version)
                if version >= 70:
                    time.sleep(choose.random() * 0.02)
                    os.kill(child, signal.SIGKILL)
                killed += os.waitpid(child, 0)[1] == signal.SIGKILL
                seen += check()
            write(1000)
            print("killed", killed, "seen", seen > 100, "at last", check() >= 5)
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.stdout == "killed 100 seen True at last True\n", done
        assert done.stderr == ""


def test_fragments_without_bytes_are_counted_like_others() -> None:
    """They are copied out of buffers that are too large to be kept for them."""
    with FragmentCache(CacheConfig(directory=False, memory_size=1000)) as cache:
        for number in range(3000):
            name = f"k{number}"
            cache.take(name, memoryview(bytes(300))[:0], CacheEntry(name, 0))
        kept = [entry.fragment_id for entry in cache]
        for name in kept:
            assert bytes(cache.take(name, memoryview(b"xyz"), CacheEntry(name, 3))) == b"xyz"
            assert cache.remove(name)
        assert (cache.stats().entries, cache.stats().memory_size) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no children here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("has_disk", [True, False])
def test_child_of_a_fork_goes_on_whatever_its_parent_was_at(open_cache: Open, tmp_path: Path, has_disk: bool) -> None:
    cache = open_cache(directory=tmp_path if has_disk else False, memory_size=1000)
    cache.put("a", b"abc")
    locks = [cache._memory._lock, cache._usage._lock]
    if has_disk:
        assert cache._disk is not None
        assert cache.claims is not None
        locks += [cache._disk._sweeping, cache._disk._ledger._lock, cache._disk._news._lock, cache.claims._lock]
    with contextlib.ExitStack() as held:  # as by other threads
        for lock in locks:
            held.enter_context(lock)
        child = os.fork()
        if not child:
            status = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                assert cache.get("a") == (b"abc" if has_disk else None)
                cache.put("b", b"b")
                assert cache.get("b") == b"b"
                cache.prune(0)
                cache.close()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
    assert status == 0
    assert cache.get("a") == b"abc"
