from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from samples import LIMITED, Array, eventually, every_kind, interrupted, llama, process, read, run, write, write_index

from holotensor_net.errors import (
    ConfigurationError,
    ConnectionFailed,
    FormatError,
    InsufficientDisk,
    NetworkError,
    NotFound,
)
from holotensor_net.interfaces import demo
from holotensor_net.interfaces.cli import main
from holotensor_net.model.sample import compare, write_model
from holotensor_net.origin import Behaviour, Origin

StartOrigin = Callable[..., Origin]
Capture = pytest.CaptureFixture[str]

SMALL = {"blocks": 3, "hidden": 128, "vocabulary": 1000}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; fails the test if any are left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("scratch")
def test_it_measures_what_it_says(tmp_cache: Path, capsys: Capture) -> None:
    found = demo.run(**SMALL)
    assert found.tensors == found.checked == 3 + 9 * SMALL["blocks"]
    assert 0 < found.critical_bytes < found.bytes
    assert found.plain_seconds > found.bytes / demo.RATE
    assert found.first.fetched_bytes >= found.bytes
    assert found.first.critical_fetched_bytes >= found.critical_bytes
    assert found.first.requests > 0
    assert found.second.fetched_bytes == 0
    for each in (found.first, found.second):
        assert demo.LATENCY < each.first_seconds <= each.critical_seconds <= each.seconds
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["first run", "second run"]
    assert list(tmp_cache.iterdir()) == []  # it has a cache of its own


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    monkeypatch.setattr(demo, "run", functools.partial(demo.run, **SMALL))


@pytest.mark.usefixtures("small")
def test_the_command_prints_a_table(capsys: Capture) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^30 tensors, \d+ MB, \d+ MB of them CRITICAL$", out, re.M)
    assert re.search(r"plain download +first run +second run$", out, re.M)
    for label in ("first tensor", "all CRITICAL tensors", "everything"):
        assert re.search(rf"^{label}( +\d+\.\d\d s){{3}}$", out, re.M)
    assert re.search(r"^bytes over the network +[\d,]+ +[\d,]+ +0$", out, re.M)
    assert re.search(r"^All CRITICAL tensors were there when \d+\.\d\d × their own bytes had moved\.$", out, re.M)
    assert re.search(r"^The second run took \d+\.\d\d × the first\.$", out, re.M)
    assert out.endswith("30 tensors equal safetensors' own, bit for bit, in both runs.\n")


