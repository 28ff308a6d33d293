"""Canaries in every place where a secret may be put: none is ever seen where it does not belong.

Each test makes sure that the canaries were sent where they belong, so that none passes because they were never used.
"""

from __future__ import annotations

import base64
import itertools
import logging
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from wire import END, HOLD, RESET, Request, Wire, answer, closed_port, part

from holotensor_net import open_model
from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import NetworkError, RetriesExhausted, redact_url
from holotensor_net.storage.cache import FragmentCache
from holotensor_net.transport.client import HttpClient
from holotensor_net.values import LoadFailure, LoadRequest, RangeRequest

NAMES = ("api-key", "header", "bearer", "password", "userinfo", "signature", "proxy", "netrc", "location", "cookie")
CANARY = {name: f"Canary+{name.replace('-', '')}+9f8e7d" for name in NAMES}
SIGNED = f"folder/object.bin?X-Signature={quote(CANARY['signature'])}&v=1"
DATA = bytes(range(256)) * 8
TAG = '"v1"'
ONCE = RetryConfig(max_retries=0)
TWICE = RetryConfig(max_retries=1, initial_backoff=0.001)


def _forms(secret: str) -> Iterator[bytes]:
    """The ways in which a secret may be spelled: as it is, in a URL, in hex, and within a text in Base64."""
    raw = secret.encode()
    yield from (raw, quote(secret, safe="").encode(), raw.hex().encode(), repr(secret)[1:-1].encode())
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        yield coded[4 if shift else 0 : -4]  # without what its neighbours have a part in


FORMS = {name: frozenset(_forms(secret)) for name, secret in CANARY.items()}


def seen(*places: object) -> set[str]:
    """The names of the canaries in the texts, bytes or values."""
    told = b"\0".join(place if isinstance(place, bytes) else str(place).encode("utf-8", "replace") for place in places)
    return {name for name, forms in FORMS.items() if any(form in told for form in forms)}


def chain(error: BaseException) -> list[BaseException]:
    """The error, and whatever led to it."""
    found: list[BaseException] = []
    left: list[object] = [error]
    while left:
        one = left.pop()
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__, *one.args, *vars(one).values()]
    return found


