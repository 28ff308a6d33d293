"""Leads: where redirects have led, for who asks for more of the same version.

A hub answers each request with the address of the bytes, which it signs for an hour or so. To ask it for every piece
takes a round trip more each time, and hubs count how often they are asked. So what has to be of a known version anyway
goes straight to where its first piece was led: nothing else can come from there unnoticed. Who knows of no version
asks the hub, which may have a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Lead", "Leads", "is_lost"]

_MOST = 256
_PINS = frozenset(("If-Match", "If-Unmodified-Since"))
_LOST = (400, 401, 403, 404, 410)  # what is said of an address whose signature is over


class Lead(NamedTuple):
    """Where the last of some redirects led: its ``url``; whether that ``is_abroad``, where nothing of ours is sent; and
    the tag that was ``linked`` on the way, if any."""

    url: str
    is_abroad: bool
    linked: str | None


class Leads:
    """The leads of a client, by what was asked for. Thread-safe: a dictionary's own operations are atomic."""

    def __init__(self) -> None:
        self._known: dict[str, Lead] = {}

    def find(self, url: str, conditions: Mapping[str, str]) -> Lead | None:
        """Where to ask in place of ``url``, if that is known, and the conditions allow one version only."""
        return None if _PINS.isdisjoint(conditions) else self._known.get(url)

    def keep(self, url: str, lead: Lead) -> None:
        """What was asked for there has come from here."""
        known = self._known
        if len(known) >= _MOST and url not in known:
            known.pop(next(iter(tuple(known))), None)
        known[url] = lead

    def forget(self, url: str) -> None:
        """It leads nowhere any more."""
        self._known.pop(url, None)


def is_lost(status: int) -> bool:
    """Whether an answer of this status, where a lead went to, says to ask anew where it began."""
    return status in _LOST
