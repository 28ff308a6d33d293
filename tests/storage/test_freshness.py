from __future__ import annotations

import email.utils
import json
import time
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import CacheError
from holotensor_net.storage.freshness import (
    KEPT_HEADERS,
    CacheControl,
    Freshness,
    State,
    http_date,
    is_same_entity,
    kept,
    refreshed,
)

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def date(moment: float) -> str:
    return email.utils.formatdate(moment, usegmt=True)


def answer(control: str | None = None, *, asked: float = NOW, came: float = NOW, **headers: str) -> Freshness:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Freshness(named if control is None else {"cache-control": control, **named}, asked, came)


class TestHttpDate:
    @pytest.mark.parametrize(
        "text",
        [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "sun, 06 nov 1994 08:49:37 gmt",
            " Sun, 06 Nov 1994 08:49:37 GMT\t",
        ],
    )
    def test_reads_all_three_forms_in_any_case(self, text: str) -> None:
        assert http_date(text, NOW) == 784111777

    @pytest.mark.parametrize(
        "text",
        [
            None,
            "",
            "0",
            "-1",
            "tomorrow",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49:37 PST",
            "Sun, 06 Nov 1994 08:49:37 +0000",
            "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Sun, 06 Nov 1994 08:49:61 GMT",
            "Sun, 06 Nov 0000 08:49:37 GMT",
            "Sun, ٠٦ Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT, Sun, 06 Nov 1994 08:49:37 GMT",
        ],
    )
    def test_anything_else_is_no_date(self, text: str | None) -> None:
        assert http_date(text, NOW) is None

    def test_leap_second_counts_as_the_one_before(self) -> None:
        assert http_date("Sat, 31 Dec 2016 23:59:60 GMT", NOW) == http_date("Sat, 31 Dec 2016 23:59:59 GMT", NOW)

    @pytest.mark.parametrize(("digits", "year"), [("94", 1994), ("23", 2023), ("73", 2073), ("74", 1974), ("00", 2000)])
    def test_two_digits_are_at_most_fifty_years_ahead(self, digits: str, year: int) -> None:
        expected = datetime(year, 11, 6, 8, 49, 37, tzinfo=timezone.utc).timestamp()
        assert http_date(f"Sunday, 06-Nov-{digits} 08:49:37 GMT", NOW) == expected
        assert http_date(f"Sunday, 06-Nov-{digits} 08:49:37 GMT") is None

    @given(st.integers(0, 253402300799))
    def test_reads_what_others_write(self, moment: int) -> None:
        try:
            text = email.utils.formatdate(moment, usegmt=True)
        except (OverflowError, ValueError):
            return
        assert http_date(text) == moment
        assert http_date(time.asctime(time.gmtime(moment))) == moment

    @given(st.text())
    def test_never_raises(self, text: str) -> None:
        assert http_date(text, NOW) is None


class TestCacheControl:
    @pytest.mark.parametrize(
        ("text", "directives"),
        [
            ("", {}),
            (" , ,\t,", {}),
            ("max-age=60", {"max-age": ("60",)}),
            ("MAX-AGE=60 ,  No-Cache", {"max-age": ("60",), "no-cache": (None,)}),
            ('max-age="60"', {"max-age": ("60",)}),
            ('no-cache="a, no-store", x', {"no-cache": ("a, no-store",), "x": (None,)}),
            (r'ext="a\"b\\c"', {"ext": (r'a"b\c',)}),
            ("max-age=1, max-age=2", {"max-age": ("1", "2")}),
            ('ext="a\nb"', {"ext": ("a\nb",)}),
        ],
    )
    def test_reads_the_grammar(self, text: str, directives: dict[str, tuple[str | None, ...]]) -> None:
        assert CacheControl.parse(text).directives == directives

    @pytest.mark.parametrize(
        "text", ["max-age = 60", "max-age=60;public", 'x="', 'x="no end, max-age=60', "max-age=", "=", "a b", "é"]
    )
    def test_what_breaks_the_grammar_is_not_to_be_used_unasked(self, text: str) -> None:
        assert dict(CacheControl.parse(text).directives) == {"no-cache": (None,)}

    @pytest.mark.parametrize("text", ["No-Store; max-age=60", 'x="a, no-store', "no store, no-store"])
    def test_no_store_is_seen_in_any_rubble(self, text: str) -> None:
        assert "no-store" in CacheControl.parse(text)

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("public", None),
            ("max-age=0", 0),
            ("max-age=060", 60),
            ("max-age=60, max-age=60", 60),
            ("max-age=60, max-age=61", 0),
            ("max-age", 0),
            ("max-age=-5", 0),
            ("max-age=1.5", 0),
            ("max-age=1_0", 0),
            ("max-age=+5", 0),
            ('max-age="٣"', 0),
            ('max-age=""', 0),
            ("max-age=2147483649", 2**31),
            ("max-age=" + "9" * 5000, 2**31),
        ],
    )
    def test_seconds_are_digits_or_nothing(self, text: str, seconds: float | None) -> None:
        assert CacheControl.parse(text).seconds("max-age") == seconds

    @given(st.text(alphabet='a-=", \\\t;0é\n'))
    def test_never_raises_and_never_hides_no_store(self, text: str) -> None:
        assert CacheControl.parse(text).seconds("a") in (None, 0.0)
        assert "no-store" in CacheControl.parse(f"no-store, {text}")

    def test_takes_time_in_proportion_to_length(self) -> None:
        for piece in ('"', '"a', 'a="\\', " ", " ,", 'a="" '):
            CacheControl.parse(piece * 20_000)


