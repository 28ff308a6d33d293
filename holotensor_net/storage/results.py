"""Results on the disk, each under a key: a JSON document, and blobs that belong to it.

::

    root/results/<2 hex>/<64 hex>    the digest of the next line; a JSON text: the document, and its blobs' digests
    root/blobs/…                     the bytes (see blobs)

The file system is the index, as in the cache of fragments: whoever reads finds the old result, the new one, or none,
whatever was killed in between. Nothing waits for the disk: everything is read and hashed each time, so that what the
disk has lost, and damage of any other kind, is a miss. The time of a document's file says when it was last used.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CacheError
from .blobs import BlobStore
from .files import Buffer, digest_of, opened, read_all, scan, translated

__all__ = ["ResultStore", "Stored"]

_SCHEMA = 1
_ORPHANED_AFTER = 3600.0  # seconds without a write, for part files of other processes
_DOCUMENT_DUE_WITHIN = 60.0  # seconds from publishing a blob
_KEY = re.compile(r"[0-9a-f]{64}")  # and a digest

Blobs: TypeAlias = tuple[tuple[str, int], ...]
"""Digest and size of each."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A document, and its files in memory, read-only."""

    document: Any
    files: tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class _Listed:
    """What making room needs to know of a result: its file's size in bytes, when it was last used, its blobs."""

    key: str
    size: int
    used: float
    blobs: Blobs


