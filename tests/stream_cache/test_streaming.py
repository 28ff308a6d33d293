"""Both halves together: compressed chunks come over sockets, and are decoded once, whoever asks and whenever."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holotensor_net import (
    CacheKey,
    ChecksumMismatch,
    LoadRequest,
    NetworkConfig,
    NetworkLoader,
    StreamCache,
    StreamingLoader,
    fragment_id_of,
)
from holotensor_net.origin import Origin
from holotensor_net.values import blake3_of

COUNT, SHAPE = 20, (64, 100)

decoded: list[int] = []


def parsed(header: memoryview) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(header))
    return found


def decode(header: dict[str, Any], fragment: memoryview) -> np.ndarray[Any, Any]:
    """A filter whose trained state is a header, and whose chunks are fragments."""
    decoded.append(1)
    return np.frombuffer(zlib.decompress(fragment), header["dtype"]).reshape(header["shape"])


@pytest.fixture
def arrays() -> list[np.ndarray[Any, Any]]:
    decoded.clear()
    source = np.random.default_rng(4)
    return [source.integers(0, 50, SHAPE).astype("<f4") for _ in range(COUNT)]


@pytest.fixture
def server(arrays: list[np.ndarray[Any, Any]], tmp_path: Path, origin: Callable[..., Origin]) -> Origin:
    www = tmp_path / "www"
    (www / "chunks").mkdir(parents=True)
    (www / "header.json").write_text(json.dumps({"dtype": "<f4", "shape": SHAPE}))
    for number, array in enumerate(arrays):
        (www / "chunks" / str(number)).write_bytes(zlib.compress(array.tobytes()))
    return origin(www)


def header_of(server: Origin) -> LoadRequest:
    data = Path(server.root, "header.json").read_bytes()
    return LoadRequest(fragment_id_of(data), "header.json", checksum=f"blake3:{blake3_of(data)}")


def streamed(cache: StreamCache, server: Origin, fragments: Path, **settings: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays, in order of their numbers."""
    config = NetworkConfig.custom_cdn(server.url, cache_dir=fragments, **settings)
    with NetworkLoader(config) as loader:
        cache.load_state_from(loader, header_of(server), "decode", parsed)
        with StreamingLoader(loader, "chunks/", buffer=4).start(map(str, range(COUNT))) as results:
            found = {int(result.fragment_id): cache.run("decode", decode, result.data) for result in results}
    return [found[number] for number in range(COUNT)]


def test_what_is_streamed_twice_is_decoded_once(
    server: Origin, arrays: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    cache = StreamCache(100)
    for asked in (True, False):
        before = len(decoded)
        got = streamed(cache, server, tmp_path / "fragments")
        assert all(map(np.array_equal, got, arrays))
        assert not any(array.flags.writeable for array in got)
        assert len(decoded) - before == (COUNT if asked else 0)
    assert (cache.hits, cache.misses) == (COUNT, COUNT)
    assert cache.stats().seconds_saved > 0


def test_another_run_without_a_network_decodes_nothing(
    server: Origin, arrays: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    streamed(StreamCache(100, disk=tmp_path / "results"), server, tmp_path / "fragments")
    server.close()
    cache = StreamCache(100, disk=tmp_path / "results")
    got = streamed(cache, server, tmp_path / "fragments", offline=True)
    assert all(map(np.array_equal, got, arrays))
    assert len(decoded) == COUNT
    assert (cache.hits, cache.misses) == (COUNT, 0)


def test_digest_that_is_known_stands_for_the_chunk(server: Origin, tmp_path: Path) -> None:
    cache = StreamCache(100)
    with NetworkLoader(NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "fragments")) as loader:
        cache.load_state_from(loader, header_of(server), "decode", parsed)
        data = Path(server.root, "chunks", "0").read_bytes()
        request = LoadRequest("0", "chunks/0", checksum=f"blake3:{blake3_of(data)}")
        assert request.checksum is not None
        key = CacheKey(bytes.fromhex(request.checksum.removeprefix("blake3:")))
        for _ in range(2):
            cache.run("decode", decode, loader.load(request).data, chunk_key=key)
    assert len(decoded) == 1


def test_state_that_is_not_what_was_promised_is_not_loaded(server: Origin, tmp_path: Path) -> None:
    request = header_of(server)
    Path(server.root, "header.json").write_text(json.dumps({"dtype": "<i4", "shape": SHAPE}))
    cache = StreamCache(100)
    config = NetworkConfig.custom_cdn(server.url, cache_dir=tmp_path / "fragments")
    with NetworkLoader(config) as loader, pytest.raises(ChecksumMismatch):
        cache.load_state_from(loader, request, "decode", parsed)
    assert cache.get_state("decode") is None
