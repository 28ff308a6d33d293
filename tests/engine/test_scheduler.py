"""Which piece is next, when, and with how many connections: with a clock that the tests turn."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from holotensor_net.config import CdnEndpoint, NetworkConfig, SchedulerConfig
from holotensor_net.engine.pacing import ConcurrencyController, Interval
from holotensor_net.engine.priority import PrioritizedFragment
from holotensor_net.engine.rations import Sender
from holotensor_net.engine.scheduler import Piece, Scheduler
from holotensor_net.errors import ConfigurationError, Timeout
from holotensor_net.values import LoadRequest, Priority, RangeRequest, Validator

CHUNK = 4096
PINNED = Validator('"v1"', None, True)
WEAK = Validator('W/"v1"', None, False)
CHECKSUM = "sha256:" + "0" * 64


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scheduler(clock: Callable[[], float] | None = None, **settings: Any) -> Scheduler:
    fixed = {"chunk_size": CHUNK, "max_concurrent": 100, "monitor_bandwidth": False}
    return Scheduler(SchedulerConfig(**(fixed | settings)), clock=clock or Clock())


def part_of(path: str, start: int, stop: int, **fields: Any) -> LoadRequest:
    return LoadRequest(fields.pop("name", f"{path}:{start}"), path, byte_range=RangeRequest(start, stop), **fields)


def drain(queue: Scheduler) -> list[Piece]:
    """Everything that can be had now."""
    return list(iter(lambda: queue.next(timeout=0), None))


def ranges(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    return [(piece.byte_range.start, piece.byte_range.stop) for piece in pieces]


@contextmanager
def thread(work: Callable[[], object]) -> Iterator[Callable[[], Any]]:
    """``work`` on a thread of its own; gives a function that waits for its result."""
    results: list[object] = []
    running = threading.Thread(target=lambda: results.append(work()))
    running.start()

    def result() -> object:
        running.join(5)
        assert results, "it is still waiting"
        return results[0]

    yield result
    running.join(5)
    assert not running.is_alive()


def wait_until_waiting(condition: threading.Condition, count: int = 1) -> None:
    """Return once ``count`` threads wait on the condition."""
    tick = threading.Event()
    for _ in range(1000):
        with condition:
            if len(condition._waiters) >= count:  # type: ignore[attr-defined]
                return
        tick.wait(0.005)
    raise AssertionError("nobody waits")


# --- cutting


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 10 * CHUNK + 7])
@pytest.mark.parametrize("fields", [{"validator": PINNED}, {"checksum": CHECKSUM}], ids=["pinned", "checksum"])
def test_a_fragment_whose_version_is_known_is_handed_out_at_once(size: int, fields: dict[str, Any]) -> None:
    queue = scheduler()
    queue.enqueue(part_of("a", 100, 100 + size, **fields))
    pieces = drain(queue)
    assert len(pieces) == -(-size // CHUNK)
    assert [start for start, _ in ranges(pieces)] == [100, *(stop for _, stop in ranges(pieces)[:-1])]
    assert ranges(pieces)[-1][1] == 100 + size
    assert all(piece.byte_range.length <= CHUNK for piece in pieces)


@pytest.mark.parametrize(
    "fields",
    [{}, {"validator": WEAK}, {"validator": PINNED, "allow_short": True}, {"checksum": CHECKSUM, "allow_short": True}],
    ids=["nothing", "weak", "pinned but short", "checksum but short"],
)
def test_without_a_known_version_the_first_piece_goes_alone(fields: dict[str, Any]) -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 100, 100 + 3 * CHUNK, **fields))
    (piece,) = drain(queue)
    assert ranges([piece]) == [(100, 100 + CHUNK)]
    assert piece.parts[0].plan.stop == 100 + CHUNK
    queue.extend(fragment, [RangeRequest(100 + CHUNK, 100 + 3 * CHUNK)], whole=False)
    assert ranges(drain(queue)) == [(100 + CHUNK, 100 + 2 * CHUNK), (100 + 2 * CHUNK, 100 + 3 * CHUNK)]


@pytest.mark.parametrize(
    ("expected_size", "fields", "handed_out"),
    [
        (None, {}, [(0, CHUNK)]),
        (None, {"checksum": CHECKSUM}, [(0, CHUNK)]),
        (0, {}, [(0, 1)]),  # nothing cannot be asked for
        (0, {"checksum": CHECKSUM}, [(0, 1)]),
        (10, {}, [(0, 10)]),
        (2 * CHUNK, {}, [(0, CHUNK)]),
        (2 * CHUNK, {"validator": PINNED}, [(0, CHUNK), (CHUNK, 2 * CHUNK)]),
    ],
)
def test_a_whole_object_is_opened_with_what_is_known_of_it(
    expected_size: int | None, fields: dict[str, Any], handed_out: list[tuple[int, int]]
) -> None:
    queue = scheduler()
    queue.enqueue(LoadRequest("a", "a", expected_size=expected_size, **fields))
    assert ranges(drain(queue)) == handed_out


@pytest.mark.parametrize(
    ("request_", "handed_out"),
    [
        (part_of("a", 5, 5 + 3 * CHUNK, checksum=CHECKSUM), (5, 5 + 3 * CHUNK)),
        (part_of("a", 5, 9), (5, 9)),
        (LoadRequest("a", "a", expected_size=3 * CHUNK), (0, 3 * CHUNK)),
        (LoadRequest("a", "a"), (0, CHUNK)),
    ],
)
def test_what_has_to_come_whole_is_not_cut(request_: LoadRequest, handed_out: tuple[int, int]) -> None:
    queue = scheduler()
    queue.push(PrioritizedFragment(request_), whole=True)
    queue.push(PrioritizedFragment(request_), whole=True)
    assert ranges(drain(queue)) == [handed_out, handed_out]


def test_an_empty_range_is_a_piece_too() -> None:
    queue = scheduler()
    queue.enqueue(part_of("a", 7, 7, checksum=CHECKSUM))
    assert ranges(drain(queue)) == [(7, 7)]


# --- order


def test_critical_overtakes_queued_bulk_between_two_pieces() -> None:
    queue = scheduler()
    queue.enqueue(part_of("bulk", 0, 4 * CHUNK, validator=PINNED))
    first = queue.next()
    assert first is not None
    queue.enqueue(part_of("urgent", 0, CHUNK, priority=Priority.CRITICAL))
    assert [piece.request.path for piece in drain(queue)] == ["urgent", "bulk", "bulk", "bulk"]
    assert first.priority is Priority.NORMAL


@given(st.lists(st.tuples(st.sampled_from(Priority), st.floats(0, 1)), max_size=30))
def test_the_most_urgent_goes_first(levels: list[tuple[Priority, float]]) -> None:
    queue = scheduler()
    queue.enqueue_many(
        LoadRequest(str(number), str(number), priority=level, importance=importance)
        for number, (level, importance) in enumerate(levels)
    )
    assert queue.queue_len == len(levels)
    scores = [piece.fragment.effective_priority for piece in drain(queue)]
    assert scores == sorted(scores)
    assert len(scores) == len(levels)


def test_moved_fragments_go_in_their_new_order() -> None:
    queue = scheduler()
    queue.enqueue_many(LoadRequest(name, name) for name in "abc")
    assert queue.update_priority("c", Priority.CRITICAL) is True
    assert queue.update_priority("a", Priority.IDLE) is True
    assert [piece.fragment_id for piece in drain(queue)] == ["c", "b", "a"]


def test_what_is_not_there_cannot_be_moved() -> None:
    queue = scheduler()
    fragment = queue.enqueue(LoadRequest("a", "a"))
    assert queue.update_priority("b", Priority.CRITICAL) is False
    queue.settle(fragment, success=True)
    assert queue.update_priority("a", Priority.CRITICAL) is False


def test_one_whose_pieces_are_all_handed_out_can_still_be_moved() -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 0, 2 * CHUNK))
    drain(queue)
    assert queue.update_priority("a:0", Priority.CRITICAL) is True
    queue.enqueue(LoadRequest("b", "b", priority=Priority.HIGH))
    queue.extend(fragment, [RangeRequest(CHUNK, 2 * CHUNK)])
    assert [piece.fragment_id for piece in drain(queue)] == ["a:0", "b"]
    assert fragment.priority is Priority.CRITICAL


@pytest.mark.parametrize("priority", [5, -1, "HIGH", None])
def test_only_levels_are_levels(priority: Any) -> None:
    queue = scheduler()
    fragment = queue.enqueue(LoadRequest("a", "a"))
    with pytest.raises(ConfigurationError, match="must be a Priority"):
        queue.update_priority("a", priority)
    with pytest.raises(ConfigurationError, match="must be a Priority"):
        queue.move(fragment, priority)
    assert fragment.priority is Priority.NORMAL


def test_exactly_one_of_those_with_the_same_id_can_be_moved() -> None:
    queue = scheduler()
    first, second = queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("a", "b")])
    queue.move(second, Priority.HIGH)
    queue.move(first, Priority.NORMAL)  # where it is: it keeps its place
    assert [piece.request.path for piece in drain(queue)] == ["b", "a"]
    queue.move(second, Priority.LOW)  # handed out
    assert (first.priority, second.priority) == (Priority.NORMAL, Priority.LOW)


def test_what_is_queued_still_takes_further_ranges() -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 0, 2 * CHUNK, validator=PINNED))
    first = queue.next()
    assert first is not None
    queue.extend(fragment, [first.byte_range])
    assert queue.queue_len == 1
    assert ranges(drain(queue)) == [(CHUNK, 2 * CHUNK), (0, CHUNK)]


def test_what_was_begun_is_ended_before_its_equals_begin() -> None:
    queue = scheduler()
    first, _, _ = queue.enqueue_many(part_of(name, 0, 3 * CHUNK) for name in "abc")
    assert queue.next() is not None
    queue.extend(first, [RangeRequest(CHUNK, 3 * CHUNK)], whole=False)
    assert [piece.request.path for piece in drain(queue)] == ["a", "a", "b", "c"]


# --- joining


def test_short_neighbours_are_brought_along() -> None:
    queue = scheduler()
    queue.enqueue_many(part_of("a", start, start + 100) for start in (300, 100, 200, 0))
    (piece,) = drain(queue)
    assert ranges([piece]) == [(0, 400)]
    assert [part.byte_range.start for part in piece.parts] == [0, 100, 200, 300]
    assert queue.queue_len == 0


def test_a_request_is_known_by_its_first_part() -> None:
    queue = scheduler()
    queue.enqueue_many([part_of("a", 100, 200, name="second"), part_of("a", 0, 100, name="first")])
    piece = queue.next()
    assert piece is not None
    assert (piece.fragment_id, piece.request.fragment_id, piece.fragment.fragment_id) == ("first", "first", "first")


LONE: list[tuple[str, LoadRequest]] = [
    ("another object", part_of("b", 100, 200)),
    ("another version", part_of("a", 100, 200, validator=PINNED)),
    ("another level", part_of("a", 100, 200, priority=Priority.LOW)),
    ("the same bytes", part_of("a", 0, 100, name="twin")),
    ("overlapping", part_of("a", 50, 150)),
    ("long", part_of("a", 100, 100 + CHUNK // 4 + 1)),
    ("perhaps shorter", part_of("a", 100, 200, allow_short=True)),
    ("beyond a gap", part_of("a", 101, 200)),
    ("whole", LoadRequest("a", "a")),
]


@pytest.mark.parametrize("other", [other for _, other in LONE], ids=[name for name, _ in LONE])
def test_what_does_not_belong_together_goes_alone(other: LoadRequest) -> None:
    queue = scheduler()
    queue.enqueue_many([part_of("a", 0, 100), other])
    assert [len(piece.parts) for piece in drain(queue)] == [1, 1]


def test_what_was_asked_for_alone_goes_alone() -> None:
    queue = scheduler()
    queue.enqueue(part_of("a", 0, 100), alone=True)
    queue.enqueue(part_of("a", 100, 200))
    assert [len(piece.parts) for piece in drain(queue)] == [1, 1]


def test_a_gap_is_read_where_that_is_cheaper_than_a_request() -> None:
    queue = scheduler()
    queue.monitor.record(50_000, 1.0)  # 1000 bytes in a round trip of 20 ms
    queue.enqueue_many(part_of("a", start, start + 100) for start in (0, 1100, 2201))
    assert ranges(drain(queue)) == [(0, 1200), (2201, 2301)]


def test_thousands_of_neighbours_that_cannot_be_joined_hold_nobody_up() -> None:
    queue = scheduler(chunk_size=1 << 22, max_concurrent=8000)
    queue.enqueue_many(part_of("a", start, start + 50) for start in range(0, 800_000, 100))
    began = time.monotonic()
    assert len(drain(queue)) == 8000
    assert time.monotonic() - began < 5  # looking at all of them each time would take half a minute


def test_neighbours_that_were_taken_or_done_with_are_not_brought_again() -> None:
    queue = scheduler()
    first, second, _ = queue.enqueue_many(part_of("a", start, start + 100) for start in (0, 100, 200))
    queue.settle(second, success=False)
    assert ranges(drain(queue)) == [(0, 100), (200, 300)]
    queue.extend(first, [RangeRequest(0, 100)])
    queue.enqueue(part_of("a", 100, 200))
    assert [len(piece.parts) for piece in drain(queue)] == [1, 1]  # one that was begun goes on alone
    assert len(queue._shorts) == 0


@given(
    st.lists(st.tuples(st.integers(0, 8000), st.integers(1, CHUNK // 4), st.sampled_from(list(Priority)[:2]))),
    st.integers(0, 200_000),
)
def test_whatever_is_joined_is_short_disjoint_and_complete(wanted: list[tuple[int, int, Priority]], rate: int) -> None:
    queue = scheduler()
    queue.monitor.record(rate, 1.0)
    fragments = queue.enqueue_many(
        part_of("a", start, start + length, priority=level) for start, length, level in wanted
    )
    pieces = drain(queue)
    taken = [part for piece in pieces for part in piece.parts]
    assert len(taken) == len({id(part.fragment) for part in taken}) == len(fragments)
    for piece in pieces:
        bounds = [(part.byte_range.start, part.byte_range.stop) for part in piece.parts]
        assert (bounds[0][0], bounds[-1][1]) == ranges([piece])[0]
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(bounds))
        assert len({part.fragment.priority for part in piece.parts}) == 1
        assert piece.byte_range.length <= CHUNK
        assert all(part.byte_range == part.fragment.request.byte_range for part in piece.parts)
        assert all(not part.is_stale for part in piece.parts)


# --- limits


def test_no_more_pieces_than_connections() -> None:
    queue = scheduler(max_concurrent=2)
    queue.enqueue_many(LoadRequest(name, name) for name in "abc")
    pieces = drain(queue)
    assert (len(pieces), queue.active, queue.limit, queue.queue_len) == (2, 2, 2, 1)
    queue.release(pieces[0])
    assert [piece.fragment_id for piece in drain(queue)] == ["c"]


def test_nothing_queued_is_told_at_once() -> None:
    assert scheduler().next() is None


def test_a_piece_is_waited_for_only_so_long() -> None:
    queue = scheduler(max_concurrent=1)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert queue.next() is not None
    assert queue.next(timeout=0.0) is None
    assert queue.next(timeout=-1.0) is None


def test_whoever_waits_for_a_connection_gets_the_next_one() -> None:
    queue = scheduler(max_concurrent=1)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    first = queue.next()
    assert first is not None
    with thread(queue.next) as result:
        wait_until_waiting(queue._changed)
        queue.release(first)
        assert result().fragment_id == "b"


def test_a_connection_comes_to_who_waits_for_it_and_not_to_who_waits_for_room() -> None:
    queue = scheduler(max_concurrent=1, queue_limit=2)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    first = queue.next()
    assert first is not None
    queue.enqueue(LoadRequest("c", "c"))
    with thread(lambda: queue.enqueue(LoadRequest("d", "d"))) as queued:
        wait_until_waiting(queue._room)
        with thread(queue.next) as taken:
            wait_until_waiting(queue._changed)
            queue.release(first)
            assert taken().fragment_id == "b"
        assert queued().fragment_id == "d"


def test_whoever_waits_leaves_when_the_last_work_is_gone() -> None:
    queue = scheduler(max_concurrent=1)
    a, b = queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert queue.next() is not None
    with thread(queue.next) as result:
        wait_until_waiting(queue._changed)
        queue.settle(b, success=False)
        assert result() is None
    queue.settle(a, success=True)


@pytest.mark.parametrize("end", [Scheduler.clear, Scheduler.close])
def test_whoever_waits_leaves_when_everything_is_forgotten(end: Callable[[Scheduler], None]) -> None:
    queue = scheduler(max_concurrent=1)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert queue.next() is not None
    with thread(queue.next) as result:
        wait_until_waiting(queue._changed)
        end(queue)
        assert result() is None


def test_a_full_queue_makes_the_caller_wait_and_says_so_in_the_end() -> None:
    queue = scheduler(queue_limit=1)
    queue.enqueue(LoadRequest("a", "a"))
    with pytest.raises(Timeout, match="holds 1 fragments"):
        queue.enqueue(LoadRequest("b", "b"), timeout=0)
    assert queue.queue_len == 1


ROOM: dict[str, Callable[[Scheduler, PrioritizedFragment], object]] = {
    "one is taken": lambda queue, fragment: queue.next(),
    "one is done with": lambda queue, fragment: queue.settle(fragment, success=False),
    "all is forgotten": lambda queue, fragment: queue.clear(),
}


@pytest.mark.parametrize("make", ROOM.values(), ids=ROOM)
def test_a_full_queue_takes_more_as_soon_as(make: Callable[[Scheduler, PrioritizedFragment], object]) -> None:
    queue = scheduler(queue_limit=1)
    fragment = queue.enqueue(LoadRequest("a", "a"))
    with thread(lambda: queue.enqueue(LoadRequest("b", "b"))) as result:
        wait_until_waiting(queue._room)
        make(queue, fragment)
        assert result().fragment_id == "b"
    assert [piece.fragment_id for piece in drain(queue)] == ["b"]


def test_a_full_queue_that_closes_lets_go_of_who_waits() -> None:
    queue = scheduler(queue_limit=1)
    queue.enqueue(LoadRequest("a", "a"))
    with thread(lambda: queue.enqueue(LoadRequest("b", "b"))) as result:
        wait_until_waiting(queue._room)
        queue.close()
        result()
    assert (queue.queue_len, queue.next()) == (0, None)


def test_of_many_those_without_room_are_given_back_at_once() -> None:
    queue = scheduler(queue_limit=2)
    entries = [(PrioritizedFragment(LoadRequest(name, name)), False, False) for name in "abc"]
    assert queue.push_all(entries) == entries[2:]
    queue.settle_all([(entries[2][0], False), (entries[0][0], True)])
    assert (queue.queue_len, queue.completed, queue.failed) == (1, 1, 1)
    assert queue.push_all(entries[2:]) == ()  # nobody wants it any more
    assert [piece.fragment_id for piece in drain(queue)] == ["b"]


def test_whoever_was_given_up_while_the_queue_was_full_waits_no_longer() -> None:
    queue = scheduler(queue_limit=1)
    queue.enqueue(LoadRequest("a", "a"))
    late = PrioritizedFragment(LoadRequest("b", "b"))
    with thread(lambda: queue.push(late)) as result:
        wait_until_waiting(queue._room)
        queue.settle(late, success=False)
        result()
    assert [piece.fragment_id for piece in drain(queue)] == ["a"]


def test_what_was_begun_goes_on_however_full_the_queue_is() -> None:
    queue = scheduler(queue_limit=1)
    first = queue.enqueue(part_of("a", 0, 2 * CHUNK))
    drain(queue)
    queue.enqueue(LoadRequest("b", "b"))
    queue.extend(first, [RangeRequest(CHUNK, 2 * CHUNK)])
    assert queue.queue_len == 2
    queue.restart(first)
    assert queue.queue_len == 2
    assert {piece.fragment_id for piece in drain(queue)} == {"a:0", "b"}


# --- changes of mind


def test_what_is_begun_anew_makes_its_old_pieces_stale() -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 0, 3 * CHUNK, validator=PINNED))
    old = queue.next()
    assert old is not None
    queue.restart(fragment)
    assert old.parts[0].is_stale
    new = drain(queue)
    assert ranges(new) == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 3 * CHUNK)]
    assert not any(piece.parts[0].is_stale for piece in new)


def test_what_is_begun_anew_may_have_to_come_whole() -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 0, 3 * CHUNK, validator=PINNED))
    drain(queue)
    queue.restart(fragment, whole=True)
    assert ranges(drain(queue)) == [(0, 3 * CHUNK)]


LATE: dict[str, Callable[[Scheduler, PrioritizedFragment], None]] = {
    "push": lambda queue, fragment: queue.push(fragment),
    "extend": lambda queue, fragment: queue.extend(fragment, [RangeRequest(0, 5)]),
    "restart": lambda queue, fragment: queue.restart(fragment),
}


@pytest.mark.parametrize("come_late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("is_closed", [False, True], ids=["settled", "closed"])
def test_what_comes_too_late_is_ignored(
    come_late: Callable[[Scheduler, PrioritizedFragment], None], is_closed: bool
) -> None:
    queue = scheduler()
    fragment = PrioritizedFragment(LoadRequest("a", "a"))
    if is_closed:
        queue.close()
    else:
        queue.settle(fragment, success=True)
    come_late(queue, fragment)
    assert (queue.queue_len, queue.next()) == (0, None)


def test_what_is_done_with_makes_its_pieces_stale() -> None:
    queue = scheduler()
    fragment = queue.enqueue(part_of("a", 0, 3 * CHUNK, validator=PINNED))
    piece = queue.next()
    queue.settle(fragment, success=False)
    assert piece is not None
    assert piece.parts[0].is_stale
    assert queue.next() is None


def test_whoever_listens_is_told_what_was_forgotten() -> None:
    queue = scheduler()
    told: list[str] = []
    queue.dropped = lambda fragments: told.extend([fragment.fragment_id for fragment in fragments])
    queue.enqueue_many([part_of("begun", 0, CHUNK), part_of("half", 0, 2 * CHUNK, validator=PINNED)])
    pieces = [queue.next(), queue.next()]
    queue.enqueue(LoadRequest("queued", "queued"))
    queue.clear()
    assert sorted(told) == ["half:0", "queued"]
    assert [piece is not None and piece.parts[0].is_stale for piece in pieces] == [False, True]
    assert queue.active == 2
    assert queue.update_priority("begun:0", Priority.HIGH)  # it goes on


# --- measuring


class Listener:
    """A controller that records what it is told, and limits as it is told to."""

    is_climbing = may_climb = False

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seconds, self.most = 0.25, limit
        self.intervals: list[Interval] = []
        self.next_limit = limit

    def revise(self, interval: Interval) -> int:
        self.intervals.append(interval)
        self.limit = self.next_limit
        return self.limit


def listened(limit: int, clock: Clock, **settings: Any) -> tuple[Scheduler, Listener]:
    queue, listener = scheduler(clock, monitor_bandwidth=True, **settings), Listener(limit)
    queue.lanes[0].controller = listener  # type: ignore[assignment]
    return queue, listener


def test_the_controller_is_told_bytes_connections_and_that_work_was_waiting() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue_many(LoadRequest(name, name) for name in "abc")
    clock.now += 5  # idle: no part of the interval
    drain(queue)
    for _ in range(4):
        clock.now += 0.0625
        queue.record(1000)
    (interval,) = listener.intervals
    assert (interval.bytes, interval.saturated, interval.refusals) == (4000, True, 0)
    assert interval.seconds == pytest.approx(0.25)
    assert interval.active == pytest.approx(2.0)
    assert queue.bandwidth == pytest.approx(16_000)


def test_work_that_waits_through_long_pieces_counts_in_every_interval() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue_many(LoadRequest(name, name) for name in "abc")
    drain(queue)
    for _ in range(32):
        clock.now += 0.0625
        queue.record(1000)
    assert [interval.saturated for interval in listener.intervals] == [True] * 8


def test_a_lone_connection_is_measured_across_its_pieces() -> None:
    clock = Clock()
    queue, listener = listened(1, clock)
    queue.enqueue(part_of("a", 0, 8 * CHUNK, validator=PINNED))
    for _ in range(8):
        (piece,) = drain(queue)
        clock.now += 0.0625
        queue.record(CHUNK)
        queue.release(piece)
    assert [interval.bytes for interval in listener.intervals] == [4 * CHUNK] * 2
    assert [interval.active for interval in listener.intervals] == [1.0, 1.0]


def test_connections_that_find_no_more_work_are_not_saturated() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue_many(LoadRequest(name, name) for name in "ab")
    drain(queue)
    for _ in range(8):
        clock.now += 0.0625
        queue.record(1000)
    assert [interval.saturated for interval in listener.intervals] == [False, False]


def test_a_refusal_is_told_at_once() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue(LoadRequest("a", "a"))
    drain(queue)
    clock.now += 0.01
    queue.refused()
    assert [interval.refusals for interval in listener.intervals] == [1]


def test_short_transfers_are_measured_when_they_end_and_teach_the_controller_nothing() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue(LoadRequest("a", "a"))
    (piece,) = drain(queue)
    clock.now += 0.1
    queue.record(1000)
    queue.release(piece)
    assert queue.bandwidth == pytest.approx(10_000)
    assert listener.intervals == []


def test_a_limit_that_rises_wakes_who_waits_and_one_that_falls_holds_back() -> None:
    clock = Clock()
    queue, listener = listened(1, clock)
    queue.enqueue_many(LoadRequest(name, name) for name in "abcd")
    first = queue.next()
    assert first is not None
    listener.next_limit = 2
    with thread(queue.next) as result:
        wait_until_waiting(queue._changed)
        clock.now += 0.3
        queue.record(1000)
        second = result()
    assert (queue.limit, queue.active) == (2, 2)
    listener.next_limit = 1
    clock.now += 0.3
    queue.record(1000)
    queue.release(first)
    assert (queue.limit, queue.active, queue.next(timeout=0)) == (1, 1, None)
    queue.release(second)
    assert queue.next(timeout=0) is not None


def test_without_a_monitor_the_ceiling_is_the_limit() -> None:
    clock = Clock()
    queue = scheduler(clock, max_concurrent=7)
    queue.enqueue(LoadRequest("a", "a"))
    drain(queue)
    clock.now += 1
    queue.record(10)
    assert queue.limit == 7


def test_a_rate_is_kept_by_waiting_before_the_next_read_and_the_next_piece() -> None:
    clock = Clock()
    queue = scheduler(clock, max_bandwidth=1000.0)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert queue.next() is not None
    assert queue.record(2000) == pytest.approx(2.0)
    assert queue.next(timeout=0) is None
    clock.now += 1.9
    assert queue.next(timeout=0) is None
    clock.now += 0.11
    assert queue.next(timeout=0) is not None


def test_whoever_waits_for_the_budget_is_served_when_it_allows() -> None:
    queue = Scheduler(SchedulerConfig(max_bandwidth=1000.0))  # by the real clock
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert queue.next() is not None
    queue.record(50)
    piece = queue.next(timeout=5)
    assert piece is not None
    assert piece.fragment_id == "b"


def test_a_rate_of_requests_is_kept_by_waiting_before_the_next_piece() -> None:
    clock = Clock()
    queue = scheduler(clock, max_requests_per_second=10.0)
    queue.enqueue_many(LoadRequest(str(number), str(number)) for number in range(200))
    taken = 0
    while clock.now < 105.0:
        taken += len(drain(queue))
        clock.now += 0.01
    assert 48 <= taken <= 51


def test_a_second_request_for_a_piece_is_paid_for_by_the_pieces_that_follow() -> None:
    clock = Clock()
    queue = scheduler(clock, max_requests_per_second=10.0)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    (piece,) = drain(queue)
    assert queue.charge(Sender(Priority.NORMAL, piece)) == 0
    again = Sender(Priority.NORMAL, piece)
    assert queue.charge(again) == pytest.approx(0.1)
    clock.now += 0.11
    assert queue.charge(again) == 0
    assert drain(queue) == []
    clock.now += 0.1
    assert len(drain(queue)) == 1


def test_a_piece_that_is_over_before_anything_was_sent_gives_the_next_one_to_who_waits() -> None:
    queue = Scheduler(SchedulerConfig(max_requests_per_second=0.01, monitor_bandwidth=False))  # by the real clock
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    piece = queue.next(timeout=5)
    assert piece is not None
    with thread(lambda: queue.next(timeout=30)) as waits:
        wait_until_waiting(queue._changed)
        queue.release(piece)
        assert taken([waits()]) == ["b"]


def test_who_leaves_the_line_makes_room_for_a_piece() -> None:
    queue = Scheduler(SchedulerConfig(max_requests_per_second=1.0))  # by the real clock
    first, second = Sender(Priority.NORMAL), Sender(Priority.NORMAL)
    assert queue.charge(first) == 0
    assert queue.charge(second) > 0
    queue.enqueue(LoadRequest("a", "a"))
    assert queue.is_rationed
    queue.forgo(second)
    assert queue.next(timeout=5) is not None


def test_critical_is_given_the_next_request_that_may_be_made() -> None:
    clock = Clock()
    queue = scheduler(clock, max_requests_per_second=10.0)
    queue.enqueue_many(LoadRequest(name, name) for name in "ab")
    assert len(drain(queue)) == 1
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    clock.now += 0.11
    assert [piece.fragment_id for piece in drain(queue)] == ["urgent"]


@pytest.mark.parametrize(
    ("rate", "connections", "bytes_"), [(None, 4, 1 << 30), (1e6, 1, 20_000), (1e6, 4, 5_000), (1e3, 1, 2048)]
)
def test_what_is_read_at_once_is_little_where_there_is_a_rate_to_be_kept(
    rate: float | None, connections: int, bytes_: int
) -> None:
    queue = scheduler(max_bandwidth=rate)
    queue.enqueue_many(LoadRequest(str(number), str(number)) for number in range(connections))
    drain(queue)
    assert queue.stride() == bytes_ if rate else queue.stride() >= bytes_


def test_what_a_server_may_send_ahead_is_little_where_there_is_a_rate_to_be_kept() -> None:
    queue = scheduler(max_bandwidth=20e6)
    queue.enqueue(part_of("a", 0, CHUNK, priority=Priority.CRITICAL))
    (piece,) = drain(queue)
    assert queue.window(piece) == 960_000  # nothing is known yet: 20 ms
    queue.monitor.record_round_trip(0.001)
    assert queue.window(piece) == 200_000


def test_nobody_waits_for_ever_while_what_is_more_urgent_keeps_coming() -> None:
    clock = Clock()
    queue = scheduler(clock, max_concurrent=1)
    queue.enqueue(LoadRequest("low", "low", priority=Priority.LOW))
    taken: list[str] = []
    while "low" not in taken:
        assert clock.now < 110
        queue.enqueue(LoadRequest("high", "high", priority=Priority.HIGH))
        piece = queue.next(timeout=0)
        assert piece is not None
        taken.append(piece.fragment_id)
        clock.now += 0.02
        queue.release(piece)
        queue.settle(piece.fragment, success=True)
    assert len(taken) >= 16
    assert clock.now > 105


def test_critical_is_made_to_wait_for_nobody() -> None:
    clock = Clock()
    queue = scheduler(clock, max_concurrent=200)
    queue.enqueue(LoadRequest("low", "low", priority=Priority.LOW))
    queue.enqueue_many(LoadRequest(str(n), str(n), priority=Priority.CRITICAL) for n in range(100))
    clock.now += 10
    assert drain(queue)[-1].fragment_id == "low"


@pytest.mark.parametrize("limit", [{"max_bandwidth": 1000.0}, {"max_requests_per_second": 10.0}], ids=str)
def test_while_what_is_queued_waits_for_a_rate_callers_are_asked_to_hold_back(limit: dict[str, float]) -> None:
    clock = Clock()
    queue = scheduler(clock, **limit)
    queue.enqueue_many([LoadRequest("a", "a"), LoadRequest("b", "b")])
    assert not queue.should_throttle()
    (piece,) = [queue.next()]
    queue.record(1000, piece)
    assert queue.should_throttle()
    clock.now += 1.1
    assert not queue.should_throttle()
    queue.record(1000, piece)
    queue.clear()
    assert not queue.should_throttle()  # nothing waits


def test_while_the_queue_is_half_full_callers_are_asked_to_hold_back() -> None:
    queue = scheduler(queue_limit=4)
    queue.enqueue(LoadRequest("a", "a"))
    assert not queue.should_throttle()
    queue.enqueue(LoadRequest("b", "b"))
    assert queue.should_throttle()
    drain(queue)
    assert not queue.should_throttle()


@pytest.mark.parametrize(
    ("is_monitored", "rate", "active", "throttles"),
    [(True, 10, 1, True), (True, 10, 0, False), (True, 1000, 1, False), (True, 0, 1, False), (False, 10, 1, False)],
)
def test_a_slow_network_in_use_asks_its_callers_to_hold_back(
    is_monitored: bool, rate: int, active: int, throttles: bool
) -> None:
    queue = scheduler(monitor_bandwidth=is_monitored, min_bandwidth=100)
    queue.monitor.record(rate, 1.0)
    queue.enqueue_many(LoadRequest(str(number), "a") for number in range(active))
    drain(queue)
    assert queue.should_throttle() is throttles


@pytest.mark.parametrize(("rate", "throttles"), [(95, False), (50, True)])
def test_a_limit_of_the_callers_own_is_no_slow_network(rate: int, throttles: bool) -> None:
    queue = scheduler(monitor_bandwidth=True, min_bandwidth=1000, max_bandwidth=100)
    queue.monitor.record(rate, 1.0)
    queue.enqueue(LoadRequest("a", "a"))
    drain(queue)
    assert queue.should_throttle() is throttles


def test_statistics_are_a_snapshot_that_loses_no_byte() -> None:
    clock = Clock()
    queue = scheduler(clock, max_concurrent=3)
    a, b, _, _ = queue.enqueue_many(LoadRequest(name, name) for name in "abcd")
    pieces = drain(queue)
    queue.record(100)  # in no time at all
    for piece in pieces:
        queue.release(piece)
    queue.settle(a, success=True)
    queue.settle(b, success=False)
    before = queue.stats()
    assert queue.next() is not None
    clock.now += 1
    queue.record(50)
    assert (before.queued, before.active, before.limit, before.completed, before.failed) == (1, 0, 3, 1, 1)
    assert (before.total_bytes, queue.stats().total_bytes) == (100, 150)
    assert (queue.completed, queue.failed) == (1, 1)
    assert queue.stats().bandwidth == queue.bandwidth


def test_it_takes_its_part_of_a_whole_configuration() -> None:
    assert Scheduler(NetworkConfig(chunk_size=5)).config.chunk_size == 5
    assert Scheduler().config == SchedulerConfig()


# --- giving way


def test_critical_takes_a_connection_beyond_the_limit_once() -> None:
    clock = Clock()
    queue, _ = listened(2, clock)
    queue.lanes[0].controller.most = 3  # type: ignore[misc]
    queue.enqueue_many(LoadRequest(name, name, priority=Priority.LOW) for name in "abc")
    assert len(drain(queue)) == queue.crew == 2
    queue.enqueue_many(LoadRequest(name, name, priority=Priority.CRITICAL) for name in "xy")
    assert queue.crew == 3
    (urgent,) = drain(queue)
    assert (urgent.fragment_id, queue.active, queue.crew) == ("x", 3, 3)
    queue.release(urgent)
    (urgent,) = drain(queue)
    queue.release(urgent)
    assert (urgent.fragment_id, drain(queue), queue.crew) == ("y", [], 2)


def test_urgent_work_has_a_worker_while_more_pieces_are_on_their_way_than_may_begin() -> None:
    queue, _ = listened(2, Clock())
    queue.lanes[0].controller.most = 64  # type: ignore[misc]
    queue.enqueue_many(LoadRequest(name, name, priority=Priority.LOW) for name in "abc")
    assert len(drain(queue)) == queue.crew == 2
    queue.lanes[0].controller.limit = 1  # type: ignore[misc]
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    assert queue.crew == 3
    (urgent,) = drain(queue)
    assert (urgent.fragment_id, queue.active, queue.crew) == ("urgent", 3, 3)
    queue.release(urgent)
    assert queue.crew == 2


def test_lower_levels_wait_while_critical_comes_in_and_no_longer() -> None:
    queue = Scheduler(SchedulerConfig())  # by the real clock
    queue.enqueue(LoadRequest("low", "low", priority=Priority.LOW))
    low = queue.next()
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    urgent = queue.next()
    assert low is not None
    assert urgent is not None
    queue.give_way(urgent)  # it does not wait for itself
    with thread(lambda: queue.give_way(low)) as result:
        wait_until_waiting(queue._calm)
        queue.record(1, urgent)
        queue.release(urgent)
        result()
    queue.give_way(low)


@pytest.mark.parametrize("silence", [0.0, 10.0], ids=["while it comes", "while nothing comes"])
def test_nobody_is_held_up_for_ever(silence: float) -> None:
    clock = Clock()
    queue = scheduler(clock)
    queue.enqueue(LoadRequest("low", "low", priority=Priority.LOW))
    low = queue.next()
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    assert queue.next() is not None
    assert low is not None
    clock.now += silence
    with thread(lambda: queue.give_way(low)) as result:
        if not silence:
            wait_until_waiting(queue._calm)
            clock.now += 0.6
        result()


@pytest.mark.parametrize("is_by_name", [False, True])
def test_what_becomes_critical_on_its_way_is_waited_for_and_waits_no_longer(is_by_name: bool) -> None:
    queue = Scheduler(SchedulerConfig())
    first, second = queue.enqueue_many(LoadRequest(name, name, priority=Priority.LOW) for name in "ab")
    pieces = [queue.next(), queue.next()]
    assert pieces[0] is not None
    assert pieces[1] is not None
    queue.move(first, Priority.CRITICAL)
    with thread(lambda: queue.give_way(pieces[1])) as result:
        wait_until_waiting(queue._calm)
        queue.update_priority("a", Priority.LOW) if is_by_name else queue.move(first, Priority.LOW)
        result()
    assert second.priority is Priority.LOW


def test_what_is_measured_while_some_give_way_teaches_the_controller_nothing() -> None:
    clock = Clock()
    queue, listener = listened(2, clock)
    queue.enqueue_many(LoadRequest(name, name, priority=Priority.LOW) for name in "abc")
    low, _ = drain(queue)
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    queue.lanes[0].controller.most = 3  # type: ignore[misc]
    assert len(drain(queue)) == 1
    clock.now += 0.3
    queue.record(1000, low)
    assert [interval.saturated for interval in listener.intervals] == [False]


def test_short_neighbours_are_joined_whole_however_slow_the_path() -> None:
    queue = scheduler(monitor_bandwidth=True, chunk_size=1 << 20)
    queue.monitor.record(1000, 1.0)
    queue.enqueue_many(part_of("a", start, start + 100_000, validator=PINNED) for start in (0, 100_000))
    (piece,) = drain(queue)
    assert [part.byte_range for part in piece.parts] == [RangeRequest(0, 100_000), RangeRequest(100_000, 200_000)]
    assert queue.queue_len == 0


def test_the_longest_pieces_of_a_slow_connection_take_a_fifth_of_a_second() -> None:
    clock = Clock()
    queue = scheduler(clock, monitor_bandwidth=True, chunk_size=1 << 20)
    fragment = queue.enqueue(part_of("a", 0, 8 << 20, validator=PINNED))
    first = queue.next()
    assert first is not None
    assert first.byte_range.length == 256 * 1024  # nothing is known yet
    queue.monitor.record(1_000_000, 1.0)
    second = queue.next()
    assert second is not None
    assert 190_000 <= second.byte_range.length <= 200_000
    queue.monitor.record(1 << 40, 100.0)
    third = queue.next()
    assert third is not None
    assert second.byte_range.stop == third.byte_range.start
    assert (1 << 20) * 0.9 <= third.byte_range.length <= 1 << 20
    queue.settle(fragment, success=False)


@pytest.mark.parametrize("level", Priority)
def test_low_levels_have_little_room_in_the_kernel(level: Priority) -> None:
    queue = scheduler(Clock())
    queue.enqueue(part_of("a", 0, CHUNK, priority=level))
    piece = queue.next()
    assert piece is not None
    assert queue.window(piece) is None  # nothing is known yet
    queue.monitor.record(50_000_000, 1.0)
    queue.monitor.record_round_trip(0.001)
    assert (queue.window(piece) is not None) == (level >= Priority.LOW)


def test_where_something_was_critical_all_other_levels_have_little_room() -> None:
    queue = scheduler(Clock(), max_concurrent=2)
    queue.monitor.record(50_000_000, 1.0)
    queue.monitor.record_round_trip(0.001)
    queue.enqueue(part_of("a", 0, CHUNK, priority=Priority.HIGH))
    queue.enqueue(LoadRequest("urgent", "urgent", priority=Priority.CRITICAL))
    urgent, high = queue.next(), queue.next()
    assert urgent is not None
    assert high is not None
    assert queue.window(urgent) is None
    assert queue.window(high) == 250_000  # there are two
    queue.update_priority("urgent", Priority.LOW)
    assert queue.window(urgent) == 250_000


# --- several hosts


def of_hosts(clock: Clock, *ceilings: int, **settings: Any) -> Scheduler:
    ends = tuple(CdnEndpoint(f"https://{n}.example.com", max_connections=most) for n, most in enumerate(ceilings))
    return Scheduler(NetworkConfig(endpoints=ends, **({"chunk_size": CHUNK} | settings)), clock=clock)


def push(queue: Scheduler, lane: int, *names: str, **fields: Any) -> list[PrioritizedFragment]:
    fragments = [PrioritizedFragment(LoadRequest(name, name, **fields)) for name in names]
    for fragment in fragments:
        fragment.lane = lane
        queue.push(fragment)
    return fragments


def taken(pieces: Iterable[Piece]) -> list[str]:
    return [piece.fragment_id for piece in pieces]


def test_a_host_whose_connections_are_all_in_use_holds_up_nothing_of_another() -> None:
    queue = of_hosts(Clock(), 2, 5, monitor_bandwidth=False)
    push(queue, 0, *"abcd", priority=Priority.CRITICAL)
    push(queue, 1, *"xyz")
    pieces = drain(queue)
    assert taken(pieces) == ["a", "b", "x", "y", "z"]
    assert (queue.queue_len, queue.active) == (2, 5)
    queue.release(pieces[0])
    assert taken(drain(queue)) == ["c"]


def test_the_most_urgent_of_all_hosts_goes_first_and_equals_in_order_of_arrival() -> None:
    queue = of_hosts(Clock(), 9, 9)
    push(queue, 1, "a")
    push(queue, 0, "b")
    push(queue, 1, "c", priority=Priority.HIGH)
    push(queue, 0, "d", priority=Priority.LOW)
    assert taken(drain(queue)) == ["c", "a", "b", "d"]


def test_all_hosts_together_have_a_ceiling_of_which_each_that_has_work_gets_its_share() -> None:
    queue = of_hosts(Clock(), 64, 64, max_concurrent=4, monitor_bandwidth=False)
    push(queue, 0, *"abcdef")
    pieces = drain(queue)
    assert taken(pieces) == ["a", "b", "c", "d"]
    push(queue, 1, *"uvwxyz", priority=Priority.LOW)
    got = []
    for piece in pieces:
        queue.release(piece)
        got += drain(queue)
    assert taken(got) == ["u", "v", "e", "f"]
    assert queue.active == 4


def test_a_ceiling_lower_than_the_number_of_hosts_is_kept() -> None:
    queue = of_hosts(Clock(), 64, 64, 64, max_concurrent=1)
    for lane in range(3):
        push(queue, lane, str(lane))
    for expected in "012":
        (piece,) = drain(queue)
        assert piece.fragment_id == expected
        queue.release(piece)


def test_a_host_that_refuses_has_fewer_connections_and_no_other_has() -> None:
    clock = Clock()
    queue = of_hosts(clock, 64, 64)
    push(queue, 0, *"abcdefgh")
    push(queue, 1, *"stuvwxyz")
    drain(queue)
    for _ in range(4):
        clock.now += 0.6
        queue.refused(0)
        queue.refused(0)
    assert (queue.lanes[0].limit, queue.lanes[1].limit) == (1, 4)
    assert queue.limit == 5


def test_what_is_measured_of_one_host_says_nothing_of_another() -> None:
    clock = Clock()
    queue = of_hosts(clock, 64, 64)
    push(queue, 0, "a")
    push(queue, 1, "b")
    slow, fast = drain(queue)
    clock.now += 1.0
    queue.record(1000, lane=0)  # of what was asked for twice
    queue.record(9_000_000, fast)
    assert queue.bandwidth == pytest.approx(9_001_000)
    queue.release(slow)
    queue.release(fast)
    assert queue.lanes[0].monitor.current_bandwidth == pytest.approx(1000)
    assert queue.lanes[1].monitor.current_bandwidth == pytest.approx(9e6)


def test_a_piece_may_go_to_a_host_that_has_room() -> None:
    queue = of_hosts(Clock(), 2, 2)
    push(queue, 0, "a")
    (piece,) = drain(queue)
    assert queue.assign(piece, 0)
    assert queue.assign(piece, 1)
    assert [lane.active for lane in queue.lanes] == [0, 1]
    queue.release(piece)
    queue.release(piece)  # it has none any more
    assert queue.active == 0


def test_what_a_piece_that_goes_elsewhere_leaves_is_given_to_who_waits_for_it() -> None:
    queue = of_hosts(Clock(), 1, 1, monitor_bandwidth=False)
    push(queue, 0, *"ab", priority=Priority.CRITICAL)
    (piece,) = drain(queue)
    with thread(lambda: queue.next(timeout=30)) as waits:
        wait_until_waiting(queue._changed)
        assert queue.assign(piece, 1)
        assert [taken([waits()]), [lane.urgent for lane in queue.lanes]] == [["b"], [1, 1]]


def test_all_pieces_of_what_becomes_urgent_are_handed_out_to_those_who_wait() -> None:
    queue = of_hosts(Clock(), 4, 4, monitor_bandwidth=True)
    for lane in queue.lanes:
        lane.controller = ConcurrencyController(4, initial=2)
    push(queue, 0, *"abcd")
    assert taken(drain(queue)) == ["a", "b"]
    with thread(lambda: queue.next(timeout=30)) as first, thread(lambda: queue.next(timeout=30)) as second:
        wait_until_waiting(queue._changed, 2)
        queue.enqueue(part_of("u", 0, 2 * CHUNK, name="u", priority=Priority.CRITICAL, validator=PINNED))
        assert taken([first(), second()]) == ["u", "u"]


def test_who_waits_for_a_piece_that_is_withdrawn_does_not_wait_any_longer() -> None:
    queue = scheduler(max_concurrent=1)
    _, second = queue.enqueue_many(LoadRequest(name, name) for name in "ab")
    assert taken(drain(queue)) == ["a"]
    with thread(lambda: queue.next(timeout=30)) as waits:
        wait_until_waiting(queue._changed)
        queue.withdraw(second)
        assert waits() is None


@pytest.mark.parametrize("length", [100, 3 * CHUNK], ids=["short", "long"])
def test_a_piece_for_a_host_that_has_no_room_is_queued_for_it(length: int) -> None:
    queue = of_hosts(Clock(), 2, 1)
    push(queue, 1, "z")
    (other,) = drain(queue)
    queue.enqueue_many(part_of("a", n * length, (n + 1) * length, validator=PINNED) for n in range(2))
    piece = queue.next(timeout=0)
    assert piece is not None
    asked = piece.byte_range
    assert not queue.assign(piece, 1)
    assert [lane.active for lane in queue.lanes] == [0, 1]
    assert all(one.fragment is not piece.fragment for one in drain(queue))
    queue.release(other)
    came = []
    while again := queue.next(timeout=0):
        assert again.fragment.lane == 1
        came.append(again.byte_range)
        queue.release(again)
    assert came.count(asked) == 1
    assert sum(one.length for one in came) >= length


def test_a_fragment_that_goes_elsewhere_keeps_its_place_among_its_equals_there() -> None:
    queue = of_hosts(Clock(), 9, 9)
    (moved,) = push(queue, 0, "a")
    push(queue, 1, "b")
    queue.send_to(1, moved)
    assert taken(drain(queue)) == ["a", "b"]
    assert queue.lanes[1].active == 2


def test_critical_of_one_host_makes_lower_levels_of_all_give_way() -> None:
    queue = Scheduler(NetworkConfig(endpoints=("https://0.example.com", "https://1.example.com")))
    push(queue, 0, "low", priority=Priority.LOW)
    push(queue, 1, "urgent", priority=Priority.CRITICAL)
    urgent, low = drain(queue)
    assert not queue.gives_way(urgent)
    assert queue.gives_way(low)
    queue.release(urgent)
    assert not queue.gives_way(low)


def test_more_connections_than_ever_before_are_begun_step_by_step() -> None:
    clock = Clock()
    queue = of_hosts(clock, 64)
    push(queue, 0, *map(str, range(40)))
    first = drain(queue)
    assert len(first) == 4
    listener = queue.lanes[0].controller = Listener(16)  # type: ignore[assignment]
    assert len(drain(queue)) == 2  # two that may be too many
    clock.now += 0.006
    assert len(drain(queue)) == 1  # answers take long
    more = queue.next(timeout=0)
    assert more is None
    queue.record(1, first[0])  # that there were as many before is no news
    assert drain(queue) == []
    newest = list(queue._in_flight)[-1]
    queue.record(1, newest)
    assert len(drain(queue)) == 2
    assert (queue.active, listener.limit) == (9, 16)


def test_whoever_waits_for_the_next_step_is_served_when_it_comes() -> None:
    queue = Scheduler(NetworkConfig(endpoints=("https://0.example.com",)))  # by the real clock
    queue.lanes[0].controller = Listener(16)  # type: ignore[assignment]
    push(queue, 0, *map(str, range(16)))
    assert [queue.next(timeout=5) is not None for _ in range(16)] == [True] * 16


def test_pieces_are_modest_while_little_is_known_of_the_path() -> None:
    clock, mib = Clock(), 1 << 20
    queue = of_hosts(clock, 64, chunk_size=64 * mib)
    queue.enqueue(LoadRequest("a", "a", expected_size=4096 * mib, checksum=CHECKSUM))
    queue.lanes[0].monitor.record(10**9, 1.0)
    assert [piece.byte_range.length for piece in drain(queue)] == [4 * mib] * 4
    queue.lanes[0].controller = Listener(5)  # type: ignore[assignment]
    piece = queue.next(timeout=0)
    assert piece is not None
    assert piece.byte_range.length > 4 * mib


# --- everything at once


class Machine(RuleBasedStateMachine):
    """Any order of calls: pieces of a fragment never overlap, none is lost, and the most urgent goes first."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit: int) -> None:
        self.clock = Clock()
        self.queue = scheduler(self.clock, max_concurrent=limit, queue_limit=50)
        self.fragments: list[PrioritizedFragment] = []
        self.given: dict[PrioritizedFragment, list[RangeRequest]] = {}
        self.out: list[Piece] = []
        self.done: set[PrioritizedFragment] = set()

    @rule(
        start=st.integers(0, 3 * CHUNK),
        length=st.integers(1, 3 * CHUNK) | st.integers(1, 50),
        level=st.sampled_from(Priority),
        path=st.sampled_from("ab"),
        is_pinned=st.booleans(),
    )
    def enqueue(self, start: int, length: int, level: Priority, path: str, is_pinned: bool) -> None:
        if self.queue.queue_len < 50:
            name, validator = str(len(self.fragments)), PINNED if is_pinned else None
            request = part_of(path, start, start + length, name=name, priority=level, validator=validator)
            fragment = self.queue.enqueue(request)
            self.fragments.append(fragment)
            self.given[fragment] = []

    @rule()
    def take(self) -> None:
        urgent = self.queue.lanes[0].queue.peek()
        piece = self.queue.next(timeout=0)
        if piece is None:
            assert urgent is None or self.queue.active == self.queue.limit
            return
        assert urgent in [part.fragment for part in piece.parts]
        self.out.append(piece)
        for part in piece.parts:
            wanted = part.fragment.request.byte_range
            assert wanted is not None
            assert wanted.start <= part.byte_range.start < part.byte_range.stop <= wanted.stop
            assert all(
                part.byte_range.stop <= other.start or other.stop <= part.byte_range.start
                for other in self.given[part.fragment]
            )
            self.given[part.fragment].append(part.byte_range)

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 10), fails=st.booleans(), seconds=st.floats(0, 1))
    def end(self, which: int, fails: bool, seconds: float) -> None:
        self.clock.now += seconds
        piece = self.out.pop(which % len(self.out))
        self.queue.record(piece.byte_range.length)
        self.queue.release(piece)
        for part in piece.parts:
            if part.is_stale:
                continue
            wanted, stop = part.fragment.request.byte_range, part.plan.stop
            assert wanted is not None
            if fails:
                self.given[part.fragment].remove(part.byte_range)
                self.queue.extend(part.fragment, [part.byte_range])
            elif stop < wanted.stop:
                self.queue.extend(part.fragment, [RangeRequest(stop, wanted.stop)], whole=False)

    @precondition(lambda self: self.fragments)
    @rule(which=st.integers(0, 100))
    def restart(self, which: int) -> None:
        fragment = self.fragments[which % len(self.fragments)]
        if fragment not in self.done:
            self.given[fragment] = []
            self.queue.restart(fragment)

    @precondition(lambda self: self.fragments)
    @rule(which=st.integers(0, 100), success=st.booleans())
    def settle(self, which: int, success: bool) -> None:
        fragment = self.fragments[which % len(self.fragments)]
        if fragment not in self.done:
            self.done.add(fragment)
            self.queue.settle(fragment, success=success)

    @precondition(lambda self: self.fragments)
    @rule(which=st.integers(0, 100), level=st.sampled_from(Priority), is_by_name=st.booleans())
    def move(self, which: int, level: Priority, is_by_name: bool) -> None:
        fragment = self.fragments[which % len(self.fragments)]
        if is_by_name:
            assert self.queue.update_priority(fragment.fragment_id, level) is (fragment not in self.done)
        else:
            self.queue.move(fragment, level)
        assert fragment in self.done or fragment.priority is level

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.active == len(self.out) <= self.queue.limit
            assert self.queue.completed + self.queue.failed == len(self.done)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        while self.out or self.queue.queue_len:
            self.take()
            if self.out:
                self.end(0, False, 0.0)
        for fragment in self.fragments:
            wanted = fragment.request.byte_range
            if fragment not in self.done and wanted is not None:
                assert sum(piece.length for piece in self.given[fragment]) == wanted.length
        assert len(self.queue._shorts) == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=50, stateful_step_count=40)


