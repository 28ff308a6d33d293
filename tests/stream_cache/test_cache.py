"""StreamCache: what is there is right, what is computed is computed once, and nobody spoils it for the next."""

from __future__ import annotations

import collections
import functools
import gc
import inspect
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from holotensor_net.errors import ConfigurationError, NotFound
from holotensor_net.storage.results import ResultStore
from holotensor_net.stream_cache import tiers
from holotensor_net.stream_cache.cache import StreamCache
from holotensor_net.stream_cache.frozen import freeze
from holotensor_net.stream_cache.keys import CacheKey
from holotensor_net.values import LoadFailure, LoadRequest, LoadResult, LoadSuccess

KEYS = [CacheKey.of(number) for number in range(100)]


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> StreamCache:
    """A cache with and without a disk; the promises are the same."""
    return StreamCache(100, disk=tmp_path / "results" if request.param == "disk" else False)


def double(state: Any, chunk: Any) -> Any:
    return chunk * 2


def shifted(state: Any, chunk: Any) -> Any:
    return chunk + state


class Counted:
    """A filter that counts its calls."""

    def __init__(self, function: Callable[[Any, Any], Any] = double) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, state: Any, chunk: Any) -> Any:
        self.calls += 1
        return self._function(state, chunk)


def together(count: int, work: Callable[[int], None]) -> None:
    """Let many threads begin at the same moment; what one raises is raised."""
    barrier, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# --- what the interface promises


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (StreamCache, "max_chunks"),
        (StreamCache.load_state, "self filter_id state_key state"),
        (StreamCache.get_state, "self filter_id"),
        (StreamCache.get_chunk, "self chunk_key"),
        (StreamCache.put_chunk, "self chunk_key value"),
        (StreamCache.run, "self filter_id function chunk"),
        (StreamCache.load_state_from, "self loader request filter_id decode"),
        (CacheKey.for_state, "config_hash training_data_hash"),
        (CacheKey.for_chunk, "config_hash state_hash chunk_hash"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_arguments_are_those_of_the_interface(method: Callable[..., Any], parameters: str) -> None:
    found = inspect.signature(method).parameters.values()
    assert [each.name for each in found if each.kind is not each.KEYWORD_ONLY] == parameters.split()


def test_what_was_put_is_got(cache: StreamCache) -> None:
    cache.put_chunk(KEYS[0], [1, "a"])
    assert cache.get_chunk(KEYS[0]) == [1, "a"]
    assert cache.get_chunk(CacheKey.of(0)) == [1, "a"]
    assert cache.get_chunk(KEYS[1]) is None


def test_hits_and_misses_are_counted(cache: StreamCache) -> None:
    assert (cache.hits, cache.misses, cache.hit_rate) == (0, 0, 0.0)
    cache.get_chunk(KEYS[0])
    assert (cache.hits, cache.misses, cache.hit_rate) == (0, 1, 0.0)
    cache.put_chunk(KEYS[0], 1)
    for _ in range(3):
        cache.get_chunk(KEYS[0])
    assert (cache.hits, cache.misses, cache.hit_rate) == (3, 1, 0.75)


def test_none_is_a_result_like_any_other(cache: StreamCache) -> None:
    cache.put_chunk(KEYS[0], None)
    assert cache.get_chunk(KEYS[0]) is None
    assert (cache.hits, cache.misses) == (1, 0)
    nothing = Counted(lambda state, chunk: None)
    assert [cache.run("f", nothing, 1, version=1) for _ in range(2)] == [None, None]
    assert nothing.calls == 1


def test_latest_value_of_a_key_counts(cache: StreamCache) -> None:
    for value in (1, "a", [2]):
        cache.put_chunk(KEYS[0], value)
        assert cache.get_chunk(KEYS[0]) == value
    assert cache.stats().chunks == 1


def test_states_are_kept_by_filter(cache: StreamCache) -> None:
    assert cache.get_state("f") is None
    cache.load_state("f", KEYS[0], {"mean": np.arange(3.0)})
    cache.load_state("g", KEYS[1], 5)
    assert cache.get_state("f")["mean"].tolist() == [0, 1, 2]
    assert cache.get_state("g") == 5
    cache.load_state("g", KEYS[2], 6)
    assert cache.get_state("g") == 6
    assert cache.stats().states == 2


def test_states_may_be_any_object(cache: StreamCache) -> None:
    model = Counted()
    cache.load_state("f", KEYS[0], model)
    assert cache.get_state("f") is model


def test_states_and_counts_survive_clear(cache: StreamCache) -> None:
    cache.load_state("f", KEYS[0], 1)
    cache.put_chunk(KEYS[0], 1)
    cache.get_chunk(KEYS[0])
    cache.clear()
    assert cache.get_chunk(KEYS[0]) is None
    assert cache.get_state("f") == 1
    assert (cache.hits, cache.misses, cache.stats().chunks) == (1, 1, 0)


def test_the_least_recently_used_goes_first() -> None:
    cache = StreamCache(3)
    for key in KEYS[:3]:
        cache.put_chunk(key, 1)
    cache.get_chunk(KEYS[0])
    cache.put_chunk(KEYS[1], 2)
    cache.put_chunk(KEYS[3], 1)
    assert [cache.get_chunk(key) for key in KEYS[:4]] == [1, 2, None, 1]
    assert cache.stats().evictions == 1


def test_bytes_are_limited_too() -> None:
    cache = StreamCache(100, max_bytes=1000)
    for key in KEYS[:3]:
        cache.put_chunk(key, bytes(400))
    assert [cache.get_chunk(key) is not None for key in KEYS[:3]] == [False, True, True]
    assert cache.stats().memory_size == 800
    cache.put_chunk(KEYS[3], bytes(1001))
    assert cache.get_chunk(KEYS[3]) is None
    cache.put_chunk(KEYS[2], bytes(1001))  # the old one must not stay
    assert cache.get_chunk(KEYS[2]) is None
    cache.put_chunk(KEYS[1], np.zeros(125))
    assert cache.get_chunk(KEYS[1]) is not None
    assert cache.stats().memory_size == 1000


@pytest.mark.parametrize("limits", [{"max_chunks": 0}, {"max_chunks": 5, "max_bytes": 0}])
def test_nothing_is_held_where_there_is_no_room(limits: dict[str, int]) -> None:
    cache = StreamCache(**limits)
    cache.put_chunk(KEYS[0], b"a")
    assert cache.get_chunk(KEYS[0]) is None
    assert cache.run("f", double, "a") == cache.run("f", double, "a") == "aa"


@pytest.mark.parametrize("name", ["max_chunks", "max_bytes", "max_disk_size"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "10"])
def test_limits_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"StreamCache\.{name} must be .* not {value!r}"):
        StreamCache(**{"max_chunks": 1, name: value})


