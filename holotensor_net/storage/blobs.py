"""Files named by what they hold: whole under their name, or not there at all.

::

    root/blobs/<2 hex>/<64 hex>    published bytes, named by their BLAKE3 digest
    root/partial/<unique>          private files that are still being filled
    root/quarantine/<unique>       what was found damaged

A part file becomes a blob by fsync → ``os.replace``. The folder itself is not flushed: after a loss of power the name
may be missing, which costs a fetch, but it never leads to other bytes. No lock is needed for that, so it holds on
network file systems, where locks may do nothing.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CacheError, InsufficientDisk
from ..values import blake3_of

__all__ = ["BlobStore", "Buffer", "PartFile", "digest_of", "flat", "opened", "read_all", "scan", "translated"]

Buffer: TypeAlias = bytes | bytearray | memoryview

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAPPING_PAYS_FROM = 1 << 16
_BACKDATED = 2_000_000_000

# CPython before 3.13 keeps a descriptor open for every mapping.
_MAPPING_KEEPS_FD = sys.version_info < (3, 13)
_MAP_OPTIONS: dict[str, Any] = {"access": mmap.ACCESS_READ} | ({} if _MAPPING_KEEPS_FD else {"trackfd": False})

# O_NONBLOCK: opening a pipe that lies in a blob's place must not wait for a writer.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def flat(buffer: Buffer) -> memoryview:
    """The bytes of a buffer of any shape in one row; copied only if they do not lie in one."""
    view = memoryview(buffer)
    if not view.nbytes:
        return memoryview(b"")
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def digest_of(buffer: Buffer) -> str:
    """The BLAKE3 digest of the bytes, 64 hex digits."""
    return blake3_of(flat(buffer))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor to read a regular file, and its status; never a link, a pipe or a device.

    Raises OSError: ELOOP for what is no regular file.
    """
    fd = os.open(path, _READ)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ELOOP, "not a regular file", str(path))
        yield fd, status
    finally:
        os.close(fd)


def read_all(fd: int, size: int) -> bytes:
    """The first ``size`` bytes of an open file, fewer only if it ends before; its position stays."""
    pieces, got = [], 0
    while got < size and (piece := os.pread(fd, size - got, got)):
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing where there is no folder."""
    try:
        with os.scandir(folder) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def translated(doing: str, root: Path) -> Iterator[None]:
    """OSErrors as CacheErrors that say what to do."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientDisk(
                f"no room to {doing} in {root}: free some space, or set another cache folder (HOLOTENSOR_CACHE)"
            ) from error
        raise CacheError(f"cannot {doing} in {root} ({error.strerror or error}): {_advice(error)}") from error


