"""An origin that refuses whatever it is asked, and what a crowd of transfers asks of it all the same."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from wire import Request, Script, Wire, answer

from holotensor_net.config import CdnEndpoint, NetworkConfig, RetryConfig
from holotensor_net.engine.loader import NetworkLoader
from holotensor_net.errors import NetworkError, RateLimited, RetriesExhausted
from holotensor_net.values import LoadRequest

CAP = 4
"""Connections that a loader may have."""

RESERVE = 32
"""Requests beyond a tenth of the transfers that a host which refuses them all may be asked."""


class Busy(Wire):
    """Answers 503 to everything. ``times``: when requests came; ``most``: how many it had at once, at most."""

    def __init__(self, **headers: object) -> None:
        self.times: list[float] = []
        self.most = 0
        self._at_once = 0
        self._refusal = answer(b"busy", 503, **headers)
        super().__init__()

    def _answer_to(self, request: Request) -> Script:
        with self._changed:
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most = max(self.most, self._at_once)
        self._closed.wait(0.002)
        with self._changed:  # before the answer is sent: whoever has it may ask again
            self._at_once -= 1
        return self._refusal


def _config(origin: Busy, folder: Path, *, deadline: float, cap: int = CAP) -> NetworkConfig:
    return NetworkConfig(
        endpoints=(CdnEndpoint(origin.url, proxies={}, max_connections=cap),),
        retry=RetryConfig(max_retries=3, initial_backoff=0.001, max_backoff=0.004, deadline=deadline),
        cache_dir=folder,
    )


def _loads(loaders: Sequence[NetworkLoader], count: int) -> list[NetworkError | None]:
    """How so many transfers end, in turn by each loader."""
    turns = itertools.cycle(loaders)
    futures = [next(turns).enqueue(LoadRequest(str(number), f"{number}.bin")) for number in range(count)]
    return [future.result(60).error for future in futures]


def _is_refusal(error: NetworkError | None) -> bool:
    return isinstance(error.last_error if isinstance(error, RetriesExhausted) else error, RateLimited)


def refused(transfers: int, folder: Path) -> list[str]:
    """What is wrong with how two loaders meet an origin that refuses everything."""
    wrongs = []
    with (
        Busy() as origin,
        NetworkLoader(_config(origin, folder / "a", deadline=50.0)) as one,
        NetworkLoader(_config(origin, folder / "b", deadline=50.0)) as other,
    ):
        errors = _loads([one, other], transfers)
    if not all(map(_is_refusal, errors)):
        wrongs.append(f"not every transfer was refused: {set(map(repr, errors))}")
    if len(origin.times) > 1.1 * transfers + RESERVE:
        wrongs.append(f"{len(origin.times)} requests for {transfers} transfers")
    if origin.most > 2 * CAP:
        wrongs.append(f"{origin.most} requests at once, where {2 * CAP} are allowed")
    return wrongs


def silenced(transfers: int, folder: Path) -> list[str]:
    """What is wrong with how a crowd that cannot wait keeps the silence that an origin asked one of it for."""
    with (
        Busy(retry_after=60) as origin,
        NetworkLoader(_config(origin, folder / "a", deadline=30.0)) as one,
        NetworkLoader(_config(origin, folder / "b", deadline=30.0)) as other,
    ):
        errors = _loads([one], 1)
        errors += _loads([one, other], transfers)
    wrongs = [] if all(map(_is_refusal, errors)) else [f"not every transfer was refused: {set(map(repr, errors))}"]
    if len(origin.times) > 1:
        wrongs.append(f"{len(origin.times)} requests, {len(origin.times) - 1} of them in a silence")
    return wrongs


def outwaited(transfers: int, folder: Path) -> list[str]:
    """The same of a few that wait. They ask one after the other, so that none may ask within a second of the one
    before it."""
    with Busy(retry_after=1) as origin, NetworkLoader(_config(origin, folder, deadline=50.0, cap=1)) as loader:
        errors = _loads([loader], max(1, transfers // 500))
    wrongs = [] if all(map(_is_refusal, errors)) else [f"not every transfer was refused: {set(map(repr, errors))}"]
    gaps = [after - before for before, after in itertools.pairwise(origin.times)]
    if not gaps or min(gaps) < 1.0:
        wrongs.append(f"{len(origin.times)} requests, {min(gaps, default=0):.3f} s apart at least")
    return wrongs


SCENES = {"32-refused": refused, "32-silenced": silenced, "32-outwaited": outwaited}
"""Names, as of rows → what a crowd of transfers meets."""
