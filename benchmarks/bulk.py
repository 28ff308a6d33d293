"""One large object from an origin that is as fast as the machine: to memory, and to the disk cache.

To the disk is to the same file system for all, in memory where the system has one, as the disk is not what is measured;
and once more to where temporary files go, if that is another. Ours hashes what it writes to the cache, and does not
deliver before it is durable; the others do neither. To memory it is measured twice: as the
others are, and with a checksum that the bytes have to have. curl fills no memory there.

Half as much over TLS, where nginx and openssl are installed: both sides of the connection encipher, on this machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._harness import OURS, Bar, Case
from ._origin import MIB, Served, folder, served, write_object
from ._sides import Effort, in_turns, sides

TO_MEMORY = ("obstore", "fsspec", "curl", "requests")
TO_DISK = ("obstore", "hf_transfer", "huggingface_hub", "fsspec", "pypdl", "aria2c", "curl", "requests")
OVER_TLS = ("obstore", "fsspec", "curl", "requests")
TO_REAL_DISK = ("obstore", "hf_transfer", "fsspec", "aria2c", "curl", "requests")
DELIVERS_NOWHERE = "curl"
VERIFIED = "ours, verified"


def cases(smallest: bool) -> Iterator[Case]:
    size, rounds = (2 * MIB, 1) if smallest else (2048 * MIB, 5)
    peers = ("curl", "requests") if smallest else None
    with folder() as root, folder() as target, tempfile.TemporaryDirectory() as real:
        write_object(root / "object", size)
        with served(root) as origin:
            with sides(peers or TO_MEMORY) as (there, absent):
                there[VERIFIED] = there[OURS].told(checksum=checksum_of(root / "object"))
                details = {"url": origin.url, "path": "object", "size": size}
                efforts = in_turns(there, "whole", rounds, **details)
                yield compared(f"to memory, from {origin.server}", efforts, absent, size)
            with sides(peers or TO_DISK) as (there, absent):
                efforts = in_turns(there, "whole", rounds, to=str(target / "here"), **details)
                yield compared(f"to the disk, from {origin.server}", efforts, absent, size, most_memory=64)
            if os.stat(real).st_dev != os.stat(target).st_dev:
                with sides(peers or TO_REAL_DISK) as (there, absent):
                    efforts = in_turns(there, "whole", rounds, to=f"{real}/here", **details)
                    name = f"to a disk that is none in memory, from {origin.server}"
                    yield compared(name, efforts, absent, size, most_memory=64)
            write_object(root / "object", size // 2)
            yield from over_tls(origin, size // 2, rounds, target / "here", smallest)


def over_tls(origin: Served, size: int, rounds: int, to: Path, smallest: bool) -> Iterator[Case]:
    """To memory and to the disk, of an origin that has a certificate."""
    if origin.secure is None:
        print("bulk over TLS: !! SKIPPED: nginx or openssl is not installed", file=sys.stderr)
        return
    details = {"url": origin.secure, "path": "object", "size": size, "trust": str(origin.trust)}
    with sides(("curl", "requests") if smallest else OVER_TLS) as (there, absent):
        for where, most_memory in (("memory", 0), ("the disk", 64)):
            more = {"to": str(to)} if most_memory else {}
            efforts = in_turns(there, "whole", rounds, **details, **more)
            name = f"to {where}, over TLS, from {origin.server}"
            yield compared(name, efforts, absent, size, most_memory=most_memory, times=1)


def compared(
    name: str,
    efforts: dict[str, list[Effort]],
    absent: tuple[str, ...],
    size: int,
    *,
    most_memory: float = 0,
    times: float = 1.5,
) -> Case:
    samples = {side: [effort.seconds for effort in each] for side, each in efforts.items()}
    notes = {side: note(each, size) for side, each in efforts.items()}
    case = Case(f"{size / MIB:g} MiB {name}", samples, absent=absent, work=size / 1e9, unit="GB", notes=notes)
    nowhere = DELIVERS_NOWHERE if not most_memory else None
    rivals = [side for side in samples if side not in (OURS, VERIFIED, nowhere)]
    bars = []
    if rivals:
        best = min(rivals, key=case.median)
        bars.append(Bar(f"faster than {best}", case.ratio(best), at_least=times, unit=" ×"))
    if "curl" in efforts and (theirs := cpu(efforts["curl"])):  # a short transfer may cost less than a clock tick
        share = cpu(efforts[OURS]) / theirs
        bars.append(Bar("processor time, of curl's", share, at_most=1, unit=" ×"))
    if VERIFIED in efforts:
        bars.append(Bar("verified, takes", case.ratio(VERIFIED), at_most=1.25, unit=" ×"))
    if most_memory:
        bars.append(Bar("memory beside", peak(efforts[OURS]) / MIB, at_most=most_memory, unit=" MiB"))
    return Case(case.name, samples, tuple(bars), absent, case.work, case.unit, notes)


def checksum_of(path: Path) -> str:
    from blake3 import blake3

    return f"blake3:{blake3().update_mmap(path).hexdigest()}"


def note(efforts: list[Effort], size: int) -> str:
    return f"{cpu(efforts) / size * 1e9:.2f} s/GB of processor, {peak(efforts) / MIB:.0f} MiB"


def cpu(efforts: list[Effort]) -> float:
    return statistics.median(effort.cpu for effort in efforts)


def peak(efforts: list[Effort]) -> float:
    return statistics.median(effort.peak for effort in efforts)
