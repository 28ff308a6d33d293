"""The digest of what arrives in any order, and what is told of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blake3 import blake3

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
