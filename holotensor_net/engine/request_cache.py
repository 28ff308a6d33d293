"""What the cache knows of a request: between requests, which name paths and ranges, and the cache, which knows keys.

A key is the hash of what tells one answer from another: URL, range, and the scope of the credentials, so that two
tenants of one machine never see each other's bytes. A request with a checksum is known by that alone: whoever served
it, it is the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from ..config import CdnEndpoint
from ..errors import CacheError, NetworkError, redact_url, without_query
from ..storage.cache import CacheEntry, FragmentCache, name_of
from ..storage.claims import Claims
from ..storage.freshness import Freshness, State, kept, refreshed
from ..storage.memory import MemoryPart
from ..storage.parts import PartFile
from ..storage.spans import Span, Spans
from ..transport.guards import validator_of
from ..values import HeadInfo, LoadRequest, RangeRequest, Validator

__all__ = ["Destination", "Found", "Proven", "RequestCache", "Resumed", "contradicts"]

_WORTH_RESUMING = 8 << 20
"""Bytes of a fragment from which a journal costs less than to fetch again what had come. A shorter one comes to memory,
if there is enough, and is then written at one go, so that the system keeps it in its largest pages (measured, 300 of
3.4 MiB: 1.2–1.8 s instead of 1.8–2.3, and half the time to touch all of them when they are mapped later)."""

_SHORT = 1 << 18
"""Bytes below which a fragment comes to memory in any case."""

_AT_ONCE = 64
"""Fragments that may be coming, for all of which together there has to be memory: as many as there are connections."""

_log = logging.getLogger("holotensor_net.cache")

_MOST_SIGHTINGS = 4096


class Destination(Protocol):
    """Where the bytes of a fragment go as they come; offsets count from the fragment's start."""

    def write(self, offset: int, data: memoryview, /) -> None: ...
    def settle(self, start: int, stop: int, /) -> None: ...
    def view(self) -> memoryview: ...
    def digest(self) -> str: ...
    def truncate(self, size: int, /) -> None: ...
    def keep(self) -> None: ...
    def discard(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A cached answer to a request. One that is not fresh may be used only if ``endpoint`` confirms its version.
    ``part``: where in its bytes those lie that were asked for, if they are not all of them."""

    key: str
    entry: CacheEntry
    endpoint: int
    is_fresh: bool
    part: RangeRequest | None = None

    @property
    def head(self) -> HeadInfo:
        """What the network said of the object."""
        entry = self.entry
        return HeadInfo(entry.object_size, entry.validator, headers=entry.headers)


class Proven(NamedTuple):
    """A fragment that is all there and right: the bytes ``wanted`` of its object, in its ``destination``.

    ``asked_at``: when the first request for it was sent, from which its age is counted; None: now.
    """

    request: LoadRequest
    head: HeadInfo
    wanted: RangeRequest
    destination: Destination
    data: memoryview
    asked_at: float | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether it is to be kept together with others."""
        return isinstance(self.destination, MemoryPart)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is true of everything that came with one answer: worked out once, however many fragments that is."""

    head: HeadInfo
    entry: CacheEntry  # of a part that nobody asked for
    is_storable: bool


@dataclass(frozen=True, slots=True)
class _Sighting:
    """What a server said last of an object, whichever part of it the answer held."""

    validator: Validator
    headers: Mapping[str, str]
    requested_at: float
    received_at: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """A transfer that was cut off: of the range ``wanted`` its destination lacks ``missing``. What the endpoint said of
    the object is in ``head``; the rest has to be of that version."""

    endpoint: int
    head: HeadInfo
    wanted: RangeRequest
    destination: Destination
    missing: list[RangeRequest]


class RequestCache:
    """A FragmentCache, asked in terms of requests to a loader's endpoints.

    What a server says with one part of an object holds for all parts of that version: one confirmation does for all,
    and once another version was seen, no part of the old one counts as fresh. ``spare``: bytes of memory that
    fragments may take while they come, and that may be kept for later ones. Thread-safe; the lock guards the sightings
    and the spans.
    """

    def __init__(
        self,
        cache: FragmentCache,
        endpoints: Sequence[CdnEndpoint],
        *,
        user_agent: str = "",
        spare: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cache = cache
        self._heuristic = cache.config.heuristic_freshness
        self._spare = spare
        self._most_in_memory = max(_SHORT, min(_WORTH_RESUMING, spare // _AT_ONCE))
        self._endpoints = endpoints
        self._user_agent = user_agent
        scopes = [endpoint.scope for endpoint in endpoints]
        place = functools.lru_cache(256)(lambda index, path: (endpoints[index].url_of(path), scopes[index]))
        self._place = place
        self._claimed = functools.lru_cache(256)(lambda path, *cut: name_of(f"{place(0, path)} {cut}"))
        self._redacted = functools.lru_cache(256)(redact_url)
        self._clock = clock
        self._here = threading.local()  # each thread's last answer: it has others' fragments to keep
        self._sightings: dict[str, _Sighting] = {}
        # Of what memory alone holds; on a disk each range has an entry of its own, which processes share.
        self._spans = Spans(lambda key: cache.find(key, unseen=True) is not None) if cache.claims is None else None
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._clock()

    @property
    def claims(self) -> Claims | None:
        """Who of several processes is at what; None where nothing is shared."""
        return self._cache.claims

    def name(self, request: LoadRequest) -> str:
        """What processes that share a cache call the answer to a request: 64 hex digits."""
        return name_of(self.key(request, 0))

    def claim(self, request: LoadRequest) -> tuple[str, int]:
        """Which number of which name they claim: one for each range, since no other would serve; those of neighbours of
        one length follow each other."""
        wanted = request.byte_range
        if wanted is None:
            return self.name(request), 0
        number, rest = divmod(wanted.start, wanted.length or 1)
        return self._claimed(request.path, wanted.length, rest), number

    def has_appeared(self, name: str) -> bool:
        """Whether an answer of that name may be in the cache."""
        return self._cache.has_appeared(name)

    def key(self, request: LoadRequest, endpoint: int) -> str:
        """The cache's key for the answer of one endpoint to a request."""
        if request.checksum is not None:
            return f"digest\n{request.checksum}"
        wanted = request.byte_range
        if wanted is None:
            return self._whole(endpoint, request.path)
        url, scope = self._place(endpoint, request.path)
        return f"url\n{url}\n{wanted.start}-{wanted.stop}\n{scope}"

    def _whole(self, endpoint: int, path: str) -> str:
        url, scope = self._place(endpoint, path)
        return f"url\n{url}\nwhole\n{scope}"

    def _object(self, path: str, endpoint: int) -> str:
        return "\n".join(self._place(endpoint, path))

    def find(self, request: LoadRequest, *, unseen: bool = False) -> Found | None:
        """The best cached answer: a fresh one of any endpoint, else a stale one that its endpoint may confirm.

        ``unseen``: without a look whether its bytes are there, for whoever asks for :meth:`data` next."""
        stale: Found | None = None
        for index in range(len(self._endpoints)):
            for key, part in self._places(request, index):
                entry = self._cache.find(key, unseen=unseen)
                if entry is None or not _fits(request, entry, entry.size if part is None else part.length):
                    continue
                if part is not None and part.stop > entry.size:  # the object has become shorter since
                    continue
                varies_on = entry.freshness.varies_on if "vary" in entry.headers else ()
                if request.checksum is None and entry.variant != self._variant(index, varies_on):
                    continue
                if request.checksum is not None or _is_pinned(request, entry) or self._is_fresh(request, index, entry):
                    return Found(key, entry, index, is_fresh=True, part=part)
                if stale is None and not (unseen and self._cache.find(key) is None):
                    stale = Found(key, entry, index, is_fresh=False, part=part)
        return stale

    def _places(self, request: LoadRequest, endpoint: int) -> Iterator[tuple[str, RangeRequest | None]]:
        """The keys under which an answer may be, and which part of that it is."""
        yield self.key(request, endpoint), None
        wanted = request.byte_range
        if self._spans is None or wanted is None or request.checksum is not None or request.allow_short:
            return
        with self._lock:
            span = self._spans.covering(self._object(request.path, endpoint), wanted)
        if span is not None and span[:2] != (wanted.start, wanted.stop):
            yield span.key, RangeRequest(wanted.start - span.start, wanted.stop - span.start)

    def knows_nothing_of(self, requests: Sequence[LoadRequest]) -> bool:
        """Whether memory alone holds what is known, and nothing of an object where these requests lie in a row."""
        path, first, last = requests[0].path, requests[0].byte_range, requests[-1].byte_range
        if self._spans is None or first is None or last is None:
            return False
        try:
            names = [self._object(path, endpoint) for endpoint in range(len(self._endpoints))]
        except NetworkError:  # a path that cannot be asked for
            return False
        with self._lock:
            is_known = any(self._spans.has_any(name, first.start, last.stop) for name in names)
        return not is_known and not self.may_have_whole(path)

    def may_have_whole(self, path: str) -> bool:
        """Whether there is a cached answer of any endpoint that holds all of the object."""
        return any(
            self._cache.find(self._whole(index, path), unseen=True) is not None for index in range(len(self._endpoints))
        )

    def _is_fresh(self, request: LoadRequest, endpoint: int, entry: CacheEntry) -> bool:
        """Whether an answer may be used unasked."""
        freshness = self._freshness(request, endpoint, entry)
        return freshness is not None and freshness.state(self._clock(), self._heuristic) is State.FRESH

    def _freshness(self, request: LoadRequest, endpoint: int, entry: CacheEntry) -> Freshness | None:
        """What its server said of an answer with it, or later with another part; None if it has another version."""
        freshness = entry.freshness
        latest = self._sightings.get(self._object(request.path, endpoint))
        if latest is not None and latest.received_at >= freshness.response_time:
            if _same(latest.validator, entry.validator):
                merged = refreshed(freshness.headers, latest.headers)
                return Freshness(merged, latest.requested_at, latest.received_at)
            if contradicts(latest.validator, entry.validator):
                return None
        return freshness

    def _saw(self, request: LoadRequest, endpoint: int, validator: Validator, head: HeadInfo, asked_at: float) -> None:
        name = self._object(request.path, endpoint)
        latest = self._sightings.get(name)
        if latest is not None and latest.headers is head.headers:
            return  # with another part of the same answer
        with self._lock:
            self._sightings.pop(name, None)
            self._sightings[name] = _Sighting(validator, head.headers, asked_at, self._clock())
            if len(self._sightings) > _MOST_SIGHTINGS:
                del self._sightings[next(iter(self._sightings))]

    def came_since(self, found: Found, moment: float) -> bool:
        """Whether somebody was given a cached answer after ``moment``, in seconds since the epoch, and it may stand for
        an answer to all who were asking then, even if it is stale by now (RFC 9111 §4). One that is yet to come is
        from before the clock was set back."""
        freshness = found.entry.freshness
        return moment < freshness.response_time <= self._clock() and not freshness.forbids_stale

    def data(self, found: Found) -> memoryview | None:
        """The bytes of a cached answer; None if they are gone or damaged."""
        data, part = self._cache.get(found.key, found.entry), found.part
        return data if data is None or part is None else data[part.start : part.stop]

    def confirm(
        self, found: Found, head: HeadInfo, request: LoadRequest | None = None, *, asked_at: float | None = None
    ) -> memoryview | None:
        """The bytes of a stale answer whose endpoint has just said that they still hold (304); None if they are gone,
        or others came meanwhile, or the endpoint spoke of others. With the ``request``, it holds for other parts of the
        object too."""
        data = self.data(found)
        if not self._cache.revalidated(found.key, head.headers, requested_at=asked_at, known=found.entry):
            return None
        if request is not None:
            self._saw(
                request, found.endpoint, found.entry.validator, head, self.now() if asked_at is None else asked_at
            )
        return data

    def stale(self, found: Found, request: LoadRequest) -> memoryview | None:
        """The bytes of a stale answer whose endpoint fails, if it has allowed that (RFC 5861 §4) and has not shown
        another version since."""
        freshness = self._freshness(request, found.endpoint, found.entry)
        is_allowed = freshness is not None and freshness.may_serve_stale(self._clock())
        return self.data(found) if is_allowed else None

    def told(self, found: Found) -> HeadInfo:
        """What the network said of a cached answer, latest confirmation included."""
        entry = self._cache.find(found.key)
        if entry is None or entry.version != found.entry.version:
            return found.head
        return replace(found, entry=entry).head

    def is_for_memory(self, size: int | None) -> bool:
        """Whether a fragment is too short to be worth a file while it comes."""
        return size is not None and size < self._most_in_memory

    def destination(
        self, size: int | None, head: HeadInfo, request: LoadRequest | None = None, endpoint: int = 0
    ) -> Destination:
        """A place for a fragment: a part file, or memory where the disk has none, the server forbids to store, or it is
        too small to be worth one. With the ``request`` that it is for, a long one can be resumed."""
        if not self.is_for_memory(size) and "no-store" not in head.headers.get("cache-control", "").lower():
            key = note = None
            is_provable = request is not None and (request.checksum is not None or head.validator.is_strong)
            if request is not None and is_provable and (size or 0) >= _WORTH_RESUMING:
                key, note = self.key(request, endpoint), _note(head, request)
            try:
                part = self._cache.create(size, key=key, note=note)
            except CacheError as error:
                _log.info("kept in memory: %s", error)  # the cache will warn, once, when it is to keep the bytes
            else:
                if part is not None:
                    return part
        return self.memory(size, request)

    def memory(self, size: int | None, request: LoadRequest | None) -> MemoryPart:
        """A place for a fragment in memory."""
        is_proved = request is not None and _blake3_in(request.checksum) is not None
        return MemoryPart(size, spare=self._spare, is_proved=is_proved)

    def has_part(self, request: LoadRequest) -> bool:
        """Whether there may be something to resume. That is looked for only if the request may be a long one."""
        size = request.expected_size if request.byte_range is None else request.byte_range.length
        return (size is None or size >= _WORTH_RESUMING) and any(
            self._cache.has_part(self.key(request, endpoint)) for endpoint in self._keyed(request)
        )

    def resume(self, request: LoadRequest, held: Found | None = None) -> Resumed | None:
        """What has come of a transfer that was cut off, if it is of a version that the request allows, and not of the
        one that is ``held``: of that, all is there."""
        for endpoint in self._keyed(request):
            found = self._cache.resume(self.key(request, endpoint))
            if found is None:
                continue
            part, note = found
            resumed = _resumed(request, endpoint, part, note)
            if resumed is not None and not (held and _same(held.entry.validator, resumed.head.validator)):
                return resumed
            part.discard()
        return None

    def _keyed(self, request: LoadRequest) -> range:
        """The endpoints whose answers have keys of their own."""
        return range(len(self._endpoints) if request.checksum is None else 1)

    def keep(self, proven: Sequence[Proven], endpoint: int) -> list[memoryview]:
        """Publish complete fragments, and give their bytes; a cache that fails costs the entries, never the bytes."""
        views = [each.data for each in proven]
        places: list[int] = []
        taken: list[tuple[str, memoryview, CacheEntry]] = []
        now, path, answer = self.now(), "", None
        for place, each in enumerate(proven):
            request, destination = each.request, each.destination
            if answer is None or answer.head is not each.head or path != request.path:
                answer, path = self._told_by(request, endpoint, each.head, each.asked_at), request.path
            if not answer.is_storable and not isinstance(destination, PartFile):
                continue
            name, digest = without_query(request.fragment_id), _blake3_in(request.checksum)
            entry = answer.entry.of(name, each.wanted.length, request.byte_range, digest, each.asked_at, now)
            if isinstance(destination, PartFile):
                with self._unkept():
                    views[place] = self._cache.adopt(self.key(request, endpoint), destination, entry)
            else:
                places.append(place)
                taken.append((self.key(request, endpoint), each.data, entry))
        with self._unkept():
            for place, data in zip(places, self._cache.take_all(taken), strict=True):
                views[place] = data
            self._note_spans([proven[place] for place in places], [key for key, _, _ in taken], endpoint)
        return views

    def _note_spans(self, proven: Sequence[Proven], keys: Sequence[str], endpoint: int) -> None:
        """These are in memory, so that parts of them are found too."""
        if self._spans is None:
            return
        with self._lock:
            for each, key in zip(proven, keys, strict=True):
                wanted = each.request.byte_range
                if wanted is not None and each.request.checksum is None and wanted == each.wanted:
                    self._spans.add(self._object(each.request.path, endpoint), Span(wanted.start, wanted.stop, key))

    @contextlib.contextmanager
    def _unkept(self) -> Iterator[None]:
        try:
            yield
        except CacheError as error:
            _log.warning("not cached: %s", error)

    def _told_by(self, request: LoadRequest, endpoint: int, head: HeadInfo, asked_at: float | None) -> _Answer:
        path = request.path
        known: tuple[str, int, _Answer] | None = getattr(self._here, "answer", None)
        if known is not None and known[2].head is head and known[:2] == (path, endpoint):
            return known[2]
        self._saw(request, endpoint, head.validator, head, self.now() if asked_at is None else asked_at)
        if known is not None and known[:2] == (path, endpoint) and _says_the_same(known[2].head, head):
            answer = _Answer(head, known[2].entry.told(kept(head.headers)), known[2].is_storable)
            self._here.answer = path, endpoint, answer
            return answer
        freshness = Freshness(head.headers)
        url = self._redacted(self._place(endpoint, path)[0])
        variant = self._variant(endpoint, freshness.varies_on)
        entry = CacheEntry(
            fragment_id="",
            size=0,
            etag=head.etag,
            last_modified=head.last_modified,
            url=url,
            object_size=head.size,
            validator_is_strong=head.validator.is_strong,
            headers=freshness.headers,
            variant=variant,
        )
        answer = _Answer(head, entry, freshness.is_storable)
        self._here.answer = path, endpoint, answer
        return answer

    def _variant(self, endpoint: int, names: Collection[str]) -> str | None:
        """A digest of what the requests to an endpoint say in these headers, None if there are none (RFC 9111 §4.1).

        Credentials count as their scope, which may outlive a token; ranges are part of the key.
        """
        if not names:
            return None
        where = self._endpoints[endpoint]
        own = {name.lower(): str(value).strip(" \t") for name, value in where.headers.items()}
        sent = {"accept-encoding": "identity", "user-agent": self._user_agent, **own, "authorization": where.scope}
        lines = (f"{name}: {sent[name]}" for name in sorted(names) if name in sent)
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _says_the_same(one: HeadInfo, other: HeadInfo) -> bool:
    """Whether two answers say the same of their object, and of how long and for whom they are good."""
    said, says = one.headers, other.headers
    is_same = one.size == other.size and said.get("cache-control") == says.get("cache-control")
    return is_same and said.get("vary") == says.get("vary") and one.validator == other.validator


def _blake3_in(checksum: str | None) -> str | None:
    """The BLAKE3 digest that a verified fragment has, if that is the one that it was verified by."""
    return checksum.removeprefix("blake3:") if checksum is not None and checksum.startswith("blake3:") else None


def _note(head: HeadInfo, request: LoadRequest) -> dict[str, Any]:
    """What has to be known of a part file to go on with it."""
    span, validator = request.byte_range, head.validator
    return {
        "etag": validator.etag,
        "last_modified": validator.last_modified,
        "is_strong": validator.is_strong,
        "object_size": head.size,
        "byte_range": None if span is None else [span.start, span.stop],
    }


def _resumed(request: LoadRequest, endpoint: int, part: PartFile, note: Mapping[str, Any]) -> Resumed | None:
    """A part file as the beginning of an answer to a request; None if it can be none."""
    try:
        validator, size, span = _validator_in(note), note["object_size"], note["byte_range"]
    except (LookupError, TypeError, ValueError):
        return None
    if type(size) is not int or size < 0:
        return None
    pinned, wanted = request.validator, request.byte_range or RangeRequest(0, size)
    is_same = pinned is None or (_same(pinned, validator) if pinned.is_strong else not contradicts(validator, pinned))
    is_provable = validator.is_strong or request.checksum is not None
    if not (is_same and is_provable) or (span is None) != (request.byte_range is None) or part.size != wanted.length:
        return None
    if span is not None and (span != [wanted.start, wanted.stop] or size < wanted.stop):
        return None
    missing, position = [], 0
    for start, stop in [*part.settled, (wanted.length, wanted.length)]:
        if position < start:
            missing.append(RangeRequest(wanted.start + position, wanted.start + start))
        position = stop
    return Resumed(endpoint, HeadInfo(size, validator), wanted, part, missing) if missing else None


def _validator_in(note: Mapping[str, Any]) -> Validator:
    """The validator in a note. Raises LookupError, TypeError or ValueError for what no answer can have had."""
    validator = Validator(note["etag"], note["last_modified"], note["is_strong"])
    told = {"etag": validator.etag, "last-modified": validator.last_modified}
    if not {type(value) for value in told.values()} <= {str, type(None)} or type(validator.is_strong) is not bool:
        raise TypeError("no validator")
    said = validator_of({name: value for name, value in told.items() if value is not None})
    if said.etag is None and said:  # whether a date is a strong one was to be seen when the answer came
        said = replace(said, is_strong=validator.is_strong)
    if said != validator:
        raise ValueError("no validator")
    return validator


def _fits(request: LoadRequest, entry: CacheEntry, size: int) -> bool:
    """Whether ``size`` bytes of a cached answer can be one to this request at all."""
    if request.expected_size is not None and size != request.expected_size:
        return False
    wanted, pinned = request.byte_range, request.validator
    if wanted is not None and size != wanted.length and not request.allow_short:
        return False
    if pinned is None or request.checksum is not None:
        return True
    return _same(pinned, entry.validator) if pinned.is_strong else not contradicts(entry.validator, pinned)


def _is_pinned(request: LoadRequest, entry: CacheEntry) -> bool:
    """Whether the request names the very version that is cached: then there is nothing to ask."""
    pinned = request.validator
    return pinned is not None and pinned.is_strong and _same(pinned, entry.validator)


def contradicts(said: Validator, pinned: Validator) -> bool:
    """Whether an answer is surely of another version than the one pinned, be the validators weak."""
    if said.etag is not None and pinned.etag is not None:
        return said.etag.removeprefix("W/") != pinned.etag.removeprefix("W/")
    return None not in (said.last_modified, pinned.last_modified) and said.last_modified != pinned.last_modified


def _same(one: Validator, other: Validator) -> bool:
    """Whether two validators surely are of one version: an entity tag alone tells, where there is one."""
    if not (one.is_strong and other.is_strong) or one.etag != other.etag:
        return False
    return one.etag is not None or one.last_modified == other.last_modified
