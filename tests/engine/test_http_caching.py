"""A private HTTP cache, case by case: what the public HTTP cache test suite (http-tests/cache-tests) asks of caches,
restated for a loader, its cache folder and an origin over a socket.

Cases keep the suite's names, so that the two can be compared. What does not apply to a client that asks with GET alone,
and keeps no headers but those that caching needs, is listed at the end with the reason.
"""

from __future__ import annotations

import email.utils
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wire import RESET, Request, Script, Wire

from holotensor_net import CdnEndpoint, LoadRequest, LoadResult, NetworkConfig, NetworkLoader, OfflineError, RetryConfig

START = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
PAUSE = 3.0  # seconds between the first request and the second: more than the short lifetimes, less than the long

Headers = Sequence[tuple[str, "str | int"]]
"""Lines of an answer; a number is the date that many seconds after the first request."""

CACHED, ASKED, CONFIRMED = "cached", "asked", "confirmed"
"""What becomes of the second request: answered without the origin; answered anew; sent with a condition, and a 304
confirms the first answer."""


def text_of(lines: Headers) -> Iterable[str]:
    for name, value in lines:
        text = email.utils.formatdate(START + value, usegmt=True) if isinstance(value, int) else value
        yield f"{name}: {text}"


def said(status: int, lines: Headers, body: bytes = b"") -> bytes:
    length = () if status in (204, 304) else (f"Content-Length: {len(body)}",)
    return "\r\n".join([f"HTTP/1.1 {status} As Scripted", *text_of(lines), *length, "", ""]).encode("latin-1") + body


