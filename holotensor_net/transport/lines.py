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
import weakref
from typing import Any

from .adapter import Reply, Request, Way, bare_reply, is_straight, target_of
from .heads import PlainHead, plain_head
from .pools import Pool, begin_to_connect, let_go, pool_classes
from .sockets import Answer, LiveSockets

__all__ = ["BRIEF", "Call", "Lines"]

BRIEF = 1 << 16
"""Bytes of a body that is read together with its head, at most."""

_LONGEST_HEAD = 1 << 14
_MOST_STRIKES = 64
_END = b"\r\n\r\n"
_UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK)


class Call:
    """A request under way over a connection of its own, from one thread, which never waits here.

    ``fd``: what to wait for, until it ``may_send`` or, once all is sent, something has come. ``is_unusual``: it is for
    the ordinary way to read what comes of it.
    """

    __slots__ = ("_came", "_connection", "_head", "_lines", "_sock", "_unsent", "fd", "is_unusual")

    def __init__(self, lines: Lines, connection: Any, head: bytes) -> None:
        self._lines, self._connection, self._head = lines, connection, head
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
                self._lines.fail()

    def receive(self) -> tuple[PlainHead, memoryview] | None:
        """The answer, once all of it has come; None before that, and if it is unusual."""
        try:
            came = self._sock.recv(BRIEF + _LONGEST_HEAD)
        except BlockingIOError:
            return None
        except OSError:
            self.is_unusual = True
            return None
        self._came = data = self._came + came if self._came else came
        head = plain_head(data)
        missing = 1 if head is None else head.size + head.length - len(data)
        if head is not None and not missing and head.size <= _LONGEST_HEAD:
            return head, memoryview(data)[head.size :]
        is_beginning = head is not None or (len(data) < _LONGEST_HEAD and _END not in data)
        self.is_unusual = not came or missing <= 0 or not is_beginning
        return None

    def end(self) -> None:
        """The answer was plain, and has been read: another request may be asked over its connection."""
        self._lines.put(self._connection)

    def reply(self, request: Request) -> Reply | None:
        """The answer as the ordinary way reads it, which waits for it; None if the ``request``, which it is to, has not
        all been sent: it is not, then. Raises what requests does."""
        connection, came = self._connection, self._came
        try:
            if not self._unsent:
                return bare_reply(request, self._lines, lambda: connection.resume(came))
            self._lines.fail()
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def cut(self) -> None:
        """Have it end: whoever waits for it, from any thread, is told at once."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """Ask nothing more over its connection."""
        self._connection.close()


class Lines:
    """The connections of a client's own origin that wait for a request, ``most`` at most. Thread-safe: the list's own
    operations are atomic.

    They go to one address of its host, as long as nothing stands between: no proxy, and no TLS.
    """

    def __init__(self, sockets: LiveSockets, most: int) -> None:
        self._sockets = sockets
        self._most = most
        self._idle: list[Any] = []
        self._is_closed = False
        weakref.finalize(self, _close_all, self._idle).atexit = False
        self._pool_class = pool_classes(sockets)["http"]
        self._address: tuple[Way, Pool, int, Any] | None = None
        self._failures = 0
        self.is_plain = True  # whether answers were, of late
        self._strikes = 0  # that were not, since one was

    def lead(self, way: Way) -> bool:
        """Whether requests that go this way may be asked here."""
        if not self.is_plain or os.name != "posix" or not is_straight(way):
            return False
        known = self._address
        if known is None or known[0] != way:
            self._address = known = self._look_up(way)
        return known is not None

    def _look_up(self, way: Way) -> tuple[Way, Pool, int, Any] | None:
        (_, host, port), *_ = way
        pool: Any = self._pool_class(host or "", port)
        connection = pool._new_conn()
        with contextlib.suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(connection._dns_host, connection.port, type=socket.SOCK_STREAM)
            family, *_, address = found[self._failures % len(found)]
            return way, pool, family, address
        return None

    def fail(self) -> None:
        """Nobody is to be reached there: try another address."""
        self._failures += 1
        self._address = None

    def doubt(self) -> None:
        """An answer was not plain: ask no more, until one of the ordinary way is."""
        self.is_plain = False
        self._strikes += 1

    def trust(self, *, is_proved: bool = False) -> None:
        """An answer of the ordinary way was plain; ``is_proved``: one that came here was. What is plain there and never
        here would be read twice each time."""
        if is_proved:
            self._strikes = 0
        elif self._strikes < _MOST_STRIKES:
            self.is_plain = True

    def call(self, request: Request) -> Call | None:
        """Ask; None if that has to be done the ordinary way. Nothing waits."""
        try:
            connection = self._connection()
        except OSError:
            return None
        if connection is None:
            return None
        head = connection.head_of(target_of(request), request.headers, request.conditions)
        if head is None:
            self.put(connection)
            return None
        call = Call(self, connection, head)
        call.send()
        return call

    def put(self, connection: Any) -> None:
        """Keep a connection for another request."""
        if len(self._idle) >= self._most or connection.sock is None:
            connection.close()
            return
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

    def _connection(self) -> Any:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._new()
            if self._is_usable(connection.sock):
                return connection
            connection.close()

    def _is_usable(self, sock: socket.socket) -> bool:
        """Whether the server has neither closed it nor sent anything that nobody asked for."""
        self._sockets.use(sock)
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._sockets.fit(sock)
        except OSError:
            pass
        return False

    def _new(self) -> Any:
        """A connection that has begun to connect."""
        known = self._address
        if known is None:
            return None
        _, pool, family, address = known
        connection: Any = pool._new_conn()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            failure = begin_to_connect(sock, address, connection, self._sockets)
        except BaseException:
            sock.close()
            raise
        if failure not in _UNDER_WAY:
            sock.close()
            return None
        connection.sock = sock
        return connection


def _close_all(connections: list[Any]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            connections.pop().close()