def told_by(error: BaseException) -> Iterator[object]:
    """All that an error tells, and whoever is behind it."""
    yield from traceback.format_exception(error)
    for one in chain(error):
        yield from (str(one), repr(one), one.args, vars(one), traceback.format_exception_only(one))
    yield pickle.dumps(error)
    yield repr(pickle.loads(pickle.dumps(error)))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that anybody logs: the libraries beneath too, down to DEBUG."""
    caplog.set_level(logging.DEBUG)
    for name in ("urllib3", "urllib3.connectionpool", "requests", "holotensor_net"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


def told_by_log(log: pytest.LogCaptureFixture) -> list[object]:
    return [log.text, *((record.msg, record.args, record.getMessage()) for record in log.records)]


def with_all(url: str, *, auth: str = "bearer", **more: Any) -> CdnEndpoint:
    """An endpoint with every secret that it can have."""
    return CdnEndpoint(
        url.replace("://", f"://me:{quote(CANARY['userinfo'])}@") if auth == "userinfo" else url,
        headers={"X-Api-Key": CANARY["api-key"], "X-Custom": CANARY["header"], "Cookie": CANARY["cookie"]},
        auth={
            "bearer": CANARY["bearer"],
            "password": ("me", CANARY["password"]),
            "callable": lambda: CANARY["bearer"],
            "userinfo": None,
        }[auth],
        **more,
    )


def config_of(endpoint: CdnEndpoint, **more: Any) -> NetworkConfig:
    return NetworkConfig(
        endpoints=(endpoint,), **{"timeout": 0.3, "connect_timeout": 1.0, "retry": TWICE, "cache_dir": False} | more
    )


def by_range(config: NetworkConfig) -> bytes:
    with HttpClient(config.endpoints[0], config) as client:
        return client.fetch_range(SIGNED, RangeRequest(0, 100))


def by_fetch(config: NetworkConfig) -> bytes:
    with HttpClient(config.endpoints[0], config) as client:
        return client.fetch(SIGNED)


def by_head(config: NetworkConfig) -> object:
    with HttpClient(config.endpoints[0], config) as client:
        return client.head(SIGNED)


def by_load(config: NetworkConfig) -> object:
    with NetworkLoader(config) as loader:
        return loader.load(LoadRequest("a fragment", SIGNED, byte_range=RangeRequest(0, 100)))


def by_stream(config: NetworkConfig) -> object:
    with NetworkLoader(config) as loader:
        return list(loader.stream([SIGNED]))


def by_model(config: NetworkConfig) -> object:
    with open_model(SIGNED, config=config) as model:
        return model


WAYS = [by_range, by_fetch, by_head, by_load, by_stream, by_model]
ways = pytest.mark.parametrize("ask", WAYS)


def attempt(ask: Callable[[NetworkConfig], object], config: NetworkConfig) -> list[object]:
    """All that is told of it when it is done or has failed."""
    try:
        result = ask(config)
    except NetworkError as error:
        return [*told_by(error)]
    results = result if isinstance(result, list) else [result]
    errors = [result.error for result in results if isinstance(result, LoadFailure)]
    return [repr(result), *map(repr, results), *itertools.chain.from_iterable(map(told_by, errors))]


# -- a second origin


def raw(requests: Iterable[Request]) -> list[object]:
    return [(request.method, request.target, request.headers) for request in requests]


def belongs(auth: str) -> set[str]:
    """What the first origin is to see."""
    return {"api-key", "header", "cookie", "signature", "bearer" if auth == "callable" else auth}


@ways
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_secret_follows_a_redirect_to_another_port(ask: Callable[[NetworkConfig], object], status: int) -> None:
    with Wire(always=answer(DATA, etag=TAG)) as other:
        leads = answer(status=status, location=f"{other.url}/there", set_cookie=f"id={CANARY['cookie']}; Path=/")
        with Wire(always=leads) as home:
            for auth in ("bearer", "password", "callable", "userinfo"):
                attempt(ask, config_of(with_all(home.url, auth=auth)))
                assert seen(*raw(home.requests)) >= belongs(auth)
        assert other.requests
        assert not seen(*raw(other.requests))
        assert not {"referer", "cookie", "authorization"} & {name for r in other.requests for name in r.headers}


@ways
def test_no_secret_follows_a_redirect_to_another_name(ask: Callable[[NetworkConfig], object]) -> None:
    """localhost is another origin than 127.0.0.1, though it be the same server."""
    hops = itertools.cycle([answer(status=302, location="PLACE"), answer(DATA, etag=TAG)])
    with Wire(always=_Served(lambda: next(hops).replace(b"PLACE", place.encode()))) as wire:
        place = f"http://localhost:{wire.port}/there"
        attempt(ask, config_of(with_all(wire.url), retry=ONCE))
        here = [request for request in wire.requests if request.headers["host"].startswith("127.0.0.1")]
        there = [request for request in wire.requests if request.headers["host"].startswith("localhost")]
        assert seen(*raw(here)) >= belongs("bearer")
        assert there
        assert not seen(*raw(there))


class _Served:
    """An answer that is made anew for each request."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[bytes]:
        return iter([self._make()])


@pytest.mark.parametrize("ask", [by_range, by_fetch, by_load])
def test_secrets_do_not_come_back_behind_a_second_origin(ask: Callable[[NetworkConfig], object]) -> None:
    """Home, elsewhere, home: the second origin chose that address, and its visitor is nobody."""
    with Wire(always=answer(status=302, location="/never")) as other:
        with Wire(answer(status=302, location=f"{other.url}/a"), always=answer(DATA, etag=TAG)) as home:
            other._answers = itertools.repeat(answer(status=307, location=f"{home.url}/chosen?by=other"))
            attempt(ask, config_of(with_all(home.url), retry=ONCE))
            assert [request.target for request in home.requests][1] == "/chosen?by=other"
            assert not seen(*raw(home.requests[1:])) & {"api-key", "header", "bearer", "cookie", "signature"}
        assert not seen(*raw(other.requests))


