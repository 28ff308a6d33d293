"""HttpClient: one endpoint, asked politely and not believed until checked.

Here requests and urllib3 are asked: their exceptions are translated on the way out, and their answers pass the guards
before a byte reaches its place. A transfer resumes where its counted bytes end, as long as a strong validator
proves that the object is the same.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import os
import re
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.utils import get_environ_proxies

from ..config import CdnEndpoint, ClientConfig, NetworkConfig, is_auth
from ..errors import (
    Cancelled,
    ConfigurationError,
    ConnectionFailed,
    HttpError,
    InvalidUrl,
    NetworkError,
    ProtocolError,
    RateLimited,
    Timeout,
    redact_url,
)
from ..values import HeadInfo, RangeRequest, must_be
from . import guards
from .adapter import Adapter, Reply, Request, ask, is_straight, way_of
from .digests import LINKED, NAMES, check_digests
from .heads import PlainHead
from .leads import Lead, Leads, is_lost
from .lines import BRIEF, Call, Lines
from .retry import EARNED, HOSTS, Allowance, Host, Patience, persist
from .sockets import Interrupt, LiveSockets
from .transfer import Answer, Ask, OpenSink, Transfer, Write
from .translation import translated

__all__ = ["BRIEF", "Answer", "Ask", "Begun", "HttpClient", "OpenSink", "Write"]

T = TypeVar("T")

_BLOCK = 256 * 1024
_GATHERED = 1024 * 1024
_STRIDE = 1024 * 1024  # the most bytes that are read at one go
_DRAIN = 64 * 1024
_DRAIN_SECONDS = 0.5
_LOOK = 0.25  # seconds between two looks whether who waits for a connection still wants it
_MOST_CONTINUATIONS = 256
_SEEN_FOR = 1.0  # seconds
_REDIRECTS = (301, 302, 303, 307, 308)
_REFUSED = (401, 403)
_CONTROL = re.compile(r"[\x00-\x20\x7f]")
_UNSENDABLE = re.compile(r"\A\s|[\r\n\0]|[^\x00-\xff]")  # in a header; requests 2.32 lets a last line end pass (seen)
_SCHEMES = ("http", "https", "all", "no")
_PROXY_VARIABLES = (  # and that which has Python leave HTTP_PROXY out: to a web server's script, a client may say it
    *(f"{scheme}_proxy" for scheme in _SCHEMES),
    *(f"{scheme}_proxy".upper() for scheme in _SCHEMES),
    "REQUEST_METHOD",
)
_PROXY_VARIABLES_AS_BYTES = tuple(map(os.fsencode, _PROXY_VARIABLES))

# What may follow a redirect to another origin: nothing that could identify the caller.
_TRAVELS = frozenset(("accept", "user-agent"))


class _Pace(NamedTuple):
    """How fast a transfer may go: what is called before each request and after each block, which may wait, and how
    many bytes a block may have."""

    on_request: Callable[[], object]
    on_bytes: Callable[[int], None]
    stride: Callable[[], int]


class Begun:
    """A transfer whose request has been sent: its ``call``, what an answer will mean for it, and the headers of every
    request as they ``were`` then. ``is_taken``: it has ended, or goes on the ordinary way, which has its connection and
    its place among those that may be open."""

    __slots__ = ("call", "is_taken", "state", "were")

    def __init__(self, call: Call, state: Transfer, were: Mapping[str, str]) -> None:
        self.call = call
        self.state = state
        self.were = were
        self.is_taken = False


class HttpClient:
    """Fetches from one endpoint, with retries, from any number of threads.

    Each thread has a session of its own (a session shared over a fork mixes up answers), and at most
    ``endpoint.max_connections`` requests run at once. ``close`` interrupts whatever runs.
    """

    def __init__(
        self,
        endpoint: CdnEndpoint | str,
        config: ClientConfig | NetworkConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.endpoint = endpoint if isinstance(endpoint, CdnEndpoint) else CdnEndpoint(endpoint)
        if config is not None:
            must_be("config", config, ClientConfig, NetworkConfig)
        self.config = config.client if isinstance(config, NetworkConfig) else config or ClientConfig()
        self._clock = clock
        self._wall = wall
        self._url_of = functools.lru_cache(256)(self.endpoint.url_of)
        self._own: tuple[object, dict[str, str]] | None = None  # headers of every request, and what they were made of
        self._reset(closed=False)

    def _reset(self, *, closed: bool) -> None:
        self._closing = threading.Event()
        if closed:
            self._closing.set()
        self._slots = threading.BoundedSemaphore(self.endpoint.max_connections)
        self._lock = threading.Lock()  # guards _sessions
        self._local = threading.local()
        self._sockets = LiveSockets(self.config.timeout, clock=self._clock)
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()  # a thread's ends with it
        self._was_straight, self._seen_at = False, -math.inf
        self._lines = Lines(self._sockets, self.endpoint.max_connections)
        self._leads = Leads()
        self._host = HOSTS.of(_origin_of(self.endpoint.url))
        self._process = os.getpid()

    def _settle(self) -> None:
        """Begin anew in a child process: it must not touch its parent's connections, nor wait for its threads."""
        if os.getpid() != self._process:
            self._reset(closed=self._closing.is_set())

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Interrupt what runs and close every connection; idempotent."""
        self._settle()
        self._closing.set()
        self._sockets.abort()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._lines.close()

    # -- the public verbs

    def fetch(self, path: str) -> bytes:
        """The whole object; compressed on the way if the settings allow it.

        Raises NetworkError; ProtocolError for a body whose end cannot be known.
        """
        body = bytearray()
        most = self.config.max_body

        def open_sink(_: HeadInfo, coming: RangeRequest | None) -> Write:
            limit = max(most, coming.stop if coming is not None else 0)

            def write(offset: int, data: memoryview) -> None:
                if offset + len(data) > limit:
                    raise _too_large(most)
                del body[offset:]  # another attempt may have begun again
                body.extend(data)

            return write

        answer = self.transfer(Ask(path), open_sink, compressed=self.config.compression)
        assert answer.byte_range is not None
        del body[answer.byte_range.stop :]
        try:
            data = _decoded(bytes(body), answer.head.headers.get("content-encoding", "identity"), most)
            check_digests(data, answer.unproved)
        except NetworkError as error:
            self._tell_where(error, path, None)
            raise
        return data

    def fetch_range(self, path: str, byte_range: RangeRequest | tuple[int, int]) -> bytes:
        """Exactly these bytes of the object. Raises NetworkError; ProtocolError if the object ends before."""
        if not isinstance(byte_range, RangeRequest):
            if not isinstance(byte_range, tuple) or len(byte_range) != 2:
                raise ConfigurationError(f"byte_range must be a RangeRequest or a pair of numbers, not {byte_range!r}")
            byte_range = RangeRequest(*byte_range)
        if not byte_range.length:
            return b""
        body = bytearray(byte_range.length)
        start = byte_range.start

        def write(offset: int, data: memoryview) -> None:
            body[offset - start : offset - start + len(data)] = data

        self.transfer(Ask(path, byte_range), lambda *_: write)
        return bytes(body)

    def head(self, path: str) -> HeadInfo:
        """What the server says of the object: size, validators, whether it serves ranges. No body is moved."""
        return self.describe(path)

    def describe(
        self, path: str, patience: Patience | None = None, *, on_request: Callable[[], object] = lambda: None
    ) -> HeadInfo:
        """``head``; ``patience`` and ``on_request`` as for ``transfer``."""
        self._settle()
        patience, allowance = patience or self._patience(), Allowance(self._host)
        headers = {"Accept-Encoding": "identity"}

        def told(reply: Reply, said: Mapping[str, str]) -> HeadInfo:
            if reply.status != 200:
                raise guards.error_of_status(reply.status, said, self._wall())
            guards.check_encoding(said)
            return guards.head_info(said, guards.content_length(said), ranges=False)

        def ask() -> HeadInfo:
            begin = functools.partial(self._begin, on_request, patience)
            return self._answered("HEAD", path, headers, patience, begin, told)

        try:
            result = persist(ask, self.config.retry, patience, may_retry=allowance.pays)
        except NetworkError as error:
            self._tell_where(error, path, None)
            raise
        allowance.give_back()
        return result

    def transfer(
        self,
        ask: Ask,
        open_sink: OpenSink,
        patience: Patience | None = None,
        *,
        on_request: Callable[[], object] = lambda: None,
        on_bytes: Callable[[int], None] = lambda _: None,
        on_retry: Callable[[NetworkError], None] = lambda _: None,
        compressed: bool = False,
        may_retry: Callable[[NetworkError], bool] = lambda _: True,
        interrupt: Interrupt | None = None,
        window: Callable[[], int | None] | None = None,
        stride: Callable[[], int] = lambda: _STRIDE,
        begun: Begun | None = None,
    ) -> Answer:
        """Move what ``ask`` names into the sink, however many requests it takes; the engine's door.

        ``on_request`` is called before each request, retries and redirects included, and ``on_bytes`` told of every
        block as it arrives; both may wait (a rate limit) or raise. ``on_retry`` is told of every failure that is
        followed by another attempt, which ``may_retry`` may forbid. ``interrupt`` cuts the transfer's connections; its
        event belongs into ``patience``, which says in what error that ends. ``window`` says how many bytes may come
        ahead of being read, None for any number, and ``stride`` how many a block may have; both are asked again and
        again. ``begun``: what ``begin_all`` began of it, which ends here. Raises ObjectChanged when the version moves
        under the transfer, RangeNotSupported for a 200 to a range, ConfigurationError for an empty range,
        RetriesExhausted, and the rest of the tree.
        """
        self._settle()
        patience, allowance = patience or self._patience(), Allowance(self._host)
        wanted = ask.byte_range
        state = Transfer.of(ask if begun is None else begun.state.ask)
        pace = _Pace(on_request, on_bytes, stride)

        def attempt() -> None:
            for _ in range(_MOST_CONTINUATIONS):
                self._ask_once(state, open_sink, patience, pace, compressed, begun)
                if state.done:
                    return
                if state.version is None:
                    raise ProtocolError(
                        "the server sent a part of what it was asked for, of a version it does not name"
                    )
            raise ProtocolError("the server keeps sending less than it was asked for")

        try:
            if wanted is not None and not wanted.length:
                raise ConfigurationError("HTTP cannot ask for an empty range: ask for one byte or more")
            with self._sockets.interruptible(interrupt, window):
                persist(
                    attempt,
                    self.config.retry,
                    patience,
                    may_retry=lambda error: may_retry(error) and allowance.pays(error),
                    on_retry=on_retry,
                )
        except NetworkError as error:
            self._tell_where(error, ask.path, wanted)
            raise
        finally:
            if begun is not None:
                self.forget(begun)
        allowance.give_back()
        assert state.head is not None
        delivered = None if state.not_modified else RangeRequest(state.start, state.position)
        return Answer(state.head, delivered, state.not_modified, state.requests, state.unproved)

    # -- many requests at once

    @property
    def may_begin(self) -> bool:
        """Whether ``begin_all`` may begin anything, as far as is known."""
        return self._lines.is_plain and self._is_straight()

    def _is_straight(self) -> bool:
        """Whether nothing stands between us and our own origin, as was seen within a second."""
        now, url = self._clock(), self.endpoint.url
        if now >= self._seen_at + _SEEN_FOR:
            is_straight_http = os.name == "posix" and url.startswith("http:")
            self._was_straight = is_straight_http and is_straight(way_of(url, self._verify(url), self._proxies(url)))
            self._seen_at = now
        return self._was_straight

    def begin_all(self, asks: Sequence[Ask]) -> list[Begun | None]:
        """Send the requests of transfers, each of a short range, and wait for none; None for each that has to be made
        the ordinary way. What has begun is to be given to :meth:`read` whenever something may have come, until that
        gives an answer; or else to :meth:`transfer`, or to :meth:`forget`."""
        self._settle()
        begun: list[Begun | None] = [None] * len(asks)
        if not self._lines.is_plain or self._closing.is_set() or self._host.refusal(self._clock()) is not None:
            return begun
        with contextlib.suppress(Exception):  # the ordinary way meets it again, and tells of it
            own, ways = self._own_headers(), dict[str, bool]()
            for index, ask in enumerate(asks):
                if ask.path not in ways:
                    url = self._url_of(ask.path)
                    ways[ask.path] = self._lines.lead(way_of(url, self._verify(url), self._proxies(url)))
                if not ways[ask.path] or ask.byte_range is None or not self._slots.acquire(blocking=False):
                    continue
                try:
                    begun[index] = self._begun(ask, own)
                finally:
                    if begun[index] is None:
                        self._slots.release()
        return begun

    def _begun(self, ask: Ask, own: Mapping[str, str]) -> Begun | None:
        state = Transfer.of(ask)
        request = Request("GET", self._url_of(ask.path), own, _conditions(state))
        call = self._lines.call(request, 0 if ask.byte_range is None else ask.byte_range.length)
        return None if call is None else Begun(call, state, own)

    def read(self, begun: Begun, open_sink: OpenSink) -> Answer | None:
        """The end of a transfer of which bytes have come, if that was all: they are in their place. None while more is
        to come; or where its call ``is_unusual``: nothing of it has come then, and :meth:`transfer` is to go on."""
        call, state = begun.call, begun.state
        came = call.receive()
        if came is not None:
            try:
                if self._is_taken_in(state, *came, open_sink):
                    call.end()
                    self._lines.prove()
                    begun.is_taken = True
                    self._slots.release()
                    self._host.earn(EARNED)
                    assert state.head is not None
                    return Answer(state.head, state.ask.byte_range, False, 1)
            except Exception:  # noqa: S110  # the ordinary way judges it again, and tells of it
                pass
            call.is_unusual = True
        if call.is_unusual:
            self._lines.doubt()
        return None

    def _is_taken_in(self, state: Transfer, head: PlainHead, body: memoryview, open_sink: OpenSink) -> bool:
        """Whether an answer is all that was asked for, in the plainest way; it is in its place then."""
        wanted = state.ask.byte_range
        if head.status != 206 or not NAMES.isdisjoint(head.said) or wanted is None or len(body) != wanted.length:
            return False
        state.count()
        state.judge(head.status, head.said, self._wall(), compressed=False)
        assert state.head is not None
        state.write = open_sink(state.head, wanted)
        state.advance(body)
        state.end(is_all=False)
        return state.done

    def forget(self, begun: Begun) -> None:
        """End what has begun, unless it has ended."""
        if not begun.is_taken:
            begun.is_taken = True
            begun.call.drop()
            self._slots.release()

    # -- one request, one answer

    def _ask_once(
        self,
        state: Transfer,
        open_sink: OpenSink,
        patience: Patience,
        pace: _Pace,
        compressed: bool,
        begun: Begun | None,
    ) -> None:
        is_sent = begun is not None and not begun.is_taken and not begun.call.may_send

        def begin() -> None:
            nonlocal is_sent
            if not is_sent:  # or what was asked for would fail as somebody wants silence from now on
                self._begin(pace.on_request, patience)
            is_sent = False
            state.count()

        def take(reply: Reply, said: Mapping[str, str]) -> None:
            length = state.judge(reply.status, said, self._wall(), compressed=compressed)
            if state.done:
                return
            assert state.head is not None
            if state.write is None:
                coming = (
                    None if length is None else RangeRequest(state.start, max(state.position + length, state.stop or 0))
                )
                state.write = open_sink(state.head, coming)
            state.expect(said, length)
            self._move(reply, state, length, patience, pace)
            if (
                reply.was_plain
                and begun is None
                and reply.url == Request("GET", self._url_of(state.ask.path), {}, {}).url
            ):
                self._lines.trust()

        state.resume()
        conditions = _conditions(state, compressed=compressed)
        self._answered("GET", state.ask.path, conditions, patience, begin, take, begun)

    def _move(self, reply: Reply, state: Transfer, length: int | None, patience: Patience, pace: _Pace) -> None:
        """Write the body to its place; its end is what was announced, no byte more or less."""
        block = reply.read_ahead() if length and length <= pace.stride() else None
        if block is None:
            left = self._gathered(reply, state, length, patience, pace)
        else:
            left = 0
            state.advance(memoryview(block))
            pace.on_bytes(len(block))
            patience.check()
        if left:
            patience.check()
            raise ConnectionFailed("the connection was cut in the middle of the body", established=True)
        if (not reply.is_over and reply.read1(1)) or reply.has_excess:
            raise ProtocolError("the server sent more than it announced")
        state.end(is_all=left is None)

    def _gathered(
        self, reply: Reply, state: Transfer, length: int | None, patience: Patience, pace: _Pace
    ) -> int | None:
        """Read the body to where it belongs, as ``_moved`` does."""
        try:
            left = self._moved(reply, state, length, patience, pace)
        except BaseException:
            with contextlib.suppress(Exception):  # what came is worth keeping, and that failure worth telling
                self._flush(state)
            raise
        self._flush(state)
        return left

    def _moved(self, reply: Reply, state: Transfer, length: int | None, patience: Patience, pace: _Pace) -> int | None:
        """Read the body; gives how many of its bytes are missing, None if nobody knew how many there would be."""
        left = length
        while left is None or left > 0:
            most = min(_STRIDE, pace.stride())
            is_plain = left is not None and reply.is_plain
            size = self._fill(reply, state, min(left, most)) if left is not None and is_plain else None
            if size is None:
                block = reply.read1(min(_BLOCK, most) if left is None else min(left, _BLOCK, most))
                size = len(block)
                if left is not None and size > left:
                    raise ProtocolError("the server sent more than it announced")
                if block:
                    state.advance(memoryview(block))
            if not size:
                break
            left = None if left is None else left - size
            pace.on_bytes(size)
            patience.check()
        return left

    def _fill(self, reply: Reply, state: Transfer, most: int) -> int:
        """Have the socket fill the place of the bytes that come next; gives their number, 0 at the end.

        What has to be written to its place gathers in a buffer until there is a block of it.
        """
        room = state.room(most)
        if room is not None:
            size = reply.readinto1(room)
            if size:
                state.advance(room[:size], is_in_place=True)
            return size
        block = self._buffer()[: state.block(_GATHERED)]
        size = reply.readinto1(block[state.ahead : state.ahead + most])
        state.ahead += size
        if state.ahead == len(block):
            self._flush(state)
        return size

    def _flush(self, state: Transfer) -> None:
        """Write what is in the buffer to its place."""
        size, state.ahead = state.ahead, 0
        if size:
            state.advance(self._buffer()[:size])

    def _buffer(self) -> memoryview:
        """This thread's own, for bytes that have to be written to their place; small enough to stay in its cache."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(bytearray(_GATHERED))
        return buffer

    # -- connections, redirects, credentials

    def _answered(
        self,
        method: str,
        path: str,
        conditions: Mapping[str, str],
        patience: Patience,
        on_request: Callable[[], object],
        take: Callable[[Reply, Mapping[str, str]], T],
        begun: Begun | None = None,
    ) -> T:
        """What ``take`` gives for the answer to one request, after redirects, and its headers, names in lower case; its
        connection is reused only if the body was read to its end."""
        url = self._url_of(path)
        self._check(patience)
        if begun is None or begun.is_taken:
            begun = None
            self._await_turn(patience)
        else:
            begun.is_taken = True
        try:
            reply, linked = self._admitted(method, url, conditions, patience, on_request, begun)
            with translated():
                try:
                    said = reply.headers
                    said.pop(LINKED, None)  # of whoever answered in the end
                    if linked:
                        said[LINKED] = linked
                    taken = take(reply, said)
                    self._drain(reply, patience)
                    return taken
                except HttpError as error:
                    if isinstance(error, RateLimited):
                        self._host_at(reply.url, url).silence(error, self._clock())
                    self._drain(reply, patience)
                    raise
                finally:
                    reply.close()
        except NetworkError as error:
            self._leads.forget(url)  # it may be to blame
            if isinstance(error, ConnectionFailed | Timeout):
                self._check(patience)  # an interrupted wait ends in whatever error the moment makes: say what it was
            raise
        finally:
            self._sockets.wait_at_most(_for_ever)  # what bounded this request holds its caller
            if begun is not None:
                begun.call.drop()
            self._slots.release()

    def _await_turn(self, patience: Patience) -> None:
        """Wait for a connection to ask over, until one is free and the host has not asked for silence. It is to be
        given back."""
        slots = self._slots
        while True:
            self._keep_silence(patience)
            if slots.acquire(blocking=False):
                return
            until = self._clock() + patience.remaining(self.config.timeout)
            while not slots.acquire(timeout=max(0.0, min(until - self._clock(), _LOOK))):
                self._check(patience)
                if self._clock() >= until:
                    raise Timeout("no connection came free: raise max_connections, or ask from fewer threads")
            if self._host.refusal(self._clock()) is None:
                return
            slots.release()

    def _begin(self, on_request: Callable[[], object], patience: Patience) -> None:
        """Wait until a request may be sent; the host may have asked for silence meanwhile."""
        on_request()
        while self._host.refusal(self._clock()) is not None:
            self._keep_silence(patience)
            on_request()

    def _keep_silence(self, patience: Patience) -> None:
        """Wait until the host may be asked. Raises RateLimited at once where nobody would wait so long."""
        while (refusal := self._host.refusal(self._clock())) is not None:
            seconds = refusal.retry_after or 0.0
            if seconds > patience.silence or not patience.outlasts(seconds):
                raise refusal
            patience.sleep(seconds)

    def _check(self, patience: Patience) -> None:
        if self._closing.is_set():
            raise Cancelled("the client is closed: make a new one")
        patience.check()

    def _until(self, end: float, patience: Patience) -> float:
        """Seconds that the head of an answer may still take."""
        return min(end - self._clock(), patience.remaining(self.config.timeout))

    def _host_at(self, url: str, asked: str) -> Host:
        """Who answers there: our own host, which was ``asked``, or one that it sent us to."""
        origin = _origin_of(url)
        return self._host if origin == _origin_of(Request("GET", asked, {}, {}).url) else HOSTS.of(origin)

    def _admitted(
        self,
        method: str,
        url: str,
        conditions: Mapping[str, str],
        patience: Patience,
        on_request: Callable[[], object],
        begun: Begun | None = None,
    ) -> tuple[Reply, str | None]:
        """As ``_follow``; what was refused is asked for once more with what may be fresh: the token that a function
        gives, after a 401, or the signed address that a redirect leads to. A token that was refused is not sent again.
        """
        own = self._own_headers() if begun is None else begun.were
        lead = self._leads.find(url, conditions) if begun is None else None
        with translated():
            reply, linked = self._follow(method, url, own, conditions, patience, on_request, begun, lead)
        is_led_anew = lead is not None and is_lost(reply.status)
        if is_led_anew:
            self._end(reply, patience)
            with translated():
                reply, linked = self._follow(method, url, own, conditions, patience, on_request)
        if reply.status not in _REFUSED:
            return reply, linked
        try:
            is_redirected = not is_led_anew and reply.url != Request(method, url, own, conditions).url
            fresh = self._own_headers() if reply.status == 401 or is_redirected else own
        except BaseException:
            reply.close()
            raise
        if fresh == own and not is_redirected:
            return reply, linked
        self._end(reply, patience)
        with translated():
            return self._follow(method, url, fresh, conditions, patience, on_request)

    def _end(self, reply: Reply, patience: Patience) -> None:
        """Have done with an answer in whose place another is asked for."""
        try:
            self._drain(reply, patience)
        except BaseException:
            reply.close()
            raise
        self._check(patience)
        with translated():
            reply.close()

    def _follow(
        self,
        method: str,
        url: str,
        own: Mapping[str, str],
        conditions: Mapping[str, str],
        patience: Patience,
        on_request: Callable[[], object],
        begun: Begun | None = None,
        lead: Lead | None = None,
    ) -> tuple[Reply, str | None]:
        """The first answer that is no redirect, and the tag that our own server linked to it on the way, if any. Where
        there is a ``lead``, it begins there.

        Its head has both timeouts together to come, however it drips. Raises RateLimited where a redirect leads to a
        host that has asked for silence.
        """
        session = self._session()
        timeout = self.config.timeout
        headed_by = self._clock() + self.config.connect_timeout + timeout
        _check_sendable(conditions)
        request = Request(method, url, own, conditions)
        asked, first, home = url, request.url, _origin_of(request.url)
        linked, is_abroad = None, False
        if lead is not None:
            url, is_abroad, linked = lead
            request = Request(method, url, _travelling(own) if is_abroad else own, conditions)
        for _ in range(self.config.max_redirects + 1):
            url = request.url
            refusal = None if _origin_of(url) == home else HOSTS.of(_origin_of(url)).refusal(self._clock())
            if refusal is not None:
                raise refusal
            ready_at = self._clock()
            on_request()
            headed_by += self._clock() - ready_at
            self._sockets.wait_at_most(functools.partial(self._until, headed_by, patience))
            taken_over = begun.call.reply(request) if begun is not None else None
            begun = None
            reply = taken_over or ask(
                session,
                request,
                timeout=lambda: (
                    max(0.001, patience.remaining(self.config.connect_timeout)),
                    max(0.001, patience.remaining(timeout)),
                ),
                verify=self._verify(url),
                proxies=self._proxies(url),
            )
            location = reply.headers.get("location")
            if reply.status not in _REDIRECTS or location is None:
                self._sockets.wait_at_most(lambda: patience.remaining(timeout))
                if url == first:
                    self._leads.forget(asked)
                elif reply.status in (200, 206):
                    self._leads.keep(asked, Lead(url, is_abroad, linked))
                return reply, linked
            if _origin_of(url) == home:
                linked = reply.headers.get(LINKED, linked)
            try:
                target = _hop(url, location)
                self._drain(reply, patience)
            finally:
                reply.close()
            is_abroad = is_abroad or _origin_of(target) != home
            request = Request(method, target, _travelling(own) if is_abroad else own, conditions)
            self._check(patience)
        raise HttpError(reply.status, f"more than {self.config.max_redirects} redirects")

    def _drain(self, reply: Reply, patience: Patience) -> None:
        """Read what little is left of a body, so that its connection can be used again; a long rest is not worth it."""
        if reply.is_over:
            return
        left = _DRAIN
        ends = self._clock() + patience.remaining(_DRAIN_SECONDS)
        self._sockets.wait_at_most(lambda: ends - self._clock())
        with contextlib.suppress(OSError, urllib3.exceptions.HTTPError):
            while left > 0 and (block := reply.read1(min(left, _BLOCK))):
                left -= len(block)

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = requests.Session()
            session.trust_env = False
            adapter = Adapter(self._sockets)
            for scheme in ("http://", "https://"):
                session.mount(scheme, adapter)
            with self._lock:
                self._sessions.add(session)
            self._local.session = session
        return session

    def _own_headers(self) -> dict[str, str]:
        """Those of every request, with the credential that is given now. Not to be changed."""
        authorization, known = self._authorization(), self._own
        reason = authorization, *self.endpoint.headers.items()
        if known is not None and known[0] == reason:
            return known[1]
        own = {**self.endpoint.headers, "User-Agent": self.config.user_agent, "Accept": "*/*"}
        if authorization is not None:
            own["Authorization"] = authorization
        _check_sendable(own)
        self._own = reason, own
        return own

    def _authorization(self) -> str | None:
        auth = self.endpoint.auth
        if callable(auth):
            auth = _given_by(auth)
        if auth is None:
            return None
        if isinstance(auth, tuple):
            return "Basic " + base64.b64encode(":".join(auth).encode()).decode()
        return f"Bearer {auth}"

    def _verify(self, url: str) -> bool | str:
        verify = self.endpoint.verify
        if verify is True and url.startswith("https:"):
            verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        if url.startswith("https:") and isinstance(verify, str) and not os.path.exists(verify):
            raise ConfigurationError(
                f"there is no CA bundle at {verify!r}: see CdnEndpoint.verify, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"
            )
        return verify

    def _proxies(self, url: str) -> dict[str, str]:
        if self.endpoint.proxies is not None:
            return dict(self.endpoint.proxies)
        return dict(_environ_proxies("/".join(url.split("/", 3)[:3]), _proxy_variables()))

    def _patience(self) -> Patience:
        limit = self.config.retry.deadline
        deadline = None if limit is None else self._clock() + limit
        return Patience(deadline=deadline, closing=self._closing, clock=self._clock)

    def _tell_where(self, error: NetworkError, path: str, byte_range: RangeRequest | None) -> None:
        """Have an error that leaves here say which URL and which range it is about."""
        if error.url is None:
            error.url = redact_url(f"{self.endpoint.url.rstrip('/')}/{path.lstrip('/')}")
            error.byte_range = byte_range


