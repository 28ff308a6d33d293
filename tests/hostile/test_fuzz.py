"""Values that nobody would send, and answers that nobody should: each ends in our own errors, in time, in little
memory.

A million header values and a hundred thousand answers with ``-m slow``; the ordinary run takes a hundredth of them.
Every case is drawn from its own seed, which a failure names.
"""

from __future__ import annotations

import base64
import itertools
import logging
import math
import os
import random
import re
import socket
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hostile.runner import Strangers
from urllib3.util import parse_url
from wire import END, HOLD, RESET, Act, Wire, answer, chunked, chunks, drip, part

from holotensor_net.config import ClientConfig, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import InvalidUrl, NetworkError, ObjectChanged, ProtocolError
from holotensor_net.transport import client, guards
from holotensor_net.transport.client import HttpClient, _hop
from holotensor_net.transport.digests import announced
from holotensor_net.values import LoadRequest, RangeRequest

MIB = 1 << 20
SHARE = 100  # of the slow run in the ordinary one
VALUES = 1_000_000 // 6  # for each header
ANSWERS = 100_000

runs = pytest.mark.parametrize(
    "share", [pytest.param(SHARE, id="share"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)


# -- header values: each parser is asked directly

ODD = [
    *string.punctuation,
    *string.digits,
    *"abzAZ \t\r\n\0\x0b\x1c\x7f\x85\xa0\xad\xb2\xff",
    *("٣", "３", "²", "Ⅷ", "−", "\u2028", "\ufeff", "\ud800", "😀", "ſ", "K"),
    *("+5", "-5", "1_0", "0x10", "1e9", "inf", "nan", "NaN", "0" * 20, "9" * 19, "9" * 20, "9" * 5000, "x" * 10_000),
    *("bytes ", "W/", '"', "/*", "*/", "..", "//", "\\", "%00", "%2e", "@", "http://", "https:", "[::1]", "GMT", "UTC"),
]


def spoilt(draw: random.Random, values: list[str]) -> str:
    """One of the values with a few edits, or none."""
    value = draw.choice(values)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 8))):
        at = draw.randrange(len(value) + 1)
        end = min(len(value), at + draw.choice((0, 0, 1, 1, 2, 9)))
        other = draw.choice((draw.choice(ODD), draw.choice(ODD), "", value[end:], chr(draw.randrange(256))))
        value = value[:at] + other + value[end:]
    return value


def number(draw: random.Random) -> str:
    return str(draw.choice((0, 1, draw.randrange(1000), draw.randrange(1 << 70), -draw.randrange(1 << 40))))


def content_ranges(draw: random.Random) -> str:
    first, last, total = number(draw), number(draw), draw.choice(("*", number(draw)))
    return spoilt(draw, [f"bytes {first}-{last}/{total}", "bytes 5-9/100", f"bytes */{total}", "bytes 0-0/1"])


def check_range(value: str) -> None:
    headers = {"content-range": value}
    size = guards.unsatisfied_size(headers)
    if size is not None:
        assert re.fullmatch(rf"bytes \*/0*{size}", value, re.IGNORECASE | re.ASCII)
    try:
        said = guards.content_range(headers)
        assert 0 <= said.byte_range.start < said.byte_range.stop
        first, last, total = re.fullmatch(r"(?i:bytes) ([0-9]+)-([0-9]+)/([0-9]+|\*)", value).groups()  # type: ignore
        assert (int(first), int(last)) == (said.byte_range.start, said.byte_range.stop - 1)
        assert said.total is None if total == "*" else said.total == int(total) >= said.byte_range.stop
        guards.check_content_range(said, RangeRequest(5, 10), 100)
    except (ProtocolError, ObjectChanged):
        return
    assert said.byte_range.start == 5
    assert said.byte_range.stop <= 10
    assert said.total in (None, 100)


def lengths(draw: random.Random) -> str:
    return spoilt(draw, [number(draw), "256", "0", "5, 5"])


def check_length(value: str) -> None:
    headers = {"content-length": value}
    try:
        length = guards.content_length(headers)
        assert length is not None
        assert re.fullmatch(r"[ \t]*[0-9]+[ \t]*", value)
        assert length == int(value) < 10**19
        guards.check_framing(headers, 256)
    except ProtocolError:
        return
    assert length == 256


