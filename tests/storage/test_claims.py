"""Claims: one has it, whoever that is, until it ends; and where there are no locks, nobody is held up."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holotensor_net.storage.claims import Claims

NAME, OTHER = "0123456789abcdef" * 4, "f" * 64

pytestmark = pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="this system has no locks of open files")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "claims"


@pytest.mark.parametrize("in_one_process", [True, False])
def test_one_has_it_until_that_one_ends(path: Path, in_one_process: bool) -> None:
    mine = Claims(path)
    if in_one_process:
        other = Claims(path)
        assert other.take(NAME)
    else:
        script = "import sys; from holotensor_net.storage.claims import Claims; from pathlib import Path\n"
        script += "claims = Claims(Path(sys.argv[1])); print(claims.take(sys.argv[2]), flush=True); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path), NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
    assert not mine.is_free(NAME)
    assert not mine.take(NAME)
    assert mine.take(OTHER)
    if in_one_process:
        assert not other.is_free(OTHER)
        other.release(NAME)
    else:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    assert mine.is_free(NAME)
    assert mine.take(NAME)
    assert mine.take(NAME)  # it is ours already


def test_numbers_of_one_name_are_claimed_apart(path: Path) -> None:
    one, other = Claims(path), Claims(path)
    for number in range(10):
        assert one.take(NAME, number)
    assert other.take(NAME, 10)
    assert [other.is_free(NAME, number) for number in (0, 9, 10, 11)] == [False, False, True, True]
    assert not one.take(NAME, 10)
    one.release(NAME, 5)
    assert [other.take(NAME, number) for number in (4, 5, 6)] == [False, True, False]
    assert one.take(OTHER, 1 << 100)


def test_numbers_that_follow_each_other_are_one_lock_to_the_kernel(path: Path) -> None:
    claims = Claims(path)
    locks = Path("/proc/locks")
    if not locks.exists():
        pytest.skip("the system does not tell of its locks")
    for number in range(100):
        assert claims.take(NAME, number)
    inode = f":{path.stat().st_ino} "
    assert sum(inode in line for line in locks.read_text().splitlines()) <= 2  # and one for who has the file open


def test_who_closes_while_another_thread_opens_holds_nobody_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, opened = Claims(path), os.open

    def closing(*args: Any, **options: Any) -> int:
        fd = opened(*args, **options)
        claims.close()
        return fd

    monkeypatch.setattr(os, "open", closing)
    assert claims.take(NAME)
    monkeypatch.undo()
    assert Claims(path).take(NAME)


def test_end_frees_all_of_one_and_nothing_of_another(path: Path) -> None:
    first, second, third = Claims(path), Claims(path), Claims(path)
    assert first.take(NAME)
    assert second.take(OTHER)
    second.close()
    assert third.take(OTHER)
    assert not third.take(NAME)
    assert second.take(NAME)  # closed, it holds nobody up
    assert not third.take(NAME)
    del first
    assert third.take(NAME)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_of_a_fork_neither_frees_nor_keeps_what_its_parent_has(path: Path) -> None:
    mine, other = Claims(path), Claims(path)
    assert mine.take(NAME)
    told, telling = os.pipe()
    held, holding = os.pipe()
    child = os.fork()
    if not child:
        os.close(holding)
        mine.release(NAME)
        os.write(telling, b"1" if mine.is_free(NAME) and not Claims(path).take(NAME) else b"0")
        os.read(held, 1)  # until the parent ends it
        os._exit(0)
    os.close(held)
    try:
        assert os.read(told, 1) == b"1"
        assert not other.take(NAME)
        mine.close()
        assert other.take(NAME)
    finally:
        os.close(holding)
        assert os.waitpid(child, 0)[1] == 0
        os.close(told)
        os.close(telling)


@pytest.mark.parametrize("place", ["folder", "link", "no folder"])
def test_where_there_can_be_no_file_everyone_gets_it(path: Path, place: str) -> None:
    if place == "no folder":
        path.parent.write_text("")
    else:
        path.parent.mkdir()
    if place == "folder":
        path.mkdir()
    elif place == "link":
        path.symlink_to(path.parent / "elsewhere")
    first, second = Claims(path), Claims(path)
    assert first.take(NAME)
    assert second.is_free(NAME)
    assert second.take(NAME)
    second.release(NAME)
    assert not (path.parent / "elsewhere").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_where_no_lock_works_everyone_gets_it(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    asked = []

    def refuse(*args: object) -> bytes:
        asked.append(args)
        raise OSError(number, os.strerror(number))

    first, second = Claims(path), Claims(path)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    for claims in (first, second):
        assert claims.take(NAME)
        assert claims.take(NAME)
        assert claims.is_free(NAME)
        claims.release(NAME)
    assert len(asked) == 2  # it is not tried again


def test_last_one_to_go_takes_the_file_along(path: Path) -> None:
    first, second = Claims(path), Claims(path)
    assert first.take(NAME)
    assert second.take(OTHER)
    first.close()
    assert path.exists()
    assert Claims(path).take(NAME)
    second.close()
    assert not path.exists()


def test_file_is_private_and_stays_empty(path: Path) -> None:
    claims = Claims(path)
    assert not path.exists()
    assert claims.take(NAME)
    assert path.stat().st_size == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
