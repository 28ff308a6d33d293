from __future__ import annotations

import base64
import contextlib
import errno
import gc
import gzip
import hashlib
import itertools
import logging
import os
import random
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from urllib3.exceptions import InsecureRequestWarning
from wire import (
    END,
    HOLD,
    RESET,
    TLS,
    Request,
    Resolver,
    Wire,
    answer,
    black_hole,
    chunked,
    closed_port,
    drip,
    part,
    write_certificate,
)

from holotensor_net.config import CdnEndpoint, ClientConfig, NetworkConfig, RetryConfig
from holotensor_net.errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    InvalidUrl,
    NetworkError,
    NotFound,
    ObjectChanged,
    ProtocolError,
    RangeNotSupported,
    RateLimited,
    RetriesExhausted,
    StalledTransfer,
    Timeout,
)
from holotensor_net.transport import addresses
from holotensor_net.transport.client import Answer, Ask, HttpClient, Write, _hop
from holotensor_net.transport.digests import Digest
from holotensor_net.transport.leads import Lead, Leads
from holotensor_net.transport.retry import Patience
from holotensor_net.transport.sockets import LiveSockets
from holotensor_net.values import HeadInfo, RangeRequest, Validator

DATA = bytes(range(256)) * 4
TAG = '"v1"'
V1 = Validator(TAG, None, True)
NOW = 1_700_000_000.0
DATE, EARLIER = formatdate(NOW, usegmt=True), formatdate(NOW - 60, usegmt=True)
SECRET = "hunter2"

QUICK = RetryConfig(max_retries=2, initial_backoff=0.001, jitter=False)
ONCE = RetryConfig(max_retries=0)
CONFIG_FIELDS = ("timeout", "connect_timeout", "compression", "user_agent", "max_body", "max_redirects")

Open = Callable[..., HttpClient]


@pytest.fixture
def client() -> Iterator[Open]:
    """Makes clients of a ``Wire`` or a URL, which end with the test: one attempt and short timeouts unless told."""
    with contextlib.ExitStack() as running:

        def start(
            at: Wire | str, *, retry: RetryConfig = ONCE, wall: Callable[[], float] = time.time, **more: Any
        ) -> HttpClient:
            settings = {"timeout": 5.0, "connect_timeout": 5.0} | {n: more.pop(n) for n in CONFIG_FIELDS if n in more}
            endpoint = CdnEndpoint(at if isinstance(at, str) else at.url, **more)
            return running.enter_context(HttpClient(endpoint, ClientConfig(retry=retry, **settings), wall=wall))

        yield start


@pytest.fixture
def trust(tmp_path: Path) -> str:
    return str(write_certificate(tmp_path))


@dataclass
class Sink:
    """Keeps what a transfer writes, and how it was opened."""

    opened: list[tuple[HeadInfo, RangeRequest | None]] = field(default_factory=list)
    body: dict[int, int] = field(default_factory=dict)

    def __call__(self, head: HeadInfo, coming: RangeRequest | None) -> Write:
        self.opened.append((head, coming))

        def write(offset: int, data: memoryview) -> None:
            self.body.update(enumerate(data, offset))

        return write

    def bytes_of(self, answered: Answer) -> bytes:
        assert answered.byte_range is not None
        return bytes(self.body[index] for index in range(answered.byte_range.start, answered.byte_range.stop))


def ranges(wire: Wire) -> list[tuple[str | None, str | None]]:
    """Range and If-Match of every request."""
    return [(request.headers.get("range"), request.headers.get("if-match")) for request in wire.requests]


def cancelled(asking: HttpClient) -> None:
    with pytest.raises(Cancelled):
        asking.fetch("a")


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# -- a whole object


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        pytest.param(answer(DATA), DATA, id="with a length"),
        pytest.param(answer(b"x"), b"x", id="one byte"),
        pytest.param(answer(b""), b"", id="empty"),
        pytest.param(chunked(DATA[:5], DATA[5:]), DATA, id="chunked"),
        pytest.param(chunked(), b"", id="chunked, empty"),
        pytest.param(chunked(DATA, end=b"0;ext=1\r\nX-Trailer: 1\r\n\r\n"), DATA, id="chunked, with a trailer"),
        pytest.param(answer(DATA, content_encoding="identity"), DATA, id="identity"),
        pytest.param(answer(gzip.compress(DATA), content_encoding="gzip"), DATA, id="gzip"),
        pytest.param(answer(gzip.compress(DATA), content_encoding=" X-GZIP "), DATA, id="x-gzip"),
        pytest.param(chunked(gzip.compress(DATA), content_encoding="gzip"), DATA, id="gzip, chunked"),
        pytest.param(answer(gzip.compress(b""), content_encoding="gzip"), b"", id="gzip of nothing"),
        pytest.param(
            answer(gzip.compress(DATA), content_encoding="gzip").replace(b"Content-Encoding", b"cONTENT-eNCODING"),
            DATA,
            id="gzip, named in odd letters",
        ),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answer(DATA), DATA, id="after early hints"),
        pytest.param(answer(DATA).replace(b"HTTP/1.1", b"HTTP/1.0"), DATA, id="HTTP/1.0"),
        pytest.param([*drip(answer(DATA[:40]), 0.001)], DATA[:40], id="in drops"),
    ],
)
def test_fetch_gives_the_whole_object(client: Open, sent: Any, body: bytes) -> None:
    with Wire(sent) as wire:
        assert client(wire).fetch("weights/a.bin") == body
        request = wire.requests[0]
        assert (request.method, request.target) == ("GET", "/weights/a.bin")
        assert request.headers["accept-encoding"] == "gzip"
        assert "range" not in request.headers


def test_a_megabyte_comes_whole(client: Open) -> None:
    data = os.urandom(1 << 20)
    with Wire(answer(data), chunked(*[data[i : i + 99_999] for i in range(0, len(data), 99_999)])) as wire:
        assert client(wire).fetch("a") == data
        assert client(wire).fetch("a") == data


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param([answer(DATA, content_length=None), END], ProtocolError, id="no length"),
        pytest.param([answer(DATA, content_length="abc"), END], ProtocolError, id="a length that is no number"),
        pytest.param([answer(DATA, content_length="-5"), END], ProtocolError, id="a negative length"),
        pytest.param([answer(DATA, content_length="5, 6"), END], ProtocolError, id="two lengths"),
        pytest.param([chunked(DATA, content_length=len(DATA))], ProtocolError, id="length and chunks"),
        pytest.param([chunked(DATA, transfer_encoding="gzip, chunked")], ProtocolError, id="compressed on the way"),
        pytest.param([answer(DATA, content_length=2000), END], ConnectionFailed, id="cut"),
        pytest.param([answer(DATA, content_length=2000), RESET], ConnectionFailed, id="reset"),
        pytest.param([chunked(DATA, end=b""), END], ConnectionFailed, id="chunked, cut"),
        pytest.param([chunked(DATA, end=b"0"), END], ConnectionFailed, id="chunked, cut in a length"),
        pytest.param([chunked(DATA, end=b"-5\r\n" + DATA), END], ConnectionFailed, id="chunk of negative length"),
        pytest.param([chunked(DATA, end=b"zz\r\n\r\n"), END], ConnectionFailed, id="chunk of no length"),
        pytest.param([answer(DATA, content_length=100)], ProtocolError, id="more than announced"),
        pytest.param([chunked(DATA) + b"!"], ProtocolError, id="chunked, and more"),
        pytest.param([answer(gzip.compress(DATA)[:-9], content_encoding="gzip")], ProtocolError, id="gzip, cut"),
        pytest.param([answer(gzip.compress(DATA) + b"!", content_encoding="gzip")], ProtocolError, id="gzip, and more"),
        pytest.param([answer(b"", content_encoding="gzip")], ProtocolError, id="gzip, nothing"),
        pytest.param([answer(DATA, content_encoding="gzip")], ProtocolError, id="gzip that is none"),
        pytest.param([answer(DATA, content_encoding="br")], ProtocolError, id="brotli"),
        pytest.param([answer(DATA, content_encoding="gzip, gzip")], ProtocolError, id="gzip twice"),
        pytest.param([part(DATA, 0, len(DATA))], ProtocolError, id="a part, the only one"),
        pytest.param([answer(status=204, content_length=None)], HttpError, id="204"),
        pytest.param([answer(status=304)], ProtocolError, id="304 unasked"),
        pytest.param([answer(status=302)], HttpError, id="302 to nowhere"),
        pytest.param([answer(status=101)], ProtocolError, id="101"),
        pytest.param([b"SSH-2.0-OpenSSH_9\r\n", HOLD], ProtocolError, id="another protocol"),
        pytest.param([b"HTTP/2.0 200 OK\r\n\r\n", END], ProtocolError, id="another version"),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"], ProtocolError, id="200 headers"),
        pytest.param([b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"], ProtocolError, id="a long header"),
        pytest.param(
            [
                answer(gzip.compress(DATA), content_length=None).replace(
                    b"\r\n\r\n", b"\r\nContent-Length: 5\r\nno header\r\nContent-Encoding: gzip\r\n\r\n", 1
                )
            ],
            ProtocolError,
            id="a line that hides the headers behind it",
        ),
        pytest.param([RESET], ConnectionFailed, id="no answer"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Le", END], ConnectionFailed, id="half a head"),
    ],
)
def test_fetch_gives_nothing_that_is_not_proven_whole(client: Open, sent: Any, error: type[NetworkError]) -> None:
    with Wire(sent) as wire:
        with pytest.raises(error) as caught:
            client(wire).fetch("weights/a.bin")
        assert caught.value.url == f"{wire.url}/weights/a.bin"
        assert not isinstance(caught.value, ProtocolError) or error is ProtocolError


def test_fetch_without_compression_asks_for_none_and_takes_none(client: Open) -> None:
    with Wire(answer(DATA), answer(gzip.compress(DATA), content_encoding="gzip")) as wire:
        plain = client(wire, compression=False)
        assert plain.fetch("a") == DATA
        with pytest.raises(ProtocolError):
            plain.fetch("a")
        assert [request.headers["accept-encoding"] for request in wire.requests] == ["identity"] * 2


FIRST_TRIES = [
    pytest.param([answer(b"old" * 9, content_length=999), RESET], id="cut"),
    pytest.param([answer(b"old" * 9, content_length=999, etag=TAG), RESET], id="cut, with a strong validator"),
    pytest.param([chunked(b"old" * 9, end=b""), END], id="chunked, cut"),
    pytest.param([answer(b"old" * 9, content_encoding="gzip", content_length=99), END], id="gzip, cut"),
]


@pytest.mark.parametrize("body", [DATA, b"", b"short"], ids=["longer", "empty", "shorter"])
@pytest.mark.parametrize("first", FIRST_TRIES)
def test_a_second_try_of_fetch_keeps_nothing_of_the_first(client: Open, first: Any, body: bytes) -> None:
    with Wire(first, answer(body, etag=TAG)) as wire:
        assert client(wire, retry=QUICK).fetch("a") == body


@pytest.mark.parametrize("size", [0, 999, 1000])
def test_a_compressed_body_of_max_body_fits(client: Open, size: int) -> None:
    with Wire(answer(gzip.compress(bytes(size)), content_encoding="gzip")) as wire:
        assert client(wire, max_body=1000).fetch("a") == bytes(size)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(answer(gzip.compress(bytes(1001)), content_encoding="gzip"), id="by one byte"),
        pytest.param(answer(gzip.compress(bytes(10**7)), content_encoding="gzip"), id="a bomb"),
        pytest.param(chunked(bytes(600), bytes(401)), id="chunked, by one byte"),
        pytest.param([chunked(end=b""), *itertools.repeat(b"5\r\nhello\r\n", 300)], id="chunked, without end"),
    ],
)
def test_a_body_of_unknown_size_beyond_max_body_is_refused_once_and_for_all(client: Open, sent: Any) -> None:
    with Wire(sent) as wire:
        with pytest.raises(NetworkError, match="larger than 1000 bytes") as caught:
            client(wire, max_body=1000, retry=QUICK).fetch("a")
        assert type(caught.value) is NetworkError
        assert caught.value.url == f"{wire.url}/a"
        assert len(wire.requests) == 1


def test_a_body_of_known_size_may_be_larger_than_max_body(client: Open) -> None:
    with Wire(answer(DATA)) as wire:
        assert client(wire, max_body=10).fetch("a") == DATA


# -- a range of an object


