"""The faults of a hostile network, one row each: what the origin does, and the only ends that are allowed.

A row's number is that of the fault in the design. ``once`` are the ends allowed where the fault strikes a transfer a
single time, ``always`` where it strikes every time: the word ``bytes``, or names of errors. Whatever a row allows,
bytes must be right, errors ours, the deadline kept and the cache clean.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hostile.scene import CHUNK, SIZES, Asked
from wire import END, HOLD, RESET, Act, Answer, answer, chunks, drip

BYTES = frozenset({"bytes"})
ENGINE = ("ranged", "whole", "plain")
PARTS = ("ranged", "whole")
SEVERAL = SIZES[-2:]  # that take more than one request
CLIENT = ("client-ranged", "client-plain")

Strike = Callable[[Asked], "Answer | None"]
"""What the origin answers; None: this request is not one that the fault is about, and gets a sound answer."""

Bend = Callable[[bytes, int, Asked], Answer]
"""What the proxy makes of an answer's bytes, given where in them the fault strikes."""


@dataclass(frozen=True)
class Fault:
    """``validator``: see Asked. ``checksum``, ``expected``, ``pinned``: what the request knows beforehand. ``mirrors``:
    how many endpoints there are; the fault is at the first alone. ``everywhere``: whatever bytes are asked for.
    ``twice``: load, then load again what has become stale. ``waits``: takes time, so the timeouts are short.
    ``most``: requests of a transfer at most. ``within``: seconds that it may take, if not up to its deadline.
    ``uncached``: nothing may be kept. ``apart``: seconds between its requests at least. ``short``: the
    object may end before the range does.
    ``dead``: the endpoints cannot be reached at all. ``pending``: what the library lacks; ``hangs``: and so much so
    that the row cannot be run.
    """

    number: int
    name: str
    strike: Strike | None = None
    once: frozenset[str] = BYTES
    always: frozenset[str] = BYTES
    bend: Bend | None = None
    shapes: tuple[str, ...] = ENGINE
    sizes: tuple[int, ...] = SIZES
    validator: str = "strong"
    checksum: bool = False
    expected: bool = False
    pinned: bool = False
    mirrors: int = 1
    everywhere: bool = False
    twice: bool = False
    waits: bool = False
    most: int | None = None
    uncached: bool = False
    tls: bool = False
    apart: float | None = None
    short: bool = False
    dead: str | None = None
    within: float | None = None
    pending: str | None = None
    hangs: bool = False


TABLE: list[Fault] = []


def ends(*names: str) -> frozenset[str]:
    return frozenset(names)


def row(number: int, name: str, strike: Strike, always: str | frozenset[str] = BYTES, **rest: object) -> None:
    if isinstance(always, str):
        always = ends(always)
    TABLE.append(Fault(number, f"{number}-{name}", strike, always=always, **rest))  # type: ignore[arg-type]


def proxy_row(number: int, name: str, bend: Bend, always: str | frozenset[str] = BYTES, **rest: object) -> None:
    if isinstance(always, str):
        always = ends(always)
    TABLE.append(Fault(number, f"{number}-{name}", bend=bend, always=always, **rest))  # type: ignore[arg-type]


# -- words of which faults are made


def part(*changes_of: Callable[[Asked], dict[str, object]], **changes: object) -> Strike:
    """A 206 with other headers."""

    def strike(asked: Asked) -> Answer | None:
        if not asked.is_part:
            return None
        own = dict(changes)
        for change in changes_of:
            own |= change(asked)
        return asked.reply(**own)

    return strike


def any_body(**changes: object) -> Strike:
    """An answer with a body, with other headers."""
    return lambda asked: asked.reply(**changes) if asked.length else None


def placed(form: str) -> Strike:
    """A 206 with this Content-Range."""

    def strike(asked: Asked) -> Answer | None:
        if not asked.is_part:
            return None
        value = form.format(first=asked.start, last=asked.stop - 1, total=asked.size, mid=asked.start + 1)
        return asked.reply(content_range=value.encode().decode("latin-1"))

    return strike


def status(code: int, body: bytes = b"", **headers: object) -> Strike:
    return lambda _: answer(body, code, **headers)


def cut(how: Act, **changes: object) -> Strike:
    """An answer that ends in the middle of its body."""

    def strike(asked: Asked) -> Answer | None:
        if not asked.length:
            return None
        return [asked.head(**changes) + asked.body[: asked.hit], how]

    return strike


def coded(body: Callable[[Asked], bytes], how: Act = END, **changes: object) -> Strike:
    """An answer whose body is already in the chunked coding."""

    def strike(asked: Asked) -> Answer | None:
        if not asked.length:
            return None
        own: dict[str, object] = {"content_length": None, "transfer_encoding": "chunked"}
        return [asked.head(**(own | changes)) + body(asked), how]

    return strike


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] if at < len(data) else data


def digest(data: bytes, algorithm: str = "sha-256") -> str:
    """The value of a Content-Digest or Repr-Digest (RFC 9530 §2)."""
    made = hashlib.new(algorithm.replace("-", ""), data).digest()
    return f"{algorithm}=:{base64.b64encode(made).decode()}:"


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


# -- 1–7: ranges

