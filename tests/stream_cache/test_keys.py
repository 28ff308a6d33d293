"""Keys: equal for equal values, in every process and on every platform; different for anything else."""

from __future__ import annotations

import collections
import dataclasses
import enum
import hashlib
import itertools
import math
import mmap
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from holotensor_net.stream_cache.keys import CacheKey


class Colour(enum.Enum):
    RED = 1
    ALSO_RED = 1
    BLUE = 2


class Size(enum.Enum):
    RED = 1


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Setting:
    name: str
    weights: Any
    hidden: int = dataclasses.field(default=0, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Other:
    name: str
    weights: Any
    hidden: int = 0


for kind in (Colour, Size, Rights, Level, Point, Setting, Other):
    kind.__module__ = "golden"  # keys tell of it, and pytest names this module as it likes


def nan(payload: int) -> float:
    value: float = struct.unpack("<d", (0x7FF8 << 48 | payload).to_bytes(8, "little"))[0]
    return value


# All of these have different keys, though many of them compare equal, or have the same bytes.
DIFFERENT: dict[str, Any] = {
    "none": None,
    "false": False,
    "true": True,
    "0": 0,
    "1": 1,
    "-1": -1,
    "255": 255,
    "256": 256,
    "-256": -256,
    "2**64": 2**64,
    "0.0": 0.0,
    "-0.0": -0.0,
    "1.0": 1.0,
    "infinity": math.inf,
    "nan": nan(0),
    "nan with a payload": nan(1),
    "complex": 1 + 0j,
    "complex, minus": complex(1, -0.0),
    "no text": "",
    "text": "a",
    "text of a digit": "1",
    "umlaut": "ä",
    "umlaut of two": "a\u0308",
    "lone surrogate": "\ud800",
    "no bytes": b"",
    "bytes": b"a",
    "long bytes": b"a" * 5000,
    "longer bytes": b"a" * 5001,
    "no list": [],
    "no tuple": (),
    "no set": set(),
    "no dict": {},
    "list": ["a"],
    "tuple": ("a",),
    "set": {"a"},
    "dict": {"a": None},
    "list of two": ["a", "b"],
    "list of one": ["ab"],
    "list in a list": [["a", "b"]],
    "list and list": [["a"], "b"],
    "list, then list": ["a", ["b"]],
    "dict of two": {"a": 1, "b": 2},
    "dict, other way": {"a": 2, "b": 1},
    "dict of a pair": {("a", 1): ("b", 2)},
    "red": Colour.RED,
    "blue": Colour.BLUE,
    "another red": Size.RED,
    "read": Rights.READ,
    "read and write": Rights.READ | Rights.WRITE,
    "low": Level.LOW,
    "named tuple": Point(1, 2),
    "plain tuple": (1, 2),
    "path": PurePosixPath("a/b"),
    "absolute path": PurePosixPath("/a/b"),
    "path as text": "a/b",
    "dataclass": Setting("a", [1]),
    "dataclass, other field": Setting("b", [1]),
    "dataclass, other weights": Setting("a", [2]),
    "dataclass, field that does not compare": Setting("a", [1], hidden=1),
    "other dataclass": Other("a", [1]),
    "key": CacheKey.of("a"),
    "bytes of a key": CacheKey.of("a").digest,
    "array": np.arange(4, dtype="<f4"),
    "array, double": np.arange(4, dtype="<f8"),
    "array of ints": np.arange(4, dtype="<i4"),
    "array of unsigned": np.arange(4, dtype="<u4"),
    "array, square": np.arange(4, dtype="<f4").reshape(2, 2),
    "array, column": np.arange(4, dtype="<f4").reshape(4, 1),
    "array as bytes": np.arange(4, dtype="<f4").tobytes(),
    "array of bytes": np.arange(4, dtype="<f4").view("u1"),
    "array as list": [0.0, 1.0, 2.0, 3.0],
    "array, minus zero": np.array([-0.0, 1, 2, 3], "<f4"),
    "array, nan": np.array([nan(0)]),
    "array, other nan": np.array([nan(1)]),
    "array of none": np.zeros(0),
    "array of none, wide": np.zeros((0, 3)),
    "array of none, long": np.zeros((3, 0)),
    "array of no float": np.zeros(0, "<f4"),
    "array of one": np.ones(()),
    "row of one": np.ones(1),
    "scalar": np.float64(1),
    "single scalar": np.float32(1),
    "bool scalar": np.bool_(True),
    "int scalar": np.int64(1),
    "array of bools": np.ones(4, "?"),
    "bytes of bools": np.ones(4, "u1"),
    "seconds": np.array([1], "M8[s]"),
    "milliseconds": np.array([1], "M8[ms]"),
    "duration": np.array([1], "m8[s]"),
    "texts": np.array(["a"]),
    "wide texts": np.array(["a"], "U2"),
    "byte strings": np.array([b"a"]),
    "text scalar": np.str_("a"),
    "text scalar, empty": np.str_(""),
    "text scalar, NUL": np.str_("\0"),
    "text scalar and NUL": np.str_("a\0"),
    "bytes scalar, empty": np.bytes_(b""),
    "bytes scalar, NUL": np.bytes_(b"\0"),
    "void": np.array([b"ab"], "V2"),
    "bfloat16": np.ones(2, ml_dtypes.bfloat16),
    "bfloat16 as void": np.ones(2, ml_dtypes.bfloat16).view("V2"),
    "half": np.ones(2, "<f2"),
    "float8_e5m2": np.ones(2, ml_dtypes.float8_e5m2),
    "float8_e4m3fn": np.ones(2, ml_dtypes.float8_e4m3fn),
    "records": np.zeros(2, [("a", "<i4"), ("b", "<f8")]),
    "records, other names": np.zeros(2, [("a", "<i4"), ("c", "<f8")]),
    "records, other types": np.zeros(2, [("a", "<i4"), ("b", "<i8")]),
    "records in records": np.zeros(2, [("a", [("a", "<i4"), ("b", "<f8")])]),
    "record": np.zeros(2, [("a", "<i4"), ("b", "<f8")])[0],
}

GOLDEN = {
    "none": "3578155c272c7201",
    "false": "bda6e158f76ead14",
    "true": "db87ea4c8da21c1f",
    "0": "44c677f525be80cf",
    "1": "75f89e1e303fd0ec",
    "-1": "6f4e8dd10fd32d9e",
    "255": "65eb903678798dcf",
    "256": "49a04644bc0bcf10",
    "-256": "29b861dd4480d233",
    "2**64": "4937a0474ee5cef7",
    "0.0": "eb4489157853c61d",
    "-0.0": "d149a108226d85ab",
    "1.0": "82b3f1e043774f96",
    "infinity": "99fbcc655aeaa146",
    "nan": "a92af22113f23c12",
    "nan with a payload": "e8af916e4f7beac6",
    "complex": "ee370fc6f4046bf3",
    "complex, minus": "b03f03c32f1ca326",
    "no text": "db2771b7def82a6c",
    "text": "61de3a9fa8c65d46",
    "text of a digit": "5e21c43f52fe8d21",
    "umlaut": "2100618b0fe3c295",
    "umlaut of two": "e4d55c9873711d71",
    "lone surrogate": "275b6715d2e6f318",
    "no bytes": "d8c7b99e7cea6aa1",
    "bytes": "e7a08eee0f68fccf",
    "long bytes": "f379d28b859e4e15",
    "longer bytes": "810a8b831a46777a",
    "no list": "215ae2855e791227",
    "no tuple": "adb23a39719942ea",
    "no set": "686f68cb7a93aa54",
    "no dict": "82e6dd28ca38d2fa",
    "list": "a2052ba6f6e94e8a",
    "tuple": "221f47d1b5930372",
    "set": "8be900a089004bc4",
    "dict": "53f6aad0be4d10bb",
    "list of two": "7c887223854b5ba7",
    "list of one": "ca0b6202b0b1baec",
    "list in a list": "a6f4f2677387fec8",
    "list and list": "661dc227dbe0af6c",
    "list, then list": "340328cf09969ddd",
    "dict of two": "6841f146d63a7cba",
    "dict, other way": "d1160117000a78bc",
    "dict of a pair": "8f700ffe08d7dca4",
    "red": "167a4123a8765451",
    "blue": "05ad656f64dbceb1",
    "another red": "cd95662501362e88",
    "read": "625785e56f00f018",
    "read and write": "32b6dc9139d5d80f",
    "low": "5faa470ae7df39a5",
    "named tuple": "d8ee0542e08d1440",
    "plain tuple": "943fc35c085ae3d0",
    "path": "cc28074340725b02",
    "absolute path": "0ce12c31faddf299",
    "path as text": "451b7a14820337f5",
    "dataclass": "3661c32e814278ab",
    "dataclass, other field": "20a3fd3b2f2b66e7",
    "dataclass, other weights": "a9fb185bd76de288",
    "dataclass, field that does not compare": "b8c996b643006e9d",
    "other dataclass": "9c924e06b69ad1da",
    "key": "e77a0cafa79c81de",
    "bytes of a key": "d8d1fbb37fbfb88a",
    "array": "030f27908a8f91ce",
    "array, double": "6490f5378b0a5de0",
    "array of ints": "181fbd3c11a45f27",
    "array of unsigned": "af0ab774ca914654",
    "array, square": "12461b89ce81e60e",
    "array, column": "c66d4e57d236b2ab",
    "array as bytes": "58e88cfa330c97e2",
    "array of bytes": "9be88c5e161bb737",
    "array as list": "3c55b4ac03c71679",
    "array, minus zero": "8880543d4aefb242",
    "array, nan": "c33bcec99d197679",
    "array, other nan": "9cef0abf4a9b029b",
    "array of none": "b873c0f2d2be33f3",
    "array of none, wide": "3209f4cc68f636dc",
    "array of none, long": "32563b70c7ce29f7",
    "array of no float": "decddcf90644ab07",
    "array of one": "21a699792983c5ae",
    "row of one": "fa7aa3956a454635",
    "scalar": "e89980bdde33a6e2",
    "single scalar": "174e868a40775c3e",
    "bool scalar": "bc1f9e0efab4a468",
    "int scalar": "a70abf90c41e0d87",
    "array of bools": "782e568c09118c33",
    "bytes of bools": "db0ea367064c88de",
    "seconds": "07f3e8a58c2847c5",
    "milliseconds": "453df4db9ea13323",
    "duration": "51c680f998c7c5d2",
    "texts": "e1b46377ff7e35a5",
    "wide texts": "6f1b1996048ff3c3",
    "byte strings": "154c7b0d64ef0ef8",
    "text scalar": "05beea35c4319ad3",
    "text scalar, empty": "4d5511e5342253e5",
    "text scalar, NUL": "af6e7f46d7f019b2",
    "text scalar and NUL": "1694a561f98d5c1b",
    "bytes scalar, empty": "a5147dccc6085a17",
    "bytes scalar, NUL": "aebf18c3002fff0d",
    "void": "7e4e2ac585e89b77",
    "bfloat16": "fb992b19e92ea354",
    "bfloat16 as void": "25c5eccfc6ada6d6",
    "half": "2d07526a5d5c9ae0",
    "float8_e5m2": "a84c8e76c86104d1",
    "float8_e4m3fn": "85b97f66d77b0194",
    "records": "bf3b7e2e963c35a4",
    "records, other names": "fafadc8f97091ddc",
    "records, other types": "9bc600d8962accd2",
    "records in records": "d4ce464afffaeed5",
    "record": "e56b633860c97de3",
}


def padded(garbage: int) -> np.ndarray[Any, Any]:
    """Two records with gaps, which hold ``garbage``."""
    dtype = np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [0, 8], "itemsize": 24})
    array = np.full(48, garbage, "u1").view(dtype)
    array["a"], array["b"] = 1, 2.0
    return array


