"""JSON from strangers: read once, within limits, with no second meaning.

RFC 8259 leaves open what a parser makes of duplicate keys, lone surrogates and huge numbers. Two readers that choose
differently see two documents in the same bytes, so all of these are refused.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from typing import Any, NoReturn

from ..errors import FormatError

__all__ = ["MAX_DEPTH", "excerpt", "load_object"]

MAX_DEPTH = 16
MAX_CONTAINERS = 4_000_000  # an empty list takes 2 bytes in the text and 56 in memory
MAX_DIGITS = 20  # of a u64; int() takes quadratic time

_EXCERPT = 80
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60

_TO_ROUND = bytes.maketrans(b"{}[]", b"()()")
_NO_STRUCTURE = bytes(set(range(256)) - set(b'"{}[]'))
_PAIR = re.compile(rb"(?i)\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
_SURROGATE = re.compile(rb"(?i)\\ud[89a-f]")


def excerpt(value: object) -> str:
    """The ``repr`` of a foreign value, cut to 80 characters, for an error message."""
    text = _REPR.repr(value)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def load_object(data: bytes | bytearray | memoryview, *, limit: int, what: str) -> dict[str, Any]:
    """The JSON object that ``data`` is, in UTF-8; ``limit`` in bytes, ``what`` names the document in errors.

    Raises FormatError for anything but one object: too long, nested deeper than 16, keys that appear twice, NaN,
    infinities, numbers of more than 20 digits, lone surrogates.
    """
    if (size := memoryview(data).nbytes) > limit:
        raise FormatError(f"the {what} has {size} bytes, {limit} at most are read")
    raw = bytes(data)
    _check_structure(raw, what)
    _check_surrogates(raw, what)
    try:
        # Decoded here because json.loads takes bytes for UTF-16 or UTF-32 if there are NULs in the right places.
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"the {what} is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"the {what} is not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise FormatError(f"the {what} must be a JSON object, not {excerpt(value)}")
    return value


def _check_structure(raw: bytes, what: str) -> None:
    """Refuse nesting that would exhaust the parser's stack, and containers that would exhaust memory.

    Works on whole buffers, about 2 ms a megabyte: drop escapes, keep quotes and brackets only, drop strings, and
    then peel off one level of brackets at a time.
    """
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(_TO_ROUND, _NO_STRUCTURE)
    # Two quotes in a row close one string and open the next, or are an empty one: without them the rest reads the same.
    text = re.sub(rb'"[^"]*"?', b"", text.replace(b'""', b""))
    if text.count(b"(") > MAX_CONTAINERS:
        raise FormatError(f"the {what} has more than {MAX_CONTAINERS} lists and objects")
    for _ in range(MAX_DEPTH):
        text = text.replace(b"()", b"")
    if text:
        raise FormatError(f"the {what} is not JSON that we read: brackets do not match, or are over {MAX_DEPTH} deep")


def _check_surrogates(raw: bytes, what: str) -> None:
    r"""Refuse half a pair such as ``\ud800``: Python would make a string of it that no one can encode."""
    if _SURROGATE.search(raw) and _SURROGATE.search(_PAIR.sub(b"", raw.replace(b"\\\\", b""))):
        raise FormatError(f"the {what} holds half a surrogate pair: it is not valid Unicode")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise FormatError(f"the key {excerpt(key)} appears twice: the document has two meanings")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise FormatError(f"a number of {len(text)} digits: no size or offset has more than {MAX_DIGITS}")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is infinity by another name
        raise FormatError(f"the number {excerpt(text)} is out of range")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise FormatError(f"{name} is not a JSON number")
