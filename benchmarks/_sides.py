"""The sides of a benchmark of transfers, each in a process of its own: ours, and the peers.

A side stays for as long as its benchmark, so that no sample pays for an import; it is told its work in a line of JSON,
and answers what that took. Whoever is not installed is absent, and named.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ._harness import OURS


@dataclass(frozen=True)
class Effort:
    """What a piece of work took: seconds, seconds of processor, bytes of memory above what was there before; ``peak``
    counts pages of mapped files, which the system takes back whenever it likes. ``told``: what else the side says."""

    seconds: float
    cpu: float
    peak: int
    told: dict[str, Any]


class Absent(Exception):
    """The side is not installed."""


class Side:
    """A process that does one side's work. ``always``: what it is told with every piece of work."""

    def __init__(self, name: str) -> None:
        self.always: dict[str, object] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            told = self._read()
            if "absent" in told:
                raise Absent(told["absent"])
        except BaseException:
            self.close()
            raise

    def told(self, **always: object) -> Side:
        """The same process, told more with every piece of work."""
        other = copy.copy(self)
        other.always = {**self.always, **always}
        return other

    def work(self, job: str, **details: object) -> Effort:
        """Do it, and give what it took. Raises RuntimeError if it fails."""
        self.begin(job, **details)
        return self.end()

    def begin(self, job: str, **details: object) -> None:
        """Start work whose end is waited for with :meth:`end`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"job": job, **details, **self.always}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Effort:
        told = self._read()
        if "error" in told:
            raise RuntimeError(told["error"])
        return Effort(**told)

    def close(self) -> None:
        process = self._process
        with contextlib.suppress(OSError), process:
            if process.stdin is not None:
                process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a side's process ended: see what it wrote above")
        told: dict[str, Any] = json.loads(line)
        return told


@contextlib.contextmanager
def sides(names: Iterable[str]) -> Iterator[tuple[dict[str, Side], tuple[str, ...]]]:
    """The processes of ours and of the peers named, and which of them are absent."""
    there: dict[str, Side] = {}
    absent = []
    with contextlib.ExitStack() as stack:
        for name in (OURS, *names):
            try:
                side = Side(name)
            except Absent:
                absent.append(name)
            else:
                stack.callback(side.close)
                there[name] = side
        yield there, tuple(absent)


def in_turns(
    there: dict[str, Side], job: str, rounds: int, *, patience: float = 5.0, **details: object
) -> dict[str, list[Effort]]:
    """What the same work takes on each side, in turns; once before that, uncounted.

    A side that takes more than ``patience`` times as long as the quickest there is measured that once only: it is far
    behind, and would take most of the time.
    """
    first = {name: side.work(job, **details) for name, side in there.items()}
    slow = far_behind({name: effort.seconds for name, effort in first.items()}, patience)
    efforts: dict[str, list[Effort]] = {name: [first[name]] if name in slow else [] for name in there}
    for _ in range(rounds):
        for name, side in there.items():
            if name not in slow:
                efforts[name].append(side.work(job, **details))
    return efforts


def far_behind(seconds: dict[str, float], patience: float = 5.0) -> set[str]:
    """The peers that took more than ``patience`` times as long as the quickest side did."""
    least = min(seconds.values())
    return {name for name, each in seconds.items() if not name.startswith(OURS) and each > patience * least}
