from __future__ import annotations

import contextlib
import gc
import http.client
import itertools
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)
from wire import END, HOLD, RESET, Wire, answer, black_hole, chunked, closed_port, drip, write_certificate

from holotensor_net.transport import sockets
from holotensor_net.transport.pools import pool_classes
from holotensor_net.transport.sockets import SLOWEST, Interrupt, LiveSockets, Reader

Open = Callable[..., Any]


@pytest.fixture
def live() -> LiveSockets:
    return LiveSockets()


@pytest.fixture
def open_pool(tmp_path: Path) -> Iterator[Open]:
    """Makes connection pools to a port of this machine, as ``live`` knows them."""
    with contextlib.ExitStack() as pools:

        def start(live: LiveSockets, port: int, *, host: str = "127.0.0.1", tls: bool = False) -> Any:
            trust = {"ca_certs": str(write_certificate(tmp_path))} if tls else {}
            pool = pool_classes(live)["https" if tls else "http"](host, port, timeout=5.0, **trust)
            return pools.enter_context(pool)

        yield start


def get(pool: Any, timeout: float = 5.0) -> Any:
    return pool.urlopen("GET", "/", retries=False, timeout=timeout, preload_content=False, decode_content=False)


def body_of(response: Any) -> bytes:
    blocks = []
    while block := response.read1(65536):
        blocks.append(block)
    return b"".join(blocks)


@contextlib.contextmanager
def interrupted(live: LiveSockets) -> Iterator[threading.Event]:
    """Aborts ``live`` once the event is set, and fails unless the block ends within a second of it."""
    ready, aborted_at = threading.Event(), [0.0]

    def abort() -> None:
        assert ready.wait(5)
        aborted_at[0] = time.monotonic()
        live.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        yield ready
    finally:
        ready.set()
        thread.join()
    assert time.monotonic() - aborted_at[0] < 1.0


# -- abort


def test_abort_wakes_a_reader_at_once(live: LiveSockets) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, interrupted(live) as ready:
        live.add(ours)
        ready.set()
        assert ours.recv(1) == b""


def test_an_interrupt_wakes_its_own_thread_and_no_other(live: LiveSockets) -> None:
    interrupt = Interrupt()
    ours, theirs = socket.socketpair()
    others, far = socket.socketpair()
    with ours, theirs, others, far:
        live.add(others)
        with live.interruptible(interrupt):
            live.add(ours)
            waker = threading.Timer(0.01, interrupt.fire)
            waker.start()
            assert ours.recv(1) == b""
            waker.join()
            with pytest.raises(ConnectionAbortedError):
                live.add(others)
        far.send(b"x")
        assert others.recv(1) == b"x"


def test_an_interrupt_that_comes_too_late_cuts_nothing(live: LiveSockets) -> None:
    interrupt = Interrupt()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with live.interruptible(interrupt):
            live.add(ours)
        interrupt.fire()
        live.add(ours)
        theirs.send(b"x")
        assert ours.recv(1) == b"x"


def test_nothing_can_be_added_after_abort(live: LiveSockets) -> None:
    live.abort()
    with socket.socket() as sock, pytest.raises(ConnectionAbortedError):
        live.add(sock)


def test_abort_passes_over_sockets_that_are_closed_or_never_connected(live: LiveSockets) -> None:
    ours, theirs = socket.socketpair()
    closed = socket.socket()
    with ours, theirs, socket.socket() as fresh:
        for sock in (closed, fresh, ours):
            live.add(sock)
        closed.close()
        live.abort()
        live.abort()
        assert ours.recv(1) == b""


def test_sockets_are_not_kept_alive(live: LiveSockets) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        live.add(ours)
        ours.close()
        del ours
        gc.collect()
        live.abort()
        assert theirs.recv(1) == b""