def test_a_redirect_within_the_origin_keeps_what_it_needs() -> None:
    with Wire(answer(status=302, location="/moved"), answer(DATA, etag=TAG)) as home:
        by_fetch(config_of(with_all(home.url)))
        assert seen(*raw(home.requests[1:])) == belongs("bearer") - {"signature"}


def test_a_second_endpoint_sees_only_its_own() -> None:
    with Wire(always=answer(status=404)) as first, Wire(always=part(DATA, 0, 100, etag=TAG)) as second:
        config = config_of(with_all(first.url, auth="password"))
        theirs = CdnEndpoint(second.url, priority=1, auth=CANARY["bearer"])
        config = NetworkConfig(endpoints=(*config.endpoints, theirs), cache_dir=False, retry=ONCE)
        by_load(config)
        assert seen(*raw(first.requests)) == belongs("password")
        assert seen(*raw(second.requests)) == {"bearer", "signature"}  # the path is asked of all endpoints


# -- proxies


@pytest.mark.parametrize("by_environment", [True, False], ids=["environment", "setting"])
def test_a_proxy_sees_its_password_and_no_origin_does(
    by_environment: bool, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    with Wire(always=answer(DATA, etag=TAG)) as direct, Wire(always=answer()) as proxy:
        proxy._answers = itertools.repeat(answer(status=302, location=f"{direct.url}/there"))
        url = f"http://me:{quote(CANARY['proxy'])}@127.0.0.1:{proxy.port}"
        if by_environment:
            monkeypatch.setenv("HTTP_PROXY", url)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            endpoint = with_all("http://far.example")
        else:
            endpoint = with_all("http://far.example", proxies={"http://far.example": url})
        told = [attempt(ask, config_of(endpoint, retry=ONCE)) for ask in WAYS]
        assert seen(*raw(proxy.requests)) == belongs("bearer") | {"proxy"}
        assert {request.target.partition("/folder")[0] for request in proxy.requests} == {"http://far.example"}
        assert direct.requests
        assert not seen(*raw(direct.requests), *told, *told_by_log(log), repr(endpoint))


def test_a_proxy_passes_no_secret_on_to_a_second_origin() -> None:
    hop = answer(status=302, location="http://other.example/there")
    with Wire(hop, answer(DATA, etag=TAG)) as proxy:
        url = f"http://me:{quote(CANARY['proxy'])}@127.0.0.1:{proxy.port}"
        by_fetch(config_of(with_all("http://far.example", proxies={"http": url})))
        assert seen(*raw(proxy.requests[:1])) == belongs("bearer") | {"proxy"}
        assert proxy.requests[1].target == "http://other.example/there"
        assert seen(*raw(proxy.requests[1:])) == {"proxy"}


def test_a_tunnel_is_asked_for_without_the_secrets_of_its_end(log: pytest.LogCaptureFixture) -> None:
    with Wire(always=answer(status=407)) as proxy:
        url = f"http://me:{quote(CANARY['proxy'])}@127.0.0.1:{proxy.port}"
        endpoint = with_all("https://far.example", proxies={"https": url})
        told = [attempt(ask, config_of(endpoint, retry=ONCE)) for ask in WAYS]
        assert {request.method for request in proxy.requests} == {"CONNECT"}
        assert seen(*raw(proxy.requests)) == {"proxy"}
    assert not seen(*told, *told_by_log(log))


# -- netrc


@ways
def test_a_netrc_is_not_read(
    ask: Callable[[NetworkConfig], object], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    home = Path(os.environ["HOME"])
    for name in (".netrc", "_netrc", "other"):
        (home / name).write_text(f"machine 127.0.0.1 login me password {CANARY['netrc']}\ndefault login a password b\n")
        (home / name).chmod(0o600)
    with Wire(always=answer(DATA, etag=TAG)) as wire:
        told = attempt(ask, config_of(CdnEndpoint(wire.url)))
        monkeypatch.setenv("NETRC", str(home / "other"))
        told += attempt(ask, config_of(CdnEndpoint(wire.url, auth=CANARY["bearer"])))
        assert seen(*raw(wire.requests)) == {"signature", "bearer"}
        assert not seen(*told, *told_by_log(log))
        assert not any("basic" in request.headers.get("authorization", "").lower() for request in wire.requests)


# -- whatever is told


HEADER = b'HTTP/1.1 200 OK\r\nETag: "v1"\r\n'
SCENES = {
    "done": answer(DATA, etag=TAG),
    "done in part": part(DATA, 0, 100, etag=TAG),
    "not found": answer(status=404),
    "refused": answer(status=401),
    "busy": answer(status=503, retry_after="0"),
    "broken": answer(status=500),
    "reset": [RESET],
    "closed": [END],
    "silent": [HOLD],
    "stalled": [HEADER + b"Content-Length: 2048\r\n\r\nabc", HOLD],
    "cut": [HEADER + b"Content-Length: 2048\r\n\r\nabc", END],
    "no HTTP": [b"\x16\x03\x01 what?\r\n\r\n", END],
    "no header": [HEADER + b"no header\r\n\r\n", END],
    "two lengths": answer(DATA, content_length="5, 6"),
    "wrong range": part(DATA, 5, 105, etag=TAG),
    "too much": answer(DATA + b"more", content_length=len(DATA), etag=TAG),
    "bad chunk": [HEADER + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc", END],
    "changed": answer(status=412),
    "no such range": answer(status=416, content_range="bytes */0"),
    "redirect to the dead": "http://127.0.0.1:{dead}/?s={secret}",
    "redirect with a password": "http://me:{secret}@127.0.0.1:{dead}/?s={secret}",
    "redirect to no name": "http://unknown.invalid/?s={secret}",
    "redirect to a bad name": f"http://{'a' * 99}/?s={{secret}}",
    "redirect to no URL": "http://[{secret}",
    "redirect to no port": "http://127.0.0.1:{secret}/",
    "redirect out of the web": "ftp://me:{secret}@x/{secret}",
    "redirect for ever": "/again?s={secret}",
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("auth", ["bearer", "userinfo"])
def test_nothing_that_is_told_of_a_transfer_holds_a_secret(
    scene: str, auth: str, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_port() as dead:
        script: Any = SCENES[scene]
        if isinstance(script, str):
            script = answer(status=302, location=script.format(dead=dead, secret=CANARY["location"]))
        with Wire(always=script) as wire:
            config = config_of(with_all(wire.url, auth=auth), retry=ONCE if script == [HOLD] else TWICE, timeout=0.1)
            told = [attempt(ask, config) for ask in WAYS]
            assert seen(*raw(wire.requests)) >= belongs(auth)
    assert not seen(*told, *told_by_log(log), config, config.endpoints, repr(config.client))


def test_nothing_that_is_told_of_no_connection_holds_a_secret(log: pytest.LogCaptureFixture) -> None:
    with closed_port() as dead:
        proxied = {"http": f"http://me:{quote(CANARY['proxy'])}@127.0.0.1:{dead}"}
        for endpoint in (
            with_all(f"http://127.0.0.1:{dead}"),
            with_all(f"https://127.0.0.1:{dead}", auth="userinfo"),
            with_all("http://far.example", proxies=proxied),
            with_all("http://far.example", proxies={"http": f"http://me:{CANARY['proxy']}@["}),
            with_all("http://far.example", proxies={"http": f"socks9://me:{CANARY['proxy']}@x"}),
            with_all("http://far.example", proxies={"http": f"http://me:{CANARY['proxy']}@x:port"}),
        ):
            told = [attempt(ask, config_of(endpoint, retry=ONCE)) for ask in WAYS]
            assert all(map(any, told))
            assert not seen(*told, *told_by_log(log), repr(endpoint)), endpoint


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("userinfo", lambda secret: CdnEndpoint(f"me:{secret}@127.0.0.1/models")),
        ("userinfo", lambda secret: CdnEndpoint(f"http:/me:{secret}@127.0.0.1/models")),
        ("userinfo", lambda secret: CdnEndpoint(f"ftp://me:{secret}@127.0.0.1/models")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}#1@127.0.0.1/")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}/1@127.0.0.1/")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}@127.0.0.1:port/")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}@[::1/")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}@a b/")),
        ("userinfo", lambda secret: CdnEndpoint(f"http://me:{secret}@/")),
        ("signature", lambda secret: CdnEndpoint(f"http://127.0.0.1/?sig={secret}")),
        ("signature", lambda secret: CdnEndpoint(f"http://127.0.0.1/#{secret}")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"http://else/?sig={secret}")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"//me:{secret}@else/")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"../a?sig={secret}")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"//[{secret}/a")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"//[{secret}]/a")),
        ("signature", lambda secret: CdnEndpoint("http://127.0.0.1").url_of(f"a\0?sig={secret}")),
        ("header", lambda secret: CdnEndpoint("http://127.0.0.1", headers={"X-Key": f"{secret}\n"})),
        ("header", lambda secret: CdnEndpoint("http://127.0.0.1", headers={"X Key": secret})),
        ("signature", lambda secret: open_model(f"http://127.0.0.1:9/a.bin?sig={secret}#part")),
        ("signature", lambda secret: open_model(f"nothing.bin?sig={secret}")),
    ],
)
def test_a_setting_that_is_refused_is_not_repeated_with_its_secret(
    name: str, make: Callable[[str], object], log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NetworkError) as caught:
        make(CANARY[name])
    assert not seen(*told_by(caught.value), *told_by_log(log))


