"""Settings: which can exist, where they come from, and that what is secret in them stays so."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net import config as room
from holotensor_net.config import (
    GIB,
    MIB,
    CacheConfig,
    CdnEndpoint,
    ClientConfig,
    NetworkConfig,
    RetryConfig,
    SchedulerConfig,
)
from holotensor_net.errors import ConfigurationError, InvalidUrl

URL = "https://cdn.example.com/models"
ENDPOINT = CdnEndpoint(URL)

CONFIGURATIONS: dict[type, Callable[..., Any]] = {
    CdnEndpoint: lambda **fields: CdnEndpoint(URL, **fields),
    RetryConfig: RetryConfig,
    ClientConfig: ClientConfig,
    SchedulerConfig: SchedulerConfig,
    CacheConfig: CacheConfig,
    NetworkConfig: NetworkConfig,
}

DEFAULTS: dict[type, dict[str, Any]] = {
    CdnEndpoint: {
        "priority": 0,
        "region": None,
        "supports_range": True,
        "max_connections": 64,
        "headers": {},
        "auth": None,
        "verify": True,
        "proxies": None,
    },
    RetryConfig: {
        "max_retries": 3,
        "initial_backoff": 0.1,
        "max_backoff": 10.0,
        "multiplier": 2.0,
        "jitter": True,
        "deadline": None,
    },
    NetworkConfig: {
        "endpoints": (),
        "timeout": 30.0,
        "connect_timeout": 10.0,
        "max_concurrent": 64,
        "retry": RetryConfig(),
        "compression": True,
        "cache_dir": None,
        "max_cache_size": 10 * GIB,
        "monitor_bandwidth": True,
        "min_bandwidth": MIB,
        "max_bandwidth": None,
        "offline": False,
    },
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_interface(kind: type) -> None:
    made = CONFIGURATIONS[kind]()
    assert {name: getattr(made, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_configurations_are_frozen_and_go_by_keyword(kind: type) -> None:
    made = CONFIGURATIONS[kind]()
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)
    with pytest.raises(TypeError):
        kind(URL, 5)


COUNTS = ["5", 1.5, -1, 0, None, True]
SECONDS = ["5", -1, 0, float("inf"), float("nan"), None, True]
SHARES = ["0.1", -0.1, 1.1, float("nan"), True, None]
SECONDS_OR_NONE = SECONDS[:5]

FLAGS = ["no", "False", 1, 0, None]
FLAGS_OR_NONE = FLAGS[:4]

REFUSED: list[tuple[type, str, list[Any]]] = [
    (CdnEndpoint, "max_connections", COUNTS),
    (CdnEndpoint, "priority", ["1", 1.5, None, True]),
    (CdnEndpoint, "supports_range", FLAGS),
    (CdnEndpoint, "region", [5, b"eu"]),
    (CdnEndpoint, "verify", [None, 1, b"/etc/bundle"]),
    (RetryConfig, "max_retries", ["1", 1.5, -1, None]),
    (RetryConfig, "initial_backoff", SECONDS),
    (RetryConfig, "max_backoff", SECONDS),
    (RetryConfig, "deadline", SECONDS_OR_NONE),
    (RetryConfig, "jitter", FLAGS),
    (RetryConfig, "multiplier", ["2", 0.9, float("inf"), float("nan"), None]),
    (ClientConfig, "timeout", SECONDS),
    (ClientConfig, "connect_timeout", SECONDS),
    (ClientConfig, "compression", FLAGS),
    (ClientConfig, "max_body", COUNTS),
    (ClientConfig, "max_redirects", ["5", -1, None]),
    (SchedulerConfig, "max_concurrent", COUNTS),
    (SchedulerConfig, "chunk_size", COUNTS),
    (SchedulerConfig, "memory_budget", COUNTS),
    (SchedulerConfig, "queue_limit", COUNTS),
    (SchedulerConfig, "monitor_bandwidth", FLAGS),
    (SchedulerConfig, "min_bandwidth", SECONDS),
    (SchedulerConfig, "max_bandwidth", SECONDS_OR_NONE),
    (SchedulerConfig, "max_requests_per_second", SECONDS_OR_NONE),
    (CacheConfig, "max_size", COUNTS),
    (CacheConfig, "memory_size", ["5", -1, None]),
    (CacheConfig, "free_space_reserve", ["5", -1, 0.05, True]),
    (CacheConfig, "verify_on_open", FLAGS),
    (CacheConfig, "offline", FLAGS_OR_NONE),
    (CacheConfig, "heuristic_freshness", SHARES),
    (NetworkConfig, "endpoints", [None, 5]),
    (NetworkConfig, "compression", FLAGS),
    (NetworkConfig, "monitor_bandwidth", FLAGS),
    (NetworkConfig, "offline", FLAGS_OR_NONE),
    (NetworkConfig, "hedging", FLAGS_OR_NONE),
    (NetworkConfig, "timeout", SECONDS),
    (NetworkConfig, "connect_timeout", SECONDS),
    (NetworkConfig, "max_concurrent", COUNTS),
    (NetworkConfig, "chunk_size", COUNTS),
    (NetworkConfig, "retry", [None, {}, 3]),
    (NetworkConfig, "cache_dir", [True, 5, b"cache"]),
    (NetworkConfig, "max_cache_size", COUNTS),
    (NetworkConfig, "free_space_reserve", ["5", -1, 0.05, True]),
    (NetworkConfig, "verify_on_open", FLAGS),
    (NetworkConfig, "heuristic_freshness", SHARES),
    (NetworkConfig, "min_bandwidth", SECONDS),
    (NetworkConfig, "max_bandwidth", SECONDS_OR_NONE),
    (NetworkConfig, "max_requests_per_second", SECONDS_OR_NONE),
    (NetworkConfig, "memory_budget", COUNTS),
    (NetworkConfig, "user_agent", ["", "ä", "a\r\nb", None]),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(kind, name, value) for kind, name, values in REFUSED for value in values]
)
def test_a_setting_that_cannot_work_names_field_and_value(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        CONFIGURATIONS[kind](**{name: value})
    assert f"{kind.__name__}.{name}" in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auth", ["user", "sesame"]),  # a list would go out as a token
        *[("auth", value) for value in (("sesame",), ("user", "sesame", "x"), ("sesame", None), b"sesame", 5)],
        *[("proxies", value) for value in ("http://user:sesame@proxy", ["sesame"])],
    ],
)
def test_a_credential_that_cannot_work_is_refused_and_not_shown(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"CdnEndpoint\.{name} must be .*, not a {type(value).__name__}$"):
        CdnEndpoint(URL, **{name: value})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (RetryConfig, {"max_retries": 0, "multiplier": 1, "deadline": 0.1}),
        (ClientConfig, {"max_redirects": 0}),
        (CacheConfig, {"memory_size": 0, "directory": False}),
        (NetworkConfig, {"max_bandwidth": 1, "cache_dir": False}),
        (CdnEndpoint, {"priority": -1, "max_connections": 1}),
    ],
)
def test_the_least_that_can_work_is_taken(kind: type, fields: dict[str, Any]) -> None:
    made = CONFIGURATIONS[kind](**fields)
    assert {name: getattr(made, name) for name in fields} == fields


# --- endpoints


@pytest.mark.parametrize(
    "url",
    [
        *("", "cdn", "ftp://host", "file:///etc/passwd", "http://", "http:///x", "//host", "http://[::1", "http://h:x"),
        *("http://h/a b", "http://h/\n", "http://h\\x", "http://h/\x7f", None, 5),
    ],
)
def test_what_is_no_web_address_is_no_endpoint(url: Any) -> None:
    with pytest.raises(InvalidUrl):
        CdnEndpoint(url)


@pytest.mark.parametrize("url", ["http://h/a?b=c", "http://h/a#b", "https://h?x"])
def test_an_endpoint_ends_before_query_and_fragment(url: str) -> None:
    with pytest.raises(InvalidUrl, match="query"):
        CdnEndpoint(url)


def test_credentials_move_from_the_url_to_auth() -> None:
    endpoint = CdnEndpoint("https://us%40er:p%3Ass@host:8443/x")
    assert endpoint.url == "https://host:8443/x"
    assert endpoint.auth == ("us@er", "p:ss")


def test_a_user_alone_has_an_empty_password() -> None:
    assert CdnEndpoint("https://user@host").auth == ("user", "")


def test_an_explicit_auth_wins_over_the_url() -> None:
    endpoint = CdnEndpoint("https://user:pass@host", auth="token")
    assert (endpoint.url, endpoint.auth) == ("https://host", "token")


def test_credentials_show_in_no_repr() -> None:
    endpoint = CdnEndpoint(
        "https://user:sesame@host", headers={"X-Key": "sesame"}, proxies={"https": "http://u:sesame@proxy"}
    )
    config = NetworkConfig(endpoints=(endpoint,))
    assert "sesame" not in repr(endpoint) + str(config) + repr(config)


@pytest.mark.parametrize("headers", [{"X: y": "z"}, {"": "z"}, {"X": "a\r\nb"}, {"X": "a\0"}, {"X\n": "a"}, {"Ä": "b"}])
def test_headers_that_http_does_not_allow_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="headers"):
        CdnEndpoint(URL, headers=headers)


def test_headers_are_a_copy() -> None:
    headers = {"X-Key": "a"}
    endpoint = CdnEndpoint(URL, headers=headers)
    headers["X-Key"] = "b"
    assert endpoint.headers == {"X-Key": "a"}


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("file.bin", f"{URL}/file.bin"),
        ("/file.bin", f"{URL}/file.bin"),
        ("a/b/c", f"{URL}/a/b/c"),
        ("a b.bin", f"{URL}/a%20b.bin"),
        ("a%20b.bin", f"{URL}/a%20b.bin"),
        ("a#b.bin", f"{URL}/a%23b.bin"),
        ("file?sig=a/../b", f"{URL}/file?sig=a/../b"),
        ("file?sig=a b#c", f"{URL}/file?sig=a%20b%23c"),
        ("..a/b..", f"{URL}/..a/b.."),
        ("ä", f"{URL}/ä"),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_path_is_looked_up_below_its_endpoint(slash: str, path: str, url: str) -> None:
    assert CdnEndpoint(URL + slash).url_of(path) == url


@pytest.mark.parametrize(
    "path",
    [
        *("..", "a/../../b", "%2e%2e/b", "a/%2E./b", "a\\..\\b"),
        *("http://other/x", "//other/x", "///x", "//[x", "file:///etc/passwd"),
        *("a\0b", "a?b\0c", "a\nb", "a?b\r\nX: y", "a\x7fb", "\ta", "a\x1b"),
    ],
)
def test_a_path_that_leaves_its_endpoint_is_refused(path: str) -> None:
    with pytest.raises(InvalidUrl):
        ENDPOINT.url_of(path)


@given(st.text(max_size=30) | st.text("./\\%2eE?#: \nab", max_size=12))
def test_no_path_at_all_leaves_its_endpoint(path: str) -> None:
    try:
        url = urlsplit(ENDPOINT.url_of(path))
    except InvalidUrl:
        return
    assert (url.scheme, url.netloc, url.fragment) == ("https", "cdn.example.com", "")
    assert url.path.startswith("/models/")
    assert ".." not in unquote(url.path).split("/")


def test_a_scope_tells_credentials_apart_and_nothing_of_them() -> None:
    scopes = [
        CdnEndpoint(URL, **fields).scope
        for fields in (
            {},
            {"auth": "a"},
            {"auth": "b"},
            {"auth": ("a", "")},
            {"headers": {"X-Key": "a"}},
            {"headers": {"X-Key": "b"}},
            {"auth": "a", "headers": {"X-Key": "a"}},
            {"auth": lambda: "a"},
            {"cache_scope": "a"},
            {"cache_scope": "b"},
            {"cache_scope": "\udcff"},  # as an environment that is no UTF-8 gives it
            {"headers": {"X": "\udcff"}},
        )
    ]
    assert len(set(scopes)) == len(scopes)
    assert scopes[0] == ""
    assert all(len(scope) == 64 for scope in scopes[1:])


def test_equal_credentials_have_one_scope_whatever_the_case_and_order_of_headers() -> None:
    one = CdnEndpoint(URL, headers={"A": "1", "b": "2"})
    other = CdnEndpoint("https://mirror.example.com", headers={"B": "2", "a": "1"}, priority=5)
    assert one.scope == other.scope


def test_two_endpoints_with_functions_share_nothing_unless_they_are_of_one_name() -> None:
    def token() -> str:
        return "a"

    one, other = CdnEndpoint(URL, auth=token), CdnEndpoint(URL, auth=token)
    assert one == other
    assert one.scope == one.scope != other.scope
    named = [CdnEndpoint(URL, auth=auth, cache_scope="alice") for auth in (token, lambda: "b", "c", None)]
    assert len({endpoint.scope for endpoint in named}) == 1


@pytest.mark.parametrize("name", ["", 1, b"a"])
def test_a_scope_is_a_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="cache_scope"):
        CdnEndpoint(URL, cache_scope=name)


def test_endpoints_can_be_keys() -> None:
    assert {CdnEndpoint(URL, headers={"a": "b"}): 1}[CdnEndpoint(URL, headers={"a": "b"})] == 1


# --- the whole configuration


@pytest.mark.parametrize("given", [URL, ENDPOINT, (URL,), [ENDPOINT], (endpoint for endpoint in (URL,))])
def test_endpoints_may_be_given_in_any_form(given: Any) -> None:
    assert NetworkConfig(endpoints=given).endpoints == (ENDPOINT,)


def test_each_room_is_given_its_part() -> None:
    config = NetworkConfig(
        timeout=1,
        connect_timeout=2,
        max_concurrent=3,
        chunk_size=4,
        retry=RetryConfig(max_retries=5),
        compression=False,
        user_agent="me",
        cache_dir="folder",
        max_cache_size=6,
        monitor_bandwidth=False,
        min_bandwidth=7,
        max_bandwidth=8,
        offline=True,
        memory_budget=400,
        max_requests_per_second=9,
        free_space_reserve=10,
        verify_on_open=True,
        heuristic_freshness=0.5,
    )
    assert config.client == ClientConfig(
        timeout=1,
        connect_timeout=2,
        retry=RetryConfig(max_retries=5),
        compression=False,
        user_agent="me",
        max_body=400,
    )
    assert config.scheduler == SchedulerConfig(
        max_concurrent=3,
        chunk_size=4,
        max_bandwidth=8,
        min_bandwidth=7,
        monitor_bandwidth=False,
        memory_budget=400,
        max_requests_per_second=9,
    )
    assert config.cache == CacheConfig(
        directory="folder",
        max_size=6,
        memory_size=100,
        offline=True,
        free_space_reserve=10,
        verify_on_open=True,
        heuristic_freshness=0.5,
    )


def test_the_memory_tier_takes_a_quarter_of_the_budget_and_not_too_much() -> None:
    assert NetworkConfig(memory_budget=4 * GIB).cache.memory_size == 256 * MIB
    assert NetworkConfig(memory_budget=3).cache.memory_size == 0


def test_a_configuration_travels_whole() -> None:
    config = NetworkConfig(endpoints=(CdnEndpoint(URL, auth="t", headers={"a": "b"}),), max_bandwidth=5)
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_user_agent_names_the_package_and_its_version() -> None:
    assert NetworkConfig().user_agent == f"holotensor-net/{room.version()}" == ClientConfig().user_agent


@pytest.fixture
def unknown_version() -> Iterator[None]:
    room.version.cache_clear()
    yield
    room.version.cache_clear()


@pytest.mark.usefixtures("unknown_version")
def test_without_an_installed_package_there_is_still_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", _raise_not_found)
    assert room.version() == "0+unknown"


@pytest.mark.usefixtures("unknown_version")
def test_an_installed_package_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2 of {name}")
    assert room.version() == "1.2 of holotensor-net"


def _raise_not_found(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


# --- presets and environment


def endpoint_of(config: NetworkConfig) -> tuple[str, Any]:
    (endpoint,) = config.endpoints
    return endpoint.url, endpoint.auth


@pytest.mark.parametrize(
    ("environment", "token", "expected"),
    [
        ({}, None, ("https://huggingface.co", None)),
        ({"HF_TOKEN": "hub"}, None, ("https://huggingface.co", "hub")),
        ({"HF_TOKEN": "hub", "HOLOTENSOR_TOKEN": "ours"}, None, ("https://huggingface.co", "ours")),
        ({"HF_TOKEN": "hub", "HOLOTENSOR_TOKEN": "ours"}, "mine", ("https://huggingface.co", "mine")),
        ({"HF_TOKEN": "", "HOLOTENSOR_TOKEN": ""}, "", ("https://huggingface.co", None)),
        ({"HOLOTENSOR_ENDPOINT": "https://mirror"}, "mine", ("https://mirror", "mine")),
    ],
)
def test_the_hub_takes_argument_then_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], token: str | None, expected: Any
) -> None:
    _set(monkeypatch, environment)
    assert endpoint_of(NetworkConfig.huggingface_hub(token=token)) == expected


@pytest.mark.parametrize(
    ("preset", "url"),
    [(NetworkConfig.civitai, "https://civitai.com"), (lambda: NetworkConfig.custom_cdn(URL), URL)],
)
def test_other_servers_are_never_given_the_hub_token(
    monkeypatch: pytest.MonkeyPatch, preset: Callable[[], NetworkConfig], url: str
) -> None:
    _set(monkeypatch, {"HF_TOKEN": "hub"})
    assert endpoint_of(preset()) == (url, None)
    _set(monkeypatch, {"HOLOTENSOR_TOKEN": "ours"})
    assert endpoint_of(preset()) == (url, "ours")


def test_civitai_takes_a_token() -> None:
    assert endpoint_of(NetworkConfig.civitai("mine")) == ("https://civitai.com", "mine")


@pytest.mark.parametrize(
    "preset",
    [NetworkConfig.huggingface_hub, NetworkConfig.civitai, lambda **s: NetworkConfig.custom_cdn(URL, **s)],
)
def test_presets_take_settings(preset: Callable[..., NetworkConfig]) -> None:
    assert preset(timeout=5.0).timeout == 5.0
    assert preset(endpoints=(ENDPOINT,)).endpoints == (ENDPOINT,)


def test_the_environment_names_an_endpoint_where_the_configuration_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"endpoints.*HOLOTENSOR_ENDPOINT"):
        NetworkConfig().with_default_endpoint()
    _set(monkeypatch, {"HOLOTENSOR_ENDPOINT": URL, "HOLOTENSOR_TOKEN": "ours"})
    found = NetworkConfig(timeout=5.0).with_default_endpoint()
    assert (endpoint_of(found), found.timeout) == ((URL, "ours"), 5.0)
    own = NetworkConfig(endpoints="https://own")
    assert own.with_default_endpoint() is own


@pytest.mark.parametrize(
    ("value", "is_set"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" on ", True),
        ("0", False),
        ("", False),
        ("no", False),
        ("2", False),
    ],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [("HOLOTENSOR_OFFLINE", room.offline), ("HOLOTENSOR_DISABLE_PROGRESS_BARS", room.progress_bars_disabled)],
)
def test_flags_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[], bool], value: str, is_set: bool
) -> None:
    assert read() is False
    _set(monkeypatch, {name: value})
    assert read() is is_set


@pytest.mark.parametrize("setting", [True, False])
def test_an_explicit_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, setting: bool) -> None:
    _set(monkeypatch, {"HOLOTENSOR_OFFLINE": str(int(not setting))})
    assert room.offline(setting) is setting
    assert CacheConfig(offline=setting).is_offline is setting
    assert CacheConfig().is_offline is not setting
    assert NetworkConfig(offline=setting).offline is setting
    assert NetworkConfig(offline=setting).cache.is_offline is setting


def test_offline_is_as_the_environment_has_it_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = NetworkConfig()
    derived = [plain, plain.with_endpoint(CdnEndpoint(URL)), pickle.loads(pickle.dumps(plain)), copy.copy(plain)]
    cache = plain.cache
    for value, is_offline in [("1", True), ("0", False)]:
        _set(monkeypatch, {"HOLOTENSOR_OFFLINE": value})
        assert [config.offline for config in derived] == [is_offline] * len(derived)
        assert cache.is_offline is is_offline


@pytest.mark.parametrize(
    ("value", "level"), [(None, "WARNING"), ("debug", "DEBUG"), (" Error ", "ERROR"), ("loud", "WARNING")]
)
def test_verbosity_is_a_level_or_the_default(monkeypatch: pytest.MonkeyPatch, value: str | None, level: str) -> None:
    if value is not None:
        _set(monkeypatch, {"HOLOTENSOR_VERBOSITY": value})
    assert room.verbosity() == level


@pytest.mark.parametrize(
    ("environment", "setting", "root"),
    [
        ({}, None, "home/.cache/holotensor-net"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, None, "xdg/holotensor-net"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "HOLOTENSOR_HOME": "{tmp}/ours"}, None, "ours/cache"),
        ({"HOLOTENSOR_HOME": "~/ours"}, None, "home/ours/cache"),
        ({"HOLOTENSOR_HOME": "{tmp}/ours", "HOLOTENSOR_CACHE": "{tmp}/here"}, None, "here"),
        ({"HOLOTENSOR_CACHE": "~/here"}, None, "home/here"),
        ({"HOLOTENSOR_CACHE": "{tmp}/here"}, "{tmp}/explicit", "explicit"),
        ({}, "~/explicit", "home/explicit"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the platform's folder is named as on Linux")
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], setting: str | None, root: str
) -> None:
    monkeypatch.delenv("HOLOTENSOR_CACHE")
    _set(monkeypatch, {"HOME": str(tmp_path / "home")})
    _set(monkeypatch, {name: value.format(tmp=tmp_path) for name, value in environment.items()})
    config = CacheConfig(directory=None if setting is None else setting.format(tmp=tmp_path))
    assert config.root == tmp_path / root


def test_there_need_not_be_a_disk_cache() -> None:
    assert CacheConfig(directory=False).root is None


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("field", "value"), [("hedging", "yes"), ("hedging", 2), ("region", 1)])
def test_hedging_and_region_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=field):
        NetworkConfig(endpoints=URL, **{field: value})
