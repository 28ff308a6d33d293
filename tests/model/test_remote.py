from __future__ import annotations

import functools
import http.server
import json
import logging
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Array, assert_equal, assert_same, every_kind, llama, read, write, write_index

from holotensor_net import open_model
from holotensor_net.config import CdnEndpoint, NetworkConfig
from holotensor_net.errors import (
    Cancelled,
    ConfigurationError,
    FormatError,
    NetworkError,
    NotFound,
    ObjectChanged,
    OfflineError,
)
from holotensor_net.model.remote import LoadReport, RemoteModel
from holotensor_net.origin import Behaviour, Origin
from holotensor_net.values import Priority

StartOrigin = Callable[..., Origin]

LLAMA = llama()
SIDE = 192  # of a tensor of 144 KiB, which does not come with the header


@pytest.fixture
def large() -> dict[str, Array]:
    return llama(blocks=2, side=SIDE)


def served(start: StartOrigin, folder: Path, tensors: dict[str, Array], **options: Any) -> tuple[Origin, str]:
    """An origin with one model in one file; gives the file's URL too."""
    write(folder / "model.safetensors", tensors)
    server = start(folder, **options)
    return server, f"{server.url}/model.safetensors"


# --- opening


def test_opening_reads_the_header_and_no_tensor(origin: StartOrigin, tmp_path: Path, large: dict[str, Array]) -> None:
    server, url = served(origin, tmp_path, large)
    with open_model(url) as model:
        assert model.keys() == list(read(tmp_path / "model.safetensors"))
    assert server.stats().requests == 1
    assert server.stats().body_bytes == 65536


def test_a_longer_header_takes_a_second_request(origin: StartOrigin, tmp_path: Path) -> None:
    tensors = {f"layer.{number}.{'x' * 40}": np.array(number) for number in range(1000)}
    server, url = served(origin, tmp_path, tensors)
    assert struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])[0] > 65536
    with open_model(url) as model:
        assert server.stats().requests == 2
        assert_same(dict(model.stream()), tensors)