@pytest.mark.parametrize(
    ("start", "stop", "sent"),
    [
        pytest.param(100, 200, part(DATA, 100, 200), id="inside"),
        pytest.param(0, 1, part(DATA, 0, 1), id="first byte"),
        pytest.param(1023, 1024, part(DATA, 1023, 1024), id="last byte"),
        pytest.param(0, 1024, part(DATA, 0, 1024), id="all"),
        pytest.param(0, 1024, answer(DATA), id="all, in a 200 that fits"),
        pytest.param(
            100,
            200,
            chunked(DATA[100:150], DATA[150:200], status=206, content_range="bytes 100-199/1024"),
            id="chunked",
        ),
        pytest.param(100, 200, [part(DATA, 100, 200, content_length=None), END], id="up to the end of the connection"),
        pytest.param(100, 200, [part(DATA, 100, 200)[:-50], 0.01, DATA[150:200]], id="in two pieces"),
    ],
)
def test_fetch_range_gives_these_bytes(client: Open, start: int, stop: int, sent: Any) -> None:
    with Wire(sent) as wire:
        assert client(wire).fetch_range("a", (start, stop)) == DATA[start:stop]
        assert wire.requests[0].headers["range"] == f"bytes={start}-{stop - 1}"
        assert wire.requests[0].headers["accept-encoding"] == "identity"


def test_an_empty_range_asks_nothing(client: Open) -> None:
    with Wire() as wire:
        assert client(wire).fetch_range("a", (5, 5)) == b""
        assert client(wire).fetch_range("a", RangeRequest(0, 0)) == b""
        with pytest.raises(ConfigurationError) as caught:
            client(wire).transfer(Ask("a", RangeRequest(5, 5)), Sink())
        assert caught.value.byte_range == RangeRequest(5, 5)
        assert wire.connections == 0


def test_a_range_that_ends_before_it_begins_is_refused(client: Open) -> None:
    with Wire() as wire, pytest.raises(ConfigurationError):
        client(wire).fetch_range("a", (6, 5))


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(part(DATA, 100, 200, content_range=None), ProtocolError, id="no Content-Range"),
        pytest.param(part(DATA, 101, 201), ProtocolError, id="shifted"),
        pytest.param(part(DATA, 0, 100), ProtocolError, id="from the start"),
        pytest.param(part(DATA, 100, 201), ProtocolError, id="longer"),
        pytest.param(part(DATA, 100, 200, content_range="bytes 199-100/1024"), ProtocolError, id="backwards"),
        pytest.param(part(DATA, 100, 200, content_range="bytes 100-199/50"), ProtocolError, id="impossible total"),
        pytest.param(part(DATA, 100, 200, content_range="bytes 100-199/*"), ProtocolError, id="unknown total"),
        pytest.param(part(DATA, 100, 200, content_range="lines 100-199/1024"), ProtocolError, id="another unit"),
        pytest.param(part(DATA, 100, 200, content_length=99), ProtocolError, id="length and range disagree"),
        pytest.param(part(DATA, 100, 200, content_encoding="gzip"), ProtocolError, id="compressed"),
        pytest.param(part(DATA, 100, 200, transfer_encoding="chunked"), ProtocolError, id="length and chunks"),
        pytest.param(part(DATA, 100, 200, content_type="multipart/byteranges; boundary=x"), ProtocolError, id="parts"),
        pytest.param(part(DATA, 100, 200) + b"!", ProtocolError, id="one byte more"),
        pytest.param([part(DATA, 100, 200, content_length=None) + b"!", END], ProtocolError, id="one more, no length"),
        pytest.param([part(DATA, 100, 200)[:-1], END], ConnectionFailed, id="one byte less"),
        pytest.param([part(DATA, 100, 200, content_length=None)[:-1], END], ConnectionFailed, id="less, no length"),
        pytest.param(
            chunked(DATA[100:199], status=206, content_range="bytes 100-199/1024"), ConnectionFailed, id="chunks, less"
        ),
        pytest.param(
            chunked(DATA[100:201], status=206, content_range="bytes 100-199/1024"), ProtocolError, id="chunks, more"
        ),
        pytest.param(answer(DATA), RangeNotSupported, id="the whole"),
        pytest.param(answer(status=304), ProtocolError, id="304"),
        pytest.param(answer(status=412), HttpError, id="412 to no condition"),
        pytest.param(answer(status=416, content_range="bytes */50"), HttpError, id="416"),
        pytest.param(answer(status=416), HttpError, id="416 without a size"),
        pytest.param(part(DATA[:150], 100, 150), HttpError, id="the object ends before"),
    ],
)
def test_fetch_range_gives_nothing_else(client: Open, sent: Any, error: type[NetworkError]) -> None:
    with Wire(sent) as wire:
        with pytest.raises(error) as caught:
            client(wire).fetch_range("a", (100, 200))
        assert type(caught.value) is error
        assert (caught.value.url, caught.value.byte_range) == (f"{wire.url}/a", RangeRequest(100, 200))


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(answer(DATA), RangeNotSupported, id="longer"),
        pytest.param(chunked(DATA[:100]), RangeNotSupported, id="of unknown length"),
        pytest.param(answer(DATA[:99]), HttpError, id="shorter"),
    ],
)
def test_a_200_to_a_range_from_the_start_must_be_that_range(client: Open, sent: bytes, error: type) -> None:
    with Wire(sent) as wire, pytest.raises(error) as caught:
        client(wire).fetch_range("a", (0, 100))
    assert type(caught.value) is error


def test_what_is_refused_is_never_written(client: Open) -> None:
    sink = Sink()
    with Wire(answer(DATA), part(DATA, 101, 201), part(DATA, 100, 200, content_encoding="gzip")) as wire:
        for _ in range(3):
            with pytest.raises(ProtocolError):
                client(wire).transfer(Ask("a", RangeRequest(100, 200)), sink)
    assert (sink.opened, sink.body) == ([], {})


# -- going on where it ended


def test_a_shorter_part_is_kept_and_the_rest_asked_for(client: Open) -> None:
    with Wire(part(DATA, 100, 130, etag=TAG), part(DATA, 130, 131, etag=TAG), part(DATA, 131, 200, etag=TAG)) as wire:
        sink = Sink()
        answered = client(wire).transfer(Ask("a", RangeRequest(100, 200)), sink)
        assert sink.bytes_of(answered) == DATA[100:200]
        assert ranges(wire) == [("bytes=100-199", None), ("bytes=130-199", TAG), ("bytes=131-199", TAG)]
        assert (answered.requests, wire.connections) == (3, 1)
        assert [coming for _, coming in sink.opened] == [RangeRequest(100, 200)]


def test_a_cut_transfer_goes_on_at_the_counted_byte_under_if_match(client: Open) -> None:
    with Wire([part(DATA, 100, 200, etag=TAG)[:-40], RESET], part(DATA, 160, 200, etag=TAG)) as wire:
        retries: list[NetworkError] = []
        moved: list[int] = []
        sink = Sink()
        ask = Ask("a", RangeRequest(100, 200))
        answered = client(wire, retry=QUICK).transfer(ask, sink, on_retry=retries.append, on_bytes=moved.append)
        assert sink.bytes_of(answered) == DATA[100:200]
        assert ranges(wire) == [("bytes=100-199", None), ("bytes=160-199", TAG)]
        assert [type(error) for error in retries] == [ConnectionFailed]
        assert sum(moved) == 100
        assert len(sink.opened) == 1


def test_a_stalled_transfer_goes_on_elsewhere(client: Open) -> None:
    with Wire([part(DATA, 100, 200, etag=TAG)[:-40], HOLD], part(DATA, 160, 200, etag=TAG)) as wire:
        retries: list[NetworkError] = []
        sink = Sink()
        stalling = client(wire, retry=QUICK, timeout=0.1)
        answered = stalling.transfer(Ask("a", RangeRequest(100, 200)), sink, on_retry=retries.append)
        assert sink.bytes_of(answered) == DATA[100:200]
        assert ranges(wire)[1] == ("bytes=160-199", TAG)
        assert [type(error) for error in retries] == [StalledTransfer]
        assert wire.connections == 2


def test_a_strong_date_is_a_validator_too(client: Open) -> None:
    dated = {"last_modified": EARLIER, "date": DATE}
    with Wire([part(DATA, 0, 200, **dated)[:-40], RESET], part(DATA, 160, 200, **dated)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (0, 200)) == DATA[:200]
        assert wire.requests[1].headers["if-unmodified-since"] == EARLIER
        assert wire.requests[1].headers["range"] == "bytes=160-199"


@pytest.mark.parametrize(
    "headers",
    [{}, {"etag": 'W/"v1"'}, {"etag": "v1"}, {"last_modified": DATE, "date": DATE}, {"last_modified": EARLIER}],
    ids=["none", "weak tag", "malformed tag", "a date too young", "a date of unknown age"],
)
def test_without_a_strong_validator_all_is_asked_for_again(client: Open, headers: dict[str, str]) -> None:
    old = bytes(len(DATA))
    with Wire([part(old, 100, 200, **headers)[:-40], RESET], part(DATA, 100, 200, **headers)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (100, 200)) == DATA[100:200]
        assert ranges(wire) == [("bytes=100-199", None)] * 2
        assert "if-unmodified-since" not in wire.requests[1].headers


def test_a_short_part_of_an_unnamed_version_is_no_progress(client: Open) -> None:
    with Wire(always=part(DATA, 100, 150)) as wire:
        with pytest.raises(RetriesExhausted, match="does not name"):
            client(wire, retry=QUICK).fetch_range("a", (100, 200))
        assert ranges(wire) == [("bytes=100-199", None)] * 3


@pytest.mark.parametrize(
    ("second", "error"),
    [
        pytest.param(answer(status=412), ObjectChanged, id="412"),
        pytest.param(part(DATA, 160, 200, etag='"v2"'), ObjectChanged, id="another tag, If-Match ignored"),
        pytest.param(part(DATA, 160, 200), ObjectChanged, id="no tag, If-Match ignored"),
        pytest.param(part(DATA, 160, 200, etag='W/"v1"'), ObjectChanged, id="the tag, weak"),
        pytest.param(part(DATA + b"!", 160, 200, etag=TAG), ObjectChanged, id="another size"),
        pytest.param(answer(status=416, content_range="bytes */160", etag=TAG), ObjectChanged, id="416, another size"),
        pytest.param(answer(DATA, etag='"v2"'), RangeNotSupported, id="the whole of another version"),
        pytest.param(answer(status=404), NotFound, id="gone"),
        pytest.param(answer(status=304, etag=TAG), RetriesExhausted, id="304"),
    ],
)
def test_parts_of_two_versions_are_never_joined(client: Open, second: bytes, error: type[NetworkError]) -> None:
    with Wire([part(DATA, 100, 200, etag=TAG)[:-40], RESET], always=second) as wire:
        with pytest.raises(error) as caught:
            client(wire, retry=QUICK).fetch_range("a", (100, 200))
        assert type(caught.value) is error


def test_a_shrunken_object_is_no_short_object(client: Open) -> None:
    shrunken = answer(status=416, content_range="bytes */160", etag=TAG)
    with Wire([part(DATA, 100, 200, etag=TAG)[:-40], RESET], shrunken) as wire, pytest.raises(ObjectChanged):
        client(wire, retry=QUICK).transfer(Ask("a", RangeRequest(100, 200), allow_short=True), Sink())


@pytest.mark.parametrize("headers", [{"etag": TAG}, {}], ids=["strong validator", "no validator"])
def test_a_body_whose_end_was_wrong_is_fetched_anew(client: Open, headers: dict[str, str]) -> None:
    ranged = {"status": 206, "content_range": "bytes 100-199/1024", **headers}
    endless, excessive = chunked(DATA[100:200], end=b"", **ranged), part(bytes(1024), 100, 200, **headers) + b"!"
    with Wire([endless, END], excessive, part(DATA, 100, 200, **headers)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (100, 200)) == DATA[100:200]
        assert [asked for asked, _ in ranges(wire)] == ["bytes=100-199"] * 3


def test_one_byte_and_a_cut_for_ever_ends(client: Open) -> None:
    def scripts() -> Iterator[Any]:
        for position in itertools.count(100):
            yield [part(DATA, position, 200, etag=TAG)[: position - 199], RESET]

    with Wire(*itertools.islice(scripts(), 3)) as wire:
        with pytest.raises(RetriesExhausted) as caught:
            client(wire, retry=QUICK).fetch_range("a", (100, 200))
        assert caught.value.attempts == 3
        assert [asked for asked, _ in ranges(wire)] == ["bytes=100-199", "bytes=101-199", "bytes=102-199"]


def test_one_byte_a_part_for_ever_ends(client: Open) -> None:
    data = bytes(2000)
    with Wire(*(part(data, position, position + 1, etag=TAG) for position in range(256))) as wire:
        with pytest.raises(ProtocolError, match="keeps sending less"):
            client(wire).fetch_range("a", (0, 2000))
        assert len(wire.requests) == 256


def test_a_200_in_the_middle_begins_again(client: Open) -> None:
    with Wire([part(DATA, 0, 1024, etag=TAG)[:-40], RESET], answer(DATA, etag=TAG)) as wire:
        sink = Sink()
        answered = client(wire, retry=QUICK).transfer(Ask("a", RangeRequest(0, 1024)), sink)
        assert sink.bytes_of(answered) == DATA
        assert len(sink.opened) == 1


def test_an_object_that_changes_size_between_tries_is_another_object(client: Open) -> None:
    """The sink was opened for the first size."""
    for size in (10, 2000):
        with Wire([answer(DATA)[:-40], RESET], answer(bytes(size))) as wire, pytest.raises(ObjectChanged):
            client(wire, retry=QUICK).transfer(Ask("a"), Sink())


