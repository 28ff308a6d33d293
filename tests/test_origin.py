"""The embedded origin, over real sockets: what it answers, how fast, how it fails on purpose, and how it ends."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net import origin as room
from holotensor_net.origin import Behaviour, Origin, OriginProcess, OriginStats, main, parse_rate, parse_size, serve

DATA = bytes(range(256)) * 4
MODIFIED = 1_700_000_000  # long ago, so that the date is a strong validator
LAST_MODIFIED = email.utils.formatdate(MODIFIED, usegmt=True)
EARLIER = email.utils.formatdate(MODIFIED - 1, usegmt=True)
LATER = email.utils.formatdate(MODIFIED + 1, usegmt=True)
ETAG = f'"{len(DATA):x}-{MODIFIED * 10**9:x}"'
OTHER = '"other"'

Start = Callable[..., Origin]


class Reply:
    """An answer, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()


def connect(server: Origin | OriginProcess) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)


def ask_on(
    connection: http.client.HTTPConnection,
    path: str = "/data.bin",
    method: str = "GET",
    headers: dict[str, str] | None = None,
) -> Reply:
    connection.request(method, path, headers=headers or {})
    return Reply(connection.getresponse())


def ask(
    server: Origin | OriginProcess, path: str = "/data.bin", method: str = "GET", headers: dict[str, str] | None = None
) -> Reply:
    with contextlib.closing(connect(server)) as connection:
        return ask_on(connection, path, method, headers)


def say(server: Origin, text: bytes) -> bytes:
    """What the server answers to these bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(text)
        return read_to_end(sock)


def read_to_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def begin(server: Origin | OriginProcess, path: str) -> socket.socket:
    """Ask, and wait for the first bytes of the answer; the rest is left unread."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert sock.recv(1)
    return sock


def await_true(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def origin_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("origin:")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with ``data.bin`` and, beside it in the outside world, ``secret``."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "data.bin").write_bytes(DATA)
    os.utime(folder / "data.bin", (MODIFIED, MODIFIED))
    (folder / "empty").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture
def served(root: Path) -> Iterator[Origin]:
    with Origin(root) as server:
        yield server


def sparse(root: Path, size: int) -> str:
    """A file of zeros that takes no room on the disk; its path in a URL."""
    with (root / "zeros").open("wb") as file:
        file.truncate(size)
    return "/zeros"


# --- words for sizes and rates


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("50MB", 50_000_000),
        ("50mb", 50_000_000),
        ("16 KiB", 16_384),
        ("1.5G", 1_500_000_000),
        (".5k", 500),
        ("2e3", 2000),
        (" 1TiB ", 2**40),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400Mbit", 5e7),
        ("400 Mbit/s", 5e7),
        ("1Gbits", 1.25e8),
        ("50MB", 5e7),
        ("50MB/s", 5e7),
        ("1MiB/s", 1_048_576.0),
        ("8bit", 1.0),
        ("50000000.0", 5e7),
    ],
)
def test_rate_is_read(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "MB", "-1", "+1", "1e", "1_000", "٣", "nan", "inf", "1 2", "1.2.3", "5 parsec"])
def test_word_that_is_no_amount_is_refused_with_a_sentence(text: str) -> None:
    for parse in (parse_size, parse_rate):
        with pytest.raises(ValueError, match=r"is not a (size|rate) such as"):
            parse(text)


@pytest.mark.parametrize("text", ["8Mbit", "1MB/s"])
def test_size_has_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "field",
    [
        {"rate": 0},
        {"rate_per_connection": float("inf")},
        {"latency": -1},
        {"fail": 1.5},
        {"drop": float("nan")},
        {"drop_after": -1},
        {"max_connections": 0},
        {"refusal": 500},
        {"retry_after": -1},
        {"require_auth": ""},
        {"cache_control": "no-store\r\nX: y"},
    ],
)
def test_behaviour_that_cannot_be_is_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"Behaviour.{next(iter(field))} must be"):
        Behaviour(**field)  # type: ignore[arg-type]


# --- files


def test_file_is_served_whole(served: Origin) -> None:
    reply = ask(served)
    assert (reply.status, reply.body) == (200, DATA)
    assert reply.headers["Content-Length"] == str(len(DATA))
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.headers["Accept-Ranges"] == "bytes"
    assert reply.headers["ETag"] == ETAG
    assert reply.headers["Last-Modified"] == LAST_MODIFIED
    assert reply.headers["Cache-Control"] is None
    assert abs(email.utils.parsedate_to_datetime(reply.headers["Date"]).timestamp() - time.time()) < 5


