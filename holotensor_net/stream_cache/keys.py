"""Keys that say what a result was made of: by value, the same in every process and on every platform.

A value is written as rows of bytes, each of which begins with its kind and its length, so that no two values are
written alike; the key is the BLAKE3 digest of that::

    row      kind (1 byte) · length of the body (8 bytes, little-endian) · body
    body     what a plain value is, or the rows of the parts, one after the other
    of a set, a dict   the rows of the elements, of the pairs, in the order of their bytes

Long bytes stand in their row as length and digest: they are read once, where they lie, and never joined. What is kept
under keys outlives the program, so whoever changes a row changes ``_FORMAT`` too, and with it every key.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import mmap
import reprlib
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from ..values import blake3_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from blake3 import blake3

__all__ = ["CacheKey"]

_FORMAT = "holotensor_net 1"
_LONG = 1 << 12  # bytes from which a digest stands for them
_THREADS_PAY_FROM = 1 << 24  # bytes
_BLOCK = 1 << 20  # bytes that are brought into order at a time

Buffer: TypeAlias = bytes | bytearray | memoryview

Hash: TypeAlias = "CacheKey | Buffer | str"
"""A key, or a digest that was made elsewhere: its bytes, or its text, which are not the same."""


@dataclass(frozen=True, slots=True, repr=False)
class CacheKey:
    """A digest of 32 bytes that stands for a value. Immutable, hashable; equal keys mean equal values."""

    digest: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.digest, bytes) or len(self.digest) != 32:
            raise TypeError("a CacheKey is 32 bytes: make one of a value with CacheKey.of")

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"CacheKey({self.hex})"

    @property
    def hex(self) -> str:
        """The key as 64 hex digits."""
        return self.digest.hex()

    @classmethod
    def from_parts(cls, *parts: Buffer) -> CacheKey:
        """The key of these bytes in this division: ``(b"ab", b"c")`` and ``(b"a", b"bc")`` differ."""
        return cls._made("parts", map(_bytes, parts))

    @classmethod
    def of(cls, value: object) -> CacheKey:
        """The key of a value, by what it holds.

        Bytes-likes (of unsigned bytes), str, int, float, complex, bool, None; NumPy arrays and scalars by dtype, shape
        and bits, whatever their memory layout and byte order; lists, tuples, sets and dicts (these two whatever
        their order), dataclasses, named tuples, enums, paths (by their parts), keys, and any nesting of these. What
        compares equal but is of another type (1, 1.0 and True; a list and a tuple; 0.0 and -0.0) has another key;
        what differs in being mutable alone (bytes and bytearray, set and frozenset) has the same. Large arrays are
        read in place, and while they are, other threads run.

        Raises TypeError for anything else, with the path to the part in question: an instance of another class,
        subclasses of the built-in types, arrays of objects and of long doubles.
        """
        return cls._made("value", map(_row_of, (value,)))

    @classmethod
    def for_state(cls, config_hash: Hash, training_data_hash: Hash) -> CacheKey:
        """The key of a trained state: how it was trained, and on what."""
        return cls._made("state", map(_hash, (config_hash, training_data_hash)))

    @classmethod
    def for_chunk(cls, config_hash: Hash, state_hash: Hash, chunk_hash: Hash) -> CacheKey:
        """The key of a result: the filter's configuration, its trained state, and the data."""
        return cls._made("chunk", map(_hash, (config_hash, state_hash, chunk_hash)))

    @classmethod
    def _made(cls, purpose: str, rows: Iterable[bytes]) -> CacheKey:
        try:
            return cls(_blake3()(b"".join((_PURPOSE[purpose], *rows))).digest())
        except _Unkeyable as refused:
            raise TypeError(str(refused)) from None
        except RecursionError:
            raise TypeError("no key for a value that is nested too deeply, or holds itself: flatten it") from None


