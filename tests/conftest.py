"""What every test stands on: a clean environment, no thread left behind, and real servers for those that ask."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from servers import Nginx, tool
from wire import Resolver

if TYPE_CHECKING:
    from holotensor_net.origin import Origin

SPEAKS_TO_US = ("HOLOTENSOR_", "HF_", "XDG_")
SPEAKS_TO_REQUESTS = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
SPEAKS_TO_TERMINALS = ("NO_COLOR", "NETRC")

settings.register_profile("house", deadline=None)  # a shared machine stalls; that is no failure of the example at hand
settings.load_profile("ci" if os.environ.get("CI") == "true" else "house")


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that do not exist yet, one for each test."""
    homes = tmp_path_factory.mktemp("homes")
    return (homes / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, _homes: Iterator[Path]) -> None:
    """An empty home and cache, no settings, no proxies; child processes import the package that the test imports."""
    for name in list(os.environ):
        if name.startswith(SPEAKS_TO_US) or name.upper() in SPEAKS_TO_REQUESTS + SPEAKS_TO_TERMINALS:
            monkeypatch.delenv(name)
    home = next(_homes)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HOLOTENSOR_CACHE", str(home / "cache"))
    spec = importlib.util.find_spec("holotensor_net")
    assert spec is not None
    assert spec.origin is not None
    monkeypatch.setenv("PYTHONPATH", str(Path(spec.origin).parents[1]))


@pytest.fixture(autouse=True)
def _no_host_known() -> None:
    """A port may have been another test's, whose server asked for silence, or refused connections."""
    for room, table in (("transport.retry", "HOSTS"), ("engine.paths", "PATHS")):
        if (module := sys.modules.get(f"holotensor_net.{room}")) is not None:
            getattr(module, table).forget()


@pytest.fixture(autouse=True)
def _no_thread_left_behind(_clean_environment: None) -> Iterator[None]:
    """Fail a test whose non-daemon threads outlive it by two seconds."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 2.0
    started = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in started if thread.is_alive()]
    assert not left, f"threads left running: {', '.join(left)}"


@pytest.fixture
def tmp_cache(_clean_environment: None) -> Path:
    """The cache folder that the environment names; empty."""
    folder = Path(os.environ["HOLOTENSOR_CACHE"])
    folder.mkdir()
    return folder


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """Takes the place of the system's; in the end it lets go of whoever still waits."""
    resolver = Resolver()
    monkeypatch.setattr("socket.getaddrinfo", resolver)
    yield resolver
    resolver.may_answer.set()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Nginx]]:
    """Starts nginx servers: ``nginx(root, limit_rate=…, conf=…, http=…)``; without ``root``, on an empty folder.

    Those that a test does not close itself stop with its module.
    """
    tool("nginx")
    with ExitStack() as running:

        def start(root: Path | None = None, **shape: Any) -> Nginx:
            root = root or tmp_path_factory.mktemp("www")
            return running.enter_context(Nginx(root, tmp_path_factory.mktemp("nginx"), **shape))

        yield start


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Callable[..., Origin]]:
    """Starts embedded origins: ``origin(behaviour=…)`` serves ``tmp_path``, ``origin(root, …)`` another folder."""
    from holotensor_net.origin import Origin

    with ExitStack() as running:

        def start(root: Path = tmp_path, **options: Any) -> Origin:
            return running.enter_context(Origin(root, **options))

        yield start
