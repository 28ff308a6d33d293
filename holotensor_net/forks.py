"""What has locks and threads is made anew in a child process: whoever held the locks is not there."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renew_in_children"]

_hooked = False


class _Renewable(Protocol):
    def _open(self) -> None: ...


_alive: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def renew_in_children(one: _Renewable) -> None:
    """Have ``_open`` called in each child of a fork, for as long as somebody holds it."""
    global _hooked
    if not _hooked:
        _hooked = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_renew_all)
    _alive.add(one)


def _renew_all() -> None:
    for one in list(_alive):
        one._open()
