"""Where the bytes of an answer go: scattered by writing, or filled in from outside where memory lies ready."""

from __future__ import annotations

import os
from pathlib import Path

from holotensor_net.engine.sinks import Scatter
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.memory import MemoryPart
from holotensor_net.values import RangeRequest

LONG = 1 << 18
PAGE = 1 << 16
BLOCK = 1 << 19


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


def test_what_belongs_into_one_file_may_come_in_a_pipe(tmp_path: Path) -> None:
    files = BlobStore(tmp_path)
    with files.create(3 * BLOCK) as part, files.create(100) as short:
        sink = Scatter(
            [
                (RangeRequest(1000, 1000 + 3 * BLOCK), part),
                (RangeRequest(4 * BLOCK, 4 * BLOCK + LONG), MemoryPart(LONG)),
                (RangeRequest(6 * BLOCK, 6 * BLOCK + 100), short),
            ]
        )
        assert sink.piped(1000, 0) == BLOCK
        assert sink.piped(1000 + 5, 0) == BLOCK - 5  # up to where a large page may end
        assert sink.piped(1000 + 5, 100) == BLOCK - 105
        assert sink.piped(1000 + 3 * BLOCK - 10, 0) == 0  # ten bytes are not worth it
        assert sink.piped(1000 + 2 * BLOCK, BLOCK - 10) == 10  # unless they can come along
        elsewhere = (0, 4 * BLOCK, 6 * BLOCK, 7 * BLOCK)
        assert [sink.piped(offset, 0) for offset in elsewhere] == [0, 0, 0, 0]


def test_a_pipe_that_is_full_gives_what_ends_where_a_page_may(tmp_path: Path) -> None:
    with BlobStore(tmp_path).create(LONG) as part:
        sink = Scatter([(RangeRequest(1000, 1000 + LONG), part)])
        source, end = os.pipe()
        with open(source, "rb"), open(end, "wb", buffering=0) as pipe:
            pipe.write(b"a" * PAGE)
            assert sink.take(1000, source, PAGE, False) == PAGE
            pipe.write(b"b" * 60_000)
            assert sink.take(1000 + PAGE, source, 10_000, False) == 10_000  # there is no such place: all of it
            assert sink.take(1000 + PAGE + 10_000, source, 50_000, True) == 50_000
            pipe.write(b"c" * 10_000)
            assert sink.take(1000 + PAGE + 60_000, source, 10_000, False) == PAGE - 60_000
        assert part.view()[: 2 * PAGE] == b"a" * PAGE + b"b" * 60_000 + b"c" * (PAGE - 60_000)