def retry_afters(draw: random.Random) -> str:
    day = draw.choice(("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"))
    far = f"Fri, {number(draw)} Dec {number(draw)} 23:{number(draw)}:59 {draw.choice(('GMT', '-0000', '+9999', 'EST'))}"
    return spoilt(draw, [number(draw), "120", day, far])


def check_retry_after(value: str) -> None:
    for status in (429, 503):
        error = guards.error_of_status(status, {"retry-after": value}, 784_111_777.0)
        wait = error.retry_after
        assert wait is None or (isinstance(wait, float) and wait >= 0 and math.isfinite(wait))


def etags(draw: random.Random) -> str:
    return spoilt(draw, ['"abc"', 'W/"abc"', '""', f'"{"e" * 10_000}"', f'"{number(draw)}"'])


def check_etag(value: str) -> None:
    said = guards.validator_of({"etag": value, "last-modified": value, "date": value})
    if said.etag is not None:
        assert said.etag == value
        assert not re.search(r"[\x00-\x20\x7f]", value), "it would be sent back in a header"
        assert said.is_strong is value.startswith('"')
        assert value.encode("latin-1")
    for pinned in ('"abc"', 'W/"abc"'):
        try:
            guards.check_same_version(guards.validator_of({"etag": pinned}), said)
        except ObjectChanged:
            continue
        assert value == pinned == '"abc"'


def digests_in(draw: random.Random) -> str:
    known = [f"{name}=:{base64.b64encode(draw.randbytes(size)).decode()}:" for name, size in SHA.items()]
    return spoilt(
        draw, [*known, ", ".join(known), f'md5=:AAAA:, x="a,b";q=1, {known[0]}', f"a=(1 :AA==: b), {known[1]}"]
    )


SHA = {"sha-256": 32, "sha-512": 64}


def check_digest(value: str) -> None:
    for digest in announced(value):
        assert digest.algorithm in ("sha256", "sha512")
        coded = base64.b64encode(digest.value).decode().rstrip("=")
        assert coded[:-1] in value, "nothing but what was announced"


def locations(draw: random.Random) -> str:
    host = draw.choice(("cdn.example", "127.0.0.1:8080", "[::1]:80", "user:pw@cdn.example", "xn--bcher-kva.example"))
    return spoilt(
        draw,
        [
            f"{draw.choice(('http', 'https', 'HTTP', 'file', 'ftp', 'javascript'))}://{host}/a?b=c#d",
            "/a/b",
            "//" + host,
        ],
    )


def check_location(value: str) -> None:
    for base in ("http://origin.example/x", "https://origin.example/x"):
        try:
            target = _hop(base, value)
        except InvalidUrl:
            continue
        parts = urlsplit(target)
        assert parts.scheme == "https" or (parts.scheme == "http" and base.startswith("http:"))
        assert not re.search(r"[\x00-\x20\x7f]", target), "it would split a request line"
        # Whoever decides which headers may travel, and whoever connects, read the same host.
        read = parse_url(target)
        assert (parts.hostname or "").lower() == (read.host or "").strip("[]").lower()
        assert parts.port == read.port


@runs
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("values", "check"),
    [
        pytest.param(content_ranges, check_range, id="Content-Range"),
        pytest.param(lengths, check_length, id="Content-Length"),
        pytest.param(retry_afters, check_retry_after, id="Retry-After"),
        pytest.param(etags, check_etag, id="ETag"),
        pytest.param(digests_in, check_digest, id="Content-Digest"),
        pytest.param(locations, check_location, id="Location"),
    ],
)
def test_a_header_value_is_read_right_or_refused(
    values: Callable[[random.Random], str], check: Callable[[str], None], share: int
) -> None:
    for seed in range(VALUES // share):
        value = values(random.Random(seed))
        began = time.perf_counter()
        try:
            check(value)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {value[:200]!r}") from error
        assert time.perf_counter() - began < 1.0, f"seed {seed} took long: {value[:200]!r}"


def test_what_is_right_is_read() -> None:
    """The values above are refused for what is wrong with them, and not all of them are."""
    read = {guards.content_range({"content-range": f"bytes {k}-{k + 4}/100"}).byte_range.start for k in range(90)}
    assert read == set(range(90))
    assert guards.content_length({"content-length": "256"}) == 256
    assert guards.retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 784_111_770.0) == 7.0
    assert guards.validator_of({"etag": '"abc"'}).is_strong
    assert _hop("http://a/x", "//b:80/y?z") == "http://b:80/y?z"


