"""A web server that sends exactly what a test scripts: the answers, cuts and silences that no real server would give.

An answer is bytes; or acts in turn: bytes to send, an Event to wait for, seconds to pause, an ``Act``; or a function
that gives such an answer to the request. Requests are answered in the order in which they come, over however many
connections.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

# For 127.0.0.1, from 2000 to 2199; it vouches for itself and for nothing else.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeeIVlNxgXBvO29DD
SGEvvEe13vFYr7LUMHdHY5/QJvihRANCAAQOI4u/nOqSLOZITwbpRGsWmWuVsHyU
6vjV1KOJIsSvCqCx4RQY3mNlhD4MoGt55zCgnj77oillJ+z30J7izDj7
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBajCCARCgAwIBAgIBATAKBggqhkjOPQQDAjATMREwDwYDVQQDDAhsb29wYmFj
azAgFw0wMDAxMDEwMDAwMDBaGA8yMTk5MTIzMTIzNTk1OVowEzERMA8GA1UEAwwI
bG9vcGJhY2swWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQOI4u/nOqSLOZITwbp
RGsWmWuVsHyU6vjV1KOJIsSvCqCx4RQY3mNlhD4MoGt55zCgnj77oillJ+z30J7i
zDj7o1MwUTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAPBgNVHREE
CDAGhwR/AAABMB0GA1UdDgQWBBRmc3IlCuqF5TD9fvedu6ByChwhUTAKBggqhkjO
PQQDAgNIADBFAiA4PD9p/4QSf/DiSZXEfDJiqtgQyL5orHhc61Xv+3rRQAIhAOrN
bf44M1/8Rb2VntomB5pr2uBXYZV3fVrIDbKS9oXp
-----END CERTIFICATE-----
"""


class Act(enum.Enum):
    """What a server may do besides sending."""

    END = "close the connection in good order"
    RESET = "cut the connection, as a crash or a firewall would"
    HOLD = "say nothing more until the client leaves"
    TLS = "talk TLS from here on, as behind a CONNECT"
    URGENT = "send a byte out of band, as TCP's urgent data"


END, RESET, HOLD, TLS, URGENT = Act


@dataclass(frozen=True)
class Request:
    """One request as it came; header names in lower case; ``connection`` counts from 0."""

    connection: int
    method: str
    target: str
    headers: dict[str, str]


Script: TypeAlias = bytes | Iterable[bytes | float | threading.Event | Act]
Answer: TypeAlias = Script | Callable[[Request], Script]


def answer(body: bytes = b"", status: int = 200, **headers: object) -> bytes:
    """A whole answer. Headers with ``_`` for ``-``; None leaves one out; Content-Length fits unless it is given."""
    named = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    lines = [
        f"{name.title()}: {value}"
        for name, value in ({"content-length": len(body)} | named).items()
        if value is not None
    ]
    return "\r\n".join([f"HTTP/1.1 {status} As Scripted", *lines, "", ""]).encode("latin-1") + body


def part(data: bytes, start: int, stop: int, **headers: object) -> bytes:
    """A 206 with bytes ``start`` up to ``stop`` of ``data``."""
    own = {"content_range": f"bytes {start}-{stop - 1}/{len(data)}"}
    return answer(data[start:stop], 206, **(own | headers))


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A body in the chunked coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n", status: int = 200, **headers: object) -> bytes:
    """A whole answer in the chunked coding."""
    own = {"content_length": None, "transfer_encoding": "chunked"}
    return answer(b"", status, **(own | headers)) + chunks(*pieces, end=end)


def drip(data: bytes, every: float) -> Iterator[bytes | float]:
    """One byte after another, with pauses."""
    for index in range(len(data)):
        yield data[index : index + 1]
        yield every


