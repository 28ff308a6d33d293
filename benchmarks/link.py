"""One object over a link of a known rate: steady, and with a step in the middle of the transfer.

The link's share is told in payload: of the rate, headers of every packet take 4 to 5 %, which no client gets around;
the rate that a single plain stream reaches is measured beside it. Ours is measured as the first loader of a process,
which has to find out how many connections there should be, and as one that comes after others.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from ._harness import FIRST, OURS, Bar, Case
from ._link import Link, shaped
from ._origin import MIB, folder, write_object
from ._sides import Effort, Side, sides

PEERS = ("curl", "obstore", "fsspec")
FAST, SLOW = 400e6, 50e6
PAYLOAD = 1448 / 1514  # of an Ethernet frame


def cases(smallest: bool) -> Iterator[Case]:
    seconds, pause, rounds = (0.1, 0.05, 1) if smallest else (5.0, 1.0, 5)
    with folder() as root, sides(("curl",) if smallest else PEERS) as (there, absent):
        write_object(root / "object", size := int(FAST / 8 * seconds))
        write_object(root / "slow", slow := int(SLOW / 8 * seconds))
        with shaped(root, FAST) as link:
            yield steady(link, there, absent, rounds, "object", size, FAST)
            link.set_rate(SLOW)
            yield steady(link, there, absent, rounds, "slow", slow, SLOW)
            for before, after in ((FAST, SLOW), (SLOW, FAST)):
                write_object(root / "step", size := int((before * pause + after * seconds) / 8))
                yield step(link, there[OURS], rounds, before, after, size, pause)


def steady(
    link: Link, there: dict[str, Side], absent: tuple[str, ...], rounds: int, path: str, size: int, rate: float
) -> Case:
    every = {**there, FIRST: there[OURS].told(anew=True)}
    efforts: dict[str, list[Effort]] = {name: [] for name in every}
    for turn in range(rounds + 1):
        for name, side in every.items():
            watch = {"watch": True} if name in (OURS, FIRST) else {}
            effort = side.work("whole", url=link.url, path=path, size=size, **watch)
            if turn:
                efforts[name].append(effort)
    samples = {name: [effort.seconds for effort in each] for name, each in efforts.items()}
    least = size / (rate / 8 * PAYLOAD)
    seen = {name: statistics.median(used(effort) for effort in efforts[name]) for name in (OURS, FIRST)}
    notes = {name: f"{least / statistics.median(each):.3f} of the link" for name, each in samples.items()}
    for name, connections in seen.items():
        notes[name] += f"; {connections:.1f} connections on average"
    case = Case(f"{rate / 1e6:g} Mbit/s: {size / MIB:.3g} MiB, {link.kind}", samples, absent=absent, notes=notes)
    bars = tuple(
        bar
        for name, connections in seen.items()
        for bar in (
            Bar(f"{name}: of the link", least / case.median(name), at_least=0.97, unit=" ×"),
            Bar("connections", connections, at_most=2, unit=" (one fills it)"),
        )
    )
    return replace(case, work=size / 1e6, unit="MB", bars=bars)


def used(effort: Effort) -> float:
    """Connections in use, on average."""
    return statistics.fmean(active for _, _, active in effort.told["seen"]) if effort.told["seen"] else 0.0


def step(link: Link, side: Side, rounds: int, before: float, after: float, size: int, pause: float) -> Case:
    """The rate changes after ``pause`` seconds: how many from there until the new one comes, to a tenth."""
    found = []
    for _ in range(rounds):
        link.set_rate(before)
        change = threading.Timer(pause, link.set_rate, (after,))
        change.start()
        effort = side.work("whole", url=link.url, path="step", size=size, watch=True)
        change.join()
        found.append(max(1e-3, reached(effort.told["seen"], after / 8 * PAYLOAD, pause)))
    title = f"step from {before / 1e6:g} to {after / 1e6:g} Mbit/s: until it is found, {link.kind}"
    return Case(title, {OURS: found}, (Bar("found within", statistics.median(found), at_most=2, unit=" s"),))


def reached(seen: list[tuple[float, int, int]], rate: float, since: float) -> float:
    """Seconds from ``since`` until the bytes come within a tenth of ``rate``; all there is, if they never do."""
    for (began, had, _), (at, have, _) in pairwise(seen):
        if began >= since and 0.9 <= (have - had) / (at - began) / rate <= 1.1:
            return at - since
    return seen[-1][0] if seen else 0.0
