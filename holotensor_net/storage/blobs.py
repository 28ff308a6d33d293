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
import math
import mmap
import os
import re
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import CacheError
from .files import (
    CREATING,
    Buffer,
    digest_of,
    disown,
    flat,
    is_gone,
    is_held,
    is_hopeless,
    is_private,
    is_remote,
    opened,
    private_name,
    read_all,
    regular,
    scan,
    subject_of,
    token_of,
    translated,
)
from .journal import Journal, blocks, span_of
from .memory import MemoryPart
from .parts import PartFile

__all__ = ["BlobStore", "Left", "is_worth_a_sync"]

_T = TypeVar("_T")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{32}")
_FLUSHED_FROM = 1 << 18  # bytes; also those from which a file is mapped: what was not flushed must not be
_LARGE_PAGE = 1 << 21
_BACKDATED = 2_000_000_000

_IDLE_FOR = 3600.0  # seconds without a write after which a file from another machine counts as left
_RESUMING = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)

# CPython before 3.13 keeps a descriptor open for every mapping.
_MAPPING_KEEPS_FD = sys.version_info < (3, 13)
_IN_LARGE_PAGES: int = getattr(mmap, "MADV_HUGEPAGE", -1)
_MAP_OPTIONS: dict[str, Any] = {"access": mmap.ACCESS_READ} | ({} if _MAPPING_KEEPS_FD else {"trackfd": False})


class Left(NamedTuple):
    """A part file that can be resumed and that nobody fills any more: its size in bytes, and when it was last touched,
    in seconds since the epoch."""

    subject: str
    size: int
    last: float


def _unheard(subject: str, token: str, size: int | None) -> None:
    pass