@settings(max_examples=40)
@given(
    start=st.integers(0, 1000),
    length=st.integers(1, 24),
    steps=st.lists(st.tuples(st.sampled_from(["short", "cut", "reset", "busy"]), st.integers(1, 20)), max_size=6),
)
def test_however_it_is_cut_the_bytes_are_those(start: int, length: int, steps: list[tuple[str, int]]) -> None:
    stop = start + length
    position, scripts = start, []
    for kind, size in steps:
        size = min(size, stop - position - 1)
        if kind == "busy":
            scripts.append([answer(status=500)])
        elif size > 0 and kind == "short":
            scripts.append([part(DATA, position, position + size, etag=TAG)])
            position += size
        elif size > 0:
            scripts.append(
                [part(DATA, position, stop, etag=TAG)[: position + size - stop], END if kind == "cut" else RESET]
            )
            position += size
    scripts.append([part(DATA, position, stop, etag=TAG)])
    retry = RetryConfig(max_retries=len(steps), initial_backoff=0.0001, jitter=False)
    with Wire(*scripts) as wire, HttpClient(wire.url, ClientConfig(retry=retry, timeout=5.0)) as client:
        assert client.fetch_range("a", (start, stop)) == DATA[start:stop]
        assert len(wire.requests) == len(scripts)


# -- versions that are pinned, held, or of known size


def test_a_pinned_version_is_demanded_from_the_first_request(client: Open) -> None:
    with Wire(part(DATA, 0, 9, etag=TAG), answer(DATA, etag=TAG)) as wire:
        for byte_range in (RangeRequest(0, 9), None):
            sink = Sink()
            answered = client(wire).transfer(Ask("a", byte_range, pinned=V1), sink)
            assert sink.bytes_of(answered) == DATA[: 9 if byte_range else None]
        assert ranges(wire) == [("bytes=0-8", TAG), (None, TAG)]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(answer(status=412), id="412"),
        pytest.param(part(DATA, 0, 9, etag='"v2"'), id="another tag"),
        pytest.param(part(DATA, 0, 9), id="no tag"),
        pytest.param(answer(DATA[:9], etag='"v2"'), id="another whole"),
    ],
)
def test_another_version_than_the_pinned_one_is_refused(client: Open, sent: bytes) -> None:
    sink = Sink()
    with Wire(sent) as wire, pytest.raises(ObjectChanged):
        client(wire, retry=QUICK).transfer(Ask("a", RangeRequest(0, 9), pinned=V1), sink)
    assert not sink.body


@pytest.mark.parametrize(
    ("held", "condition", "said"),
    [
        pytest.param(V1, ("if-none-match", TAG), {"etag": TAG}, id="strong tag"),
        pytest.param(V1, ("if-none-match", TAG), {}, id="strong tag, not repeated"),
        pytest.param(Validator('W/"v1"'), ("if-none-match", 'W/"v1"'), {"etag": TAG}, id="weak tag"),
        pytest.param(Validator(None, DATE), ("if-modified-since", DATE), {}, id="date"),
        pytest.param(Validator(TAG, DATE, True), ("if-none-match", TAG), {"etag": TAG}, id="tag before date"),
    ],
)
@pytest.mark.parametrize("byte_range", [None, RangeRequest(0, 9)], ids=["whole", "range"])
def test_a_304_confirms_the_version_that_is_held(
    client: Open, held: Validator, condition: tuple[str, str], said: dict[str, str], byte_range: RangeRequest | None
) -> None:
    with Wire(answer(status=304, content_length=None, cache_control="max-age=60", **said)) as wire:
        sink = Sink()
        answered = client(wire).transfer(Ask("a", byte_range, held=held), sink)
        assert (answered.not_modified, answered.byte_range, answered.requests) == (True, None, 1)
        assert answered.head.headers["cache-control"] == "max-age=60"
        assert not sink.opened
        sent = {name: value for name, value in wire.requests[0].headers.items() if name.startswith("if-")}
        assert sent == dict([condition])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        pytest.param(Ask("a"), {}, id="nothing held"),
        pytest.param(Ask("a", held=Validator()), {}, id="an empty validator held"),
        pytest.param(Ask("a", held=V1), {"etag": '"v2"'}, id="another tag"),
        pytest.param(Ask("a", held=V1, pinned=V1), {"etag": TAG}, id="pinned, so not asked"),
    ],
)
def test_a_304_that_confirms_nothing_is_an_error(client: Open, ask: Ask, said: dict[str, str]) -> None:
    with Wire(answer(status=304, content_length=None, **said)) as wire, pytest.raises(ProtocolError):
        client(wire).transfer(ask, Sink())


def test_a_304_to_a_second_try_is_an_error(client: Open) -> None:
    with Wire([answer(DATA, content_length=2000), RESET], always=answer(status=304)) as wire:
        with pytest.raises(RetriesExhausted) as caught:
            client(wire, retry=QUICK).transfer(Ask("a", held=V1), Sink())
        assert isinstance(caught.value.last_error, ProtocolError)
        assert ["if-none-match" in request.headers for request in wire.requests] == [True, False, False]


def test_a_new_version_comes_in_the_place_of_the_held_one(client: Open) -> None:
    with Wire(answer(DATA, etag='"v2"')) as wire:
        sink = Sink()
        answered = client(wire).transfer(Ask("a", held=V1), sink)
        assert not answered.not_modified
        assert sink.bytes_of(answered) == DATA


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(answer(DATA[:-1]), ObjectChanged, id="shorter"),
        pytest.param(answer(DATA + b"!"), ObjectChanged, id="longer"),
        pytest.param([answer(DATA[:-1], content_length=None), END], ConnectionFailed, id="shorter, no length"),
        pytest.param([answer(DATA + b"!", content_length=None), END], ProtocolError, id="longer, no length"),
        pytest.param(chunked(DATA[:-1]), ConnectionFailed, id="chunked, shorter"),
        pytest.param(chunked(DATA + b"!"), ProtocolError, id="chunked, longer"),
    ],
)
def test_an_object_of_another_size_than_known_is_refused(client: Open, sent: Any, error: type[NetworkError]) -> None:
    with Wire(sent) as wire, pytest.raises(error) as caught:
        client(wire).transfer(Ask("a", size=len(DATA)), Sink())
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "sent",
    [answer(DATA), [answer(DATA, content_length=None), END], chunked(DATA)],
    ids=["length", "end of the connection", "chunked"],
)
def test_an_object_of_known_size_may_end_in_any_way(client: Open, sent: Any) -> None:
    with Wire(sent) as wire:
        sink = Sink()
        assert sink.bytes_of(client(wire).transfer(Ask("a", size=len(DATA)), sink)) == DATA


@pytest.mark.parametrize(
    ("sent", "coming"),
    [
        pytest.param(part(DATA, 0, 100, etag=TAG), RangeRequest(0, 100), id="the part"),
        pytest.param(answer(DATA), RangeRequest(0, 1024), id="more than asked for"),
        pytest.param(answer(DATA[:50]), RangeRequest(0, 50), id="less than asked for"),
        pytest.param(part(DATA[:50], 0, 50), RangeRequest(0, 50), id="a part up to an earlier end"),
        pytest.param(chunked(DATA), None, id="of unknown length"),
        pytest.param(answer(b""), RangeRequest(0, 0), id="an empty object"),
    ],
)
def test_who_wants_the_whole_takes_what_comes(client: Open, sent: bytes, coming: RangeRequest | None) -> None:
    with Wire(sent) as wire:
        sink = Sink()
        answered = client(wire).transfer(Ask("a", RangeRequest(0, 100), or_whole=True), sink)
        assert [told for _, told in sink.opened] == [coming]
        assert answered.byte_range == (coming or RangeRequest(0, 1024))
        assert sink.bytes_of(answered) == DATA[: answered.byte_range.stop]


def test_who_wants_the_whole_does_not_take_it_in_the_middle(client: Open) -> None:
    with Wire(answer(DATA)) as wire, pytest.raises(RangeNotSupported):
        client(wire).transfer(Ask("a", RangeRequest(100, 200), or_whole=True), Sink())


def test_a_whole_that_is_cut_goes_on_in_ranges(client: Open) -> None:
    with Wire([answer(DATA, etag=TAG)[:-24], RESET], part(DATA, 1000, 1024, etag=TAG)) as wire:
        sink = Sink()
        answered = client(wire, retry=QUICK).transfer(Ask("a", RangeRequest(0, 100), or_whole=True), sink)
        assert sink.bytes_of(answered) == DATA
        assert ranges(wire) == [("bytes=0-99", None), ("bytes=1000-1023", TAG)]


def test_a_whole_of_unknown_length_that_is_cut_begins_again(client: Open) -> None:
    with Wire([chunked(bytes(50), end=b"", etag=TAG), RESET], chunked(DATA, etag=TAG)) as wire:
        sink = Sink()
        answered = client(wire, retry=QUICK).transfer(Ask("a", RangeRequest(0, 100), or_whole=True), sink)
        assert sink.bytes_of(answered) == DATA
        assert ranges(wire) == [("bytes=0-99", None), (None, TAG)]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        pytest.param(part(DATA, 1000, 1024), RangeRequest(1000, 1024), id="the object ends inside"),
        pytest.param(
            answer(status=416, content_range="bytes */1000"), RangeRequest(1000, 1000), id="ends where we begin"
        ),
        pytest.param(answer(status=416, content_range="bytes */7"), RangeRequest(1000, 1000), id="ends before"),
        pytest.param(answer(status=416, content_range="bytes */0"), RangeRequest(1000, 1000), id="is empty"),
    ],
)
def test_who_allows_a_short_object_gets_what_there_is(client: Open, sent: bytes, expected: RangeRequest) -> None:
    with Wire(sent) as wire:
        sink = Sink()
        answered = client(wire).transfer(Ask("a", RangeRequest(1000, 1100), allow_short=True), sink)
        assert answered.byte_range == expected
        assert sink.bytes_of(answered) == DATA[1000 : expected.stop]


def test_a_416_that_says_the_bytes_are_there_is_an_error(client: Open) -> None:
    with Wire(answer(status=416, content_range="bytes */2000")) as wire, pytest.raises(HttpError, match="2000 bytes"):
        client(wire).transfer(Ask("a", RangeRequest(1000, 1100), allow_short=True), Sink())


def test_an_empty_object_satisfies_who_wants_the_whole(client: Open) -> None:
    with Wire(answer(status=416, content_range="bytes */0", etag=TAG)) as wire:
        answered = client(wire).transfer(Ask("a", RangeRequest(0, 100), or_whole=True), Sink())
        assert (answered.byte_range, answered.head.size) == (RangeRequest(0, 0), 0)


def test_the_answer_tells_of_the_object_in_lower_case(client: Open) -> None:
    sent = part(DATA, 0, 9, etag=TAG + " \t", cache_control="no-store", content_type="text/plain")
    with Wire(sent.replace(b"Cache-Control", b"CACHE-CONTROL")) as wire:
        head = client(wire).transfer(Ask("a", RangeRequest(0, 9)), Sink()).head
        assert (head.size, head.validator, head.accepts_ranges, head.content_type) == (1024, V1, True, "text/plain")
        assert head.headers["cache-control"] == "no-store"


# -- HEAD


def test_head_tells_without_a_body(client: Open) -> None:
    with Wire(always=answer(content_length=10**12, etag=TAG, accept_ranges="bytes")) as wire:
        asking = client(wire)
        for _ in range(2):
            info = asking.head("a")
            assert (info.size, info.etag, info.accepts_ranges) == (10**12, TAG, True)
        assert [request.method for request in wire.requests] == ["HEAD"] * 2
        assert wire.connections == 1


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(answer(status=404), NotFound, id="404"),
        pytest.param(answer(status=204, content_length=None), HttpError, id="204"),
        pytest.param(answer(content_encoding="gzip"), ProtocolError, id="compressed"),
        pytest.param(answer(content_length="1e9"), ProtocolError, id="a length that is no number"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 12", END], ConnectionFailed, id="cut in the length"),
        pytest.param([answer(status=301, location="x")] * 1, HttpError, id="a redirect too many"),
    ],
)
def test_head_raises_what_the_answer_stands_for(client: Open, sent: Any, error: type[NetworkError]) -> None:
    with Wire(sent) as wire:
        with pytest.raises(error) as caught:
            client(wire, max_redirects=0).head("a")
        assert caught.value.url == f"{wire.url}/a"


def test_head_is_retried_and_redirected(client: Open) -> None:
    with Wire(answer(status=503), answer(status=307, location="/b"), answer(content_length=5)) as wire:
        assert client(wire, retry=QUICK).head("a").size == 5
        assert [(request.method, request.target) for request in wire.requests] == [
            ("HEAD", "/a"),
            ("HEAD", "/a"),
            ("HEAD", "/b"),
        ]


