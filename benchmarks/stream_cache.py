"""1 MiB arrays through StreamCache: hit, key, miss.

A hit is what it takes to give a result whose key is at hand. What a call takes that has only the chunk is told too:
that is little but the time of a hash, ours against the peer's.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from holotensor_net import CacheKey, StreamCache

from ._harness import OURS, Bar, Case, alternate, alternate_told, peer

MIB = 1 << 20
WAVE = np.linspace(0, 1, 20_000)
TURNS = 1
FUNCTION = "the function itself"
inside: list[float] = []  # seconds that its calls took

Call: TypeAlias = Callable[[], object]

fresh = itertools.count(1_000_000)  # no chunk is ever asked for twice by a miss


def doubled(state: Any, chunk: Any) -> Any:
    return chunk * 2


def doubled_alone(chunk: Any) -> Any:
    return chunk * 2


def worked(state: Any, chunk: Any) -> Any:
    """Takes about ten milliseconds."""
    began = time.perf_counter()
    for _ in range(TURNS):
        np.sin(WAVE, out=WAVE)
    result = chunk * 2
    inside.append(time.perf_counter() - began)
    return result


def worked_alone(chunk: Any) -> Any:
    return worked(None, chunk)


def calibrate() -> int:
    """How often :func:`worked` has to go round."""
    turns = []
    for _ in range(200):
        began = time.perf_counter()
        np.sin(WAVE, out=WAVE)
        turns.append(time.perf_counter() - began)
    return max(1, round(0.01 / median(turns)))


def cases(smallest: bool) -> Iterator[Case]:
    rounds, size = (2, 1 << 12) if smallest else (41, MIB)
    chunk = np.random.default_rng(0).standard_normal(size // 8)
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(folder)
        yield hit(chunk, rounds, peers)
        yield call(chunk, rounds, peers)
        yield call_of_the_next_run(chunk, rounds, peers, f"{folder}/next")
        yield key(chunk, rounds, peers)
        yield key(np.tile(chunk, 64), rounds // 4 + 1, peers)
        yield miss(chunk, 2 * rounds, peers)
        yield miss(chunk, rounds, peers, f"{folder}/miss")


class Peers:
    """joblib, if it is there."""

    def __init__(self, folder: str) -> None:
        self.joblib = peer("joblib")
        self.absent = () if self.joblib else ("joblib",)
        self._memory = self.joblib.Memory(f"{folder}/joblib", verbose=0) if self.joblib else None

    def memory(self, function: Callable[[Any], Any], chunk: Any) -> dict[str, Call]:
        """A side that asks joblib.Memory for what the function makes of the chunk."""
        if self._memory is None:
            return {}
        kept = self._memory.cache(function)
        return {"joblib.Memory": lambda: kept(chunk)}


def hit(chunk: Any, rounds: int, peers: Peers) -> Case:
    cache = StreamCache(1000)
    cache.run("double", doubled, chunk)
    ready = cache.key_of("double", doubled, chunk)
    plain = functools.lru_cache(1000)(lambda ready: doubled_alone(chunk))
    sides: dict[str, Call] = {
        OURS: lambda: cache.get_chunk(ready),
        "lru_cache on the key": lambda: plain(ready),
        **peers.memory(doubled_alone, chunk),
    }
    notes = {OURS: "read-only", "lru_cache on the key": "anybody can spoil it for the next"}
    case = Case("hit", alternate(sides, rounds, at_least=0.002), absent=peers.absent, notes=notes)
    bars = [Bar("a hit takes", case.median() * 1e6, at_most=2, unit=" µs")]
    if peers.joblib:
        bars.append(Bar("faster than joblib.Memory's", case.ratio("joblib.Memory"), at_least=20, unit=" ×"))
    return replace(case, bars=tuple(bars))


def call(chunk: Any, rounds: int, peers: Peers) -> Case:
    cache, chunk_key = StreamCache(1000), CacheKey.of(chunk)
    sides: dict[str, Call] = {
        OURS: lambda: cache.run("double", doubled, chunk),
        "ours, the chunk's digest known": lambda: cache.run("double", doubled, chunk, chunk_key=chunk_key),
        **peers.memory(doubled_alone, chunk),
    }
    return Case("hit, and the key of the call", alternate(sides, rounds, at_least=0.002), absent=peers.absent)


def call_of_the_next_run(chunk: Any, rounds: int, peers: Peers, folder: str) -> Case:
    sides: dict[str, Call] = {
        OURS: lambda: StreamCache(10, disk=folder).run("double", doubled, chunk),
        **peers.memory(doubled_alone, chunk),
    }
    notes = {OURS: "its bytes are verified"}
    name = "hit of the next run, from the disk, and the key of the call"
    return Case(name, alternate(sides, rounds, at_least=0.002), absent=peers.absent, notes=notes)


def key(chunk: Any, rounds: int, peers: Peers) -> Case:
    sides: dict[str, Call] = {OURS: lambda: CacheKey.of(chunk)}
    if joblib := peers.joblib:
        sides["joblib.hash"] = lambda: joblib.hash(chunk)
    size = chunk.nbytes / 1e9
    samples = alternate(sides, rounds, at_least=0.002)
    case = Case(f"key of {chunk.nbytes / MIB:g} MiB", samples, absent=peers.absent, work=size, unit="GB")
    return replace(case, bars=(Bar("keys", size / case.median(), at_least=2, unit=" GB/s"),))


def miss(chunk: Any, rounds: int, peers: Peers, folder: str | None = None) -> Case:
    """What is spent outside of the function, told apart within each call: its own time is never twice the same."""
    global TURNS
    TURNS = calibrate()
    cache, mine, theirs = StreamCache(10, disk=folder or False), chunk.copy(), chunk.copy()
    asked = {
        OURS: lambda: cache.run("work", worked, mine),
        "ours, the chunk's digest known": lambda: cache.run("work", worked, mine, chunk_key=CacheKey.of(next(fresh))),
        **peers.memory(worked_alone, theirs),
    }

    def beside(call: Call) -> float:
        mine[0] = theirs[0] = next(fresh)
        began = time.perf_counter()
        call()
        return time.perf_counter() - began - inside[-1]

    inside.clear()
    samples = alternate_told({side: functools.partial(beside, call) for side, call in asked.items()}, rounds)
    samples[FUNCTION] = inside[len(asked) :]
    name = "miss, beside the function" + (", kept on the disk" if folder else "")
    case = Case(name, samples, absent=peers.absent)
    cost = 100 / case.ratio(FUNCTION)
    return case if folder else replace(case, bars=(Bar("it costs", cost, at_most=5, unit=" % of the function's time"),))
