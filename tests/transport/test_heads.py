"""A plain head is read as http.client reads it, and everything else is left to that."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
from typing import Any

import pytest
from wire import Request, Wire, chunks, part

from holotensor_net.config import CdnEndpoint
from holotensor_net.transport.client import HttpClient
from holotensor_net.transport.heads import PlainHead, plain_head, plain_request
from holotensor_net.transport.sockets import Answer, LiveSockets, Reader

PLAIN = (
    b"HTTP/1.1 206 Partial Content",
    b"Server: one/1.0",
    b"Content-Range: bytes 0-4/100",
    b"Content-Length: 5",
    b'ETag: "v1"',
)
BODY = b"body!"


def head(*lines: bytes, end: bytes = b"\r\n") -> bytes:
    return b"".join(line + end for line in (*lines, b""))


def as_http_client_reads(sent: bytes) -> dict[str, Any] | None:
    """What comes of it the long way; None where that is refused."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        answer = Answer(Reader(ours, LiveSockets()), method="GET")
        with contextlib.closing(answer):
            try:
                answer.begin()
            except (http.client.HTTPException, OSError, ValueError):
                return None
            told = {"status": answer.status, "said": dict(answer.said), "length": answer.length}
            rest = answer.fp.peek()
            return {**told, "closes": answer.will_close, "chunked": answer.chunked, "rest": rest}


def test_a_plain_head_is_read_at_one_go() -> None:
    sent = head(*PLAIN)
    found = plain_head(sent + BODY)
    assert found is not None
    assert (found.status, found.length, found.size) == (206, 5, len(sent))
    assert dict(found.said) == {
        "server": "one/1.0",
        "content-range": "bytes 0-4/100",
        "content-length": "5",
        "etag": '"v1"',
    }


UNUSUAL = {
    "cut in its end": head(*PLAIN)[:-1],
    "cut in a name": head(*PLAIN)[:60],
    "no header at all": head(PLAIN[0]),
    "no length": head(*PLAIN[:3], PLAIN[4]),
    "another status": head(b"HTTP/1.1 404 Not Found", *PLAIN[1:]),
    "an interim answer": head(b"HTTP/1.1 100 Continue") + head(*PLAIN),
    "an old version": head(b"HTTP/1.0 206 Partial Content", *PLAIN[1:]),
    "a status of four digits": head(b"HTTP/1.1 2066 Partial Content", *PLAIN[1:]),
    "line feeds alone": head(*PLAIN, end=b"\n"),
    "one line feed alone": head(*PLAIN).replace(b"\r\n", b"\n", 2),
    "a bare carriage return": head(*PLAIN, b"X: a\rb"),
    "a folded line": head(*PLAIN, b" and on"),
    "a line folded with a tab": head(*PLAIN, b"\tand on"),
    "a space before the colon": head(*PLAIN, b"X : a"),
    "no colon": head(*PLAIN, b"X"),
    "no name": head(*PLAIN, b": a"),
    "a name with a space": head(*PLAIN, b"X Y: a"),
    "a name beyond ASCII": head(*PLAIN, b"\xc3\xbc: a"),
    "a mail's envelope": head(*PLAIN, b"From someone"),
    "a value beyond ASCII": head(*PLAIN, b"X: \xc3\xbc"),
    "a zero byte": head(*PLAIN, b"X: a\0b"),
    "a form feed": head(*PLAIN, b"X: a\x0cb"),
    "two lengths": head(*PLAIN, b"Content-Length: 6"),
    "the same length twice": head(*PLAIN, b"content-length: 5"),
    "a length with a sign": head(*PLAIN[:3], b"Content-Length: +5"),
    "a negative length": head(*PLAIN[:3], b"Content-Length: -5"),
    "a length with an underline": head(*PLAIN[:3], b"Content-Length: 1_0"),
    "a list of lengths": head(*PLAIN[:3], b"Content-Length: 5, 5"),
    "a length of no end": head(*PLAIN[:3], b"Content-Length: " + b"9" * 19),
    "an empty length": head(*PLAIN[:3], b"Content-Length:"),
    "chunks": head(*PLAIN, b"Transfer-Encoding: chunked"),
    "another encoding": head(*PLAIN, b"Transfer-Encoding: identity"),
    "two places": head(*PLAIN, b"content-range: bytes 0-4/100"),
    "a place over two lines": head(*PLAIN[:2], b"Content-Range: bytes 0-4/100", b" and on", *PLAIN[3:]),
    "a place beyond ASCII": head(*PLAIN, b"Content-Range: \xff"),
    "an end of the connection": head(*PLAIN, b"Connection: close"),
    "two wishes for the connection": head(*PLAIN, b"Connection: keep-alive", b"Connection: close"),
    "another wish": head(*PLAIN, b"Connection: upgrade"),
    "several parts": head(*PLAIN, b"Content-Type: multipart/byteranges; boundary=x"),
    "several parts, in capitals": head(*PLAIN, b"Content-Type: Multipart/mixed"),
    "a mail": head(*PLAIN, b"Content-Type: message/rfc822"),
    "too many headers": head(*PLAIN, *(b"X-%d: a" % number for number in range(61))),
}


