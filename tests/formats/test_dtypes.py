"""Element types: the installed libraries are the reference."""

from __future__ import annotations

import json
import re
import struct
import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from holotensor_net.errors import ConfigurationError, FormatError
from holotensor_net.formats.dtypes import DTYPES, bits_of, frombytes, numpy_dtype
from holotensor_net.formats.tensors import TensorInfo

NO_ARRAYS = {"F6_E2M3", "F6_E3M2"}
AS_STORED = sorted(DTYPES - NO_ARRAYS - {"F4"})
WRITABLE = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "BOOL": np.bool_,
    "C64": np.complex64,
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}") for kind, letter in ("Ii", "Uu") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}


def file_of(dtype: str, shape: list[int], size: int) -> bytes:
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def test_knows_the_dtypes_that_the_installed_library_names() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_of("NONE", [1], 1))
    named = set(re.findall(r"`([A-Z][A-Z0-9_]*)`", str(caught.value))) - {"NONE"}
    assert "BF16" in named
    assert named <= DTYPES


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_widths_are_those_of_the_installed_library(dtype: str) -> None:
    size = bits_of(dtype)  # of eight elements, in bytes
    assert safetensors.deserialize(file_of(dtype, [8], size))[0][1]["shape"] == [8]
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(file_of(dtype, [8], size + 1))


@pytest.mark.parametrize("name", ["", "float32", "f32", "F8_E4M3FN", "I4", "x" * 10_000])
def test_an_unknown_dtype_is_an_error_that_names_the_known(name: str) -> None:
    for function in (bits_of, numpy_dtype):
        with pytest.raises(FormatError, match=r"unknown dtype .* known are BF16") as caught:
            function(name)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("dtype", sorted(WRITABLE))
def test_arrays_have_the_dtype_that_the_library_would_write_as_this(dtype: str) -> None:
    written = safetensors.numpy.save({"t": np.zeros(3, WRITABLE[dtype])})
    assert json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])["t"]["dtype"] == dtype
    assert numpy_dtype(dtype) == np.dtype(WRITABLE[dtype])
    assert numpy_dtype(dtype).itemsize * 8 == bits_of(dtype)


@pytest.mark.parametrize("dtype", ["I16", "U32", "F64", "C64"])
def test_numpy_types_are_little_endian_on_every_machine(dtype: str) -> None:
    assert numpy_dtype(dtype).str.startswith("<")


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 0), (2, 3), (1, 2, 1, 3, 1, 1, 1, 2)])
@pytest.mark.parametrize("dtype", AS_STORED)
def test_an_array_is_a_view_of_its_buffer(dtype: str, shape: tuple[int, ...]) -> None:
    info = TensorInfo("t", dtype, shape)
    data = bytes(np.random.default_rng(0).integers(0, 2, info.nbytes, np.uint8))
    array = frombytes(data, info)
    assert (array.shape, array.dtype) == (shape, numpy_dtype(dtype))
    assert array.tobytes() == data
    assert not array.flags.writeable
    if data:
        assert np.shares_memory(array, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "BOOL"])
def test_an_array_over_writable_memory_writes_through(dtype: str) -> None:
    memory = bytearray(2 * bits_of(dtype) // 8)
    array = frombytes(memoryview(memory), TensorInfo("t", dtype, (2,)))
    array[1] = 1
    assert any(memory)
    assert not frombytes(memoryview(memory).toreadonly(), TensorInfo("t", dtype, (2,))).flags.writeable


def test_bf16_is_read_low_byte_first() -> None:
    array = frombytes(b"\x80\x3f\x00\xc0", TensorInfo("t", "BF16", (2,)))
    assert array.astype(np.float32).tolist() == [1.0, -2.0]


def test_an_odd_address_is_no_obstacle() -> None:
    memory = memoryview(b"x" + np.arange(4, dtype="<f8").tobytes())[1:]
    assert frombytes(memory, TensorInfo("t", "F64", (4,))).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_f4_is_unpacked_low_half_first() -> None:
    array = frombytes(b"\x10\x32\xf7", TensorInfo("t", "F4", (2, 3)))
    assert (array.dtype, array.shape) == (np.dtype(ml_dtypes.float4_e2m1fn), (2, 3))
    assert array.astype(np.float32).tolist() == [[0.0, 0.5, 1.0], [1.5, 6.0, -6.0]]


@pytest.mark.parametrize(("shape", "data"), [((0,), b""), ((0, 3), b""), ((1,), b"\x02"), ((3,), b"\x22\x02")])
def test_f4_of_any_count(shape: tuple[int, ...], data: bytes) -> None:
    array = frombytes(data, TensorInfo("t", "F4", shape))
    assert array.shape == shape
    assert (array.astype(np.float32) == 1.0).all()


@pytest.mark.parametrize("dtype", sorted(NO_ARRAYS))
def test_what_numpy_cannot_hold_is_an_error_that_says_so(dtype: str) -> None:
    with pytest.raises(FormatError, match="NumPy cannot hold F6"):
        frombytes(bytes(3), TensorInfo("t", dtype, (4,)))


@pytest.mark.parametrize("size", [0, 7, 9])
@pytest.mark.parametrize("dtype", ["F32", "F4"])
def test_refuses_a_buffer_of_another_length(dtype: str, size: int) -> None:
    count = 64 // bits_of(dtype)
    with pytest.raises(FormatError, match=f"tensor 'w' takes 8 bytes, not {size}"):
        frombytes(bytes(size), TensorInfo("w", dtype, (count,)))


@pytest.mark.parametrize(
    ("library", "stand_in", "dtype"),
    [
        ("numpy", None, "F32"),
        ("ml_dtypes", None, "BF16"),
        ("ml_dtypes", ModuleType("ml_dtypes"), "F8_E8M0"),
    ],
    ids=["no numpy", "no ml_dtypes", "old ml_dtypes"],
)
def test_a_missing_library_is_an_error_that_says_what_to_install(
    library: str, stand_in: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, stand_in)
    with pytest.raises(ConfigurationError, match=rf"{dtype} need .*{library}.*pip install holotensor-net\[tensors\]"):
        numpy_dtype(dtype)


def test_plain_types_do_not_need_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert frombytes(bytes(8), TensorInfo("t", "F32", (2,))).tolist() == [0.0, 0.0]
