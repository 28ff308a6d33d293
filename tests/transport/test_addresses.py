"""The first of a host's addresses that takes a connection has it, however many are silent."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from wire import Wire, black_hole, closed_port

from holotensor_net.transport import addresses as room
from holotensor_net.transport.addresses import connect, in_turn, pass_over
from holotensor_net.transport.sockets import Interrupt, LiveSockets

LONG = 30.0


class Known(LiveSockets):
    """Those of a client, with all that were ever ``begun``; ``is_trying`` once there are two."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[socket.socket] = []
        self.is_trying = threading.Event()

    def add(self, sock: socket.socket) -> None:
        self.begun.append(sock)
        if len(self.begun) == 2:
            self.is_trying.set()
        super().add(sock)

    @property
    def left_open(self) -> list[socket.socket]:
        return [sock for sock in self.begun if sock.fileno() != -1]


@pytest.fixture
def live() -> Known:
    return Known()


@pytest.fixture
def hole() -> Iterator[int]:
    with black_hole() as port:
        yield port


@pytest.fixture
def closed() -> Iterator[int]:
    with closed_port() as port:
        yield port


def at(*ports: int) -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]


def reached(live: Known, *ports: int, seconds: float = LONG) -> int:
    """The port that a connection leads to, which is all that is left open."""
    with connect(at(*ports), (), live, lambda: seconds) as sock:
        assert live.left_open == [sock]
        port: int = sock.getpeername()[1]
        return port


def test_families_take_turns_as_they_were_found(live: Known) -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    found = [(family, 0, 0, "", number) for number, family in enumerate([six, six, six, four, four])]
    assert [address for *_, address in in_turn(found, live)] == [0, 3, 1, 4, 2]
    assert in_turn([], live) == []


def test_who_was_silent_is_tried_last_and_longest_ago_first(live: Known) -> None:
    for address in (1, 0):
        pass_over(address, live)
    found = [(socket.AF_INET, 0, 0, "", number) for number in range(4)]
    assert [address for *_, address in in_turn(found, live)] == [2, 3, 1, 0]


def test_what_is_known_of_addresses_has_a_bound(live: Known) -> None:
    for address in range(10_000):
        pass_over(address, live)
    assert len(live.silent) < 1000


def test_an_address_that_is_silent_is_not_waited_for(live: Known, hole: int) -> None:
    began = time.monotonic()
    with Wire() as wire:
        assert reached(live, hole, wire.port) == wire.port
        assert time.monotonic() - began < LONG / 2
        live.begun.clear()
        assert reached(live, hole, wire.port) == wire.port
        assert len(live.begun) == 1  # it is known by now


def test_who_was_silent_is_reached_where_others_are_not(live: Known, closed: int) -> None:
    with Wire() as wire:
        pass_over(("127.0.0.1", wire.port), live)
        assert reached(live, wire.port, closed) == wire.port
        assert not live.silent


def test_the_next_is_tried_at_once_where_one_fails(live: Known, closed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_DELAY", LONG)
    began = time.monotonic()
    with Wire() as wire:
        assert reached(live, closed, closed, wire.port) == wire.port
    assert time.monotonic() - began < LONG / 2


def test_one_that_is_silent_and_one_that_fails_leave_the_rest(live: Known, hole: int, closed: int) -> None:
    with Wire() as wire:
        assert reached(live, hole, closed, wire.port, closed) == wire.port


def test_the_last_failure_is_told(live: Known, hole: int, closed: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(at(closed, closed), (), live, lambda: LONG)
    with pytest.raises(TimeoutError):
        connect(at(hole, closed), (), live, lambda: 0.5)
    with pytest.raises(OSError, match="no address"):
        connect([], (), live, lambda: LONG)
    assert not live.left_open


def test_what_a_host_said_is_told_rather_than_that_there_is_no_way_to_another(live: Known, closed: int) -> None:
    unknown = (12345, socket.SOCK_STREAM, 0, "", ("::1", closed, 0, 0))
    with pytest.raises(ConnectionRefusedError):
        connect([*at(closed), unknown], (), live, lambda: LONG)
    with pytest.raises(OSError, match="not supported"):
        connect([unknown], (), live, lambda: LONG)


def test_attempts_end_with_the_time_of_the_last(live: Known, hole: int) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connect(at(hole, hole, hole), (), live, lambda: 0.5)
    assert 2 * room._DELAY + 0.5 <= time.monotonic() - began < 5.0
    assert len(live.begun) == 3
    assert not live.left_open


def test_one_that_takes_its_time_is_not_given_up_for_the_next(
    live: Known, hole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_DELAY", 0.01)
    with contextlib.ExitStack() as sockets:
        slow = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        slow.settimeout(10.0)
        sockets.enter_context(socket.create_connection(slow.getsockname()))  # fills its queue

        def accept() -> None:
            assert live.is_trying.wait(10)
            for _ in range(2):
                sockets.enter_context(slow.accept()[0])

        accepting = threading.Thread(target=accept)
        accepting.start()
        port = slow.getsockname()[1]
        try:
            assert reached(live, port, hole) == port  # once its request is sent again, after a second
        finally:
            live.is_trying.set()
            accepting.join()
        assert len(live.begun) == 2


@pytest.mark.parametrize("by", ["abort", "interrupt"])
def test_all_attempts_can_be_cut(live: Known, hole: int, by: str) -> None:
    interrupt, cut_at = Interrupt(), [0.0]

    def cut() -> None:
        assert live.is_trying.wait(10)
        cut_at[0] = time.monotonic()
        live.abort() if by == "abort" else interrupt.fire()

    cutting = threading.Thread(target=cut)
    cutting.start()
    with live.interruptible(interrupt), pytest.raises(ConnectionError):
        connect(at(*[hole] * 200), (), live, lambda: LONG)
    assert time.monotonic() - cut_at[0] < 5.0
    cutting.join()
    assert not live.left_open


def test_what_is_left_bounds_all_attempts(live: Known, hole: int) -> None:
    began = time.monotonic()
    live.wait_at_most(lambda: began + 0.6 - time.monotonic())
    with pytest.raises(TimeoutError):
        connect(at(*[hole] * 200), (), live, live.left)
    assert 0.6 <= time.monotonic() - began < 5.0
    assert not live.left_open


def test_an_interrupted_wait_leaves_nothing_open(live: Known, hole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(under_way: Any, _: float) -> Any:
        if len(under_way) == 2:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(room, "_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connect(at(hole, hole, hole), (), live, lambda: LONG)
    assert not live.left_open
