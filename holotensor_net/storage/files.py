"""What every file of the cache is read, named and held by.

A private file's name tells whose it is, ``<subject>.<owner>.<token>``: what a process that is gone has left can be
collected, or taken over by renaming it, without a lock. ``subject`` says what it is good for to others, if anything.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from ..errors import CacheError, InsufficientDisk
from ..values import blake3_of

__all__ = [
    "CREATING",
    "Buffer",
    "Descriptor",
    "contents",
    "digest_of",
    "disown",
    "fixed",
    "flat",
    "hold",
    "is_gone",
    "is_held",
    "is_hopeless",
    "is_in_memory",
    "is_private",
    "is_remote",
    "opened",
    "private_name",
    "read_all",
    "regular",
    "scan",
    "subject_of",
    "token_of",
    "translated",
]

Buffer: TypeAlias = bytes | bytearray | memoryview

# O_NONBLOCK: opening a pipe that lies in a file's place must not wait for a writer.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
CREATING = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

_PRIVATE = re.compile(r"((?:[0-9a-f]{2}){0,32})\.(?:([0-9a-f]{12})-([0-9]{1,10}))?\.[0-9a-f]{32}")

_MOUNTS = "/proc/self/mountinfo"
_REMOTE = re.compile(r"nfs4?|cifs|smb[23]?|smbfs|9p|afs|coda|vboxsf|fuse(\..*)?")
"""Others (Lustre, GPFS, CephFS) keep what is deleted elsewhere for as long as it is open here."""

_mine: set[str] = set()
"""Names of private files that are in use in this process."""


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
def opened(path: Path | str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor to read a regular file, and its status; never a link, a pipe or a device.

    Raises OSError: ELOOP for what is no regular file.
    """
    fd, status = regular(path)
    try:
        yield fd, status
    finally:
        os.close(fd)


def regular(path: Path | str) -> tuple[int, os.stat_result]:
    """:func:`opened` for what is done so often that a context costs; the descriptor is the caller's to close."""
    fd = os.open(path, _READ)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise OSError(errno.ELOOP, "not a regular file", str(path))
    return fd, status


def contents(path: str, most: int) -> tuple[bytes, os.stat_result]:
    """The bytes of a regular file, ``most`` at most, and its status. Raises OSError as :func:`opened` does."""
    fd, status = regular(path)
    try:
        return read_all(fd, min(status.st_size, most)), status
    finally:
        os.close(fd)


def read_all(fd: int, size: int) -> bytes:
    """The first ``size`` bytes of an open file, fewer only if it ends before; its position stays."""
    data = os.pread(fd, size, 0)
    while len(data) < size and (more := os.pread(fd, size - len(data), len(data))):
        data += more
    return data


def scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in a folder; nothing where there is no folder."""
    try:
        with os.scandir(folder) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        return []


class Descriptor:
    """A file descriptor that is closed with the last reference to it, whoever is using it meanwhile."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The number; that of no file once it is closed."""
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    __del__ = close


class translated:
    """A context in which OSErrors become CacheErrors that say what to do; it may be entered again and again.

    No generator: every read passes through.
    """

    __slots__ = ("_doing", "_root")

    def __init__(self, doing: str, root: Path) -> None:
        self._doing = doing
        self._root = root

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, CacheError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientDisk(
                f"no room to {self._doing} in {self._root}:"
                " free some space, or set another cache folder (HOLOTENSOR_CACHE)"
            ) from error
        told = error.strerror or error
        raise CacheError(f"cannot {self._doing} in {self._root} ({told}): {_advice(error)}") from error


def is_hopeless(error: BaseException) -> bool:
    """Whether an OSError, or the CacheError that it became, tells of this file alone, and it will not do better: it is
    another user's, or lies on a bad sector. In its folder another may take its place."""
    cause = error if isinstance(error, OSError) and not isinstance(error, CacheError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EIO)


def _advice(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return "make sure that it is a folder that may be read and written, or set another (HOLOTENSOR_CACHE)"


@functools.cache
def _machine() -> str:
    """Where process numbers mean what they mean here: this machine since it was started, this container."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def is_in_memory(fd: int) -> bool:
    """Whether an open file lies in memory, as far as the system tells."""
    return _kind_of(os.fstat(fd).st_dev) in ("tmpfs", "ramfs")


def is_remote(fd: int) -> bool:
    """Whether an open file lies where another machine, or another program, can take its bytes away from under whoever
    has mapped it, as far as the system tells."""
    return _REMOTE.fullmatch(_kind_of(os.fstat(fd).st_dev)) is not None


@functools.lru_cache(64)
def _kind_of(device: int) -> str:
    """Of which kind a mounted file system is, "" if that is not known (proc(5): the third field tells the device, the
    first one behind the dash the kind)."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError, IndexError):
        for line in Path(_MOUNTS).read_text(errors="replace").splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == number and kind:
                return kind.split()[0]
    return ""


def private_name(subject: str = "", *, owned: bool = True) -> str:
    """A name that no other file has. ``owned``: as long as it is in use, see :func:`disown`, nobody else's."""
    name = f"{subject}.{f'{_machine()}-{os.getpid()}' if owned else ''}.{secrets.token_hex(16)}"
    if owned:
        _mine.add(name)
    return name


def disown(name: str) -> None:
    """The file is not in use any more."""
    _mine.discard(name)


def is_private(name: str) -> bool:
    """Whether :func:`private_name` has given this name, here or elsewhere."""
    return _PRIVATE.fullmatch(name) is not None


def subject_of(name: str) -> str:
    """What a private file is good for, "" if that is nothing to anybody else."""
    match = _PRIVATE.fullmatch(name)
    return match[1] if match else ""


def token_of(name: str) -> str:
    """What tells a private file from all others: 32 hex digits."""
    return name.rpartition(".")[2]


def fixed(folder: Path) -> Path:
    """The same folder wherever the process goes from here; as it was named, where only that leads there: what lies
    above the working directory may be closed to us."""
    try:
        return folder.absolute() if folder.is_absolute() or os.access(Path.cwd(), os.X_OK) else folder
    except OSError:  # there is no working directory any more
        return folder


def is_gone(name: str) -> bool | None:
    """Whether nobody uses a private file any more; None if that cannot be told: it comes from elsewhere."""
    match = _PRIVATE.fullmatch(name)
    if match is None or (match[2] is not None and (match[2] != _machine() or os.name != "posix")):
        return None
    if match[2] is None:
        return True
    process = int(match[3])
    if process == os.getpid():
        return name not in _mine
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except (OSError, IndexError):
        return False


def hold(fd: int) -> bool:
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


def is_held(path: Path) -> bool:
    """Whether somebody has the file marked as in use."""
    try:
        with opened(path) as (fd, _):
            return not hold(fd)
    except OSError:
        return False