class Origin:
    """Answers with a body that counts its answers, and with a 304 where the version it has is the one asked about."""

    def __init__(self, *answers: Headers, status: int = 200) -> None:
        self.answers = answers
        self.status = status
        self.asked: list[Request] = []
        self.fails: bytes | None = None
        self.cuts = False

    def __call__(self, request: Request) -> Script:
        self.asked.append(request)
        count = len(self.asked)
        if self.cuts:
            return [RESET]
        if self.fails is not None:
            return self.fails
        lines = self.answers[min(count, len(self.answers)) - 1]
        own = dict(line.split(": ", 1) for line in text_of(lines))
        of_tag, of_date = request.headers.get("if-none-match"), request.headers.get("if-modified-since")
        if (of_tag is not None and of_tag == own.get("ETag")) or (
            of_date is not None and of_tag is None and of_date == own.get("Last-Modified")
        ):
            return said(304, lines)
        body = b"answer %d of the origin" % count
        if (wanted := request.headers.get("range")) is None or self.status != 200:
            return said(self.status, lines, body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        piece = body[int(first) : int(last) + 1]
        there = f"bytes {int(first)}-{int(first) + len(piece) - 1}/{len(body)}"
        return said(206, [*lines, ("Content-Range", there)], piece)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Scene:
    """One cache folder and one origin; every request comes from a loader of its own, as from another run."""

    folder: Path
    wire: Wire
    clock: Clock = field(default_factory=Clock)
    heuristic: float = 0.0

    def loader(self, *, offline: bool = False, **endpoint: Any) -> NetworkLoader:
        config = NetworkConfig(
            endpoints=(CdnEndpoint(self.wire.url, **endpoint),),
            cache_dir=self.folder,
            retry=RetryConfig(max_retries=0),
            timeout=5.0,
            offline=offline,
            heuristic_freshness=self.heuristic,
        )
        return NetworkLoader(config, clock=self.clock)

    def ask(self, request: LoadRequest | None = None, *, offline: bool = False, **endpoint: Any) -> LoadResult:
        with self.loader(offline=offline, **endpoint) as loader:
            return loader.load(request or LoadRequest("model", "model.bin"))


def has_condition(request: Request) -> bool:
    return "if-none-match" in request.headers or "if-modified-since" in request.headers


def outcome(scene: Scene, origin: Origin, **endpoint: Any) -> str:
    """What becomes of a request, which must get the bytes that belong to that."""
    before = len(origin.asked)
    result = scene.ask(**endpoint)
    if len(origin.asked) == before:
        assert bytes(result.data) == b"answer 1 of the origin"
        return CACHED
    assert len(origin.asked) == before + 1
    if bytes(result.data) == b"answer 1 of the origin":
        assert has_condition(origin.asked[-1])
        return CONFIRMED
    assert bytes(result.data) == b"answer %d of the origin" % len(origin.asked)
    return ASKED


# --- one answer, and what it says of the next request: (name, lines of the answer, outcome)

FRESH: Headers = [("Cache-Control", "max-age=3600")]


def control(value: str) -> Headers:
    return [("Cache-Control", value)]


def expires(value: str) -> Headers:
    return [("Expires", value), ("Date", 0)]


def age(*values: str, control: str = "max-age=3600") -> Headers:
    return [("Date", 0), ("Cache-Control", control), *(("Age", value) for value in values)]


TAG: Headers = [("ETag", '"abcd"')]
DAY = 24 * 3600

FRESHNESS: list[tuple[str, Headers, str]] = [
    ("freshness-none", [], ASKED),
    ("freshness-max-age", FRESH, CACHED),
    ("freshness-max-age-stale", control("max-age=2"), ASKED),
    ("freshness-max-age-0", control("max-age=0"), ASKED),
    ("freshness-max-age-max-minus-1", control("max-age=2147483647"), CACHED),
    ("freshness-max-age-max", control("max-age=2147483648"), CACHED),
    ("freshness-max-age-max-plus-1", control("max-age=2147483649"), CACHED),
    ("freshness-max-age-max-plus", control("max-age=99999999999"), CACHED),
    ("freshness-max-age-age", age("7200"), ASKED),
    ("freshness-max-age-date", [("Date", -7200), *FRESH], ASKED),
    ("freshness-max-age-expires", [*FRESH, ("Expires", -7200), ("Date", 0)], CACHED),
    ("freshness-max-age-expires-invalid", [*FRESH, ("Expires", "0"), ("Date", 0)], CACHED),
    ("freshness-max-age-0-expires", [("Expires", 3600), *control("max-age=0"), ("Date", 0)], ASKED),
    ("freshness-max-age-extension", control("foobar, max-age=3600"), CACHED),
    ("freshness-max-age-case-insenstive", control("MaX-aGe=3600"), CACHED),
    ("freshness-max-age-negative", control("max-age=-3600"), ASKED),
    ("freshness-max-age-s-maxage-private", control("s-maxage=3600, max-age=1"), ASKED),
    ("freshness-max-age-s-maxage-private-multiple", [*control("s-maxage=3600"), *control("max-age=1")], ASKED),
    # forms of max-age: one that contradicts itself or breaks the grammar is not trusted
    ("freshness-max-age-two-fresh-stale-sameline", control("max-age=1800, max-age=1"), ASKED),
    ("freshness-max-age-two-fresh-stale-sepline", [*control("max-age=1800"), *control("max-age=1")], ASKED),
    ("freshness-max-age-two-stale-fresh-sameline", control("max-age=1, max-age=1800"), ASKED),
    ("freshness-max-age-two-stale-fresh-sepline", [*control("max-age=1"), *control("max-age=1800")], ASKED),
    ("freshness-max-age-quoted", control('max-age="3600"'), CACHED),
    ("freshness-max-age-ignore-quoted", control('extension="max-age=3600", max-age=1'), ASKED),
    ("freshness-max-age-ignore-quoted-rev", control('max-age=1, extension="max-age=3600"'), ASKED),
    ("freshness-max-age-space-before-equals", control("max-age =3600"), ASKED),
    ("freshness-max-age-space-after-equals", control("max-age= 3600"), ASKED),
    ("freshness-max-age-leading-zero", control("max-age=003600"), CACHED),
    ("freshness-max-age-single-quoted", control("max-age='3600'"), ASKED),
    ("freshness-max-age-decimal-zero", control("max-age=3600.0"), ASKED),
    ("freshness-max-age-decimal-five", control("max-age=3600.5"), ASKED),
    ("freshness-max-age-a100", control("max-age=a3600"), ASKED),
    ("freshness-max-age-100a", control("max-age=3600a"), ASKED),
    # Age
    ("age-parse-nonnumeric", age("abc"), CACHED),
    ("age-parse-negative", age("-7200"), CACHED),
    ("age-parse-float", age("7200.0"), CACHED),
    ("age-parse-large-minus-one", age("2147483647"), ASKED),
    ("age-parse-large", age("2147483648"), ASKED),
    ("age-parse-larger", age("2147483649"), ASKED),
    ("age-parse-suffix", age("7200, 0"), ASKED),
    ("age-parse-prefix", age("0, 7200"), CACHED),
    ("age-parse-suffix-twoline", age("7200", "0"), ASKED),
    ("age-parse-prefix-twoline", age("0", "7200"), CACHED),
    ("age-parse-dup-0", age("0, 0"), CACHED),
    ("age-parse-dup-0-twoline", age("0", "0"), CACHED),
    ("age-parse-dup-old", age("3600", "3600", control="max-age=10000"), CACHED),
    ("age-parse-parameter", age("7200;foo=bar"), CACHED),
    ("age-parse-numeric-parameter", age("7200;foo=111"), CACHED),
    # Expires
    ("freshness-expires-future", [("Expires", 30 * DAY), ("Date", 0)], CACHED),
    ("freshness-expires-past", [("Expires", -30 * DAY), ("Date", 0)], ASKED),
    ("freshness-expires-present", [("Expires", 0), ("Date", 0)], ASKED),
    ("freshness-expires-old-date", [("Expires", 300), ("Date", 400)], ASKED),
    ("freshness-expires-invalid", expires("0"), ASKED),
    ("freshness-expires-invalid-date", [("Date", "foo"), ("Expires", 10)], CACHED),
    ("freshness-expires-age-slow-date", [("Date", -10), ("Expires", 10), ("Age", "25")], ASKED),
    ("freshness-expires-age-fast-date", [("Date", 10), ("Expires", 20), ("Age", "15")], ASKED),
    ("freshness-expires-32bit", expires("Tue, 19 Jan 2038 14:14:08 GMT"), CACHED),
    ("freshness-expires-far-future", expires("Sun, 21 Nov 2286 04:46:39 GMT"), CACHED),
    ("freshness-expires-rfc850", expires("Thursday, 18-Aug-50 02:01:18 GMT"), CACHED),
    ("freshness-expires-ansi-c", expires("Thu Aug  8 02:01:18 2050"), CACHED),
    ("freshness-expires-wrong-case-weekday", expires("THU, 18 Aug 2050 02:01:18 GMT"), CACHED),
    ("freshness-expires-wrong-case-month", expires("Thu, 18 AUG 2050 02:01:18 GMT"), CACHED),
    ("freshness-expires-wrong-case-tz", expires("Thu, 18 Aug 2050 02:01:18 gMT"), CACHED),
    ("freshness-expires-invalid-utc", expires("Thu, 18 Aug 2050 02:01:18 UTC"), ASKED),
    ("freshness-expires-invalid-aest", expires("Thu, 18 Aug 2050 02:01:18 AEST"), ASKED),
    ("freshness-expires-invalid-2-digit-year", expires("Thu, 18 Aug 50 02:01:18 GMT"), ASKED),
    ("freshness-expires-invalid-no-comma", expires("Thu 18 Aug 2050 02:01:18 GMT"), ASKED),
    ("freshness-expires-invalid-multiple-spaces", expires("Thu, 18  Aug  2050 02:01:18 GMT"), ASKED),
    ("freshness-expires-invalid-date-dashes", expires("Thu, 18-Aug-2050 02:01:18 GMT"), ASKED),
    ("freshness-expires-invalid-time-periods", expires("Thu, 18 Aug 2050 02.01.18 GMT"), ASKED),
    ("freshness-expires-invalid-1-digit-hour", expires("Thu, 18 Aug 2050 2:01:18 GMT"), ASKED),
    (
        "freshness-expires-invalid-multiple-lines",
        [("Expires", "Thu, 18 Aug 2050 02:01:18 GMT"), *expires("Thu, 18 Aug 2050 02:01:19 GMT")],
        ASKED,
    ),
    # a server that says nothing of how long is asked: weights must not be old on a guess
    *[
        (f"heuristic-delta-{ago}", [("Last-Modified", -ago), ("Date", 0)], CONFIRMED)
        for ago in (5, 10, 30, 60, 300, 600, 1200, 1800, 3600, 12 * 3600, DAY)
    ],
    # directives
    ("cc-resp-private-private", control("private, max-age=3600"), CACHED),
    ("cc-resp-no-store", control("no-store"), ASKED),
    ("cc-resp-no-store-case-insensitive", control("No-StOrE"), ASKED),
    ("cc-resp-no-store-fresh", [*control("max-age=10000, no-store"), ("Expires", 10000), ("Date", 0)], ASKED),
    ("cc-resp-no-cache", [*control("max-age=10000, no-cache"), ("Expires", 10000), ("Date", 0)], ASKED),
    ("cc-resp-no-cache-case-insensitive", control("max-age=10000, No-CaChE"), ASKED),
    ("cc-resp-no-cache-revalidate", [*control("no-cache"), *TAG], CONFIRMED),
    ("cc-resp-no-cache-revalidate-fresh", [*control("max-age=10000, no-cache"), *TAG], CONFIRMED),
    ("cc-resp-no-cache-listed-header", [*control('no-cache="a"'), *control("max-age=3600"), *TAG], CONFIRMED),
    ("cc-resp-must-revalidate-fresh", [*control("max-age=10000, must-revalidate"), *TAG], CACHED),
    ("cc-resp-must-revalidate-stale", [*control("max-age=2, must-revalidate"), *TAG], CONFIRMED),
    ("cc-resp-immutable-fresh", [*control("max-age=10000, immutable"), *TAG], CACHED),
    ("cc-resp-immutable-stale", [*control("max-age=2, immutable"), *TAG], CONFIRMED),
    ("status-200-must-understand", control("max-age=3600, no-store, must-understand"), ASKED),
    ("stale-while-revalidate", [*control("max-age=1, stale-while-revalidate=3600"), *TAG], CONFIRMED),
    ("pragma-response-no-cache", [*FRESH, ("Pragma", "no-cache")], CACHED),
    ("pragma-response-no-cache-heuristic", [("Last-Modified", -10000), ("Pragma", "no-cache")], CONFIRMED),
    ("pragma-response-extension", [*FRESH, ("Pragma", "unrecognised-extension")], CACHED),
    # validators that are sent back, and such as are none
    ("conditional-etag-strong-generate", [*control("max-age=2"), *TAG], CONFIRMED),
    ("conditional-etag-weak-generate-weak", [*control("max-age=2"), ("ETag", 'W/"abcd"')], CONFIRMED),
    ("conditional-etag-strong-generate-unquoted", [*control("max-age=2"), ("ETag", "abcd")], ASKED),
    ("conditional-lm-stale", [*control("max-age=2"), ("Last-Modified", -3000), ("Date", 0)], CONFIRMED),
    # headers that change nothing
    (
        "other-heuristic-content-disposition-attachment",
        [("Last-Modified", -DAY), ("Content-Disposition", "attachment")],
        CONFIRMED,
    ),
    ("other-fresh-content-disposition-attachment", [*FRESH, ("Content-Disposition", "attachment")], CACHED),
    ("other-set-cookie", [*FRESH, ("Set-Cookie", "a=b")], CACHED),
    # Vary: * matches no request to come, however it is written
    *[
        (f"vary-syntax-{name}", [*FRESH, *(("Vary", line) for line in lines)], ASKED)
        for name, lines in [
            ("star", ["*"]),
            ("star-star", ["*, *"]),
            ("star-star-lines", ["*", "*"]),
            ("empty-star", [", *"]),
            ("empty-star-lines", ["", "*"]),
            ("star-foo", ["*, Foo"]),
            ("foo-star", ["Foo, *"]),
        ]
    ],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(("lines", "expected"), [case[1:] for case in FRESHNESS], ids=[case[0] for case in FRESHNESS])
def test_what_an_answer_says_of_the_next_request(folder: Path, lines: Headers, expected: str) -> None:
    origin = Origin(lines)
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        assert bytes(scene.ask().data) == b"answer 1 of the origin"
        scene.clock.now += PAUSE
        assert outcome(scene, origin) == expected


def test_where_nothing_is_said_of_how_long_a_guess_is_made_if_that_is_allowed(folder: Path) -> None:
    origin = Origin([("Last-Modified", -1000), ("Date", 0)])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire, heuristic=0.1)
        scene.ask()
        scene.clock.now += 99
        assert scene.ask().from_cache
        assert len(origin.asked) == 1
        scene.clock.now += 2
        scene.ask()
        assert [has_condition(request) for request in origin.asked] == [False, True]


@pytest.mark.parametrize("later", ["no-store", "no-store, max-age=0"])
def test_what_is_fresh_is_used_whatever_a_newer_answer_would_say(folder: Path, later: str) -> None:
    """cc-resp-no-store-old-new, cc-resp-no-store-old-max-age"""
    origin = Origin([*control("max-age=10000"), ("Expires", 10000), ("Date", 0)], [*control(later), ("Date", 3)])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        for _ in range(2):
            scene.clock.now += PAUSE
            assert outcome(scene, origin) == CACHED
        assert bytes(scene.ask(part(0, 6)).data) == b"answer"
        assert len(origin.asked) == 1


# --- Vary: (name, what it names, headers of the first request, of the second, outcome)

ONE, TWO, THREE = {"Foo": "1"}, {"Foo": "1", "Bar": "abc"}, {"Foo": "1", "Bar": "abc", "Baz": "789"}

VARY: list[tuple[str, str, dict[str, str], dict[str, str], str]] = [
    ("vary-match", "Foo", ONE, ONE, CACHED),
    ("vary-no-match", "Foo", ONE, {"Foo": "2"}, ASKED),
    ("vary-omit-stored", "Foo", {}, ONE, ASKED),
    ("vary-omit", "Foo", ONE, {}, ASKED),
    ("vary-cache-key", "Foo", {**ONE, "Other": "2"}, {**ONE, "Other": "3"}, CACHED),
    ("vary-2-match", "Foo, Bar", TWO, TWO, CACHED),
    ("vary-2-no-match", "Foo, Bar", TWO, {**TWO, "Foo": "2"}, ASKED),
    ("vary-2-match-omit", "Foo, Bar", TWO, {}, ASKED),
    ("vary-3-match", "Foo, Bar, Baz", THREE, THREE, CACHED),
    ("vary-3-no-match", "Foo, Bar, Baz", THREE, {**THREE, "Foo": "2"}, ASKED),
    ("vary-3-order", "Foo, Bar, Baz", THREE, {"Foo": "1", "Baz": "789", "Bar": "abcde"}, ASKED),
    ("vary-3-omit", "Foo, Bar, Baz", {"Foo": "1", "Baz": "789"}, {"Foo": "1", "Baz": "789"}, CACHED),
    ("vary-normalise-space-around", "Foo", {"Foo": "1"}, {"fOO": "1 "}, CACHED),
    ("vary-accept-encoding", "Accept-Encoding", {}, {}, CACHED),
]


@pytest.mark.parametrize(
    ("names", "first", "second", "expected"), [case[1:] for case in VARY], ids=[case[0] for case in VARY]
)
def test_an_answer_is_used_only_for_a_request_alike_in_what_it_varies_on(
    folder: Path, names: str, first: dict[str, str], second: dict[str, str], expected: str
) -> None:
    origin = Origin([*FRESH, ("Vary", names)])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask(headers=first, cache_scope="ours")
        assert outcome(scene, origin, headers=second, cache_scope="ours") == expected


def test_a_version_is_offered_for_confirmation_with_what_its_answer_varies_on(folder: Path) -> None:
    """conditional-etag-vary-headers"""
    origin = Origin([*TAG, ("Expires", 1), ("Date", 0), ("Vary", "Abc")])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask(headers={"Abc": "123"}, cache_scope="ours")
        scene.clock.now += PAUSE
        assert outcome(scene, origin, headers={"Abc": "123"}, cache_scope="ours") == CONFIRMED
        assert origin.asked[-1].headers["abc"] == "123"


def test_no_version_of_another_variant_is_offered_for_confirmation(folder: Path) -> None:
    """conditional-etag-vary-headers-mismatch"""
    origin = Origin([*TAG, ("Vary", "Foo")])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask(headers={"Foo": "1"}, cache_scope="ours")
        assert outcome(scene, origin, headers={"Foo": "2"}, cache_scope="ours") == ASKED
        assert not has_condition(origin.asked[-1])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"auth": "one"}, {"auth": "one"}, CACHED),
        ({"auth": "one"}, {"auth": "two"}, ASKED),
        ({"auth": "one"}, {}, ASKED),
        ({}, {"auth": ("user", "password")}, ASKED),
        ({"headers": {"X-Key": "one"}}, {"headers": {"X-Key": "two"}}, ASKED),
    ],
)
def test_whoever_asks_with_other_credentials_asks_the_origin(
    folder: Path, one: dict[str, Any], other: dict[str, Any], expected: str
) -> None:
    origin = Origin(FRESH)
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask(**one)
        assert outcome(scene, origin, **other) == expected