def test_a_model_tells_what_it_holds(origin: StartOrigin, tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", LLAMA, {"format": "pt"})
    with open_model(f"{origin().url}/m.safetensors") as model:
        assert isinstance(model, RemoteModel)
        assert model.metadata() == {"format": "pt"}
        assert set(model) == set(model.keys()) == LLAMA.keys()
        assert len(model) == len(LLAMA)
        assert "model.norm.weight" in model
        assert "model.norm" not in model
        assert model.nbytes == sum(array.nbytes for array in LLAMA.values())
        assert repr(model) == f"<RemoteModel: {len(LLAMA)} tensors, {model.nbytes} bytes>"
        info = model.info("model.embed_tokens.weight")
        assert (info.dtype, info.shape, info.nbytes) == ("F32", (64, 64), 16384)
        part = model.get_slice("model.embed_tokens.weight")
        assert (part.get_shape(), part.get_dtype()) == ([64, 64], "F32")
        model.metadata().clear()
        model.keys().clear()
        assert model.metadata()
        assert model.keys()


def test_an_unknown_name_is_a_key_error_that_names_what_comes_near(tmp_path: Path) -> None:
    with open_model(write(tmp_path / "m.safetensors", LLAMA)) as model:
        for ask in (model.info, model.get_tensor, model.get_slice):
            with pytest.raises(KeyError, match=r"no tensor 'model\.norm\.wieght': did you mean model\.norm\.weight"):
                ask("model.norm.wieght")
        with pytest.raises(KeyError, match=r"no tensor '¿'\"?$"):
            model.info("¿")


def test_a_tensor_may_have_any_name(origin: StartOrigin, tmp_path: Path) -> None:
    names = [
        "",
        " ",
        "a b",
        "a\tb\n",
        "..",
        "../x",
        "/",
        "?a=b#c",
        "*[x]?",
        "%s{0}",
        "\u202e",
        "ünï/日本語😀",
        "x" * 1000,
    ]
    tensors = {name: np.full((SIDE, SIDE), number, np.float32) for number, name in enumerate(names)}
    _, url = served(origin, tmp_path, tensors)
    for _ in range(2):  # from the server, and from the cache
        with open_model(url) as model:
            assert_same(dict(model.stream()), tensors)
            for name, tensor in tensors.items():
                assert_equal(model.get_tensor(name), tensor)
                assert_equal(model.get_slice(name)[1:2], tensor[1:2])


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", ""])
@pytest.mark.parametrize("is_local", [True, False])
def test_files_indices_and_folders_open(origin: StartOrigin, tmp_path: Path, name: str, is_local: bool) -> None:
    folder = tmp_path / "llama"
    if name.endswith(".json"):
        write_index(folder, LLAMA, made_by="nobody")
    else:
        write(folder / "model.safetensors", LLAMA, {"made_by": "nobody"})
    where = str(folder / name) if is_local else f"{origin().url}/llama/{name}"
    with open_model(where) as model:
        assert model.metadata() == {"made_by": "nobody"}
        assert_same(dict(model.stream()), LLAMA)
        assert_equal(model.get_tensor("model.norm.weight"), LLAMA["model.norm.weight"])


def test_a_folder_with_an_index_opens_by_it(origin: StartOrigin, tmp_path: Path) -> None:
    write_index(tmp_path, LLAMA)
    write(tmp_path / "model.safetensors", {"other": np.zeros(1)})
    with open_model(f"{origin().url}/") as model:
        assert set(model) == LLAMA.keys()


def test_a_folder_with_nothing_to_open_is_not_found(origin: StartOrigin, tmp_path: Path) -> None:
    for where in (f"{origin().url}/", tmp_path):
        with pytest.raises(
            NotFound, match=r"neither model\.safetensors\.index\.json nor model\.safetensors: name the file"
        ):
            open_model(where)


def test_a_folder_that_lacks_a_shard_says_which(origin: StartOrigin, tmp_path: Path) -> None:
    write_index(tmp_path, LLAMA)
    lost = sorted(tmp_path.glob("*.safetensors"))[-1]
    lost.unlink()
    for where in (f"{origin().url}/", tmp_path):
        with pytest.raises(NotFound, match=re.escape(lost.name)):
            open_model(where)


@pytest.mark.parametrize("is_sharded", [True, False])
@pytest.mark.parametrize("refusal", ["404 Not Found", "403 Forbidden", "200 OK"])
def test_a_folder_needs_no_slash(tmp_path: Path, refusal: str, is_sharded: bool) -> None:
    """Servers are of several minds about what to say of a folder that is asked for like a file."""
    if is_sharded:
        write_index(tmp_path / "llama-3.1", LLAMA)
    else:
        write(tmp_path / "llama-3.1" / "model.safetensors", LLAMA)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.partition("?")[0].endswith("llama-3.1"):
                super().do_GET()
                return
            status, text = refusal.split(" ", 1)
            self.send_response(int(status), text)
            self.send_header("Content-Length", "17")
            self.end_headers()
            self.wfile.write(b"<html>llama</html"[:17])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            for query in ("", "?signature=1"):
                with open_model(f"{url}/llama-3.1{query}") as model:
                    assert_same(dict(model.stream()), LLAMA)
            with open_model(f"{url}/llama-3.1", config=NetworkConfig(offline=True)) as model:
                assert set(model) == LLAMA.keys()
            (tmp_path / "text").write_text("Invalid username or password.")
            with pytest.raises(FormatError, match="this looks like text"):
                open_model(f"{url}/text")
            with pytest.raises(NotFound, match=r"check the path .*/nothing, "):
                open_model(f"{url}/nothing")
        finally:
            server.shutdown()


def test_an_index_may_be_long(origin: StartOrigin, tmp_path: Path) -> None:
    tensors = {f"layer.{number}.{'x' * 60}": np.array(number) for number in range(1000)}
    index = write_index(tmp_path, tensors)
    assert index.stat().st_size > 65536
    with open_model(f"{origin().url}/model.safetensors.index.json") as model:
        assert_same(dict(model.stream()), tensors)


def test_an_index_that_is_no_index_is_not_read_to_its_end(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate((100 << 20) + 1)
    server = origin()
    with pytest.raises(FormatError, match="at most are read"):
        open_model(f"{server.url}/huge.json")
    assert server.stats().body_bytes == 65536


@pytest.mark.parametrize("size", [4, 300, 100_000])
def test_a_file_that_was_cut_short_is_known_when_it_is_opened(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array], size: int
) -> None:
    file = write(tmp_path / "model.safetensors", large)
    os.truncate(file, size)
    for where in (f"{origin().url}/model.safetensors", file):
        with pytest.raises(FormatError):
            open_model(where)


def test_a_text_is_told_for_what_it_is(origin: StartOrigin, tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html><body>Sign in</body></html>" + " " * 70_000)
    with pytest.raises(FormatError, match=r"looks like HTML: is the URL the raw file\?"):
        open_model(f"{origin().url}/page.safetensors")


def test_an_opening_that_fails_leaves_nothing_running(origin: StartOrigin) -> None:
    with pytest.raises(NotFound):
        open_model(f"{origin().url}/no.safetensors")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("holotensor")]


# --- addresses, credentials


def test_a_query_is_sent_for_every_file_and_kept_nowhere(origin: StartOrigin, tmp_path: Path, tmp_cache: Path) -> None:
    write_index(tmp_path / "www", LLAMA)
    server = origin(tmp_path / "www")
    for name in ("model.safetensors.index.json", ""):
        with open_model(f"{server.url}/{name}?sig=S3CRET/x") as model:
            assert_same(dict(model.stream()), LLAMA)
    assert {record.path.partition("?")[2] for record in server.requests()} == {"sig=S3CRET/x"}
    kept = [path for path in tmp_cache.rglob("*") if path.is_file()]
    assert len(kept) > len(LLAMA) // 2
    assert not [path for path in kept if b"S3CRET" in path.read_bytes() or "S3CRET" in path.name]


def test_a_path_is_looked_up_below_the_configured_endpoint(origin: StartOrigin, tmp_path: Path) -> None:
    write_index(tmp_path / "models" / "llama", LLAMA)
    config = NetworkConfig.custom_cdn(f"{origin().url}/models")
    for where in ("llama/model.safetensors.index.json", "llama/", f"{config.endpoints[0].url}/llama/"):
        with open_model(where, config=config) as model:
            assert set(model) == LLAMA.keys()


def test_credentials_reach_their_endpoint_and_no_other(origin: StartOrigin, tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", LLAMA)
    own, other = origin(behaviour=Behaviour(require_auth="Bearer token")), origin()
    config = NetworkConfig(endpoints=(CdnEndpoint(own.url, auth="token", headers={"X-Api-Key": "key"}),))
    for where in ("m.safetensors", f"{own.url}/m.safetensors", f"{other.url}/m.safetensors"):
        with open_model(where, config=config) as model:
            assert_same(dict(model.stream()), LLAMA)
    assert all(record.headers["x-api-key"] == "key" for record in own.requests())
    sent = [record.headers for record in other.requests()]
    assert sent
    assert not any("authorization" in headers or "x-api-key" in headers for headers in sent)


def test_endpoint_and_token_come_from_the_environment(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.safetensors", LLAMA)
    own, other = origin(behaviour=Behaviour(require_auth="Bearer token")), origin()
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", own.url)
    monkeypatch.setenv("HOLOTENSOR_TOKEN", "token")
    for where in ("m.safetensors", f"{own.url}/m.safetensors", f"{other.url}/m.safetensors"):
        with open_model(where) as model:
            assert_same(dict(model.stream()), LLAMA)
    assert not any("authorization" in record.headers for record in other.requests())


# --- streaming


@pytest.mark.parametrize("is_sharded", [False, True])
def test_every_dtype_and_shape_arrives_as_it_was_saved(origin: StartOrigin, tmp_path: Path, is_sharded: bool) -> None:
    tensors = every_kind()
    name = write_index(tmp_path, tensors).name if is_sharded else write(tmp_path / "m.safetensors", tensors).name
    with open_model(f"{origin().url}/{name}") as model:
        assert_same(dict(model.stream()), tensors)
        assert_same({name: model.get_tensor(name) for name in model}, tensors)
    with open_model(tmp_path / name) as model:
        assert_same(dict(model.stream()), tensors)


def test_arrays_cannot_be_written_to_and_outlive_the_model(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array]
) -> None:
    _, url = served(origin, tmp_path, large)
    for where in (url, str(tmp_path / "model.safetensors")):
        with open_model(where) as model:
            arrays = dict(model.stream())
        for array in arrays.values():
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        assert_same(arrays, large)


def names_of(model: RemoteModel, *arguments: Any, **options: Any) -> list[str]:
    return [name for name, _ in model.stream(*arguments, **options)]


@pytest.mark.parametrize("is_local", [True, False])
def test_order_of_the_file_and_of_the_layers_is_strict(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array], is_local: bool
) -> None:
    _, url = served(origin, tmp_path, large, behaviour=Behaviour(rate_per_connection=2e6))
    config = NetworkConfig(chunk_size=16384, cache_dir=False)  # tensors end out of order, as their pieces do
    with open_model(tmp_path / "model.safetensors" if is_local else url, config=config) as model:
        assert names_of(model, "file") == list(read(tmp_path / "model.safetensors"))
        layers = names_of(model, order="layer")
    assert layers[0] == "model.embed_tokens.weight"
    assert layers[-1] == "lm_head.weight"
    blocks = [name.split(".")[2] for name in layers if ".layers." in name]
    assert blocks == sorted(blocks)
    assert set(layers) == large.keys()


@pytest.mark.parametrize(
    "order",
    [
        lambda name: 1.0 if "down_proj" in name else 0.0,
        {"*down_proj*": 1.0, "*": 0.0},
        {"*.0.*down_proj*": Priority.CRITICAL, "*.1.*down_proj*": (Priority.CRITICAL, 0.3), "*": Priority.IDLE},
    ],
)
def test_the_caller_decides_what_comes_first(tmp_path: Path, order: Any) -> None:
    with open_model(write(tmp_path / "m.safetensors", llama(blocks=2))) as model:
        assert set(names_of(model, order)[:2]) == {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1)}