class TestLifetime:
    @pytest.mark.parametrize(
        ("freshness", "lifetime"),
        [
            (answer(), 0),
            (answer("max-age=60"), 60),
            (answer("s-maxage=60"), 0),
            (answer("max-age=60", expires=date(NOW + 5), date=date(NOW)), 60),
            (answer("max-age=x", expires=date(NOW + 5), date=date(NOW)), 0),
            (answer(expires=date(NOW + 5), date=date(NOW)), 5),
            (answer(expires=date(NOW + 5), date=date(NOW - 10)), 15),
            (answer(expires=date(NOW + 5)), 5),
            (answer(expires=date(NOW + 5), date="garbage"), 5),
            (answer(expires=date(NOW - 5), date=date(NOW)), 0),
            (answer(expires="0", last_modified=date(0)), 0),
            (answer(expires=f"{date(NOW + 5)}, {date(NOW + 6)}"), 0),
            (answer(last_modified=date(NOW - 1000)), 0),
        ],
    )
    def test_is_what_the_server_said_and_else_none(self, freshness: Freshness, lifetime: float) -> None:
        assert freshness.lifetime() == lifetime

    @pytest.mark.parametrize(
        ("freshness", "lifetime"),
        [
            (answer(last_modified=date(NOW - 1000), date=date(NOW)), 100),
            (answer(last_modified=date(NOW - 1000)), 100),
            (answer(last_modified=date(NOW - 10**9)), 7 * 86400),
            (answer(last_modified=date(NOW + 1000)), 0),
            (answer(last_modified="garbage"), 0),
            (answer(), 0),
            (answer("max-age=60", last_modified=date(NOW - 1000)), 60),
            (answer(expires=date(NOW + 5), last_modified=date(NOW - 1000)), 5),
            (answer(expires="0", last_modified=date(NOW - 1000)), 0),
        ],
    )
    def test_is_guessed_only_where_that_is_allowed_and_nothing_is_said(
        self, freshness: Freshness, lifetime: float
    ) -> None:
        assert freshness.lifetime(0.1) == pytest.approx(lifetime)
        assert freshness.state(NOW, 0.1) is (State.FRESH if lifetime else State.STALE)


class TestAge:
    @pytest.mark.parametrize(
        ("freshness", "later", "age"),
        [
            (answer(), 0, 0),
            (answer(), 10, 10),
            (answer(age="30"), 10, 40),
            (answer(age="30, 99"), 10, 40),
            (answer(age="-30"), 10, 10),
            (answer(age="x"), 10, 10),
            (answer(age="9" * 30), 0, 2**31),
            (answer(date=date(NOW - 7)), 10, 17),
            (answer(date=date(NOW - 7), age="3"), 10, 17),
            (answer(date=date(NOW - 7), age="9"), 10, 19),
            (answer(date=date(NOW + 100)), 10, 10),
            (answer(asked=NOW - 4), 10, 14),
            (answer(asked=NOW - 4, age="3"), 0, 7),
            (answer(asked=NOW + 50), 10, 10),
            (answer(), -1000, 0),
        ],
    )
    def test_is_the_larger_of_what_is_told_and_what_is_seen(
        self, freshness: Freshness, later: float, age: float
    ) -> None:
        assert freshness.age(NOW + later) == age

    @given(
        st.dictionaries(st.sampled_from(sorted(KEPT_HEADERS)), st.text() | st.integers().map(str)),
        st.floats(0, 4e9),
        st.floats(0, 4e9),
        st.floats(0, 4e9),
        st.floats(0, 4e9),
    )
    def test_never_shrinks_and_never_raises(
        self, headers: dict[str, str], asked: float, came: float, now: float, later: float
    ) -> None:
        freshness = Freshness(headers, asked, came)
        assert 0 <= freshness.age(now) <= freshness.age(now + later)
        if freshness.state(now) is State.STALE and now >= came:
            assert freshness.state(now + later) is State.STALE
        if freshness.may_serve_stale(now):
            assert not freshness.forbids_stale


