"""Every fault of the table over real sockets: right bytes, or one of our errors in time; and a clean cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile.fault_origin import Addresses, origin_process
from hostile.faults import TABLE, Fault
from hostile.runner import cases, run, some
from hostile.scene import CHUNK, Case

from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import DeadlineExceeded, InvalidUrl
from holotensor_net.values import LoadFailure, LoadRequest, LoadResult, RangeRequest

AT_ONCE = 46
"""Transfers of a row in the ordinary run, at most."""

SEEDS = range(6)

BUDGET = 32
"""Requests beyond a tenth of the transfers that a host which refuses them all may be asked."""


@pytest.fixture(scope="module")
def addresses() -> Iterator[Addresses]:
    with origin_process() as running:
        yield running


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that is disabled by a fault says so in the log, thousands of times here; and a netrc with secrets."""
    home = Path.home()
    (home / ".netrc").write_text("default login canary-netrc password canary-netrc\n")
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _share(fault: Fault) -> list[Case]:
    return some(fault, 28 if fault.waits else AT_ONCE)


def _rows() -> list[object]:
    return [
        pytest.param(
            fault,
            id=fault.name,
            marks=[pytest.mark.xfail(reason=fault.pending, strict=True, run=not fault.hangs)] if fault.pending else [],
        )
        for fault in TABLE
    ]


@pytest.mark.parametrize("fault", _rows())
def test_a_fault_ends_in_right_bytes_or_a_typed_error_in_time(
    fault: Fault, addresses: Addresses, tmp_path: Path
) -> None:
    report = run(fault, _share(fault), addresses, tmp_path)
    assert not report.wrongs, str(report)
    assert report.struck, f"the fault struck nothing: {report}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", _rows())
def test_a_fault_ends_so_everywhere_and_always(fault: Fault, addresses: Addresses, tmp_path: Path) -> None:
    planned = list(cases(fault, SEEDS[:1] if fault.waits else SEEDS))
    report = run(fault, planned, addresses, tmp_path)
    assert not report.wrongs, str(report)


def test_the_matrix_is_as_large_as_promised() -> None:
    live = [fault for fault in TABLE if not fault.hangs]
    assert sum(len(_share(fault)) for fault in live) >= 6_000
    assert sum(len(list(cases(fault, SEEDS[:1] if fault.waits else SEEDS))) for fault in live) >= 60_000


# -- rows that are about several transfers at once


def _settings(addresses: Addresses, folder: Path, *mirrors: str, **rest: Any) -> NetworkConfig:
    own = {key: rest.pop(key) for key in ("auth", "max_connections") if key in rest}
    endpoints = tuple(
        CdnEndpoint(f"http://127.0.0.1:{addresses.origin}/{mirror}", priority=index, proxies={}, **own)
        for index, mirror in enumerate(mirrors or "a")
    )
    retry = RetryConfig(max_retries=2, initial_backoff=0.001, max_backoff=0.004, deadline=10.0)
    return NetworkConfig(**{"endpoints": endpoints, "chunk_size": CHUNK, "retry": retry, "cache_dir": folder} | rest)


def _case(fault: str, seed: int, *, lasting: bool = False, shape: str = "ranged", size: int = CHUNK) -> Case:
    return Case(fault, shape, size, "start", seed, lasting)


def _load(loader: NetworkLoader, case: Case) -> LoadResult:
    return loader.load(LoadRequest(case.key, case.path, byte_range=RangeRequest(*case.wanted)))


def test_32_a_storm_meets_one_budget_for_the_host(addresses: Addresses, tmp_path: Path) -> None:
    storm = [_case("32-busy", seed, lasting=True) for seed in range(300)]
    with NetworkLoader(_settings(addresses, tmp_path)) as loader, ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda case: _load(loader, case), storm))
    ledgers = addresses.settle("32-busy")["ledgers"]
    assert all(isinstance(result, LoadFailure) for result in results)
    assert sum(ledger["requests"] for ledger in ledgers.values()) <= 1.1 * len(storm) + BUDGET


