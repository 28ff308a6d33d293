"""However many threads ask for the same, it comes once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Nginx

from holotensor_net.config import CdnEndpoint, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.values import LoadRequest


def requests_of(nginx: Callable[..., Nginx], root: Path, cache: Path | bool, keys: int, threads: int) -> Counter[str]:
    """How often each object was asked for, by threads that ask for all of them, each in an order of its own."""
    root.mkdir()
    for number in range(keys):
        (root / f"k{number}").write_bytes(b"%d" % number)
    server = nginx(root, conf='add_header Cache-Control "max-age=600";')
    wrong: list[str] = []
    config = NetworkConfig(endpoints=(CdnEndpoint(server.url),), cache_dir=cache)  # type: ignore[arg-type]
    with NetworkLoader(config) as loader:

        def ask(seed: int) -> None:
            names = [f"k{number}" for number in range(keys)]
            random.Random(seed).shuffle(names)
            for name in names:
                result = loader.load(LoadRequest(name, name))
                if not result.is_success or bytes(result.data) != name[1:].encode():
                    wrong.append(name)

        workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
    return Counter(access.path for access in server.accesses())


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_each_object_is_asked_for_once(nginx: Callable[..., Nginx], tmp_path: Path, disk: bool) -> None:
    asked = requests_of(nginx, tmp_path / "www", tmp_path / "cache" if disk else False, 60, 16)
    assert asked == {f"/k{number}": 1 for number in range(60)}


@pytest.mark.slow
def test_a_thousand_objects_and_64_threads(nginx: Callable[..., Nginx], tmp_path: Path) -> None:
    asked = requests_of(nginx, tmp_path / "www", tmp_path / "cache", 1000, 64)
    assert asked == {f"/k{number}": 1 for number in range(1000)}
