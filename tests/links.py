"""Links that are simulated: many of them at once, each with up to 64 connections that fetch pieces.

A fluid model in small steps of time. A connection waits a round trip for the first byte of a piece (three for that of
its first), its window grows as TCP's does, and so its rate is at most window / round trip, and at most its cap.
What the link gives is shared evenly among those that could take more. A stall, as a lost packet makes one, holds a
connection up and narrows its window. The rate of a link may scatter, and another's traffic may take part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holotensor_net.engine.pacing import ConcurrencyController, Interval
from holotensor_net.engine.planning import piece_worth_asking

Floats = NDArray[np.float64]

CEILING = 64
FIXED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FIRST_WINDOW = 14_600.0
_LARGEST_WINDOW = 6e6  # of a receive buffer as Linux has it by default
_READ = 16 * 1024


@dataclass(frozen=True)
class Link:
    """``rate`` bytes/s in all and ``cap`` of one connection; ``round_trip`` seconds; ``stalls`` of one connection in a
    second; ``noise``: the scatter of the logarithm of the rate; ``piece`` bytes."""

    rate: float
    round_trip: float
    cap: float = math.inf
    stalls: float = 0.0
    noise: float = 0.0
    piece: int = 4 << 20

    @property
    def step(self) -> float:
        return min(0.02, max(0.005, self.round_trip / 4))


class Simulation:
    """Links with one round trip, advanced together by ``step`` seconds; ``limits`` may be changed at any time."""

    def __init__(self, links: Sequence[Link], limits: Sequence[int], seed: int = 0) -> None:
        self.step = min(link.step for link in links)
        self.now = 0.0
        self.limits = np.array(limits)
        self._random = np.random.default_rng(seed)
        shape = (len(links), CEILING)
        self.is_busy = np.zeros(shape, bool)
        self._is_open = np.zeros(shape, bool)
        self._left = np.zeros(shape)
        self._wait = np.zeros(shape)
        self._window = np.full(shape, _FIRST_WINDOW)
        self._threshold = np.full(shape, math.inf)
        self._weather = np.zeros(len(links))
        self.change(links)
        self.pieces = np.minimum(self.pieces, 256 * 1024)
        self._begin()

    def change(self, links: Sequence[Link]) -> None:
        """From now on the links are these."""

        def column(name: str) -> Floats:
            return np.array([float(getattr(link, name)) for link in links])[:, None]

        self._rate, self._cap, self._trip = column("rate"), column("cap"), column("round_trip")
        self._stalls, self._noise, self.pieces = column("stalls"), column("noise"), column("piece")

    def advance(self) -> Floats:
        """One step: the bytes that came by each link."""
        step = self.step
        moving = np.clip(step - self._wait, 0.0, step) / step * self.is_busy
        self._wait = np.maximum(0.0, self._wait - step)
        could = np.minimum(self._cap, self._window / self._trip) * moving
        rate = self._fair(could)
        came = rate * step
        self._grow(came, is_held_back=rate < 0.95 * could)
        self._stall()
        self._left -= came
        self._end_pieces()
        self._begin()
        self.now += step
        total: Floats = came.sum(axis=1)
        return total

    def _fair(self, could: Floats) -> Floats:
        """Each gets what it could take, or as much as the others that could take more."""
        self._weather += -self._weather * self.step / 0.3 + self._random.standard_normal(len(could)) * math.sqrt(
            2 * self.step / 0.3
        )
        whole = self._rate[:, 0] * np.exp(self._noise[:, 0] * self._weather)
        level = whole / np.maximum(1, (could > 0).sum(axis=1))
        for _ in range(6):
            small = could <= level[:, None]
            left = whole - (could * small).sum(axis=1)
            level = np.where((~small).any(axis=1), left / np.maximum(1, (~small).sum(axis=1)), np.inf)
        return np.minimum(could, level[:, None])

    def _grow(self, came: Floats, is_held_back: Any) -> None:
        growth = np.where(self._window < self._threshold, came, 0.1 * came)
        window = np.minimum(self._window + growth, _LARGEST_WINDOW)
        held = np.maximum(_FIRST_WINDOW, 2 * came / self.step * self._trip)
        self._window = np.where(is_held_back & (came > 0), np.minimum(window, np.maximum(held, 0.9 * window)), window)

    def _stall(self) -> None:
        if self._stalls.any():
            stalled = self.is_busy & (self._random.random(self.is_busy.shape) < self._stalls * self.step)
            self._wait += np.where(stalled, np.maximum(0.2, 2 * self._trip), 0.0)
            self._window = np.where(stalled, np.maximum(_FIRST_WINDOW, 0.7 * self._window), self._window)
            self._threshold = np.where(stalled, self._window, self._threshold)

    def _end_pieces(self) -> None:
        """A piece that is there is followed by another, or where there are more connections than may be by none."""
        ended = self.is_busy & (self._left <= 0)
        excess = np.maximum(0, self.is_busy.sum(axis=1) - self.limits)[:, None]
        leaves = ended & (np.cumsum(ended, axis=1) <= excess)
        goes_on = ended & ~leaves
        self.is_busy &= ~leaves
        self._left = np.where(goes_on, self._left + self.pieces, self._left)
        self._wait += goes_on * self._trip

    def _begin(self) -> None:
        lacking = np.maximum(0, self.limits - self.is_busy.sum(axis=1))[:, None]
        if lacking.any():
            free = ~self.is_busy
            starts = free & (np.cumsum(free, axis=1) <= lacking)
            self._wait = np.where(starts, np.where(self._is_open, 1.0, 3.0) * self._trip, self._wait)
            self._left = np.where(starts, self.pieces, self._left)
            self.is_busy |= starts
            self._is_open |= starts


class _Meter:
    """What a scheduler would tell a controller of one link."""

    def __init__(self, controller: ConcurrencyController, link: Link) -> None:
        self.controller, self.link = controller, link
        self.unread = self.total = self.rate = 0.0
        self.active = 1.0
        self.clear()

    def clear(self) -> None:
        self.seconds = self.busy = self.bytes = 0.0

    @property
    def piece(self) -> int:
        """Bytes of the next piece."""
        each, connections = self.rate / self.active, int(self.active)
        return piece_worth_asking(self.link.round_trip, each, most=self.link.piece, connections=connections)

    def add(self, seconds: float, came: float, active: float) -> int:
        came += self.unread
        self.unread = came % _READ
        self.total += came - self.unread
        self.bytes += came - self.unread
        self.seconds += seconds
        self.rate += (came / seconds - self.rate) * seconds / 0.5
        self.active = max(1.0, active)
        self.busy += active * seconds
        if self.seconds >= self.controller.seconds - 1e-9:
            trip = self.link.round_trip if self.total else 0.0
            self.controller.revise(
                Interval(self.seconds, int(self.bytes), self.busy / self.seconds, True, round_trip=trip)
            )
            self.clear()
        return self.controller.limit


@dataclass(frozen=True)
class Run:
    """``bytes`` that came by each link in each step, and its ``limits`` then; ``times`` at the ends of the steps."""

    times: Floats
    bytes: Floats
    limits: Floats

    def rate(self, begin: float, end: float) -> Floats:
        chosen = (self.times > begin + 1e-9) & (self.times <= end + 1e-9)
        rates: Floats = self.bytes[chosen].sum(axis=0) / (end - begin)
        return rates

    def connections(self, begin: float, end: float) -> Floats:
        chosen = (self.times > begin + 1e-9) & (self.times <= end + 1e-9)
        mean: Floats = self.limits[chosen].mean(axis=0)
        return mean


Change = Callable[[Link], Link]


def run_controlled(
    links: Sequence[Link],
    seconds: float,
    *,
    changes: Sequence[tuple[float, Sequence[Link]]] = (),
    seed: int = 0,
    make: Callable[[], ConcurrencyController] = lambda: ConcurrencyController(CEILING),
) -> Run:
    """Links with a controller each; ``changes``: at such a time, they become these."""
    meters = [_Meter(make(), link) for link in links]
    simulation = Simulation(links, [meter.controller.limit for meter in meters], seed)
    left = sorted(changes, key=lambda change: change[0])
    times, came, limits = [], [], []
    while simulation.now < seconds - 1e-9:
        if left and simulation.now >= left[0][0]:
            _, links = left.pop(0)
            simulation.change(links)
            for meter, link in zip(meters, links, strict=True):
                meter.link = link
        active = simulation.is_busy.sum(axis=1)
        got = simulation.advance()
        times.append(simulation.now)
        came.append(got)
        limits.append(simulation.limits.copy())
        for index, meter in enumerate(meters):
            simulation.limits[index] = meter.add(simulation.step, got[index], active[index])
            simulation.pieces[index] = meter.piece
    return Run(np.array(times), np.array(came), np.array(limits, dtype=float))


def best_fixed(
    links: Sequence[Link], begin: float, end: float, *, seed: int = 0, share: float = 0.97
) -> tuple[Floats, Floats]:
    """For each link the best rate that a fixed number of connections reaches, and the least number that reaches
    ``share`` of it."""
    rows = [link for link in links for _ in FIXED]
    simulation = Simulation(rows, list(FIXED) * len(links), seed)
    total = np.zeros(len(rows))
    while simulation.now < end - 1e-9:
        came = simulation.advance()
        if simulation.now > begin + 1e-9:
            total += came
    rates = total.reshape(len(links), len(FIXED)) / (end - begin)
    best = rates.max(axis=1)
    least = np.array(FIXED)[(rates >= share * best[:, None]).argmax(axis=1)]
    return best, least.astype(float)


def stepped(links: Sequence[Link], **changes: float) -> list[Link]:
    """The links with each named value multiplied."""
    return [replace(link, **{name: getattr(link, name) * by for name, by in changes.items()}) for link in links]