class Wire:
    """Listens on a free loopback port until the ``with`` block ends; leaves no thread.

    ``always`` answers what comes after ``answers``; without it, a request too many fails the test. ``tls``: speak it
    from the first byte; clients trust ``ca``.
    """

    def __init__(self, *answers: Answer, always: Answer | None = None, tls: bool = False) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self._answers = itertools.chain(answers, itertools.repeat(always) if always is not None else ())
        self._unscripted: list[Request] = []
        self._tls = tls
        self._changed = threading.Condition()  # guards all that is above, and what is below
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def targets(self) -> list[str]:
        return [request.target for request in self.requests]

    def await_requests(self, count: int) -> list[Request]:
        """The requests that came, once there are ``count``."""
        self._await(lambda: len(self.requests) >= count)
        return self.requests

    def await_closed(self) -> None:
        """Return once the client has closed every connection."""
        self._await(lambda: self.open == 0)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError), socket.socket() as caller:
            caller.connect(("127.0.0.1", self.port))  # wakes accept()
        with self._changed:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            assert not self._unscripted, f"requests that no answer was scripted for: {self._unscripted}"

    def _await(self, is_so: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(is_so, timeout=5), f"{self.open} connections open, asked: {self.requests}"

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"wire-{self.port}")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with self._changed:
                if self._closed.is_set():
                    sock.close()
                    return
                number = self.connections
                self.connections += 1
                self.open += 1
                self._sockets.add(sock)
            self._start(self._serve, sock, number)

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            with contextlib.suppress(OSError):
                if self._tls:
                    sock = self._secured(sock)
                while (request := self._next_request(sock, number)) is not None:
                    script = self._answer_to(request)
                    for act in [script] if isinstance(script, bytes) else script:
                        if act is TLS:
                            sock = self._secured(sock)
                        elif not self._perform(act, sock):
                            return
        finally:
            sock.close()
            with self._changed:
                self.open -= 1
                self._sockets.discard(sock)
                self._changed.notify_all()

    def _perform(self, act: bytes | float | threading.Event | Act, sock: socket.socket) -> bool:
        """Do it; False if the connection is over."""
        if isinstance(act, bytes):
            sock.sendall(act)
        elif isinstance(act, threading.Event):
            while not act.wait(0.01) and not self._closed.is_set():
                pass
        elif isinstance(act, float):
            self._closed.wait(act)
        elif act is URGENT:
            sock.send(b"!", socket.MSG_OOB)
        elif act is HOLD:
            while sock.recv(4096):
                pass
        elif act is RESET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return (act is URGENT or not isinstance(act, Act)) and not self._closed.is_set()

    def _secured(self, sock: socket.socket) -> socket.socket:
        secured = _server_context().wrap_socket(sock, server_side=True)
        with self._changed:
            self._sockets.discard(sock)
            self._sockets.add(secured)
        return secured

    def _next_request(self, sock: socket.socket, number: int) -> Request | None:
        text = b""
        while not text.endswith(b"\r\n\r\n"):
            received = sock.recv(65536)
            if not received:
                return None
            text += received
        first, *lines = text.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        request = Request(number, method, target, headers)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return request

    def _answer_to(self, request: Request) -> Script:
        with self._changed:
            scripted = next(self._answers, None)
            if scripted is None:
                self._unscripted.append(request)
                return [RESET]
        return scripted(request) if callable(scripted) else scripted


@functools.cache
def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(write_certificate(Path(folder)))
    return context


def write_certificate(folder: Path) -> Path:
    """A CA bundle that trusts every ``Wire(tls=True)``."""
    path = folder / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port where connecting never ends: its queue of connections is full, and nobody accepts."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        address = listener.getsockname()
        for _ in range(8):
            sock = sockets.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address[1]


class Resolver:
    """Stands for ``socket.getaddrinfo``: it knows no name before ``may_answer``, and what addresses are at once.

    Any name leads to this machine then; or ``failure`` is raised, if there is one.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.asked: list[str] = []
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self._real = socket.getaddrinfo

    def __call__(self, host: str, port: int, *kind: Any, flags: int = 0, **more: Any) -> list[Any]:
        try:
            return self._real(host, port, *kind, flags=flags | socket.AI_NUMERICHOST, **more)
        except socket.gaierror:
            if flags & socket.AI_NUMERICHOST:
                raise
        self.asked.append(host)
        self.is_asked.set()
        assert self.may_answer.wait(30)
        if self.failure is not None:
            raise self.failure
        return self._real("127.0.0.1", port, *kind, **more)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
