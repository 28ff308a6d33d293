"""The house as a table, and proof that its imports keep to it.

The table is data, read it first. What follows reads every import with ``ast``: at module level, inside functions, and
under ``TYPE_CHECKING``, where a name is used for typing only and may come from anywhere.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

HOUSE = "holotensor_net"

# A floor imports only floors below it.
# Only the interfaces and the doors stand above ``origin``; what it imports itself is nothing of the rest.
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("errors", "values", "config", "waits", "forks"),
    1: (
        *("transport/retry", "transport/guards", "transport/sockets"),
        *("transport/transfer", "transport/digests", "transport/translation", "transport/adapter"),
        *("transport/heads", "transport/names", "transport/addresses", "transport/pools"),
        *("transport/lines", "transport/leads"),
        *("storage/files", "storage/journal", "storage/parts", "storage/blobs", "storage/memory", "storage/freshness"),
        *("storage/claims", "storage/news", "storage/prefix", "storage/spans"),
        *("engine/priority", "engine/bandwidth", "engine/pacing", "engine/planning", "engine/routes"),
        *("engine/alarms", "engine/hedging"),
        *("formats/strict_json", "formats/dtypes", "formats/tensors"),
        *("formats/bitplane", "formats/safetensors", "formats/gguf", "formats/holotensor", "formats/manifest"),
        *("stream_cache/keys", "stream_cache/functions", "stream_cache/frozen", "stream_cache/portable"),
    ),
    2: (
        *(
            "transport/client",
            "engine/paths",
            "engine/lanes",
            "engine/rations",
            "engine/neighbours",
            "engine/scheduler",
        ),
        *("storage/entries", "storage/ledger", "storage/disk", "storage/cache", "storage/results"),
    ),
    3: (
        *("engine/request_cache", "engine/sinks", "engine/loads", "engine/runs", "engine/books", "engine/races"),
        *("engine/turns", "engine/confirmations"),
        *("engine/recovery", "engine/assembly", "engine/courier", "engine/rounds", "engine/fetcher"),
        *("stream_cache/tiers", "stream_cache/cache"),
    ),
    4: ("engine/loader", "engine/streaming", "storage/library"),
    5: ("model/importance", "model/sources", "model/remote", "model/sample", "model/publish", "origin"),
    6: (
        *("interfaces/cli", "interfaces/progress", "interfaces/demo"),
        *("interfaces/notebook", "interfaces/filesystem", "interfaces/cluster"),
    ),
}

# Within one floor, a room may import those that stand on a lower step of the same stair.
STAIRS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("errors",), ("values", "config")),
    (("transport/guards", "transport/digests"), ("transport/transfer",)),
    (
        ("transport/heads",),
        ("transport/sockets",),
        ("transport/names", "transport/addresses"),
        ("transport/pools",),
        ("transport/adapter",),
        ("transport/lines",),
    ),
    (
        ("formats/strict_json", "formats/dtypes"),
        ("formats/tensors",),
        ("formats/bitplane",),
        ("formats/safetensors", "formats/gguf", "formats/holotensor", "formats/manifest"),
    ),
    (
        ("storage/files",),
        ("storage/journal", "storage/claims", "storage/news"),
        ("storage/prefix",),
        ("storage/memory",),
        ("storage/parts",),
        ("storage/blobs",),
    ),
    (("storage/entries", "storage/ledger"), ("storage/disk",), ("storage/cache",)),
    (("engine/paths",), ("engine/lanes", "engine/rations", "engine/neighbours"), ("engine/scheduler",)),
    (("engine/streaming",), ("engine/loader",)),
    (
        ("engine/request_cache",),
        ("engine/sinks", "engine/loads"),
        ("engine/runs",),
        ("engine/books",),
        ("engine/races", "engine/recovery", "engine/turns", "engine/confirmations"),
        ("engine/assembly",),
        ("engine/courier",),
        ("engine/rounds",),
        ("engine/fetcher",),
    ),
    (("stream_cache/keys",), ("stream_cache/functions",)),
    (("stream_cache/tiers",), ("stream_cache/cache",)),
    (("model/importance", "model/sources"), ("model/remote", "model/publish")),
    (("interfaces/progress",), ("interfaces/demo",), ("interfaces/cli", "interfaces/notebook")),
)

# Doors lead into rooms and hold nothing themselves; no room leaves through one.
DOORS = ("__init__", "__main__", "prelude")
FOLDERS = ("transport", "storage", "engine", "formats", "model", "stream_cache", "interfaces")

# One room, or one folder (with its slash), has a library to itself.
MONOPOLIES: dict[str, tuple[str, ...]] = {
    "requests": ("transport/client", "transport/adapter", "transport/translation"),
    "urllib3": (
        *("transport/client", "transport/adapter", "transport/pools"),
        *("transport/sockets", "transport/names", "transport/addresses", "transport/translation"),
    ),
    "tenacity": ("transport/retry",),
    "cachetools": ("storage/cache", "stream_cache/"),
    "platformdirs": ("config",),
    "numpy": ("formats/", "stream_cache/", "model/"),
    "ml_dtypes": ("formats/", "stream_cache/", "model/"),
    "argparse": ("interfaces/cli", "origin"),
}

# The same for a single name, whatever it is called where it is used.
NAMES: dict[str, tuple[str, ...]] = {
    "concurrent.futures.ThreadPoolExecutor": ("engine/fetcher",),
    "builtins.print": ("interfaces/cli", "origin"),
    "time.sleep": ("interfaces/", "origin", "waits"),  # every other wait can be interrupted
    "functools.cached_property": (),  # before Python 3.12 it has a lock that a fork can leave held for ever (seen)
}

# Imported when first needed, so never at module level, except in the rooms named.
LAZY: dict[str, tuple[str, ...]] = {
    "numpy": (),
    "ml_dtypes": (),
    "safetensors": (),
    "blake3": (),
    "tqdm": ("interfaces/",),
}

BANNED = ("asyncio", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve")

# Imports nothing of the rest, not even for typing.
ALONE = ("origin",)

# --- the table ends here ---

FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
PACKAGE = Path(__file__).parents[1] / HOUSE


@dataclass(frozen=True)
class Import:
    """``target`` is a dotted module; ``where`` is "module", "function" or "typing"."""

    target: str
    line: int
    where: str

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


def imports_of(room: str, tree: ast.AST) -> Iterator[Import]:
    """Every import of a room, those made by a call with a literal name included."""
    for node, where in _placed(tree, "module"):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(room, node.module or "", node.level)
            yield from (Import(_member(base, alias.name), node.lineno, where) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield Import(
                        _absolute(room, name.lstrip("."), len(name) - len(name.lstrip("."))), node.lineno, where
                    )
                case _ if not is_door(room):
                    yield Import("<computed>", node.lineno, where)


def _placed(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        place = where
        if isinstance(node, ast.If) and _is_type_checking(node.test) and child in node.body:
            place = "typing"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and where == "module":
            place = "function"
        yield child, place
        yield from _placed(child, place)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _absolute(room: str, module: str, level: int) -> str:
    if level == 0:
        return module
    here = [HOUSE, *room.split("/")]
    return ".".join([*here[: len(here) - level], *filter(None, [module])])


def _member(base: str, name: str) -> str:
    """``from base import name`` imports a module if the name is one, and else reads something in ``base``."""
    inner = _room(f"{base}.{name}")
    return f"{base}.{name}" if inner in FLOOR_OF or inner in FOLDERS or inner in DOORS else base


def _room(target: str) -> str | None:
    """The room (``storage/cache``), folder or door behind a dotted name of the house; None for a library."""
    head, _, rest = target.partition(".")
    return (rest.replace(".", "/") or "__init__") if head == HOUSE else None


def is_door(room: str) -> bool:
    return room in DOORS or room.endswith("/__init__")


def _stands_in(room: str, places: tuple[str, ...]) -> bool:
    return any(room == place or (place.endswith("/") and room.startswith(place)) for place in places)


def _may_import(room: str, other: str) -> bool:
    return FLOOR_OF[other] < FLOOR_OF[room] or any(
        other in lower and room in higher for stair in STAIRS for lower, higher in combinations(stair, 2)
    )


def violations(room: str, source: str) -> list[str]:
    """What a room does that the table forbids, one sentence each."""
    tree = ast.parse(source)
    if not is_door(room) and room not in FLOOR_OF:
        return [f"{room}: has no floor in the table"]
    found = [(found.line, fault) for found in imports_of(room, tree) for fault in _faults_of_import(room, found)]
    found += _faults_of_names(room, tree)
    found += _faults_of_door(tree) if is_door(room) else []
    return [f"{room}:{line}: {fault}" for line, fault in sorted(set(found))]


def _faults_of_import(room: str, found: Import) -> Iterator[str]:
    if found.target == "<computed>":
        yield "imports a name that cannot be read in the source"
    if found.library in BANNED:
        yield f"imports {found.library}, which is banned"
    other = _room(found.target)
    if other is not None and room in ALONE:
        yield f"imports {other}, and stands alone"
    if found.where == "typing":
        return
    if found.library in MONOPOLIES and not _stands_in(room, MONOPOLIES[found.library]):
        yield f"imports {found.library}, the monopoly of {', '.join(MONOPOLIES[found.library])}"
    if found.where == "module" and found.library in LAZY and not _stands_in(room, LAZY[found.library]):
        yield f"imports {found.library} at module level"
    if other is None or is_door(room):
        return
    if other not in FLOOR_OF:
        yield f"imports {other}, which is a door" if is_door(other) or other in FOLDERS else f"imports {other}, no room"
    elif not _may_import(room, other):
        yield f"imports {other} of floor {FLOOR_OF[other]} from floor {FLOOR_OF[room]}"


def _faults_of_names(room: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Uses of the names that have an owner, under the names that the room gave them when it imported them."""
    nodes = list(ast.walk(tree))
    origins: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            origins |= {name.asname: name.name for name in node.names if name.asname}
            origins |= {
                name.name.partition(".")[0]: name.name.partition(".")[0] for name in node.names if not name.asname
            }
        elif isinstance(node, ast.ImportFrom):
            origins |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            used = origins.get(head, f"builtins.{head}") + dot + rest
            if used in NAMES and not _stands_in(room, NAMES[used]):
                yield node.lineno, f"uses {used}, the business of {', '.join(NAMES[used]) or 'nobody'}"


