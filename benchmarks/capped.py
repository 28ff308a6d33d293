"""One object from an origin that caps each connection, so that only many of them fill the path.

The sweep tells what fixed numbers of connections reach, through the same engine; ours is not told any. It is measured
as the first loader of a process, which has to find out, and as one that comes after others. A peer that writes files
writes them to the same place in memory where ours keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ._harness import FIRST, OURS, Bar, Case
from ._origin import MIB, folder, served, write_object
from ._sides import in_turns, sides

PEERS = ("obstore", "hf_transfer", "huggingface_hub", "fsspec", "pypdl", "aria2c", "curl", "requests")
TO_DISK = ("hf_transfer", "huggingface_hub", "pypdl", "aria2c", "curl")
NUMBERS = (4, 8, 16, 32, 64, 128)
CAP = 20_000_000


def cases(smallest: bool) -> Iterator[Case]:
    size, rounds = (2 * MIB, 1) if smallest else (512 * MIB, 5)
    peers = ("requests",) if smallest else PEERS
    numbers = NUMBERS[:1] if smallest else NUMBERS
    with folder() as root, folder() as target, sides(peers) as (there, absent):
        write_object(root / "object", size)
        with served(root, cap=CAP) as origin:
            for name, side in there.items():
                if name in TO_DISK:
                    side.always["to"] = str(target / "here")
            all_sides = {**there, FIRST: there[OURS].told(anew=True)}
            for number in numbers:
                fixed = {"max_concurrent": number, "max_connections": number, "monitor_bandwidth": False}
                all_sides[f"ours, fixed at {number}"] = there[OURS].told(**fixed)
            efforts = in_turns(all_sides, "whole", rounds, url=origin.url, path="object", size=size)
    samples = {name: [effort.seconds for effort in each] for name, each in efforts.items()}
    limits = {name: [effort.told["limit"] for effort in efforts[name]] for name in (OURS, FIRST)}
    notes = {name: f"{min(each)}–{max(each)} connections in the end" for name, each in limits.items()}
    title = f"{size / MIB:g} MiB, {CAP / 1e6:g} MB/s a connection, from {origin.server}"
    case = Case(title, samples, absent=absent, work=size / 1e9, unit="GB", notes=notes)
    rivals = [name for name in there if name != OURS]
    best = min(rivals, key=case.median)
    fixed_best = min((name for name in samples if name.startswith("ours, fixed")), key=case.median)
    number = fixed_best.split()[-1]
    bars = tuple(
        bar
        for name in (OURS, FIRST)
        for bar in (
            Bar(f"{name}: faster than {best}", case.ratio(best, name), at_least=2, unit=" ×"),
            Bar(f"of the best fixed number, {number}", case.ratio(fixed_best, name), at_least=0.95, unit=" ×"),
        )
    )
    yield Case(title, samples, bars, absent, case.work, case.unit, notes)
