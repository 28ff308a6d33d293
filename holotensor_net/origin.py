"""A small web server for demonstrations, tests and benchmarks: ranges, validators, shaping and faults.

It serves the files below one folder over HTTP/1.1, one thread a connection, and imports nothing of the rest of the
package. ``Origin`` runs in this process, ``OriginProcess`` in a child, ``serve`` until Ctrl-C, and
``python -m holotensor_net.origin DIR`` from a shell. It listens on loopback unless told otherwise.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import email.utils
import json
import math
import os
import random
import re
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from io import FileIO
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

__all__ = [
    "Behaviour",
    "Origin",
    "OriginProcess",
    "OriginStats",
    "RequestRecord",
    "add_behaviour_options",
    "behaviour_of",
    "main",
    "parse_rate",
    "parse_size",
    "serve",
]

_AMOUNT = re.compile(
    r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,2})?) *(?:([kmgt])(i?))?(b|bits?)?(/s)?", re.ASCII | re.IGNORECASE
)
_REQUEST_LINE = re.compile(r"([!-~]+) ([!-~]+) HTTP/1\.([01])")
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,99})-([0-9]{0,99})", re.IGNORECASE)
_ENTITY_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_TYPES = {".json": "application/json", ".html": "text/html; charset=utf-8", ".txt": "text/plain; charset=utf-8"}

_MAX_HEAD = 64 * 1024
_MAX_RECORDS = 10_000
_UNSHAPED = 8 * 1024 * 1024  # how much one call may send; the counters move in such steps
_SHAPED = 16 * 1024
_LAST = 16 * 1024
_CATCH_UP = 0.02  # seconds of lateness that a shaped answer may make up for
_TICK = 0.005  # a block takes no longer than this at its rate
_SEND_BUFFER = 128 * 1024
_LINGER = 0.5


def parse_size(text: str) -> int:
    """Bytes in ``50MB`` (10⁶), ``16 KiB`` (2¹⁰), ``1.5G`` or ``4096``. Raises ValueError."""
    return round(_amount(text, ("", "b"), "a size such as 4096, 50MB or 16KiB"))


def parse_rate(text: str) -> float:
    """Bytes/s in ``50MB``, ``50MB/s``, ``16MiB`` or ``400Mbit`` (10⁶ bits). Raises ValueError."""
    return _amount(text, ("", "b", "bit", "bits"), "a rate such as 50MB or 400Mbit (a second)", per_second=True)


def _amount(text: str, units: Sequence[str], wanted: str, per_second: bool = False) -> float:
    found = _AMOUNT.fullmatch(text.strip())
    if not found or (found[4] or "").lower() not in units or (found[5] and not per_second):
        raise ValueError(f"{text!r} is not {wanted}")
    power = " kmgt".index((found[2] or " ").lower())
    scale = (1024.0 if found[3] else 1000.0) ** power
    return float(found[1]) * scale / (8 if (found[4] or "b").lower() != "b" else 1)


def _flag(parse: Callable[[str], Any], metavar: str, text: str) -> dict[str, Any]:
    return {"parse": parse, "metavar": metavar, "help": text}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How an origin treats its clients: its speed, its faults. By default as fast as it can, and well.

    Sizes in bytes, rates in bytes/s, times in seconds, fractions from 0 to 1; what each field does stands beside it.
    Rates bind bodies only. Faults are drawn from ``seed``, anew for each behaviour that an origin is given.

    Raises ValueError, naming field and value.
    """

    rate: float | None = field(default=None, metadata=_flag(parse_rate, "BYTES/S", "shared by all connections"))
    rate_per_connection: float | None = field(default=None, metadata=_flag(parse_rate, "BYTES/S", "of each connection"))
    latency: float = field(default=0.0, metadata=_flag(float, "SECONDS", "before the first byte of each answer"))
    fail: float = field(default=0.0, metadata=_flag(float, "FRACTION", "of requests that are answered 503"))
    drop_after: int | None = field(default=None, metadata=_flag(parse_size, "BYTES", "of a body, then a reset"))
    drop: float = field(default=1.0, metadata=_flag(float, "FRACTION", "of answers that --drop-after concerns"))
    max_connections: int | None = field(
        default=None, metadata=_flag(int, "N", "requests answered at once; more are refused")
    )
    refusal: int = field(default=503, metadata=_flag(int, "STATUS", "of a refused request: 429 or 503"))
    retry_after: int = field(default=1, metadata=_flag(int, "SECONDS", "that a refused request is told to wait"))
    ignore_range: bool = field(default=False, metadata=_flag(bool, "", "answer ranges with the whole"))
    no_validators: bool = field(default=False, metadata=_flag(bool, "", "neither tell nor check versions"))
    require_auth: str | None = field(default=None, metadata=_flag(str, "VALUE", "of Authorization, else 401"))
    cache_control: str | None = field(default=None, metadata=_flag(str, "VALUE", "of the Cache-Control header"))
    seed: int = field(default=0, metadata=_flag(int, "N", "of the faults that are drawn by lot"))

    def __post_init__(self) -> None:
        for name in ("rate", "rate_per_connection"):
            self._check(name, lambda rate: rate is None or 0 < rate < math.inf, "a number of bytes/s above 0, or None")
        self._check("latency", lambda seconds: 0 <= seconds < math.inf, "a number of seconds, 0 or more")
        for name in ("fail", "drop"):
            self._check(name, lambda fraction: 0 <= fraction <= 1, "a fraction from 0 to 1")
        self._check("drop_after", lambda size: size is None or size >= 0, "a number of bytes, or None")
        self._check("max_connections", lambda number: number is None or number >= 1, "a number from 1, or None")
        self._check("refusal", lambda status: status in (429, 503), "429 or 503")
        self._check("retry_after", lambda seconds: seconds >= 0, "a whole number of seconds, 0 or more")
        for name in ("require_auth", "cache_control"):
            self._check(name, lambda text: text is None or re.fullmatch(r"[\x20-\x7e]+", text), "printable ASCII")

    def _check(self, name: str, is_good: Callable[[Any], Any], wanted: str) -> None:
        if not is_good(getattr(self, name)):
            raise ValueError(f"Behaviour.{name} must be {wanted}, not {getattr(self, name)!r}")