def test_a_body_after_head_is_not_taken_for_the_next_answer(client: Open) -> None:
    forged = answer(b"forged")
    with Wire(answer(content_length=len(forged)) + forged, answer(b"right")) as wire:
        asking = client(wire)
        asking.head("a")
        assert asking.fetch("b") == b"right"
        assert [request.connection for request in wire.requests] == [0, 1]


def test_the_size_may_be_unknown(client: Open) -> None:
    with Wire(answer(content_length=None, transfer_encoding="chunked")) as wire:
        assert client(wire).head("a").size is None


# -- digests that the server announces


def digest_of(data: bytes, algorithm: str = "sha-256") -> str:
    made = hashlib.new(algorithm.replace("-", ""), data).digest()
    return f"{algorithm}=:{base64.b64encode(made).decode()}:"


def linked_to(url: str, data: bytes) -> bytes:
    """A redirect to a file, and the digest that it has."""
    return answer(status=302, location=url, x_linked_etag=f'"{hashlib.sha256(data).hexdigest()}"')


WRONG = DATA[:300] + b"?" + DATA[301:]
ZIPPED = gzip.compress(DATA)

announce = pytest.mark.parametrize(
    "field",
    [
        pytest.param({"content_digest": digest_of(DATA)}, id="Content-Digest"),
        pytest.param({"repr_digest": digest_of(DATA)}, id="Repr-Digest"),
        pytest.param({"content_digest": digest_of(DATA, "sha-512")}, id="sha-512"),
        pytest.param({"content_digest": digest_of(DATA), "repr_digest": digest_of(DATA, "sha-512")}, id="both"),
        pytest.param({"repr_digest": f"{digest_of(DATA)}, {digest_of(DATA, 'sha-512')}"}, id="two algorithms"),
    ],
)


@announce
@pytest.mark.parametrize("tag", [TAG, f"W/{TAG}", None])
def test_a_whole_that_is_not_what_was_announced_is_asked_for_again(
    client: Open, field: dict[str, str], tag: str | None
) -> None:
    with Wire(answer(WRONG, etag=tag, **field), answer(DATA, etag=tag, **field)) as wire:
        assert client(wire, retry=QUICK, compression=False).fetch("a") == DATA


@announce
def test_a_whole_that_stays_wrong_is_not_delivered(client: Open, field: dict[str, str]) -> None:
    with Wire(chunked(WRONG, **field)) as wire, pytest.raises(ChecksumMismatch, match="checksum mismatch") as caught:
        client(wire).fetch("a")
    assert caught.value.expected.startswith("sha")
    assert caught.value.url == f"{wire.url}/a"


def test_a_part_is_held_against_its_own_digest_alone(client: Open) -> None:
    fields = {"content_digest": digest_of(DATA[100:500]), "repr_digest": digest_of(DATA), "etag": TAG}
    with Wire(part(WRONG, 100, 500, **fields), part(DATA, 100, 500, **fields)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (100, 500)) == DATA[100:500]
        assert len(wire.requests) == 2


def test_a_part_that_is_all_there_is_is_held_against_the_digest_of_the_whole(client: Open) -> None:
    with Wire(part(WRONG, 0, len(DATA), repr_digest=digest_of(DATA))) as wire, pytest.raises(ChecksumMismatch):
        client(wire).fetch_range("a", (0, len(DATA)))


def test_a_promise_is_held_across_a_cut(client: Open) -> None:
    cut = [part(WRONG, 0, len(DATA), etag=TAG, content_digest=digest_of(DATA)).removesuffix(DATA[500:]), END]
    rest = part(DATA, 500, len(DATA), etag=TAG)
    with Wire(cut, rest, part(DATA, 0, len(DATA), etag=TAG)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (0, len(DATA))) == DATA
        assert [asked for asked, _ in ranges(wire)] == ["bytes=0-1023", "bytes=500-1023", "bytes=0-1023"]


def test_what_a_part_alone_got_wrong_is_asked_for_alone(client: Open) -> None:
    first, rest = (digest_of(data) for data in (DATA[:400], DATA[400:]))
    with Wire(
        answer(DATA[:400], 206, content_range="bytes 0-399/1024", etag=TAG, content_digest=first),
        part(DATA[:400] + bytes(624), 400, 1024, etag=TAG, content_digest=rest),
        part(DATA, 400, 1024, etag=TAG, content_digest=rest),
    ) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (0, 1024)) == DATA
        assert [asked for asked, _ in ranges(wire)] == ["bytes=0-1023", "bytes=400-1023", "bytes=400-1023"]


def test_digests_are_of_the_bytes_as_they_come(client: Open) -> None:
    fields = {"content_encoding": "gzip", "content_digest": digest_of(ZIPPED), "repr_digest": digest_of(ZIPPED)}
    with Wire(answer(ZIPPED, **fields), answer(ZIPPED, **(fields | {"repr_digest": digest_of(DATA)}))) as wire:
        assert client(wire).fetch("a") == DATA
        with pytest.raises(ChecksumMismatch):
            client(wire).fetch("a")


@pytest.mark.parametrize("body", [b"", DATA])
def test_digests_that_prove_nothing_are_passed_over(client: Open, body: bytes) -> None:
    with Wire(answer(body, content_digest="md5=:AAAA:, sha-256=:*:", repr_digest="sha=:AA==:, x-y")) as wire:
        assert client(wire).fetch("a") == body


def test_an_empty_body_has_a_digest_too(client: Open) -> None:
    right, wrong = digest_of(b""), digest_of(b"x")
    with Wire(answer(content_digest=right), answer(content_digest=wrong)) as wire:
        assert client(wire).fetch("a") == b""
        with pytest.raises(ChecksumMismatch):
            client(wire).fetch("a")


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "gzip"])
def test_a_file_behind_a_hub_is_held_against_what_the_hub_linked(client: Open, coded: bool) -> None:
    def stored(data: bytes) -> bytes:
        return answer(gzip.compress(data), content_encoding="gzip") if coded else answer(data)

    with Wire(stored(DATA), stored(WRONG)) as store:
        links = [linked_to(f"{store.url}/x", DATA)] * 2
        with Wire(*links) as hub:
            assert client(hub).fetch("a") == DATA
            with pytest.raises(ChecksumMismatch):
                client(hub).fetch("a")


def test_only_our_own_server_links_a_digest(client: Open) -> None:
    false = {"x_linked_etag": f'"{"0" * 64}"'}
    with Wire(answer(DATA, **false), answer(DATA, **false)) as store:
        with (
            Wire(answer(status=302, location=f"{store.url}/x", **false)) as mirror,
            Wire(answer(status=302, location=f"{mirror.url}/x")) as hub,
        ):
            assert client(hub).fetch("a") == DATA
        assert client(store).fetch("a") == DATA


def test_what_a_transfer_could_not_prove_alone_is_told(client: Open) -> None:
    sink = Sink()
    with Wire(part(DATA, 5, 9, repr_digest=digest_of(DATA)), answer(DATA, repr_digest=digest_of(DATA))) as wire:
        half = client(wire).transfer(Ask("a", RangeRequest(5, 9)), sink)
        assert half.unproved == {Digest("sha256", hashlib.sha256(DATA).digest())}
        assert client(wire).transfer(Ask("a"), sink).unproved == set()


# -- statuses and Retry-After


@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        *((404, NotFound, 1), (410, NotFound, 1), (400, HttpError, 1), (401, HttpError, 1), (403, HttpError, 1)),
        *((429, RetriesExhausted, 3), (503, RetriesExhausted, 3), (500, RetriesExhausted, 3), (501, HttpError, 1)),
    ],
)
def test_a_status_is_its_error_and_retried_if_it_may_pass(
    client: Open, status: int, error: type[NetworkError], requests: int
) -> None:
    with Wire(always=answer(b"why", status)) as wire:
        with pytest.raises(error) as caught:
            client(wire, retry=QUICK).fetch("a")
        assert type(caught.value) is error
        assert len(wire.requests) == requests
        assert wire.connections == 1  # what was left of each body was read


@pytest.mark.parametrize(("status", "more"), [(401, r"\)"), (403, r"\), and the path")])
def test_a_refusal_says_where_credentials_come_from(client: Open, status: int, more: str) -> None:
    with (
        Wire(answer(status=status)) as wire,
        pytest.raises(HttpError, match=rf"check the credentials .*HOLOTENSOR_TOKEN with HOLOTENSOR_ENDPOINT{more} \["),
    ):
        client(wire).fetch("a")


def test_a_busy_server_is_asked_again(client: Open) -> None:
    with Wire(answer(status=503), answer(status=429, retry_after=0), answer(DATA)) as wire:
        assert client(wire, retry=QUICK).fetch("a") == DATA


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("7", 7.0), ("1000000000", 1e9), ("-7", None), ("soon", None)),
        pytest.param(formatdate(NOW + 90, usegmt=True), 90.0, id="date"),
        pytest.param(formatdate(NOW - 90, usegmt=True), 0.0, id="date gone by"),
    ],
)
def test_retry_after_is_told(client: Open, value: str, seconds: float | None) -> None:
    with Wire(answer(status=429, retry_after=value)) as wire:
        with pytest.raises(RateLimited) as caught:
            client(wire, wall=lambda: NOW).fetch("a")
        assert caught.value.retry_after == seconds


@pytest.mark.parametrize("value", ["61", "1000000000", formatdate(NOW + 3600, usegmt=True)])
def test_a_retry_after_beyond_all_patience_is_not_waited_for(client: Open, value: str) -> None:
    with Wire(answer(status=503, retry_after=value)) as wire, within(1.0), pytest.raises(RateLimited):
        client(wire, retry=QUICK, wall=lambda: NOW).fetch("a")


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(client: Open) -> None:
    retry = RetryConfig(deadline=2.0)
    with Wire(answer(status=503, retry_after=30)) as wire, within(1.0), pytest.raises(RateLimited):
        client(wire, retry=retry).fetch("a")


def timed(times: list[float], reply: bytes) -> Callable[[Request], bytes]:
    """The answer, with a note of when it was asked for."""

    def told(_: Request) -> bytes:
        times.append(time.monotonic())
        return reply

    return told


@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_every_client_of_a_host_keeps_the_silence_that_one_was_asked_for(client: Open, retry_after: str) -> None:
    times: list[float] = []
    wall = itertools.repeat(NOW).__next__
    said = formatdate(NOW + 1, usegmt=True) if retry_after == "date" else retry_after
    with Wire(timed(times, answer(status=503, retry_after=said)), timed(times, answer(DATA))) as wire:
        with pytest.raises(RateLimited):
            client(wire, wall=wall).fetch("a")
        assert client(wire.url + "/other").fetch("b") == DATA
        assert times[1] - times[0] >= 1.0


def test_a_silence_is_that_of_the_host_that_asked_for_it_not_of_the_one_that_led_there(client: Open) -> None:
    with Wire(answer(status=503, retry_after=30)) as far:
        away = answer(status=302, location=f"{far.url}/a")
        with Wire(away, answer(b"here"), away) as near:
            asking = client(near)
            refuse(asking)
            assert asking.fetch("b") == b"here"  # it has asked for nothing
            refuse(asking)
            assert len(far.requests) == 1  # as the other has


@pytest.mark.parametrize("retry_after", [30, 3600, 10**9])
def test_who_cannot_wait_for_the_end_of_a_silence_is_told_at_once_and_asks_for_nothing(
    client: Open, retry_after: int
) -> None:
    hasty = RetryConfig(max_retries=3, deadline=5.0)
    with Wire(answer(status=429, retry_after=retry_after)) as wire:
        with pytest.raises(RateLimited):
            client(wire).head("a")
        for _ in range(3):
            with within(1.0), pytest.raises(RateLimited) as caught:
                client(wire, retry=hasty).fetch("a")
            assert caught.value.status == 429
            assert 20 < (caught.value.retry_after or 0.0) <= min(retry_after, 3600)
        assert len(wire.requests) == 1


def refuse(asking: HttpClient) -> None:
    with pytest.raises(RateLimited):
        asking.fetch("a")


def test_who_waits_for_a_connection_does_not_use_it_in_a_silence(client: Open) -> None:
    asked = threading.Event()
    times: list[float] = []
    first = [asked, answer(status=503, retry_after=1)]
    with Wire(first, timed(times, answer(DATA))) as wire:
        asking = client(wire, max_connections=1)
        refused = threading.Thread(target=refuse, args=(asking,))
        refused.start()
        wire.await_requests(1)
        waiting = threading.Thread(target=lambda: asking.fetch("b"))
        waiting.start()
        began = time.monotonic()
        asked.set()
        waiting.join(5)
        refused.join(5)
        assert times[0] - began >= 1.0


def test_who_waits_for_a_rate_does_not_ask_in_a_silence_that_began_meanwhile(client: Open) -> None:
    times: list[float] = []
    rested: list[float] = []
    with Wire(answer(status=503, retry_after=1), timed(times, answer(DATA))) as wire:
        asking = client(wire)

        def rest() -> None:
            rested.append(time.monotonic())
            if len(rested) == 1:
                refuse(client(wire))

        answered = asking.transfer(Ask("b"), lambda *_: lambda *_: None, on_request=rest)
        assert answered.requests == 1
        assert [len(rested), len(times)] == [2, 1]  # the rate is asked again: others, too, were held up
        assert times[0] - rested[0] >= 1.0


