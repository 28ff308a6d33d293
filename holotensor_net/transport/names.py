"""Names of hosts, whose resolver holds nobody up.

``getaddrinfo`` cannot be interrupted, knows no timeout, and takes half a minute where the network has just gone. So a
thread of its own is in it, one for all who ask for a name, and they wait as for everything else: at a socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeAlias

from urllib3.util import wait_for_read

from .sockets import LiveSockets

__all__ = ["look_up"]

_Key: TypeAlias = tuple[int, str, int]
_Found: TypeAlias = Future[list[Any]]

_under_way: dict[_Key, _Found] = {}
"""By process too: a fork takes the entries along, but not the threads that would end them."""


def look_up(host: str, port: int, sockets: LiveSockets, seconds: float) -> list[Any]:
    """The addresses of a host, as ``socket.getaddrinfo`` gives them for a stream.

    Raises what that does; TimeoutError after so many seconds; OSError once the wait is cut, as by ``sockets.abort``.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # no address but a name
        found = _asked(host, port)
    bell, rope = socket.socketpair()
    with bell, rope:  # both: what a resolver that never answers would close is closed all the same
        sockets.add(bell)
        found.add_done_callback(lambda _: rope.close())
        if not wait_for_read(bell, seconds):
            raise TimeoutError("the name was not resolved in time")
    if not found.done():
        raise ConnectionAbortedError("the wait for the resolver was cut")
    return found.result()


def _asked(host: str, port: int) -> _Found:
    """What a thread finds, or fails to."""
    key, mine = (os.getpid(), host, port), _Found()
    try:
        found = _under_way.setdefault(key, mine)
        if found is mine:
            threading.Thread(target=_resolve, args=(key, mine), name=f"resolving {host}", daemon=True).start()
        return found
    except RuntimeError:  # no thread can be started
        _resolve(key, mine)
        return mine
    except BaseException:
        if _under_way.get(key) is mine:  # there may be no thread that would end it
            _end(key, mine, ConnectionAbortedError("the resolver was interrupted"))
        raise


def _resolve(key: _Key, mine: _Found) -> None:
    _, host, port = key
    try:
        _end(key, mine, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except Exception as error:
        _end(key, mine, error)


def _end(key: _Key, mine: _Found, outcome: list[Any] | Exception) -> None:
    _under_way.pop(key, None)
    with contextlib.suppress(InvalidStateError):  # both its thread and who was interrupted may
        if isinstance(outcome, Exception):
            mine.set_exception(outcome)
        else:
            mine.set_result(outcome)
