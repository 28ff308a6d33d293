"""One object from an origin that answers 429 above a number of connections, each of which is capped.

What N fixed connections reach is measured through the same engine; ours is not told N. It is measured as the first
loader of a process, which has to find out, and as one that comes after others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ._harness import FIRST, OURS, Bar, Case
from ._origin import MIB, Served, folder, served, write_object
from ._sides import Effort, Side, far_behind, sides

PEERS = ("obstore", "fsspec", "curl", "requests")
CAP = 20_000_000
REFUSED = (429, 503)


def cases(smallest: bool) -> Iterator[Case]:
    size, rounds = (2 * MIB, 1) if smallest else (512 * MIB, 5)
    with folder() as root, sides(("requests",) if smallest else PEERS) as (there, absent):
        write_object(root / "object", size)
        for most in (4,) if smallest else (6, 16):
            with served(root, cap=CAP, most=most) as origin:
                yield measured(origin, there, absent, most, size, rounds)


def measured(
    origin: Served, there: dict[str, Side], absent: tuple[str, ...], most: int, size: int, rounds: int
) -> Case:
    fixed = f"ours, fixed at {most}"
    numbers = {"max_concurrent": most, "max_connections": most, "monitor_bandwidth": False}
    every = {**there, FIRST: there[OURS].told(anew=True), fixed: there[OURS].told(**numbers)}
    efforts: dict[str, list[Effort]] = {name: [] for name in every}
    asked: dict[str, Counter[int]] = {name: Counter() for name in every}
    failed: dict[str, str] = {}
    slow: set[str] = set()
    for turn in range(rounds + 1):
        for name, side in every.items():
            if name in failed or name in slow:
                continue
            origin.asked()
            try:
                effort = side.work("whole", url=origin.url, path="object", size=size)
            except RuntimeError as error:  # a peer that cannot cope with refusals
                failed[name] = str(error)[:60]
                continue
            efforts[name].append(effort)
            asked[name] += origin.asked()
        if not turn:  # what is not far behind is measured again, and that does not count
            slow = far_behind({name: each[0].seconds for name, each in efforts.items() if each})
            for name in every.keys() - slow:
                efforts[name].clear()
                asked[name].clear()
    samples = {name: [effort.seconds for effort in each] for name, each in efforts.items() if each}
    notes = {name: f"{share(asked[name]):.1%} of {asked[name].total()} requests refused" for name in samples}
    notes[OURS] += "".join(f"; {name} failed: {why}" for name, why in failed.items())
    title = f"{size / MIB:g} MiB, {CAP / 1e6:g} MB/s a connection, 429 above {most}, from {origin.server}"
    case = Case(title, samples, absent=absent, work=size / 1e9, unit="GB", notes=notes)
    bars = tuple(
        bar
        for name in (OURS, FIRST)
        for bar in (
            Bar(f"{name}: of what {most} fixed connections reach", case.ratio(fixed, name), at_least=0.9, unit=" ×"),
            Bar("of its requests refused", 100 * share(asked[name]), at_most=2, unit=" %"),
        )
    )
    return Case(title, samples, bars, absent, case.work, case.unit, notes)


def share(asked: Counter[int]) -> float:
    """Refusals among all requests."""
    return sum(asked[status] for status in REFUSED) / max(1, asked.total())
