"""What was found out about the paths to hosts, for whoever goes there next: loaders are often short-lived."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from .pacing import ConcurrencyController

__all__ = ["PATHS", "Path", "Paths", "host_of"]

_MOST = 256
_LASTS = 600.0  # seconds


@dataclass(frozen=True, slots=True)
class Path:
    """``controller``: one that is not in use any more; ``each``: bytes/s of a connection; ``round_trip`` in seconds."""

    controller: ConcurrencyController
    each: float
    round_trip: float


class Paths:
    """The paths that this process has used lately: 256 at most, each for ten minutes after it was last used.

    Thread-safe, and new in a child process: its lock guards the table. Times are arguments.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Path]] = {}
        self._process = os.getpid()

    def keep(self, host: str, path: Path, now: float) -> None:
        """What there is to be known about a host, in place of what was known."""
        self._be_of_this_process()
        with self._lock:
            self._known.pop(host, None)
            self._known[host] = now, path
            while len(self._known) > _MOST:
                del self._known[next(iter(self._known))]

    def recall(self, host: str, ceiling: int, now: float) -> Path | None:
        """What is known about a host, with a controller to go on with, of so many connections at most."""
        self._be_of_this_process()
        with self._lock:
            kept, path = self._known.get(host, (0.0, None))
        if path is None or not 0 <= now - kept <= _LASTS:
            return None
        return Path(path.controller.heir(ceiling, after=now - kept), path.each, path.round_trip)

    def _be_of_this_process(self) -> None:
        if os.getpid() != self._process:
            self.forget()


PATHS = Paths()
"""Those of this process."""


def host_of(url: str) -> str:
    """What names a host: scheme, name and port. No user, no password, no path."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or parts.scheme}"
