"""A host's addresses, and a connection to the first that takes one: Happy Eyeballs (RFC 8305 §4 and §5).

On many a network the routes of one family lead nowhere. Tried one after the other, an address that is silent costs a
whole timeout; here, a quarter of a second, and nothing once it is known.
"""

from __future__ import annotations

import collections
import errno
import itertools
import math
import os
import selectors
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from urllib3.util import wait_for_write

from .sockets import LiveSockets

__all__ = ["Options", "begin_to_connect", "connect", "in_turn", "pass_over"]

_DELAY = 0.25  # seconds for which an address may be silent until the next is tried as well (RFC 8305 §5)
_MOST_SILENT = 256  # addresses that are remembered
_UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)

_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)  # takes no file

Options: TypeAlias = Iterable[tuple[Any, ...]]
"""Arguments of ``setsockopt``."""


def in_turn(found: Sequence[Any], sockets: LiveSockets) -> list[Any]:
    """Addresses as ``socket.getaddrinfo`` gives them, families in turn; last those that were silent, of late at
    the very end."""
    if len(found) < 2:
        return list(found)
    families: dict[int, list[Any]] = {}
    for one in found:
        families.setdefault(one[0], []).append(one)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*families.values()))
    return sorted((one for one in turns if one is not None), key=lambda one: sockets.silent.get(one[-1], -math.inf))


def connect(
    found: Sequence[Any], options: Options, sockets: LiveSockets, patience: Callable[[], float]
) -> socket.socket:
    """A connection to the first of these addresses that takes one; each attempt is known to ``sockets``.

    ``patience`` gives the seconds for which an attempt that begins now is waited for, and those before it. Raises the
    OSError of the one that failed last, if any could begin; TimeoutError where some were silent to the end.
    """
    failure, is_sent, seconds, until = OSError("the name has no address"), False, 0.0, 0.0
    left, under_way = collections.deque(in_turn(found, sockets)), dict[socket.socket, Any]()
    try:
        while left or under_way:
            if left:
                one = left.popleft()
                try:
                    seconds = patience()
                    under_way[_begun(one, options, sockets)] = one[-1]
                except OSError as error:  # also where this machine has no such family, or no route to it
                    failure = failure if is_sent else error
                    continue
                is_sent = True
                until = sockets.clock() + seconds
            wait = max(0.0, until - sockets.clock())
            ready = _ready(under_way, min(wait, _DELAY) if left else wait)
            for sock in ready:
                address, number = under_way.pop(sock), sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not number:
                    sock.settimeout(seconds)
                    sockets.silent.pop(address, None)
                    for passed in under_way.values():
                        pass_over(passed, sockets)
                    return sock
                sock.close()
                failure = OSError(number, os.strerror(number))
            if not (ready or left):
                raise TimeoutError("timed out")
    finally:
        for sock in under_way:
            sock.close()
    raise failure


def pass_over(address: Any, sockets: LiveSockets) -> None:
    """Try others before an address, from now on."""
    if len(sockets.silent) >= _MOST_SILENT:
        sockets.silent.clear()
    sockets.silent[address] = sockets.clock()


def _begun(one: Any, options: Options, sockets: LiveSockets) -> socket.socket:
    """A socket that connects to an address."""
    family, kind, protocol, _, address = one
    sock = socket.socket(family, kind, protocol)
    try:
        number = begin_to_connect(sock, address, options, sockets)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


def _ready(under_way: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Those that are connected, or have failed to be, once there is one, or after so many seconds."""
    first, *more = under_way
    if not more:
        return [first] if wait_for_write(first, seconds) else []
    with _Selector() as selector:
        for sock in (first, *more):
            selector.register(sock, selectors.EVENT_WRITE)
        return [key.fileobj for key, _ in selector.select(seconds) if isinstance(key.fileobj, socket.socket)]


def begin_to_connect(sock: socket.socket, address: Any, options: Options, sockets: LiveSockets) -> int:
    """Have a socket connect, without a wait, and be known to ``sockets``; gives the number of an error, 0 while there
    is none."""
    for option in options:
        sock.setsockopt(*option)
    sock.setblocking(False)
    number = sock.connect_ex(address)
    sockets.add(sock)  # under way already: a shutdown before that would be forgotten by connecting
    return 0 if number in _UNDER_WAY else number
