"""A model to try things with, and the comparison with what the ``safetensors`` library reads from the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ConfigurationError, FormatError, InsufficientDisk, NetworkError

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

__all__ = ["compare", "write_model"]

_HIDDEN, _VOCABULARY, _FEED_FORWARD, _BLOCKS, _KEYS = 1024, 16_000, 2816, 8, 256
_SHARDS = 3


def write_model(folder: Path, *, blocks: int = _BLOCKS, hidden: int = _HIDDEN, vocabulary: int = _VOCABULARY) -> None:
    """A Llama-shaped BF16 model of random weights, in three safetensors shards and their index; about 250 MB as it
    stands.

    Raises InsufficientDisk; ConfigurationError where NumPy, ml_dtypes or safetensors is missing.
    """
    try:
        import ml_dtypes
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ConfigurationError(
            "writing a model needs NumPy, ml_dtypes and safetensors: pip install holotensor-net[tensors]"
        ) from error
    random = np.random.default_rng(0)
    shapes = _shapes(blocks, hidden, vocabulary)
    tensors = {
        name: (random.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    total = sum(array.nbytes for array in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, npt.NDArray[Any]] = {}
    number = filled = 0
    for position, (name, array) in enumerate(tensors.items(), start=1):
        shard[name] = array
        filled += array.nbytes
        if filled >= total * (number + 1) / _SHARDS or position == len(tensors):
            number += 1
            file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                raise InsufficientDisk(f"cannot write to {folder} ({error}): free some space there") from error
            weight_map.update(dict.fromkeys(shard, file))
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shapes(blocks: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    feed_forward, keys = hidden * _FEED_FORWARD // _HIDDEN, hidden * _KEYS // _HIDDEN
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (keys, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (keys, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (feed_forward, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (feed_forward, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, feed_forward)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def compare(files: Sequence[Path], *runs: Arrays) -> int:
    """How many tensors were compared with what ``safetensors`` reads, bit for bit, in every run.

    Raises NetworkError at a difference, FormatError for a file that ``safetensors`` refuses, ConfigurationError where
    it is missing.
    """
    import numpy as np

    checked = 0
    for file in files:
        for name, expected in _originals(file):
            found = [arrays[name] for arrays in runs if name in arrays]
            for array in found:
                same = array.shape == expected.shape and expected.dtype in (array.dtype, np.uint8)
                if not same or not np.array_equal(_bits(array), _bits(expected)):
                    raise NetworkError(f"tensor {name!r} differs from the file's: please report this")
            checked += len(found)
    return checked // len(runs)


def _originals(file: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors of a file as ``safetensors`` reads them; those that it cannot give to NumPy (FP8) as bytes."""
    import numpy as np

    try:
        from safetensors import SafetensorError, deserialize, safe_open
    except ImportError as error:
        raise ConfigurationError("comparing needs safetensors: pip install holotensor-net[tensors]") from error
    try:
        with safe_open(file, framework="np") as local:
            for name in local.keys():  # noqa: SIM118 (a safe_open is no mapping)
                try:
                    yield name, local.get_tensor(name)
                except (AttributeError, TypeError):
                    read: Any = deserialize  # which has no types in some versions
                    stored = dict(read(file.read_bytes()))[name]
                    yield name, np.frombuffer(stored["data"], np.uint8).reshape(stored["shape"])
    except SafetensorError as error:
        raise FormatError(f"safetensors cannot read {file.name}: {error}") from error


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The bytes of an array, so that NaNs compare like anything else."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