GRID = np.arange(60_000, dtype="<f4").reshape(200, 300)

SAME: dict[str, list[Any]] = {
    "bytes-likes": [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"aXbXc")[::2]],
    "long bytes-likes": [b"a" * 10_000, bytearray(b"a" * 10_000), memoryview(b"a" * 20_000)[::2]],
    "sets": [{1, 2, 3}, {3, 2, 1}, frozenset({2, 3, 1})],
    "dicts": [{"a": 1, "b": 2, 3: 4}, {3: 4, "b": 2, "a": 1}],
    "dicts with nan": [{nan(0): 1, nan(1): 2}, {nan(1): 2, nan(0): 1}],
    "sets in dicts": [{"a": {1, "1", None}}, {"a": {None, "1", 1}}],
    "aliases": [Colour.RED, Colour.ALSO_RED],
    "paths": [PurePosixPath("a/b"), PurePosixPath("a//b/."), PureWindowsPath("a\\b"), Path("a", "b")],
    "layouts": [GRID, np.asfortranarray(GRID), GRID.T.copy().T, np.repeat(GRID, 2, axis=1)[:, ::2], GRID[::-1][::-1]],
    "byte orders": [GRID, GRID.astype(">f4"), np.asfortranarray(GRID.astype(">f4"))],
    "small layouts": [GRID[:3, :2], GRID[:3, :2].copy(), GRID[:3, :2].astype(">f4"), GRID[:3, :2].copy("F")],
    "wide texts": [np.array([["ab", "c"], ["d", "e"]]), np.array([["ab", "c"], ["d", "e"]], ">U2").copy("F")],
    "times": [np.array([1, 2], "<M8[s]"), np.array([1, 2], ">M8[s]")],
    "complex": [np.array([1 + 2j, 3]), np.array([1 + 2j, 3], ">c16")],
    "bfloat16": [GRID.astype(ml_dtypes.bfloat16), np.asfortranarray(GRID.astype(ml_dtypes.bfloat16))],
    "gaps": [padded(0), padded(255), np.array([(1, 2.0)] * 2, [("a", "u1"), ("b", ">f8")])],
    "broadcasts": [np.broadcast_to(np.float32(1), (90, 90)), np.ones((90, 90), "<f4")],
    "empty": [np.zeros((0, 3), "<f4"), np.zeros((0, 3), ">f4"), np.zeros((0, 3), "<f4", "F")],
}


