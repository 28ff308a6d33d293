"""safetensors: the real library writes, we read; strangers write, we refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import FormatError
from holotensor_net.formats.dtypes import DTYPES, bits_of, frombytes
from holotensor_net.formats.safetensors import (
    MAX_HEADER,
    Index,
    merge,
    read_header,
    read_index,
    read_sharded_header,
    shards_of,
    slice_range,
)
from holotensor_net.formats.tensors import FragmentInfo, ModelHeader, TensorInfo

KIB, MIB = 1 << 10, 1 << 20


class Files:
    """Objects by path, read by range as a server would give them; ``reads`` is what was asked for."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.reads: list[tuple[str, int, int]] = []

    def __call__(self, path: str, start: int, stop: int) -> memoryview:
        assert 0 <= start < stop, "an empty range cannot be asked for"
        self.reads.append((path, start, stop))
        return memoryview(self.files[path])[start:stop]


def row(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    shape, offsets = (list(x) if isinstance(x, tuple) else x for x in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def file_of(table: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read(data: bytes, *, with_size: bool = True) -> ModelHeader:
    return read_header(Files({"m": data}), "m", size=len(data) if with_size else None)


def array_of(data: bytes, info: TensorInfo) -> Any:
    return frombytes(b"".join(data[f.start : f.stop] for f in info.fragments), info)


TENSORS: dict[str, Any] = {
    "f64": np.linspace(-1, 1, 6).reshape(2, 3),
    "f32": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "f16": np.arange(5, dtype=np.float16),
    "i64": np.arange(-3, 3),
    "u8": np.arange(7, dtype=np.uint8),
    "bool": np.array([True, False, True]),
    "c64": np.array([1 + 2j, -1j], np.complex64),
    "bf16": np.linspace(-2, 2, 12).astype(ml_dtypes.bfloat16).reshape(3, 4),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "empty too": np.zeros((4, 0), np.int8),
    '名前 "\\\n': np.arange(3, dtype=np.int16),
}
FP8 = {
    name: np.linspace(0.25, 4, 9).astype(name).reshape(3, 3)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
}


# --- one file ---


def test_reads_bit_for_bit_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "np", "note": "é"})
    data = path.read_bytes()
    header = read(data)
    with safetensors.safe_open(path, "np") as reference:
        assert set(header.tensors) == set(reference.keys())
        assert list(header.tensors) == list(reference.offset_keys())
        assert header.metadata == reference.metadata()
        for name, info in header.tensors.items():
            ours, theirs = array_of(data, info), reference.get_tensor(name)
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    assert header.files == ("m",)


def test_reads_fp8_bit_for_bit() -> None:
    data = safetensors.numpy.save(FP8)
    header = read(data)
    assert len(header.tensors) == len(FP8)
    for name, info in header.tensors.items():
        ours = array_of(data, info)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (FP8[name].dtype, (3, 3), FP8[name].tobytes())


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["f4", "f8", "u1", "i2", "?"]), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
def test_agrees_with_the_library_on_any_file_of_its_own(kinds: dict[str, tuple[str, list[int]]]) -> None:
    data = safetensors.numpy.save({name: np.ones(shape, dtype) for name, (dtype, shape) in kinds.items()})
    header = read(data)
    theirs = {name: (view["dtype"], tuple(view["shape"])) for name, view in safetensors.deserialize(data)}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == theirs
    assert all((array_of(data, info) == 1).all() for info in header.tensors.values())


def test_every_tensor_has_one_fragment_with_an_absolute_range() -> None:
    data = file_of({"a": row(), "e": row(shape=(0,), offsets=(4, 4)), "b": row(offsets=(4, 8))}, bytes(8))
    base = len(data) - 8
    tensors = read(data).tensors
    assert tensors["a"].fragments == (FragmentInfo("m", base, base + 4),)
    assert tensors["e"].fragments == (FragmentInfo("m", base + 4, base + 4),)
    assert tensors["b"].fragments == (FragmentInfo("m", base + 4, base + 8),)
    assert list(tensors) == ["a", "e", "b"]


def test_order_is_that_of_the_bytes_whatever_the_header_says() -> None:
    table = {"c": row(offsets=(8, 12)), "a": row(offsets=(4, 8)), "b": row(offsets=(0, 4))}
    assert list(read(file_of(table, bytes(12))).tensors) == ["b", "a", "c"]