def test_head_tells_the_same_without_a_body(served: Origin) -> None:
    whole, head = ask(served), ask(served, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert {**head.headers, "Date": ""} == {**whole.headers, "Date": ""}


def test_head_ignores_ranges(served: Origin) -> None:
    head = ask(served, method="HEAD", headers={"Range": "bytes=0-1"})
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(DATA)))


def test_coding_is_always_identity(served: Origin) -> None:
    reply = ask(served, headers={"Accept-Encoding": "gzip, br"})
    assert reply.headers["Content-Encoding"] is None
    assert reply.body == DATA


def test_entity_tag_changes_with_the_content(served: Origin, root: Path) -> None:
    (root / "data.bin").write_bytes(DATA[::-1])
    assert ask(served).headers["ETag"] != ETAG


def test_model_index_is_json(served: Origin, root: Path) -> None:
    (root / "model.JSON").write_text("{}")
    assert ask(served, "/model.JSON").headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "path",
    ["/data.bin?download=true", "/%64ata%2Ebin", "//data.bin", "http://elsewhere/data.bin?x=1", "/folder/b%C3%BC.bin"],
)
def test_ways_to_name_a_file(served: Origin, root: Path, path: str) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "bü.bin").write_bytes(DATA)
    assert ask(served, path).body == DATA


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nothing",
        "/folder",
        "/folder/",
        "/data.bin/",
        "/data.bin/.",
        "/../secret",
        "/%2e%2e/secret",
        "/..%2fsecret",
        "/folder/../../secret",
        "/folder/../data.bin",
        "/outside",
        "/outside_folder/secret",
        "/loop",
        "/pipe",
        "/data.bin%00",
        "/%ff%fe",
        "/" + "x" * 5000,
    ],
)
def test_nothing_but_files_below_the_root_is_found(served: Origin, root: Path, path: str) -> None:
    (root / "folder").mkdir()
    (root / "outside").symlink_to(root.parent / "secret")
    (root / "outside_folder").symlink_to(root.parent)
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    reply = ask(served, path)
    assert (reply.status, reply.body) == (404, b"")


def test_absolute_path_of_another_file_is_not_found(served: Origin, root: Path) -> None:
    assert ask(served, f"/{root.parent / 'secret'}").status == 404


def test_target_that_is_no_url_is_not_found(served: Origin) -> None:
    assert say(served, b"GET http://[/data.bin HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 404 ")


def test_link_within_the_root_is_followed(served: Origin, root: Path) -> None:
    (root / "link").symlink_to("data.bin")
    assert ask(served, "/link").body == DATA


def test_root_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    with Origin(link) as server:
        assert ask(server).body == DATA


def test_root_that_is_no_folder_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        Origin(root / "data.bin")


# --- ranges and conditions

SIZE = len(DATA)


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=10-19", 10, 20),
        ("Bytes= 10-19", 10, 20),
        ("bytes=1000-99999999999999999999", 1000, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-5000", 0, SIZE),
    ],
)
def test_range_is_served(served: Origin, value: str, start: int, stop: int) -> None:
    reply = ask(served, headers={"Range": value})
    assert (reply.status, reply.body) == (206, DATA[start:stop])
    assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert reply.headers["Content-Length"] == str(stop - start)
    assert reply.headers["ETag"] == ETAG


@pytest.mark.parametrize(
    "value",
    [
        "bytes=0-1,5-6",
        "bytes=5-4",
        "bytes=-",
        "bytes=",
        "bytes 0-1",
        "items=0-1",
        "bytes=+0-1",
        "bytes=0-1_0",
        "bytes=a-b",
        "bytes=--1",
        "bytes=0-" + "9" * 5000,
    ],
)
def test_range_that_is_several_or_malformed_is_ignored(served: Origin, value: str) -> None:
    reply = ask(served, headers={"Range": value})
    assert (reply.status, reply.body) == (200, DATA)
    assert reply.headers["Content-Range"] is None


@pytest.mark.parametrize("value", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE}", "bytes=-0"])
def test_range_beyond_the_end_is_refused_with_the_size(served: Origin, value: str) -> None:
    reply = ask(served, headers={"Range": value})
    assert (reply.status, reply.body) == (416, b"")
    assert reply.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(("value", "status"), [("bytes=0-", 416), ("bytes=-0", 416), ("bytes=-5", 200)])
