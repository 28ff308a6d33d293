"""Frozen values: what comes out is what went in, and nobody can change it for the next."""

from __future__ import annotations

import collections
import sys
import threading
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from holotensor_net.stream_cache.frozen import freeze


class Factors(NamedTuple):
    axes: Any
    sizes: Any


VALUES: dict[str, Any] = {
    "none": None,
    "a bool": True,
    "an int": 2**70,
    "a float": -0.0,
    "a complex": 1j,
    "text": "ä\ud800",
    "bytes": b"abc",
    "a list": [1, [2.0, "x"], []],
    "a tuple": (1, (2, [3])),
    "a named tuple": Factors([1], 2),
    "a set": {1, "a", (2, 3)},
    "a frozenset": frozenset({1, frozenset({2})}),
    "a dict": {"b": [1], "a": {"c": (2,)}, 3: None, (4, 5): {6}},
    "a scalar": np.float32(1.5),
    "a bfloat16": ml_dtypes.bfloat16(1.5),
    "an ordered dict": collections.OrderedDict(b=[1], a=[2]),
    "a range": range(3),
}

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "floats": np.arange(6.0).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every other": np.arange(12.0)[::2],
    "backwards": np.arange(12.0)[::-1],
    "swapped": np.arange(6, dtype=">i4"),
    "one": np.array(5),
    "none": np.zeros((0, 3), "f4"),
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16),
    "texts": np.array(["a", "bcd"]),
    "times": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "records": np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    "broadcast": np.broadcast_to(np.float32(3), (4, 5)),
    "over bytes": np.frombuffer(b"abcdefgh", "u1"),
    "over little of much": np.frombuffer(b"abcdefgh" * 9, "u1")[:8],
    "over a bytearray": np.frombuffer(bytearray(b"abcdefgh"), "u1"),
    "of objects": np.array([{1}, None]),
    "masked": np.ma.array([1, 2], mask=[True, False]),
}


@pytest.mark.parametrize("case", VALUES)
def test_value_comes_out_as_it_went_in(case: str) -> None:
    value = VALUES[case]
    thawed = freeze(value).thaw()
    assert type(thawed) is type(value)
    assert repr(thawed) == repr(value)


@pytest.mark.parametrize("case", ARRAYS)
def test_array_comes_out_as_it_went_in(case: str) -> None:
    array = ARRAYS[case]
    thawed = freeze(array).thaw()
    assert type(thawed) is type(array)
    assert thawed.dtype == array.dtype
    assert thawed.shape == array.shape
    assert thawed.tolist() == array.tolist()
    if array.ndim > 1 and array.size:
        assert thawed.flags.f_contiguous == array.flags.f_contiguous


def test_bytes_likes_come_out_as_bytes() -> None:
    for value in (bytearray(b"ab"), memoryview(b"ab"), memoryview(b"aXb")[::2]):
        assert freeze(value).thaw() == b"ab"
        assert type(freeze(value).thaw()) is bytes


def test_memory_mapped_array_comes_out_as_an_array(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "file", "u1", "w+", shape=(4,))
    frozen = freeze(mapped)
    mapped[:] = 1
    assert type(frozen.thaw()) is np.ndarray
    assert frozen.thaw().tolist() == [0, 0, 0, 0]


def change(value: Any) -> None:
    """Do to the value whatever Python lets one do."""
    match value:
        case np.ndarray():
            for attempt in (
                lambda: value.__setitem__(..., 9),
                lambda: value.setflags(write=True),
                lambda: setattr(value.flags, "writeable", True),
                lambda: value.view().setflags(write=True),
                lambda: value.base.setflags(write=True),
                lambda: value.sort(),
                lambda: np.copyto(value, 9),
                lambda: memoryview(value).cast("B").__setitem__(0, 9),
            ):
                with pytest.raises((ValueError, TypeError)):
                    attempt()
            for each in (value, value.base):
                if isinstance(each, np.ndarray) and each.size:
                    each.strides = (0,) * each.ndim
                    each.dtype = f"V{each.itemsize}"
        case list():
            for part in value:
                change(part)
            value.append("changed")
        case tuple():
            for part in value:
                change(part)
        case set():
            value.add("changed")
        case dict():
            for part in value.values():
                change(part)
            value["changed"] = True