def test_a_file_without_tensors_is_a_model_without_tensors() -> None:
    assert read(file_of({})).tensors == {}
    assert read(file_of({"__metadata__": {"a": "b"}})).metadata == {"a": "b"}


def test_metadata_may_be_null_or_absent() -> None:
    assert read(file_of({"__metadata__": None, "a": row()}, bytes(4))).metadata == {}
    assert read(file_of({"a": row()}, bytes(4))).metadata == {}


def test_sub_byte_tensors_are_packed() -> None:
    table = {"a": row("F4", (2, 3), (0, 3)), "b": row("F6_E2M3", (4,), (3, 6))}
    tensors = read(file_of(table, bytes(6))).tensors
    assert [info.nbytes for info in tensors.values()] == [3, 3]


# --- reads ---


def padded(size: int) -> bytes:
    """A file whose header takes ``size`` bytes."""
    return file_of(json.dumps({"a": row()}).encode().ljust(size), bytes(4))


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize(
    ("length", "reads"),
    [
        (1 * KIB, [(0, 64 * KIB)]),
        (64 * KIB - 8, [(0, 64 * KIB)]),
        (64 * KIB - 7, [(0, 64 * KIB), (64 * KIB, 64 * KIB + 1)]),
        (1 * MIB, [(0, 64 * KIB), (64 * KIB, MIB + 8)]),
    ],
)
def test_one_read_or_two_and_no_byte_twice(length: int, reads: list[tuple[int, int]], with_size: bool) -> None:
    data = padded(length)
    files = Files({"m": data})
    header = read_header(files, "m", size=len(data) if with_size else None)
    assert list(header.tensors) == ["a"]
    size = len(data) if with_size else 10**9
    assert files.reads == [("m", start, min(stop, size)) for start, stop in reads]


def test_a_known_size_is_never_read_beyond() -> None:
    data = padded(100)
    files = Files({"m": data})
    read_header(files, "m", size=len(data))
    assert files.reads == [("m", 0, len(data))]


def test_a_size_that_the_first_read_reveals_is_checked() -> None:
    with pytest.raises(FormatError, match="is cut short"):
        read(padded(100)[:-1], with_size=False)


@pytest.mark.parametrize("start", [b"", b"\x09\x00", b"<!DOCTYPE html><html>", b"\xff" * 5000])
def test_no_second_read_for_what_is_no_safetensors_file(start: bytes) -> None:
    files = Files({"m": start + bytes(100 * KIB)})
    with pytest.raises(FormatError):
        read_header(files, "m")
    assert files.reads == [("m", 0, 64 * KIB)]


def test_buffers_of_any_kind_will_do() -> None:
    data = padded(70 * KIB)
    for kind in (bytes, bytearray, memoryview):
        assert read_header(lambda _, start, stop, kind=kind: kind(data[start:stop]), "m").tensors


# --- strangers' files ---