def test_the_rest_of_an_object_is_shared_among_all_connections_if_nothing_else_is_queued() -> None:
    mebibyte = 1 << 20
    queue = scheduler(chunk_size=16 * mebibyte, max_concurrent=8)
    pinned = Validator('"v"', None, is_strong=True)
    queue.enqueue(part_of("long", 0, 64 * mebibyte, validator=pinned))
    first = queue.next(timeout=0)
    assert first is not None
    assert first.byte_range.length == 8 * mebibyte
    queue.enqueue(part_of("other", 0, 64 * mebibyte, validator=pinned, priority=Priority.LOW))
    then = queue.next(timeout=0)
    assert then is not None
    assert then.byte_range.length > 8 * mebibyte


def test_pieces_are_taken_together_as_long_as_the_most_urgent_suits() -> None:
    queue = scheduler(max_concurrent=3)
    starts = [number << 20 for number in range(5)]
    queue.enqueue_many([part_of("a", start, start + 10) for start in starts])
    queue.enqueue(part_of("b", 0, 10, priority=Priority.CRITICAL))

    def suits(fragment: PrioritizedFragment) -> bool:
        return fragment.request.path == "a"

    assert queue.next_all(suits, 10) == ([], None)  # what is more urgent is another's
    urgent = queue.next(timeout=0)
    assert urgent is not None
    assert urgent.request.path == "b"
    taken, _ = queue.next_all(suits, 1)
    more, _ = queue.next_all(suits, 10)
    assert ranges([*taken, *more]) == [(start, start + 10) for start in starts[:2]]  # and no more than the limit
    queue.release(urgent)
    queue.came([*taken, *more])
    assert queue.active == 0
    assert queue.stats().total_bytes == 20
    rest, _ = queue.next_all(suits, 10)
    assert ranges(rest) == [(start, start + 10) for start in starts[2:]]


