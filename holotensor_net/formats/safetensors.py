"""safetensors: a header of JSON, then the tensors one after another without a gap.

Stricter than the reference reader: whoever serves the bytes may be hostile, and is believed in nothing that can be
checked. Layout: u64 length of the header, the header, the data; all little-endian.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..errors import FormatError, redact_url
from .dtypes import DTYPES, bits_of
from .strict_json import excerpt, load_object
from .tensors import (
    MAX_TENSORS,
    BytesLike,
    FragmentInfo,
    ModelHeader,
    ReadRange,
    TensorInfo,
    checked_name,
    checked_shape,
)

__all__ = [
    "MAX_HEADER",
    "Index",
    "merge",
    "read_header",
    "read_index",
    "read_sharded_header",
    "shards_of",
    "slice_range",
]

MAX_HEADER = 100 << 20
FIRST_READ = 64 << 10  # holds the header of most files, so that one request is enough

_PREFIX = 8
_KEYS = {"dtype", "shape", "data_offsets"}
_BARE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\:?#%]{1,255}")

_TEXTS = (
    (rb"version https://git-lfs", "a Git LFS pointer: ask for the file itself, not for its place in the repository"),
    (rb"\s*<(!doctype html|html|head|body)", "HTML: is the URL the raw file?"),
    (rb"\s*<", "XML: is the URL the raw file, and may you read it?"),
    (rb"\s*[{\[]", "JSON: an index is opened as *.safetensors.index.json"),
    (rb"[\t\n\r\x20-\x7e]*\Z", "text: is the URL the raw file?"),
)
_BINARIES = (
    (rb"PK\x03\x04", "a zip archive, as PyTorch writes: convert it to safetensors"),
    (rb"\x80[\x02-\x05]", "a Python pickle: convert it to safetensors"),
    (rb"GGUF", "GGUF, which is not read: ask for the model as safetensors"),
    (rb"HTNS", "a HoloTensor container, which is not read: ask for the model as safetensors"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd", "a compressed file: serve it uncompressed"),
)

_Entry: TypeAlias = tuple[int, int, str, str, tuple[int, ...]]


def read_header(read_range: ReadRange, path: str, *, size: int | None = None) -> ModelHeader:
    """The tensors of one file, in the order of their bytes, one fragment each; ``size`` of the file in bytes, if known.

    One read, a second one if the header is longer than 64 KiB. Raises FormatError, which says what the file looks
    like if it is something else; the end of the data is checked if ``size`` is known or the first read reached it.
    """
    with _told_where(path):
        asked = FIRST_READ if size is None else min(FIRST_READ, size)
        head = bytes(read_range(path, 0, asked)) if asked else b""
        if len(head) < asked:
            if size is not None:
                raise FormatError(f"the file ends after {len(head)} of {size} bytes")
            size = len(head)
        length = _header_length(head, size)
        header = head[_PREFIX : _PREFIX + length]
        if len(header) < length:
            header = b"".join((header, read_range(path, len(head), _PREFIX + length)))
        if len(header) != length:
            raise FormatError(f"the file ends after {len(header)} of the {length} bytes of its header")
        return _header(header, path, size)


@contextmanager
def _told_where(path: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        if error.url is None:
            error.url = redact_url(path)
        raise


def _header_length(head: bytes, size: int | None) -> int:
    """Bytes of the header that ``head`` begins; whether it is one is decided before more of it is asked for."""
    length = int.from_bytes(head[:_PREFIX], "little")
    # The format demands the brace; the reference reader lets spaces pass.
    if not head.startswith(b"{", _PREFIX):
        raise FormatError(f"this is no safetensors file: {_likeness(head)}")
    if length > MAX_HEADER:
        raise FormatError(f"the header claims {length} bytes, {MAX_HEADER} at most are read")
    if size is not None and _PREFIX + length > size:
        raise FormatError(f"the header takes {length} bytes and the file has {size}: it is cut short")
    return length


def _likeness(head: bytes) -> str:
    """What else the file could be, as half a sentence."""
    if not head:
        return "it is empty"
    start = head[:512].removeprefix(b"\xef\xbb\xbf")
    # A length of 60 begins with "<", and goes on with zeros.
    for pattern, name in _BINARIES if b"\0" in head[:_PREFIX] else _BINARIES + _TEXTS:
        if re.match(pattern, start, re.IGNORECASE):
            return f"this looks like {name}"
    return f"it begins with {excerpt(head[:12])}"


def _header(header: bytes, path: str, size: int | None) -> ModelHeader:
    """The table of tensors, each with the absolute range of its bytes."""
    table = load_object(header, limit=MAX_HEADER, what="safetensors header")
    metadata = _metadata(table.pop("__metadata__", None))
    if len(table) > MAX_TENSORS:
        raise FormatError(f"the file has {len(table)} tensors, {MAX_TENSORS} at most are read")
    base = _PREFIX + len(header)
    tensors = {}
    end = 0
    # Sorted because the order in the header is free: early writers went by name, or by nothing. Popped so that a large
    # table is not held twice.
    for start, stop, name, dtype, shape in sorted(_entry(name, table.pop(name)) for name in list(table)):
        if start != end:
            flaw = "leaves a hole before it" if start > end else "overlaps another"
            raise FormatError(f"tensor {excerpt(name)} {flaw}: it begins at {start}, the one before ends at {end}")
        tensors[name] = TensorInfo(name, dtype, shape, fragments=(FragmentInfo(path, base + start, base + stop),))
        end = stop
    if size is not None and base + end != size:
        flaw = "is cut short" if size < base + end else "has bytes that belong to no tensor"
        raise FormatError(f"the file {flaw}: its header describes {base + end} bytes, it has {size}")
    return ModelHeader(tensors, metadata, (path,))


def _metadata(found: object) -> dict[str, str]:
    if found is None:  # MLX writes null when it has nothing to say
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"__metadata__ must map strings to strings, not {excerpt(found)}")
    return found


def _entry(name: str, value: Any) -> _Entry:
    """One row of the table, checked by itself: offsets from the start of the data, name, dtype, shape."""
    checked_name(name)
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise FormatError(f"tensor {excerpt(name)} must have dtype, shape and data_offsets only, not {excerpt(value)}")
    dtype, offsets = value["dtype"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"tensor {excerpt(name)} has the unknown dtype {excerpt(dtype)}")
    shape = checked_shape(name, value["shape"])
    # bool and float would pass for int in comparisons
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise FormatError(f"tensor {excerpt(name)}: data_offsets must be two whole numbers, not {excerpt(offsets)}")
    start, stop = offsets
    bits = bits_of(dtype)
    for side in shape:
        bits *= side
    if start < 0 or (stop - start) * 8 != bits:
        raise FormatError(
            f"tensor {excerpt(name)}: {dtype} of shape {excerpt(shape)} takes {bits / 8:.15g} bytes,"
            f" not those from {start} to {stop}"
        )
    return start, stop, name, sys.intern(dtype), shape


@dataclass(frozen=True, slots=True)
class Index:
    """A sharded model's table of contents: the path of the shard that holds each tensor."""

    path: str
    weight_map: Mapping[str, str] = field(repr=False)