@pytest.mark.parametrize("sent", UNUSUAL.values(), ids=UNUSUAL)
def test_whatever_is_unusual_is_left_to_others(sent: bytes) -> None:
    assert plain_head(sent) is None
    assert plain_head(sent + BODY) is None


USUAL = {
    "a whole object": head(b"HTTP/1.1 200 OK", *PLAIN[1:]),
    "no reason": head(b"HTTP/1.1 206 ", *PLAIN[1:]),
    "no body": head(*PLAIN[:2], b"Content-Length: 0"),
    "an empty value": head(*PLAIN, b"X:"),
    "spaces and tabs around a value": head(*PLAIN, b"X: \t a\tb \t "),
    "no space": head(*PLAIN, b"X:a:b"),
    "one name several times": head(*PLAIN, b"Via: a", b"X: y", b"via: b"),
    "a wish to stay": head(*PLAIN, b"Connection: Keep-Alive"),
    "as many headers as are read here": head(*PLAIN, *(b"X-%d: a" % number for number in range(60))),
    "odd letters in a name": head(*PLAIN, b"!#$%&'*+-.^_`|~09: a"),
}


def told(found: PlainHead, sent: bytes) -> dict[str, object]:
    """What a plain head says of the answer, in the terms of :func:`as_http_client_reads`."""
    return {
        "status": found.status,
        "said": dict(found.said),
        "length": found.length,
        "closes": False,
        "chunked": False,
        "rest": (sent + BODY)[found.size :],
    }


@pytest.mark.parametrize("sent", USUAL.values(), ids=USUAL)
def test_what_is_usual_is_read_as_http_client_reads_it(sent: bytes) -> None:
    found = plain_head(sent + BODY)
    assert found is not None
    assert as_http_client_reads(sent + BODY) == told(found, sent)


def made(draw: random.Random) -> bytes:
    """A head that may well be plain, or nearly."""
    own = [
        b"X: a",
        b"Via: 1.1 a",
        b"via: b",
        b"X:",
        b"Vary: *",
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT",
        b"Content-Length: 6",
    ]
    odd = [
        b" fold",
        b"X : y",
        b"From: x",
        b"From x",
        b": y",
        b"\x85X: y",
        b"Content-Type: message/http",
        b"X: \x1c\x85\xa0",
    ]
    lines = [*PLAIN, *draw.choices(own, k=draw.randrange(4)), *draw.choices(odd, k=draw.random() < 0.1)]
    kept = lines[:1] + draw.sample(lines[1:], k=len(lines) - 1 - (draw.random() < 0.1))
    sent = bytearray(head(*kept))
    for _ in range(draw.choice((0, 0, 1, 1, 2))):
        at = draw.randrange(len(sent))
        match draw.randrange(3):
            case 0:
                sent[at] = draw.choice((draw.randrange(256), *b"\r\n\t :,;\0\x0b\x85"))
            case 1:
                del sent[at]
            case _:
                sent.insert(at, draw.choice(b"\r\n\t :0-\x1c\x7f"))
    return bytes(sent)


