"""``python -m benchmarks [NAME …] [--json FILE] [--smallest]``: run benchmarks, and print what they show."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import sys
from dataclasses import replace
from pathlib import Path

import benchmarks

from ._harness import Case, table


def names() -> list[str]:
    """All benchmarks."""
    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name[0] != "_")


def run(name: str, *, smallest: bool = False) -> list[Case]:
    """What a benchmark measures, printed as it comes."""
    module = importlib.import_module(f"benchmarks.{name}")
    print(f"\n== {name}: {(module.__doc__ or '').strip().splitlines()[0]}\n", flush=True)
    cases = []
    for case in module.cases(smallest):
        case = replace(case, bars=()) if smallest else case  # they are for the full size
        cases.append(case)
        print("\n".join(table([case])), flush=True)
    return cases


def main(arguments: list[str] | None = None) -> int:
    """Run what is named, or all; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__)
    parser.add_argument("name", nargs="*", choices=[*names(), []], metavar="NAME", help=", ".join(names()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers there")
    parser.add_argument("--smallest", action="store_true", help="at the smallest size, to see that it still works")
    chosen = parser.parse_args(arguments)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    found = {name: run(name, smallest=chosen.smallest) for name in chosen.name or names()}
    missed = [bar for cases in found.values() for case in cases for bar in case.bars if not bar.is_held]
    absent = sorted({name for cases in found.values() for case in cases for name in case.absent})
    print(f"\n{len(missed)} bars missed; peers skipped: {', '.join(absent) or 'none'}")
    if chosen.json is not None:
        figures = {name: [case.to_json() for case in cases] for name, cases in found.items()}
        chosen.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
