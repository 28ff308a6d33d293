"""JSON from strangers: what is read, and everything that is refused."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.errors import FormatError
from holotensor_net.formats.strict_json import MAX_CONTAINERS, MAX_DEPTH, excerpt, load_object

KIB = 1 << 10


def load(data: bytes | bytearray | memoryview | str, limit: int = 64 * KIB) -> dict[str, Any]:
    return load_object(data.encode() if isinstance(data, str) else data, limit=limit, what="table")


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """An object of ``depth`` levels, the outermost included."""
    return '{"a":' + opening * (depth - 1) + closing * (depth - 1) + "}"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(st.dictionaries(st.text(), VALUES), st.booleans(), st.sampled_from([None, 2]))
def test_reads_what_json_writes(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert load(text) == value


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_reads_any_buffer_and_leaves_padding_alone(buffer: Any) -> None:
    assert load(buffer(b'{"a": [1, -2.5e3, "x"]}   ')) == {"a": [1, -2500.0, "x"]}


@pytest.mark.parametrize("depth", [2, MAX_DEPTH])
def test_reads_down_to_the_allowed_depth(depth: int) -> None:
    assert load(nested(depth))


@pytest.mark.parametrize(
    "text",
    [
        nested(MAX_DEPTH + 1),
        '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
        '{"a":' + '[{"b":' * 8 + "1" + "}]" * 8 + "}",
        nested(10_000),
        '{"a":' + "[" * 10_000,
        '{"a\\\\":' + nested(MAX_DEPTH) + "}",
        '{"\\"":' + nested(MAX_DEPTH) + "}",
    ],
    ids=["lists", "objects", "mixed", "very deep", "never closed", "after an escaped backslash", "after a quote"],
)
def test_refuses_deep_nesting_before_the_parser_sees_it(text: str) -> None:
    with pytest.raises(FormatError, match="over 16 deep"):
        load(text)


@pytest.mark.parametrize("name", ["[" * 40, '"[', '\\"[[[', "]", "{}", '""{"', "\\", '"', '"[" : "]"'])
def test_brackets_and_quotes_inside_strings_do_not_count(name: str) -> None:
    value = {name: [name, {name: name}], "": ["", name]}
    assert load(json.dumps(value)) == value


@given(st.dictionaries(st.text('[]{}"\\a'), st.lists(st.text('[]{}"\\a'))))
def test_strings_full_of_syntax_do_not_count(value: dict[str, list[str]]) -> None:
    assert load(json.dumps(value)) == value


@given(st.text('{}[]",:\\ a1ud8'))
def test_garbage_raises_nothing_but_format_error(text: str) -> None:
    try:
        expected = json.loads('{"a":' + text + "}")
    except ValueError:
        with pytest.raises(FormatError):
            load('{"a":' + text + "}")
    else:
        assert load('{"a":' + text + "}") == expected


@given(st.binary(max_size=200))
def test_bytes_raise_nothing_but_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        load(b'{"a":1' + data.replace(b"}", b"") + b"\x00}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "a": 1}', "'a' appears twice"),
        ('{"a": {"b": 1, "\\u0062": 2}}', "'b' appears twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": Infinity}', "Infinity"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": -1e999}', "out of range"),
        ('{"a": ' + "9" * 21 + "}", "21 digits"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"a": "\\uDC00\\uD800"}', "surrogate"),
        ('{"\\ud83d\\ud83d\\udc00\\udc00": 1}', "surrogate"),
        ('{"a": "\\\\\\ud800"}', "surrogate"),
        ("", "not JSON"),
        ("{", "brackets"),
        ('{"a": [1}]', "not JSON"),
        ('{"a": "', "brackets"),
        ('{"a": 1} x', "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": "\n"}', "not JSON"),
        ('\ufeff{"a": 1}', "not JSON"),
        ("[1]", r"must be a JSON object, not \[1\]"),
        ('"text"', "must be a JSON object"),
        ("null", "must be a JSON object"),
    ],
)
def test_refuses_two_meanings_and_non_json(text: str, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        load(text)


@pytest.mark.parametrize("text", ['{"a": "\\\\ud800"}', '{"a": "\\ud83d\\udc00"}', '{"\\\\": "\\\\\\\\uDC00"}'])
def test_reads_whole_pairs_and_what_only_looks_like_half_of_one(text: str) -> None:
    assert load(text) == json.loads(text)


@pytest.mark.parametrize(
    "data", [b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), '{"a": "\ud800"}'.encode("utf-8", "surrogatepass")]
)
def test_refuses_what_is_not_utf_8(data: bytes) -> None:
    with pytest.raises(FormatError, match="not UTF-8"):
        load(data)


def test_refuses_utf_16_without_a_mark() -> None:
    with pytest.raises(FormatError):
        load('{"a": 1}'.encode("utf-16-le"))


def test_refuses_one_byte_too_many_before_looking_at_it() -> None:
    assert load(b'{"a":1}', limit=7)
    with pytest.raises(FormatError, match="the table has 8 bytes, 7 at most"):
        load(b"[" * 8, limit=7)


def test_refuses_more_containers_than_memory_is_for() -> None:
    text = b'{"a":[' + b"[]," * MAX_CONTAINERS + b"1]}"
    with pytest.raises(FormatError, match="more than 4000000 lists and objects"):
        load(text, limit=len(text))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":"' + b"\\\\" * 500_000 + b'"}',
        b'{"a":"' + b'\\"' * 500_000,
        b'{"a":' + b'"(",' * 250_000,
        b'{"a":' + b"[" * 1_000_000,
        b'{"a":' + b"9" * 1_000_000 + b"}",
        b'{"a":0.' + b"9" * 1_000_000 + b"}",
    ],
    ids=["backslashes", "quotes", "strings", "brackets", "digits", "fraction"],
)
def test_a_megabyte_of_malice_takes_no_more_than_linear_time(text: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(FormatError):
        load(text, limit=len(text))
    assert time.process_time() - began < 2.0  # quadratic time would be minutes


@pytest.mark.parametrize(
    "value", ["x" * 10_000, "\x00" * 100, [["y" * 100] * 10] * 10, {"k" * 100: "v" * 100}, 5, None, b"\xff" * 100]
)
def test_an_excerpt_is_short_whatever_it_is_of(value: object) -> None:
    assert 1 <= len(excerpt(value)) <= 80
    assert excerpt(value).isprintable()


def test_an_excerpt_of_something_short_is_its_repr() -> None:
    assert excerpt("layer.0") == "'layer.0'"