def test_clients_of_one_host_share_its_retries(client: Open) -> None:
    with Wire(always=answer(status=500)) as wire:
        asking = [client(wire, retry=QUICK), client(wire.url + "/other", retry=QUICK)]
        for number in range(60):
            with pytest.raises(NetworkError):
                asking[number % 2].fetch("a")
        assert 60 + 30 <= len(wire.requests) <= 66 + 32


def test_retries_that_lead_to_success_are_not_counted(client: Open) -> None:
    with Wire(*[answer(status=500), answer(DATA), answer(status=503), answer(content_length=5)] * 50) as wire:
        asking = client(wire, retry=QUICK)
        for _ in range(50):
            assert asking.fetch("a") == DATA
            assert asking.head("a").size == 5


def test_no_request_is_made_before_retry_after_is_over(client: Open) -> None:
    with Wire(answer(status=503, retry_after=1), answer(DATA)) as wire:
        began = time.monotonic()
        assert client(wire, retry=QUICK).fetch("a") == DATA
        assert time.monotonic() - began >= 1.0


# -- what is left of a body


@pytest.mark.parametrize("status", [404, 302, 416])
@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(lambda: itertools.repeat(bytes(65536)), id="flood"),
        pytest.param(lambda: drip(bytes(1000), 0.1), id="drip"),
        pytest.param(lambda: [HOLD], id="silence"),
    ],
)
def test_an_endless_body_of_a_refusal_is_left_soon(client: Open, status: int, rest: Callable[[], Any]) -> None:
    endless = itertools.chain([answer(status=status, content_length=10**12, location="/b")], rest())
    with Wire(endless, always=answer(DATA)) as wire:
        asking = client(wire)
        with within(1.5), contextlib.suppress(HttpError):
            asking.fetch_range("a", (0, 1024))
        assert asking.fetch("b") == DATA
        assert wire.requests[-1].connection == 1


def test_an_answer_that_is_refused_costs_its_connection_and_no_other(client: Open) -> None:
    with Wire(answer(DATA), answer(b"x"), answer(b"y")) as wire:
        asking = client(wire)
        with pytest.raises(RangeNotSupported):
            asking.fetch_range("a", (1, 5))
        assert asking.fetch("b") + asking.fetch("c") == b"xy"
        assert [request.connection for request in wire.requests] == [0, 1, 1]


# -- connections


def test_a_connection_serves_one_request_after_the_other(client: Open) -> None:
    with Wire(answer(DATA), chunked(DATA), part(DATA, 5, 9), answer(status=404), answer(DATA)) as wire:
        asking = client(wire)
        assert asking.fetch("a") == asking.fetch("b") == DATA
        assert asking.fetch_range("c", (5, 9)) == DATA[5:9]
        with pytest.raises(NotFound):
            asking.fetch("d")
        assert asking.fetch("e") == DATA
        assert (len(wire.requests), wire.connections) == (5, 1)


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(client: Open) -> None:
    with Wire([answer(b"x"), END], answer(b"y")) as wire:
        asking = client(wire)
        assert asking.fetch("a") == b"x"
        wire.await_closed()
        assert asking.fetch("b") == b"y"


def test_a_server_that_closes_after_each_answer_is_served_by_new_connections(client: Open) -> None:
    with Wire(always=[answer(DATA, connection="close"), END]) as wire:
        asking = client(wire)
        assert asking.fetch("a") == asking.fetch("b") == DATA
        assert wire.connections == 2


def test_closing_the_client_closes_its_connections(client: Open) -> None:
    with Wire(always=answer(DATA)) as wire:
        with client(wire) as asking:
            asking.fetch("a")
            assert wire.open == 1
        wire.await_closed()


def test_a_thread_that_ends_takes_its_connection_with_it(client: Open) -> None:
    with Wire(always=answer(DATA)) as wire:
        asking = client(wire)
        for _ in range(5):
            thread = threading.Thread(target=asking.fetch, args=("a",))
            thread.start()
            thread.join()
        del thread
        gc.collect()
        wire.await_closed()
        assert wire.connections == 5


