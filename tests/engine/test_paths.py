"""What is known of a path outlives the loader that found it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path as FilePath

import pytest

from holotensor_net import CdnEndpoint, LoadRequest, NetworkConfig, NetworkLoader
from holotensor_net.engine.lanes import Lane
from holotensor_net.engine.pacing import ConcurrencyController, Interval
from holotensor_net.engine.paths import PATHS, Path, Paths, host_of
from holotensor_net.engine.priority import PriorityQueue
from holotensor_net.engine.scheduler import Scheduler
from holotensor_net.origin import Behaviour, Origin

MB = 1_000_000


def full(controller: ConcurrencyController, *, most: float, refuses_above: int = 1000, times: int = 200) -> None:
    """As many intervals on a path where each connection brings a megabyte a second, up to ``most`` together."""
    for _ in range(times):
        limit = controller.limit
        rate = min(most, limit) * MB
        refusals = max(0, limit - refuses_above)
        served = min(limit, refuses_above)
        controller.revise(
            Interval(0.25, int(rate * 0.25), float(limit), True, refusals, served=served if refusals else 0)
        )


def found(*, most: float = 10.0, ceiling: int = 64, refuses_above: int = 1000, times: int = 200) -> Path:
    controller = ConcurrencyController(ceiling)
    full(controller, most=most, refuses_above=refuses_above, times=times)
    return Path(controller, 1e6, 0.01)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://cdn.example.com/models", "https://cdn.example.com:https"),
        ("https://cdn.example.com:8443/models", "https://cdn.example.com:8443"),
        ("http://CDN.example.com", "http://cdn.example.com:http"),
        ("http://me:secret@cdn.example.com/a?b#c", "http://cdn.example.com:http"),
        ("http://[::1]:8080/", "http://::1:8080"),
    ],
)
def test_a_host_is_named_by_scheme_name_and_port_and_by_nothing_secret(url: str, host: str) -> None:
    assert host_of(url) == host


def test_what_was_kept_is_recalled_for_ten_minutes() -> None:
    paths = Paths()
    paths.keep("a", found(), 100.0)
    recalled = paths.recall("a", 64, 700.0)
    assert recalled is not None
    assert (recalled.each, recalled.round_trip) == (1e6, 0.01)
    assert paths.recall("a", 64, 700.1) is None
    assert paths.recall("b", 64, 100.0) is None


def test_the_oldest_of_many_hosts_is_forgotten() -> None:
    paths, path = Paths(), found(times=4)
    for number in range(257):
        paths.keep(f"host {number}", path, 100.0)
        paths.keep("host 1", path, 100.0)  # used again and again
    assert paths.recall("host 0", 64, 100.0) is None
    assert paths.recall("host 1", 64, 100.0) is not None
    assert paths.recall("host 256", 64, 100.0) is not None


def test_each_who_recalls_a_path_has_a_controller_of_its_own() -> None:
    paths = Paths()
    paths.keep("a", found(), 100.0)
    one, other = paths.recall("a", 64, 100.0), paths.recall("a", 64, 100.0)
    assert one is not None
    assert other is not None
    before = other.controller.limit
    full(one.controller, most=60)
    assert one.controller.limit > before
    assert other.controller.limit == before


def test_an_heir_begins_with_what_was_found_and_stays_there() -> None:
    controller = found(most=10).controller
    heir = controller.heir(64, after=1.0)
    assert 10 <= heir.limit <= 15
    limits = []
    for _ in range(7):
        limits.append(heir.limit)
        full(heir, most=10, times=1)
    assert limits == [limits[0]] * 7


def test_an_heir_takes_up_the_search_for_fewer_where_it_was_cut_short() -> None:
    controller = ConcurrencyController(64, initial=32)
    while controller.limit >= 32:
        full(controller, most=1, times=1)
    assert controller.limit == 16  # is being tried
    heir = controller.heir(64, after=1.0)
    limits = []
    for _ in range(30):
        limits.append(heir.limit)
        full(heir, most=1, times=1)
    assert max(limits) == limits[0] == 32
    assert limits[-1] <= 2


def test_what_comes_slowly_in_the_beginning_does_not_make_an_heir_climb() -> None:
    heir = found(most=10).controller.heir(64, after=1.0)
    before = heir.limit
    for _ in range(2):
        heir.revise(Interval(0.25, 1_000_000, float(before), True))
    full(heir, most=10, times=4)
    assert heir.limit == before


def test_an_heir_on_a_path_that_is_another_finds_it_out() -> None:
    heir = found(most=10).controller.heir(64, after=1.0)
    full(heir, most=60, times=60)
    assert heir.limit >= 48


def test_a_climb_that_had_not_ended_goes_on() -> None:
    controller = found(most=1000, times=3).controller
    assert controller.limit == 16
    heir = controller.heir(64, after=1.0)
    assert heir.limit == 8  # sixteen had not been seen to pay
    full(heir, most=1000, times=8)
    assert heir.limit == 64


def test_an_heir_keeps_to_its_own_ceiling() -> None:
    controller = found(most=1000, ceiling=16).controller
    assert controller.heir(4, after=0.0).limit == 4
    wider = controller.heir(64, after=0.0)
    assert wider.limit == 16
    full(wider, most=1000, times=4)
    assert wider.limit == 64


def test_an_heir_does_not_ask_at_once_for_what_was_refused() -> None:
    controller = found(most=1000, refuses_above=6, times=20).controller
    assert controller.limit == 6
    heir, later = controller.heir(64, after=1.0), controller.heir(64, after=600.0)
    full(heir, most=1000, times=20)
    assert heir.limit == 6
    full(later, most=1000, times=20)
    assert later.limit == 64


def test_a_controller_that_has_learnt_nothing_has_nothing_to_tell() -> None:
    assert not ConcurrencyController(64).has_learnt
    assert found(times=4).controller.has_learnt


def test_a_fork_begins_with_none() -> None:
    paths = Paths()
    paths.keep("a", found(times=4), 100.0)
    paths._process = os.getpid() + 1
    paths._lock.acquire()  # by a thread that there is not
    assert paths.recall("a", 64, 100.0) is None


def lane(now: float, host: str | None = "host", *, is_adaptive: bool = True) -> Lane:
    return Lane(PriorityQueue(), 64, is_adaptive=is_adaptive, now=now, host=host)


def test_a_lane_tells_and_is_told() -> None:
    first = lane(100.0)
    full(first.controller, most=10)
    first.keep(101.0)
    second = lane(102.0)
    assert second.limit == first.controller.heir(64, after=0.0).limit != lane(102.0, "another").limit
    assert second.delay(102.0) == 0.0
    for number in range(second.limit):  # as many as are known to be answered, at once
        assert second.delay(102.0) == 0.0
        second.begin(number, 102.0)
    assert second.delay(102.0) is None


@pytest.mark.parametrize(("host", "is_adaptive"), [(None, True), ("host", False)])
def test_a_lane_without_a_host_or_a_controller_tells_nobody(host: str | None, is_adaptive: bool) -> None:
    first = lane(100.0, host, is_adaptive=is_adaptive)
    full(first.controller, most=10)
    first.keep(101.0)
    assert PATHS.recall("host", 64, 101.0) is None


def test_a_scheduler_that_closes_tells_what_it_found_once() -> None:
    config = NetworkConfig(endpoints=("https://cdn.example.com/a",))
    first = Scheduler(config, clock=lambda: 100.0)
    full(first.lanes[0].controller, most=10)
    first.close()
    second = Scheduler(NetworkConfig(endpoints=("https://cdn.example.com/b",)), clock=lambda: 101.0)
    assert second.limit == first.lanes[0].controller.heir(64, after=0.0).limit != 4
    PATHS.forget()
    first.close()
    assert Scheduler(config, clock=lambda: 102.0).limit == 4


def test_a_second_loader_asks_for_no_more_than_the_first_was_served(
    origin: Callable[..., Origin], tmp_path: FilePath
) -> None:
    size = 2 << 20
    (tmp_path / "object").write_bytes(bytes(size))
    kind = Behaviour(rate_per_connection=2_000_000, max_connections=2, refusal=429, retry_after=0)
    server = origin(behaviour=kind)
    limits = []
    for _ in range(2):
        end = CdnEndpoint(server.url)
        with NetworkLoader(NetworkConfig(endpoints=(end,), cache_dir=False, chunk_size=64 * 1024)) as loader:
            limits.append(loader.stats().limit)
            assert loader.load(LoadRequest("id", "object", expected_size=size)).is_success
    assert limits[0] == 4
    assert limits[1] <= 3
