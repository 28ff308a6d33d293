"""Results on the disk: whole or not there, the least used go first, and no process disturbs another."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from holotensor_net.errors import CacheError, InsufficientDisk
from holotensor_net.storage.files import digest_of
from holotensor_net.storage.results import ResultStore

KEYS = [f"{number:064x}" for number in range(0, 1000, 7)]
KEY, OTHER, THIRD = KEYS[1:4]
LARGE = 1 << 30


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> ResultStore:
    return ResultStore(tmp_path / "store", LARGE, clock=clock)


def files(store: ResultStore, folder: str = ".") -> list[Path]:
    return sorted(path for path in (store.root / folder).rglob("*") if not path.is_dir())


def contents(store: ResultStore, key: str) -> tuple[Any, list[bytes]] | None:
    stored = store.get(key)
    return None if stored is None else (stored.document, [bytes(file) for file in stored.files])


def test_what_was_put_is_there(store: ResultStore) -> None:
    document = {"a": [1, 2.5, None, "ä\ud800"], "b": {}}
    store.put(KEY, document, [[b"ab", b"", memoryview(b"cd")], [b""], [b"x" * 100_000]])
    assert contents(store, KEY) == (document, [b"abcd", b"", b"x" * 100_000])
    assert contents(store, OTHER) is None


def test_nothing_is_touched_before_something_is_put(store: ResultStore) -> None:
    assert store.get(KEY) is None
    assert store.size() == 0
    store.prune(0)
    assert not store.root.exists()


def test_another_store_in_the_same_folder_sees_it(store: ResultStore) -> None:
    other = ResultStore(store.root, LARGE)
    assert other.get(KEY) is None
    store.put(KEY, 1, [[b"a"]])
    assert contents(other, KEY) == (1, [b"a"])
    other.put(KEY, 2, [[b"b"]])
    assert contents(store, KEY) == (2, [b"b"])


def test_the_latest_counts(store: ResultStore) -> None:
    for number in range(3):
        store.put(KEY, number, [[b"%d" % number]])
        assert contents(store, KEY) == (number, [b"%d" % number])


def test_equal_files_are_stored_once(store: ResultStore) -> None:
    for key in (KEY, OTHER):
        store.put(key, key, [[b"x" * 1000], [b"x" * 500, b"x" * 500]])
    assert len(files(store, "blobs")) == 1
    assert contents(store, KEY) == (KEY, [b"x" * 1000] * 2)


def test_views_outlive_what_they_are_of(store: ResultStore) -> None:
    store.put(KEY, 1, [[b"x" * 100_000]])
    stored = store.get(KEY)
    assert stored is not None
    store.clear()
    assert bytes(stored.files[0]) == b"x" * 100_000
    assert stored.files[0].readonly


def test_what_is_removed_is_gone(store: ResultStore) -> None:
    store.put(KEY, 1)
    store.put(OTHER, 2)
    store.remove(KEY)
    store.remove(THIRD)
    assert contents(store, KEY) is None
    assert contents(store, OTHER) == (2, [])


def test_clear_leaves_nothing(store: ResultStore) -> None:
    for key in KEYS[:5]:
        store.put(key, key, [[key.encode()]])
    store.clear()
    assert files(store) == []
    assert store.size() == 0
    store.put(KEY, 1)
    assert contents(store, KEY) == (1, [])


@pytest.mark.parametrize("key", ["", "a", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_what_is_no_key_is_refused(store: ResultStore, key: str) -> None:
    for use in (store.get, store.remove, lambda key: store.put(key, 1)):
        with pytest.raises(CacheError, match="64"):
            use(key)
    assert not store.root.exists()


def rewritten(body: bytes) -> bytes:
    return digest_of(body).encode() + b"\n" + body


DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "one line": b"a" * 64,
    "no JSON": rewritten(b"{"),
    "no object": rewritten(b"[]"),
    "newer": rewritten(json.dumps({"schema": 2, "document": 1, "blobs": []}).encode()),
    "no blobs": rewritten(json.dumps({"schema": 1, "document": 1}).encode()),
    "garbled blobs": rewritten(json.dumps({"schema": 1, "document": 1, "blobs": [[1, 2, 3]]}).encode()),
    **{
        f"blob {blob}": rewritten(json.dumps({"schema": 1, "document": 1, "blobs": [blob]}).encode())
        for blob in (["a" * 64, float("inf")], ["a" * 64, -1], ["a" * 64, 1.0], ["a" * 64, True], ["../a", 1], [1, 1])
    },
    "bottomless": rewritten(b"[" * 100_000),
    "not UTF-8": b"\xff" * 64 + b"\n{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_document_that_cannot_be_understood_is_set_aside(store: ResultStore, damage: str) -> None:
    store.put(KEY, 1)
    (path,) = files(store, "results")
    path.write_bytes(DAMAGES[damage])
    assert store.get(KEY) is None
    assert not path.exists()
    assert len(files(store, "quarantine")) == 1
    store.put(KEY, 2)
    assert contents(store, KEY) == (2, [])


def test_every_bit_of_a_document_counts(store: ResultStore) -> None:
    store.put(KEY, {"value": [1.5, "x"]}, [[b"ab"]])
    (path,) = files(store, "results")
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert store.get(KEY) is None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert store.get(KEY) is None
    path.write_bytes(whole)
    assert contents(store, KEY) == ({"value": [1.5, "x"]}, [b"ab"])


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("damage", ["changed", "cut", "grown", "gone"])
def test_damaged_file_is_a_miss(store: ResultStore, size: int, damage: str) -> None:
    store.put(KEY, 1, [[b"x" * size], [b"y"]])
    path = max(files(store, "blobs"), key=lambda path: path.stat().st_size)
    match damage:
        case "changed":
            path.write_bytes(b"x" * (size - 1) + b"z")
        case "cut":
            os.truncate(path, size - 1)
        case "grown":
            path.write_bytes(b"x" * (size + 1))
        case "gone":
            path.unlink()
    other = ResultStore(store.root, LARGE)
    assert other.get(KEY) is None
    assert files(store, "results") == []
    other.put(KEY, 1, [[b"x" * size], [b"y"]])
    assert contents(store, KEY) == (1, [b"x" * size, b"y"])


@pytest.mark.parametrize("size", [100, 100_000, 1 << 18, 1 << 20])
@pytest.mark.parametrize("is_new", [True, False])
def test_bytes_that_the_disk_has_lost_are_never_given(store: ResultStore, size: int, is_new: bool) -> None:
    """Nothing is flushed: where the system fails to write a file, its bytes change some time, and not its time."""
    store.put(KEY, 1, [[b"x" * size]])
    reader = ResultStore(store.root, LARGE) if is_new else store
    before = reader.get(KEY)
    assert before is not None
    (path,) = files(store, "blobs")
    written = path.stat()
    with path.open("r+b") as file:
        file.write(b"\0" * size)
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert before.files[0] == b"x" * size
    assert reader.get(KEY) is None
    assert files(store, "results") == []


def test_result_that_meets_a_damaged_file_is_missed_once(store: ResultStore) -> None:
    store.put(KEY, 1, [[b"x" * 5000]])
    (path,) = files(store, "blobs")
    path.write_bytes(b"y" * 5000)
    other = ResultStore(store.root, LARGE)
    other.put(OTHER, 2, [[b"x" * 5000]])
    assert other.get(OTHER) is None
    other.put(OTHER, 2, [[b"x" * 5000]])
    assert contents(other, OTHER) == (2, [b"x" * 5000])


def test_link_in_place_of_a_document_is_not_followed(store: ResultStore, tmp_path: Path) -> None:
    store.put(KEY, 1)
    (path,) = files(store, "results")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert store.get(KEY) is None
    assert (tmp_path / "elsewhere").exists()


def test_folders_are_for_their_owner_alone(store: ResultStore) -> None:
    store.put(KEY, 1, [[b"a"]])
    assert {path.stat().st_mode & 0o777 for path in store.root.rglob("*") if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in files(store)} == {0o600}


# --- room


def test_the_least_used_make_room(store: ResultStore, clock: Clock) -> None:
    for key in KEYS[:8]:
        clock.ahead += 10
        store.put(key, None, [[key.encode() * 100]])
    clock.ahead += 10
    assert store.get(KEYS[0]) is not None
    store.prune(4 * 7000)
    left = [key for key in KEYS[:8] if store.get(key) is not None]
    assert left == [KEYS[0], *KEYS[5:8]]
    assert len(files(store, "blobs")) == len(left)
    assert store.size() == sum(path.stat().st_size for path in files(store)) <= 4 * 7000


def test_size_stays_below_the_limit(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, 100_000)
    for key in KEYS[:60]:
        store.put(key, None, [[key.encode() * 100]])
        assert store.size() <= 100_000
    assert store.get(KEYS[59]) is not None
    assert store.size() > 70_000


def test_what_others_write_meanwhile_counts_too(tmp_path: Path) -> None:
    stores = [ResultStore(tmp_path, 100_000) for _ in range(4)]
    for number, key in enumerate(KEYS[:80]):
        stores[number % 4].put(key, None, [[key.encode() * 50]])
        assert stores[0].size() <= 100_000 + 4 * (100_000 // 16 + 3500)
    assert all(store.get(KEYS[79]) is not None for store in stores)


def test_what_others_left_counts_too(tmp_path: Path) -> None:
    for key in KEYS[:10]:
        ResultStore(tmp_path, LARGE).put(key, None, [[key.encode() * 100]])
    ResultStore(tmp_path, 30_000).put(KEYS[10], None, [[KEYS[10].encode() * 100]])
    assert ResultStore(tmp_path, LARGE).size() <= 30_000


def test_file_stays_while_one_document_names_it(store: ResultStore, clock: Clock) -> None:
    for key in (KEY, OTHER):
        clock.ahead += 10
        store.put(key, key, [[b"x" * 10_000], [key.encode()]])
    store.prune(store.size() - 1)
    assert contents(store, KEY) is None
    assert contents(store, OTHER) == (OTHER, [b"x" * 10_000, OTHER.encode()])
    assert len(files(store, "blobs")) == 2


def test_file_that_may_yet_get_its_document_stays_a_while(store: ResultStore, clock: Clock) -> None:
    store.put(KEY, 1, [[b"a" * 10_000]])
    store.put(KEY, 2, [[b"b" * 10_000]])  # leaves the first file without a document, as one just written is
    store.prune(LARGE)
    assert len(files(store, "blobs")) == 2
    clock.ahead += 61
    store.prune(LARGE)
    assert len(files(store, "blobs")) == 1
    assert contents(store, KEY) == (2, [b"b" * 10_000])


def test_file_without_a_document_goes_before_any_result(store: ResultStore) -> None:
    store.put(KEY, 1, [[b"a" * 10_000]])
    store.put(KEY, 2, [[b"b" * 10_000]])
    store.prune(15_000)
    assert len(files(store, "blobs")) == 1
    assert contents(store, KEY) == (2, [b"b" * 10_000])


def test_remains_of_processes_that_died_are_swept(store: ResultStore, clock: Clock) -> None:
    store.put(KEY, 1)
    litter = store.root / "partial" / f".0123456789ab-1.{'0' * 32}"
    litter.write_bytes(b"x")
    clock.ahead += 3601
    ResultStore(store.root, LARGE, clock=clock).put(KEY, 2)
    assert not litter.exists()


def test_what_vanishes_while_it_is_counted_is_not_counted(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (KEY, OTHER):
        store.put(key, 1)
    items = list(store._items())
    monkeypatch.setattr(store, "_items", lambda: iter(items))
    store.remove(KEY)
    assert store.size() == sum(path.stat().st_size for path in files(store, "results"))
    store.prune(LARGE)
    assert store.get(OTHER) is not None


# --- a disk that fails


def test_full_disk_is_an_error_and_leaves_nothing(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, 1)
    before = files(store)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(InsufficientDisk, match="free some space"):
            store.put(OTHER, 1, [[b"a"]])
    assert files(store) == before


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ResultStore(tmp_path / "file" / "store", LARGE)
    assert store.get(KEY) is None
    with pytest.raises(CacheError, match="HOLOTENSOR_CACHE"):
        store.put(KEY, 1)


def test_error_of_the_disk_while_reading_is_an_error(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, 1)

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        with pytest.raises(CacheError, match="read a result"):
            store.get(KEY)
    assert contents(store, KEY) == (1, [])


def test_result_is_given_though_its_use_cannot_be_noted(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(KEY, 1)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", read_only)
    assert contents(store, KEY) == (1, [])


def test_threads_never_see_a_mixture(tmp_path: Path) -> None:
    stores = [ResultStore(tmp_path, 60_000) for _ in range(2)]
    wrong: list[object] = []

    def work(number: int) -> None:
        store = stores[number % 2]
        for step in range(60):
            key = KEYS[(number * 31 + step * 17) % 5]
            if step % 3 == number % 3:
                mark = f"{number}/{step}".encode()
                store.put(key, mark.decode(), [[mark * 900], [mark]])
            elif (found := contents(store, key)) is not None:
                mark = found[0].encode()
                if found[1] != [mark * 900, mark]:
                    wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert stores[0].size() < 200_000