def read_index(data: BytesLike, path: str) -> Index:
    """The index in ``data``, all of ``*.safetensors.index.json``; shards are looked for in the folder of ``path``.

    Raises FormatError, also for a shard that is anything but a bare file name.
    """
    with _told_where(path):
        weight_map = load_object(data, limit=MAX_HEADER, what="index").get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError("an index must have a weight_map, from the name of a tensor to the name of its file")
        if len(weight_map) > MAX_TENSORS:
            raise FormatError(f"the index names {len(weight_map)} tensors, {MAX_TENSORS} at most are read")
        folder = path[: path.partition("?")[0].rfind("/") + 1]
        shards: dict[str, str] = {}
        for name, shard in weight_map.items():
            checked_name(name)
            if not isinstance(shard, str):
                raise FormatError(f"tensor {excerpt(name)} must be in a file, not in {excerpt(shard)}")
            if shard not in shards:
                shards[shard] = folder + _bare(shard)
        return Index(path, {name: shards[shard] for name, shard in weight_map.items()})


def _bare(name: str) -> str:
    if not _BARE_NAME.fullmatch(name) or ".." in name or name == ".":
        raise FormatError(f"the shard {excerpt(name)} must be a bare file name, beside the index")
    return name


def shards_of(index: Index) -> tuple[str, ...]:
    """The paths of all shards, each once, in order of name."""
    return tuple(sorted(set(index.weight_map.values())))


