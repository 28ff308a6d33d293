"""The values that travel: which can exist, and what they tell."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import ConfigurationError, NetworkError, NotFound
from holotensor_net.values import (
    HeadInfo,
    LoadFailure,
    LoadRequest,
    LoadResult,
    LoadSuccess,
    Priority,
    RangeRequest,
    Validator,
    fragment_id_of,
)

# BLAKE3 of nothing, from the specification's test vectors.
EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
CHECKSUM = f"blake3:{EMPTY}"


def test_levels_are_numbers_and_the_least_goes_first() -> None:
    assert [(level.name, level.value) for level in sorted(Priority)] == [
        ("CRITICAL", 0),
        ("HIGH", 1),
        ("NORMAL", 2),
        ("LOW", 3),
        ("IDLE", 4),
    ]


@pytest.mark.parametrize(
    ("start", "stop", "header"), [(0, 1024, "bytes=0-1023"), (7, 8, "bytes=7-7"), (1 << 40, (1 << 40) + 2, None)]
)
def test_a_range_is_half_open_here_and_inclusive_on_the_wire(start: int, stop: int, header: str | None) -> None:
    wanted = RangeRequest(start, stop)
    assert wanted.length == stop - start
    assert wanted.header_value == (header or f"bytes={start}-{stop - 1}")


def test_an_empty_range_is_a_value_that_http_cannot_ask_for() -> None:
    assert RangeRequest(5, 5).length == 0
    with pytest.raises(ValueError, match="empty"):
        _ = RangeRequest(5, 5).header_value


@pytest.mark.parametrize("bounds", [(-1, 5), (5, 4), (0.5, 2), (0, 2.0), ("0", "5"), (None, 5), (0, math.nan)])
def test_no_range_exists_that_cannot_be(bounds: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"start=.*stop="):
        RangeRequest(*bounds)


def test_bounds_may_be_whole_numbers_of_any_kind() -> None:
    assert RangeRequest(np.int64(3), np.uint32(9)).header_value == "bytes=3-8"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_ranges_sort_by_start_then_stop(pairs: list[tuple[int, int]]) -> None:
    ordered = [(min(pair), max(pair)) for pair in pairs]
    ranges = sorted(RangeRequest(*pair) for pair in ordered)
    assert [(r.start, r.stop) for r in ranges] == sorted(ordered)


def test_a_request_has_the_defaults_of_the_interface() -> None:
    request = LoadRequest("id", "path")
    assert request.priority is Priority.NORMAL
    assert request.importance == 0.5
    nothing = ("expected_size", "byte_range", "checksum", "deadline", "validator")
    assert all(getattr(request, name) is None for name in nothing)
    assert request.allow_short is False


def test_all_but_id_and_path_go_by_their_names() -> None:
    with pytest.raises(TypeError):
        LoadRequest("id", "path", Priority.HIGH)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fragment_id", None),
        ("fragment_id", b"id"),
        ("path", ""),
        ("path", 5),
        ("priority", 5),
        ("priority", "HIGH"),
        ("importance", -0.1),
        ("importance", 1.1),
        ("importance", math.nan),
        ("importance", math.inf),
        ("importance", "much"),
        ("importance", None),
        ("expected_size", -1),
        ("expected_size", 1.5),
        ("expected_size", "5"),
        ("byte_range", 5),
        ("byte_range", (1, 2, 3)),
        ("byte_range", "0-5"),
        ("checksum", "md5:abc"),
        ("checksum", EMPTY),
        ("checksum", CHECKSUM[:-1]),
        ("checksum", CHECKSUM.upper()),
        ("checksum", CHECKSUM + "\n"),
        ("checksum", CHECKSUM.encode()),
        ("deadline", 0),
        ("deadline", -1.0),
        ("deadline", math.nan),
        ("deadline", "soon"),
        ("validator", '"etag"'),
    ],
)
def test_a_request_that_cannot_be_names_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        LoadRequest(**{"fragment_id": "id", "path": "path", name: value})
    assert f"LoadRequest.{name}" in str(caught.value)
    assert repr(value) in str(caught.value)


def test_a_range_that_cannot_be_is_refused_in_a_request_too() -> None:
    with pytest.raises(ConfigurationError):
        LoadRequest("id", "path", byte_range=(5, 1))  # type: ignore[arg-type]


def test_shorthands_become_the_values_that_they_stand_for() -> None:
    request = LoadRequest("id", "path", priority=1, byte_range=(3, 9))  # type: ignore[arg-type]
    assert request.priority is Priority.HIGH
    assert request.byte_range == RangeRequest(3, 9)


@pytest.mark.parametrize("number", [0, 1, np.float32(0.5), np.float64(0.25), True])
def test_importance_may_be_a_number_of_any_kind(number: Any) -> None:
    assert LoadRequest("id", "path", importance=number).importance == number


@pytest.mark.parametrize("text", ["ä/ö ü", "../..", "a\0b", "\ud800", "x" * 10_000, " "])
def test_any_string_is_a_fragment_id(text: str) -> None:
    assert LoadRequest(text, "path").fragment_id == text


def specimens() -> list[Any]:
    return [
        RangeRequest(1, 5),
        Validator('"e"', "Tue, 15 Nov 1994 12:45:26 GMT", True),
        HeadInfo(5, Validator('"e"'), True, "text/plain", {"a": "b"}),
        LoadRequest("id", "path", byte_range=RangeRequest(0, 4), checksum=CHECKSUM, validator=Validator('"e"')),
    ]


@pytest.mark.parametrize("value", specimens(), ids=lambda value: type(value).__name__)
def test_values_are_frozen_and_equal_to_their_copies(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def test_a_request_of_a_derived_class_is_looked_at_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Labelled(LoadRequest):
        label: str = ""

    assert Labelled("a", "b", byte_range=(0, 5)).byte_range == RangeRequest(0, 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="importance"):
        Labelled("a", "b", importance=7)


def test_requests_can_be_keys() -> None:
    assert {LoadRequest("id", "path"): 1}[LoadRequest("id", "path")] == 1


@pytest.mark.parametrize(
    ("validator", "says_something"),
    [
        (Validator(), False),
        (Validator(is_strong=True), False),
        (Validator(etag=""), True),
        (Validator('"e"'), True),
        (Validator(None, "date"), True),
    ],
)
def test_a_validator_is_true_if_it_tells_versions_apart(validator: Validator, says_something: bool) -> None:
    assert bool(validator) is says_something


def test_a_head_shows_its_validator() -> None:
    head = HeadInfo(5, Validator('"e"', "date"))
    assert (head.etag, head.last_modified, head.accepts_ranges, dict(head.headers)) == ('"e"', "date", False, {})


def told(result: LoadResult) -> str:
    match result:
        case LoadSuccess(fragment_id=name, data=data):
            return f"{name}: {bytes(data)!r}"
        case LoadFailure(fragment_id=name, error=error):
            return f"{name}: {error}"


def test_results_can_be_matched() -> None:
    assert told(LoadSuccess("a", memoryview(b"x"))) == "a: b'x'"
    assert told(LoadFailure("b", NotFound("gone"))) == "b: gone"


def test_a_success_has_all_that_a_failure_has() -> None:
    success, failure = LoadSuccess("a", memoryview(b"")), LoadFailure("a", NetworkError("no"))
    assert (success.is_success, success.error, success.from_cache, success.duration) == (True, None, False, 0.0)
    assert (failure.is_success, str(failure.error), failure.from_cache, failure.duration) == (False, "no", False, 0.0)


def test_no_failure_goes_unread() -> None:
    error = NotFound("gone")
    with pytest.raises(NotFound) as caught:
        _ = LoadFailure("a", error).data
    assert caught.value is error


def test_neither_bytes_nor_headers_flood_the_log() -> None:
    assert "secret" not in repr(LoadSuccess("a", memoryview(b"secret"), head=HeadInfo(1, headers={"x": "secret"})))
    assert "secret" not in repr(HeadInfo(1, headers={"x": "secret"}))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_content_id_is_the_beginning_of_the_digest(kind: Any) -> None:
    assert fragment_id_of(kind(b"")) == EMPTY[:32]
    assert fragment_id_of(kind(b"a")) != EMPTY[:32]
