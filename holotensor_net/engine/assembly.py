"""Assembly: where the bytes of answers go, what a load still lacks, and the whole that is verified and kept.

An answer's bytes go straight to the destinations of the loads that it is for. What a load has is of one version of the
object, and is handed over once all of it is there and proves right.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..config import NetworkConfig
from ..errors import ChecksumMismatch, HttpError, NetworkError, ObjectChanged
from ..storage.memory import MemoryPart
from ..transport.client import Answer, Write
from ..transport.digests import check_digests
from ..transport.guards import check_checksum
from ..values import HeadInfo, LoadRequest, RangeRequest
from ..waits import Latch
from .confirmations import Confirmations
from .loads import Attempt, Load, Share, Whole
from .recovery import Gone, is_failing
from .request_cache import Destination, Proven, RequestCache, contradicts
from .scheduler import Scheduler
from .sinks import Bounded, Scatter
from .turns import Turns

__all__ = ["Assembly"]

_log = logging.getLogger("holotensor_net.engine")

_DENSE = 0.75
"""Of what is read in one request for several fragments: from so much on that is theirs, they share its memory."""

_UNTIL_ITS_END = RangeRequest(0, 1 << 62)


@dataclass(frozen=True, slots=True)
class _Common:
    """Memory that short neighbours share: the bytes ``span`` of their object."""

    span: RangeRequest
    memory: MemoryPart

    def part(self, span: RangeRequest) -> MemoryPart:
        begin = self.span.start
        return self.memory.part(span.start - begin, span.stop - begin)


class Assembly:
    """Makes wholes of pieces. ``lock``, the fetcher's, guards the loads; nothing is read or written under it."""

    def __init__(
        self,
        config: NetworkConfig,
        scheduler: Scheduler,
        cache: RequestCache,
        turns: Turns,
        confirmations: Confirmations,
        lock: Latch,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._cache = cache
        self._turns = turns
        self._confirmations = confirmations
        self._lock = lock

    def open(self, shares: list[Share], head: HeadInfo, coming: RangeRequest | None) -> Write:
        """Where an answer's bytes go, of the range that it brings, if that is known: each load's share to its own
        place, what lies between to nowhere. The rest of a load whose version is known now need not wait for them."""
        spans = [_span(share, head) for share in shares]
        made: list[Destination | None] = []
        places: list[tuple[RangeRequest, Destination]] = []
        common = self._common(shares, spans)
        may_store = "no-store" not in head.headers.get("cache-control", "").lower()
        try:
            for share, span in zip(shares, spans, strict=True):
                self._confirmations.answered(share.load)
                if not may_store:
                    self._turns.end(share.load)  # there will be nothing to wait for
                made.append(self._made(share, span, head) if common is None else common.part(span))
            with self._lock:
                for share, span, new in zip(shares, spans, made, strict=True):
                    if not may_store:
                        share.attempt.is_sound = False
                    place = self._place(share, span, head, new)
                    if place is not None:
                        places.append(place)
                        if coming is not None and head.size is not None:
                            self._plan_rest(share, coming.stop)
        finally:
            used = {id(destination) for _, destination in places}
            for new in made:
                if new is not None and id(new) not in used:
                    new.discard()
        if common is not None and len(used) == len(made):  # the socket fills it
            places = [(common.span, common.memory)]
        scatter = Scatter(places)
        if head.size is not None:
            return scatter
        is_in_memory = any(isinstance(destination, MemoryPart) for _, destination in places)
        return Bounded(scatter, self._config.memory_budget if is_in_memory else self._config.max_cache_size)

    def _common(self, shares: list[Share], spans: list[RangeRequest]) -> _Common | None:
        """Memory for short neighbours together, unless too much of it would be for what lies between them."""
        if len(shares) == 1:
            return None
        span = RangeRequest(spans[0].start, spans[-1].stop)
        lengths = [each.stop - each.start for each in spans]
        if sum(lengths) < _DENSE * span.length or not self._cache.is_for_memory(max(lengths)):
            return None
        if any(share.attempt.destination is not None for share in shares):
            return None
        return _Common(span, MemoryPart(span.length, spare=self._config.memory_budget))

    def _made(self, share: Share, span: RangeRequest, head: HeadInfo) -> Destination | None:
        """A place for a load's bytes, None if it has one."""
        load, attempt = share.load, share.attempt
        if attempt.destination is not None:
            return None
        size = None if _is_open_ended(load.request, head) else span.length
        if load.in_memory:
            return self._cache.memory(size, load.request)
        return self._cache.destination(size, head, load.request, attempt.endpoint or 0)

    def _place(
        self, share: Share, span: RangeRequest, head: HeadInfo, made: Destination | None
    ) -> tuple[RangeRequest, Destination] | None:
        """The range of the object that a load wants, and the one place where its bytes go, ``made`` if it had none;
        None if nobody waits. With the lock held."""
        load, attempt, held = share.load, share.attempt, share.load.held
        is_theirs = held is not None and held.endpoint == attempt.endpoint and not attempt.abandoned
        if held is not None and is_theirs and contradicts(head.validator, held.head.validator):
            load.held = None  # replaced, whatever becomes of the new version
        if attempt.destination is not None and attempt.wanted is not None:
            if attempt.is_resumed:
                attempt.head, attempt.is_resumed = head, False
            return attempt.wanted, attempt.destination
        if attempt.destination is None and made is not None and not attempt.abandoned:
            attempt.destination, attempt.is_open_ended = made, _is_open_ended(load.request, head)
            attempt.head, attempt.wanted, attempt.missing = head, span, span.length
        return None if attempt.destination is None else (attempt.wanted or span, attempt.destination)

    def settle(self, share: Share, answer: Answer) -> None:
        """What a piece has brought will not change any more, if others may add to it."""
        attempt, came = share.attempt, answer.byte_range
        wanted, destination = attempt.wanted, attempt.destination
        if came is None or wanted is None or destination is None or attempt.is_open_ended or answer.head.size is None:
            return
        if share.load.is_provable:
            destination.settle(max(came.start, wanted.start) - wanted.start, min(came.stop, wanted.stop) - wanted.start)

    def advance(self, share: Share, answer: Answer) -> bool:
        """Book what a piece brought; True if the load now has everything. With the lock held."""
        load, attempt, came = share.load, share.attempt, answer.byte_range
        if came is None:
            return True
        if answer.unproved:
            attempt.digests |= answer.unproved
        if attempt.wanted is None:  # nothing had to be written: there is nothing where the range begins
            attempt.head, attempt.wanted = answer.head, came
            return True
        if answer.head.size is None or attempt.is_open_ended:
            return self._ends(load, answer.head, came)
        wanted = attempt.wanted
        is_all = came.start <= wanted.start and wanted.stop <= came.stop
        part = wanted.stop - wanted.start if is_all else _overlap(came, wanted)
        if not load.is_provable:
            attempt.head = answer.head
            if not is_all:
                # Nothing proves that the rest would be of the same version: all of it has to come in one answer.
                self._scheduler.extend(load, [attempt.wanted], whole=True)
                return False
        attempt.missing -= part
        if attempt.missing:
            self._plan_rest(share, share.part.plan.stop)
        return attempt.missing == 0

    def _plan_rest(self, share: Share, begin: int) -> None:
        """Have what was not planned yet be asked for, from ``begin`` on. With the lock held."""
        load, attempt = share.load, share.attempt
        begin = max(begin, share.part.plan.stop)
        if attempt.wanted is not None and begin < attempt.wanted.stop and load.is_provable and not share.part.is_stale:
            self._scheduler.extend(load, [RangeRequest(begin, attempt.wanted.stop)], whole=False)

    def _ends(self, load: Load, head: HeadInfo, came: RangeRequest) -> bool:
        """Whether a body ended where the object does, of which no answer, or not the first, had told how long it is.
        With the lock held."""
        size = came.stop if head.size is None else head.size
        if came.stop < size:  # now it comes in parts, which nothing joins: ask for all of it
            load.whole = True
            self.restart(load)
            return False
        attempt, wanted = load.attempt, load.request.byte_range or RangeRequest(0, size)
        attempt.head, attempt.missing = head, 0
        attempt.wanted = RangeRequest(min(wanted.start, size), min(wanted.stop, size))
        return True

    def confirmed(self, load: Load, answer: Answer) -> Whole:
        assert load.held is not None
        data = self._cache.confirm(load.held, answer.head, load.request, asked_at=load.attempt.asked_at)
        if data is None:
            raise Gone("the cached bytes are gone")
        return Whole(data, self._cache.told(load.held), from_cache=True)

    def proven(self, share: Share) -> Proven:
        """A load of which all is there, if that is right. Raises what is wrong with it."""
        load, attempt = share.load, share.attempt
        request, head, wanted = load.request, attempt.head, attempt.wanted
        assert head is not None
        assert wanted is not None
        asked, size = request.byte_range, wanted.stop - wanted.start
        if asked is not None and size < asked.length and not request.allow_short:
            raise HttpError(416, f"the object has {wanted.stop} bytes and ends before the range asked for")
        if attempt.destination is None:
            attempt.destination = self._cache.destination(size, head)
        destination = attempt.destination
        data = destination.view()
        if len(data) > size:  # an earlier go was longer
            destination.truncate(size)
            data = destination.view()
        if len(data) < size:
            raise ObjectChanged(f"the object has {size} bytes now, not {len(data)}")
        if request.expected_size is not None and size != request.expected_size:
            raise ObjectChanged(f"the fragment has {size} bytes, not the {request.expected_size} expected")
        if request.checksum is not None:
            _check(destination, data, request.checksum)
        if asked is None:
            check_digests(data, attempt.digests)
            if head.size is None:
                head = replace(head, size=size)
        return Proven(request, head, wanted, destination, data, attempt.asked_at)

    def kept(self, proven: list[Proven], endpoint: int) -> list[Whole]:
        """Publish what proved right; whatever becomes of that, it is delivered, unless the disk has lost it on the way.
        Raises NetworkError for that."""
        try:
            views = self._cache.keep(proven, endpoint)
        except NetworkError:
            raise
        except Exception:
            _log.exception("keeping what came failed")
            views = [each.data for each in proven]
        return [Whole(data, each.head) for data, each in zip(views, proven, strict=True)]

    def stale(self, load: Load) -> Whole | None:
        """What the cache has of it, where its server fails and has allowed that."""
        held = load.held if any(map(is_failing, load.failures)) else None
        data = self._cache.stale(held, load.request) if held is not None else None
        if data is None or held is None:
            return None
        return Whole(data, held.head, from_cache=True)

    def restart(self, load: Load) -> None:
        """Begin a load anew. With the lock held; the piece that this is about has not left the attempt yet, and tidies
        up when it does."""
        load.attempt.abandon()
        load.attempt = Attempt()
        self._scheduler.restart(load, whole=load.whole)


def _check(destination: Destination, data: memoryview, checksum: str) -> None:
    """Raises ChecksumMismatch unless the bytes have the digest that they should; what is known of it is used."""
    if not checksum.startswith("blake3:"):
        check_checksum(data, checksum)
    elif (actual := f"blake3:{destination.digest()}") != checksum:
        raise ChecksumMismatch(expected=checksum, actual=actual)


def _is_open_ended(request: LoadRequest, head: HeadInfo) -> bool:
    """Whether nobody knows how many bytes will come for a request."""
    return head.size is None and (request.byte_range is None or request.allow_short)


def _span(share: Share, head: HeadInfo) -> RangeRequest:
    """The range of the object that a load wants, if the object is one that it may be of."""
    request = share.load.request
    pinned = request.validator
    if pinned is not None and not pinned.is_strong and contradicts(head.validator, pinned):
        raise ObjectChanged("the object was replaced: it is not the version that was asked for")
    return _wanted(request, head)


def _wanted(request: LoadRequest, head: HeadInfo) -> RangeRequest:
    """The range of the object that a request wants, now that its size is known (or known to be unknown)."""
    wanted, size = request.byte_range, head.size
    if wanted is None:
        return _UNTIL_ITS_END if size is None else RangeRequest(0, size)
    if size is None or wanted.stop <= size:
        return wanted
    if not request.allow_short:
        raise HttpError(416, f"the object has {size} bytes and ends before the range asked for")
    return RangeRequest(min(wanted.start, size), size)


def _overlap(one: RangeRequest, other: RangeRequest) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