# --- the origin fails: (name, what it had said, how it fails, seconds later, whether the old bytes stand in)

STALE: list[tuple[str, str, int | None, float, bool]] = [
    ("stale-close", "max-age=2", None, PAUSE, False),
    ("stale-503", "max-age=2", 503, PAUSE, False),
    ("stale-sie-close", "max-age=2, stale-if-error=60", None, PAUSE, True),
    ("stale-sie-503", "max-age=2, stale-if-error=60", 503, PAUSE, True),
    ("stale-if-error-500", "max-age=0, stale-if-error=3600", 500, PAUSE, True),
    ("stale-if-error-expired", "max-age=0, stale-if-error=1", 500, PAUSE, False),
    ("stale-if-error-not-found", "max-age=0, stale-if-error=3600", 404, PAUSE, False),
    ("stale-close-must-revalidate", "max-age=2, must-revalidate, stale-if-error=60", None, PAUSE, False),
    ("stale-close-no-cache", "max-age=2, no-cache, stale-if-error=60", None, PAUSE, False),
]


@pytest.mark.parametrize(
    ("had_said", "status", "later", "stands_in"), [case[1:] for case in STALE], ids=[case[0] for case in STALE]
)
def test_old_bytes_stand_in_for_an_origin_that_fails_only_as_long_as_it_allowed(
    folder: Path, had_said: str, status: int | None, later: float, stands_in: bool
) -> None:
    origin = Origin(control(had_said))
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        scene.clock.now += later
        origin.cuts, origin.fails = status is None, said(status or 500, [])
        result = scene.ask()
        assert result.is_success is stands_in
        assert len(origin.asked) >= 2
        if stands_in:
            assert bytes(result.data) == b"answer 1 of the origin"