NESTED: dict[str, Any] = {
    "an array": np.arange(6.0),
    "an array over bytes": np.frombuffer(b"abcdefgh", "u1"),
    "a list": [1, [2], np.arange(3)],
    "a tuple": ([1], {"a": np.arange(3)}),
    "a dict": {"a": [1, {2}], "b": {"c": np.arange(3)}},
    "a named tuple": Factors(np.arange(3), [1]),
    "a set": {1, 2},
    "an ordered dict": collections.OrderedDict(a=[1]),
}


@pytest.mark.filterwarnings("ignore:.*(strides|dtype).*:DeprecationWarning")
@pytest.mark.parametrize("case", NESTED)
def test_what_one_does_to_it_the_next_does_not_see(case: str) -> None:
    frozen = freeze(NESTED[case])
    before = repr(frozen.thaw())
    change(frozen.thaw())
    assert repr(frozen.thaw()) == before


def test_what_is_done_to_the_original_does_not_show() -> None:
    array, part = np.zeros(3), [1]
    read_only = array.view()
    read_only.flags.writeable = False
    shared = np.frombuffer(memoryview(bytearray(4)).toreadonly(), "u1")
    owner = np.zeros(3)
    owner.flags.writeable = False
    frozen = freeze({"array": array, "part": part, "view": read_only, "shared": shared, "owner": owner})
    array[0] = part[0] = 9
    shared.base.obj[0] = 9  # type: ignore[union-attr]
    owner.flags.writeable = True
    owner[0] = 9
    thawed = frozen.thaw()
    assert all(thawed[name][0] == 0 for name in ("array", "view", "shared", "owner"))
    assert thawed["part"] == [1]


def test_arrays_over_bytes_are_not_copied() -> None:
    whole = np.frombuffer(b"abcdefgh", "u1")
    assert np.shares_memory(freeze(whole).thaw(), whole)
    frozen = freeze(np.arange(4)).thaw()
    assert np.shares_memory(freeze(frozen).thaw(), frozen)
    little = np.frombuffer(b"abcdefgh" * 9, "u1")[:8]
    assert not np.shares_memory(freeze(little).thaw(), little)  # which would hold all of it


def test_thawed_arrays_share_their_memory() -> None:
    frozen = freeze([np.arange(4)])
    assert np.shares_memory(frozen.thaw()[0], frozen.thaw()[0])


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (np.zeros(100), 800),
        (b"a" * 70, 70),
        ("a" * 70, 70),
        ([np.zeros(100), b"a" * 70], 870),
        ({"ab": np.zeros(100)}, 802),
        (np.float32(1), 4),
        (Factors(np.zeros(100), np.zeros(10)), 880),
    ],
)
def test_size_is_that_of_what_is_in_it(value: Any, nbytes: int) -> None:
    assert freeze(value).nbytes == nbytes


@pytest.mark.parametrize(
    "value",
    [
        np.ma.zeros(1000),
        collections.OrderedDict(a=np.zeros(1000)),
        [collections.OrderedDict(a=[collections.deque([np.zeros(1000)])])],
        "\U0001f600" * 2000,
        [[] for _ in range(250)],
        [{} for _ in range(250)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_size_of_what_is_hidden_counts(value: Any) -> None:
    assert 8000 <= freeze(value).nbytes < 12_000


def test_size_of_what_is_kept_as_it_is_counts() -> None:
    class Model:
        nbytes = 1000

    assert freeze([Model()], keep=True).nbytes == 1000
    assert freeze(b"a" * 70, keep=True).nbytes == 70
    assert freeze(memoryview(np.zeros(10))).nbytes == 80
    assert freeze(object(), keep=True).nbytes == sys.getsizeof(object())


def test_named_tuple_that_carries_more_is_copied_whole() -> None:
    class Labelled(Factors):
        label = ""

    value = Labelled([1], 2)
    value.label = "a"
    assert freeze(value).thaw().label == "a"


def test_size_of_anything_is_known() -> None:
    assert freeze(1).nbytes > 0
    assert freeze(range(5)).nbytes > 0


def test_other_objects_are_kept_as_they_are_if_asked_to() -> None:
    model = collections.OrderedDict(weights=[1])
    assert freeze(model, keep=True).thaw() is model
    assert freeze([model, [1]], keep=True).thaw()[0] is model
    assert freeze(model).thaw() is not model


@pytest.mark.parametrize("value", [threading.Lock(), (part for part in "ab")])
def test_what_cannot_be_copied_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be kept \(.*\): make it arrays"):
        freeze({"a": value})


def test_what_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="holds itself"):
        freeze(endless)