def test_abort_wakes_a_thread_that_connects(
    live: LiveSockets, open_pool: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = live.add
    with black_hole() as port, interrupted(live) as ready:

        def note(sock: socket.socket) -> None:
            add(sock)
            ready.set()

        monkeypatch.setattr(live, "add", note)
        with pytest.raises(HTTPError):
            get(open_pool(live, port), timeout=30.0)


def test_an_abort_at_the_very_moment_of_connecting_is_not_forgotten(
    live: LiveSockets, open_pool: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = live.add

    def add_and_abort(sock: socket.socket) -> None:
        add(sock)
        live.abort()

    monkeypatch.setattr(live, "add", add_and_abort)
    began = time.monotonic()
    with black_hole() as port, pytest.raises(HTTPError):
        get(open_pool(live, port), timeout=30.0)
    assert time.monotonic() - began < 1.0


def test_abort_wakes_a_thread_in_a_handshake(live: LiveSockets, open_pool: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, interrupted(live) as ready:

        def accept() -> None:
            peer, _ = silent.accept()
            with peer:
                peer.recv(65536)  # the ClientHello; no answer to it
                ready.set()
                assert peer.recv(1) == b""

        server = threading.Thread(target=accept)
        server.start()
        with pytest.raises(HTTPError):
            get(open_pool(live, silent.getsockname()[1], tls=True), timeout=30.0)
        server.join()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_abort_wakes_a_thread_that_waits_for_an_answer(live: LiveSockets, open_pool: Open, tls: bool) -> None:
    with Wire([HOLD], tls=tls) as wire, interrupted(live) as ready:
        asker = threading.Thread(target=lambda: (wire.await_requests(1), ready.set()))
        asker.start()
        with pytest.raises(HTTPError):
            get(open_pool(live, wire.port, tls=tls), timeout=30.0)
        asker.join()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_abort_wakes_a_thread_that_reads_a_body(live: LiveSockets, open_pool: Open, tls: bool) -> None:
    with Wire([answer(b"half", content_length=8), HOLD], tls=tls) as wire, interrupted(live) as ready:
        response = get(open_pool(live, wire.port, tls=tls), timeout=30.0)
        assert response.read1(4) == b"half"
        ready.set()
        with pytest.raises(ProtocolError):
            response.read1(4)


def test_no_connection_is_made_after_abort(live: LiveSockets, open_pool: Open) -> None:
    live.abort()
    with Wire() as wire, pytest.raises(NewConnectionError):
        get(open_pool(live, wire.port))
    assert not wire.requests


def test_a_kept_connection_is_not_used_after_abort(live: LiveSockets, open_pool: Open) -> None:
    with Wire(answer(b"x"), always=answer(b"y")) as wire:
        pool = open_pool(live, wire.port)
        assert body_of(get(pool)) == b"x"
        live.abort()
        with pytest.raises(HTTPError):
            get(pool)
        assert len(wire.requests) == 1


def test_a_tls_connection_whose_stand_in_comes_too_late_is_closed(
    live: LiveSockets, open_pool: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = live.add, []

    def abort_after_the_first(sock: socket.socket) -> None:
        add(sock)
        calls.append(sock)
        live.abort()

    monkeypatch.setattr(live, "add", abort_after_the_first)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(NewConnectionError):
            get(open_pool(live, silent.getsockname()[1], tls=True))
        assert [sock.fileno() for sock in calls] == [-1]


# -- what is encrypted


class Encrypted:
    """Both ends of a TLS connection: ``sock`` is ours, and of what the other ``said``, the test sends what it likes."""

    def __init__(self, folder: Path) -> None:
        trust = str(write_certificate(folder))
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(trust)
        client = ssl.create_default_context(cafile=trust)
        self._heard, self._said = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._server = server.wrap_bio(self._heard, self._said, server_side=True)
        plain, self.far = socket.socketpair()
        self.sock = client.wrap_socket(plain, server_hostname="127.0.0.1", do_handshake_on_connect=False)
        self.sock.settimeout(5.0)
        shaking = threading.Thread(target=self.sock.do_handshake)
        shaking.start()
        while True:
            try:
                self._server.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.far.sendall(self._said.read())
                self._heard.write(self.far.recv(65536))
        self.far.sendall(self._said.read())
        shaking.join()

    def record(self, data: bytes) -> bytes:
        """What carries these bytes."""
        self._server.write(data)
        return self._said.read()

    def close(self) -> None:
        self.sock.close()
        self.far.close()


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Encrypted]:
    with contextlib.closing(Encrypted(tmp_path)) as both:
        yield both


def test_what_came_in_many_records_is_read_at_one_go(live: LiveSockets, encrypted: Encrypted) -> None:
    reader = Reader(encrypted.sock, live)
    reader.raw.begin_body(may_end=True)
    live.wait_at_most(lambda: 5.0)
    parts = [bytes([number]) * 1000 for number in range(40)]
    encrypted.far.sendall(b"".join(map(encrypted.record, parts)))
    buffer = bytearray(1 << 16)
    assert reader.raw.readinto(buffer) == 40_000
    assert buffer[:40_000] == b"".join(parts)
    assert 0 < (encrypted.sock.gettimeout() or 0) <= 5.0  # it waits again


def test_no_more_records_are_taken_than_there_is_room_for(live: LiveSockets, encrypted: Encrypted) -> None:
    reader = Reader(encrypted.sock, live)
    reader.raw.begin_body(may_end=True)
    encrypted.far.sendall(encrypted.record(b"a" * 1000) + encrypted.record(b"b" * 1000))
    buffer = bytearray(1500)
    assert [reader.raw.readinto(buffer), bytes(buffer)] == [1500, b"a" * 1000 + b"b" * 500]
    assert reader.raw.readinto(buffer) == 500


def test_a_record_of_which_half_has_come_holds_back_nothing(live: LiveSockets, encrypted: Encrypted) -> None:
    reader = Reader(encrypted.sock, live)
    reader.raw.begin_body(may_end=False)
    first, second = encrypted.record(b"a" * 1000), encrypted.record(b"b" * 1000)
    encrypted.far.sendall(first + second[:500])
    buffer = bytearray(1 << 16)
    assert reader.raw.readinto(buffer) == 1000
    encrypted.far.sendall(second[500:])
    assert [reader.raw.readinto(buffer), buffer[:1000]] == [1000, b"b" * 1000]
    encrypted.far.sendall(encrypted.record(b"c"))
    encrypted.far.shutdown(socket.SHUT_WR)
    assert reader.raw.readinto(buffer) == 1
    with pytest.raises(OSError, match=r"cut|EOF"):
        reader.raw.readinto(buffer)


def test_a_bundle_of_certificates_is_read_once_until_it_changes(
    live: LiveSockets, open_pool: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = ssl.SSLContext.load_verify_locations

    def noted(context: ssl.SSLContext, cafile: str, *more: Any) -> None:
        read.append(cafile)
        load(context, cafile, *more)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", noted)
    bundle = write_certificate(tmp_path)
    with Wire(always=[answer(b"x"), END], tls=True) as wire, contextlib.ExitStack() as pools:

        def pool() -> Any:
            made = pool_classes(live)["https"]("127.0.0.1", wire.port, timeout=5.0, ca_certs=str(bundle))
            return pools.enter_context(made)

        for _ in range(3):
            assert body_of(get(pool())) == b"x"
        assert read == [str(bundle)]
        bundle.write_text(bundle.read_text().partition("-----BEGIN CERT")[0])
        with pytest.raises(SSLError):
            get(pool())


# -- connecting


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes every name resolve to these (family, port) pairs of this machine."""

    def resolve_to(*addresses: tuple[int, int]) -> None:
        found = [(family, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for family, port in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    return resolve_to


def test_the_next_address_is_tried_when_one_refuses(
    live: LiveSockets, open_pool: Open, resolved: Callable[..., None]
) -> None:
    with Wire(answer(b"x")) as wire, closed_port() as port:
        resolved((socket.AF_INET, port), (socket.AF_INET, wire.port))
        assert body_of(get(open_pool(live, 80, host="two.example"))) == b"x"


def test_the_next_address_is_tried_when_this_machine_lacks_a_family(
    live: LiveSockets, open_pool: Open, resolved: Callable[..., None]
) -> None:
    with Wire(answer(b"x")) as wire:
        resolved((12345, wire.port), (socket.AF_INET, wire.port))
        assert body_of(get(open_pool(live, 80, host="six.example"))) == b"x"


def test_no_address_at_all_is_no_connection(live: LiveSockets, open_pool: Open, resolved: Callable[..., None]) -> None:
    resolved()
    with pytest.raises(NewConnectionError, match="no address"):
        get(open_pool(live, 80, host="none.example"))


def test_a_refused_connection_says_so(live: LiveSockets, open_pool: Open) -> None:
    with closed_port() as port, pytest.raises(NewConnectionError, match="refused"):
        get(open_pool(live, port))


def test_connecting_ends_with_its_timeout(live: LiveSockets, open_pool: Open) -> None:
    began = time.monotonic()
    with black_hole() as port, pytest.raises(ConnectTimeoutError):
        get(open_pool(live, port), timeout=0.1)
    assert 0.1 <= time.monotonic() - began < 1.0


def test_many_dead_addresses_do_not_outlast_what_is_left(
    live: LiveSockets, open_pool: Open, resolved: Callable[..., None]
) -> None:
    began = time.monotonic()
    live.wait_at_most(lambda: began + 0.2 - time.monotonic())
    with black_hole() as port:
        resolved(*[(socket.AF_INET, port)] * 20)
        with pytest.raises(ConnectTimeoutError):
            get(open_pool(live, 80, host="many.example"), timeout=5.0)
    assert 0.2 <= time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    "failure", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")], ids=repr
)
def test_a_name_that_resolves_to_nothing_is_no_connection(
    live: LiveSockets, open_pool: Open, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(NameResolutionError):
        get(open_pool(live, 80, host="nowhere.example"))


# -- waiting


def test_a_thread_waits_as_long_as_it_said_and_another_as_long_as_it_did(live: LiveSockets) -> None:
    live.wait_at_most(lambda: 3.0)
    seen: list[float] = []
    other = threading.Thread(target=lambda: seen.append(live.left()))
    other.start()
    other.join()
    assert live.left() == 3.0
    assert seen[0] > 1000.0


def test_no_time_left_is_a_timeout(live: LiveSockets) -> None:
    live.wait_at_most(lambda: 0.0)
    with pytest.raises(TimeoutError):
        live.left()


def test_a_wait_longer_than_sockets_take_is_cut(live: LiveSockets) -> None:
    live.wait_at_most(lambda: 1e300)
    with socket.socket() as sock:
        sock.settimeout(live.left())


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda: drip(answer(b"x" * 200), 0.02), id="head"),
        pytest.param(
            lambda: drip(b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + answer(), 0.02), id="dripping interim answers"
        ),
        pytest.param(lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), id="flood of interim answers"),
        pytest.param(lambda: drip(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 20, 0.02), id="early hints"),
        pytest.param(lambda: [chunked(end=b""), *drip(b"5;" + b"x" * 500, 0.02)], id="length of a chunk"),
        pytest.param(lambda: [chunked(end=b"0\r\n"), *drip(b"X-Trailer: " + b"x" * 500, 0.02)], id="trailer"),
        pytest.param(lambda: [answer(content_length=500), *drip(b"x" * 500, 0.02)], id="body"),
    ],
)
def test_a_drip_does_not_outlast_what_is_left(live: LiveSockets, open_pool: Open, script: Callable[[], Any]) -> None:
    began = time.monotonic()
    with Wire(script()) as wire:
        live.wait_at_most(lambda: began + 0.3 - time.monotonic())
        with pytest.raises(ReadTimeoutError):
            body_of(get(open_pool(live, wire.port)))
        assert 0.3 <= time.monotonic() - began < 1.0


class Ticks:
    """A clock that every look at it moves by a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    ("size", "passes"), [(int(2 * SLOWEST) - 1, False), (int(2 * SLOWEST), True)], ids=["too slow", "just fast enough"]
)
def test_a_body_below_the_least_rate_is_given_up(open_pool: Open, size: int, passes: bool) -> None:
    live = LiveSockets(window=2.0, clock=Ticks())  # a read takes a second, so two reads are a window
    begin, end = threading.Event(), threading.Event()
    with Wire([answer(content_length=size), begin, b"x" * (size - 1), end, b"x"]) as wire:
        response = get(open_pool(live, wire.port))
        begin.set()
        assert len(response.read1(size)) == size - 1
        end.set()
        if passes:
            assert body_of(response) == b"x"
        else:
            with pytest.raises(ReadTimeoutError):
                response.read1(1)


def test_a_head_that_takes_its_time_is_no_drip(open_pool: Open) -> None:
    live = LiveSockets(window=0.05)
    with Wire([0.2, answer(b"x")]) as wire:
        assert body_of(get(open_pool(live, wire.port))) == b"x"


# -- what an answer is


@pytest.mark.parametrize("cut", [END, RESET], ids=["end", "reset"])
@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 20", id="in the status"),
        pytest.param(b"HTTP/1.1 200 OK\r\n", id="before the headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 12", id="in a header"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n", id="before the empty line"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\n\r\n", id="after an interim answer"),
    ],
)
def test_a_head_that_is_cut_is_an_error(live: LiveSockets, open_pool: Open, head: bytes, cut: Any) -> None:
    with Wire([head, cut]) as wire, pytest.raises(ProtocolError):
        get(open_pool(live, wire.port))


@pytest.mark.parametrize("end", [b"", b"0", b"000", b"0\r\n", b"00000400", b"5\r\nhell", b"5\r\nhello\r"], ids=repr)
def test_a_chunked_body_that_is_cut_is_an_error(live: LiveSockets, open_pool: Open, end: bytes) -> None:
    with Wire([chunked(b"hello", end=end), END]) as wire:
        response = get(open_pool(live, wire.port))
        with pytest.raises(ProtocolError):
            body_of(response)


def test_a_body_without_a_length_ends_with_its_connection(live: LiveSockets, open_pool: Open) -> None:
    with Wire([answer(b"hello", content_length=None), END]) as wire:
        assert body_of(get(open_pool(live, wire.port))) == b"hello"


@pytest.mark.parametrize(
    "line",
    [b"no header line at all", b"Name : value", b": no name", b"\xff\xfe: x"],
    ids=repr,
)
def test_a_head_with_a_line_that_is_no_header_is_an_error(
    live: LiveSockets, open_pool: Open, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sent = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n%b\r\nETag: x\r\n\r\nhello" % line
    with Wire(sent) as wire, pytest.raises(ProtocolError):
        get(open_pool(live, wire.port))
    assert not caplog.records  # urllib3 would log the URL with what is secret in it


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
    ],
    ids=repr,
)
def test_interim_answers_are_passed_over(live: LiveSockets, open_pool: Open, interim: bytes) -> None:
    with Wire(interim + answer(b"hello")) as wire:
        response = get(open_pool(live, wire.port))
        assert (response.status, body_of(response)) == (200, b"hello")