# -- answers: real ones, spoilt, over a real socket

DATA = random.Random(4).randbytes(3000)
WANTED = RangeRequest(500, 1500)
TAGGED = {"etag": '"v1"', "last_modified": "Sun, 06 Nov 1994 08:49:37 GMT", "accept_ranges": "bytes"}

REAL: tuple[Callable[[], bytes], ...] = (
    lambda: part(DATA, WANTED.start, WANTED.stop, **TAGGED),
    lambda: part(DATA, WANTED.start, WANTED.stop, content_length=None),
    lambda: part(DATA, WANTED.start, 900, **TAGGED),
    lambda: answer(DATA, **TAGGED),
    lambda: answer(DATA, content_length=None),
    lambda: chunked(DATA[:1000], DATA[1000:], **TAGGED),
    lambda: chunked(DATA[500:1500], status=206, content_range="bytes 500-1499/3000"),
    lambda: answer(status=302, location="/elsewhere"),
    lambda: answer(b"busy", status=503, retry_after="0"),
    lambda: answer(status=416, content_range="bytes */3000"),
    lambda: answer(status=304, etag='"v1"'),
    lambda: answer(b"x" * 3000, status=404),
)

WRONG_VALUES = [
    *(
        b"",
        b"-1",
        b"+5",
        b"1_0",
        b"0x10",
        b"1e3",
        b"5, 5",
        b"\xd9\xa3",
        b"9" * 19,
        b"9" * 30,
        b"NaN",
        b"\0",
        b"\xff" * 9,
    ),
    *(b"chunked", b"gzip", b"gzip, chunked", b"identity", b"chunked, chunked", b"bytes 0-0/1", b"bytes */*"),
    *(b"multipart/byteranges; boundary=x", b'W/"v1"', b"x" * 70_000, b"/a" * 500, b"close", b"http://[", b"//\\/"),
]
GARBAGE_LINES = [
    *(
        b"no colon",
        b": no name",
        b"name : value",
        b" folded",
        b"\tfolded",
        b"\0",
        b"\xff\xfe: \xfd",
        b"\r",
        b"a" * 70_000,
    ),
    *(b"HTTP/1.1 200 OK", b"\n".join([b"X: y"] * 150), b"Set-Cookie: a=b; Domain=127.0.0.1"),
]
NAMES = [
    *(b"Content-Range", b"Content-Length", b"Transfer-Encoding", b"Content-Encoding", b"Content-Type", b"ETag"),
    *(b"Last-Modified", b"Date", b"Location", b"Retry-After", b"Connection", b"Content-Digest", b"Trailer"),
]
SIZES = [
    b"-5",
    b"+5",
    b" 5",
    b"5 ",
    b"0x5",
    b"5_0",
    b"",
    b"g",
    b"F" * 17,
    b"F" * 70_000,
    b"\xd9\xa3",
    b"5;" + b"e" * 70_000,
]
STATUS_LINES = [
    *(b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 -1 No", b"HTTP/1.1 99999 No", b"HTTP/9.9 200 OK", b"ICY 200 OK"),
    *(
        b"HTTP/1.1 0 OK",
        b"HTTP/1.1 2\xd9\xa30 OK",
        b"HTTP/1.1 200 " + b"x" * 70_000,
        b"HTTP/1.0 206 OK",
        b"\x16\x03\x01",
    ),
    *(
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1 101 Switch",
        b"HTTP/1.1 103 Hints",
        b"HTTP/1.1 204 None",
        b"HTTP/1.1 304 No",
    ),
]


def flip(draw: random.Random, raw: bytes) -> bytes:
    spoilt = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8, 100))):
        spoilt[draw.randrange(min(len(raw), draw.choice((30, 300, len(raw)))))] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def cut(draw: random.Random, raw: bytes) -> bytes:
    return raw[: draw.randrange(min(len(raw), draw.choice((300, len(raw)))))]


