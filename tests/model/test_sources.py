from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holotensor_net.config import CdnEndpoint, NetworkConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import (
    ConfigurationError,
    HttpError,
    InvalidUrl,
    NetworkError,
    NotFound,
    ObjectChanged,
    RangeNotSupported,
    RetriesExhausted,
)
from holotensor_net.model.sources import FileSource, NetworkSource, endpoint_of, source_of
from holotensor_net.origin import Behaviour, Origin
from holotensor_net.values import LoadFailure, LoadRequest, LoadSuccess, Priority, RangeRequest

StartOrigin = Callable[..., Origin]

TEXT = bytes(range(256)) * 1024  # longer than the first read


def part(path: str, start: int, stop: int, priority: Priority = Priority.NORMAL) -> LoadRequest:
    return LoadRequest(f"{path}[{start}:{stop}]", path, byte_range=RangeRequest(start, stop), priority=priority)


# --- where a name leads


@pytest.mark.parametrize(
    ("url", "endpoint", "path"),
    [
        ("https://cdn.example.com/llama/m.safetensors", "https://cdn.example.com/llama", "m.safetensors"),
        ("https://cdn.example.com/m.safetensors", "https://cdn.example.com", "m.safetensors"),
        ("https://cdn.example.com/llama/", "https://cdn.example.com/llama", ""),
        (
            "https://cdn.example.com/a/m.safetensors?sig=a/b&t=1",
            "https://cdn.example.com/a",
            "m.safetensors?sig=a/b&t=1",
        ),
        ("https://cdn.example.com/a/?sig=1", "https://cdn.example.com/a", "?sig=1"),
        ("https://cdn.example.com", "https://cdn.example.com", ""),
    ],
)
def test_a_url_is_a_file_in_the_folder_that_it_names(url: str, endpoint: str, path: str) -> None:
    config, found = endpoint_of(url, NetworkConfig(timeout=7))
    assert [each.url for each in config.endpoints] == [endpoint]
    assert found == path
    assert config.timeout == 7


def test_a_url_below_a_configured_endpoint_keeps_all_of_them() -> None:
    given = NetworkConfig(
        endpoints=(CdnEndpoint("https://a.example.com/models/", auth="token"), CdnEndpoint("https://b.example.com"))
    )
    config, path = endpoint_of("https://a.example.com/models/llama/m.safetensors?x=1", given)
    assert config == given
    assert path == "llama/m.safetensors?x=1"


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example.com.evil.org/models/m.safetensors",
        "https://a.example.com/models-of-others/m.safetensors",
        "https://a.example.com:444/models/m.safetensors",
        "http://a.example.com/models/m.safetensors",
        "https://a.example.com@evil.org/models/m.safetensors",
    ],
)
def test_no_other_url_is_asked_with_the_credentials_of_an_endpoint(url: str) -> None:
    given = NetworkConfig(endpoints=(CdnEndpoint("https://a.example.com/models", auth="token"),))
    config, _ = endpoint_of(url, given)
    assert [(each.auth == "token", each.url == given.endpoints[0].url) for each in config.endpoints] == [(False, False)]


def test_a_path_is_below_the_endpoints_of_the_configuration() -> None:
    given = NetworkConfig.custom_cdn("https://a.example.com")
    assert endpoint_of("llama/m.safetensors", given) == (given, "llama/m.safetensors")


def test_a_path_is_below_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", "https://e.example.com")
    monkeypatch.setenv("HOLOTENSOR_TOKEN", "token")
    for where in ("m.safetensors", "https://e.example.com/m.safetensors"):
        config, path = endpoint_of(where, NetworkConfig())
        assert [(each.url, each.auth) for each in config.endpoints] == [("https://e.example.com", "token")]
        assert path == "m.safetensors"


def test_the_token_of_the_environment_is_for_its_endpoint_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLOTENSOR_ENDPOINT", "https://e.example.com")
    monkeypatch.setenv("HOLOTENSOR_TOKEN", "token")
    config, _ = endpoint_of("https://other.example.com/m.safetensors", NetworkConfig())
    assert [each.auth for each in config.endpoints] == [None]


def test_a_path_without_an_endpoint_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigurationError, match="a path needs NetworkConfig"):
        endpoint_of("m.safetensors", NetworkConfig())


@pytest.mark.parametrize("where", ["https://a.example.com/m.safetensors#top", "m.safetensors#top"])
def test_a_fragment_is_refused(where: str) -> None:
    with pytest.raises(InvalidUrl, match="leave out what follows '#'"):
        endpoint_of(where, NetworkConfig.custom_cdn("https://a.example.com"))


