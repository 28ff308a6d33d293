"""What lies in a cache folder, counted once and then kept up by what its processes tell each other."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from .blobs import Left
from .news import Item, Kind, News, Place

__all__ = ["Ledger", "Named"]

_LOOK_AGAIN = 300.0  # seconds after which what was counted is not trusted any more: news may get lost
_MOST_LOOKING = 0.01  # of the time


class Named(NamedTuple):
    """What an entry names, and its uses as far as they are known: the file may tell of later ones."""

    digest: str
    last: float = 0.0
    uses: int = 0


class Ledger:
    """Blobs and their sizes, the entries that name them, and part files that were left; as such count files set aside.

    Counted by looking at the folder when that is first asked for (entries only where somebody has to go), then kept up:
    each process tells the others what it is about to add, once more when that is there, as somebody may have looked
    meanwhile, and what it has deleted: so they know of too many bytes rather than of too few. All that is only an aid:
    what was missed shows when the folder is looked at again, and a process that believes too long in what is gone
    deletes what will be fetched again. ``entries`` is given what was known of them before. Blobs that are
    pinned are being adopted here; loose ones have lost an entry. The lock guards the collections.
    """

    def __init__(
        self,
        news: News,
        blobs: Callable[[], Iterable[tuple[str, int]]],
        parts: Callable[[], Mapping[str, Left]],
        entries: Callable[[Mapping[str, Named]], Mapping[str, Named]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._news = news
        self._look = blobs, parts, entries
        self._clock = clock
        self._blobs: dict[str, int] | None = None
        self._parts: dict[str, Left] = {}
        self._entries: dict[str, Named] | None = None
        self._named: Counter[str] = Counter()
        self._size = 0
        self._place = Place()
        self._due = 0.0
        self._has_missed = False
        self._pins: Counter[str] = Counter()
        self._coming: dict[str, int] = {}
        self._loose: set[str] = set()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all blobs, and of part files that were left, or files set aside."""
        return self._size

    @property
    def has_missed(self) -> bool:
        """Whether, for all that was asked yet, something that others told was missed since the folder was looked at."""
        return self._has_missed

    def is_counted(self) -> bool:
        """Whether the size is known, not too long ago, and nothing was missed since; takes in what was told."""
        self._has_missed = self._has_missed or not self.catch_up()
        return self._blobs is not None and not self._has_missed and self._clock() <= self._due

    def count(self) -> None:
        """Look at the folder, but for its entries if nobody has asked for them yet. Not for two threads at once. Raises
        CacheError."""
        self._look_at(with_entries=self._entries is not None)

    def refresh(self, *, anew: bool = False) -> None:
        """Know of everything that there is: from the news, or by looking at all of the folder. Not for two threads at
        once. Raises CacheError."""
        is_old = self._entries is None or self._has_missed or self._clock() > self._due
        if anew or is_old or not self.catch_up():
            self._look_at(with_entries=True)

    def catch_up(self) -> bool:
        """Take in what others, and this process, have told; False if something was missed."""
        while self._blobs is not None:
            place = self._place
            heard = self._news.since(place)
            if heard is None:
                return False
            items, end = heard
            if end == place:
                return True
            with self._lock:
                if self._place == place:  # else another thread was faster, and may have heard less
                    for item in items:
                        self._apply(item)
                    self._place = end
                    return True
        return True

    def tell(self, *items: Item) -> None:
        """Let everybody know, and take in what others have told; at least this, if some of that was missed."""
        self.announce(*items)
        if not self.is_counted():
            with self._lock:
                for item in items:
                    self._apply(item)

    def announce(self, *items: Item) -> None:
        """Let everybody know; this process will hear of it when it next asks."""
        if not self._news.tell(items):
            with self._lock:
                for item in items:
                    self._apply(item)

    def miss(self, name: str) -> None:
        """There is no such entry, be it that somebody is about to tell that it went, or was killed before."""
        with self._lock:
            self._apply(Item(Kind.NO_ENTRY, name))

    def loosen(self, digest: str) -> None:
        """The blob has lost an entry."""
        with self._lock:
            self._loose.add(digest)

    @contextlib.contextmanager
    def pinned(self, digest: str, size: int) -> Iterator[None]:
        """Keep the blob while it is being adopted, and count it, be it there or not yet."""
        with self._lock:
            self._pins[digest] += 1
            self._coming[digest] = size
        try:
            yield
        finally:
            with self._lock:
                self._pins -= Counter((digest,))
                if digest not in self._pins:
                    del self._coming[digest]

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def is_named(self, digest: str) -> bool:
        """Whether an entry names the blob."""
        return self._named[digest] > 0

    def size_of(self, digest: str) -> int:
        """Bytes of a blob; 0 if there is none."""
        return (self._blobs or {}).get(digest, 0)

    def loose(self) -> set[str]:
        with self._lock:
            return set(self._loose)

    def unnamed(self) -> list[str]:
        """The blobs that no entry names, and that nobody is adopting here."""
        with self._lock:
            return [each for each in self._blobs or () if not self._named[each] and each not in self._pins]

    def blobs(self) -> list[str]:
        with self._lock:
            return list(self._blobs or ())

    def entries(self) -> list[tuple[str, Named]]:
        with self._lock:
            return list((self._entries or {}).items())

    def parts(self) -> list[tuple[str, Left]]:
        """Part files that were left, by their tokens."""
        with self._lock:
            return list(self._parts.items())

    def close(self) -> None:
        """Let go of the news; who goes on looks at the folder again."""
        with self._lock:
            self._place, self._has_missed = Place(), True

    def _look_at(self, *, with_entries: bool) -> None:
        look_for_blobs, look_for_parts, look_for_entries = self._look
        began, place = self._clock(), self._news.end()
        blobs, parts = dict(look_for_blobs()), dict(look_for_parts())
        entries = dict(look_for_entries(self._entries or {})) if with_entries else None
        with self._lock:
            blobs.update(self._coming)
            self._blobs, self._parts, self._entries = blobs, parts, entries
            self._named = Counter(named.digest for named in (entries or {}).values())
            self._size = sum(blobs.values()) + sum(part.size for part in parts.values())
            self._place, self._due = place, began + max(_LOOK_AGAIN, (self._clock() - began) / _MOST_LOOKING)
        self._has_missed = not self.catch_up()

    def _apply(self, item: Item) -> None:
        """With the lock held."""
        blobs, other = self._blobs, item.other
        if blobs is None:
            return
        if item.kind is Kind.BLOB:
            self._size += item.number - blobs.get(other, 0)
            blobs[other] = item.number
            self._loose.discard(other)
        elif item.kind is Kind.NO_BLOB:
            self._size -= blobs.pop(other, 0)
            self._loose.discard(other)
        elif item.kind in (Kind.PART, Kind.ASIDE):
            self._strike_part(other[:32])
            is_part = item.kind is Kind.PART
            self._parts[other[:32]] = Left(item.name if is_part else "", item.number, time.time() if is_part else 0.0)
            self._size += item.number
        elif item.kind is Kind.NO_PART:
            self._strike_part(other[:32])
        elif self._entries is not None and item.kind in (Kind.ENTRY, Kind.NO_ENTRY):
            before = self._entries.pop(item.name, None)
            if before is not None:
                self._named[before.digest] -= 1
                if not self._named[before.digest]:
                    del self._named[before.digest]
            if item.kind is Kind.ENTRY:
                self._entries[item.name] = Named(other, item.number / 1e9)
                self._named[other] += 1

    def _strike_part(self, token: str) -> None:
        left = self._parts.pop(token, None)
        self._size -= left.size if left is not None else 0
