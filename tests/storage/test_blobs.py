from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from holotensor_net.errors import CacheError, InsufficientDisk
from holotensor_net.storage import blobs, journal, memory, parts
from holotensor_net.storage import files as owners
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.files import digest_of, flat, is_in_memory, opened, private_name, read_all
from holotensor_net.storage.journal import Journal
from holotensor_net.storage.parts import PartFile
from holotensor_net.storage.prefix import Prefix

LARGE = 1 << 17
FLUSHED = 1 << 18  # so that its file's time is believed, and it is mapped; smaller ones are read and hashed each time
SIZES = (0, 1, 4096, LARGE, FLUSHED - 1, FLUSHED, FLUSHED + 1)


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


def opened_in(root: Path) -> list[str]:
    """Where the descriptors of this process that lead into ``root`` lead; those of other tests come and go."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, or one that another thread has closed
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(path for path in paths if path.startswith(str(root)))


@contextlib.contextmanager
def tiny_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes of its own, where this machine lets us make one."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield path
    finally:
        gc.collect()
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def assert_closed(part: PartFile) -> None:
    for use in (part.view, lambda: part.size, lambda: part.write(0, b"x"), lambda: part.truncate(1)):
        with pytest.raises(CacheError, match="begin a new one"):
            use()


def rot_unseen(path: Path) -> None:
    """As when the disk has lost what it was given: other bytes, and the file's time as it was."""
    before = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "cache")


SlowDisk = tuple[threading.Event, threading.Event]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """Set when a flush has begun, and to be set for it to end."""
    begun, ended = threading.Event(), threading.Event()

    def sync(_: int) -> None:
        begun.set()
        assert ended.wait(10)

    monkeypatch.setattr(journal, "SYNC_EVERY", LARGE)
    monkeypatch.setattr(os, "fdatasync", sync)
    return begun, ended


class TestDigest:
    @pytest.mark.parametrize("size", [*SIZES, (1 << 20) + 1])
    def test_is_blake3_whatever_the_number_of_threads(self, size: int) -> None:
        data = os.urandom(size)
        assert digest_of(data) == blake3(data).hexdigest()

    def test_takes_any_shape_of_buffer(self) -> None:
        data = bytes(range(240))
        square = memoryview(data).cast("I", (6, 10))
        strided = memoryview(data)[::2]
        assert digest_of(square) == digest_of(bytearray(data)) == blake3(data).hexdigest()
        assert digest_of(strided) == blake3(data[::2]).hexdigest()
        assert flat(memoryview(b"").cast("I")) == b""

    def test_ends_in_the_child_of_a_process_that_hashed_with_threads(self) -> None:
        done = run("""
            import os, signal
            from holotensor_net.storage.blobs import digest_of
            data = bytes(8 << 20)
            digest = digest_of(data)
            child = os.fork()
            if not child:
                signal.alarm(10)
                os._exit(digest_of(data) != digest)
            print(os.waitpid(child, 0)[1])
        """)
        assert done.stdout == "0\n", done