def test_range_of_an_empty_file(served: Origin, value: str, status: int) -> None:
    reply = ask(served, "/empty", headers={"Range": value})
    assert (reply.status, reply.body) == (status, b"")


@given(first=st.none() | st.integers(0, 40), last=st.none() | st.integers(0, 40), size=st.integers(0, 30))
def test_range_selects_what_the_definition_says(first: int | None, last: int | None, size: int) -> None:
    value = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is None:
        asked = [position for position in range(size) if last is not None and position >= size - last]
        is_ignored = last is None or (size == 0 and last > 0)
    else:
        asked = [position for position in range(size) if position >= first and (last is None or position <= last)]
        is_ignored = last is not None and last < first
    bounds = room._range(value, size)
    assert (bounds is None) == is_ignored
    if bounds is not None:
        assert list(range(*bounds)) == asked


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-Match": ETAG}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": f"{OTHER}, {ETAG}"}, 200),
        ({"If-Match": f"{OTHER},W/{ETAG}"}, 412),
        ({"If-Match": OTHER}, 412),
        ({"If-Match": "malformed"}, 412),
        ({"If-None-Match": ETAG}, 304),
        ({"If-None-Match": f"W/{ETAG}"}, 304),
        ({"If-None-Match": f"{OTHER} , {ETAG}"}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": OTHER}, 200),
        ({"If-Unmodified-Since": LAST_MODIFIED}, 200),
        ({"If-Unmodified-Since": LATER}, 200),
        ({"If-Unmodified-Since": EARLIER}, 412),
        ({"If-Unmodified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": LAST_MODIFIED}, 304),
        ({"If-Modified-Since": LATER}, 304),
        ({"If-Modified-Since": EARLIER}, 200),
        ({"If-Modified-Since": "Tue, 14 Nov 99999999 22:13:20 GMT"}, 200),
        # the precedence of RFC 9110 §13.2.2
        ({"If-Match": ETAG, "If-Unmodified-Since": EARLIER}, 200),
        ({"If-Match": OTHER, "If-Unmodified-Since": LATER}, 412),
        ({"If-None-Match": OTHER, "If-Modified-Since": LATER}, 200),
        ({"If-None-Match": ETAG, "If-Modified-Since": EARLIER}, 304),
        ({"If-Match": OTHER, "If-None-Match": ETAG}, 412),
        ({"If-Match": ETAG, "If-None-Match": ETAG}, 304),
        ({"If-Unmodified-Since": EARLIER, "If-Modified-Since": LATER}, 412),
        # and the range last
        ({"Range": "bytes=0-1", "If-Match": ETAG}, 206),
        ({"Range": "bytes=0-1", "If-Match": OTHER}, 412),
        ({"Range": "bytes=0-1", "If-None-Match": ETAG}, 304),
        ({"Range": "bytes=9999-", "If-None-Match": ETAG}, 304),
        ({"Range": "bytes=0-1", "If-Range": ETAG}, 206),
        ({"Range": "bytes=0-1", "If-Range": f"W/{ETAG}"}, 200),
        ({"Range": "bytes=0-1", "If-Range": OTHER}, 200),
        ({"Range": "bytes=0-1", "If-Range": LAST_MODIFIED}, 206),
        ({"Range": "bytes=0-1", "If-Range": LATER}, 200),
        ({"Range": "bytes=0-1", "If-Range": "nonsense"}, 200),
        ({"Range": "bytes=9999-", "If-Range": OTHER}, 200),
        ({"Range": "bytes=9999-", "If-Range": ETAG}, 416),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditions(served: Origin, method: str, headers: dict[str, str], status: int) -> None:
    if method == "HEAD" and status in (206, 416):
        status = 200  # only GET has ranges
    reply = ask(served, method=method, headers=headers)
    assert reply.status == status
    assert reply.headers["ETag"] == ETAG
    whole = {200: DATA, 206: DATA[:2]}.get(status, b"")
    assert reply.body == (whole if method == "GET" else b"")


def test_three_forms_of_date_are_understood(served: Origin) -> None:
    for date in (LAST_MODIFIED, "Tuesday, 14-Nov-23 22:13:20 GMT", "Tue Nov 14 22:13:20 2023"):
        assert ask(served, headers={"If-Modified-Since": date}).status == 304, date


def test_date_of_a_file_that_has_just_changed_is_too_weak_for_if_range(served: Origin, root: Path) -> None:
    soon = time.time() + 100
    os.utime(root / "data.bin", (soon, soon))
    reply = ask(served, headers={"Range": "bytes=0-1", "If-Range": email.utils.formatdate(soon, usegmt=True)})
    assert reply.status == 200


def test_not_modified_has_validators_and_no_length(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(cache_control="max-age=60")) as server:
        reply = ask(server, headers={"If-None-Match": ETAG})
    assert reply.headers["Content-Length"] is None
    assert reply.headers["Last-Modified"] == LAST_MODIFIED
    assert reply.headers["Cache-Control"] == "max-age=60"


# --- the connection


def test_connection_is_kept(served: Origin) -> None:
    with contextlib.closing(connect(served)) as connection:
        for path in ("/data.bin", "/nothing", "/empty", "/data.bin"):
            ask_on(connection, path)
    assert served.stats().connections == 1


def test_requests_sent_ahead_are_answered_in_order(served: Origin) -> None:
    text = b"".join(b"GET /data.bin HTTP/1.1\r\nRange: bytes=%d-%d\r\n\r\n" % (n, n) for n in range(3))
    answers = say(served, text + b"HEAD /data.bin HTTP/1.1\r\nConnection: x, Close\r\n\r\n")
    assert [answers.count(b"\r\n\r\n" + DATA[n : n + 1] + b"HTTP/1.1 ") for n in range(3)] == [1, 1, 1]
    assert answers.endswith(b"Connection: close\r\n\r\n")


def test_head_of_a_request_may_come_in_pieces(served: Origin) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        for piece in (b"GET /da", b"ta.bin HTTP/1.1\r\nRange: bytes=1-1\r", b"\nConnection: close\r\n\r", b"\n"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(piece)
        assert read_to_end(sock).endswith(b"\r\n\r\n\x01")


def test_http_1_0_ends_the_connection(served: Origin) -> None:
    assert say(served, b"GET /data.bin HTTP/1.0\r\n\r\n").endswith(DATA)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "FOO"])
