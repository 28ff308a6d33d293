"""Heads of requests and answers in which there is nothing to think about, written and read at one go. No I/O.

http.client has each head parsed as a mail would be, which takes half of the processor's time that a short range costs
(measured: 0.3 of 0.6 ms). Nearly all heads are plain: these are read here, to the very same end; whatever is unusual in
any way is left to http.client, and to the guards behind it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["PlainHead", "by_name", "plain_head", "plain_request"]

_MOST_HEADERS = 63  # besides that of the range; http.client takes a hundred lines
_END = b"\r\n\r\n"
_PLACE_NAME = "content-range"
_MOST_HEADS = 64  # that are remembered
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEAD = re.compile(rf"HTTP/1\.1 (200|206) [\t -~]*\r\n((?:{_NAME}:[\t -~]*\r\n)+)\r\n".encode())
_PLACE = re.compile(rb"\r\nContent-Range:[\t ]*([\t -~]*)(?=\r\n)", re.IGNORECASE)
_HEADER = re.compile(r"([^:]+):[\t ]*([^\r]*)\r\n")
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_PARSED = ("multipart", "message")  # the parser of mails would look into these
_TOKEN = re.compile(_NAME)
_LINE = r"[\t -~\x80-\xff]+\r\n"
_LINES = re.compile(rf"(?:{_LINE})*")
_OPENING = re.compile(rf"GET [!-~]+ HTTP/1\.1\r\nHost: [!-~]+\r\n(?:{_LINE})*")
_NONE: Mapping[str, str] = MappingProxyType({})


class PlainHead(NamedTuple):
    """The head of a 200 or 206 whose body is ``length`` bytes, over a connection that stays. ``said``: its headers,
    names in lower case; ``size``: its own bytes."""

    status: int
    said: Mapping[str, str]
    length: int
    size: int


def plain_head(ahead: bytes) -> PlainHead | None:
    """The head with which these bytes begin; None if it is not all there, or not plain.

    Of one object, the heads of a second are the same but for the range: so they are read without it, and remembered.
    """
    end = ahead.find(_END) + len(_END)
    if end < len(_END):
        return None
    place = _PLACE.search(ahead, 0, end)
    if place is None:
        return _plain_head(ahead[:end])
    rest = _plain_head(ahead[: place.start()] + ahead[place.end() : end])
    if rest is None or _PLACE_NAME in rest.said:  # two of them
        return None
    return PlainHead(rest.status, {**rest.said, _PLACE_NAME: place[1].decode("ascii").strip(" \t")}, rest.length, end)


@functools.lru_cache(_MOST_HEADS)
def _plain_head(head: bytes) -> PlainHead | None:
    match = _HEAD.fullmatch(head)
    if match is None:
        return None
    headers = _HEADER.findall(match[2].decode("ascii"))
    if len(headers) > _MOST_HEADERS:
        return None
    said = by_name(headers)
    length = said.get("content-length", "")  # two of them are no number
    is_plain = (
        _LENGTH.fullmatch(length) is not None
        and "transfer-encoding" not in said
        and said.get("connection", "keep-alive").lower() == "keep-alive"
        and not said.get("content-type", "").lower().startswith(_PARSED)
    )
    return PlainHead(int(match[1]), said, int(length), len(head)) if is_plain else None


def plain_request(
    target: str, host: str, headers: Mapping[str, str], conditions: Mapping[str, str] = _NONE
) -> bytes | None:
    """The head of a GET as http.client writes it, in the order of ``headers``, and then of ``conditions``, which differ
    from one request to the next; None if anything in it is unusual."""
    opening = _opening(target, host, tuple(headers.items()), tuple(conditions))
    lines = "".join([f"{name}: {value}\r\n" for name, value in conditions.items()])
    is_plain = opening is not None and lines.count("\n") == len(conditions) and _LINES.fullmatch(lines)
    return f"{opening}{lines}\r\n".encode("latin-1") if is_plain else None


@functools.lru_cache(64)
def _opening(target: str, host: str, headers: tuple[tuple[str, str], ...], more: tuple[str, ...]) -> str | None:
    """The head of a GET as far as its ``headers``, before ``more`` of these names; None if a name or a value is
    unusual, or http.client would add another header."""
    names = (*(name for name, _ in headers), *more)
    known = {name.lower() for name in names}
    if len(known) < len(names) or "accept-encoding" not in known or "host" in known:
        return None
    opening = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    is_plain = all(map(_TOKEN.fullmatch, names)) and opening.count("\n") == len(headers) + 2
    return opening if is_plain and _OPENING.fullmatch(opening) else None


def by_name(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by their names in lower case; those of one name as one (RFC 9110 §5.2)."""
    said: dict[str, str] = {}
    for name, value in headers:
        name, value = name.lower(), value.strip(" \t")
        said[name] = f"{said[name]}, {value}" if name in said else value
    return said