def test_statistics_are_snapshots(cache: StreamCache) -> None:
    before = cache.stats()
    cache.get_chunk(KEYS[0])
    assert (before.misses, cache.stats().misses) == (0, 1)
    with pytest.raises(AttributeError):
        before.misses = 5  # type: ignore[misc]


def test_time_that_hits_save_is_told(tmp_path: Path) -> None:
    time_of_day = iter(range(0, 1000, 3))
    for disk in (False, tmp_path, tmp_path):
        cache = StreamCache(10, disk=disk, clock=lambda: float(next(time_of_day)))
        for _ in range(4):
            cache.run("f", double, 1)
        assert cache.stats().seconds_saved == 3.0 * cache.hits
    assert cache.hits == 4


# --- run


def test_a_chunk_is_computed_once(cache: StreamCache) -> None:
    counted = Counted()
    for _ in range(3):
        assert cache.run("f", counted, np.arange(3), version=1).tolist() == [0, 2, 4]
    assert (counted.calls, cache.hits, cache.misses) == (1, 2, 1)


def test_function_gets_the_state_of_its_filter(cache: StreamCache) -> None:
    cache.load_state("one", KEYS[1], 1)
    cache.load_state("two", KEYS[2], 2)
    assert [cache.run(name, shifted, 5) for name in ("one", "two")] == [6, 7]
    assert cache.run("three", lambda state, chunk: state, 5) is None


def test_new_state_means_new_results(cache: StreamCache) -> None:
    cache.load_state("f", KEYS[1], 1)
    assert cache.run("f", shifted, 5) == 6
    cache.load_state("f", KEYS[2], 2)
    assert cache.run("f", shifted, 5) == 7
    cache.load_state("f", KEYS[1], 1)
    assert cache.run("f", shifted, 5) == 6
    assert (cache.hits, cache.misses) == (1, 2)


def test_all_that_makes_a_result_is_in_its_key(cache: StreamCache) -> None:
    cache.load_state("f", KEYS[0], 1)
    variants: list[dict[str, Any]] = [
        {},
        {"filter_id": "g"},
        {"function": double},
        {"chunk": 6},
        {"config": 1},
        {"config": {"a": 1}},
        {"version": 1},
        {"version": "1"},
        {"chunk_key": KEYS[9]},
    ]
    base = {"filter_id": "f", "function": shifted, "chunk": 5}
    keys = [cache.key_of(**(base | variant)) for variant in variants]
    assert len(set(keys)) == len(keys)
    assert keys == [cache.key_of(**(base | variant)) for variant in variants]


def test_filters_that_do_the_same_share_results(cache: StreamCache) -> None:
    counted = Counted()
    for name in ("a", "b"):
        cache.load_state(name, KEYS[0], 1)
        cache.run(name, counted, 5, version=1)
    assert counted.calls == 1


def test_key_is_the_one_that_run_uses(cache: StreamCache) -> None:
    cache.load_state("f", KEYS[0], 1)
    result = cache.run("f", shifted, 5, config="a")
    assert cache.get_chunk(cache.key_of("f", shifted, 5, config="a")) == result == 6


def test_key_of_a_chunk_spares_its_reading(cache: StreamCache) -> None:
    class Unread:
        """Has no key of its own."""

    counted = Counted(lambda state, chunk: 1)
    for _ in range(2):
        assert cache.run("f", counted, Unread(), version=1, chunk_key=KEYS[3]) == 1
    assert cache.run("f", counted, 3, version=1) == 1  # whose key that is
    assert counted.calls == 1