PLAIN = Behaviour()


@dataclass(frozen=True)
class OriginStats:
    """What an origin has done since it was started or reset.

    ``body_bytes`` were handed to the system's buffers; ``connections`` were accepted; ``peak_requests`` is the most
    that were answered at once, refused ones not counted.
    """

    requests: int
    not_modified: int
    body_bytes: int
    connections: int
    peak_requests: int
    statuses: dict[int, int]


@dataclass(frozen=True)
class RequestRecord:
    """One request: ``path`` as it was sent, query included; ``headers`` by lower-case name."""

    method: str
    path: str
    range: str | None
    status: int
    headers: dict[str, str] = field(repr=False)


# --- HTTP, as pure functions


@dataclass(frozen=True)
class _Request:
    """The head of a request; all empty if it could not be read."""

    method: str = ""
    target: str = ""
    keeps_alive: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Resource:
    """What the answer depends on: size in bytes, entity tag, time of modification in whole seconds (None: untold)."""

    size: int
    etag: str | None
    modified: int | None
    type: str = "application/octet-stream"


@dataclass(frozen=True)
class _Answer:
    """A status, its header fields, and which bytes of the resource follow."""

    status: int
    fields: Mapping[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int = 0


def _parse_head(head: bytes) -> _Request:
    """The request whose lines these are; an empty one, if they are none. A request with a body ends its connection."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = _REQUEST_LINE.fullmatch(first)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():  # folded lines too (RFC 9112 §5.2)
            return _Request()
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if not words:
        return _Request()
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    closes = "close" in re.split(r"[ \t,]+", headers.get("connection", "").lower())
    return _Request(words[1], words[2], words[3] == "1" and not closes and not has_body, headers)


def _open(root: str, target: str) -> FileIO | None:
    """The file that a request's target names; None if there is none to read below ``root``, itself a real path."""
    with contextlib.suppress(ValueError, OSError):  # not a URL, a NUL in it, another drive, no permission
        path = target if target.startswith("/") else urlsplit(target).path
        name = os.fsdecode(unquote_to_bytes(path.partition("?")[0].lstrip("/")))
        real = os.path.realpath(os.path.join(root, name))
        is_plain = not any(segment in ("", ".", "..") for segment in name.split("/"))
        if is_plain and os.path.commonpath((root, real)) == root and os.path.isfile(real):
            return FileIO(real)
    return None


def _respond(request: _Request, resource: _Resource, behaviour: Behaviour, now: float) -> _Answer:
    """The answer to a GET or HEAD for a resource that is there."""
    fields = {"Content-Type": resource.type}
    if not behaviour.ignore_range:
        fields["Accept-Ranges"] = "bytes"
    if resource.etag is not None:
        fields["ETag"] = resource.etag
    if resource.modified is not None:
        fields["Last-Modified"] = email.utils.formatdate(resource.modified, usegmt=True)
    if behaviour.cache_control is not None:
        fields["Cache-Control"] = behaviour.cache_control
    status = _precondition(request.headers, resource)
    if status != 200:
        return _Answer(status, fields)
    asked = None
    if request.method == "GET" and not behaviour.ignore_range and _if_range(request.headers, resource, now):
        asked = _range(request.headers.get("range", ""), resource.size)
    if asked is None:
        return _Answer(200, fields, 0, resource.size)
    start, stop = asked
    if start == stop:
        return _Answer(416, {**fields, "Content-Range": f"bytes */{resource.size}"})
    return _Answer(206, {**fields, "Content-Range": f"bytes {start}-{stop - 1}/{resource.size}"}, start, stop)


def _precondition(headers: Mapping[str, str], resource: _Resource) -> int:
    """200, 304 or 412: what a GET or HEAD is conditional on, in the order of RFC 9110 §13.2.2."""
    if resource.etag is None or resource.modified is None:
        return 200
    if "if-match" in headers:
        if not _matches(headers["if-match"], resource.etag, weakly=False):
            return 412
    elif (date := _date(headers.get("if-unmodified-since"))) is not None and resource.modified > date:
        return 412
    if "if-none-match" in headers:
        return 304 if _matches(headers["if-none-match"], resource.etag, weakly=True) else 200
    date = _date(headers.get("if-modified-since"))
    return 304 if date is not None and resource.modified <= date else 200


def _if_range(headers: Mapping[str, str], resource: _Resource, now: float) -> bool:
    """Whether a Range applies (RFC 9110 §13.1.5): no If-Range, or one that names this very version."""
    value = headers.get("if-range")
    if value is None:
        return True
    if '"' in value:
        return value == resource.etag
    # a date is strong once the second that it names is over (§8.8.2.2)
    return resource.modified is not None and _date(value) == resource.modified <= now - 1


def _matches(tags: str, etag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags, or ``*``, holds the strong ``etag`` (RFC 9110 §8.8.3.2)."""
    return tags == "*" or any(tag == etag and (weakly or not weak) for weak, tag in _ENTITY_TAG.findall(tags))


def _date(value: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date; None for none, and for what is none."""
    with contextlib.suppress(ValueError, OverflowError, IndexError, TypeError):
        parts = email.utils.parsedate_tz(value or "")
        return None if parts is None else email.utils.mktime_tz(parts)
    return None


def _range(value: str, size: int) -> tuple[int, int] | None:
    """Half-open bounds of the one range that is asked for; None to ignore it; empty if it cannot be satisfied."""
    found = _RANGE.fullmatch(value)
    if not found or value.endswith("=-"):
        return None
    first, last = found.groups()
    if not first:
        suffix = min(int(last), size)
        return None if int(last) and not size else (size - suffix, size)
    if last and int(last) < int(first):
        return None
    start = min(int(first), size)
    return start, min(int(last) + 1, size) if last else size


def _head(answer: _Answer, now: float, keeps_alive: bool) -> bytes:
    """The bytes of an answer before its body."""
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines.append(f"Date: {email.utils.formatdate(now, usegmt=True)}")
    if answer.status != 304:  # its length would be that of a 200 (RFC 9110 §8.6)
        lines.append(f"Content-Length: {answer.stop - answer.start}")
    lines.extend(f"{name}: {value}" for name, value in answer.fields.items())
    if not keeps_alive:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# --- shaping


class Link:
    """A line that all connections share, one block at a time, first come first served.

    An answer has one block at it at most, so that all get the same share. The lock guards when it is free next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = 0.0

    def reserve(self, seconds: float, asked: float) -> float:
        """When a block that takes the line for ``seconds`` has passed it, if it came at the time ``asked``."""
        with self._lock:
            self._free = max(self._free, asked) + seconds
            return self._free


class Pacer:
    """Holds one answer to the rates in force.

    A block goes when it has had its time, as on a real line: there is no burst after a pause. A block that goes late,
    because the machine was busy, is made up for by the next ones, up to 20 ms.
    """

    def __init__(self, link: Link, clock: Callable[[], float], pause: Callable[[float], None]) -> None:
        self._link = link
        self._clock = clock
        self._pause = pause
        self._own = self._due = clock()

    def admit(self, size: int, behaviour: Behaviour) -> None:
        """Wait until ``size`` more bytes may go."""
        earliest = self._clock() - _CATCH_UP
        if behaviour.rate_per_connection is not None:
            self._own = max(self._own, earliest) + size / behaviour.rate_per_connection
            self._pause(self._own - self._clock())
        if behaviour.rate is not None:
            asked = max(self._own, self._due, earliest)
            self._due = self._link.reserve(size / behaviour.rate, asked)
            self._pause(self._due - self._clock())


def block_size(behaviour: Behaviour, rest: int) -> int:
    """Bytes to send in one go, of ``rest`` that are left. The last block is always a small one."""
    size = _UNSHAPED
    if behaviour.rate_per_connection is not None:
        size = min(size, int(behaviour.rate_per_connection * _TICK))
    if behaviour.rate is not None:
        size = min(size, int(behaviour.rate * _TICK), max(_SHAPED, int(behaviour.rate * _TICK / 16)))
    size = max(size, 1)
    if size < rest or rest <= _LAST:
        return min(size, rest)
    return rest - _LAST


# --- the server


class _Tally:
    """Counts what an origin does. The lock guards the counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._records: collections.deque[RequestRecord] = collections.deque(maxlen=_MAX_RECORDS)
            self._statuses: collections.Counter[int] = collections.Counter()
            self._body_bytes = self._connections = 0
            self._peak = self._active

    def add(self, *, connections: int = 0, body_bytes: int = 0) -> None:
        with self._lock:
            self._connections += connections
            self._body_bytes = max(0, self._body_bytes + body_bytes)  # a block may straddle a reset

    def enter(self, limit: int | None) -> bool:
        """Whether one more request may be answered now; each that may ends with ``leave``."""
        with self._lock:
            if limit is not None and self._active >= limit:
                return False
            self._active += 1
            self._peak = max(self._peak, self._active)
            return True

    def leave(self) -> None:
        with self._lock:
            self._active -= 1

    def answered(self, request: _Request, status: int) -> None:
        headers = dict(request.headers)
        with self._lock:
            self._statuses[status] += 1
            self._records.append(RequestRecord(request.method, request.target, headers.get("range"), status, headers))

    def records(self) -> list[RequestRecord]:
        with self._lock:
            return list(self._records)

    def stats(self) -> OriginStats:
        with self._lock:
            return OriginStats(
                requests=self._statuses.total(),
                not_modified=self._statuses.get(304, 0),
                body_bytes=self._body_bytes,
                connections=self._connections,
                peak_requests=self._peak,
                statuses=dict(sorted(self._statuses.items())),
            )


class _Connection:
    """One client: its requests in turn, each answered before the next is read."""

    def __init__(self, origin: Origin, sock: socket.socket, tally: _Tally, closing: threading.Event) -> None:
        self._origin = origin
        self._sock = sock
        self._tally = tally
        self._closing = closing
        self._received = b""
        self._entered = False

    def run(self) -> None:
        """Serve until the client leaves, or has to."""
        with self._sock, contextlib.suppress(OSError):
            self._sock.setblocking(True)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._serve_one():
                pass
            self._part()

    def _serve_one(self) -> bool:
        """Answer one request; whether another may follow."""
        head = self._read_head()
        if head is None:
            return False
        request = _parse_head(head)
        behaviour = self._origin.behaviour
        self._entered = self._tally.enter(behaviour.max_connections)
        try:
            with _open(self._origin.root, request.target) or contextlib.nullcontext() as file:
                answer = self._answer(request, behaviour, file)
                self._pause(behaviour.latency)
                self._tally.answered(request, answer.status)
                self._send(request, answer, file, behaviour)
        finally:
            self._leave()
        return request.keeps_alive

    def _read_head(self) -> bytes | None:
        """The next request up to its empty line; None at the end of the connection."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > _MAX_HEAD:
                return b""
            data = self._sock.recv(_MAX_HEAD)
            if not data:
                return None
            self._received += data
        head, self._received = self._received[:end], self._received[end + 4 :]
        return head

    def _answer(self, request: _Request, behaviour: Behaviour, file: FileIO | None) -> _Answer:
        if not self._entered:
            return _Answer(behaviour.refusal, {"Retry-After": str(behaviour.retry_after)})
        if self._origin.strikes(behaviour.fail):
            return _Answer(503)
        if not request.method:
            return _Answer(400)
        if behaviour.require_auth not in (None, request.headers.get("authorization")):
            return _Answer(401, {"WWW-Authenticate": 'Bearer realm="origin"'})
        if request.method not in ("GET", "HEAD"):
            return _Answer(405, {"Allow": "GET, HEAD"})
        if file is None:
            return _Answer(404)
        about = os.fstat(file.fileno())
        resource = _Resource(
            size=about.st_size,
            etag=None if behaviour.no_validators else f'"{about.st_size:x}-{about.st_mtime_ns:x}"',
            modified=None if behaviour.no_validators else about.st_mtime_ns // 10**9,
            type=_TYPES.get(os.path.splitext(str(file.name))[1].lower(), "application/octet-stream"),
        )
        return _respond(request, resource, behaviour, time.time())

    def _send(self, request: _Request, answer: _Answer, file: FileIO | None, behaviour: Behaviour) -> None:
        head = _head(answer, time.time(), request.keeps_alive)
        length = answer.stop - answer.start
        if file is None or request.method != "GET" or not length:
            self._leave()
            self._sock.sendall(head)
            return
        self._sock.sendall(head)
        stop = answer.stop
        if behaviour.drop_after is not None and behaviour.drop_after < length and self._origin.strikes(behaviour.drop):
            stop = answer.start + behaviour.drop_after
        self._send_body(file, answer.start, stop)
        if stop < answer.stop:
            self._reset()

    def _send_body(self, file: FileIO, position: int, stop: int) -> None:
        pacer = Pacer(self._origin.link, time.monotonic, self._pause)
        while position < stop:
            behaviour = self._origin.behaviour  # may change on the way
            size = block_size(behaviour, stop - position)
            if behaviour.rate is not None or behaviour.rate_per_connection is not None:
                # what has passed the link is with the client, or is as good as there
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
                pacer.admit(size, behaviour)
            if position + size == stop:
                self._leave()  # before the client can know the end: its next request must find the place free
            self._send_block(file, position, size)
            position += size

    def _send_block(self, file: FileIO, position: int, size: int) -> None:
        """Counted before it goes, so that who has read it finds it counted."""
        self._tally.add(body_bytes=size)
        file.seek(position)
        try:
            self._sock.sendfile(file, position, size)  # leaves the file where it stopped, whatever stopped it
        finally:
            unsent = position + size - file.tell()
            self._tally.add(body_bytes=-unsent)
        if unsent:  # the file was cut short under the answer
            self._reset()

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._tally.leave()

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and self._closing.wait(seconds):
            raise ConnectionAbortedError("the origin is closing")

    def _reset(self) -> None:
        """End the connection with a reset: what the client has not been sent yet is lost."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError("cut on purpose")

    def _part(self) -> None:
        """Let the client read the last answer, although it may have more to say (RFC 9112 §9.6)."""
        self._sock.shutdown(socket.SHUT_WR)
        self._sock.settimeout(_LINGER)
        received = 0
        while received < _MAX_HEAD and (data := self._sock.recv(_MAX_HEAD)):
            received += len(data)


class Origin:
    """A web server on a thread of its own, for the files below ``root``; a context manager.

    Thread-safe. ``behaviour`` can be replaced at any time: its rates bind at once, the rest from the next request on.
    ``port`` 0 takes a free one, and keeps it if started again. The lock guards the lots that are drawn.

    Raises ValueError if ``root`` is no folder; ``start`` raises OSError if the port is taken.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 0, behaviour: Behaviour = PLAIN
    ) -> None:
        if not os.path.isdir(root):
            raise ValueError(f"{os.fspath(root)!r} is not a folder: name the one whose files are to be served")
        self.root = os.path.realpath(root)
        self.link = Link()
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._tally = _Tally()
        self._connections: list[tuple[socket.socket, threading.Thread]] = []  # the acceptor's, while it runs
        self._closing = threading.Event()
        self._acceptor: threading.Thread | None = None
        self.behaviour = behaviour

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        with self._lock:
            self._random = random.Random(behaviour.seed)
            self._behaviour = behaviour

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    def start(self) -> Origin:
        """Listen; nothing if it does already."""
        if self._acceptor is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            listener = socket.create_server((self._host, self._port), family=family, backlog=511)
            listener.setblocking(False)
            self._port = listener.getsockname()[1]
            self._closing = threading.Event()
            self._wake, wakened = socket.socketpair()
            self._acceptor = threading.Thread(
                target=self._accept, args=(listener, wakened), name=f"origin:{self._port}", daemon=True
            )
            self._acceptor.start()
        return self

    def close(self) -> None:
        """Cut every connection, now, and wait for the threads; idempotent."""
        if self._acceptor is None:
            return
        self._closing.set()
        self._wake.close()
        self._acceptor.join()
        self._acceptor = None
        for sock, _ in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for _, thread in self._connections:
            thread.join()
        self._connections = []

    def stats(self) -> OriginStats:
        return self._tally.stats()

    def reset_stats(self) -> None:
        """Count from zero, and forget the requests."""
        self._tally.reset()

    def requests(self) -> list[RequestRecord]:
        """The last ten thousand requests, in the order in which their answers began."""
        return self._tally.records()

    def strikes(self, fraction: float) -> bool:
        """Draw a lot: whether a fault that concerns this fraction of cases concerns this one."""
        if fraction <= 0:
            return False
        with self._lock:
            return self._random.random() < fraction

    def _accept(self, listener: socket.socket, wakened: socket.socket) -> None:
        with listener, wakened, selectors.DefaultSelector() as ready:
            ready.register(listener, selectors.EVENT_READ)
            ready.register(wakened, selectors.EVENT_READ)
            while not self._closing.is_set():
                ready.select()
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError:  # no descriptors left, or a client that is gone already
                    self._closing.wait(0.05)
                    continue
                self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        self._tally.add(connections=1)
        connection = _Connection(self, sock, self._tally, self._closing)
        thread = threading.Thread(target=connection.run, name=f"origin:{self._port} connection", daemon=True)
        thread.start()
        self._connections = [*(pair for pair in self._connections if pair[1].is_alive()), (sock, thread)]

    def __enter__(self) -> Origin:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class OriginProcess:
    """An ``Origin`` in a process of its own, which ends with this one; a context manager.

    After ``kill``, another can be started on the same port. The two talk in lines of JSON; the lock guards the talk.

    Raises RuntimeError where the process has ended, or could not start.
    """

    def __init__(self, root: str | os.PathLike[str], *, port: int = 0, behaviour: Behaviour = PLAIN) -> None:
        self._root = os.fspath(root)
        self._port = port
        self._behaviour = behaviour
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def behaviour(self) -> Behaviour:
        return self._behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        self._ask("behaviour", dataclasses.asdict(behaviour))
        self._behaviour = behaviour

    def start(self) -> OriginProcess:
        """Start the process and wait until it listens; nothing if it runs already."""
        if self._process is None:
            package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
            command = [sys.executable, "-m", "holotensor_net.origin", self._root, f"--port={self._port}", "--json"]
            self._process = subprocess.Popen(  # noqa: S603 - the interpreter that runs this
                [*command, *_arguments_of(self._behaviour)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the parent; the child sees its end
            )
            self._port = self._read(self._process)["port"]
        return self

    def stats(self) -> OriginStats:
        told = self._ask("stats")
        return OriginStats(**{**told, "statuses": {int(status): n for status, n in told["statuses"].items()}})

    def reset_stats(self) -> None:
        """Count from zero."""
        self._ask("reset")

    def kill(self) -> None:
        """End the process with SIGKILL, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process, and wait for it; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with process:  # waits, after it has closed the pipes; what stdin's end does not end, is killed
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()

    def _ask(self, verb: str, argument: object = None) -> Any:
        with self._lock:
            process = self._process
            if process is None:
                raise RuntimeError("the origin's process is not running: start it first")
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # the answer, which does not come, tells
                process.stdin.write(json.dumps([verb, argument]) + "\n")
                process.stdin.flush()
            return self._read(process)

    def _read(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the origin's process ended with status {process.returncode}: see what it wrote above")
        return json.loads(line)

    def __enter__(self) -> OriginProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the command


def add_behaviour_options(parser: argparse.ArgumentParser) -> None:
    """An option for each field of Behaviour."""
    for f in dataclasses.fields(Behaviour):
        parse, metavar, text = f.metadata["parse"], f.metadata["metavar"], f.metadata["help"]
        if parse is bool:
            parser.add_argument(_option(f.name), action="store_true", help=text)
        else:
            parser.add_argument(_option(f.name), type=_explained(parse), default=f.default, metavar=metavar, help=text)


def _arguments_of(behaviour: Behaviour) -> list[str]:
    """The options that give ``behaviour``."""
    changed = {name: value for name, value in vars(behaviour).items() if value != getattr(PLAIN, name)}
    return [_option(name) if value is True else f"{_option(name)}={value}" for name, value in changed.items()]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _explained(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, whose ValueError argparse would replace with a sentence of its own."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


def behaviour_of(arguments: argparse.Namespace) -> Behaviour:
    """The behaviour that the options of ``add_behaviour_options`` ask for. Raises ValueError."""
    return Behaviour(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Behaviour)})


def serve(
    root: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    behaviour: Behaviour = PLAIN,
    announce: Callable[[str], None] = _announce,
) -> None:
    """Serve until Ctrl-C; ``announce`` is told the URL. Raises ValueError and OSError as Origin does."""
    with Origin(root, host=host, port=port, behaviour=behaviour) as origin, contextlib.suppress(KeyboardInterrupt):
        announce(origin.url)
        while True:
            time.sleep(0.1)  # a signal that another thread takes does not end a sleep


def _serve_parent(origin: Origin) -> None:
    """Obey lines of JSON on stdin, each answered by one on stdout, until there are no more."""

    def say(what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    say({"port": origin.port})
    for line in sys.stdin:
        verb, argument = json.loads(line)
        if verb == "behaviour":
            origin.behaviour = Behaviour(**argument)
        elif verb == "reset":
            origin.reset_stats()
        say(dataclasses.asdict(origin.stats()))


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a folder until Ctrl-C, or, with ``--json``, until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m holotensor_net.origin", description="Serve a folder over HTTP.")
    parser.add_argument("root", metavar="DIR", help="whose files are served")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help="(default: a free one)")
    parser.add_argument("--json", action="store_true", help="take orders on stdin, and end with it")
    add_behaviour_options(parser)
    arguments = parser.parse_args(argv)
    try:
        behaviour = behaviour_of(arguments)
        where = {"host": arguments.host, "port": arguments.port, "behaviour": behaviour}
        if arguments.json:
            with Origin(arguments.root, **where) as origin, contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
                _serve_parent(origin)
        else:
            serve(arguments.root, **where)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: cannot listen on {arguments.host}:{arguments.port}: {error.strerror}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