def lines(draw: random.Random, raw: bytes) -> bytes:
    """A header line more, less, twice, or another."""
    head, end, body = raw.partition(b"\r\n\r\n")
    rows = head.split(b"\r\n")
    at = draw.randrange(1, len(rows)) if len(rows) > 1 else 0
    wrong = draw.choice(NAMES) + b": " + draw.choice(WRONG_VALUES)
    rows[at : at + 1] = draw.choice(
        (
            [rows[at], rows[at]],
            [rows[at], draw.choice(GARBAGE_LINES)],
            [rows[at], wrong],
            [rows[at].partition(b":")[0] + b": " + draw.choice(WRONG_VALUES)],
            [],
        )
    )
    return draw.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r")).join(rows) + end + body


def status(draw: random.Random, raw: bytes) -> bytes:
    return draw.choice(STATUS_LINES) + raw[raw.find(b"\r\n") :]


def sizes(draw: random.Random, raw: bytes) -> bytes:
    """A chunked body whose sizes are wrong."""
    head = raw.partition(b"\r\n\r\n")[0].replace(b"Content-Length", b"X-Length")
    body = chunks(DATA[500:1000], DATA[1000:1500], end=draw.choice((b"0\r\n\r\n", b"0\r\n", b"", b"0\r\nX: y\r\n\r\n")))
    at = draw.choice((0, body.find(b"\r\n", 10) + 2, len(body) - 5))
    wrong = draw.choice(SIZES)
    return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body[:at] + wrong + body[at + draw.randrange(6) :]


def flood(draw: random.Random, raw: bytes) -> bytes:
    line = draw.choice(
        (b"100 Continue", b"102 Processing", b"103 Early Hints\r\nLink: </a>", b"101 Switching Protocols")
    )
    return (b"HTTP/1.1 " + line + b"\r\n\r\n") * draw.choice((1, 2, 100, 5000)) + raw


def excess(draw: random.Random, raw: bytes) -> bytes:
    return raw + draw.choice((b"x", b"\r\n", raw, bytes(MIB)))


def noise(draw: random.Random, raw: bytes) -> bytes:
    return draw.randbytes(draw.choice((1, 10, 1000, 100_000)))


def shuffled(draw: random.Random, raw: bytes) -> bytes:
    a, b = sorted((draw.randrange(len(raw)), draw.randrange(len(raw))))
    return raw[:a] + raw[b:] + raw[a:b]


SPOILERS = (flip, flip, cut, lines, lines, lines, status, sizes, sizes, flood, excess, noise, shuffled)

