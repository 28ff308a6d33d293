"""The whole from the outside: real files on a real web server, and what a caller gets and sees."""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from samples import (
    CLI,
    Array,
    assert_same,
    eventually,
    every_kind,
    interrupted,
    llama,
    process,
    read,
    run,
    write,
    write_index,
)
from servers import Access, Nginx

from holotensor_net import NetworkConfig, open_model
from holotensor_net.interfaces.cli import main
from holotensor_net.model.importance import rank_names
from holotensor_net.model.sample import write_model
from holotensor_net.origin import Behaviour, Origin, OriginProcess
from holotensor_net.values import Priority

StartOrigin = Callable[..., Origin]

KINDS = every_kind()
MANY = {f"model.layers.{number}.{'x' * 40}.weight": np.full((3,), number, "f4") for number in range(1200)}
LARGE = llama(blocks=4, side=512) | {"half": np.arange(3 << 20, dtype="u2").view("f2")}  # of several pieces


@pytest.fixture(scope="module")
def www(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all sorts: in one file, in shards, with a long header, with long tensors."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / "kinds.safetensors", KINDS, {"format": "np"})
    write_index(folder / "kinds", KINDS)
    write(folder / "many.safetensors", MANY)
    write(folder / "large.safetensors", LARGE)
    write_index(folder / "large", LARGE)
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def server(nginx: Callable[..., Nginx], www: Path) -> Nginx:
    return nginx(www)


MODELS = {
    "kinds.safetensors": KINDS,
    "kinds/model.safetensors.index.json": KINDS,
    "kinds/": KINDS,
    "many.safetensors": MANY,
    "large.safetensors": LARGE,
    "large/model.safetensors.index.json": LARGE,
}


def since(server: Nginx, before: int) -> list[Access]:
    return server.accesses()[before:]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


# --- files


@pytest.mark.parametrize("folder", ["kinds", "large"])
def test_pulled_files_have_the_digests_of_the_originals(server: Nginx, www: Path, tmp_path: Path, folder: str) -> None:
    url = f"{server.url}/{folder}/model.safetensors.index.json"
    assert main(["pull", url, "--to", str(tmp_path / "first")]) == 0
    assert digests(tmp_path / "first") == digests(www / folder)
    before = len(server.accesses())
    assert main(["pull", url, "--to", str(tmp_path / "second")]) == 0
    assert digests(tmp_path / "second") == digests(www / folder)
    again = since(server, before)
    assert {access.status for access in again if access.method == "GET"} == {304}
    assert sum(access.bytes for access in again) == 0


def test_pulled_files_have_the_digests_of_the_originals_in_a_process_too(
    server: Nginx, www: Path, tmp_path: Path
) -> None:
    done = run(*CLI, "pull", f"{server.url}/large/model.safetensors.index.json", "--to", tmp_path)
    assert done.returncode == 0
    assert digests(tmp_path) == digests(www / "large")
    assert len(done.stdout.splitlines()) == len(list(tmp_path.iterdir()))


# --- arrays


@pytest.mark.parametrize("name", MODELS)
def test_arrays_are_what_was_saved_bit_for_bit_and_move_once(server: Nginx, www: Path, name: str) -> None:
    with open_model(f"{server.url}/{name}") as model:
        arrays = dict(model.stream())
    assert_same(arrays, MODELS[name])
    before = len(server.accesses())
    with open_model(f"{server.url}/{name}") as model:
        assert_same(dict(model.stream()), MODELS[name])
    again = since(server, before)
    assert {access.status for access in again} == {304}
    assert sum(access.bytes for access in again) == 0


def test_arrays_are_what_safetensors_reads(server: Nginx, www: Path) -> None:
    for file in sorted(www.rglob("*.safetensors")):
        with open_model(f"{server.url}/{file.relative_to(www)}") as model:
            arrays = dict(model.stream())
        expected = read(file)
        assert_same({name: arrays[name] for name in expected}, expected)
        assert all(arrays[name].dtype.name.startswith("float8") for name in arrays.keys() - expected.keys())


def test_a_header_beyond_the_first_read_is_read(www: Path) -> None:
    (length,) = struct.unpack("<Q", (www / "many.safetensors").read_bytes()[:8])
    assert length > 65536  # or the test above proves nothing


def test_rows_come_without_the_rest(server: Nginx) -> None:
    before = len(server.accesses())
    with open_model(f"{server.url}/large.safetensors") as model:
        rows = model.get_slice("model.embed_tokens.weight")[5:10]
    assert rows.tobytes() == LARGE["model.embed_tokens.weight"][5:10].tobytes()
    assert sum(access.bytes for access in since(server, before)) <= 65536 + rows.nbytes


# --- time


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 61 MB, a quarter of what the demo loads."""
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder, blocks=8, hidden=512, vocabulary=8000)
    return folder


@pytest.fixture(scope="module")
def expected(llama_folder: Path) -> dict[str, Array]:
    return {name: array for file in llama_folder.glob("*.safetensors") for name, array in read(file).items()}


def test_what_is_critical_comes_first_and_the_second_time_is_instant(
    llama_folder: Path, expected: dict[str, Array]
) -> None:
    ranks = rank_names({name: array.nbytes for name, array in expected.items()})
    critical = {name for name, rank in ranks.items() if rank.priority == Priority.CRITICAL}
    share = sum(expected[name].nbytes for name in critical)
    config = NetworkConfig(chunk_size=1 << 20)  # pieces as small, in proportion, as those of a model of that sort
    arrays: dict[str, Array] = {}
    moved = None
    with OriginProcess(llama_folder, behaviour=Behaviour(rate=15e6, latency=0.02)) as server:
        url = f"{server.url}/model.safetensors.index.json"
        began = time.monotonic()
        with open_model(url, config=config) as model:
            for name, array in model.stream():
                arrays[name] = array
                if moved is None and critical <= arrays.keys():
                    moved = server.stats().body_bytes
            report = model.report()
        first = time.monotonic() - began
        assert_same(arrays, expected)
        assert moved is not None
        assert moved <= 1.3 * share < 0.8 * model.nbytes  # the rest is large enough for the test to fail
        assert report is not None
        assert report.critical_fetched_bytes is not None
        assert report.critical_fetched_bytes <= 1.3 * share
        server.reset_stats()
        began = time.monotonic()
        with open_model(url, config=config) as model:
            again = dict(model.stream())
        second = time.monotonic() - began
        assert_same(again, expected)
        assert second <= 0.2 * first
        assert server.stats().body_bytes == 0
        assert set(server.stats().statuses) == {304}


# --- outages


@pytest.mark.parametrize("cache", [True, False])
def test_a_server_that_is_killed_and_comes_back_costs_time_and_nothing_else(
    llama_folder: Path, expected: dict[str, Array], cache: bool, tmp_path: Path
) -> None:
    config = NetworkConfig(cache_dir=tmp_path / "cache" if cache else False)
    with OriginProcess(llama_folder, behaviour=Behaviour(rate=50e6)) as server:
        arrays: dict[str, Array] = {}
        killed = None
        with open_model(f"{server.url}/model.safetensors.index.json", config=config) as model:
            for name, array in model.stream():
                arrays[name] = array
                if killed is None:
                    server.kill()
                    killed = time.monotonic()
                    restart = threading.Timer(2.0, server.start)
                    restart.start()
        restart.join()
        assert killed is not None
        assert time.monotonic() - killed > 2.0
    assert_same(arrays, expected)


# --- interruptions

SCRIPT = """
import sys, threading
import holotensor_net
with holotensor_net.open_model(sys.argv[1]) as model:
    try:
        for name, array in model.stream():
            print(name, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print([thread.name for thread in threading.enumerate()])
"""

CARELESS = """
import sys
import holotensor_net
model = holotensor_net.open_model(sys.argv[1])
for name, array in model.stream():
    print(name, flush=True)
"""


def test_a_script_that_is_interrupted_keeps_no_thread(origin: StartOrigin, llama_folder: Path) -> None:
    server = origin(llama_folder, behaviour=Behaviour(rate=2e6))
    with process(sys.executable, "-c", SCRIPT, f"{server.url}/model.safetensors.index.json") as child:
        eventually(lambda: server.stats().body_bytes > 500_000, "the transfer begins")
        out, err = interrupted(child)
    assert (child.returncode, err) == (0, "")
    assert out.splitlines()[-2:] == ["interrupted", "['MainThread']"]


def test_a_script_that_closes_nothing_ends_all_the_same(origin: StartOrigin, llama_folder: Path) -> None:
    server = origin(llama_folder, behaviour=Behaviour(rate=2e6))
    with process(sys.executable, "-c", CARELESS, f"{server.url}/model.safetensors.index.json") as child:
        eventually(lambda: server.stats().body_bytes > 500_000, "the transfer begins")
        _, err = interrupted(child)
    assert child.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert err.count("Traceback") == 1


def test_an_interrupted_pull_goes_on_where_it_can(server: Nginx, www: Path, tmp_path: Path) -> None:
    url = f"{server.url}/large/model.safetensors.index.json"
    with process(*CLI, "pull", url, "--to", tmp_path / "out", "--max-bandwidth", "3MB") as child:
        eventually(lambda: list((tmp_path / "out").glob("*.json")), "the first file is there")
        out, err = interrupted(child)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert all(name in os.listdir(www / "large") for name in os.listdir(tmp_path / "out"))  # whole files only
    assert main(["pull", url, "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(www / "large")