@pytest.mark.parametrize(
    ("auth", "headers"),
    [("{}\n", {}), ("{}\u20ac", {}), (("me", "{}\n"), {}), (None, {"X-Key": " {}"}), (None, {"X-Key": "{}\u20ac"})],
)
def test_a_credential_that_http_cannot_carry_is_not_repeated(
    auth: Any, headers: dict[str, str], log: pytest.LogCaptureFixture
) -> None:
    secret = CANARY["bearer"]
    auth = tuple(part.format(secret) for part in auth) if isinstance(auth, tuple) else auth and auth.format(secret)
    endpoint = CdnEndpoint("http://127.0.0.1:9", auth=auth, headers={k: v.format(secret) for k, v in headers.items()})
    told = [attempt(ask, config_of(endpoint, retry=ONCE)) for ask in WAYS]
    assert not seen(*told, *told_by_log(log))


# -- what is handed out


def test_no_value_that_is_handed_out_shows_a_secret(tmp_path: Path) -> None:
    with Wire(always=answer(DATA, etag=TAG, cache_control="max-age=60")) as wire:
        config = config_of(with_all(wire.url), cache_dir=tmp_path / "cache")
        request = LoadRequest(SIGNED, SIGNED)
        with NetworkLoader(config) as loader:
            stream = loader.stream([SIGNED])
            (result,) = stream
            again = loader.load(request)
            entries = list(loader.cache)
            shown = [request, result, again, entries, stream, loader, loader.cache, loader.scheduler, loader.stats()]
            shown += [result.head, loader._fetcher, *loader._fetcher._courier._clients, loader.head(SIGNED), config]
            shown += [LoadFailure(SIGNED, NetworkError("no", url=f"{wire.url}/{SIGNED}"))]
            assert result.is_success
            assert again.from_cache
            assert len(entries) == 1
            assert not seen(*map(repr, shown), *map(str, shown))
            assert not seen(*map(pickle.dumps, [entries, result.head, loader.stats()]))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://me:secret@cdn.example/a/b?sig=secret#secret", "https://cdn.example/a/b?…"),
        ("https://cdn.example:8080/@scope/b", "https://cdn.example:8080/@scope/b"),
        ("folder/a?secret", "folder/a?…"),
        ("folder/@scope/b", "folder/@scope/b"),
        ("me:secret@cdn.example/a", "(unreadable URL)"),
        ("https:/me:secret@cdn.example/a", "(unreadable URL)"),
        ("https://me:secret#@cdn.example/a", "(unreadable URL)"),
        ("https://[secret", "(unreadable URL)"),
    ],
)
def test_a_url_is_told_without_its_secrets(url: str, told: str) -> None:
    assert redact_url(url) == told


