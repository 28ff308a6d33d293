"""The origin and the proxy of the matrix, in a process of their own: ``python -m hostile.fault_origin``.

Its addresses are printed as a line of JSON; it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from hostile.faults import BY_NAME
from hostile.proxy import FaultProxy
from hostile.scene import SECRETS, Asked, Books, Case
from wire import Answer, Request, Wire, answer, black_hole, closed_port


class FaultOrigin(Wire):
    """Serves the object of each case below ``/a/`` and ``/b/``, its fault at ``/a/`` alone.

    ``other``: the origin that redirects to another lead to; ``books`` are shared with it. ``is_foreign``: no secret
    may come here.
    """

    def __init__(self, books: Books, other: int = 0, *, is_foreign: bool = False, tls: bool = False) -> None:
        self._books = books
        self._other = other
        self._is_foreign = is_foreign
        super().__init__(tls=tls)

    def _serve(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._serve(sock, number)

    def _answer_to(self, request: Request) -> Answer:
        with self._changed:
            self.requests.clear()
        mirror, _, key = request.target.partition("?")[0].lstrip("/").partition("/")
        if mirror == "-":
            return answer(json.dumps(self._books.settle(key)).encode(), content_type="application/json")
        if mirror == "portal":
            return answer(b"<html>Accept our terms", content_type="text/html")
        self._look_for_breaches(request)
        if mirror == "expired":
            return answer(b"", 403)
        try:
            case = Case.of(key)
            fault = BY_NAME[case.fault]
        except (ValueError, KeyError):
            return answer(b"", 404)
        with self._books.lock:
            ledger = self._books.ledgers[key]
            validator = fault.validator
            asked = Asked(request, case, mirror, ledger, validator=validator, port=self._other)
            if not self._is_foreign or mirror == "flipped":
                ledger.requests += 1
                ledger.times.append(time.monotonic())
            is_due = mirror == "a" and not self._is_foreign and (case.lasting or not ledger.hits or fault.everywhere)
            script = fault.strike(asked) if fault.strike and is_due and (asked.covers or fault.everywhere) else None
            if script is not None:
                ledger.hits += 1
                ledger.versions.add(asked.version)
            elif mirror == "back":
                script = answer(b"", 307, location=f"http://127.0.0.1:{self._other}/b/{key}")
            elif mirror == "flipped":
                ledger.hits += 1
                script = asked.reply(asked.body[::-1][:-1] + b"?") if asked.is_satisfiable else asked.good()
            else:
                if mirror == "b" and fault.mirrors > 1 and fault.number == 22:
                    asked.version = 0 if fault.checksum else 1
                    asked.validator = "strong"
                script = asked.good()
        if request.method != "HEAD":
            return script
        first = script if isinstance(script, bytes) else next(act for act in script if isinstance(act, bytes))
        return first.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def _look_for_breaches(self, request: Request) -> None:
        said = request.headers
        found = []
        if "," in said.get("range", ""):
            found.append("several ranges were asked for at once")
        if any(said.get(name, "").startswith("W/") for name in ("if-range", "if-match")):
            found.append("a weak validator was used where only a strong one may be")
        if said.get("if-match", '"').startswith("W/"):
            found.append("a weak validator in If-Match")
        if "canary-netrc" in repr(said):
            found.append("a credential was taken from the netrc")
        if self._is_foreign and any(secret in f"{request.target} {said!r}" for secret in SECRETS):
            found.append("a secret came to another origin")
        if found:
            with self._books.lock:
                self._books.breaches += [f"{request.target}: {breach}" for breach in found]


@dataclass(frozen=True)
class Addresses:
    """Ports on 127.0.0.1."""

    origin: int
    other: int
    proxy: int
    tls: int
    closed: int
    black_hole: int

    def settle(self, fault: str) -> dict[str, dict[str, object]]:
        """What the origin noted of one fault; see Books."""
        opener = build_opener(ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.origin}/-/{fault}", timeout=10) as response:
            told: dict[str, dict[str, object]] = json.load(response)
        return told


@contextlib.contextmanager
def origin_process() -> Iterator[Addresses]:
    """The servers in a process of their own, which ends with the block."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent)))}
    command = [sys.executable, "-m", "hostile.fault_origin"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield Addresses(**json.loads(process.stdout.readline()))
        finally:
            process.terminate()


def main() -> None:
    books = Books()
    with (
        FaultOrigin(books, is_foreign=True) as other,
        FaultOrigin(books, other.port) as origin,
        FaultOrigin(books, other.port, tls=True) as tls,
        FaultProxy(origin.port, books) as proxy,
        closed_port() as closed,
        black_hole() as silent,
    ):
        other._other = origin.port
        addresses = Addresses(origin.port, other.port, proxy.port, tls.port, closed, silent)
        print(json.dumps(addresses.__dict__), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
