"""Benchmarks still work: each at its smallest size, without a look at the figures; and what they all stand on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import _harness as harness
from benchmarks._harness import OURS, Bar, Case, alternate, peer, table


@pytest.mark.parametrize("name", benchmarks.names())
def test_benchmark_runs_at_its_smallest(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main([name, "--smallest", "--json", str(tmp_path / "figures.json")]) == 0
    cases = json.loads((tmp_path / "figures.json").read_text())[name]
    printed = capsys.readouterr().out
    assert cases
    for case in cases:
        assert case["name"] in printed
        assert len(case["samples"][OURS]) > 0
        assert all(seconds > 0 for samples in case["samples"].values() for seconds in samples)


def test_peers_that_are_absent_are_skipped_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import stream_cache

    monkeypatch.setattr(stream_cache, "peer", lambda name: None)
    benchmarks.main(["stream_cache", "--smallest"])
    printed = capsys.readouterr().out
    assert "joblib                          !! SKIPPED: not installed" in printed
    assert printed.endswith("peers skipped: joblib\n")


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        benchmarks.main(["nonsense"])
    assert refused.value.code == 2
    assert "stream_cache" in capsys.readouterr().err


def test_all_are_run_if_none_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def run(name: str, *, smallest: bool) -> list[Case]:
        ran.append(name)
        return [Case("case", {OURS: [1.0]}, bars=(Bar("time", 3, at_most=2), Bar("rate", 3, at_least=2)))]

    monkeypatch.setattr(benchmarks, "run", run)
    assert benchmarks.main([]) == 0
    assert ran == benchmarks.names()
    assert f"{len(ran)} bars missed; peers skipped: none" in capsys.readouterr().out


def test_what_all_share_is_no_benchmark() -> None:
    assert "stream_cache" in benchmarks.names()
    assert not [name for name in benchmarks.names() if name.startswith("_")]


def test_sides_take_turns() -> None:
    calls: list[str] = []
    samples = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    measured = calls[-6:]
    assert measured == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        tick()

    assert alternate({"a": call}, 2, at_least=2.0) == {"a": [0.25, 0.25]}
    assert len(calls) == 1 + (1 + 2 + 4 + 8) + 2 * 8


def test_table_tells_medians_ratios_rates_and_bars() -> None:
    samples = {OURS: [2.0, 1.0, 9.0], "peer": [8.0, 8.0, 1.0], "quick": [5e-7]}
    bars = (Bar("speed", 4, at_least=3, unit=" ×"), Bar("cost", 6, at_most=5, unit=" %"))
    case = Case("work", samples, bars, absent=("other",), work=4.0, unit="GB", notes={"peer": "a note"})
    lines = list(table([case]))
    assert lines[0] == "work"
    assert lines[1].split() == ["ours", "2", "s", "2", "GB/s"]
    assert lines[2].split() == ["peer", "8", "s", "0.5", "GB/s", "4.00", "×", "a", "note"]
    assert lines[3].split()[:3] == ["quick", "500", "ns"]
    assert lines[4].split()[:3] == ["other", "!!", "SKIPPED:"]
    assert lines[5:] == ["    -> speed ≥ 3 ×: 4 × held", "    -> cost ≤ 5 %: 6 % MISSED"]


@pytest.mark.parametrize(("name", "there"), [("json", True), ("holotensor_net.nonsense", False)])
def test_peer_is_a_module_or_none(name: str, there: bool) -> None:
    assert (peer(name) is not None) is there
