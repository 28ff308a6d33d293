"""Connections of a client: made, kept in urllib3's pools, and asked again without many words.

Each is known to its client's ``LiveSockets`` from the moment that it begins to connect.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import logging
import math
import os
import queue
import socket
import ssl
import threading
from collections.abc import Mapping
from typing import Any

from urllib3 import connectionpool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import (
    ClosedPoolError,
    ConnectTimeoutError,
    NameResolutionError,
    NewConnectionError,
)
from urllib3.util.ssl_ import create_urllib3_context, resolve_cert_reqs

from ..errors import without_query
from .addresses import connect
from .heads import plain_request
from .names import look_up
from .sockets import LONGEST, Answer, LiveSockets, Reader

__all__ = ["Pool", "let_go", "pool_classes"]

_CLOSED_MEANWHILE = contextlib.suppress(BrokenPipeError, ConnectionResetError)  # there may be an answer all the same
_FULL = contextlib.suppress(BlockingIOError)


class _Here(threading.local):
    """Whether this thread is about a request of ours."""

    is_asking = False


class _Discretion(logging.Filter):
    """Has urllib3 leave the queries out of what it logs of our requests: they may be signatures."""

    here = _Here()

    def filter(self, record: logging.LogRecord) -> bool:
        if self.here.is_asking and isinstance(record.args, tuple):
            record.args = tuple(without_query(said) if isinstance(said, str) else said for said in record.args)
        return True


_DISCRETION = _Discretion()


class _Stack:
    """What urllib3 keeps a pool's connections in: a list, whose own operations are atomic, and which nobody waits for.
    A queue of Python's takes two locks and ten times as long."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: list[Any] = []

    def get(self, block: bool = False, timeout: float | None = None) -> Any:
        try:
            return self._items.pop()
        except IndexError:
            raise queue.Empty from None

    def put(self, item: Any, block: bool = False, timeout: float | None = None) -> None:
        if len(self._items) >= self._most:
            raise queue.Full
        self._items.append(item)

    def qsize(self) -> int:
        return len(self._items)


class Pool(connectionpool.HTTPConnectionPool):
    """A pool whose requests are logged without their queries, and which can ask again without many words."""

    QueueCls = _Stack  # type: ignore[assignment]

    def urlopen(self, *args: Any, **kwargs: Any) -> Any:
        here = _DISCRETION.here
        here.is_asking = True
        try:
            return super().urlopen(*args, **kwargs)
        finally:
            here.is_asking = False

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.rest()
        super()._put_conn(conn)

    def again(self, target: str, headers: Mapping[str, str], conditions: Mapping[str, str]) -> Answer | None:
        """The answer to a GET, over a connection that an earlier one has left; None if there is none.

        ``headers`` are those that it has in common with the last, and ``conditions`` its own. It is to be given to
        :meth:`take_back`. Raises what http.client does.
        """
        try:
            connection: Any = self._get_conn()
        except ClosedPoolError:
            return None
        try:
            if connection.is_closed:
                return None
            self._validate_conn(connection)
            answer: Answer = connection.ask(target, headers, conditions)
        except BaseException:
            connection.close()
            raise
        else:
            connection = None
            return answer
        finally:
            if connection is not None:
                self._put_conn(connection)

    def take_back(self, answer: Answer) -> None:
        """Use the connection of an answer again, if that was read to its end."""
        connection = let_go(answer)
        if connection is not None:
            self._put_conn(connection)


def let_go(answer: Answer) -> Any:
    """The connection of an answer, if there is one still: open only if that was read to its end."""
    connection, answer.connection = answer.connection, None
    if not answer.isclosed():
        answer.close()
        if connection is not None:
            connection.close()
    if connection is not None:
        connection.take_back(answer.left)
    return connection


