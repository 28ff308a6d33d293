"""A model that is all in the cache: opened, and every tensor touched; a hit in memory; a cache of many entries.

To touch a tensor is to read a byte of each of its pages. Each turn opens everything anew, as the next process would.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from holotensor_net import CacheEntry, CdnEndpoint, FragmentCache, NetworkConfig, open_model
from holotensor_net.config import CacheConfig

from ._harness import OURS, Bar, Case, alternate, peer
from ._origin import served

MIB = 1 << 20
REVISION = "0" * 40


def cases(smallest: bool) -> Iterator[Case]:
    rounds, size, tensors, entries = (2, 4 * MIB, 6, 200) if smallest else (11, 1024 * MIB, 300, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        yield model(Path(folder), rounds, size, tensors)
    yield hit(rounds)
    with tempfile.TemporaryDirectory() as folder:
        yield from many(Path(folder), 2 if smallest else 3, entries)


def model(folder: Path, rounds: int, size: int, tensors: int) -> Case:
    safetensors_numpy, safetensors = peer("safetensors.numpy"), peer("safetensors")
    assert safetensors_numpy is not None  # it writes the file that all read
    assert safetensors is not None
    root = folder / "hub" / "models--a--b" / "snapshots" / REVISION
    root.mkdir(parents=True)
    file = root / "model.safetensors"
    rng = np.random.default_rng(0)
    length = size // tensors // 4
    safetensors_numpy.save_file({f"t{n:03}": rng.standard_normal(length, np.float32) for n in range(tensors)}, file)

    def ours(config: NetworkConfig, url: str) -> Any:
        with open_model(url, config=config) as opened:
            touch(opened, opened.keys())
            return opened

    def theirs(path: Path | str) -> None:
        with safetensors.safe_open(path, framework="np") as opened:
            touch(opened, opened.keys())

    with served(root) as origin:
        url = f"{origin.url}/{file.name}"
        settings: dict[str, Any] = {"cache_dir": folder / "cache", "endpoints": (CdnEndpoint(origin.url),)}
        ours(NetworkConfig(**settings), url)
    # The server is gone: whatever asked it would fail.
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(NetworkConfig(**settings, offline=True), url),
        "safetensors, a local file": lambda: theirs(file),
    }
    hub, absent = peer("huggingface_hub"), []
    if hub is None:
        absent.append("huggingface_hub")
    else:
        refs = folder / "hub" / "models--a--b" / "refs"
        refs.mkdir()
        (refs / "main").write_text(REVISION)

        def found() -> None:
            theirs(hub.hf_hub_download("a/b", file.name, cache_dir=folder / "hub", local_files_only=True))

        sides["huggingface_hub offline"] = found
    samples = alternate(sides, rounds)
    name = f"{size / MIB:g} MiB in {tensors} tensors, cached: open and touch"
    case = Case(name, samples, absent=tuple(absent), work=size / 1e9, unit="GB", notes={OURS: "0 requests"})
    ratio = case.ratio("safetensors, a local file")
    bar = Bar("as fast as safetensors", ratio, at_least=0.9, unit=" ×")
    return Case(case.name, samples, (bar,), case.absent, case.work, case.unit, case.notes)


def touch(opened: Any, names: Any) -> None:
    for name in names:
        tensor = opened.get_tensor(name)
        int(tensor.reshape(-1).view(np.uint8)[::4096].sum())


def hit(rounds: int) -> Case:
    cache = FragmentCache(CacheConfig(directory=False))
    cache.put("key", bytes(MIB))
    case = Case("hit in memory", alternate({OURS: lambda: cache.get("key")}, rounds, at_least=0.002))
    return Case(case.name, case.samples, (Bar("a hit takes", case.median() * 1e6, at_most=5, unit=" µs"),))


def many(folder: Path, rounds: int, entries: int) -> Iterator[Case]:
    config = CacheConfig(directory=folder, memory_size=0)
    with FragmentCache(config) as cache:
        for number in range(entries):
            key = f"{number}"
            cache.put(key, key.encode(), CacheEntry(key, 0))

    def opened() -> None:
        with FragmentCache(config) as cache:
            assert cache.get("0") == b"0"

    case = Case(f"open a cache of {entries:,} entries, and read one", alternate({OURS: opened}, rounds))
    yield Case(case.name, case.samples, (Bar("it takes", case.median() * 1e3, at_most=50, unit=" ms"),))
    listed = alternate({OURS: lambda: sum(1 for _ in FragmentCache(config))}, rounds)
    case = Case(f"list {entries:,} entries", listed)
    yield Case(case.name, case.samples, (Bar("it takes", case.median(), at_most=3, unit=" s"),))
