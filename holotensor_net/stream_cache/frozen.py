"""Values that nobody can change: kept once, handed out as often as wanted.

``freeze`` takes a value apart into what cannot change; ``thaw`` builds it anew for each caller, out of new containers
and read-only views of the same memory.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Frozen", "freeze"]

_SMALL = 32  # bytes that a number counts for, or a container of nothing

Array: TypeAlias = "npt.NDArray[Any]"


class Frozen(Protocol):
    """A value in a form that cannot change. ``nbytes`` is what its arrays, bytes, text and numbers take."""

    @property
    def nbytes(self) -> int: ...

    def thaw(self) -> Any:
        """The value, in containers that are the caller's own; arrays are read-only."""
        ...


@dataclass(frozen=True, slots=True)
class _Plain:
    """What cannot change by itself."""

    value: Any
    nbytes: int

    def thaw(self) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class _Array:
    """A view, never handed out itself, of memory that nobody can write to."""

    array: Array
    nbytes: int

    def thaw(self) -> Any:
        return self.array.view()


@dataclass(frozen=True, slots=True)
class _Several:
    """A list, tuple, named tuple, set or frozenset."""

    kind: Callable[[Any], Any]
    parts: tuple[Frozen, ...]
    nbytes: int

    def thaw(self) -> Any:
        return self.kind(part.thaw() for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Table:
    """A dict, in its order."""

    pairs: tuple[tuple[Frozen, Frozen], ...]
    nbytes: int

    def thaw(self) -> Any:
        return {key.thaw(): part.thaw() for key, part in self.pairs}


@dataclass(frozen=True, slots=True)
class _Copied:
    """An object of which nothing is known but how to copy it."""

    value: Any
    nbytes: int

    def thaw(self) -> Any:
        return copy.deepcopy(self.value)


def freeze(value: object, *, keep: bool = False) -> Frozen:
    """The value as it is now; what is done to it afterwards does not show.

    Arrays are copied unless they lie in bytes already; bytes-likes come back as bytes. An object of another kind than
    arrays, numbers, text, bytes, and lists, tuples (named ones too), sets and dicts of these is deep-copied, here and
    each time that it is thawed. With ``keep``, what would be copied is kept as it is, and it is for the caller not to
    change it.

    Raises TypeError for what cannot be copied.
    """
    try:
        return _part(value, keep)
    except RecursionError:
        raise TypeError("a value that is nested too deeply, or holds itself, cannot be kept: flatten it") from None


def _part(value: object, keep: bool) -> Frozen:
    return _FREEZE.get(type(value), _other)(value, keep)


def _plain(value: object, keep: bool) -> Frozen:
    return _Plain(value, _SMALL)


def _text(value: str, keep: bool) -> Frozen:
    return _Plain(value, len(value) if value.isascii() else sys.getsizeof(value))


def _bytes(value: bytes | bytearray | memoryview, keep: bool) -> Frozen:
    return _Plain(bytes(value), len(value) if isinstance(value, bytes) else memoryview(value).nbytes)


def _several(value: Any, keep: bool) -> Frozen:
    parts = tuple(_part(part, keep) for part in value)
    return _Several(getattr(value, "_make", type(value)), parts, sum(part.nbytes for part in parts) or _SMALL)


def _table(value: dict[Any, Any], keep: bool) -> Frozen:
    pairs = tuple((_part(key, keep), _part(part, keep)) for key, part in value.items())
    return _Table(pairs, sum(key.nbytes + part.nbytes for key, part in pairs) or _SMALL)


def _other(value: Any, keep: bool) -> Frozen:
    numpy = sys.modules.get("numpy")  # where it was never imported, there is no array
    if numpy is not None and type(value) in (numpy.ndarray, numpy.memmap) and not value.dtype.hasobject:
        return _array(value)
    if numpy is not None and isinstance(value, numpy.generic) and not isinstance(value, numpy.void):
        return _Plain(value, value.nbytes)
    if isinstance(value, tuple) and hasattr(value, "_make") and not getattr(value, "__dict__", None):
        return _several(value, keep)
    if keep:
        return _Plain(value, _size_of(value))
    copies: dict[int, Any] = {}  # everything that can change, wherever it is in the value
    try:
        own = copy.deepcopy(value, copies)
    except Exception as error:
        raise TypeError(
            f"a {type(value).__qualname__} cannot be kept ({error}): make it arrays, numbers, text, bytes, or lists,"
            " tuples, sets and dicts of these"
        ) from error
    parts = {id(part): part for part in (own, *copies.values())}
    return _Copied(own, sum(map(_size_of, parts.values())))


def _size_of(value: object) -> int:
    nbytes = getattr(value, "nbytes", None)  # arrays, tensors
    return nbytes if isinstance(nbytes, int) else sys.getsizeof(value)


_FREEZE: dict[type, Callable[[Any, bool], Frozen]] = {
    **dict.fromkeys((type(None), bool, int, float, complex), _plain),
    str: _text,
    **dict.fromkeys((bytes, bytearray, memoryview), _bytes),
    **dict.fromkeys((list, tuple, set, frozenset), _several),
    dict: _table,
}


def _array(array: Array) -> _Array:
    import numpy as np

    if type(array) is not np.ndarray or not _lies_in_bytes(array):
        # Over bytes, so that no view of it can be made writable. The elements lie as the function left them: what is
        # computed from them may depend on that in its last bits.
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        array = np.ndarray(array.shape, array.dtype, array.tobytes(order), order=order)
    return _Array(array.view(), array.nbytes)


def _lies_in_bytes(array: Array) -> bool:
    """Whether the memory is that of a bytes object, which nobody can write to; no, if most of it is something else."""
    owner: Any = array
    while not isinstance(owner, bytes):
        if isinstance(owner, memoryview):
            owner = owner.obj
        elif isinstance(owner, type(array)):
            owner = owner.base
        else:
            return False
    return len(owner) <= 2 * array.nbytes
