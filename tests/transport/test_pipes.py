"""What belongs into a file goes there through a pipe; what cannot, the way of everything else, to the same bytes."""

from __future__ import annotations

import contextlib
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
from wire import END, HOLD, Answer, Request, Wire, part, write_certificate

from holotensor_net.config import CdnEndpoint, ClientConfig, RetryConfig
from holotensor_net.engine.sinks import Scatter
from holotensor_net.errors import CacheError, Cancelled, ChecksumMismatch, NetworkError, StalledTransfer
from holotensor_net.storage.blobs import BlobStore
from holotensor_net.storage.parts import PartFile
from holotensor_net.transport import pipes
from holotensor_net.transport.client import Ask, HttpClient
from holotensor_net.transport.pipes import Pipe
from holotensor_net.values import RangeRequest

pytestmark = pytest.mark.skipif(not hasattr(os, "splice"), reason="the system has no such pipes")

SIZE = 3_000_017
DATA = random.Random(7).randbytes(SIZE)
TAG = '"v1"'
ONCE = RetryConfig(max_retries=0)
TWICE = RetryConfig(max_retries=1, initial_backoff=0.001, jitter=False)


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


def test_a_file_system_that_takes_nothing_from_pipes_is_written_to(
    store: BlobStore, piped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice

    def only_from_sockets(src: int, dst: int, count: int, **more: Any) -> int:
        if "offset_dst" in more:
            raise OSError(errno.EINVAL, "not here")
        return splice(src, dst, count, **more)

    monkeypatch.setattr(os, "splice", only_from_sockets)
    with Wire([whole()]) as wire, client(wire.url) as one:
        assert brought(one, store) == DATA
    assert sum(piped) > 0.9 * SIZE


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


def waiting(answered: Answer, store: BlobStore, act: Callable[[HttpClient], None], **settings: Any) -> NetworkError:
    """How a transfer ends that waits for more in the middle of its body, once ``act`` was called; it is not long."""
    with Wire(answered) as wire, client(wire.url, **settings) as one, store.create(SIZE) as made:
        came, ended = threading.Event(), []

        def run() -> None:
            wanted = RangeRequest(0, SIZE)
            try:
                one.transfer(Ask("object", wanted), lambda *_: Scatter([(wanted, made)]), on_bytes=lambda _: came.set())
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


def test_who_waits_for_a_pipe_to_fill_is_woken_by_an_end(store: BlobStore, piped: list[int]) -> None:
    error = waiting([whole()[: -SIZE // 2], HOLD], store, lambda one: one.close())
    assert isinstance(error, Cancelled)
    assert piped


def test_a_server_that_falls_silent_is_not_waited_for(store: BlobStore, piped: list[int]) -> None:
    error = waiting([whole()[: -SIZE // 2], HOLD], store, lambda _: None, timeout=0.3)
    assert isinstance(error, StalledTransfer)
    assert piped


def test_a_disk_that_fails_ends_the_transfer(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    splice = os.splice

    def failing(src: int, dst: int, count: int, **more: Any) -> int:
        if "offset_dst" in more:
            raise OSError(errno.EIO, "worn out")
        return splice(src, dst, count, **more)

    monkeypatch.setattr(os, "splice", failing)
    with Wire([whole()]) as wire, client(wire.url) as one, pytest.raises(CacheError):
        brought(one, store)


def test_a_part_file_takes_no_more_than_belongs_to_it_and_no_less_than_was_said(store: BlobStore) -> None:
    with Pipe() as pipe, store.create(100_000) as made:
        assert pipe.is_there
        os.write(pipe._ends[1], b"x" * 10)  # type: ignore[index]
        for offset, size in ((-1, 10), (99_991, 10)):
            with pytest.raises(CacheError):
                made.take(offset, pipe.source, size)
        made.take(99_990, pipe.source, 10)
        assert made.view()[-11:] == b"\0" + b"x" * 10
        made.discard()
        with pytest.raises(CacheError):
            made.take(0, pipe.source, 10)