def test_36_a_slow_piece_is_asked_of_the_next_endpoint_too(addresses: Addresses, tmp_path: Path) -> None:
    slow = _case("28-stall-before-the-head", 1)
    with NetworkLoader(_settings(addresses, tmp_path, "a", "b", timeout=3.0)) as loader:
        for seed in range(60):  # sound, for the loader to know how long an answer takes
            assert _load(loader, _case("4-half-of-it", seed, shape="ranged", size=1)).is_success
        digest = f"sha256:{hashlib.sha256(slow.truth()).hexdigest()}"  # what is not proven to be the same is not hedged
        result = loader.load(LoadRequest(slow.key, slow.path, byte_range=RangeRequest(*slow.wanted), checksum=digest))
    addresses.settle("4-half-of-it")
    addresses.settle(slow.fault)
    assert bytes(result.data) == slow.truth()
    assert result.duration < 2.5  # silence is told at 3


def test_37_a_crowd_with_one_wish_makes_one_fetch(addresses: Addresses, tmp_path: Path) -> None:
    wish = _case("8-cut", 1)
    digest = f"sha256:{hashlib.sha256(wish.truth()).hexdigest()}"  # whoever comes late need not ask whether it is new
    request = LoadRequest(wish.key, wish.path, byte_range=RangeRequest(*wish.wanted), checksum=digest)
    with NetworkLoader(_settings(addresses, tmp_path)) as loader, ThreadPoolExecutor(16) as callers:
        results = list(callers.map(lambda _: loader.load(request), range(16)))
    ledger = addresses.settle("8-cut")["ledgers"][wish.key]
    assert {bytes(result.data) for result in results} == {wish.truth()}
    assert ledger["requests"] == 2  # the one that was cut, and what followed it


def test_37_when_the_first_of_a_crowd_leaves_the_others_are_served(addresses: Addresses, tmp_path: Path) -> None:
    wish = _case("28-stall", 1)
    request = LoadRequest("first", wish.path, byte_range=RangeRequest(*wish.wanted))
    with NetworkLoader(_settings(addresses, tmp_path, timeout=0.5)) as loader:
        leader = loader.enqueue(replace(request, deadline=0.1), shared=False)
        follower = loader.enqueue(replace(request, fragment_id="second"), shared=False)
        assert isinstance(leader.result(5).error, DeadlineExceeded)
        assert bytes(follower.result(5).data) == wish.truth()
    addresses.settle("28-stall")


def test_38_one_connection_serves_a_crowd_of_stalls(addresses: Addresses, tmp_path: Path) -> None:
    stalls = [_case("28-stall", seed, lasting=seed % 2 == 1) for seed in range(10, 16)]
    settings = _settings(addresses, tmp_path, timeout=0.2, max_connections=1)
    with NetworkLoader(settings) as loader, ThreadPoolExecutor(len(stalls)) as callers:
        results = list(callers.map(lambda case: _load(loader, case), stalls))
    addresses.settle("28-stall")
    for case, result in zip(stalls, results, strict=True):
        assert case.lasting != result.is_success, result
        assert not result.is_success or bytes(result.data) == case.truth()


@pytest.mark.parametrize("path", ["../up", "a/../../up", "a/%2e%2e/up", "nul\0", "http://127.0.0.1/x", "//host/x"])
def test_42_a_path_that_leaves_its_endpoint_is_not_asked_for(addresses: Addresses, tmp_path: Path, path: str) -> None:
    with NetworkLoader(_settings(addresses, tmp_path / "cache")) as loader:
        result = loader.load(LoadRequest("../../evil\0" + "x" * 10_000, path))
    assert isinstance(result.error, InvalidUrl)
    assert [file.name for file in tmp_path.iterdir()] in ([], ["cache"])


@pytest.mark.parametrize("tenants", [("one", "two"), (lambda: "one", lambda: "two")], ids=["tokens", "functions"])
def test_43_what_one_tenant_was_given_is_not_given_to_another(
    tenants: tuple[Any, Any], addresses: Addresses, tmp_path: Path
) -> None:
    case = _case("4-half-of-it", 77)
    for tenant in tenants:
        with NetworkLoader(_settings(addresses, tmp_path, auth=tenant)) as loader:
            result = _load(loader, case)
            assert result.is_success
            assert not result.from_cache
    addresses.settle("4-half-of-it")
