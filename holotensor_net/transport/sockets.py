"""Connections that another thread can interrupt, at any moment of their lives, and that no server can hold for ever.

A thread that connects, waits for an answer or reads a body sits in the kernel; closing the response from outside
waits for it (seen: 4.7 s). Shutting its socket down wakes it at once. So every socket is known here from the moment
that it begins to connect.

A timeout is an operation's own: a server that sends a byte now and then begins a new one each time. So every wait for
bytes is bounded anew, and what comes slower than anyone would wait for counts as nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import re
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from urllib3.exceptions import HeaderParsingError
from urllib3.util import wait_for_read
from urllib3.util.response import assert_header_parsing

from .heads import by_name, plain_head

__all__ = ["LONGEST", "SLOWEST", "Answer", "Interrupt", "LiveSockets", "Reader"]

SLOWEST = 128.0
"""Bytes/s. What comes slower than this, over a whole window, is a drip."""

LONGEST = 1e6
"""Seconds that a socket waits, at most; beyond some 1e9, settimeout raises OverflowError."""

_LONGEST_LINE = 1 << 16
_AHEAD = 1 << 15  # bytes read with a head at once: a short body comes along
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")  # RFC 9112 §7.1
_HARDLY = 0.05  # seconds
_MUCH = 1 << 19  # bytes that are waited for where they come fast
_SOON = 0.005  # seconds in which they then do
_SILENCE = 0.5  # seconds without a byte that make other connections doubtful, at least
_LONGEST_REST = 60.0  # seconds after which a router may have forgotten a connection
_WIDE = 8 << 20  # bytes of a receive buffer, enough for any path
_ACCOUNTED = 2 if sys.platform == "linux" else 1  # socket(7): SO_RCVBUF is doubled, for the kernel's own bookkeeping


class _Own(threading.local):
    """What belongs to one thread."""

    seconds: Callable[[], float] = staticmethod(lambda: LONGEST)
    window: Callable[[], int | None] | None = None
    interrupt: Interrupt | None = None


class Interrupt:
    """Ends one transfer from another thread, whatever it waits for: ``fired`` is set, and its connections are cut.

    Its lock guards the sockets.
    """

    def __init__(self) -> None:
        self.fired = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def fire(self) -> None:
        """End the transfer; idempotent, and without effect on what its thread does after it."""
        self.fired.set()
        with self._lock:  # shutting down waits for nobody; a socket that was let go of may be another transfer's
            for sock in self._sockets:
                _shut_down(sock)

    def add(self, sock: socket.socket) -> None:
        """Take ``sock`` along. Raises OSError once fired."""
        with self._lock:
            self._sockets.add(sock)
        if self.fired.is_set():
            raise ConnectionAbortedError("the transfer was interrupted")

    def let_go(self) -> None:
        """The transfer has ended: its connections are not its own any more."""
        with self._lock:
            self._sockets.clear()


class _Interruptible:
    """What ``interruptible`` gives: a class, as it is entered for every short range."""

    __slots__ = ("_interrupt", "_own", "_window")

    def __init__(self, own: _Own, interrupt: Interrupt | None, window: Callable[[], int | None] | None) -> None:
        self._own, self._interrupt, self._window = own, interrupt, window

    def __enter__(self) -> None:
        self._own.interrupt, self._own.window = self._interrupt, self._window

    def __exit__(self, *_: object) -> None:
        self._own.interrupt = self._own.window = None
        if self._interrupt is not None:
            self._interrupt.let_go()


class LiveSockets:
    """The sockets of one client, and how long each of its threads waits for bytes. Its lock guards the set.

    ``window``: seconds of waiting over which the rate of an answer is taken. ``silent``: when addresses were
    found to be, which are tried after others for that.
    """

    def __init__(self, window: float = 30.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.window = window
        self.clock = clock
        self.silent: dict[Any, float] = {}
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._buffers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # of sockets that have a bound
        self._widest = _WIDE  # that may be asked for, as far as is known
        self._aborted = False
        self._doubted_at = -math.inf
        self._own = _Own()

    def add(self, sock: socket.socket) -> None:
        """Know ``sock``. Raises OSError after ``abort``."""
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("the client is closed")
            self._open.add(sock)
        if self._own.interrupt is not None:
            self._own.interrupt.add(sock)

    def use(self, sock: socket.socket) -> None:
        """:meth:`add`, for one that is known already."""
        if self._aborted:
            raise ConnectionAbortedError("the client is closed")
        if self._own.interrupt is not None:
            self._own.interrupt.add(sock)

    def interruptible(
        self, interrupt: Interrupt | None, window: Callable[[], int | None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Let ``interrupt`` cut what this thread opens or uses within the block, and ``window`` say, before each read,
        how many bytes may come ahead of it; None for as many as the kernel likes."""
        return _Interruptible(self._own, interrupt, window)

    def wait_at_most(self, seconds: Callable[[], float]) -> None:
        """Bound every wait of this thread from now on; ``seconds`` is asked before each."""
        self._own.seconds = seconds

    def left(self) -> float:
        """Seconds that this thread may wait for its next bytes. Raises TimeoutError if there are none."""
        seconds = min(self._own.seconds(), LONGEST)
        if seconds <= 0:
            raise TimeoutError("no time is left")
        return seconds

    def bound(self, sock: Any) -> None:
        """Let nothing that this thread does with ``sock`` wait longer than :meth:`left`. A change is a system call, so
        one that hardly shortens the wait is left out."""
        seconds, bound = self.left(), sock.gettimeout()
        if bound is None or not seconds <= bound <= seconds + _HARDLY:
            sock.settimeout(seconds)

    def fit(self, sock: Any) -> bool:
        """Have the kernel take as many bytes ahead of this thread's reads as its transfer wants; False if it may not.

        The kernel sizes a buffer as it sees fit, up to many megabytes, until it is told a size, and then never again.
        So none is bounded that would have to be larger than may be asked for.
        """
        window = self._own.window() if self._own.window is not None else None
        if window is None and not self._buffers:
            return True
        with self._lock:
            has, widest = self._buffers.get(sock), self._widest
        if has is None and (window is None or window > widest):
            return True
        wanted = min(_WIDE, window or _WIDE)
        if has is None or not wanted <= has <= 1.25 * wanted:
            has = _resize(sock, wanted)
            with self._lock:
                self._buffers[sock] = has
                self._widest = min(widest, has) if has < wanted else widest
        return has >= wanted

    def doubt(self, seconds: float) -> None:
        """A thread has waited so long for bytes, in vain: what is at rest now may lead nowhere, too."""
        if seconds >= _SILENCE:
            self._doubted_at = self.clock()

    def is_trusted(self, since: float) -> bool:
        """Whether a connection that has been at rest since then may be used. Where a router has forgotten it, or this
        machine has another address now, nobody says so: what is sent over it is not answered."""
        return self._doubted_at < since and self.clock() < since + _LONGEST_REST

    def abort(self) -> None:
        """Wake every thread that waits on one of the sockets, now; no new ones are made."""
        with self._lock:
            self._aborted = True
            sockets = list(self._open)
        for sock in sockets:
            _shut_down(sock)


