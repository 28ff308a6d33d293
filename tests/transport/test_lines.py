"""Lines: many requests under way over connections that one thread looks at."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from wire import HOLD, Wire, answer, part

from holotensor_net.transport import lines as room
from holotensor_net.transport.adapter import Request, is_straight, way_of
from holotensor_net.transport.client import Ask, HttpClient
from holotensor_net.transport.lines import BRIEF, Call, Lines
from holotensor_net.transport.sockets import LiveSockets
from holotensor_net.values import RangeRequest

DATA = bytes(range(200))
CONDITIONS = {"Range": "bytes=0-99", "Accept-Encoding": "identity"}
PLAIN = part(DATA, 0, 100, etag='"v1"')


@pytest.fixture
def lines() -> Iterator[Lines]:
    sockets = LiveSockets(5.0)
    made = Lines(sockets, 8)
    yield made
    made.close()
    sockets.abort()


def request(url: str) -> Request:
    return Request("GET", f"{url}/file", {}, CONDITIONS)


def call(lines: Lines, url: str) -> Call:
    assert lines.lead(way_of(url, True, {}))
    begun = lines.call(request(url), 100)
    assert begun is not None
    return begun


def wait_for(begun: Call) -> None:
    """Return once something is there, all having been sent."""
    while begun.may_send:
        assert select.select([], [begun.fd], [], 5)[1]
        begun.send()
        assert not begun.is_unusual
    assert select.select([begun.fd], [], [], 5)[0]


def received(begun: Call) -> Any:
    while True:
        wait_for(begun)
        came = begun.receive()
        if came is not None or begun.is_unusual:
            return came


def test_a_plain_answer_is_read_and_its_connection_used_again(lines: Lines) -> None:
    with Wire(always=PLAIN) as wire:
        for _ in range(3):
            begun = call(lines, wire.url)
            head, body = received(begun)
            assert (head.status, bytes(body)) == (206, DATA[:100])
            begun.end()
        assert wire.connections == 1


def test_a_connection_that_may_lead_nowhere_is_not_used_again(lines: Lines) -> None:
    with Wire(always=PLAIN) as wire:
        for _ in range(2):
            begun = call(lines, wire.url)
            assert received(begun) is not None
            begun.end()
            lines._sockets.doubt(2.0)
        assert wire.connections == 2


def test_who_is_cut_when_it_is_over_cuts_nobody_else(lines: Lines) -> None:
    is_cut = threading.Event()
    with Wire(PLAIN, [is_cut, PLAIN]) as wire:
        first = call(lines, wire.url)
        assert received(first) is not None
        first.end()
        second = call(lines, wire.url)
        assert second.fd == first.fd
        first.cut()
        first.drop()
        is_cut.set()
        assert received(second) is not None
        second.drop()


def test_who_is_cut_is_told(lines: Lines) -> None:
    with Wire(always=[HOLD]) as wire:
        begun = call(lines, wire.url)
        while begun.may_send:
            begun.send()
        begun.cut()
        assert received(begun) is None
        begun.drop()


def test_a_long_answer_is_not_gathered(lines: Lines) -> None:
    long = answer(bytes(50 * BRIEF))
    with Wire(always=[long[: BRIEF // 2], HOLD]) as wire:  # so that only its beginning is there
        begun = call(lines, wire.url)
        assert received(begun) is None
        begun.drop()


def test_no_connection_is_forgotten_as_the_client_is_closed(lines: Lines) -> None:
    with Wire(always=PLAIN) as wire:
        begun = [call(lines, wire.url) for _ in range(3)]
        for one in begun:
            assert received(one) is not None
            one.end()
        lines._sockets.abort()  # what closing begins with
        assert lines.call(request(wire.url), 100) is None
        wire.await_closed()
        assert [one._sock.fileno() for one in begun] == [-1] * 3


def two_addresses(monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    """A host has an address at which nobody is, and one that is right."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", closed)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", good)),
    ]
    monkeypatch.setattr(room.socket, "getaddrinfo", lambda *_, **__: found)


def test_another_address_is_tried_however_many_failed_at_the_first(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wire(always=PLAIN) as wire:
        two_addresses(monkeypatch, wire.port)
        assert lines.lead(way_of(wire.url, True, {}))
        begun = [lines.call(request(wire.url), 100) for _ in range(4)]  # an even number of failures
        for one in begun:
            if one is not None:
                while one.may_send and not one.is_unusual:
                    one.send()
                assert one.reply(request(wire.url)) is None
        second = call(lines, wire.url)
        assert received(second) is not None
        second.end()


def test_what_is_never_plain_here_is_given_up(lines: Lines) -> None:
    for _ in range(1000):
        lines.doubt()  # a thousand were on the way when it began
    lines.trust()
    assert lines.is_plain
    for _ in range(100):
        lines.doubt()
        lines.trust()
    assert not lines.is_plain


def test_what_is_plain_now_and_then_is_not(lines: Lines) -> None:
    for _ in range(1000):
        lines.doubt()
        lines.trust()
        lines.prove()
    assert lines.is_plain


def test_who_watches_is_shown_every_request(caplog: pytest.LogCaptureFixture) -> None:
    way = way_of("http://127.0.0.1:9", True, {})
    assert is_straight(way)
    with caplog.at_level(logging.DEBUG, "urllib3"):
        assert not is_straight(way)


def test_what_fails_between_two_hands_leaves_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with Wire(always=[HOLD]) as wire, HttpClient(wire.url) as client:
        [begun] = client.begin_all([Ask("file", RangeRequest(0, 100))])
        assert begun is not None
        monkeypatch.setattr(client, "_session", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            client.transfer(begun.state.ask, lambda *_: lambda *_: None, begun=begun)
        wire.await_closed()  # while what has begun is still held here
        assert begun.is_taken
