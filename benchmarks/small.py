"""Many small ranges of one object: neighbours, and scattered ones, with and without a round trip.

Over the round trip the origin is the embedded one, which waits before each answer; nginx has no such setting.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from ._harness import OURS, Bar, Case
from ._origin import MIB, folder, served, write_object
from ._sides import Effort, in_turns, sides

PEERS = ("obstore", "fsspec")
LENGTH = 16 * 1024
ROUND_TRIP = 0.02


def cases(smallest: bool) -> Iterator[Case]:
    near, far, rounds = (100, 4, 1) if smallest else (10_000, 2000, 5)
    ranges = {
        f"{near} neighbours": [LENGTH * number for number in range(near)],
        f"{far} a mebibyte apart": [MIB * number for number in range(far)],
    }
    with folder() as root, sides(() if smallest else PEERS) as (there, absent):
        write_object(root / "object", max(starts[-1] for starts in ranges.values()) + LENGTH)
        for latency in (0.0, ROUND_TRIP):
            with served(root, latency=latency) as origin:
                for name, starts in ranges.items():
                    details = {"url": origin.url, "path": "object", "starts": starts, "length": LENGTH}
                    efforts = in_turns(there, "ranges", rounds, **details)
                    yield compared(f"{name}, {latency * 1e3:g} ms, {origin.server}", efforts, absent, starts)


def compared(name: str, efforts: dict[str, list[Effort]], absent: tuple[str, ...], starts: Sequence[int]) -> Case:
    samples = {side: [effort.seconds for effort in each] for side, each in efforts.items()}
    notes = {side: f"{cpu(each) / len(starts) * 1e6:.0f} µs of processor a range" for side, each in efforts.items()}
    told = efforts[OURS][-1].told
    notes[OURS] += f"; {told['requests']} requests, {told['over-read'] / MIB:.1f} MiB over-read"
    case = Case(name, samples, absent=absent, notes=notes)
    each = cpu(efforts[OURS]) / len(starts)
    is_joined = told["requests"] < len(starts) / 4
    bars = [
        Bar("a joined fragment takes", each * 1e6, at_most=15, unit=" µs")
        if is_joined
        else Bar("a request takes", cpu(efforts[OURS]) / told["requests"] * 1e3, at_most=0.4, unit=" ms")
    ]
    rivals = [side for side in samples if side != OURS]
    if rivals:
        best = min(rivals, key=case.median)
        bars.append(Bar(f"faster than {best}", case.ratio(best), at_least=1, unit=" ×"))
    return Case(name, samples, tuple(bars), absent, notes=notes)


def cpu(efforts: list[Effort]) -> float:
    return statistics.median(effort.cpu for effort in efforts)
