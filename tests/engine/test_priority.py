import gc
import itertools
import math
import random
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from holotensor_net.engine.priority import DEADLINE_STEPS, PrioritizedFragment, PriorityQueue
from holotensor_net.values import LoadRequest, Priority

CRITICAL, HIGH, NORMAL, LOW, IDLE = Priority


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def request(name="f", priority=NORMAL, importance=0.5, deadline=None):
    return LoadRequest(name, "model.bin", priority=priority, importance=importance, deadline=deadline)


def drain(queue):
    return [fragment.fragment_id for fragment in iter(queue.pop, None)]


# -- the score

levels = st.sampled_from(Priority)
importances = st.floats(0, 1)


@given(level=levels, importance=importances)
def test_without_a_deadline_the_score_is_level_and_half_of_what_importance_lacks(level, importance):
    fragment = PrioritizedFragment(request(priority=level, importance=importance))
    assert fragment.effective_priority == level + 0.5 * (1 - importance)
    assert fragment.deadline_at is None
    assert fragment.next_promotion(0.0) is None


@given(
    pair=st.lists(levels, min_size=2, max_size=2, unique=True).map(sorted),
    importance=st.tuples(importances, importances),
)
def test_importance_alone_never_crosses_a_level(pair, importance):
    above, below = (
        PrioritizedFragment(request(priority=p, importance=i)) for p, i in zip(pair, importance, strict=True)
    )
    assert above.effective_priority < below.effective_priority


@pytest.mark.parametrize(
    ("left", "urgency"),
    [(1e9, 0), (8.001, 0), (8, 0.5), (4.001, 0.5), (4, 1), (2, 1.5), (1, 2), (0, 2), (-1e9, 2), (math.inf, 0)],
)
def test_a_deadline_that_comes_near_is_worth_up_to_two_levels(left, urgency):
    fragment = PrioritizedFragment(request(deadline=math.inf if left == math.inf else 1e10), queued_at=0.0)
    assert fragment.score_at(fragment.deadline_at - left if math.isfinite(left) else 0.0) == 2.25 - urgency


@given(deadline=st.floats(1e-3, 1e9), queued_at=st.floats(0, 1e9), elapsed=st.floats(0, 1e10))
def test_urgency_only_grows_and_is_never_more_than_two_levels(deadline, queued_at, elapsed):
    fragment = PrioritizedFragment(request(deadline=deadline), queued_at=queued_at)
    assert 0.25 <= fragment.score_at(queued_at + elapsed) <= fragment.effective_priority <= 2.25


@given(deadline=st.floats(1e-3, 1e9), queued_at=st.floats(0, 1e9))
def test_promotions_are_as_many_as_the_steps_ahead_and_each_lowers_the_score(deadline, queued_at):
    fragment = PrioritizedFragment(request(deadline=deadline), queued_at=queued_at)
    now, scores = queued_at, [fragment.effective_priority]
    while (due := fragment.next_promotion(now)) is not None:
        assert due > now
        now = due
        scores.append(fragment.score_at(now))
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores) <= len(DEADLINE_STEPS) + 1
    assert scores[-1] == 0.25


def test_a_fragment_carries_its_request_and_room_for_its_runner():
    asked = request("a", HIGH, 0.9, deadline=5.0)
    fragment = PrioritizedFragment(asked, queued_at=100.0)
    assert (fragment.request, fragment.fragment_id, fragment.priority) == (asked, "a", HIGH)
    assert (fragment.importance, fragment.queued_at, fragment.deadline_at) == (0.9, 100.0, 105.0)
    assert fragment.state is None
    fragment.state = ["anything"]
    assert "'a'" in repr(fragment)
    assert "HIGH" in repr(fragment)


# -- order


def test_critical_overtakes_queued_bulk():
    queue = PriorityQueue()
    for index in range(100):
        queue.push(request(f"bulk {index}", LOW, 1.0))
    queue.push(request("urgent", CRITICAL, 0.0))
    assert queue.pop().fragment_id == "urgent"


def test_importance_orders_a_level():
    queue = PriorityQueue()
    for name, importance in [("b", 0.5), ("c", 0.1), ("a", 0.9)]:
        queue.push(request(name, importance=importance))
    assert drain(queue) == ["a", "b", "c"]


def test_equal_urgency_goes_in_order_of_arrival():
    queue = PriorityQueue()
    names = [f"{index}" for index in random.Random(1).sample(range(100), 100)]
    for name in names:
        queue.push(request(name))
    assert drain(queue) == names


def test_an_empty_queue_gives_none():
    queue = PriorityQueue()
    assert queue.pop() is None
    assert queue.peek() is None
    assert len(queue) == 0
    assert "f" not in queue
    assert queue.get_by_priority(IDLE) == []