row(
    1,
    "whole-for-a-range",
    lambda a: answer(a.case.content(a.version), 200, **a.headers()) if a.is_part else None,
    "RangeNotSupported",
    once=ends("RangeNotSupported"),
    shapes=("ranged", "client-ranged"),
)
row(
    1,
    "whole-for-all-ranges",
    lambda a: answer(a.case.content(a.version), 200, **a.headers()) if a.is_part else None,
    shapes=("whole",),
)
row(
    1,
    "whole-then-the-next-endpoint",
    lambda a: answer(a.case.content(a.version), 200, **a.headers()) if a.is_part else None,
    mirrors=2,
    shapes=PARTS,
)
row(
    1,
    "whole-without-a-length-for-a-range",
    lambda a: [answer(a.case.content(a.version), 200, content_length=None, **a.headers()), END] if a.is_part else None,
    "RangeNotSupported",
    once=ends("RangeNotSupported"),
    shapes=("ranged",),
)
row(2, "no-content-range", part(content_range=None), "ProtocolError", shapes=(*PARTS, "client-ranged"))
row(
    3,
    "other-part",
    lambda a: (
        answer(
            a.case.content()[a.start + 1 : a.stop + 1],
            206,
            **(a.headers() | {"content_range": f"bytes {a.start + 1}-{a.stop}/{a.size}"}),
        )
        if a.is_part and a.stop < a.size
        else None
    ),
    "ProtocolError",
    shapes=("ranged", "client-ranged"),
)
row(
    3,
    "earlier-part",
    lambda a: (
        answer(
            a.case.content()[a.start - 1 : a.stop - 1],
            206,
            **(a.headers() | {"content_range": f"bytes {a.start - 1}-{a.stop - 2}/{a.size}"}),
        )
        if a.is_part and a.start
        else None
    ),
    "ProtocolError",
    shapes=("ranged", "client-ranged"),
)
row(
    3,
    "later-start",
    lambda a: (
        a.reply(a.body[1:], content_range=f"bytes {a.start + 1}-{a.stop - 1}/{a.size}")
        if a.is_part and a.length > 1
        else None
    ),
    "ProtocolError",
    shapes=PARTS,
)
row(
    3,
    "more-than-asked",
    lambda a: (
        answer(
            a.case.content()[a.start : a.stop + 1],
            206,
            **(a.headers() | {"content_range": f"bytes {a.start}-{a.stop}/{a.size}"}),
        )
        if a.is_part and a.stop < a.size
        else None
    ),
    "ProtocolError",
    shapes=("ranged", "client-ranged"),
)


