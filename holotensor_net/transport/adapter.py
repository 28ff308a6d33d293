"""One request, one reply: the first by requests, those that follow over the connection that it has left.

What requests and urllib3 work out for a request hardly differs from one range of an object to the next, and takes
three quarters of the processor's time that a short range costs (measured: 0.85 of 1.1 ms). So once an answer has come
through a pool of ours, the next request to that origin is handed to the pool's connection, and http.client's answer is
read as it is. Whatever could make a difference sends a request the whole way again: another proxy or certificate, a
connection that has closed, somebody who watches, or who stands in for requests in a test.
"""

from __future__ import annotations

import functools
import http.client
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import BaseSSLError
from urllib3.connectionpool import log
from urllib3.exceptions import ProtocolError

from .heads import by_name
from .pools import Pool, pool_classes
from .sockets import Answer, LiveSockets

__all__ = ["Adapter", "Reply", "Request", "Way", "ask", "bare_reply", "is_straight", "target_of", "way_of"]

_MOST_WAYS = 8
"""Origins whose pools are kept, by requests too."""


class Request:
    """What is asked: the ``method``, the ``url`` as requests writes it, the ``headers`` that we send with everything,
    and the ``conditions`` of this request.

    Raises what requests does for a URL that is none.
    """

    __slots__ = ("_template", "conditions", "headers", "method", "url")

    def __init__(self, method: str, url: str, headers: Mapping[str, str], conditions: Mapping[str, str]) -> None:
        self._template = template = _template(method, url)
        self.method = method
        self.url: str = template.url or ""
        self.headers = headers
        self.conditions = conditions
        if template.headers:  # the credentials that its URL may hold
            own = requests.structures.CaseInsensitiveDict(headers)
            own.update(template.headers)
            self.headers = own

    def prepared(self) -> requests.PreparedRequest:
        """The same for requests."""
        request = requests.PreparedRequest()
        request.method, request.url, request.hooks = self.method, self.url, self._template.hooks
        request.headers = requests.structures.CaseInsensitiveDict({**self.headers, **self.conditions})
        return request


class Reply:
    """An answer: its ``status``, the ``url`` that gave it, and its ``headers``, names in lower case; the body as it is
    sent. This one is as requests gives it."""

    def __init__(self, response: requests.Response) -> None:
        self.status: int = response.status_code
        self.url: str = response.url
        self.headers = by_name(response.headers.items())
        self._raw: Any = response.raw
        answer = getattr(response.raw, "_original_response", None)  # as ``sockets`` reads it
        self._answer = answer if isinstance(answer, Answer) else None

    @property
    def was_plain(self) -> bool:
        """Whether there was nothing to think about in its head."""
        return self._answer is not None and self._answer.was_plain

    @property
    def is_over(self) -> bool:
        """Whether the body is known to have been read to its end."""
        return self._answer is not None and self._answer.isclosed()

    @property
    def is_plain(self) -> bool:
        """Whether the body is so many bytes, as they are, and can be had with :meth:`readinto1`."""
        return self._answer is not None and self._answer.is_plain

    @property
    def has_excess(self) -> bool:
        """Whether more was sent than belongs to the body, which has been read to its end."""
        return self._answer is not None and self._answer.has_excess

    def read_ahead(self) -> bytes | None:
        """All of a short plain body, if it is here already; else None, and nothing is read."""
        return None

    def read1(self, most: int) -> bytes:
        """What comes next of the body, ``most`` bytes at most; none at the end."""
        block: bytes = self._raw.read1(most)
        return block

    def readinto1(self, buffer: memoryview) -> int:
        """Have the socket write what comes next of a plain body; gives the number of bytes, 0 at the end.

        urllib3 gives bytes objects, new memory for each block: what it takes to touch that, and to copy it, is most of
        what a fast transfer costs. It is told how far the body has come, and has nothing else to do with a plain one.
        """
        assert self._answer is not None
        size = self._answer.readinto1(buffer)
        self._raw.length_remaining = self._answer.length
        return size

    def close(self) -> None:
        """Give the connection back if the body ended, else cut it: a pool would hand the rest to the next request."""
        if self._answer is not None and not self._answer.isclosed():
            self._raw.close()
        self._raw.release_conn()


class _BareReply(Reply):
    """The same, as http.client gives it."""

    def __init__(self, url: str, owner: _Owner, answer: Answer) -> None:
        self.status = answer.status
        self.url = url
        self.headers = dict(answer.said)
        self._owner = owner
        self._answer: Answer = answer

    def read_ahead(self) -> bytes | None:
        return self._answer.read_ahead()

    def read1(self, most: int) -> bytes:
        try:
            return self._answer.read1(most)
        except http.client.HTTPException as error:
            raise ProtocolError("the body is broken", error) from error

    def readinto1(self, buffer: memoryview) -> int:
        return self._answer.readinto1(buffer)

    def close(self) -> None:
        self._owner.take_back(self._answer)


