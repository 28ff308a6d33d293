"""The demonstration: a model behind a slow link, loaded plainly, streamed, and streamed again from the cache."""

from __future__ import annotations

import errno
import http.client
import shutil
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from ..config import NetworkConfig
from ..errors import ConnectionFailed, FormatError, InsufficientDisk, redact_url
from ..model.importance import rank_names
from ..model.remote import open_model
from ..model.sample import compare, write_model
from ..model.sources import endpoint_of
from ..origin import Behaviour, OriginProcess
from ..values import Priority
from .progress import progress

if TYPE_CHECKING:
    import numpy.typing as npt

    Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

__all__ = ["DemoResult", "RunResult", "run", "write_model"]

RATE = 400e6 / 8
LATENCY = 0.02


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run, its times counted from before the model was opened. ``critical_fetched_bytes``: all that had come over
    the network by the time the last CRITICAL tensor was there."""

    first_seconds: float
    critical_seconds: float
    seconds: float
    fetched_bytes: int
    critical_fetched_bytes: int
    requests: int


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What was measured. Times in seconds, sizes in bytes; ``checked`` tensors equal ``safe_open``'s bit for bit;
    ``url`` is redacted."""

    url: str
    tensors: int
    bytes: int
    critical_bytes: int
    plain_seconds: float
    first: RunResult
    second: RunResult
    checked: int


def run(url: str | None = None, *, show_progress: bool = True, **size: int) -> DemoResult:
    """Load the model at ``url``, or one made for the purpose behind 400 Mbit/s and 20 ms; ``size``: the arguments of
    ``write_model``. Raises NetworkError."""
    folder = Path(tempfile.mkdtemp(prefix="holotensor-demo-"))
    try:
        if url is not None:
            return _measure(url, folder, None, show_progress)
        files = folder / "model"
        write_model(files, **size)
        with OriginProcess(files, behaviour=Behaviour(rate=RATE, latency=LATENCY)) as origin:
            return _measure(f"{origin.url}/model.safetensors.index.json", folder, files, show_progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(url: str, folder: Path, originals: Path | None, show: bool) -> DemoResult:
    own, _ = endpoint_of(url, NetworkConfig(cache_dir=False))
    with open_model(url, config=NetworkConfig(cache_dir=False)) as model:
        sizes = {name: model.info(name).nbytes for name in model}
        paths = sorted({fragment.file for name in model for fragment in model.info(name).fragments})
    began = time.monotonic()
    files = _download_plainly([own.endpoints[0].url_of(path) for path in paths], folder / "plain")
    plain_seconds = time.monotonic() - began
    config = NetworkConfig(cache_dir=folder / "cache")
    arrays, first = _stream(url, config, "first run", show)
    again, second = _stream(url, config, "second run", show)
    checked = compare([originals / file.name for file in files] if originals else files, arrays, again)
    ranks = rank_names(sizes)
    critical = sum(size for name, size in sizes.items() if ranks[name].priority == Priority.CRITICAL)
    return DemoResult(redact_url(url), len(sizes), sum(sizes.values()), critical, plain_seconds, first, second, checked)


def _stream(url: str, config: NetworkConfig, label: str, show: bool) -> tuple[Arrays, RunResult]:
    began = time.monotonic()
    with open_model(url, config=config) as model:
        opened = time.monotonic() - began
        with progress(label, model.nbytes, model.source.stats, enabled=show):
            arrays = dict(model.stream())
        report, stats = model.report(), model.source.stats()
    if report is None or report.seconds is None:
        raise FormatError("the model has no tensors", url=url)
    return arrays, RunResult(
        first_seconds=opened + (report.first_seconds or 0.0),
        critical_seconds=opened + (report.critical_seconds or 0.0),
        seconds=opened + report.seconds,
        fetched_bytes=stats.bytes_fetched,
        critical_fetched_bytes=report.critical_fetched_bytes or 0,
        requests=stats.requests,
    )


def _download_plainly(urls: list[str], folder: Path) -> list[Path]:
    """One connection, one file after the other, with the standard library: what the other runs are measured against."""
    folder.mkdir()
    files = [folder / urlsplit(url).path.rpartition("/")[2] for url in urls]
    for url, target in zip(urls, files, strict=True):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(target, "wb") as file:  # noqa: S310 (checked)
                shutil.copyfileobj(answer, file, 1 << 20)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise InsufficientDisk(f"no room in {folder}: free some space, or set TMPDIR") from error
            raise ConnectionFailed(
                f"the plain download failed ({error}), so there is nothing to compare with", url=url
            ) from error
    return files
