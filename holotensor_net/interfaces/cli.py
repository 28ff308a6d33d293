"""The command line: ``holotensor-net``, or ``python -m holotensor_net``. Results on stdout, progress and errors on
stderr.

Exit codes: 0 done, 1 not a model, 2 usage, 3 timeout, 4 not found, 5 network, 6 disk, 7 authentication, 8 checksum,
130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import io
import itertools
import json
import logging
import operator
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from .. import errors
from ..config import NetworkConfig, verbosity, version

if TYPE_CHECKING:
    from ..engine.loader import NetworkLoader
    from ..storage.cache import CacheEntry
    from ..values import LoadResult

__all__ = ["main"]

_N = TypeVar("_N", int, float)

_GRACE = 0.7
"""Seconds that an interrupted command has to clean up. The cache survives being ended at any moment."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("holotensor_net").setLevel(verbosity())  # ours alone: urllib3 would log URLs with their secrets
    try:
        with _prompt_interrupts():
            arguments.run(arguments)
            sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except errors.NetworkError as error:
        _complain(f"error: {error}")
        return exit_code(error)
    except BrokenPipeError:
        # Whoever read stdout has gone; a second failure when it is flushed at exit would be shown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell tells of who ended by SIGPIPE
    except OSError as error:
        _complain(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 6
    return 0


def exit_code(error: BaseException | None) -> int:
    """The exit code that tells this error from others."""
    if isinstance(error, errors.RetriesExhausted) and error.last_error is not None:
        return exit_code(error.last_error)
    if isinstance(error, errors.HttpError) and error.status in (401, 403, 407):
        return 7
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    return 5


_EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ConfigurationError, 2),
    (errors.InvalidUrl, 2),
    (errors.Timeout, 3),
    (errors.DeadlineExceeded, 3),
    (errors.NotFound, 4),
    (errors.CacheError, 6),
    (errors.ChecksumMismatch, 8),
    (errors.FormatError, 1),
    (errors.Cancelled, 130),
)