@pytest.mark.parametrize("url", ["ftp://example.com/m.safetensors", "file:///etc/passwd", "http:///m", "http://a b/m"])
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidUrl, match="a URL must"):
        source_of(url, None)


def test_a_file_that_exists_is_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(TEXT)
    for where in (str(tmp_path / "x.safetensors"), tmp_path / "x.safetensors"):
        source, path = source_of(where, None)
        assert isinstance(source, FileSource)
        assert path == "x.safetensors"
        assert source.read_range(path, 1, 3) == TEXT[1:3]
    monkeypatch.chdir(tmp_path)
    source, path = source_of("x.safetensors", None)
    assert source.read_range(path, 1, 3) == TEXT[1:3]


def test_a_local_folder_has_no_name_in_it(tmp_path: Path) -> None:
    source, path = source_of(tmp_path, None)
    assert isinstance(source, FileSource)
    assert path == ""


def test_a_configured_endpoint_comes_before_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(TEXT)
    monkeypatch.chdir(tmp_path)
    source, path = source_of("x.safetensors", NetworkConfig.custom_cdn("http://127.0.0.1:9", cache_dir=False))
    source.close()
    assert isinstance(source, NetworkSource)
    assert path == "x.safetensors"


def test_neither_url_nor_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"neither a URL .* nor a file that exists"):
        source_of(tmp_path / "no.safetensors", None)


# --- local files


def test_files_give_ranges_sizes_and_results(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TEXT)
    (tmp_path / "empty").write_bytes(b"")
    source = FileSource(tmp_path)
    source.prefetch(["x", "empty"])
    assert source.read_range("x", 5, 300) == TEXT[5:300]
    assert source.read_range("empty", 0, 10) == b""
    assert (source.size_of("x"), source.size_of("empty")) == (len(TEXT), 0)
    request = part("x", 10, 20)
    assert source.version_of("x") is None
    assert source.is_cached(request)
    result = source.load(request)
    assert result.data == TEXT[10:20]
    assert result.data.readonly
    assert result.from_cache
    assert source.load(LoadRequest("all", "x")).data == TEXT
    assert source.stats().bytes_cached == 10 + len(TEXT)
    assert source.stats().bytes_fetched == 0


def test_files_come_most_urgent_first(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TEXT)
    levels = (Priority.LOW, Priority.CRITICAL, Priority.NORMAL)
    requests = [part("x", index, index + 1, level) for index, level in enumerate(levels)]
    assert [bytes(result.data) for result in FileSource(tmp_path).stream(requests)] == [b"\1", b"\2", b"\0"]


def test_a_range_beyond_the_end_of_a_file_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    result = FileSource(tmp_path).load(part("x", 1, 4))
    assert isinstance(result, LoadFailure)
    assert isinstance(result.error, HttpError)
    assert result.error.status == 416


def test_views_of_a_file_outlive_the_source(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(TEXT)
    source = FileSource(tmp_path)
    data = source.load(part("x", 0, 256)).data
    source.close()
    assert data == TEXT[:256]


def test_a_file_that_is_not_there_or_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotFound, match=r"there is no file .*no\.safetensors"):
        FileSource(tmp_path).read_range("no.safetensors", 0, 1)
    with pytest.raises(NetworkError, match=r"cannot read .*folder"):
        FileSource(tmp_path).read_range("folder", 0, 1)


# --- web servers


@pytest.fixture
def server(origin: StartOrigin, tmp_path: Path) -> Origin:
    """Serves the files ``long``, ``short`` and ``empty`` of the folder ``www``."""
    root = tmp_path / "www"
    root.mkdir()
    (root / "long").write_bytes(TEXT)
    (root / "short").write_bytes(b"brief")
    (root / "empty").write_bytes(b"")
    return origin(root)


@pytest.fixture
def source(server: Origin) -> Iterator[NetworkSource]:
    made = NetworkSource(NetworkLoader(NetworkConfig.custom_cdn(server.url)))
    yield made
    made.close()


def test_the_beginning_is_read_once_and_tells_the_size(source: NetworkSource, server: Origin) -> None:
    assert source.size_of("long") is None
    source.prefetch(["long"])
    source.prefetch(["long"])
    assert source.read_range("long", 0, 65536) == TEXT[:65536]
    assert source.read_range("long", 10, 20) == TEXT[10:20]
    assert source.size_of("long") == len(TEXT)
    assert server.stats().requests == 1


def test_what_lies_beyond_the_beginning_is_asked_for(source: NetworkSource) -> None:
    assert source.read_range("long", 65000, 70000) == TEXT[65000:70000]
    assert source.read_range("long", len(TEXT) - 5, len(TEXT) + 5) == TEXT[-5:]


