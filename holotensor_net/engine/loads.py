"""Loads: who asked for what, how far it has come, and the books that hold all of that.

Nothing here waits, reads or writes; the owner's lock guards it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, TimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import NetworkError
from ..transport.digests import Digest
from ..values import HeadInfo, LoadRequest, LoadResult, RangeRequest, Validator
from ..waits import attentively
from .alarms import Alarm
from .priority import PrioritizedFragment
from .request_cache import Destination, Found
from .scheduler import Part

__all__ = ["Attempt", "Books", "Fragment", "Load", "Share", "Turn", "Waiter", "Whole", "identity_of", "is_sealed"]


_MOST_ENDED = 4096


@dataclass(slots=True, eq=False)
class Attempt:
    """One go at a load: all that must be of one version of the object. ``wanted`` is known once an answer has come,
    ``missing`` counts the bytes of it that have not. ``digests`` of the whole object are to be checked at the end.
    ``is_open_ended``: the destination grows, as nobody knew how long the object is. ``in_flight`` counts those who may
    be at the destination. ``asked_at``: the wall clock's time of its first request. ``is_resumed``: another has begun
    it, and its endpoint has not answered yet. ``is_sound``: whoever asks next may go on with what has come."""

    endpoint: int | None = None
    asked_at: float | None = None
    head: HeadInfo | None = None
    wanted: RangeRequest | None = None
    missing: int = 0
    digests: frozenset[Digest] = frozenset()
    destination: Destination | None = None
    is_open_ended: bool = False
    in_flight: int = 0
    abandoned: bool = False
    is_resumed: bool = False
    is_sound: bool = True

    def leave(self) -> Callable[[], None]:
        """A piece has ended, and what came of it. Under the fetcher's lock; what it gives is to be called without."""
        self.in_flight -= 1
        return self._ending()

    def abandon(self, *, keep: bool = False) -> Callable[[], None]:
        """Nothing of it is wanted any more, but perhaps to go on with later. Under the fetcher's lock; what it gives is
        to be called without."""
        self.abandoned = True
        self.is_sound = self.is_sound and keep
        return self._ending()

    def _ending(self) -> Callable[[], None]:
        """What there is to do about its destination. Nothing while a piece is still being written: its file descriptor
        must not become another file's."""
        destination = self.destination
        if destination is None or not self.abandoned or self.in_flight:
            return _nothing
        self.destination = None
        return destination.keep if self.is_sound else destination.discard


def _nothing() -> None:
    pass


@dataclass(slots=True, eq=False)
class Turn:
    """Where a load stands among processes that want the same, which is told by the cache's ``name`` for it, and by its
    ``claim``.

    ``has_come``: it is this process's to bring, ``is_claimed``: others know. ``is_waiting``: another brings it;
    ``since`` is the wall clock's time when that was first seen, ``began`` the other clock's; ``is_late``: it is waited
    for no longer; ``pause`` are the seconds to the next look."""

    name: str
    claim: tuple[str, int]
    has_come: bool = False
    is_claimed: bool = False
    is_waiting: bool = False
    has_waited: bool = False
    is_late: bool = False
    since: float = 0.0
    began: float = 0.0
    pause: float = 0.0


@dataclass(eq=False)
class Load:
    """A fragment on its way, and everyone who waits for it. ``whole``: each endpoint is asked for all of the object in
    a plain GET, as none is left that serves ranges. ``may_resume``: the first worker is to look for what has come of an
    earlier transfer. ``is_repeated``: an equal load has ended not long ago."""

    request: LoadRequest
    fragment: Fragment
    held: Found | None
    whole: bool
    identity: object
    waiters: list[Waiter] = field(default_factory=list)
    attempt: Attempt = field(default_factory=Attempt)
    tried: frozenset[int] = frozenset()
    failures: tuple[NetworkError, ...] = ()
    restarts: int = 0
    in_memory: bool = False
    may_resume: bool = False
    is_repeated: bool = False
    turn: Turn | None = None
    done: bool = False

    @property
    def version(self) -> Validator | None:
        """The strong validator that all its pieces share, if there is one."""
        pinned = self.request.validator
        if pinned is not None and pinned.is_strong:
            return pinned
        head = self.attempt.head
        return head.validator if head is not None and head.validator.is_strong else None

    @property
    def is_provable(self) -> bool:
        """Whether pieces of several answers may be combined."""
        return self.request.checksum is not None or self.version is not None


