"""Memory that stands in for a part file."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import NetworkError
from holotensor_net.storage.memory import MemoryPart


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


@pytest.mark.parametrize("size", [1 << 62, 9_999_999_999_999_999_999])
def test_more_than_memory_holds_is_refused_in_words(size: int) -> None:
    with pytest.raises(NetworkError, match="there is no memory for"):
        MemoryPart(size)