def test_other_methods_are_refused(served: Origin, method: str) -> None:
    reply = ask(served, method=method)
    assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")


def test_request_with_a_body_is_answered_and_ends_the_connection(served: Origin) -> None:
    with contextlib.closing(connect(served)) as connection:
        connection.request("POST", "/data.bin", body=io.BytesIO(bytes(50_000)), headers={"Content-Length": "50000"})
        reply = Reply(connection.getresponse())
    assert (reply.status, reply.headers["Connection"]) == (405, "close")


def test_client_with_more_to_say_can_still_read_the_answer(served: Origin) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(b"POST /data.bin HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 405 ")
        for _ in range(3):
            sock.sendall(b"more")  # a closed socket would have answered with a reset


@pytest.mark.parametrize(
    "text",
    [
        b"GET /data.bin\r\n\r\n",
        b"GET /data.bin HTTP/2.0\r\n\r\n",
        b"GET  /data.bin HTTP/1.1\r\n\r\n",
        b"GET /data.bin HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /data.bin HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET /data.bin HTTP/1.1\r\nRange : bytes=0-1\r\n\r\n",
        b"\x16\x03\x01 this is TLS\r\n\r\n",
        b"GET /" + b"x" * 70_000,
    ],
)
def test_what_is_no_request_is_refused(served: Origin, text: bytes) -> None:
    assert say(served, text).startswith(b"HTTP/1.1 400 ")
    assert served.stats().statuses == {400: 1}


