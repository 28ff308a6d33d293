"""What is asked for again after a failure: the whole table, in values."""

from __future__ import annotations

import pytest

from holotensor_net.engine.books import Books, identity_of
from holotensor_net.engine.loads import Attempt, Load, Waiter
from holotensor_net.engine.recovery import Again, Gone, Moved, Recovery, is_failing, silence_of, summary
from holotensor_net.engine.request_cache import Found
from holotensor_net.errors import (
    CacheError,
    Cancelled,
    ChecksumMismatch,
    ConnectionFailed,
    DeadlineExceeded,
    HttpError,
    NetworkError,
    NotFound,
    ObjectChanged,
    RangeNotSupported,
    RateLimited,
    RetriesExhausted,
    StalledTransfer,
)
from holotensor_net.storage.cache import CacheEntry
from holotensor_net.values import HeadInfo, LoadRequest, RangeRequest, Validator

NOTHING, PIECE, ALL = Again
V1 = Validator('"v1"', None, True)
WEAK = Validator('W/"v1"', None, False)
DIGEST = "sha256:" + "0" * 64
ENTRY = CacheEntry(fragment_id="id", size=1)


def load_of(begun: Validator | None = None, *, held_of: int | None = None, **fields: object) -> Load:
    """A load; ``begun``: of which an answer with that validator has begun to come."""
    held = None if held_of is None else Found("key", ENTRY, held_of, is_fresh=False)
    request = LoadRequest("id", "file", **fields)  # type: ignore[arg-type]
    load = Books().open(request, identity_of(request), held, 0.0, whole=False)
    if begun is not None:
        load.attempt = Attempt(endpoint=0, head=HeadInfo(100, begun), wanted=RangeRequest(0, 100), missing=50)
    return load


def again(load: Load, error: NetworkError, endpoint: int | None = 0, *, endpoints: int = 1, **options: object) -> Again:
    options = {"is_passing": False, "now": 0.0} | options
    return Recovery(endpoints, options.pop("rangeless", ())).again(load, error, endpoint, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "validator", "expected"),
    [
        (Cancelled("x"), V1, NOTHING),
        (NotFound(404), V1, PIECE),
        (ConnectionFailed("x"), V1, PIECE),
        (ConnectionFailed("x"), WEAK, ALL),
        (ConnectionFailed("x"), None, ALL),
        (ChecksumMismatch("a", "b"), V1, ALL),
        (ObjectChanged("x"), V1, ALL),
        (Moved("x"), None, ALL),
        (Gone("x"), None, ALL),
        (CacheError("x"), V1, ALL),
        (RangeNotSupported("x"), None, ALL),
        (HttpError(416), V1, ALL),
    ],
)
def test_what_is_asked_for_where_there_is_another_endpoint(
    error: NetworkError, validator: Validator | None, expected: Again
) -> None:
    assert again(load_of(validator), error, endpoints=2) is expected


@pytest.mark.parametrize("error", [NotFound(404), ConnectionFailed("x"), RangeNotSupported("x")])
def test_each_endpoint_is_asked_once(error: NetworkError) -> None:
    load = load_of(V1, byte_range=RangeRequest(0, 100))
    assert again(load, error, 0, endpoints=2) is PIECE
    assert again(load, error, 1, endpoints=2) is NOTHING
    assert load.failures == (error, error)


def test_what_passes_is_asked_again_and_blames_nobody() -> None:
    load = load_of(V1)
    assert again(load, ConnectionFailed("x"), is_passing=True) is PIECE
    assert (load.failures, load.tried) == ((), set())


@pytest.mark.parametrize(("until", "expected"), [([1.0], NOTHING), ([1.0, 3.0], PIECE), ([1.0, None], PIECE)])
def test_a_deadline_is_that_of_whoever_waits_still(until: list[float | None], expected: Again) -> None:
    load = load_of(V1)
    load.waiters = [Waiter(load, load.request, 0.0, end, is_shared=True) for end in until]
    assert again(load, DeadlineExceeded("x"), now=2.0) is expected


def test_an_object_that_is_replaced_again_and_again_is_given_up() -> None:
    load = load_of(V1)
    assert [again(load, ObjectChanged("x")) for _ in range(2)] == [ALL, NOTHING]


def test_a_version_that_was_asked_for_is_not_replaced_by_another() -> None:
    assert again(load_of(V1, validator=V1), ObjectChanged("x")) is NOTHING


def test_wrong_bytes_are_asked_for_anew_only_where_nobody_else_has_them() -> None:
    load = load_of(V1, checksum=DIGEST)
    assert again(load, ChecksumMismatch("a", "b"), 0, endpoints=2) is ALL
    assert load.tried == {0}
    assert again(load, ChecksumMismatch("a", "b"), 1, endpoints=2) is ALL
    assert load.tried == {0}  # the last one is given another chance
    assert again(load, ChecksumMismatch("a", "b"), 1, endpoints=2) is NOTHING


def test_a_disk_that_fails_is_done_without_once() -> None:
    load = load_of(V1)
    assert again(load, CacheError("x")) is ALL
    assert load.in_memory
    assert again(load, CacheError("x")) is NOTHING


def test_those_without_ranges_come_last() -> None:
    load, options = load_of(V1), {"endpoints": 2, "rangeless": (1,)}
    assert Recovery(2, (1,)).excluded(load) == {1}
    assert again(load, ConnectionFailed("x"), 0, **options) is ALL  # type: ignore[arg-type]
    assert load.whole
    assert Recovery(2, (1,)).excluded(load) == {0}
    assert again(load, ConnectionFailed("x"), 1, **options) is NOTHING  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "endpoint", "stands"),
    [
        (ConnectionFailed("x"), 0, True),
        (HttpError(500), 0, True),
        (NotFound(404), 0, False),
        (NotFound(404), 1, True),
        (Gone("x"), 0, False),
    ],
)
def test_what_is_held_may_stand_in_unless_its_own_server_says_otherwise(
    error: NetworkError, endpoint: int, stands: bool
) -> None:
    load = load_of(held_of=0)
    again(load, error, endpoint, endpoints=2)
    assert (load.held is not None) is stands


def test_who_fails_and_who_asks_for_silence() -> None:
    assert is_failing(RetriesExhausted(3, StalledTransfer("x"), "x"))
    assert not is_failing(NotFound(404))
    assert silence_of(RateLimited(5.0, status=503)) == 5.0
    assert silence_of(ConnectionFailed("x")) == 0.0


def test_one_error_tells_of_all() -> None:
    one, other = NotFound(404), ConnectionFailed("cut")
    assert summary([one, NotFound(404)]).args != ()
    told = summary([one, other])
    assert isinstance(told, RetriesExhausted)
    assert told.last_error is other
    assert "every endpoint failed" in told.message