ONE = {"a": row()}
HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "hole at the start": ({"a": row(offsets=(4, 8))}, bytes(8), "hole"),
    "hole between": ({"a": row(), "b": row(offsets=(8, 12))}, bytes(12), "hole"),
    "overlap": ({"a": row(), "b": row(offsets=(2, 6))}, bytes(6), "overlaps"),
    "same bytes twice": ({"a": row(), "b": row()}, bytes(4), "overlaps"),
    "backwards": ({"a": row(offsets=(4, 0))}, bytes(4), "takes 4 bytes"),
    "negative": ({"a": row(offsets=(-4, 0))}, bytes(4), "takes 4 bytes"),
    "too few bytes": ({"a": row(shape=(2,))}, bytes(4), "takes 8 bytes, not those from 0 to 4"),
    "too many bytes": ({"a": row(shape=(0,))}, bytes(4), "takes 0 bytes"),
    "half a byte": ({"a": row("F4", (3,), (0, 2))}, bytes(2), "takes 1.5 bytes"),
    "data cut short": (ONE, bytes(3), "is cut short"),
    "data too long": (ONE, bytes(5), "belong to no tensor"),
    "2**40 + 1 elements": ({"a": row("U8", (2**40 + 1,), (0, 2**40 + 1))}, b"", "more than 2"),
    "product wraps to 0": ({"a": row(shape=(2**32, 2**32), offsets=(0, 0))}, b"", "more than 2"),
    "zero hides a giant": ({"a": row(shape=(0, 2**62), offsets=(0, 0))}, b"", "more than 2"),
    "nine dimensions": ({"a": row(shape=(1,) * 9)}, bytes(4), "8 numbers"),
    "bool in shape": ({"a": row(shape=(True,))}, bytes(4), "whole numbers"),
    "float in shape": ({"a": row(shape=(1.0,))}, bytes(4), "whole numbers"),
    "shape is text": ({"a": row(shape="1")}, bytes(4), "must be a list"),
    "bool in offsets": ({"a": row("U8", (1,), (False, True))}, bytes(1), "two whole numbers"),
    "float in offsets": ({"a": row(offsets=(0, 4.0))}, bytes(4), "two whole numbers"),
    "one offset": ({"a": row(offsets=(4,))}, bytes(4), "two whole numbers"),
    "three offsets": ({"a": row(offsets=(0, 2, 4))}, bytes(4), "two whole numbers"),
    "offsets are an object": ({"a": row(offsets={"0": 4})}, bytes(4), "two whole numbers"),
    "unknown dtype": ({"a": row("F33")}, bytes(4), "unknown dtype 'F33'"),
    "dtype in lower case": ({"a": row("f32")}, bytes(4), "unknown dtype"),
    "dtype is a list": ({"a": row(["F32"])}, bytes(4), "unknown dtype"),
    "dtype is null": ({"a": row(None)}, bytes(4), "unknown dtype None"),
    "unknown key": ({"a": row(extra=1)}, bytes(4), "dtype, shape and data_offsets only"),
    "missing key": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "dtype, shape and data_offsets only"),
    "row is a list": ({"a": [1, 2]}, bytes(4), "dtype, shape and data_offsets only"),
    "row is null": ({"a": None}, bytes(4), "dtype, shape and data_offsets only"),
    "long name": ({"n" * 1025: row()}, bytes(4), "over 1024 bytes"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
    "metadata nested": ({"__metadata__": {"a": {}}}, b"", "strings to strings"),
    "metadata list": ({"__metadata__": ["a"]}, b"", "strings to strings"),
    "metadata is false": ({"__metadata__": False}, b"", "strings to strings"),
    "same name twice": (
        json.dumps(ONE).encode()[:-1] + b"," + json.dumps({"a": row(offsets=(4, 8))}).encode()[1:],
        bytes(8),
        "'a' appears twice",
    ),
    "nan": (b'{"a":NaN}', b"", "NaN"),
    "deep": (b'{"a":' + b"[" * 99 + b"]" * 99 + b"}", b"", "over 16 deep"),
    "not UTF-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "space before the brace": (b" " + json.dumps(ONE).encode(), bytes(4), "no safetensors file"),
    "a list": (b"[1]", b"", "no safetensors file"),
    "text after the object": (json.dumps(ONE).encode() + b"x", bytes(4), "not JSON"),
}


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_hostile_tables(case: str, with_size: bool) -> None:
    table, data, sentence = HOSTILE[case]
    with pytest.raises(FormatError, match=sentence) as caught:
        read(file_of(table, data), with_size=with_size)
    assert "[m]" in str(caught.value)


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        (MAX_HEADER + 1, "at most are read"),
        (2**64 - 1, "at most are read"),
        (1000, "is cut short"),
        (0, "not JSON"),
        (1, "brackets"),
    ],
)
def test_refuses_a_length_that_is_not_that_of_the_header(length: int, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        read(file_of(ONE, bytes(4), length=length))


def test_refuses_a_file_that_ends_within_its_header() -> None:
    data = padded(100 * KIB)[: 80 * KIB]
    with pytest.raises(FormatError, match=f"ends after {80 * KIB - 8} of the {100 * KIB} bytes of its header"):
        read(data, with_size=False)
    with pytest.raises(FormatError, match=f"takes {100 * KIB} bytes and the file has {80 * KIB}"):
        read(data)


def test_refuses_a_file_that_is_shorter_than_it_was_said_to_be() -> None:
    with pytest.raises(FormatError, match="ends after 112 of 5000 bytes"):
        read_header(Files({"m": padded(100)}), "m", size=5000)


def test_refuses_more_tensors_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holotensor_net.formats.safetensors.MAX_TENSORS", 2)
    table = {name: row(shape=(0,), offsets=(0, 0)) for name in "ab"}
    assert len(read(file_of(table)).tensors) == 2
    with pytest.raises(FormatError, match="has 3 tensors"):
        read(file_of({**table, "c": row(shape=(0,), offsets=(0, 0))}))
    with pytest.raises(FormatError, match="names 3 tensors"):
        read_index(json.dumps({"weight_map": dict.fromkeys("abc", "m")}).encode(), "i")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty"),
        (b"\x01\x02", "it begins with b'.x01.x02'"),
        (b"<!DOCTYPE html>\n<html></html>", "this looks like HTML: is the URL the raw file?"),
        (b"\xef\xbb\xbf\r\n <HTML lang='en'>", "this looks like HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "this looks like XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "this looks like a Git LFS pointer"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "this looks like a zip archive"),
        (b"PK\x03\x04\x14\x00\x00\x00\x00\x00", "this looks like a zip archive"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "this looks like a Python pickle"),
        (b"GGUF\x03\x00\x00\x00\x01\x00", "this looks like GGUF, which is not read"),
        (b"HTNS\x01\x00\x00\x00\x00\x00", "this looks like a HoloTensor container, which is not read"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "this looks like a compressed file"),
        (b'{"error": "Repository not found"}', "this looks like JSON"),
        (b"Invalid username or password.", "this looks like text: is the URL the raw file?"),
        (struct.pack("<Q", 60) + b"\x00" * 60, "it begins with b'<"),
        (struct.pack("<Q", 123) + b"\x00" * 60, "it begins with b'{"),
        (b"\xfe" * 5000, "it begins with"),
    ],
)
@pytest.mark.parametrize("with_size", [True, False])
def test_says_what_the_file_looks_like(data: bytes, sentence: str, with_size: bool) -> None:
    with pytest.raises(FormatError, match=re.escape(sentence) if "begins" not in sentence else sentence) as caught:
        read(data, with_size=with_size)
    assert len(str(caught.value)) < 200