class Promise(Future[LoadResult]):
    """A future that tells of its being cancelled, and which ``waiter`` has gone with it.

    It holds that one weakly: they would hold each other, and so the bytes, until garbage is collected.
    """

    on_cancel: Callable[[weakref.ref[Waiter]], object] | None = None
    waiter: weakref.ref[Waiter]

    def result(self, timeout: float | None = None) -> LoadResult:
        self._stay(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._stay(timeout)
        return super().exception(0)

    def _stay(self, timeout: float | None) -> None:
        if not self.done():
            attentively(self._is_over, timeout)

    def _is_over(self, seconds: float) -> bool:
        with suppress(CancelledError, TimeoutError):
            super().exception(seconds)
        return self.done()

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        if is_cancelled and self.on_cancel is not None:
            self.on_cancel(self.waiter)
        return is_cancelled


@dataclass(eq=False)
class Waiter:
    """A caller: which request it made, when, until when it waits, and the future that it holds. ``is_shared``: others
    who ask for the same may be given that future too. ``alarm``: that of its deadline."""

    load: Load
    request: LoadRequest
    since: float
    until: float | None
    is_shared: bool
    future: Promise = field(default_factory=Promise)
    alarm: Alarm | None = None

    @property
    def fragment_id(self) -> str:
        return self.request.fragment_id


class Whole(NamedTuple):
    """What a load ends in when it ends well."""

    data: memoryview
    head: HeadInfo | None
    from_cache: bool = False


class Fragment(PrioritizedFragment):
    """A queued fragment that knows its load."""

    __slots__ = ("load",)
    load: Load


@dataclass(slots=True, eq=False)
class Share:
    """What one piece does for one load."""

    load: Load
    attempt: Attempt
    part: Part


class Books:
    """The loads in flight, by what they are and by the names that callers gave them. Not thread-safe: its owner has a
    lock."""

    def __init__(self) -> None:
        self._loads: dict[object, Load] = {}
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

    def open(self, request: LoadRequest, identity: object, held: Found | None, now: float, *, whole: bool) -> Load:
        """A new load, that nobody waits for yet."""
        fragment = Fragment(request, queued_at=now)
        fragment.load = load = Load(request, fragment, held, whole, identity)
        load.is_repeated = identity in self._ended
        self._loads[identity] = load
        return load

    def enter(self, waiter: Waiter) -> None:
        """One more waits for a load."""
        load, name = waiter.load, waiter.request.fragment_id
        load.waiters.append(waiter)
        there = self._by_name.setdefault(name, load)
        if isinstance(there, dict):
            there[load] = None
        elif there is not load:
            self._by_name[name] = {there: None, load: None}

    def leave(self, waiter: Waiter) -> bool:
        """One waits no longer; False if it was told already."""
        if waiter not in waiter.load.waiters:
            return False
        waiter.load.waiters.remove(waiter)
        self._forget_name(waiter.load, waiter.fragment_id)
        return True

    def close(self, load: Load) -> tuple[list[Waiter], Callable[[], None]]:
        """Strike a load out; gives those who are to be told, and what is then to be called without the lock."""
        load.done = True
        ending = load.attempt.abandon(keep=True)
        del self._loads[load.identity]
        self._ended[load.identity] = None
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        waiters, load.waiters = load.waiters, []
        for waiter in waiters:
            self._forget_name(load, waiter.fragment_id)
        return waiters, ending

    def _forget_name(self, load: Load, name: str) -> None:
        """Let a load go by this name no longer, unless somebody else calls it so."""
        if load.waiters and any(waiter.fragment_id == name for waiter in load.waiters):
            return
        there = self._by_name.get(name)
        if isinstance(there, dict):
            there.pop(load, None)
        if there is load or not there:
            self._by_name.pop(name, None)


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


def is_sealed(share: Share) -> bool:
    """Whether a piece is all of a fragment whose digest is known, so that its bytes prove themselves."""
    request = share.load.request
    is_all = share.part.byte_range == (request.byte_range or RangeRequest(0, request.expected_size or 0))
    return request.checksum is not None and is_all