def pool_classes(sockets: LiveSockets) -> dict[str, type[connectionpool.HTTPConnectionPool]]:
    """urllib3's pools by scheme, with connections whose sockets ``sockets`` knows and bounds."""

    class Connection(HTTPConnection):
        _answer: Answer | None = None
        _left: Reader | None = None
        _rests_since = math.inf

        def response_class(self, sock: Any, *args: Any, **kwargs: Any) -> Answer:  # type: ignore[override]
            self._answer = Answer(Reader(sock, sockets), *args, **kwargs)
            return self._answer

        def _new_conn(self) -> socket.socket:
            return _connect(self, sockets)

        @property
        def is_connected(self) -> bool:
            """Whether it may be used again: open and trusted, with a receive buffer as large as is wanted now."""
            return self.is_trusted and super().is_connected and sockets.fit(self.sock)

        @property
        def is_trusted(self) -> bool:
            """Whether what is sent over it may be answered, though it has been at rest."""
            return sockets.is_trusted(self._rests_since)

        def rest(self) -> None:
            """Nobody uses it, from now on."""
            self._rests_since = sockets.clock()

        def ask(self, target: str, headers: Mapping[str, str], conditions: Mapping[str, str]) -> Answer:
            """The answer to a GET over this connection, which is open."""
            sockets.use(self.sock)
            sockets.bound(self.sock)
            head = self.head_of(target, headers, conditions)
            answer = self._asked(head) if head else self._asked_at_length(target, {**headers, **conditions})
            answer.connection = self
            return answer

        def head_of(self, target: str, headers: Mapping[str, str], conditions: Mapping[str, str]) -> bytes | None:
            """The head of a GET over this connection; None if anything in it is unusual."""
            host = f"[{self.host}]" if ":" in self.host else self.host
            host = host if self.port == self.default_port else f"{host}:{self.port}"
            return plain_request(target, host, headers, conditions)

        def resume(self, came: bytes) -> Answer:
            """The answer to a GET that was sent over this connection, of which so much has been read."""
            sockets.use(self.sock)
            sockets.bound(self.sock)
            reader = self._reader()
            reader.raw.put_back(came)
            answer = self._begun(reader)
            answer.connection = self
            return answer

        def _asked(self, head: bytes) -> Answer:
            with _CLOSED_MEANWHILE:
                self._send_at_once(head)
            return self._begun(self._reader())

        def _begun(self, reader: Reader) -> Answer:
            answer = Answer(reader, method="GET")
            try:
                if not answer.begin_plainly():
                    answer.begin()
                    if answer.will_close:
                        self.close()
            except BaseException:
                answer.close()
                raise
            return answer

        def _send_at_once(self, head: bytes) -> None:
            """``send``, in one system call where that will do: a socket with a timeout asks first whether it may."""
            sent = 0
            if type(self.sock) is socket.socket and os.name == "posix" and self.sock.gettimeout():
                with _FULL:
                    sent = os.write(self.sock.fileno(), head)
            if sent < len(head):
                self.send(head[sent:])

        def _asked_at_length(self, target: str, headers: Mapping[str, str]) -> Answer:
            names = {name.lower() for name in headers}
            with _CLOSED_MEANWHILE:
                self.putrequest(
                    "GET", target, skip_host="host" in names, skip_accept_encoding="accept-encoding" in names
                )
                for name, value in headers.items():
                    self.putheader(name, value)
                self.endheaders()
            try:
                return http.client.HTTPConnection.getresponse(self)  # type: ignore[return-value]
            finally:
                self._answer = None

        def _reader(self) -> Reader:
            reader, self._left = self._left, None
            if reader is None or not reader.raw.is_of(self.sock):
                return Reader(self.sock, sockets)
            reader.raw.begin_head()
            return reader

        def take_back(self, reader: Reader | None) -> None:
            """What was left of an answer over this connection is for the next."""
            if reader is not None and self.sock is not None and reader.raw.is_of(self.sock):
                self._left = reader
            elif reader is not None:
                reader.close()

        def close(self) -> None:
            reader, self._left = self._left, None
            super().close()
            if reader is not None:
                reader.close()

        def getresponse(self) -> Any:
            if self.sock is not None:
                sockets.add(self.sock)
            try:
                return super().getresponse()
            except BaseException:
                if self._answer is not None:
                    self._answer.close()  # urllib3 forgets it if it cannot wrap it, and its socket would stay open
                raise
            finally:
                self._answer = None

    class SecureConnection(Connection, HTTPSConnection):
        def connect(self) -> None:
            if self.proxy is None and self.ca_certs:
                self._share_trust(self.ca_certs)
            # The handshake runs on a socket that nobody knows yet: until it is over, a duplicate stands for it.
            with contextlib.ExitStack() as self._handshake:
                super().connect()

        def _share_trust(self, bundle: str) -> None:
            """Trust what others do who trust a bundle, without reading it again."""
            with contextlib.suppress(OSError):  # urllib3 meets it again, and tells of it
                if resolve_cert_reqs(self.cert_reqs) is ssl.CERT_REQUIRED:
                    self.ssl_context = _trusting(bundle, os.stat(bundle).st_mtime_ns)
                    self.ca_certs = None

        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            try:
                sockets.add(self._handshake.enter_context(sock.dup()))
            except OSError as error:
                sock.close()
                raise NewConnectionError(self, f"no connection: {error}") from error
            return sock

    class PlainPool(Pool):
        ConnectionCls = Connection

    class SecurePool(Pool, connectionpool.HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    connectionpool.log.addFilter(_DISCRETION)

    return {"http": PlainPool, "https": SecurePool}


@functools.lru_cache(8)
def _trusting(bundle: str, changed: int) -> ssl.SSLContext:
    """What trusts the certificates of a bundle, as it was when it ``changed``. To read one takes longer than to connect
    (measured, the usual one: 20 to 70 ms), and urllib3 does so for each connection."""
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
    context.load_verify_locations(bundle)
    return context


def _connect(connection: HTTPConnection, sockets: LiveSockets) -> socket.socket:
    """A connected socket, known to ``sockets`` since it began to connect; raises what urllib3's own would."""
    patience = functools.partial(_patience, connection, sockets)
    try:
        found = look_up(connection._dns_host, connection.port, sockets, patience())
        return connect(found, connection.socket_options or (), sockets, patience)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, UnicodeError):
            error = socket.gaierror(str(error))
        raise NameResolutionError(connection.host, connection, error) from error
    except TimeoutError as error:
        raise ConnectTimeoutError(connection, f"no connection within {connection.timeout} s") from error
    except OSError as error:
        raise NewConnectionError(connection, f"no connection: {error}") from error


def _patience(connection: HTTPConnection, sockets: LiveSockets) -> float:
    """Seconds that each step towards a connection may take."""
    return min(float(connection.timeout or LONGEST), sockets.left())