LONG = "\x00\x1b[31m" * 5000


@pytest.mark.parametrize(
    "table",
    [
        {LONG: row()},
        {"a": row(LONG)},
        {"a": row(shape=LONG)},
        {"a": row(shape=[LONG] * 8)},
        {"a": row(shape=[9] * 9999)},
        {"a": row(offsets=[LONG, LONG])},
        {"a": LONG},
        {"a": {LONG: {LONG: [LONG]}}},
        {"__metadata__": LONG},
        {"__metadata__": {LONG: [LONG]}},
        {("n" * 1024): row(shape=(3,))},
        b'{"a":1,' + json.dumps(LONG).encode() + b":1," + json.dumps(LONG).encode() + b":1}",
        LONG.encode(),
    ],
)
def test_errors_quote_little_of_a_strangers_bytes_and_nothing_unprintable(table: Any) -> None:
    with pytest.raises(FormatError) as caught:
        read(file_of(table, bytes(4)))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_an_error_of_the_reader_keeps_the_place_it_names() -> None:
    def broken(path: str, start: int, stop: int) -> bytes:
        raise FormatError("no", url="elsewhere")

    with pytest.raises(FormatError, match=r"no \[elsewhere\]"):
        read_header(broken, "m")


def test_errors_keep_what_is_secret_in_a_path() -> None:
    with pytest.raises(FormatError) as caught:
        read_header(lambda *_: b"", "x/m.safetensors?token=hush", size=0)
    assert "x/m.safetensors" in str(caught.value)
    assert "hush" not in str(caught.value)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from([2**31, 2**40, 2**63, 2**64, "F32", "BF16", "F4"])
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound table, and the bytes of its data; its rows in any order."""
    rows, end = [], 0
    kinds = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3))
    for dtype, shape in draw(st.lists(kinds, max_size=4)):
        sides = [*shape, 8]  # whole bytes, however narrow the elements
        size = int(np.prod(sides)) * bits_of(dtype) // 8
        rows.append(row(dtype, sides, [end, end + size]))
        end += size
    return {str(place): rows[place] for place in draw(st.permutations(range(len(rows))))}, end


@st.composite
def damaged(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound table, in which one thing is something else."""
    table, size = draw(tables().filter(lambda sound: sound[0]))
    victim = table[draw(st.sampled_from(sorted(table)))]
    match draw(st.sampled_from(["field", "item", "row", "name", "data"])):
        case "field":
            victim[draw(st.sampled_from([*victim, "extra"]))] = draw(JUNK)
        case "item":
            items = victim[draw(st.sampled_from(["shape", "data_offsets"]))]
            items[draw(st.integers(0, len(items) - 1))] = draw(JUNK)
        case "row":
            table[draw(st.sampled_from(sorted(table)))] = draw(JUNK)
        case "name":
            table[draw(st.just("__metadata__") | st.text(max_size=3))] = draw(JUNK)
        case _:
            size += draw(st.integers(1, 9))
    return table, size