@pytest.mark.parametrize(
    ("sent", "excess"),
    [
        pytest.param(answer(b"hello"), False, id="as announced"),
        pytest.param(answer(b"hello, world", content_length=5), True, id="more than announced"),
        pytest.param(chunked(b"hello"), False, id="chunked"),
        pytest.param(chunked(b"hello") + b"!", True, id="chunked, and more"),
    ],
)
def test_bytes_beyond_the_end_are_noticed(live: LiveSockets, open_pool: Open, sent: bytes, excess: bool) -> None:
    with Wire(sent) as wire:
        response = get(open_pool(live, wire.port))
        assert body_of(response) == b"hello"
        assert response._original_response.has_excess is excess
        assert response._original_response.isclosed()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_connection_with_bytes_beyond_the_end_is_not_used_again(
    live: LiveSockets, open_pool: Open, tls: bool
) -> None:
    with Wire(answer(b"hello, world", content_length=5), answer(b"right"), tls=tls) as wire:
        pool = open_pool(live, wire.port, tls=tls)
        assert body_of(get(pool)) == b"hello"
        assert body_of(get(pool)) == b"right"
        assert wire.connections == 2


def test_a_change_of_protocol_is_an_error(live: LiveSockets, open_pool: Open) -> None:
    with Wire(answer(status=101, content_length=None) + answer(b"hello")) as wire, pytest.raises(ProtocolError):
        get(open_pool(live, wire.port))