def _half(asked: Asked) -> Answer | None:
    if not asked.is_part or asked.length < 2:
        return None
    less = max(1, asked.length // 2)
    place = f"bytes {asked.start}-{asked.start + less - 1}/{asked.size}"
    return asked.reply(asked.body[:less], content_range=place)


row(4, "half-of-it", _half, shapes=(*PARTS, "client-ranged"))
row(4, "half-of-no-version", _half, ends("ProtocolError", "bytes"), validator="none", shapes=PARTS, most=16)
row(4, "half-of-a-weak-version", _half, ends("ProtocolError", "bytes"), validator="weak", shapes=PARTS)

for _name, _form in {
    "last-before-first": "bytes {mid}-{first}/{total}",
    "total-within": "bytes {first}-{last}/{last}",
    "other-unit": "items {first}-{last}/{total}",
    "plus": "bytes +{first}-{last}/{total}",
    "underscore": "bytes {first}-{last}/1_000_000",
    "other-digits": "bytes {first}-{last}/٣٣٣٣٣٣٣",
    "no-total": "bytes {first}-{last}",
    "equals": "bytes={first}-{last}/{total}",
    "negative": "bytes -{first}-{last}/{total}",
    "two-in-one": "bytes {first}-{last}/{total}, bytes {first}-{last}/{total}",
    "spaces": "bytes {first} - {last} / {total}",
    "endless-number": "bytes {first}-{last}/" + "9" * 5000,
    "hexadecimal": "bytes 0x{first}-{last}/{total}",
    "empty": "",
}.items():
    row(5, _name, placed(_form), "ProtocolError", shapes=PARTS)
row(
    5,
    "twice",
    part(lambda a: {"extra": f"Content-Range: bytes {a.start}-{a.stop - 1}/{a.size}\r\n".encode()}),
    "ProtocolError",
    shapes=PARTS,
)
row(
    5,
    "folded",
    lambda a: a.reply(content_range=f"bytes\r\n {a.start}-{a.stop - 1}/{a.size}") if a.is_part else None,
    "ProtocolError",
    shapes=PARTS,
)
row(6, "star-unknown", placed("bytes {first}-{last}/*"), "ProtocolError", shapes=PARTS, sizes=(1, CHUNK - 1, CHUNK))
row(6, "star-known", placed("bytes {first}-{last}/*"), shapes=("whole",), expected=True)
row(
    6,
    "other-total",
    lambda a: a.reply(content_range=f"bytes {a.start}-{a.stop - 1}/{a.size + 1}") if a.is_part else None,
    "ObjectChanged",
    shapes=("whole",),
    expected=True,
)
row(
    6,
    "other-total-between-parts",
    lambda a: a.reply(content_range=f"bytes {a.start}-{a.stop - 1}/{a.size + 1}") if a.is_part else None,
    ends("ObjectChanged"),
    shapes=PARTS,
    sizes=(CHUNK + 1, 3 * CHUNK),
)
row(
    7,
    "several-parts",
    lambda a: (
        answer(
            b"--x\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (a.start, a.stop - 1, a.size) + a.body + b"\r\n--x--\r\n",
            206,
            content_type="multipart/byteranges; boundary=x",
        )
        if a.is_part
        else None
    ),
    "ProtocolError",
    shapes=PARTS,
)
row(
    7, "several-parts-and-a-place", part(content_type="multipart/byteranges; boundary=x"), "ProtocolError", shapes=PARTS
)

# -- 8–12: where a body ends

row(8, "cut", cut(END), "ConnectionFailed", shapes=(*ENGINE, *CLIENT))
row(8, "reset", cut(RESET), "ConnectionFailed")
row(8, "cut-without-a-version", cut(END), "ConnectionFailed", validator="none")
row(8, "reset-before-the-head", lambda _: [RESET], "ConnectionFailed")
row(8, "end-before-the-head", lambda _: [END], "ConnectionFailed")
row(
    8,
    "cut-in-the-head",
    lambda a: [a.head()[: a.random.randrange(1, len(a.head()) - 1)], END],
    ends("ConnectionFailed", "ProtocolError"),
)
row(9, "part-without-length-cut", cut(END, content_length=None), "ConnectionFailed", shapes=(*PARTS, "client-ranged"))
row(9, "part-without-length", lambda a: [a.reply(content_length=None), END] if a.is_part else None, shapes=PARTS)
row(9, "length-in-words", cut(END, content_length="abc"), "ProtocolError", shapes=(*ENGINE, *CLIENT))
row(9, "negative-length", cut(END, content_length="-5"), "ProtocolError")
row(9, "length-with-plus", lambda a: a.reply(content_length=f"+{a.length}") if a.length else None, "ProtocolError")
row(
    9,
    "two-lengths",
    lambda a: a.reply(extra=b"Content-Length: %d\r\n" % (a.length + 1)) if a.length else None,
    "ProtocolError",
)
row(
    9,
    "length-less-than-part",
    lambda a: a.reply(content_length=a.length - 1) if a.length > 1 else None,
    "ProtocolError",
    shapes=PARTS,
)
row(
    9,
    "length-more-than-part",
    lambda a: [a.reply(content_length=a.length + 1), END] if a.length > 1 else None,
    "ProtocolError",
    shapes=PARTS,
)
row(
    9,
    "whole-without-end",
    lambda a: [a.reply(content_length=None), END],
    "ProtocolError",
    shapes=("plain", "client-plain"),
)
row(9, "whole-of-known-size-cut", cut(END, content_length=None), "ConnectionFailed", shapes=("plain",), expected=True)
row(
    9,
    "whole-of-known-size-too-long",
    lambda a: [a.reply(a.body + b"x", content_length=None), END],
    "ProtocolError",
    shapes=("plain",),
    expected=True,
)
row(9, "other-length-than-known", lambda a: a.reply(a.body + b"x"), "ObjectChanged", shapes=("plain",), expected=True)
row(
    10,
    "length-and-chunks",
    coded(lambda a: chunks(a.body[: a.length // 2]), content_length="256"),
    "ProtocolError",
    shapes=(*ENGINE, *CLIENT),
)
row(
    10,
    "right-length-and-chunks",
    lambda a: [a.head(transfer_encoding="chunked") + chunks(a.body), END] if a.length else None,
    "ProtocolError",
)
row(
    11,
    "excess",
    lambda a: a.reply(content_length=a.length) + b"HTTP/1.1 200 OK\r\n" if a.length else None,
    ends("ProtocolError"),
    shapes=(*ENGINE, *CLIENT),
)
row(
    11,
    "excess-after-part-without-length",
    lambda a: [a.reply(content_length=None) + b"more", END] if a.is_part else None,
    "ProtocolError",
    shapes=PARTS,
)
row(11, "more-chunks-than-part", coded(lambda a: chunks(a.body, b"more")), "ProtocolError", shapes=PARTS)
row(
    12,
    "chunked",
    lambda a: (
        a.head(content_length=None, transfer_encoding="chunked") + chunks(a.body[: a.hit], a.body[a.hit :])
        if 0 < a.hit < a.length
        else None
    ),
    shapes=PARTS,
)
row(
    12,
    "cut-between-chunks",
    coded(lambda a: chunks(a.body[: a.hit], end=b"") if a.hit else b""),
    "ConnectionFailed",
    shapes=(*ENGINE, *CLIENT),
)
row(
    12,
    "cut-in-a-chunk",
    coded(lambda a: b"%04x\r\n" % a.length + a.body[: a.hit]),
    "ConnectionFailed",
    shapes=(*ENGINE, *CLIENT),
)
row(
    12,
    "cut-in-a-chunks-length",
    coded(lambda a: (b"%04x\r\n%b\r\n" % (a.hit, a.body[: a.hit]) if a.hit else b"") + b"0"),
    "ConnectionFailed",
    shapes=(*ENGINE, *CLIENT),
)
row(
    12,
    "reset-between-chunks",
    coded(lambda a: chunks(a.body[: a.hit], end=b"") if a.hit else b"", RESET),
    "ConnectionFailed",
)
row(12, "unterminated", coded(lambda a: chunks(a.body, end=b"")), ends("ConnectionFailed", "bytes"))
row(12, "chunk-length-in-words", coded(lambda a: b"zz\r\n" + a.body), ends("ConnectionFailed", "ProtocolError"))
row(
    12,
    "short-chunks",
    coded(lambda a: chunks(a.body[:-1])),
    ends("ConnectionFailed", "ProtocolError", "bytes"),
    shapes=PARTS,
)

row(
    8,
    "cut-in-the-length",
    lambda a: [b"HTTP/1.1 200 OK\r\nContent-Length: 0", END] if a.length else None,
    "ConnectionFailed",
    shapes=("plain", "client-plain"),
)
for _name, _sign in {"plus": b"+", "hexadecimal": b"0x", "underscore": b"0_", "minus": b"-"}.items():
    row(
        12,
        f"chunk-length-with-{_name}",
        coded(lambda a, sign=_sign: sign + chunks(a.body)),
        ends("ConnectionFailed", "ProtocolError"),
        shapes=(*ENGINE, *CLIENT),
    )

# -- 13–17: heads and codings that lie, bytes that are wrong

for _name, _line in {
    "colonless": b"garbage\r\n",
    "leading-space": b" Folded: first\r\n",
    "nul": b"\0\0: \0\r\n",
    "bare-colon": b": x\r\n",
}.items():
    row(
        13,
        _name,
        lambda a, line=_line: a.reply(extra=line) if a.length else None,
        "ProtocolError",
    )
row(
    13,
    "garbage-hides-coding",
    lambda a: [a.reply(content_length=None, extra=b"garbage\r\n"), END] if a.length else None,
    "ProtocolError",
)
row(14, "said-to-be-gzip", any_body(content_encoding="gzip"), "ProtocolError")
row(14, "said-to-be-brotli", any_body(content_encoding="br"), "ProtocolError", shapes=(*ENGINE, "client-ranged"))
row(
    14,
    "whole-said-to-be-brotli",
    any_body(content_encoding="br"),
    "ProtocolError",
    once=ends("ProtocolError"),
    shapes=("client-plain",),
)
row(
    14,
    "gzip-said-to-be-brotli",
    lambda a: a.reply(gzip.compress(a.body), content_encoding="br"),
    "ProtocolError",
    once=ends("ProtocolError"),
    shapes=("client-plain",),
)
row(
    14,
    "slice-of-gzip",
    lambda a: (
        answer(
            gzip.compress(a.case.content())[: a.length].ljust(a.length, b"\0"),
            206,
            **(a.headers() | {"content_range": f"bytes {a.start}-{a.stop - 1}/{a.size}", "content_encoding": "gzip"}),
        )
        if a.is_part
        else None
    ),
    "ProtocolError",
    shapes=PARTS,
)
row(
    14,
    "bomb",
    lambda a: answer(gzip.compress(bytes(8 << 20)), **(a.headers() | {"content_encoding": "gzip"})),
    ends("ProtocolError", "NetworkError"),
    once=ends("bytes", "ProtocolError", "NetworkError"),
    shapes=("plain", "client-plain"),
)
row(
    14,
    "broken-gzip",
    lambda a: (
        a.reply(flipped(gzip.compress(a.body), len(gzip.compress(a.body)) - 6), content_encoding="gzip")
        if a.length
        else None
    ),
    ends("ProtocolError"),
    once=ends("bytes", "ProtocolError"),
    shapes=("client-plain",),
    sizes=SIZES[1:],
)
row(
    14,
    "gzip-cut-at-a-flush",
    lambda a: a.reply(_unfinished(a.body), content_encoding="gzip") if a.length else None,
    "ProtocolError",
    once=ends("ProtocolError"),
    shapes=("client-plain",),
)
row(
    14,
    "two-gzip-members",
    lambda a: a.reply(gzip.compress(a.body) * 2, content_encoding="gzip"),
    "ProtocolError",
    once=ends("ProtocolError"),
    shapes=("client-plain",),
)


def _unfinished(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH)


row(
    15,
    "gzip-chunked",
    lambda a: (
        [a.head(content_length=None, transfer_encoding="gzip, chunked") + chunks(gzip.compress(a.body)), END]
        if a.length
        else None
    ),
    "ProtocolError",
    shapes=(*ENGINE, *CLIENT),
)
row(
    15,
    "gzip-alone",
    lambda a: [a.reply(content_length=None, transfer_encoding="gzip"), END] if a.length else None,
    "ProtocolError",
)
row(16, "bit-flip", lambda a: a.reply(flipped(a.body, a.hit)) if a.length else None, "ChecksumMismatch", checksum=True)
row(
    16,
    "bit-flip-then-the-next-endpoint",
    lambda a: a.reply(flipped(a.body, a.hit)) if a.length else None,
    checksum=True,
    mirrors=2,
)
row(
    16,
    "captive-portal",
    lambda a: answer(b"<html>Welcome!".ljust(a.length)[: a.length], 200, content_type="text/html"),
    ends("ChecksumMismatch", "RangeNotSupported", "ObjectChanged", "bytes"),
    once=ends("bytes", "RangeNotSupported"),
    checksum=True,
)
row(
    16,
    "captive-portal-by-redirect",
    lambda a: answer(b"", 302, location=f"http://127.0.0.1:{a.other_port}/portal"),
    ends("ChecksumMismatch", "RangeNotSupported"),
    once=ends("bytes", "RangeNotSupported"),
    checksum=True,
    sizes=(1, CHUNK),
)
row(
    16,
    "swapped-pieces",
    lambda a: a.reply(a.body[::-1]) if a.length > 1 and a.body != a.body[::-1] else None,
    "ChecksumMismatch",
    checksum=True,
)

row(
    17,
    "body-against-content-digest",
    lambda a: a.reply(flipped(a.body, a.hit), content_digest=digest(a.body)) if a.length else None,
    ends("ChecksumMismatch", "ProtocolError"),
    shapes=(*ENGINE, *CLIENT),
)
row(
    17,
    "whole-against-repr-digest",
    lambda a: a.reply(flipped(a.body, a.hit), repr_digest=digest(a.body)) if a.length else None,
    ends("ChecksumMismatch", "ProtocolError"),
    shapes=("plain", "client-plain"),
)
row(
    17,
    "sha-512",
    lambda a: a.reply(flipped(a.body, a.hit), content_digest=digest(a.body, "sha-512")) if a.length else None,
    ends("ChecksumMismatch", "ProtocolError"),
)
row(17, "right-content-digest", lambda a: a.reply(content_digest=digest(a.body)))
row(17, "repr-digest-with-a-part", lambda a: a.reply(repr_digest=digest(a.case.content())), shapes=PARTS)
row(17, "unknown-digest", lambda a: a.reply(content_digest="md5=:AAAA:, crc99=:x:, nonsense", repr_digest="?!"))


def _hub(asked: Asked) -> Answer:
    """A hub that sends large files' readers to a store, and says which digest they will find there."""
    linked = hashlib.sha256(asked.case.content()).hexdigest()
    where = f"http://127.0.0.1:{asked.other_port}/flipped/{asked.case.key}"
    return answer(b"", 302, location=where, x_linked_etag=f'"{linked}"', x_linked_size=asked.case.object_size)


row(
    17,
    "linked-etag",
    _hub,
    ends("ChecksumMismatch", "ProtocolError"),
    shapes=("whole", "plain"),
    sizes=SIZES[1:],
)

# -- 18–26: which version it is


def replaced(*, honest: bool, **changes: object) -> Strike:
    """The object is replaced after the first request, or before each one after it."""

    def strike(asked: Asked) -> Answer | None:
        asked.version = asked.nth if asked.case.lasting else min(asked.nth, 1)
        if not asked.version:
            return None
        if changes and asked.is_satisfiable:
            return asked.reply(**changes)
        return asked.good(conditions=honest)

    return strike


def _alternating(asked: Asked) -> Answer | None:
    """Two servers behind one name, with a version each."""
    asked.version = asked.nth % 2
    return asked.good(conditions=False)


def _cut_and_replaced(asked: Asked) -> Answer | None:
    asked.version = asked.nth if asked.case.lasting else min(asked.nth, 1)
    if asked.hits and not asked.case.lasting:
        return None
    said = asked.request.headers.get("if-match")
    if said is not None and said != asked.etag:
        return answer(b"", 412)
    return cut(END)(asked)


row(18, "replaced", replaced(honest=True), ends("bytes", "ObjectChanged"), everywhere=True, sizes=SEVERAL, shapes=PARTS)
row(
    18,
    "replaced-and-pinned",
    lambda a: (setattr(a, "version", 1), a.good())[1],
    "ObjectChanged",
    once=ends("ObjectChanged", "bytes"),
    pinned=True,
    everywhere=True,
    sizes=SIZES[1:],
)
row(
    18,
    "cut-and-replaced",
    _cut_and_replaced,
    ends("ConnectionFailed", "ObjectChanged", "bytes"),
    once=ends("bytes", "ObjectChanged"),
    everywhere=True,
)
row(19, "if-match-ignored", replaced(honest=False), ends("bytes", "ObjectChanged"), everywhere=True, sizes=SEVERAL)
row(
    19,
    "version-withheld",
    replaced(honest=False, etag=None),
    ends("bytes", "ObjectChanged"),
    everywhere=True,
    sizes=SEVERAL,
)
row(
    19,
    "two-versions-in-turn",
    _alternating,
    ends("bytes", "ObjectChanged"),
    once=ends("bytes", "ObjectChanged"),
    everywhere=True,
)
row(20, "weak-etag", _alternating, everywhere=True, validator="weak", once=BYTES)
row(20, "no-validator", _alternating, everywhere=True, validator="none", once=BYTES)
row(
    20, "cut-of-a-weak-version", _cut_and_replaced, ends("ConnectionFailed", "bytes"), validator="weak", everywhere=True
)
row(
    20,
    "replaced-by-a-weak-version",
    replaced(honest=False, etag='W/"v0"'),
    ends("bytes", "ObjectChanged"),
    everywhere=True,
    sizes=SEVERAL,
)
row(21, "date-of-the-same-second", _alternating, everywhere=True, validator="weak-date")
row(
    21,
    "cut-with-a-date-of-the-same-second",
    _cut_and_replaced,
    ends("ConnectionFailed", "bytes"),
    validator="weak-date",
    everywhere=True,
)
row(
    21,
    "replaced-by-date",
    replaced(honest=True),
    ends("bytes", "ObjectChanged"),
    validator="date",
    everywhere=True,
    sizes=SEVERAL,
)
row(
    21,
    "date-ignored",
    replaced(honest=False),
    ends("bytes", "ObjectChanged"),
    validator="date",
    everywhere=True,
    sizes=SEVERAL,
)
row(22, "mirror-of-another-version", cut(END), mirrors=2)
row(22, "mirror-of-another-version-in-the-head", status(404), mirrors=2)
row(22, "mirror-with-another-name-for-it", cut(END), mirrors=2, checksum=True)
row(
    23,
    "if-range-answered-by-the-whole",
    lambda a: answer(a.case.content(), 200, **a.headers()) if "if-range" in a.request.headers else cut(END)(a),
    "ConnectionFailed",
    shapes=PARTS,
)


def _once_after_a_cut(strike: Strike) -> Strike:
    """A cut, what follows it, and nothing more, however long the fault is to last."""
    return lambda asked: cut(END)(asked) if asked.nth == 0 else strike(asked) if asked.nth == 1 else None


def _after_the_first(strike: Strike) -> Strike:
    """A cut, and what follows it."""

    def after(asked: Asked) -> Answer | None:
        if asked.nth == 0:
            return cut(END)(asked)
        return strike(asked) if asked.case.lasting or asked.nth == 1 else None

    return after


row(
    24,
    "refused-where-we-stand",
    _after_the_first(lambda a: answer(b"", 416, content_range=f"bytes */{a.start or 1}")),
    ends("ObjectChanged", "HttpError", "ConnectionFailed"),
    shapes=PARTS,
    everywhere=True,
    sizes=(CHUNK - 1, CHUNK),
    once=ends("bytes", "ObjectChanged"),
)
row(
    24,
    "refused-where-what-may-end-was-cut",
    _once_after_a_cut(lambda a: answer(b"", 416, content_range=f"bytes */{a.start}")),
    shapes=PARTS,
    sizes=(CHUNK - 1, CHUNK),
    everywhere=True,
    short=True,
)
row(
    18,
    "longer-when-asked-again",
    lambda a: cut(END)(a) if a.nth == 0 else a.reply(a.body[::-1] + b"x") if a.nth == 1 else None,
    shapes=("plain",),
    sizes=SIZES[1:],
    everywhere=True,
)
row(
    26,
    "change-of-protocol",
    lambda _: [answer(b"", 101, content_length=None, upgrade="h2c", connection="upgrade"), bytes(64), END],
    "ProtocolError",
)
row(
    24,
    "ends-before-the-range",
    lambda a: (
        a.reply(
            a.body[: a.length // 2],
            content_range=f"bytes {a.start}-{a.start + a.length // 2 - 1}/{a.start + a.length // 2}",
        )
        if a.is_part and a.length > 1
        else None
    ),
    ends("HttpError", "ObjectChanged"),
    once=ends("HttpError", "ObjectChanged", "bytes"),
    shapes=("ranged", "client-ranged"),
)
row(
    24,
    "refused-after-a-cut",
    _after_the_first(status(416)),
    ends("HttpError", "ConnectionFailed"),
    shapes=PARTS,
    everywhere=True,
    sizes=(CHUNK - 1, CHUNK),
)
row(
    24,
    "refused-although-there-is-more",
    lambda a: answer(b"", 416, content_range=f"bytes */{a.size}") if a.length else None,
    "HttpError",
    once=ends("HttpError", "bytes"),
    shapes=PARTS,
)
row(
    24,
    "short-object-refuses-in-words",
    status(416, content_range="bytes */x"),
    "HttpError",
    once=ends("HttpError"),
    shapes=("ranged",),
    sizes=(0,),
)
row(25, "unsolicited-304", status(304, content_length=None), "ProtocolError", shapes=(*ENGINE, *CLIENT))
row(
    25,
    "304-of-another-version",
    lambda a: (
        answer(b"", 304, content_length=None, etag='"other"')
        if "if-none-match" in a.request.headers
        else a.good()
        if not a.is_satisfiable
        else a.reply(cache_control="no-cache")
    ),
    "ProtocolError",
    once=ends("ProtocolError", "bytes"),
    twice=True,
    everywhere=True,
    sizes=SIZES[1:],
)
row(
    25,
    "304",
    lambda a: (
        a.good() if "if-none-match" in a.request.headers or not a.is_satisfiable else a.reply(cache_control="no-cache")
    ),
    twice=True,
    everywhere=True,
)
row(
    26,
    "part-for-a-whole",
    lambda a: (
        answer(a.body, 206, **(a.headers() | {"content_range": f"bytes 0-{a.size - 1}/{a.size}"}))
        if not a.asks_part and a.size
        else None
    ),
    "ProtocolError",
    shapes=("plain", "client-plain"),
)
row(
    26,
    "half-for-a-whole",
    lambda a: (
        answer(a.body[: a.size // 2], 206, **(a.headers() | {"content_range": f"bytes 0-{a.size // 2 - 1}/{a.size}"}))
        if not a.asks_part and a.size > 1
        else None
    ),
    "ProtocolError",
    shapes=("plain", "client-plain"),
)
row(
    26,
    "204",
    status(204, content_length=None),
    ends("HttpError", "ProtocolError"),
    once=ends("HttpError", "ProtocolError", "bytes"),
    shapes=(*ENGINE, *CLIENT),
)
for _code in (201, 203, 205, 226, 300, 305, 418, 599):
    row(
        26,
        f"status-{_code}",
        lambda a, code=_code: a.reply(status=code, content_range=None) if a.length else None,
        ends("HttpError", "ProtocolError"),
        once=ends("HttpError", "ProtocolError", "bytes"),
    )

# -- 27–29: time

row(
    27,
    "body-drip",
    lambda a: [a.head(), *drip(a.body, 0.02)] if a.length else None,
    ends("StalledTransfer", "bytes"),
    waits=True,
)
row(27, "head-drip", lambda a: drip(a.reply(), 0.02), ends("Timeout", "DeadlineExceeded"), waits=True)
row(27, "chunk-extension-drip", coded(lambda a: b""), ends("ConnectionFailed", "ProtocolError"), waits=True)
row(
    27,
    "trailer-drip",
    lambda a: (
        [
            a.head(content_length=None, transfer_encoding="chunked") + chunks(a.body, end=b"0\r\n"),
            *drip(b"X-Trailer: 0\r\n" * 40, 0.02),
        ]
        if a.length
        else None
    ),
    ends("Timeout", "DeadlineExceeded", "bytes"),
    waits=True,
)
row(
    27,
    "flood-of-100",
    lambda a: _flood(b"HTTP/1.1 100 Continue\r\n\r\n"),
    ends("Timeout", "DeadlineExceeded", "ProtocolError"),
    waits=True,
)
row(
    27,
    "flood-of-103",
    lambda a: _flood(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
    ends("Timeout", "DeadlineExceeded", "ProtocolError"),
    waits=True,
)
row(
    27,
    "slow-but-not-a-drip",
    lambda a: _paced(a),
    ends("DeadlineExceeded", "StalledTransfer", "bytes"),
    once=ends("DeadlineExceeded", "bytes", "StalledTransfer"),
    waits=True,
    sizes=(CHUNK, 3 * CHUNK),
)


def _flood(piece: bytes) -> Iterator[bytes | float]:
    while True:
        yield piece
        yield 0.01


def _in_steps(data: bytes, step: int, every: float) -> Iterator[bytes | float]:
    for index in range(0, len(data), step):
        yield data[index : index + step]
        yield every


def _paced(asked: Asked) -> Iterator[bytes | float]:
    yield asked.head()
    yield from _in_steps(asked.body, 8, 0.04)


row(28, "stall", cut(HOLD), "StalledTransfer", waits=True)
row(28, "stall-before-the-head", lambda _: [HOLD], ends("Timeout"), waits=True, once=BYTES)
row(28, "stall-in-the-head", lambda a: [a.head()[:20], HOLD], "Timeout", waits=True)
row(
    28,
    "stall-before-the-last-chunk",
    lambda a: (
        [a.head(content_length=None, transfer_encoding="chunked") + chunks(a.body, end=b""), HOLD] if a.length else None
    ),
    ends("Timeout", "bytes"),
    waits=True,
)
row(29, "endless-500", lambda a: _endless(500), "HttpError", sizes=(0, 1, CHUNK))
row(29, "endless-404", lambda a: _endless(404), "NotFound", once=ends("NotFound"), sizes=(0, 1, CHUNK))
row(
    29,
    "endless-redirect",
    lambda a: _endless(302, location=f"/a/{a.case.key}") if not a.hits else None,
    sizes=(0, 1, CHUNK),
)
row(
    29,
    "dripped-500",
    lambda a: [answer(b"", 500, content_length=9999), *drip(b"x" * 400, 0.02)],
    "HttpError",
    waits=True,
    sizes=(1, CHUNK),
)


def _endless(code: int, **headers: object) -> Iterator[bytes]:
    yield answer(b"", code, content_length=None, transfer_encoding="chunked", **headers)
    yield from endless(chunks(b"x" * 16384, end=b""))


# -- 30–35: redirects, refusals, and trying again

row(30, "redirect-loop", lambda a: answer(b"", 302, location=f"/a/{a.case.key}"), "HttpError", shapes=ENGINE, most=40)
row(30, "one-redirect", lambda a: answer(b"", 302, location=f"/a/{a.case.key}") if not a.hits else None)
for _name, _where in {
    "file": "file:///etc/passwd",
    "ftp": "ftp://127.0.0.1/x",
    "data": "data:,hello",
    "no-url": "http://[::1",
    "javascript": "javascript:1",
    "control": "http://127.0.0.1\x7f/x",
}.items():
    row(
        30,
        f"redirect-to-{_name}",
        lambda _, where=_where: answer(b"", 302, location=where),
        "InvalidUrl",
        once=ends("InvalidUrl"),
    )
row(30, "redirect-without-location", status(302), "HttpError", once=ends("HttpError"))
row(
    30,
    "https-to-http",
    lambda a: answer(b"", 302, location=f"http://127.0.0.1:{a.other_port}/b/{a.case.key}"),
    "InvalidUrl",
    once=ends("InvalidUrl"),
    tls=True,
    sizes=(1, CHUNK),
)
row(31, "retry-after-negative", status(503, retry_after=-5), "RateLimited")
row(31, "retry-after-in-words", status(429, retry_after="soon"), "RateLimited")
row(31, "retry-after-a-past-date", status(503, retry_after="Sun, 06 Nov 1994 08:49:37 GMT"), "RateLimited")
row(
    31,
    "retry-after-a-far-date",
    status(503, retry_after="Sun, 06 Nov 2094 08:49:37 GMT"),
    "RateLimited",
    once=ends("RateLimited"),
    within=2.0,
)
row(31, "retry-after-a-broken-date", status(503, retry_after="Sun, 99 Foo 99999 99:99:99 GMT"), "RateLimited")
row(31, "retry-after-30-years", status(429, retry_after=10**9), "RateLimited", once=ends("RateLimited"), within=2.0)
row(
    31,
    "retry-after-beyond-numbers",
    status(503, retry_after="9" * 400),
    "RateLimited",
    once=ends("RateLimited", "bytes"),
    within=2.0,
)
row(31, "retry-after-30-years-then-the-next-endpoint", status(503, retry_after=10**9), mirrors=2, within=2.0)
row(32, "busy", status(503), "RateLimited", most=12)
row(32, "too-many", status(429), "RateLimited", most=12)
for _code in (400, 404, 410):
    row(
        33,
        f"status-{_code}",
        status(_code),
        "HttpError",
        once=ends("HttpError"),
        most=4,
        shapes=(*ENGINE, *CLIENT, "client-head"),
    )
    row(33, f"status-{_code}-then-the-next-endpoint", status(_code), mirrors=2)
row(
    33,
    "stale-credential",
    lambda a: answer(b"", 401) if a.request.headers.get("authorization", "").endswith("canary-bearer-1") else None,
    everywhere=True,
)
row(
    33,
    "expired-signature",
    lambda a: answer(b"", 302, location=f"http://127.0.0.1:{a.other_port}/{'a' if a.hits else 'expired'}/{a.case.key}"),
)
row(33, "forbidden-for-ever", status(403), "HttpError", once=ends("HttpError"), most=8)
row(
    34,
    "one-byte-then-cut",
    lambda a: [a.head() + a.body[:1], END] if a.length else None,
    ends("ConnectionFailed", "bytes"),
    most=12,
)
row(
    34,
    "one-byte-then-cut-of-a-part",
    lambda a: [a.head() + a.body[:1], END] if a.is_part else None,
    ends("ConnectionFailed", "bytes"),
    everywhere=True,
    most=12,
    shapes=PARTS,
    once=ends("ConnectionFailed", "bytes"),
)


def _one_byte(asked: Asked) -> Answer | None:
    place = f"bytes {asked.start}-{asked.start}/{asked.size}"
    return asked.reply(asked.body[:1], content_range=place) if asked.is_part and asked.length > 1 else None


row(
    34,
    "one-byte-at-a-time",
    _one_byte,
    "ProtocolError",
    once=ends("ProtocolError"),
    everywhere=True,
    sizes=(3 * CHUNK,),
    shapes=("client-ranged",),
    most=800,
)
row(29, "endless-500-in-a-hurry", lambda a: _endless(500), "HttpError", sizes=(1, CHUNK), waits=True, within=0.9)
row(
    29,
    "slow-500",
    lambda a: [answer(b"", 500, content_length=9999), *_in_steps(bytes(9999), 64, 0.04)],
    "HttpError",
    sizes=(1,),
    waits=True,
    within=1.7,
)
row(
    29,
    "endless-200",
    lambda a: _endless(200),
    "NetworkError",
    once=ends("NetworkError"),
    shapes=("client-plain",),
    sizes=(1,),
    waits=True,
    within=1.5,
)
row(
    31,
    "retry-after-beyond-the-deadline",
    status(503, retry_after=9),
    "RateLimited",
    once=ends("RateLimited"),
    waits=True,
    within=1.0,
)
row(31, "retry-after-is-kept", status(503, retry_after=1), "RateLimited", waits=True, apart=0.99, sizes=(1, CHUNK))


def _nothing(_: Asked) -> Answer | None:
    return None


row(
    35,
    "all-endpoints-refuse",
    _nothing,
    "ConnectionFailed",
    once=ends("ConnectionFailed"),
    mirrors=2,
    dead="refused",
    within=3.0,
)
row(
    35,
    "no-endpoint-has-an-address",
    _nothing,
    "ConnectionFailed",
    once=ends("ConnectionFailed"),
    mirrors=2,
    dead="nameless",
    within=3.0,
)
row(
    35, "all-endpoints-are-black-holes", _nothing, "Timeout", once=ends("Timeout"), mirrors=2, dead="silent", waits=True
)
row(35, "no-name-server-answers", _nothing, "Timeout", once=ends("Timeout"), mirrors=2, dead="unresolved", waits=True)
row(35, "the-first-endpoint-refuses", _nothing, mirrors=2, dead="first-refused")

# -- 39–44: secrets, tenants, heads of any size

row(
    39,
    "redirect-to-another-origin",
    lambda a: answer(b"", 302, location=f"http://127.0.0.1:{a.other_port}/a/{a.case.key}"),
)
row(
    39,
    "redirect-there-and-back",
    lambda a: answer(b"", 307, location=f"http://127.0.0.1:{a.other_port}/back/{a.case.key}"),
)
row(
    39,
    "redirect-to-another-name-of-ours",
    lambda a: answer(b"", 301, location=f"http://localhost:{a.other_port}/a/{a.case.key}"),
    sizes=(1, CHUNK),
)
row(
    42,
    "etag-of-10-KB",
    lambda a: a.reply(etag='"' + "e" * 10_000 + '"') if a.length else None,
    ends("bytes", "ObjectChanged"),
    once=ends("bytes", "ObjectChanged"),
)
row(
    42,
    "etag-that-climbs",
    lambda a: a.reply(etag='"../../../../evil"') if a.length else None,
    ends("bytes", "ObjectChanged"),
    once=ends("bytes", "ObjectChanged"),
)
row(
    42,
    "etag-without-quotes",
    lambda a: a.reply(etag="../../evil") if a.length else None,
    ends("bytes", "ObjectChanged"),
    once=ends("bytes", "ObjectChanged"),
)
row(43, "no-store", lambda a: a.reply(cache_control="no-store"), everywhere=True, uncached=True, sizes=SIZES[1:])
row(43, "vary-by-anything", lambda a: a.reply(vary="*"), everywhere=True)
row(44, "endless-head", lambda a: _endless_head(), ends("ProtocolError", "ConnectionFailed"))
row(
    44,
    "line-of-70-KB",
    lambda a: a.reply(extra=b"X-Long: " + b"x" * 70_000 + b"\r\n") if a.length else None,
    ends("ProtocolError", "ConnectionFailed"),
)
for _name, _reply in {
    "no-http": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "old-http": b"<html>hello</html>\r\n\r\n",
    "status-in-words": b"HTTP/1.1 OK\r\n\r\n",
    "status-of-0": b"HTTP/1.1 000 No\r\n\r\n",
    "status-of-4-digits": b"HTTP/1.1 2000 No\r\n\r\n",
    "nothing-but-zeros": bytes(300),
}.items():
    row(
        44,
        _name,
        lambda _, reply=_reply: [reply, END],
        ends("ProtocolError", "ConnectionFailed", "HttpError"),
        once=ends("bytes", "HttpError", "ProtocolError"),
    )


def _endless_head() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\n"
    yield from endless(b"X-More: x\r\n" * 50)


# -- what a network does below HTTP: the proxy bends whatever the origin says, head or body


def _delayed(said: bytes, at: int, asked: Asked) -> Answer:
    return [said[:at], 0.05, said[at:]]


def _swapped(said: bytes, at: int, asked: Asked) -> Answer:
    return [flipped(said, at), END]


def _corrupt_in(where: str) -> Bend:
    def bend(said: bytes, at: int, asked: Asked) -> Answer:
        border = said.index(b"\r\n\r\n")
        low, high = (0, border) if where == "head" else (border + 4, len(said))
        if low >= high:
            return said
        at = asked.random.randrange(low, high)
        return [said[:at] + struct.pack("B", said[at] ^ (1 << asked.random.randrange(8))) + said[at + 1 :], END]

    return bend


_ANY = ends("bytes", "NetworkError")
proxy_row(8, "proxy-cuts", lambda said, at, _: [said[:at], END], ends("ConnectionFailed", "ProtocolError", "bytes"))
proxy_row(8, "proxy-resets", lambda said, at, _: [said[:at], RESET], ends("ConnectionFailed", "ProtocolError", "bytes"))
proxy_row(
    13,
    "proxy-writes-into-the-head",
    lambda said, at, a: said.replace(b"\r\n", b"\r\n\x01garbage\r\n", 1),
    "ProtocolError",
)
proxy_row(16, "proxy-flips-a-bit-of-the-body", _corrupt_in("body"), ends("ChecksumMismatch", "bytes"), checksum=True)
proxy_row(16, "proxy-flips-a-bit-of-the-head", _corrupt_in("head"), _ANY, checksum=True, once=_ANY)
proxy_row(11, "proxy-adds-bytes", lambda said, at, _: said + b"more", "ProtocolError", sizes=SIZES[1:])
proxy_row(28, "proxy-delays", _delayed, waits=True)
proxy_row(27, "proxy-drips", lambda said, at, _: drip(said, 0.02), ends("Timeout", "DeadlineExceeded"), waits=True)
proxy_row(28, "proxy-stalls", lambda said, at, _: [said[:at], HOLD], ends("Timeout", "bytes"), waits=True)
proxy_row(35, "proxy-is-a-black-hole", lambda said, at, _: [HOLD], ends("Timeout"), waits=True)

TABLE.sort(key=lambda fault: fault.number)

BY_NAME = {fault.name: fault for fault in TABLE}
assert len(BY_NAME) == len(TABLE), "two rows of one name"
