"""A proxy that does to answers what networks do: delay, drip, stall, reset, swallow, cut, corrupt.

It takes the whole of an answer from the origin behind it, and hands on what its case's fault makes of the bytes, head
and body alike.
"""

from __future__ import annotations

import socket

from hostile.faults import BY_NAME
from hostile.scene import Asked, Books, Case
from wire import Answer, Request, Wire


class FaultProxy(Wire):
    """Stands before the origin at ``port``."""

    def __init__(self, port: int, books: Books) -> None:
        self._port = port
        self._books = books
        super().__init__()

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._serve(sock, number)

    def _answer_to(self, request: Request) -> Answer:
        self.requests.clear()
        said = self._ask(request)
        key = request.target.partition("?")[0].lstrip("/").partition("/")[2]
        case = Case.of(key)
        fault = BY_NAME[case.fault]
        with self._books.lock:
            ledger = self._books.ledgers[key]
            asked = Asked(request, case, "a", ledger, validator=fault.validator, port=0)
            if fault.bend is None or not asked.covers or (ledger.hits and not case.lasting):
                return said
            ledger.hits += 1
            at = {"start": 0, "middle": asked.random.randrange(len(said)), "end": len(said) - 1}[case.place]
            return fault.bend(said, at, asked)

    def _ask(self, request: Request) -> bytes:
        """The origin's answer, as it came."""
        lines = [f"{request.method} {request.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items() if name != "connection"]
        text = "\r\n".join([*lines, "", ""]).encode("latin-1")
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as sock:
            sock.sendall(text)
            sock.shutdown(socket.SHUT_WR)  # the origin ends the connection once it has answered
            received = b""
            while block := sock.recv(65536):
                received += block
        return received
