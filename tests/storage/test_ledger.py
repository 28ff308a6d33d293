"""Ledger: counted once, then kept up by news, its own and others'; whoever has missed some looks again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holotensor_net.storage.blobs import Left
from holotensor_net.storage.ledger import Ledger, Named
from holotensor_net.storage.news import Item, Kind, News

A, B, C = "a" * 64, "b" * 64, "c" * 64
ENTRY, OTHER = "1" * 64, "2" * 64
TOKEN = "f" * 32


class Folder:
    """What a look at it would find, how often that was done, and something to happen meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = {A: 1}
        self.named = {ENTRY: Named(A)}
        self.looks = 0
        self.meanwhile = lambda: None

    def _blobs(self) -> Iterator[tuple[str, int]]:
        self.looks += 1
        yield from list(self.blobs.items())
        self.meanwhile()

    def ledger(self, *, clock: list[float] | None = None) -> Ledger:
        now, news = clock or [0.0], News(self.path / "news", 1 << 20, lambda: self.path / "spare")
        return Ledger(news, self._blobs, dict, lambda _: dict(self.named), clock=lambda: now[0])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def blob(digest: str, size: int) -> Item:
    return Item(Kind.BLOB, other=digest, number=size)


def test_each_knows_what_the_other_does_and_looks_once(folder: Folder) -> None:
    one, other = folder.ledger(), folder.ledger()
    one.refresh()
    other.count()
    assert (one.size, other.size, other.entries()) == (1, 1, [])
    one.tell(blob(B, 20), Item(Kind.ENTRY, OTHER, B, 7_000_000_000), Item(Kind.PART, ENTRY, TOKEN, 300))
    other.tell(blob(C, 4000))
    assert one.is_counted()
    assert one.size == other.size == 4321
    assert sorted(one.blobs()) == [A, B, C]
    assert dict(one.entries()) == {ENTRY: Named(A), OTHER: Named(B, 7.0)}
    assert [(token, left.subject, left.size) for token, left in other.parts()] == [(TOKEN, ENTRY, 300)]
    assert one.unnamed() == [C]
    other.tell(Item(Kind.NO_BLOB, other=B), Item(Kind.NO_PART, ENTRY, TOKEN), Item(Kind.NO_PART, ENTRY, TOKEN))
    other.tell(Item(Kind.NO_BLOB, other=B), blob(C, 4000))
    one.refresh()
    assert one.size == other.size == 4001
    assert folder.looks == 2


def test_an_entry_that_names_other_bytes_lets_go_of_the_first(folder: Folder) -> None:
    ledger = folder.ledger()
    ledger.refresh()
    ledger.tell(blob(B, 1), Item(Kind.ENTRY, OTHER, A), Item(Kind.ENTRY, ENTRY, B))
    assert [ledger.is_named(each) for each in (A, B)] == [True, True]
    ledger.tell(Item(Kind.NO_ENTRY, OTHER), Item(Kind.NO_ENTRY, OTHER))
    ledger.miss(OTHER)
    assert [ledger.is_named(each) for each in (A, B)] == [False, True]
    with ledger.pinned(A, 1):
        assert ledger.unnamed() == []
    assert ledger.unnamed() == [A]


def test_who_has_missed_something_knows_of_its_own_doings_at_least(folder: Folder) -> None:
    ledger = folder.ledger()
    ledger.refresh()
    ledger.tell(blob(B, 20), Item(Kind.ENTRY, OTHER, B))
    (folder.path / "news").unlink()
    for digest, name in ((A, ENTRY), (B, OTHER)):
        ledger.tell(Item(Kind.NO_ENTRY, name))
        assert not ledger.is_named(digest)
        ledger.tell(Item(Kind.NO_BLOB, other=digest))
    assert ledger.size == 0
    assert not ledger.is_counted()


def test_what_happens_during_the_look_counts(folder: Folder) -> None:
    ledger, other = folder.ledger(), folder.ledger()

    def meanwhile() -> None:
        other.tell(blob(B, 20), blob(C, 300))
        other.tell(Item(Kind.NO_BLOB, other=C), Item(Kind.NO_BLOB, other=A))

    folder.meanwhile = meanwhile
    with ledger.pinned("d" * 64, 4000):  # is on its way: told before, and not there yet
        ledger.count()
        assert (ledger.size, sorted(ledger.blobs())) == (4020, [B, "d" * 64])
    with ledger.pinned("d" * 64, 4000):
        pass
    folder.meanwhile = lambda: None
    folder.blobs = {B: 20}
    ledger.count()
    assert ledger.size == 20


@pytest.mark.parametrize("way", ["begun anew", "long ago"])
def test_who_has_missed_something_looks_again(folder: Folder, way: str) -> None:
    now = [0.0]
    ledger, other = folder.ledger(clock=now), folder.ledger()
    other.tell(blob(A, 1))
    ledger.refresh()
    ledger.refresh()
    assert folder.looks == 1
    folder.blobs[B] = 20  # and nobody told
    if way == "begun anew":
        other.tell(blob(C, 300))
        folder.blobs[C] = 300
        (folder.path / "news").unlink()
        ledger.tell(blob(C, 300))
        assert not ledger.is_counted()
        ledger.count()
        assert ledger.size == 321
    else:
        now[0] = 301.0
        ledger.refresh()
    assert ledger.is_counted()
    assert B in ledger.blobs()


def test_what_was_counted_is_not_believed_for_ever_nor_looked_at_all_the_time(folder: Folder) -> None:
    now = [0.0]
    ledger = folder.ledger(clock=now)
    ledger.refresh()
    folder.blobs[B] = 20  # by somebody who is not heard
    now[0] = 299.0
    assert ledger.is_counted()
    now[0] = 301.0
    assert not ledger.is_counted()

    def slow() -> None:
        now[0] += 10.0

    folder.meanwhile = slow
    ledger.count()
    assert (ledger.size, ledger.entries()) == (21, [(ENTRY, Named(A))])
    now[0] += 900.0
    assert ledger.is_counted()
    now[0] += 100.0
    assert not ledger.is_counted()


def test_without_a_place_for_news_it_knows_of_its_own_doings(folder: Folder) -> None:
    (folder.path / "news").mkdir()
    ledger = folder.ledger()
    ledger.refresh()
    ledger.tell(blob(B, 20), Item(Kind.PART, ENTRY, TOKEN, 300))
    assert ledger.size == 321
    assert ledger.parts()[0][1] == Left(ENTRY, 300, ledger.parts()[0][1].last)
    ledger.tell(Item(Kind.NO_BLOB, other=B), Item(Kind.NO_PART, ENTRY, TOKEN))
    assert ledger.size == 1
    ledger.loosen(A)
    assert ledger.loose() == {A}
    ledger.tell(Item(Kind.NO_BLOB, other=A))
    assert (ledger.size, ledger.loose()) == (0, set())
