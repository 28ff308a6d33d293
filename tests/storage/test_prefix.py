"""The digest of what arrives in any order, and what is told of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.storage.journal import Span
from holotensor_net.storage.prefix import Prefix

DATA = bytes(range(90))


def read(start: int, stop: int) -> Iterator[memoryview]:
    yield memoryview(DATA)[start:stop]


def span(start: int, stop: int) -> Span:
    return Span(start, stop, blake3(DATA[start:stop]).hexdigest())


def settle(prefix: Prefix, start: int, stop: int) -> None:
    assert prefix.claim(prefix.add(start, stop))
    prefix.hash(read)
    prefix.hash_apart(read)
    prefix.release()


def test_what_closes_a_gap_while_another_is_hashed_takes_nothing_from_the_mark() -> None:
    prefix = Prefix()
    settle(prefix, 20, 30)
    settle(prefix, 60, 70)
    assert prefix.claim(prefix.add(0, 10))

    def read_slowly(start: int, stop: int) -> Iterator[memoryview]:
        yield from read(start, stop)
        prefix.add(10, 20)

    prefix.hash(read_slowly)
    assert (prefix.mark.prefix, set(prefix.mark.apart)) == (span(0, 10), {span(20, 30), span(60, 70)})
    prefix.release()
    assert prefix.spans() == [(0, 30), (60, 70)]


def test_what_the_prefix_has_reached_is_told_once() -> None:
    prefix = Prefix()
    settle(prefix, 20, 30)
    settle(prefix, 0, 20)
    assert (prefix.mark.prefix, prefix.mark.apart) == (span(0, 30), ())
    settle(prefix, 30, 90)
    assert prefix.digest(read, 90) == blake3(DATA).hexdigest()


def test_bytes_that_are_not_there_are_no_digest() -> None:
    with pytest.raises(OSError, match="before they should"):
        Prefix().digest(read, 91)


def unread(start: int, stop: int) -> Iterator[memoryview]:
    assert start == stop, "these bytes were at hand"
    yield from ()


def test_what_is_written_in_order_is_not_read_again() -> None:
    prefix = Prefix()
    for start in (0, 10, 30):
        prefix.follow(start, memoryview(DATA)[start : 30 if start == 10 else start + 10])
        assert prefix.claim(prefix.add(start, 30 if start == 10 else start + 10))
        prefix.hash(unread)
        prefix.release()
    prefix.follow(40, memoryview(DATA)[40:])
    assert prefix.mark.prefix == span(0, 40)
    assert prefix.digest(unread, 90) == blake3(DATA).hexdigest()


def test_what_is_hashed_ahead_of_what_is_settled_is_in_no_mark_yet() -> None:
    prefix = Prefix()
    prefix.follow(0, memoryview(DATA)[:50])
    settle(prefix, 0, 30)
    assert prefix.mark.prefix == span(0, 30)
    assert prefix.claim(prefix.add(30, 50))
    prefix.hash(unread)
    assert prefix.mark.prefix == span(0, 50)


def test_what_goes_over_bytes_that_were_hashed_ahead_has_them_forgotten() -> None:
    for start, stop in ((0, 90), (0, 10), (40, 50), (80, 90), (89, 200)):
        prefix = Prefix()
        prefix.follow(0, memoryview(bytes(90)))
        prefix.follow(start, memoryview(DATA)[start:stop])
        assert prefix.digest(read, 90) == blake3(DATA).hexdigest()


def test_who_writes_while_bytes_are_hashed_does_not_wait() -> None:
    prefix = Prefix()
    assert prefix.claim(prefix.add(0, 30))
    prefix.follow(0, memoryview(bytes(30)))
    prefix.hash(read)
    prefix.follow(30, memoryview(bytes(30)))
    prefix.release()
    assert prefix.digest(read, 90) == blake3(DATA).hexdigest()


@given(st.data())
def test_however_a_file_is_written_its_digest_is_that_of_what_it_holds(data: st.DataObject) -> None:
    file, prefix, settled = bytearray(40), Prefix(), [False] * 40

    def read_file(start: int, stop: int) -> Iterator[memoryview]:
        yield memoryview(bytes(file[start:stop]))

    for _ in range(data.draw(st.integers(1, 12))):
        start = data.draw(st.integers(0, 39))
        stop = data.draw(st.integers(start + 1, 40))
        if any(settled[start:stop]):
            continue  # will not change any more
        block = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
        prefix.follow(start, memoryview(block))
        file[start:stop] = block
        if data.draw(st.booleans()):
            settled[start:stop] = [True] * (stop - start)
            assert prefix.claim(prefix.add(start, stop))
            prefix.hash(read_file)
            mark = prefix.mark.prefix
            prefix.release()
            assert mark == Span(0, mark.stop, blake3(file[: mark.stop]).hexdigest())
    assert prefix.digest(read_file, 40) == blake3(file).hexdigest()
