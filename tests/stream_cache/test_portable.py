"""Values through files and back: every bit of them, and no pickle."""

from __future__ import annotations

import collections
import io
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from holotensor_net.errors import ConfigurationError, FormatError
from holotensor_net.stream_cache.keys import CacheKey
from holotensor_net.stream_cache.portable import pack, unpack


def joined(files: Sequence[Sequence[bytes | memoryview]]) -> list[memoryview]:
    return [memoryview(b"".join(pieces)) for pieces in files]


def through_files(value: Any) -> Any:
    packed = pack(value)
    assert packed is not None
    document, files = packed
    return unpack(json.loads(json.dumps(document)), joined(files))


def nan(payload: int) -> float:
    value: float = struct.unpack("<d", (0x7FF8 << 48 | payload).to_bytes(8, "little"))[0]
    return value


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.builds(nan, st.integers(0, 1000)),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=())),
    st.binary(max_size=2000),
    hnp.from_dtype(np.dtype("<f4")),
    hnp.from_dtype(np.dtype("M8[s]")),
)
dtypes = st.one_of(hnp.scalar_dtypes(), hnp.byte_string_dtypes(), hnp.unicode_string_dtypes(), hnp.array_dtypes())
arrays = hnp.arrays(
    dtypes.filter(lambda dtype: str(dtype.descr).isascii()),  # names in a .npy header of version 1.0 are Latin
    hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
)
keys = st.recursive(st.one_of(st.none(), st.integers(), st.text(), st.binary()), lambda part: st.tuples(part, part))
values = st.recursive(
    st.one_of(scalars, arrays),
    lambda part: st.one_of(
        st.lists(part, max_size=4),
        st.lists(part, max_size=4).map(tuple),
        st.dictionaries(keys, part, max_size=4),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=10,
)


@given(values)
def test_value_comes_back_with_every_bit(value: Any) -> None:
    assert CacheKey.of(through_files(value)) == CacheKey.of(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(2000.0).reshape(40, 50),
        np.asfortranarray(np.arange(2000.0).reshape(40, 50)),
        np.arange(2000.0)[::2],
        np.arange(2000, dtype=">i4"),
        np.arange(2000).astype(ml_dtypes.bfloat16),
        np.arange(2000).astype(ml_dtypes.float8_e4m3fn).reshape(2, -1),
        np.zeros((0, 7), ml_dtypes.bfloat16),
        np.array(5),
        np.ones(2000, [("a", "u1"), ("b", "<f8", (2,))]),
        np.zeros(50, np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [0, 8], "itemsize": 24})),
        ml_dtypes.bfloat16(1.5),
        np.float64(1.5),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_array_comes_back_as_it_was(array: Any) -> None:
    back = through_files(array)
    assert type(back) is type(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert CacheKey.of(back) == CacheKey.of(array)
    if array.ndim > 1 and array.size:
        assert back.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize("text", ["", "ä", "\ud800", "\ud83d\ude00", "\U0001f600", "a\0", '"\\'], ids=ascii)
def test_text_comes_back_with_every_surrogate(text: str) -> None:
    assert through_files([text, {text: text}]) == [text, {text: text}]


def test_order_of_a_dict_comes_back() -> None:
    assert list(through_files({"b": 1, "a": 2, 0: 3})) == ["b", "a", 0]


def test_arrays_are_written_as_npy() -> None:
    array = np.arange(2000, dtype="<f4").reshape(40, 50)
    packed = pack([array])
    assert packed is not None
    (file,) = joined(packed[1])
    assert np.array_equal(np.load(io.BytesIO(file), allow_pickle=False), array)


def test_arrays_are_neither_copied_into_files_nor_out_of_them() -> None:
    array = np.arange(2000.0)
    packed = pack(array)
    assert packed is not None
    document, files = packed
    assert np.shares_memory(np.frombuffer(files[0][1]), array)
    (file,) = joined(files)
    back = unpack(document, [file])
    assert np.shares_memory(back, np.frombuffer(file, "u1"))
    assert not back.flags.writeable
    assert back.ctypes.data % 64 == np.frombuffer(file, "u1").ctypes.data % 64


def test_small_values_need_no_file() -> None:
    for value in (b"a" * 1000, np.arange(100.0), np.float64(1), {"a": [b"b"]}):
        packed = pack(value)
        assert packed is not None
        assert packed[1] == []


@pytest.mark.parametrize(
    "value",
    [
        object(),
        [collections.OrderedDict()],
        {"a": {"b": len}},
        np.array([None]),
        np.ma.zeros(3),
        np.zeros(3, [("a", "O")]),
        np.zeros(3, [("a", ml_dtypes.bfloat16)]),
        np.zeros(2, [("a" * 70_000, "u1")]),
        np.zeros(2, [("\u0100", "u1")]),
        [np.str_("a\0")],
        np.bytes_(b"\0"),
    ],
    ids=[
        "object",
        "class of a dict",
        "function",
        "objects",
        "masked",
        "records of objects",
        "of others",
        "wide",
        "foreign",
        "text scalar and NUL",
        "bytes scalar of NUL",
    ],
)
def test_what_no_file_can_hold_is_left_out(value: Any) -> None:
    assert pack(value) is None


def test_what_holds_itself_is_left_out() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert pack(endless) is None


NPY = np.lib.format.magic(1, 0) + struct.pack("<H", 9)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"a": 1, "b": 2},
        {"object": 1},
        {"int": "text"},
        {"float": "00"},
        {"complex": 5},
        {"bytes": 7},
        {"bytes": "0"},
        {"text": "ff"},
        {"text": 5},
        {"tuple": 5},
        {"set": [[]]},
        {"dict": [[1]]},
        {"array": [0, None]},
        {"array": ["", None]},
        {"array": [b"\x93NUMPY\x02\x00".hex(), None]},
        {"array": [b"\x93NUMPY\x01\x00\x05\x00print".hex(), None]},
        {"array": [(NPY + b"{'a': 1}\n").hex(), None]},
        {"scalar": 5},
        [[{"int": []}]],
    ],
    ids=str,
)
def test_what_is_damaged_is_an_error(document: Any) -> None:
    with pytest.raises(FormatError, match="remove it"):
        unpack(document, [])


def test_arrays_that_are_too_short_are_an_error() -> None:
    packed = pack(np.arange(2000.0))
    assert packed is not None
    with pytest.raises(FormatError):
        unpack(packed[0], [joined(packed[1])[0][:-1]])


def test_planted_objects_are_not_read() -> None:
    file = io.BytesIO()
    np.save(file, np.array([math.inf, None], object), allow_pickle=True)
    with pytest.raises(FormatError):
        unpack({"array": [0, None]}, [memoryview(file.getvalue())])


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(np.zeros(3, ml_dtypes.bfloat16))
    assert packed is not None
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(ConfigurationError, match=r"ml_dtypes.*holotensor-net\[tensors\]"):
        unpack(packed[0], joined(packed[1]))


def test_type_that_ml_dtypes_does_not_have_is_an_error() -> None:
    packed = pack(np.zeros(3, ml_dtypes.bfloat16))
    assert packed is not None
    packed[0]["array"][1] = "bfloat17"
    with pytest.raises(FormatError):
        unpack(packed[0], joined(packed[1]))
