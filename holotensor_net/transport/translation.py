"""Foreign exceptions become ours here and nowhere else.

Above this room nobody has heard of requests or urllib3. Each error says in a few words what the system said; never
the URL that the libraries' own words would repeat.
"""

from __future__ import annotations

import errno
import http.client
import socket
import sys

import requests
import urllib3

from ..errors import (
    ConfigurationError,
    ConnectionFailed,
    InvalidUrl,
    NetworkError,
    ProtocolError,
    StalledTransfer,
    Timeout,
)

__all__ = ["translated"]

_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


class translated:
    """A context: errors that leave it are of our tree.

    Their cause is what the system said: the layers between repeat the URL, and what is secret in it.
    """

    __slots__ = ("_outside",)

    def __enter__(self) -> None:
        self._outside = sys.exc_info()[1]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NetworkError) or not isinstance(error, urllib3.exceptions.HTTPError | OSError):
            return  # requests' own are OSErrors
        cause = _beneath(error, self._outside)
        ours = _ours(error, cause)
        try:
            raise ours from cause
        finally:
            ours.__context__ = self._outside


def _ours(error: BaseException, cause: BaseException | None) -> NetworkError:
    """The error of our tree for a foreign one and what lies beneath it."""
    reason = _reason(cause or error)
    match error:
        case requests.Timeout() | urllib3.exceptions.ConnectTimeoutError():
            return Timeout(f"the server did not answer in time ({reason})")
        case urllib3.exceptions.ReadTimeoutError() | TimeoutError():
            return StalledTransfer("the bytes stopped, or came too slowly")
        case requests.exceptions.SSLError():
            return ConnectionFailed(f"no secure connection: {reason}: check https://, and what is trusted (verify=)")
        case requests.exceptions.ProxyError():
            return ConnectionFailed(f"the proxy refused: {reason}: see HTTP_PROXY, HTTPS_PROXY, NO_PROXY and proxies=")
        case requests.exceptions.InvalidProxyURL() | requests.exceptions.InvalidSchema():
            return ConfigurationError("the proxy cannot be used: see CdnEndpoint.proxies, HTTP_PROXY and HTTPS_PROXY")
        case requests.exceptions.InvalidURL():
            return InvalidUrl("not a URL that can be asked for: check the endpoint, and the proxy if there is one")
        case requests.exceptions.InvalidHeader():
            return ProtocolError("the answer has a header that contradicts itself")
        case requests.ConnectionError() if _is_gibberish(cause):
            return ProtocolError(f"the answer is not HTTP: {reason}")
        case requests.ConnectionError():
            unreached = isinstance(_root(error), urllib3.exceptions.NewConnectionError)
            return ConnectionFailed(f"{reason}: {_advice(cause)}" if unreached else reason, established=not unreached)
        case _:
            return ConnectionFailed(f"the connection was cut: {reason}", established=True)


def _advice(cause: BaseException | None) -> str:
    """What to look at where no connection came about."""
    if isinstance(cause, socket.gaierror):
        return "check the host's name, and whether this machine is online"
    if isinstance(cause, OSError) and cause.errno in _NO_WAY:
        return "check the host, and whether this machine is online"
    return "check host and port, and whether the server runs"


def _is_gibberish(cause: BaseException | None) -> bool:
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError)


def _root(error: BaseException) -> object:
    inner = error.args[0] if error.args else None
    return getattr(inner, "reason", inner)


def _beneath(error: BaseException, outside: BaseException | None) -> BaseException | None:
    """What the system said, under the libraries' layers; None if it was a library that refused.

    ``outside``: what was being handled when the work began, which is no part of it.
    """
    while (inner := error.__cause__ or (not error.__suppress_context__ and error.__context__)) and inner is not outside:
        error = inner
    is_foreign = isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError)
    return None if is_foreign else error


def _reason(error: BaseException) -> str:
    """A few words on what went wrong, without the URL that the libraries' own would repeat."""
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return error.strerror or str(error) or type(error).__name__
    if isinstance(error, http.client.HTTPException) and not isinstance(error, http.client.IncompleteRead):
        return f"{type(error).__name__} {str(error)[:60]!r}"
    return type(error).__name__