def _conditions(state: Transfer, *, compressed: bool = False) -> dict[str, str]:
    """What one request says beside what every request does."""
    conditions = state.conditions()
    conditions["Accept-Encoding"] = "gzip" if compressed else "identity"
    return conditions


def _travelling(own: Mapping[str, str]) -> dict[str, str]:
    """What of the headers of every request may go to another origin."""
    return {name: value for name, value in own.items() if name.lower() in _TRAVELS}


def _for_ever() -> float:
    return math.inf


def _proxy_variables() -> tuple[object, ...]:
    """What the environment says of proxies, now. To ask it by its public means takes a microsecond for each name that
    it does not have, and there are nine for each request; so its dictionary is asked, where it has one."""
    known = getattr(os.environ, "_data", None)
    if os.name == "posix" and type(known) is dict:
        return tuple(map(known.get, _PROXY_VARIABLES_AS_BYTES))
    return tuple(map(os.environ.get, _PROXY_VARIABLES))


@functools.lru_cache(256)
def _environ_proxies(origin: str, said: tuple[object, ...]) -> dict[str, str]:
    """The environment's proxies, which ``said`` is all of: to search it for them costs as much as all the rest of what
    asking takes in Python."""
    return get_environ_proxies(origin, no_proxy=None)


def _given_by(function: Callable[[], str]) -> str | tuple[str, str] | None:
    """The credential that a function gives. Raises what it raises, and ConfigurationError for what is none."""
    auth = function()
    if callable(auth) or not is_auth(auth):
        raise ConfigurationError(f"the function given as auth= must return a token, not {type(auth).__name__}")
    return auth


