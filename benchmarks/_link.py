"""A link of a known rate: ``tc tbf`` between two network namespaces, or a proxy that lets so many bytes pass.

The namespace needs root and iproute2. The proxy is a process of threads, and adds copies of its own; its kernel buffers
are kept small, so that it holds no more than a router would.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ._origin import served

BLOCK = 16 * 1024


@dataclass(frozen=True)
class Link:
    """An origin behind a link. ``set_rate`` takes bits/s; ``kind`` is for the table."""

    url: str
    kind: str
    set_rate: Callable[[float], object]


@contextlib.contextmanager
def shaped(root: Path, rate: float) -> Iterator[Link]:
    """The files below ``root``, behind ``rate`` bits/s."""
    with contextlib.ExitStack() as stack:
        try:
            link = stack.enter_context(_namespace(root, rate))
        except (OSError, subprocess.CalledProcessError):
            link = stack.enter_context(_proxied(root, rate))
        yield link


@contextlib.contextmanager
def _namespace(root: Path, rate: float) -> Iterator[Link]:
    if os.geteuid() or not all(map(shutil.which, ("ip", "tc", "nginx"))):
        raise OSError("no namespaces here")
    number = os.getpid()
    name, here, there = f"bench-{number}", f"bh{number}", f"bt{number}"
    network = f"10.{200 + number % 50}.{number // 50 % 256}"
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "del", name)
        run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        run("ip", "addr", "add", f"{network}.1/30", "dev", here)
        run("ip", "link", "set", here, "up")
        inside = ("ip", "netns", "exec", name)
        run(*inside, "ip", "addr", "add", f"{network}.2/30", "dev", there)
        run(*inside, "ip", "link", "set", there, "up")
        run(*inside, "ip", "link", "set", "lo", "up")

        def set_rate(bits: float, verb: str = "change") -> None:
            shape = ("root", "tbf", "rate", f"{bits:.0f}bit", "burst", "64kb", "latency", "20ms")
            run(*inside, "tc", "qdisc", verb, "dev", there, *shape)

        set_rate(rate, "add")
        origin = stack.enter_context(served(root, namespace=name, host=f"{network}.2"))
        yield Link(origin.url, f"{origin.server}, tbf between namespaces", set_rate)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def _proxied(root: Path, rate: float) -> Iterator[Link]:
    with served(root) as origin:
        proxy = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._link", origin.url.rpartition(":")[2], f"{rate}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with proxy:
            assert proxy.stdin is not None
            assert proxy.stdout is not None
            orders = proxy.stdin
            port = int(proxy.stdout.readline())
            try:
                yield Link(
                    f"http://127.0.0.1:{port}",
                    f"{origin.server}, a shaping proxy",
                    lambda bits: print(bits, file=orders, flush=True),
                )
            finally:
                orders.close()
                proxy.wait(10)


class Shaper:
    """Lets ``rate`` bytes/s pass, of all connections together. The lock guards the debt."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.005) + size / self.rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


def proxy(port: int, rate: float) -> None:
    """Pass connections on, until stdin ends; a line of it is a new rate."""
    shaper = Shaper(rate / 8)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * BLOCK)
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * BLOCK)
            server.connect(("127.0.0.1", port))
            for start in ((client, server, None), (server, client, shaper)):
                threading.Thread(target=pump, args=start, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    for line in sys.stdin:
        shaper.rate = float(line) / 8


def pump(source: socket.socket, target: socket.socket, shaper: Shaper | None) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(BLOCK):
            if shaper is not None:
                shaper.wait(len(block))
            target.sendall(block)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    proxy(int(sys.argv[1]), float(sys.argv[2]))