def test_peek_leaves_what_it_shows():
    queue = PriorityQueue()
    fragment = queue.push(request("a"))
    assert queue.peek() is fragment
    assert queue.peek() is fragment
    assert queue.pop() is fragment
    assert queue.peek() is None


def test_the_eldest_is_the_one_that_was_pushed_first_and_stays():
    queue = PriorityQueue()
    assert queue.eldest() is None
    first, second = queue.push(request("a", Priority.LOW)), queue.push(request("b", Priority.HIGH))
    assert (queue.eldest(), len(queue)) == (first, 2)
    queue.discard(first)
    queue.push(first)
    assert queue.eldest() is second


def test_a_request_is_queued_as_from_now():
    queue = PriorityQueue(clock=Clock(50.0))
    fragment = queue.push(request(deadline=20.0))
    assert (fragment.queued_at, fragment.deadline_at) == (50.0, 70.0)


def test_a_fragment_that_is_pushed_again_keeps_its_deadline_and_its_state():
    clock = Clock(0.0)
    queue = PriorityQueue(clock=clock)
    fragment = queue.push(request(deadline=20.0))
    fragment.state = "begun"
    assert queue.pop() is fragment
    clock.now = 15.0
    assert queue.push(fragment) is fragment
    assert (fragment.deadline_at, fragment.state) == (20.0, "begun")
    assert fragment.effective_priority == 2.25 - 0.5


def test_a_fragment_cannot_be_queued_twice():
    queue = PriorityQueue()
    fragment = queue.push(request())
    with pytest.raises(ValueError, match="queued already"):
        queue.push(fragment)
    with pytest.raises(ValueError, match="queued already"):
        PriorityQueue().push(fragment)
    assert len(queue) == 1


# -- deadlines


def test_a_deadline_that_comes_near_promotes_while_queued():
    clock = Clock()
    queue = PriorityQueue(clock=clock)
    queue.push(request("soon", NORMAL, deadline=60.0))
    queue.push(request("high", HIGH))
    assert queue.peek().fragment_id == "high"
    clock.now += 60.0 - 2.0
    assert queue.peek().fragment_id == "soon"
    assert queue.peek().effective_priority == 2.25 - 1.5
    assert drain(queue) == ["soon", "high"]


def test_a_deadline_far_away_promotes_nothing():
    clock = Clock()
    queue = PriorityQueue(clock=clock)
    queue.push(request("first"))
    queue.push(request("some day", deadline=math.inf))
    queue.push(request("tomorrow", deadline=86400.0))
    clock.now += 86400.0 - 9.0
    assert drain(queue) == ["first", "some day", "tomorrow"]


def test_a_late_low_does_not_pass_critical():
    clock = Clock()
    queue = PriorityQueue(clock=clock)
    queue.push(request("late", LOW, 1.0, deadline=1.0))
    queue.push(request("critical", CRITICAL, 0.0))
    clock.now += 100.0
    assert drain(queue) == ["critical", "late"]


def test_a_promotion_missed_for_long_is_made_up_at_once():
    clock = Clock()
    queue = PriorityQueue(clock=clock)
    fragment = queue.push(request(deadline=60.0))
    clock.now += 1e6
    assert [f.effective_priority for f in queue.get_by_priority(CRITICAL)] == [0.25]
    assert queue.peek() is fragment


def test_a_fragment_taken_out_is_not_promoted_any_more():
    clock = Clock()
    queue = PriorityQueue(clock=clock)
    fragment = queue.push(request("gone", deadline=60.0))
    queue.push(request("here", deadline=60.0))
    queue.discard(fragment)
    clock.now += 59.5
    assert drain(queue) == ["here"]
    assert fragment.effective_priority == 2.25


# -- changes of mind


def test_update_priority_moves_both_ways_and_keeps_the_order_of_arrival():
    queue = PriorityQueue()
    for name in "abc":
        queue.push(request(name))
    assert queue.update_priority("c", CRITICAL)
    assert queue.update_priority("a", IDLE)
    assert queue.update_priority("a", NORMAL)
    assert [f.fragment_id for f in queue.get_by_priority(IDLE)] == ["c", "a", "b"]
    assert drain(queue) == ["c", "a", "b"]


def test_update_priority_leaves_the_request_as_it_was_asked():
    queue = PriorityQueue()
    fragment = queue.push(request(importance=0.8))
    queue.update_priority("f", HIGH)
    assert (fragment.priority, fragment.request.priority) == (HIGH, NORMAL)
    assert fragment.effective_priority == HIGH + 0.5 * (1 - 0.8)


