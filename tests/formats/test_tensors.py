"""The shape that all formats share."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from holotensor_net.errors import FormatError
from holotensor_net.formats.tensors import FragmentInfo, ModelHeader, TensorInfo, checked_name, checked_shape


def test_values_are_frozen_and_equal_by_content() -> None:
    fragment = FragmentInfo("a.bin", 8, 20, dst_offset=4, level=1, requires=(0,), rel_error=0.1, checksum="sha256:00")
    tensor = TensorInfo("w", "F32", (3,), "bitplane", (fragment,), 2, 0.7)
    header = ModelHeader({"w": tensor}, {"format": "pt"}, ("a.bin",))
    assert fragment.length == 12
    assert copy.deepcopy(header) == header
    for value, field in ((fragment, "start"), (tensor, "shape"), (header, "files")):
        assert not hasattr(value, "__dict__")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, ())


@pytest.mark.parametrize(
    ("dtype", "shape", "elements", "size"),
    [
        ("F32", (), 1, 4),
        ("F32", (2, 3), 6, 24),
        ("F64", (0, 5), 0, 0),
        ("BF16", (7,), 7, 14),
        ("F4", (8,), 8, 4),
        ("F4", (3,), 3, 2),
        ("F6_E2M3", (4, 2), 8, 6),
        ("F6_E3M2", (1,), 1, 1),
        ("U8", (1 << 20, 1 << 20), 1 << 40, 1 << 40),
    ],
)
def test_counts_elements_and_decoded_bytes(dtype: str, shape: tuple[int, ...], elements: int, size: int) -> None:
    info = TensorInfo("w", dtype, shape)
    assert (info.element_count, info.nbytes) == (elements, size)


def test_the_size_of_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(FormatError, match="unknown dtype 'F3'"):
        _ = TensorInfo("w", "F3", (1,)).nbytes


@pytest.mark.parametrize("shape", [[], [0], [1] * 8, [1 << 40], [1 << 20, 1 << 20], [0, 1 << 40, 1]])
def test_accepts_shapes_within_the_limits(shape: list[int]) -> None:
    assert checked_shape("w", shape) == tuple(shape)


@pytest.mark.parametrize(
    "shape",
    [
        None,
        3,
        "33",
        {},
        (1,),
        [1] * 9,
        [-1],
        [True],
        [1.0],
        ["1"],
        [None],
        [[1]],
        [2**40 + 1],
        [2**20, 2**21],
        [0, 2**62],
    ],
)
def test_refuses_shapes_beyond_the_limits_and_names_the_tensor(shape: Any) -> None:
    with pytest.raises(FormatError, match="tensor 'w'") as caught:
        checked_shape("w", shape)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["", "w", "x" * 1024, "é" * 512, "𝄞" * 256])
def test_accepts_names_of_a_kibibyte(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["x" * 1025, "é" * 513, "𝄞" * 257])
def test_refuses_longer_names_and_does_not_repeat_them(name: str) -> None:
    with pytest.raises(FormatError, match="over 1024 bytes") as caught:
        checked_name(name)
    assert len(str(caught.value)) < 150
