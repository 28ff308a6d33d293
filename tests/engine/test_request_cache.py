"""Requests and the cache: which answers can stand for which questions, and that a cache that fails costs no byte."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.config import CacheConfig, CdnEndpoint
from holotensor_net.engine.request_cache import Proven, RequestCache, contradicts
from holotensor_net.storage.cache import FragmentCache
from holotensor_net.storage.memory import MemoryPart
from holotensor_net.storage.parts import PartFile
from holotensor_net.values import HeadInfo, LoadRequest, RangeRequest, Validator

V1 = Validator('"v1"', "Tue, 15 Nov 1994 12:45:26 GMT", True)
V2 = Validator('"v2"', "Wed, 16 Nov 1994 12:45:26 GMT", True)
WEAK = replace(V1, etag='W/"v1"', is_strong=False)
DATED = Validator(None, V1.last_modified, False)
OLD = replace(DATED, is_strong=True)
CHECKSUM = "sha256:" + "0" * 64
FRESH = {"cache-control": "max-age=3600"}

ENDPOINTS = (CdnEndpoint("https://one.example.com"), CdnEndpoint("https://two.example.com"))
REQUEST = LoadRequest("id", "file.bin")
PART = LoadRequest("id", "file.bin", byte_range=RangeRequest(2, 6))


def head_of(validator: Validator = V1, size: int | None = 10, **headers: str) -> HeadInfo:
    told = {"etag": validator.etag, "last-modified": validator.last_modified}
    all_of_it = {name.replace("_", "-"): value for name, value in headers.items()}
    return HeadInfo(size, validator, headers={k: v for k, v in told.items() if v is not None} | all_of_it)


@pytest.fixture
def store(tmp_path: Path) -> FragmentCache:
    return FragmentCache(CacheConfig(directory=tmp_path / "cache"))


@pytest.fixture
def cache(store: FragmentCache) -> RequestCache:
    return RequestCache(store, ENDPOINTS)


def keep(
    cache: RequestCache,
    request: LoadRequest = REQUEST,
    data: bytes = b"0123456789",
    endpoint: int = 0,
    head: HeadInfo | None = None,
) -> memoryview:
    """Take a fragment's bytes all the way into the cache."""
    head = head or head_of()
    start = request.byte_range.start if request.byte_range is not None else 0
    destination = cache.destination(len(data), head)
    destination.write(0, memoryview(data))
    wanted = RangeRequest(start, start + len(data))
    return cache.keep([Proven(request, head, wanted, destination, destination.view())], endpoint)[0]


# --- what is known by which name


DIFFERENT: list[tuple[CdnEndpoint, LoadRequest]] = [
    (CdnEndpoint("https://a"), REQUEST),
    (CdnEndpoint("https://b"), REQUEST),
    (CdnEndpoint("https://a", auth="one"), REQUEST),
    (CdnEndpoint("https://a", auth="two"), REQUEST),
    (CdnEndpoint("https://a", headers={"X-Key": "one"}), REQUEST),
    (CdnEndpoint("https://a"), replace(REQUEST, path="other.bin")),
    (CdnEndpoint("https://a"), replace(REQUEST, path="file.bin?v=2")),
    (CdnEndpoint("https://a"), PART),
    (CdnEndpoint("https://a"), replace(PART, byte_range=RangeRequest(2, 7))),
    (CdnEndpoint("https://a"), replace(REQUEST, checksum=CHECKSUM)),
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(range(len(DIFFERENT)), 2)))
def test_what_differs_in_place_range_or_credentials_has_another_key(store: FragmentCache, one: int, other: int) -> None:
    keys = [RequestCache(store, [DIFFERENT[i][0]]).key(DIFFERENT[i][1], 0) for i in (one, other)]
    assert keys[0] != keys[1]


SAME: list[dict[str, Any]] = [
    {"fragment_id": "other"},
    {"priority": 0},
    {"importance": 1.0},
    {"deadline": 5.0},
    {"expected_size": 10},
    {"validator": V1},
    {"allow_short": True},
]


@pytest.mark.parametrize("fields", SAME, ids=lambda fields: next(iter(fields)))
def test_how_urgent_or_how_called_changes_no_key(cache: RequestCache, fields: dict[str, Any]) -> None:
    assert cache.key(replace(REQUEST, **fields), 0) == cache.key(REQUEST, 0)


