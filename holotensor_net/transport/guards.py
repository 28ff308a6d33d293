"""Pure checks of an answer: each refuses one way in which bytes can be wrong.

A guard takes what was asked and what was said, and raises; it reads no socket. Header names are lower case.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timezone

from ..errors import (
    ChecksumMismatch,
    HttpError,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RateLimited,
)
from ..values import HeadInfo, RangeRequest, Validator, blake3_of

__all__ = [
    "ContentRange",
    "check_checksum",
    "check_content_range",
    "check_encoding",
    "check_framing",
    "check_same_version",
    "content_length",
    "content_range",
    "error_of_status",
    "head_info",
    "is_encoded",
    "retry_after",
    "unsatisfied_size",
    "validator_of",
]

Headers = Mapping[str, str]

# int() alone would take '+5', '1_0' and digits of other scripts.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII | re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,19})", re.ASCII | re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]{1,19}", re.ASCII)
_DATE = re.compile(r"[!-~][ -~]*")
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"')


@dataclass(frozen=True, slots=True)
class ContentRange:
    """What a 206 says that its body is; ``total`` is None where the server did not know (``*``)."""

    byte_range: RangeRequest
    total: int | None


def content_range(headers: Headers) -> ContentRange:
    """The Content-Range of a 206. Raises ProtocolError if it is missing, malformed or impossible (RFC 9110 §14.4), or
    if the body is framed as several parts, whatever it says of their place."""
    value = headers.get("content-range")
    if headers.get("content-type", "").strip().lower().startswith("multipart/byteranges"):
        raise ProtocolError("a partial answer came in several parts")
    if value is None:
        raise ProtocolError("a partial answer came with no Content-Range")
    match = _CONTENT_RANGE.fullmatch(value)
    if match is None:
        raise ProtocolError(f"malformed Content-Range {value[:60]!r}")
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < first or (total is not None and total <= last):
        raise ProtocolError(f"impossible Content-Range {value!r}")
    return ContentRange(RangeRequest(first, last + 1), total)


def check_content_range(said: ContentRange, asked: RangeRequest, total: int | None) -> None:
    """Refuse a part that begins elsewhere, goes beyond what was asked, or belongs to an object of another size.

    A part that begins right and is shorter is allowed (RFC 9110 §15.3.7); whoever asked goes on from there.
    """
    if said.byte_range.start != asked.start or said.byte_range.stop > asked.stop:
        raise ProtocolError(f"asked for {asked.header_value}, the answer holds {said.byte_range.header_value}")
    if said.total is None and total is None:
        raise ProtocolError("the server did not say how long the object is")
    if said.total is not None and total is not None and said.total != total:
        raise ObjectChanged(f"the object has {said.total} bytes now, not {total}")


def unsatisfied_size(headers: Headers) -> int | None:
    """The object's size that a 416 names, None if it names none."""
    match = _UNSATISFIED.fullmatch(headers.get("content-range", ""))
    return int(match[1]) if match else None


def content_length(headers: Headers) -> int | None:
    """Content-Length in bytes, None if absent. Raises ProtocolError for anything but ASCII digits."""
    value = headers.get("content-length")
    if value is None:
        return None
    if not _DIGITS.fullmatch(value.strip(" \t")):
        raise ProtocolError(f"malformed Content-Length {value[:30]!r}")
    return int(value)


def check_framing(headers: Headers, length: int | None) -> None:
    """Refuse a body whose end is told twice, in codings that nobody undoes, or other than by ``length`` (if known)."""
    coding = headers.get("transfer-encoding")
    if coding is not None and coding.strip().lower() != "chunked":
        raise ProtocolError(f"Transfer-Encoding {coding[:30]!r} was not asked for")
    said = content_length(headers)
    if coding is not None and said is not None:
        raise ProtocolError("the answer has both Content-Length and Transfer-Encoding")
    if said is not None and length is not None and said != length:
        raise ProtocolError(f"the answer announces {said} bytes where {length} belong")


def check_encoding(headers: Headers) -> None:
    """Refuse compression that was not asked for: a slice of a compressed body decodes to nonsense without an error."""
    if is_encoded(headers):
        raise ProtocolError(f"Content-Encoding {headers['content-encoding'][:30]!r} was not asked for")


def is_encoded(headers: Headers) -> bool:
    """Whether the bytes of an answer are a compressed form of the object's."""
    return headers.get("content-encoding", "").strip().lower() not in ("", "identity")


def validator_of(headers: Headers) -> Validator:
    """The validator of an answer; a malformed entity tag counts as none, and so does a date that no request could name
    again."""
    etag = headers.get("etag")
    if etag is not None and not _ETAG.fullmatch(etag):
        etag = None
    modified = headers.get("last-modified")
    if modified is not None and not _DATE.fullmatch(modified):
        modified = None
    strong = not etag.startswith("W/") if etag is not None else _is_old_enough(modified, headers.get("date"))
    return Validator(etag, modified, strong)


def _is_old_enough(modified: str | None, date: str | None) -> bool:
    """Whether a Last-Modified is a strong validator: the answer is at least one second younger (RFC 9110 §8.8.2.2)."""
    then, now = _seconds(modified), _seconds(date)
    return then is not None and now is not None and now >= then + 1


@functools.lru_cache(64)
def _seconds(value: str | None) -> float | None:
    try:
        moment = email.utils.parsedate_to_datetime(value) if value else None
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if moment is None:
        return None
    # A date in the "-0000" form is naive and means UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def check_same_version(pinned: Validator, said: Validator) -> None:
    """Refuse an answer that is not of the pinned version: a server may ignore If-Match."""
    if pinned.etag is not None:
        same = said.etag == pinned.etag and pinned.is_strong
    else:
        same = said.last_modified == pinned.last_modified
    if not same:
        raise ObjectChanged("the object was replaced: it is no longer the version that was begun")


def head_info(headers: Headers, size: int | None, *, ranges: bool) -> HeadInfo:
    """What an answer tells of its object."""
    return HeadInfo(
        size=size,
        validator=validator_of(headers),
        accepts_ranges=ranges or headers.get("accept-ranges", "").strip().lower() == "bytes",
        content_type=headers.get("content-type"),
        headers=dict(headers),
    )


def retry_after(headers: Headers, now: float) -> float | None:
    """Seconds that the server asks to wait, from a number or an HTTP date; None for none or nonsense; at least 0."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if _DIGITS.fullmatch(value):
        return float(value)
    moment = _seconds(value)
    return None if moment is None else max(0.0, moment - now)


def error_of_status(status: int, headers: Headers, now: float) -> HttpError:
    """The error that a status stands for; call it for statuses that are no success."""
    if status in (404, 410):
        return NotFound(status=status)
    if status in (429, 503):
        return RateLimited(status=status, retry_after=retry_after(headers, now))
    if status in (401, 403, 407):
        credentials = "the credentials (auth=, or HOLOTENSOR_TOKEN with HOLOTENSOR_ENDPOINT)"
        path = ", and the path" if status == 403 else ""  # many a server answers that for what is not there
        return HttpError(status, f"the server answered {status}: check {credentials}{path}")
    return HttpError(status=status)


def check_checksum(data: memoryview, checksum: str) -> None:
    """Raises ChecksumMismatch unless ``data`` has the digest ``blake3:…`` or ``sha256:…``."""
    algorithm, _, expected = checksum.partition(":")
    actual = blake3_of(data) if algorithm == "blake3" else hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise ChecksumMismatch(expected=checksum, actual=f"{algorithm}:{actual}")
