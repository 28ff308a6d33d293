"""What is known of each cached fragment, and the small files that say so.

::

    root/entries/<2 hex>/<64 hex>.json    what the network said, named by the SHA-256 of the key

A file begins with the number of uses, ten digits that are written over in place: any mixture of two numbers reads as a
number. All that follows is held together by a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import operator
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from ..errors import CacheError, ConfigurationError
from ..values import RangeRequest, Validator, must_be
from .blobs import BlobStore
from .files import contents, is_hopeless, scan, translated
from .freshness import Freshness, answer_in, is_same_entity, is_storable, kept, refreshed

__all__ = ["CacheEntry", "EntryFiles", "Garbled", "Held", "Usage", "dispensability"]

_SCHEMA = 1
_MOST_ENTRY_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"([0-9a-f]{64})\.json")

_USES = re.compile(rb'\{"uses": "([0-9]{10})", "check": "([0-9a-f]{16})", ')
_NAMED = re.compile(rb'"digest": "([0-9a-f]{64})"')  # no text that is quoted within the JSON looks so
_USES_AT = len('{"uses": "')
_MOST_USES = 10**10 - 1
_MOST_SKEW = 3600.0  # seconds by which the clocks of machines that share a folder may differ
_NOTING = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class CacheEntry:
    """What is known of one cached fragment. Sizes in bytes, times in seconds since the epoch.

    ``byte_range`` is the part that it is of an object of ``object_size`` bytes; None: all of it. ``url`` is kept as
    given: redact it first. Of ``headers`` only those are kept that say how long, and for whom, the bytes are good.
    ``requested_at`` and ``received_at`` are the times of the answer (None: ``cached_at``); ``stamp`` is the blob's file
    time when its bytes were known to be right; ``variant`` a digest of the request's headers that the answer varies on.

    Raises ConfigurationError for a size that is none, or a name that is no string.
    """

    fragment_id: str
    size: int
    etag: str | None = None
    last_modified: str | None = None
    cached_at: float = 0.0
    last_accessed: float = 0.0
    access_count: int = 0
    _: KW_ONLY
    digest: str | None = None
    url: str | None = None
    byte_range: RangeRequest | None = None
    object_size: int | None = None
    validator_is_strong: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    requested_at: float | None = None
    received_at: float | None = None
    stamp: int | None = field(default=None, repr=False)
    variant: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        must_be("CacheEntry.fragment_id", self.fragment_id, str)
        if not isinstance(self.size, (int, Integral)) or self.size < 0:
            raise ConfigurationError(f"CacheEntry.size must be a number of bytes, not {self.size!r}")
        object.__setattr__(self, "headers", kept(self.headers))

    @property
    def validator(self) -> Validator:
        return Validator(self.etag, self.last_modified, self.validator_is_strong)

    @property
    def version(self) -> tuple[object, ...]:
        """What tells its bytes from those of another entry that was stored under the same key."""
        return self.digest, self.etag, self.cached_at

    @property
    def freshness(self) -> Freshness:
        received = self.cached_at if self.received_at is None else self.received_at
        return Freshness(self.headers, received if self.requested_at is None else self.requested_at, received)

    @property
    def is_storable(self) -> bool:
        return is_storable(self.headers)

    def eviction_score(self, now: float) -> float:
        """How dispensable it is: seconds without use over the number of uses. The highest goes first."""
        return dispensability(now, self.last_accessed, self.access_count)

    def stored(self, now: float) -> CacheEntry:
        """This entry as it is put into the cache; nothing is checked again, which most of ``replace`` would be."""
        received = now if self.received_at is None else self.received_at
        requested = received if self.requested_at is None else self.requested_at
        times = {"cached_at": now, "last_accessed": now, "received_at": received, "requested_at": requested}
        return _made({**self.__dict__, **times})

    def of(
        self,
        fragment_id: str,
        size: int,
        byte_range: RangeRequest | None,
        digest: str | None,
        asked_at: float | None,
        now: float,
    ) -> CacheEntry:
        """An entry for another part of the object, which came with the same answer, as it is put into the cache."""
        return _made(
            {
                **self.__dict__,
                "fragment_id": fragment_id,
                "size": size,
                "byte_range": byte_range,
                "digest": digest,
                "requested_at": now if asked_at is None else asked_at,
                "received_at": now,
                "cached_at": now,
                "last_accessed": now,
            }
        )

    def stamped(self, stamp: int | None) -> CacheEntry:
        """This entry with the file time of its blob."""
        return _made({**self.__dict__, "stamp": stamp})

    def told(self, headers: Mapping[str, str]) -> CacheEntry:
        """This entry with the headers of another answer that says the same of the object; those that are ``kept``."""
        return self if headers is self.headers else _made({**self.__dict__, "headers": headers})

    def used(self, count: int, last: float) -> CacheEntry:
        """This entry after ``count`` more uses, the last of them at ``last``."""
        latest = {"access_count": self.access_count + count, "last_accessed": max(self.last_accessed, last)}
        return _made({**self.__dict__, **latest})

    def confirmed(self, headers: Mapping[str, str], requested_at: float, received_at: float) -> CacheEntry | None:
        """This entry as a 304 leaves it; None if the 304 speaks of another version (RFC 9111 §4.3.4).

        The validator stays that of the bytes.
        """
        etag, modified = headers.get("etag"), headers.get("last-modified")
        if etag is not None and self.etag is not None:
            if not is_same_entity(etag, self.etag):
                return None
        elif None not in (modified, self.last_modified) and modified != self.last_modified:
            return None
        merged = refreshed(self.headers, headers)
        return replace(self, headers=merged, requested_at=requested_at, received_at=received_at)


def dispensability(now: float, last: float, uses: int) -> float:
    """Seconds without use over the number of uses, of which one counts as made.

    A use that is to come has just been, by the clock of another machine; if it is far ahead, the clock was wrong then:
    as long as that is ahead it has not been used, lest it stay until then."""
    idle = now - last if last - now < _MOST_SKEW else last - now
    return (max(0.0, idle) + 1.0) / (1.0 + uses)


def _made(fields: dict[str, Any]) -> CacheEntry:
    """An entry of fields that are known to be sound, which takes a fifth of the time that its constructor does."""
    entry = object.__new__(CacheEntry)
    object.__setattr__(entry, "__dict__", fields)
    return entry


@dataclass(slots=True)
class Held:
    """The bytes, and what is known of them by now."""

    entry: CacheEntry
    view: memoryview


class Usage:
    """Hits, misses and evictions, and the uses of entries that their files do not tell of yet. The lock guards all."""

    def __init__(self) -> None:
        self._hits = self._misses = self._evictions = 0
        self._uses: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def hit(self, name: str, now: float) -> None:
        with self._lock:
            self._hits += 1
            self._uses[name] = (self._uses.get(name, (0, 0.0))[0] + 1, now)

    def miss(self) -> None:
        with self._lock:
            self._misses += 1

    def evicted(self, count: int) -> None:
        with self._lock:
            self._evictions += count

    def forget(self, name: str) -> None:
        if name in self._uses:
            with self._lock:
                self._uses.pop(name, None)

    def applied(self, name: str, entry: CacheEntry) -> CacheEntry:
        """The entry with its latest uses."""
        uses = self._uses.get(name)
        return entry.used(*uses) if uses else entry

    def latest(self, name: str, last: float, uses: int) -> tuple[float, int]:
        """When an entry was last used, and how often, if its file tells of ``last`` and ``uses``."""
        count, used = self._uses.get(name, (0, 0.0))
        return max(last, used), uses + count

    def take(self) -> list[tuple[str, tuple[int, float]]]:
        """Each entry's uses, their number and the last one's time, least recent first; they count as written now."""
        with self._lock:
            uses, self._uses = self._uses, {}
        return sorted(uses.items(), key=lambda item: item[1][1])

    def totals(self) -> tuple[int, int, int]:
        with self._lock:
            return self._hits, self._misses, self._evictions


class EntryFiles:
    """One small JSON file for each entry; its modification time is when the entry was last used.

    What cannot be understood (torn, garbled, of a newer schema) is set aside and counts as absent. Raises CacheError.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._folder = str(blobs.root / "entries")
        self._reading = translated("read an entry", blobs.root)

    def path_of(self, name: str) -> str:
        return f"{self._folder}/{name[:2]}/{name}.json"

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name, be it an entry or not."""
        return os.access(f"{self._folder}/{name[:2]}/{name}.json", os.F_OK)

    def names(self) -> Iterator[str]:
        """The names of all entries, folder by folder."""
        with translated("look for entries", self._blobs.root):
            for folder in scan(self._folder):
                for item in scan(folder.path):
                    match = _NAME.fullmatch(item.name)
                    if match:
                        yield match[1]

    def times(self) -> Iterator[tuple[str, float]]:
        """The name of every entry, and when it was last used."""
        with translated("look for entries", self._blobs.root):
            for folder in scan(self._folder):
                for item in scan(folder.path):
                    match = _NAME.fullmatch(item.name)
                    if match:
                        with contextlib.suppress(FileNotFoundError):
                            yield match[1], item.stat(follow_symlinks=False).st_mtime

    def glance(self, name: str) -> tuple[str, float, int] | None:
        """The digest that an entry names, when it was last used, and how often: less work than :meth:`read`."""
        with self._reading:
            try:
                text, status = contents(self.path_of(name), _MOST_ENTRY_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno != errno.ELOOP and not is_hopeless(error):
                    raise
                return None
        head, digest = _USES.match(text), _NAMED.search(text)
        if head is None or digest is None or head[2] != _check(memoryview(text)[head.end() :]):
            return None
        return digest[1].decode(), status.st_mtime, int(head[1])

    def read(self, name: str, *, is_dispensable: bool = False) -> CacheEntry | None:
        """The entry. ``is_dispensable``: to let it go or to replace it, so that one that cannot be read is none."""
        try:
            return self.examined(name)
        except Garbled:
            self._blobs.set_aside(Path(self.path_of(name)))
        except CacheError as error:
            if not (is_dispensable and is_hopeless(error)):
                raise
        return None

    def examined(self, name: str) -> CacheEntry | None:
        """The entry, None if there is none. Raises Garbled for what cannot be understood, and leaves it where it is."""
        path = f"{self._folder}/{name[:2]}/{name}.json"
        try:
            text, status = contents(path, _MOST_ENTRY_BYTES)
            return _unpacked(text, status.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Garbled from error
            with self._reading:
                raise

    def write(self, name: str, entry: CacheEntry) -> None:
        # It tells itself whether it is whole, so that nothing has to wait for the disk.
        self._blobs.replace(self.path_of(name), _packed(entry), when=entry.last_accessed)

    def touch(self, name: str, when: float) -> None:
        """Note when the entry was last used, where that may be written."""
        with contextlib.suppress(OSError):
            os.utime(self.path_of(name), (when, when), follow_symlinks=False)

    def note(self, name: str, count: int, last: float, now: float) -> None:
        """Count ``count`` more uses, the last of them at ``last``, where that may be written. A later one that others
        have noted stays, unless it is yet to come."""
        with contextlib.suppress(OSError):
            fd = os.open(self.path_of(name), _NOTING)
            try:
                head, noted = _USES.match(os.pread(fd, 64, 0)), os.fstat(fd).st_mtime
                if head is not None:
                    os.pwrite(fd, _uses(int(head[1]) + count), _USES_AT)
                    if not last <= noted <= now:
                        noted = last
                    os.utime(fd, (noted, noted))  # writing has changed it
            finally:
                os.close(fd)

    def remove(self, name: str) -> bool:
        """Whether the entry is gone now."""
        try:
            os.unlink(self.path_of(name))
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True


class Garbled(Exception):
    """An entry file that cannot be understood."""


_TEXT, _COUNT = frozenset((str,)), frozenset((int,))
_NONE = frozenset((type(None),))

_PLAIN_FIELDS: dict[str, frozenset[type]] = {
    "fragment_id": _TEXT,
    "size": _COUNT,
    "digest": _TEXT,
    "etag": _TEXT | _NONE,
    "last_modified": _TEXT | _NONE,
    "validator_is_strong": frozenset((bool,)),
    "url": _TEXT | _NONE,
    "object_size": _COUNT | _NONE,
    "cached_at": frozenset((int, float)),
    "stamp": _COUNT | _NONE,
    "variant": _TEXT | _NONE,
}
"""What is stored as it is, and the types that it may have."""

_values = operator.itemgetter(*_PLAIN_FIELDS, "schema", "byte_range", "freshness")
_decoded = json.JSONDecoder().raw_decode


@functools.lru_cache(64)
def _may_be(types: tuple[type, ...]) -> bool:
    """Whether the plain fields, in their order, may be of these types: there are but few combinations of them."""
    return all(map(operator.contains, _PLAIN_FIELDS.values(), types))


def _packed(entry: CacheEntry) -> bytes:
    """The entry as JSON."""
    span = entry.byte_range
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        **{name: getattr(entry, name) for name in _PLAIN_FIELDS},
        "byte_range": None if span is None else [span.start, span.stop],
        "freshness": entry.freshness.to_json(),
    }
    return _sealed(data, entry.access_count)


def _sealed(data: dict[str, Any], uses: int = 0) -> bytes:
    """Data, of which there is some, as JSON with its checksum. Rot that leaves it readable shall not bless wrong bytes;
    it may spoil the number of uses."""
    body = json.dumps(data)[1:].encode()
    return b'{"uses": "%b", "check": "%b", %b' % (_uses(uses), _check(body), body)


def _unpacked(text: bytes, last_accessed: float) -> CacheEntry:
    """The entry that :func:`_packed` wrote. Raises Garbled for anything else.

    It is made field by field: a cache of many entries is listed by little else.
    """
    head = _USES.match(text)
    if head is None or head[2] != _check(memoryview(text)[head.end() :]):
        raise Garbled
    try:
        *plain, schema, span, freshness = _values(_decoded(text.decode())[0])
        fragment_id, size, digest, etag, modified, is_strong, url, whole, cached_at, stamp, variant = plain
        if not (
            schema == _SCHEMA
            and _may_be(tuple(map(type, plain)))
            and 0 <= cached_at < math.inf
            and size >= 0
            and (whole or 0) >= 0
            and (stamp or 0) >= 0
            and _DIGEST.fullmatch(digest)
        ):
            raise Garbled
        byte_range = None if span is None else RangeRequest(*span)
        headers, requested_at, received_at = answer_in(freshness)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, CacheError) as error:
        raise Garbled from error
    return _made(
        {
            "fragment_id": fragment_id,
            "size": size,
            "etag": etag,
            "last_modified": modified,
            "cached_at": cached_at,
            "last_accessed": last_accessed,
            "access_count": int(head[1]),
            "digest": digest,
            "url": url,
            "byte_range": byte_range,
            "object_size": whole,
            "validator_is_strong": is_strong,
            "headers": kept(headers),
            "requested_at": requested_at,
            "received_at": received_at,
            "stamp": stamp,
            "variant": variant,
        }
    )


def _uses(count: int) -> bytes:
    return b"%010d" % min(count, _MOST_USES)


def _check(body: bytes | memoryview) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()