@pytest.mark.parametrize(
    "status", [201, 202, 203, 204, 299, 301, 302, 303, 307, 308, 400, 403, 404, 410, 499, 500, 502, 503, 504, 599]
)
def test_no_other_status_than_200_and_206_is_an_answer_or_kept(folder: Path, status: int) -> None:
    """status-*-stale, heuristic-*-not_cached, status-599-must-understand"""
    origin = Origin([*FRESH, ("Last-Modified", -DAY), ("Date", 0)], status=status)
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        assert not scene.ask().is_success
        before = len(origin.asked)
        assert not scene.ask().is_success
        assert len(origin.asked) > before
        assert not list(folder.rglob("*.json"))


@pytest.mark.parametrize("date", ["\xa0Tue, 14 Nov 2023 22:13:19 GMT", "a\0b", ""])
def test_a_date_that_no_request_can_name_is_not_asked_about(folder: Path, date: str) -> None:
    origin = Origin([("Last-Modified", date), ("Date", 0)])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        assert outcome(scene, origin) == ASKED
        assert not has_condition(origin.asked[-1])


# --- what a 304 changes


@pytest.mark.parametrize("validator", [TAG, [("Last-Modified", -DAY)]], ids=["etag", "lm"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (control("max-age=2"), FRESH, CACHED),
        (control("max-age=2"), [], CONFIRMED),
        (FRESH, [], CACHED),
        ([("Expires", 1), ("Date", 0)], [("Expires", 3600), ("Date", 3)], CACHED),
        (control("max-age=2"), control("max-age=3600, no-cache"), CONFIRMED),
        (control("max-age=2"), control("no-store"), ASKED),
        (age("1", control="max-age=2"), control("max-age=3600"), CACHED),
        (control("max-age=2"), age("7200"), CONFIRMED),
    ],
    ids=["lifetime", "nothing-said", "fresh-anyway", "expires", "no-cache", "no-store", "age-goes", "age-comes"],
)
def test_a_304_changes_what_is_known_of_the_answer(
    folder: Path, validator: Headers, first: Headers, second: Headers, expected: str
) -> None:
    """304-{etag,lm}-update-{response,stored}-{Cache-Control,Expires}, 304-lm-use-stored"""
    origin = Origin([*validator, *first], [*validator, *second])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        scene.clock.now += PAUSE
        assert outcome(scene, origin) == (CACHED if first is FRESH else CONFIRMED)
        scene.clock.now += PAUSE
        origin.answers = ([("ETag", '"other"')],) if expected == ASKED else origin.answers
        assert outcome(scene, origin) == expected


