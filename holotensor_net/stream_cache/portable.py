"""Values in files without a pickle: a JSON document, and bytes beside it.

In the document None, bools, text, ordinary numbers and lists are JSON's own. Anything else is an object of one pair,
its kind and what it is::

    {"tuple": […]}  {"set": […]}  {"frozenset": […]}  {"dict": [[key, value], …]}
    {"int": "0x…"}  {"float": "hex"}  {"complex": "hex"}       where JSON would lose bits,
    {"text": "hex"}                                            or join two halves of a surrogate pair
    {"bytes": place}  {"array": [place, name]}  {"scalar": [place, name]}

A place is the bytes themselves in hex, if they are few, or the number of an attachment. Arrays lie there in the layout
of ``.npy``; the name is that of a type which ``ml_dtypes`` adds and ``.npy`` does not know, or null.
"""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ConfigurationError, FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Attachment", "pack", "unpack"]

_FEW = 1 << 10
_EXACT = 1 << 53  # other readers of JSON hold no more of an integer
_LONGEST_HEADER = 1 << 16

Attachment: TypeAlias = "tuple[bytes | memoryview, ...]"
"""The bytes of one file, in pieces that follow each other."""

Array: TypeAlias = "npt.NDArray[Any]"


class _Unportable(Exception):
    """A part that no file can hold."""


def pack(value: object) -> tuple[Any, list[Attachment]] | None:
    """The document, and what goes beside it; None for a value that holds what only memory can keep.

    Arrays that lie in one piece are not copied.
    """
    files: list[Attachment] = []
    try:
        return _packed(value, files), files
    except (_Unportable, RecursionError):
        return None


def unpack(document: Any, files: Sequence[memoryview]) -> Any:
    """The value that was packed. Arrays are views of the files, read-only where these are.

    Raises FormatError for what :func:`pack` would not give, ConfigurationError where NumPy or ml_dtypes is missing.
    """
    try:
        return _unpacked(document, files)
    except ImportError as error:
        raise ConfigurationError(f"a stored array needs {error.name}: pip install holotensor-net[tensors]") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error) as error:
        raise FormatError("a stored result is damaged: remove it, and compute it again") from error


def _packed(value: Any, files: list[Attachment]) -> Any:
    kind = type(value)
    if kind in (type(None), bool):
        return value
    if kind in _PACK:
        return _PACK[kind](value, files)
    numpy = sys.modules.get("numpy")  # where it was never imported, there is no array
    if numpy is not None and kind is numpy.ndarray:
        return {"array": _packed_array(value, files)}
    if numpy is not None and isinstance(value, numpy.generic):
        if isinstance(value, numpy.character) and numpy.asarray(value)[()] != value:
            raise _Unportable  # it ends with NULs, which arrays do not keep
        return {"scalar": _packed_array(numpy.asarray(value), files)}
    raise _Unportable


def _text(value: str, files: list[Attachment]) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"text": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _several(value: Any, files: list[Attachment]) -> Any:
    return [_packed(part, files) for part in value]


_PACK: dict[type, Callable[[Any, list[Attachment]], Any]] = {
    int: lambda value, _: value if abs(value) < _EXACT else {"int": hex(value)},
    float: lambda value, _: value if math.isfinite(value) else {"float": struct.pack("<d", value).hex()},
    complex: lambda value, _: {"complex": struct.pack("<dd", value.real, value.imag).hex()},
    str: _text,
    bytes: lambda value, files: {"bytes": _placed((value,), files)},
    list: _several,
    tuple: lambda value, files: {"tuple": _several(value, files)},
    set: lambda value, files: {"set": _several(value, files)},
    frozenset: lambda value, files: {"frozenset": _several(value, files)},
    dict: lambda value, files: {"dict": _several(map(list, value.items()), files)},
}

_UNPACK: dict[str, Callable[[Any, Sequence[memoryview]], Any]] = {
    "int": lambda text, _: int(text, 16),
    "float": lambda text, _: struct.unpack("<d", bytes.fromhex(text))[0],
    "complex": lambda text, _: complex(*struct.unpack("<dd", bytes.fromhex(text))),
    "text": lambda text, _: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "bytes": lambda place, files: bytes(_found(place, files)),
    "tuple": lambda parts, files: tuple(_unpacked(part, files) for part in parts),
    "set": lambda parts, files: {_unpacked(part, files) for part in parts},
    "frozenset": lambda parts, files: frozenset(_unpacked(part, files) for part in parts),
    "dict": lambda pairs, files: {_unpacked(key, files): _unpacked(part, files) for key, part in pairs},
    "array": lambda content, files: _unpacked_array(content, files),
    "scalar": lambda content, files: _unpacked_array(content, files)[()],
}


def _unpacked(document: Any, files: Sequence[memoryview]) -> Any:
    if isinstance(document, list):
        return [_unpacked(part, files) for part in document]
    if not isinstance(document, dict):
        return document
    ((kind, content),) = document.items()
    return _UNPACK[kind](content, files)


def _placed(pieces: Attachment, files: list[Attachment]) -> str | int:
    if sum(map(len, pieces)) <= _FEW:
        return b"".join(pieces).hex()
    files.append(pieces)
    return len(files) - 1


def _found(place: str | int, files: Sequence[memoryview]) -> memoryview:
    return memoryview(bytes.fromhex(place)) if isinstance(place, str) else files[place]


def _packed_array(array: Array, files: list[Attachment]) -> list[Any]:
    from numpy.lib import format as npy

    dtype = array.dtype
    if dtype.hasobject:
        raise _Unportable
    try:
        described = npy.dtype_to_descr(dtype)
        if dtype.isbuiltin != 2 and npy.descr_to_dtype(described) != dtype:
            raise _Unportable
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"descr": described, "fortran_order": is_fortran, "shape": array.shape})
    except (ValueError, TypeError) as error:
        raise _Unportable from error
    elements = array.ravel("F" if is_fortran else "C").view("u1").data if array.nbytes else b""
    return [_placed((header.getvalue(), elements), files), _name_of(dtype)]


def _unpacked_array(content: Any, files: Sequence[memoryview]) -> Array:
    import numpy as np
    from numpy.lib import format as npy

    place, name = content
    view = _found(place, files)
    header = io.BytesIO(view[:_LONGEST_HEADER])
    if npy.read_magic(header) != (1, 0):
        raise ValueError("an array of another version than is written")
    shape, is_fortran, dtype = npy.read_array_header_1_0(header, max_header_size=_LONGEST_HEADER)
    if name is not None:
        dtype = _extension(name)
    if dtype.hasobject:
        raise ValueError("an array of objects, which is never written")  # and would be read as addresses
    array: Array = np.ndarray(shape, dtype, view, header.tell(), order="F" if is_fortran else "C")
    return array


def _name_of(dtype: np.dtype[Any]) -> str | None:
    if dtype.isbuiltin != 2:
        return None
    if not dtype.type.__module__.startswith("ml_dtypes"):
        raise _Unportable
    return str(dtype.name)


def _extension(name: str) -> np.dtype[Any]:
    import ml_dtypes
    import numpy as np

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype
