"""Where to cut a long range, and what to read in one request. Values in, values out."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence

from ..errors import ConfigurationError
from ..values import RangeRequest

__all__ = [
    "coalesce",
    "cut",
    "gap_worth_reading",
    "join_neighbours",
    "piece_worth_asking",
    "share_of_rest",
    "split",
    "window_worth_filling",
]

_PIECE_SECONDS = 0.2
_COMES_FREE = 0.01  # seconds until some connection does
_PIECE_ROUND_TRIPS = 20.0
_SMALLEST_PIECE = 64 * 1024
_FIRST_PIECE = 256 * 1024
_SMALLEST_SHARE = 4 * 1024 * 1024
_LONG_PIECE = 4 * 1024 * 1024
_BLOCKS = (1024 * 1024, 64 * 1024)
_WINDOW_ROUND_TRIPS = 2.0
_WINDOW_SECONDS = 0.008  # that a reader may be late
_SMALLEST_WINDOW = 128 * 1024


def split(byte_range: RangeRequest, piece_size: int) -> Iterator[RangeRequest]:
    """The range in the fewest pieces of at most ``piece_size`` bytes, which differ by a byte at most.

    Equal pieces leave no tiny last one, which would cost a request of its own. An empty range has no pieces.

    Raises ConfigurationError if ``piece_size`` is below 1.
    """
    if piece_size < 1:
        raise ConfigurationError(f"piece_size must be 1 byte or more, not {piece_size!r}")
    start, length = byte_range.start, byte_range.length
    count = -(-length // piece_size)
    return (RangeRequest(start + length * i // count, start + length * (i + 1) // count) for i in range(count))


def cut(byte_range: RangeRequest, piece_size: int, *, start: int) -> RangeRequest:
    """The first of the pieces of a range that :func:`split` would give; ended, if it is long and that makes no more of
    them, where a block ends of the file that the fragment goes to, whose first byte is ``start``.

    What is written to blocks of a file one after the other lies in large pages of the system's, which are fewer to map.
    """
    first = next(split(byte_range, piece_size))
    rest = -(-(byte_range.stop - first.stop) // piece_size)
    for block in _BLOCKS if rest else ():
        stop = first.stop - (first.stop - start) % block
        if stop - first.start >= block and -(-(byte_range.stop - stop) // piece_size) == rest:
            return RangeRequest(first.start, stop)
    return first


def coalesce(ranges: Sequence[RangeRequest], max_gap: int) -> list[RangeRequest]:
    """Join neighbours whose gap in bytes is cheaper to read than a request, and give the result in order.

    The ranges may come in any order; empty ones ask for nothing and are left out.

    Raises ConfigurationError (a ValueError) if two ranges overlap, or ``max_gap`` is below 0.
    """
    if max_gap < 0:
        raise ConfigurationError(f"max_gap must be 0 bytes or more, not {max_gap!r}")
    joined: list[RangeRequest] = []
    for following in sorted(r for r in ranges if r.length):
        if joined and following.start < joined[-1].stop:
            raise ConfigurationError(f"ranges must not overlap, and {following} begins before byte {joined[-1].stop}")
        if joined and following.start - joined[-1].stop <= max_gap:
            joined[-1] = RangeRequest(joined[-1].start, following.stop)
        else:
            joined.append(following)
    return joined


def gap_worth_reading(round_trip: float, rate: float) -> int:
    """The bytes that pass in one round trip (seconds) at ``rate`` bytes/s: to read as many costs what a request would.

    0 while either is unknown (not finite, or not above 0).
    """
    gap = round_trip * rate
    return int(gap) if round_trip > 0 and math.isfinite(gap) and gap > 0 else 0


def share_of_rest(length: int, connections: int) -> int:
    """The bytes of the next piece of ``length`` where nothing else is queued: so many that each of the ``connections``
    has one, and that they end together; 4 MiB at least."""
    return max(_SMALLEST_SHARE, -(-length // connections))


def piece_worth_asking(round_trip: float, rate: float, *, most: int, connections: int = 1) -> int:
    """The bytes of a piece for a connection of ``rate`` bytes/s: about a fifth of a second's, so that connections come
    free and are given to others in time; of more than twenty ``connections`` so many that one comes free each hundredth
    of a second, as more requests than that would take the time of a processor. But up to 4 MiB no fewer than pass in
    twenty round trips, as each piece costs one; and 256 KiB while the rate is unknown; ``most`` at most."""
    length = rate * max(_PIECE_SECONDS, connections * _COMES_FREE)
    if not 0 < length < math.inf:
        return min(most, _FIRST_PIECE)
    at_least = rate * _PIECE_ROUND_TRIPS * round_trip if round_trip > 0 else 0.0
    return min(most, int(max(_SMALLEST_PIECE, length, min(_LONG_PIECE, at_least))))


def window_worth_filling(round_trip: float, rate: float, *, connections: int) -> int | None:
    """The bytes that each of so many connections may have on the way and unread, so that together they fill a path of
    ``rate`` bytes/s and hold up little of what comes after them; None while either is unknown.

    Twice what a round trip takes: where the window itself is what limits the rate, it doubles until it does not.
    """
    length = rate * (_WINDOW_ROUND_TRIPS * round_trip + _WINDOW_SECONDS)
    if not (round_trip > 0 and 0 < length < math.inf):
        return None
    return max(_SMALLEST_WINDOW, int(length / max(1, connections)))


def join_neighbours(anchor: RangeRequest, others: Sequence[RangeRequest], *, max_gap: int, max_length: int) -> range:
    """The indices of those among ``others`` to read in one request together with ``anchor``.

    ``others`` are in order and do not overlap. The request grows on the side of the narrower gap, forwards where they
    are equal, until the next gap is wider than ``max_gap`` bytes or the whole would be longer than ``max_length``.
    A neighbour that overlaps the anchor is left to a request of its own. O(log n) and what was joined.
    """
    low = high = bisect.bisect_left(others, anchor)
    start, stop = anchor.start, anchor.stop
    while True:
        ahead = behind = math.inf
        if high < len(others):
            following = others[high]
            if following.stop - start <= max_length and 0 <= (gap := following.start - stop) <= max_gap:
                ahead = gap
        if low > 0:
            previous = others[low - 1]
            if stop - previous.start <= max_length and 0 <= (gap := start - previous.stop) <= max_gap:
                behind = gap
        if ahead == behind == math.inf:
            return range(low, high)
        if ahead <= behind:
            stop = others[high].stop
            high += 1
        else:
            low -= 1
            start = others[low].start