def test_what_has_a_digest_is_the_same_wherever_it_comes_from(cache: RequestCache) -> None:
    one = cache.key(replace(REQUEST, checksum=CHECKSUM), 0)
    assert one == cache.key(replace(PART, path="elsewhere", checksum=CHECKSUM), 1)


# --- what can stand for an answer


def test_what_was_never_kept_is_not_found(cache: RequestCache) -> None:
    assert cache.find(REQUEST) is None


FITS: list[tuple[str, dict[str, Any], dict[str, Any], bool | None]] = [
    # what was kept, what is asked for, whether it is fresh (None: it does not fit at all)
    ("fresh by its headers", {"head": head_of(**{"cache_control": "max-age=60"})}, {}, True),
    ("to be confirmed", {}, {}, False),
    ("to be confirmed each time", {"head": head_of(**{"cache_control": "no-cache"})}, {}, False),
    ("of the size expected", {}, {"expected_size": 10}, False),
    ("of another size", {}, {"expected_size": 11}, None),
    ("of the version pinned", {}, {"validator": V1}, True),
    ("of the tag pinned, whatever its date", {}, {"validator": replace(V1, last_modified=None)}, True),
    ("of the date pinned", {"head": head_of(OLD)}, {"validator": OLD}, True),
    ("of another date", {"head": head_of(OLD)}, {"validator": replace(OLD, last_modified="another")}, None),
    ("of a date, where a tag is pinned", {"head": head_of(OLD)}, {"validator": V1}, None),
    ("of another version", {}, {"validator": V2}, None),
    ("of a weak version, strongly pinned", {"head": head_of(WEAK)}, {"validator": V1}, None),
    ("of a weak version, weakly pinned", {"head": head_of(WEAK)}, {"validator": WEAK}, False),
    ("surely not of the version that is weakly pinned", {"head": head_of(V2)}, {"validator": WEAK}, None),
]


@pytest.mark.parametrize(("kept", "asked", "is_fresh"), [case[1:] for case in FITS], ids=[case[0] for case in FITS])
def test_what_is_kept_is_found_if_it_fits(
    cache: RequestCache, kept: dict[str, Any], asked: dict[str, Any], is_fresh: bool | None
) -> None:
    keep(cache, **kept)
    found = cache.find(replace(REQUEST, **asked))
    assert (None if found is None else found.is_fresh) is is_fresh
    if found is not None:
        assert cache.data(found) == b"0123456789"


def test_a_short_answer_fits_only_who_allows_it(cache: RequestCache) -> None:
    keep(cache, replace(PART, allow_short=True), b"23")
    assert cache.find(PART) is None
    assert cache.find(replace(PART, allow_short=True)) is not None


def test_what_has_a_digest_needs_no_confirmation_and_no_version(cache: RequestCache) -> None:
    keep(cache, replace(REQUEST, checksum=CHECKSUM), head=head_of(V1))
    found = cache.find(replace(REQUEST, checksum=CHECKSUM, validator=V2))
    assert found is not None
    assert found.is_fresh


def test_a_fresh_answer_of_any_endpoint_comes_before_a_stale_one(cache: RequestCache) -> None:
    keep(cache, data=b"stale", endpoint=0)
    assert (found := cache.find(REQUEST)) is not None
    assert (found.endpoint, found.is_fresh) == (0, False)
    keep(cache, data=b"fresh", endpoint=1, head=head_of(**{"cache_control": "max-age=60"}))
    assert (found := cache.find(REQUEST)) is not None
    assert (found.endpoint, found.is_fresh, cache.data(found)) == (1, True, b"fresh")


def test_of_two_stale_answers_the_first_endpoint_s_is_confirmed(cache: RequestCache) -> None:
    for endpoint in (1, 0):
        keep(cache, endpoint=endpoint)
    assert (found := cache.find(REQUEST)) is not None
    assert found.endpoint == 0


def test_what_has_lost_its_bytes_is_no_answer_to_be_confirmed(tmp_path: Path) -> None:
    cache = RequestCache(FragmentCache(CacheConfig(directory=tmp_path / "cache", memory_size=0)), ENDPOINTS)
    keep(cache)
    assert cache.find(REQUEST, unseen=True) is not None
    (blob,) = (path for path in (tmp_path / "cache" / "blobs").rglob("*") if path.is_file())
    blob.unlink()
    assert cache.find(REQUEST, unseen=True) is None


def test_what_is_found_tells_what_the_network_said_of_the_object(cache: RequestCache) -> None:
    keep(cache, PART, b"2345", head=head_of(V1, 1000, content_type="text/plain"))
    found = cache.find(PART)
    assert found is not None
    assert (found.head.size, found.head.validator) == (1000, V1)
    assert found.head.headers["content-type"] == "text/plain"