def _advice(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "make sure that it is a folder that may be read and written, or set another (HOLOTENSOR_CACHE)"


class BlobStore:
    """Content-addressed files below ``root``. Thread-safe, and safe beside other processes.

    The constructor touches nothing; folders are made, for their owner only, when something is first written.
    ``clock`` is compared with the times of files. Raises CacheError, or InsufficientDisk where there is no room.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.root = Path(root)
        self._clock = clock
        self._stamps: dict[str, int] = {}
        self._mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def open(self, digest: str, size: int, *, stamp: int | None = None) -> memoryview | None:
        """A read-only view of the blob, None if it is absent or damaged (then it is set aside).

        ``stamp`` is what :meth:`stamp` gave when the bytes were known to be right. A file that was written to since
        then is hashed before it is handed out, once in the life of this object. The view outlives the blob.
        """
        return self._open(digest, size, {stamp, self._stamps.get(digest)})

    def stamp(self, digest: str) -> int | None:
        """The file time (ns) of a blob that this object has published or found right."""
        return self._stamps.get(digest)

    def check(self, digest: str, size: int) -> bool:
        """Whether the blob is there and its bytes, read again and hashed, are right; a damaged one is set aside."""
        return self._open(digest, size, set()) is not None

    def _open(self, digest: str, size: int, trusted: set[int | None]) -> memoryview | None:
        path = self.path_of(digest)
        with translated("read", self.root):
            try:
                with opened(path) as (fd, status):
                    if status.st_size == size:
                        view = self._view(fd, size)
                        if status.st_mtime_ns in trusted or digest_of(view) == digest:
                            self._stamps[digest] = status.st_mtime_ns
                            return view
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        self.set_aside(path)
        return None

    def create(self, size: int | None) -> PartFile:
        """A private part file with ``size`` bytes reserved, so that a full disk shows before a byte is fetched."""
        with translated("make a part file", self.root):
            path = self._folder("partial") / secrets.token_hex(16)
            part = PartFile(self, path, os.open(path, _NEW, 0o600), size)
            try:
                part.reserve()
            except BaseException:
                part.discard()
                raise
        return part

    def put(self, data: Buffer) -> str:
        """Store the bytes; gives their digest."""
        view = flat(data)
        digest = digest_of(view)
        with self.create(len(view)) as part:
            part.write(0, view)
            part.publish(digest)
        return digest

    def remove(self, digest: str) -> bool:
        """Whether the blob is gone now. Views of it stay valid."""
        self._stamps.pop(digest, None)
        try:
            self.path_of(digest).unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def digests(self) -> Iterator[tuple[str, int]]:
        """Every blob's digest and size in bytes, in no order."""
        with translated("look for blobs", self.root):
            for folder in scan(self.root / "blobs"):
                for item in scan(Path(folder.path)):
                    if _DIGEST.fullmatch(item.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield item.name, item.stat(follow_symlinks=False).st_size

    def has(self, digest: str, size: int) -> bool:
        """Whether there is a blob of that digest and size."""
        try:
            return self.path_of(digest).lstat().st_size == size
        except OSError:
            return False

    def age_of(self, digest: str) -> float:
        """Seconds since the blob was last written to; 0 if it is absent."""
        try:
            return self._clock() - self.path_of(digest).lstat().st_mtime
        except OSError:
            return 0.0

    def set_aside(self, path: Path) -> None:
        """Move a damaged file out of the way, for :meth:`sweep` to delete; where nothing may be written, leave it."""
        with contextlib.suppress(OSError):
            os.replace(path, self._folder("quarantine") / f"{path.name[:64]}.{secrets.token_hex(4)}")

    def sweep(self, older_than: float) -> int:
        """Delete what was set aside, and part files whose process is gone, if untouched for ``older_than`` seconds.

        Gives the number of files deleted. Where locks do nothing, age alone tells.
        """
        before = self._clock() - older_than
        swept = 0
        with translated("look for part files", self.root):
            items = [*scan(self.root / "partial"), *scan(self.root / "quarantine")]
        for item in items:
            path = Path(item.path)
            with contextlib.suppress(OSError):
                status = path.lstat()
                if max(status.st_mtime, status.st_ctime) < before and not _is_held(path):
                    path.unlink()
                    swept += 1
        return swept

    def path_of(self, digest: str) -> Path:
        """Where the blob lies, or would. Raises CacheError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise CacheError(f"a blob is named by 64 lower-case hex digits, not {digest[:80]!r}")
        return self.root / "blobs" / digest[:2] / digest

    def _folder(self, *names: str) -> Path:
        path = self.root
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            path /= name
            path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _view(self, fd: int, size: int) -> memoryview:
        """The bytes of an open file: mapped, or read where mapping costs more or would use up the descriptors."""
        if size >= _MAPPING_PAYS_FROM and len(self._mapped) < _most_mappings():
            with contextlib.suppress(OSError):
                mapping = mmap.mmap(fd, size, **_MAP_OPTIONS)
                self._mapped.add(mapping)
                return memoryview(mapping)
        return memoryview(read_all(fd, size))


class PartFile:
    """A private file, filled in any order by any number of threads, that becomes a blob in one step.

    A context manager that discards what was not published; so does forgetting it. The lock guards who uses the
    descriptor: after :meth:`publish` or :meth:`discard` no late write can reach the file, or whatever is given the same
    descriptor next. Raises CacheError, or InsufficientDisk where there is no room.
    """

    def __init__(self, store: BlobStore, path: Path, fd: int, size: int | None) -> None:
        self.path = path
        self._store = store
        self._fd = fd
        self._limit = size
        self._users = 0
        self._is_writable = self._is_open = True
        self._idle = threading.Condition()
        self._abandon = weakref.finalize(self, _abandon, fd, path, os.getpid())
        _hold(fd)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    @property
    def size(self) -> int:
        """Bytes that the file has now; reserved ones count."""
        with self._using() as fd:
            return os.fstat(fd).st_size

    def reserve(self) -> None:
        """Ask the disk for all of the room at once."""
        if not self._limit:
            return
        with self._using(writing=True) as fd, translated(f"reserve {self._limit} bytes", self._store.root):
            try:
                os.posix_fallocate(fd, 0, self._limit)
            except (AttributeError, OSError) as error:
                # Not every system has it, nor every file system where there is it.
                if getattr(error, "errno", None) not in (None, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(fd, self._limit)

    def write(self, offset: int, buffer: Buffer) -> None:
        """Put all of the buffer at ``offset``. Threads may write disjoint parts at once."""
        rest = flat(buffer)
        if offset < 0 or (self._limit is not None and offset + len(rest) > self._limit):
            raise CacheError(f"{len(rest)} bytes at {offset} do not fit into a part file of {self._limit} bytes")
        with self._using(writing=True) as fd, translated(f"write {len(rest)} bytes", self._store.root):
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written

    def view(self) -> memoryview:
        """A read-only view of what is there now; a later write may or may not show in it."""
        with self._using() as fd, translated("read a part file", self._store.root):
            return self._store._view(fd, os.fstat(fd).st_size)

    def truncate(self, size: int) -> None:
        """Cut the file to ``size`` bytes. No view of it may be read beyond that any more."""
        with self._using(writing=True) as fd, translated(f"cut a part file to {size} bytes", self._store.root):
            os.ftruncate(fd, size)
            self._limit = size

    def publish(self, digest: str) -> memoryview:
        """Make this the blob ``digest``; gives a read-only view of it. The caller answers for the digest.

        Where the same bytes are published already, theirs is the view, and this file is discarded.
        """
        twin = self._store.open(digest, self.size)
        if twin is not None:
            self.discard()
            return twin
        target = self._store.path_of(digest)
        with self._moved_to(target) as fd:
            status = os.fstat(fd)
            self._store._stamps[digest] = status.st_mtime_ns
            return self._store._view(fd, status.st_size)

    def publish_as(self, target: Path, *, durable: bool = True) -> None:
        """Make this the file ``target`` below the store's root. Not ``durable``: a loss of power may leave it empty."""
        with self._moved_to(target, durable=durable):
            pass

    @contextlib.contextmanager
    def _moved_to(self, target: Path, *, durable: bool = True) -> Iterator[int]:
        with self._using(alone=True) as fd, translated("publish a file", self._store.root):
            self._store._folder(*target.relative_to(self._store.root).parts[:-1])
            # Any later write is then sure to show in the file's time, though it came in the same tick of the clock.
            past = time.time_ns() - _BACKDATED
            os.utime(self.path, ns=(past, past))
            if durable:
                os.fsync(fd)
            os.replace(self.path, target)
            yield fd
        self.discard()

    def discard(self) -> None:
        """Close and delete the file, once writes under way are done; after :meth:`publish` do nothing."""
        with self._idle:
            self._is_writable = self._is_open = False
            self._idle.wait_for(lambda: self._users == 0)
        self._abandon()

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


def _abandon(fd: int, path: Path, owner: int) -> None:
    """Close a part file, and delete it unless this is the child of the process that owns it."""
    with contextlib.suppress(OSError):
        os.close(fd)
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            path.unlink()


def _hold(fd: int) -> bool:
    """Whether the file could be marked as in use; the mark goes with the process, however it ends.

    False only if somebody else holds it. True where locks are unknown: they save work here and guard nothing.
    """
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def _is_held(path: Path) -> bool:
    try:
        with opened(path) as (fd, _):
            return not _hold(fd)
    except OSError:
        return False


def _most_mappings() -> int:
    """Views that may be mapped at once, so that sockets and files find descriptors too."""
    limit = os.sysconf("SC_OPEN_MAX") if _MAPPING_KEEPS_FD and hasattr(os, "sysconf") else -1
    return limit // 2 if limit > 0 else sys.maxsize