def test_no_head_is_read_otherwise_than_by_http_client() -> None:
    draw, plain = random.Random(7), 0
    for _ in range(3000):
        sent = made(draw)
        found = plain_head(sent + BODY)
        if found is not None:
            plain += 1
            assert as_http_client_reads(sent + BODY) == told(found, sent), sent
    assert 500 < plain < 2500


class Recorded:
    """A socket that takes what is sent."""

    def __init__(self) -> None:
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data


@pytest.mark.parametrize("target", ["/a", "/a?b=%20", "/" + "x" * 5000])
def test_a_request_is_written_as_http_client_writes_it(target: str) -> None:
    headers = {
        "User-Agent": "x/1",
        "Accept": "*/*",
        "Range": "bytes=0-1",
        "Accept-Encoding": "identity",
        "X-Own": "\xf6 \t\x80",
    }
    connection: Any = http.client.HTTPConnection("a.test", 8080)
    connection.sock = Recorded()
    connection.putrequest("GET", target, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    own = {name: headers[name] for name in ("User-Agent", "Accept")}
    conditions = {name: value for name, value in headers.items() if name not in own}
    assert plain_request(target, "a.test:8080", headers) == connection.sock.sent
    assert plain_request(target, "a.test:8080", own, conditions) == connection.sock.sent


@pytest.mark.parametrize(
    ("target", "host", "own"),
    [
        ("/a b", "h", {}),
        ("/a\r\nX: y", "h", {}),
        ("/ü", "h", {}),
        ("", "h", {}),
        ("/a", "h\r\nX: y", {}),
        ("/a", "ü", {}),
        ("/a", "h", {"X": "a\r\nY: b"}),
        ("/a", "h", {"X": "a\nb"}),
        ("/a", "h", {"X": "a\0"}),
        ("/a", "h", {"X": "€"}),
        ("/a", "h", {"X Y": "a"}),
        ("/a", "h", {"X: Y": "a"}),
        ("/a", "h", {"": "a"}),
        ("/a", "h", {"host": "other"}),
        ("/a", "h", {"accept-encoding": "gzip"}),
    ],
)
def test_a_request_that_is_unusual_is_left_to_http_client(target: str, host: str, own: dict[str, str]) -> None:
    assert plain_request("/a", "h", {"Accept-Encoding": "identity"}) is not None
    assert plain_request("/a", "h", {}) is None
    assert plain_request(target, host, {"Accept-Encoding": "identity", **own}) is None
    assert plain_request(target, host, {"Accept-Encoding": "identity"}, own) is None or not own


def test_of_two_heads_that_differ_in_their_place_each_has_its_own() -> None:
    for start in (5, 10):
        place = b"bytes %d-%d/100" % (start, start + 4)
        found = plain_head(head(*PLAIN).replace(b"bytes 0-4/100", place))
        assert found is not None
        assert found.said["content-range"] == place.decode()


def test_answers_of_all_kinds_follow_each_other_over_one_connection() -> None:
    data = bytes(range(100))

    def usual(request: Request) -> bytes:
        start, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        return part(data, int(start), int(last) + 1, etag='"v1"')

    def in_chunks(request: Request) -> bytes:
        whole = usual(request)
        begin, _, body = whole.partition(b"\r\n\r\n")
        lines = [line for line in begin.split(b"\r\n") if not line.lower().startswith(b"content-length")]
        return head(*lines, b"Transfer-Encoding: chunked") + chunks(body)

    def after_hints(request: Request) -> bytes:
        return head(b"HTTP/1.1 103 Early Hints", b"Link: </x>") + usual(request)

    kinds = [usual, in_chunks, usual, usual, after_hints, usual, in_chunks, in_chunks, usual]
    with Wire(*kinds) as wire, HttpClient(CdnEndpoint(wire.url)) as client:
        for number in range(len(kinds)):
            assert client.fetch_range("a", (number, number + 10)) == data[number : number + 10]
        assert wire.connections == 1