class _Unkeyable(Exception):
    """A part that has no key; every container that it is in adds where."""

    def __init__(self, part: object, advice: str) -> None:
        super().__init__()
        self._kind = f"{type(part).__module__}.{type(part).__qualname__}".removeprefix("builtins.")
        self._advice = advice
        self._steps: list[str] = []

    def inside(self, step: str) -> _Unkeyable:
        self._steps.insert(0, step)
        return self

    def __str__(self) -> str:
        return f"no key for value{''.join(self._steps)}, which is a {self._kind}: {self._advice}"


def _row(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(8, "little") + body


def _row_of(value: object) -> bytes:
    return _ROW_OF.get(type(value), _other)(value)


def _int(value: int) -> bytes:
    return _row(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _text(value: str) -> bytes:
    return _row(b"s", value.encode("utf-8", "surrogatepass"))


def _hash(value: Hash) -> bytes:
    return _text(value) if isinstance(value, str) else _bytes(value)


def _bytes(value: CacheKey | Buffer) -> bytes:
    if isinstance(value, CacheKey):
        return _row(b"k", value.digest)
    if not isinstance(value, bytes | bytearray | memoryview | mmap.mmap):
        raise TypeError(f"bytes or a CacheKey are wanted here, not {reprlib.repr(value)}: CacheKey.of makes one of it")
    view = memoryview(value)
    if view.format != "B" or view.ndim != 1:
        raise _Unkeyable(value, "cast it to bytes (view.cast('B')), or make it a NumPy array")
    return _data(view if view.c_contiguous else memoryview(view.tobytes()))


def _data(view: memoryview) -> bytes:
    if len(view) < _LONG:
        return _row(b"b", bytes(view))
    return _long(len(view), _digest(view))


def _digest(view: memoryview) -> bytes:
    # On few cores with other work, waiting for a thread that another process has put off costs more than it saves.
    return _blake3()(view).digest() if len(view) < _THREADS_PAY_FROM else bytes.fromhex(blake3_of(view))


@functools.cache
def _blake3() -> type[blake3]:
    from blake3 import blake3

    return blake3


def _long(length: int, digest: bytes) -> bytes:
    return _row(b"B", length.to_bytes(8, "little") + digest)


def _rows_in(values: Iterable[object], step: str = "[{index}]") -> list[bytes]:
    rows: list[bytes] = []
    try:
        rows.extend(map(_row_of, values))
    except _Unkeyable as refused:
        raise refused.inside(step.format(index=len(rows))) from None
    return rows


def _sequence(kind: bytes, values: Iterable[object]) -> bytes:
    return _row(kind, b"".join(_rows_in(values)))


def _set(values: Iterable[object]) -> bytes:
    return _row(b"e", b"".join(sorted(_rows_in(values, "{{…}}"))))


def _dict(value: dict[object, object]) -> bytes:
    keys = _rows_in(value, " (a key of it)")
    pairs = []
    for row, (key, part) in zip(keys, value.items(), strict=True):
        try:
            pairs.append(row + _row_of(part))
        except _Unkeyable as refused:
            raise refused.inside(f"[{reprlib.repr(key)}]") from None
    return _row(b"d", b"".join(sorted(pairs)))


def _record(value: object, names: Iterable[str]) -> bytes:
    """A dataclass or named tuple: its class, and its fields by name."""
    rows = [_class_name(type(value))]
    for name in names:
        try:
            rows.append(_text(name) + _row_of(getattr(value, name)))
        except AttributeError:
            raise _Unkeyable(value, f"its field {name!r} is not set") from None
        except _Unkeyable as refused:
            raise refused.inside(f".{name}") from None
    return _row(b"r", b"".join(rows))


def _enum(value: enum.Enum) -> bytes:
    # Names of combined flags differ between Python versions.
    name = b"" if isinstance(value, enum.Flag) else _text(value.name)
    try:
        return _row(b"m", _class_name(type(value)) + name + _row_of(value.value))
    except _Unkeyable as refused:
        raise refused.inside(".value") from None


def _class_name(kind: type) -> bytes:
    return _text(f"{kind.__module__}:{kind.__qualname__}")


def _other(value: Any) -> bytes:
    """The row of what its exact type alone does not tell."""
    numpy = sys.modules.get("numpy")  # where it was never imported, there is no array
    if numpy is not None and isinstance(value, numpy.generic):
        if isinstance(value, numpy.character) and not value:  # in an array it would be as long as a NUL
            return _row(b"n", _text(value.dtype.kind))
        return _row(b"n", _array(numpy.asarray(value), value))
    if numpy is not None and type(value) in (numpy.ndarray, numpy.memmap):
        return _row(b"a", _array(value, value))
    if isinstance(value, enum.Enum):
        return _enum(value)
    if isinstance(value, PurePath):
        return _sequence(b"p", value.parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _record(value, value._fields)
    if isinstance(value, tuple(_ROW_OF)) or (numpy is not None and isinstance(value, numpy.ndarray)):
        raise _Unkeyable(value, "a subclass may hold more than can be seen; make it a plain one")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _record(value, (field.name for field in dataclasses.fields(value)))
    raise _Unkeyable(value, "name what it stands for by bytes, text, numbers, arrays, or a dataclass of these")


def _array(array: npt.NDArray[Any], part: object) -> bytes:
    """The rows of an array: dtype, shape, and the elements in C order, little-endian."""
    dtype, shape = array.dtype, _sequence(b"t", array.shape)
    if dtype.names is not None:
        # Field by field, for there may be anything in the gaps between them.
        fields = (_text(name) + _array(array[name], part) for name in dtype.names)
        return _row(b"o", shape + b"".join(fields))
    if dtype.isbuiltin == 2 and dtype.itemsize in (1, 2, 4, 8):  # such as bfloat16; NumPy calls them all V
        name, array = dtype.name, array.view(f"u{dtype.itemsize}")
    elif dtype.kind in "biufcmMSUV" and dtype.itemsize <= _WIDEST.get(dtype.kind, dtype.itemsize):
        name = dtype.newbyteorder("<").str
    else:
        raise _Unkeyable(part, f"elements of {dtype} are not the same everywhere; convert them (array.astype)")
    return _text(name) + shape + _elements(array)


# Long doubles have gaps of arbitrary bits, and another width on every platform.
_WIDEST = {"f": 8, "c": 16}


def _elements(array: npt.NDArray[Any]) -> bytes:
    dtype = array.dtype.newbyteorder("<")
    if not array.nbytes:
        return _data(memoryview(b""))
    if array.flags.c_contiguous and array.dtype == dtype:
        return _data(array.reshape(-1).view("u1").data)
    if array.nbytes < _LONG:
        return _data(memoryview(array.astype(dtype, order="C").tobytes()))
    return _long(array.nbytes, _digest_in_order(array, dtype))


def _digest_in_order(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """The digest that the elements would have as a C-ordered array of ``dtype``, without making one."""
    import numpy as np

    options: dict[str, Any] = {"op_dtypes": [dtype], "casting": "equiv", "order": "C"}
    hasher, elements = _blake3()(), max(1, _BLOCK // dtype.itemsize)
    for block in np.nditer(array, flags=["external_loop", "buffered"], buffersize=elements, **options):
        hasher.update(np.ascontiguousarray(block).view("u1").data)
    return hasher.digest()


_ROW_OF: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: _row(b"N", b""),
    bool: lambda value: _row(b"?", b"\1" if value else b"\0"),
    int: _int,
    float: lambda value: _row(b"f", struct.pack("<d", value)),
    complex: lambda value: _row(b"c", struct.pack("<dd", value.real, value.imag)),
    str: _text,
    **dict.fromkeys((bytes, bytearray, memoryview, mmap.mmap, CacheKey), _bytes),
    list: lambda value: _sequence(b"l", value),
    tuple: lambda value: _sequence(b"t", value),
    **dict.fromkeys((set, frozenset), _set),
    dict: _dict,
}

_PURPOSE = {purpose: _text(_FORMAT) + _text(purpose) for purpose in ("parts", "value", "state", "chunk")}
