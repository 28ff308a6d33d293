"""What is slow is asked for twice: when, how often, and never what could be of another version.

First the decision alone, in simulated time; then over real sockets.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from wire import END, HOLD, Act, Request, Wire, answer, part

from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.hedging import Hedging, Versions
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.engine.races import Race
from holotensor_net.transport.client import Ask
from holotensor_net.values import LoadRequest, RangeRequest, Validator

V1 = Validator('"v1"', None, True)


# -- the decision


def usual(hedging: Hedging, count: int = 100, *, seconds: float = 0.01, endpoint: int = 0) -> None:
    for _ in range(count):
        hedging.begin(endpoint, 1)
        hedging.measured(endpoint, seconds, 1, 0.0)


def test_nothing_is_slow_until_it_is_known_what_is_usual() -> None:
    hedging = Hedging(2)
    usual(hedging, 19)
    assert hedging.begin(0, 1) is None
    usual(hedging, 1)
    assert hedging.begin(0, 1) == pytest.approx(0.02)
    assert hedging.begin(1, 1) is None  # each endpoint has its own


def test_a_few_that_are_slow_do_not_change_what_is_usual() -> None:
    hedging, draw = Hedging(1), random.Random(1)
    for _ in range(2000):
        hedging.measured(0, 2.0 if draw.random() < 0.01 else draw.uniform(0.005, 0.01), 1, 0.0)
    delay = hedging.begin(0, 1)
    assert delay is not None
    assert delay <= 0.02


def test_a_path_that_becomes_slow_as_a_whole_is_soon_the_usual_one() -> None:
    hedging = Hedging(1)
    usual(hedging, 1000)
    usual(hedging, 128, seconds=1.0)
    assert hedging.begin(0, 1) == pytest.approx(2.0)


def test_a_long_piece_is_given_the_time_for_its_bytes() -> None:
    hedging = Hedging(1)
    usual(hedging)
    assert hedging.begin(0, 1 << 20) is None  # how fast bytes come is not known yet
    for _ in range(20):
        hedging.measured(0, 0.01, 1 << 20, 0.1)
    assert hedging.begin(0, 1 << 22) == pytest.approx(2 * (0.01 + 0.4))
    assert hedging.begin(0, 1000) == pytest.approx(0.02)


@pytest.mark.parametrize("slow", [0.0, 0.02, 0.2, 1.0])
def test_no_more_than_a_twentieth_is_ever_spent(slow: float) -> None:
    hedging, draw, spent = Hedging(1), random.Random(2), 0
    for count in range(1, 5001):
        hedging.begin(0, 1)
        spent += draw.random() < slow and hedging.spend()
        assert spent <= 0.05 * count


def test_what_is_saved_up_is_bounded() -> None:
    hedging = Hedging(1)
    usual(hedging, 100_000)
    assert sum(hedging.spend() for _ in range(1000)) == 10


def simulated(share_slow: float, count: int = 20_000, *, hedged: bool) -> tuple[float, float]:
    """The 99th percentile in seconds, and the requests for each piece, where some answers take 2 s longer."""
    hedging, draw, took, extra = Hedging(1), random.Random(3), [], 0

    def one() -> float:
        return draw.lognormvariate(-4.6, 0.4) + (2.0 if draw.random() < share_slow else 0.0)

    for _ in range(count):
        delay, first = hedging.begin(0, 1), one()
        if hedged and delay is not None and first > delay and hedging.spend():
            extra += 1
            first = min(first, delay + one())
        hedging.measured(0, first, 1, 0.0)
        took.append(first)
    return sorted(took)[int(0.99 * count)], extra / count


def test_with_2_percent_slow_answers_the_99th_percentile_is_that_of_the_others() -> None:
    plain, _ = simulated(0.02, hedged=False)
    hedged, extra = simulated(0.02, hedged=True)
    assert plain > 2.0
    assert hedged < 0.1 * plain
    assert extra <= 0.05


def test_a_version_holds_for_a_minute_and_only_if_it_is_an_entity_tag() -> None:
    versions = Versions()
    versions.note("a", V1, 0.0)
    assert versions.of("a", 59.0) == V1
    assert versions.of("a", 61.0) is None
    assert versions.of("b", 0.0) is None
    versions.note("a", Validator('W/"v2"', None, False), 1.0)
    assert versions.of("a", 1.0) is None
    versions.note("a", Validator(None, "Sun, 06 Nov 1994 08:49:37 GMT", True), 1.0)
    assert versions.of("a", 1.0) is None
    for number in range(2000):
        versions.note(str(number), V1, 2.0)
    assert versions.of("0", 2.0) is None
    assert versions.of("1999", 2.0) == V1


def test_who_had_another_version_is_asked_for_it_again_after_a_minute() -> None:
    versions = Versions()
    assert versions.may_have("a", 1, 0.0)
    versions.differs("a", 1, 0.0)
    assert not versions.may_have("a", 1, 59.0)
    assert versions.may_have("a", 0, 59.0)
    assert versions.may_have("b", 1, 59.0)
    assert versions.may_have("a", 1, 60.0)


# -- over real sockets

DATA = random.Random(36).randbytes(1 << 17)
OTHER = random.Random(37).randbytes(1 << 17)
NEVER = 10.0
Wait = float | threading.Event | Act | tuple[threading.Event, float]


class Mirror(Wire):
    """Serves one object in ranges. ``slow``: how long an answer takes in seconds, or what it waits for, drawn anew for
    each; ``silent`` before its head, else in the middle of its body."""

    def __init__(
        self,
        data: bytes = DATA,
        *,
        etag: str | None = '"v1"',
        slow: Callable[[Request], Wait] = lambda _: 0.0,
        silent: bool = True,
    ) -> None:
        self.served = 0
        self._data = data
        self._etag = etag
        self._slow = slow
        self._silent = silent
        super().__init__(always=self._reply)

    def _reply(self, request: Request) -> Any:
        self.served += 1
        if self._etag and request.headers.get("if-match", self._etag) != self._etag:
            return answer(b"", 412)
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        whole = part(self._data, int(first), int(last) + 1, etag=self._etag)
        wait = self._slow(request)
        middle = 0 if self._silent else len(whole) - (int(last) + 1 - int(first)) // 2
        waits = wait if isinstance(wait, tuple) else (wait,)
        return [whole[:middle], *waits, whole[middle:]] if wait else whole


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., NetworkLoader]]:
    with ExitStack() as running:

        def make(*mirrors: Mirror, **settings: Any) -> NetworkLoader:
            endpoints = tuple(CdnEndpoint(mirror.url, priority=n, proxies={}) for n, mirror in enumerate(mirrors))
            fixed = {"retry": RetryConfig(max_retries=0), "cache_dir": False, "timeout": NEVER}
            return running.enter_context(NetworkLoader(NetworkConfig(endpoints=endpoints, **(fixed | settings))))

        yield make


def piece(number: int, size: int = 100, **fields: Any) -> LoadRequest:
    start = number * 7 % (len(DATA) - size)
    return LoadRequest(f"{number} {size}", "object", byte_range=RangeRequest(start, start + size), **fields)


def right(request: LoadRequest, data: bytes = DATA) -> bytes:
    assert request.byte_range is not None
    return data[request.byte_range.start : request.byte_range.stop]


def warm(loader: NetworkLoader, count: int = 40, *, saved: float = 5.0) -> None:
    """Have the loader learn what is usual; a piece that is slow by chance meanwhile is not asked for twice."""
    hedging = loader._fetcher._courier._hedging
    hedging._saved = -1e9
    for number in range(count):
        loader.load(piece(number)).data  # noqa: B018
    hedging._saved = saved


def slow_from(number: int, wait: Wait) -> Callable[[Request], Wait]:
    """The answers from that one on are slow."""
    count = iter(range(1 << 30))
    return lambda _: wait if next(count) >= number else 0.0


@pytest.mark.parametrize("silent", [True, False], ids=["before the head", "in the body"])
def test_a_slow_piece_is_taken_from_whoever_has_it_first(load: Callable[..., NetworkLoader], silent: bool) -> None:
    with Mirror(slow=slow_from(40, HOLD), silent=silent) as first, Mirror() as second:
        loader = load(first, second)
        warm(loader)
        wanted = piece(1000, 200)
        result = loader.load(wanted)
        assert bytes(result.data) == right(wanted)
        assert result.duration < NEVER / 2
        assert (first.served, second.served) == (41, 1)
        assert loader.stats().hedges == 1
        assert loader.stats().completed == 41


def test_the_first_wins_where_it_is_first_after_all_and_the_second_is_cut(
    load: Callable[..., NetworkLoader],
) -> None:
    asked = threading.Event()

    def ask(_: Request) -> Act:
        asked.set()
        return HOLD

    with Mirror(slow=slow_from(40, asked)) as first, Mirror(slow=ask) as second:
        loader = load(first, second)
        warm(loader)
        wanted = piece(1000)
        result = loader.load(wanted)
        assert bytes(result.data) == right(wanted)
        assert second.served == 1
        second.await_closed()  # long before its timeout


def test_a_digest_proves_bytes_of_any_name(load: Callable[..., NetworkLoader]) -> None:
    with Mirror(slow=slow_from(40, HOLD)) as first, Mirror(etag='"elsewhere"') as second:
        loader = load(first, second)
        warm(loader)
        digest = hashlib.sha256(right(piece(1000))).hexdigest()
        assert bytes(loader.load(piece(1000, checksum=f"sha256:{digest}")).data) == right(piece(1000))
        assert second.served == 1


def telling(asked: threading.Event) -> Callable[[Request], float]:
    """Is not slow, and sets the event when it is asked."""
    return lambda _: asked.set() or 0.0  # type: ignore[func-returns-value]


def test_wrong_bytes_do_not_win(load: Callable[..., NetworkLoader]) -> None:
    asked = threading.Event()
    with Mirror(slow=slow_from(40, (asked, 0.3))) as first, Mirror(OTHER, slow=telling(asked)) as second:
        loader = load(first, second)
        warm(loader)
        digest = hashlib.sha256(right(piece(1000))).hexdigest()
        assert bytes(loader.load(piece(1000, checksum=f"sha256:{digest}")).data) == right(piece(1000))
        assert second.served == 1


@pytest.mark.parametrize("etag", ['"v2"', 'W/"v1"', None])
def test_what_is_not_proven_to_be_the_same_is_not_taken(load: Callable[..., NetworkLoader], etag: str | None) -> None:
    asked = threading.Event()

    class Honest(Mirror):
        def _reply(self, request: Request) -> Any:
            asked.set()
            return super()._reply(request)

    with Mirror(slow=slow_from(40, (asked, 0.3))) as first, Honest(OTHER, etag=etag) as second:
        loader = load(first, second)
        warm(loader)
        assert bytes(loader.load(piece(1000)).data) == right(piece(1000))
        assert second.served == 1  # asked for that very version, it had to own up


def test_who_has_another_version_is_not_asked_for_it_again_and_again(load: Callable[..., NetworkLoader]) -> None:
    asked = threading.Event()
    with Mirror(slow=slow_from(40, (asked, 0.3))) as first, Mirror(etag='"elsewhere"') as second:
        refused = second._reply
        second._answers = iter(lambda: lambda request: (asked.set(), refused(request))[1], None)
        loader = load(first, second)
        warm(loader)
        for number in range(1000, 1003):
            assert bytes(loader.load(piece(number)).data) == right(piece(number))
        assert second.served == 1


def test_wrong_bytes_of_the_first_do_not_cut_the_second(load: Callable[..., NetworkLoader]) -> None:
    asked = threading.Event()

    class Spoilt(Mirror):
        def _reply(self, request: Request) -> Any:
            self._data = DATA if self.served < 40 else OTHER
            return super()._reply(request)

    def slow(_: Request) -> float:
        asked.set()
        return 0.3

    with Spoilt(slow=slow_from(40, asked)) as first, Mirror(slow=slow) as second:
        loader = load(first, second)
        warm(loader)
        digest = hashlib.sha256(right(piece(1000))).hexdigest()
        assert bytes(loader.load(piece(1000, checksum=f"sha256:{digest}")).data) == right(piece(1000))
        assert (first.served, second.served) == (41, 1)


def test_what_nothing_is_known_of_is_asked_for_once(load: Callable[..., NetworkLoader]) -> None:
    with Mirror(etag=None, slow=slow_from(40, 0.3)) as first, Mirror(OTHER, etag=None) as second:
        loader = load(first, second)
        warm(loader)
        assert bytes(loader.load(piece(1000)).data) == right(piece(1000))
        assert second.served == 0


@pytest.mark.parametrize(("hedging", "mirrors", "hedges"), [(None, 1, 0), (True, 1, 1), (False, 2, 0)])
def test_a_lone_endpoint_is_asked_twice_only_on_request(
    load: Callable[..., NetworkLoader], hedging: bool | None, mirrors: int, hedges: int
) -> None:
    count, asked = iter(range(1 << 30)), threading.Event()

    def slow(_: Request) -> Wait:
        match next(count):
            case 40:
                return asked if hedges else 0.3
            case 41:
                asked.set()
        return 0.0

    with Mirror(slow=slow) as first, Mirror() as second:
        loader = load(*(first, second)[:mirrors], hedging=hedging)
        warm(loader)
        assert bytes(loader.load(piece(1000)).data) == right(piece(1000))
        assert loader.stats().hedges == hedges
        assert first.served == 41 + hedges


def test_a_slow_piece_of_a_long_fragment_comes_from_the_next_endpoint(load: Callable[..., NetworkLoader]) -> None:
    size = 1 << 14
    held_up = f"bytes={3 * size}-{4 * size - 1}"

    def slow(request: Request) -> Wait:
        return HOLD if request.headers["range"] == held_up else 0.0

    with Mirror(slow=slow, silent=False) as first, Mirror() as second:
        loader = load(first, second, chunk_size=size)
        warm(loader)
        result = loader.load(LoadRequest("all", "object"))
        assert bytes(result.data) == DATA
        assert held_up in [request.headers["range"] for request in second.requests]


def test_no_endpoint_is_asked_for_more_at_once_than_is_allowed(load: Callable[..., NetworkLoader]) -> None:
    count = iter(range(1 << 30))
    with Mirror(slow=lambda _: 0.3 if next(count) == 40 else 0.0) as alone:
        loader = load(alone, hedging=True, max_concurrent=1)
        warm(loader)
        assert bytes(loader.load(piece(1000)).data) == right(piece(1000))
        assert loader.stats().hedges == 0


@pytest.mark.parametrize("rests", [True, False])
def test_a_piece_whose_reader_rests_is_not_slow(
    load: Callable[..., NetworkLoader], monkeypatch: pytest.MonkeyPatch, rests: bool
) -> None:
    over = threading.Event()

    def rest(_: object) -> None:
        over.wait(1.0)

    with Mirror(slow=slow_from(40, 0.0 if rests else over)) as first, Mirror() as second:
        loader = load(first, second)
        warm(loader)
        usual(loader._fetcher._courier._hedging, 128, seconds=0.25)
        if rests:
            monkeypatch.setattr(loader.scheduler, "gives_way", lambda _: True)
            monkeypatch.setattr(loader.scheduler, "give_way", rest)
        result = loader.load(piece(1000))
        assert bytes(result.data) == right(piece(1000))
        assert result.duration >= 0.5
        assert second.served == loader.stats().hedges == (0 if rests else 1)
        over.set()


@pytest.mark.parametrize("is_headed", [False, True])
def test_rests_do_not_count(is_headed: bool) -> None:
    now = 10.0
    race = Race([], Ask("a"), 0, now, headed=now if is_headed else None)
    for length in (1.0, 3.0):
        now += 0.5
        with race.resting(lambda: now):  # noqa: B023
            before = race.seconds(now)
            now += length
            assert race.seconds(now) == before
    assert race.seconds(now) == 1.0
    # How long its head and its body took, each without the rests.
    assert (race.began, race.rested) == ((10.0, 4.0) if is_headed else (14.0, 0.0))


def test_closing_ends_both_at_once(load: Callable[..., NetworkLoader]) -> None:
    asked = threading.Event()

    def ask(_: Request) -> Act:
        asked.set()
        return HOLD

    with Mirror(slow=slow_from(40, HOLD)) as first, Mirror(slow=ask) as second:
        loader = load(first, second, timeout=60.0)
        warm(loader)
        future = loader.enqueue(piece(1000))
        assert asked.wait(NEVER)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < NEVER
        assert future.result(0).error is not None


def tails(load: Callable[..., NetworkLoader], count: int, *, seconds: float, hedging: bool) -> tuple[float, float]:
    """The 99th percentile of a load's time in seconds, and the requests for each, where 2 % of answers are slow."""
    draw, lock = random.Random(7), threading.Lock()

    def slow(_: Request) -> float:
        with lock:
            return seconds if draw.random() < 0.02 else 0.0

    with Mirror(slow=slow) as first, Mirror(slow=slow) as second:
        loader = load(first, second, hedging=hedging, monitor_bandwidth=False, max_concurrent=8)
        warm(loader, 100, saved=0.0)
        before = first.served + second.served
        requests = [piece(number, 300 + number % 5000) for number in range(count)]
        with ThreadPoolExecutor(4) as callers:
            results = list(callers.map(loader.load, requests))
        assert all(bytes(result.data) == right(wanted) for wanted, result in zip(requests, results, strict=True))
        took = sorted(result.duration for result in results)
        served = first.served + second.served - before
    return took[int(0.99 * count)], served / count


