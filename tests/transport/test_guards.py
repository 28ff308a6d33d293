from __future__ import annotations

import hashlib
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime, formatdate

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import (
    ChecksumMismatch,
    HttpError,
    NetworkError,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RateLimited,
)
from holotensor_net.transport import guards
from holotensor_net.transport.guards import ContentRange
from holotensor_net.values import RangeRequest, Validator

NOW = 1_700_000_000.0


def date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


# -- Content-Range


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("bytes 0-0/1", ContentRange(RangeRequest(0, 1), 1), id="one byte"),
        pytest.param("bytes 5-9/10", ContentRange(RangeRequest(5, 10), 10), id="up to the end"),
        pytest.param("bytes 5-9/*", ContentRange(RangeRequest(5, 10), None), id="of an unknown total"),
        pytest.param("BYTES 5-9/10", ContentRange(RangeRequest(5, 10), 10), id="unit in capitals"),
        pytest.param(
            "bytes 0-9223372036854775806/9223372036854775807",
            ContentRange(RangeRequest(0, 2**63 - 1), 2**63 - 1),
            id="the largest file",
        ),
    ],
)
def test_content_range_is_read(value: str, expected: ContentRange) -> None:
    assert guards.content_range({"content-range": value}) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", "bytes", "bytes 0-9", "0-9/10", "bytes=0-9/10", "bytes 0-9/", "bytes -9/10", "bytes 0-/10"),
        *("items 0-9/10", "bytes  0-9/10", "bytes 0 - 9/10", " bytes 0-9/10", "bytes 0-9/10 ", "bytes 0-9/10\n"),
        *("bytes +0-9/10", "bytes 0-+9/10", "bytes 0-9/1_0", "bytes ٠-٩/١٠", "bytes 0x0-0x9/10", "bytes 0-9.0/10"),
        *("bytes 0-9/10, bytes 0-9/10", "bytes 0-9/10 bytes 0-9/10", "bytes 0-9,20-29/100", "bytes */10"),
        *("bytes 9-5/10", "bytes 0-9/9", "bytes 0-9/5", "bytes 0-9/0", "bytes 0-99999999999999999999/*"),
    ],
)
def test_a_content_range_that_is_malformed_or_impossible_is_refused(value: str) -> None:
    with pytest.raises(ProtocolError):
        guards.content_range({"content-range": value})


def test_a_part_without_content_range_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no Content-Range"):
        guards.content_range({"content-type": "application/octet-stream"})


@pytest.mark.parametrize("content_range", [{}, {"content-range": "bytes 0-9/10"}], ids=["alone", "with Content-Range"])
@pytest.mark.parametrize("kind", ["multipart/byteranges; boundary=x", "Multipart/ByteRanges", " multipart/byteranges"])
def test_several_parts_are_refused_whatever_they_claim(kind: str, content_range: dict[str, str]) -> None:
    with pytest.raises(ProtocolError, match="several parts"):
        guards.content_range({"content-type": kind, **content_range})


@given(first=st.integers(0, 2**40), length=st.integers(1, 2**40), more=st.integers(0, 2**40))
def test_a_content_range_comes_back_as_it_was_written(first: int, length: int, more: int) -> None:
    last, total = first + length - 1, first + length + more
    said = guards.content_range({"content-range": f"bytes {first}-{last}/{total}"})
    assert said == ContentRange(RangeRequest(first, first + length), total)


@given(st.text(max_size=40))
def test_any_content_range_is_read_or_refused(value: str) -> None:
    try:
        said = guards.content_range({"content-range": "bytes " + value})
    except ProtocolError:
        return
    assert said.byte_range.length > 0


ASKED = RangeRequest(10, 20)


@pytest.mark.parametrize(
    ("start", "stop", "said", "known"),
    [
        pytest.param(10, 20, 100, None, id="all, size new"),
        pytest.param(10, 20, 100, 100, id="all, size as known"),
        pytest.param(10, 20, None, 100, id="all, size known here alone"),
        pytest.param(10, 11, 100, 100, id="a shorter part"),
        pytest.param(10, 15, 15, None, id="up to an earlier end"),
    ],
)
def test_a_part_that_begins_right_is_accepted(start: int, stop: int, said: int | None, known: int | None) -> None:
    guards.check_content_range(ContentRange(RangeRequest(start, stop), said), ASKED, known)