@pytest.mark.parametrize("lines", [FRESH, [("Expires", 30 * DAY)]])
def test_what_an_answer_said_is_told_with_its_bytes_later_on(folder: Path, lines: Headers) -> None:
    """other-date-update, other-date-update-expires, other-date-update-expires-update"""
    origin = Origin([*lines, ("Date", 0)])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        first = scene.ask()
        scene.clock.now += PAUSE
        again = scene.ask()
        assert len(origin.asked) == 1
        assert first.head is not None
        assert again.head is not None
        assert again.head.headers["date"] == email.utils.formatdate(START, usegmt=True)
        names = ("cache-control", "expires")
        assert [again.head.headers.get(name) for name in names] == [first.head.headers.get(name) for name in names]


def test_what_a_304_said_is_told_with_the_bytes_and_the_rest_is_as_it_was(folder: Path) -> None:
    """304-etag-update-response, 304-lm-use-stored-Test-Header"""
    first: Headers = [*TAG, *control("max-age=2"), ("Content-Type", "model/weights"), ("Date", 0)]
    origin = Origin(first, [*TAG, *FRESH, ("Date", 3), ("Content-Type", "text/html")])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        scene.clock.now += PAUSE
        for _ in ("confirmed", "from the cache"):
            result = scene.ask()
            assert result.head is not None
            assert result.head.headers["cache-control"] == "max-age=3600"
            assert result.head.headers["date"] == email.utils.formatdate(START + 3, usegmt=True)
            assert result.head.headers["content-type"] == "model/weights"
        assert len(origin.asked) == 2