def test_a_connection_is_used_again(live: LiveSockets, open_pool: Open) -> None:
    with Wire(always=answer(b"hello")) as wire:
        pool = open_pool(live, wire.port)
        for _ in range(3):
            assert body_of(get(pool)) == b"hello"
        assert (wire.connections, len(wire.requests)) == (1, 3)


@pytest.mark.parametrize(("rest", "connections"), [(0.0, 1), (30.0, 1), (300.0, 2)])
def test_a_connection_that_a_router_may_have_forgotten_is_not_used_again(
    open_pool: Open, rest: float, connections: int
) -> None:
    now = [0.0]
    with Wire(always=answer(b"hello")) as wire:
        pool = open_pool(LiveSockets(clock=lambda: now[0]), wire.port)
        for _ in range(2):
            assert body_of(get(pool)) == b"hello"
            now[0] += rest
        assert wire.connections == connections


@pytest.mark.parametrize(("seconds", "connections"), [(0.01, 1), (2.0, 2)])
def test_who_waited_in_vain_has_others_make_new_connections(
    live: LiveSockets, open_pool: Open, seconds: float, connections: int
) -> None:
    with Wire([answer(b"hello")], [HOLD], always=answer(b"hello")) as wire:
        at_rest, silent = open_pool(live, wire.port), open_pool(live, wire.port)
        assert body_of(get(at_rest)) == b"hello"
        live.wait_at_most(lambda: seconds)
        with pytest.raises(ReadTimeoutError):
            get(silent)
        live.wait_at_most(lambda: 5.0)
        for _ in range(2):  # the second time over the new one
            assert body_of(get(at_rest)) == b"hello"
        assert wire.connections == 1 + connections