def _faults_of_door(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name="__getattr__" | "__dir__"):
                continue
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, f"defines {name}, and a door holds nothing"


def rooms() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("room", rooms())
def test_room_keeps_to_the_table(room: str) -> None:
    assert violations(room, rooms()[room].read_text()) == []


def test_every_folder_is_known() -> None:
    assert {room.partition("/")[0] for room in rooms() if "/" in room} <= set(FOLDERS)


def test_stairs_stay_on_one_floor() -> None:
    for stair in STAIRS:
        assert len({FLOOR_OF[room] for step in stair for room in step}) == 1


FORBIDDEN = {
    "upwards": ("engine/priority", "from .scheduler import Scheduler"),
    "sideways": ("storage/cache", "from ..transport.client import HttpClient"),
    "across a stair": ("formats/gguf", "from .safetensors import read"),
    "up a stair": ("engine/streaming", "def f():\n    from .loader import NetworkLoader"),
    "up by name of module": ("storage/blobs", "from . import cache"),
    "up by absolute name": ("values", "import holotensor_net.config"),
    "up by two dots": ("values", "from . import config"),
    "through the front door": ("model/remote", "from .. import NetworkLoader"),
    "through an inner door": ("model/remote", "from ..engine import NetworkLoader"),
    "a module without a floor": ("model/utils", ""),
    "from a module without a floor": ("model/remote", "from .utils import helper"),
    "requests in the engine": ("engine/fetcher", "def f():\n    import requests.adapters"),
    "numpy in the cache": ("storage/cache", "def f():\n    from numpy import array"),
    "numpy at once": ("formats/bitplane", "import numpy as np"),
    "numpy at once, in a class": (
        "formats/bitplane",
        "class A:\n    try:\n        import numpy\n    finally:\n        pass",
    ),
    "numpy for typing or else": ("formats/bitplane", "if TYPE_CHECKING:\n    pass\nelse:\n    import numpy"),
    "blake3 at once": ("transport/guards", "from blake3 import blake3"),
    "tqdm at once": ("model/publish", "from tqdm.auto import tqdm"),
    "pickle for typing": ("stream_cache/portable", "if TYPE_CHECKING:\n    import pickle"),
    "asyncio in a function": ("engine/fetcher", "def f():\n    import asyncio"),
    "a literal call": ("engine/fetcher", "def f():\n    importlib.import_module('requests')"),
    "a literal relative call": ("engine/priority", "import_module('.fetcher', __package__)"),
    "a computed call": ("engine/fetcher", "def f(name):\n    return __import__(name)"),
    "a pool": ("engine/loader", "from concurrent.futures import ThreadPoolExecutor as Pool\nPool(1)"),
    "a pool by attribute": ("engine/loader", "from concurrent import futures\nfutures.ThreadPoolExecutor(1)"),
    "a pool by full name": ("engine/loader", "import concurrent.futures\nconcurrent.futures.ThreadPoolExecutor(1)"),
    "print": ("interfaces/progress", "def f():\n    print(1)"),
    "sleep": ("transport/retry", "import time\ndef f(sleep=time.sleep): ..."),
    "a lock that survives a fork": (
        "storage/freshness",
        "from functools import cached_property as lazily\n@lazily\ndef f(self): ...",
    ),
    "sleep by another name": ("transport/retry", "import time as t\nt.sleep(1)"),
    "sleep alone": ("transport/retry", "from time import sleep as wait\nwait(1)"),
    "origin with company": ("origin", "if TYPE_CHECKING:\n    from .values import RangeRequest"),
    "a definition in a door": ("__init__", "def load(): ..."),
    "a class in an inner door": ("engine/__init__", "class Loader: ..."),
}

