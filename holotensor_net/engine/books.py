"""Books: the loads in flight, by what they are and by the names that callers gave them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..values import LoadRequest
from .loads import Load, Waiter
from .request_cache import Found
from .runs import Member, Rows, Run

__all__ = ["Books", "identity_of"]

_MOST_ENDED = 4096


class Books:
    """The loads in flight. Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._loads: dict[object, Load] = {}
        self._rows = Rows()
        self._ended: OrderedDict[object, None] = OrderedDict()
        self._by_name: dict[str, Load | dict[Load, None]] = {}  # a lone one stands for itself

    def __len__(self) -> int:
        return len(self._loads)

    def all(self) -> list[Load]:
        return list(self._loads.values())

    def named(self, name: str) -> list[Load]:
        """The loads of which somebody waits for a fragment of this name."""
        there = self._by_name.get(name, ())
        return [there] if isinstance(there, Load) else list(there)

    def find(self, identity: object) -> Load | None:
        """The load that an equal request has begun, one of the same :func:`identity_of`."""
        return self._loads.get(identity)

    def member(self, request: LoadRequest) -> Member | None:
        """The future of an equal request that comes in a run."""
        return self._rows.find(request)

    def open(self, request: LoadRequest, identity: object, held: Found | None, now: float, *, whole: bool) -> Load:
        """A new load, that nobody waits for yet."""
        load = Load(request, identity, held, now, whole=whole)
        if identity in self._ended or request.path in self._ended:
            load.is_repeated = True
        self._loads[identity] = load
        return load

    def open_run(self, requests: Sequence[LoadRequest], identity: object, now: float) -> Run | None:
        """A new load for all of these, which make a run, and their futures; None if any of it is on its way."""
        if requests in self._rows:
            return None
        if len(self._loads) > len(self._rows) and any(identity_of(request) in self._loads for request in requests):
            return None
        run = Run(requests, identity, now)
        run.is_repeated = run.request.path in self._ended
        self._loads[identity] = run
        self._rows.add(run)
        names = [request.fragment_id for request in requests]
        if self._by_name.keys().isdisjoint(names):
            self._by_name.update(dict.fromkeys(names, run))
        else:
            for name in names:
                self._name(name, run)
        return run

    def enter(self, waiter: Waiter, load: Load) -> None:
        """One more waits for a load."""
        load.waiters.append(waiter)
        self._name(waiter.request.fragment_id, load)

    def leave(self, waiter: Waiter) -> Load | None:
        """One waits no longer; gives the load that it waited for, None if it was told already."""
        load = waiter.load
        if load is None:
            return None
        waiter.part_from()
        load.waiters.remove(waiter)
        self._forget_name(load, waiter.fragment_id)
        return load

    def dissolve(self, run: Run) -> tuple[list[Load], Callable[[], None] | None]:
        """Give each who waits for something of a run a load of its own; those that there were none of, which are as
        urgent as the run was, and what is then to be called, if anything is."""
        waiters, loads = run.waiters, []
        _, ending = self.close(run)
        run.unwatch()
        for waiter in waiters:
            waiter.part_from()
            identity = identity_of(waiter.request)
            load = self.find(identity)
            if load is None:
                load = self.open(waiter.request, identity, None, run.queued_at, whole=False)
                load.priority = run.priority
                load.is_repeated = False  # it has not come
                loads.append(load)
            waiter.load = load
            self.enter(waiter, load)
        return loads, ending

    def close(self, load: Load) -> tuple[list[Waiter], Callable[[], None] | None]:
        """Strike a load out; gives those who are to be told, but for the members of a run, and what is then to be
        called without the lock, if anything is."""
        load.done = True
        ending = load.attempt.abandon(keep=True)
        del self._loads[load.identity]
        if isinstance(load, Run):
            self._rows.discard(load)
            self._note_end(load.request.path)
            self._forget_all(load, [request.fragment_id for request in load.requests])
            waiters = load.let_go()
        else:
            self._note_end(load.identity)
            waiters, load.waiters = load.waiters, []
        for waiter in waiters:
            waiter.load = None
            self._forget_name(load, waiter.request.fragment_id)
        return waiters, ending

    def _note_end(self, identity: object) -> None:
        self._ended[identity] = None
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)

    def _name(self, name: str, load: Load) -> None:
        there = self._by_name.setdefault(name, load)
        if isinstance(there, dict):
            there[load] = None
        elif there is not load:
            self._by_name[name] = {there: None, load: None}

    def _forget_name(self, load: Load, name: str) -> None:
        """Let a load go by this name no longer, unless somebody else calls it so."""
        if load.waiters and any(waiter.fragment_id == name for waiter in load.waiters):
            return
        self._forget(load, name)

    def _forget_all(self, load: Load, names: Sequence[str]) -> None:
        """Let a load go by none of these names any longer."""
        theirs = list(map(self._by_name.pop, names, itertools.repeat(None)))
        if theirs.count(load) == len(names):
            return
        for name, there in zip(names, theirs, strict=True):
            if isinstance(there, dict):
                there.pop(load, None)
            if there and there is not load:  # it is another's too
                self._by_name[name] = there

    def _forget(self, load: Load, name: str) -> None:
        there = self._by_name.get(name)
        if isinstance(there, dict):
            there.pop(load, None)
        if there is load or there == {}:
            del self._by_name[name]


def identity_of(request: LoadRequest) -> object:
    """What makes two requests one load: of plain values, which are hashed several times as fast as others."""
    wanted = request.byte_range
    return (
        request.path,
        None if wanted is None else wanted.start,
        None if wanted is None else wanted.stop,
        request.checksum,
        request.validator,
        request.expected_size,
        request.allow_short,
    )