def test_update_priority_of_a_stranger_is_false():
    queue = PriorityQueue()
    assert not queue.update_priority("nobody", HIGH)
    queue.push(request("a"))
    queue.pop()
    assert not queue.update_priority("a", HIGH)


def test_a_level_that_does_not_exist_is_refused_and_moves_nothing():
    queue = PriorityQueue()
    fragment = queue.push(request())
    with pytest.raises(ValueError, match="Priority"):
        queue.update_priority("f", 7)
    assert fragment.priority is NORMAL


def test_one_id_speaks_for_all_who_bear_it():
    queue = PriorityQueue()
    twins = [queue.push(request("twin")) for _ in range(3)]
    queue.push(request("other", HIGH))
    assert queue.update_priority("twin", CRITICAL)
    assert queue.pop() is twins[0]
    assert "twin" in queue
    assert queue.remove("twin") == twins[1:]
    assert "twin" not in queue
    assert drain(queue) == ["other"]


def test_discard_takes_exactly_one():
    queue = PriorityQueue()
    twins = [queue.push(request("twin")) for _ in range(3)]
    stranger = PrioritizedFragment(request("twin"))
    assert not queue.discard(stranger)
    assert queue.discard(twins[1])
    assert not queue.discard(twins[1])
    assert [queue.pop(), queue.pop(), queue.pop()] == [twins[0], twins[2], None]


def test_a_lone_fragment_is_discarded_by_itself_only():
    queue = PriorityQueue()
    fragment = queue.push(request())
    elsewhere = PriorityQueue().push(request())
    assert not queue.discard(elsewhere)
    assert queue.discard(fragment)
    assert "f" not in queue


def test_remove_gives_what_was_there_and_nothing_for_a_stranger():
    queue = PriorityQueue()
    fragment = queue.push(request("a"))
    assert queue.remove("b") == []
    assert queue.remove("a") == [fragment]
    assert queue.remove("a") == []
    assert queue.pop() is None


def test_clear_gives_everything_back_to_be_queued_again():
    queue = PriorityQueue()
    fragments = {queue.push(request(name, deadline=5.0)) for name in "aab"}
    assert set(queue.clear()) == fragments
    assert len(queue) == 0
    assert queue.pop() is None
    assert "a" not in queue
    for fragment in fragments:
        queue.push(fragment)
    assert len(queue) == 3


def test_get_by_priority_gives_a_level_and_all_above_it():
    queue = PriorityQueue()
    for level in Priority:
        queue.push(request(f"{level.name} least", level, 0.0))
        queue.push(request(f"{level.name} most", level, 1.0))
    names = [f.fragment_id for f in queue.get_by_priority(HIGH)]
    assert names == ["CRITICAL most", "CRITICAL least", "HIGH most", "HIGH least"]
    assert len(queue.get_by_priority(IDLE)) == len(queue) == 10


def test_stale_places_never_outnumber_the_live_by_much():
    queue = PriorityQueue(clock=Clock())
    for index in range(100):
        queue.push(request(f"{index}", deadline=3600.0))
    for _, level, index in itertools.product(range(10), (LOW, HIGH), range(100)):
        queue.update_priority(f"{index}", level)
        assert len(queue._ranks) <= 2 * len(queue) + 16
    for index in range(100):
        queue.remove(f"{index}")
        assert len(queue._ranks) <= 2 * len(queue) + 16
        assert len(queue._promotions) <= 2 * len(queue) + 16


class Mortal(PrioritizedFragment):
    """One whose end can be seen."""


def test_equals_go_in_order_of_arrival_however_they_came_back():
    queue = PriorityQueue(clock=Clock())
    for name in "abcd":
        queue.push(request(name, LOW if name == "c" else NORMAL))
    queue.update_priority("c", NORMAL)
    first = queue.peek()
    place = first.place
    assert queue.pop() is first
    queue.push(request("e"))
    queue.push(first, place=place)
    for level in (HIGH, NORMAL):
        queue.update_priority("b", level)
    assert drain(queue) == list("abcde")


def test_a_place_left_behind_keeps_no_fragment_alive():
    queue = PriorityQueue(clock=Clock())
    queue.push(request("stays"))
    queue.push(Mortal(request("goes", deadline=3600.0), queued_at=1000.0))
    queue.update_priority("goes", LOW)
    gone = [weakref.ref(fragment) for fragment in queue.remove("goes")]
    gc.collect()
    assert [fragment() for fragment in gone] == [None]


