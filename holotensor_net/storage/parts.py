"""Part files: private, filled in any order, that become a blob or another file in one step, or are resumed later."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError, ChecksumMismatch
from .files import Buffer, disown, flat, hold, is_in_memory, private_name, subject_of, token_of, translated
from .journal import TAIL, Journal, believed, blocks
from .memory import MemoryPart
from .prefix import Prefix

if TYPE_CHECKING:
    from .blobs import BlobStore

__all__ = ["PartFile"]

_BACKDATED = 2_000_000_000


class PartFile:
    """A private file, filled in any order by any number of threads, that becomes a blob in one step.

    A context manager that discards what was not published; so does forgetting it. The lock guards who uses the
    descriptor: after :meth:`publish` or :meth:`discard` no late write can reach the file, or whatever is given the same
    descriptor next. ``is_proved``: its digest will be asked for, and is taken as the bytes come. Raises CacheError, or
    InsufficientDisk where there is no room.
    """

    def __init__(self, store: BlobStore, path: Path, fd: int, size: int | None, *, is_proved: bool = False) -> None:
        self.path = path
        self._store = store
        self._fd = fd
        self._limit = size
        self._users = 0
        self._is_writable = self._is_open = True
        self._idle = threading.Condition()
        self._turn = threading.Lock()
        self._prefix = Prefix()
        self._is_proved = is_proved
        self._journal: Journal | None = None
        self._lost = 0  # the number of the error that a flush gave
        self._abandon = weakref.finalize(self, _abandon, fd, path, os.getpid(), store._filling)
        store._filling[path.name] = size or 0
        hold(fd)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    @property
    def size(self) -> int:
        """Bytes that the file has now; reserved ones count."""
        with self._using() as fd:
            return self._size(fd)

    @property
    def settled(self) -> list[tuple[int, int]]:
        """Where the bytes are that are settled, in order."""
        return self._prefix.spans()

    def reserve(self) -> None:
        """Ask the disk for all of the room at once; where the disk is memory, only look whether it is there: to be
        given it takes as long as to write, and nothing would be received meanwhile."""
        if not self._limit:
            return
        size = self._limit + self._tail
        with self._using(writing=True) as fd, translated(f"reserve {self._limit} bytes", self._store.root):
            if is_in_memory(fd):
                _look_for_room(fd, size)
                os.ftruncate(fd, size)
                return
            try:
                os.posix_fallocate(fd, 0, size)
            except (AttributeError, OSError) as error:
                # Not every system has it, nor every file system where there is it.
                if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(fd, size)

    def write(self, offset: int, buffer: Buffer) -> None:
        """Put all of the buffer at ``offset``. Threads may write disjoint parts at once."""
        rest = flat(buffer)
        self._check(offset, len(rest))
        with self._writing() as fd, translated(f"write {len(rest)} bytes", self._store.root):
            if self._is_proved:
                self._prefix.follow(offset, rest)
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or (self._limit is not None and offset + size > self._limit):
            raise CacheError(f"{size} bytes at {offset} do not fit into a part file of {self._limit} bytes")

    def view(self) -> memoryview:
        """A read-only view of what is there now; a later write may or may not show in it."""
        with self._using() as fd, translated("read a part file", self._store.root):
            return self._store._mapping(fd, self._size(fd))

    def truncate(self, size: int) -> None:
        """Cut the file to ``size`` bytes. No view of it may be read beyond that any more."""
        with self._using(writing=True) as fd, translated(f"cut a part file to {size} bytes", self._store.root):
            os.ftruncate(fd, size)
            self._limit, self._journal = size, None

    def settle(self, start: int, stop: int) -> None:
        """The bytes there will not change any more: take them into the digest, and into the journal if there is one.

        When this returns, that is done, by whichever thread. A disk that fails here shows when the file is published.
        """
        number = self._prefix.add(start, stop)
        with contextlib.suppress(OSError, CacheError):
            if self._prefix.claim(number):
                journal, mark = self._journal, None
                try:
                    with self._using() as fd:
                        self._prefix.hash(partial(blocks, fd))
                        if journal is not None and self._prefix.length < journal.size:
                            self._prefix.hash_apart(partial(blocks, fd))
                            mark = self._prefix.mark
                            journal.advance(fd, mark)
                finally:
                    self._prefix.release()
                if mark is not None and journal is not None:
                    with self._using(writing=True) as fd:  # not while it is published
                        journal.secure(fd, mark, self._sync)

    def _sync(self, fd: int, *, whole: bool = False) -> None:
        try:
            (os.fsync if whole else getattr(os, "fdatasync", os.fsync))(fd)
        except OSError as error:
            self._lost = error.errno or errno.EIO  # the system tells of bytes that it has lost once only
            raise

    def land(self) -> None:
        """It counts as a blob from now on."""
        self._store._filling.pop(self.path.name, None)

    def flush(self) -> bool:
        """Whether the disk has taken all bytes: else they are right until the system lets go of its copy, and others
        from then on, in every view of the file."""
        with contextlib.suppress(OSError), self._using() as fd:
            self._sync(fd, whole=True)
        return not self._lost

    def rescued(self, digest: str) -> memoryview:
        """All bytes, read-only and in memory. Raises ChecksumMismatch if some are lost already."""
        with self._using() as fd:
            try:
                copy = MemoryPart.of(fd, self._size(fd))
                actual = copy.digest()
            except CacheError:
                raise
            except OSError as error:
                actual = str(error)
        if actual != digest:
            raise ChecksumMismatch(digest, actual, "the disk has lost bytes of what it was to keep: fetch them again")
        return copy.view()

    def digest(self) -> str:
        """The BLAKE3 digest of all bytes; those that were settled have been hashed already. Nothing may be written."""
        with self._using() as fd, translated("read a part file", self._store.root):
            return self._prefix.digest(partial(blocks, fd), self._size(fd))

    def keep(self) -> None:
        """Let go of the file and leave it to whoever resumes it; discard it if there is nothing to resume."""
        if self._journal is None or not self.settled:
            self.discard()
            return
        subject = subject_of(self.path.name)
        name = private_name(subject, owned=False)
        with contextlib.suppress(OSError, CacheError), self._using(alone=True) as fd:
            os.rename(self.path, self.path.with_name(name))
            self._store._on_left(subject, token_of(name), os.fstat(fd).st_size)
        self.discard()

    def publish(self, digest: str, *, durable: bool = True) -> memoryview:
        """Make this the blob ``digest``; gives a read-only view of it. The caller answers for the digest.

        Where the same bytes are published already, theirs is the view, and this file is discarded.
        """
        twin = self._store.twin(digest, self.size)
        if twin is not None:
            self.discard()
            return twin
        target = self._store.path_of(digest)
        with self._moved_to(target, durable=durable) as fd:
            status = os.fstat(fd)
            if durable:
                self._store._stamps[digest] = status.st_mtime_ns
            return self._store._view(fd, status.st_size)

    def publish_as(self, target: Path, *, durable: bool = True) -> None:
        """Make this the file ``target`` below the store's root. Not ``durable``: a loss of power may leave it empty."""
        with self._moved_to(target, durable=durable):
            pass

    @contextlib.contextmanager
    def _moved_to(self, target: Path, *, durable: bool = True) -> Iterator[int]:
        with self._using(alone=True) as fd, translated("publish a file", self._store.root):
            if self._journal is not None:
                os.ftruncate(fd, self._journal.size)
            self._store._folder(*target.relative_to(self._store.root).parts[:-1])
            # Any later write is then sure to show in the file's time, though it came in the same tick of the clock.
            past = time.time_ns() - _BACKDATED
            os.utime(self.path, ns=(past, past))
            if self._lost:
                raise OSError(self._lost, os.strerror(self._lost))
            if durable:
                self._sync(fd, whole=True)
            os.replace(self.path, target)
            yield fd
        self.discard()

    def discard(self) -> None:
        """Close and delete the file, once writes under way are done; after :meth:`publish` do nothing."""
        with self._idle:
            self._is_writable = self._is_open = False
            self._idle.wait_for(lambda: self._users == 0)
        self._abandon()

    def begin_journal(self, note: Mapping[str, Any]) -> None:
        """Make this a file that can be resumed, if the note, what JSON can say, is short enough."""
        if self._limit:
            journal = Journal(self._limit, note)
            with self._using(writing=True) as fd, translated("write a journal", self._store.root):
                if journal.begin(fd):
                    self._journal = journal
                    self._store._filling[self.path.name] = self._limit + TAIL

    @classmethod
    def resumed(cls, store: BlobStore, path: Path, fd: int) -> tuple[PartFile, Mapping[str, Any]] | None:
        """A part file as somebody has left it, and its note; None, and it is deleted, if its bytes do not bear out what
        its journal tells. Takes the descriptor."""
        part = cls(store, path, fd, None, is_proved=True)
        with translated("read a part file", store.root):
            found = Journal.read(fd)
            length, hasher, apart = believed(fd, found[1]) if found is not None else (0, None, [])
            if found is None or not (length or apart):
                part.discard()
                return None
            part._journal = found[0]
            part._limit = found[0].size
            store._filling[path.name] = part._limit + TAIL
            part._prefix = Prefix(hasher, length, apart)
        return part, found[0].note

    @property
    def _tail(self) -> int:
        return TAIL if self._journal is not None else 0

    def _size(self, fd: int) -> int:
        return os.fstat(fd).st_size if self._journal is None else self._journal.size

    @contextlib.contextmanager
    def _writing(self) -> Iterator[int]:
        """The descriptor, for one thread at a time to write to.

        The system lets no two write to one file at once, and who waits for it there spins (measured: a fifth of all
        processor time, with four threads).
        """
        with self._using(writing=True) as fd, self._turn:
            yield fd

    @contextlib.contextmanager
    def _using(self, *, writing: bool = False, alone: bool = False) -> Iterator[int]:
        """The descriptor, which stays open meanwhile; ``alone`` waits for the others and lets no writer in again."""
        with self._idle:
            if not (self._is_writable if writing or alone else self._is_open):
                raise CacheError("the part file is published or discarded: begin a new one")
            if alone:
                self._is_writable = False
                self._idle.wait_for(lambda: self._users == 0)
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()


def _abandon(fd: int, path: Path, owner: int, filling: dict[str, int]) -> None:
    """Close a part file, and delete it unless this is the child of the process that owns it."""
    filling.pop(path.name, None)
    with contextlib.suppress(OSError):
        os.close(fd)
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            path.unlink()
        disown(path.name)


def _look_for_room(fd: int, size: int) -> None:
    """Raises OSError where there is none for so many bytes."""
    disk = os.fstatvfs(fd)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize < size:  # it has a limit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