# -- the cache folder


def files_of(folder: Path) -> Iterator[bytes]:
    """The names and the bytes of everything below a folder."""
    for path in folder.rglob("*"):
        yield os.fsencode(path.relative_to(folder))
        if path.is_file():
            yield path.read_bytes()


@pytest.mark.parametrize("auth", ["bearer", "password", "userinfo"])
def test_no_file_of_the_cache_holds_a_secret(auth: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    leaky = {"set_cookie": CANARY["cookie"], "location": f"/?{CANARY['location']}", "x_echo": CANARY["bearer"]}
    with Wire(always=answer(DATA, etag=TAG, cache_control="max-age=60", **leaky)) as wire:
        config = config_of(with_all(wire.url, auth=auth), cache_dir=folder, timeout=5.0)
        with NetworkLoader(config) as loader:
            assert all(result.is_success for result in loader.stream([SIGNED, LoadRequest("named", SIGNED + "&w=2")]))
            assert loader.load(LoadRequest(SIGNED, SIGNED, priority=0)).from_cache
            loader.sync()
        assert seen(*raw(wire.requests)) >= belongs(auth)
    assert any(DATA in content for content in files_of(folder)), "nothing was cached"
    assert not seen(*files_of(folder))
    assert len(list(FragmentCache(config.cache))) == 2


def test_no_file_of_a_transfer_that_was_cut_holds_a_secret(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with Wire(always=[HEADER + b"Content-Length: 2048\r\n\r\n" + DATA[:1000], RESET]) as wire:
        by_load(config_of(with_all(wire.url), cache_dir=folder))
        by_stream(config_of(with_all(wire.url), cache_dir=folder))
    assert not seen(*files_of(folder))


# -- the command line


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holotensor_net", *arguments],
        env={**os.environ, "HOLOTENSOR_VERBOSITY": "DEBUG", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("way", ["pull", "pull --json", "pull --to", "inspect"])
@pytest.mark.parametrize("scene", ["done", "not found", "reset", "redirect to the dead"])
def test_the_command_line_tells_no_secret(way: str, scene: str, tmp_path: Path) -> None:
    verb, *flags = way.split()
    script: Any = SCENES[scene]
    with closed_port() as dead:
        if isinstance(script, str):
            script = answer(status=302, location=script.format(dead=dead, secret=CANARY["location"]))
        with Wire(always=script) as wire:
            url = wire.url.replace("://", f"://me:{quote(CANARY['userinfo'])}@") + "/" + SIGNED
            done = command(verb, url, *flags, *([str(tmp_path / "to")] if "--to" in flags else []))
            assert seen(*raw(wire.requests)) >= {"signature", "userinfo"}
    listed = [command("cache", *words) for words in (["ls"], ["ls", "--json"], ["verify"])]
    assert (done.returncode == 0) is (scene == "done" and verb == "pull"), done
    assert not re.search("Traceback", done.stderr)
    assert not seen(done.stdout, done.stderr, *listed, *files_of(tmp_path))
    assert not seen(*files_of(Path(os.environ["HOLOTENSOR_CACHE"])))


def test_the_command_line_tells_no_token_of_the_environment() -> None:
    with Wire(always=answer(DATA, etag=TAG)) as wire:
        done = command("pull", "a.bin", HOLOTENSOR_ENDPOINT=wire.url, HOLOTENSOR_TOKEN=CANARY["bearer"])
        assert done.returncode == 0
        assert seen(*raw(wire.requests)) == {"bearer"}
    assert not seen(done, *files_of(Path(os.environ["HOLOTENSOR_CACHE"])))


# -- the canaries themselves


def test_a_canary_is_found_however_it_is_spelled() -> None:
    for name, secret in CANARY.items():
        assert seen(f"x{secret}y") == seen(quote(secret, safe="")) == seen(secret.encode().hex()) == {name}
        for user in ("", "a", "ab", "abc"):
            assert seen(base64.b64encode(f"{user}:{secret}".encode())) == {name}
    inner = RetriesExhausted(last_error=NetworkError(CANARY["bearer"]))
    assert seen(*told_by(inner)) == {"bearer"}
