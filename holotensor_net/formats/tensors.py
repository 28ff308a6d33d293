"""The one shape that every format is brought into: tensors, and where their bytes are.

Plain frozen values without checks of their own; whoever reads a format checks what it says. The limits that all
formats share stand here, and the checks of names and shapes with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

from ..errors import FormatError
from .dtypes import bits_of
from .strict_json import excerpt

__all__ = [
    "MAX_DIMENSIONS",
    "MAX_ELEMENTS",
    "MAX_NAME",
    "MAX_TENSORS",
    "BytesLike",
    "FragmentInfo",
    "ModelHeader",
    "ReadRange",
    "TensorInfo",
    "checked_name",
    "checked_shape",
]

MAX_TENSORS = 1_000_000
MAX_NAME = 1024  # bytes of UTF-8
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 40

BytesLike: TypeAlias = bytes | bytearray | memoryview

ReadRange: TypeAlias = Callable[[str, int, int], BytesLike]
"""``read_range(path, start, stop)``: those bytes of one object; fewer, or none, only where the object ends."""


@dataclass(frozen=True, slots=True)
class FragmentInfo:
    """Stored bytes of a tensor: ``[start, stop)`` of the object ``file``.

    ``dst_offset``: where they belong in the decoded tensor, in bytes (raw). ``level``: 0 first, each refines those
    below it (bitplane); ``requires``: other fragments of the tensor, by position, without which this one is useless.
    ``rel_error``: relative Frobenius error, measured, with this fragment and those it requires.
    ``checksum`` of the stored bytes: ``blake3:…`` or ``sha256:…``.
    """

    file: str
    start: int
    stop: int
    _: KW_ONLY
    dst_offset: int = 0
    level: int = 0
    requires: tuple[int, ...] = ()
    rel_error: float | None = None
    checksum: str | None = None

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: what it is, and the fragments that it is made from.

    ``dtype`` as safetensors names it; ``encoding``: how fragments become bytes (``raw``, ``bitplane``, ``htns``);
    ``priority`` and ``importance`` as the publisher set them, None if nobody did.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "raw"
    fragments: tuple[FragmentInfo, ...] = ()
    priority: int | None = None
    importance: float | None = None

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when decoded; elements below a byte are packed, and the last byte counts whole."""
        return (self.element_count * bits_of(self.dtype) + 7) // 8


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """All that is known of a model before its weights are fetched.

    ``tensors`` by name, in the order in which ``files`` hold them; ``metadata`` as the publisher wrote it.
    """

    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def checked_name(name: str) -> str:
    """``name``, which a stranger chose for a tensor. Raises FormatError if it is over 1024 bytes."""
    if len(name) > MAX_NAME // 4 and len(name.encode()) > MAX_NAME:
        raise FormatError(f"the tensor name {excerpt(name)} is over {MAX_NAME} bytes")
    return name


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """The shape of tensor ``name`` that a JSON list states: at most 8 whole numbers, at most 2⁴⁰ elements.

    Raises FormatError.
    """
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(
            f"the shape of tensor {excerpt(name)} must be a list of {MAX_DIMENSIONS} numbers at most, not"
            f" {excerpt(shape)}"
        )
    elements = 1
    for side in shape:
        if type(side) is not int or side < 0:  # True is an int to isinstance
            raise FormatError(
                f"the shape of tensor {excerpt(name)} must be whole numbers from 0 up, not {excerpt(shape)}"
            )
        elements *= side or 1  # as NumPy counts: (0, 2**62) has no elements and is too big all the same
    if elements > MAX_ELEMENTS:
        raise FormatError(f"tensor {excerpt(name)}, shape {excerpt(shape)}, has more than 2**40 elements")
    return tuple(shape)
