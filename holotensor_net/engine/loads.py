"""Loads: who asked for what, and how far it has come.

Nothing here waits, reads or writes; the owner's lock guards it.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from ..errors import NetworkError
from ..transport.digests import Digest
from ..values import HeadInfo, LoadRequest, LoadResult, RangeRequest, Validator
from ..waits import attentively
from .alarms import Alarm
from .priority import PrioritizedFragment
from .request_cache import Destination, Found
from .scheduler import Part

__all__ = ["Attempt", "Call", "Load", "Promise", "Share", "Turn", "Waiter", "Whole", "calling_later", "is_sealed"]

Call: TypeAlias = Callable[[], object]

PENDING, _CANCELLED, FINISHED = "PENDING", "CANCELLED", "FINISHED"  # as the base class of futures has it


@dataclass(slots=True, eq=False)
class Attempt:
    """One go at a load: all that must be of one version of the object. ``wanted`` is known once an answer has come,
    ``missing`` counts the bytes of it that have not. ``digests`` of the whole object are to be checked at the end.
    ``is_open_ended``: the destination grows, as nobody knew how long the object is. ``in_flight`` counts those who may
    be at the destination. ``asked_at``: the wall clock's time of its first request. ``is_resumed``: another has begun
    it, and its endpoint has not answered yet. ``is_sound``: whoever asks next may go on with what has come, and nobody
    has forbidden to store it."""

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

    def leave(self) -> Callable[[], None] | None:
        """A piece has ended, and what came of it. Under the fetcher's lock; what it gives is to be called without."""
        self.in_flight -= 1
        return None if self.in_flight else self._ending()

    def abandon(self, *, keep: bool = False) -> Callable[[], None] | None:
        """Nothing of it is wanted any more, but perhaps to go on with later. Under the fetcher's lock; what it gives is
        to be called without."""
        self.abandoned = True
        self.is_sound = self.is_sound and keep
        return None if self.in_flight else self._ending()

    def _ending(self) -> Callable[[], None] | None:
        """What there is to do about its destination, now that no piece is being written any more: its file descriptor
        must not become another file's."""
        destination = self.destination
        if destination is None or not self.abandoned:
            return None
        self.destination = None
        return destination.keep if self.is_sound else destination.discard


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


class Load(PrioritizedFragment):
    """A fragment on its way, and everyone who waits for it; it stands in the scheduler's queue itself.

    ``whole``: each endpoint is asked for all of the object in a plain GET, as none is left that serves ranges.
    ``may_resume``: the first worker is to look for what has come of an earlier transfer. ``is_repeated``: an equal load
    has ended not long ago. ``asks``: what it asks for others too, if it does. ``done``: everyone was told.
    """

    # What most loads never need is the class's until it is set: there may be a million of them.
    tried: frozenset[int] = frozenset()
    failures: tuple[NetworkError, ...] = ()
    restarts: int = 0
    in_memory: bool = False
    may_resume: bool = False
    is_repeated: bool = False
    asks: object = None
    turn: Turn | None = None
    done: bool = False

    def __init__(self, request: LoadRequest, identity: object, held: Found | None, now: float, *, whole: bool) -> None:
        super().__init__(request, queued_at=now)
        self.identity = identity
        self.held = held
        self.whole = whole
        self.waiters: list[Waiter] = []
        self.attempt = Attempt()

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


class Gate(_thread.RLock):  # type: ignore[misc]
    """The lock of a future on which nobody waits, as whoever waits has an event of his own. A Condition would be the
    most part of what a future weighs; and an interrupt could leave it locked, being written in Python."""

    __slots__ = ()

    def notify_all(self) -> None:
        """Nobody waits."""

    def wait(self, timeout: float | None = None) -> bool:
        """Whether something has happened: not without a wait."""
        return False


class Promise(Future[LoadResult]):
    """A future whose wait Ctrl-C ends at once."""

    def __init__(self) -> None:
        # All that the base class would set.
        self._condition = Gate()  # type: ignore[assignment]
        self._state = PENDING
        self._result: LoadResult = None  # type: ignore[assignment]
        self._exception: BaseException | None = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[LoadResult]], object]] = []

    def result(self, timeout: float | None = None) -> LoadResult:
        if self._state == FINISHED and self._exception is None:  # a glance: what is over stays as it is
            return self._result
        self._stay(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._stay(timeout)
        return super().exception(0)

    def _stay(self, timeout: float | None) -> None:
        if not self.done():
            attentively(lambda seconds: wait((self,), seconds).done, timeout)

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        with self._condition:
            if self._state == _CANCELLED:  # who has an event of his own is told by this alone
                self.set_running_or_notify_cancel()
        return is_cancelled


class Waiter(Promise):
    """A caller, who holds this future: which request it made, when, and until when it waits.

    ``load``: the one that it waits for, None once it has been told. ``is_shared``: others who ask for the same may be
    given this future too. ``alarm``: that of its deadline. ``on_cancel``: who is told that it was cancelled.
    """

    alarm: Alarm | None = None
    on_cancel: Callable[[Waiter], object] | None = None

    def __init__(
        self,
        load: Load,
        request: LoadRequest,
        since: float,
        until: float | None,
        *,
        is_shared: bool,
    ) -> None:
        super().__init__()
        self.load: Load | None = load
        self.request = request
        self.since = since
        self.until = until
        self.is_shared = is_shared

    @property
    def fragment_id(self) -> str:
        return self.request.fragment_id

    def add_done_callback(self, fn: Callable[[Future[LoadResult]], object]) -> None:
        super().add_done_callback(partial(_call_back, fn))

    def part_from(self) -> None:
        """It has left its load, and will be told something of its own."""
        self.load = None

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        if is_cancelled and self.on_cancel is not None:
            self.on_cancel(self)
        return is_cancelled


class _Here(threading.local):
    """Who is to be called back by this thread later, if that is not to be at once."""

    later: list[Call] | None = None


_here = _Here()


@contextlib.contextmanager
def calling_later() -> Iterator[list[Call]]:
    """Meanwhile nobody is called back on this thread: what is to be called gathers in this list; within another such
    block, in that one's."""
    calls: list[Call] = []
    before = _here.later
    if before is None:
        _here.later = calls
    try:
        yield calls
    finally:
        _here.later = before


def _call_back(call: Callable[[Future[LoadResult]], object], future: Future[LoadResult]) -> None:
    if _here.later is None:
        call(future)
    else:
        _here.later.append(partial(call, future))


class Whole(NamedTuple):
    """What a load ends in when it ends well."""

    data: memoryview
    head: HeadInfo | None
    from_cache: bool = False


@dataclass(slots=True, eq=False)
class Share:
    """What one piece does for one load."""

    load: Load
    attempt: Attempt
    part: Part


def is_sealed(share: Share) -> bool:
    """Whether a piece is all of a fragment whose digest is known, so that its bytes prove themselves."""
    request = share.load.request
    is_all = share.part.byte_range == (request.byte_range or RangeRequest(0, request.expected_size or 0))
    return request.checksum is not None and is_all
