"""How long a stored answer may be used without asking again: a private cache by RFC 9111, as pure functions.

Headers are mappings with names in lower case; repeated lines are joined by commas. Times are seconds since the epoch.
Whatever is garbled counts as the case that asks the server again.
"""

from __future__ import annotations

import calendar
import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from ..errors import CacheError

__all__ = [
    "KEPT_HEADERS",
    "CacheControl",
    "Freshness",
    "State",
    "answer_in",
    "http_date",
    "is_same_entity",
    "kept",
    "refreshed",
]

Headers = Mapping[str, str]

KEPT_HEADERS = frozenset(
    ("age", "cache-control", "content-type", "date", "etag", "expires", "last-modified", "vary"),
)
"""What is worth keeping of an answer. Nothing else is: cookies and tokens must not reach the disk."""

_FOREVER = 2**31  # RFC 9111 §1.2.2: what a number of seconds that is too large counts as

_LONGEST_GUESS = 7 * 86400.0

_END_OF_TIME = 253402300799  # the last second of the year 9999, beyond which there are no dates
_TEXT = frozenset((str,))
_STORED = ("headers", "request_time", "response_time")

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEMBER = re.compile(r'((?:[^,"]|"(?:[^"\\]|\\.)*")*)(?:,|\Z)', re.DOTALL)
_DIRECTIVE = re.compile(rf'({_WORD})(?:=(?:({_WORD})|"((?:[^"\\]|\\.)*)"))?', re.DOTALL)
_SECONDS = re.compile(r"[0-9]+", re.ASCII)

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_TIME = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})"
_DATES = tuple(
    re.compile(pattern, re.ASCII | re.IGNORECASE)
    for pattern in (
        rf"[a-z]{{3}}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT",  # IMF-fixdate
        rf"[a-z]{{6,9}}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT",  # RFC 850
        rf"[a-z]{{3}} {_MONTH} (?P<day>[0-9 ][0-9]) {_TIME} (?P<year>[0-9]{{4}})",  # asctime
    )
)


class State(enum.Enum):
    """Whether a stored answer may be used as it is, or the server must be asked first."""

    FRESH = "fresh"
    STALE = "stale"


def http_date(value: str | None, now: float | None = None) -> float | None:
    """The moment that a date of any of HTTP's three forms names (RFC 9110 §5.6.7), None if it is no such date.

    ``now`` settles the century of two-digit years: none is more than 50 years ahead. Without it they name no moment.
    """
    match = next((m for form in _DATES if (m := form.fullmatch((value or "").strip(" \t")))), None)
    if match is None:
        return None
    year, month = int(match["year"]), _MONTHS.index(match["month"].lower()) + 1
    day, hour, minute = int(match["day"]), int(match["hour"]), int(match["minute"])
    second = min(int(match["second"]), 59) if match["second"] == "60" else int(match["second"])
    if len(match["year"]) == 2:
        if now is None:
            return None
        this_year = datetime.fromtimestamp(now, timezone.utc).year
        year += this_year - this_year % 100
        year -= 100 if year > this_year + 50 else 0
    try:
        return float(calendar.timegm(datetime(year, month, day, hour, minute, second).timetuple()))
    except ValueError:
        return None


def _delta_seconds(value: str | None) -> float | None:
    """A number of seconds (RFC 9111 §1.2.2), None for anything but ASCII digits."""
    if value is None or not _SECONDS.fullmatch(value):
        return None
    return float(_FOREVER if len(value.lstrip("0")) > 10 else min(int(value), _FOREVER))


@dataclass(frozen=True, slots=True)
class CacheControl:
    """The directives of a Cache-Control field (RFC 9111 §5.2): names in lower case, with every value that each has.

    A field that breaks the grammar counts as ``no-cache``, and as ``no-store`` if that word occurs in it anywhere.
    """

    directives: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    @classmethod
    @functools.lru_cache(64)
    def parse(cls, text: str) -> CacheControl:
        found: dict[str, tuple[str | None, ...]] = {}
        position = 0
        while position < len(text):
            member = _MEMBER.match(text, position)
            directive = _DIRECTIVE.fullmatch(member[1].strip(" \t")) if member else None
            if member is None or (directive is None and member[1].strip(" \t")):
                hidden = {"no-store": (None,)} if "no-store" in text.lower() else {}
                return cls({"no-cache": (None,), **hidden})
            if directive is not None:
                name, token, quoted = directive.groups()
                value = token if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
                found[name.lower()] = (*found.get(name.lower(), ()), value)
            position = member.end()
        return cls(found)

    def __contains__(self, name: str) -> bool:
        return name in self.directives

    def seconds(self, name: str) -> float | None:
        """The value of a directive in seconds: None if it is absent, 0 if it is garbled or contradicts itself."""
        values = set(self.directives.get(name, ()))
        if not values:
            return None
        return (_delta_seconds(values.pop()) or 0.0) if len(values) == 1 else 0.0