def test_tls_within_tls_is_known_by_the_socket_it_has(live: LiveSockets) -> None:
    """urllib3's stand-in for a socket there has none of a socket's C methods, so that abort could not shut it down."""
    connection = pool_classes(live)["http"].ConnectionCls("127.0.0.1")
    ours, theirs = socket.socketpair()

    class Transport:
        socket = ours

    with ours, theirs:
        connection.sock = Transport()  # type: ignore[assignment]
        with contextlib.suppress(Exception):
            connection.getresponse()  # nothing was asked
        live.abort()
        assert theirs.recv(1) == b""
        connection.sock = None


def test_a_connection_without_a_socket_has_no_answer(live: LiveSockets) -> None:
    connection = pool_classes(live)["http"].ConnectionCls("127.0.0.1")
    with pytest.raises(http.client.ResponseNotReady):
        connection.getresponse()


def read_into(response: Any, place: bytearray, at: int = 0, most: int = 1 << 20) -> int:
    """How far the place is filled once the body is over."""
    while count := response._original_response.readinto1(memoryview(place)[at : at + most]):
        at += count
    response.release_conn()
    return at


def test_a_plain_body_is_read_into_its_place(open_pool: Open, live: LiveSockets) -> None:
    data = bytes(range(256)) * 400
    with Wire([answer(data)]) as wire:
        response, place = get(open_pool(live, wire.port)), bytearray(len(data) + 10)
        assert response._original_response.is_plain
        assert read_into(response, place, most=70_000) == len(data)
        assert place == data + bytes(10)
        assert response._original_response.isclosed()
        assert not response._original_response.has_excess


