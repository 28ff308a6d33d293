"""A disk that fails while a loader is at work: every byte comes, one warning is given, nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from servers import Nginx, tool, unavailable

from holotensor_net.config import NetworkConfig
from holotensor_net.storage.cache import FragmentCache

MIB = 1 << 20
SIZES = {"long": 9 * MIB, "middle": MIB, "short": 5000}

LOAD = """
    import json, logging, sys
    from hashlib import sha256
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.values import LoadRequest

    logging.basicConfig(format="%(levelname)s", level=logging.WARNING)
    url, cache, names = sys.argv[1:]
    config = NetworkConfig(endpoints=(CdnEndpoint(url),), cache_dir=cache, chunk_size=1 << 20)
    with NetworkLoader(config) as loader:
        data = {name: loader.load(LoadRequest(name, name)).data for name in names.split()}
    print(json.dumps({name: sha256(view).hexdigest() for name, view in data.items()}))
"""


@pytest.fixture
def objects() -> dict[str, bytes]:
    return {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}


@pytest.fixture
def server(nginx: Callable[..., Nginx], tmp_path: Path, objects: dict[str, bytes]) -> Nginx:
    root = tmp_path / "www"
    root.mkdir()
    for name, data in objects.items():
        (root / name).write_bytes(data)
    return nginx(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = [tool("mount"), "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        unavailable("nothing may be mounted here")
    yield folder
    subprocess.run([tool("umount"), "--lazy", str(folder)], check=True)


def assert_delivers(server: Nginx, cache: Path, objects: dict[str, bytes], *before: str, warnings: int = 1) -> None:
    names = " ".join(objects)
    command = [*before, sys.executable, "-c", textwrap.dedent(LOAD), server.url, str(cache), names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: sha256(data).hexdigest() for name, data in objects.items()}
    assert done.stderr.splitlines() == ["WARNING"] * warnings
    assert not list((cache / "partial").glob("*"))
    with FragmentCache(NetworkConfig(cache_dir=cache).cache) as kept:
        assert kept.verify() == []


def test_a_full_disk(server: Nginx, small_disk: Path, objects: dict[str, bytes]) -> None:
    (small_disk / "other").write_bytes(bytes(3 * MIB))
    assert_delivers(server, small_disk / "cache", objects)


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "pwrite64", "rename"])
def test_a_disk_that_gives_errors(server: Nginx, tmp_path: Path, objects: dict[str, bytes], call: str) -> None:
    """What cannot be written in pieces is kept in memory and written as one, so that not every call is missed."""
    cache = tmp_path / "cache"
    inject = f"inject={call}:error=EIO"
    traced = [tool("strace"), "-f", "-qq", "-e", f"trace={call}", "-e", inject, "-o", os.devnull]
    if subprocess.run([tool("strace"), "-o", os.devnull, sys.executable, "-c", ""], capture_output=True).returncode:
        unavailable("no process may be traced here")
    assert_delivers(server, cache, objects, *traced, warnings=call in ("fsync", "rename"))


def test_a_folder_that_may_only_be_read(server: Nginx, small_disk: Path, objects: dict[str, bytes]) -> None:
    subprocess.run([tool("mount"), "-o", "remount,ro", str(small_disk)], check=True)
    assert_delivers(server, small_disk / "cache", objects)
