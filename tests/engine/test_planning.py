import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.engine.planning import (
    coalesce,
    cut,
    gap_worth_reading,
    join_neighbours,
    piece_worth_asking,
    share_of_rest,
    split,
    window_worth_filling,
)
from holotensor_net.values import RangeRequest

R = RangeRequest
MIB = 1 << 20


@st.composite
def apart(draw, min_size=0):
    """Ranges in order that do not overlap, empty ones among them."""
    steps = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=min_size, max_size=30))
    at, ranges = 0, []
    for gap, length in steps:
        ranges.append(R(at + gap, at + gap + length))
        at += gap + length
    return ranges


@pytest.mark.parametrize(
    ("start", "stop", "piece_size", "bounds"),
    [
        (0, 0, 4, []),
        (7, 7, 4, []),
        (0, 1, 4, [(0, 1)]),
        (0, 4, 4, [(0, 4)]),
        (0, 5, 4, [(0, 2), (2, 5)]),
        (10, 22, 4, [(10, 14), (14, 18), (18, 22)]),
        (0, 3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_a_range_is_split_into_equal_pieces(start, stop, piece_size, bounds):
    assert list(split(R(start, stop), piece_size)) == [R(*pair) for pair in bounds]


@given(start=st.integers(0, 10**15), length=st.integers(0, 5000), piece_size=st.integers(1, 6000))
def test_pieces_cover_the_range_and_differ_by_a_byte_at_most(start, length, piece_size):
    whole = R(start, start + length)
    pieces = list(split(whole, piece_size))
    assert len(pieces) == math.ceil(length / piece_size)
    if pieces:
        assert (pieces[0].start, pieces[-1].stop) == (whole.start, whole.stop)
    assert all(a.stop == b.start for a, b in pairwise(pieces))
    lengths = {piece.length for piece in pieces}
    assert max(lengths, default=0) <= piece_size
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


def test_a_huge_range_is_split_as_it_is_read():
    assert next(iter(split(R(0, 10**18), 1))) == R(0, 1)


@pytest.mark.parametrize("piece_size", [0, -1])
def test_a_piece_has_a_byte_at_least(piece_size):
    with pytest.raises(ValueError, match="piece_size"):
        split(R(0, 10), piece_size)


@pytest.mark.parametrize(
    ("ranges", "max_gap", "joined"),
    [
        ([], 0, []),
        ([R(0, 5)], 0, [R(0, 5)]),
        ([R(0, 5), R(5, 9)], 0, [R(0, 9)]),
        ([R(0, 5), R(6, 9)], 0, [R(0, 5), R(6, 9)]),
        ([R(0, 5), R(6, 9)], 1, [R(0, 9)]),
        ([R(6, 9), R(0, 5)], 1, [R(0, 9)]),
        ([R(0, 1), R(3, 4), R(6, 7), R(10, 11)], 2, [R(0, 7), R(10, 11)]),
        ([R(4, 4), R(0, 10)], 0, [R(0, 10)]),
        ([R(4, 4)], 9, []),
    ],
)
def test_neighbours_are_joined_across_gaps_not_wider_than_allowed(ranges, max_gap, joined):
    assert coalesce(ranges, max_gap) == joined


@pytest.mark.parametrize("ranges", [[R(0, 5), R(4, 9)], [R(0, 9), R(2, 3)], [R(1, 2), R(1, 2)]])
def test_ranges_that_overlap_are_refused(ranges):
    with pytest.raises(ValueError, match="overlap"):
        coalesce(ranges, 0)


def test_a_gap_cannot_be_less_than_nothing():
    with pytest.raises(ValueError, match="max_gap"):
        coalesce([], -1)


@given(ranges=apart(), max_gap=st.integers(0, 60), shuffle=st.randoms())
def test_joining_keeps_every_byte_and_leaves_only_wide_gaps(ranges, max_gap, shuffle):
    shuffled = list(ranges)
    shuffle.shuffle(shuffled)
    joined = coalesce(shuffled, max_gap)
    full = [r for r in ranges if r.length]
    assert all(b.start - a.stop > max_gap for a, b in pairwise(joined))
    for whole in joined:
        inside = [r for r in full if whole.start <= r.start and r.stop <= whole.stop]
        assert (inside[0].start, inside[-1].stop) == (whole.start, whole.stop)
        assert all(b.start - a.stop <= max_gap for a, b in pairwise(inside))
        full = [r for r in full if r not in inside]
    assert not full


@pytest.mark.parametrize(
    ("round_trip", "rate", "gap"),
    [
        (0.02, 50e6, 1_000_000),
        (0.0, 50e6, 0),
        (0.02, 0.0, 0),
        (-1.0, 50e6, 0),
        (-1.0, -50e6, 0),
        (0.02, math.inf, 0),
        (math.nan, 50e6, 0),
        (1e-9, 1.0, 0),
    ],
)
def test_a_gap_is_worth_what_passes_in_a_round_trip(round_trip, rate, gap):
    assert gap_worth_reading(round_trip, rate) == gap


@pytest.mark.parametrize(
    ("round_trip", "rate", "length"),
    [
        (0.005, 1e6, 200_000),  # a fifth of a second's
        (0.02, 1e6, 400_000),  # twenty round trips'
        (0.3, 1e6, 4 << 20),
        (0.02, 3e7, 6_000_000),
        (0.02, 1e9, 8_000_000),
        (0.02, 1.0, 64 * 1024),
        (0.0, 1e6, 200_000),
        (0.02, 0.0, 256 * 1024),
        (0.02, math.inf, 256 * 1024),
        (math.nan, 1e6, 200_000),
    ],
)
def test_a_piece_takes_a_fifth_of_a_second_or_twenty_round_trips(round_trip, rate, length):
    assert piece_worth_asking(round_trip, rate, most=8_000_000) == length
    assert piece_worth_asking(round_trip, rate, most=1000) == 1000


NEIGHBOURS = [R(0, 10), R(20, 30), R(35, 40), R(60, 70), R(71, 80), R(200, 210)]


@pytest.mark.parametrize(
    ("anchor", "max_gap", "max_length", "joined"),
    [
        (R(45, 55), 0, 1000, []),
        (R(45, 55), 5, 1000, [1, 2, 3, 4]),
        (R(45, 55), 10, 1000, [0, 1, 2, 3, 4]),
        (R(45, 55), 1000, 1000, [0, 1, 2, 3, 4, 5]),
        (R(45, 55), 5, 9, []),
        (R(45, 55), 5, 20, [2]),  # forwards would be 45–70, too long
        (R(45, 55), 5, 25, [3]),
        (R(45, 55), 5, 35, [3, 4]),
        (R(40, 60), 0, 1000, [2, 3]),
        (R(80, 81), 0, 1000, [4]),
        (R(300, 310), 100, 1000, [5]),
        (R(38, 45), 20, 1000, [3, 4]),  # 35–40 overlaps and is left alone
        (R(60, 70), 20, 1000, [0, 1, 2]),  # the same range once more overlaps too
    ],
)
def test_a_request_takes_its_neighbours_along(anchor, max_gap, max_length, joined):
    assert list(join_neighbours(anchor, NEIGHBOURS, max_gap=max_gap, max_length=max_length)) == joined


def test_without_neighbours_nothing_is_joined():
    assert list(join_neighbours(R(3, 9), [], max_gap=100, max_length=100)) == []


@given(
    ranges=apart(min_size=1),
    pick=st.integers(0, 1000),
    max_gap=st.integers(0, 60),
    max_length=st.integers(0, 300),
)
def test_what_is_joined_is_dense_short_enough_and_cannot_grow(ranges, pick, max_gap, max_length):
    anchor = ranges.pop(pick % len(ranges))
    found = join_neighbours(anchor, ranges, max_gap=max_gap, max_length=max_length)
    together = sorted([anchor, *(ranges[i] for i in found)])
    start, stop = together[0].start, max(r.stop for r in together)
    assert all(0 <= b.start - a.stop <= max_gap for a, b in pairwise(together))
    assert not found or stop - start <= max_length
    for index in (found.start - 1, found.stop):
        if 0 <= index < len(ranges):
            other = ranges[index]
            gap = max(other.start - stop, start - other.stop)
            assert gap > max_gap or max(stop, other.stop) - min(start, other.start) > max_length


@pytest.mark.parametrize(
    ("round_trip", "rate", "connections", "window"),
    [
        (0.001, 50e6, 1, 500_000),
        (0.001, 50e6, 2, 250_000),
        (0.096, 50e6, 2, 5_000_000),
        (0.096, 50e6, 0, 10_000_000),
        (0.001, 50e6, 100, 128 * 1024),
        (0.0, 50e6, 1, None),
        (0.1, 0.0, 1, None),
        (math.nan, 50e6, 1, None),
    ],
)
def test_a_window_holds_what_fills_the_path_and_little_more(round_trip, rate, connections, window):
    assert window_worth_filling(round_trip, rate, connections=connections) == window


@pytest.mark.parametrize(("connections", "seconds"), [(1, 0.2), (20, 0.2), (64, 0.64), (128, 1.28)])
def test_of_many_connections_one_comes_free_each_hundredth_of_a_second(connections, seconds):
    assert piece_worth_asking(0.001, 1e6, most=1 << 30, connections=connections) == pytest.approx(1e6 * seconds)


@pytest.mark.parametrize(
    ("length", "connections", "size"),
    [
        (128 * MIB, 16, 8 * MIB),
        (64 * MIB, 1, 64 * MIB),
        (128 * MIB + 1, 16, 8 * MIB + 1),
        (5 * MIB, 64, 4 * MIB),
        (9, 4, 4 * MIB),
    ],
)
def test_what_is_left_is_shared_among_all_connections(length: int, connections: int, size: int) -> None:
    assert share_of_rest(length, connections) == size


@pytest.mark.parametrize(
    ("start", "stop", "most", "end"),
    [
        (0, 10 * MIB, 4 * MIB, 3 * MIB),  # three pieces, each at most 4 MiB
        (0, 3_579_136, 1_200_000, 18 * 65_536),  # a shorter one would make a fourth
        (0, 3_579_136, 1_193_050, 1_193_045),
        (0, 3_579_136, 1_300_000, MIB),
        (0, 600_000, 400_000, 4 * 65_536),
        (0, 100_000, 60_000, 50_000),
        (0, 100, 200, 100),
        (7 * MIB + 11, 17 * MIB, 4 * MIB, 10 * MIB),
    ],
)
def test_pieces_end_where_blocks_of_the_file_do_if_that_makes_none_more(
    start: int, stop: int, most: int, end: int
) -> None:
    assert cut(RangeRequest(start, stop), most, start=0) == RangeRequest(start, end)
    assert cut(RangeRequest(start + 999, stop + 999), most, start=999) == RangeRequest(start + 999, end + 999)


@given(st.integers(0, 1 << 24), st.integers(1, 1 << 26), st.integers(1 << 12, 1 << 24))
def test_pieces_that_are_cut_one_after_the_other_are_as_many_as_equal_ones(start: int, length: int, most: int) -> None:
    rest, pieces = RangeRequest(start, start + length), []
    while rest.length:
        pieces.append(cut(rest, most, start=start))
        rest = RangeRequest(pieces[-1].stop, rest.stop)
    assert len(pieces) == -(-length // most)
    assert all(0 < piece.length <= most for piece in pieces)
