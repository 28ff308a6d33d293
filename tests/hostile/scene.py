"""What one transfer of the matrix is about, written into the path that it asks for, and what the origin makes of it.

A case names its fault, its shape, its size, where the fault strikes and whether it lasts. Client and origin read the
same path, and so agree on every byte without speaking of it.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from wire import Request, answer

CHUNK = 512
SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK)
PLACES = ("start", "middle", "end")
PAD = 64
"""Bytes before and behind the range that a ranged transfer asks for."""

SECRETS = ("canary-bearer", "canary-api-key", "canary-signature", "canary-netrc")

_THEN, _NOW = 1_700_000_000, 1_700_000_100  # seconds since the epoch
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass(frozen=True)
class Case:
    """One transfer. ``shape``: ranged (a part of an object), whole (in ranges) or plain (one GET without a range), and
    the same asked of the client alone, without the engine (``client-…``); ``lasting``: the fault strikes every time,
    not only the first."""

    fault: str
    shape: str
    size: int
    place: str
    seed: int
    lasting: bool

    @property
    def key(self) -> str:
        when = "always" if self.lasting else "once"
        return f"{self.fault}/{self.shape}/{self.size}/{self.place}/{self.seed}/{when}"

    @property
    def path(self) -> str:
        return f"{self.key}?sig=canary-signature"

    @classmethod
    def of(cls, key: str) -> Case:
        fault, shape, size, place, seed, when = key.split("/")
        return cls(fault, shape, int(size), place, int(seed), when == "always")

    @property
    def is_ranged(self) -> bool:
        return self.shape.endswith("ranged")

    @property
    def wanted(self) -> tuple[int, int]:
        """Where the bytes that the transfer wants lie in the object. An empty part is one behind the object's end."""
        return (PAD, PAD + self.size) if self.is_ranged else (0, self.size)

    @property
    def object_size(self) -> int:
        if not self.is_ranged:
            return self.size
        return self.size + 2 * PAD if self.size else PAD

    @property
    def offset(self) -> int:
        """The byte of the object at which the fault strikes."""
        start, stop = self.wanted
        middle = random.Random(self.key).randrange(self.size // 4, self.size - self.size // 4) if self.size > 1 else 0
        return {"start": start, "middle": start + middle, "end": max(start, stop - 1)}[self.place]

    def content(self, version: int = 0) -> bytes:
        """The whole object. Bytes differ between any two versions of it, at every place."""
        return _content(self.key, self.object_size, version)

    def truth(self, version: int = 0) -> bytes:
        start, stop = self.wanted
        return self.content(version)[start:stop]


@functools.lru_cache(256)
def _content(key: str, size: int, version: int) -> bytes:
    base = random.Random(key).randbytes(size)
    return bytes((byte + version) % 256 for byte in base) if version else base


@dataclass
class Ledger:
    """What the origin saw of one case."""

    requests: int = 0
    hits: int = 0
    versions: set[int] = field(default_factory=set)
    times: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return {"requests": self.requests, "hits": self.hits, "versions": sorted(self.versions), "times": self.times}


class Books:
    """The ledgers of all cases, and what the origin saw that no client may do. Its lock guards both."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ledgers: defaultdict[str, Ledger] = defaultdict(Ledger)
        self.breaches: list[str] = []

    def settle(self, fault: str) -> dict[str, Any]:
        """All that was noted of one fault, which is then forgotten, and all breaches."""
        with self.lock:
            keys = [key for key in self.ledgers if key.split("/")[0] == fault]
            told = {key: self.ledgers.pop(key).told() for key in keys}
            breaches, self.breaches = self.breaches, []
        return {"ledgers": told, "breaches": breaches}


class Asked:
    """One request, and what a sound server would say to it; faults are told as changes of that.

    ``nth`` and ``hits`` count the requests of this case before this one, all and faulty. ``validator``: strong, weak,
    none, date (a strong Last-Modified) or weak-date.
    """

    def __init__(self, request: Request, case: Case, mirror: str, ledger: Ledger, *, validator: str, port: int) -> None:
        self.request = request
        self.case = case
        self.mirror = mirror
        self.nth = ledger.requests
        self.hits = ledger.hits
        self.validator = validator
        self.other_port = port
        self.version = 0
        self.random = random.Random(f"{case.key} {self.nth}")
        self._ledger = ledger
        self.size = case.object_size
        match = _RANGE.fullmatch(request.headers.get("range", ""))
        self.asks_part = match is not None
        self.start, self.stop = (int(match[1]), int(match[2]) + 1) if match else (0, self.size)
        self.is_satisfiable = not self.asks_part or self.start < self.size
        self.stop = min(self.stop, self.size)

    # -- what was asked

    @property
    def length(self) -> int:
        return max(0, self.stop - self.start)

    @property
    def is_part(self) -> bool:
        return self.asks_part and self.is_satisfiable

    @property
    def covers(self) -> bool:
        """Whether the place at which the fault strikes is within what was asked for."""
        return self.start <= self.case.offset < self.stop or not self.length

    @property
    def hit(self) -> int:
        """The byte of the body at which the fault strikes."""
        return max(0, self.case.offset - self.start)

    @property
    def body(self) -> bytes:
        with_version = self.case.content(self.version)
        self._ledger.versions.add(self.version)
        return with_version[self.start : self.stop]

    @property
    def etag(self) -> str | None:
        return {"strong": f'"v{self.version}"', "weak": 'W/"w"'}.get(self.validator)

    # -- what a sound server says

    def headers(self) -> dict[str, object]:
        """The headers of a sound answer that say nothing of its length."""
        own: dict[str, object] = {"accept_ranges": "bytes", "cache_control": "max-age=60", "date": _date(_NOW)}
        if self.etag:
            own["etag"] = self.etag
        if self.validator == "date":
            own["last_modified"] = _date(_THEN + self.version)
        if self.validator == "weak-date":
            own["last_modified"] = _date(_NOW)
        return own

    def reply(
        self, body: bytes | None = None, status: int | None = None, *, extra: bytes = b"", **changes: object
    ) -> bytes:
        """A sound answer but for the changes; None leaves a header out. ``extra``: raw header lines, put first."""
        own = self.headers()
        if not self.is_satisfiable and body is None and status is None:
            return answer(b"", 416, content_range=f"bytes */{self.size}")
        content = self.body if body is None else body
        if self.is_part and status in (None, 206):
            own["content_range"] = f"bytes {self.start}-{self.stop - 1}/{self.size}"
        status = status or (206 if self.is_part else 200)
        whole = answer(content, status, **(own | changes))
        first, _, rest = whole.partition(b"\r\n")
        return first + b"\r\n" + extra + rest

    def head(self, **changes: object) -> bytes:
        """The head alone of ``reply``, which announces the body all the same."""
        return self.reply(**changes).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"

    def good(self, *, conditions: bool = True) -> bytes:
        """What a sound server answers, conditional requests included."""
        said = self.request.headers
        if conditions:
            if "if-match" in said and said["if-match"] != self.etag:
                return answer(b"", 412)
            if "if-unmodified-since" in said and said["if-unmodified-since"] != self.headers().get("last_modified"):
                return answer(b"", 412)
            if self.etag and said.get("if-none-match") == self.etag:
                self._ledger.versions.add(self.version)
                return answer(b"", 304, content_length=None, **self.headers())
        if not self.is_satisfiable:
            self._ledger.versions.add(self.version)
            return answer(b"", 416, content_range=f"bytes */{self.size}")
        return self.reply()


def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
