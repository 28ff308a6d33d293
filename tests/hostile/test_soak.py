"""Mixed faults for a long time: nothing grows."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.fault_origin import Addresses, origin_process
from hostile.faults import TABLE
from hostile.runner import cases, run

MEMORY_GROWTH = 20 << 20
"""Bytes by which the process may grow."""

ROWS = [fault for fault in TABLE if not (fault.pending or fault.hangs or fault.most == 800)]

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")


@pytest.fixture
def addresses() -> Iterator[Addresses]:
    logging.disable(logging.WARNING)
    with origin_process() as running:
        yield running
    logging.disable(logging.NOTSET)


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _memory() -> int:
    """Bytes of the process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _mix(seed: int, addresses: Addresses, folder: Path) -> int:
    """Some transfers of some rows; gives how many. What they leave on the disk is thrown away."""
    draw = random.Random(seed)
    done = 0
    for fault in draw.sample(ROWS, 12):
        every = list(cases(fault, (seed,)))
        planned = draw.sample(every, min(12, len(every)))
        report = run(fault, planned, addresses, folder / str(seed))
        assert not report.wrongs, str(report)
        done += report.transfers
    shutil.rmtree(folder / str(seed))
    return done


def _soak(seconds: float, addresses: Addresses, folder: Path) -> None:
    seeds = itertools.count(1)
    began = time.monotonic()
    while time.monotonic() - began < seconds / 4:  # until pools, caches and the allocator have what they need
        _mix(next(seeds), addresses, folder)
    descriptors, threads, memory = _descriptors(), threading.active_count(), _memory()
    transfers = 0
    while time.monotonic() - began < seconds:
        transfers += _mix(next(seeds), addresses, folder)
    assert transfers >= 100
    assert threading.active_count() <= threads
    assert _descriptors() <= descriptors
    assert _memory() - memory < MEMORY_GROWTH


def test_faults_leave_nothing_behind(addresses: Addresses, tmp_path: Path) -> None:
    _soak(60.0, addresses, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_of_ten_minutes_leave_nothing_behind(addresses: Addresses, tmp_path: Path) -> None:
    _soak(600.0, addresses, tmp_path)