def test_different_values_have_different_keys() -> None:
    keys = {name: CacheKey.of(value) for name, value in DIFFERENT.items()}
    names = collections.defaultdict(list)
    for name, key in keys.items():
        names[key].append(name)
    assert [clash for clash in names.values() if len(clash) > 1] == []


@pytest.mark.parametrize("case", DIFFERENT)
def test_keys_are_what_they_have_always_been(case: str) -> None:
    assert CacheKey.of(DIFFERENT[case]).hex[:16] == GOLDEN[case]


@pytest.mark.parametrize("case", SAME)
def test_same_values_have_the_same_key(case: str) -> None:
    assert len({CacheKey.of(value) for value in SAME[case]}) == 1


def test_files_are_keyed_as_their_bytes(tmp_path: Path) -> None:
    GRID.tofile(tmp_path / "grid")
    with (tmp_path / "grid").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert CacheKey.of(mapped) == CacheKey.of(GRID.tobytes())
    assert CacheKey.of(np.memmap(tmp_path / "grid", "<f4", "r", shape=GRID.shape)) == CacheKey.of(GRID)


def test_made_keys_are_what_they_have_always_been() -> None:
    assert CacheKey.from_parts().hex[:16] == "c46575b208b12fbd"
    assert CacheKey.from_parts(b"ab", b"c").hex[:16] == "29e60ffbab475693"
    assert CacheKey.for_state(b"config", b"data").hex[:16] == "7e2130c18b6ae46d"
    assert CacheKey.for_chunk(b"config", b"state", b"chunk").hex[:16] == "110a0570b3ba3a56"