@pytest.mark.usefixtures("small")
def test_the_command_prints_json(capsys: Capture) -> None:
    assert main(["demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checked"] == found["tensors"] == 30
    assert found["second"]["fetched_bytes"] == 0
    assert found["url"].endswith("/model.safetensors.index.json")


# --- a model of yours


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("model.safetensors", ""),
        ("model.safetensors", "?sig=S3CRET/x"),
        ("sharded/model.safetensors.index.json", ""),
        ("sharded/", "?sig=S3CRET"),
        ("", ""),
    ],
)
def test_any_model_will_do(origin: StartOrigin, tmp_path: Path, capsys: Capture, name: str, query: str) -> None:
    tensors = every_kind() | llama()
    write(tmp_path / "www" / "model.safetensors", tensors)
    write_index(tmp_path / "www" / "sharded", tensors)
    server = origin(tmp_path / "www")
    assert main(["demo", "--json", "--url", f"{server.url}/{name}{query}"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["checked"] == found["tensors"] == len(tensors)
    assert "S3CRET" not in out + err


@pytest.mark.usefixtures("scratch")
def test_a_path_below_the_endpoint_of_the_environment_will_do(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path / "www" / "llama", llama())
    server = origin(tmp_path / "www")
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", server.url)
    for where in ("llama/model.safetensors.index.json", f"{server.url}/llama/"):
        assert demo.run(where, show_progress=False).checked == len(llama())


@pytest.mark.usefixtures("scratch")
def test_what_cannot_be_shown_is_told(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write(tmp_path / "www" / "none.safetensors", {})
    write(tmp_path / "www" / "m.safetensors", llama())
    server, locked = (
        origin(tmp_path / "www"),
        origin(tmp_path / "www", behaviour=Behaviour(require_auth="Bearer token")),
    )
    with pytest.raises(NotFound):
        demo.run(f"{server.url}/no.safetensors")
    with pytest.raises(FormatError, match="the model has no tensors"):
        demo.run(f"{server.url}/none.safetensors")
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", locked.url)
    monkeypatch.setenv("HOLOTENSOR_TOKEN", "token")
    with pytest.raises(ConnectionFailed, match=r"plain download failed .*401"):
        demo.run(f"{locked.url}/m.safetensors")


# --- what it stands on


@pytest.mark.parametrize("library", ["safetensors", "safetensors.numpy", "ml_dtypes", "numpy"])
@pytest.mark.usefixtures("scratch")
def test_without_its_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["demo"]) == 2
    assert "pip install holotensor-net[tensors]" in capsys.readouterr().err


def test_comparing_needs_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        compare([tmp_path / "m.safetensors"], {})


@pytest.mark.usefixtures("scratch")
def test_no_room_for_the_model_is_a_full_disk() -> None:
    done = run(sys.executable, "-c", LIMITED, "demo")
    assert done.returncode == 6
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("scratch")
def test_no_room_for_the_download_is_a_full_disk(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.safetensors", llama(side=192))
    done = run(sys.executable, "-c", LIMITED, "demo", "--url", f"{origin().url}/m.safetensors")
    assert done.returncode == 6
    assert "free some space, or set TMPDIR" in done.stderr


@pytest.mark.usefixtures("scratch")
def test_a_disk_that_fills_up_is_told_from_a_network_that_fails(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{origin().url}/{write(tmp_path / 'm.safetensors', llama()).name}"
    (tmp_path / "model-00001-of-00003.safetensors").mkdir()
    with pytest.raises(InsufficientDisk, match="free some space there"):
        write_model(tmp_path, **SMALL)
    for number, kind in ((errno.ENOSPC, InsufficientDisk), (errno.ECONNRESET, ConnectionFailed)):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(shutil, "copyfileobj", fail)
        with pytest.raises(kind):
            demo.run(url)


def test_a_model_is_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_model(tmp_path / folder, **SMALL)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == [*(f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)), "model.safetensors.index.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    index = json.loads((tmp_path / "one" / files[-1]).read_text())
    stored = {name: array for file in files[:3] for name, array in read(tmp_path / "one" / file).items()}
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())


def test_equal_runs_are_counted_and_a_difference_is_an_error(tmp_path: Path) -> None:
    tensors = every_kind()
    file = write(tmp_path / "m.safetensors", tensors)
    assert compare([file], tensors, tensors) == len(tensors)
    assert compare([file], {}, {}) == 0
    for name in ("float32.5x3", "bfloat16.scalar", "float8_e5m2.7"):
        array = tensors[name]
        changed = array.copy().reshape(-1)
        changed.view(np.uint8)[-1] ^= 1
        others: list[Array] = [changed.reshape(array.shape), array.reshape((*array.shape, 1))]
        if array.dtype.itemsize > 1:  # FP8 is compared as bytes
            others.append(array.view(f"u{array.dtype.itemsize}"))
        for other in others:
            with pytest.raises(NetworkError, match=f"tensor '{name}' differs"):
                compare([file], tensors, {**tensors, name: other})


def test_a_file_that_safetensors_refuses_is_a_format_error(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", llama())
    os.truncate(file, 1000)
    with pytest.raises(FormatError, match=r"safetensors cannot read m\.safetensors"):
        compare([file], {})


# --- interruption

SLOW = """
import functools, sys
from holotensor_net.interfaces import cli, demo
demo.RATE = 4e6
demo.run = functools.partial(demo.run, blocks=2, hidden=128, vocabulary=8000)
sys.exit(cli.main(["demo"]))
"""


def processes_in(folder: Path) -> list[bytes]:
    """The command lines of processes that speak of a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(file.read_bytes())
    return [line for line in found if bytes(folder) in line]


@pytest.mark.parametrize("moment", ["plain", "cache/entries"])
def test_an_interrupted_demo_ends_at_once_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with process(sys.executable, "-c", SLOW, env={**os.environ, "TMPDIR": str(tmp_path)}) as child:
        eventually(lambda: list(tmp_path.glob(f"holotensor-demo-*/{moment}/*")), "the transfer begins")
        assert processes_in(tmp_path)
        out, err = interrupted(child)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: not processes_in(tmp_path), "the server ends", timeout=5)
