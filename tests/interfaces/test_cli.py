from __future__ import annotations

import http.server
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import CLI, LIMITED, Array, eventually, interrupted, llama, process, run, write, write_index

from holotensor_net import errors, open_model
from holotensor_net.config import NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.interfaces import cli
from holotensor_net.interfaces.cli import exit_code, main
from holotensor_net.origin import Behaviour, Origin
from holotensor_net.storage.cache import CacheEntry, FragmentCache

StartOrigin = Callable[..., Origin]
Capture = pytest.CaptureFixture[str]

LLAMA = llama()


def result(capsys: Capture, *arguments: object) -> Any:
    """What a command that succeeds prints with ``--json``."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def usage(*arguments: object) -> int | str | None:
    """The exit code of a command line, whoever finds the fault in it."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as refused:
        return refused.code


# --- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FormatError(), 1),
        (errors.ConfigurationError(), 2),
        (errors.InvalidUrl(), 2),
        (errors.Timeout(), 3),
        (errors.StalledTransfer(), 3),
        (errors.DeadlineExceeded(), 3),
        (errors.NotFound(), 4),
        (errors.NetworkError(), 5),
        (errors.ConnectionFailed(), 5),
        (errors.HttpError(status=500), 5),
        (errors.RateLimited(), 5),
        (errors.ProtocolError(), 5),
        (errors.RangeNotSupported(), 5),
        (errors.ObjectChanged(), 5),
        (errors.OfflineError(), 5),
        (errors.CacheError(), 6),
        (errors.InsufficientDisk(), 6),
        (errors.HttpError(status=401), 7),
        (errors.HttpError(status=403), 7),
        (errors.HttpError(status=407), 7),
        (errors.ChecksumMismatch(), 8),
        (errors.Cancelled(), 130),
        (errors.RetriesExhausted(last_error=errors.Timeout()), 3),
        (errors.RetriesExhausted(last_error=errors.RetriesExhausted(last_error=errors.NotFound())), 4),
        (errors.RetriesExhausted(last_error=ValueError()), 5),
        (errors.RetriesExhausted(), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("inspect",),
        ("cache",),
        ("cache", "prune"),
        ("cache", "prune", "much"),
        ("pull", "http://127.0.0.1:9/x", "--max-bandwidth", "fast"),
        ("pull", "http://127.0.0.1:9/x", "--max-bandwidth", "0"),
        ("pull", "http://127.0.0.1:9/x", "--timeout", "soon"),
        ("pull", "http://127.0.0.1:9/x", "--timeout", "-1"),
        ("pull", "ftp://example.com/x"),
        ("pull", "model.safetensors"),
        ("inspect", "gopher://example.com/x"),
        ("inspect", "http://127.0.0.1:9/x#top"),
        ("serve", ".", "--latency", "-1"),
        ("serve", ".", "--fail", "2"),
        ("serve", ".", "--rate", "0"),
        ("serve", ".", "--port", "99999"),
        ("serve", ".", "--host", "256.256.256.256"),
        ("demo", "--url", "model.safetensors"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_2_and_says_what_is_wrong(arguments: tuple[str, ...], capsys: Capture) -> None:
    assert usage(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err
    assert "Traceback" not in err


def test_a_path_without_an_endpoint_is_told_from_a_url(capsys: Capture) -> None:
    assert main(["pull", "cdn.example.com/model.safetensors"]) == 2
    assert "'cdn.example.com/model.safetensors' is no URL (http://, https://)" in capsys.readouterr().err


def test_a_port_in_use_is_told(origin: StartOrigin, tmp_path: Path, capsys: Capture) -> None:
    assert usage("serve", tmp_path, "--port", origin().port) == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_help_and_version_are_given(capsys: Capture) -> None:
    for arguments in ("-h", "inspect -h", "pull -h", "serve -h", "cache -h", "cache prune -h", "demo -h", "--version"):
        assert usage(*arguments.split()) == 0
        out, err = capsys.readouterr()
        assert out.startswith(("usage: holotensor-net", "holotensor-net "))
        assert err == ""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and says nothing; gives its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_server() -> str:
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


FAULTS: dict[str, tuple[str, type[errors.NetworkError], int, str]] = {
    "nothing there": ("{origin}/no.safetensors", errors.NotFound, 4, "no such object: check the path"),
    "no endpoint": ("no.safetensors", errors.NotFound, 4, "neither a URL (http://, https://) nor a file that exists"),
    "wrong scheme": ("ftp://example.com/x", errors.InvalidUrl, 2, "a URL must begin with http:// or https://"),
    "dead endpoint": (
        "{dead}/x.safetensors",
        errors.RetriesExhausted,
        5,
        "gave up after 4 attempts; the last one: Connection refused: check host and port, and whether the server runs",
    ),
    "locked": ("{locked}/m.safetensors", errors.HttpError, 7, "check the credentials (auth=, or HOLOTENSOR_TOKEN with"),
    "text": ("{origin}/text.safetensors", errors.FormatError, 1, "text: is the URL the raw file?"),
    "HTML": ("{origin}/html.safetensors", errors.FormatError, 1, "HTML: is the URL the raw file?"),
    "empty": ("{origin}/empty.safetensors", errors.FormatError, 1, "it is empty"),
    "cut short": ("{origin}/cut.safetensors", errors.FormatError, 1, "the file is cut short"),
    "cut in the header": ("{origin}/stub.safetensors", errors.FormatError, 1, "it is cut short"),
    "index of nothing": (
        "{origin}/bad.safetensors.index.json",
        errors.FormatError,
        1,
        "an index must have a weight_map",
    ),
    "index to elsewhere": ("{origin}/far.safetensors.index.json", errors.FormatError, 1, "must be a bare file name"),
    "shard is missing": ("{origin}/one.safetensors.index.json", errors.NotFound, 4, "no such object: check the path"),
}


@pytest.fixture
def places(origin: StartOrigin, tmp_path: Path, dead_server: str) -> dict[str, str]:
    whole = write(tmp_path / "m.safetensors", llama(side=256)).read_bytes()
    (tmp_path / "text.safetensors").write_text("Invalid username or password.")
    (tmp_path / "html.safetensors").write_text("<html>" + "." * 99_999)
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "stub.safetensors").write_bytes(whole[:99])
    (tmp_path / "bad.safetensors.index.json").write_text("{}")
    (tmp_path / "far.safetensors.index.json").write_text('{"weight_map": {"a": "http://example.com/x"}}')
    (tmp_path / "one.safetensors.index.json").write_text('{"weight_map": {"a": "no.safetensors"}}')
    locked = origin(behaviour=Behaviour(require_auth="Bearer s3cret"))
    return {"origin": origin().url, "locked": locked.url, "dead": dead_server}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_error_its_exit_code_and_a_sentence_that_helps(
    fault: str, places: dict[str, str], capsys: Capture
) -> None:
    where, kind, code, sentence = FAULTS[fault]
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        open_model(where.format(**places))
    assert type(caught.value) is kind
    assert main(["inspect", where.format(**places)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    (line,) = err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize("fault", ["nothing there", "dead endpoint", "locked", "index of nothing", "shard is missing"])
def test_pull_fails_as_inspect_does(fault: str, places: dict[str, str], capsys: Capture) -> None:
    where, _, code, sentence = FAULTS[fault]
    assert main(["pull", where.format(**places)]) == code
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_server_that_says_nothing_is_a_timeout(silent_server: str, capsys: Capture) -> None:
    assert main(["pull", f"{silent_server}/m.safetensors", "--timeout", "0.1"]) == 3
    assert "the server did not answer in time" in capsys.readouterr().err


# --- inspect


@pytest.mark.parametrize("is_local", [True, False])
def test_inspect_lists_the_tensors(origin: StartOrigin, tmp_path: Path, capsys: Capture, is_local: bool) -> None:
    tensors = {**LLAMA, "scalar": np.array(1.0)}
    file = write(tmp_path / "m.safetensors", tensors, {"format": "pt"})
    url = str(file) if is_local else f"{origin().url}/m.safetensors"
    assert main(["inspect", url]) == 0
    out, err = capsys.readouterr()
    *rows, total = out.splitlines()
    assert err == ""
    assert len(rows) == len(tensors)
    assert total == f"{len(tensors)} tensors, {sum(array.nbytes for array in tensors.values()):,} bytes"
    assert re.search(r"^model\.embed_tokens\.weight +F32 +64×64 +16,384  CRITICAL$", out, re.M)
    assert re.search(r"^scalar +F64 +scalar +8  \w+$", out, re.M)
    found = result(capsys, "inspect", url)
    assert (found["tensors"], found["metadata"]) == (len(tensors), {"format": "pt"})
    row = next(row for row in found["list"] if row["name"] == "lm_head.weight")
    assert row | {"importance": 0} == {
        "name": "lm_head.weight",
        "dtype": "F32",
        "shape": [64, 64],
        "bytes": 16384,
        "priority": "CRITICAL",
        "importance": 0,
    }


def test_inspect_shows_what_matches(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "m.safetensors", LLAMA)
    found = result(capsys, "inspect", file, "--include", "*norm*", "--include", "lm_head.*")
    assert {row["name"] for row in found["list"]} == {name for name in LLAMA if "norm" in name} | {"lm_head.weight"}
    assert main(["inspect", str(file), "--include", "nothing"]) == 0
    assert capsys.readouterr().out == "0 tensors, 0 bytes\n"


HOSTILE = "\x1b[2J\x9b31m\r\n\u202ename"


def test_names_do_not_steer_the_terminal(origin: StartOrigin, tmp_path: Path, capsys: Capture) -> None:
    header = json.dumps({HOSTILE: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    url = f"{origin().url}/m.safetensors"
    assert main(["inspect", url]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J\x9b31m\r\n\u202ename" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert result(capsys, "inspect", url)["list"][0]["name"] == HOSTILE
    with open_model(url) as model:
        list(model.stream())
    for command in (["cache", "ls"], ["cache", "verify"], ["cache", "ls", "--json"]):
        assert main(command) == 0
        assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)


def test_errors_do_not_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", f"no{HOSTILE}such.safetensors"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


# --- pull


def test_an_interrupt_as_a_file_comes_to_its_place_is_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted_replace(source: str, target: Path) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted_replace)
    with pytest.raises(KeyboardInterrupt):
        cli._write(tmp_path / "file", memoryview(b"all of it"))
    assert os.listdir(tmp_path) == ["file"]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def sharded(origin: StartOrigin, tmp_path: Path) -> tuple[Origin, str, Path]:
    """An origin, the URL of an index on it, and the folder of the files."""
    write_index(tmp_path / "www", LLAMA)
    server = origin(tmp_path / "www")
    return server, f"{server.url}/model.safetensors.index.json", tmp_path / "www"


def test_pull_brings_index_and_shards(sharded: tuple[Origin, str, Path], tmp_path: Path, capsys: Capture) -> None:
    server, url, folder = sharded
    out = tmp_path / "out" / "deep"
    assert main(["pull", url, "--to", str(out)]) == 0
    said, progress = capsys.readouterr()
    assert digests(out) == digests(folder)
    assert {line.split()[0] for line in said.splitlines()} == {file.name for file in folder.iterdir()}
    assert "was cached" not in said
    assert str(out) in said
    assert re.fullmatch(r"pull: ([0-9.]+) of \1 MB \(100%\)\n", progress)
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~umask}
    server.reset_stats()
    again = result(capsys, "pull", url)
    assert server.stats().body_bytes == 0
    assert {row["file"] for row in again} == {file.name for file in folder.iterdir()}
    assert all(row["from_cache"] and row["to"] is None for row in again)
    assert main(["pull", url]) == 0
    assert capsys.readouterr().out.count("in the cache  (was cached)") == 4


def test_pull_takes_the_model_of_a_folder(
    sharded: tuple[Origin, str, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, folder = sharded
    write(folder / "one" / "model.safetensors", LLAMA)
    (folder / "none").mkdir()
    assert main(["pull", f"{server.url}/?token=1", "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(folder)
    assert main(["pull", f"{server.url}/one/", "--to", str(tmp_path / "single")]) == 0
    assert digests(tmp_path / "single") == digests(folder / "one")
    assert main(["pull", f"{server.url}/none/"]) == 4
    assert "no such object: check the path" in capsys.readouterr().err
    monkeypatch.setenv("HOLOTENSOR_OFFLINE", "1")
    assert main(["pull", f"{server.url}/one/"]) == 0


def test_pull_takes_what_matches(sharded: tuple[Origin, str, Path], tmp_path: Path, capsys: Capture) -> None:
    _, url, folder = sharded
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    for pattern in ("lm_head.*", placed):
        out = tmp_path / pattern.replace("*", "_")
        assert main(["pull", url, "--to", str(out), "--include", pattern]) == 0
        assert set(digests(out)) == {"model.safetensors.index.json", placed}
    capsys.readouterr()
    assert main(["pull", url, "--include", "nothing"]) == 4
    assert "matches --include" in capsys.readouterr().err


def test_pull_takes_any_file_and_any_query(origin: StartOrigin, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    server = origin()
    rows = result(capsys, "pull", f"{server.url}/tokenizer.json?sig=S3CRET/x", "--to", tmp_path / "out")
    assert [row["file"] for row in rows] == ["tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert all(record.path == "/tokenizer.json?sig=S3CRET/x" for record in server.requests())
    assert "S3CRET" not in json.dumps(result(capsys, "cache", "ls"))


def test_pull_sends_the_query_for_the_shards_too(sharded: tuple[Origin, str, Path], tmp_path: Path) -> None:
    server, url, folder = sharded
    assert main(["pull", f"{url}?token=1", "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(folder)
    assert all(record.path.endswith("?token=1") for record in server.requests())


def test_pull_knows_the_endpoint_of_the_environment(
    sharded: tuple[Origin, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, folder = sharded
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", server.url)
    assert main(["pull", "model.safetensors.index.json", "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(folder)


def test_pull_needs_no_head(tmp_path: Path, capsys: Capture) -> None:
    # what is signed for GET is refused to HEAD
    write(tmp_path / "m.safetensors", LLAMA)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            assert main(["pull", f"http://127.0.0.1:{server.server_port}/m.safetensors", "--to", f"{tmp_path}/o"]) == 0
        finally:
            server.shutdown()
            thread.join()
    assert (tmp_path / "o" / "m.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert re.fullmatch(r"pull: [0-9.]+ MB\n", capsys.readouterr().err)


def test_pull_keeps_to_a_bandwidth(origin: StartOrigin, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(600_000))
    began = time.monotonic()
    assert main(["pull", f"{origin().url}/x", "--max-bandwidth", "1MB"]) == 0
    assert 0.35 < time.monotonic() - began < 5


def test_pull_offline_gives_what_is_cached(
    sharded: tuple[Origin, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    server, url, folder = sharded
    assert main(["pull", url]) == 0
    server.close()
    monkeypatch.setenv("HOLOTENSOR_OFFLINE", "1")
    assert main(["pull", url, "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(folder)
    capsys.readouterr()
    assert main(["pull", f"{server.url}/other.safetensors"]) == 5
    assert "is not in the cache" in capsys.readouterr().err


def test_a_file_that_stands_there_is_replaced_whole(origin: StartOrigin, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"old and longer")
    assert main(["pull", f"{origin().url}/x", "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "x").read_bytes() == b"new"


def test_a_target_that_cannot_be_written_is_6(origin: StartOrigin, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "x").write_bytes(b"new")
    (tmp_path / "out" / "x").mkdir(parents=True)
    for target in (tmp_path / "x", tmp_path / "x" / "y", tmp_path / "out"):  # a file; below a file; a folder in the way
        assert main(["pull", f"{origin().url}/x", "--to", str(target)]) == 6
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith("error: cannot write ")
        assert "name another folder (--to)" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may mount a small disk; a limit on the size of files has to do, see below")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def big(origin: StartOrigin, tmp_path: Path) -> tuple[str, dict[str, Array]]:
    """The URL and the tensors of a model of which each, but for the norms, is larger than a small disk."""
    tensors = llama(blocks=2, side=300)
    write(tmp_path / "www" / "m.safetensors", tensors)
    return f"{origin(tmp_path / 'www').url}/m.safetensors", tensors


def test_a_full_disk_is_6_and_leaves_no_litter(
    big: tuple[str, dict[str, Array]], small_disk: Path, capsys: Capture
) -> None:
    assert main(["pull", big[0], "--to", str(small_disk)]) == 6
    assert "free some space, or name another folder (--to)" in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []


def test_a_full_cache_disk_costs_a_warning_and_no_bytes(
    big: tuple[str, dict[str, Array]],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url, tensors = big
    monkeypatch.setenv("HOLOTENSOR_CACHE", str(small_disk))
    with open_model(url) as model:
        arrays = dict(model.stream())
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }
    assert "free some space" in caplog.text
    assert main(["pull", url, "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == (tmp_path / "www" / "m.safetensors").read_bytes()


def test_files_that_may_not_grow_are_a_full_disk(big: tuple[str, dict[str, Array]], tmp_path: Path) -> None:
    cached = run(sys.executable, "-c", LIMITED, "pull", big[0])
    assert cached.returncode == 0
    assert "WARNING: " in cached.stderr
    assert "HOLOTENSOR_CACHE" in cached.stderr
    copied = run(sys.executable, "-c", LIMITED, "pull", big[0], "--to", tmp_path / "out")
    assert copied.returncode == 6
    assert copied.stderr.splitlines()[-1].startswith("error: no room for ")
    assert list((tmp_path / "out").iterdir()) == []


KILLED = """
import os, resource, signal, sys
from pathlib import Path
from holotensor_net.interfaces import cli
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would go on
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
cli._write(Path(sys.argv[1]), memoryview(bytes(2 << 20)))
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="every file has a name")
def test_a_process_that_is_killed_leaves_no_litter_beside_its_target(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"every file of this file system has a name ({error.strerror})")
    assert run(sys.executable, "-c", KILLED, tmp_path / "out" / "file").returncode == -signal.SIGXFSZ
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("has_nameless", [True, False])
def test_a_file_comes_to_its_place_with_or_without_a_name_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_nameless: bool
) -> None:
    if not has_nameless:
        monkeypatch.setattr(cli, "_nameless", lambda folder: None)
    umask = os.umask(0)
    os.umask(umask)
    for content in (b"one", b"another"):
        cli._write(tmp_path / "file", memoryview(content))
        assert (tmp_path / "file").read_bytes() == content
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
        assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.CacheError, match="cannot write"):
        cli._write(tmp_path / "folder", memoryview(b"in the way"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


# --- serve


def test_serve_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("content")
    with process(*CLI, "serve", tmp_path, "--port", 0, "--latency", "0.01", "--rate", "400Mbit") as child:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/x", timeout=5) as answer:
            assert answer.read() == b"content"
        _, err = interrupted(child)
    assert child.returncode in (0, 130)
    assert "Traceback" not in err


def test_serve_needs_a_folder(tmp_path: Path, capsys: Capture) -> None:
    assert main(["serve", str(tmp_path / "no")]) == 4
    assert "there is no folder" in capsys.readouterr().err


# --- the cache


def test_cache_path_is_where_the_environment_says(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLOTENSOR_CACHE", str(tmp_path / "here"))
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/here\n"
    assert result(capsys, "cache", "path") == {"path": f"{tmp_path}/here"}


def test_an_empty_cache_is_empty(capsys: Capture) -> None:
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out == "0 entries, 0 bytes\n"
    assert result(capsys, "cache", "ls") == []
    assert result(capsys, "cache", "verify") == {"damaged": []}
    assert result(capsys, "cache", "prune", "0") == {"freed": 0}
    assert result(capsys, "cache", "clear") == {"freed": 0}


@pytest.fixture
def filled(tmp_cache: Path) -> Path:
    """A cache folder with three entries of 1000 bytes, of which two have the same bytes."""
    with FragmentCache(NetworkConfig().cache) as cache:
        for number, letter in enumerate("aab"):
            entry = CacheEntry(f"fragment-{number}", 1000, url=f"http://h/{number}", cached_at=1.0 + number)
            cache.put(f"key-{number}", letter.encode() * 1000, entry)
    return tmp_cache


def test_cache_ls_lists_what_it_holds(filled: Path, capsys: Capture) -> None:
    assert main(["cache", "ls"]) == 0
    *rows, total = capsys.readouterr().out.splitlines()
    assert {row.split()[-1] for row in rows} == {"http://h/0", "http://h/1", "http://h/2"}
    assert total == "3 entries, 3,000 bytes"
    listed = result(capsys, "cache", "ls")
    assert {row["fragment"] for row in listed} == {"fragment-0", "fragment-1", "fragment-2"}
    assert [row["last_accessed"] for row in listed] == sorted((row["last_accessed"] for row in listed), reverse=True)


def test_cache_ls_tells_ranges(origin: StartOrigin, tmp_path: Path, capsys: Capture) -> None:
    write(tmp_path / "m.safetensors", llama(side=192))
    url = f"{origin().url}/m.safetensors"
    with open_model(url) as model:
        model.get_tensor("lm_head.weight")
    assert main(["cache", "ls"]) == 0
    assert re.search(rf"^ +65,536  {re.escape(url)}\[0:65536\]$", capsys.readouterr().out, re.M)
    assert [0, 65536] in [row["range"] for row in result(capsys, "cache", "ls")]


def test_cache_prune_and_clear_tell_what_was_freed(filled: Path, capsys: Capture) -> None:
    assert main(["cache", "prune", "1KB"]) == 0
    assert capsys.readouterr().out == "freed 1,000 bytes\n"
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "freed 1,000 bytes\n"
    assert result(capsys, "cache", "ls") == []


def test_cache_clear_counts_what_lay_on_the_disk(filled: Path, capsys: Capture) -> None:
    assert result(capsys, "cache", "clear") == {"freed": 2000}


def test_cache_verify_finds_damage(filled: Path, capsys: Capture) -> None:
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out == "0 damaged\n"
    for blob in (path for path in (filled / "blobs").rglob("*") if path.is_file()):
        if blob.read_bytes().startswith(b"b"):
            blob.chmod(0o600)
            blob.write_bytes(b"x" * 1000)
    assert main(["cache", "verify"]) == 8
    out, err = capsys.readouterr()
    assert out == "fragment-2\n1 damaged\n"
    assert "they will be fetched again" in err
    assert result(capsys, "cache", "verify") == {"damaged": []}


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_bytes(
    sharded: tuple[Origin, str, Path],
    tmp_path: Path,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, url, folder = sharded
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HOLOTENSOR_CACHE", str(tmp_path / "file"))
    assert main(["pull", url, "--to", str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(folder)
    assert (
        "make sure that it is a folder that may be read and written, or set another (HOLOTENSOR_CACHE)" in caplog.text
    )
    for command in ("ls", "verify", "clear", "prune 0"):
        assert main(["cache", *command.split()]) == 0


# --- progress, logs, terminals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_only_there(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(2_000_000))
    for err in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", err)
        assert main(["pull", f"{origin().url}/x"]) == 0
        assert ("\r" in err.getvalue()) == err.isatty()
        assert "100%" in err.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_can_be_turned_off(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    (tmp_path / "x").write_bytes(bytes(2_000_000))
    err = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("HOLOTENSOR_DISABLE_PROGRESS_BARS", "1")
    assert main(["pull", f"{origin().url}/x"]) == 0
    assert err.getvalue() == ""


def test_verbosity_is_ours_alone_and_tells_no_secret(origin: StartOrigin, tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", llama(side=192))
    url = f"{origin(behaviour=Behaviour(ignore_range=True)).url}/m.safetensors?sig=S3CRET"
    warned = run(*CLI, "inspect", url, HOLOTENSOR_VERBOSITY="DEBUG")
    assert warned.returncode == 0
    assert "WARNING: " in warned.stderr
    assert "the server sends no ranges" in warned.stderr
    assert "S3CRET" not in warned.stderr
    quiet = run(*CLI, "inspect", url, HOLOTENSOR_VERBOSITY="ERROR")
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_a_terminal_that_knows_no_letters_is_no_reason_to_stop(tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", {"тензор": np.zeros((2, 2))})
    done = run(*CLI, "inspect", file, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u0442\u0435" in done.stdout


@pytest.mark.parametrize("command", ["cache path", "inspect", "inspect --json", "serve --port=0"])
def test_whoever_reads_the_output_may_leave(tmp_path: Path, command: str) -> None:
    file = write(tmp_path / "m.safetensors", {f"layer.{number}": np.zeros(1) for number in range(3000)})
    read_end, write_end = os.pipe()
    os.close(read_end)
    arguments = command.replace("inspect", f"inspect {file}").replace("serve", f"serve {tmp_path}").split()
    done = subprocess.run(
        [*CLI, *arguments],
        stdout=write_end,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # the end of the output is noticed at the end
        check=False,
        timeout=30,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_pipe_that_breaks_is_no_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        """Fail."""
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_cache_path", fail)
        patch.setattr(os, "dup2", lambda *descriptors: os.close(descriptors[0]))
        assert main(["cache", "path"]) == 141
    assert capfd.readouterr().err == ""


# --- interruptions


def test_an_interrupted_pull_ends_at_once_in_one_line(origin: StartOrigin, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "x").write_bytes(bytes(50_000_000))
    server = origin(tmp_path / "www", behaviour=Behaviour(rate=5e6))
    with process(*CLI, "pull", f"{server.url}/x", "--to", tmp_path / "out") as child:
        eventually(lambda: server.stats().body_bytes > 1_000_000, "the transfer begins")
        out, err = interrupted(child)
    assert (child.returncode, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_an_interruption_within_a_call_is_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "_cache_path", interrupted)
    interrupted.__doc__ = "Wait."
    began = time.monotonic()
    assert main(["cache", "path"]) == 130
    assert time.monotonic() - began < 1
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


SLOW_TO_END = """
import sys, time
from holotensor_net.interfaces import cli
def run(arguments):
    "Wait."
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        time.sleep(30)
cli._cache_path = run
sys.exit(cli.main(["cache", "path"]))
"""


def test_cleaning_up_that_takes_too_long_is_cut_short() -> None:
    with process(sys.executable, "-c", SLOW_TO_END) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        _, err = interrupted(child)
    assert (child.returncode, err) == (130, "interrupted\n")


def test_the_command_runs_in_any_thread(capsys: Capture) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["cache", "path"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_the_module_is_the_command(tmp_cache: Path) -> None:
    done = run(*CLI, "cache", "path")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_cache}\n", "")


def test_other_failures_of_the_system_are_6(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(arguments: object) -> None:
        """Fail."""
        raise PermissionError(13, "Permission denied", "/there")

    monkeypatch.setattr(cli, "_cache_path", fail)
    assert main(["cache", "path"]) == 6
    assert capsys.readouterr().err == "error: Permission denied: /there\n"


def test_sizes_come_from_the_loader(origin: StartOrigin, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with NetworkLoader(NetworkConfig.custom_cdn(origin().url)) as loader:
        assert cli._size_of(loader, "x") == 5
        assert cli._size_of(loader, "no") is None
