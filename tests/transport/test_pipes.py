"""What belongs into a file goes there through a pipe; what cannot, the way of everything else, to the same bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re
import select
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wire import END, HOLD, URGENT, Answer, Request, Wire, chunked, drip, part, write_certificate

from holotensor_net.config import CdnEndpoint, ClientConfig, RetryConfig
from holotensor_net.engine.sinks import Scatter
from holotensor_net.errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    InsufficientDisk,
    NetworkError,
    StalledTransfer,
)
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.parts import PartFile
from holotensor_net.transport import pipes
from holotensor_net.transport.client import Ask, HttpClient
from holotensor_net.transport.pipes import Pipe
from holotensor_net.transport.sockets import Interrupt, LiveSockets, _Incoming
from holotensor_net.values import RangeRequest

pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="the system has no such pipes")

SIZE = 3_000_017
DATA = random.Random(7).randbytes(SIZE)
TAG = '"v1"'
ONCE = RetryConfig(max_retries=0)
TWICE = RetryConfig(max_retries=1, initial_backoff=0.001, jitter=False)
CANNOT = [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "cache")


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what went through pipes."""
    sizes: list[int] = []
    take = PartFile.take

    def noted(self: PartFile, offset: int, pipe: int, size: int) -> None:
        sizes.append(size)
        take(self, offset, pipe, size)

    monkeypatch.setattr(PartFile, "take", noted)
    return sizes


class Splices:
    """os.splice with a twist: ``before`` is called with the side, "socket" or "file", that it is called for, and the
    number of the call on that side, from 1; and ``after`` with the same, once bytes were moved."""

    def __init__(
        self,
        before: Callable[[str, int], None] = lambda *_: None,
        after: Callable[[str, int], None] = lambda *_: None,
        most: int = 1 << 30,
    ) -> None:
        self.calls = {"socket": 0, "file": 0}
        self._real, self._before, self._after, self._most = os.splice, before, after, most

    def __call__(self, src: int, dst: int, count: int, **more: Any) -> int:
        side = "file" if "offset_dst" in more else "socket"
        self.calls[side] += 1
        self._before(side, self.calls[side])
        moved = self._real(src, dst, min(count, self._most) if side == "file" else count, **more)
        self._after(side, self.calls[side])
        return moved


def failing(number: int, side: str, first: int = 1) -> Callable[[str, int], None]:
    """Fails calls on one side, from the ``first`` on, with an error of this number."""

    def fail(where: str, call: int) -> None:
        if where == side and call >= first:
            raise OSError(number, os.strerror(number))

    return fail


def open_pipes() -> list[str]:
    folder, found = "/proc/self/fd", []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"{folder}/{name}"))
    return sorted(link for link in found if link.startswith("pipe:"))


@pytest.fixture(autouse=True)
def _no_pipe_left_open() -> Iterator[None]:
    before = open_pipes()
    yield
    assert open_pipes() == before


def client(url: str, retry: RetryConfig = ONCE, *, verify: Any = True, **settings: Any) -> HttpClient:
    return HttpClient(CdnEndpoint(url, verify=verify), ClientConfig(retry=retry, **settings))


def brought(one: HttpClient, store: BlobStore, wanted: RangeRequest | None = None) -> bytes:
    """What a transfer puts into a file."""
    wanted = wanted or RangeRequest(0, SIZE)
    with store.create(wanted.length) as made:
        one.transfer(Ask("object", wanted), lambda *_: Scatter([(wanted, made)]))
        return bytes(made.view())


def whole(**headers: object) -> bytes:
    return part(DATA, 0, SIZE, etag=TAG, **headers)


