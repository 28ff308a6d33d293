"""The element types that safetensors defines: how wide they are, and how NumPy holds them.

All little-endian. NumPy has no BF16 and nothing below 16 bits of floating point; ``ml_dtypes`` supplies these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .tensors import TensorInfo

__all__ = ["DTYPES", "bits_of", "frombytes", "numpy_dtype"]

# name: (bits an element, NumPy type of what is stored, name in ml_dtypes)
_KINDS: dict[str, tuple[int, str, str]] = {
    "BOOL": (8, "?", ""),
    "F4": (4, "u1", "float4_e2m1fn"),
    "F6_E2M3": (6, "", ""),
    "F6_E3M2": (6, "", ""),
    "U8": (8, "u1", ""),
    "I8": (8, "i1", ""),
    "F8_E5M2": (8, "u1", "float8_e5m2"),
    "F8_E4M3": (8, "u1", "float8_e4m3fn"),
    "F8_E8M0": (8, "u1", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "u1", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "u1", "float8_e5m2fnuz"),
    "I16": (16, "<i2", ""),
    "U16": (16, "<u2", ""),
    "F16": (16, "<f2", ""),
    "BF16": (16, "<u2", "bfloat16"),
    "I32": (32, "<i4", ""),
    "U32": (32, "<u4", ""),
    "F32": (32, "<f4", ""),
    "C64": (64, "<c8", ""),
    "F64": (64, "<f8", ""),
    "I64": (64, "<i8", ""),
    "U64": (64, "<u8", ""),
}

DTYPES = frozenset(_KINDS)


def bits_of(name: str) -> int:
    """Bits that one element takes as stored. Raises FormatError for a dtype that safetensors does not define."""
    try:
        return _KINDS[name][0]
    except KeyError:
        raise FormatError(f"unknown dtype {name[:32]!r}: known are {', '.join(sorted(DTYPES))}") from None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of an array of ``name``; explicitly little-endian where NumPy has the type itself.

    F4 becomes ``float4_e2m1fn``, a byte an element. Raises FormatError for a dtype that is unknown or that NumPy
    cannot hold, ConfigurationError where NumPy or ml_dtypes is missing.
    """
    bits_of(name)
    _, stored, extension = _KINDS[name]
    if not stored:
        # No framework writes these, so how four of them share three bytes is nowhere defined.
        raise FormatError(f"NumPy cannot hold {name}: fetch the tensor's bytes and unpack them yourself")
    try:
        import numpy as np

        return np.dtype(_extension(extension) if extension else stored)
    except ImportError as error:
        raise ConfigurationError(f"arrays of {name} need {error.name}: pip install holotensor-net[tensors]") from error


def _extension(name: str) -> Any:
    import ml_dtypes

    try:
        return getattr(ml_dtypes, name)
    except AttributeError as error:
        raise ImportError(name="a newer ml_dtypes") from error


def frombytes(buffer: bytes | bytearray | memoryview, info: TensorInfo) -> npt.NDArray[Any]:
    """The array that the decoded bytes of ``info`` are: a view of ``buffer``, read-only if that is.

    F4 alone is copied, since NumPy has no half bytes. Raises FormatError if ``buffer`` is not ``info.nbytes`` long.
    """
    dtype = numpy_dtype(info.dtype)
    import numpy as np

    if (length := memoryview(buffer).nbytes) != info.nbytes:
        raise FormatError(f"tensor {info.name[:64]!r} takes {info.nbytes} bytes, not {length}")
    bits, stored, extension = _KINDS[info.dtype]
    if bits < 8:
        return _halves(buffer, info.element_count).view(dtype).reshape(info.shape)
    array: npt.NDArray[Any] = np.ndarray(info.shape, stored, buffer=buffer)
    if extension:
        # ml_dtypes knows the machine's own byte order only; this is a copy on big-endian machines and nowhere else.
        array = array.astype(array.dtype.newbyteorder("="), copy=False).view(dtype)
    return array


def _halves(buffer: bytes | bytearray | memoryview, count: int) -> npt.NDArray[Any]:
    """Four bits a byte, the low half of each byte first, as PyTorch's float4_e2m1fn_x2 has them."""
    import numpy as np

    packed = np.frombuffer(buffer, np.uint8)
    halves = np.empty((packed.size, 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=halves[:, 0])
    np.right_shift(packed, 4, out=halves[:, 1])
    return halves.reshape(-1)[:count]
