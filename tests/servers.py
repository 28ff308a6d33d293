"""A real nginx for tests: what it serves, how it is shaped, and what it was asked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import pytest

CONFIGURATION = """\
daemon off;
worker_processes 1;
{user}
pid {work}/nginx.pid;
error_log {work}/error.log notice;
events {{ worker_connections 1024; }}
http {{
    default_type application/octet-stream;
    sendfile on;
    keepalive_timeout 60s;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    log_format probe escape=json '{{"method": "$request_method", "path": "$uri", "status": $status, '
        '"bytes": $body_bytes_sent, "range": "$http_range", "if_match": "$http_if_match", '
        '"connection": $connection, "seconds": $request_time}}';
    access_log {work}/access.log probe;
    limit_rate {limit_rate};
    {http}
    server {{
        listen 127.0.0.1:{port};
        root "{root}";
        {conf}
    }}
    server {{
        listen 127.0.0.1:{control};
        access_log off;
        location / {{ return 204; }}
    }}
}}
"""


def tool(name: str) -> str:
    """The path of a program that a test cannot do without.

    A machine without it skips the test; continuous integration (``CI=true``) fails it, so that none is skipped unseen.
    """
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    return shutil.which(name, path=places) or unavailable(f"{name} is not installed")


def unavailable(reason: str) -> NoReturn:
    """End a test that cannot run here: skipped on a desk, failed in continuous integration."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Access:
    """One request as nginx logged it: ``bytes`` of body that were sent, ``range`` as it was asked ("" for none)."""

    method: str
    path: str
    status: int
    bytes: int
    range: str
    if_match: str
    connection: int
    seconds: float


class Nginx:
    """nginx on a free loopback port, serving the files under ``root``; a context manager.

    ``limit_rate`` caps each connection, in bytes/s. ``conf`` is put into the server block, ``http`` beside it (zones,
    maps). The listening sockets are opened here and inherited by nginx, so that no other process can take the port.
    """

    def __init__(self, root: Path, work: Path, *, limit_rate: int = 0, conf: str = "", http: str = "") -> None:
        self.root = root
        self._log = work / "access.log"
        self._errors = work / "error.log"
        with _listener() as served, _listener() as control:
            self.port: int = served.getsockname()[1]
            self._control: int = control.getsockname()[1]
            settings = CONFIGURATION.format(
                work=work,
                root=root,
                user="user root;" if os.geteuid() == 0 else "",
                port=self.port,
                control=self._control,
                limit_rate=limit_rate,
                conf=conf,
                http=http,
            )
            (work / "nginx.conf").write_text(settings)
            self._process = self._start(work, served.fileno(), control.fileno())
        try:
            self._settle()
        except OSError as error:
            self.close()
            raise RuntimeError(f"nginx did not start:\n{self._errors.read_text()}") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def accesses(self) -> list[Access]:
        """The requests answered so far, in the order in which they ended."""
        if self._process.poll() is None:
            self._settle()
        return [Access(**json.loads(line)) for line in self._log.read_text().splitlines()]

    def await_accesses(self, is_enough: Callable[[list[Access]], bool], timeout: float = 5.0) -> list[Access]:
        """The requests answered, once they satisfy ``is_enough``: those that a client cuts short end later."""
        deadline = time.monotonic() + timeout
        while not is_enough(accesses := self.accesses()):
            assert time.monotonic() < deadline, f"nginx logged only {accesses}"
        return accesses

    def close(self) -> None:
        """Stop at once, cutting what is being sent. The log can still be read."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def _start(self, work: Path, *inherited: int) -> subprocess.Popen[bytes]:
        with self._errors.open("ab") as complaints:
            return subprocess.Popen(
                [tool("nginx"), "-p", str(work), "-c", str(work / "nginx.conf")],
                pass_fds=inherited,
                env={"NGINX": "".join(f"{number};" for number in inherited)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
            )

    def _settle(self) -> None:
        """Wait until nginx has logged what it has sent.

        Its one worker takes events in turn, and a request is logged in the turn that sends its last byte: once a
        request on the other port is answered, everything before it is in the log.
        """
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(f"http://127.0.0.1:{self._control}/", timeout=10).close()

    def __enter__(self) -> Nginx:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listener() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=511)
    listener.setblocking(False)  # nginx takes an inherited socket as it is, and must never wait in accept()
    return listener
