"""What can go wrong, and whether trying again can help.

::

    NetworkError
     ├── HttpError                an answer whose status says no (.status)
     │    ├── NotFound            404, 410                  is a FileNotFoundError
     │    └── RateLimited         429, 503                  try again after .retry_after
     ├── ConnectionFailed         no connection, or cut     is a ConnectionError
     ├── Timeout                  the network was silent    is a TimeoutError
     │    └── StalledTransfer     bytes came, then stopped or dripped
     ├── DeadlineExceeded         the caller's own limit    is a TimeoutError
     ├── ProtocolError            an answer that contradicts itself or the question
     │    ├── RangeNotSupported   a range was asked for, the whole was sent
     │    └── ObjectChanged       the object is no longer the one that was begun
     ├── ChecksumMismatch         right length, wrong bytes (.expected, .actual)
     ├── RetriesExhausted         every attempt failed (.last_error)
     ├── InvalidUrl               not a URL we will fetch   is a ValueError
     ├── ConfigurationError       a setting that cannot be  is a ValueError
     ├── FormatError              bytes that are no model   is a ValueError
     ├── CacheError               the disk cache failed     is an OSError
     │    └── InsufficientDisk    no room for the bytes
     ├── OfflineError             not cached, and offline
     └── Cancelled                stopped on request        is a CancelledError

Whether to retry belongs to the class (``is_retryable``), so that no caller has to know a list.
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

if TYPE_CHECKING:
    from .values import RangeRequest

__all__ = [
    "CacheError",
    "Cancelled",
    "ChecksumMismatch",
    "ConfigurationError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "FormatError",
    "HttpError",
    "InsufficientDisk",
    "InvalidUrl",
    "NetworkError",
    "NotFound",
    "ObjectChanged",
    "OfflineError",
    "ProtocolError",
    "RangeNotSupported",
    "RateLimited",
    "RetriesExhausted",
    "StalledTransfer",
    "Timeout",
    "redact_url",
    "without_query",
]


def redact_url(url: str) -> str:
    """The URL without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a password with a '#' or '/' in it stands where a port should
        if parts.netloc or "@" not in parts.path or ":" not in url:
            host = parts.netloc.rpartition("@")[2]
            return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))
    except ValueError:
        pass
    return "(unreadable URL)"


def without_query(name: str) -> str:
    """A name or a path without the query in which it may end, and which may be a signature; one that is a URL without
    its user and password too."""
    path, mark, _ = name.partition("?")
    if "@" in path:
        scheme, colon, rest = path.partition("://")
        user, at, _ = rest.partition("/")[0].rpartition("@")
        path = f"{scheme}{colon}…@{rest[len(user) + 1 :]}" if at else path
    return f"{path}?…" if mark else path


class NetworkError(Exception):
    """The root: catch this to catch everything the library raises.

    ``url`` is redacted before it is kept; ``byte_range`` is the range asked for; ``attempts`` counts requests
    made; ``retry_after`` is in seconds, None when the server named no time.
    """

    is_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        url: str | None = None,
        byte_range: RangeRequest | None = None,
        attempts: int = 1,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.url = None if url is None else redact_url(url)
        self.byte_range = byte_range
        self.attempts = attempts
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = []
        if self.url is not None:
            where.append(self.url)
        if self.byte_range is not None:
            where.append(f"bytes {self.byte_range.start}–{self.byte_range.stop}")
        if self.attempts > 1:
            where.append(f"{self.attempts} attempts")
        text = self.message or type(self).__name__
        return f"{text} [{', '.join(where)}]" if where else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[NetworkError], args: tuple[Any, ...], state: dict[str, Any]) -> NetworkError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class HttpError(NetworkError):
    """The server answered with a status that refuses the request."""

    def __init__(self, status: int = 0, message: str = "", **context: Any) -> None:
        super().__init__(message or f"the server answered {status}", **context)
        self.status = status

    @property
    def is_retryable(self) -> bool:  # type: ignore[override]
        return self.status in (408, 429) or (self.status >= 500 and self.status not in (501, 505))


class NotFound(HttpError, FileNotFoundError):
    """There is no such object (404 or 410)."""

    def __init__(self, message: str = "", *, status: int = 404, **context: Any) -> None:
        super().__init__(status, message or "no such object: check the path", **context)


class RateLimited(HttpError):
    """The server asks for fewer requests (429), or for time (503)."""

    is_retryable = True

    def __init__(
        self, retry_after: float | None = None, message: str = "", *, status: int = 429, **context: Any
    ) -> None:
        super().__init__(status, message or f"the server is busy ({status})", retry_after=retry_after, **context)


class ConnectionFailed(NetworkError, ConnectionError):
    """No connection could be made, or it was cut.

    ``established`` tells the two apart: whether this connection had carried a request before it failed.
    """

    is_retryable = True

    def __init__(self, message: str = "", *, established: bool = False, **context: Any) -> None:
        super().__init__(message or "the connection failed", **context)
        self.established = established


class Timeout(NetworkError, TimeoutError):
    """The network said nothing for longer than the idle timeout."""

    is_retryable = True


class StalledTransfer(Timeout):
    """Bytes came and then stopped, or came below the minimum rate."""


class DeadlineExceeded(NetworkError, TimeoutError):
    """The caller's deadline passed before the bytes were there."""


class ProtocolError(NetworkError):
    """An answer that contradicts itself or the question. Another attempt may meet a saner server."""

    is_retryable = True


class RangeNotSupported(ProtocolError):
    """A range was asked for and the server sent the whole object."""

    is_retryable = False


class ObjectChanged(ProtocolError):
    """The object was replaced while it was being fetched, and the caller had pinned the old one."""

    is_retryable = False


class ChecksumMismatch(NetworkError):
    """The bytes have the right length and the wrong content."""

    is_retryable = True

    def __init__(self, expected: str = "", actual: str = "", message: str = "", **context: Any) -> None:
        super().__init__(message or f"checksum mismatch: expected {expected}, received {actual}", **context)
        self.expected = expected
        self.actual = actual


class RetriesExhausted(NetworkError):
    """Every attempt failed; ``last_error`` says how the last one did."""

    def __init__(
        self, attempts: int = 1, last_error: BaseException | None = None, message: str = "", **context: Any
    ) -> None:
        super().__init__(message or f"gave up: {last_error}", attempts=attempts, **context)
        self.last_error = last_error


class InvalidUrl(NetworkError, ValueError):
    """Not a URL that the library fetches."""


class ConfigurationError(NetworkError, ValueError):
    """A setting that cannot work; the message names the field and the value."""


class FormatError(NetworkError, ValueError):
    """The bytes are not the model format that they should be."""


class CacheError(NetworkError, OSError):
    """The disk cache could not do what was asked."""


class InsufficientDisk(CacheError):
    """There is no room on the disk for the bytes."""


class OfflineError(NetworkError):
    """The bytes are not in the cache, and the network must not be asked."""


class Cancelled(NetworkError, concurrent.futures.CancelledError):
    """The load was stopped on request."""