def test_repeated_range_is_ignored(served: Origin) -> None:
    answer = say(served, b"GET /data.bin HTTP/1.0\r\nRange: bytes=0-1\r\nRange: bytes=0-1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_client_that_leaves_early_is_no_event(served: Origin, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begin(served, sparse(root, 64 << 20)).close()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(b"GET /da")
    await_true(lambda: len(origin_threads()) == 1)
    served.close()
    assert capfd.readouterr() == ("", "")


def test_file_cut_short_under_an_answer_cuts_the_answer(served: Origin, root: Path) -> None:
    path = sparse(root, 64 << 20)
    with begin(served, path) as sock:
        os.truncate(root / "zeros", 1 << 20)
        with pytest.raises(ConnectionResetError):
            read_to_end(sock)


# --- counting


def test_everything_is_counted(served: Origin) -> None:
    headers = {"Range": "bytes=0-9", "X-Token": "t"}
    with contextlib.closing(connect(served)) as connection:
        ask_on(connection, "/data.bin?a=b", headers=headers)
        ask_on(connection, headers={"If-None-Match": ETAG})
        ask_on(connection, method="HEAD")
        ask_on(connection, "/nothing")
        ask_on(connection)
    assert served.stats() == OriginStats(
        requests=5,
        not_modified=1,
        body_bytes=10 + SIZE,
        connections=1,
        peak_requests=1,
        statuses={200: 2, 206: 1, 304: 1, 404: 1},
    )
    first = served.requests()[0]
    assert (first.method, first.path, first.range, first.status) == ("GET", "/data.bin?a=b", "bytes=0-9", 206)
    assert first.headers["x-token"] == "t"
    assert [record.status for record in served.requests()] == [206, 304, 200, 404, 200]
    served.reset_stats()
    assert served.stats() == OriginStats(0, 0, 0, 0, 0, {})
    assert served.requests() == []


def test_body_is_counted_when_its_reader_has_it(served: Origin, root: Path) -> None:
    size = (8 << 20) + 12_345
    path = sparse(root, size)
    with contextlib.closing(connect(served)) as connection:
        for n in range(1, 4):
            assert len(ask_on(connection, path).body) == size
            assert served.stats().body_bytes == n * size


def test_bytes_that_were_not_sent_are_not_counted(served: Origin, root: Path) -> None:
    size = 256 << 20
    begin(served, sparse(root, size)).close()
    await_true(lambda: len(origin_threads()) == 1)
    assert 0 < served.stats().body_bytes < size


def test_peak_counts_requests_at_once(served: Origin, root: Path) -> None:
    path = sparse(root, 64 << 20)
    with begin(served, path), begin(served, path), begin(served, path):
        assert served.stats().peak_requests == 3
        served.reset_stats()
        assert served.stats().peak_requests == 3
    await_true(lambda: len(origin_threads()) == 1)
    served.reset_stats()
    ask(served)
    assert served.stats().peak_requests == 1


# --- shaping


class Time:
    """A clock that moves when somebody waits, and a little more."""

    def __init__(self, oversleep: float = 0.0) -> None:
        self.now = 100.0
        self.oversleep = oversleep

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        if seconds > 0:
            self.now += seconds + self.oversleep


@pytest.mark.parametrize("oversleep", [0.0, 0.004, 0.015])
@pytest.mark.parametrize(
    "behaviour", [Behaviour(rate=1e6), Behaviour(rate_per_connection=1e6), Behaviour(rate=1e6, rate_per_connection=2e6)]
)
def test_pacer_holds_the_rate_although_it_wakes_late(behaviour: Behaviour, oversleep: float) -> None:
    clock = Time(oversleep)
    pacer = room.Pacer(room.Link(), clock, clock.pause)
    for _ in range(200):
        pacer.admit(5000, behaviour)
    assert clock.now - 100.0 == pytest.approx(1.0, abs=0.02)


def test_pacer_gives_no_credit_for_a_pause() -> None:
    clock, link = Time(), room.Link()
    room.Pacer(link, clock, clock.pause).admit(10_000, Behaviour(rate=1e6))
    clock.now = 200.0
    room.Pacer(link, clock, clock.pause).admit(10_000, Behaviour(rate=1e6))
    assert clock.now == pytest.approx(200.01)


def test_pacer_makes_up_for_little_when_the_client_was_slow() -> None:
    clock = Time()
    pacer = room.Pacer(room.Link(), clock, clock.pause)
    pacer.admit(1000, Behaviour(rate=1e6))
    clock.now = 200.0
    for _ in range(100):
        pacer.admit(1000, Behaviour(rate=1e6))
    assert clock.now == pytest.approx(200.08)


def test_link_gives_each_its_turn() -> None:
    link = room.Link()
    assert [link.reserve(0.5, asked) for asked in (10.0, 10.0, 10.2, 20.0)] == [10.5, 11.0, 11.5, 20.5]


@given(
    rate=st.none() | st.floats(1, 1e10),
    own=st.none() | st.floats(1, 1e10),
    rest=st.integers(1, 1 << 40),
)
def test_block_is_some_of_the_rest_and_a_small_one_at_last(rate: float | None, own: float | None, rest: int) -> None:
    size = room.block_size(Behaviour(rate=rate, rate_per_connection=own), rest)
    assert 1 <= size <= min(rest, 8 << 20)
    assert size < rest or size <= 16 * 1024
    for limit in (rate, own):
        assert limit is None or size == 1 or size / limit <= 0.005


def download(server: OriginProcess, path: str, ends: list[float], size: int) -> None:
    with contextlib.closing(connect(server)) as connection:
        connection.request("GET", path)
        response, block, count = connection.getresponse(), bytearray(1 << 17), 0
        while got := response.readinto(block):
            count += got
        assert count == size
    ends.append(time.monotonic())


def timed(server: OriginProcess, path: str, size: int, connections: int) -> list[float]:
    """Seconds until each of the downloads had ended."""
    ends: list[float] = []
    began = time.monotonic()
    clients = [threading.Thread(target=download, args=(server, path, ends, size)) for _ in range(connections)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(ends) == connections
    return [end - began for end in ends]


@pytest.mark.parametrize(
    ("behaviour", "connections", "size", "seconds"),
    [
        (Behaviour(rate=50e6), 16, 4_000_000, 1.28),
        (Behaviour(rate=1e6), 1, 1_100_000, 1.1),
        (Behaviour(rate_per_connection=2e6), 4, 2_200_000, 1.1),
    ],
)
def test_rate_is_held_and_shared(root: Path, behaviour: Behaviour, connections: int, size: int, seconds: float) -> None:
    path = sparse(root, size)
    with OriginProcess(root, behaviour=behaviour) as server:
        ends = timed(server, path, size, connections)
    assert 0.97 * seconds <= max(ends) <= 1.2 * seconds
    assert min(ends) >= 0.75 * seconds  # nobody was served before the others


def test_latency_passes_before_each_answer(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(latency=0.1)) as server, contextlib.closing(connect(server)) as connection:
        for path in ("/data.bin", "/nothing"):
            began = time.monotonic()
            ask_on(connection, path)
            assert time.monotonic() - began >= 0.1


def test_new_rate_binds_in_mid_transfer(root: Path) -> None:
    path = sparse(root, 10_000_000)
    with Origin(root, behaviour=Behaviour(rate=10_000)) as server, begin(server, path) as sock:
        server.behaviour = Behaviour()  # a thousand seconds otherwise
        count = 0
        while count < 10_000_000:
            count += len(sock.recv(1 << 20))


# --- faults


def test_fraction_of_requests_fails_the_same_way_each_time(root: Path) -> None:
    def statuses(seed: int) -> list[int]:
        behaviour = Behaviour(fail=0.5, seed=seed)
        with Origin(root, behaviour=behaviour) as server, contextlib.closing(connect(server)) as connection:
            return [ask_on(connection).status for _ in range(40)]

    first = statuses(1)
    assert set(first) == {200, 503}
    assert statuses(1) == first
    assert statuses(2) != first


def test_behaviour_is_replaced_while_running(served: Origin) -> None:
    with contextlib.closing(connect(served)) as connection:
        assert ask_on(connection).status == 200
        served.behaviour = replace(served.behaviour, fail=1.0)
        assert ask_on(connection).status == 503
        served.behaviour = Behaviour()
        assert ask_on(connection).status == 200


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_answer_is_cut_with_a_reset(root: Path, size: int) -> None:
    path = sparse(root, 300_000)
    with Origin(root, behaviour=Behaviour(drop_after=size)) as server:
        with contextlib.closing(connect(server)) as connection:
            connection.request("GET", path, headers={"Range": "bytes=1000-"})
            try:
                response = connection.getresponse()
                assert response.headers["Content-Length"] == "299000"
                with pytest.raises(ConnectionResetError):
                    response.read()
            except ConnectionResetError:
                assert size == 0  # the reset may overtake the head
        assert server.stats().body_bytes == size


def test_answers_that_are_shorter_or_have_no_body_are_not_cut(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(drop_after=SIZE)) as server:
        assert ask(server).body == DATA
        server.behaviour = Behaviour(drop_after=0)
        assert ask(server, method="HEAD").status == 200
        assert ask(server, "/nothing").status == 404


def test_fraction_of_answers_is_cut(root: Path) -> None:
    outcomes = []
    with Origin(root, behaviour=Behaviour(drop_after=10, drop=0.5)) as server:
        for _ in range(40):
            try:
                outcomes.append(ask(server).status)
            except ConnectionResetError:
                outcomes.append(0)
    assert set(outcomes) == {0, 200}


@pytest.mark.parametrize("status", [429, 503])
def test_requests_above_the_limit_are_refused_with_a_time(root: Path, status: int) -> None:
    path = sparse(root, 64 << 20)
    behaviour = Behaviour(max_connections=2, refusal=status, retry_after=7)
    with Origin(root, behaviour=behaviour) as server:
        with begin(server, path), begin(server, path):
            for _ in range(2):
                refused = ask(server)
                assert (refused.status, refused.headers["Retry-After"]) == (status, "7")
            assert server.stats().peak_requests == 2
        await_true(lambda: ask(server).status == 200)


def test_place_is_free_when_the_client_has_the_answer(root: Path) -> None:
    sparse(root, 100_000)
    with (
        Origin(root, behaviour=Behaviour(max_connections=1)) as server,
        contextlib.closing(connect(server)) as one,
        contextlib.closing(connect(server)) as other,
    ):
        for path in ("/data.bin", "/zeros", "/nothing") * 100:
            assert ask_on(one, path).status != 503
            assert ask_on(other, path).status != 503
        assert server.stats().peak_requests == 1


def test_ranges_can_be_ignored(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(ignore_range=True)) as server:
        reply = ask(server, headers={"Range": "bytes=0-1"})
    assert (reply.status, reply.body, reply.headers["Accept-Ranges"]) == (200, DATA, None)


def test_validators_can_be_withheld(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(no_validators=True)) as server:
        for headers in ({"If-Match": OTHER}, {"If-None-Match": "*"}, {"If-Modified-Since": LATER}):
            reply = ask(server, headers=headers)
            assert reply.status == 200
            assert reply.headers["ETag"] is None
            assert reply.headers["Last-Modified"] is None
        for value in (ETAG, LAST_MODIFIED):
            assert ask(server, headers={"Range": "bytes=0-1", "If-Range": value}).status == 200


def test_credentials_can_be_required(root: Path) -> None:
    with Origin(root, behaviour=Behaviour(require_auth="Bearer right")) as server:
        assert ask(server, headers={"Authorization": "Bearer right"}).status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            reply = ask(server, headers=headers)
            assert (reply.status, reply.body) == (401, b"")
            assert reply.headers["WWW-Authenticate"]


# --- beginning and end


def test_close_cuts_every_connection_at_once_and_leaves_no_thread(root: Path) -> None:
    path = sparse(root, 64 << 20)
    server = Origin(root).start()
    with contextlib.ExitStack() as clients:
        idle = connect(server)
        clients.callback(idle.close)
        ask_on(idle)
        clients.enter_context(begin(server, path))  # its buffers are full
        server.behaviour = Behaviour(rate=1.0)
        clients.enter_context(begin(server, path))  # waits for its turn
        server.behaviour = Behaviour(latency=1000)
        waiting = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        waiting.sendall(b"GET /data.bin HTTP/1.1\r\n\r\n")
        await_true(lambda: len(origin_threads()) == 5)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 2
        assert origin_threads() == []
        assert waiting.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            ask(server)
    server.close()


def test_origin_starts_again_on_its_port(root: Path) -> None:
    server = Origin(root)
    with server.start(), contextlib.closing(connect(server)) as connection:
        url = server.url
        ask_on(connection)
        server.close()
        with server:
            assert server.url == url
            assert ask(server).body == DATA


def test_port_that_is_taken_is_an_error(served: Origin, root: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        Origin(root, port=served.port).start()


def test_other_addresses_can_be_served(root: Path) -> None:
    try:
        server = Origin(root, host="::1").start()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, contextlib.closing(http.client.HTTPConnection("::1", server.port, timeout=20)) as connection:
        assert server.url == f"http://[::1]:{server.port}"
        assert ask_on(connection).body == DATA


def test_failing_to_accept_is_survived(served: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = socket.socket.accept
    failures = [OSError(24, "Too many open files"), ConnectionAbortedError()]

    def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    assert ask(served).body == DATA
    assert failures == []


# --- in a process of its own


def test_process_serves_counts_and_obeys(root: Path) -> None:
    with OriginProcess(root, behaviour=Behaviour(require_auth="Bearer x y", rate=1e9, ignore_range=True)) as server:
        assert server.start() is server
        assert ask(server).status == 401
        assert ask(server, headers={"Authorization": "Bearer x y", "Range": "bytes=0-1"}).body == DATA
        assert server.stats() == OriginStats(2, 0, SIZE, 2, 1, {200: 1, 401: 1})
        server.behaviour = replace(server.behaviour, require_auth=None)
        assert server.behaviour == Behaviour(rate=1e9, ignore_range=True)
        assert ask(server).status == 200
        server.reset_stats()
        assert server.stats() == OriginStats(0, 0, 0, 0, 0, {})
    server.close()
    server.kill()
    with pytest.raises(RuntimeError, match="start it first"):
        server.stats()


def test_killed_process_is_followed_on_the_same_port(root: Path) -> None:
    path = sparse(root, 64 << 20)
    with OriginProcess(root) as first, begin(first, path) as sock:
        first.kill()
        with contextlib.suppress(ConnectionResetError):
            read_to_end(sock)
        with pytest.raises(ConnectionRefusedError):
            ask(first)
        with OriginProcess(root, port=first.port) as second:
            assert second.url == first.url
            assert ask(second).body == DATA


def test_process_that_cannot_start_says_so(served: Origin, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        OriginProcess(root, port=served.port).start()
    assert "cannot listen on 127.0.0.1" in capfd.readouterr().err


def test_process_that_has_died_says_so(root: Path) -> None:
    with OriginProcess(root) as server:
        assert server._process is not None
        server._process.kill()
        server._process.wait()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            server.stats()


def test_process_that_does_not_end_is_killed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OriginProcess(root) as server:
        process = server._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        wait = process.wait
        monkeypatch.setattr(process, "wait", lambda timeout=None: wait(timeout and 0.05))
        server.close()
        assert process.returncode == -signal.SIGKILL


def test_process_ends_with_its_parent(root: Path) -> None:
    parent = (
        "import sys, time\n"
        "from holotensor_net.origin import OriginProcess\n"
        "server = OriginProcess(sys.argv[1]).start()\n"
        "print(server.port, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent, str(root)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
                process.kill()
                assert sock.recv(1) == b""  # the server has gone too
        finally:
            process.kill()


# --- the command


def test_serve_announces_and_serves_until_interrupted(root: Path) -> None:
    heard = []

    def announce(url: str) -> None:
        port = int(url.rpartition(":")[2])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            heard.append(ask_on(connection).body)
        raise KeyboardInterrupt

    serve(root, announce=announce)
    assert heard == [DATA]
    assert origin_threads() == []


def test_command_serves_until_interrupted(root: Path) -> None:
    command = [sys.executable, "-m", "holotensor_net.origin", str(root), "--cache-control", "no-store"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            port = int(url.removeprefix("http://127.0.0.1:"))
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
                assert ask_on(connection).headers["Cache-Control"] == "no-store"
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_command_takes_orders_in_json(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = [["stats", None], ["behaviour", {"fail": 0.5}], ["reset", None]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    assert main([str(root), "--json", "--rate=400Mbit", "--drop-after=1MB", "--no-validators"]) == 0
    first, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["port"] > 0
    assert [answer["requests"] for answer in answers] == [0, 0, 0]


def test_command_gives_its_options_to_the_server(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(room, "serve", lambda root, **settings: given.update(settings, root=root))
    behaviour = Behaviour(
        rate=5e7,
        rate_per_connection=1e6,
        latency=0.02,
        fail=0.1,
        drop_after=1000,
        drop=0.5,
        max_connections=4,
        refusal=429,
        retry_after=2,
        ignore_range=True,
        no_validators=True,
        require_auth="Basic eDp5",
        cache_control="max-age=60, public",
        seed=3,
    )
    assert main([str(root), "--host=::1", "--port=81", *room._arguments_of(behaviour)]) == 0
    assert given == {"root": str(root), "host": "::1", "port": 81, "behaviour": behaviour}


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--rate=fast"], 2, "'fast' is not a rate such as 50MB or 400Mbit"),
        (["--fail=2"], 2, "Behaviour.fail must be a fraction from 0 to 1, not 2.0"),
        (["--latency=soon"], 2, "could not convert"),
        (["--host=192.0.2.1"], 1, "cannot listen on 192.0.2.1:0"),
    ],
)
def test_command_explains_what_it_cannot_do(
    root: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(root), *options])
    assert stopped.value.code == status
    assert sentence in capsys.readouterr().err


def test_command_explains_that_there_is_no_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(root / "nothing")])
    assert "is not a folder: name the one" in capsys.readouterr().err