def test_no_credential_of_a_url_is_written_down(store: FragmentCache) -> None:
    keep(RequestCache(store, ENDPOINTS), LoadRequest("id", "file.bin?token=sesame"))
    (entry,) = store
    assert entry.url == "https://one.example.com/file.bin?…"
    files = [path for path in Path(store.config.directory or "").rglob("*") if path.is_file()]
    assert files
    assert all(b"sesame" not in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("said", "pinned", "differs"),
    [
        (V1, V1, False),
        (V2, V1, True),
        (WEAK, V1, False),
        (V1, WEAK, False),
        (V2, WEAK, True),
        (DATED, V1, False),
        (DATED, V2, True),
        (V2, DATED, True),
        (Validator(), V1, False),
        (V1, Validator(), False),
    ],
)
def test_what_contradicts_a_version(said: Validator, pinned: Validator, differs: bool) -> None:
    assert contradicts(said, pinned) is differs


@given(st.builds(Validator, st.none() | st.sampled_from(['"a"', 'W/"a"', '"b"']), st.none() | st.sampled_from("de")))
def test_no_version_contradicts_itself(validator: Validator) -> None:
    assert not contradicts(validator, validator)


# --- confirmed by the server


def test_a_304_makes_the_answer_good_again(cache: RequestCache) -> None:
    keep(cache)
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.confirm(found, head_of(**{"cache_control": "max-age=60"})) == b"0123456789"
    again = cache.find(REQUEST)
    assert again is not None
    assert again.is_fresh


@pytest.mark.parametrize("said", [V2, replace(V2, etag=None)])
def test_a_304_that_speaks_of_another_version_confirms_nothing(cache: RequestCache, said: Validator) -> None:
    keep(cache, head=head_of(replace(V1, etag=said.etag and V1.etag)))
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.confirm(found, head_of(said, **{"cache_control": "max-age=60"})) is None
    assert (again := cache.find(REQUEST)) is not None
    assert not again.is_fresh


@pytest.mark.parametrize(("has_disk", "by_whom"), [(True, "the same"), (True, "another"), (False, "the same")])
def test_a_304_confirms_nothing_that_has_come_meanwhile(tmp_path: Path, has_disk: bool, by_whom: str) -> None:
    now = 1e9
    config = CacheConfig(directory=tmp_path / "cache" if has_disk else False)

    def opened() -> RequestCache:
        return RequestCache(FragmentCache(config, clock=lambda: now), ENDPOINTS, clock=lambda: now)

    cache = opened()
    keep(cache, data=b"0123456789")
    now += 10
    found = cache.find(REQUEST)
    assert found is not None
    keep(cache if by_whom == "the same" else opened(), data=b"abcdefghij", head=head_of(V2))
    now += 1
    nameless = HeadInfo(None, headers=FRESH)
    if by_whom == "the same":
        assert cache.confirm(found, nameless, REQUEST, asked_at=now - 0.5) is None
        assert cache.told(found).etag == '"v1"'
    else:  # what this one has in memory was confirmed, and stays there
        assert cache.confirm(found, nameless, REQUEST, asked_at=now - 0.5) == b"0123456789"
        assert cache.told(found).etag == '"v1"'
    later = cache if by_whom == "the same" else opened()
    latest = later.find(REQUEST)
    assert latest is not None
    assert (latest.entry.etag, latest.is_fresh) == ('"v2"', False)
    assert later.data(latest) == b"abcdefghij"


@pytest.mark.parametrize(("set_back", "counts"), [(0, True), (3600, False)])
def test_what_came_before_the_clock_was_set_back_did_not_come_since(set_back: float, counts: bool) -> None:
    now = 1e9
    cache = RequestCache(FragmentCache(CacheConfig(directory=False), clock=lambda: now), ENDPOINTS, clock=lambda: now)
    keep(cache)
    now -= set_back
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.came_since(found, now - 1) is counts


def test_a_304_that_forbids_to_store_still_gives_the_bytes(cache: RequestCache) -> None:
    keep(cache)
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.confirm(found, head_of(**{"cache_control": "no-store"})) == b"0123456789"
    assert cache.find(REQUEST) is None


def test_what_is_gone_cannot_be_confirmed(cache: RequestCache, store: FragmentCache) -> None:
    keep(cache)
    found = cache.find(REQUEST)
    assert found is not None
    store.clear()
    assert cache.confirm(found, head_of()) is None
    assert cache.data(found) is None


