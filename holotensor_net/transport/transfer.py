"""One transfer: how far it has come, what to ask for next, and what an answer means for it. No I/O.

A transfer resumes where its counted bytes end, as long as a strong validator proves that the object is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import ChecksumMismatch, HttpError, ObjectChanged, ProtocolError, RangeNotSupported
from ..values import HeadInfo, RangeRequest, Validator
from . import guards
from .digests import LINKED, NAMES, Claim, Digest, announced, linked

__all__ = ["Answer", "Ask", "OpenSink", "Room", "Transfer", "Write"]

Write: TypeAlias = Callable[[int, memoryview], None]
"""Takes bytes at an absolute offset of the object."""


Room: TypeAlias = Callable[[int, int], memoryview | None]
"""What a ``Write`` with memory for its bytes has as ``room``: where those from an offset on belong, so many at most,
for a socket to fill; None if they have to be written there. It may have a ``block`` too: how many of those it wants to
be given at once."""

OpenSink: TypeAlias = Callable[[HeadInfo, RangeRequest | None], Write]
"""Called once, when an answer has passed the guards: what it told, and which bytes come (None: an unknown number from
0)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What to transfer: a range of an object, or all of it in one plain GET (``byte_range`` None).

    ``size``: the object's, where a plan knows it. ``pinned``: the version that it must be of. ``held``: the version
    that the caller has already; a 304 then ends the transfer. ``allow_short``: the object may end first.
    ``or_whole``: the caller wants the whole object in the end, so an answer that holds all of it is welcome.
    """

    path: str
    byte_range: RangeRequest | None = None
    size: int | None = None
    pinned: Validator | None = None
    held: Validator | None = None
    allow_short: bool = False
    or_whole: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """How a transfer ended: what was told of the object, which bytes came (None with a 304), in how many requests: all
    that were sent for it, those that failed, redirects, and repeats with a fresh credential included.

    ``unproved``: digests of the whole object, as it is stored, that were announced and not held against the bytes, as
    not all of them came, or not in order.
    """

    head: HeadInfo
    byte_range: RangeRequest | None
    not_modified: bool
    requests: int
    unproved: frozenset[Digest] = frozenset()


@dataclass(slots=True)
class Transfer:
    """How far one transfer has come: bytes up to ``position`` are written, ``ahead`` more are in the client's buffer.
    ``version`` is a strong validator; ``claims`` are what the answers said of the bytes that are under way."""

    ask: Ask
    position: int
    stop: int | None
    version: Validator | None
    size: int | None
    head: HeadInfo | None = None
    write: Write | None = None
    ahead: int = 0
    requests: int = 0
    done: bool = False
    not_modified: bool = False
    claims: list[Claim] = field(default_factory=list)
    unproved: frozenset[Digest] = frozenset()

    @classmethod
    def of(cls, ask: Ask) -> Transfer:
        """One of which nothing has come."""
        known = ask.pinned if ask.pinned is not None and ask.pinned.is_strong else None
        wanted = ask.byte_range
        return cls(ask, wanted.start if wanted else 0, wanted.stop if wanted else ask.size, known, ask.size)

    def count(self) -> None:
        """A request is sent for it."""
        self.requests += 1

    @property
    def start(self) -> int:
        return self.ask.byte_range.start if self.ask.byte_range is not None else 0

    def missing(self) -> RangeRequest | None:
        """The range to ask for next, None for a plain GET: of an object that is empty, there is no range."""
        wanted, stop = self.ask.byte_range, self.stop
        if wanted is None or stop is None or stop == self.position:
            return None
        is_all = wanted.start == self.position and wanted.stop == stop
        return wanted if is_all else RangeRequest(self.position, stop)

    def held(self) -> Validator | None:
        """The validator to offer with the next request, None where a 304 would be no answer."""
        may_be_confirmed = self.version is None and self.head is None
        return self.ask.held if self.ask.held and may_be_confirmed else None

    def resume(self) -> None:
        """Go on where the bytes end, or begin anew."""
        if self.version is None or self.position == self.stop:
            # Nothing proves that what follows belongs to what came; or all came, and its end was wrong.
            self._rewind(self.start)
            self.unproved = frozenset()

    def _rewind(self, position: int) -> None:
        self.position = position
        self.claims.clear()

    def conditions(self) -> dict[str, str]:
        """The conditional and Range headers of the next request."""
        headers: dict[str, str] = {}
        wanted = self.missing()
        if wanted is not None:
            headers["Range"] = wanted.header_value
        version, held = self.version, self.held()
        if version is not None:
            name, value = ("If-Match", version.etag) if version.etag else ("If-Unmodified-Since", version.last_modified)
            headers[name] = value or ""
        elif held is not None:
            name, value = ("If-None-Match", held.etag) if held.etag else ("If-Modified-Since", held.last_modified)
            headers[name] = value or ""
        return headers

    def expect(self, headers: Mapping[str, str], length: int | None) -> None:
        """Hold the body that is to come, ``length`` bytes if that is known, against the digests that its head names."""
        if NAMES.isdisjoint(headers):
            return
        stop = None if length is None else self.position + length
        if own := announced(headers.get("content-digest")):
            self.claims.append(Claim(self.position, stop, own))
        stored = linked(headers.get(LINKED))
        whole = announced(headers.get("repr-digest"))  # of the bytes as they come, compressed or not (RFC 9530 §3)
        if not guards.is_encoded(headers):
            whole, stored = whole | stored, frozenset()
        whole -= {digest for claim in self.claims for digest in whole if claim.start == 0 and digest in claim}
        if whole and self.position == 0 and (self.ask.byte_range is None or self.stop == self.size):
            self.claims.append(Claim(0, self.stop, whole))
            whole = frozenset()
        self.unproved |= whole | stored

    def room(self, most: int) -> memoryview | None:
        """The memory where the next bytes belong, ``most`` of them at most; None if they have to be written there."""
        room: Room | None = getattr(self.write, "room", None)
        return None if room is None or self.ahead else room(self.position, most)

    def block(self, most: int) -> int:
        """How many of the next bytes, of ``most``, are best written at once."""
        block: Callable[[int, int], int] | None = getattr(self.write, "block", None)
        return most if block is None else block(self.position, most)

    def advance(self, block: memoryview, *, is_in_place: bool = False) -> None:
        """The next bytes: to their place, unless they are there. Raises ChecksumMismatch if they complete what has
        another digest."""
        assert self.write is not None
        if not is_in_place:
            self.write(self.position, block)
        self.position += len(block)
        for claim in self.claims:
            claim.feed(block)
        self._settle(lambda claim: claim.stop == self.position)

    def end(self, *, is_all: bool) -> None:
        """A body is there to its end. ``is_all``: of an object that nobody knew the length of."""
        if is_all:
            self.stop = self.position
        self._settle(lambda claim: claim.stop is None or claim.stop == self.position)
        self.done = self.stop is None or self.position >= self.stop

    def _settle(self, is_due: Callable[[Claim], bool]) -> None:
        """Check what can be. What is wrong is not kept, nor what came under the same promise before it."""
        if not self.claims:
            return
        due = [claim for claim in self.claims if is_due(claim)]
        try:
            for claim in due:
                claim.check()
        except ChecksumMismatch:
            self._rewind(min(claim.start for claim in self.claims))
            raise
        self.claims = [claim for claim in self.claims if claim not in due]

    def judge(self, status: int, headers: Mapping[str, str], now: float, *, compressed: bool) -> int | None:
        """Pass an answer through the guards: how many bytes of its body belong to us, None for all, however many.

        Sets ``done`` where no body is to be read.
        """
        length: int | None
        if status == 206:
            length = self._judge_part(headers)
        elif status == 200:
            length = self._judge_whole(headers, compressed)
        elif status == 304:
            self._judge_not_modified(headers)
            return 0
        elif status == 412 and self.version is not None:
            raise ObjectChanged("the object was replaced: it is no longer the version that was begun")
        elif status == 416 and self.missing() is not None:
            self._judge_unsatisfied(headers)
            return 0
        else:
            raise guards.error_of_status(status, headers, now)
        assert self.head is not None
        if self.version is not None:
            guards.check_same_version(self.version, self.head.validator)
        elif self.head.validator.is_strong:
            self.version = self.head.validator
        return length

    def _judge_part(self, headers: Mapping[str, str]) -> int:
        wanted = self.missing()
        said = guards.content_range(headers)
        if wanted is None:
            raise ProtocolError("a part was sent where the whole was asked for")
        guards.check_content_range(said, wanted, self.size)
        guards.check_framing(headers, said.byte_range.length)
        guards.check_encoding(headers)
        self.size = said.total if said.total is not None else self.size
        self.head = guards.head_info(headers, self.size, ranges=True)
        self._end_at(self.size)
        return said.byte_range.length

    def _judge_whole(self, headers: Mapping[str, str], compressed: bool) -> int | None:
        length = guards.content_length(headers)
        if not compressed:
            guards.check_encoding(headers)
        guards.check_framing(headers, length)
        if self.ask.byte_range is not None:
            fits = length is not None and self.stop is not None and length <= self.stop
            if self.start != 0 or not (fits or self.ask.or_whole):
                raise RangeNotSupported(
                    "the server answered a range with the whole object; set supports_range=False on its CdnEndpoint to"
                    " download whole objects from it"
                )
        if length is None and "transfer-encoding" not in headers and self.size is None:
            raise ProtocolError("the server did not say how long the body is, so its end cannot be told from a cut")
        if length is not None and self.size is not None and length != self.size and not compressed:
            raise ObjectChanged(f"the object has {length} bytes now, not {self.size}")
        self._rewind(0)
        if length is not None and not compressed:
            self.size = length
        self.head = guards.head_info(headers, length, ranges=False)
        if self.ask.byte_range is not None and self.ask.or_whole:
            self.stop = length
        else:
            self._end_at(length)
        return length if length is not None else self.size

    def _judge_not_modified(self, headers: Mapping[str, str]) -> None:
        held, said = self.held(), guards.validator_of(headers)
        if held is None:
            raise ProtocolError("the server answered 304 to a question that nobody asked")
        if (
            said.etag is not None
            and held.etag is not None
            and said.etag.removeprefix("W/") != held.etag.removeprefix("W/")
        ):
            raise ProtocolError("the server answered 304 for another version than ours")
        self.head = guards.head_info(headers, self.size, ranges=True)
        self.done = self.not_modified = True

    def _judge_unsatisfied(self, headers: Mapping[str, str]) -> None:
        """A 416 is an answer only where nothing was left to send: an empty object, or one that ends where we begin."""
        size = guards.unsatisfied_size(headers)
        if size is not None and self.size is not None and size != self.size:
            raise ObjectChanged(f"the object has {size} bytes now, not {self.size}")
        may_end = self.ask.allow_short or (self.ask.or_whole and size == 0)
        if size is None or size > self.position or not may_end:
            told = "" if size is None else f": it says that the object has {size} bytes"
            raise HttpError(416, f"the server refuses the range{told}")
        self.head = guards.head_info(headers, size, ranges=True)
        self.stop = self.position
        self.done = True

    def _end_at(self, size: int | None) -> None:
        """Take note that the object ends before the range asked for does, where the caller allows that."""
        if size is None or self.stop is None or size >= self.stop:
            return
        if not (self.ask.allow_short or self.ask.or_whole):
            raise HttpError(416, f"the object has {size} bytes and ends before the range asked for")
        self.stop = size
