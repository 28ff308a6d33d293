"""Ten thousand random ranges of random objects: what the library gives equals, byte for byte, what nginx serves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pytest
from servers import Nginx

from holotensor_net.config import ClientConfig, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.transport.client import HttpClient
from holotensor_net.values import LoadRequest, LoadSuccess, Priority, RangeRequest

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 64 * KIB
SIZES = (1, 2, 255, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, MIB + 7, 6 * MIB)

BY_CLIENT, BY_LOAD_RANGE, BY_ENQUEUE = 4000, 2000, 4000  # ranges; together ten thousand
THREADS = 4

Objects = dict[str, bytes]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    draw = random.Random(1)
    return {f"{size}.bin": draw.randbytes(size) for size in SIZES}


@pytest.fixture(scope="module")
def server(objects: Objects, tmp_path_factory: pytest.TempPathFactory, nginx: Callable[..., Nginx]) -> Nginx:
    root = tmp_path_factory.mktemp("objects")
    for name, data in objects.items():
        (root / name).write_bytes(data)
    return nginx(root)


def some_range(draw: random.Random, size: int, most: int) -> RangeRequest:
    """A range that is not empty, of up to ``most`` bytes, often at an edge of the object or of a piece."""
    length = min(size, draw.choice((1, 2, draw.randint(1, 300), draw.randint(1, most))))
    last = size - length
    start = draw.randint(0, last)
    start = draw.choice((start, start, 0, last, start - start % CHUNK))
    return RangeRequest(start, start + length)


def draws(seed: int, objects: Objects, count: int, most: int = 200 * KIB) -> Iterator[tuple[str, RangeRequest]]:
    draw = random.Random(seed)
    names = list(objects)
    for _ in range(count):
        name = draw.choice(names)
        yield name, some_range(draw, len(objects[name]), most)


def in_threads(work: Callable[[int], int]) -> int:
    """The sum of what ``work`` gives for each of the threads' seeds."""
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(done.result() for done in as_completed([pool.submit(work, seed) for seed in range(THREADS)]))


def test_the_client_gives_the_bytes_of_the_file(server: Nginx, objects: Objects) -> None:
    with HttpClient(server.url, ClientConfig()) as client:

        def compare(seed: int) -> int:
            count = 0
            for name, wanted in draws(seed, objects, BY_CLIENT // THREADS):
                got = client.fetch_range(name, wanted)
                assert got == objects[name][wanted.start : wanted.stop], f"seed {seed}: {name} {wanted}"
                count += 1
            return count

        assert in_threads(compare) == BY_CLIENT


def test_ranges_of_fragments_are_the_bytes_of_the_file(server: Nginx, objects: Objects, tmp_path: Path) -> None:
    config = NetworkConfig.custom_cdn(server.url, chunk_size=CHUNK, cache_dir=tmp_path / "cache", max_concurrent=8)
    with NetworkLoader(config) as loader:

        def compare(seed: int) -> int:
            count = 0
            for name, wanted in draws(100 + seed, objects, BY_LOAD_RANGE // THREADS):
                result = loader.load_range(LoadRequest(f"{seed}/{count}", name), wanted.start, wanted.stop)
                assert result.data == objects[name][wanted.start : wanted.stop], f"seed {seed}: {name} {wanted}"
                count += 1
            return count

        assert in_threads(compare) == BY_LOAD_RANGE


def neighbours(draw: random.Random, objects: Objects, runs: int) -> Iterator[tuple[str, RangeRequest]]:
    """Runs of ten ranges, one behind the other, as the tensors of a file lie."""
    for _ in range(runs):
        name = draw.choice([name for name, data in objects.items() if len(data) > MIB])
        stop = draw.randrange(len(objects[name]) - 30 * KIB)
        for length in draw.choices(range(1, 3 * KIB), k=10):
            start, stop = stop, stop + length
            yield name, RangeRequest(start, stop)


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_joined_and_divided_ranges_are_the_bytes_of_the_file(
    server: Nginx, objects: Objects, tmp_path: Path, disk: bool
) -> None:
    """Many at once: neighbours are joined into one request, long ones divided into pieces, equal ones shared."""
    before = len(server.accesses())
    config = NetworkConfig.custom_cdn(
        server.url, chunk_size=CHUNK, cache_dir=tmp_path / "cache" if disk else False, max_concurrent=8
    )
    draw = random.Random(8 + disk)
    asked = [
        *draws(10 + disk, objects, BY_ENQUEUE // 4, most=3 * CHUNK),
        *neighbours(draw, objects, BY_ENQUEUE // 40),
    ]
    with NetworkLoader(config) as loader:
        futures = [
            loader.enqueue(
                LoadRequest(str(number), name, byte_range=wanted, priority=draw.choice((Priority.HIGH, Priority.LOW))),
                shared=draw.random() < 0.5,
            )
            for number, (name, wanted) in enumerate(asked)
        ]
        for future, (name, wanted) in zip(futures, asked, strict=True):
            result = future.result(timeout=60)
            assert isinstance(result, LoadSuccess), f"{name} {wanted}: {result}"
            assert result.data == objects[name][wanted.start : wanted.stop], f"{name} {wanted}"
    came = {(access.path, access.range) for access in server.accesses()[before:]}
    long = {(f"/{name}", wanted.header_value) for name, wanted in asked if wanted.length > 2 * CHUNK}
    short = [(f"/{name}", wanted.header_value) for name, wanted in asked if wanted.length <= CHUNK]
    assert long, "no range is longer than a piece"
    assert not long & came, "a long range came in one piece"
    assert sum(one in came for one in short) < len(short) * 0.9, "neighbours were not joined"
