"""What is asked over a kept connection is asked, and answered, as it would be the whole way."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import responses
from requests.adapters import HTTPAdapter
from wire import END, RESET, Request, Wire, answer, chunked, part

from holotensor_net.config import CdnEndpoint, ClientConfig, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import ConnectionFailed, NetworkError
from holotensor_net.transport.client import HttpClient
from holotensor_net.values import LoadRequest

DATA = bytes(range(256)) * 4
TAG = '"v1"'


def in_parts(request: Request) -> bytes:
    start, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return part(DATA, int(start), int(last) + 1, etag=TAG)


def client_of(wire: Wire | str, **more: Any) -> HttpClient:
    endpoint = CdnEndpoint(wire if isinstance(wire, str) else wire.url, **more)
    return HttpClient(endpoint, ClientConfig(retry=RetryConfig(max_retries=0), timeout=5.0, connect_timeout=5.0))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that went the whole way."""
    urls: list[str] = []
    send = HTTPAdapter.send

    def noted(self: HTTPAdapter, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        urls.append(request.url or "")
        return send(self, request, *args, **kwargs)

    monkeypatch.setattr(HTTPAdapter, "send", noted)
    return urls


def test_one_request_goes_the_whole_way_and_the_others_look_the_same(sent: list[str]) -> None:
    own = {"X-Own": "1", "Host": "elsewhere.test", "accept": "text/plain"}
    with Wire(always=in_parts) as wire, client_of(wire, auth="token", headers=own) as client:
        for start in range(0, 100, 10):
            assert client.fetch_range("a", (start, start + 10)) == DATA[start : start + 10]
        assert len(sent) == 1
        assert wire.connections == 1
        first, *others = [{**request.headers, "range": ""} for request in wire.requests]
        assert all(headers == first and list(headers) == list(first) for headers in others)
        assert first["authorization"] == "Bearer token"


@pytest.mark.parametrize(
    "path", ["a b", "a%20b", "[1]", "a|b", "ü", "a?x=[1]&y=%41", "a//b", "~a", "a'b", "a%2fb", "{x}", "a?b#c"]
)
def test_a_path_is_sent_as_it_would_be_the_whole_way(path: str) -> None:
    def target(*before: str) -> str:
        with Wire(always=in_parts) as wire, client_of(wire) as client:
            for each in (*before, path):
                client.fetch_range(each, (0, 1))
            return wire.targets[-1]

    assert target("plain") == target()


def endings() -> Iterator[Any]:
    yield [RESET]
    yield [END]
    yield [b"HTTP/1.1 206", END]
    yield b"SSH-2.0-OpenSSH\r\n\r\n"
    yield part(DATA, 0, 8, etag=TAG, x_folded="1\r\n 2")
    yield part(DATA, 0, 8, etag=TAG).replace(b"Etag", b" Etag")
    yield part(DATA, 1, 9, etag=TAG)
    yield part(DATA, 0, 8, etag=TAG) + b"more"
    yield [part(DATA, 0, 8, etag=TAG)[:-4], END]
    yield part(DATA, 0, 8, etag=TAG, connection="close")
    yield [answer(DATA[:8], 206, content_range=f"bytes 0-7/{len(DATA)}", content_length=None), END]
    yield [chunked(DATA[:8], status=206, content_range=f"bytes 0-7/{len(DATA)}")[:-7], END]
    yield chunked(DATA[:4], DATA[4:8], status=206, content_range=f"bytes 0-7/{len(DATA)}")
    yield chunked(DATA[:8], status=206, content_range=f"bytes 0-7/{len(DATA)}", end=b"+0\r\n\r\n")
    yield part(DATA, 0, 8, content_encoding="gzip")
    yield answer(b"x" * 100_000, 404)
    yield answer(b"", 429, retry_after=7)
    yield answer(b"", 302, location="file:///etc/passwd")
    yield answer(b"", 204, content_length=None)


@pytest.mark.parametrize("ending", list(endings()))
def test_what_comes_ends_as_it_would_the_whole_way(ending: Any) -> None:
    def outcome(*before: Any) -> tuple[object, ...]:
        with Wire(*before, ending, always=in_parts) as wire, client_of(wire) as client:
            for _ in before:
                client.fetch_range("a", (0, 8))
            try:
                ended: tuple[object, ...] = (client.fetch_range("a", (0, 8)),)
            except NetworkError as error:
                ended = type(error), error.message, error.retry_after, type(error.__cause__)
                if isinstance(error, ConnectionFailed):
                    ended = *ended, error.established
            if isinstance(ending, list):
                wire.await_closed()
            client._host.__init__()  # type: ignore[misc]  # it may have asked for silence
            return *ended, client.fetch_range("a", (8, 16))

    assert outcome(in_parts) == outcome()


def test_a_connection_that_was_closed_meanwhile_is_opened_anew(sent: list[str]) -> None:
    with Wire(lambda request: [in_parts(request), END], always=in_parts) as wire, client_of(wire) as client:
        assert client.fetch_range("a", (0, 8)) == DATA[:8]
        wire.await_closed()
        assert client.fetch_range("a", (8, 16)) == DATA[8:16]
        assert client.fetch_range("a", (16, 24)) == DATA[16:24]
        assert wire.connections == len(sent) == 2


def test_who_takes_the_adapters_place_is_asked() -> None:
    with Wire(always=in_parts) as wire, client_of(wire) as client:
        assert client.fetch_range("a", (0, 8)) == DATA[:8]
        with responses.RequestsMock() as mocked:
            said = {"Content-Range": f"bytes 0-7/{len(DATA)}", "ETag": '"v2"'}
            mocked.add(responses.GET, f"{wire.url}/a", body=b"mockery!", status=206, headers=said)
            assert client.fetch_range("a", (0, 8)) == b"mockery!"
        assert client.fetch_range("a", (8, 16)) == DATA[8:16]
        assert len(wire.requests) == 2


def test_a_loader_takes_what_is_answered_in_a_servers_place() -> None:
    with responses.RequestsMock() as mocked:
        said = {"Content-Range": f"bytes 0-7/{len(DATA)}", "ETag": TAG}
        mocked.add(responses.GET, "http://nowhere.test/a", body=DATA[:8], status=206, headers=said)
        with NetworkLoader(NetworkConfig.custom_cdn("http://nowhere.test", cache_dir=False)) as loader:
            assert loader.load(LoadRequest("a", "a", byte_range=(0, 8))).data == DATA[:8]  # type: ignore[arg-type]


def test_another_proxy_sends_a_request_the_whole_way(sent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(always=in_parts) as wire, Wire(always=in_parts) as proxy, client_of(wire) as client:
        monkeypatch.setenv("no_proxy", "")
        client.fetch_range("a", (0, 8))
        monkeypatch.setenv("http_proxy", proxy.url)
        client.fetch_range("a", (0, 8))
        client.fetch_range("a", (0, 8))
        assert len(sent) == 3
        assert (len(wire.requests), proxy.targets) == (1, [f"{wire.url}/a"] * 2)


def test_who_watches_urllib3_is_told_of_every_request(caplog: pytest.LogCaptureFixture) -> None:
    with (
        Wire(always=in_parts) as wire,
        client_of(wire) as client,
        caplog.at_level(logging.DEBUG, "urllib3.connectionpool"),
    ):
        for _ in range(3):
            client.fetch_range("a?sig=secret", (0, 8))
    assert sum("206" in record.getMessage() for record in caplog.records) == 3
    assert "secret" not in caplog.text


def test_a_token_is_asked_for_each_time() -> None:
    tokens = iter(["one", "two", "three"])
    with Wire(always=in_parts) as wire, client_of(wire, auth=lambda: next(tokens)) as client:
        for _ in range(3):
            client.fetch_range("a", (0, 8))
        assert [request.headers["authorization"] for request in wire.requests] == [
            "Bearer one",
            "Bearer two",
            "Bearer three",
        ]


@pytest.mark.parametrize("most", [0, 10])
def test_a_request_that_does_not_go_out_at_once_goes_out_all_the_same(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, []

    def little(where: int, data: bytes) -> int:
        if not data.startswith(b"GET "):
            return write(where, data)
        written.append(data)
        if not most:
            raise BlockingIOError
        return write(where, data[:most])

    monkeypatch.setattr("holotensor_net.transport.pools.os.write", little)
    with Wire(always=in_parts) as wire, client_of(wire) as client:
        for start in range(0, 30, 10):
            assert client.fetch_range("a", (start, start + 10)) == DATA[start : start + 10]
        assert (len(written), wire.connections) == (2, 1)


def test_an_environment_of_any_make_is_asked_for_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of("http://a.test") as client:
        for name, value in (("http_proxy", "http://p.test:1"), ("no_proxy", "")):
            monkeypatch.setenv(name, value)
        known = client._proxies("http://a.test/x")
        assert known["http"] == "http://p.test:1"
        monkeypatch.setattr(os, "environ", dict(os.environ))
        assert client._proxies("http://a.test/x") == known
        os.environ["http_proxy"] = "http://q.test:1"
        assert client._proxies("http://a.test/x")["http"] == "http://q.test:1"
