"""What an import costs, each in an interpreter of its own.

The modules' files are in the page cache, and their bytecode is compiled: what is measured is what every start pays.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from ._harness import OURS, Bar, Case, alternate_told

PEERS = ("requests", "obstore", "huggingface_hub")
TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def cases(smallest: bool) -> Iterator[Case]:
    rounds = 1 if smallest else 15
    peers = PEERS[:1] if smallest else PEERS
    absent = tuple(name for name in peers if importlib.util.find_spec(name) is None)
    imports = {name: f"import {name}" for name in peers if name not in absent}
    package = measured("the package", {OURS: "import holotensor_net", **imports}, rounds)
    if "requests" in imports:
        share = 1 / package.ratio("requests")
        package = replace(package, bars=(Bar("share of requests' time", share, at_most=0.5, unit=" ×"),))
    yield replace(package, absent=absent)
    notes = {OURS: "the whole engine, requests included"}
    engine = {OURS: "from holotensor_net import NetworkLoader", **imports}
    yield replace(measured("what a first load needs", engine, rounds), absent=absent, notes=notes)


def measured(name: str, statements: dict[str, str], rounds: int) -> Case:
    sides: dict[str, Callable[[], float]] = {side: partial(seconds, code) for side, code in statements.items()}
    return Case(name, alternate_told(sides, rounds))


def seconds(statement: str) -> float:
    """How long the statement takes in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)
