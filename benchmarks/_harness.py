"""What every benchmark needs: sides that take turns, medians, bars, and peers that may be absent.

Machines are shared and noisy, so no time is ever quoted alone: the sides of a case take turns in one run (A B A B …),
and medians and their ratios are what counts.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

OURS = "ours"
FIRST = "ours, the first time"  # before anything is known of the path, which later loaders of a process are told


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach: ``at_least``, or ``at_most``."""

    what: str
    figure: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def is_held(self) -> bool:
        above = self.at_least is None or self.figure >= self.at_least
        return above and (self.at_most is None or self.figure <= self.at_most)

    def __str__(self) -> str:
        bound = f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"
        return f"{self.what} {bound}{self.unit}: {self.figure:.3g}{self.unit} {'held' if self.is_held else 'MISSED'}"


@dataclass(frozen=True)
class Case:
    """One line of work, done by several sides: ``samples`` in seconds for each, ours among them.

    ``absent`` names peers that could not take part. ``work`` is what one sample does, in ``unit``, where a rate says
    more than a time.
    """

    name: str
    samples: Mapping[str, list[float]]
    bars: tuple[Bar, ...] = ()
    absent: tuple[str, ...] = ()
    work: float | None = None
    unit: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    def median(self, side: str = OURS) -> float:
        """Seconds."""
        return statistics.median(self.samples[side])

    def ratio(self, side: str, ours: str = OURS) -> float:
        """How many times as long as we the side takes."""
        return self.median(side) / self.median(ours)

    def to_json(self) -> dict[str, Any]:
        bars = [{**bar.__dict__, "is_held": bar.is_held} for bar in self.bars]
        return {**self.__dict__, "samples": dict(self.samples), "bars": bars, "notes": dict(self.notes)}


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, *, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds that a call of each side takes, measured in turns; once before that, uncounted.

    A call that is shorter than ``at_least`` seconds is repeated until a sample takes that long.
    """
    repeats = {name: _repeats(call, at_least) for name, call in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            samples[name].append(_seconds(call, repeats[name]))
    return samples


def alternate_told(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """As :func:`alternate`, where each call tells the seconds that count."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            seconds = call()
            if turn:
                samples[name].append(seconds)
    return samples


def _repeats(call: Callable[[], object], at_least: float) -> int:
    call()
    repeats = 1
    while _seconds(call, repeats) * repeats < at_least:
        repeats *= 2
    return repeats


def _seconds(call: Callable[[], object], repeats: int) -> float:
    turns = range(repeats)
    began = time.perf_counter()
    for _ in turns:
        call()
    return (time.perf_counter() - began) / repeats


def peer(name: str) -> ModuleType | None:
    """A library to compare with, None if it is not installed: name it in ``Case.absent``, so that all see it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def table(cases: list[Case]) -> Iterator[str]:
    """The lines of a table: the case, each side's median, and how it compares with ours."""
    for case in cases:
        yield case.name
        for side in case.samples:
            median = case.median(side)
            rate = f"{case.work / median:10.3g} {case.unit}/s" if case.work else ""
            ratio = "" if side == OURS else f"{case.ratio(side):8.2f} ×"
            yield f"    {side:<32}{_time(median):>12}  {rate:<16}{ratio:>12}  {case.notes.get(side, '')}".rstrip()
        for name in case.absent:
            yield f"    {name:<32}!! SKIPPED: not installed (pip install '.[bench]')"
        for bar in case.bars:
            yield f"    -> {bar}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