def test_keys_do_not_depend_on_the_process() -> None:
    program = "from holotensor_net import CacheKey; print(CacheKey.of({'a', 'b', 'c', 1, None, (2.5, b'x')}).hex)"
    made = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert made == {f"{CacheKey.of({'a', 'b', 'c', 1, None, (2.5, b'x')}).hex}\n".encode()}


def test_parts_are_kept_apart() -> None:
    divisions = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), ()]
    assert len({CacheKey.from_parts(*division) for division in divisions}) == len(divisions)


def test_purposes_are_kept_apart() -> None:
    parts = (b"a", b"b")
    made = {CacheKey.from_parts(*parts), CacheKey.for_state(*parts), CacheKey.of(parts), CacheKey.of(list(parts))}
    assert len(made) == 4
    assert CacheKey.for_chunk(b"a", b"b", b"c") != CacheKey.from_parts(b"a", b"b", b"c")


def test_chunk_key_depends_on_each_of_its_three() -> None:
    a, b = CacheKey.of("a"), CacheKey.of("b")
    assert len({CacheKey.for_chunk(*three) for three in itertools.product((a, b), repeat=3)}) == 8
    assert len({CacheKey.for_state(*two) for two in itertools.product((a, b), repeat=2)}) == 4


def test_key_is_a_value() -> None:
    key = CacheKey.of("a")
    assert key == CacheKey(bytes.fromhex(key.hex)) == pickle.loads(pickle.dumps(key))
    assert {key: 1}[CacheKey.of("a")] == 1
    assert key != key.digest
    assert key.hex in repr(key)
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.digest = bytes(32)  # type: ignore[misc]


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