def test_a_short_file_is_whole_after_its_beginning(source: NetworkSource, server: Origin) -> None:
    assert source.read_range("short", 0, 65536) == b"brief"
    assert source.is_cached(part("short", 1, 3))
    assert source.load(part("short", 1, 3)).data == b"ri"
    assert source.load(LoadRequest("all", "short")).data == b"brief"
    assert [bytes(result.data) for result in source.stream([part("short", 0, 2)])] == [b"br"]
    assert server.stats().requests == 1
    assert source.stats().bytes_cached == 2 + 5 + 2


def test_an_empty_file_is_read(source: NetworkSource) -> None:
    assert source.read_range("empty", 0, 65536) == b""
    assert source.size_of("empty") == 0


def test_a_file_that_was_begun_is_held_to_its_version(source: NetworkSource, tmp_path: Path) -> None:
    assert source.request(part("long", 0, 10)).validator is None
    source.read_range("long", 0, 65536)
    pinned = source.request(part("long", 100_000, 100_010))
    assert pinned.validator is not None
    (tmp_path / "www" / "long").write_bytes(TEXT[::-1])
    result = source.load(pinned)
    assert isinstance(result, LoadFailure)
    assert isinstance(result.error, ObjectChanged)


def test_a_missing_file_is_told_by_whoever_asks(source: NetworkSource) -> None:
    source.prefetch(["no"])
    with pytest.raises(NotFound):
        source.read_range("no", 0, 65536)


class Rangeless:
    """Stands in for a loader: a server whose ranges fail from some time on."""

    def __init__(self, loader: NetworkLoader, error: NetworkError) -> None:
        self._loader = loader
        self._error = error
        self.config = loader.config
        self.enqueue = loader.enqueue
        self.close = loader.close
        self.wholes = 0

    def load(self, request: LoadRequest) -> LoadSuccess | LoadFailure:
        if request.byte_range is not None:
            return LoadFailure(request.fragment_id, self._error)
        self.wholes += 1
        return self._loader.load(request)


@pytest.mark.parametrize("error", [RangeNotSupported("no"), RetriesExhausted(last_error=RangeNotSupported("no"))])
def test_a_server_that_stops_sending_ranges_is_asked_for_the_whole(source: NetworkSource, error: NetworkError) -> None:
    source.read_range("long", 0, 65536)
    source.loader = rangeless = Rangeless(source.loader, error)  # type: ignore[assignment]
    for start in (70_000, 80_000):
        assert source.load(source.request(part("long", start, start + 9))).data == TEXT[start : start + 9]
    assert rangeless.wholes == 1


def test_the_whole_is_of_the_version_that_was_begun(source: NetworkSource, tmp_path: Path) -> None:
    source.read_range("long", 0, 65536)
    source.loader = Rangeless(source.loader, RangeNotSupported("no"))  # type: ignore[assignment]
    (tmp_path / "www" / "long").write_bytes(TEXT[::-1])
    with pytest.raises(ObjectChanged):
        source.load(source.request(part("long", 70_000, 70_009)))


@pytest.mark.parametrize("lacks", [{"behaviour": Behaviour(ignore_range=True)}, {"supports_range": False}])
def test_without_ranges_a_file_comes_once_and_whole(
    origin: StartOrigin, tmp_path: Path, caplog: pytest.LogCaptureFixture, lacks: dict[str, object]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(TEXT + name.encode())
    supports_range = bool(lacks.pop("supports_range", True))
    server = origin(**lacks)
    config = NetworkConfig(endpoints=(CdnEndpoint(server.url, supports_range=supports_range),), cache_dir=False)
    source = NetworkSource(NetworkLoader(config))
    source.prefetch(["a", "b"])
    with caplog.at_level(logging.WARNING), source.loader:
        for name in ("a", "b", "c"):
            assert source.read_range(name, 0, 65536) == TEXT[:65536]
            assert source.size_of(name) == len(TEXT) + 1
            assert source.request(part(name, 0, 10)).validator is None
            assert source.load(part(name, len(TEXT), len(TEXT) + 1)).data == name.encode()
        results = {r.fragment_id: bytes(r.data) for r in source.stream([part("a", 1, 3), part("b", 2, 4)])}
    assert results == {"a[1:3]": TEXT[1:3], "b[2:4]": TEXT[2:4]}
    warnings = [record.message for record in caplog.records if "sends no ranges" in record.message]
    assert len(warnings) == (1 if supports_range else 0)  # who has configured it need not be told
    assert len(server.requests()) == (6 if supports_range else 3)
    assert source.stats().bytes_cached > 0
