"""What stands for a function in the key of its results."""

from __future__ import annotations

import dis
import functools
import reprlib
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

from .keys import CacheKey

__all__ = ["function_key"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CARRIED = ("__closure__", "__defaults__", "__kwdefaults__", "__dict__")


def function_key(function: Callable[..., Any], version: object = None) -> CacheKey:
    """The key of a function: its module, its qualified name, and its version.

    ``version`` is any value that has a key. Without one the compiled body stands for it, with the plain values
    (numbers, text, bytes, None) that it has as defaults, or takes from an enclosing function and does not set itself.
    Compiled bodies change with the version of Python.

    Raises TypeError where a name and a body do not tell what will be computed, and no version does: for a bound method,
    a ``functools.partial``, a class that is not built in, an object that can be called.
    """
    name = _name_of(function)
    if version is not None:
        return CacheKey.of((*name, "version", version))
    if type(function) is FunctionType and not any(getattr(function, carried) for carried in _CARRIED):
        return _key_of_body(*name, function.__code__)
    return CacheKey.of((*name, "body", [_substance_of(layer) for layer in _layers(function)]))


@functools.lru_cache(maxsize=1024)
def _key_of_body(module: str, name: str, code: CodeType) -> CacheKey:
    """The key of a function that carries nothing but its body, as most do; made once."""
    return CacheKey.of((module, name, "body", [(_body_of(code)[0], {}, {}, {})]))


def _name_of(function: Any) -> tuple[str, str]:
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return str(getattr(named, "__module__", None)), str(named.__qualname__)


def _layers(function: Any) -> Iterator[FunctionType]:
    """The function, and those that decorators wrapped in it, as far as they are written in Python."""
    layer = function
    while isinstance(layer, FunctionType):
        yield layer
        if not hasattr(layer, "__wrapped__"):
            return
        layer = layer.__wrapped__
    if not _is_built_in(layer):
        raise TypeError(
            f"no key for {reprlib.repr(function)}, which may carry values that its name does not tell of:"
            " tell them by version=, or pass a function, and the values as config="
        )


def _is_built_in(function: object) -> bool:
    is_free = isinstance(getattr(function, "__self__", None), ModuleType | None)
    if isinstance(function, type):
        return function.__module__ == "builtins"
    return isinstance(function, MethodDescriptorType) or (isinstance(function, BuiltinFunctionType) and is_free)


def _substance_of(function: FunctionType) -> tuple[CacheKey, object, object, object]:
    body, rebound = _body_of(function.__code__)
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    captured = {name: _content(cell) for name, cell in zip(names, cells, strict=True) if name not in rebound}
    return body, _plain(captured), _plain(dict(enumerate(function.__defaults__ or ()))), _plain(function.__kwdefaults__)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the enclosing function has not set it yet
        return ...


def _plain(values: dict[Any, object] | None) -> dict[Any, object]:
    return {name: value for name, value in (values or {}).items() if type(value) in _PLAIN}


@functools.lru_cache(maxsize=1024)
def _body_of(code: CodeType) -> tuple[CacheKey, frozenset[str]]:
    """The key of what a function does, wherever it stands; and the enclosing function's names that it sets."""
    constants = [_body_of(part)[0] if isinstance(part, CodeType) else _constant(part) for part in code.co_consts]
    handlers = getattr(code, "co_exceptiontable", b"")
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    key = CacheKey.of((code.co_code, handlers, code.co_flags, code.co_argcount, names, constants))
    rebound = {step.argval for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return key, frozenset(rebound)


def _constant(value: object) -> object:
    """A constant of a body: plain, or one of the few that have no key of their own, such as an Ellipsis or a slice."""
    try:
        return CacheKey.of(value)
    except TypeError:
        return repr(value)