def test_each_thread_has_a_connection_of_its_own(client: Open) -> None:
    together = threading.Event()
    with Wire(always=[together, answer(DATA)]) as wire:
        asking = client(wire)
        fetched: list[bytes] = []
        threads = [threading.Thread(target=lambda: fetched.append(asking.fetch("a"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wire.await_requests(4)
        together.set()
        for thread in threads:
            thread.join()
        assert fetched == [DATA] * 4
        assert wire.connections == 4


def test_no_more_than_max_connections_run_at_once(client: Open) -> None:
    gates = [threading.Event() for _ in range(4)]
    with Wire(*([gate, answer(DATA)] for gate in gates)) as wire:
        asking = client(wire, max_connections=2)
        threads = [threading.Thread(target=asking.fetch, args=("a",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for done, gate in enumerate(gates):
            assert len(wire.await_requests(min(done + 2, 4))) == min(done + 2, 4)
            gate.set()
        for thread in threads:
            thread.join()


def test_no_connection_coming_free_is_a_timeout_that_says_so(client: Open) -> None:
    with Wire([answer(b"", content_length=1), HOLD]) as wire:
        asking = client(wire, max_connections=1, timeout=0.2)

        def ask_meanwhile(*_: object) -> Write:
            with pytest.raises(Timeout, match="raise max_connections"):
                asking.head("b")
            raise Cancelled("seen")

        with pytest.raises(Cancelled, match="seen"):
            asking.transfer(Ask("a"), ask_meanwhile)
        assert len(wire.requests) == 1


FAILURES = [
    pytest.param([answer(status=404)], "a", id="404"),
    pytest.param([answer(DATA, content_length=9999), RESET], "a", id="cut"),
    pytest.param([b"gibberish\r\n", END], "a", id="gibberish"),
    pytest.param([answer(status=302, location="http://[")], "a", id="bad redirect"),
    pytest.param([answer(status=302, location="file:///etc/passwd")], "a", id="file redirect"),
    pytest.param([answer(status=302, location="/a")] * 2, "a", id="redirect loop"),
    pytest.param([answer(DATA, content_length=9999), HOLD], "a", id="stall"),
    pytest.param([HOLD], "a", id="silence"),
    pytest.param([chunked(DATA, content_length=5)], "a", id="two lengths"),
    pytest.param([answer(content_length="5, 6")], "a", id="bad length"),
    pytest.param([part(DATA, 0, 5)], "a", id="part"),
    pytest.param([], "../a", id="bad path"),
]


@pytest.mark.parametrize(("sent", "path"), FAILURES)
def test_no_failure_costs_a_slot_or_a_connection(client: Open, sent: Any, path: str) -> None:
    loops = [sent[:1]] * 2 if len(sent) == 2 and sent[0] == sent[1] else [sent] if sent else []
    with Wire(*loops, answer(DATA)) as wire:
        asking = client(wire, max_connections=1, timeout=0.2, max_redirects=1)
        with pytest.raises(NetworkError):
            asking.fetch(path)
        assert asking.fetch("b") == DATA
        wire._await(lambda: wire.open <= 1)  # the server may learn of the end of a connection a little later
        asking.close()
        wire.await_closed()


@pytest.mark.parametrize("where", ["open", "write", "on_bytes"])
@pytest.mark.parametrize(
    "error", [CacheError("disk full"), Cancelled("stop"), DeadlineExceeded("late"), ValueError("a defect")], ids=repr
)
def test_what_the_caller_raises_comes_out_as_it_is(client: Open, where: str, error: Exception) -> None:
    def fail(*_: object) -> Any:
        raise error

    def nothing(*_: object) -> None:
        return None

    with Wire(always=answer(DATA)) as wire:
        asking = client(wire, max_connections=1, retry=QUICK)
        open_sink = fail if where == "open" else lambda *_: fail if where == "write" else nothing
        with pytest.raises(type(error)) as caught:
            asking.transfer(Ask("a"), open_sink, on_bytes=fail if where == "on_bytes" else nothing)
        assert caught.value is error
        assert len(wire.requests) == 1
        assert asking.fetch("b") == DATA


# -- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("b", "/base/b"),
        ("/b", "/b"),
        ("../b?x=1", "/b?x=1"),
        ("?x=1", "/base/a?x=1"),
        ("/b#fragment", "/b"),
        ("/with space", "/with%20space"),
        ("/caf\xe9", "/caf%C3%A9"),
        ("/caf\xc3\xa9", "/caf%C3%A9"),
        ("/caf%C3%A9", "/caf%C3%A9"),
    ],
)
def test_a_redirect_is_followed(client: Open, status: int, location: str, target: str) -> None:
    with Wire(answer(b"moved", status, location=location), part(DATA, 5, 9)) as wire:
        assert client(wire.url + "/base", auth=SECRET).fetch_range("a", (5, 9)) == DATA[5:9]
        assert wire.targets == ["/base/a", target]
        assert wire.requests[1].headers == wire.requests[0].headers
        assert wire.requests[1].headers["authorization"] == f"Bearer {SECRET}"
        assert wire.connections == 1


def test_nothing_that_identifies_the_caller_crosses_to_another_origin(client: Open) -> None:
    own = {"X-Api-Key": SECRET, "Cookie": SECRET, "authorization": SECRET, "X-Any": SECRET}
    with Wire(part(DATA, 5, 9, etag=TAG)) as other, Wire(answer(status=302, location=f"{other.url}/b?sig=1")) as home:
        asking = client(home, headers=own, auth=SECRET, user_agent="probe/1")
        asking.transfer(Ask("a", RangeRequest(5, 9), pinned=V1), Sink())
        assert home.requests[0].headers["x-api-key"] == SECRET
        sent = dict(other.requests[0].headers)
        assert sent.pop("host") == f"127.0.0.1:{other.port}"
        assert sent == {
            "user-agent": "probe/1",
            "accept": "*/*",
            "accept-encoding": "identity",
            "range": "bytes=5-8",
            "if-match": TAG,
        }


def test_a_header_that_is_changed_in_its_place_is_sent_as_it_is(client: Open) -> None:
    own = {"X-Api-Key": "first"}
    with Wire(*[part(DATA, 5, 9, etag=TAG)] * 3) as wire:
        asking = client(wire, headers=own)
        for key in ("first", "second", "second"):
            asking.endpoint.headers["X-Api-Key"] = key
            assert asking.fetch_range("a", (5, 9)) == DATA[5:9]
        assert [request.headers["x-api-key"] for request in wire.requests] == ["first", "second", "second"]


def test_what_was_shed_is_not_put_on_again_on_the_way_home(client: Open) -> None:
    def back(_: object) -> bytes:
        return answer(status=302, location=f"{home.url}/c")

    with Wire(back) as other, Wire(answer(status=302, location=f"{other.url}/b"), answer(DATA)) as home:
        assert client(home, auth=SECRET).fetch("a") == DATA
        assert ["authorization" in request.headers for request in home.requests] == [True, False]


def test_a_host_hidden_behind_a_backslash_is_another_origin(client: Open) -> None:
    """The standard library reads the host behind the '@', the library that connects the one before the backslash."""

    def there(_: object) -> bytes:
        return answer(status=302, location=f"{other.url}\\@127.0.0.1:{home.port}/b")

    with Wire(answer(DATA)) as other, Wire(there) as home:
        assert client(home, auth=SECRET, headers={"X-Api-Key": SECRET}).fetch("a") == DATA
        assert SECRET in str(home.requests)
        assert SECRET not in str(other.requests)


def test_each_request_of_a_transfer_begins_at_home(client: Open) -> None:
    """A signed URL may have expired meanwhile."""
    numbers = itertools.count()

    def signed(_: object) -> bytes:
        return answer(status=302, location=f"{other.url}/b?sig={next(numbers)}")

    with (
        Wire([part(DATA, 0, 9, etag=TAG)[:-4], RESET], part(DATA, 5, 9, etag=TAG)) as other,
        Wire(always=signed) as home,
    ):
        assert client(home, retry=QUICK).fetch_range("a", (0, 9)) == DATA[:9]
        assert other.targets == ["/b?sig=0", "/b?sig=1"]
        assert other.requests[1].headers["range"] == "bytes=5-8"


@pytest.mark.parametrize("hops", [0, 1, 5])
def test_hops_are_counted(client: Open, hops: int) -> None:
    with Wire(*([answer(status=302, location="/a")] * hops), answer(DATA)) as wire:
        assert client(wire, max_redirects=hops).fetch("a") == DATA
    with Wire(*([answer(status=302, location="/a")] * (hops + 1))) as wire:
        with pytest.raises(HttpError, match=f"more than {hops} redirects") as caught:
            client(wire, max_redirects=hops, retry=QUICK).fetch("a")
        assert caught.value.status == 302


BAD_HOPS = [
    *("file:///etc/passwd", "ftp://127.0.0.1/a", "javascript:alert(1)", "data:,x", "httpx://127.0.0.1/"),
    *("http://[::1", "http://[/", "http://a:b:c/", "http://127.0.0.1:99999/", "http://127.0.0.1:port/", "http://*/"),
]


@pytest.mark.parametrize("location", BAD_HOPS)
def test_a_redirect_out_of_the_web_is_refused(client: Open, location: str) -> None:
    with Wire(answer(status=302, location=location)) as wire:
        with pytest.raises(InvalidUrl, match="redirects to"):
            client(wire, retry=QUICK).fetch("a")
        assert len(wire.requests) == 1


def test_a_redirect_that_gives_up_encryption_is_refused() -> None:
    with pytest.raises(InvalidUrl, match="give up encryption"):
        _hop("https://example.com/a", "http://example.com/a")
    assert _hop("https://example.com/a", "//example.com/b") == "https://example.com/b"
    assert _hop("http://example.com/a", "https://example.com/b") == "https://example.com/b"


def test_a_redirect_from_tls_to_plain_is_refused_on_the_wire(client: Open, trust: str) -> None:
    with Wire() as plain, Wire(answer(status=302, location=f"{plain.url}/b"), tls=True) as secure:
        with pytest.raises(InvalidUrl, match="give up encryption"):
            client(secure, verify=trust, auth=SECRET).fetch("a")
        assert plain.connections == 0


@given(st.text(max_size=60))
def test_any_location_is_a_web_address_or_refused(location: str) -> None:
    with contextlib.suppress(InvalidUrl):
        assert re.match(r"https?://[^/]", _hop("http://example.com/a", location))


# -- where redirects have led


def signed_by(hub: list[str], store: Wire) -> Callable[[Request], bytes]:
    """A hub that signs another address each time, and keeps count of them."""

    def told(_: Request) -> bytes:
        hub.append(f"/x?signature={SECRET}{len(hub)}")
        return answer(status=302, location=store.url + hub[-1], x_linked_etag=f'"{"0" * 64}"')

    return told


def stored(request: Request) -> bytes:
    """The part of DATA that is asked for."""
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return part(DATA, int(first), int(last) + 1, etag=TAG)


@pytest.fixture
def store() -> Iterator[Wire]:
    with Wire(always=stored) as wire:
        yield wire


def pieces(asking: HttpClient, count: int, pinned: Validator | None = V1) -> list[Answer]:
    return [asking.transfer(Ask("a", RangeRequest(n, n + 9), pinned=pinned), Sink()) for n in range(count)]


def test_what_has_to_be_of_a_known_version_goes_where_its_first_piece_was_led(client: Open, store: Wire) -> None:
    signed: list[str] = []
    with Wire(always=signed_by(signed, store)) as hub:
        asking = client(hub, auth=SECRET, headers={"X-Api-Key": SECRET})
        answers = pieces(asking, 4)
        assert len(hub.requests) == 1
        assert store.targets == signed * 4
        assert [one.requests for one in answers] == [2, 1, 1, 1]
        assert all(one.unproved for one in answers)  # what the hub linked to it holds for each piece
        for request in store.requests:
            assert not {"authorization", "x-api-key"} & request.headers.keys()


def test_who_knows_of_no_version_asks_the_hub_which_may_have_a_new_one(client: Open, store: Wire) -> None:
    signed: list[str] = []
    with Wire(always=signed_by(signed, store)) as hub:
        asking = client(hub)
        pieces(asking, 2)
        pieces(asking, 2, pinned=None)
        asking.transfer(Ask("a", RangeRequest(0, 9), held=V1), Sink())
        assert len(hub.requests) == 4
        assert store.targets == [signed[0], *signed]


def test_a_hub_that_has_it_itself_by_now_is_asked_again(client: Open, store: Wire) -> None:
    signed: list[str] = []
    with Wire(signed_by(signed, store), always=stored) as hub:
        asking = client(hub)
        for pinned in (V1, V1, None, V1):
            pieces(asking, 1, pinned)
        assert [len(hub.requests), len(store.requests)] == [3, 2]


def test_credentials_go_along_to_an_address_of_their_own_origin(client: Open) -> None:
    home = [answer(status=302, location="/b"), *[part(DATA, n, n + 9, etag=TAG) for n in range(2)]]
    with Wire(*home) as wire:
        pieces(client(wire, auth=SECRET), 2)
        assert wire.targets == ["/a", "/b", "/b"]
        assert {request.headers["authorization"] for request in wire.requests} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_address_that_is_over_is_asked_for_anew_at_once(client: Open, status: int) -> None:
    signed: list[str] = []
    over = answer(b"Request has expired", status)
    with Wire(stored, over, always=stored) as store, Wire(always=signed_by(signed, store)) as hub:
        assert [one.requests for one in pieces(client(hub), 3)] == [2, 3, 1]
        assert len(hub.requests) == 2
        assert store.targets == [signed[0], signed[0], signed[1], signed[1]]


@pytest.mark.parametrize(
    "failure",
    [[RESET], [answer(status=503)], [answer(status=500)], [part(DATA, 1, 10, etag=TAG)[:-4], RESET], [HOLD]],
    ids=["cut", "503", "500", "cut in the body", "silence"],
)
def test_who_fails_is_not_gone_to_again(client: Open, failure: Any) -> None:
    signed: list[str] = []
    with Wire(stored, failure, always=stored) as store, Wire(always=signed_by(signed, store)) as hub:
        pieces(client(hub, retry=QUICK, timeout=0.3), 2)
        assert store.targets == [signed[0], signed[0], signed[1]]


def test_only_so_many_leads_are_kept() -> None:
    leads = Leads()
    for number in range(1000):
        leads.keep(f"{number}", Lead("x", True, None))
    assert leads.find("999", {"If-Match": TAG}) == Lead("x", True, None)
    assert leads.find("0", {"If-Match": TAG}) is None
    assert len(leads._known) == 256


# -- credentials and headers


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        pytest.param(None, None, id="none"),
        pytest.param("token", "Bearer token", id="token"),
        pytest.param(("user", "päss"), "Basic dXNlcjpww6Rzcw==", id="user and password"),
        pytest.param(lambda: "fresh", "Bearer fresh", id="function"),
        pytest.param(lambda: None, None, id="function that has none"),
        pytest.param(lambda: ("user", ""), "Basic dXNlcjo=", id="function that gives a user"),
    ],
)
def test_credentials_are_sent(client: Open, auth: Any, expected: str | None) -> None:
    with Wire(answer(DATA)) as wire:
        client(wire, auth=auth).fetch("a")
        assert wire.requests[0].headers.get("authorization") == expected


def test_a_token_is_asked_for_anew_for_each_request(client: Open) -> None:
    tokens = iter(["one", "two"])
    with Wire(answer(status=503), answer(DATA)) as wire:
        client(wire, retry=QUICK, auth=lambda: next(tokens)).fetch("a")
        assert [request.headers["authorization"] for request in wire.requests] == ["Bearer one", "Bearer two"]


def test_a_token_function_that_fails_is_not_a_failed_connection(client: Open) -> None:
    def token() -> str:
        raise FileNotFoundError("no token file")

    with Wire(answer(DATA)) as wire:
        broken = client(wire, auth=token, max_connections=1, retry=QUICK)
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="no token file"):
                broken.fetch("a")
        client(wire).fetch("a")


@pytest.mark.parametrize(
    "ask", [lambda c: c.fetch("a"), lambda c: c.fetch_range("a", (0, 1024)), lambda c: c.head("a")]
)
def test_a_refused_token_is_asked_for_anew_and_the_old_one_is_not_sent_again(
    client: Open, ask: Callable[[HttpClient], object]
) -> None:
    tokens = iter(["old", "new"])
    with Wire(answer(b"", 401), lambda request: good(request)) as wire:
        assert ask(client(wire, auth=lambda: next(tokens)))
        assert [request.headers["authorization"] for request in wire.requests] == ["Bearer old", "Bearer new"]
        assert [request.connection for request in wire.requests] == [0, 0]


def test_every_request_that_is_sent_counts(client: Open) -> None:
    tokens = itertools.count().__next__
    away = answer(status=302, location="/b")
    with Wire(answer(status=503), away, answer(b"", 401), away, part(DATA, 0, 10)) as wire:
        sink = Sink()
        asking = client(wire, retry=QUICK, auth=lambda: f"token{tokens()}")
        answered = asking.transfer(Ask("a", RangeRequest(0, 10)), sink)
        assert sink.bytes_of(answered) == DATA[:10]
        assert answered.requests == len(wire.requests) == 5


def good(request: Request) -> bytes:
    if request.method == "HEAD":
        return answer(content_length=len(DATA))
    return part(DATA, 0, len(DATA)) if "range" in request.headers else answer(DATA)


def test_a_token_is_refreshed_once_and_then_refused(client: Open) -> None:
    tokens = iter(["old", "new", "newer"])
    with Wire(always=answer(status=401)) as wire:
        with pytest.raises(HttpError, match="check the credentials") as caught:
            client(wire, retry=QUICK, auth=lambda: next(tokens)).fetch("a")
        assert caught.value.status == 401
        assert [request.headers["authorization"] for request in wire.requests] == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize("auth", [None, "token", ("user", "password"), lambda: "the same"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_credential_that_stays_the_same_is_not_sent_again(client: Open, auth: Any, status: int) -> None:
    with Wire(answer(status=status)) as wire, pytest.raises(HttpError):
        client(wire, retry=QUICK, auth=auth).fetch("a")


@pytest.mark.parametrize("status", [403, 407])
def test_a_refusal_that_is_no_matter_of_a_stale_token_refreshes_none(client: Open, status: int) -> None:
    tokens = iter(["one"])
    with Wire(answer(status=status)) as wire, pytest.raises(HttpError):
        client(wire, retry=QUICK, auth=lambda: next(tokens)).fetch("a")


def test_a_token_function_that_fails_when_asked_again_is_heard_and_leaves_no_connection(client: Open) -> None:
    tokens = iter(["one"])

    def token() -> str:
        try:
            return next(tokens)
        except StopIteration:
            raise FileNotFoundError("no token file") from None

    with Wire(answer(status=401, content_length=10)) as wire:
        with pytest.raises(FileNotFoundError, match="no token file"):
            client(wire, retry=QUICK, auth=token).fetch("a")
        wire.await_closed()


@pytest.mark.parametrize("status", [401, 403])
def test_a_signed_address_that_has_expired_is_resolved_again(client: Open, status: int) -> None:
    with Wire(answer(b"Request has expired", status), answer(DATA)) as store:
        signed = [answer(status=302, location=f"{store.url}/x?signature={SECRET}{n}") for n in range(2)]
        with Wire(*signed) as hub:
            assert client(hub, auth=SECRET).fetch("a") == DATA
            assert hub.targets == ["/a", "/a"]
            assert store.targets == [f"/x?signature={SECRET}{n}" for n in range(2)]
            assert all("authorization" not in request.headers for request in store.requests)


def test_a_signed_address_that_stays_refused_is_resolved_once_more_and_no_further(client: Open) -> None:
    with Wire(always=answer(status=403)) as store:
        with Wire(always=answer(status=302, location=f"{store.url}/x?signature={SECRET}")) as hub:
            with pytest.raises(HttpError) as caught:
                client(hub, retry=QUICK).fetch("a")
            assert len(hub.requests) == len(store.requests) == 2
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_own_headers_do_not_undo_ours(client: Open) -> None:
    own = {"Range": "bytes=0-0", "accept-encoding": "br", "X-Own": "1", "AUTHORIZATION": "old"}
    with Wire(part(DATA, 5, 9)) as wire:
        assert client(wire, headers=own, auth="new").fetch_range("a", (5, 9)) == DATA[5:9]
        sent = wire.requests[0].headers
        assert (sent["range"], sent["accept-encoding"], sent["x-own"]) == ("bytes=5-8", "identity", "1")
        assert sent["authorization"] == "Bearer new"


def test_a_netrc_file_is_not_asked(client: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Wire(answer(DATA), answer(DATA)) as wire:
        client(wire).fetch("a")
        client(wire, auth="mine").fetch("a")
        assert [request.headers.get("authorization") for request in wire.requests] == [None, "Bearer mine"]


def test_no_cookie_is_kept(client: Open) -> None:
    with Wire(answer(DATA, set_cookie="id=1"), answer(DATA)) as wire:
        asking = client(wire)
        asking.fetch("a")
        asking.fetch("a")
        assert "cookie" not in wire.requests[1].headers


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"auth": f"{SECRET}\n"}, id="line end in a token"),
        pytest.param({"auth": f"{SECRET}\0"}, id="NUL in a token"),
        pytest.param({"auth": f"{SECRET}\r\nX-Injected: 1"}, id="header in a token"),
        pytest.param({"auth": f"{SECRET}\u2026"}, id="letter beyond Latin-1 in a token"),
        pytest.param({"headers": {"X-Api-Key": f" {SECRET}"}}, id="space in front of a header"),
        pytest.param({"headers": {"X-Api-Key": f"{SECRET}\u20ac"}}, id="letter beyond Latin-1 in a header"),
    ],
)
def test_a_credential_that_http_cannot_carry_is_a_setting_to_mend(client: Open, options: dict[str, Any]) -> None:
    with Wire() as wire:
        with pytest.raises(ConfigurationError, match=r"CdnEndpoint\.auth") as caught:
            client(wire, retry=QUICK, **options).fetch("a")
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert wire.connections == 0


@pytest.mark.parametrize("path", ["../a", "http://other/a", "//other/a", "a\nb", "a\\b", "a/..%2fb/../c"])
def test_a_path_cannot_leave_its_endpoint(client: Open, path: str) -> None:
    with Wire() as wire, pytest.raises(InvalidUrl):
        client(wire).fetch(path)


def test_a_client_is_made_from_a_url_and_any_of_the_settings() -> None:
    assert HttpClient("http://host").config == ClientConfig()
    assert HttpClient(CdnEndpoint("http://host"), NetworkConfig(timeout=7.0)).config.timeout == 7.0
    assert HttpClient("http://host", ClientConfig(timeout=8.0)).config.timeout == 8.0


# -- secrets


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param([RESET], id="cut"),
        pytest.param([HOLD], id="silence"),
        pytest.param([answer(DATA, content_length=9999), HOLD], id="stall"),
        pytest.param([answer(DATA, content_length=9999), RESET], id="cut in the body"),
        pytest.param([b"gibberish\r\n", END], id="gibberish"),
        pytest.param([b"HTTP/1.1 200 OK\r\nno header\r\n\r\n", END], id="bad header"),
        pytest.param([answer(content_length="5, 6")], id="two lengths"),
        pytest.param([answer(status=404)], id="404"),
        pytest.param([answer(status=503)], id="503"),
        pytest.param([answer(status=302, location=f"http://[{SECRET}")], id="bad redirect"),
        pytest.param([answer(status=302, location=f"http://{'a' * 99}/?{SECRET}")], id="redirect to a bad name"),
        pytest.param([answer(status=302, location=f"http://user:{SECRET}@127.0.0.1:1/?{SECRET}")], id="dead redirect"),
        pytest.param([answer(status=302, location=f"ftp://x/{SECRET}")], id="redirect out of the web"),
    ],
)
def test_no_failure_shows_a_secret(client: Open, sent: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Wire(always=sent) as wire:
        asking = client(
            wire.url.replace("//", f"//user:{SECRET}@"), headers={"X-Key": SECRET}, timeout=0.1, retry=QUICK
        )
        with pytest.raises(NetworkError) as caught:
            asking.fetch(f"a?signature={SECRET}")
    shown = "".join(traceback.format_exception(caught.value))
    for text in (shown, repr(caught.value), str(caught.value), repr(asking), repr(asking.endpoint), caplog.text):
        assert SECRET not in text
    assert f"{wire.url}/a?…" in shown


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("refused", "check host and port"),
        ("no TLS", "check https://"),
        ("unknown name", "check the host's name"),
        ("no network", "unreachable: check the host, and whether this machine is online"),
        ("proxy", "see HTTP_PROXY"),
    ],
)
def test_no_failure_to_connect_shows_a_secret_and_each_says_what_to_look_at(
    client: Open, kind: str, advice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    options: dict[str, Any] = {}
    with closed_port() as port, Wire(answer(), tls=True) as secure:
        url = f"http://127.0.0.1:{port}"
        if kind == "no TLS":
            url = secure.url
        elif kind == "proxy":
            options["proxies"] = {"http": f"http://user:{SECRET}@127.0.0.1:{port}"}
        elif kind == "unknown name":

            def unknown(*_: object, **__: object) -> None:
                raise socket.gaierror(-2, "Name or service not known")

            monkeypatch.setattr(socket, "getaddrinfo", unknown)
        elif kind == "no network":
            monkeypatch.setattr(addresses, "begin_to_connect", lambda *_: errno.ENETUNREACH)
        with pytest.raises(ConnectionFailed, match=advice) as caught:
            client(url, auth=SECRET, **options).fetch(f"a?signature={SECRET}")
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not caught.value.established


# -- failures to connect


@pytest.mark.parametrize("name", ["a" * 64 + ".example", "a..example"], ids=["a label too long", "an empty label"])
def test_a_name_that_cannot_be_is_no_connection(client: Open, name: str) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        client(f"http://{name}").fetch("a")
    assert not caught.value.established


def test_a_name_that_nobody_resolves_is_a_timeout(client: Open, resolver: Resolver) -> None:
    with within(5.0), pytest.raises(Timeout, match="the name was not resolved in time"):
        client("http://models.example", connect_timeout=0.1).fetch("a")


def test_a_refused_connection_says_why(client: Open) -> None:
    with closed_port() as port:
        with pytest.raises(ConnectionFailed, match="Connection refused: check host and port") as caught:
            client(f"http://127.0.0.1:{port}").fetch("a")
        assert not caught.value.established


def test_a_connection_that_was_there_says_so(client: Open) -> None:
    for sent in ([RESET], [answer(DATA, content_length=9999), RESET], [answer(DATA, content_length=9999), END]):
        with Wire(sent) as wire, pytest.raises(ConnectionFailed) as caught:
            client(wire).fetch("a")
        assert caught.value.established


def test_the_reason_is_that_of_the_failure_and_not_of_what_the_caller_was_handling(client: Open) -> None:
    with closed_port() as port:
        try:
            raise FileNotFoundError(2, "no such cache")
        except FileNotFoundError:
            with pytest.raises(ConnectionFailed, match="Connection refused"):
                client(f"http://127.0.0.1:{port}").fetch("a")
    with Wire(answer(content_length="5, 6")) as wire:
        try:
            raise FileNotFoundError(2, "no such cache")
        except FileNotFoundError:
            with pytest.raises(ProtocolError) as caught:
                client(wire).fetch("a")
    assert caught.value.__cause__ is None


def test_the_cause_is_what_the_system_said(client: Open) -> None:
    with closed_port() as port, pytest.raises(ConnectionFailed) as caught:
        client(f"http://127.0.0.1:{port}").fetch("a")
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


# -- TLS


def test_a_server_is_trusted_by_a_bundle(client: Open, trust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(always=answer(DATA), tls=True) as wire:
        assert client(wire, verify=trust).fetch("a") == DATA
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.setenv(name, trust)
            assert client(wire).fetch("a") == DATA
            monkeypatch.delenv(name)


def test_a_server_that_nobody_vouches_for_is_refused(client: Open) -> None:
    with Wire(tls=True) as wire:
        with pytest.raises(ConnectionFailed, match=r"no secure connection.*certificate.*verify="):
            client(wire).fetch("a")
        assert not wire.requests


def test_what_comes_in_small_records_is_written_in_blocks(client: Open, trust: str) -> None:
    data = random.Random(0).randbytes((2 << 20) + 50)
    written: dict[int, bytes] = {}

    def sink(head: HeadInfo, coming: RangeRequest | None) -> Write:
        return lambda offset, block: written.update({offset: bytes(block)})

    end = len(data)
    with Wire([part(data, 0, end, etag=TAG)[:-7], END], part(data, end - 7, end, etag=TAG), tls=True) as wire:
        client(wire, verify=trust, retry=QUICK).transfer(Ask("a", RangeRequest(0, end)), sink)
    assert [(offset, len(block)) for offset, block in written.items()] == [
        (0, 1 << 20),
        (1 << 20, 1 << 20),
        (2 << 20, end - 7 - (2 << 20)),
        (end - 7, 7),
    ]
    assert b"".join(written.values()) == data


def test_a_server_may_be_trusted_blindly(client: Open) -> None:
    with Wire(answer(DATA), tls=True) as wire, pytest.warns(InsecureRequestWarning):
        assert client(wire, verify=False).fetch("a") == DATA


def test_a_bundle_that_is_not_there_is_a_setting_to_mend(client: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(tls=True) as wire, pytest.raises(ConfigurationError, match="no CA bundle at '/nowhere'"):
        client(wire, verify="/nowhere", retry=QUICK).fetch("a")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    with Wire(answer(DATA)) as wire:
        assert client(wire).fetch("a") == DATA  # nothing to verify


def test_a_bundle_that_is_none_is_no_secure_connection(client: Open, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("not a certificate")
    with Wire(tls=True) as wire, pytest.raises(ConnectionFailed):
        client(wire, verify=str(tmp_path / "bundle")).fetch("a")


def test_a_server_without_tls_is_no_secure_connection(client: Open) -> None:
    with Wire() as wire:
        url = wire.url.replace("http:", "https:")
        with pytest.raises((ConnectionFailed, Timeout)):
            client(url, connect_timeout=0.2).fetch("a")


# -- proxies


def test_a_proxy_is_asked_for_the_whole_url(client: Open) -> None:
    with Wire(always=answer(DATA)) as proxy:
        asking = client("http://far.example/base", proxies={"http": f"http://user:pass@127.0.0.1:{proxy.port}"})
        assert asking.fetch("a") == asking.fetch("a") == DATA
        assert proxy.targets == ["http://far.example/base/a"] * 2
        assert proxy.requests[0].headers["host"] == "far.example"
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNz"
        assert proxy.connections == 1


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_honoured(client: Open, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(answer(DATA)) as proxy, Wire(answer(b"direct"), answer(b"direct")) as direct:
        monkeypatch.setenv(name, proxy.url)
        assert client("http://far.example").fetch("a") == DATA
        assert client(direct, proxies={}).fetch("a") == b"direct"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert client(direct).fetch("a") == b"direct"


def test_tls_goes_through_a_proxy_in_a_tunnel(client: Open, trust: str) -> None:
    with Wire([b"HTTP/1.1 200 Connected\r\n\r\n", TLS], answer(DATA), answer(DATA)) as proxy:
        asking = client("https://127.0.0.1:9", verify=trust, auth=SECRET, proxies={"https": proxy.url})
        assert asking.fetch("a") == asking.fetch("b") == DATA
        assert [(request.method, request.target) for request in proxy.requests] == [
            ("CONNECT", "127.0.0.1:9"),
            ("GET", "/a"),
            ("GET", "/b"),
        ]
        assert "authorization" not in proxy.requests[0].headers


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(answer(status=407), ConnectionFailed, id="refuses"),
        pytest.param([RESET], ConnectionFailed, id="cuts"),
        pytest.param([HOLD], NetworkError, id="is silent"),
        pytest.param([*drip(b"HTTP/1.1 200 " + b"x" * 1000, 0.02)], NetworkError, id="drips"),
    ],
)
def test_a_tunnel_that_is_not_made_is_an_error_in_time(client: Open, trust: str, sent: Any, error: type) -> None:
    retry = RetryConfig(max_retries=0, deadline=0.5)
    with Wire(sent) as proxy, within(1.5), pytest.raises(error):
        client("https://127.0.0.1:9", verify=trust, proxies={"https": proxy.url}, retry=retry).fetch("a")


@pytest.mark.parametrize(
    ("proxy", "error"),
    [
        pytest.param("http://", ConfigurationError, id="no host"),
        pytest.param("socks5://127.0.0.1:9", ConfigurationError, id="SOCKS, which is not installed"),
        pytest.param("ftp://127.0.0.1:9", InvalidUrl, id="another protocol"),
        pytest.param("http://127.0.0.1:99999", NetworkError, id="no port"),
    ],
)
def test_a_proxy_that_cannot_be_is_a_setting_to_mend(client: Open, proxy: str, error: type[NetworkError]) -> None:
    with pytest.raises(error, match="proxy"):
        client("http://far.example", proxies={"http": proxy}, retry=QUICK).fetch("a")


# -- time


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param([HOLD], Timeout, id="silence"),
        pytest.param([b"HTTP/1.1 200 OK\r\n", HOLD], Timeout, id="half a head"),
        pytest.param([answer(content_length=9), HOLD], StalledTransfer, id="no body"),
        pytest.param([answer(b"half", content_length=9), HOLD], StalledTransfer, id="half a body"),
        pytest.param([chunked(b"half", end=b""), HOLD], StalledTransfer, id="half a chunked body"),
        pytest.param([*drip(answer(DATA), 0.02)], Timeout, id="a dripping head"),
        pytest.param([answer(content_length=9999), *drip(bytes(9999), 0.02)], StalledTransfer, id="a dripping body"),
        pytest.param([chunked(end=b""), *drip(b"5;" + b"x" * 999, 0.02)], StalledTransfer, id="a dripping chunk"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", 0.05] * 100, Timeout, id="interim answers for ever"),
    ],
)
def test_a_server_that_holds_us_up_is_left_without_any_deadline(
    client: Open, sent: Any, error: type[NetworkError]
) -> None:
    with Wire(sent) as wire, within(1.5):
        with pytest.raises(error) as caught:
            client(wire, timeout=0.2, connect_timeout=0.2).fetch("a")
        assert type(caught.value) is error


def test_connecting_ends_with_its_timeout(client: Open) -> None:
    with black_hole() as port, within(1.0), pytest.raises(Timeout, match="did not answer in time"):
        client(f"http://127.0.0.1:{port}", connect_timeout=0.1).fetch("a")


def test_a_handshake_ends_with_its_timeout(client: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, within(1.0), pytest.raises(Timeout):
        client(f"https://127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.1).fetch("a")


@pytest.mark.parametrize("timeout", [1e10, 1e300])
def test_a_timeout_beyond_all_clocks_is_no_error(client: Open, timeout: float) -> None:
    with Wire(answer(DATA)) as wire:
        assert client(wire, timeout=timeout, connect_timeout=timeout).fetch("a") == DATA


HOLD_UPS_OF_HEADS = [
    pytest.param([HOLD], id="silence"),
    pytest.param([b"HTTP/1.1 200 OK\r\n", HOLD], id="half a head"),
    pytest.param([*drip(answer(DATA), 0.02)], id="a dripping head"),
    pytest.param([answer(status=500, retry_after=0), 0.01], id="errors for ever"),
    pytest.param([0.05, answer(status=302, location="/a")], id="slow redirects"),
    pytest.param([RESET], id="cuts for ever"),
]
HOLD_UPS = [
    *HOLD_UPS_OF_HEADS,
    pytest.param([answer(b"half", content_length=9), HOLD], id="half a body"),
    pytest.param([answer(content_length=9999), *drip(bytes(9999), 0.02)], id="a dripping body"),
    pytest.param([chunked(end=b""), *drip(b"5;" + b"x" * 999, 0.02)], id="a dripping chunk"),
    pytest.param(
        [answer(status=302, location="/a", content_length=9999), *drip(bytes(999), 0.02)], id="a dripping hop"
    ),
]


@pytest.mark.parametrize(
    ("verb", "sent"),
    [
        pytest.param(verb, *hold_up.values, id=f"{verb}-{hold_up.id}")
        for verb, hold_ups in {"fetch": HOLD_UPS, "head": HOLD_UPS_OF_HEADS}.items()
        for hold_up in hold_ups
    ],
)
def test_the_deadline_is_kept(client: Open, verb: str, sent: Any) -> None:
    retry = RetryConfig(max_retries=10**6, initial_backoff=0.001, max_backoff=0.05, deadline=0.4)
    with Wire(always=sent) as wire, within(1.0), pytest.raises(NetworkError) as caught:
        getattr(client(wire, retry=retry, max_redirects=10**6), verb)("a")
    assert isinstance(caught.value, DeadlineExceeded | RetriesExhausted)


def test_the_deadline_is_kept_while_connecting(client: Open) -> None:
    retry = RetryConfig(deadline=0.2)
    with black_hole() as port, within(1.0), pytest.raises(DeadlineExceeded):
        client(f"http://127.0.0.1:{port}", retry=retry).fetch("a")


def test_the_deadline_is_kept_while_waiting_for_a_connection(client: Open) -> None:
    with Wire([HOLD]) as wire:
        asking = client(wire, max_connections=1)
        first = threading.Thread(target=cancelled, args=(asking,))
        first.start()
        wire.await_requests(1)
        patience = Patience(deadline=time.monotonic() + 0.2)
        with within(1.0), pytest.raises(DeadlineExceeded):
            asking.transfer(Ask("b"), Sink(), patience)
        asking.close()
        first.join()


def test_who_is_cancelled_while_waiting_for_a_connection_waits_no_longer(client: Open) -> None:
    with Wire([HOLD]) as wire:
        asking = client(wire, max_connections=1)
        first = threading.Thread(target=cancelled, args=(asking,))
        first.start()
        wire.await_requests(1)
        is_cancelled = threading.Event()
        timer = threading.Timer(0.1, is_cancelled.set)
        timer.start()
        with within(1.0), pytest.raises(Cancelled):
            asking.transfer(Ask("b"), Sink(), Patience(cancelled=is_cancelled.is_set))
        timer.join()
        asking.close()
        first.join()


def test_the_deadline_of_the_caller_counts(client: Open) -> None:
    with Wire([answer(b"half", content_length=9), HOLD]) as wire, within(1.0), pytest.raises(DeadlineExceeded):
        client(wire, retry=QUICK).transfer(Ask("a"), Sink(), Patience(deadline=time.monotonic() + 0.2))


def test_a_deadline_gone_by_asks_nothing(client: Open) -> None:
    with Wire() as wire:
        with pytest.raises(DeadlineExceeded):
            client(wire).transfer(Ask("a"), Sink(), Patience(deadline=time.monotonic() - 1.0))
        assert wire.connections == 0


def test_a_caller_who_has_left_is_noticed_at_the_next_block(client: Open) -> None:
    left = threading.Event()
    patience = Patience(cancelled=left.is_set)
    with Wire([answer(DATA, content_length=9999), HOLD]) as wire, within(1.0), pytest.raises(Cancelled):
        client(wire, retry=QUICK).transfer(Ask("a"), Sink(), patience, on_bytes=lambda _: left.set())


# -- closing


@contextlib.contextmanager
def closing(asking: HttpClient) -> Iterator[threading.Event]:
    """Closes the client once the event is set; the block must end in Cancelled, within a second of it."""
    ready, closed_at = threading.Event(), [0.0]

    def close() -> None:
        assert ready.wait(5)
        closed_at[0] = time.monotonic()
        asking.close()
        assert time.monotonic() - closed_at[0] < 1.0

    thread = threading.Thread(target=close)
    thread.start()
    try:
        with pytest.raises(Cancelled):
            yield ready
    finally:
        ready.set()
        thread.join()
    assert time.monotonic() - closed_at[0] < 1.0


def test_close_interrupts_the_wait_for_a_name(client: Open, resolver: Resolver) -> None:
    with closing(asking := client("http://models.example", retry=QUICK)) as ready:
        watcher = threading.Thread(target=lambda: (resolver.is_asked.wait(5), ready.set()))
        watcher.start()
        try:
            asking.fetch("a")
        finally:
            watcher.join()


def test_close_interrupts_connecting(client: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    add = LiveSockets.add
    with black_hole() as port, closing(asking := client(f"http://127.0.0.1:{port}", retry=QUICK)) as ready:

        def note(live: LiveSockets, sock: socket.socket) -> None:
            add(live, sock)
            ready.set()

        monkeypatch.setattr(LiveSockets, "add", note)
        asking.fetch("a")


def test_close_interrupts_a_handshake(client: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asking = client(f"https://127.0.0.1:{silent.getsockname()[1]}", retry=QUICK)
        with closing(asking) as ready:

            def accept() -> None:
                peer, _ = silent.accept()
                with peer:
                    peer.recv(65536)
                    ready.set()
                    peer.recv(65536)

            server = threading.Thread(target=accept)
            server.start()
            try:
                asking.fetch("a")
            finally:
                server.join()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("verb", ["fetch", "head"])
@pytest.mark.parametrize(
    "sent", [[HOLD], [b"HTTP/1.1 200 OK\r\nContent-Length: 1", HOLD]], ids=["silence", "half a head"]
)
def test_close_interrupts_the_wait_for_an_answer(client: Open, sent: Any, verb: str, tls: bool, trust: str) -> None:
    with Wire(sent, tls=tls) as wire, closing(asking := client(wire, retry=QUICK, verify=trust)) as ready:
        watcher = threading.Thread(target=lambda: (wire.await_requests(1), ready.set()))
        watcher.start()
        try:
            getattr(asking, verb)("a")
        finally:
            watcher.join()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(
    "half",
    [answer(DATA, content_length=9999), chunked(DATA, end=b""), answer(DATA, content_length=None)],
    ids=["length", "chunked", "end of the connection"],
)
def test_close_interrupts_reading_a_body(client: Open, half: bytes, tls: bool, trust: str) -> None:
    with Wire([half, HOLD], tls=tls) as wire, closing(asking := client(wire, retry=QUICK, verify=trust)) as ready:
        size = None if b"chunked" in half else 9999
        asking.transfer(Ask("a", size=size), Sink(), on_bytes=lambda _: ready.set())


def test_close_interrupts_the_sleep_between_two_tries(client: Open) -> None:
    with Wire(answer(status=503, retry_after=30)) as wire, closing(asking := client(wire, retry=QUICK)) as ready:
        asking.transfer(Ask("a"), Sink(), on_retry=lambda _: ready.set(), patience=asking._patience())


def test_close_interrupts_the_wait_for_a_connection(client: Open) -> None:
    with Wire([HOLD]) as wire, closing(asking := client(wire, retry=QUICK, max_connections=1)) as ready:
        first = threading.Thread(target=cancelled, args=(asking,))
        first.start()
        wire.await_requests(1)
        ready.set()
        try:
            asking.fetch("b")
        finally:
            first.join()


def test_close_is_felt_by_who_brings_a_patience_of_his_own(client: Open) -> None:
    retry = RetryConfig(max_retries=5, initial_backoff=10.0, jitter=False)
    with Wire([answer(DATA, content_length=9999), HOLD]) as wire, closing(asking := client(wire, retry=retry)) as ready:
        asking.transfer(Ask("a"), Sink(), Patience(), on_bytes=lambda _: ready.set())


def test_a_closed_client_says_so(client: Open) -> None:
    with Wire() as wire:
        asking = client(wire)
        asking.close()
        asking.close()
        for verb in (asking.fetch, asking.head, lambda path: asking.transfer(Ask(path), Sink(), Patience())):
            with pytest.raises(Cancelled):
                verb("a")
        assert wire.connections == 0


@pytest.mark.parametrize("size", [b"5", b"05", b"5;a=b", b"5 "])
def test_a_chunk_may_have_an_extension(client: Open, size: bytes) -> None:
    with Wire(chunked(end=size + b"\r\nabcde\r\n0\r\n\r\n")) as wire:
        assert client(wire).fetch("a") == b"abcde"


@pytest.mark.parametrize(
    "size", [b"-5", b"+5", b"0x5", b"0_5", b" 5", b"", b";5", b"\xd9\xa5", b"0" * 15 + b"5", b"5\0"]
)
def test_a_chunk_whose_size_is_no_number_ends_the_body(client: Open, size: bytes) -> None:
    with Wire(chunked(end=size + b"\r\nabcde\r\n0\r\n\r\n")) as wire, pytest.raises(NetworkError):
        client(wire).fetch("a")


def test_a_chunk_of_negative_size_adds_no_byte_to_what_is_tried_again(client: Open) -> None:
    cut = chunked(DATA[:1020], end=b"-5\r\nabcde" * 3, status=206, content_range="bytes 0-1023/1024")
    with Wire(cut, part(DATA, 0, 1024)) as wire:
        assert client(wire, retry=QUICK).fetch_range("a", (0, 1024)) == DATA


def test_an_object_that_called_itself_empty_and_was_not_is_asked_for_again(client: Open) -> None:
    wanted = Ask("a", RangeRequest(0, 400), or_whole=True)
    for second, ends in ((answer(b""), RangeRequest(0, 0)), (answer(DATA), ObjectChanged)):
        with Wire(answer(b"more", content_length=0), second) as wire:
            asking = client(wire, retry=QUICK)
            if isinstance(ends, RangeRequest):
                assert asking.transfer(wanted, lambda *_: lambda *_: None).byte_range == ends
            else:
                with pytest.raises(ends):
                    asking.transfer(wanted, lambda *_: lambda *_: None)
            assert "range" not in wire.requests[1].headers


# -- fork


def in_child(work: Callable[[], bytes]) -> bytes:
    """What ``work`` gives in a child process; its error, if it raises; fails if it takes ten seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            os.write(write, work())
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return result


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is the subject here


@forks
def test_a_child_process_has_connections_of_its_own(client: Open) -> None:
    with Wire(*map(answer, [b"one", b"two", b"three"])) as wire:
        asking = client(wire)
        assert asking.fetch("a") == b"one"
        assert in_child(lambda: asking.fetch("b")) == b"two"
        assert asking.fetch("c") == b"three"
        assert [request.connection for request in wire.requests] == [0, 1, 0]


@forks
def test_a_child_that_closes_does_not_cut_its_parent(client: Open) -> None:
    with Wire(*map(answer, [b"one", b"two"])) as wire:
        asking = client(wire)
        assert asking.fetch("a") == b"one"
        assert in_child(lambda: str(asking.close()).encode()) == b"None"
        assert asking.fetch("b") == b"two"
        assert wire.connections == 1


@forks
def test_a_child_does_not_wait_for_the_threads_of_its_parent(client: Open) -> None:
    gate = threading.Event()
    with Wire([gate, answer(b"one")], answer(b"two")) as wire:
        asking = client(wire, max_connections=1)
        first = threading.Thread(target=asking.fetch, args=("a",))
        first.start()
        wire.await_requests(1)
        assert in_child(lambda: asking.fetch("b")) == b"two"
        gate.set()
        first.join()


@forks
def test_a_closed_client_is_closed_in_a_child_too(client: Open) -> None:
    with Wire() as wire:
        asking = client(wire)
        asking.close()
        assert b"Cancelled" in in_child(lambda: asking.fetch("a"))