def test_what_came_is_given_without_waiting_for_more(open_pool: Open, live: LiveSockets) -> None:
    more = threading.Event()
    with Wire([answer(content_length=90_000), b"x" * 1000, more, b"y" * 89_000]) as wire:
        response, place = get(open_pool(live, wire.port)), bytearray(90_000)
        at = 0
        while at < 1000:
            at += response._original_response.readinto1(memoryview(place)[at:])
        more.set()
        assert read_into(response, place, at) == 90_000
        assert place == b"x" * 1000 + b"y" * 89_000


@pytest.fixture
def quick() -> Iterator[LiveSockets]:
    """Those of a client for whom all comes fast, as no time passes."""
    live = LiveSockets(clock=lambda: 0.0)
    yield live
    live.abort()


def wakes_at(sock: Any) -> int:
    """Bytes that there have to be before the kernel tells of them."""
    size: int = socket.socket.getsockopt(sock, socket.SOL_SOCKET, socket.SO_RCVLOWAT)
    return size


def test_of_what_comes_fast_much_is_waited_for(open_pool: Open, quick: LiveSockets) -> None:
    data = random.Random(2).randbytes(3_000_000)
    with Wire([answer(data)], always=[answer(b"short")]) as wire:
        pool = open_pool(quick, wire.port)
        response, place, at, bounds = get(pool), bytearray(len(data)), 0, set()
        sock = response._original_response._incoming._sock
        while count := response._original_response.readinto1(memoryview(place)[at : at + (1 << 20)]):
            at += count
            bounds.add(wakes_at(sock))
        assert place == data
        assert len(bounds) > 1
        assert wakes_at(sock) == 1  # what comes next is a head, and short
        response.release_conn()
        assert get(pool).read() == b"short"
        assert wire.connections == 1


