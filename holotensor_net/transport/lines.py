"""Lines: connections to one origin over which many requests are asked at once, by one thread that waits for all.

A thread for each short range spends most of its time on taking turns with the others. Here a request is sent and its
thread goes on; whenever bytes have come, they are looked at. Only what is plain to the last byte is read here: whatever
is not, or takes long, is taken over, as it stands, by the ordinary way (``Call.reply``), with all of its guards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import weakref
from typing import Any, TypeAlias

from .adapter import Reply, Request, Way, bare_reply, is_straight, target_of
from .addresses import begin_to_connect, in_turn, pass_over
from .heads import PlainHead, plain_head
from .names import look_up
from .pools import Pool, let_go, pool_classes
from .sockets import Answer, LiveSockets

__all__ = ["BRIEF", "Call", "Lines"]

BRIEF = 1 << 16
"""Bytes of a body that is read together with its head, at most."""

_HEAD = 1 << 11  # bytes that a head mostly has at most
_LONGEST_HEAD = 1 << 14
_MOST_STRIKES = 64
_SOON = 0.5  # seconds for which a thread that has others' requests under way waits for a name
_END = b"\r\n\r\n"

Address: TypeAlias = tuple[Way, Pool, int, Any]
"""Where requests of a way are asked: a pool that makes its connections, the family of an address, and that."""


class Call:
    """A request under way over a connection of its own, from one thread, which never waits here.

    ``fd``: what to wait for, until it ``may_send`` or, once all is sent, something has come. ``is_unusual``: it is for
    the ordinary way to read what comes of it.
    """

    __slots__ = ("_address", "_came", "_connection", "_lines", "_most", "_sock", "_unsent", "fd", "is_unusual")

    def __init__(self, lines: Lines, connection: Any, address: Address | None, head: bytes, length: int) -> None:
        self._lines, self._connection, self._address = lines, connection, address
        self._most = min(length, BRIEF) + _HEAD  # room for more would cost half as much again as to receive it
        self._sock: socket.socket = connection.sock
        self._unsent, self._came = head, b""
        self.fd = self._sock.fileno()
        self.is_unusual = False

    @property
    def may_send(self) -> bool:
        """Whether there is something left to send."""
        return bool(self._unsent)

    def send(self) -> None:
        """Send what can be sent now."""
        try:
            self._unsent = self._unsent[os.write(self.fd, self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # it still connects
                self.is_unusual = True

    def receive(self) -> tuple[PlainHead, memoryview] | None:
        """The answer, once all of it has come; None before that, and if it is unusual."""
        try:
            came = self._sock.recv(self._most)
        except BlockingIOError:
            return None
        except OSError:
            self.is_unusual = True
            return None
        self._came = data = self._came + came if self._came else came
        head = plain_head(data)
        if head is None:
            self.is_unusual = not came or len(data) >= _LONGEST_HEAD or _END in data
            return None
        missing = head.size + head.length - len(data)
        if not missing and head.size <= _LONGEST_HEAD:
            return head, memoryview(data)[head.size :]
        self.is_unusual = not came or missing <= 0 or head.length > BRIEF
        return None

    def end(self) -> None:
        """The answer was plain, and has been read: another request may be asked over its connection."""
        if (connection := self._given_up()) is not None:
            self._lines.put(connection)

    def reply(self, request: Request) -> Reply | None:
        """The answer as the ordinary way reads it, which waits for it; None if the ``request``, which it is to, has not
        all been sent: it is not, then. Raises what requests does."""
        if self._unsent:
            self._lines.fail(self._address)
            self.drop()
            return None
        connection = self._given_up()
        try:
            return bare_reply(request, self._lines, lambda: connection.resume(self._came))
        except BaseException:
            connection.close()
            raise

    def cut(self) -> None:
        """Have it end: whoever waits for it, from any thread, is told at once."""
        with self._lines.lock, contextlib.suppress(OSError):
            if self._connection is not None:
                self._sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Ask nothing more over its connection, unless that is somebody else's by now."""
        if (connection := self._given_up()) is not None:
            connection.close()

    def _given_up(self) -> Any:
        """The connection, which is not ours any more: whoever cuts this cuts nobody else."""
        with self._lines.lock:
            connection, self._connection = self._connection, None
        return connection