def test_by_default_what_matters_comes_first(origin: StartOrigin, tmp_path: Path) -> None:
    tensors = llama(blocks=12, side=SIDE)
    _, url = served(origin, tmp_path, tensors, behaviour=Behaviour(rate=20e6))
    with open_model(url) as model:
        names = names_of(model)
    last = max(names.index(name) for name in names if "norm" in name or "embed" in name or name.startswith("lm_head"))
    assert last < len(names) * 0.8
    assert names.index("model.layers.6.mlp.up_proj.weight") > names.index("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, sorted(LLAMA)),
        ("model.norm.*", None, ["model.norm.weight"]),
        (["model.norm.*", "lm_*"], None, ["lm_head.weight", "model.norm.weight"]),
        ("*.0.*", "*proj*", ["model.layers.0.input_layernorm.weight"]),
        (None, ["*layers*", "*norm*"], ["lm_head.weight", "model.embed_tokens.weight"]),
        ("MODEL.*", None, []),
        ([], None, []),
    ],
)
def test_patterns_select(tmp_path: Path, include: Any, exclude: Any, expected: list[str]) -> None:
    file = write(tmp_path / "m.safetensors", LLAMA)
    with open_model(file) as model:
        assert sorted(names_of(model, include=include, exclude=exclude)) == expected
        assert model.explain(include=include, exclude=exclude).bytes == sum(LLAMA[name].nbytes for name in expected)
    with open_model(file, include=include, exclude=exclude) as model:
        assert sorted(model) == sorted(names_of(model)) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"order": "nonsense"}, "order must be 'importance', 'layer', 'file', a function or a mapping, not 'nonsense'"),
        ({"order": 7}, "order must be"),
        ({"quality": 1.5}, "quality must be a relative error from 0 to 1, not 1.5"),
        ({"until": -0.1}, "until must be"),
        ({"order": {"*": 2}}, "must be a number from 0 to 1"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_fetched(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with open_model(write(tmp_path / "m.safetensors", LLAMA)) as model, pytest.raises(ConfigurationError) as caught:
        model.stream(**options)
    assert complaint in str(caught.value)


def test_levels_do_not_concern_tensors_that_have_none(tmp_path: Path) -> None:
    with open_model(write(tmp_path / "m.safetensors", LLAMA)) as model:
        assert_same(dict(model.stream(quality=0.1, until=0.0)), LLAMA)


def test_a_tensor_that_fails_ends_the_stream_with_its_error(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array]
) -> None:
    server, url = served(origin, tmp_path, large)
    with open_model(url) as model:
        server.behaviour = Behaviour(require_auth="Bearer other")
        for order in ("importance", "file"):
            with pytest.raises(NetworkError, match="check the credentials"):
                list(model.stream(order))
        with pytest.raises(NetworkError, match="check the credentials"):
            model.get_tensor("lm_head.weight")
        with pytest.raises(NetworkError, match="check the credentials"):
            model.get_slice("lm_head.weight")[0]


# --- endings


def test_closing_ends_a_stream(origin: StartOrigin, tmp_path: Path, large: dict[str, Array]) -> None:
    server, url = served(origin, tmp_path, large)
    model = open_model(url, config=NetworkConfig(chunk_size=65536))
    server.behaviour = Behaviour(rate=1e6)
    stream = model.stream()
    name, array = next(stream)
    threading.Timer(0.1, model.close).start()
    with pytest.raises(Cancelled):
        list(stream)
    model.close()
    assert_equal(array, large[name])
    with pytest.raises(Cancelled, match="closed"):
        model.get_tensor("lm_head.weight")


def test_a_stream_that_is_left_asks_for_nothing_more(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array]
) -> None:
    server, url = served(origin, tmp_path, large)
    with open_model(url, config=NetworkConfig(chunk_size=65536)) as model:
        server.behaviour = Behaviour(rate=1e6)
        for _ in model.stream():
            break
        server.behaviour = Behaviour()
        assert_equal(model.get_tensor("lm_head.weight"), large["lm_head.weight"])
    assert server.stats().body_bytes < model.nbytes


