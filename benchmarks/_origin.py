"""What is fetched, and who serves it: files that can be checked, behind nginx or the embedded origin.

The server runs in a process of its own. nginx is taken where it is installed; the embedded origin is Python, and
slower, so every table says which it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holotensor_net.origin import Behaviour, OriginProcess

MIB = 1 << 20
COMMIT = "0" * 40  # what the Hub calls a version; its client wants one
HUB = "hub/owner/model/resolve/main"

CONFIGURATION = """\
daemon off;
worker_processes 1;
{user}
pid {work}/nginx.pid;
error_log {work}/error.log crit;
events {{ worker_connections 2048; }}
http {{
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 60s;
    keepalive_requests 1000000;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    log_format short "$status $body_bytes_sent $connection";
    access_log {work}/access.log short;
    limit_rate {cap};
    {zone}
    server {{
        listen {host}:{port} backlog=511;
        {secure}
        root "{root}";
        {refuse}
        location /hub/owner/model/resolve/main/ {{
            alias "{root}/";
            add_header X-Repo-Commit {commit};
        }}
        location = /-/ready {{ limit_rate 0; access_log off; return 204; }}
    }}
}}
"""


@dataclass
class Served:
    """Where the files are, and what was asked so far. ``server``: its name, for the table. ``secure``: where they are
    over TLS, for who trusts the certificates in ``trust``."""

    url: str
    server: str
    log: Path | None = None
    secure: str | None = None
    trust: Path | None = None

    def asked(self) -> Counter[int]:
        """Requests by the status that they were answered with, since the last time."""
        if self.log is None:
            return Counter()
        time.sleep(0.05)  # a request is logged when its last byte has been sent
        statuses = Counter(int(line.split()[0]) for line in self.log.read_text().splitlines())
        os.truncate(self.log, 0)
        return statuses


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory where the system has one; the disk's speed is not what is measured."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        yield Path(name)


def write_object(path: Path, size: int) -> None:
    """Bytes that do not repeat: noise of a mebibyte, with its number in front of each."""
    noise = bytearray(os.urandom(min(size, MIB)))
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            noise[:8] = start.to_bytes(8, "little")
            file.write(noise[: size - start])


def is_object(data: memoryview, start: int = 0) -> bool:
    """Whether these are the bytes that :func:`write_object` wrote, from ``start`` on; looks at each mebibyte's number.
    ``start`` is a multiple of a mebibyte."""
    return all(
        data[at : at + 8] == (start + at).to_bytes(8, "little")[: len(data) - at] for at in range(0, len(data), MIB)
    )


@contextlib.contextmanager
def served(
    root: Path, *, cap: int = 0, most: int | None = None, latency: float = 0.0, namespace: str = "", host: str = ""
) -> Iterator[Served]:
    """The files below ``root``, in a process of its own.

    ``cap``: bytes/s that each connection is given; ``most``: connections at once, above which it answers 429;
    ``latency``: seconds before each answer, which only the embedded origin has. ``namespace``: the network namespace
    to run nginx in, at address ``host``.
    """
    if shutil.which("nginx") is None or latency:
        kind = Behaviour(rate_per_connection=cap or None, max_connections=most, refusal=429, latency=latency)
        with OriginProcess(root, behaviour=kind) as process:
            yield Served(process.url, "the embedded origin")
        return
    with tempfile.TemporaryDirectory() as name, _nginx(root, Path(name), cap, most, namespace, host) as one:
        yield one


@contextlib.contextmanager
def _nginx(root: Path, work: Path, cap: int, most: int | None, namespace: str, host: str) -> Iterator[Served]:
    host, port, secure_port = host or "127.0.0.1", _free_port(), _free_port()
    trust = _certificate(work, host)
    settings = CONFIGURATION.format(
        work=work,
        secure=f"listen {host}:{secure_port} ssl; ssl_certificate {trust}; ssl_certificate_key {trust};"
        if trust
        else "",
        root=root,
        user="user root;" if os.geteuid() == 0 else "",
        host=host,
        port=port,
        cap=cap,
        commit=COMMIT,
        zone="limit_conn_zone $server_port zone=all:1m;" if most else "",
        refuse=f"limit_conn all {most}; limit_conn_status 429;" if most else "",
    )
    (work / "nginx.conf").write_text(settings)
    enter = ["ip", "netns", "exec", namespace] if namespace else []
    process = subprocess.Popen([*enter, "nginx", "-p", str(work), "-c", str(work / "nginx.conf")])
    try:
        _await(f"http://{host}:{port}/-/ready", process)
        secure = f"https://{host}:{secure_port}" if trust else None
        yield Served(f"http://{host}:{port}", "nginx", work / "access.log", secure, trust)
    finally:
        process.terminate()
        process.wait()


def _certificate(work: Path, host: str) -> Path | None:
    """One that the host has for a day, with its key; None without openssl."""
    if shutil.which("openssl") is None:
        return None
    made = work / "certificate.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    name = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=IP:{host}"]
    command = ["openssl", "req", "-x509", *kind, *name, "-keyout", str(made), "-out", str(work / "public.pem")]
    subprocess.run(command, check=True, capture_output=True)
    made.write_text(made.read_text() + (work / "public.pem").read_text())
    return made


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(200):
        with contextlib.suppress(OSError):
            direct.open(url, timeout=5).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError("nginx did not start")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
