"""One side of a benchmark, in a process of its own: ``python -m benchmarks._side NAME``; see ``_sides``.

Every side can do some of these jobs:

* ``whole``: an object (``path`` below ``url``, ``size`` bytes) into memory, or into the file ``to``; over TLS, if the
  certificates to ``trust`` are named;
* ``ranges``: many ranges of an object into memory;
* ``urgent``: a mebibyte of an object, ``times`` times, while ``bulk`` bytes of it are fetched as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import resource
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from ._origin import HUB, MIB, is_object

PIECE = 4 * MIB


class Absentee(Exception):
    """What the side needs is not installed."""


def needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absentee(name) from error


def command(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Absentee(name)
    return found


class Ours:
    """This library: a loader without a disk for what goes to memory, and with one for what goes to a file."""

    def __init__(self) -> None:
        import holotensor_net

        self.net = holotensor_net

    def loader(self, url: str, to: str | None = None, trust: str | None = None, **more: Any) -> Any:
        most = more.pop("max_connections", 128)
        config = self.net.NetworkConfig(
            endpoints=(self.net.CdnEndpoint(url, max_connections=most, verify=trust or True),),
            cache_dir=False if to is None else to,
            max_concurrent=more.pop("max_concurrent", 128),
            memory_budget=8 << 30,
            **more,
        )
        return self.net.NetworkLoader(config)

    def whole(
        self,
        url: str,
        path: str,
        size: int,
        to: str | None = None,
        watch: bool = False,
        checksum: str | None = None,
        anew: bool = False,
        **more: Any,
    ) -> Any:
        with self.first() if anew else contextlib.nullcontext(), self.loader(url, to, **more) as loader:
            future = loader.enqueue(self.net.LoadRequest(path, path, expected_size=size, checksum=checksum))
            seen = list(watched(loader, future)) if watch else []
            data = future.result().data
            stats = loader.stats()
            told = {"requests": stats.requests, "retries": stats.retries, "limit": stats.limit, "seen": seen}
            return data, told

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Be as in the first loader of a process, which knows nothing of any path; others go on with what they know."""
        paths = importlib.import_module("holotensor_net.engine.paths").PATHS
        known = dict(paths._known)
        paths.forget()
        try:
            yield
        finally:
            paths._known = known

    def urgent(self, url: str, path: str, bulk: int, times: int, every: float) -> Any:
        """An urgent mebibyte, again and again, alone and beside a bulk of low priority."""
        low, critical = self.net.Priority.LOW, self.net.Priority.CRITICAL
        with self.loader(url) as loader:

            def once(number: int) -> float:
                start = (number % max(1, bulk // MIB - 1)) * MIB
                # each of another byte's length, so that none is the same as one that is cached or under way
                wanted = (start, start + MIB - number // max(1, bulk // MIB - 1))
                request = self.net.LoadRequest(f"u{number}", path, byte_range=wanted, priority=critical)
                began = time.perf_counter()
                if not loader.load(request).is_success:
                    raise RuntimeError("the urgent fragment failed")
                return time.perf_counter() - began

            idle = [once(number) for number in range(max(2, times // 10))]
            future = loader.enqueue(self.net.LoadRequest("bulk", path, expected_size=bulk, priority=low))
            time.sleep(min(3.0, 10 * every))
            began, before = time.perf_counter(), loader.stats().bytes_fetched
            busy = []
            for number in range(len(idle), len(idle) + times):
                busy.append(once(number))
                time.sleep(every)
                if future.done():
                    break
            rate = (loader.stats().bytes_fetched - before) / (time.perf_counter() - began)
            future.cancel()
            return None, {"idle": idle, "busy": busy, "rate": rate}

    def ranges(self, url: str, path: str, starts: Sequence[int], length: int, **more: Any) -> Any:
        with self.loader(url, **more) as loader:
            requests = [self.net.LoadRequest(f"{start}", path, byte_range=(start, start + length)) for start in starts]
            futures = loader.enqueue_many(requests)
            data = [future.result().data for future in futures]
            stats = loader.stats()
            return data, {"requests": stats.requests, "over-read": stats.bytes_fetched - length * len(starts)}


def watched(loader: Any, future: Any) -> Iterator[tuple[float, int, int]]:
    """Seconds, bytes that have come, and connections in use, every fifth of a second until the future is done."""
    began = time.perf_counter()
    while not future.done():
        stats = loader.stats()
        yield time.perf_counter() - began, stats.bytes_fetched, stats.connections
        wait([future], 0.2)


def beside_bulk(
    urgent: Callable[[int], object], piece: Callable[[int], object], bulk: int, times: int, every: float
) -> Any:
    """What an urgent mebibyte takes of a peer, alone and while threads of its own fetch the bulk in pieces."""

    def once(number: int) -> float:
        began = time.perf_counter()
        urgent(number % max(1, bulk // MIB - 1) * MIB)
        return time.perf_counter() - began

    idle = [once(number) for number in range(max(2, times // 10))]
    starts, came, over = iter(itertools.cycle(range(0, bulk, PIECE))), [0], threading.Event()

    def fetch() -> None:
        while not over.is_set():
            start = next(starts)
            piece(start)
            came[0] += min(PIECE, bulk - start)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(min(3.0, 10 * every))
    began, before, busy = time.perf_counter(), came[0], []
    for number in range(times):
        busy.append(once(number))
        time.sleep(every)
    rate = (came[0] - before + times * MIB) / (time.perf_counter() - began)
    over.set()
    for thread in threads:
        thread.join()
    return None, {"idle": idle, "busy": busy, "rate": rate}


class Requests:
    """requests, as everyone writes it."""

    def __init__(self) -> None:
        self.session = needed("requests").Session()
        self.session.trust_env = False

    def whole(self, url: str, path: str, size: int, to: str | None = None, trust: str | None = None) -> Any:
        with self.session.get(f"{url}/{path}", stream=to is not None, verify=trust or True) as answer:
            if to is None:
                return answer.content
            with open(to, "wb") as file:
                for block in answer.iter_content(MIB):
                    file.write(block)
        return None


class Obstore:
    def __init__(self) -> None:
        self.obstore = needed("obstore")
        self.http = needed("obstore.store").HTTPStore

    def store(self, url: str, trust: str | None = None) -> Any:
        trusts = {"allow_http": True} if trust is None else {"allow_invalid_certificates": True}  # it takes no others
        return self.http.from_url(url, client_options={**trusts, "timeout": "600s"})

    def whole(self, url: str, path: str, size: int, to: str | None = None, trust: str | None = None) -> Any:
        answer = self.obstore.get(self.store(url, trust), path)
        if to is None:
            return memoryview(answer.bytes())
        with open(to, "wb") as file:
            for block in answer.stream(4 * MIB):
                file.write(block)
        return None

    def ranges(self, url: str, path: str, starts: Sequence[int], length: int) -> Any:
        lengths = [length] * len(starts)
        return [memoryview(b) for b in self.obstore.get_ranges(self.store(url), path, starts=starts, lengths=lengths)]

    def urgent(self, url: str, path: str, bulk: int, times: int, every: float) -> Any:
        store = self.store(url)
        get = self.obstore.get_range
        return beside_bulk(
            lambda start: get(store, path, start=start, length=MIB),
            lambda start: get(store, path, start=start, length=min(PIECE, bulk - start)),
            bulk,
            times,
            every,
        )


class HfTransfer:
    """To a file only. Its files are opened and written in pieces, by as many threads as it is told."""

    def __init__(self) -> None:
        self.module = needed("hf_transfer")

    def whole(self, url: str, path: str, size: int, to: str) -> None:
        self.module.download(f"{url}/{path}", to, 64, 10 * MIB, 3, 5)


class HuggingfaceHub:
    """To a file only: ``hf_hub_download``, with everything else that it does."""

    def __init__(self) -> None:
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
        self.module = needed("huggingface_hub")

    def whole(self, url: str, path: str, size: int, to: str) -> None:
        endpoint = f"{url}/{HUB.partition('/')[0]}"
        self.module.hf_hub_download("owner/model", path, endpoint=endpoint, local_dir=f"{to}.hub", token=False)


class Fsspec:
    def __init__(self) -> None:
        needed("aiohttp")
        self.fs = needed("fsspec").filesystem("http", skip_instance_cache=True)

    def whole(self, url: str, path: str, size: int, to: str | None = None, trust: str | None = None) -> Any:
        address = f"{url}/{path}"
        if trust is not None:
            self.fs.kwargs["ssl"] = ssl.create_default_context(cafile=trust)
        if to is not None:
            self.fs.get_file(address, to)
            return None
        starts = range(0, size, PIECE)
        parts = self.fs.cat_ranges([address] * len(starts), list(starts), [min(size, s + PIECE) for s in starts])
        assert sum(map(len, parts)) == size
        return parts[0]

    def ranges(self, url: str, path: str, starts: Sequence[int], length: int) -> Any:
        address = f"{url}/{path}"
        return self.fs.cat_ranges([address] * len(starts), list(starts), [s + length for s in starts])

    def urgent(self, url: str, path: str, bulk: int, times: int, every: float) -> Any:
        address = f"{url}/{path}"
        get = self.fs.cat_file
        return beside_bulk(
            lambda start: get(address, start=start, end=start + MIB),
            lambda start: get(address, start=start, end=min(bulk, start + PIECE)),
            bulk,
            times,
            every,
        )


class Pypdl:
    """To a file only."""

    def __init__(self) -> None:
        self.one = needed("pypdl").Pypdl(allow_reuse=True)

    def whole(self, url: str, path: str, size: int, to: str) -> None:
        self.one.start(url=f"{url}/{path}", file_path=to, segments=16, display=False, overwrite=True)

    def close(self) -> None:
        self.one.shutdown()


class Aria2c:
    """To a file only, with the most connections that it takes."""

    def __init__(self) -> None:
        self.path = command("aria2c")

    def whole(self, url: str, path: str, size: int, to: str) -> None:
        folder, name = os.path.split(to)
        many = ["-x16", "-s16", "-k1M", "--file-allocation=none", "--allow-overwrite=true", "--no-conf", "-q"]
        subprocess.run([self.path, *many, "-d", folder, "-o", name, f"{url}/{path}"], check=True)


class Curl:
    """Into a file, or into nowhere where others fill memory."""

    def __init__(self) -> None:
        self.path = command("curl")

    def whole(self, url: str, path: str, size: int, to: str | None = None, trust: str | None = None) -> None:
        trusts = [] if trust is None else ["--cacert", trust]
        plain = [self.path, "-sf", "--noproxy", "*", *trusts, "-o", to or os.devnull]
        subprocess.run([*plain, f"{url}/{path}"], check=True)


SIDES: dict[str, Callable[..., Any]] = {
    "ours": Ours,
    "requests": Requests,
    "obstore": Obstore,
    "hf_transfer": HfTransfer,
    "huggingface_hub": HuggingfaceHub,
    "fsspec": Fsspec,
    "pypdl": Pypdl,
    "aria2c": Aria2c,
    "curl": Curl,
}


@contextlib.contextmanager
def emptied(to: str | None) -> Iterator[None]:
    """Nothing where the bytes will go, before and after."""
    yield
    if to is not None:
        for leftover in Path(to).parent.glob(Path(to).name + "*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


class Peak:
    """The most memory that this process or a child of it held: in all, and without pages of mapped files."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # begin anew with the high-water mark
        self._before, self._anonymous_before = self._figure("VmRSS"), self._figure("RssAnon")
        self._anonymous = self._anonymous_before
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._anonymous = max(self._anonymous, self._figure("RssAnon") + self._figure("RssShmem"))

    def end(self) -> tuple[int, int]:
        self._over.set()
        self._watcher.join()
        child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        whole = max(child, self._figure("VmHWM") - self._before)
        return whole, max(child, self._anonymous - self._anonymous_before)

    @staticmethod
    def _figure(name: str) -> int:
        with contextlib.suppress(OSError), open("/proc/self/status") as told:
            for line in told:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
        return 0


def done(side: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked, and give what it took. Memory is given back before the next turn."""
    work = getattr(side, order.pop("job"))
    gc.collect()
    with emptied(order.get("to")):
        peak, cpu, began = Peak(), _cpu(), time.perf_counter()
        result = work(**order)
        seconds = time.perf_counter() - began
        cpu = _cpu() - cpu
        whole, anonymous = peak.end()
        data, told = result if isinstance(result, tuple) else (result, {})
        if order.get("to") is None and data is not None and "size" in order and not is_object(memoryview(data)):
            raise ValueError("the bytes are wrong")
        if isinstance(data, list) and not all(
            is_object(memoryview(each)) for each, start in zip(data, order["starts"], strict=True) if not start
        ):
            raise ValueError("the bytes are wrong")
    return {"seconds": seconds, "cpu": cpu, "peak": whole, "told": {"anonymous": anonymous, **told}}


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes elsewhere
    try:
        side = SIDES[sys.argv[1]]()
        first: dict[str, Any] = {"ready": True}
    except Absentee as missing:
        first = {"absent": str(missing)}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        try:
            told = done(side, json.loads(line))
        except Exception as error:
            told = {"error": f"{sys.argv[1]}: {error!r}"}
        print(json.dumps(told), file=answers, flush=True)
    if hasattr(side, "close"):
        side.close()


if __name__ == "__main__":
    main()