def test_what_has_no_key_is_refused_before_it_is_computed(cache: StreamCache) -> None:
    counted = Counted()
    for arguments in ({"chunk": object()}, {"chunk": 1, "config": {"a": object()}}, {"chunk": 1, "version": object()}):
        with pytest.raises(TypeError, match="no key"):
            cache.run("f", counted, **{"version": 1, **arguments})
    with pytest.raises(TypeError, match="version="):
        cache.run("f", counted, 1)
    with pytest.raises(TypeError, match="version="):
        cache.run("f", functools.partial(double, 1), 1)
    assert (counted.calls, cache.misses) == (0, 0)


def test_result_that_cannot_be_kept_is_refused(cache: StreamCache) -> None:
    with pytest.raises(TypeError, match="generator cannot be kept"):
        cache.run("f", lambda state, chunk: (part for part in chunk), "ab")


def test_error_is_not_a_result(cache: StreamCache) -> None:
    counted = Counted(lambda state, chunk: 1 / chunk)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.run("f", counted, 0, version=1)
    assert (counted.calls, cache.hits, cache.misses, cache.stats().chunks) == (2, 0, 2, 0)


def test_error_keeps_nothing_alive(cache: StreamCache) -> None:
    class Chunk:
        pass

    def failing(state: Any, chunk: Any) -> Any:
        raise ValueError("no")

    def attempt() -> weakref.ref[Chunk]:
        chunk = Chunk()
        with pytest.raises(ValueError, match="no"):
            cache.run("f", failing, chunk, chunk_key=KEYS[0])
        return weakref.ref(chunk)

    gc.collect()
    gc.disable()
    try:
        assert attempt()() is None  # without a search for cycles
    finally:
        gc.enable()


def test_function_may_use_the_cache_itself(cache: StreamCache) -> None:
    def factorial(state: Any, chunk: int) -> int:
        return chunk * cache.run("f", factorial, chunk - 1) if chunk else 1

    assert cache.run("f", factorial, 10) == 3628800
    assert cache.run("f", factorial, 5) == 120
    assert (cache.hits, cache.misses) == (1, 11)


def test_function_may_ask_for_its_own_result(cache: StreamCache) -> None:
    depth = 0

    def curious(state: Any, chunk: Any) -> Any:
        nonlocal depth
        depth += 1
        return cache.run("f", curious, chunk) if depth < 3 else "in the end"

    assert cache.run("f", curious, 1) == "in the end"
    assert cache.run("f", curious, 1) == "in the end"
    assert depth == 3
    assert (cache.hits, cache.misses) == (1, 3)


# --- nobody spoils it for the next