@pytest.mark.parametrize(
    ("start", "stop", "said", "known", "error"),
    [
        pytest.param(0, 10, 100, None, ProtocolError, id="same length, from the start"),
        pytest.param(11, 21, 100, None, ProtocolError, id="same length, shifted"),
        pytest.param(11, 20, 100, None, ProtocolError, id="begins later"),
        pytest.param(9, 20, 100, None, ProtocolError, id="begins earlier"),
        pytest.param(10, 21, 100, None, ProtocolError, id="ends later"),
        pytest.param(10, 20, None, None, ProtocolError, id="size unknown to all"),
        pytest.param(10, 20, 101, 100, ObjectChanged, id="another size"),
    ],
)
def test_a_part_of_something_else_is_refused(
    start: int, stop: int, said: int | None, known: int | None, error: type[NetworkError]
) -> None:
    with pytest.raises(error) as caught:
        guards.check_content_range(ContentRange(RangeRequest(start, stop), said), ASKED, known)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("value", "size"),
    [
        *(("bytes */0", 0), ("bytes */100", 100), ("Bytes */7", 7)),
        *(("bytes */*", None), ("bytes 0-9/10", None), ("*/10", None), ("", None), ("bytes */1_0", None)),
    ],
)
def test_the_size_in_a_416_is_read(value: str, size: int | None) -> None:
    assert guards.unsatisfied_size({"content-range": value}) == size


def test_a_416_may_name_no_size() -> None:
    assert guards.unsatisfied_size({}) is None


# -- framing


@pytest.mark.parametrize(("value", "length"), [("0", 0), ("10", 10), (" 10\t", 10), ("007", 7)])
def test_content_length_is_read(value: str, length: int) -> None:
    assert guards.content_length({"content-length": value}) == length


def test_content_length_may_be_absent() -> None:
    assert guards.content_length({}) is None


@pytest.mark.parametrize(
    "value", ["", "abc", "-5", "+5", "1_0", "1.0", "0x10", "5, 5", "5 5", "٣", "\u00b2", "5\n", "1" * 20, "\u00a05"]
)
def test_a_content_length_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ProtocolError):
        guards.content_length({"content-length": value})


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        pytest.param({}, None, id="nothing said, nothing known"),
        pytest.param({}, 10, id="nothing said"),
        pytest.param({"content-length": "10"}, 10, id="said as known"),
        pytest.param({"content-length": "10"}, None, id="said, not known"),
        pytest.param({"transfer-encoding": "chunked"}, 10, id="chunked"),
        pytest.param({"transfer-encoding": " Chunked "}, 10, id="chunked, written oddly"),
    ],
)
def test_framing_that_tells_the_end_once_is_accepted(headers: dict[str, str], length: int | None) -> None:
    guards.check_framing(headers, length)


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        pytest.param({"content-length": "9"}, 10, id="shorter"),
        pytest.param({"content-length": "11"}, 10, id="longer"),
        pytest.param({"content-length": "10", "transfer-encoding": "chunked"}, 10, id="told twice"),
        pytest.param({"transfer-encoding": "gzip, chunked"}, 10, id="compressed on the way"),
        pytest.param({"transfer-encoding": "chunked, chunked"}, 10, id="chunked twice"),
        pytest.param({"transfer-encoding": "identity"}, 10, id="identity"),
        pytest.param({"transfer-encoding": ""}, 10, id="empty"),
    ],
)
def test_framing_that_contradicts_is_refused(headers: dict[str, str], length: int) -> None:
    with pytest.raises(ProtocolError):
        guards.check_framing(headers, length)


@pytest.mark.parametrize("headers", [{}, *({"content-encoding": v} for v in ("", "identity", " Identity "))], ids=str)
def test_a_plain_body_is_accepted(headers: dict[str, str]) -> None:
    guards.check_encoding(headers)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "zstd", "deflate", "identity, gzip", "gzip, identity", "?"])
def test_compression_that_was_not_asked_for_is_refused(coding: str) -> None:
    with pytest.raises(ProtocolError):
        guards.check_encoding({"content-encoding": coding})