@pytest.mark.parametrize("rest", [1, 1000, 100_000])
def test_what_came_fast_and_no_longer_does_is_given_all_the_same(
    open_pool: Open, quick: LiveSockets, rest: int
) -> None:
    more, size = threading.Event(), 2_000_000
    script = [answer(content_length=size), b"x" * 200_000, more, b"y" * rest, threading.Event(), b"z" * size]
    with Wire(script) as wire:
        response, place, at = get(open_pool(quick, wire.port)), bytearray(size), 0
        answered = response._original_response
        while at < 200_000:
            at += answered.readinto1(memoryview(place)[at:])
        more.set()
        while at < 200_000 + rest:
            at += answered.readinto1(memoryview(place)[at:])
        assert place[:at] == b"x" * 200_000 + b"y" * rest
        assert wakes_at(answered._incoming._sock) == 1
        script[4].set()
        assert read_into(response, place, at) == size


def unread(response: Any, live: LiveSockets, window: int | None) -> int:
    """Bytes that come, until no more do, after some reads of a thread that wants ``window`` of them ahead."""
    with live.interruptible(None, lambda: window):
        for _ in range(4):
            assert response._original_response.readinto1(bytearray(1 << 20))
        sock = response._original_response._incoming._sock
        waiting, before = 0, -1
        while waiting != before:
            time.sleep(0.1)
            before, waiting = waiting, len(sock.recv(1 << 25, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return waiting


@pytest.mark.skipif(sys.platform != "linux", reason="what a bound counts is the kernel's affair")
def test_no_more_bytes_wait_to_be_read_than_a_transfer_wants(open_pool: Open, live: LiveSockets) -> None:
    data = bytes(32 << 20)
    with Wire([answer(data)]) as wire:
        pool, window = open_pool(live, wire.port), 256 * 1024
        with live.interruptible(None, lambda: window):
            bounded = get(pool)
        assert unread(bounded, live, window) <= window
        assert window < unread(bounded, live, 4 * window) <= 4 * window  # raised


def test_a_connection_too_narrow_for_what_comes_next_is_not_used_again(
    open_pool: Open, live: LiveSockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = sockets._resize
    monkeypatch.setattr(sockets, "_resize", lambda sock, size: resize(sock, min(size, 400_000)))
    with Wire(*[[answer(b"x")]] * 4) as wire:
        pool = open_pool(live, wire.port)

        def ask(window: int | None) -> Any:
            with live.interruptible(None, lambda: window):
                return get(pool).read()

        for window in (300_000, 200_000, None, 500_000):
            assert ask(window) == b"x"
    assert [request.connection for request in wire.requests] == [0, 0, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="what a bound counts is the kernel's affair")
@pytest.mark.parametrize("size", [100_000, 100_001])
def test_a_socket_has_as_much_room_as_was_asked_for(live: LiveSockets, size: int) -> None:
    """The kernel doubles what it is told; half a byte less would pass for all that may be had."""
    with socket.socket() as one, socket.socket() as other:
        for sock, window in ((one, size), (other, 2 * size)):
            with live.interruptible(None, lambda window=window: window):  # type: ignore[misc]
                live.fit(sock)
        given = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for sock in (one, other)]
    assert size <= given[0] <= size + 1
    assert 2 * size <= given[1] <= 2 * size + 1


def test_a_socket_that_is_gone_needs_no_room(live: LiveSockets) -> None:
    with socket.socket() as sock:
        pass
    with live.interruptible(None, lambda: 300_000):
        assert live.fit(sock)


def test_bytes_beyond_a_plain_body_are_noticed(open_pool: Open, live: LiveSockets) -> None:
    with Wire([answer(b"x" * 101, content_length=100)]) as wire:
        response = get(open_pool(live, wire.port))
        assert read_into(response, bytearray(200)) == 100
        assert response._original_response.has_excess


def test_a_chunked_body_is_not_plain(open_pool: Open, live: LiveSockets) -> None:
    with Wire([chunked(b"abc")]) as wire:
        response = get(open_pool(live, wire.port))
        assert not response._original_response.is_plain
        assert body_of(response) == b"abc"