class Listed(list[Any]):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "an object": (Opaque(), "value, which is a "),
    "in a list": ([1, Opaque()], r"value\[1\], which is a .*Opaque"),
    "in a tuple": ((1, (2, 3, Opaque())), r"value\[1\]\[2\]"),
    "in a dict": ({"a": {"b": Opaque()}}, r"value\['a'\]\['b'\]"),
    "as a key": ({Opaque(): 1}, r"value \(a key of it\)"),
    "in a set": ({"a": {Opaque()}}, r"value\['a'\]\{…\}"),
    "in a dataclass": ([Setting("a", [Opaque()])], r"value\[0\]\.weights\[0\]"),
    "in a named tuple": (Point(1, Opaque()), r"value\.y"),  # type: ignore[arg-type]
    "in an enum": (enum.Enum("Odd", {"A": Opaque()}).A, r"value\.value"),  # type: ignore[attr-defined]
    "a class": (Opaque, "value, which is a type"),
    "a dataclass itself": (Setting, "value, which is a type"),
    "a function": (len, "builtin_function"),
    "a list of another class": (Listed(), "plain"),
    "an ordered dict": ({"a": collections.OrderedDict()}, r"value\['a'\], .*OrderedDict.*plain"),
    "an array of objects": (np.array([None]), "elements of object"),
    "an array of long doubles": (np.zeros(1, np.longdouble), "elements of"),
    "a record of objects": (np.zeros(1, [("a", "O")]), "elements of object"),
    "a masked array": (np.ma.zeros(3), "MaskedArray.*plain"),
    "a memoryview of floats": (memoryview(GRID), "cast"),
    "a memoryview of signed bytes": (memoryview(b"ab").cast("b"), "cast"),
    "an iterator": (iter([1]), "list_iterator"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_part(case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        CacheKey.of(value)


def test_what_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TypeError, match="holds itself"):
        CacheKey.of(endless)


def test_field_that_is_not_set_is_refused() -> None:
    setting = Setting("a", 1)
    del setting.weights
    with pytest.raises(TypeError, match="'weights' is not set"):
        CacheKey.of(setting)


def test_parts_that_are_no_bytes_are_refused() -> None:
    for made, part in ((CacheKey.from_parts, "text"), (lambda part: CacheKey.for_state(part, b""), 5), (CacheKey, "a")):
        with pytest.raises(TypeError, match=r"CacheKey\.of"):
            made(part)  # type: ignore[operator]
    with pytest.raises(TypeError, match="cast"):
        CacheKey.from_parts(memoryview(GRID))


def test_digests_made_elsewhere_may_be_text() -> None:
    made = {CacheKey.for_state(*digests) for digests in (("ab", "c"), ("a", "bc"), (b"ab", b"c"), ("ab", b"c"))}
    assert len(made) == 4
    assert CacheKey.for_chunk("a", "b", "c") == CacheKey.for_chunk("a", "b", "c") != CacheKey.for_chunk("a", "b", "d")


# --- nothing that is different goes by the same key


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_bit_of_config_state_and_chunk_counts() -> None:
    parts = [np.linspace(0, 1, 4).tobytes(), bytes(range(20)), np.arange(12, dtype="<f4").tobytes()]

    def key(config: bytes, state: bytes, chunk: bytes) -> CacheKey:
        configured, learnt = CacheKey.of({"scale": np.frombuffer(config)}), CacheKey.for_state(b"", state)
        return CacheKey.for_chunk(configured, learnt, CacheKey.of(np.frombuffer(chunk, "<f4")))

    changed = [
        [*parts[:place], flipped(part, bit), *parts[place + 1 :]]
        for place, part in enumerate(parts)
        for bit in range(8 * len(part))
    ]
    assert len({key(*each) for each in [parts, *changed]}) == 1 + sum(8 * len(part) for part in parts)


@given(
    hnp.arrays(
        st.one_of(
            hnp.floating_dtypes(sizes=(16, 32, 64)), hnp.integer_dtypes(), hnp.complex_number_dtypes(sizes=(64,))
        ),
        hnp.array_shapes(max_dims=3, max_side=40),
        elements=None,
        fill=st.nothing(),
    ),
    st.data(),
)
def test_every_bit_of_an_array_counts(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, 8 * array.nbytes - 1))
    other = np.frombuffer(flipped(array.tobytes(), bit), array.dtype).reshape(array.shape)
    assert CacheKey.of(array) != CacheKey.of(other)
    assert CacheKey.of(array) == CacheKey.of(np.asfortranarray(array))