# --- parts


def part(start: int, stop: int) -> LoadRequest:
    return LoadRequest(f"{start}-{stop}", "model.bin", byte_range=(start, stop))


def test_a_part_is_kept_and_used_again(folder: Path) -> None:
    """partial-store-partial-reuse-partial"""
    origin = Origin([*FRESH, *TAG])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        assert [bytes(scene.ask(part(7, 12)).data) for _ in range(2)] == [b"1 of "] * 2
        assert len(origin.asked) == 1


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (7, 22), (21, 22), (0, 22)])
def test_parts_are_cut_from_the_whole(folder: Path, start: int, stop: int) -> None:
    """partial-store-complete-reuse-partial, -no-last, -suffix"""
    origin = Origin(FRESH)
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        scene.ask()
        assert bytes(scene.ask(part(start, stop)).data) == b"answer 1 of the origin"[start:stop]
        assert len(origin.asked) == 1


@pytest.mark.parametrize("status", [304, 206])
def test_what_is_said_with_one_part_is_said_of_all_parts_of_that_version(folder: Path, status: int) -> None:
    origin = Origin([*control("max-age=2"), *TAG])
    pieces = [(0, 6), (6, 8), (8, 22)]
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        with scene.loader() as loader:
            first = [bytes(loader.load(part(*piece)).data) for piece in pieces]
            scene.clock.now += PAUSE
            assert loader.load(part(*pieces[0]) if status == 304 else part(1, 2)).is_success
            assert has_condition(origin.asked[-1]) is (status == 304)
            assert [bytes(loader.load(part(*piece)).data) for piece in pieces] == first
            assert len(origin.asked) == 4


