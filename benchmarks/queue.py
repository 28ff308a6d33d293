"""A million fragments pushed, moved to another level, and popped; from one thread, and from eight.

The peer is ``heapq`` alone, in one thread: no lock, no index, and a move leaves the old place behind, to be skipped
when it is popped. It is what order costs at the least.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from threading import Thread

from holotensor_net import LoadRequest, Priority, PriorityQueue

from ._harness import OURS, Bar, Case

LEVELS = len(Priority)
PEER = "heapq alone"


def cases(smallest: bool) -> Iterator[Case]:
    count, rounds = (500, 1) if smallest else (1_000_000, 5)
    requests = [request(number) for number in range(count)]
    moves = [(name, Priority((level + 1) % LEVELS)) for name, level, _ in map(named, requests)]
    for threads in (1, 8):
        yield turns(requests, moves, threads, rounds)


def request(number: int) -> LoadRequest:
    level, importance = Priority(number % LEVELS), (number * 7919 % 1000) / 1000
    place = (number << 10, number + 1 << 10)
    return LoadRequest(f"fragment-{number}", "object", byte_range=place, priority=level, importance=importance)


def named(request: LoadRequest) -> tuple[str, Priority, float]:
    return request.fragment_id, request.priority, request.importance


Moves = list[tuple[str, Priority]]


def turns(requests: list[LoadRequest], moves: Moves, threads: int, rounds: int) -> Case:
    """Seconds of one operation of each kind, ours and the peer's in turns."""
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    memory = []
    for _ in range(rounds):
        seconds, held = round_of_ours(requests, moves, threads)
        ours.append(seconds)
        memory.append(held)
        theirs.append(round_of_heapq(requests, moves))
    kinds = ("push", "move", "pop")
    samples = {OURS: [sum(each) / 3 for each in ours], PEER: [sum(each) / 3 for each in theirs]}
    for index, kind in enumerate(kinds):
        samples[f"ours, {kind}"] = [each[index] for each in ours]
        samples[f"{PEER}, {kind}"] = [each[index] for each in theirs]
    most = max(memory)
    notes = {OURS: f"{most:.0f} B a fragment beside its request, at the most"}
    case = Case(f"{len(requests)} fragments, {_threads(threads)}: an operation", samples, notes=notes)
    bars = (
        Bar("an operation takes", case.median() * 1e6, at_most=8, unit=" µs"),
        Bar("a fragment takes", most, at_most=400, unit=" B"),
    )
    return Case(case.name, samples, bars, notes=notes)


def _threads(number: int) -> str:
    return "one thread" if number == 1 else f"{number} threads"


def round_of_ours(requests: list[LoadRequest], moves: Moves, threads: int) -> tuple[list[float], float]:
    """Seconds of a push, a move and a pop; and the bytes that a fragment takes at the most."""
    gc.collect()
    before = resident()
    queue = PriorityQueue()

    def push(share: list[LoadRequest]) -> None:
        for one in share:
            queue.push(one)

    def move(share: Moves) -> None:
        for name, level in share:
            queue.update_priority(name, level)

    def pop(_: object) -> None:
        while queue.pop() is not None:
            pass

    pushed = timed(push, [requests[start::threads] for start in range(threads)])
    most = resident()
    moved = timed(move, [moves[start::threads] for start in range(threads)])
    most = max(most, resident())
    popped = timed(pop, [None] * threads)
    return [each / len(requests) for each in (pushed, moved, popped)], max(0, most - before) / len(requests)


def timed(work: Callable[[object], None], shares: list[object]) -> float:
    """Seconds until as many threads as there are shares are done with theirs."""
    workers = [Thread(target=work, args=(share,)) for share in shares]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - began


def round_of_heapq(requests: list[LoadRequest], moves: Moves) -> list[float]:
    gc.collect()
    marks = [time.perf_counter()]
    heap: list[tuple[float, int, str]] = []
    valid: dict[str, int] = {}
    numbers = itertools.count()
    for one in requests:
        number = valid[one.fragment_id] = next(numbers)
        heapq.heappush(heap, (one.priority + 0.5 * (1 - one.importance), number, one.fragment_id))
    marks.append(time.perf_counter())
    for name, level in moves:
        number = valid[name] = next(numbers)
        heapq.heappush(heap, (level + 0.25, number, name))
    marks.append(time.perf_counter())
    while heap:
        _, number, name = heapq.heappop(heap)
        if valid.get(name) == number:
            del valid[name]
    marks.append(time.perf_counter())
    return [(after - before) / len(requests) for before, after in itertools.pairwise(marks)]


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as told:
            return int(told.read().split()[1]) * 4096
    except OSError:
        return 0