Way: TypeAlias = tuple[tuple[str | None, str | None, int | None], object, tuple[object, ...], object, object]


class Adapter(HTTPAdapter):
    """requests' adapter over connections that can be interrupted, one for each host of a session, for one thread."""

    def __init__(self, sockets: LiveSockets) -> None:
        self._pool_classes = pool_classes(sockets)
        self._pools: dict[Way, Pool] = {}
        super().__init__(pool_connections=_MOST_WAYS, pool_maxsize=2, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pool_classes
        return manager

    def again(self, way: Way, request: Request) -> Reply | None:
        """The answer over a connection that is there; None where the request has to go the whole way."""
        pool = self._pools.get(way)
        if pool is None or request.method != "GET" or log.isEnabledFor(logging.DEBUG):
            return None
        return bare_reply(request, pool, lambda: pool.again(target_of(request), request.headers, request.conditions))

    def learn(self, way: Way, response: requests.Response) -> None:
        """An answer came the whole way: if it came through a pool of ours, the next may come sooner."""
        pool = getattr(response.raw, "_pool", None)
        url = response.request.url
        if isinstance(pool, Pool) and pool.proxy is None and url and response.raw.url == _target(url):
            self._pools.pop(way, None)
            self._pools[way] = pool
            while len(self._pools) > _MOST_WAYS:
                del self._pools[next(iter(self._pools))]


class _Owner(Protocol):
    """Who uses connections again."""

    def take_back(self, answer: Answer) -> None: ...


def bare_reply(request: Request, owner: _Owner, ask: Callable[[], Answer | None]) -> Reply | None:
    """The answer that ``ask`` gives, as http.client does; ``owner`` has its connection in the end. Raises what requests
    does."""
    try:
        answer = ask()
    except TimeoutError as error:
        raise requests.ReadTimeout(error, request=request.prepared()) from error
    except BaseSSLError as error:
        raise requests.exceptions.SSLError(error, request=request.prepared()) from error
    except (http.client.HTTPException, OSError) as error:
        aborted = ProtocolError("Connection aborted.", error)
        raise requests.ConnectionError(aborted, request=request.prepared()) from error
    return None if answer is None else _BareReply(request.url, owner, answer)


def way_of(url: str, verify: bool | str, proxies: Mapping[str, str]) -> Way:
    """All that makes a difference to how a request for a URL is sent."""
    said = tuple(sorted(proxies.items())) if proxies else ()
    return _origin(url), verify, said, *_doers()


def is_straight(way: Way) -> bool:
    """Whether nothing lies between us and the origin: no TLS, no proxy, nobody who answers in its place or watches."""
    (scheme, *_), _, proxies, *doers = way
    return scheme == "http" and not proxies and tuple(doers) == _DOERS and not log.isEnabledFor(logging.DEBUG)


def _doers() -> tuple[object, object]:
    """Who sends. Whoever replaces one of these, as those do that answer in a test, is asked."""
    return HTTPAdapter.send, urllib3.HTTPConnectionPool.urlopen


_DOERS = _doers()


def ask(
    session: requests.Session,
    request: Request,
    *,
    timeout: Callable[[], tuple[float, float]],
    verify: bool | str,
    proxies: Mapping[str, str],
) -> Reply:
    """The answer to a request, whose body has not been read; redirects are not followed. Raises what requests does.

    ``timeout``: seconds to connect, and for each wait for bytes.
    """
    adapter = session.get_adapter(request.url)
    way = way_of(request.url, verify, proxies)
    reply = adapter.again(way, request) if isinstance(adapter, Adapter) else None
    if reply is not None:
        return reply
    response = adapter.send(request.prepared(), stream=True, timeout=timeout(), verify=verify, proxies=dict(proxies))
    if isinstance(adapter, Adapter):
        adapter.learn(way, response)
    return Reply(response)


@functools.lru_cache(256)
def _template(method: str, url: str) -> requests.PreparedRequest:
    """A request without headers of ours; the same URL is asked for again and again, a range at a time."""
    return requests.Request(method, url).prepare()


def target_of(request: Request) -> str:
    """What of a request's URL is sent to its server."""
    return _target(request.url)


@functools.lru_cache(256)
def _target(url: str) -> str:
    """What of a URL is sent to its server, as urllib3 writes it."""
    return urllib3.util.parse_url(url).request_uri


@functools.lru_cache(256)
def _origin(url: str) -> tuple[str | None, str | None, int | None]:
    parts = urllib3.util.parse_url(url)
    return parts.scheme, parts.host, parts.port