def test_one_tensor_overtakes_a_stream(origin: StartOrigin, tmp_path: Path) -> None:
    tensors = llama(blocks=16, side=256)
    server, url = served(origin, tmp_path, tensors)
    with open_model(url, config=NetworkConfig(chunk_size=1 << 18)) as model:
        server.behaviour = Behaviour(rate=20e6)
        stream = model.stream(lambda name: 0.5)
        first = next(stream)
        last = model.keys()[-1]
        assert_equal(model.get_tensor(last), tensors[last])
        moved = server.stats().body_bytes
        assert_same(dict([first, *stream]), tensors)
    assert moved < model.nbytes / 2


# --- the second time


def test_the_second_time_nothing_is_fetched(origin: StartOrigin, tmp_path: Path, large: dict[str, Array]) -> None:
    server, url = served(origin, tmp_path, large)
    with open_model(url) as model:
        before = model.explain()
        assert before.bytes == model.nbytes
        assert before.cached_bytes == 0
        assert 0 < before.requests <= len(large)
        assert before.seconds > 0
        assert model.report() is None
        assert_same(dict(model.stream()), large)
        report, after = model.report(), model.explain()
        assert (after.requests, after.cached_bytes, after.seconds) == (0, model.nbytes, 0.0)
        assert report is not None
        assert (report.tensors, report.bytes, report.retries) == (len(large), model.nbytes, 0)
        assert report.fetched_bytes >= model.nbytes
        assert report.requests > 0
        assert report.first_seconds is not None
        assert report.critical_seconds is not None
        assert report.critical_fetched_bytes is not None
        assert report.seconds is not None
        assert 0 < report.first_seconds <= report.critical_seconds <= report.seconds
        assert report.critical_fetched_bytes <= report.fetched_bytes
    server.reset_stats()
    with open_model(url) as model:
        assert_same(dict(model.stream()), large)
        report = model.report()
    assert report is not None
    assert (report.fetched_bytes, report.requests) == (0, 0)
    assert server.stats().body_bytes == 0
    assert server.stats().statuses == {304: 1}