class QueueAgainstAList(RuleBasedStateMachine):
    """The queue does what a list that is sorted anew at every question would do."""

    @initialize()
    def begin(self):
        self.clock = Clock(0.0)
        self.queue = PriorityQueue(clock=self.clock)
        self.model = []
        self.out = []

    def in_order(self):
        return sorted(self.model, key=lambda f: f.score_at(self.clock.now))  # stable: arrival decides

    def drop(self, fragment):
        self.model.remove(fragment)
        self.out.append(fragment)

    names = st.sampled_from("abcdef")

    @rule(
        name=names, level=levels, importance=st.sampled_from([0, 0.5, 1]), deadline=st.sampled_from([None, 0.5, 5, 20])
    )
    def push(self, name, level, importance, deadline):
        self.model.append(self.queue.push(request(name, level, importance, deadline)))

    @rule()
    def push_again(self):
        if self.out:
            self.model.append(self.queue.push(self.out.pop()))

    @rule()
    def pop(self):
        expected = self.in_order()[0] if self.model else None
        assert self.queue.peek() is expected
        assert self.queue.pop() is expected
        if expected is not None:
            self.drop(expected)

    @rule(name=names, level=levels)
    def update(self, name, level):
        assert self.queue.update_priority(name, level) == any(f.fragment_id == name for f in self.model)
        assert all(f.priority == level for f in self.model if f.fragment_id == name)

    @rule(name=names)
    def remove(self, name):
        expected = [f for f in self.model if f.fragment_id == name]
        assert self.queue.remove(name) == expected
        for fragment in expected:
            self.drop(fragment)

    @rule(pick=st.integers(0, 99))
    def discard(self, pick):
        if self.model:
            fragment = self.model[pick % len(self.model)]
            assert self.queue.discard(fragment)
            self.drop(fragment)

    @rule(seconds=st.sampled_from([0.3, 1.0, 7.0, 100.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule(level=levels)
    def look(self, level):
        expected = [f for f in self.in_order() if f.score_at(self.clock.now) <= level + 0.5]
        assert self.queue.get_by_priority(level) == expected

    @invariant()
    def counts_agree(self):
        assert len(self.queue) == len(self.model)
        assert {name for name in "abcdef" if name in self.queue} == {f.fragment_id for f in self.model}


TestQueueAgainstAList = QueueAgainstAList.TestCase
TestQueueAgainstAList.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- threads


def together(*jobs):
    """Run all jobs at once; raise what any of them raised."""
    start, errors = threading.Barrier(len(jobs)), []

    def run(job):
        start.wait(30)
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_eight_threads_lose_nothing_and_get_nothing_twice():
    queue, count = PriorityQueue(), 1000
    taken = [[] for _ in range(8)]

    def worker(number):
        for index in range(count):
            queue.push(request(f"{number}:{index}", Priority(index % 5)))
            queue.update_priority(f"{(number + 1) % 8}:{index}", HIGH)
            if index % 2 and (fragment := queue.pop()) is not None:
                taken[number].append(fragment.fragment_id)
        while (fragment := queue.pop()) is not None:
            taken[number].append(fragment.fragment_id)

    together(*(lambda number=number: worker(number) for number in range(8)))
    assert sorted(itertools.chain(*taken)) == sorted(f"{n}:{i}" for n in range(8) for i in range(count))
    assert len(queue) == 0


def test_whoever_finds_the_lock_taken_waits_and_then_goes_on():
    queue = PriorityQueue()
    done = threading.Event()
    with queue._lock:
        thread = threading.Thread(target=lambda: (queue.push(request()), done.set()))
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(10)
    thread.join(10)
    assert len(queue) == 1


def test_each_of_the_queued_is_either_popped_or_removed():
    queue, names = PriorityQueue(), [f"{index}" for index in range(4000)]
    for name in names:
        queue.push(request(name))
    popped, removed = [], []
    together(
        lambda: popped.extend(drain(queue)),
        lambda: removed.extend(f.fragment_id for name in reversed(names) for f in queue.remove(name)),
    )
    assert sorted(popped + removed) == sorted(names)


def test_what_is_pushed_at_one_go_stands_as_if_pushed_one_by_one():
    wanted = [request("a", LOW), request("b"), request("c", HIGH, deadline=5.0), request("d"), request("e", CRITICAL)]
    clock = Clock()
    one, all_ = PriorityQueue(clock=clock), PriorityQueue(clock=clock)
    for each in wanted:
        one.push(each)
    fragments = [PrioritizedFragment(each, queued_at=clock()) for each in wanted]
    all_.push_all(fragments)
    with pytest.raises(ValueError, match="queued already"):
        all_.push_all(fragments[:1])
    clock.now += 4.5
    assert drain(all_) == drain(one)