def test_a_long_body_goes_into_its_file_through_a_pipe(store: BlobStore, piped: list[int]) -> None:
    with Wire([whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert sum(piped) > 0.9 * SIZE
    assert max(piped) <= 1 << 20


def test_the_connection_is_used_again_and_what_follows_is_not_mixed_up(store: BlobStore, piped: list[int]) -> None:
    def answered(request: Request) -> bytes:
        first, last = map(int, re.findall(r"\d+", request.headers["range"]))
        return part(DATA, first, last + 1, etag=TAG)

    spans = [RangeRequest(start, start + 200_000 + start) for start in (0, 5, 70_001, 300_000)]
    with Wire(always=answered) as wire, client(wire.url) as one:
        for wanted in spans:
            assert brought(one, store, wanted) == DATA[wanted.start : wanted.stop]
        assert wire.connections == 1
    assert sum(piped) > 0.5 * sum(wanted.length for wanted in spans)


def test_pieces_that_come_as_they_like_are_put_where_they_belong(store: BlobStore, piped: list[int]) -> None:
    def script() -> Iterator[bytes | float]:
        chance, at = random.Random(1), 0
        yield whole()[:-SIZE]
        while at < SIZE:
            stop = at + chance.choice((1, 100, 4096, 40_000, 65_537, 700_000))
            yield DATA[at:stop]
            at = stop
            yield 0.001

    with Wire(lambda _: script()) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert sum(piped) > SIZE // 2


def test_short_places_and_long_ones_side_by_side_get_their_own(store: BlobStore, piped: list[int]) -> None:
    lengths = [10_000, 200_001, 5, 40_000, 700_000, 33_000, 1_000_011, 1]
    spans, start = [], 0
    for length in lengths:
        spans.append(RangeRequest(start, start + length))
        start += length + length % 7  # with gaps that nobody wants
    made = [store.create(span.length) for span in spans]
    wanted = RangeRequest(0, spans[-1].stop)
    with Wire([part(DATA, 0, wanted.stop)]) as wire, client(wire.url) as one:
        one.transfer(Ask("object", wanted), lambda *_: Scatter(list(zip(spans, made, strict=True))))
    for span, its in zip(spans, made, strict=True):
        assert its.view() == DATA[span.start : span.stop]
        its.discard()
    assert 0 < sum(piped) < wanted.stop


@pytest.mark.parametrize("sent", [100_000, 1 << 20, 2_000_003])
def test_a_body_that_is_cut_goes_on_where_it_ended(store: BlobStore, piped: list[int], sent: int) -> None:
    def rest(request: Request) -> bytes:
        assert request.headers["range"] == f"bytes={sent}-{SIZE - 1}"
        return part(DATA, sent, SIZE, etag=TAG)

    with Wire([whole()[: -SIZE + sent], END], rest) as wire, client(wire.url, TWICE) as one:
        assert brought(one, store) == DATA
    assert piped


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("number", CANNOT, ids=errno.errorcode.get)
def test_a_file_system_that_takes_nothing_from_pipes_is_written_to(
    store: BlobStore, piped: list[int], monkeypatch: pytest.MonkeyPatch, number: int, first: int
) -> None:
    """Also what a pipe still holds of which some was moved."""
    monkeypatch.setattr(os, "splice", Splices(failing(number, "file", first), most=1000))
    with Wire([whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert sum(piped) > 0.9 * SIZE


@pytest.mark.parametrize("number", CANNOT, ids=errno.errorcode.get)
def test_where_sockets_cannot_be_spliced_they_are_read(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Pipe, "_are_filled", True)  # what this process finds out is forgotten with the test
    splices = Splices(failing(number, "socket"))
    monkeypatch.setattr(os, "splice", splices)
    with Wire(always=[whole()]) as wire, client(wire.url) as one:
        for _ in range(2):
            assert brought(one, store) == DATA
        assert len(wire.requests) == 2
    assert splices.calls["socket"] == 1  # once is enough to know


def test_where_sockets_cannot_be_spliced_is_found_out_in_the_middle_too(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipe, "_are_filled", True)
    monkeypatch.setattr(os, "splice", Splices(failing(errno.EINVAL, "socket", 3)))
    with Wire([whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert not Pipe._are_filled


def test_without_pipes_of_use_bytes_go_the_usual_way(
    store: BlobStore, piped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "_LEAST", 1 << 40)  # as for a user who has as many as one may have
    with Wire([whole()], [whole()], [whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
        monkeypatch.setattr(os, "pipe", lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
        assert brought(one, store) == DATA
        monkeypatch.delattr(os, "splice")
        assert brought(one, store) == DATA
    assert not piped


def test_a_pipe_whose_size_nobody_tells_is_not_used_and_not_left_open(
    store: BlobStore, piped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    with Wire([whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert not piped


def test_what_comes_in_chunks_does_not_go_through_a_pipe(store: BlobStore, piped: list[int]) -> None:
    pieces = [DATA[at : at + 100_000] for at in range(0, SIZE, 100_000)]
    answer = chunked(*pieces, status=206, content_range=f"bytes 0-{SIZE - 1}/{SIZE}", etag=TAG)
    with Wire([answer]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert not piped


def test_what_is_encrypted_does_not_go_through_a_pipe(store: BlobStore, piped: list[int], tmp_path: Path) -> None:
    with Wire([whole()], tls=True) as wire, client(wire.url, verify=str(write_certificate(tmp_path))) as one:
        assert brought(one, store) == DATA
    assert not piped


def test_what_has_a_digest_on_the_way_is_held_against_it(store: BlobStore, piped: list[int]) -> None:
    def digest(data: bytes) -> str:
        return f"sha-256=:{b64encode(hashlib.sha256(data).digest()).decode()}:"

    answers = [[whole(content_digest=digest(data))] for data in (DATA, b"other")]
    with Wire(*answers) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
        with pytest.raises(ChecksumMismatch):
            brought(one, store)
    assert not piped


def test_bytes_beyond_the_end_are_never_taken(store: BlobStore, piped: list[int]) -> None:
    with Wire([whole() + b"more"], always=[whole()]) as wire, client(wire.url, TWICE) as one:
        for _ in range(2):
            assert brought(one, store) == DATA
        assert wire.connections == 2  # what is in front of the next answer would be taken for it


@pytest.mark.parametrize("at", [70_000, 200_000, SIZE - 1])
def test_an_urgent_byte_is_no_part_of_the_body_and_holds_nobody(store: BlobStore, piped: list[int], at: int) -> None:
    """The kernel says that there is something to read behind it, and splices nothing."""
    with Wire([whole()[: -SIZE + at], URGENT, DATA[at:]]) as wire, client(wire.url, timeout=5.0) as one:
        assert brought(one, store) == DATA
        assert len(wire.requests) == 1
    assert sum(piped) > 0.5 * SIZE


def test_an_urgent_byte_is_not_the_end_where_the_end_has_come_too() -> None:
    """Then the kernel does not say that it splices nothing: it says that it is at the end."""
    live = LiveSockets()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        theirs, _ = server.accept()
        with theirs:
            theirs.sendall(b"a" * 5000)
            theirs.send(b"!", socket.MSG_OOB)
            theirs.sendall(b"b" * 5000)
        ended = select.poll()
        ended.register(sock, select.POLLRDHUP)
        assert ended.poll(5000)
        incoming = _Incoming(sock, sock.makefile("rb", buffering=0), live)
        incoming.begin_body(may_end=True)
        came = []

        def taken(source: int, size: int, _: bool) -> int:
            came.append(os.read(source, size))
            return len(came[-1])

        with Pipe(taken) as pipe, contextlib.closing(incoming):
            assert pipe.is_there
            while incoming.pipe(pipe, 1 << 16):
                pipe.empty()
        assert b"".join(came) == b"a" * 5000 + b"b" * 5000


def waiting(
    answered: Answer,
    store: BlobStore,
    act: Callable[[HttpClient], None],
    interrupt: Interrupt | None = None,
    **settings: Any,
) -> NetworkError:
    """How a transfer ends that waits for more in the middle of its body, once ``act`` was called; it is not long."""
    with Wire(answered) as wire, client(wire.url, **settings) as one, store.create(SIZE) as made:
        came, ended = threading.Event(), []

        def run() -> None:
            wanted = RangeRequest(0, SIZE)
            sink = Scatter([(wanted, made)])
            try:
                one.transfer(Ask("object", wanted), lambda *_: sink, on_bytes=lambda _: came.set(), interrupt=interrupt)
            except NetworkError as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert came.wait(20)
        began = time.monotonic()
        act(one)
        thread.join(20)
        assert not thread.is_alive()
        assert time.monotonic() - began < 5  # of the 30 s that it would wait for bytes
        return ended[0]


SILENT = {
    "a silence": [whole()[: -SIZE // 2], HOLD],
    "an urgent byte": [whole()[: -SIZE // 2], URGENT, HOLD],
    "an urgent byte and one more": [whole()[: -SIZE // 2], URGENT, b"x", HOLD],
}


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT)
def test_who_waits_for_a_pipe_to_fill_is_woken_by_an_end(store: BlobStore, piped: list[int], script: Answer) -> None:
    error = waiting(script, store, lambda one: one.close())
    assert isinstance(error, Cancelled)
    assert piped


def test_who_waits_for_a_pipe_to_fill_is_woken_by_an_interrupt(store: BlobStore, piped: list[int]) -> None:
    interrupt = Interrupt()
    waiting([whole()[: -SIZE // 2], HOLD], store, lambda _: interrupt.fire(), interrupt)
    assert piped


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT)
def test_a_server_that_falls_silent_is_not_waited_for(store: BlobStore, piped: list[int], script: Answer) -> None:
    error = waiting(script, store, lambda _: None, timeout=0.3)
    assert isinstance(error, StalledTransfer)
    assert piped


@pytest.mark.parametrize("urgent", [[], [URGENT]], ids=["", "an urgent byte"])
def test_a_server_that_drips_is_not_waited_for(store: BlobStore, piped: list[int], urgent: list[Any]) -> None:
    error = waiting([whole()[: -SIZE // 2], *urgent, *drip(bytes(500), 0.02)], store, lambda _: None, timeout=0.3)
    assert isinstance(error, StalledTransfer)
    assert piped


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, CacheError), (errno.ENOSPC, InsufficientDisk)])
def test_a_disk_that_fails_ends_the_transfer(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """And what its pipe still held is in nobody's way."""
    with Wire(always=[whole()]) as wire, client(wire.url) as one:
        with monkeypatch.context() as patched:
            patched.setattr(os, "splice", Splices(failing(number, "file", 2), most=1000))
            with pytest.raises(kind):
                brought(one, store)
        assert brought(one, store) == DATA
        assert wire.connections == 2


@pytest.mark.parametrize("side", ["socket", "file"])
def test_an_interrupt_between_two_steps_leaves_nothing_in_the_way(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Ctrl-C in the thread that transfers, when bytes have just been moved."""

    def interrupted(where: str, call: int) -> None:
        if (where, call) == (side, 2):
            raise KeyboardInterrupt

    with Wire(always=[whole()]) as wire, client(wire.url) as one:
        with monkeypatch.context() as patched:
            patched.setattr(os, "splice", Splices(after=interrupted, most=1000))
            with pytest.raises(KeyboardInterrupt):
                brought(one, store)
        assert brought(one, store) == DATA
        assert wire.connections == 2


def test_an_interrupt_writes_nothing_twice(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C when what came with the head is in the pipe."""
    pour, poured = Pipe.pour, []

    def interrupted(self: Pipe, block: bytes) -> int:
        size = pour(self, block)
        if size:
            poured.append(size)
            raise KeyboardInterrupt
        return size

    monkeypatch.setattr(Pipe, "pour", interrupted)
    with Wire(always=[whole()]) as wire, client(wire.url) as one, store.create(SIZE) as made:
        with pytest.raises(KeyboardInterrupt):
            one.transfer(Ask("object", RangeRequest(0, SIZE)), lambda *_: Scatter([(RangeRequest(0, SIZE), made)]))
        (size,) = poured
        assert made.view()[: 2 * size] == DATA[:size] + bytes(size)


def test_a_part_file_takes_no_more_than_belongs_to_it_and_no_less_than_was_said(store: BlobStore) -> None:
    source, end = os.pipe()
    with store.create(100_000) as made, open(source, "rb"), open(end, "wb", buffering=0) as pipe:
        pipe.write(b"x" * 10)
        for offset, size in ((-1, 10), (99_991, 10)):
            with pytest.raises(CacheError):
                made.take(offset, source, size)
        made.take(99_990, source, 10)
        assert made.view()[-11:] == b"\0" + b"x" * 10
        made.discard()
        with pytest.raises(CacheError):
            made.take(0, source, 10)


def test_a_pipe_gathers_until_it_is_full_and_gives_what_its_owner_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full one does not wait for room that nobody makes."""
    monkeypatch.setattr(pipes, "_ROOM", 1 << 16)  # sixteen fragments of packets
    given: list[tuple[int, bool]] = []
    came = []

    def taken(source: int, size: int, is_all: bool) -> int:
        given.append((size, is_all))
        came.append(os.read(source, size if is_all else size - 1000))
        return len(came[-1])

    data = random.Random(3).randbytes(4 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        theirs, _ = server.accept()
        with theirs, Pipe(taken) as pipe:
            assert pipe.is_there
            sender = threading.Thread(target=theirs.sendall, args=(data,))
            sender.start()
            left = len(data)
            while left:
                assert select.select([sock], [], [], 10)[0]
                left -= pipe.fill(sock, left)
            pipe.empty()
            assert pipe.held == 0
            sender.join(10)
    assert b"".join(came) == data
    assert [is_all for _, is_all in given] == [False] * (len(given) - 1) + [True]
    assert len(given) > 2


def test_what_could_not_be_moved_on_is_not_moved_twice() -> None:
    def taken(source: int, size: int, is_all: bool) -> int:
        os.read(source, 10)
        raise OSError(errno.EIO, "no")

    with Pipe(taken) as pipe:
        assert pipe.is_there
        pipe.pour(b"x" * 100)
        with pytest.raises(OSError, match="no"):
            pipe.empty()
        pipe.empty()