def test_every_bit_of_a_large_array_counts() -> None:
    source = random.Random(6)
    array = np.frombuffer(source.randbytes(1 << 20), "u1").copy().reshape(1024, 1024)
    keys = {CacheKey.of(array), CacheKey.of(array.T)}
    for _ in range(50):
        place, bit = (source.randrange(1024), source.randrange(1024)), source.randrange(8)
        array[place] ^= 1 << bit
        keys |= {CacheKey.of(array), CacheKey.of(array.T)}
        array[place] ^= 1 << bit
    assert len(keys) == 102


def any_value(source: random.Random, depth: int = 3) -> Any:
    """A value out of few, so that near misses are many."""
    kind = source.randrange(15 if depth else 10)
    size = source.choice((0, 1, 1, 2, 2, 3))
    if kind < 10:
        return _any_leaf(source, kind)
    parts = [any_value(source, depth - 1) for _ in range(size)]
    match kind:
        case 10 | 11:
            return parts
        case 12:
            return tuple(parts)
        case 13:
            return {_any_leaf(source, source.randrange(7)) for _ in range(size)}
        case _:
            return {_any_leaf(source, source.randrange(7)): part for part in parts}


def _any_leaf(source: random.Random, kind: int) -> Any:
    match kind:
        case 0:
            return source.choice((None, False, True))
        case 1 | 2:
            return source.randrange(-(1 << source.choice((1, 8, 16, 64))), 1 << source.choice((1, 8, 16, 64)))
        case 3:
            return (
                struct.unpack("<d", source.randbytes(8))[0] if source.randrange(2) else float(source.randrange(-9, 9))
            )
        case 4:
            return complex(source.randrange(3), source.randrange(3))
        case 5:
            return "".join(source.choices("ab1\0ä", k=source.randrange(5)))
        case 6:
            return bytes(source.choices(b"ab1\0\xff", k=source.randrange(5)))
        case 7:
            return PurePosixPath("/".join(source.choices("abc", k=source.randrange(4))))
        case 8:
            return source.choice((Colour.RED, Colour.BLUE, Size.RED, Point(source.randrange(9), 1), Rights.READ))
        case _:
            dtype = source.choice(("u1", "i1", "<u2", "<f4", "<i4", "?"))
            return np.array(source.choices((0, 1), k=4), dtype).reshape(source.choice(((4,), (2, 2), (4, 1), (1, 4))))