@pytest.mark.parametrize(
    ("cache_control", "age", "serves"),
    [
        ("max-age=10, stale-if-error=60", 69, True),
        ("max-age=10, stale-if-error=60", 71, False),
        ("max-age=10, stale-if-error=60, must-revalidate", 11, False),
        ("max-age=10", 11, False),
    ],
)
def test_what_is_stale_stands_in_as_long_as_its_server_allowed(
    store: FragmentCache, cache_control: str, age: float, serves: bool
) -> None:
    keep(RequestCache(store, ENDPOINTS), head=head_of(cache_control=cache_control))
    (entry,) = store
    cache = RequestCache(store, ENDPOINTS, clock=lambda: entry.cached_at + age)
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.stale(found, REQUEST) == (b"0123456789" if serves else None)


def test_what_is_stale_does_not_stand_in_for_another_version_that_was_seen_since(store: FragmentCache) -> None:
    head = head_of(cache_control="max-age=0, stale-if-error=60")
    cache = RequestCache(store, ENDPOINTS)
    keep(cache, head=head)
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.stale(found, REQUEST) is not None
    keep(cache, PART, b"2345", head=head_of(V2))
    assert cache.stale(found, REQUEST) is None


# --- where bytes go


def test_bytes_go_to_the_disk_where_there_is_one(cache: RequestCache) -> None:
    destination = cache.destination(1 << 18, head_of())
    assert isinstance(destination, PartFile)
    destination.discard()


SOUND: dict[str, Any] = {
    **{"etag": V1.etag, "last_modified": V1.last_modified, "is_strong": True, "object_size": 10, "byte_range": [2, 6]},
}
NOTES: list[tuple[str, dict[str, Any], bool]] = [
    ("sound", {}, True),
    ("of a date", {"etag": None}, True),
    ("of a weak tag that is called strong", {"etag": 'W/"v1"'}, False),
    ("of a strong tag that is called weak", {"is_strong": False}, False),
    ("of a tag that is none", {"etag": "v1"}, False),
    ("of a date that is none", {"etag": None, "last_modified": "a\r\nb"}, False),
    ("of nothing", {"etag": None, "last_modified": None}, False),
    ("of an object that ends before it does", {"object_size": 5}, False),
    ("of another range", {"byte_range": [2, 7]}, False),
    ("of the whole", {"byte_range": None}, False),
]


@pytest.mark.parametrize(("fields", "is_resumed"), [case[1:] for case in NOTES], ids=[case[0] for case in NOTES])
def test_part_is_gone_on_with_if_its_note_makes_sense(
    store: FragmentCache, cache: RequestCache, fields: dict[str, Any], is_resumed: bool
) -> None:
    part = store.create(4, key=cache.key(PART, 0), note={**SOUND, **fields})
    assert part is not None
    part.write(0, b"23")
    part.settle(0, 2)
    part.keep()
    found = cache.resume(PART)
    assert (found is not None) is is_resumed
    if found is not None:
        assert found.missing == [RangeRequest(4, 6)]
        found.destination.discard()
    assert not cache.has_part(PART)
    assert cache.resume(PART) is None


@pytest.mark.parametrize(("spare", "least"), [(0, 1 << 18), (1 << 26, 1 << 20), (1 << 30, 8 << 20), (1 << 40, 8 << 20)])
def test_what_is_too_short_to_be_resumed_goes_to_memory_first_if_there_is_enough(
    store: FragmentCache, spare: int, least: int
) -> None:
    cache = RequestCache(store, ENDPOINTS, spare=spare)
    assert isinstance(cache.destination(least - 1, head_of()), MemoryPart)
    part = cache.destination(least, head_of())
    assert isinstance(part, PartFile)
    part.discard()


@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("value", ["no-store", "private, No-Store"])
def test_bytes_that_must_not_be_stored_go_to_memory(cache: RequestCache, value: str, size: int | None) -> None:
    assert isinstance(cache.destination(size, head_of(**{"cache_control": value})), MemoryPart)


def without_disk(folder: Path) -> CacheConfig:
    return CacheConfig(directory=False)


def too_small(folder: Path) -> CacheConfig:
    return CacheConfig(directory=folder, max_size=3)


def in_the_way(folder: Path) -> CacheConfig:
    folder.write_bytes(b"a file where the folder should be")
    return CacheConfig(directory=folder)