def _complain(text: str) -> None:
    print(_printable(text), file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """The text with control characters spelled out: names that strangers chose must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _prompt_interrupts() -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt, and ends the process should cleaning up take longer than the grace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up() -> None:
        _complain("interrupted")
        os._exit(130)

    timer = threading.Timer(_GRACE, give_up)
    timer.daemon = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        timer.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    from ..origin import add_behaviour_options

    parser = argparse.ArgumentParser(prog="holotensor-net", description=_first_line(sys.modules["holotensor_net"]))
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _add(commands, "inspect", _inspect)
    command.add_argument("url", metavar="URL", help="a .safetensors file, an index, a folder, or a local path")
    command.add_argument("--include", metavar="GLOB", action="append", help="only tensors whose name matches")

    command = _add(commands, "pull", _pull)
    command.add_argument(
        "url", metavar="URL", help="a file, a .safetensors.index.json with all of its shards, or a folder/ with one"
    )
    command.add_argument("--include", metavar="GLOB", action="append", help="only files, or tensors' files, that match")
    command.add_argument("--to", metavar="DIR", type=Path, help="put the files there (default: into the cache only)")
    command.add_argument("--max-bandwidth", metavar="RATE", type=_rate, help="bytes per second, as in 50MB or 400Mbit")
    command.add_argument("--timeout", metavar="SECONDS", type=float, default=30.0, help="without a byte (default: 30)")

    command = _add(commands, "serve", _serve, with_json=False)
    command.add_argument("dir", metavar="DIR", type=Path, help="the folder to serve")
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=_port, default=8000, help="0 for any free one (default: 8000)")
    add_behaviour_options(command)

    cache = commands.add_parser("cache", help="look at the disk cache, or empty it")
    actions = cache.add_subparsers(metavar="ACTION", required=True)
    _add(actions, "ls", _cache_ls)
    _add(actions, "path", _cache_path)
    _add(actions, "verify", _cache_verify)
    command = _add(actions, "prune", _cache_prune)
    command.add_argument("max_size", metavar="SIZE", type=_size, help="keep this much at most, as in 5GB")
    _add(actions, "clear", _cache_clear)

    command = _add(commands, "demo", _demo)
    command.add_argument("--url", metavar="URL", help="a model of yours, instead of one made for the purpose")
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], *, with_json: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=_first_line(run), description=_first_line(run))
    command.set_defaults(run=run)
    if with_json:
        command.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def _first_line(of: object) -> str:
    return (of.__doc__ or "").splitlines()[0].rstrip(".")


def _rate(text: str) -> float:
    from ..origin import parse_rate

    return _parsed(parse_rate, text)


def _size(text: str) -> int:
    from ..origin import parse_size

    return _parsed(parse_size, text)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port: they go from 0 to 65535")
    return port


def _parsed(parse: Callable[[str], _N], text: str) -> _N:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _show(value: Any) -> None:
    print(json.dumps(value, indent=1))


# -- models


def _inspect(arguments: argparse.Namespace) -> None:
    """List the tensors of a model; only headers are read."""
    from ..model.importance import rank_names
    from ..model.remote import open_model

    with open_model(arguments.url, include=arguments.include) as model:
        ranks = rank_names({name: model.info(name).nbytes for name in model})
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "dtype": model.info(name).dtype,
                "shape": list(model.info(name).shape),
                "bytes": model.info(name).nbytes,
                "priority": ranks[name].priority.name,
                "importance": round(ranks[name].importance, 4),
            }
            for name in model
        ]
        summary = {"tensors": len(model), "bytes": model.nbytes, "metadata": model.metadata()}
    if arguments.json:
        _show({**summary, "list": rows})
        return
    table = [(_printable(row["name"]), "×".join(map(str, row["shape"])) or "scalar", row) for row in rows]
    width = max((len(name) for name, _, _ in table), default=4)
    for name, shape, row in table:
        print(f"{name:<{width}}  {row['dtype']:<8} {shape:>16} {row['bytes']:>13,}  {row['priority']}")
    print(f"{summary['tensors']} tensors, {summary['bytes']:,} bytes")


def _pull(arguments: argparse.Namespace) -> None:
    """Bring files into the cache, and into a folder if one is named."""
    from ..engine.loader import NetworkLoader
    from ..model.sources import endpoint_of
    from ..values import LoadFailure, LoadRequest
    from .progress import progress

    config, path = endpoint_of(
        arguments.url, NetworkConfig(max_bandwidth=arguments.max_bandwidth, timeout=arguments.timeout)
    )
    pulled = []
    with NetworkLoader(config) as loader:
        read, files = _files_of(loader, path, arguments.include)
        sizes = {file: _size_of(loader, file) for file in files}
        total = None if None in sizes.values() else sum(size or 0 for size in sizes.values())
        requests = [LoadRequest(_name_of(file), file, expected_size=size) for file, size in sizes.items()]
        with progress("pull", total, loader.stats), loader.stream(requests) as results:
            for result in itertools.chain(read, results):
                if isinstance(result, LoadFailure):
                    raise result.error
                target = None if arguments.to is None else arguments.to / result.fragment_id
                if target is not None:
                    _write(target, result.data)
                pulled.append(
                    {
                        "file": result.fragment_id,
                        "bytes": len(result.data),
                        "from_cache": result.from_cache,
                        "to": target and str(target),
                    }
                )
    if arguments.json:
        _show(pulled)
        return
    for row in pulled:
        cached = "  (was cached)" if row["from_cache"] else ""
        print(_printable(f"{row['file']}  {row['bytes']:,} bytes  {row['to'] or 'in the cache'}{cached}"))


def _files_of(loader: NetworkLoader, path: str, include: list[str] | None) -> tuple[list[LoadResult], list[str]]:
    """What belongs to ``path``: the index, read already, and its shards; or the one file that it is. In a folder, that
    is its model."""
    from ..formats.safetensors import shards_of
    from ..model.remote import index_of, places_in
    from ..values import LoadFailure, LoadRequest, Priority

    single = None
    if not _name_of(path):
        path, single = places_in(path)
    if not _name_of(path).endswith(".safetensors.index.json"):
        return [], [path]
    read = loader.load(LoadRequest(_name_of(path), path, priority=Priority.CRITICAL))
    if (
        single is not None
        and isinstance(read, LoadFailure)
        and isinstance(read.error, errors.NotFound | errors.OfflineError)
    ):
        return [], [single]
    index = index_of(read.data, path)
    shards = shards_of(index)
    if include:
        by_tensor = {shard for name, shard in index.weight_map.items() if _matches(name, include)}
        shards = tuple(shard for shard in shards if shard in by_tensor or _matches(_name_of(shard), include))
        if not shards:
            raise errors.NotFound("no file and no tensor of the model matches --include")
    return [read], list(shards)


def _name_of(path: str) -> str:
    return urlsplit(path).path.rpartition("/")[2]


def _size_of(loader: NetworkLoader, path: str) -> int | None:
    """Bytes of a file, None if the server will not say: a signed URL may be good for GET alone."""
    try:
        return loader.head(path).size
    except (errors.HttpError, errors.ProtocolError):
        return None


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _write(target: Path, data: memoryview) -> None:
    """Put the bytes into a file: all of them, or it does not appear. Raises CacheError, InsufficientDisk."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _becoming(target) as file:
            file.write(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise errors.InsufficientDisk(
                f"no room for {str(target)!r}: free some space, or name another folder (--to)"
            ) from error
        raise errors.CacheError(
            f"cannot write {str(target)!r} ({error.strerror}): make sure that it may be written, or name another folder"
            " (--to)"
        ) from error


@contextmanager
def _becoming(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its place once it is whole: where the system has files without a name, nothing is left even of
    one whose process is killed. Raises OSError."""
    name = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    fd = _nameless(target.parent)
    try:
        with open(name, "xb") if fd is None else open(fd, "wb") as file:
            yield file
            file.flush()
            if fd is not None:
                # Where no src_dir_fd is given, os.link follows no link, whatever follow_symlinks says.
                os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):  # it was in its place already as the interrupt came, or has had no name
            os.unlink(name)
        raise


def _nameless(folder: Path) -> int | None:
    """A new file without a name, None where there is none that could get one later."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError:
        return None  # not every file system has it; what else is wrong shows where a file with a name is made


def _serve(arguments: argparse.Namespace) -> None:
    """Serve a folder, with ranges, and with the weather of your choice."""
    from ..origin import behaviour_of, serve

    if not arguments.dir.is_dir():
        raise errors.NotFound(f"there is no folder {str(arguments.dir)!r}")
    try:
        behaviour = behaviour_of(arguments)
    except ValueError as error:
        raise errors.ConfigurationError(str(error)) from error
    try:
        serve(arguments.dir, host=arguments.host, port=arguments.port, behaviour=behaviour)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.ConfigurationError(
            f"cannot listen on {arguments.host}:{arguments.port} ({error}): choose another --host or --port"
        ) from error


# -- the cache


def _cache() -> Any:
    from ..storage.cache import FragmentCache

    return FragmentCache(NetworkConfig().cache)


def _cache_ls(arguments: argparse.Namespace) -> None:
    """List what the disk cache holds, the last used first."""
    rendered = _cache_row if arguments.json else _cache_line
    count = size = 0
    lines: list[tuple[float, str]] = []  # rather than entries, which would take several times the memory
    for entry in _cache():
        count, size = count + 1, size + entry.size
        lines.append((entry.last_accessed, rendered(entry)))
    lines.sort(key=operator.itemgetter(0), reverse=True)
    texts = (line for _, line in lines)
    if arguments.json:
        print("[" + ",".join(f"\n {text}" for text in texts) + "\n]" if lines else "[]")
    else:
        print("\n".join((*texts, f"{count} entries, {size:,} bytes")))


def _cache_row(entry: CacheEntry) -> str:
    span = entry.byte_range
    return json.dumps(
        {
            "fragment": entry.fragment_id,
            "bytes": entry.size,
            "url": entry.url,
            "range": None if span is None else [span.start, span.stop],
            "etag": entry.etag,
            "cached_at": entry.cached_at,
            "last_accessed": entry.last_accessed,
        }
    )


def _cache_line(entry: CacheEntry) -> str:
    span = entry.byte_range
    part = "" if span is None else f"[{span.start}:{span.stop}]"
    return f"{entry.size:>13,}  {_printable(entry.url or entry.fragment_id)}{part}"


def _cache_path(arguments: argparse.Namespace) -> None:
    """Tell where the disk cache is."""
    path = str(NetworkConfig().cache.root)
    if arguments.json:
        _show({"path": path})
    else:
        print(path)


def _cache_verify(arguments: argparse.Namespace) -> None:
    """Read everything in the disk cache again, and set aside what is damaged."""
    broken = [str(item) for item in _cache().verify()]
    if arguments.json:
        _show({"damaged": broken})
    else:
        print("\n".join([*map(_printable, broken), f"{len(broken)} damaged"]))
    if broken:
        raise errors.ChecksumMismatch(message=f"{len(broken)} entries were damaged; they will be fetched again")


def _cache_prune(arguments: argparse.Namespace) -> None:
    """Shrink the disk cache: what was used least goes first."""
    freed = _cache().prune(arguments.max_size)
    if arguments.json:
        _show({"freed": freed})
    else:
        print(f"freed {freed:,} bytes")


def _cache_clear(arguments: argparse.Namespace) -> None:
    """Empty the disk cache."""
    cache = _cache()
    size = cache.stats().disk_size
    cache.clear()
    if arguments.json:
        _show({"freed": size})
    else:
        print(f"freed {size:,} bytes")


# -- the demonstration


def _demo(arguments: argparse.Namespace) -> None:
    """Stream a model behind 400 Mbit/s and 20 ms, and compare with a plain download."""
    from .demo import run

    result = run(arguments.url)
    if arguments.json:
        _show(asdict(result))
        return
    first, second, plain = result.first, result.second, result.plain_seconds
    print(
        f"{result.tensors} tensors, {result.bytes / 1e6:.0f} MB, {result.critical_bytes / 1e6:.0f} MB of them CRITICAL"
    )
    print(f"{'':<28}{'plain download':>16}{'first run':>12}{'second run':>12}")
    for label, mine, again in (
        ("first tensor", first.first_seconds, second.first_seconds),
        ("all CRITICAL tensors", first.critical_seconds, second.critical_seconds),
        ("everything", first.seconds, second.seconds),
    ):
        print(f"{label:<28}{plain:>14.2f} s{mine:>10.2f} s{again:>10.2f} s")
    print(f"{'bytes over the network':<28}{result.bytes:>16,}{first.fetched_bytes:>12,}{second.fetched_bytes:>12,}")
    share = first.critical_fetched_bytes / max(1, result.critical_bytes)
    print(f"All CRITICAL tensors were there when {share:.2f} × their own bytes had moved.")
    print(f"The second run took {second.seconds / first.seconds:.2f} × the first.")
    print(f"{result.checked} tensors equal safetensors' own, bit for bit, in both runs.")
