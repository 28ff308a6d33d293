"""What is handed to the wrong place, or is of the wrong kind, is named in a sentence, there and then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wire import Wire

from holotensor_net import (
    CacheConfig,
    CacheEntry,
    CacheKey,
    CdnEndpoint,
    ClientConfig,
    ConfigurationError,
    FragmentCache,
    HttpClient,
    InvalidUrl,
    LoadRequest,
    NetworkConfig,
    NetworkLoader,
    PrioritizedFragment,
    Priority,
    PriorityQueue,
    RetryConfig,
    Scheduler,
    StreamCache,
    StreamingLoader,
    fragment_id_of,
    open_model,
)

URL = "http://127.0.0.1:9"  # never asked
REQUEST = LoadRequest("rows", "model.bin")
OTHERS: list[Any] = ["model.bin", b"model.bin", 3, RetryConfig(), object()]


def loader() -> NetworkLoader:
    return NetworkLoader(NetworkConfig(endpoints=(CdnEndpoint(URL),), cache_dir=False))


@pytest.mark.parametrize("wrong", OTHERS, ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (NetworkLoader, "config"),
        (Scheduler, "config"),
        (FragmentCache, "config"),
        (lambda config: HttpClient(URL, config), "config"),
        (lambda config: open_model(URL + "/model.safetensors", config=config), "config"),
        (StreamingLoader, "loader"),
        (PrioritizedFragment, "request"),
    ],
    ids=["loader", "scheduler", "cache", "client", "model", "stream", "fragment"],
)
def test_what_is_built_of_something_else_says_so(kind: Callable[[Any], object], name: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} must be .*not {type(wrong).__name__}"):
        kind(wrong)


@pytest.mark.parametrize("wrong", [*OTHERS, None], ids=lambda wrong: type(wrong).__name__)
@pytest.mark.parametrize(
    "use",
    [
        NetworkLoader.load,
        NetworkLoader.enqueue,
        NetworkLoader.is_cached,
        lambda loader, wrong: loader.enqueue_many([wrong]),
        lambda loader, wrong: loader.load_range(wrong, 0, 1),
        lambda loader, wrong: loader.scheduler.enqueue(wrong),
        lambda loader, wrong: loader.scheduler.enqueue_many([wrong]),
        lambda loader, wrong: PriorityQueue().push(wrong),
    ],
)
def test_what_is_no_request_is_refused_before_it_is_queued(use: Callable[[Any, Any], object], wrong: Any) -> None:
    with loader() as tried:
        with pytest.raises(ConfigurationError, match=f"must be LoadRequest.*not {type(wrong).__name__}"):
            use(tried, wrong)
        assert tried.stats().queued == 0


@pytest.mark.parametrize("wrong", [[3], [None], [b"name"], "name"])
def test_a_stream_is_of_requests_and_names(wrong: Any) -> None:
    with loader() as tried, pytest.raises(ConfigurationError, match="request"):
        tried.stream(wrong)


@pytest.mark.parametrize("wrong", ["HIGH", 9, None])
def test_a_level_that_is_none_is_refused_even_where_there_is_nothing_to_move(wrong: Any) -> None:
    with loader() as tried:
        for place in (tried, tried.scheduler, PriorityQueue()):
            with pytest.raises(ConfigurationError, match=f"priority must be a Priority, not {wrong!r}"):
                place.update_priority("rows", wrong)
        assert not tried.update_priority("rows", Priority.HIGH)


@pytest.mark.parametrize(("start", "stop"), [("0", 1), (0, "1"), (None, None), (0, None), (2, 1), (0.5, 1)])
def test_a_part_that_is_none_is_refused(start: Any, stop: Any) -> None:
    with loader() as tried, pytest.raises(ConfigurationError, match="RangeRequest needs whole numbers"):
        tried.load_range(REQUEST, start, stop)


@pytest.mark.parametrize("wrong", [3, None, "0-1", (1,), (1, 2, 3), [0, 1]])
def test_a_range_for_the_client_is_a_pair(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="byte_range must be a RangeRequest or a pair of numbers"):
        HttpClient(URL).fetch_range("model.bin", wrong)


@pytest.mark.parametrize("wrong", [3, None, b"model.bin"])
def test_a_path_is_a_string(wrong: Any) -> None:
    with pytest.raises(InvalidUrl, match=f"a path must be a string, not {type(wrong).__name__}"):
        HttpClient(URL).fetch(wrong)


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("wrong", [3, None, b"key"])
def test_a_key_of_the_cache_is_a_string(tmp_path: Path, disk: bool, wrong: Any) -> None:
    with FragmentCache(CacheConfig(directory=tmp_path if disk else False)) as cache:
        uses: list[Callable[[], object]] = [
            lambda: cache.get(wrong),
            lambda: cache.put(wrong, b"bytes"),
            lambda: cache.get_entry(wrong),
            lambda: cache.needs_revalidation(wrong),
            lambda: cache.remove(wrong),
        ]
        for use in uses:
            with pytest.raises(ConfigurationError, match=f"must be str, not {type(wrong).__name__}"):
                use()
        assert wrong not in cache
        assert list(cache) == []


@pytest.mark.parametrize("wrong", [-1, "1", None, 1.5, True])
def test_a_size_that_is_none_does_not_empty_the_cache(tmp_path: Path, wrong: Any) -> None:
    with FragmentCache(CacheConfig(directory=tmp_path)) as cache:
        cache.put("key", b"bytes")
        with pytest.raises(ConfigurationError, match="max_size must be a whole number, 0 or more"):
            cache.prune(wrong)
        assert "key" in cache
        with pytest.raises(ConfigurationError, match="entry must be CacheEntry"):
            cache.put("key", b"bytes", wrong if wrong is not None else "entry")


@pytest.mark.parametrize("size", [-1, "1", None, 1.5])
def test_an_entry_has_a_size(size: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"CacheEntry\.size must be a number of bytes"):
        CacheEntry("key", size)


@pytest.mark.parametrize("wrong", ["key", b"key", 3, None])
def test_a_result_is_kept_under_a_cache_key(wrong: Any) -> None:
    cache = StreamCache(4)
    for use in (
        lambda: cache.get_chunk(wrong),
        lambda: cache.put_chunk(wrong, 1),
        lambda: cache.load_state("filter", wrong, 1),
    ):
        with pytest.raises(TypeError, match=f"a CacheKey is wanted here, not {type(wrong).__name__}"):
            use()
    assert cache.get_chunk(CacheKey.of("key")) is None


@pytest.mark.parametrize("wrong", [None, "text", 3])
def test_what_has_no_bytes_has_no_content_id(wrong: Any) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        fragment_id_of(wrong)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("headers", wrong) for wrong in [None, 3, "name: value", {"name": 3}, {3: "value"}]),
        *(("proxies", wrong) for wrong in [3, "http://proxy", {"https": 3}]),
    ],
)
def test_an_endpoint_is_described_by_text(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"CdnEndpoint.{field}"):
        CdnEndpoint(URL, **{field: wrong})


@pytest.mark.parametrize("wrong", [3, True, "a\0b", b"folder\0"])
def test_a_folder_that_no_file_system_has_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="cache_dir"):
        NetworkConfig(cache_dir=wrong)
    with pytest.raises(ConfigurationError, match="directory"):
        CacheConfig(directory=wrong)


@pytest.mark.parametrize("wrong", [{"retry": None}, {"retry": 3}, {"user_agent": None}, {"user_agent": "a\nb"}])
def test_what_a_client_is_told_is_checked_there_too(wrong: dict[str, Any]) -> None:
    for kind in (ClientConfig, NetworkConfig):
        with pytest.raises(ConfigurationError, match=f"{kind.__name__}.{next(iter(wrong))}"):
            kind(**wrong)


def test_what_a_function_gives_as_a_credential_is_looked_at() -> None:
    for wrong in (3, b"token", ("user",)):
        with Wire() as wire:
            endpoint = CdnEndpoint(wire.url, auth=lambda wrong=wrong: wrong)  # type: ignore[misc]
            with NetworkLoader(NetworkConfig(endpoints=(endpoint,), cache_dir=False)) as tried:
                error = tried.load(REQUEST).error
            assert isinstance(error, ConfigurationError)
            assert f"must return a token, not {type(wrong).__name__}" in str(error)


def test_each_room_takes_the_whole_configuration(tmp_path: Path) -> None:
    config = NetworkConfig(cache_dir=tmp_path, max_cache_size=5000, max_concurrent=3, timeout=7.0)
    with FragmentCache(config) as cache:
        assert cache.config == config.cache
    assert Scheduler(config).config.max_concurrent == 3
    assert HttpClient(URL, config).config.timeout == 7.0