def test_a_share_of_the_slow_tail_is_cut_off(load: Callable[..., NetworkLoader]) -> None:
    hedged, requests = tails(load, 400, seconds=2.0, hedging=True)
    assert hedged <= 0.3 * 2.0
    assert requests <= 1.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hedging_cuts_the_slow_tail_off_for_a_twentieth_more_requests(load: Callable[..., NetworkLoader]) -> None:
    count = 4000
    plain, _ = tails(load, count, seconds=2.0, hedging=False)
    hedged, requests = tails(load, count, seconds=2.0, hedging=True)
    print(f"99th percentile: {plain:.3f} s plain, {hedged:.3f} s hedged, with {requests:.4f} requests for each")
    assert hedged <= 0.3 * plain
    assert requests <= 1.05


# -- and where one fails


def test_an_endpoint_that_recovers_is_used_again_while_the_other_is_well(
    load: Callable[..., NetworkLoader],
) -> None:
    state = {"is well": False}

    class Sick(Mirror):
        def _reply(self, request: Request) -> Any:
            self.served += 1
            return super()._reply(request) if state["is well"] else answer(b"", 500)

    with Sick() as first, Mirror() as second:
        loader = load(first, second, hedging=False)
        for number in range(50):
            assert bytes(loader.load(piece(number)).data) == right(piece(number))
        assert first.served < 25  # its circuit opened: not each load ran into it
        state["is well"] = True
        deadline, number = time.monotonic() + 40, 100
        while time.monotonic() < deadline:
            before, number = second.served, number + 1
            assert bytes(loader.load(piece(number)).data) == right(piece(number))
            if second.served == before:
                break
        before = second.served
        for number in range(1000, 1010):
            assert bytes(loader.load(piece(number)).data) == right(piece(number))
        assert second.served == before