# -- validators


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param({}, Validator(), id="none"),
        pytest.param({"etag": '"a"'}, Validator('"a"', None, True), id="strong tag"),
        pytest.param({"etag": '""'}, Validator('""', None, True), id="empty tag"),
        pytest.param({"etag": '"\xe9!#~"'}, Validator('"\xe9!#~"', None, True), id="all characters of a tag"),
        pytest.param({"etag": 'W/"a"'}, Validator('W/"a"', None, False), id="weak tag"),
        pytest.param({"etag": "a"}, Validator(), id="no quotes"),
        pytest.param({"etag": '"a'}, Validator(), id="cut short"),
        pytest.param({"etag": 'w/"a"'}, Validator(), id="w is not W"),
        pytest.param({"etag": '"a"b"'}, Validator(), id="a quote within"),
        pytest.param({"etag": '"a b"'}, Validator(), id="a space within"),
        pytest.param({"etag": '"a", "b"'}, Validator(), id="two"),
        pytest.param({"etag": '"a"\r\nX: y'}, Validator(), id="a line end"),
        pytest.param({"last-modified": "long ago"}, Validator(None, "long ago", False), id="what may be a date"),
        pytest.param({"last-modified": ""}, Validator(), id="no date"),
        pytest.param({"last-modified": "\xa0" + date(NOW), "date": date(NOW + 9)}, Validator(), id="an odd space"),
        pytest.param({"last-modified": date(NOW) + "\0", "date": date(NOW + 9)}, Validator(), id="a NUL in a date"),
        pytest.param({"last-modified": date(NOW) + "\r\nX: y"}, Validator(), id="a line end in a date"),
        pytest.param(
            {"etag": 'W/"a"', "last-modified": date(NOW - 9), "date": date(NOW)},
            Validator('W/"a"', date(NOW - 9), False),
            id="a weak tag is not made strong by a date",
        ),
        pytest.param(
            {"etag": "junk", "last-modified": date(NOW - 9), "date": date(NOW)},
            Validator(None, date(NOW - 9), True),
            id="a date stands in for a malformed tag",
        ),
    ],
)
def test_validators_are_read(headers: dict[str, str], expected: Validator) -> None:
    assert guards.validator_of(headers) == expected


@pytest.mark.parametrize(
    ("modified", "answered", "strong"),
    [
        pytest.param(date(NOW - 1), date(NOW), True, id="a second older"),
        pytest.param(date(NOW), date(NOW), False, id="the same second"),
        pytest.param(date(NOW + 60), date(NOW), False, id="in the future"),
        pytest.param(date(NOW - 60), None, False, id="no Date"),
        pytest.param(date(NOW - 60), "yesterday", False, id="no date in Date"),
        pytest.param("yesterday", date(NOW), False, id="no date in Last-Modified"),
        pytest.param("", date(NOW), False, id="empty"),
        pytest.param("Tue, 14 Nov 2023 22:13:19 -0000", date(NOW), True, id="-0000 is UTC"),
        pytest.param("Tue, 14 Nov 2023 23:13:19 +0100", date(NOW), True, id="another zone"),
    ],
)
def test_a_date_is_strong_if_the_answer_is_a_second_younger(modified: str, answered: str | None, strong: bool) -> None:
    headers = {"last-modified": modified} | ({} if answered is None else {"date": answered})
    assert guards.validator_of(headers).is_strong is strong


@given(etag=st.text(max_size=20), modified=st.text(max_size=40), answered=st.text(max_size=40))
def test_any_validator_is_read_without_an_error(etag: str, modified: str, answered: str) -> None:
    headers = {"etag": etag, "last-modified": modified, "date": answered}
    assert guards.validator_of(headers).etag in (etag, None)


PIECES = [
    "Mon",
    "Tue,",
    "14",
    "Nov",
    "Jan",
    "0",
    "99999",
    "-1",
    "9999",
    "0001",
    "23:59:60",
    "24:00",
    "+9999",
    "-2359",
    "GMT",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join))
def test_what_almost_is_a_date_raises_nothing(value: str) -> None:
    assert (guards.retry_after({"retry-after": value}, NOW) or 0.0) >= 0.0


STRONG = Validator('"a"', date(NOW), True)
DATED = Validator(None, date(NOW), True)


@pytest.mark.parametrize(
    ("pinned", "said", "same"),
    [
        pytest.param(STRONG, Validator('"a"', None, True), True, id="same tag"),
        pytest.param(STRONG, Validator('"b"', date(NOW), True), False, id="another tag"),
        pytest.param(STRONG, Validator('W/"a"', date(NOW), False), False, id="the tag, weak"),
        pytest.param(STRONG, Validator(None, date(NOW), True), False, id="no tag"),
        pytest.param(STRONG, Validator(), False, id="nothing"),
        pytest.param(DATED, Validator(None, date(NOW), False), True, id="same date"),
        pytest.param(DATED, Validator('"x"', date(NOW), True), True, id="same date and a tag"),
        pytest.param(DATED, Validator(None, date(NOW + 1), True), False, id="another date"),
        pytest.param(DATED, Validator(), False, id="no date"),
        pytest.param(Validator('W/"a"'), Validator('W/"a"'), False, id="a weak tag proves nothing"),
    ],
)
def test_only_the_pinned_version_passes(pinned: Validator, said: Validator, same: bool) -> None:
    if same:
        guards.check_same_version(pinned, said)
    else:
        with pytest.raises(ObjectChanged):
            guards.check_same_version(pinned, said)


