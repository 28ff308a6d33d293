"""A transfer that was cut off goes on where it was, if what it brought is still good; and never on other bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from servers import Nginx

from holotensor_net.config import CdnEndpoint, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.storage.claims import Claims
from holotensor_net.storage.files import subject_of
from holotensor_net.storage.journal import TAIL
from holotensor_net.values import LoadRequest, RangeRequest

MIB = 1 << 20
WORKERS = 4
PIECE = MIB // 2
SIZE = 12 * MIB

LOAD = """
    import json, os, signal, sys, threading, time
    from hashlib import sha256
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.values import LoadRequest, RangeRequest

    url, cache, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    piece, workers, doom = map(int, sys.argv[4:])
    config = NetworkConfig(
        endpoints=(CdnEndpoint(url),),
        cache_dir=cache,
        chunk_size=piece,
        max_concurrent=workers,
        monitor_bandwidth=False,
    )

    def end_at(limit):
        while loader.stats().bytes_fetched < limit:
            time.sleep(0.0005)
        print(loader.stats().bytes_fetched, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    with NetworkLoader(config) as loader:
        if doom:
            threading.Thread(target=end_at, args=(doom,), daemon=True).start()
        span = fields.pop("span", None)
        data = loader.load(LoadRequest("big", "big", byte_range=span and RangeRequest(*span), **fields)).data
        print(sha256(data).hexdigest())
"""


def start(
    server: Nginx, cache: Path, *, doom: int = 0, piece: int = PIECE, workers: int = WORKERS, **fields: Any
) -> subprocess.Popen[str]:
    """A process that loads the object and tells its SHA-256; or kills itself once ``doom`` bytes have come."""
    command = [sys.executable, "-c", textwrap.dedent(LOAD), server.url, str(cache), json.dumps(fields)]
    return subprocess.Popen([*command, *map(str, (piece, workers, doom))], stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str], status: int = 0) -> str:
    said, _ = process.communicate(timeout=100)
    assert process.returncode == status
    return said.strip()


def killed(server: Nginx, cache: Path, doom: int, **options: Any) -> int:
    """The bytes that had come when it was killed."""
    return int(told(start(server, cache, doom=doom, **options), -signal.SIGKILL))


def config_of(server: Nginx, cache: Path, *, piece: int = PIECE, workers: int = WORKERS) -> NetworkConfig:
    return NetworkConfig(
        endpoints=(CdnEndpoint(server.url),),
        cache_dir=cache,
        chunk_size=piece,
        max_concurrent=workers,
        monitor_bandwidth=False,
    )


def loaded(server: Nginx, cache: Path, *, span: tuple[int, int] | None = None, **options: Any) -> tuple[int, str]:
    """Bytes that another loader, which knows nothing of the first, has to fetch for the object; and their SHA-256."""
    settings = {name: options.pop(name) for name in ("piece", "workers") if name in options}
    with NetworkLoader(config_of(server, cache, **settings)) as loader:
        data = loader.load(LoadRequest("big", "big", byte_range=span and RangeRequest(*span), **options)).data
        return loader.stats().bytes_fetched, sha256(data).hexdigest()


def part_files(cache: Path) -> list[Path]:
    return list((cache / "partial").glob("*"))


@pytest.fixture
def data() -> bytes:
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def server(nginx: Callable[..., Nginx], tmp_path: Path, data: bytes) -> Nginx:
    """Slow enough that a process is killed where it means to be."""
    root = tmp_path / "www"
    root.mkdir()
    (root / "big").write_bytes(data)
    return nginx(root, limit_rate=12 * MIB)


def checksum(data: bytes, algorithm: str) -> str:
    digest = blake3(data).hexdigest() if algorithm == "blake3" else sha256(data).hexdigest()
    return f"{algorithm}:{digest}"


@pytest.mark.parametrize("kind", ["whole", "range", "blake3"])
def test_killed_at_half_it_fetches_the_other_half(server: Nginx, tmp_path: Path, data: bytes, kind: str) -> None:
    fields: dict[str, Any] = {}
    wanted = data
    if kind == "range":
        fields["span"], wanted = (MIB // 2, SIZE - 3), data[MIB // 2 : SIZE - 3]
    elif kind != "whole":
        fields["checksum"] = checksum(data, kind)
    came = killed(server, tmp_path / "cache", SIZE // 2, **fields)
    (part,) = part_files(tmp_path / "cache")
    assert part.stat().st_size == len(wanted) + TAIL
    fetched, digest = loaded(server, tmp_path / "cache", **fields)
    assert digest == sha256(wanted).hexdigest()
    assert fetched <= len(wanted) - came + (WORKERS + 1) * PIECE
    assert part_files(tmp_path / "cache") == []
    assert loaded(server, tmp_path / "cache", **fields) == (0, digest)


def test_killed_again_and_again_it_comes_to_an_end(server: Nginx, tmp_path: Path, data: bytes) -> None:
    total = sum(killed(server, tmp_path / "cache", SIZE // 4) for _ in range(3))
    fetched, digest = loaded(server, tmp_path / "cache")
    assert digest == sha256(data).hexdigest()
    assert total + fetched <= SIZE + 3 * (WORKERS + 1) * PIECE


@pytest.mark.parametrize("kind", ["whole", "blake3"])
def test_object_that_changed_meanwhile_is_fetched_from_the_start(
    server: Nginx, tmp_path: Path, data: bytes, kind: str
) -> None:
    killed(server, tmp_path / "cache", SIZE // 2, **({} if kind == "whole" else {"checksum": checksum(data, kind)}))
    changed = data[:100] + bytes(MIB) + data[100 + MIB :]
    (server.root / "big").write_bytes(changed)
    os.utime(server.root / "big", (1, 1))  # another entity tag, though no second has passed
    fields = {} if kind == "whole" else {"checksum": checksum(changed, kind)}
    fetched, digest = loaded(server, tmp_path / "cache", **fields)
    assert digest == sha256(changed).hexdigest()
    assert fetched >= SIZE


def test_with_a_digest_another_entity_tag_costs_the_bytes_and_no_error(
    server: Nginx, tmp_path: Path, data: bytes
) -> None:
    fields = {"checksum": checksum(data, "blake3")}
    killed(server, tmp_path / "cache", SIZE // 2, **fields)
    os.utime(server.root / "big", (1, 1))
    assert loaded(server, tmp_path / "cache", **fields)[1] == sha256(data).hexdigest()
    assert part_files(tmp_path / "cache") == []


@pytest.mark.parametrize("where", ["data", "journal", "end"])
def test_part_file_that_has_rotted_is_not_believed(server: Nginx, tmp_path: Path, data: bytes, where: str) -> None:
    killed(server, tmp_path / "cache", SIZE // 2)
    (part,) = part_files(tmp_path / "cache")
    place = {"data": 1000, "journal": SIZE, "end": SIZE // 2}[where]
    with part.open("r+b") as file:
        if where == "end":
            file.truncate(place)
        else:
            file.seek(place)
            file.write(bytes([data[place] ^ 1]) if where == "data" else b"\xff" * TAIL)
    fetched, digest = loaded(server, tmp_path / "cache")
    assert digest == sha256(data).hexdigest()
    assert fetched >= SIZE // 2
    assert part_files(tmp_path / "cache") == []


def test_of_two_that_go_on_at_once_both_are_right(server: Nginx, tmp_path: Path, data: bytes) -> None:
    killed(server, tmp_path / "cache", SIZE // 2)
    both = {told(process) for process in [start(server, tmp_path / "cache") for _ in range(2)]}
    assert both == {sha256(data).hexdigest()}
    assert part_files(tmp_path / "cache") == []


def test_a_loader_that_is_closed_leaves_what_the_next_goes_on_with(server: Nginx, tmp_path: Path, data: bytes) -> None:
    config = config_of(server, tmp_path / "cache")
    with NetworkLoader(config) as loader:
        future = loader.enqueue(LoadRequest("big", "big"))
        while loader.stats().bytes_fetched < SIZE // 2:
            assert not future.done()
    came = loader.stats().bytes_fetched
    (part,) = part_files(tmp_path / "cache")
    assert subject_of(part.name)
    with NetworkLoader(config) as loader:
        assert loader.load(LoadRequest("other", "big", byte_range=RangeRequest(0, 5 * MIB))).data == data[: 5 * MIB]
        before = loader.stats().bytes_fetched
        assert before == 5 * MIB  # another range is another fragment
        assert loader.load(LoadRequest("big", "big")).data == data
        stats = loader.stats()
        assert stats.bytes_fetched - before <= SIZE - came + (WORKERS + 1) * PIECE
        assert (
            stats.bytes_fetched - before + stats.bytes_cached == SIZE
        )  # what had come before counts, or a bar would end early
    assert part_files(tmp_path / "cache") == []


def test_nothing_is_left_of_what_a_server_forbids_to_store_meanwhile(
    server: Nginx, nginx: Callable[..., Nginx], tmp_path: Path, data: bytes
) -> None:
    proved = checksum(data, "blake3")
    killed(server, tmp_path / "cache", SIZE // 2, checksum=proved)
    assert len(part_files(tmp_path / "cache")) == 1
    other = nginx(tmp_path / "www", limit_rate=MIB, conf="add_header Cache-Control no-store;")
    with NetworkLoader(config_of(other, tmp_path / "cache")) as loader:
        future = loader.enqueue(LoadRequest("big", "big", checksum=proved))
        while loader.stats().bytes_fetched < PIECE:
            assert not future.done()
    assert part_files(tmp_path / "cache") == []


SMALL = 3000
GARBLED: list[Any] = [
    *(None, True, False, -1, 0, SMALL, SMALL - 1, SMALL + 1, 1 << 70, float(SMALL), 1e300, float("inf"), float("nan")),
    *("", "x", '"x"', 'W/"x"', '"x', '"\r\nX-Evil: 1"', '"\ud800"', "Tue, 15 Nov 1994 12:45:26 GMT", str(SMALL)),
    *([], {}, [[]], [0, SMALL], [0, SMALL + 1], [-1, 5], [5, -1], [0.0, float(SMALL)], ["0", "1"], ["\n"], {"a": 1}),
]


def leave(cache: Path, server: Nginx, data: bytes, note: dict[str, Any]) -> None:
    """Half of an object in a part file, with a note that may be anything."""
    with NetworkLoader(config_of(server, cache)) as loader:
        part = loader.cache.create(len(data), key=loader._requests.key(LoadRequest("small", "small"), 0), note=note)
        assert part is not None
        part.write(0, data[: len(data) // 2])
        part.settle(0, len(data) // 2)
        part.keep()


@pytest.mark.parametrize("name", ["etag", "last_modified", "is_strong", "object_size", "byte_range"])
def test_garbled_note_costs_the_bytes_and_no_error(
    nginx: Callable[..., Nginx], tmp_path: Path, data: bytes, name: str
) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "small").write_bytes(data[:SMALL])
    os.utime(tmp_path / "www" / "small", (1, 1))
    server = nginx(tmp_path / "www")
    said = {"etag": f'"1-{SMALL:x}"', "last_modified": "Thu, 01 Jan 1970 00:00:01 GMT", "is_strong": True}
    sound = [{**said, "object_size": SMALL, "byte_range": None, **kind} for kind in ({}, {"etag": None})]
    fetched = []
    for number, note in enumerate([*sound, *({**note, name: value} for note in sound for value in GARBLED)]):
        cache = tmp_path / str(number)
        leave(cache, server, data[:SMALL], note)
        with NetworkLoader(config_of(server, cache)) as loader:
            assert loader.load(LoadRequest("small", "small")).data == data[:SMALL], note
            fetched.append(loader.stats().bytes_fetched)
        assert part_files(cache) == []
    assert fetched[:2] == [SMALL // 2] * 2


@dataclass
class Replaced:
    """An object of which a cache holds an old version, and a part of the one that has taken its place: the transfer of
    that was killed when ``came`` bytes of it were there."""

    server: Nginx
    cache: Path
    old: bytes
    new: bytes
    came: int = 0

    def serve(self, data: bytes, when: int) -> None:
        (self.server.root / "big").write_bytes(data)
        os.utime(self.server.root / "big", (when, when))

    def load(self) -> tuple[int, str]:
        fetched, digest = loaded(self.server, self.cache)
        assert part_files(self.cache) == []
        return fetched, digest


@pytest.fixture
def replaced(nginx: Callable[..., Nginx], tmp_path: Path, data: bytes) -> Replaced:
    (tmp_path / "www").mkdir()
    lenient = "add_header Cache-Control 'max-age=0, stale-if-error=1000000';"
    server = nginx(tmp_path / "www", limit_rate=12 * MIB, conf=lenient)
    made = Replaced(server, tmp_path / "cache", bytes(MIB) + data[: SIZE - MIB], data)
    made.serve(made.old, 1)
    assert made.load()[1] == sha256(made.old).hexdigest()
    made.serve(made.new, 2)
    made.came = killed(server, made.cache, SIZE // 2)
    assert len(part_files(made.cache)) == 1
    return made


def test_new_version_goes_on_though_an_old_one_is_cached(replaced: Replaced) -> None:
    fetched, digest = replaced.load()
    assert digest == sha256(replaced.new).hexdigest()
    assert fetched <= SIZE - replaced.came + (WORKERS + 1) * PIECE
    assert replaced.load() == (0, digest)


def test_new_version_that_is_no_longer_served_gives_way_to_the_cached_one(replaced: Replaced) -> None:
    replaced.serve(replaced.old, 1)
    digest = sha256(replaced.old).hexdigest()
    assert replaced.load() == (0, digest)
    assert replaced.load() == (0, digest)


def test_of_three_versions_the_latest_comes_whole(replaced: Replaced) -> None:
    latest = replaced.new[MIB:] + bytes(MIB)
    replaced.serve(latest, 3)
    assert replaced.load() == (SIZE, sha256(latest).hexdigest())


def test_what_is_all_there_is_confirmed_rather_than_that_a_part_of_it_is_gone_on_with(replaced: Replaced) -> None:
    (part,) = part_files(replaced.cache)
    kept = part.read_bytes()
    replaced.load()
    part.write_bytes(kept)
    assert replaced.load() == (0, sha256(replaced.new).hexdigest())


def test_who_has_waited_for_another_goes_on_where_that_one_was_killed(replaced: Replaced) -> None:
    request = LoadRequest("big", "big")
    with NetworkLoader(config_of(replaced.server, replaced.cache)) as loader:
        other, claim = Claims(replaced.cache / "claims"), loader._requests.claim(request)
        assert other.take(*claim)
        future = loader.enqueue(request)
        while not any(load.turn and load.turn.is_waiting for load in loader._fetcher._books.all()):
            assert not future.done()
        other.release(*claim)
        assert future.result(100).data == replaced.new
        assert loader.stats().bytes_fetched <= SIZE - replaced.came + (WORKERS + 1) * PIECE


def test_who_fails_after_the_new_version_has_answered_is_not_stood_in_for_by_the_old_one(replaced: Replaced) -> None:
    config = replace(config_of(replaced.server, replaced.cache, workers=1), timeout=1.0)
    with NetworkLoader(config) as loader:
        future = loader.enqueue(LoadRequest("big", "big"))
        while not loader.stats().bytes_fetched:
            assert not future.done()
        replaced.server.close()
        assert not future.result(100).is_success


def test_who_fails_at_once_is_stood_in_for_by_the_old_version(replaced: Replaced) -> None:
    replaced.server.close()
    with NetworkLoader(replace(config_of(replaced.server, replaced.cache), timeout=1.0)) as loader:
        assert loader.load(LoadRequest("big", "big")).data == replaced.old


@pytest.mark.slow
def test_half_a_gigabyte(nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    size, piece, workers = 512 * MIB, 4 * MIB, 8
    root = tmp_path / "www"
    root.mkdir()
    block = random.Random(6).randbytes(MIB)
    with (root / "big").open("wb") as file:
        for number in range(512):
            file.write(number.to_bytes(8, "big") + block[8:])
    server = nginx(root, limit_rate=64 * MIB)
    came = killed(server, tmp_path / "cache", size // 2, piece=piece, workers=workers)
    fetched, digest = loaded(server, tmp_path / "cache", piece=piece, workers=workers)
    assert digest == sha256((root / "big").read_bytes()).hexdigest()
    assert fetched <= size - came + workers * piece