class TestState:
    @pytest.mark.parametrize(
        ("control", "seconds", "state"),
        [
            (None, 0, State.STALE),
            ("max-age=60", 59, State.FRESH),
            ("max-age=60", 60, State.STALE),
            ("max-age=60, immutable", 59, State.FRESH),
            ("immutable", 0, State.STALE),
            ("max-age=60, no-cache", 0, State.STALE),
            ('max-age=60, no-cache="set-cookie"', 0, State.STALE),
            ("max-age=60, must-revalidate", 59, State.FRESH),
            ("private, max-age=60", 59, State.FRESH),
            ("public, MAX-AGE=60", 59, State.FRESH),
            ("max-age=60", -1, State.STALE),
        ],
    )
    def test_is_fresh_only_within_the_lifetime(self, control: str | None, seconds: float, state: State) -> None:
        assert answer(control).state(NOW + seconds) is state

    @pytest.mark.parametrize(
        ("control", "seconds", "may"),
        [
            (None, 0, False),
            ("max-age=60", 61, False),
            ("max-age=60, stale-if-error=30", 89, True),
            ("max-age=60, stale-if-error=30", 90, False),
            ("max-age=60, stale-if-error=x", 61, False),
            ("max-age=60, stale-if-error=30", -1, False),
            ("stale-if-error=30", 29, True),
            ("stale-if-error=30, must-revalidate", 1, False),
            ("stale-if-error=30, no-cache", 1, False),
            ("stale-if-error=30, no-store", 1, False),
        ],
    )
    def test_stale_stands_in_only_in_its_window(self, control: str | None, seconds: float, may: bool) -> None:
        assert answer(control).may_serve_stale(NOW + seconds) is may


class TestStorable:
    @pytest.mark.parametrize(
        ("control", "vary", "storable"),
        [
            (None, None, True),
            ("private, max-age=0", None, True),
            ("no-cache", None, True),
            ("no-store", None, False),
            ("max-age=60, NO-STORE", None, False),
            ("must-understand, no-store", None, False),
            (None, "accept-encoding", True),
            (None, "*", False),
            (None, "Accept, *", False),
        ],
    )
    def test_not_what_forbids_it_nor_what_matches_no_request(
        self, control: str | None, vary: str | None, storable: bool
    ) -> None:
        headers = {} if vary is None else {"vary": vary}
        assert answer(control, **headers).is_storable is storable

    def test_vary_names_headers_in_lower_case(self) -> None:
        assert answer(vary="Accept-Encoding,\t User-Agent,,").varies_on == {"accept-encoding", "user-agent"}


class TestKept:
    def test_cookies_and_tokens_never(self) -> None:
        headers = {"ETag": '"a"', "set-cookie": "s", "www-authenticate": "t", "x-amz-signature": "u", "Vary": "v"}
        assert kept(headers) == {"etag": '"a"', "vary": "v"}
        assert Freshness(headers).headers == {"etag": '"a"', "vary": "v"}
        assert "set-cookie" not in json.dumps(Freshness(headers).to_json())

    def test_304_replaces_what_it_says_and_ages_anew(self) -> None:
        old = {
            "cache-control": "max-age=1",
            "date": date(NOW - 1000),
            "age": "900",
            "etag": '"a"',
            "content-type": "application/octet-stream",
            "vary": "accept",
        }
        new = {"cache-control": "max-age=60", "set-cookie": "s", "content-type": "text/html", "content-length": "0"}
        merged = refreshed(old, new)
        assert merged == {
            "cache-control": "max-age=60",
            "etag": '"a"',
            "content-type": "application/octet-stream",
            "vary": "accept",
        }
        assert Freshness(merged, NOW, NOW).state(NOW) is State.FRESH
        assert refreshed(old, {"date": "d", "age": "1"}).items() >= {"date": "d", "age": "1"}.items()

    @given(st.dictionaries(st.sampled_from(sorted(KEPT_HEADERS)), st.text()), st.floats(0, 1e11), st.floats(0, 1e11))
    def test_survives_json(self, headers: dict[str, str], asked: float, came: float) -> None:
        freshness = Freshness(headers, asked, came)
        again = Freshness.from_json(json.loads(json.dumps(freshness.to_json())))
        assert again == freshness
        assert hash(again) == hash(freshness)

    @pytest.mark.parametrize(
        "data",
        [
            None,
            [],
            "headers",
            {},
            {"headers": {}, "request_time": 0},
            {"headers": [], "request_time": 0, "response_time": 0},
            {"headers": {"a": 1}, "request_time": 0, "response_time": 0},
            {"headers": {}, "request_time": "0", "response_time": 0},
            {"headers": {}, "request_time": 0, "response_time": -1},
            {"headers": {}, "request_time": 0, "response_time": float("nan")},
            {"headers": {}, "request_time": 0, "response_time": 1e300},
        ],
    )
    def test_damaged_json_is_refused(self, data: object) -> None:
        with pytest.raises(CacheError, match="fetch it again"):
            Freshness.from_json(data)


class TestValidator:
    @pytest.mark.parametrize(
        ("a", "b", "same"),
        [
            ('"a"', '"a"', True),
            ('W/"a"', '"a"', True),
            ('W/"a"', 'W/"a"', True),
            ('"a"', '"b"', False),
            (None, '"a"', False),
            (None, None, False),
        ],
    )
    def test_weak_comparison_overlooks_the_mark(self, a: str | None, b: str | None, same: bool) -> None:
        assert is_same_entity(a, b) is same
        assert is_same_entity(b, a) is same