def test_head_info_tells_what_the_answer_told() -> None:
    headers = {"etag": '"a"', "accept-ranges": "Bytes", "content-type": "text/plain", "x-more": "1"}
    info = guards.head_info(headers, 7, ranges=False)
    assert (info.size, info.etag, info.accepts_ranges, info.content_type) == (7, '"a"', True, "text/plain")
    assert info.headers == headers


@pytest.mark.parametrize(
    ("accept", "ranges", "expected"),
    [("bytes", False, True), ("none", False, False), ("", False, False), ("none", True, True)],
)
def test_ranges_are_known_from_the_header_or_from_having_been_served(accept: str, ranges: bool, expected: bool) -> None:
    assert guards.head_info({"accept-ranges": accept}, None, ranges=ranges).accepts_ranges is expected


# -- Retry-After and statuses


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("0", 0.0), ("120", 120.0), (" 5 ", 5.0), ("1000000000", 1e9)),
        pytest.param(date(NOW + 90), 90.0, id="a date"),
        pytest.param(date(NOW - 90), 0.0, id="a date gone by"),
        *(
            ("", None),
            ("-5", None),
            ("+5", None),
            ("1.5", None),
            ("soon", None),
            ("1_0", None),
            ("٣", None),
            ("5s", None),
        ),
        *(("1" * 20, None), ("Tue, 99 Nov 2023 99:99:99 GMT", None), ("99999999999 Nov", None)),
    ],
)
def test_retry_after_is_a_number_a_date_or_nothing(value: str, seconds: float | None) -> None:
    assert guards.retry_after({"retry-after": value}, NOW) == seconds


def test_retry_after_may_be_absent() -> None:
    assert guards.retry_after({}, NOW) is None


@given(st.text(max_size=40))
def test_any_retry_after_is_read_without_an_error(value: str) -> None:
    seconds = guards.retry_after({"retry-after": value}, NOW)
    assert seconds is None or seconds >= 0.0


@given(
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)),
    st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
def test_every_date_is_read_as_the_moment_it_names(moment: datetime, zone: timezone) -> None:
    moment = moment.replace(microsecond=0, tzinfo=zone)
    expected = max(0.0, moment.timestamp() - NOW)
    if moment.year >= 1000:  # years of fewer digits are read as two-digit years
        assert guards.retry_after({"retry-after": format_datetime(moment)}, NOW) == expected


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        *((404, NotFound, False), (410, NotFound, False), (429, RateLimited, True), (503, RateLimited, True)),
        *((401, HttpError, False), (403, HttpError, False), (407, HttpError, False), (400, HttpError, False)),
        *((408, HttpError, True), (416, HttpError, False), (500, HttpError, True), (501, HttpError, False)),
        *((502, HttpError, True), (505, HttpError, False), (204, HttpError, False), (302, HttpError, False)),
    ],
)
def test_a_status_is_its_error(status: int, kind: type[HttpError], retryable: bool) -> None:
    error = guards.error_of_status(status, {"retry-after": "7"}, NOW)
    assert (type(error), error.status, error.is_retryable) == (kind, status, retryable)
    assert error.retry_after == (7.0 if kind is RateLimited else None)


@pytest.mark.parametrize("status", [401, 403, 407])
def test_a_refusal_says_where_credentials_come_from(status: int) -> None:
    assert "HOLOTENSOR_TOKEN" in str(guards.error_of_status(status, {}, NOW))


# -- checksums


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=len)
@pytest.mark.parametrize("name", ["blake3", "sha256"])
def test_right_bytes_pass_their_checksum_and_no_others_do(name: str, data: bytes) -> None:
    digest = blake3(data).hexdigest() if name == "blake3" else hashlib.sha256(data).hexdigest()
    guards.check_checksum(memoryview(data), f"{name}:{digest}")
    with pytest.raises(ChecksumMismatch) as caught:
        guards.check_checksum(memoryview(data + b"!"), f"{name}:{digest}")
    assert caught.value.expected == f"{name}:{digest}"
    assert caught.value.actual.startswith(f"{name}:")
    assert caught.value.actual != caught.value.expected
