"""Names are looked up by threads of their own, and nobody waits for a resolver longer than for a server."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from wire import Resolver

from holotensor_net.transport import names
from holotensor_net.transport.names import look_up
from holotensor_net.transport.sockets import Interrupt, LiveSockets

NAME, LONG = "models.example", 30.0


@pytest.fixture
def live() -> LiveSockets:
    return LiveSockets()


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """Both ends of every pair of sockets."""
    ends: list[socket.socket] = []
    real = socket.socketpair

    def made() -> tuple[socket.socket, socket.socket]:
        ends.extend(pair := real())
        return pair

    monkeypatch.setattr(socket, "socketpair", made)
    return ends


@pytest.fixture(autouse=True)
def _nothing_under_way() -> Iterator[None]:
    yield
    end = time.monotonic() + 5
    while names._under_way and time.monotonic() < end:
        time.sleep(0.001)
    assert not names._under_way


def addresses(found: list[Any]) -> list[Any]:
    return [address for *_, address in found]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_is_no_name(live: LiveSockets, resolver: Resolver, host: str) -> None:
    assert [address[:2] for address in addresses(look_up(host, 80, live, LONG))] == [(host, 80)]
    assert resolver.asked == []


def test_a_name_is_resolved(live: LiveSockets, pairs: list[socket.socket]) -> None:
    assert ("127.0.0.1", 80) in addresses(look_up("localhost", 80, live, LONG))
    assert [end.fileno() for end in pairs] == [-1, -1]


def test_what_is_wrong_with_a_name_is_told_to_all_who_ask(live: LiveSockets, resolver: Resolver) -> None:
    resolver.failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(look_up, NAME, 80, live, LONG) for _ in range(8)]
        assert resolver.is_asked.wait(5)
        resolver.may_answer.set()
        for one in asking:
            with pytest.raises(socket.gaierror, match="not known"):
                one.result(5)


def test_a_name_is_looked_up_once_for_all_who_wait_for_it(live: LiveSockets, resolver: Resolver) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = threading.Barrier(9)

        def ask() -> list[Any]:
            waiting.wait(5)
            return look_up(NAME, 80, live, LONG)

        asking = [pool.submit(ask) for _ in range(8)]
        waiting.wait(5)
        end = time.monotonic() + 5
        while len(live._open) < 8 and time.monotonic() < end:  # each of them waits at a socket
            time.sleep(0.001)
        resolver.may_answer.set()
        assert [addresses(one.result(5)) for one in asking] == [[("127.0.0.1", 80)]] * 8
    assert resolver.asked == [NAME]


def test_it_is_looked_up_again_for_the_next(live: LiveSockets, resolver: Resolver) -> None:
    resolver.may_answer.set()
    for _ in range(3):
        look_up(NAME, 80, live, LONG)
    assert resolver.asked == [NAME] * 3


def test_nobody_waits_longer_than_he_said(live: LiveSockets, resolver: Resolver, pairs: list[socket.socket]) -> None:
    for _ in range(3):  # those who come back find the same thread at it
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="not resolved in time"):
            look_up(NAME, 80, live, 0.05)
        assert 0.05 <= time.monotonic() - began < 5.0
    assert resolver.asked == [NAME]
    assert [end.fileno() for end in pairs] == [-1] * 6
    resolver.may_answer.set()
    assert addresses(look_up(NAME, 80, live, LONG)) == [("127.0.0.1", 80)]


@pytest.mark.parametrize("by", ["abort", "interrupt"])
def test_the_wait_for_a_name_can_be_cut(
    live: LiveSockets, resolver: Resolver, pairs: list[socket.socket], by: str
) -> None:
    interrupt = Interrupt()

    def cut() -> None:
        assert resolver.is_asked.wait(5)
        live.abort() if by == "abort" else interrupt.fire()

    cutting = threading.Thread(target=cut)
    cutting.start()
    began = time.monotonic()
    with live.interruptible(interrupt), pytest.raises(ConnectionAbortedError):
        look_up(NAME, 80, live, LONG)
    assert time.monotonic() - began < 5.0
    cutting.join()
    assert [end.fileno() for end in pairs] == [-1, -1]


def test_where_no_thread_can_be_started_it_is_looked_up_in_place(
    live: LiveSockets, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    resolver.may_answer.set()
    assert addresses(look_up(NAME, 80, live, LONG)) == [("127.0.0.1", 80)]


@pytest.mark.parametrize("when", ["before it runs", "while it runs"])
def test_an_interrupt_as_a_thread_is_started_leaves_nobody_waiting(
    live: LiveSockets, resolver: Resolver, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if when == "while it runs":
            start(thread)
            assert resolver.is_asked.wait(5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            look_up(NAME, 80, live, LONG)
    resolver.may_answer.set()
    assert addresses(look_up(NAME, 80, live, LONG)) == [("127.0.0.1", 80)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_does_not_wait_for_a_thread_of_its_parent(live: LiveSockets, resolver: Resolver) -> None:
    with pytest.raises(TimeoutError):
        look_up(NAME, 80, live, 0.01)
    child = os.fork()
    if not child:
        status = 1
        try:
            resolver.may_answer = threading.Event()
            resolver.may_answer.set()
            status = addresses(look_up(NAME, 80, live, 5.0)) != [("127.0.0.1", 80)]
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    resolver.may_answer.set()