@pytest.mark.parametrize("config", [without_disk, too_small, in_the_way])
def test_without_a_disk_that_takes_part_memory_has_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Callable[[Path], CacheConfig]
) -> None:
    cache = RequestCache(FragmentCache(config(tmp_path / "cache")), ENDPOINTS)
    assert isinstance(cache.destination(10, head_of()), MemoryPart)
    assert [keep(cache, replace(REQUEST, path=str(number))) for number in range(3)] == [b"0123456789"] * 3
    found = cache.find(replace(REQUEST, path="2"))
    assert found is not None
    assert cache.data(found) == b"0123456789"
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (1 if config is in_the_way else 0)


# --- what is kept


@pytest.mark.parametrize("data", [b"", b"x", b"0123456789" * 20_000])
def test_what_is_kept_is_given_and_found_again(cache: RequestCache, data: bytes) -> None:
    view = keep(cache, data=data, head=head_of(size=len(data)))
    assert view == data
    assert view.readonly
    found = cache.find(REQUEST)
    assert found is not None
    assert cache.data(found) == data
    assert found.entry.size == len(data)


@pytest.mark.parametrize("headers", [{"cache_control": "no-store"}, {"vary": "*"}], ids=["no-store", "vary"])
def test_what_must_not_be_kept_is_given_all_the_same(cache: RequestCache, headers: dict[str, str]) -> None:
    assert keep(cache, head=head_of(**headers)) == b"0123456789"
    assert cache.find(REQUEST) is None


def test_the_latest_answer_is_the_one_that_is_kept(cache: RequestCache) -> None:
    keep(cache, data=b"old bytes!")
    keep(cache, data=b"new bytes!", head=head_of(V2))
    found = cache.find(REQUEST)
    assert found is not None
    assert (cache.data(found), found.entry.etag) == (b"new bytes!", '"v2"')


def test_a_cache_that_cannot_keep_costs_no_byte(
    cache: RequestCache, store: FragmentCache, caplog: pytest.LogCaptureFixture
) -> None:
    destination = cache.destination(10, head_of())
    destination.write(0, memoryview(b"0123456789"))
    proven = Proven(REQUEST, head_of(), RangeRequest(0, 9), destination, destination.view())  # sizes that differ
    assert cache.keep([proven], 0) == [b"0123456789"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["not cached"]
    assert cache.find(REQUEST) is None
    assert not list(Path(store.config.directory or "").rglob("partial/*"))


def test_an_answer_that_says_the_same_of_its_object_has_its_own_date(cache: RequestCache) -> None:
    parts = [replace(PART, byte_range=RangeRequest(at, at + 1)) for at in range(4)]
    said: list[dict[str, str]] = [
        {"date": "Tue, 15 Nov 1994 12:45:30 GMT", "cache_control": "max-age=9", "set_cookie": "secret"},
        {"date": "Tue, 15 Nov 1994 12:45:31 GMT", "cache_control": "max-age=9", "set_cookie": "secret"},
        {"date": "Tue, 15 Nov 1994 12:45:32 GMT", "cache_control": "max-age=8"},
        {"date": "Tue, 15 Nov 1994 12:45:33 GMT", "cache_control": "no-store"},
    ]
    for part, headers in zip(parts, said, strict=True):
        assert keep(cache, part, b"x", head=head_of(**headers)) == b"x"
    found = [cache.find(part) for part in parts]
    kept = [each.entry.headers for each in found if each is not None]
    assert [each["date"] for each in kept] == [each["date"] for each in said[:3]]
    assert [each["cache-control"] for each in kept] == ["max-age=9", "max-age=9", "max-age=8"]
    assert all("set-cookie" not in each for each in kept)


@pytest.mark.parametrize("other", [{"size": 11}, {"validator": V2}, {"vary": "user-agent"}])
def test_an_answer_that_says_something_else_is_kept_as_it_says(cache: RequestCache, other: dict[str, Any]) -> None:
    parts = [replace(PART, byte_range=RangeRequest(at, at + 1)) for at in range(2)]
    keep(cache, parts[0], b"x", head=head_of())
    keep(cache, parts[1], b"x", head=head_of(**other))
    found = cache.find(parts[1])
    assert found is not None
    expected = head_of(**other)
    assert (found.entry.object_size, found.entry.etag) == (expected.size, expected.etag)
    assert found.entry.headers.get("vary") == other.get("vary")
    assert (found.entry.variant is not None) == ("vary" in other)