def test_one_that_brings_others_along_is_the_last_that_is_taken_together() -> None:
    queue = scheduler()
    queue.enqueue_many([part_of("a", 0, 10), part_of("b", 0, 10), part_of("b", 10, 20), part_of("c", 0, 10)])
    taken, _ = queue.next_all(lambda fragment: True, 10)
    assert [len(piece.parts) for piece in taken] == [1, 2]


def test_there_may_be_more_at_once_after_one_that_brings_others_along() -> None:
    queue = scheduler()
    queue.enqueue_many([part_of("a", 0, 10), part_of("a", 10, 20), part_of("b", 0, 10)])
    taken, pause = queue.next_all(lambda fragment: True, 10)
    assert ([len(piece.parts) for piece in taken], pause) == ([2], 0.0)


@pytest.mark.parametrize("goes_along", [True, False])
def test_who_waits_for_a_turn_leaves_once_all_is_taken_together_or_has_what_does_not_go_along(goes_along: bool) -> None:
    queue = scheduler(max_concurrent=1)
    queue.enqueue(part_of("a", 0, 10))
    first = queue.next(timeout=0)
    assert first is not None
    queue.enqueue(part_of("b", 0, 10))
    with thread(queue.next) as result:
        wait_until_waiting(queue._changed)
        queue.came([first])
        taken, _ = queue.next_all(lambda fragment: goes_along, 10)
        assert len(taken) == goes_along
        assert (result() is None) == goes_along