@given(tables(), st.booleans())
def test_sound_tables_are_read_as_the_library_reads_them(sound: tuple[dict[str, Any], int], with_size: bool) -> None:
    table, size = sound
    data = file_of(table, bytes(size))
    tensors = read(data, with_size=with_size).tensors
    assert {n: (i.dtype, list(i.shape)) for n, i in tensors.items()} == {
        name: (view["dtype"], view["shape"]) for name, view in safetensors.deserialize(data)
    }
    assert sum(info.nbytes for info in tensors.values()) == size


@given(damaged() | st.tuples(st.dictionaries(st.text(max_size=3), JUNK, max_size=3), st.integers(0, 9)), st.booleans())
def test_damaged_tables_raise_nothing_but_format_error(found: tuple[dict[str, Any], int], with_size: bool) -> None:
    table, size = found
    data = file_of(table, bytes(size))
    try:
        header = read(data, with_size=with_size)
    except FormatError:
        return
    # What is accepted all the same tiles the file, and the library accepts it as well.
    ranges = [(f.start, f.stop) for info in header.tensors.values() for f in info.fragments]
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert sum(info.nbytes for info in header.tensors.values()) == size
    assert len(safetensors.deserialize(data)) == len(header.tensors)


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda data: file_of(b"{" + data)), st.booleans())
def test_random_bytes_raise_nothing_but_format_error(data: bytes, with_size: bool) -> None:
    if data == file_of(b"{}"):
        return
    with pytest.raises(FormatError):
        read(data, with_size=with_size)


# --- shards ---


def index_of(weight_map: Any, **more: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map, **more}).encode()


def shard_of(*names: str, **metadata: str) -> bytes:
    arrays = {name: np.full(2, place, np.float32) for place, name in enumerate(names)}
    return safetensors.numpy.save(arrays, metadata or None)


def test_a_sharded_model_reads_as_one() -> None:
    files = Files(
        {
            "org/m/x.index.json": index_of({"c": "2.safetensors", "a": "1.safetensors", "b": "1.safetensors"}),
            "org/m/1.safetensors": shard_of("b", "a", format="pt", only="first"),
            "org/m/2.safetensors": shard_of("c", "stray", format="np", other="x"),
        }
    )
    header = read_sharded_header(files, "org/m/x.index.json")
    assert list(header.tensors) == ["a", "b", "c"]
    assert header.files == ("org/m/1.safetensors", "org/m/2.safetensors")
    assert header.metadata == {"format": "pt", "only": "first", "other": "x"}
    assert header.tensors["c"].fragments[0].file == "org/m/2.safetensors"
    assert len(files.reads) == 3


def test_a_tensor_in_two_shards_is_taken_from_where_the_index_places_it() -> None:
    index = read_index(index_of({"a": "2", "b": "1"}), "i")
    headers = {path: read_header(Files({path: shard_of("a", "b")}), path) for path in "12"}
    tensors = merge(index, headers).tensors
    assert {name: info.fragments[0].file for name, info in tensors.items()} == {"a": "2", "b": "1"}


def test_the_sizes_of_shards_are_checked_where_known() -> None:
    files = Files({"i": index_of({"a": "1"}), "1": padded(70 * KIB)})
    assert read_sharded_header(files, "i").tensors
    with pytest.raises(FormatError, match=r"belong to no tensor.*\[1\]"):
        read_sharded_header(files, "i", sizes={"1": len(files.files["1"]) + 1})