def test_parts_that_came_with_one_answer_age_from_when_it_was_asked_for(folder: Path) -> None:
    origin = Origin([*control("max-age=100"), *TAG])
    pieces = [part(0, 6), part(6, 8), part(8, 22)]

    def slow(request: Request) -> Script:
        scene.clock.now += 80
        return origin(request)

    with Wire(always=slow) as wire:
        scene = Scene(folder, wire)
        with scene.loader() as loader:
            futures = loader.enqueue_many(pieces)
            assert b"".join(bytes(future.result(5).data) for future in futures) == b"answer 1 of the origin"
        assert len(origin.asked) == 1
        with scene.loader() as loader:
            assert [loader.is_cached(piece) for piece in pieces] == [True] * 3
            scene.clock.now += 30
            assert [loader.is_cached(piece) for piece in pieces] == [False] * 3


def test_no_part_of_an_old_version_is_fresh_once_another_was_seen(folder: Path) -> None:
    origin = Origin([*FRESH, ("ETag", '"one"')], [*FRESH, ("ETag", '"two"')])
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        with scene.loader() as loader:
            assert bytes(loader.load(part(0, 8)).data) == b"answer 1"
            assert bytes(loader.load(part(8, 12)).data) == b" of "
            assert bytes(loader.load(part(0, 8)).data) == b"answer 3"
            assert bytes(loader.load(part(0, 8)).data) == b"answer 3"
        assert len(origin.asked) == 3