@dataclass(frozen=True)
class Freshness:
    """What the headers of an answer, and the times it was asked for and came, say of its use later on.

    An object of which the server did not say how long it is fresh is asked for again each time, which costs a 304, but
    where the caller allows a guess (``heuristic``, RFC 9111 §4.2.2): it now and then gives old bytes, of which nobody
    would know.
    """

    headers: Headers = field(default_factory=dict, hash=False)
    request_time: float = 0.0
    response_time: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", kept(self.headers))

    @property
    def control(self) -> CacheControl:
        return CacheControl.parse(self.headers.get("cache-control", ""))

    @property
    def varies_on(self) -> frozenset[str]:
        """Names of the request's headers that the answer depends on, in lower case; ``*``: on more than these."""
        return _names(self.headers.get("vary", ""))

    @property
    def is_storable(self) -> bool:
        return is_storable(self.headers)

    @property
    def forbids_stale(self) -> bool:
        """Whether the origin wants to be asked, come what may (RFC 9111 §4.2.4)."""
        return any(name in self.control for name in ("no-store", "no-cache", "must-revalidate"))

    @property
    def _date(self) -> float:
        """When the origin made the answer; when it came, if it does not say (RFC 9110 §6.6.1)."""
        date = http_date(self.headers.get("date"), self.response_time)
        return self.response_time if date is None else date

    def lifetime(self, heuristic: float = 0.0) -> float:
        """Seconds for which the answer is fresh, counted from when the origin made it (RFC 9111 §4.2.1).

        Where the origin does not say: ``heuristic`` times how long the object had been as it is then, a week at most.
        """
        max_age = self.control.seconds("max-age")
        if max_age is not None:
            return max_age
        if "expires" in self.headers:
            expires = http_date(self.headers["expires"], self.response_time)
            return 0.0 if expires is None else max(0.0, expires - self._date)
        changed = http_date(self.headers.get("last-modified"), self.response_time) if heuristic else None
        return 0.0 if changed is None else min(_LONGEST_GUESS, max(0.0, heuristic * (self._date - changed)))

    def age(self, now: float) -> float:
        """Seconds since the origin made or last confirmed the answer (RFC 9111 §4.2.3); never below 0."""
        said = self.headers.get("age", "").split(",")[0].strip(" \t")
        corrected = (_delta_seconds(said) or 0.0) + max(0.0, self.response_time - self.request_time)
        apparent = max(0.0, self.response_time - self._date)
        return max(apparent, corrected) + max(0.0, now - self.response_time)

    def state(self, now: float, heuristic: float = 0.0) -> State:
        """FRESH while the age is below the :meth:`lifetime`. A clock that was set back tells no age: STALE."""
        if "no-cache" in self.control or now < self.response_time:
            return State.STALE
        return State.FRESH if self.age(now) < self.lifetime(heuristic) else State.STALE

    def may_serve_stale(self, now: float) -> bool:
        """Whether the answer may stand in for one that the server fails to give (stale-if-error, RFC 5861 §4)."""
        window = self.control.seconds("stale-if-error")
        if window is None or self.forbids_stale or now < self.response_time:
            return False
        return self.age(now) < self.lifetime() + window

    def to_json(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_json` makes this again."""
        return dict(zip(_STORED, (dict(self.headers), self.request_time, self.response_time), strict=True))

    @classmethod
    def from_json(cls, data: Any) -> Freshness:
        """Raises CacheError for anything that :meth:`to_json` would not give."""
        return cls(*answer_in(data))


def answer_in(data: Any) -> tuple[dict[str, str], float, float]:
    """The headers and the two times in what :meth:`Freshness.to_json` gave. Raises CacheError for anything else."""
    try:
        headers, asked, came = data["headers"], data["request_time"], data["response_time"]
        is_sound = _TEXT.issuperset(map(type, headers)) and _TEXT.issuperset(map(type, headers.values()))
        is_sound = is_sound and 0 <= asked <= _END_OF_TIME and 0 <= came <= _END_OF_TIME
    except (AttributeError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise CacheError("the stored headers of an answer are damaged: remove the cache entry, and fetch it again")
    return headers, asked, came


@functools.lru_cache(64)
def _names(text: str) -> frozenset[str]:
    """The names in a list of them, in lower case."""
    return frozenset(name.strip(" \t") for name in text.lower().split(",")) - {""}


class _Kept(dict[str, str]):
    """Headers that may be stored, and no others; nobody changes them."""


def kept(headers: Headers) -> Headers:
    """The headers that may be stored, names in lower case. Equal ones are mostly the same object."""
    if isinstance(headers, _Kept):
        return headers
    names = _names_to_keep(tuple(headers))
    return _kept(names, tuple(map(headers.__getitem__, names)))


@functools.lru_cache(64)
def _names_to_keep(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.lower() in KEPT_HEADERS)


@functools.lru_cache(64)
def _kept(names: tuple[str, ...], values: tuple[str, ...]) -> Headers:
    return _Kept(zip(map(str.lower, names), values, strict=True))


def is_storable(headers: Headers) -> bool:
    """Whether an answer may be kept: no ``no-store``, and no ``Vary: *``, which matches no request to come."""
    control, vary = headers.get("cache-control"), headers.get("vary")
    return not (control and "no-store" in CacheControl.parse(control)) and not (vary and "*" in _names(vary))


def refreshed(old: Headers, new: Headers) -> dict[str, str]:
    """The stored headers as a 304 leaves them (RFC 9111 §3.2, §4.3.4).

    Date and Age of the old answer go in any case: they tell of another message. Content-Type stays what it was when the
    bytes came.
    """
    still = {name: value for name, value in kept(old).items() if name not in ("age", "date")}
    return {**still, **{name: value for name, value in kept(new).items() if name != "content-type"}}


def is_same_entity(a: str | None, b: str | None) -> bool:
    """Weak comparison of two entity tags (RFC 9110 §8.8.3.2): equal but for ``W/``. None equals nothing."""
    return a is not None and b is not None and a.removeprefix("W/") == b.removeprefix("W/")
