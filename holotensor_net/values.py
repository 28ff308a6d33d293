"""Frozen values that travel between the rooms: what is asked for, and what came back.

Byte ranges are half-open ``[start, stop)`` here and inclusive on the wire only (RFC 9110 §14.1.2).
"""

from __future__ import annotations

import enum
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias, TypeVar

from .errors import ConfigurationError, NetworkError, without_query

__all__ = [
    "HeadInfo",
    "LoadFailure",
    "LoadRequest",
    "LoadResult",
    "LoadSuccess",
    "Priority",
    "RangeRequest",
    "Result",
    "Validator",
    "blake3_hasher",
    "blake3_of",
    "fragment_id_of",
    "level_of",
    "must_be",
]

T = TypeVar("T")

_CHECKSUM = re.compile(r"(blake3|sha256):[0-9a-f]{64}")
_THREADS_PAY_FROM = 1 << 20

# The threads of BLAKE3 do not survive a fork, and the child would wait for them for ever.
_BORN_IN = os.getpid()


class Priority(enum.IntEnum):
    """Levels of urgency. A lower number goes first, and importance never crosses a level."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3
    IDLE = 4


def level_of(priority: Priority) -> Priority:
    """The level that is meant, be it by its number. Raises ConfigurationError."""
    try:
        return Priority(priority)
    except ValueError:
        raise ConfigurationError(f"priority must be a Priority, not {priority!r}") from None


def must_be(name: str, value: object, *kinds: type) -> None:
    """Raises ConfigurationError for an argument that is of none of these kinds; its value may be secret."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigurationError(f"{name} must be {wanted}, not {type(value).__name__}")


@dataclass(frozen=True, slots=True, order=True)
class RangeRequest:
    """Bytes ``start`` up to, not including, ``stop`` of one object.

    An empty range is a legal value, which HTTP cannot ask for: its ``header_value`` raises ValueError.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        start, stop = self.start, self.stop
        if type(start) is int and type(stop) is int and 0 <= start <= stop:  # what follows takes longer than all else
            return
        try:
            sound = 0 <= operator.index(start) <= operator.index(stop)
        except TypeError:
            sound = False
        if not sound:
            raise ConfigurationError(
                f"RangeRequest needs whole numbers 0 <= start <= stop, not start={self.start!r}, stop={self.stop!r}"
            )

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def header_value(self) -> str:
        """The value of a ``Range`` header, e.g. ``bytes=0-1023``."""
        if self.start == self.stop:
            raise ValueError("an empty range cannot be asked for over HTTP")
        return f"bytes={self.start}-{self.stop - 1}"


@dataclass(frozen=True, slots=True)
class Validator:
    """What tells one version of an object from another: an entity tag, or a modification date.

    ``is_strong`` is decided once, by whoever saw the answer (RFC 9110 §8.8.2.2: a date counts as strong only when
    the answer was made at least a second later).
    """

    etag: str | None = None
    last_modified: str | None = None
    is_strong: bool = False

    def __bool__(self) -> bool:
        return self.etag is not None or self.last_modified is not None


@dataclass(frozen=True, slots=True)
class HeadInfo:
    """What a server said of an object without sending it. Sizes in bytes; header names in lower case."""

    size: int | None
    validator: Validator = field(default_factory=Validator)
    accepts_ranges: bool = False
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def etag(self) -> str | None:
        return self.validator.etag

    @property
    def last_modified(self) -> str | None:
        return self.validator.last_modified


class _Discreet:
    """Shows itself without the queries of its names and paths."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        told = (f"{name}={(without_query(v) if isinstance(v, str) else v)!r}" for name, v in shown.items())
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, slots=True, repr=False, init=False)
class LoadRequest(_Discreet):
    """One fragment to load.

    ``path`` is relative to the endpoint's URL. ``importance`` in [0, 1] orders fragments within a level.
    ``expected_size`` in bytes: any other size is an error. ``byte_range``: the part of the object that the fragment is;
    None for all of it. ``checksum``: ``blake3:…`` or ``sha256:…``, 64 hex digits. ``deadline``: seconds from when it
    is queued.
    ``validator``: the version of the object that it must be a part of; ObjectChanged otherwise. ``allow_short``: the
    object may end before the range does; what there is is delivered.

    Raises ConfigurationError, naming field and value.
    """

    fragment_id: str
    path: str
    _: KW_ONLY
    priority: Priority = Priority.NORMAL
    importance: float = 0.5
    expected_size: int | None = None
    byte_range: RangeRequest | None = None
    checksum: str | None = None
    deadline: float | None = None
    validator: Validator | None = None
    allow_short: bool = False

    def __init__(
        self,
        fragment_id: str,
        path: str,
        *,
        priority: Priority = Priority.NORMAL,
        importance: float = 0.5,
        expected_size: int | None = None,
        byte_range: RangeRequest | tuple[int, int] | None = None,
        checksum: str | None = None,
        deadline: float | None = None,
        validator: Validator | None = None,
        allow_short: bool = False,
    ) -> None:
        if type(byte_range) is tuple and len(byte_range) == 2:
            byte_range = RangeRequest(byte_range[0], byte_range[1])
        # Each slot by itself, which takes half the time that the constructor of a frozen dataclass does.
        _set_fragment_id(self, fragment_id)
        _set_path(self, path)
        _set_priority(self, priority)
        _set_importance(self, importance)
        _set_expected_size(self, expected_size)
        _set_byte_range(self, byte_range)
        _set_checksum(self, checksum)
        _set_deadline(self, deadline)
        _set_validator(self, validator)
        _set_allow_short(self, allow_short)
        is_plain = (  # a glance: to look closer takes several times as long
            type(fragment_id) is str
            and type(path) is str
            and path != ""
            and type(priority) is Priority
            and type(importance) is float
            and 0.0 <= importance <= 1.0
            and (byte_range is None or type(byte_range) is RangeRequest)
            and expected_size is None
            and checksum is None
            and deadline is None
            and validator is None
        )
        if not is_plain:
            self.__post_init__()

    def __post_init__(self) -> None:  # under this name, classes that are derived from it look too
        if not isinstance(self.fragment_id, str):
            self._refuse("fragment_id", "a string")
        if not isinstance(self.path, str) or not self.path:
            self._refuse("path", "a string that is not empty")
        if type(self.priority) is not Priority:
            try:
                object.__setattr__(self, "priority", Priority(self.priority))
            except ValueError:
                self._refuse("priority", "a Priority")
        if not (isinstance(self.importance, (float, Real)) and 0.0 <= self.importance <= 1.0):
            self._refuse("importance", "a number from 0 to 1")
        size = self.expected_size
        if size is not None and not (isinstance(size, (int, Integral)) and size >= 0):
            self._refuse("expected_size", "a number of bytes, or None")
        wanted = self.byte_range
        if isinstance(wanted, tuple) and len(wanted) == 2:
            object.__setattr__(self, "byte_range", RangeRequest(*wanted))
        elif wanted is not None and not isinstance(wanted, RangeRequest):
            self._refuse("byte_range", "a RangeRequest, a pair of numbers, or None")
        if self.checksum is not None and not (isinstance(self.checksum, str) and _CHECKSUM.fullmatch(self.checksum)):
            self._refuse("checksum", "'blake3:' or 'sha256:' and 64 lower-case hex digits")
        if self.deadline is not None and not (isinstance(self.deadline, Real) and self.deadline > 0):
            self._refuse("deadline", "a number of seconds above 0, or None")
        if self.validator is not None and not isinstance(self.validator, Validator):
            self._refuse("validator", "a Validator, or None")

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise ConfigurationError(f"LoadRequest.{name} must be {wanted}, not {getattr(self, name)!r}")