def _resize(sock: Any, size: int) -> int:
    """Bound what waits in the kernel to be read to ``size`` bytes; gives the bound that it has now."""
    plain = getattr(sock, "socket", sock)
    with contextlib.suppress(OSError):
        socket.socket.setsockopt(plain, socket.SOL_SOCKET, socket.SO_RCVBUF, -(-size // _ACCOUNTED))
        return socket.socket.getsockopt(plain, socket.SOL_SOCKET, socket.SO_RCVBUF)
    return size  # it is gone, and nobody will read from it


def _shut_down(sock: Any) -> None:
    plain = getattr(sock, "socket", sock)  # TLS within TLS is no socket and has one
    with contextlib.suppress(OSError):
        # The plain socket's method: a TLS socket's own would drop its TLS state under the reading thread.
        socket.socket.shutdown(plain, socket.SHUT_RDWR)


def _records(sock: ssl.SSLSocket, buffer: memoryview) -> int:
    """Have what has come fill the buffer; gives the number of bytes.

    What is encrypted comes in records of at most 16 KiB, and a read takes one of them: all that is done for a read
    takes longer than to decipher it (measured: 4.5 s/GB of processor, and 1.7 where those that are here are taken
    together).
    """
    count, timeout = 0, sock.gettimeout()
    sock.settimeout(0.0)
    try:
        while count < len(buffer) and (came := sock.recv_into(buffer[count:])):
            count += came
    except ssl.SSLWantReadError:  # there is no whole one
        pass
    finally:
        sock.settimeout(timeout)
    return count


class _Incoming(io.RawIOBase):
    """What a socket receives: every wait bounded, drips refused, and an end only where one may be.

    http.client takes a head or a chunk's length that was cut short for a complete one (seen: a chunk of 0400 bytes,
    cut after its first digit, ended the body).
    """

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, sockets: LiveSockets) -> None:
        self._sock = sock
        self._raw = raw
        self._sockets = sockets
        self._bytes, self._seconds = 0, 0.0
        self._in_body = False
        self._may_end = False
        self._is_over = False
        self._last = 0.0  # when bytes of the body came
        self._wakes_at = 1
        self._is_fast = self._may_be_fast = False
        self._encrypted = sock if isinstance(sock, ssl.SSLSocket) else None
        self._put_back = b""

    def put_back(self, came: bytes) -> None:
        """Let these bytes, which were received already, be read first."""
        self._put_back = came

    def begin_head(self) -> None:
        """Another answer comes."""
        self._bytes, self._seconds = 0, 0.0
        self._in_body = self._may_end = self._is_over = False

    def is_of(self, sock: Any) -> bool:
        """Whether it is this socket that is read."""
        return self._sock is sock

    def begin_body(self, *, may_end: bool) -> None:
        """The head has been read. ``may_end``: the end of the connection is not an error by itself."""
        self._in_body = True
        self._may_end = may_end
        self._last = self._sockets.clock()
        self._may_be_fast = self._encrypted is not None or type(self._sock) is socket.socket

    def leave(self) -> None:
        """Take no more from the socket: what may be read is what has come already."""
        self._is_over = True
        self._is_fast = self._may_be_fast = False
        self._wake_at(1)

    def cut(self) -> None:
        """Let nobody use the connection again."""
        _shut_down(self._sock)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if came := self._put_back:
            count = min(len(came), len(buffer))
            buffer[:count], self._put_back = came[:count], came[count:]
            return count
        if self._is_over:
            return 0
        sockets = self._sockets
        began = sockets.clock() if self._in_body else 0.0
        sockets.bound(self._sock)
        sockets.fit(self._sock)
        self._gather(len(buffer))
        try:
            count = self._sock.recv_into(buffer)
        except TimeoutError:
            sockets.doubt(self._sock.gettimeout() or 0.0)
            raise
        if self._encrypted is not None and 0 < count < len(buffer):
            count += _records(self._encrypted, memoryview(buffer)[count:])
        if not count and not self._may_end:
            raise ConnectionResetError("the connection was cut in the middle of the answer")
        if self._in_body:
            self._note(count, began)
        return count

    def _gather(self, room: int) -> None:
        """Where bytes come fast, have more than a packet of them come before this thread is woken: to wake it, and all
        that is done for each read, takes longer than to receive a packet (measured, from loopback: 0.18 s/GB of
        processor, and 0.09 where half a mebibyte is waited for).

        Once that was in vain it is not done again in the same body.
        """
        has_more = self._encrypted is not None and self._encrypted.pending() > 0
        if not (self._is_fast and room > _AHEAD) or has_more:
            self._wake_at(1)
            return
        self._wake_at(min(room, _MUCH))
        if self._wakes_at > 1 and not wait_for_read(self._sock, _SOON):
            self._is_fast, self._may_be_fast = False, False
            self._wake_at(1)

    def _wake_at(self, size: int) -> None:
        """Have the kernel tell of bytes when there are so many."""
        if size != self._wakes_at:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
                self._wakes_at = size
            except (OSError, AttributeError):  # not every system has it
                self._is_fast = self._may_be_fast = False

    def _note(self, count: int, began: float) -> None:
        now = self._sockets.clock()
        self._is_fast = self._may_be_fast and count * _SOON >= _MUCH * (now - self._last)
        self._last = now
        self._bytes += count
        self._seconds += now - began
        if self._seconds >= self._sockets.window:
            if self._bytes < SLOWEST * self._seconds:
                raise TimeoutError("the bytes come too slowly")
            self._bytes, self._seconds = 0, 0.0

    def close(self) -> None:
        self._raw.close()
        super().close()


class Reader(io.BufferedReader):
    """A connection's bytes, a head and a short body at one go. Those that follow each other read through the same."""

    raw: _Incoming

    def __init__(self, sock: Any, sockets: LiveSockets) -> None:
        super().__init__(_Incoming(sock, sock.makefile("rb", buffering=0), sockets), _AHEAD)

    def makefile(self, mode: str) -> Reader:
        """What http.client asks of a socket."""
        return self


class Answer(http.client.HTTPResponse):
    """An answer that is read through ``_Incoming``, and refused where its head cannot be trusted.

    ``said`` are its headers, names in lower case. ``has_excess``: the server sent bytes beyond its end. They would be
    taken for the next answer, so there is none. ``connection`` is the one that it came over; where there is one, the
    reader is ``left`` at the end for the next answer. ``was_plain``: there was nothing to think about in its head.
    """

    said: Mapping[str, str] = MappingProxyType({})
    has_excess = False
    was_plain = False
    connection: Any = None
    left: Reader | None = None
    _is_direct = False

    def __init__(self, reader: Reader, *args: Any, **kwargs: Any) -> None:
        super().__init__(reader, *args, **kwargs)  # type: ignore[arg-type]
        self._incoming = reader.raw

    @property
    def is_plain(self) -> bool:
        """Whether the body is so many bytes, as they are."""
        return not self.chunked and self.length is not None

    def read_ahead(self) -> bytes | None:
        """All that is to come of a plain body, if it is short and is here already; else None, and nothing is read."""
        length = self.length
        if not length or length > _AHEAD or self.fp is None or len(self.fp.peek()) < length:
            return None
        block = self.fp.read(length)
        self._counted(length)
        return block

    def readinto1(self, buffer: Any) -> int:
        """Have the socket write what has come of a plain body into the buffer; gives the number of bytes, 0 at the
        end, of the body or of the connection."""
        if self.fp is None:
            return 0
        assert self.length is not None
        room = memoryview(buffer)[: self.length]
        if self._is_direct:
            count = self.fp.readinto1(room)
            self._is_direct = len(room) >= _AHEAD
        else:  # what was read ahead is given alone: with room for more, Python would wait for more
            held = len(self.fp.peek())
            count = self.fp.readinto1(room[:held])
            self._is_direct = count == held
        return self._counted(count)

    def _counted(self, count: int) -> int:
        """So many bytes have come of a plain body."""
        assert self.length is not None
        self.length -= count
        if not count or not self.length:
            self._close_conn()
        return count

    def read1(self, n: int = -1) -> bytes:
        self._is_direct = False
        block = super().read1(n)
        if self.fp is not None and self.length == 0 and not self.chunked:  # Python waits for one call more
            self._close_conn()
        return block

    def begin_plainly(self) -> bool:
        """:meth:`begin`, in a tenth of the time, for a head in which there is nothing to think about; False if that has
        to be asked of http.client. For who reads ``said`` alone: there is no ``msg``."""
        head = plain_head(self.fp.peek())
        if head is None:
            return False
        self.fp.read(head.size)
        self.status, self.said, self.length = head.status, head.said, head.length
        self.version, self.chunked, self.will_close, self.was_plain = 11, False, False, True
        self._incoming.begin_body(may_end=True)
        return True

    def begin(self) -> None:
        super().begin()
        if self.status == 101:
            raise http.client.HTTPException("a change of protocol that nobody asked for")
        self._incoming.begin_body(may_end=not self.chunked)
        try:
            assert_header_parsing(self.msg)  # Python drops every header behind a line that is none
        except HeaderParsingError:
            raise http.client.HTTPException("a header line that is none") from None
        self.said = by_name(self.msg.items())
        if any("\n" in value for value in self.said.values()):  # urllib3 would unfold it (RFC 9112 §5.2)
            raise http.client.HTTPException("a header in several lines")

    def _read_status(self) -> tuple[str, int, str]:
        status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        while 102 <= status[1] < 200:  # any number of them may come before the answer (RFC 9110 §15.2)
            http.client.parse_headers(self.fp)
            status = super()._read_status()  # type: ignore[misc]
        return status

    def _read_next_chunk_size(self) -> int:
        """The size of a chunk in bytes; ValueError, which ends the body, for what is none.

        Python's own takes '-5', after which it reads more than it is asked for, '+5', '0x5' and '5_0'.
        """
        size = _CHUNK_SIZE.fullmatch(self.fp.readline(_LONGEST_LINE))
        if size is None:
            self._close_conn()
            raise ValueError("malformed chunk size")
        return int(size[1], 16)

    def _close_conn(self) -> None:
        self._incoming.leave()
        if self.fp.peek():
            self.has_excess = True
            self._incoming.cut()
        elif self.connection is not None and self.length == 0:
            self.left, self.fp = self.fp, None  # type: ignore[assignment]
            return
        super()._close_conn()  # type: ignore[misc]