@pytest.mark.parametrize(
    ("path", "shard"),
    [
        ("i.json", "s"),
        ("a/b/i.json", "a/b/s"),
        ("/i.json", "/s"),
        ("a/i.json?download=true&next=/x/y", "a/s"),
    ],
)
def test_shards_lie_beside_the_index(path: str, shard: str) -> None:
    index = read_index(index_of({"t": "s", "u": "s"}), path)
    assert index == Index(path, {"t": shard, "u": shard})
    assert shards_of(index) == (shard,)


@pytest.mark.parametrize("size", [64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 2 * MIB])
def test_an_index_of_any_length_is_read_whole(size: int) -> None:
    files = Files({"i": index_of({"a": "1"}).ljust(size), "1": padded(100)})
    assert list(read_sharded_header(files, "i").tensors) == ["a"]
    assert len(files.reads) <= 4


def test_an_index_over_the_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holotensor_net.formats.safetensors.MAX_HEADER", 100 * KIB)
    files = Files({"i": index_of({"a": "1"}).ljust(MIB)})
    with pytest.raises(FormatError, match="at most are read"):
        read_sharded_header(files, "i")
    assert files.reads[-1][2] == 100 * KIB + 1


@pytest.mark.parametrize(
    "shard",
    [
        *("", ".", "..", "../s", "a/s", "/s", "\\s", "a\\..\\s", "..s"),
        *("http://x/s", "file:s", "s?q", "s#f", "%2e%2e%2fs", "s\n", "s\x00", "s" * 256),
    ],
)
def test_refuses_a_shard_that_is_no_bare_file_name(shard: str) -> None:
    with pytest.raises(FormatError, match="must be a bare file name"):
        read_index(index_of({"t": shard}), "i")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{}", "must have a weight_map"),
        (b"[]", "must be a JSON object"),
        (index_of(["s"]), "must have a weight_map"),
        (index_of(None), "must have a weight_map"),
        (index_of({"t": 1}), "must be in a file, not in 1"),
        (index_of({"t": ["s"]}), "must be in a file"),
        (index_of({"t" * 1025: "s"}), "over 1024 bytes"),
        (b'{"weight_map":{"t":"1","t":"2"}}', "'t' appears twice"),
        (b"<html>", "not JSON"),
    ],
)
def test_refuses_a_malformed_index(data: bytes, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence) as caught:
        read_index(data, "x/i.json")
    assert "[x/i.json]" in str(caught.value)


def test_refuses_to_merge_shards_that_lack_what_the_index_places_there() -> None:
    index = read_index(index_of({"a": "1", "b": "2"}), "i")
    one, two = (read_header(Files({path: shard_of("a")}), path) for path in "12")
    with pytest.raises(FormatError, match="'b' is not in '2'"):
        merge(index, {"1": one, "2": two})
    with pytest.raises(FormatError, match="header of the shard '2' is missing"):
        merge(index, {"1": one})


# --- slices ---


def whole(array: Any, dtype: str = "I32", start: int = 100) -> TensorInfo:
    return TensorInfo("t", dtype, array.shape, fragments=(FragmentInfo("m", start, start + array.nbytes),))


def numbers(*shape: int) -> Any:
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (IndexError, TypeError) as error:
        return type(error)


BOUNDS = st.none() | st.integers(-6, 6)
KEYS = (
    st.integers(-5, 5)
    | st.integers(-5, 5).map(np.int64)
    | st.builds(slice, BOUNDS, BOUNDS, st.none() | st.just(1))
    | st.just(...)
)
ODD_KEYS = (
    st.builds(slice, BOUNDS, BOUNDS, st.sampled_from([2, -1, 3]))
    | st.none()
    | st.booleans()
    | st.lists(st.integers(-1, 1), max_size=2)
)