def test_a_query_is_part_of_the_name(folder: Path) -> None:
    """query-args-different, query-args-same"""
    origin = Origin(FRESH)
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        bodies = [bytes(scene.ask(LoadRequest("model", f"model.bin?v={v}")).data) for v in "1212"]
        assert bodies[:2] == bodies[2:]
        assert bodies[0] != bodies[1]
        assert len(origin.asked) == 2


def test_offline_takes_what_there_is_however_old_and_asks_nobody(folder: Path) -> None:
    """ccreq-oic: only-if-cached, as this library has it"""
    origin = Origin(control("max-age=2"))
    with Wire(always=origin) as wire:
        scene = Scene(folder, wire)
        assert isinstance(scene.ask(offline=True).error, OfflineError)
        scene.ask()
        scene.clock.now += 3600
        assert bytes(scene.ask(offline=True).data) == b"answer 1 of the origin"
        assert isinstance(scene.ask(LoadRequest("other", "other.bin"), offline=True).error, OfflineError)
        assert (len(origin.asked), wire.connections) == (1, 1)


EXCLUDED = {
    "cdn-*, surrogate-control": "directives for content delivery networks, which this is none of",
    "freshness-*-shared-*, cc-resp-private-shared, other-authorization*, stale-close-proxy-revalidate, "
    "stale-close-s-maxage=2": "rules for caches that several users share; scopes keep users apart here",
    "ccreq-*, pragma-request-*, stale-if-error-cc-request*": "requests carry no directives; offline= is only-if-cached",
    "conditional-*-respond*, conditional-304-etag, conditional-etag-precedence, conditional-etag-forward*, "
    "conditional-lm-fresh*": "callers ask for bytes and send no conditions of their own that could be answered",
    "304-*-ETag": "a 304 that names another version freshens nothing (RFC 9111 §4.3.4): see tests/hostile, row 25",
    "headers-*, headers-omit-*, 304-*-update-* but Cache-Control, Expires, Content-Type": "only what "
    "caching needs is kept of an answer, so that no cookie or token reaches the disk (RFC 9111 §3.1 asks to keep all)",
    "other-age-*, stale-warning-*": "nothing is served on: the caller gets bytes, and no Age or Warning is made",
    "other-cookie": "cookies are never sent",
    "interim-*": "interim answers are passed over, which is told of in tests/transport",
    "invalidate-*, method-POST, head-*": "GET fetches, HEAD only looks; no other method is sent, nor answers kept",
    "stale-while-revalidate-window": "an old answer never goes out ahead of its confirmation",
    "vary-invalidate": "optional: one variant is kept for one place and scope, the latest",
    "vary-normalise-combine, -lang-*, -space": "optional: header values are compared as they are sent",
    "status-*-fresh but 200, heuristic-*-cached": "optional: only complete answers with bytes are worth keeping",
    "partial-store-partial-reuse-partial-*, partial-store-partial-complete": "optional: a part is found by its own "
    "range; fragments are asked for by the same ranges each time",
    "partial-use-headers, partial-use-stored-headers": "headers that are not kept",
    "collapse-*": "single flight: see test_fetcher.py",
}
"""Cases of the suite that have no counterpart above, and why."""