def test_a_report_is_of_the_last_stream(tmp_path: Path) -> None:
    with open_model(write(tmp_path / "m.safetensors", LLAMA)) as model:
        assert model.explain().seconds == 0.0
        list(model.stream())
        full = model.report()
        assert full is not None
        assert full.critical_seconds is not None
        list(model.stream("file", include="*norm*"))
        partial = model.report()
        assert partial is not None
        assert partial.tensors == sum("norm" in name for name in LLAMA)
        assert partial.seconds is not None
        assert partial.critical_seconds is None  # nothing was asked for at that level
        begun = model.stream()
        next(begun)
        so_far = model.report()
        assert so_far is not None
        assert (so_far.tensors, so_far.seconds) == (1, None)
        list(model.stream(include="nothing"))
        assert model.report() == LoadReport()


def test_offline_gives_what_was_there_before(
    origin: StartOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: dict[str, Array]
) -> None:
    write(tmp_path / "model.safetensors", large)
    server = origin()
    urls = [f"{server.url}/model.safetensors", f"{server.url}/"]
    for url in urls:
        with open_model(url) as model:
            list(model.stream(exclude="lm_head.*"))
    server.close()
    monkeypatch.setenv("HOLOTENSOR_OFFLINE", "1")
    for url in urls:
        with open_model(url) as model:
            assert_same(
                dict(model.stream(exclude="lm_head.*")),
                {name: array for name, array in large.items() if not name.startswith("lm_head")},
            )
            with pytest.raises(OfflineError, match="not in the cache"):
                model.get_tensor("lm_head.weight")
    with pytest.raises(OfflineError, match="not in the cache"):
        open_model(f"{server.url}/other.safetensors")


