"""When a piece counts as slow, and whether another request may be spent on it. Pure: times are arguments.

A piece is slow once it takes twice as long as 19 in 20 did of late: the time until an answer began, and for a long
piece that which its bytes take. One request in 20 may be spent on the slow ones, and what is saved up while all goes
well is bounded, so that a path which becomes slow as a whole is not made slower.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import TypeVar

from ..values import Validator

__all__ = ["Hedging", "Versions"]

K = TypeVar("K")
V = TypeVar("V")

_SHARE = 0.05
_MOST_SAVED = 10.0
_HIGH = 0.95
_MANY_TIMES = 2.0
_LEAST_DELAY = 0.01  # seconds
_WINDOW = 128
_ENOUGH = 20
_LONG = 1 << 16  # bytes, from which the time of a body is more than noise
_MOST_VERSIONS = 1024
_TRUE_FOR = 60.0  # seconds


class _Recent:
    """The last figures of one kind."""

    def __init__(self) -> None:
        self._figures: deque[float] = deque(maxlen=_WINDOW)

    def add(self, figure: float) -> None:
        self._figures.append(figure)

    @property
    def high(self) -> float:
        """What 19 in 20 do not exceed; infinite while too little is known."""
        if len(self._figures) < _ENOUGH:
            return math.inf
        return sorted(self._figures)[math.ceil(_HIGH * len(self._figures)) - 1]


class Hedging:
    """The delays after which pieces are asked for twice, and the budget for that. Not thread-safe: its owner has a
    lock. Sizes in bytes, times in seconds."""

    def __init__(self, endpoints: int) -> None:
        self._heads = [_Recent() for _ in range(endpoints)]
        self._paces = [_Recent() for _ in range(endpoints)]
        self._saved = 0.0

    def begin(self, endpoint: int, size: int) -> float | None:
        """A piece is asked for: how long to wait until it counts as slow, None while that is not known."""
        self._saved = min(_MOST_SAVED, self._saved + _SHARE)
        usual = self._heads[endpoint].high
        if size >= _LONG:
            usual += size * self._paces[endpoint].high
        return max(_LEAST_DELAY, _MANY_TIMES * usual) if usual < math.inf else None

    def measured(self, endpoint: int, head: float, size: int, body: float) -> None:
        """A piece took ``head`` seconds until its answer began, and ``body`` more for its bytes. One that was cut
        tells how long it took at least."""
        self._heads[endpoint].add(head)
        if size >= _LONG:
            self._paces[endpoint].add(body / size)

    def spend(self) -> bool:
        """Whether another request may be made, which then counts as made."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Versions:
    """Which version each object was of when an endpoint told last, and which endpoints had another one; forgotten after
    a minute. Not thread-safe."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, tuple[Validator, float]] = OrderedDict()
        self._differs: OrderedDict[tuple[str, int], float] = OrderedDict()

    def note(self, path: str, version: Validator, now: float) -> None:
        self._told.pop(path, None)
        if version.is_strong and version.etag is not None:  # equal dates at two servers prove little
            _remember(self._told, path, (version, now))

    def of(self, path: str, now: float) -> Validator | None:
        version, told_at = self._told.get(path, (None, 0.0))
        return version if now - told_at < _TRUE_FOR else None

    def differs(self, path: str, endpoint: int, now: float) -> None:
        """The endpoint has another version than the one that it was asked for: so are its entity tags, perhaps."""
        _remember(self._differs, (path, endpoint), now)

    def may_have(self, path: str, endpoint: int, now: float) -> bool:
        """Whether there is a point in asking the endpoint for a version that another one told."""
        told_at = self._differs.get((path, endpoint))
        return told_at is None or now - told_at >= _TRUE_FOR


def _remember(known: OrderedDict[K, V], key: K, value: V) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > _MOST_VERSIONS:
        known.popitem(last=False)