# What never ends by itself: the deadline has to. Each is an answer in acts.
ENDLESS: tuple[Callable[[bytes], Iterator[bytes | float | Act]], ...] = (
    lambda raw: iter([raw[: len(raw) // 2], HOLD]),
    lambda raw: iter([raw[:20], HOLD]),
    lambda raw: drip(raw, 0.02),
    lambda raw: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    lambda raw: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X-More: " + b"y" * 1000)),
    lambda raw: itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], itertools.repeat(bytes(64 << 10))),
    lambda raw: itertools.chain(
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"],
        itertools.repeat(b"10000\r\n" + bytes(1 << 16) + b"\r\n"),
    ),
    lambda raw: itertools.chain(
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\nx\r\n" * 100)
    ),
    lambda raw: itertools.chain([answer(status=503, content_length=10**12)], itertools.repeat(bytes(64 << 10))),
    lambda raw: itertools.repeat(answer(status=302, location="/again")),
)
ENDLESS_EVERY = 40  # one of so many cases

DEADLINE = 0.3
SLACK = 1.0
MEMORY = 64 * MIB


class Spoilt:
    """What ``Wire`` plays to each request of the case whose seed is set: iterating begins another answer."""

    seed = 0

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, seed: int) -> None:
        self.seed, self._draw = seed, random.Random(seed)

    def __iter__(self) -> Iterator[bytes | float | Act]:
        draw = self._draw
        raw = draw.choice(REAL)()
        if self.seed % ENDLESS_EVERY == 0:
            return draw.choice(ENDLESS)(raw)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            raw = draw.choice(SPOILERS)(draw, raw) or b"\r\n"
        return iter([raw, draw.choice((END, END, END, RESET))])


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def known_ports(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ports of this machine that may be connected to: a spoilt redirect leads nowhere else, whatever it spells."""
    ports: set[int] = set()
    find = socket.getaddrinfo

    def guarded(host: Any, port: Any, *args: Any, **more: Any) -> Any:
        if host != "127.0.0.1" or port not in ports:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return find(host, port, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)
    return ports


@pytest.fixture(autouse=True)
def _strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HOSTS", Strangers())


@runs
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_a_spoilt_answer_ends_in_bytes_or_in_our_own_error_and_in_time(
    share: int, known_ports: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # what is captured of a hundred thousand answers is memory too
    caplog.set_level(logging.CRITICAL, logger="urllib3")
    before, outcomes = resident(), set()
    for first in range(0, ANSWERS // share, 500):
        spoilt = Spoilt()
        with Wire(always=spoilt) as wire:
            known_ports.add(wire.port)
            for seed in range(first, min(first + 500, ANSWERS // share)):
                spoilt.begin(seed)
                began = time.monotonic()
                try:
                    outcomes.add(ASKING[seed % len(ASKING)](wire.url))
                except Exception as error:
                    raise AssertionError(f"seed {seed} ended in {error!r}") from error
                took = time.monotonic() - began
                assert took < DEADLINE + SLACK, f"seed {seed} took {took:.1f} s"
                grown = resident() - before
                assert grown < MEMORY, f"{grown >> 20} MiB more by seed {seed}"
    assert outcomes >= {"bytes", "ProtocolError", "ConnectionFailed", "HttpError", "NotFound"}, outcomes


RETRY = RetryConfig(max_retries=1, initial_backoff=0.001, deadline=DEADLINE)
CONFIG = ClientConfig(timeout=0.2, connect_timeout=0.2, retry=RETRY, max_body=MIB)


def range_by_client(url: str) -> str:
    with HttpClient(url, CONFIG) as client:
        return outcome_of(lambda: client.fetch_range("object", WANTED), WANTED.length)


def whole_by_client(url: str) -> str:
    with HttpClient(url, CONFIG) as client:
        return outcome_of(lambda: client.fetch("object"))


def head_by_client(url: str) -> str:
    with HttpClient(url, CONFIG) as client:
        return outcome_of(lambda: repr(client.head("object")).encode())


def by_loader(url: str, request: LoadRequest) -> str:
    config = NetworkConfig.custom_cdn(
        url, timeout=0.2, connect_timeout=0.2, retry=RETRY, cache_dir=False, memory_budget=MIB, chunk_size=400
    )
    with NetworkLoader(config) as loader:
        length = request.byte_range.length if request.byte_range is not None else None
        return outcome_of(lambda: bytes(loader.load(request).data), length)


ASKING: tuple[Callable[[str], str], ...] = (
    range_by_client,
    whole_by_client,
    range_by_client,
    head_by_client,
    lambda url: by_loader(url, LoadRequest("a", "object", byte_range=WANTED)),
    range_by_client,
    lambda url: by_loader(url, LoadRequest("a", "object")),
)


def outcome_of(fetch: Callable[[], bytes], length: int | None = None) -> str:
    """The kind of error, or "bytes"; anything but our own errors is let through, defects of ours that they tell of
    too."""
    try:
        data = fetch()
    except NetworkError as error:
        if "internal error" in str(error):
            raise RuntimeError(str(error)) from error
        return type(getattr(error, "last_error", error)).__name__
    assert length is None or len(data) == length
    return "bytes"


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_a_body_without_an_end_is_given_up_where_there_is_no_room_for_more(disk: bool, tmp_path: Path) -> None:
    """Nobody has set a deadline: what ends it is the room that it may have."""
    folder = tmp_path / "cache"
    endless = Endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunks(bytes(1 << 16), end=b""))
    room = {"max_cache_size" if disk else "memory_budget": 4 * MIB}
    with Wire(always=endless) as wire:
        config = NetworkConfig.custom_cdn(wire.url, cache_dir=folder if disk else False, retry=RETRY_NOT, **room)
        with (
            NetworkLoader(config) as loader,
            pytest.raises(NetworkError, match=r"did not say how long .* 4194304 bytes"),
        ):
            _ = loader.load(LoadRequest("a", "object")).data
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > MIB]


RETRY_NOT = RetryConfig(max_retries=0)


class Endless:
    """A beginning, and then the same for ever, for each request anew."""

    def __init__(self, begin: bytes, then: bytes) -> None:
        self._begin, self._then = begin, then

    def __iter__(self) -> Iterator[bytes]:
        return itertools.chain([self._begin], itertools.repeat(self._then))