def test_an_object_that_is_replaced_is_never_mixed(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array]
) -> None:
    _, url = served(origin, tmp_path, large)
    other = {name: array + 1 for name, array in large.items()}
    with open_model(url) as model:
        kept = model.get_tensor("lm_head.weight")
        write(tmp_path / "new", other).replace(tmp_path / "model.safetensors")
        with pytest.raises(ObjectChanged):
            list(model.stream(exclude="lm_head.*"))
        with pytest.raises(ObjectChanged):
            model.get_slice("model.embed_tokens.weight")[3]
        assert_equal(kept, large["lm_head.weight"])
    with open_model(url) as model:
        assert_same(dict(model.stream()), other)


# --- servers that lack something


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """Python's own web server, which knows no ranges and no entity tags; gives its URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("side", [16, SIDE])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["origin", "python"])
def test_a_server_without_ranges_will_do(
    origin: StartOrigin,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    is_sharded: bool,
    side: int,
) -> None:
    tensors = llama(blocks=2, side=side)
    name = write_index(tmp_path, tensors).name if is_sharded else write(tmp_path / "m.safetensors", tensors).name
    if kind == "origin":
        base = origin(behaviour=Behaviour(ignore_range=True)).url
    else:
        base = request.getfixturevalue("plain_server")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            caplog.clear()
            with open_model(f"{base}/{name}") as model:
                assert_same(dict(model.stream()), tensors)
                assert_equal(model.get_slice("lm_head.weight")[2:4], tensors["lm_head.weight"][2:4])
                assert model.explain().requests == 0
            assert len([record for record in caplog.records if "sends no ranges" in record.message]) <= 1
            assert not [record for record in caplog.records if "sends no ranges" not in record.message]


def test_an_endpoint_that_is_known_to_have_no_ranges_sends_each_file_once(
    origin: StartOrigin, tmp_path: Path, large: dict[str, Array]
) -> None:
    server, _ = served(origin, tmp_path, large)
    endpoint = CdnEndpoint(server.url, supports_range=False)
    with open_model("model.safetensors", config=NetworkConfig(endpoints=(endpoint,), cache_dir=False)) as model:
        assert_same(dict(model.stream()), large)
    assert server.stats().body_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_server_without_validators_will_do(origin: StartOrigin, tmp_path: Path, large: dict[str, Array]) -> None:
    _, url = served(origin, tmp_path, large, behaviour=Behaviour(no_validators=True))
    for _ in range(2):
        with open_model(url) as model:
            assert_same(dict(model.stream()), large)


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_bytes(
    origin: StartOrigin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    large: dict[str, Array],
) -> None:
    _, url = served(origin, tmp_path, large)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HOLOTENSOR_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING), open_model(url) as model:
        assert_same(dict(model.stream()), large)
    (warning,) = caplog.messages
    assert "HOLOTENSOR_CACHE" in warning


# --- slices

INDICES: list[Any] = [
    0,
    -1,
    np.int64(3),
    slice(2, 5),
    slice(None),
    slice(-3, None),
    slice(5, 2),
    slice(0, 10**6),
    slice(None, None, 2),
    slice(None, None, -1),
    ...,
    (1, 2),
    (1, 2, 3),
    (-1, -1, -1),
    (slice(1, 3), 2),
    (1, slice(0, 2)),
    (..., 1),
    (1, ...),
    (slice(2, 4), ..., slice(1, 2)),
    (slice(0, 0), 1),
    None,
    [0, 2],
    np.array([True] * 4 + [False] * 4),
    (),
]
CUBE = np.arange(8 * 64 * 64, dtype="f4").reshape(8, 64, 64)


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("place", ["fetched", "cached", "local"])
def test_a_slice_is_what_numpy_makes_of_the_index(origin: StartOrigin, tmp_path: Path, index: Any, place: str) -> None:
    file = write(tmp_path / "m.safetensors", {"cube": CUBE, "last": np.zeros(1)})
    with open_model(file if place == "local" else f"{origin().url}/m.safetensors") as model:
        if place == "cached":
            model.get_tensor("cube")
        found = model.get_slice("cube")[index]
    assert isinstance(found, np.ndarray)
    assert_equal(found, np.asarray(CUBE[index]))


@pytest.mark.parametrize("place", ["fetched", "local"])
def test_an_index_beyond_the_tensor_is_an_index_error(origin: StartOrigin, tmp_path: Path, place: str) -> None:
    file = write(tmp_path / "m.safetensors", {"cube": CUBE})
    with open_model(file if place == "local" else f"{origin().url}/m.safetensors") as model:
        for index in (8, -9, (0, 64), (0, 0, 0, 0)):
            with pytest.raises(IndexError):
                model.get_slice("cube")[index]


@pytest.mark.parametrize("validators", [True, False])
@pytest.mark.parametrize(
    ("index", "size"), [(slice(4, 6), 32768), (5, 16384), ((5, slice(10, 20)), 2560), ((7, 3), 256)]
)
def test_a_slice_moves_its_rows_only(
    origin: StartOrigin, tmp_path: Path, index: Any, size: int, validators: bool
) -> None:
    write(tmp_path / "m.safetensors", {"cube": CUBE})
    server = origin(behaviour=Behaviour(no_validators=not validators))
    with open_model(f"{server.url}/m.safetensors") as model:
        server.reset_stats()
        assert_equal(model.get_slice("cube")[index], CUBE[index])
        assert server.stats().body_bytes == size
        assert_equal(model.get_slice("cube")[index], CUBE[index])
        assert server.stats().body_bytes == size or not validators


def test_the_order_of_shards_and_their_names_is_the_index_s(origin: StartOrigin, tmp_path: Path) -> None:
    index = write_index(tmp_path, LLAMA)
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with open_model(f"{origin().url}/{index.name}") as model:
        assert "lm_head.weight" not in model
        assert set(names_of(model)) == LLAMA.keys() - {"lm_head.weight"}
