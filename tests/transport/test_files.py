"""A long body goes into its file in blocks, however it comes, and whatever ends it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
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
from holotensor_net.transport.client import Ask, HttpClient
from holotensor_net.transport.sockets import Interrupt, _Incoming
from holotensor_net.values import RangeRequest

SIZE = 3_000_017
MIB = 1 << 20
DATA = random.Random(7).randbytes(SIZE)
TAG = '"v1"'
ONCE = RetryConfig(max_retries=0)
TWICE = RetryConfig(max_retries=1, initial_backoff=0.001, jitter=False)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "cache")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where writes to files begin and end."""
    spans: list[tuple[int, int]] = []
    write = PartFile.write

    def noted(self: PartFile, offset: int, buffer: Any) -> None:
        spans.append((offset, offset + len(buffer)))
        write(self, offset, buffer)

    monkeypatch.setattr(PartFile, "write", noted)
    return spans


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


def test_a_long_body_is_written_in_blocks_of_its_file(store: BlobStore, written: list[tuple[int, int]]) -> None:
    """Wherever in the object it begins: files that are written so lie in large pages."""
    begin = 70_001
    with Wire([part(DATA, begin, SIZE)]) as wire, client(wire.url) as one:
        assert brought(one, store, RangeRequest(begin, SIZE)) == DATA[begin:]
    assert written == [(0, MIB), (MIB, 2 * MIB), (2 * MIB, SIZE - begin)]


def test_the_connection_is_used_again_and_what_follows_is_not_mixed_up(store: BlobStore) -> None:
    def answered(request: Request) -> bytes:
        first, last = map(int, re.findall(r"\d+", request.headers["range"]))
        return part(DATA, first, last + 1, etag=TAG)

    spans = [RangeRequest(start, start + 200_000 + start) for start in (0, 5, 70_001, 300_000)]
    with Wire(always=answered) as wire, client(wire.url) as one:
        for wanted in spans:
            assert brought(one, store, wanted) == DATA[wanted.start : wanted.stop]
        assert wire.connections == 1


def test_pieces_that_come_as_they_like_are_put_where_they_belong(store: BlobStore) -> None:
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


def test_short_places_and_long_ones_side_by_side_get_their_own(store: BlobStore) -> None:
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


@pytest.mark.parametrize("sent", [100_000, 1 << 20, 2_000_003])
def test_a_body_that_is_cut_goes_on_where_it_ended(store: BlobStore, sent: int) -> None:
    def rest(request: Request) -> bytes:
        assert request.headers["range"] == f"bytes={sent}-{SIZE - 1}"
        return part(DATA, sent, SIZE, etag=TAG)

    with Wire([whole()[: -SIZE + sent], END], rest) as wire, client(wire.url, TWICE) as one:
        assert brought(one, store) == DATA


def test_what_comes_in_chunks_comes_whole(store: BlobStore) -> None:
    pieces = [DATA[at : at + 100_000] for at in range(0, SIZE, 100_000)]
    answer = chunked(*pieces, status=206, content_range=f"bytes 0-{SIZE - 1}/{SIZE}", etag=TAG)
    with Wire([answer]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA


def test_what_is_encrypted_comes_whole(store: BlobStore, tmp_path: Path) -> None:
    with Wire([whole()], tls=True) as wire, client(wire.url, verify=str(write_certificate(tmp_path))) as one:
        assert brought(one, store) == DATA


def test_what_has_a_digest_on_the_way_is_held_against_it(store: BlobStore) -> None:
    def digest(data: bytes) -> str:
        return f"sha-256=:{b64encode(hashlib.sha256(data).digest()).decode()}:"

    answers = [[whole(content_digest=digest(data))] for data in (DATA, b"other")]
    with Wire(*answers) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
        with pytest.raises(ChecksumMismatch):
            brought(one, store)


def test_bytes_beyond_the_end_are_never_taken(store: BlobStore) -> None:
    with Wire([whole() + b"more"], always=[whole()]) as wire, client(wire.url, TWICE) as one:
        for _ in range(2):
            assert brought(one, store) == DATA
        assert wire.connections == 2  # what is in front of the next answer would be taken for it


@pytest.mark.parametrize("at", [70_000, 200_000, SIZE - 1])
def test_an_urgent_byte_is_no_part_of_the_body_and_holds_nobody(store: BlobStore, at: int) -> None:
    with Wire([whole()[: -SIZE + at], URGENT, DATA[at:]]) as wire, client(wire.url, timeout=5.0) as one:
        assert brought(one, store) == DATA
        assert len(wire.requests) == 1


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
def test_who_waits_for_more_is_woken_by_an_end(store: BlobStore, script: Answer) -> None:
    error = waiting(script, store, lambda one: one.close())
    assert isinstance(error, Cancelled)


def test_who_waits_for_more_is_woken_by_an_interrupt(store: BlobStore) -> None:
    interrupt = Interrupt()
    waiting([whole()[: -SIZE // 2], HOLD], store, lambda _: interrupt.fire(), interrupt)


@pytest.mark.parametrize("script", SILENT.values(), ids=SILENT)
def test_a_server_that_falls_silent_is_not_waited_for(store: BlobStore, script: Answer) -> None:
    error = waiting(script, store, lambda _: None, timeout=0.3)
    assert isinstance(error, StalledTransfer)


@pytest.mark.parametrize("urgent", [[], [URGENT]], ids=["", "an urgent byte"])
def test_a_server_that_drips_is_not_waited_for(store: BlobStore, urgent: list[Any]) -> None:
    error = waiting([whole()[: -SIZE // 2], *urgent, *drip(bytes(500), 0.02)], store, lambda _: None, timeout=0.3)
    assert isinstance(error, StalledTransfer)


class Twisted:
    """A function that calls ``twist`` with the number of its call, from 1, once it has done its work."""

    def __init__(self, real: Callable[..., Any], twist: Callable[[int], None]) -> None:
        self.calls = 0
        self._real, self._twist = real, twist

    def __call__(self, *place: Any) -> Any:
        self.calls += 1
        result = self._real(*place)
        self._twist(self.calls)
        return result


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, CacheError), (errno.ENOSPC, InsufficientDisk)])
def test_a_disk_that_fails_ends_the_transfer(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """And what was not written is in nobody's way."""

    def fail(call: int) -> None:
        if call >= 2:
            raise OSError(number, os.strerror(number))

    with Wire(always=[whole()]) as wire, client(wire.url) as one:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", Twisted(os.pwrite, fail))
            with pytest.raises(kind):
                brought(one, store)
        assert brought(one, store) == DATA
        assert wire.connections == 2


@pytest.mark.parametrize("side", ["socket", "file"])
def test_an_interrupt_between_two_steps_leaves_nothing_in_the_way(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Ctrl-C in the thread that transfers, when bytes have just been moved."""

    def interrupt(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    with Wire(always=[whole()]) as wire, client(wire.url) as one:
        with monkeypatch.context() as patched:
            if side == "file":
                patched.setattr(os, "pwrite", Twisted(os.pwrite, interrupt))
            else:
                twisted = Twisted(_Incoming.readinto, interrupt)
                patched.setattr(_Incoming, "readinto", lambda *place: twisted(*place))
            with pytest.raises(KeyboardInterrupt):
                brought(one, store)
        assert brought(one, store) == DATA
        assert wire.connections == 2