def spelt(value: Any) -> str:
    """The value in words that leave no doubt, made without any thought of speed or of how keys are made."""
    kind = type(value).__name__
    match value:
        case np.ndarray():
            return f"{kind} {value.dtype.str} {value.shape} {value.tobytes().hex()}"
        case enum.Enum() | PurePosixPath():
            return f"{kind} {value!r}"
        case list() | tuple():
            return f"{kind} ({', '.join(map(spelt, value))})"
        case set():
            return f"{kind} ({', '.join(sorted(map(spelt, value)))})"
        case dict():
            return f"{kind} ({', '.join(sorted(f'{spelt(key)}: {spelt(part)}' for key, part in value.items()))})"
        case float():
            return f"{kind} {struct.pack('<d', value).hex()}"
        case _:
            return f"{kind} {value!r}"


def assert_no_collisions(count: int) -> None:
    source, key_of = random.Random(20), {}
    tries = 0
    while len(key_of) < count:
        value = any_value(source)
        name = hashlib.sha256(spelt(value).encode("utf-8", "surrogatepass")).digest()[:16]
        key = CacheKey.of(value).digest
        assert key_of.setdefault(name, key) == key, f"two keys for {value!r}"
        tries += 1
    assert tries > count  # some came twice, and had the same key
    assert len(set(key_of.values())) == count


def test_no_collisions_among_random_values() -> None:
    assert_no_collisions(20_000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_collisions_among_a_million_random_values() -> None:
    assert_no_collisions(1_000_000)


# --- large arrays


@pytest.mark.parametrize("layout", ["C", "F", "strided", "swapped"])
def test_large_arrays_are_not_copied(layout: str) -> None:
    array = np.zeros((2048, 2048))
    array = {"C": array, "F": array.T, "strided": array[:, ::2], "swapped": array.view(">f8")}[layout]
    CacheKey.of(array[:2])
    tracemalloc.start()
    try:
        CacheKey.of(array)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_other_threads_run_while_a_large_array_is_hashed() -> None:
    array = np.zeros(1 << 28, "u1")

    def longest_gap_and_whole() -> tuple[float, float]:
        began = threading.Event()
        took = []

        def work() -> None:
            start = time.perf_counter()
            began.set()
            CacheKey.of(array)
            took.append(time.perf_counter() - start)

        thread = threading.Thread(target=work)
        thread.start()
        began.wait()
        gap, last = 0.0, time.perf_counter()
        while thread.is_alive():
            now = time.perf_counter()
            gap, last = max(gap, now - last), now
        thread.join()
        return gap, took[0]

    # A busy machine may stop this thread as well as the lock would, but not every time.
    tries = (longest_gap_and_whole() for _ in range(20))
    assert any(gap < whole / 2 for gap, whole in tries)