@pytest.mark.parametrize("got_by", ["run", "run again", "get", "state", "state in run"])
def test_what_one_caller_writes_the_next_does_not_see(cache: StreamCache, got_by: str) -> None:
    value = {"array": np.arange(1000.0), "list": [1, [2]], "arrays": (np.zeros(3, "i4"),)}

    def make(state: Any, chunk: Any) -> Any:
        return value

    def get() -> Any:
        match got_by:
            case "get":
                return cache.get_chunk(KEYS[0])
            case "state":
                return cache.get_state("f")
            case "state in run":
                states: list[Any] = []
                cache.run("f", lambda state, chunk: states.append(state), random.random())
                return states[0]
            case _:
                return cache.run("f", make, 1)

    cache.load_state("f", KEYS[1], value)
    cache.put_chunk(KEYS[0], value)
    if got_by == "run again":
        get()
    spoilt = get()
    for array in (spoilt["array"], spoilt["arrays"][0], spoilt["array"][1:], spoilt["array"].view("u1")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    spoilt["list"][1].append(3)
    spoilt["list"].clear()
    del spoilt["array"]
    value["array"][:] = 9  # nor what the one who gave it does
    value["list"].append(4)
    fresh = get()
    assert fresh["array"].tolist() == list(range(1000))
    assert fresh["list"] == [1, [2]]


def test_chunk_given_back_may_be_written_to_afterwards(cache: StreamCache) -> None:
    chunk = np.arange(4.0)
    assert cache.run("f", lambda state, chunk: chunk, chunk).tolist() == [0, 1, 2, 3]
    chunk[0] = 9
    assert cache.run("f", lambda state, chunk: chunk, np.arange(4.0)).tolist() == [0, 1, 2, 3]


# --- many threads


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Is released once by every thread that waits for another's computation."""
    arrived = threading.Semaphore(0)
    outcome = tiers.Flight.outcome

    def announced(flight: tiers.Flight) -> tiers.Held | None:
        arrived.release()
        return outcome(flight)

    monkeypatch.setattr(tiers.Flight, "outcome", announced)
    return arrived


def await_all(arrived: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert arrived.acquire(timeout=30)


def test_one_computes_while_the_others_wait(cache: StreamCache, waiting: threading.Semaphore) -> None:
    def slow(state: Any, chunk: Any) -> Any:
        await_all(waiting, 63)
        return chunk * 2

    counted, results = Counted(slow), []
    together(64, lambda _: results.append(cache.run("f", counted, np.arange(1000), version=1)))
    assert counted.calls == 1
    assert len(results) == 64
    assert all(np.array_equal(result, np.arange(1000) * 2) for result in results)
    assert len({id(result) for result in results}) == 64
    assert (cache.hits, cache.misses) == (63, 1)


def test_one_computation_of_a_tenth_of_a_second_is_enough_for_64_threads(cache: StreamCache) -> None:
    def slow(state: Any, chunk: Any) -> Any:
        time.sleep(0.1)
        return chunk * 2

    counted = Counted(slow)
    together(64, lambda _: np.testing.assert_array_equal(cache.run("f", counted, np.arange(9), version=1)[1], 2))
    assert counted.calls == 1


def test_error_reaches_all_and_the_next_computes_again(cache: StreamCache, waiting: threading.Semaphore) -> None:
    def failing(state: Any, chunk: Any) -> Any:
        await_all(waiting, 63)
        raise ValueError("no luck")

    counted, errors = Counted(failing), []

    def work(_: int) -> None:
        with pytest.raises(ValueError, match="no luck") as caught:
            cache.run("f", counted, 1, version=1)
        errors.append(caught.value)

    together(64, work)
    assert counted.calls == 1
    assert len(errors) == 64
    assert (cache.hits, cache.misses) == (0, 64)  # all asked, and it was there for none
    assert cache.run("f", Counted(), 1, version=1) == 2


def test_interrupted_computation_is_taken_over(cache: StreamCache, waiting: threading.Semaphore) -> None:
    interrupted = threading.Event()

    def stopped_once(state: Any, chunk: Any) -> Any:
        if not interrupted.is_set():
            await_all(waiting, 7)
            interrupted.set()
            raise KeyboardInterrupt
        return chunk * 2

    counted, results = Counted(stopped_once), []

    def work(_: int) -> None:
        try:
            results.append(cache.run("f", counted, 1, version=1))
        except KeyboardInterrupt:
            results.append("interrupted")

    together(8, work)
    assert sorted(map(str, results)) == ["2"] * 7 + ["interrupted"]
    assert counted.calls == 2


def interrupted_at(step: int, ask: Callable[[], object]) -> bool:
    """Ask, and be interrupted where a function of the cache begins or a call in it ends: that is where signals come."""
    left = step

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event != "c_call" and Path(frame.f_code.co_filename).name in ("cache.py", "tiers.py"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        ask()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def test_interrupt_at_any_step_strands_nobody(cache: StreamCache) -> None:
    for step in itertools.count():
        if not interrupted_at(step, lambda step=step: cache.run("f", double, step)):  # type: ignore[misc]
            break
        results: list[Any] = []
        ask = functools.partial(lambda step, into: into.append(cache.run("f", double, step)), step, results)
        next_one = threading.Thread(target=ask, daemon=True)
        next_one.start()
        next_one.join(30)
        assert results == [2 * step]
    assert step > 15


def test_what_is_being_computed_is_not_kept_after_clear(cache: StreamCache) -> None:
    begun, cleared, results = threading.Event(), threading.Event(), []

    def slow(state: Any, chunk: Any) -> Any:
        begun.set()
        assert cleared.wait(30)
        return "old"

    asker = threading.Thread(target=lambda: results.append(cache.run("f", slow, 1, version=1)))
    asker.start()
    assert begun.wait(30)
    cache.clear()
    assert cache.run("f", lambda state, chunk: "new", 2, version=1, chunk_key=KEYS[1]) == "new"  # does not wait
    key = cache.key_of("f", slow, 1, version=1)
    cleared.set()
    asker.join(30)
    assert results == ["old"]
    assert cache.get_chunk(key) is None
    assert cache.run("f", slow, 1, version=1) == "old"
    assert cache.get_chunk(key) == "old"


def test_new_state_does_not_get_what_is_computed_with_the_old(cache: StreamCache) -> None:
    begun, loaded, results = threading.Event(), threading.Event(), []

    def slow(state: Any, chunk: Any) -> Any:
        begun.set()
        assert loaded.wait(30)
        return state

    cache.load_state("f", KEYS[0], "old")
    asker = threading.Thread(target=lambda: results.append(cache.run("f", slow, 1)))
    asker.start()
    assert begun.wait(30)
    cache.load_state("f", KEYS[1], "new")
    loaded.set()
    assert cache.run("f", slow, 1) == "new"
    asker.join(30)
    assert results == ["old"]
    assert cache.run("f", slow, 1) == "new"


def test_threads_with_different_chunks_do_not_wait_for_each_other(cache: StreamCache) -> None:
    meeting = threading.Barrier(8)

    def meet(state: Any, chunk: Any) -> Any:
        meeting.wait(30)
        return chunk

    together(8, lambda number: np.testing.assert_equal(cache.run("f", meet, number), number))


# --- compared with a dictionary and a list


class Model:
    """What StreamCache(max_chunks, max_bytes=…) is to do, without any thought of speed. Values are bytes."""

    def __init__(self, max_chunks: int, max_bytes: float) -> None:
        self.max_chunks, self.max_bytes = max_chunks, max_bytes
        self.held: dict[int, bytes] = {}
        self.order: list[int] = []  # the least recently used first
        self.hits = self.misses = 0

    def get(self, key: int) -> bytes | None:
        if key not in self.held:
            self.misses += 1
            return None
        self.hits += 1
        self.order.remove(key)
        self.order.append(key)
        return self.held[key]

    def put(self, key: int, value: bytes) -> None:
        if key in self.held:
            del self.held[key]
            self.order.remove(key)
        if len(value) > self.max_bytes:
            return
        self.held[key] = value
        self.order.append(key)
        while len(self.held) > self.max_chunks or sum(map(len, self.held.values())) > self.max_bytes:
            del self.held[self.order.pop(0)]

    def run(self, key: int, value: bytes) -> bytes:
        found = self.get(key)
        if found is None:
            self.put(key, value)
            return value
        return found


def as_in(cache: StreamCache, model: Model) -> None:
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (model.hits, model.misses)
    assert (stats.chunks, stats.memory_size) == (len(model.held), sum(map(len, model.held.values())))


chosen_keys = st.integers(0, 7)
chosen_values = st.binary(max_size=8)


class Machine(RuleBasedStateMachine):
    @initialize(max_chunks=st.integers(0, 6), max_bytes=st.none() | st.integers(0, 20))
    def begin(self, max_chunks: int, max_bytes: int | None) -> None:
        self.cache = StreamCache(max_chunks, max_bytes=max_bytes)
        self.model = Model(max_chunks, float("inf") if max_bytes is None else max_bytes)

    @rule(key=chosen_keys)
    def get(self, key: int) -> None:
        assert self.cache.get_chunk(KEYS[key]) == self.model.get(key)

    @rule(key=chosen_keys, value=chosen_values)
    def put(self, key: int, value: bytes) -> None:
        self.cache.put_chunk(KEYS[key], value)
        self.model.put(key, value)

    @rule(key=chosen_keys, value=chosen_values)
    def run(self, key: int, value: bytes) -> None:
        # The first value computed for the key stays, as long as there is room.
        assert self.cache.run("f", double, value, chunk_key=KEYS[key]) == self.model.run(1000 + key, value * 2)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.held.clear()
        self.model.order.clear()

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "cache"):
            as_in(self.cache, self.model)


TestAgainstAModel = Machine.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def compare_with_model(steps: int) -> None:
    source, cache, model = random.Random(8), StreamCache(20, max_bytes=300), Model(20, 300)
    for step in range(steps):
        key = min(source.randrange(40), source.randrange(40))
        match source.randrange(4):
            case 0:
                value = source.randbytes(source.choice((0, 5, 20, 40, 301)))
                cache.put_chunk(KEYS[key], value)
                model.put(key, value)
            case _:
                assert cache.get_chunk(KEYS[key]) == model.get(key)
        if step % 100 == 0:
            as_in(cache, model)
    as_in(cache, model)
    assert model.hits > steps / 10
    assert model.misses > steps / 10


def test_long_run_is_as_in_the_model() -> None:
    compare_with_model(20_000)


@pytest.mark.slow
def test_very_long_run_is_as_in_the_model() -> None:
    compare_with_model(100_000)


def assert_never_wrong_or_stale(cache: StreamCache, steps: int, *, sizes: tuple[int, ...]) -> None:
    """Eight threads, each of which writes to keys of its own, and reads those of all.

    A value says whose it is and how new. Its writer must get the latest or nothing; the others must never get one that
    is older than one they got, or one that was not yet written.
    """
    threads, keys = 8, 5
    written = [[0] * keys for _ in range(threads)]

    def value_of(owner: int, place: int, age: int) -> np.ndarray[Any, Any]:
        return np.full(sizes[(owner + place + age) % len(sizes)], (owner * keys + place) * 1_000_000 + age)

    def work(me: int) -> None:
        source = random.Random(me)
        seen = collections.Counter[tuple[int, int]]()
        for _ in range(steps):
            owner, place = source.choice((me, source.randrange(threads))), source.randrange(keys)
            key = KEYS[owner * keys + place]
            if owner == me and source.randrange(3) == 0:
                age = written[me][place] + 1
                value = value_of(me, place, age)
                written[me][place] = age
                cache.put_chunk(key, value)
                seen[me, place] = age
                continue
            if source.randrange(4) == 0:
                chunk = source.randrange(30)
                assert cache.run("f", double, chunk) == 2 * chunk
                continue
            got = cache.get_chunk(key)
            latest = written[owner][place]
            if got is None:
                continue
            age = int(got[0]) % 1_000_000
            assert np.array_equal(got, value_of(owner, place, age)), "a wrong value"
            assert seen[owner, place] <= age <= latest, "a stale value"
            seen[owner, place] = age

    together(threads, work)
    assert cache.hits > steps / 5
    assert cache.misses > 0


@pytest.mark.parametrize("limits", [{"max_chunks": 25}, {"max_chunks": 100, "max_bytes": 6000}])
def test_eight_threads_never_see_a_wrong_or_stale_value(limits: dict[str, int]) -> None:
    assert_never_wrong_or_stale(StreamCache(**limits), 3_000, sizes=(1, 20, 60))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("limits", [{"max_chunks": 25}, {"max_chunks": 100, "max_bytes": 6000}])
def test_eight_threads_never_see_a_wrong_or_stale_value_in_many_steps(limits: dict[str, int]) -> None:
    assert_never_wrong_or_stale(StreamCache(**limits), 100_000, sizes=(1, 20, 60))


def test_eight_threads_never_see_a_wrong_or_stale_value_from_the_disk(tmp_path: Path) -> None:
    cache = StreamCache(3, disk=tmp_path, max_disk_size=200_000)
    assert_never_wrong_or_stale(cache, 150, sizes=(1, 300, 900))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_threads_never_see_a_wrong_or_stale_value_from_the_disk_in_many_steps(tmp_path: Path) -> None:
    cache = StreamCache(3, disk=tmp_path, max_disk_size=200_000)
    assert_never_wrong_or_stale(cache, 5_000, sizes=(1, 300, 900))


# --- the disk


VALUES: dict[str, Any] = {
    "array": np.arange(1000.0).reshape(20, 50),
    "small array": np.arange(3, dtype="i2"),
    "bytes": b"ab" * 1000,
    "text": "ä",
    "nested": {"a": [1, (2, None)], "b": np.float32(1.5), "c": np.zeros((2, 2000))},
    "none": None,
}


@pytest.mark.parametrize("case", VALUES)
def test_the_next_run_computes_nothing(tmp_path: Path, case: str) -> None:
    counted = Counted(lambda state, chunk: VALUES[chunk])
    for _ in range(3):
        cache = StreamCache(10, disk=tmp_path)
        result = cache.run("f", counted, case, version=1)
        assert CacheKey.of(result) == CacheKey.of(VALUES[case])
        if isinstance(result, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                result[0] = 1
    assert counted.calls == 1
    assert (cache.hits, cache.misses) == (1, 0)


def test_what_leaves_the_memory_is_found_on_the_disk(tmp_path: Path) -> None:
    cache = StreamCache(2, disk=tmp_path)
    for number, key in enumerate(KEYS[:20]):
        cache.put_chunk(key, number)
    assert [cache.get_chunk(key) for key in KEYS[:20]] == list(range(20))
    assert (cache.hits, cache.misses, cache.stats().chunks) == (20, 0, 2)


def test_objects_stay_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = StreamCache(10, disk=tmp_path)
    for key in KEYS[:2]:
        cache.put_chunk(key, 1)
        cache.put_chunk(key, OrderedDict(a=1))
        assert cache.get_chunk(key) == OrderedDict(a=1)
    assert StreamCache(10, disk=tmp_path).get_chunk(KEYS[0]) is None  # and not what was there before
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pickle" in caplog.text


def test_disk_may_be_the_platforms_cache_folder(tmp_cache: Path) -> None:
    StreamCache(1, disk=True).put_chunk(KEYS[0], 1)
    assert StreamCache(1, disk=True).get_chunk(KEYS[0]) == 1
    assert StreamCache(1, disk=tmp_cache / "results").get_chunk(KEYS[0]) == 1
    assert StreamCache(1, disk=str(tmp_cache / "results")).get_chunk(KEYS[0]) == 1


def test_disk_size_is_limited(tmp_path: Path) -> None:
    cache = StreamCache(1, disk=tmp_path, max_disk_size=100_000)
    for key in KEYS:
        cache.put_chunk(key, key.digest * 100)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 100_000
    assert cache.get_chunk(KEYS[-1]) == KEYS[-1].digest * 100


def test_clear_forgets_what_is_on_the_disk(tmp_path: Path) -> None:
    cache = StreamCache(10, disk=tmp_path)
    cache.put_chunk(KEYS[0], b"a" * 5000)
    cache.clear()
    assert cache.get_chunk(KEYS[0]) is None
    assert StreamCache(10, disk=tmp_path).get_chunk(KEYS[0]) is None


def test_old_result_does_not_overtake_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread has read the old result from the disk, and not yet put it into memory, when another puts a new one."""
    StreamCache(1, disk=tmp_path).put_chunk(KEYS[0], "old")
    cache, has_read, go_on = StreamCache(1, disk=tmp_path), threading.Event(), threading.Event()
    get = tiers.DiskTier.get

    def halted(disk: tiers.DiskTier, key: CacheKey) -> tiers.Held | None:
        held = get(disk, key)
        has_read.set()
        assert go_on.wait(30)
        return held

    monkeypatch.setattr(tiers.DiskTier, "get", halted)
    reader = threading.Thread(target=cache.get_chunk, args=(KEYS[0],))
    writer = threading.Thread(target=cache.put_chunk, args=(KEYS[0], "new"))
    reader.start()
    assert has_read.wait(30)
    writer.start()
    writer.join(0.3)  # it has to wait for the reader; if it did not, it would be done by then
    go_on.set()
    reader.join()
    writer.join()
    assert cache.get_chunk(KEYS[0]) == "new"
    assert StreamCache(1, disk=tmp_path).get_chunk(KEYS[0]) == "new"


def test_what_came_into_memory_meanwhile_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StreamCache(1, disk=tmp_path)
    turn = tiers.DiskTier.turn

    def late(disk: tiers.DiskTier, key: CacheKey) -> threading.Lock:
        cache._memory.put(key.digest, tiers.Held(freeze("meanwhile")))
        return turn(disk, key)

    monkeypatch.setattr(tiers.DiskTier, "turn", late)
    assert cache.get_chunk(KEYS[0]) == "meanwhile"


def test_what_is_read_while_all_is_cleared_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StreamCache(1, disk=tmp_path)
    cache.put_chunk(KEYS[0], "old")
    clear = ResultStore.clear

    def clear_late(store: ResultStore) -> None:
        assert cache.get_chunk(KEYS[0]) == "old"  # from the disk, into memory
        clear(store)

    monkeypatch.setattr(ResultStore, "clear", clear_late)
    cache.clear()
    assert cache.get_chunk(KEYS[0]) is None


def test_time_may_come_in_whole_seconds(tmp_path: Path) -> None:
    for _ in range(2):
        cache = StreamCache(1, disk=tmp_path, clock=lambda: 5)
        assert cache.run("f", double, 1) == 2
    assert cache.hits == 1


def test_disk_that_fails_costs_nothing_but_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = StreamCache(10, disk=tmp_path / "file" / "results")
    counted = Counted()
    for _ in range(2):
        for chunk in range(5):
            assert cache.run("f", counted, chunk, version=1) == 2 * chunk
    assert counted.calls == 5
    assert len(caplog.records) == 1
    assert "results stay in memory" in caplog.text


@pytest.mark.parametrize("document", [5, {}, {"value": {"object": 1}, "seconds": 0.0}, {"value": 1, "seconds": "x"}])
def test_result_of_another_making_is_computed_again(
    tmp_path: Path, document: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ResultStore(tmp_path, 1 << 20).put(KEYS[0].hex, document)
    cache = StreamCache(10, disk=tmp_path)
    assert cache.get_chunk(KEYS[0]) is None
    cache.put_chunk(KEYS[0], 1)
    assert StreamCache(10, disk=tmp_path).get_chunk(KEYS[0]) == 1
    assert len(caplog.records) == 1


# --- processes


def run_script(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = StreamCache(1, disk="results")
    for number in range(2):  # one more than memory holds
        cache.put_chunk(CacheKey.of(number), number)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cache.get_chunk(CacheKey.of(0)) == 0


def test_child_of_a_fork_goes_on_whatever_its_parent_was_at(tmp_path: Path) -> None:
    """The parent forks while one thread holds every lock, and another is computing what the child then asks for."""
    printed = run_script(
        """
        import os, sys, threading
        import numpy as np
        from holotensor_net import CacheKey, StreamCache

        cache = StreamCache(10, disk=sys.argv[1])
        cache.load_state("f", CacheKey.of(1), 7)
        key, chunk = CacheKey.of("put"), np.zeros(1 << 20)
        cache.put_chunk(key, chunk)
        entered, leave = threading.Event(), threading.Event()

        def slow(state, chunk):
            entered.set()
            leave.wait()
            return state * chunk

        parent = os.getpid()
        worker = threading.Thread(target=cache.run, args=("f", slow, 6))
        worker.start()
        entered.wait()
        with cache._memory._lock, cache._disk.turn(key):
            child = os.fork()
            if child == 0:
                leave.set()
                assert cache.run("f", slow, 6) == 42
                assert (cache.get_chunk(key) == chunk).all()
                cache.put_chunk(key, chunk + 1)
                assert cache.run("f", lambda state, chunk: chunk.sum(), chunk) == 0
                assert (cache.hits, cache.misses) == (1, 2)
                os._exit(0)
            _, status = os.waitpid(child, 0)
        leave.set()
        worker.join()
        print(status, cache.run("f", slow, 6), cache.hits, cache.misses)
        """,
        tmp_path,
    )
    assert printed == "0 42 1 1\n"


WRITERS = """
import os, random, signal, sys
import numpy as np
from holotensor_net import CacheKey, StreamCache

KEYS = [CacheKey.of(number) for number in range(20)]

def value(key, age):
    kind = key % 4
    if kind == 0:
        return np.full((200, 30), key * 1_000_000 + age, ">i8" if age % 2 else "<i8")
    if kind == 1:
        return b"%d,%d." % (key, age) * 500
    if kind == 2:
        return {"key": key, "age": age, "arrays": [np.full(age % 700, key), np.full(3, age)], "text": "x" * age}
    return (key, age, 1.5)

def age_of(key, got):
    return {0: lambda: int(got[0, 0]) % 1_000_000, 1: lambda: int(got.split(b".")[0].split(b",")[1]),
            2: lambda: got["age"], 3: lambda: got[1]}[key % 4]()

def work(folder, seed, steps):
    source, cache, found = random.Random(seed), StreamCache(3, disk=folder, max_disk_size=1_500_000), 0
    while steps:
        steps -= 1
        key = source.randrange(20)
        if source.randrange(3) == 0:
            cache.put_chunk(KEYS[key], value(key, source.randrange(2000)))
            continue
        got = cache.get_chunk(KEYS[key])
        if got is not None:
            found += 1
            if CacheKey.of(got) != CacheKey.of(value(key, age_of(key, got))):
                return f"wrong value for {key}: {got!r}"
    return f"found {found}"

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    seed, steps = map(int, line.split())
    pid = os.fork()
    if pid == 0:
        try:
            said = work(sys.argv[1], seed, steps)
        except BaseException as error:
            said = f"wrong: {error!r}"
        os.write(1, said.replace("\\n", " ").encode()[:2000] + b"\\n")
        os._exit(0)
    os.write(1, b"began %d\\n" % pid)
"""


class Writers:
    """Four processes that put and get in one folder, and complain if they get what nobody put there."""

    def __init__(self, folder: Path) -> None:
        # They are born of one that has imported everything, and come to their work at once.
        arguments = [sys.executable, "-W", "error", "-c", WRITERS, str(folder)]
        self._parent = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._seeds = iter(range(10_000))
        self.running = [self._begin() for _ in range(4)]

    def kill(self, number: int) -> None:
        """Kill one in the middle of its work, and let another take its place."""
        os.kill(self.running[number], signal.SIGKILL)
        self.running[number] = self._begin()

    def check(self) -> int:
        """Let one more come to an end; gives the number of results that it found."""
        self._begin(200)
        return int(self._heard("found"))

    def close(self) -> None:
        for process in self.running:
            os.kill(process, signal.SIGKILL)
        self.running = []
        self._parent.communicate()

    def _begin(self, steps: int = -1) -> int:
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{next(self._seeds)} {steps}\n")
        self._parent.stdin.flush()
        return int(self._heard("began"))

    def _heard(self, word: str) -> str:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line.startswith(word), line
        return line.removeprefix(word)


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    running = Writers(tmp_path)
    yield running
    running.close()


def assert_survives(writers: Writers, folder: Path, kills: int) -> None:
    source = random.Random(5)
    for _ in range(kills):
        time.sleep(source.random() * 0.05)  # not for luck: death shall come at any moment
        writers.kill(source.randrange(4))
    assert writers.check() > 50
    writers.close()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20_000_000


def test_killed_processes_leave_no_wrong_value(writers: Writers, tmp_path: Path) -> None:
    assert_survives(writers, tmp_path, 30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_killed_processes_leave_no_wrong_value(writers: Writers, tmp_path: Path) -> None:
    assert_survives(writers, tmp_path, 200)


# --- states that were trained elsewhere


class Shelf:
    """A loader of what lies on a shelf."""

    def __init__(self, **data: bytes) -> None:
        self.data = data

    def load(self, request: LoadRequest) -> LoadResult:
        if request.path not in self.data:
            return LoadFailure(request.fragment_id, NotFound())
        return LoadSuccess(request.fragment_id, memoryview(self.data[request.path]))


STATE = LoadRequest("state", "state")


def test_state_is_loaded_decoded_and_keyed(cache: StreamCache) -> None:
    shelf, calls = Shelf(state=b"5"), []

    def decoded(data: memoryview) -> int:
        calls.append(1)
        return int(bytes(data))

    assert cache.load_state_from(shelf, STATE, "f", decoded) == 5
    assert cache.run("f", shifted, 1) == 6
    assert cache.load_state_from(shelf, STATE, "f", decoded) == 5
    assert len(calls) == 1  # it is there already
    shelf.data["state"] = b"7"
    assert cache.load_state_from(shelf, STATE, "f", decoded) == 7
    assert cache.run("f", shifted, 1) == 8


def test_state_is_bytes_if_nothing_decodes_it(cache: StreamCache) -> None:
    assert cache.load_state_from(Shelf(state=b"abc"), STATE, "f") == b"abc"


def test_decoder_is_part_of_the_key_of_a_state(cache: StreamCache) -> None:
    shelf = Shelf(state=b"5")
    for decode, version in ((int, None), (float, None), (lambda data: int(data) + 1, None), (Counted, 1), (Counted, 2)):
        cache.load_state_from(shelf, STATE, "f", decode, version=version)
        cache.run("f", lambda state, chunk: 0, 1)
    assert (cache.hits, cache.misses) == (0, 5)


def test_state_that_cannot_be_loaded_leaves_what_was_there(cache: StreamCache) -> None:
    cache.load_state("f", KEYS[0], 1)
    with pytest.raises(NotFound):
        cache.load_state_from(Shelf(), STATE, "f")
    with pytest.raises(ValueError, match="invalid literal"):
        cache.load_state_from(Shelf(state=b"x"), STATE, "f", lambda data: int(bytes(data)))
    assert cache.get_state("f") == 1
