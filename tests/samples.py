"""Models for tests: every dtype and shape that safetensors stores, written by safetensors itself; and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

Array = npt.NDArray[Any]

FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
KINDS: tuple[Any, ...] = (
    *("bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "c8", "f8", "i8", "u8", ml_dtypes.bfloat16),
    *(getattr(ml_dtypes, name) for name in FP8),
)
SHAPES = ((), (0,), (3, 0, 2), (7,), (5, 3), (2, 3, 4))


def every_kind(seed: int = 0) -> dict[str, Array]:
    """A tensor of random bits, NaNs and infinities among them, for each dtype and shape."""
    random = np.random.default_rng(seed)
    made = {}
    for kind in map(np.dtype, KINDS):
        for shape in SHAPES:
            size = int(np.prod(shape)) * kind.itemsize
            raw = random.integers(0, 2 if kind == np.bool_ else 256, size, np.uint8)
            made[f"{kind.name}.{'x'.join(map(str, shape)) or 'scalar'}"] = raw.view(kind).reshape(shape)
    return made


def llama(blocks: int = 3, side: int = 64) -> dict[str, Array]:
    """Tensors that are named like those of a small Llama, each full of other numbers."""
    random = np.random.default_rng(1)
    parts = ("input_layernorm", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{part}.weight" for block in range(blocks) for part in parts]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]
    return {name: random.standard_normal((side,) if "norm" in name else (side, side)).astype("f4") for name in names}


def write(file: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> Path:
    """Save tensors as safetensors does, for everyone to read: it makes files that only their owner may read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, metadata)
    file.chmod(0o644)
    return file


def write_index(folder: Path, tensors: Mapping[str, Array], shards: int = 3, **metadata: str) -> Path:
    """A sharded model; gives its index."""
    import json

    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = write(folder / f"model-{number + 1:05}-of-{shards:05}.safetensors", part, dict(metadata) or None)
        weight_map.update(dict.fromkeys(part, file.name))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def bits(array: Array) -> bytes:
    """What an array is in memory, so that NaNs compare like anything else."""
    return np.ascontiguousarray(array).tobytes()


def assert_equal(found: Array, expected: Array) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


def assert_same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """The same names, and for each the same dtype, shape and bits."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert_equal(found[name], expected[name])


def read(file: Path) -> dict[str, Array]:
    """What safetensors reads from a file; FP8, which it cannot give to NumPy, left out."""
    with safe_open(file, framework="np") as opened:
        kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {name: opened.get_tensor(name) for name, kind in kinds.items() if not kind.startswith("F8")}


# --- processes

CLI = (sys.executable, "-m", "holotensor_net")

# The command line, in a process whose files can be no longer than 100 kB.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from holotensor_net.interfaces.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def process(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process whose output is read; it does not outlive the block."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here, a child would ignore too
    try:
        child = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with child:
        try:
            yield child
        finally:
            child.kill()


def interrupted(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C; gives what else the process prints. Asserts that it ends within a second."""
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=5)
    assert time.monotonic() - began < 1.0
    return out, err


def run(*command: object, timeout: float = 30, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, with some variables more."""
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def eventually(is_true: Callable[[], object], what: str, timeout: float = 20) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.01)
