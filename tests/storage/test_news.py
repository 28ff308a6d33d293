"""News: what one process tells, the others hear, in order and once; what was missed is said to be missed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holotensor_net.storage.news import Item, Kind, News, Place

A, B = "a" * 64, "0123456789abcdef" * 4
ITEMS = [
    Item(Kind.BLOB, other=B + "", number=1 << 40),
    Item(Kind.ENTRY, A, B, 1_700_000_000),
    Item(Kind.NO_ENTRY, A),
    Item(Kind.PART, A, B[:32], 5),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "news"


def made(path: Path, most: int = 1 << 20) -> News:
    return News(path, most, lambda: path.with_name("spare"))


def heard(news: News, place: Place) -> list[tuple[object, ...]]:
    found = news.since(place)
    assert found is not None
    return [(item.kind, item.name[:2], item.other[:32], item.number) for item in found[0]]


def told(items: list[Item]) -> list[tuple[object, ...]]:
    return [(item.kind, (item.name or "0" * 64)[:2], (item.other or "0" * 64)[:32], item.number) for item in items]


def test_asking_makes_nothing_and_what_comes_later_is_heard_from_its_beginning(path: Path) -> None:
    reader, writer = made(path, 1 << 20), made(path, 1 << 20)
    place = reader.end()
    assert reader.since(place) == ([], place)
    assert not path.parent.exists()
    assert writer.tell(ITEMS[:2])
    assert writer.tell(ITEMS[2:])
    assert heard(reader, place) == told(ITEMS)
    _, after = reader.since(place) or ([], place)
    assert reader.since(after) == ([], after)
    assert path.stat().st_mode & 0o777 == 0o600


def test_who_begins_later_hears_only_what_follows(path: Path) -> None:
    made(path, 1 << 20).tell(ITEMS)
    reader = made(path, 1 << 20)
    place = reader.end()
    assert heard(reader, place) == []
    made(path, 1 << 20).tell(ITEMS[1:2])
    assert heard(reader, place) == told(ITEMS[1:2])


def test_what_has_grown_is_followed_by_another_and_nobody_misses_anything(path: Path) -> None:
    reader, lagging, writer = made(path, 1000), made(path, 1000), made(path, 1000)
    place = late = unborn = reader.end()
    for number in range(40):
        items = [Item(Kind.BLOB, other=B, number=number), *ITEMS[1:]]
        assert writer.tell(items)
        if number == 1:
            late = lagging.end()
        found = reader.since(place)
        assert found is not None
        assert [(i.kind, i.number) for i in found[0] if i.kind is not Kind.FOLLOWS] == [
            (i.kind, i.number) for i in items
        ]
        place = found[1]
        assert path.stat().st_size <= 1000 + len(ITEMS) * 88
    assert lagging.since(late) is None  # it was more than one file behind
    assert made(path).since(unborn) is None
    assert os.listdir(path.parent) == ["news"]


@pytest.mark.parametrize("way", ["grown", "deleted", "replaced", "garbled", "torn"])
def test_what_was_missed_is_said_and_not_for_ever(path: Path, way: str) -> None:
    reader, writer = made(path, 1000), made(path, 1000)
    writer.tell(ITEMS)
    place = reader.end()
    if way == "grown":
        for _ in range(8):  # more than one file behind
            writer.tell(ITEMS)
    elif way == "deleted":
        path.unlink()
    elif way == "replaced":
        path.unlink()
        made(path, 1000).tell(ITEMS)
    elif way == "garbled":
        with path.open("ab") as file:
            file.write(os.urandom(200))
    else:
        with path.open("ab") as file:
            file.write(b"half an item")
        writer.tell(ITEMS)
    assert reader.since(place) is None
    place = reader.end()
    assert heard(reader, place) == []
    assert writer.tell(ITEMS)
    assert heard(reader, place) == told(ITEMS)


@pytest.mark.parametrize("found", ["by its name", "by its number of links", "when it is used"])
def test_file_whose_handle_is_stale_is_opened_again(path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """As on a network file system, when another machine has put another file in its place."""
    reader, writer = made(path), made(path)
    writer.tell(ITEMS)
    place = reader.end()
    assert place.file is not None
    stale = place.file.fileno()
    number = path.stat().st_ino
    os.link(path, path.with_name("hidden"))  # what such a system does to what is open: links stay
    writer.begin_anew()
    writer.tell(ITEMS)

    def fails(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(fd: int, *arguments: Any) -> Any:
            if fd == stale:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return call(fd, *arguments)

        return called

    if found != "by its name":
        for name in ("fstat", "pread", "write"):
            monkeypatch.setattr(os, name, fails(getattr(os, name)))
    if found == "when it is used":  # even its name seems to be what it was, for the first time
        place.file.identity = path.stat().st_dev, path.stat().st_ino
    assert path.stat().st_ino != number
    assert reader.since(place) is None
    place = reader.end()
    assert writer.tell(ITEMS[:2])
    assert heard(reader, place) == told(ITEMS[:2])
    assert reader.tell(ITEMS[2:])
    assert heard(writer, place) == told(ITEMS)


def test_who_tells_through_a_stale_handle_tells_the_file_that_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = made(path), made(path)
    writer.tell(ITEMS)
    place = reader.end()
    write, tries = os.write, []

    def stale_once(fd: int, data: bytes) -> int:
        tries.append(fd)
        if len(tries) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return write(fd, data)

    monkeypatch.setattr(os, "write", stale_once)
    assert writer.tell(ITEMS)
    assert heard(reader, place) == told(ITEMS)
    assert len(tries) == 2


def test_handle_that_was_let_go_is_no_reason_to_have_missed_anything(path: Path) -> None:
    news = made(path)
    news.tell(ITEMS)
    place = news.end()
    news.close()
    assert news.since(place) == ([], place)
    news.close()
    news.tell(ITEMS)
    assert heard(news, place) == told(ITEMS)


def test_who_found_no_news_hears_that_it_has_begun_anew(path: Path) -> None:
    reader, writer = made(path), made(path)
    place = reader.end()
    writer.begin_anew()
    assert not path.parent.exists()
    assert reader.since(place) == ([], place)
    writer.tell(ITEMS)
    writer.begin_anew()
    assert reader.since(place) is None
    place = reader.end()
    assert writer.tell(ITEMS)
    assert heard(reader, place) == told(ITEMS)


def test_more_than_can_be_news_was_missed(path: Path) -> None:
    reader, writer = made(path, 1000), made(path, 1000)
    writer.tell(ITEMS)
    place = reader.end()
    os.truncate(path, 1 << 40)
    assert reader.since(place) is None
    place = reader.end()
    assert heard(reader, place) == []
    assert writer.tell(ITEMS)
    assert heard(reader, place) == told(ITEMS)
    assert path.stat().st_size < 1000  # another has followed


@pytest.mark.parametrize("planted", ["link", "pipe", "folder", "nothing may be written"])
def test_what_cannot_be_written_has_no_news(path: Path, tmp_path: Path, planted: str) -> None:
    path.parent.mkdir()
    if planted == "link":
        (tmp_path / "other").write_bytes(b"")
        path.symlink_to(tmp_path / "other")
    elif planted == "pipe":
        os.mkfifo(path)
    elif planted == "folder":
        path.mkdir()
    else:
        path.parent.rmdir()
        path.parent.write_bytes(b"a file in the folder's place")
    news = made(path, 1000)
    assert not news.tell(ITEMS)
    assert news.since(news.end()) == ([], Place())


def test_many_tell_at_once_and_nothing_is_lost(path: Path) -> None:
    script = """
