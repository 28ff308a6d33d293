"""An urgent mebibyte that is asked for while bulk of low priority fills a link of 400 Mbit/s.

The idle link's time is measured before. The peers have no priorities: their urgent range stands in line with the bulk.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from ._harness import OURS, Bar, Case
from ._link import shaped
from ._origin import MIB, folder, write_object
from ._sides import sides

PEERS = ("obstore", "fsspec")
RATE = 400e6
PAYLOAD = 1448 / 1514


def cases(smallest: bool) -> Iterator[Case]:
    size, times, every = (4 * MIB, 2, 0.01) if smallest else (2048 * MIB, 100, 0.4)
    with folder() as root, sides(() if smallest else PEERS) as (there, absent):
        write_object(root / "object", size)
        with shaped(root, RATE) as link:
            told = {
                name: side.work("urgent", url=link.url, path="object", bulk=size, times=times, every=every).told
                for name, side in there.items()
            }
        samples, notes = {}, {}
        for name, each in told.items():
            idle, busy = statistics.median(each["idle"]), sorted(each["busy"])
            samples[name], samples[f"{name}, idle link"] = busy, each["idle"]
            notes[name] = (
                f"p50 {statistics.median(busy) / idle:.2f} ×, p99 {late(busy) / idle:.2f} × the idle link's;"
                f" {each['rate'] / (RATE / 8 * PAYLOAD):.2f} of the link used"
            )
        ours = told[OURS]
        idle, busy = statistics.median(ours["idle"]), sorted(ours["busy"])
        bars = (
            Bar("p50, of the idle link's", statistics.median(busy) / idle, at_most=1.6, unit=" ×"),
            Bar("p99, of the idle link's", late(busy) / idle, at_most=3, unit=" ×"),
            Bar("of the link used", ours["rate"] / (RATE / 8 * PAYLOAD), at_least=0.95, unit=" ×"),
        )
        yield Case(f"1 MiB, {times} times, {link.kind}", samples, bars, absent, notes=notes)


def late(ordered: list[float]) -> float:
    """The 99th percentile."""
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
