"""Digests that a server announces, and bytes that are held against them as they pass.

Content-Digest is of the bytes of one answer, Repr-Digest of the whole representation (RFC 9530); a hub names the
SHA-256 of the file that it redirects to in an entity tag of its own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import ChecksumMismatch

__all__ = ["LINKED", "NAMES", "Claim", "Digest", "announced", "check_digests", "linked"]

LINKED = "x-linked-etag"
"""The header in which a hub names the digest of the file that it redirects to."""

NAMES = frozenset(("content-digest", "repr-digest", LINKED))
"""The headers that name digests."""

_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
"""Those of RFC 9530 that prove anything → their names in ``hashlib``."""

# A Dictionary of RFC 9651 §3.2, member by member. Its values are to be byte sequences, but others may stand between.
_KEY = r"[a-z*][a-z0-9_.*-]*"
_BARE = (
    r"(?:-?[0-9]{1,15}(?:\.[0-9]{1,3})?"
    r'|%?"(?:[ !#-\[\]-~]|\\["\\])*"'
    r"|[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*"
    r"|:[A-Za-z0-9+/=]*:"
    r"|\?[01]"
    r"|@-?[0-9]{1,15})"
)
_PARAMETERS = rf"(?:; *{_KEY}(?:={_BARE})?)*"
_LIST = rf"\( *(?:{_BARE}{_PARAMETERS}(?: +{_BARE}{_PARAMETERS})*)? *\)"
_MEMBER = re.compile(rf"({_KEY})(?:=({_BARE}|{_LIST}))?{_PARAMETERS}")
_COMMA = re.compile(r"[ \t]*,[ \t]*")
_LINKED = re.compile(r'"?([0-9a-f]{64})"?')


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest as announced; ``algorithm`` as ``hashlib`` names it."""

    algorithm: str
    value: bytes

    def check(self, actual: bytes) -> None:
        """Raises ChecksumMismatch unless ``actual`` is the digest."""
        if actual != self.value:
            raise ChecksumMismatch(f"{self.algorithm}:{self.value.hex()}", f"{self.algorithm}:{actual.hex()}")


def announced(field: str | None) -> frozenset[Digest]:
    """The digests in a Content-Digest or Repr-Digest that can be checked.

    Algorithms that prove nothing, or that nobody knows, are passed over; a field that cannot be read counts as none
    (RFC 9651 §4.2).
    """
    if field is None:
        return frozenset()
    try:
        members = dict(_members(field.strip(" ")))
        return frozenset(
            Digest(_ALGORITHMS[key], _bytes(value))
            for key, value in members.items()
            if key in _ALGORITHMS and value.startswith(":")
        )
    except ValueError:
        return frozenset()


def _members(text: str) -> Iterator[tuple[str, str]]:
    """Keys and values of a Dictionary; of keys that come twice, the last counts. Raises ValueError."""
    at = 0
    while at < len(text):
        member = _MEMBER.match(text, at)
        if member is None:
            raise ValueError("no dictionary")
        yield member[1], member[2] or "?1"
        comma = _COMMA.match(text, member.end())
        at = comma.end() if comma else member.end()
        if (comma is None) != (at == len(text)):
            raise ValueError("no comma")


def _bytes(value: str) -> bytes:
    """What a byte sequence holds, its padding or not (RFC 9651 §4.2.7). Raises ValueError."""
    coded = value.strip(":").rstrip("=")
    return base64.b64decode(coded + "=" * (-len(coded) % 4), validate=True)


def linked(field: str | None) -> frozenset[Digest]:
    """The digest in a hub's linked entity tag; small files have another kind of tag there, which proves nothing."""
    found = None if field is None else _LINKED.fullmatch(field)
    return frozenset((Digest("sha256", bytes.fromhex(found[1])),)) if found else frozenset()


class Claim:
    """That the bytes from ``start`` up to ``stop`` of an object, None for those up to its end, have these digests.

    The bytes are fed in order, however many answers they come in.
    """

    def __init__(self, start: int, stop: int | None, digests: Collection[Digest]) -> None:
        self.start = start
        self.stop = stop
        self._hashes = {digest: hashlib.new(digest.algorithm) for digest in digests}

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._hashes

    def feed(self, data: memoryview) -> None:
        for made in self._hashes.values():
            made.update(data)

    def check(self) -> None:
        """All bytes came. Raises ChecksumMismatch if they are others."""
        for digest, made in self._hashes.items():
            digest.check(made.digest())


def check_digests(data: bytes | memoryview, digests: Collection[Digest]) -> None:
    """Raises ChecksumMismatch unless ``data`` has all these digests."""
    for digest in digests:
        digest.check(hashlib.new(digest.algorithm, data).digest())