ALLOWED = {
    "downwards": (
        "storage/cache",
        "from ..errors import CacheError\nfrom .blobs import Blobs\nfrom . import freshness",
    ),
    "down a stair": ("engine/loader", "def f():\n    from .streaming import StreamingLoader"),
    "up for typing": (
        "errors",
        "if TYPE_CHECKING:\n    from .values import RangeRequest\n    from . import NetworkLoader",
    ),
    "up for typing by attribute": ("errors", "if typing.TYPE_CHECKING:\n    import numpy"),
    "numpy when needed": ("formats/bitplane", "def f():\n    import numpy as np"),
    "tqdm at once in an interface": ("interfaces/progress", "from tqdm.auto import tqdm"),
    "a sleep that is an argument": ("transport/retry", "def f(sleep):\n    sleep(1)"),
    "methods called sleep and print": ("transport/retry", "def f(self, time):\n    self.print(time.sleep(1))"),
    "two floors down a stair": ("formats/gguf", "from .dtypes import itemsize"),
    "a server that sleeps and prints": ("origin", "import argparse, time\ntime.sleep(1)\nprint(1)"),
    "a lazy door": (
        "__init__",
        "def __getattr__(name):\n    return import_module('.' + name, __name__)\ndef __dir__(): ...",
    ),
    "a door to every floor": ("prelude", "from .engine.loader import NetworkLoader\nfrom .values import Priority"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_checker_finds(case: str) -> None:
    assert len(violations(*FORBIDDEN[case])) == 1, violations(*FORBIDDEN[case])


@pytest.mark.parametrize("case", ALLOWED)
def test_checker_allows(case: str) -> None:
    assert violations(*ALLOWED[case]) == []


WATCHED_IMPORT = """
import importlib, json, sys, threading
sys.dont_write_bytecode = True
before, names = (filter(None, argument.split(",")) for argument in sys.argv[1:])
for name in before:
    importlib.import_module(name)
seen = []
def watch(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        seen.append(f"open {arguments[0]}")
    elif event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove")):
        seen.append(event)
sys.addaudithook(watch)
modules = [importlib.import_module(name) for name in names]
seen += [f"thread {thread.name}" for thread in threading.enumerate()[1:]]
loaded = sorted({name.partition(".")[0] for name in sys.modules})
door, names = modules[0], getattr(modules[0], "__all__", ())
json.dump({
    "seen": list(seen),  # as it is now: resolving the names below imports more
    "loaded": loaded,
    "unresolved": [name for name in names if not hasattr(door, name)],
    "unlisted": sorted(set(names) - set(dir(door))),
}, sys.stdout)
"""


def watched_import(*names: str, before: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """What a fresh interpreter does while it imports these modules, having imported others ``before``.

    ``seen``: files opened other than modules, sockets, processes, threads; ``loaded``: top-level modules in the end;
    ``unresolved`` and ``unlisted``: names in ``__all__`` of the first module that it does not give, or ``dir`` omits.
    """
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, ",".join(before), ",".join(names)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, list[str]] = json.loads(done.stdout)
    return answer


def test_importing_the_package_does_nothing_else() -> None:
    found = watched_import(HOUSE)
    assert found["seen"] == []
    assert {"numpy", "requests", "urllib3", "blake3", "tqdm"}.isdisjoint(found["loaded"])


def test_package_gives_and_lists_all_its_names() -> None:
    found = watched_import(HOUSE)
    assert found["unresolved"] == []
    assert found["unlisted"] == []


def test_importing_a_room_does_nothing_else() -> None:
    # what the libraries do is theirs: urllib3 opens a socket to learn whether there is IPv6
    below = sorted(room for room in rooms() if FLOOR_OF.get(room, 6) < 6)
    found = watched_import(
        *(f"{HOUSE}.{room.replace('/', '.')}" for room in below), before=("requests", "tenacity", "cachetools")
    )
    assert found["seen"] == []
    assert {"numpy", "ml_dtypes", "safetensors"}.isdisjoint(found["loaded"])


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("open('/dev/null').close()", ["open /dev/null"]),
        ("import socket; socket.socket().close()", ["socket.__new__"]),
        ("import threading as t; t.Thread(target=t.Event().wait, name='idle', daemon=True).start()", ["thread idle"]),
        ("__all__ = ['missing']", []),
    ],
)
def test_watch_sees(statement: str, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guilty.py").write_text(statement)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = watched_import("guilty")
    assert found["seen"] == seen
    assert found["unresolved"] == found["unlisted"] == (["missing"] if "missing" in statement else [])