class BlobStore:
    """Content-addressed files below ``root``. Thread-safe, and safe beside other processes.

    The constructor touches nothing; folders are made, for their owner only, when something is first written.
    ``clock`` is compared with the times of files. ``verify_first``: hash every blob once, when it is first opened, even
    if nothing has been written to it since its bytes were known to be right. ``on_left`` is called with the subject,
    the token and the size of a part file that was left to be resumed, or with "" for the subject of a file that was
    set aside; with None for its size when that has an end.
    Raises CacheError, or InsufficientDisk where there is no room.
    """

    def __init__(
        self,
        root: Path,
        *,
        clock: Callable[[], float] = time.time,
        verify_first: bool = False,
        on_left: Callable[[str, str, int | None], None] = _unheard,
    ) -> None:
        self.root = Path(root)
        self._blobs, self._partial = str(self.root / "blobs"), str(self.root / "partial")
        self._reading = translated("read", self.root)
        self._clock = clock
        self._verify_first = verify_first
        self._on_left = on_left
        self._stamps: dict[str, int] = {}
        self._filling: dict[str, int] = {}
        self._mapped: set[weakref.ref[mmap.mmap]] = set()

    def open(self, digest: str, size: int, *, stamp: int | None = None) -> memoryview | None:
        """A read-only view of the blob, None if it is absent or damaged (then it is set aside).

        ``stamp`` is what :meth:`stamp` gave when the bytes were known to be right. A file that was written to since
        then is hashed before it is handed out, once in the life of this object; one that was never flushed, each time.
        The view outlives the blob.
        """
        if not is_worth_a_sync(size):
            return self.read(digest, size)
        trusted = {None if self._verify_first else stamp, self._stamps.get(digest)}

        def right(fd: int, status: os.stat_result) -> memoryview | None:
            view = self._view(fd, size)
            is_right = len(view) == size and (status.st_mtime_ns in trusted or digest_of(view) == digest)
            return view if is_right else None

        return self._read(digest, size, right)

    def read(self, digest: str, size: int) -> memoryview | None:
        """:meth:`open` for what may never have been flushed: the bytes are read and hashed each time."""

        def right(fd: int, _: os.stat_result) -> memoryview | None:
            data = read_all(fd, size)
            return memoryview(data) if len(data) == size and digest_of(data) == digest else None

        return self._read(digest, size, right)

    def stamp(self, digest: str) -> int | None:
        """The file time (ns) of a blob that this object has published or found right.

        None for one that was not flushed: what the disk then fails to take is lost, and no time of a file tells.
        """
        return self._stamps.get(digest)

    def check(self, digest: str, size: int) -> bool:
        """Whether the blob is there and its bytes, read again and hashed, are right; a damaged one is set aside."""

        def right(fd: int, _: os.stat_result) -> bool | None:
            # Not of a mapping: where the disk gives an error, the system ends the process that looks into it.
            return span_of(blocks(fd, 0, size), 0).digest == digest or None

        try:
            return self._read(digest, size, right) is not None
        except CacheError as error:
            if not is_hopeless(error):
                raise
        self.set_aside(self.path_of(digest))
        return False

    def twin(self, digest: str, size: int) -> memoryview | None:
        """:meth:`open` for whoever has the bytes too, and takes the place of what cannot be read."""
        try:
            return self.open(digest, size)
        except CacheError as error:
            if not is_hopeless(error):
                raise
        return None

    def _read(self, digest: str, size: int, right: Callable[[int, os.stat_result], _T | None]) -> _T | None:
        """What ``right`` gives of the blob, None if it is absent, or damaged: then ``right`` gives None, or the disk an
        error to it."""
        path = self._place(digest)
        with self._reading:
            try:
                fd, status = regular(path)
                try:
                    if status.st_size == size and (found := right(fd, status)) is not None:
                        if is_worth_a_sync(size):
                            self._stamps[digest] = status.st_mtime_ns
                        return found
                except CacheError:  # there is no memory for it
                    raise
                except OSError:
                    pass
                finally:
                    os.close(fd)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        self.set_aside(Path(path))
        return None

    def create(
        self, size: int | None, *, subject: str = "", note: Mapping[str, Any] | None = None, is_proved: bool = False
    ) -> PartFile:
        """A private part file with ``size`` bytes reserved, so that a full disk shows before a byte is fetched.

        With a ``note``, what JSON can say, it can be resumed by whoever knows its ``subject``, some hex digits.
        ``is_proved``: its digest will be asked for.
        """
        with translated("make a part file", self.root):
            path = f"{self._partial}/{private_name(subject if note is not None else '')}"
            part = PartFile(self, Path(path), self._begun(path), size, is_proved=is_proved)
            try:
                if note is not None:
                    part.begin_journal(note)
                part.reserve()
            except BaseException:
                part.discard()
                raise
        return part

    @property
    def filling(self) -> int:
        """Bytes of the part files that this object has in use, reserved ones included; none for an unknown length."""
        return sum(self._filling.copy().values())  # a part that is garbage may go at any moment

    def has_part(self, subject: str) -> bool:
        """Whether a part file of this subject could be resumed."""
        return next(self._left(subject), None) is not None

    def resume(self, subject: str) -> tuple[PartFile, Mapping[str, Any]] | None:
        """A part file of this subject that nobody fills any more, and its note; it is the caller's from here on.

        What its journal tells is hashed again. Of two that want the same file, one gets it: who renames it first.
        """
        for path in self._left(subject):
            mine = path.with_name(private_name(subject))
            try:
                os.rename(path, mine)
                self._on_left(subject, token_of(path.name), None)
                fd = os.open(mine, _RESUMING)
            except OSError:
                disown(mine.name)
                continue
            with contextlib.suppress(CacheError):
                found = PartFile.resumed(self, mine, fd)
                if found is not None:
                    return found
        return None

    def put(self, data: Buffer, digest: str | None = None) -> str:
        """Store the bytes, whose digest the caller may know already; gives it."""
        view = flat(data)
        digest = digest or digest_of(view)
        if self.twin(digest, len(view)) is None:
            self.replace(self._place(digest), view, durable=is_worth_a_sync(len(view)))
        return digest

    def replace(self, target: str, data: Buffer, *, durable: bool = False, when: float | None = None) -> None:
        """Make the bytes the file ``target`` below the root, whatever was there. ``when``: the file's time, which is
        long ago otherwise. Not ``durable``: a loss of power may leave it empty."""
        with translated("publish a file", self.root):
            name = private_name()
            path = f"{self._partial}/{name}"  # no Path: each costs as much as a system call
            fd = self._begun(path)
            try:
                try:
                    rest = flat(data)
                    while rest:
                        rest = rest[os.write(fd, rest) :]
                    moment = time.time_ns() - _BACKDATED if when is None else int(when * 1e9)
                    os.utime(path, ns=(moment, moment))
                    if durable:
                        os.fsync(fd)
                        self._stamps[target.rpartition("/")[2]] = os.fstat(fd).st_mtime_ns
                finally:
                    os.close(fd)
                self._made(lambda: os.replace(path, target), target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise
            finally:
                disown(name)

    def spare(self) -> Path:
        """A private file that is not there yet, in a folder that is. Raises OSError."""
        return self._folder("partial") / private_name()

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
                for item in scan(folder.path):
                    if _DIGEST.fullmatch(item.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield item.name, item.stat(follow_symlinks=False).st_size

    def names(self) -> set[str]:
        """The digests of all blobs, whatever their sizes: less work than to look at each."""
        with translated("look for blobs", self.root):
            return {item.name for folder in scan(self._blobs) for item in scan(folder.path)}

    def has(self, digest: str, size: int) -> bool:
        """Whether there is a blob of that digest and size."""
        try:
            return os.lstat(self._place(digest)).st_size == size
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
        token = secrets.token_hex(16)
        with contextlib.suppress(OSError):
            size = path.lstat().st_size
            os.replace(path, self._folder("quarantine") / f"{path.name[:64]}.{token}")
            self._on_left("", token, size)

    def sweep(self, older_than: float, *, resumable_for: float = 0.0) -> int:
        """Delete what processes that are gone have left, and what was set aside ``older_than`` seconds ago.

        Files that can be resumed stay for ``resumable_for`` seconds, and whatever is named as no file of the cache is,
        for good: it may have been in the folder before. Where it cannot be told who is gone, age tells,
        and a lock where locks work. Gives the number of files deleted.
        """
        swept = 0
        with translated("look for part files", self.root):
            items = [*scan(self.root / "partial"), *scan(self.root / "quarantine")]
        for item in items:
            path = Path(item.path)
            if not (is_private(item.name) or _is_aside(path)):
                continue
            age = resumable_for if _can_be_resumed(path) else -math.inf
            with contextlib.suppress(OSError):
                if self._is_left(path, older_than) and self._age(path) > age:
                    self._unlink(path)
                    swept += 1
        return swept

    def left(self) -> dict[str, Left]:
        """The part files that could be resumed, by their tokens; with no subject, and as of long ago, files that were
        set aside."""
        found = {}
        with translated("look for part files", self.root):
            items, damaged = scan(self.root / "partial"), scan(self.root / "quarantine")
        for item in damaged:
            with contextlib.suppress(OSError):
                if _is_aside(Path(item.path)):
                    found[token_of(item.name)] = Left("", item.stat(follow_symlinks=False).st_size, 0.0)
        for item in items:
            subject, path = subject_of(item.name), Path(item.path)
            if subject and self._is_left(path, _IDLE_FOR):
                with contextlib.suppress(OSError):
                    status = path.lstat()
                    found[token_of(item.name)] = Left(subject, status.st_size, max(status.st_mtime, status.st_ctime))
        return found

    def forget_part(self, token: str) -> bool:
        """Delete a part file that nobody fills any more, or one that was set aside; whether there was one."""
        with translated("look for part files", self.root):
            items = [*scan(self.root / "partial"), *scan(self.root / "quarantine")]
        for item in items:
            path = Path(item.path)
            if token_of(item.name) == token and (_is_aside(path) or self._is_left(path, _IDLE_FOR)):
                with contextlib.suppress(OSError):
                    self._unlink(path)
                    return True
        return False

    def _unlink(self, path: Path) -> None:
        path.unlink()
        subject = subject_of(path.name)
        if subject or _is_aside(path):
            self._on_left(subject, token_of(path.name), None)

    def _left(self, subject: str) -> Iterator[Path]:
        with translated("look for part files", self.root):
            for item in scan(self.root / "partial"):
                path = Path(item.path)
                if subject_of(item.name) == subject and self._is_left(path, _IDLE_FOR):
                    yield path

    def _is_left(self, path: Path, older_than: float) -> bool:
        """Whether nobody uses a private file any more."""
        gone = is_gone(path.name)
        return gone if gone is not None else self._age(path) > older_than and not is_held(path)

    def _age(self, path: Path) -> float:
        """Seconds since a file was last touched; 0 if it is gone."""
        try:
            status = path.lstat()
        except OSError:
            return 0.0
        return self._clock() - max(status.st_mtime, status.st_ctime)

    def path_of(self, digest: str) -> Path:
        """Where the blob lies, or would. Raises CacheError for what is no digest."""
        return Path(self._place(digest))

    def _place(self, digest: str) -> str:
        if not _DIGEST.fullmatch(digest):
            raise CacheError(f"a blob is named by 64 lower-case hex digits, not {digest[:80]!r}")
        return f"{self._blobs}/{digest[:2]}/{digest}"

    def _folder(self, *names: str) -> Path:
        path = self.root
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            path /= name
            path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _begun(self, path: str) -> int:
        """A descriptor of a private file that is new. Raises OSError, and then nobody uses the name."""
        try:
            return self._made(lambda: os.open(path, CREATING, 0o600), path)
        except BaseException:
            disown(path.rpartition("/")[2])
            raise

    def _made(self, make: Callable[[], _T], path: str) -> _T:
        """What ``make`` gives, once there is the folder that ``path`` lies in."""
        try:
            return make()
        except FileNotFoundError:
            self._folder(*Path(path).relative_to(self.root).parts[:-1])
            return make()

    def _view(self, fd: int, size: int) -> memoryview:
        """The bytes of a published file, fewer only if it ends before: mapped, unless others can take them away."""
        return MemoryPart.of(fd, size).view() if is_remote(fd) else self._mapping(fd, size)

    def _mapping(self, fd: int, size: int) -> memoryview:
        """The bytes of an open file, fewer only if it ends before: mapped, or read where it is small, which costs less,
        and where mapping would use up the descriptors.

        What the system has to read of it comes in large pages, where there are such: a mapped file that is not in
        memory would come in the smallest ones, and to touch a gibibyte of those takes eight times as long for as long
        as they stay there (measured: 157 and 20 ms).
        """
        if size >= _FLUSHED_FROM and len(self._mapped) < _most_mappings():
            with contextlib.suppress(OSError, ValueError):  # ValueError: it has just been cut
                mapping = mmap.mmap(fd, size, **_MAP_OPTIONS)
                if size >= _LARGE_PAGE and _IN_LARGE_PAGES >= 0:
                    with contextlib.suppress(OSError):
                        mapping.madvise(_IN_LARGE_PAGES)
                self._mapped.add(weakref.ref(mapping, self._mapped.discard))  # half the price of a WeakSet
                return memoryview(mapping)
        return MemoryPart.of(fd, size).view()


def _is_aside(path: Path) -> bool:
    """Whether this is a file that was set aside, and no stray one."""
    return path.parent.name == "quarantine" and _TOKEN.fullmatch(token_of(path.name)) is not None


def _can_be_resumed(path: Path) -> bool:
    """Whether somebody may want to go on with a part file: it tells of what, and how far it has come."""
    if subject_of(path.name):
        with contextlib.suppress(OSError), opened(path) as (fd, _):
            found = Journal.read(fd)
            return found is not None and bool(found[1])
    return False


def is_worth_a_sync(size: int) -> bool:
    """Whether a blob is to be durable when it is published, so that nobody has to hash it when it is first opened, and
    it can be mapped: of what was not flushed, a mapping gives other bytes once the disk has failed to take them.

    To read and hash a small one takes less time than to wait for the disk.
    """
    return size >= _FLUSHED_FROM


def _most_mappings() -> int:
    """Views that may be mapped at once, so that sockets and files find descriptors too."""
    limit = os.sysconf("SC_OPEN_MAX") if _MAPPING_KEEPS_FD and hasattr(os, "sysconf") else -1
    return limit // 2 if limit > 0 else sys.maxsize
