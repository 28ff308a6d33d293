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
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.storage.cache import FragmentCache
from holotensor_net.values import LoadRequest

MIB = 1 << 20
SIZES = {"long": 9 * MIB, "middle": MIB, "short": 5000}

LOAD = """
    import json, logging, sys
    from hashlib import sha256
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.storage import journal
    from holotensor_net.values import LoadRequest

    journal.SYNC_EVERY = 2 << 20
    logging.basicConfig(format="%(levelname)s", level=logging.WARNING)
    url, cache, names = sys.argv[1:]
    config = NetworkConfig(endpoints=(CdnEndpoint(url),), cache_dir=cache, chunk_size=1 << 20)
    with NetworkLoader(config) as loader:
        data = {name: loader.load(LoadRequest(name, name)).data for name in names.split()}
    print(json.dumps({name: sha256(view).hexdigest() for name, view in data.items()}))
"""
WAY = """
    print("mapped" if "/partial/" in open("/proc/self/maps").read() else "copied")
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


def assert_delivers(server: Nginx, cache: Path, objects: dict[str, bytes], *before: str, warnings: int = 1) -> str:
    """Gives whether the bytes are mapped from a part file or copied."""
    names = " ".join(objects)
    command = [*before, sys.executable, "-c", textwrap.dedent(LOAD + WAY), server.url, str(cache), names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    digests, way = done.stdout.splitlines()
    assert json.loads(digests) == {name: sha256(data).hexdigest() for name, data in objects.items()}
    assert done.stderr.splitlines() == ["WARNING"] * warnings
    assert not list((cache / "partial").glob("*"))
    with FragmentCache(NetworkConfig(cache_dir=cache).cache) as kept:
        assert kept.verify() == []
    return way


def test_a_full_disk(server: Nginx, small_disk: Path, objects: dict[str, bytes]) -> None:
    (small_disk / "other").write_bytes(bytes(3 * MIB))
    assert_delivers(server, small_disk / "cache", objects)


def assert_delivers_though(call: str, error: str, server: Nginx, cache: Path, objects: dict[str, bytes]) -> None:
    """Though every such system call fails. What could not be flushed is not what the caller looks into."""
    inject = f"inject={call}:error={error}"
    traced = [tool("strace"), "-f", "-qq", "-e", f"trace={call}", "-e", inject, "-o", os.devnull]
    if subprocess.run([tool("strace"), "-o", os.devnull, sys.executable, "-c", ""], capture_output=True).returncode:
        unavailable("no process may be traced here")
    way = assert_delivers(server, cache, objects, *traced, warnings=call in ("fsync", "fdatasync", "rename"))
    assert (way == "mapped") == (call == "rename")


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "pwrite64", "rename"])
def test_a_disk_that_gives_errors(server: Nginx, tmp_path: Path, objects: dict[str, bytes], call: str) -> None:
    """What cannot be written in pieces is kept in memory and written as one, so that not every call is missed."""
    assert_delivers_though(call, "EIO", server, tmp_path / "cache", objects)


def test_a_folder_that_may_only_be_read(server: Nginx, small_disk: Path, objects: dict[str, bytes]) -> None:
    subprocess.run([tool("mount"), "-o", "remount,ro", str(small_disk)], check=True)
    assert_delivers(server, small_disk / "cache", objects)


FEW_FILES = """
    import os, resource, sys
    taken = [os.open(os.devnull, os.O_RDONLY)]
    limit = taken[0] + int(sys.argv.pop(1))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    import holotensor_net.engine.loader, requests, blake3, encodings.idna
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    os.close(taken.pop())
"""


@pytest.mark.parametrize("spare", [2, 3, 4])
def test_too_few_descriptors(server: Nginx, tmp_path: Path, objects: dict[str, bytes], spare: int) -> None:
    """There are as many as a connection takes, and a few for the disk: here it fails in one place, there in another."""
    load = textwrap.dedent(LOAD).replace("chunk_size=1 << 20", "chunk_size=1 << 20, max_concurrent=1")
    cache, names = tmp_path / "cache", " ".join(objects)
    command = [sys.executable, "-c", textwrap.dedent(FEW_FILES) + load, str(spare), server.url, str(cache), names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: sha256(data).hexdigest() for name, data in objects.items()}
    assert done.stderr.splitlines() == ["WARNING"]
    assert not list((cache / "partial").glob("*"))
    with FragmentCache(NetworkConfig(cache_dir=cache).cache) as kept:
        assert kept.verify() == []


OFFLINE = """
    import json, logging, os, sys
    from hashlib import sha256
    from holotensor_net.config import CdnEndpoint, NetworkConfig
    from holotensor_net.engine.loader import NetworkLoader
    from holotensor_net.values import LoadRequest, RangeRequest
    import blake3, holotensor_net.engine.streaming, tqdm, requests  # what may be where only its owner may read

    url, names = sys.argv[1], sys.argv[2].split()
    if os.getuid() == 0 and os.environ.get("DROP"):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    def watch(event, arguments):
        assert not event.startswith("socket."), event
    sys.addaudithook(watch)
    config = NetworkConfig(endpoints=(CdnEndpoint(url),), cache_dir="cache")
    try:
        open("cache/new", "w")
        print("could be written")
    except OSError:
        pass
    with NetworkLoader(config) as loader:
        got = {name: loader.load(LoadRequest(name, name)).data for name in names}
        got |= {result.fragment_id + " again": result.data for result in loader.stream(names)}
        part = loader.load(LoadRequest("part", "long", byte_range=RangeRequest(5, 1000005))).data
        assert part == got["long"][5:1000005]
        assert loader.head("long").size == len(got["long"])
        assert all(loader.is_cached(LoadRequest(name, name)) for name in names)
        assert type(loader.load(LoadRequest("x", "x")).error).__name__ == "OfflineError"
        assert loader.cache.stats().entries == len(names)
        loader.sync()
    print(json.dumps({name: sha256(view).hexdigest() for name, view in got.items()}))
"""


@pytest.mark.parametrize("way", ["mount", "owner"])
def test_offline_all_is_read_from_a_folder_that_may_only_be_read(
    server: Nginx, tmp_path: Path, objects: dict[str, bytes], way: str
) -> None:
    """Nothing is even tried: no socket, no warning, and every file and folder is as it was."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    mount = [tool("mount"), "-t", "tmpfs", "-o", "size=32m,mode=0755", "none", str(folder)]
    if way == "mount" and subprocess.run(mount, capture_output=True).returncode:
        unavailable("nothing may be mounted here")
    try:
        with NetworkLoader(NetworkConfig(endpoints=(server.url,), cache_dir=folder / "cache")) as loader:
            for name in objects:
                assert loader.load(LoadRequest(name, name)).is_success
        if way == "mount":
            subprocess.run([tool("mount"), "-o", "remount,ro", str(folder)], check=True)
        else:
            subprocess.run([tool("chmod"), "-R", "a+rX,a-w", str(folder)], check=True)
        before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
        environment = {**os.environ, "HOLOTENSOR_OFFLINE": "1", "DROP": "1" * (way == "owner")}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(OFFLINE), server.url, " ".join(objects)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, done.stderr) == (0, "")
        digests = {name: sha256(data).hexdigest() for name, data in objects.items()}
        assert json.loads(done.stdout) == {**digests, **{f"{name} again": digests[name] for name in objects}}
        assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        if way == "mount":
            subprocess.run([tool("umount"), "--lazy", str(folder)], check=True)
        else:
            subprocess.run([tool("chmod"), "-R", "u+w", str(folder)], check=True)