class TestOpen:
    def test_constructor_and_questions_touch_nothing(self, store: BlobStore) -> None:
        assert store.open("0" * 64, 0) is None
        assert list(store.digests()) == []
        assert store.sweep(0) == 0
        assert store.remove("0" * 64)
        assert not store.check("0" * 64, 0)
        assert not store.has("0" * 64, 0)
        assert store.age_of("0" * 64) == 0
        assert not store.root.exists()

    @pytest.mark.parametrize("size", SIZES)
    def test_gives_what_was_put(self, store: BlobStore, size: int) -> None:
        data = os.urandom(size)
        digest = store.put(data)
        view = store.open(digest, size)
        assert digest == blake3(data).hexdigest()
        assert view == data
        assert view is not None
        assert view.readonly
        assert isinstance(view.obj, mmap.mmap) == (size >= FLUSHED)
        assert list(store.digests()) == [(digest, size)]
        assert store.has(digest, size)
        assert not store.has(digest, size + 1)

    @pytest.mark.parametrize("size", [10, LARGE])
    def test_view_outlives_the_blob(self, store: BlobStore, size: int) -> None:
        data = os.urandom(size)
        digest = store.put(data)
        view = store.open(digest, size)
        assert store.remove(digest)
        assert store.open(digest, size) is None
        assert view == data

    @pytest.mark.parametrize("size", [10, LARGE])
    @pytest.mark.parametrize("damage", ["cut", "lengthened", "emptied"])
    def test_wrong_length_is_set_aside(self, store: BlobStore, size: int, damage: str) -> None:
        digest = store.put(os.urandom(size))
        os.truncate(store.path_of(digest), {"cut": size - 1, "lengthened": size + 1, "emptied": 0}[damage])
        assert store.open(digest, size) is None
        assert not store.path_of(digest).exists()
        assert [path.parent.name for path in files(store.root)] == ["quarantine"]

    @pytest.mark.parametrize("is_new", [True, False])
    def test_rot_is_noticed_at_once_and_set_aside(self, store: BlobStore, is_new: bool) -> None:
        digest = store.put(bytes(LARGE))
        stamp = store.stamp(digest)
        with store.path_of(digest).open("r+b") as file:
            file.write(b"\1")
        reader = BlobStore(store.root) if is_new else store
        assert reader.open(digest, LARGE, stamp=stamp) is None
        assert not store.path_of(digest).exists()

    def test_stamp_is_older_than_any_write_to_come(self, store: BlobStore) -> None:
        stamp = store.stamp(store.put(bytes(FLUSHED)))
        assert stamp is not None
        assert stamp < time.time_ns() - 1_000_000_000

    def test_stamp_spares_the_hashing(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        data = os.urandom(FLUSHED)
        digest = store.put(data)
        stamp = store.stamp(digest)
        hashed: list[int] = []
        monkeypatch.setattr(blobs, "digest_of", lambda view: hashed.append(len(view)) or digest)
        assert store.open(digest, FLUSHED) == data
        reader = BlobStore(store.root)
        assert reader.open(digest, FLUSHED, stamp=stamp) == data
        assert hashed == []
        stranger = BlobStore(store.root)
        for _ in range(3):
            assert stranger.open(digest, FLUSHED, stamp=1) == data
        assert hashed == [FLUSHED]
        assert stranger.check(digest, FLUSHED)
        rot_unseen(store.path_of(digest))
        assert not stranger.check(digest, FLUSHED)

    @pytest.mark.parametrize("size", [1, LARGE, FLUSHED])
    def test_cut_at_the_moment_of_opening_it_is_damaged(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        digest = store.put(os.urandom(size))
        stamp = store.path_of(digest).stat().st_mtime_ns
        regular = blobs.regular

        def cut(path: str) -> tuple[int, os.stat_result]:
            found = regular(path)
            os.truncate(path, size // 2)
            return found

        monkeypatch.setattr(blobs, "regular", cut)
        assert store.open(digest, size, stamp=stamp) is None
        assert not store.path_of(digest).exists()

    @pytest.mark.parametrize("size", [1, LARGE, FLUSHED])
    def test_what_the_disk_cannot_read_is_damaged(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        digest = store.put(os.urandom(size))

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        assert not store.check(digest, size)
        assert [path.parent.name for path in files(store.root)] == ["quarantine"]

    def test_check_finds_rot_that_left_the_file_time_as_it_was(self, store: BlobStore) -> None:
        digest = store.put(bytes(FLUSHED))
        rot_unseen(store.path_of(digest))
        assert store.open(digest, FLUSHED) != bytes(FLUSHED)
        assert not store.check(digest, FLUSHED)
        assert store.open(digest, FLUSHED) is None

    @pytest.mark.parametrize("size", [1, LARGE, FLUSHED - 1])
    @pytest.mark.parametrize("way", ["put", "adopted", "read before"])
    def test_what_was_not_flushed_may_be_lost_though_no_file_time_tells(
        self, store: BlobStore, size: int, way: str
    ) -> None:
        data = os.urandom(size)
        if way == "adopted":
            with store.create(size) as part:
                part.write(0, data)
                digest = digest_of(data)
                assert part.publish(digest, durable=False) == data
        else:
            digest = store.put(data)
        reader = BlobStore(store.root) if way == "read before" else store
        assert reader.open(digest, size) == data
        assert reader.stamp(digest) is None
        rot_unseen(store.path_of(digest))
        assert reader.open(digest, size) is None

    @pytest.mark.parametrize("size", [1, LARGE, FLUSHED - 1])
    @pytest.mark.parametrize("way", ["put", "adopted", "adopted, of any size", "found beside"])
    def test_views_of_what_was_not_flushed_stay_right_whatever_the_disk_loses(
        self, store: BlobStore, size: int, way: str
    ) -> None:
        data = os.urandom(size)
        digest = digest_of(data)
        if way != "adopted, of any size":
            store.put(data)
        view = store.open(digest, size)
        if way != "put":
            with store.create(None if "any" in way else size) as part:
                part.write(0, data)
                if way != "found beside":
                    store.remove(digest)
                view = part.publish(digest, durable=False)
        assert view == data
        rot_unseen(store.path_of(digest))
        assert view == data

    @pytest.mark.parametrize("way", ["put", "adopted", "read"])
    def test_what_another_machine_may_delete_or_cut_is_not_mapped(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, way: str
    ) -> None:
        """As a look into it would end the process then."""
        monkeypatch.setattr(blobs, "is_remote", lambda fd: True)
        data = os.urandom(3 * FLUSHED)
        digest = digest_of(data)
        with store.create(len(data)) as part:
            part.write(0, data)
            view: memoryview | None = part.publish(digest) if way == "adopted" else None
        if way != "adopted":
            store.put(data)
            view = (BlobStore(store.root) if way == "read" else store).open(digest, len(data))
        os.truncate(store.path_of(digest), 0)
        assert view == data
        assert view.readonly

    def test_what_there_is_no_memory_for_is_an_error_and_stays(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = store.put(bytes(FLUSHED))

        def fail(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as scarce:
            scarce.setattr(blobs, "is_remote", lambda fd: True)
            scarce.setattr(memory, "_memory", fail)
            with pytest.raises(CacheError, match="no memory"):
                store.open(digest, FLUSHED)
        assert store.open(digest, FLUSHED) == bytes(FLUSHED)

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_what_the_disk_cannot_give_is_set_aside(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        digest = store.put(os.urandom(size))

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        for read in ("pread", "preadv"):
            monkeypatch.setattr(os, read, fail)
        assert store.open(digest, size) is None
        assert [path.parent.name for path in files(store.root)] == ["quarantine"]

    def test_link_pipe_and_folder_are_refused_without_waiting(self, store: BlobStore, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"abc")
        digest = digest_of(b"abc")
        path = store.path_of(digest)
        path.parent.mkdir(parents=True)
        for plant in (lambda: path.symlink_to(secret), lambda: os.mkfifo(path), lambda: path.mkdir()):
            plant()
            with pytest.raises(OSError), opened(path):
                pass
            assert store.open(digest, 3) is None
            assert not os.path.lexists(path)
        assert secret.read_bytes() == b"abc"

    @pytest.mark.parametrize("digest", ["", "../" * 20, "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 32 + "/" + "0" * 31])
    def test_what_is_no_digest_never_becomes_a_path(self, store: BlobStore, digest: str) -> None:
        with pytest.raises(CacheError, match="64 lower-case hex digits"):
            store.open(digest, 0)

    def test_failing_disk_is_an_error_and_not_an_absence(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = store.put(b"abc")

        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(os, "open", fail)
            with pytest.raises(CacheError, match="Input/output error"):
                store.open(digest, 3)
        assert store.open(digest, 3) == b"abc"

    def test_mappings_leave_descriptors_for_others(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blobs, "_most_mappings", lambda: 2)
        digest = store.put(bytes(FLUSHED))
        views = [store.open(digest, FLUSHED) for _ in range(4)]
        assert [isinstance(view.obj, mmap.mmap) for view in views if view is not None] == [True, True, False, False]
        assert all(view == bytes(FLUSHED) for view in views)
        del views
        assert isinstance(store.open(digest, FLUSHED).obj, mmap.mmap)  # type: ignore[union-attr]

    def test_limit_of_mappings_follows_the_limit_of_open_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blobs, "_MAPPING_KEEPS_FD", True)
        monkeypatch.setattr(os, "sysconf", lambda name: {"SC_OPEN_MAX": 1024}[name])
        assert blobs._most_mappings() == 512
        monkeypatch.setattr(os, "sysconf", lambda name: -1)
        assert blobs._most_mappings() == sys.maxsize
        monkeypatch.setattr(blobs, "_MAPPING_KEEPS_FD", False)
        assert blobs._most_mappings() == sys.maxsize

    def test_where_nothing_can_be_mapped_it_is_read(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        data = os.urandom(FLUSHED)
        digest = store.put(data)

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENODEV, "No such device")

        monkeypatch.setattr(mmap, "mmap", fail)
        assert store.open(digest, FLUSHED) == data

    @pytest.mark.parametrize("size", [1 << 21, (1 << 21) - 1])
    def test_what_is_long_is_read_in_large_pages_where_there_are_such(self, store: BlobStore, size: int) -> None:
        try:
            mmap.mmap(-1, size).madvise(mmap.MADV_HUGEPAGE)
        except (OSError, AttributeError):
            pytest.skip("there are no large pages here")
        digest = store.put(bytes(size))
        view = store.open(digest, size)
        maps = Path("/proc/self/smaps").read_text().partition(digest)[2]
        flags = maps.partition("VmFlags:")[2].partition("\n")[0].split()
        assert view == bytes(size)
        assert ("hg" in flags) == (size >= 1 << 21)

    def test_where_there_are_no_large_pages_it_is_mapped_all_the_same(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blobs, "_IN_LARGE_PAGES", 0x7FFF)  # the system knows no such advice
        view = store.open(store.put(bytes(1 << 21)), 1 << 21)
        assert view is not None
        assert isinstance(view.obj, mmap.mmap)
        assert view == bytes(1 << 21)

    def test_short_reads_are_gone_on_with(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_bytes(bytes(range(100)))
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 7), offset))
        with path.open("rb") as file:
            assert read_all(file.fileno(), 100) == bytes(range(100))
            assert read_all(file.fileno(), 200) == bytes(range(100))


class TestPartFile:
    def test_is_private_and_so_are_its_folders(self, store: BlobStore) -> None:
        os.umask(umask := os.umask(0))
        os.umask(0)
        try:
            store.put(b"abc")
        finally:
            os.umask(umask)
        for path in (store.root, *store.root.rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    @pytest.mark.parametrize("size", SIZES)
    def test_takes_pieces_in_any_order_from_many_threads(self, store: BlobStore, size: int) -> None:
        data = os.urandom(size)
        part = store.create(size)
        assert part.size == size
        step = max(1, size // 7)
        starts = list(range(0, size, step))[::-1]
        threads = [threading.Thread(target=part.write, args=(at, data[at : at + step])) for at in starts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert part.view() == data
        assert part.publish(digest_of(data)) == data
        assert files(store.root) == [store.path_of(digest_of(data))]

    def test_grows_where_the_size_is_not_known(self, store: BlobStore) -> None:
        with store.create(None) as part:
            part.write(0, b"abc")
            part.write(3, b"defg")
            part.truncate(5)
            assert part.size == 5
            with pytest.raises(CacheError, match="do not fit"):
                part.write(5, b"x")
            assert part.publish(digest_of(b"abcde")) == b"abcde"

    def test_partial_writes_are_gone_on_with(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
        data = os.urandom(LARGE)
        assert store.open(store.put(data), LARGE) == data

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 11), (10, 1), (1 << 60, 1)])
    def test_nothing_is_written_beside_the_place_reserved(self, store: BlobStore, offset: int, length: int) -> None:
        with store.create(10) as part:
            with pytest.raises(CacheError, match="do not fit"):
                part.write(offset, bytes(length))
            assert part.size == 10

    @pytest.mark.parametrize("size", [10, LARGE])
    def test_end_leaves_no_descriptor_open(self, store: BlobStore, size: int) -> None:
        for ending in ("publish", "twin", "discard", "forget"):
            part = store.create(size)
            part.write(0, bytes(size))
            assert opened_in(store.root) == [str(path) for path in files(store.root / "partial")]
            if ending == "forget":
                del part
            elif ending == "discard":
                part.discard()
                part.discard()
            else:
                assert part.publish(digest_of(bytes(size))) == bytes(size)
                part.discard()
            assert opened_in(store.root) == [], ending
        assert files(store.root) == [store.path_of(digest_of(bytes(size)))]

    def test_forgotten_in_a_cycle_it_goes_with_the_garbage(self, store: BlobStore) -> None:
        part = store.create(10)
        cycle: list[object] = [part]
        cycle.append(cycle)
        gone = weakref.ref(part)
        del part, cycle
        gc.collect()
        assert gone() is None
        assert files(store.root) == []

    def test_late_writer_reaches_neither_the_blob_nor_the_next_file(self, store: BlobStore, tmp_path: Path) -> None:
        data = bytes(4096)
        for ending in ("publish", "discard"):
            part = store.create(4096)
            part.write(0, data)
            begun, refused = threading.Event(), threading.Event()

            def write(part: PartFile = part, begun: threading.Event = begun, refused: threading.Event = refused):
                with contextlib.suppress(CacheError):
                    while True:
                        part.write(0, data)
                        begun.set()
                refused.set()

            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            assert begun.wait(10)
            part.publish(digest_of(data)) if ending == "publish" else part.discard()
            others = [(tmp_path / f"{ending}{n}").open("w+b") for n in range(20)]
            assert refused.wait(10)
            thread.join()
            assert [os.fstat(other.fileno()).st_size for other in others] == [0] * 20
            for other in others:
                other.close()
            assert_closed(part)
        assert store.check(digest_of(data), 4096)

    def test_end_waits_for_a_write_under_way(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        part = store.create(3)
        inside, ended = threading.Event(), threading.Event()
        waited: list[bool] = []
        pwrite = os.pwrite

        def slow(fd: int, data: memoryview, offset: int) -> int:
            inside.set()
            waited.append(not ended.wait(0.1))
            return pwrite(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", slow)
        writer = threading.Thread(target=part.write, args=(0, b"abc"))
        writer.start()
        assert inside.wait(10)
        part.discard()
        ended.set()
        writer.join()
        assert waited == [True]

    def test_no_write_begins_once_it_is_being_published(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part = store.create(3)
        part.write(0, b"abc")
        refused: list[str] = []

        def fsync(_: int) -> None:
            for use in (lambda: part.write(0, b"xyz"), lambda: part.truncate(1), lambda: part.publish("0" * 64)):
                with pytest.raises(CacheError, match="begin a new one") as caught:
                    use()
                refused.append(str(caught.value))

        monkeypatch.setattr(os, "fsync", fsync)
        assert part.publish(digest_of(b"abc")) == b"abc"
        assert len(refused) == 3

    def test_twin_is_kept_and_a_rotted_twin_replaced(self, store: BlobStore) -> None:
        digest = store.put(b"abc")
        inode = store.path_of(digest).stat().st_ino
        assert store.put(b"abc") == digest
        assert store.path_of(digest).stat().st_ino == inode
        store.path_of(digest).write_bytes(b"xyz")
        assert BlobStore(store.root).put(b"abc") == digest
        assert store.check(digest, 3)

    def test_publish_as_names_any_file_below_the_root(self, store: BlobStore) -> None:
        for durable in (True, False):
            with store.create(3) as part:
                part.write(0, b"abc")
                part.publish_as(store.root / "entries" / "ab" / f"{durable}.json", durable=durable)
        assert [path.read_bytes() for path in files(store.root)] == [b"abc", b"abc"]

    def test_child_of_a_fork_leaves_the_file_to_its_parent(self, tmp_path: Path) -> None:
        done = run(
            """
            import os, sys
            from pathlib import Path
            from holotensor_net.storage.blobs import BlobStore
            part = BlobStore(Path(sys.argv[1])).create(3)
            part.write(0, b"abc")
            child = os.fork()
            if not child:
                part.discard()
                os._exit(0)
            os.waitpid(child, 0)
            print(bytes(part.view()), part.path.exists())
            """,
            tmp_path,
        )
        assert done.stdout == "b'abc' True\n", done
        assert files(tmp_path) == []


class TestFailingDisk:
    def test_full_disk_shows_before_a_byte_is_written(self, tmp_path: Path) -> None:
        with tiny_disk(tmp_path / "disk", 1 << 19) as disk:
            store = BlobStore(disk / "cache")
            with pytest.raises(InsufficientDisk, match="free some space"):
                store.create(1 << 20)
            assert files(disk) == []
            with store.create(None) as part, pytest.raises(InsufficientDisk):
                part.write(0, bytes(1 << 20))
            assert files(disk) == []
            digest = store.put(bytes(1 << 18))
            assert store.check(digest, 1 << 18)

    def test_file_larger_than_allowed_is_a_cache_error_without_litter(self, tmp_path: Path) -> None:
        done = run(
            """
            import resource, sys
            from pathlib import Path
            from holotensor_net.errors import CacheError
            from holotensor_net.storage.blobs import BlobStore
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
            store = BlobStore(Path(sys.argv[1]))
            for size in (1 << 20, None):
                try:
                    with store.create(size) as part:
                        part.write(0, bytes(1 << 20))
                except CacheError as error:
                    print(type(error).__name__)
            """,
            tmp_path / "cache",
        )
        assert done.stdout == "CacheError\nCacheError\n", done
        assert files(tmp_path) == []

    @pytest.mark.parametrize("place", ["", "partial", "blobs"])
    def test_file_in_a_folders_place_is_an_error_that_says_what_to_do(self, store: BlobStore, place: str) -> None:
        blocked = store.root / place
        blocked.parent.mkdir(exist_ok=True)
        blocked.write_bytes(b"")
        with pytest.raises(CacheError, match="HOLOTENSOR_CACHE"):
            store.put(b"abc")
        assert files(store.root.parent) == [blocked]
        assert opened_in(store.root.parent) == []
        assert store.open(digest_of(b"abc"), 3) is None
        assert list(store.digests()) == []

    def test_too_many_open_files_names_the_limit(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(CacheError, match="ulimit"):
            store.create(3)

    @pytest.mark.parametrize("call", ["open", "rename"])
    def test_no_name_is_in_use_of_what_could_not_be_made(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        subject = "a" * 64
        with store.create(1 << 20, subject=subject, note={}) as part:
            part.write(0, bytes(1 << 20))
            part.settle(0, 1 << 19)
            part.keep()
        before = set(owners._mine)
        really_open = os.open

        def fail(path: object, flags: object = None, *_: object, **__: object) -> int:
            if isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY:
                return really_open(str(path), flags)
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with contextlib.suppress(CacheError):
                store.put(b"abc")
            with contextlib.suppress(CacheError), store.create(3):
                pass
            assert store.resume(subject) is None
        assert set(owners._mine) == before
        found = store.resume(subject)
        assert found is not None
        with found[0] as part:
            assert part.settled == [(0, 1 << 19)]

    @pytest.mark.parametrize("call", ["fsync", "replace", "utime"])
    def test_failure_to_publish_leaves_no_blob_and_no_litter(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(os, call, fail)
            with pytest.raises(CacheError, match="Input/output error"):
                store.put(bytes(1 << 18))
            with pytest.raises(CacheError, match="Input/output error"), store.create(3) as part:
                part.publish(digest_of(bytes(3)))
        assert files(store.root) == []

    def test_what_the_disk_has_lost_on_the_way_is_not_published(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The system tells of it once: to flush the file at the end succeeds."""

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(journal, "SYNC_EVERY", LARGE)
        with store.create(3 * LARGE, subject="a" * 64, note={"what": "this"}) as part:
            part.write(0, bytes(LARGE))
            with monkeypatch.context() as broken:
                broken.setattr(os, "fdatasync", fail)
                part.settle(0, LARGE)
            part.write(LARGE, bytes(2 * LARGE))
            part.settle(LARGE, 3 * LARGE)
            with pytest.raises(CacheError, match="Input/output error"):
                part.publish(part.digest())
            assert part.view() == bytes(3 * LARGE)
        assert files(store.root) == []

    def test_a_disk_that_is_far_behind_is_waited_for(self, store: BlobStore, slow_disk: SlowDisk) -> None:
        begun, ended = slow_disk
        with store.create(6 * LARGE, subject="a" * 64, note={"what": "this"}) as part:
            part.write(0, bytes(6 * LARGE))
            flushing = threading.Thread(target=part.settle, args=(0, LARGE))
            flushing.start()
            assert begun.wait(10)
            following = threading.Thread(target=part.settle, args=(LARGE, 5 * LARGE))
            following.start()
            following.join(0.1)
            assert following.is_alive()
            ended.set()
            for thread in (flushing, following):
                thread.join(10)
                assert not thread.is_alive()

    def test_a_flush_that_comes_late_writes_nothing_into_what_is_published(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed, publishing = threading.Event(), threading.Event()
        release, fsync = Prefix.release, os.fsync

        def released(self: Prefix) -> None:
            release(self)
            if threading.current_thread() is settling:
                hashed.set()
                assert publishing.wait(10)

        def slowly(fd: int) -> None:
            publishing.set()
            settling.join(0.2)  # what it does now must not reach the file
            fsync(fd)

        monkeypatch.setattr(journal, "SYNC_EVERY", LARGE)
        monkeypatch.setattr(Prefix, "release", released)
        monkeypatch.setattr(os, "fsync", slowly)
        with store.create(3 * LARGE, subject="a" * 64, note={"what": "this"}) as part:
            part.write(0, bytes(3 * LARGE))
            settling = threading.Thread(target=part.settle, args=(0, 2 * LARGE))
            settling.start()
            assert hashed.wait(10)
            digest = part.digest()
            assert part.publish(digest) == bytes(3 * LARGE)
        settling.join(10)
        assert not settling.is_alive()
        assert [path.stat().st_size for path in files(store.root)] == [3 * LARGE]
        assert store.open(digest, 3 * LARGE) == bytes(3 * LARGE)

    def test_others_go_on_while_one_flushes(self, store: BlobStore, slow_disk: SlowDisk) -> None:
        begun, ended = slow_disk
        with store.create(4 * LARGE, subject="a" * 64, note={"what": "this"}) as part:
            part.write(0, bytes(4 * LARGE))
            flushing = threading.Thread(target=part.settle, args=(0, LARGE))
            flushing.start()
            assert begun.wait(10)
            part.settle(LARGE, 2 * LARGE)
            with opened(part.path) as (fd, _):
                found = Journal.read(fd)
            assert found is not None
            assert [mark.prefix.stop for mark in found[1]] == [2 * LARGE]
            ended.set()
            flushing.join(10)
            assert not flushing.is_alive()
            with opened(part.path) as (fd, _):
                found = Journal.read(fd)
            assert found is not None
            assert {mark.prefix.stop for mark in found[1]} == {LARGE, 2 * LARGE}

    @pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
    def test_without_fallocate_the_size_is_set_all_the_same(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int | None
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, "no fallocate here")

        if number is None:
            monkeypatch.delattr(os, "posix_fallocate")
        else:
            monkeypatch.setattr(os, "posix_fallocate", fail)
        with store.create(100) as part:
            assert part.size == 100

    def test_in_memory_nothing_is_reserved_but_room_is_looked_for(
        self, store: BlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parts, "is_in_memory", lambda fd: True)
        with store.create(1 << 20) as part:
            assert part.size == 1 << 20
            assert part.path.stat().st_blocks == 0
            part.write(1 << 19, b"there")
            assert part.view()[1 << 19 :][:6] == b"there\0"
        with pytest.raises(InsufficientDisk):
            store.create(1 << 60)
        assert files(store.root) == []

    def test_it_is_known_which_file_systems_are_elsewhere(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "mountinfo").write_text(
            "36 35 0:1 / /a rw shared:1 - nfs4 host:/a rw\n37 35 0:2 / /b rw - fuse.sshfs host: rw\n"
            "38 35 0:3 / /c rw - ext4 /dev/vda rw\n39 35 garbled\n40 35 0:4 / /d - fuse x rw\n"
            "41 35 0:5 / /e rw a:1 b:2 - fuseblk /dev/vdb rw\n42 35 0:6 / /f - cifs //host/f rw\n"
        )
        monkeypatch.setattr(owners, "_MOUNTS", str(tmp_path / "mountinfo"))
        kinds = {number: owners._kind_of.__wrapped__(os.makedev(0, number)) for number in range(8)}
        assert kinds == {0: "", 1: "nfs4", 2: "fuse.sshfs", 3: "ext4", 4: "fuse", 5: "fuseblk", 6: "cifs", 7: ""}
        with (tmp_path / "mountinfo").open() as file:
            assert not owners.is_remote(file.fileno())
            for number, kind in kinds.items():
                monkeypatch.setattr(owners, "_kind_of", lambda device, kind=kind: kind)
                assert owners.is_remote(file.fileno()) == (number in (1, 2, 4, 6))
        monkeypatch.setattr(owners, "_MOUNTS", str(tmp_path / "absent"))

    @pytest.mark.parametrize("kind", ["tmpfs", "proc"])
    def test_it_is_known_which_file_systems_are_memory(self, kind: str) -> None:
        mounts = Path("/proc/mounts")
        places = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
        found = [place for _, place, its, *_ in places if its == kind and os.access(place, os.R_OK)]
        if not found:
            pytest.skip(f"no {kind} is mounted here")
        fd = os.open(found[-1], os.O_RDONLY)
        try:
            assert is_in_memory(fd) is (kind == "tmpfs")
        finally:
            os.close(fd)

    def test_blob_that_cannot_be_deleted_is_said_to_stay(self, store: BlobStore) -> None:
        path = store.path_of("0" * 64)
        path.mkdir(parents=True)
        assert not store.remove("0" * 64)

    def test_folder_that_cannot_be_listed_is_an_error(self, store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store.put(b"abc")

        def fail(*_: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(CacheError, match="ulimit"):
            list(store.digests())
        with pytest.raises(CacheError, match="ulimit"):
            store.sweep(0)


class TestSweep:
    def test_takes_what_a_killed_process_left_and_nothing_else(self, tmp_path: Path) -> None:
        done = run(
            """
            import os, signal, sys
            from pathlib import Path
            from holotensor_net.storage.blobs import BlobStore
            part = BlobStore(Path(sys.argv[1])).create(100)
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            tmp_path,
        )
        assert done.returncode == -signal.SIGKILL
        (orphan,) = files(tmp_path)
        later = BlobStore(tmp_path, clock=lambda: time.time() + 100)
        kept = later.put(b"abc")
        damaged = later.put(b"damaged")
        later.path_of(damaged).write_bytes(b"")
        assert later.open(damaged, 7) is None
        with later.create(10) as alive:
            assert orphan.exists()
            assert later.sweep(200) == 1
            assert not orphan.exists()
            assert later.sweep(50) == 1
            assert files(tmp_path) == sorted([later.path_of(kept), alive.path])
        assert later.age_of(kept) >= 100

    def test_goes_by_age_where_locks_do_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        def fail(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", fail)
        store = BlobStore(tmp_path, clock=lambda: time.time() + 100)
        with store.create(10) as part:
            monkeypatch.setattr(owners, "_machine", lambda: "0123456789ab")
            assert store.sweep(200) == 0
            assert store.sweep(50) == 1
            with pytest.raises(CacheError):
                part.publish(digest_of(bytes(10)))
        assert files(tmp_path) == []

    @pytest.mark.parametrize("folder", ["partial", "quarantine"])
    @pytest.mark.parametrize("name", ["thesis.txt", ".DS_Store", "0" * 64, f"thesis.{'0' * 31}"])
    def test_whatever_is_not_of_the_cache_stays(self, tmp_path: Path, folder: str, name: str) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"of somebody else")
        assert BlobStore(tmp_path, clock=lambda: time.time() + 1e6).sweep(50) == 0
        assert files(tmp_path) == [tmp_path / folder / name]

    def test_planted_link_is_deleted_and_not_followed(self, store: BlobStore, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_bytes(b"abc")
        (store.root / "partial").mkdir(parents=True)
        (store.root / "partial" / private_name(owned=False)).symlink_to(target)
        assert BlobStore(store.root, clock=lambda: time.time() + 100).sweep(50) == 1
        assert target.read_bytes() == b"abc"

    def test_strange_files_are_no_blobs(self, store: BlobStore) -> None:
        digest = store.put(b"abc")
        (store.path_of(digest).parent / "README").write_bytes(b"")
        (store.root / "blobs" / "stray").write_bytes(b"")
        assert list(store.digests()) == [(digest, 3)]
