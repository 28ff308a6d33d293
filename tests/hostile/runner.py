"""Runs the transfers of a row over real sockets, and judges what came of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import random
import time
import traceback
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from hostile.fault_origin import Addresses
from hostile.faults import Fault
from hostile.scene import CHUNK, PLACES, SECRETS, Case
from wire import Resolver, write_certificate

from holotensor_net import errors
from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.transport import client
from holotensor_net.transport.client import HttpClient
from holotensor_net.transport.retry import Host, Hosts
from holotensor_net.values import LoadRequest, RangeRequest, Validator

OVERRUN = 0.25
"""Seconds past its deadline by which a transfer must have ended."""


def cases(fault: Fault, seeds: Iterable[int] = (0,)) -> Iterator[Case]:
    """Every transfer of a row: shapes × sizes × places × seeds, the fault once and always."""
    for seed, shape, size, lasting in itertools.product(seeds, fault.shapes, fault.sizes, (False, True)):
        if shape == "client-ranged" and not size:
            continue  # an empty range is not asked for
        for place in PLACES if size > 1 else PLACES[:1]:
            yield Case(fault.name, shape, size, place, seed, lasting)


def some(fault: Fault, most: int, seed: int = 0) -> list[Case]:
    """At most so many transfers of a row, drawn with a fixed seed: some of every shape, once and always."""
    every = list(cases(fault, (seed,)))
    random.Random(f"{fault.name} {seed}").shuffle(every)
    groups: dict[tuple[str, bool], list[Case]] = {}
    for case in every:
        groups.setdefault((case.shape, case.lasting), []).append(case)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return [case for case in in_turn if case is not None][:most]


@dataclass
class Ending:
    """How one transfer ended; times in seconds."""

    case: Case
    took: float
    data: bytes | None = None
    error: BaseException | None = None


@dataclass
class Report:
    """What a row came to: how many transfers, how they ended, how many were struck, and what was wrong."""

    fault: Fault
    transfers: int = 0
    struck: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrongs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = ", ".join(f"{end} {count}" for end, count in self.ends.most_common())
        wrongs = "".join(f"\n    {wrong}" for wrong in self.wrongs[:12])
        more = f"\n    … {len(self.wrongs)} in all" if len(self.wrongs) > 12 else ""
        return f"{self.fault.name}: {self.transfers} transfers, {self.struck} struck ({told}){wrongs}{more}"


def run(fault: Fault, planned: list[Case], addresses: Addresses, folder: Path, *, workers: int | None = None) -> Report:
    """Make the transfers, several at a time, each worker with loaders and a cache of its own, and judge them all."""
    with mock.patch.object(client, "HOSTS", Strangers()), _silent_resolver(fault):
        return _run(fault, planned, addresses, folder, workers)


@contextlib.contextmanager
def _silent_resolver(fault: Fault) -> Iterator[None]:
    """No name server answers before the end, if that is the fault."""
    if fault.dead != "unresolved":
        yield
        return
    resolver = Resolver()
    try:
        with mock.patch("socket.getaddrinfo", resolver):
            yield
    finally:
        resolver.may_answer.set()


class Strangers(Hosts):
    """Every client meets the host for the first time: what one transfer was told is not to end another."""

    def of(self, name: Hashable) -> Host:
        return Host()


def _run(fault: Fault, planned: list[Case], addresses: Addresses, folder: Path, workers: int | None) -> Report:
    addresses.settle(fault.name)  # what an earlier run of the same row left
    report = Report(fault, len(planned))
    count = min(len(planned), workers or (16 if fault.waits else 6))
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(_work, fault, planned[index::count], addresses, folder / fault.name / str(index), report)
            for index in range(count)
        ]
        endings = [ending for job in jobs for ending in job.result()]
    told = addresses.settle(fault.name)
    report.wrongs += [str(breach) for breach in told["breaches"]]
    for ending in endings:
        _judge(report, ending, told["ledgers"].get(ending.case.key, {}))
    for index in range(count):
        _inspect(report, planned[index::count], addresses, folder / fault.name / str(index), told["ledgers"])
    return report


# -- making transfers


def deadline_of(fault: Fault) -> float:
    return 3.0 if fault.waits else 10.0


def config_of(fault: Fault, addresses: Addresses, folder: Path, shape: str, tokens: Iterator[str]) -> NetworkConfig:
    """Settings as a caller would have them, on the scale of the matrix."""
    port = addresses.proxy if fault.bend is not None else addresses.tls if fault.tls else addresses.origin
    scheme = "https" if fault.tls else "http"
    endpoints = tuple(
        CdnEndpoint(
            _dead(fault, addresses, mirror) or f"{scheme}://127.0.0.1:{port}/{mirror}",
            priority=index,
            supports_range=shape != "plain",
            headers={"X-Api-Key": "canary-api-key"},
            auth=lambda: next(tokens),
            cache_scope="the matrix",
            verify=str(write_certificate(folder)) if fault.tls else True,
            proxies={},
        )
        for index, mirror in enumerate("ab"[: fault.mirrors])
    )
    return NetworkConfig(
        endpoints=endpoints,
        timeout=0.5 if fault.waits else 8.0,
        connect_timeout=0.5 if fault.waits else 8.0,
        chunk_size=CHUNK,
        retry=RetryConfig(
            max_retries=1 if fault.waits else 2, initial_backoff=0.001, max_backoff=0.004, deadline=deadline_of(fault)
        ),
        cache_dir=folder / "cache",
        memory_budget=1 << 20,
    )


def _dead(fault: Fault, addresses: Addresses, mirror: str) -> str | None:
    """The URL of an endpoint that is not there; None if it is."""
    match fault.dead:
        case "refused":
            return f"http://127.0.0.1:{addresses.closed}/{mirror}"
        case "first-refused" if mirror == "a":
            return f"http://127.0.0.1:{addresses.closed}/{mirror}"
        case "nameless":
            return f"http://{mirror * 64}/"  # no label of a name is so long
        case "unresolved":
            return f"http://{mirror}.example/"
        case "silent":
            return f"http://127.0.0.1:{addresses.black_hole}/{mirror}"
    return None


def request_of(fault: Fault, case: Case) -> LoadRequest:
    start, stop = case.wanted
    is_empty_part = case.is_ranged and not case.size
    return LoadRequest(
        case.key,
        case.path,
        byte_range=RangeRequest(start, start + CHUNK if is_empty_part else stop) if case.is_ranged else None,
        allow_short=is_empty_part or (fault.short and case.is_ranged),
        expected_size=case.size if fault.expected else None,
        checksum=f"sha256:{hashlib.sha256(case.truth()).hexdigest()}" if fault.checksum else None,
        validator=Validator('"v0"', None, True) if fault.pinned else None,
        deadline=deadline_of(fault),
    )


class _Tokens:
    """A fresh token each time; begins anew with each transfer."""

    def __init__(self) -> None:
        self._count = 0

    def begin(self) -> None:
        self._count = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._count += 1
        return f"canary-bearer-{self._count}"


def _work(fault: Fault, planned: list[Case], addresses: Addresses, folder: Path, report: Report) -> list[Ending]:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _Tokens()
    endings = []
    with ExitStack() as open_ones:

        def new_door(shape: str) -> Any:
            config = config_of(fault, addresses, folder, shape, tokens)
            if shape.startswith("client"):
                return open_ones.enter_context(HttpClient(config.endpoints[0], config))
            return open_ones.enter_context(NetworkLoader(config))

        # One that is silent is set aside for a while, and one that is busy asked less.
        door = new_door if fault.waits or fault.number in (26, 29, 31, 32) else functools.cache(new_door)
        for case in planned:
            for _ in range(2 if fault.twice else 1):
                tokens.begin()
                ending = _end_of(fault, case, door(case.shape))
            endings.append(ending)
    return endings


def _end_of(fault: Fault, case: Case, door: Any) -> Ending:
    request = request_of(fault, case)
    began = time.monotonic()
    ending = Ending(case, 0.0)
    try:
        if isinstance(door, NetworkLoader):
            result = door.load(request)
            ending.took = time.monotonic() - began
            ending.data, ending.error = (bytes(result.data), None) if result.is_success else (None, result.error)
            return ending
        if case.shape == "client-head":
            ending.data = case.truth() if door.head(request.path).size == case.size else b"of another size"
        elif request.byte_range is not None:
            ending.data = door.fetch_range(request.path, request.byte_range)
        else:
            ending.data = door.fetch(request.path)
    except BaseException as error:
        ending.error = error
    ending.took = time.monotonic() - began
    return ending


# -- judging them


def _judge(report: Report, ending: Ending, ledger: dict[str, Any]) -> None:
    fault, case = report.fault, ending.case
    is_struck = bool(ledger.get("hits")) or fault.dead is not None
    report.struck += is_struck
    allowed = (fault.always if case.lasting else fault.once) if is_struck else {"bytes"}
    name = _name_of(ending)
    report.ends[name] += 1

    def wrong(what: str) -> None:
        report.wrongs.append(f"{case.key}: {what}")

    if ending.data is not None and ending.data not in truths(case, ledger):
        wrong(f"wrong bytes: {len(ending.data)} of {case.size}, requests {ledger.get('requests')}")
    if ending.error is not None:
        wrongness = _is_foreign(ending.error)
        if wrongness:
            wrong(wrongness)
        elif any(secret in "".join(traceback.format_exception(ending.error)) for secret in SECRETS):
            wrong(f"a secret in {ending.error!r}")
    if not any(_is(ending, end) for end in allowed):
        wrong(f"ended in {name} ({ending.error}), not in {' or '.join(sorted(allowed))}")
    limit = deadline_of(fault) + OVERRUN if fault.within is None else fault.within
    if ending.took > limit:
        wrong(f"took {ending.took:.2f} s")
    times = ledger.get("times", ())
    if fault.apart is not None and any(after - before < fault.apart for before, after in itertools.pairwise(times)):
        wrong(f"asked again too soon, at {times}")
    if fault.most is not None and ledger.get("requests", 0) > fault.most:
        wrong(f"made {ledger['requests']} requests")


def truths(case: Case, ledger: dict[str, Any]) -> list[bytes]:
    """What the bytes may be: those of one version that was served, and of no mixture."""
    return [case.truth(version) for version in ledger.get("versions") or (0,)]


def _last(error: BaseException | None) -> BaseException | None:
    while isinstance(error, errors.RetriesExhausted) and error.last_error is not None:
        error = error.last_error
    return error


def _name_of(ending: Ending) -> str:
    return "bytes" if ending.error is None else type(_last(ending.error)).__name__


def _is(ending: Ending, end: str) -> bool:
    if end == "bytes":
        return ending.error is None
    return isinstance(_last(ending.error), getattr(errors, end))


def _is_foreign(error: BaseException) -> str | None:
    if not isinstance(error, errors.NetworkError):
        return f"a foreign error: {error!r}"
    if "internal error" in error.message:
        return f"a defect: {''.join(traceback.format_exception(error))}"
    return None


def _inspect(report: Report, planned: list[Case], addresses: Addresses, folder: Path, ledgers: dict[str, Any]) -> None:
    """The cache holds nothing but what is true, and gives nothing else."""
    fault = report.fault
    known = {truth for case in planned for truth in truths(case, ledgers.get(case.key, {}))}
    cache = folder / "cache"
    for blob in (cache / "blobs").glob("*/*"):
        if blob.read_bytes() not in known:
            report.wrongs.append(f"{blob} holds {blob.stat().st_size} bytes that are nobody's")
        if fault.uncached:
            report.wrongs.append(f"{blob} was to be kept nowhere")
    for file in cache.rglob("*"):
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in SECRETS):
            report.wrongs.append(f"a secret in {file}")
    left = list((cache / "partial").glob("*"))
    if left:
        report.wrongs.append(f"{len(left)} part files were left: {left[0]}")
    for shape in sorted({case.shape for case in planned if not case.shape.startswith("client")}):
        config = replace(config_of(fault, addresses, folder, shape, iter(())), offline=True)
        with NetworkLoader(config) as loader:
            for case in planned:
                kept = loader.load(request_of(fault, case)) if case.shape == shape else None
                if kept is None or isinstance(kept.error, errors.OfflineError):
                    continue
                if kept.error is not None or bytes(kept.data) not in truths(case, ledgers.get(case.key, {})):
                    report.wrongs.append(f"{case.key}: the cache gave {kept}")