def _setters(kind: type) -> list[Callable[[object, object], None]]:
    """What sets the slots of a dataclass, frozen or not, in the order of its fields."""
    return [getattr(kind, each.name).__set__ for each in fields(kind)]


(
    _set_fragment_id,
    _set_path,
    _set_priority,
    _set_importance,
    _set_expected_size,
    _set_byte_range,
    _set_checksum,
    _set_deadline,
    _set_validator,
    _set_allow_short,
) = _setters(LoadRequest)


@dataclass(frozen=True, slots=True, repr=False, init=False)
class LoadSuccess(_Discreet):
    """The bytes of a fragment, verified.

    ``data`` is a read-only view that stays valid as long as it is held, whatever the cache evicts. Short neighbours
    that came together share one buffer, of a few MiB at most, which each of them keeps: copy what you keep few of.
    ``duration`` in seconds, from when the fragment was queued. ``head``: what the network said of the object that it is
    a part of.
    """

    fragment_id: str
    data: memoryview = field(repr=False)
    duration: float = 0.0
    from_cache: bool = False
    head: HeadInfo | None = field(default=None, repr=False)
    is_success: ClassVar[Literal[True]] = True
    error: ClassVar[None] = None

    def __init__(
        self,
        fragment_id: str,
        data: memoryview,
        duration: float = 0.0,
        from_cache: bool = False,
        head: HeadInfo | None = None,
    ) -> None:
        _set_id(self, fragment_id)
        _set_data(self, data)
        _set_duration(self, duration)
        _set_from_cache(self, from_cache)
        _set_head(self, head)


_set_id, _set_data, _set_duration, _set_from_cache, _set_head = _setters(LoadSuccess)


@dataclass(frozen=True, slots=True, repr=False)
class LoadFailure(_Discreet):
    """Why a fragment could not be loaded. Reading its ``data`` raises ``error``, so that no failure goes unread."""

    fragment_id: str
    error: NetworkError
    duration: float = 0.0
    from_cache: ClassVar[bool] = False
    is_success: ClassVar[Literal[False]] = False

    @property
    def data(self) -> NoReturn:
        raise self.error


LoadResult: TypeAlias = LoadSuccess | LoadFailure
"""What a load ends in; match on the two cases, or ask ``is_success``."""

Result: TypeAlias = T | NetworkError
"""A value, or the error that stands in its place."""


def fragment_id_of(data: bytes | bytearray | memoryview) -> str:
    """The content id of a fragment: the first 16 bytes of its BLAKE3 digest, as 32 hex digits. TypeError for what has
    no bytes."""
    from blake3 import blake3

    return blake3(memoryview(data).cast("B")).hexdigest(length=16)  # of None it would make the id of nothing


def blake3_of(data: bytes | bytearray | memoryview) -> str:
    """The BLAKE3 digest of contiguous bytes, 64 hex digits; on all cores where that pays."""
    return str(blake3_hasher(data, is_threaded=memoryview(data).nbytes >= _THREADS_PAY_FROM).hexdigest())


def blake3_hasher(data: bytes | bytearray | memoryview = b"", *, is_threaded: bool = True) -> Any:
    """A BLAKE3 hasher that has taken in ``data``, on all cores where that is safe."""
    from blake3 import blake3

    is_threaded = is_threaded and os.getpid() == _BORN_IN
    return blake3(data, max_threads=blake3.AUTO if is_threaded else 1)