@pytest.mark.parametrize("etags", [('"v1"', '"v2"'), (None, None), ('W/"v1"', 'W/"v1"')])
@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_two_versions_never_meet_whichever_endpoint_fails_when(
    load: Callable[..., NetworkLoader], etags: tuple[str | None, str | None], seed: int
) -> None:
    draw, lock = random.Random(seed), threading.Lock()

    class Moody(Mirror):
        def _reply(self, request: Request) -> Any:
            with lock:
                mood = draw.random()
            if mood < 0.15:
                return answer(b"", 500)
            script = super()._reply(request)
            return [script[: len(script) // 2], END] if mood < 0.3 and isinstance(script, bytes) else script

    with Moody(DATA, etag=etags[0]) as first, Moody(OTHER, etag=etags[1]) as second:
        loader = load(first, second, chunk_size=1 << 14, retry=RetryConfig(max_retries=1, initial_backoff=0.001))
        results = [loader.load(LoadRequest(str(n), "object", byte_range=RangeRequest(n, 99_000))) for n in range(12)]
    whole = [bytes(result.data) for result in results if result.is_success]
    assert whole
    assert all(
        got in (DATA[n:99_000], OTHER[n:99_000])
        for n, result in enumerate(results)
        if result.is_success
        for got in [bytes(result.data)]
    )