class ResultStore:
    """Documents and their files below ``root``, at most ``max_size`` bytes: those used least recently make room.

    Keys are 64 hex digits. Thread-safe, and safe beside other processes: of two that write the same key, one wins. Each
    looks at what the others wrote whenever it has written a sixteenth of the limit, by which they may exceed it.
    ``clock`` gives seconds since the epoch; the lock lets one thread at a time make room. Raises CacheError, or
    InsufficientDisk where there is no room.
    """

    def __init__(self, root: Path, max_size: int, *, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(root)
        self._max_size = max_size
        self._clock = clock
        self._blobs = BlobStore(self.root, clock=clock)
        self._size: int | None = None  # an estimate, begun when something is first written
        self._unchecked = 0  # bytes written since it was made
        self._sweeping = threading.Lock()

    def get(self, key: str) -> Stored | None:
        """What was put under the key; None if that is nothing, or damaged. It is read and hashed each time."""
        path = self._path_of(key)
        found = self._read(path)
        if found is None:
            return None
        document, blobs = found
        views = [view for digest, size in blobs if (view := self._blobs.read(digest, size)) is not None]
        if len(views) < len(blobs):
            self.remove(key)
            return None
        self._touch(path)
        return Stored(document, tuple(views))

    def put(self, key: str, document: Any, files: Sequence[Sequence[Buffer]] = ()) -> None:
        """Keep a document and its files, each in pieces that follow each other, in place of what was there."""
        path = self._path_of(key)
        if self._size is None:
            self._blobs.sweep(_ORPHANED_AFTER)
            self._size = self.size()
        blobs = [self._add(pieces) for pieces in files]
        body = json.dumps({"schema": _SCHEMA, "document": document, "blobs": blobs}).encode()
        head = digest_of(body).encode() + b"\n"
        with self._blobs.create(None) as part:
            part.write(0, head)
            part.write(len(head), body)
            part.publish_as(path, durable=False)
        self._touch(path)
        self._count(len(head) + len(body) + sum(size for _, size in blobs))

    def remove(self, key: str) -> None:
        """Forget a result. Its blobs go when room is next made."""
        with translated("remove a result", self.root):
            self._path_of(key).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all results."""
        with self._sweeping:
            self._shrink(-1)

    def prune(self, max_size: int) -> None:
        """Make room until at most ``max_size`` bytes are left."""
        with self._sweeping:
            self._shrink(max_size)

    def size(self) -> int:
        """Bytes of all documents and blobs."""
        size = sum(size for _, size in self._blobs.digests())
        with translated("look for results", self.root):
            for item in self._items():
                with contextlib.suppress(FileNotFoundError):
                    size += item.stat(follow_symlinks=False).st_size
        return size

    def _count(self, written: int) -> None:
        """Note that so much was written; look again how much there is, and make room, where it is time."""
        share = self._max_size // 16
        self._size = (self._size or 0) + written
        self._unchecked += written
        if self._size <= self._max_size and self._unchecked <= share:
            return
        with self._sweeping:
            if self._unchecked > share:
                self._size, self._unchecked = self.size(), 0
            if self._size > self._max_size:
                # A little more than needed, so that not every result to come makes room again.
                self._shrink(self._max_size - share)

    def _shrink(self, max_size: int) -> None:
        """Drop blobs that no document names, for want of room those too that one may yet name; then the least used."""
        listed, blobs = sorted(self._listed(), key=lambda result: result.used), dict(self._blobs.digests())
        named = Counter(digest for result in listed for digest, _ in result.blobs)
        size = sum(result.size for result in listed) + sum(blobs.values())
        for digest in sorted(blobs.keys() - named.keys(), key=self._blobs.age_of, reverse=True):
            is_due = size > max_size or self._blobs.age_of(digest) > _DOCUMENT_DUE_WITHIN
            if is_due and self._blobs.remove(digest):
                size -= blobs[digest]
        for result in listed:
            if size <= max_size:
                break
            self.remove(result.key)
            size -= result.size
            named.subtract(digest for digest, _ in result.blobs)
            for digest in {digest for digest, _ in result.blobs if not named[digest]}:
                if self._blobs.remove(digest):
                    size -= blobs.get(digest, 0)
        self._size, self._unchecked = size, 0

    def _add(self, pieces: Sequence[Buffer]) -> tuple[str, int]:
        """Publish the pieces as one blob, without joining them in memory."""
        size = sum(map(len, pieces))
        with self._blobs.create(size) as part:
            offset = 0
            for piece in pieces:
                part.write(offset, piece)
                offset += len(piece)
            digest = digest_of(part.view())
            if not self._blobs.has(digest, size):
                part.publish_as(self._blobs.path_of(digest), durable=False)
        return digest, size

    def _read(self, path: Path) -> tuple[Any, Blobs] | None:
        """The document and its blobs; what cannot be understood is set aside, and counts as absent."""
        with translated("read a result", self.root):
            try:
                with opened(path) as (fd, status):
                    return _parsed(read_all(fd, status.st_size))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except (ValueError, TypeError, LookupError, RecursionError):
                pass
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        self._blobs.set_aside(path)
        return None

    def _listed(self) -> Iterator[_Listed]:
        with translated("look for results", self.root):
            for item in self._items():
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    found = self._read(Path(item.path))
                    if found is not None:
                        yield _Listed(item.name, status.st_size, status.st_mtime, found[1])

    def _items(self) -> Iterator[os.DirEntry[str]]:
        for folder in scan(self.root / "results"):
            yield from (item for item in scan(Path(folder.path)) if _KEY.fullmatch(item.name))

    def _touch(self, path: Path) -> None:
        """Note that the result was used, where that may be written."""
        with contextlib.suppress(OSError):
            now = self._clock()
            os.utime(path, (now, now), follow_symlinks=False)

    def _path_of(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise CacheError(f"a result is named by 64 lower-case hex digits, not {key[:80]!r}")
        return self.root / "results" / key[:2] / key


def _parsed(text: bytes) -> tuple[Any, Blobs]:
    """The document and its blobs. Raises ValueError, TypeError or LookupError for what is none."""
    head, _, body = text.partition(b"\n")
    if digest_of(body) != head.decode():
        raise ValueError("damaged")
    data = json.loads(body)
    if data["schema"] != _SCHEMA:
        raise ValueError("of another version")
    blobs = tuple((digest, size) for digest, size in data["blobs"])
    if not all(_KEY.fullmatch(digest) and type(size) is int and size >= 0 for digest, size in blobs):
        raise ValueError("no blobs")
    return data["document"], blobs
