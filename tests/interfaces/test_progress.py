from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from holotensor_net.engine.loader import LoaderStats
from holotensor_net.interfaces import progress as room
from holotensor_net.interfaces.progress import progress

NOTHING = LoaderStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Meter:
    """Stands in for a loader: tells what has arrived, and when it has been asked."""

    def __init__(self) -> None:
        self.now = NOTHING
        self.asked = threading.Semaphore(0)

    def __call__(self) -> LoaderStats:
        self.asked.release()
        return self.now

    def await_question(self) -> None:
        while self.asked.acquire(blocking=False):
            pass
        for _ in range(3):  # the third was asked, and so the first shown, after this began
            assert self.asked.acquire(timeout=5)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    monkeypatch.setattr(room, "_REFRESH", 0.005)
    monkeypatch.setattr(room, "_LINE_EVERY", 0.005)
    return Meter()


def test_a_terminal_gets_a_bar_of_the_bytes_that_arrived(meter: Meter) -> None:
    out = Terminal()
    with progress("pull", 4_000_000, meter, out=out):
        meter.now = replace(NOTHING, bytes_fetched=1_000_000, bytes_cached=1_000_000, connections=3)
        meter.await_question()
        meter.now = replace(meter.now, bytes_fetched=3_000_000)
    shown = out.getvalue()
    assert shown.startswith("\rpull:   0%|")
    assert "3 connections" in shown
    assert "100%" in shown
    assert "4.00M/4.00M" in shown


def test_elsewhere_it_is_lines(meter: Meter) -> None:
    out = io.StringIO()
    with progress("pull", 4_000_000, meter, out=out):
        meter.now = replace(NOTHING, bytes_fetched=1_000_000, bytes_cached=1_000_000)
        meter.await_question()
        meter.now = replace(NOTHING, bytes_fetched=3_000_000, bytes_cached=1_000_000)
    lines = out.getvalue().splitlines()
    assert "pull: 2.0 of 4.0 MB (50%)" in lines
    assert lines[-1] == "pull: 4.0 of 4.0 MB (100%)"
    assert "\r" not in out.getvalue()


def test_what_came_before_is_not_counted(meter: Meter) -> None:
    out = io.StringIO()
    meter.now = replace(NOTHING, bytes_fetched=300_000, bytes_cached=400_000)
    with progress("run", 2_000_000, meter, out=out):
        meter.now = replace(NOTHING, bytes_fetched=1_200_000, bytes_cached=500_000)
    assert out.getvalue().splitlines()[-1] == "run: 1.0 of 2.0 MB (50%)"


def test_what_came_twice_does_not_count_twice(meter: Meter) -> None:
    out = io.StringIO()
    with progress("run", 1_000_000, meter, out=out):
        meter.now = replace(NOTHING, bytes_fetched=9_000_000)
    assert out.getvalue().splitlines()[-1] == "run: 1.0 of 1.0 MB (100%)"


@pytest.mark.parametrize(("total", "line"), [(None, "run: 1.5 MB"), (0, "run: 0.0 of 0.0 MB")])
def test_a_total_may_be_unknown_or_nothing(meter: Meter, total: int | None, line: str) -> None:
    for out in (io.StringIO(), Terminal()):
        with progress("run", total, meter, out=out):
            meter.now = replace(NOTHING, bytes_fetched=1_500_000)
        assert out.getvalue().splitlines()[-1] == line or out.isatty()
        meter.now = NOTHING


@pytest.mark.parametrize("terminal", [True, False])
def test_silence_is_silent(meter: Meter, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = Terminal() if terminal else io.StringIO()
    with progress("run", 10, meter, enabled=False, out=out):
        pass
    monkeypatch.setenv("HOLOTENSOR_DISABLE_PROGRESS_BARS", "1")
    with progress("run", 10, meter, out=out):
        pass
    assert out.getvalue() == ""
    assert not meter.asked.acquire(blocking=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_passes_and_the_thread_ends(meter: Meter, terminal: bool) -> None:
    before = threading.active_count()
    out = Terminal() if terminal else io.StringIO()
    with pytest.raises(KeyError), progress("run", 10, meter, out=out):
        raise KeyError
    left = [thread for thread in threading.enumerate() if "tqdm" not in type(thread).__module__]
    assert len(left) <= before
    if not terminal:
        assert "100%" not in out.getvalue()


def test_it_is_stderr_if_nothing_else_is_named(meter: Meter, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("run", 10, meter):
        pass
    assert capsys.readouterr().err.startswith("run: 0.0 of")