def merge(index: Index, headers: Mapping[str, ModelHeader]) -> ModelHeader:
    """One header of many: ``headers`` by the path of the shard, all of ``shards_of(index)``.

    The index decides: a tensor that a shard has and the index does not place there is ignored. Where shards differ in
    metadata, the first that names a key wins. Raises FormatError if a shard lacks a tensor that the index places there.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    with _told_where(index.path):
        shards = shards_of(index)
        for shard in shards:
            if shard not in headers:
                raise FormatError(f"the header of the shard {excerpt(shard)} is missing")
            found = headers[shard]
            tensors.update((n, info) for n, info in found.tensors.items() if index.weight_map.get(n) == shard)
            metadata = {**found.metadata, **metadata}
        for name, shard in index.weight_map.items():
            if name not in tensors:
                raise FormatError(f"tensor {excerpt(name)} is not in {excerpt(shard)}, where the index places it")
    return ModelHeader(tensors, metadata, shards)


def read_sharded_header(
    read_range: ReadRange, index_path: str, *, sizes: Mapping[str, int] | None = None
) -> ModelHeader:
    """The tensors of a sharded model, shard after shard; ``sizes`` in bytes by path, as far as they are known.

    Whoever wants to read the shards at once calls ``read_index``, ``shards_of``, ``read_header`` and ``merge``.
    """
    sizes = sizes or {}
    index = read_index(_read_all(read_range, index_path), index_path)
    return merge(index, {path: read_header(read_range, path, size=sizes.get(path)) for path in shards_of(index)})


def _read_all(read_range: ReadRange, path: str) -> bytes:
    """The whole object, in few reads though its size is not known; a byte more than is allowed, if it is longer."""
    data = bytearray()
    step = FIRST_READ
    while len(data) <= MAX_HEADER:
        stop = min(len(data) + step, MAX_HEADER + 1)
        data += read_range(path, len(data), stop)
        if len(data) < stop:
            break
        step *= 16
    return bytes(data)


def slice_range(info: TensorInfo, index: Any) -> TensorInfo | None:
    """The part of a tensor that ``index`` selects, as a tensor of its own whose bytes are one range; None if they are
    not, or if the index is more than whole numbers, slices of step 1 and an Ellipsis: take the whole tensor, then.

    Follows NumPy, numbers beyond an end included: IndexError for an int, an empty or shorter part for a slice.
    A fragment with a checksum counts as a whole, since a part of it could not be verified.
    """
    picks = _picks(index, info.shape)
    if picks is None or info.encoding != "raw" or len(info.fragments) != 1:
        return None
    span, whole = _contiguous(picks, info.shape), info.fragments[0]
    if span is None or whole.checksum is not None or whole.length != info.nbytes:
        return None
    start, stop = (elements * bits_of(info.dtype) for elements in span)
    if start % 8 or stop % 8:
        return None
    shape = tuple(count for _, count, kept in picks if kept)
    part = FragmentInfo(whole.file, whole.start + start // 8, whole.start + stop // 8)
    return replace(info, shape=shape, fragments=(part,))


_Pick: TypeAlias = tuple[int, int, bool]
"""Of one axis: the first element taken, how many, and whether the axis remains."""


def _picks(index: Any, shape: tuple[int, ...]) -> list[_Pick] | None:
    """What a basic index takes of each axis; None for one that is not basic. Raises IndexError as NumPy does."""
    keys = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_basic, keys)):
        return None
    dots = [place for place, key in enumerate(keys) if key is ...]
    if len(dots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    named = len(keys) - len(dots)
    if named > len(shape):
        raise IndexError(f"too many indices: the tensor is {len(shape)}-dimensional, but {named} were indexed")
    at = dots[0] if dots else len(keys)
    filled = (*keys[:at], *[slice(None)] * (len(shape) - named), *keys[at + 1 :])
    return [_pick(key, axis, side) for axis, (key, side) in enumerate(zip(filled, shape, strict=True))]


def _is_basic(key: Any) -> bool:
    if isinstance(key, slice):
        return key.step is None or key.step == 1
    if key is ...:
        return True
    try:
        operator.index(key)
    except TypeError:
        return False
    return not isinstance(key, bool)  # to NumPy, True is a mask


def _pick(key: Any, axis: int, side: int) -> _Pick:
    if isinstance(key, slice):
        start, stop, _ = key.indices(side)
        return start, max(0, stop - start), True
    place = operator.index(key)
    if not -side <= place < side:
        raise IndexError(f"index {place} is out of bounds for axis {axis} with size {side}")
    return place % side, 1, False


def _contiguous(picks: list[_Pick], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The elements ``[start, stop)`` that are taken, if they lie side by side; none always do."""
    if any(count == 0 for _, count, _ in picks):
        return 0, 0
    start, taken, stride, partial = 0, 1, 1, False
    for (first, count, _), side in zip(reversed(picks), reversed(shape), strict=True):
        if partial and count > 1:  # several of an axis, of which an inner one is not taken whole
            return None
        partial = partial or count < side
        start += first * stride
        taken *= count
        stride *= side
    return start, start + taken
