"""Memory that stands in for a part file."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import NetworkError
from holotensor_net.storage import memory
from holotensor_net.storage.memory import MemoryPart
from holotensor_net.values import blake3_of

MIB = 1 << 20

reclaims = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system would not take spare memory back")


@st.composite
def pieces(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """Some bytes, and bounds that cut them into disjoint pieces, in any order."""
    data = draw(st.binary(min_size=1, max_size=200))
    cuts = sorted({0, len(data), *draw(st.sets(st.integers(0, len(data))))})
    return data, draw(st.permutations(list(itertools.pairwise(cuts))))


@given(pieces())
def test_pieces_in_any_order_make_the_whole(case: tuple[bytes, list[tuple[int, int]]]) -> None:
    data, bounds = case
    part = MemoryPart(len(data))
    for start, stop in bounds:
        part.write(start, memoryview(data)[start:stop])
    assert part.view() == data


@pytest.mark.parametrize("size", [100, MIB])
def test_parts_of_a_part_are_its_memory(size: int) -> None:
    whole = MemoryPart(size, spare=4 * MIB)
    parts = [whole.part(start, start + 10) for start in range(0, 100, 10)]
    for number, part in enumerate(parts):
        part.write(0, bytes([number]) * 10)
        with pytest.raises(ValueError, match="beyond the end"):
            part.write(1, bytes(10))
    assert whole.view()[:100] == bytes(number // 10 for number in range(100))
    views = [part.view() for part in parts]
    whole.discard()
    del whole, parts
    assert b"".join(views) == bytes(number // 10 for number in range(100))
    assert all(view.readonly for view in views)


@given(st.lists(st.binary(max_size=50)))
def test_without_a_size_it_grows(blocks: list[bytes]) -> None:
    part = MemoryPart(None)
    for block in blocks:
        part.write(len(part.view()), block)
    assert part.view() == b"".join(blocks)


@pytest.mark.parametrize("size", [0, None])
def test_nothing_is_a_view_too(size: int | None) -> None:
    part = MemoryPart(size)
    part.write(0, b"")
    assert part.view() == b""


@pytest.mark.parametrize(("size", "offset", "data"), [(4, 3, b"xy"), (4, 5, b"x"), (0, 0, b"x"), (4, 0, b"x" * 5)])
def test_nothing_is_written_beyond_a_known_end(size: int, offset: int, data: bytes) -> None:
    part = MemoryPart(size)
    with pytest.raises(ValueError, match="beyond the end"):
        part.write(offset, data)
    assert part.view() == bytes(size)


@pytest.mark.parametrize("size", [3, None])
def test_a_view_can_be_read_only(size: int | None) -> None:
    part = MemoryPart(size)
    part.write(0, b"abc")
    view = part.view()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 0


@pytest.mark.parametrize("size", [3, None])
def test_a_view_outlives_what_is_discarded(size: int | None) -> None:
    part = MemoryPart(size)
    part.write(0, b"abc")
    view = part.view()
    part.discard()
    part.discard()
    assert view == b"abc"
    assert part.view() == b""


@pytest.mark.parametrize("size", [3, None])
def test_nothing_is_written_once_discarded(size: int | None) -> None:
    part = MemoryPart(size)
    part.discard()
    with pytest.raises(ValueError, match="beyond the end"):
        part.write(0, b"abc")


def test_what_has_grown_can_be_cut() -> None:
    part = MemoryPart(None)
    part.write(0, b"first, longer")
    part.write(0, b"second")
    part.truncate(6)
    assert part.view() == b"second"


@pytest.mark.parametrize("size", [3, 1, 0])
def test_what_was_made_too_long_can_be_cut(size: int) -> None:
    part = MemoryPart(3)
    part.write(0, b"abc")
    part.truncate(size)
    assert part.view() == b"abc"[:size]


def test_threads_may_write_disjoint_pieces_at_once() -> None:
    size, count = 1 << 16, 8
    part = MemoryPart(size * count)
    together = threading.Barrier(count)

    def fill(number: int) -> None:
        together.wait(5)
        for start in range(0, size, 4096):
            part.write(number * size + start, bytes([number]) * 4096)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert part.view() == b"".join(bytes([number]) * size for number in range(count))


def test_the_digest_is_taken_as_the_bytes_come_in_whatever_order() -> None:
    piece, count = 300_000, 20
    data = random.Random(3).randbytes(piece * count)
    part = MemoryPart(len(data), is_proved=True)
    order = random.Random(4).sample(range(count), count)

    def bring(numbers: list[int]) -> None:
        for number in numbers:
            part.write(number * piece, data[number * piece : (number + 1) * piece])
            part.settle(number * piece, (number + 1) * piece)

    threads = [threading.Thread(target=bring, args=(order[first:-1:4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert part._prefix is not None
    assert part._prefix.length == piece * order[-1]  # all up to what has not come
    part.write(order[-1] * piece, data[order[-1] * piece : (order[-1] + 1) * piece])
    assert part.digest() == blake3_of(data)
    part.truncate(piece)
    assert part.digest() == blake3_of(data[:piece])
    part.settle(0, piece)
    part.discard()
    part.settle(0, 2 * piece)  # a piece that was late


@pytest.mark.parametrize("size", [1 << 62, 9_999_999_999_999_999_999])
def test_more_than_memory_holds_is_refused_in_words(size: int) -> None:
    with pytest.raises(NetworkError, match="there is no memory for"):
        MemoryPart(size)


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> memory._Spare:
    """What is kept for others, nothing so far."""
    kept = memory._Spare()
    monkeypatch.setattr(memory, "_SPARE", kept)
    return kept


def address(part: MemoryPart) -> int:
    room = part.room(0, 1)
    assert room is not None
    return ctypes.addressof(ctypes.c_char.from_buffer(room))


@reclaims
@pytest.mark.parametrize("following", [4 * MIB, 4 * MIB - 5, 3 * MIB])
def test_memory_that_nobody_looks_into_any_more_is_used_again(spare: memory._Spare, following: int) -> None:
    part = MemoryPart(4 * MIB, spare=8 * MIB)
    first = address(part)
    view = part.view()[MIB:]
    part.discard()
    other = MemoryPart(following, spare=8 * MIB)
    assert address(other) != first
    del view
    again = MemoryPart(following, spare=8 * MIB)
    assert address(again) == first
    assert len(again.view()) == following
    with pytest.raises(ValueError, match="beyond the end"):
        again.write(following, b"x")


@reclaims
def test_what_fits_badly_is_left_for_others(spare: memory._Spare) -> None:
    MemoryPart(8 * MIB, spare=64 * MIB).discard()
    MemoryPart(2 * MIB, spare=64 * MIB).discard()
    MemoryPart(16 * MIB, spare=64 * MIB).discard()
    assert sorted(map(len, spare._mappings)) == [2 * MIB, 8 * MIB, 16 * MIB]


@pytest.mark.parametrize(("most", "kept"), [(0, 0), (2 * MIB - 1, 0), (7 * MIB, 3), (1000 * MIB, 5)])
def test_no_more_is_kept_than_may_be(spare: memory._Spare, most: int, kept: int) -> None:
    parts = [MemoryPart(2 * MIB, spare=most) for _ in range(5)]
    for part in parts:
        part.discard()
    assert len(spare._mappings) == (kept if hasattr(mmap, "MADV_FREE") else 0)


@reclaims
def test_what_is_kept_and_what_is_in_use_are_no_more_together_than_may_be(spare: memory._Spare) -> None:
    parts = [MemoryPart(2 * MIB, spare=8 * MIB) for _ in range(4)]
    for part in parts[:3]:
        part.discard()
    assert len(spare._mappings) == 3
    large = MemoryPart(5 * MIB, spare=8 * MIB)  # for which what is kept is too small
    assert len(spare._mappings) == 0
    large.discard()
    assert [len(kept) for kept in spare._mappings] == [5 * MIB]
    parts[3].discard()
    assert sum(map(len, spare._mappings)) == 7 * MIB
    assert not spare._lent


@pytest.mark.usefixtures("spare")
def test_bytes_that_are_held_never_change_whoever_is_given_memory() -> None:
    def work(number: int) -> None:
        chance = random.Random(number)
        held: list[tuple[memoryview, int]] = []
        for turn in range(150):
            part = MemoryPart(chance.randrange(MIB, 3 * MIB), spare=6 * MIB)
            mark = (turn * 8 + number) % 251
            last = len(part.view()) - 1
            for offset in (0, last // 2, last):
                part.write(offset, bytes([mark]))
            held.append((part.view()[last // 2 :], mark))
            if len(held) > 4:
                view, said = held.pop(chance.randrange(5))
                if (view[0], view[-1]) != (said, said):
                    wrong.append((number, turn))
        wrong.extend((number, -1) for view, said in held if (view[0], view[-1]) != (said, said))

    wrong: list[tuple[int, int]] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
