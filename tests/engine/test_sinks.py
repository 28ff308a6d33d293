"""Where the bytes of an answer go: scattered by writing, or filled in from outside where memory lies ready."""

from __future__ import annotations

from pathlib import Path

from holotensor_net.engine.sinks import Scatter
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.memory import MemoryPart
from holotensor_net.values import RangeRequest

LONG = 1 << 18


def test_a_place_in_memory_can_be_filled_from_outside() -> None:
    part = MemoryPart(LONG)
    sink = Scatter([(RangeRequest(1000, 1000 + LONG), part)])
    room = sink.room(1000, 100_000)
    assert room is not None
    assert room.nbytes == 100_000
    room[:] = b"a" * 100_000
    rest = sink.room(101_000, 2 * LONG)
    assert rest is not None
    assert rest.nbytes == LONG - 100_000
    rest[:] = b"b" * rest.nbytes
    assert part.view() == b"a" * 100_000 + b"b" * (LONG - 100_000)


def test_what_belongs_to_several_places_or_to_none_has_to_be_written() -> None:
    sink = Scatter([(RangeRequest(LONG, 2 * LONG), MemoryPart(LONG)), (RangeRequest(0, LONG), MemoryPart(LONG))])
    assert sink.room(0, LONG) is not None
    assert sink.room(LONG - 10, LONG) is None  # ten bytes are not worth a read
    assert sink.room(2 * LONG, LONG) is None
    assert Scatter([(RangeRequest(LONG, 2 * LONG), MemoryPart(LONG))]).room(0, 2 * LONG) is None
    shared = Scatter([(RangeRequest(0, 2 * LONG), MemoryPart(2 * LONG)), (RangeRequest(LONG, LONG + 5), MemoryPart(5))])
    assert shared.room(0, 2 * LONG) is None


def test_a_place_that_grows_has_to_be_written() -> None:
    part = MemoryPart(None)
    sink = Scatter([(RangeRequest(0, 1 << 62), part)])
    assert sink.room(0, LONG) is None
    sink(0, memoryview(b"abc"))
    assert part.view() == b"abc"


def test_room_outlives_the_part_that_gave_it() -> None:
    for size in (1 << 17, 1 << 21):
        part = MemoryPart(size)
        room = part.room(size - 4, 100)
        assert room is not None
        assert room.nbytes == 4
        part.discard()
        room[:] = b"late"  # a read that was under way
        assert part.room(0, 4) is None


def test_blocks_end_where_pages_do_in_the_place_that_they_belong_to() -> None:
    sink = Scatter(
        [(RangeRequest(1000, 1000 + LONG), MemoryPart(LONG)), (RangeRequest(7 * LONG, 8 * LONG), MemoryPart(LONG))]
    )
    assert [sink.block(offset, 4096) for offset in (1000, 1001, 1000 + 4095, 1000 + 4096)] == [4096, 4095, 1, 4096]
    assert sink.block(7 * LONG + 5, 4096) == 4091
    assert 0 < sink.block(0, 4096) <= 4096  # what is asked for with it, and belongs nowhere


def test_only_what_files_take_is_time_that_was_not_read_in(tmp_path: Path) -> None:
    with BlobStore(tmp_path).create(2 * LONG) as part:
        sink = Scatter(
            [(RangeRequest(0, 2 * LONG), part), (RangeRequest(2 * LONG, 3 * LONG), MemoryPart(LONG))],
            clock=map(float, range(100)).__next__,
        )
        sink(2 * LONG, memoryview(bytes(LONG)))
        sink(0, memoryview(bytes(10)))
        assert sink.spent == 0
        sink(0, memoryview(bytes(LONG)))
        sink(LONG, memoryview(bytes(2 * LONG)))
        assert sink.spent == 2