@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_slices_as_numpy_does_or_not_at_all(shape: list[int], draw: st.DataObject) -> None:
    array = numbers(*shape)
    keys = draw.draw(st.lists(KEYS, max_size=5) | st.lists(KEYS | ODD_KEYS, max_size=4))
    index = keys[0] if len(keys) == 1 and draw.draw(st.booleans()) else tuple(keys)
    part = outcome(lambda: slice_range(whole(array), index))
    if part is None:
        return
    theirs = outcome(lambda: array[index])
    if isinstance(theirs, type):
        assert part is theirs
        return
    assert part.shape == theirs.shape
    assert part.fragments[0].length == part.nbytes == theirs.nbytes
    assert array_of(bytes(100) + array.tobytes(), part).tolist() == theirs.tolist()


ALL = slice(None)


@pytest.mark.parametrize(
    "index",
    [
        0,
        -4,
        np.uint8(2),
        ALL,
        slice(1, 3),
        slice(-2, None),
        slice(2, 99),
        ...,
        (),
        (1, ...),
        (..., ALL, ALL),
        (1, 2),
        (1, slice(0, 2)),
        (slice(2, 3), 1),
        (slice(2, 3), slice(1, 3)),
        (1, 2, 1),
        (..., 1, 2, 1),
        (3, 0, slice(1, None)),
        slice(3, 1),
        (ALL, slice(5, 6)),
        (slice(0, 4, 1), slice(-99, 99), ...),
    ],
)
def test_contiguous_parts_become_one_range(index: Any) -> None:
    array = numbers(4, 3, 2)
    part = slice_range(whole(array), index)
    assert part is not None
    assert len(part.fragments) == 1
    assert array_of(bytes(100) + array.tobytes(), part).tolist() == array[index].tolist()
    assert part.shape == array[index].shape


@pytest.mark.parametrize(
    "index",
    [
        (ALL, 1),
        (..., 0),
        (slice(0, 2), slice(0, 2)),
        slice(None, None, 2),
        slice(None, None, -1),
        None,
        (None, 1),
        True,
        np.True_,
        [0, 1],
        np.array([0, 1]),
        "a",
        1.0,
        (None, 99),
    ],
    ids=repr,
)
def test_anything_else_is_left_to_whoever_has_the_whole(index: Any) -> None:
    assert slice_range(whole(numbers(4, 3, 2)), index) is None


@pytest.mark.parametrize("index", [4, -5, (0, 3), (0, 0, 0, 0), (..., ...), (0, ..., 2), (slice(9, 9), -4)])
def test_numbers_out_of_range_are_index_errors_as_in_numpy(index: Any) -> None:
    array = numbers(4, 3, 2)
    with pytest.raises(IndexError):
        array[index]
    with pytest.raises(IndexError):
        slice_range(whole(array), index)


def test_slices_agree_with_safe_open(tmp_path: Path) -> None:
    path = tmp_path / "m"
    safetensors.numpy.save_file(TENSORS, path)
    data = path.read_bytes()
    header = read(data)
    chosen = [("f32", 1), ("f32", slice(1, 3)), ("f32", (2, slice(0, 2))), ("bf16", slice(1, 3)), ("i64", -1)]
    with safetensors.safe_open(path, "np") as reference:
        for name, index in chosen:
            part = slice_range(header.tensors[name], index)
            assert part is not None
            ours, theirs = array_of(data, part), reference.get_slice(name)[index]
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def test_half_bytes_are_not_cut() -> None:
    info = TensorInfo("t", "F4", (4, 3), fragments=(FragmentInfo("m", 10, 16),))
    assert slice_range(info, 1) is None
    part = slice_range(info, slice(2, 4))
    assert part is not None
    assert part.fragments == (FragmentInfo("m", 13, 16),)
    assert bits_of("F4") * part.element_count == 8 * part.fragments[0].length


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "bitplane"},
        {"fragments": (FragmentInfo("m", 0, 8), FragmentInfo("m", 8, 16, dst_offset=8))},
        {"fragments": (FragmentInfo("m", 0, 8),)},
        {"fragments": (FragmentInfo("m", 0, 16, checksum="sha256:" + "0" * 64),)},
    ],
    ids=["encoded", "in two pieces", "half of it", "verified as a whole"],
)
def test_what_is_not_one_plain_fragment_is_taken_whole(change: dict[str, Any]) -> None:
    plain = TensorInfo("t", "I32", (4,), fragments=(FragmentInfo("m", 0, 16),))
    assert slice_range(plain, 1) is not None
    assert slice_range(dataclasses.replace(plain, **change), 1) is None
