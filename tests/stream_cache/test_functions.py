"""What stands for a function: its name, and its version or its body; never less than tells what is computed."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from holotensor_net.stream_cache.functions import function_key

Function = Callable[..., Any]


def defined(source: str, **around: Any) -> Function:
    """The function ``f`` that the source defines, in a module of its own, always of the same name."""
    space: dict[str, Any] = {"__name__": "notebook", **around}
    exec(source, space)
    function: Function = space["f"]
    return function


def scaled_by(factor: Any) -> Function:
    def scale(state: Any, chunk: Any) -> Any:
        return chunk * factor

    return scale


def shouted(function: Function) -> Function:
    @functools.wraps(function)
    def shout(*arguments: Any) -> Any:
        return function(*arguments).upper()

    return shout


class Filter:
    def __call__(self, state: Any, chunk: Any) -> Any: ...

    def apply(self, state: Any, chunk: Any) -> Any: ...

    @classmethod
    def create(cls, state: Any, chunk: Any) -> Any: ...

    @staticmethod
    def static(state: Any, chunk: Any) -> Any: ...


SAME = [
    "def f(state, chunk): return chunk + 1",
    "\n\n# further down\ndef f(state, chunk):\n    # add\n    return chunk + 1",
]

DIFFERENT = [
    "def f(state, chunk): return chunk + 1",
    "def f(state, chunk): return chunk + 2",
    "def f(state, chunk): return chunk + 1.0",
    "def f(state, chunk): return chunk - 1",
    "def f(state, chunk): return state + 1",
    "def f(state, chunk): return chunk + one",
    "def f(state, chunk): return chunk + two",
    "def f(state, chunk): return chunk.real + 1",
    "def f(state, chunk): return (lambda: chunk + 1)()",
    "def f(state, chunk): return (lambda: chunk + 2)()",
    "def f(state, chunk): return chunk[..., 1]",
    "def f(state, chunk): return chunk[..., 2]",
    "def f(state, chunk): return chunk in {1, 2}",
    "def f(state, chunk): return chunk in {1, 3}",
    "def f(state, chunk, one=1): return chunk + one",
    "def f(state, chunk, one=2): return chunk + one",
    "def f(state, chunk, *, one=1): return chunk + one",
    "def f(state, chunk, *, one=2): return chunk + one",
    "def f(state, chunk): yield chunk + 1",
    "def f(state, chunk):\n    try: return 1 / chunk\n    except ValueError: return 0",
    "def f(state, chunk):\n    try: return 1 / chunk\n    except TypeError: return 0",
    "f = lambda state, chunk: chunk + 1",
    "f = lambda state, chunk: chunk + 2",
    "class f:\n    def f(state, chunk): return chunk + 1\nf = f.f",
]


def test_a_body_is_known_wherever_it_stands() -> None:
    assert len({function_key(defined(source)) for source in SAME}) == 1


def test_different_bodies_have_different_keys() -> None:
    keys = {source: function_key(defined(source)) for source in DIFFERENT}
    assert len(set(keys.values())) == len(DIFFERENT)


def test_a_version_stands_for_the_body() -> None:
    one, two = defined(DIFFERENT[0]), defined(DIFFERENT[1])
    assert function_key(one, "1") == function_key(two, "1")
    assert len({function_key(one), *(function_key(one, version) for version in ("1", 1, "2", (1, 2), b"1"))}) == 6


def test_module_and_qualified_name_count() -> None:
    here, there = defined(DIFFERENT[0]), defined(DIFFERENT[0], __name__="elsewhere")
    named = defined("def f(state, chunk): return chunk + 1\nf.__qualname__ = 'g'")
    for version in (None, "1"):
        assert len({function_key(each, version) for each in (here, there, named)}) == 3


@pytest.mark.parametrize("values", [(1, 2), (1, 1.0), ("a", "b"), (b"a", None), (True, 1)])
def test_plain_values_from_around_count(values: tuple[Any, Any]) -> None:
    one, two = values
    assert function_key(scaled_by(one)) == function_key(scaled_by(one)) != function_key(scaled_by(two))


def test_objects_from_around_do_not_count() -> None:
    assert function_key(scaled_by([1])) == function_key(scaled_by([2])) == function_key(scaled_by(Filter()))


def test_what_a_function_counts_does_not_count() -> None:
    calls = 0

    def counting(state: Any, chunk: Any) -> Any:
        nonlocal calls
        calls += 1

    before = function_key(counting)
    counting(None, None)
    assert calls == 1
    assert function_key(counting) == before


def test_what_is_around_may_come_later() -> None:
    def early(state: Any, chunk: Any) -> Any:
        return chunk * late

    before = function_key(early)
    late = 1
    assert function_key(early) != before


def test_what_a_decorator_wraps_counts() -> None:
    one, two = (shouted(defined(source)) for source in DIFFERENT[:2])
    assert function_key(one) != function_key(two)
    assert function_key(one) == function_key(shouted(defined(DIFFERENT[0])))
    assert function_key(one) != function_key(defined(DIFFERENT[0]))


def test_built_in_functions_are_told_by_name() -> None:
    functions: list[Function] = [len, math.hypot, math.pow, str.upper, str.lower, bytes, bytearray]
    assert len({function_key(each) for each in functions}) == len(functions)
    assert function_key(Filter.static) == function_key(Filter().static) != function_key(json.loads)


NAMELESS: dict[str, Any] = {
    "a partial": functools.partial(pow, 2),
    "a partial in disguise": functools.update_wrapper(functools.partial(scaled_by, 2), scaled_by),
    "a bound method": Filter().apply,
    "a class method": Filter.create,
    "a method of a value": "{} {}".format,
    "an object": Filter(),
    "a class": Filter,
}


@pytest.mark.parametrize("case", NAMELESS)
def test_what_a_name_does_not_tell_needs_a_version(case: str) -> None:
    with pytest.raises(TypeError, match=r"version=.*config="):
        function_key(NAMELESS[case])
    assert function_key(NAMELESS[case], 1) != function_key(NAMELESS[case], 2)


def test_versions_of_nameless_things_are_told_apart_by_what_they_are_of() -> None:
    functions = [functools.partial(pow, 2), functools.partial(math.pow, 2), Filter().apply, Filter(), "".format, pow]
    assert len({function_key(function, "1") for function in functions}) == len(functions) - 1  # a partial of pow is pow


def test_a_version_must_have_a_key() -> None:
    with pytest.raises(TypeError, match="object"):
        function_key(len, object())