import sys
from pathlib import Path
from holotensor_net.storage.news import Item, Kind, News
news = News(Path(sys.argv[1]), 1 << 30, lambda: None)
for number in range(500):
    assert news.tell([Item(Kind.BLOB, other="ab" * 32, number=int(sys.argv[2]) * 1000 + number)] * 2)
"""
    news = made(path, 1 << 30)
    place = news.end()
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), str(each)]) for each in range(3)]
    seen: list[int] = []
    while len(seen) < 3000:
        have_ended = all(process.poll() is not None for process in processes)
        found = news.since(place)
        assert found is not None
        seen += [item.number for item in found[0] if item.kind is Kind.BLOB]
        if not found[0] and have_ended:
            break
        place = found[1]
    assert [process.wait(60) for process in processes] == [0] * 3
    for each in range(3):
        assert [number for number in seen if number // 1000 == each] == [
            each * 1000 + number for number in range(500) for _ in range(2)
        ]


def test_threads_share_one_file(path: Path) -> None:
    news = made(path, 1 << 30)
    place = news.end()
    threads = [threading.Thread(target=lambda: [news.tell(ITEMS) for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(heard(news, place)) == 4 * 100 * len(ITEMS)
    news.close()
    assert len(heard(news, Place())) == 4 * 100 * len(ITEMS)