def _check_sendable(headers: Mapping[str, str]) -> None:
    if any(map(_UNSENDABLE.search, headers.values())):  # requests would repeat what it refuses
        raise ConfigurationError(
            "a credential or a header holds what HTTP cannot carry: look for line ends, spaces in front and letters"
            " beyond Latin-1 in CdnEndpoint.auth and .headers"
        )


def _too_large(most: int) -> NetworkError:
    return NetworkError(f"the body is larger than {most} bytes: fetch ranges of it, or raise memory_budget")


def _decoded(body: bytes, coding: str, most: int) -> bytes:
    """The body without the compression that was asked for, at most ``most`` bytes of it."""
    coding = coding.lower()
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip"):
        raise ProtocolError(f"Content-Encoding {coding[:30]!r} was not asked for")
    decoder = zlib.decompressobj(wbits=31)
    try:
        decoded = decoder.decompress(body, most + 1)
    except zlib.error as error:
        raise ProtocolError(f"the compressed body is broken: {error}") from error
    if len(decoded) > most:
        raise _too_large(most)
    if not decoder.eof or decoder.unused_data:
        raise ProtocolError("the compressed body is cut, or has more behind its end")
    return decoded


@functools.lru_cache(256)
def _origin_of(url: str | None) -> tuple[str, str, int | None]:
    parts = urlsplit(url or "")
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _hop(url: str, location: str) -> str:
    """Where a redirect leads, as it will be asked for. Refuses one that leaves the web, or gives up encryption."""
    with contextlib.suppress(UnicodeError):
        location = location.encode("latin-1").decode()  # http.client reads Latin-1; what is not ASCII here is UTF-8
    target, scheme, host = "", "", ""
    with contextlib.suppress(ValueError):  # its words may repeat a signature
        # The library that connects must read it first: another reader may see another host behind a backslash.
        target = requests.Request("GET", urljoin(url, location)).prepare().url or ""
        scheme, host, _ = _origin_of(target)
    if not scheme or _CONTROL.search(target):
        raise InvalidUrl("the server redirects to something that is no URL")
    if scheme not in ("http", "https") or not host:
        raise InvalidUrl(f"the server redirects to a {scheme!r} address, which is not fetched")
    if urlsplit(url).scheme == "https" and scheme == "http":
        raise InvalidUrl("the server redirects from https to http, which would give up encryption")
    return target