class Lines:
    """The connections of a client's own origin that wait for a request, ``most`` at most. Thread-safe: the list's own
    operations are atomic, and ``lock`` guards whose a connection is.

    They go to one address of its host, as long as nothing stands between: no proxy, and no TLS.
    """

    def __init__(self, sockets: LiveSockets, most: int) -> None:
        self._sockets = sockets
        self._most = most
        self._idle: list[Any] = []
        self._is_closed = False
        weakref.finalize(self, _close_all, self._idle).atexit = False
        self._pool_class = pool_classes(sockets)["http"]
        self.lock = threading.Lock()
        self._address: Address | None = None
        self.is_plain = True  # whether answers were, of late
        self._strikes = 0  # how often that ended, since one was that came here

    def lead(self, way: Way) -> bool:
        """Whether requests that go this way may be asked here."""
        if not self.is_plain or os.name != "posix" or not is_straight(way):
            return False
        known = self._address
        if known is None or known[0] != way:
            self._address = known = self._look_up(way)
        return known is not None

    def _look_up(self, way: Way) -> Address | None:
        (_, host, port), *_ = way
        pool: Any = self._pool_class(host or "", port)
        connection = pool._new_conn()
        with contextlib.suppress(OSError, UnicodeError):
            found = look_up(connection._dns_host, connection.port, self._sockets, _SOON)
            family, *_, address = in_turn(found, self._sockets)[0]
            return way, pool, family, address
        return None

    def fail(self, tried: Address | None) -> None:
        """Nobody is to be reached at an address that was tried: try another, unless that is done already."""
        with self.lock:
            if tried is not None and tried is self._address:
                pass_over(tried[3], self._sockets)
                self._address = None

    def doubt(self) -> None:
        """An answer was not plain: ask no more, until one of the ordinary way is."""
        with self.lock:
            self._strikes += self.is_plain
            self.is_plain = False

    def trust(self) -> None:
        """An answer of the ordinary way was plain. What is plain there and never here would be read twice each time:
        that is tried only so often."""
        if not self.is_plain and self._strikes < _MOST_STRIKES:
            self.is_plain = True

    def call(self, request: Request, length: int) -> Call | None:
        """Ask for so many bytes; None if that has to be done the ordinary way. Nothing waits."""
        address = None
        connection = self._waiting()
        if connection is None:
            address = self._address
            connection = None if address is None else self._new(address)
        if connection is None:
            return None
        head = connection.head_of(target_of(request), request.headers, request.conditions)
        if head is None:
            self.put(connection)
            return None
        call = Call(self, connection, address, head, length)
        call.send()
        return call

    def prove(self) -> None:
        """An answer that came here was plain."""
        self._strikes = 0

    def put(self, connection: Any) -> None:
        """Keep a connection for another request."""
        if len(self._idle) >= self._most or connection.sock is None:
            connection.close()
            return
        connection.rest()
        self._idle.append(connection)
        if self._is_closed:
            _close_all(self._idle)

    def take_back(self, answer: Answer) -> None:
        """Use the connection of an answer again, if that was read to its end."""
        connection = let_go(answer)
        if connection is not None and connection.sock is not None:
            connection.sock.settimeout(0.0)
            self.put(connection)

    def close(self) -> None:
        """Close those that wait, and those that will."""
        self._is_closed = True
        _close_all(self._idle)

    def _waiting(self) -> Any:
        """A connection that waits for a request, if there is one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.is_trusted and self._is_usable(connection.sock):
                return connection
            connection.close()

    def _is_usable(self, sock: socket.socket) -> bool:
        """Whether the server has neither closed it nor sent anything that nobody asked for."""
        try:
            self._sockets.use(sock)
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._sockets.fit(sock)
        except OSError:  # also once the client is closed
            pass
        return False

    def _new(self, known: Address) -> Any:
        """A connection that has begun to connect; None if it cannot."""
        _, pool, family, address = known
        connection: Any = pool._new_conn()
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            return None
        try:
            failure = begin_to_connect(sock, address, connection.socket_options or (), self._sockets)
        except OSError as error:
            failure = error.errno or errno.EIO
        except BaseException:
            sock.close()
            raise
        if failure:
            sock.close()
            self.fail(known)
            return None
        connection.sock = sock
        return connection


def _close_all(connections: list[Any]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            connections.pop().close()
