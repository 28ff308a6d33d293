"""The end of a part file: whatever stands there, nothing is believed that the bytes do not bear out."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from holotensor_net.storage import journal
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.files import digest_of
from holotensor_net.storage.journal import TAIL

SIZE = 300
DATA = random.Random(3).randbytes(SIZE)
SUBJECT = "a" * 64
THERE = [(0, 100), (150, 200)]
NOTE_ROOM = 1 << 12
SLOT_ROOM = (TAIL - NOTE_ROOM) // 2

GARBLED: list[Any] = [
    *(None, True, False, -1, 1, SIZE, SIZE + 1, 1 << 63, 1 << 200, -0.0, 99.5, 100.0, 1e300),
    *(float("inf"), float("-inf"), float("nan"), "", "100", "\ud800", digest_of(DATA), [], {}, [[]], {"a": 1}, [100]),
    [[0, 100, digest_of(DATA[:100])]],
]


class Left:
    """A part file that was left, and what is made of it when other bytes stand there."""

    def __init__(self, root: Path) -> None:
        self.store = BlobStore(root)
        with self.store.create(SIZE, subject=SUBJECT, note={"what": "this"}) as part:
            part.write(0, DATA)
            for span in THERE:
                part.settle(*span)
            part.keep()
        self.content = self.path.read_bytes()
        self.path.unlink()

    @property
    def path(self) -> Path:
        (path,) = (self.store.root / "partial").iterdir()
        return path

    def settled(self, content: bytes) -> list[tuple[int, int]]:
        """What is believed of a part file with this content: never a byte too many, and no error."""
        path = self.store.root / "partial" / f"{SUBJECT}..{'0' * 32}"
        path.write_bytes(content)
        found = self.store.resume(SUBJECT)
        settled: list[tuple[int, int]] = []
        if found is not None:
            with found[0] as part:
                settled, view = part.settled, part.view()
                assert part.size == SIZE
                assert all(view[start:stop] == DATA[start:stop] for start, stop in settled)
                assert [0, *itertools.chain(*settled), SIZE] == sorted([0, *itertools.chain(*settled), SIZE])
                assert {type(place) for span in settled for place in span} <= {int}
        assert list((self.store.root / "partial").iterdir()) == []
        return settled

    def with_note(self, told: Any) -> bytes:
        return self._with(told, SIZE, NOTE_ROOM)

    def with_marks(self, told: Any, slot: int = 0) -> bytes:
        return self._with(told, SIZE + NOTE_ROOM + slot * SLOT_ROOM, SLOT_ROOM)

    def _with(self, told: Any, place: int, room: int) -> bytes:
        line = journal._sealed(told)
        assert len(line) <= room
        return self.content[:place] + line.ljust(room, b"\0") + self.content[place + room :]


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path / "cache")


def test_what_was_left_is_believed(left: Left) -> None:
    assert left.settled(left.content) == THERE


def test_every_byte_counts(left: Left) -> None:
    for place, byte in enumerate(left.content):
        if byte or place < SIZE:
            left.settled(left.content[:place] + bytes([byte ^ 1 << place % 8]) + left.content[place + 1 :])


def test_every_length_counts(left: Left) -> None:
    lengths = [*range(SIZE + 400), *range(SIZE + 400, SIZE + TAIL, 97), SIZE + TAIL - 1]
    for length in lengths:
        assert left.settled(left.content[:length]) == []
    assert left.settled(left.content + b"\0") == []


@pytest.mark.parametrize("name", ["schema", "size", "note"])
def test_garbled_note_is_no_error(left: Left, name: str) -> None:
    sound = {"schema": 1, "size": SIZE, "note": {"what": "this"}}
    assert left.settled(left.with_note(sound)) == THERE
    for value in GARBLED:
        left.settled(left.with_note({**sound, name: value}))
    assert left.settled(left.with_note({key: value for key, value in sound.items() if key != name})) == []


def test_garbled_marks_are_no_error(left: Left) -> None:
    head, apart = [0, 100, digest_of(DATA[:100])], [150, 200, digest_of(DATA[150:200])]
    assert left.settled(left.with_marks([head, apart])) == THERE
    for value, place, slot in itertools.product(GARBLED, range(3), range(2)):
        for garbled in ([*head[:place], value, *head[place + 1 :]], [*apart[:place], value, *apart[place + 1 :]]):
            for marks in ([garbled, apart], [head, garbled], [head, apart, garbled]):
                left.settled(left.with_marks(marks, slot))
        left.settled(left.with_marks(value, slot))
        left.settled(left.with_marks([value], slot))
        left.settled(left.with_marks([head, value], slot))


def test_spans_that_overlap_count_once(left: Left) -> None:
    spans = [
        [start, stop, digest_of(DATA[start:stop])] for start, stop in [(0, 100), (90, 160), (120, 180), (150, 200)]
    ]
    for order in itertools.permutations(spans):
        left.settled(left.with_marks(order))
        left.settled(left.with_marks([spans[0], *order]))


@pytest.mark.parametrize("whole", ["note", "marks"])
def test_bottomless_journal_is_no_error(left: Left, whole: str) -> None:
    room = NOTE_ROOM if whole == "note" else SLOT_ROOM
    place = SIZE if whole == "note" else SIZE + NOTE_ROOM
    body = b"[" * (room - 100)
    line = digest_of(body).encode() + b" " + body + b"\n"
    left.settled(left.content[:place] + line.ljust(room, b"\0") + left.content[place + room :])


def test_anything_is_no_error(left: Left) -> None:
    some = random.Random(7)

    def value(depth: int = 0) -> Any:
        if depth < 3 and some.random() < 0.5:
            return [value(depth + 1) for _ in range(some.randrange(5))]
        return some.choice(GARBLED) if some.random() < 0.5 else some.randrange(SIZE + 2)

    for _ in range(1000):
        left.settled(left.with_marks([value() for _ in range(some.randrange(5))], some.randrange(2)))
