"""A bar that tells the truth: bytes that have arrived, of the bytes that were asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ..config import progress_bars_disabled
from ..engine.loader import LoaderStats

__all__ = ["progress"]

_REFRESH = 0.1
_LINE_EVERY = 10.0


@contextmanager
def progress(
    label: str, total: int | None, stats: Callable[[], LoaderStats], *, enabled: bool = True, out: TextIO | None = None
) -> Iterator[None]:
    """Show on ``out`` (stderr) how many of ``total`` bytes (None: nobody knows) have arrived, while the block runs: a
    bar on a terminal, else a plain line every ten seconds. Nothing at all if ``HOLOTENSOR_DISABLE_PROGRESS_BARS`` is
    set."""
    out = out or sys.stderr
    if not enabled or progress_bars_disabled():
        yield
        return
    before = stats()
    started = before.bytes_fetched + before.bytes_cached

    def arrived() -> int:
        now = stats()
        count = now.bytes_fetched + now.bytes_cached - started
        return count if total is None else min(total, count)

    ended = threading.Event()
    if out.isatty():
        thread = threading.Thread(target=_bar, args=(label, total, arrived, stats, ended, out), daemon=True)
    else:
        thread = threading.Thread(target=_lines, args=(label, total, arrived, ended, out), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if not out.isatty():
        _line(label, total, arrived(), out)


def _bar(
    label: str,
    total: int | None,
    arrived: Callable[[], int],
    stats: Callable[[], LoaderStats],
    ended: threading.Event,
    out: TextIO,
) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, file=out, dynamic_ncols=True) as bar:
        while True:
            last = ended.wait(_REFRESH)
            bar.set_postfix_str(f"{stats().connections} connections", refresh=False)
            bar.update(arrived() - bar.n)
            if last:
                return


def _lines(label: str, total: int | None, arrived: Callable[[], int], ended: threading.Event, out: TextIO) -> None:
    while not ended.wait(_LINE_EVERY):
        _line(label, total, arrived(), out)


def _line(label: str, total: int | None, count: int, out: TextIO) -> None:
    known = "" if total is None else f" of {total / 1e6:.1f}"
    share = "" if not total else f" ({count / total:.0%})"
    out.write(f"{label}: {count / 1e6:.1f}{known} MB{share}\n")
    out.flush()
