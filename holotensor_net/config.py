"""Frozen settings, checked when built: a configuration that exists is one that can work.

Every setting: explicit argument > environment > default. The environment is read when a value is used, never at import.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from .errors import ConfigurationError, InvalidUrl, redact_url

__all__ = ["CacheConfig", "CdnEndpoint", "ClientConfig", "NetworkConfig", "RetryConfig", "SchedulerConfig"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Auth: TypeAlias = str | tuple[str, str] | Callable[[], str] | None
"""A bearer token, a user and a password, or a function that gives a fresh token."""


@functools.cache
def version() -> str:
    """The installed version of the package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("holotensor-net")
    except PackageNotFoundError:
        return "0+unknown"


def _positive(owner: object, *names: str, none: bool = False) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None and none:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            _refuse(owner, name, "a number above 0" + (" or None" if none else ""))


def _whole(owner: object, *names: str, least: int = 1, none: bool = False) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None and none:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            _refuse(owner, name, f"a whole number, {least} or more" + (" or None" if none else ""))


def _share(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            _refuse(owner, name, "a number from 0 to 1")


def _flags(owner: object, *names: str, none: bool = False) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (isinstance(value, bool) or (none and value is None)):
            _refuse(owner, name, "True, False or None" if none else "True or False")


def _folder(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if value is None or value is False:
        return
    if not isinstance(value, str | os.PathLike) or "\0" in os.fsdecode(value):
        _refuse(owner, name, "a folder, None or False")


def _transport(owner: ClientConfig | NetworkConfig) -> None:
    if not isinstance(owner.retry, RetryConfig):
        _refuse(owner, "retry", "a RetryConfig")
    if not isinstance(owner.user_agent, str) or not re.fullmatch(r"[\x20-\x7e]+", owner.user_agent):
        _refuse(owner, "user_agent", "printable ASCII")


def _refuse(owner: object, name: str, wanted: str, *, told: bool = True) -> None:
    value = getattr(owner, name)
    shown = repr(value) if told else f"a {type(value).__name__}"  # and nothing that is secret
    raise ConfigurationError(f"{type(owner).__name__}.{name} must be {wanted}, not {shown}")


def is_auth(value: object) -> bool:
    """Whether something may be an endpoint's ``auth``."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, str) or callable(value)


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """How often and how patiently one endpoint is asked again. Times in seconds.

    The wait before retry n is drawn from [0, min(max_backoff, initial_backoff · multiplierⁿ)] (full jitter), or is
    that bound itself with ``jitter=False``; a Retry-After of the server is never undercut. ``deadline`` bounds one
    load, or one ``head`` of a loader, in all.
    """

    max_retries: int = 3
    initial_backoff: float = 0.1
    max_backoff: float = 10.0
    multiplier: float = 2.0
    jitter: bool = True
    deadline: float | None = None

    def __post_init__(self) -> None:
        _whole(self, "max_retries", least=0)
        _flags(self, "jitter")
        _positive(self, "initial_backoff", "max_backoff")
        _positive(self, "deadline", none=True)
        if not isinstance(self.multiplier, int | float) or not 1 <= self.multiplier < float("inf"):
            _refuse(self, "multiplier", "a number, 1 or more")


@dataclass(frozen=True, kw_only=True)
class CdnEndpoint:
    """One place to fetch from. A path is looked up below ``url``.

    ``priority``: lower first. ``max_connections``: a ceiling; the controller finds the least that fills the path.
    ``auth``: a bearer token, a ``(user, password)`` pair, or a function that gives a token: it is asked for each
    request, and once more where the server refuses what it gave. ``verify``: check TLS certificates (True), not at all
    (False), or against a CA bundle (a path). ``proxies``: scheme → proxy URL; None takes the environment's. Credentials
    in the URL are moved to ``auth``; credentials and headers never show in ``repr``.

    What is cached is given only to who asks with the same credentials. Whose token a function gives cannot be told, so
    what came with it serves this very endpoint and no other process, unless ``cache_scope`` names whose eyes it
    sees with: endpoints of one name share what is cached, whatever their credentials. Bytes that a request knows by
    their digest are shared by all.

    Raises InvalidUrl or ConfigurationError.
    """

    url: str = field(kw_only=False)
    priority: int = 0
    region: str | None = None
    supports_range: bool = True
    max_connections: int = 64
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)
    auth: Auth = field(default=None, repr=False)
    verify: bool | str = True
    proxies: Mapping[str, str] | None = field(default=None, repr=False, hash=False)
    cache_scope: str | None = field(default=None, repr=False)
    _own: str = field(default_factory=lambda: secrets.token_hex(16), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = _web_url(self.url)
        if parts.query or parts.fragment:
            raise InvalidUrl("an endpoint's URL ends before '?' and '#': put the query into the path", url=self.url)
        if parts.username is not None:
            if self.auth is None:
                object.__setattr__(self, "auth", (unquote(parts.username), unquote(parts.password or "")))
            parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        object.__setattr__(self, "url", urlunsplit(parts))
        if not isinstance(self.headers, Mapping):
            _refuse(self, "headers", "a mapping of names to values", told=False)
        object.__setattr__(self, "headers", dict(self.headers))
        _whole(self, "max_connections")
        _flags(self, "supports_range")
        if not isinstance(self.region, str | None):
            _refuse(self, "region", "a name or None")
        if not isinstance(self.verify, bool | str | os.PathLike):
            _refuse(self, "verify", "True, False or the path of a bundle")
        if self.proxies is not None and not (
            isinstance(self.proxies, Mapping)
            and all(isinstance(part, str) for pair in self.proxies.items() for part in pair)
        ):
            _refuse(self, "proxies", "a mapping of schemes to URLs, or None", told=False)
        if not is_auth(self.auth):
            _refuse(self, "auth", "a token, a tuple (user, password), a function or None", told=False)
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            _refuse(self, "priority", "a whole number")
        if self.cache_scope is not None and not (isinstance(self.cache_scope, str) and self.cache_scope):
            _refuse(self, "cache_scope", "a name or None")
        for name, value in self.headers.items():
            is_text = isinstance(name, str) and isinstance(value, str)
            if not is_text or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\r\n\0]", value):
                raise ConfigurationError(f"CdnEndpoint.headers has a name or value that HTTP does not allow: {name!r}")

    def url_of(self, path: str) -> str:
        """The full URL of ``path`` below this endpoint.

        Raises InvalidUrl for a path that would leave the endpoint: another host, ``..``, control characters.
        """
        if not isinstance(path, str):
            raise InvalidUrl(f"a path must be a string, not {type(path).__name__}", url=self.url)
        if re.search(r"[\x00-\x1f\x7f]", path) or "\\" in path.split("?")[0]:
            raise InvalidUrl("a path must not hold control characters or backslashes", url=self.url)
        target = None
        with contextlib.suppress(ValueError):  # its words may repeat a secret
            target = urlsplit(path)
        if target is None:
            raise InvalidUrl("not a path that could be part of a URL", url=self.url)
        if target.scheme or target.netloc or path.startswith("//"):
            raise InvalidUrl("a path is relative to its endpoint: configure a CdnEndpoint for another host", url=path)
        if ".." in unquote(target.path).split("/"):
            raise InvalidUrl("a path must not climb out of its endpoint with '..'", url=f"{self.url}/{path}")
        # A server never sees a fragment: what looks like one is part of the name.
        return f"{self.url.rstrip('/')}/{path.lstrip('/').replace(' ', '%20').replace('#', '%23')}"

    @property
    def scope(self) -> str:
        """A digest of whose eyes this endpoint sees with: equal for equal names or credentials, empty for none."""
        if self.cache_scope is not None:
            return _digest("named", self.cache_scope)
        if self.auth is None and not self.headers:
            return ""
        auth = f"function {self._own}" if callable(self.auth) else repr(self.auth)
        return _digest(auth, *sorted(f"{k.lower()}: {v}" for k, v in self.headers.items()))


def _digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _web_url(url: str) -> Any:
    """The parts of an http or https URL; raises InvalidUrl with a sentence."""
    if not isinstance(url, str):
        raise InvalidUrl(f"a URL must be a string, not {type(url).__name__}")
    host = None
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # their words may repeat a password
        parts = urlsplit(url)
        _, host = parts.port, parts.hostname or ""
    if host is None:
        raise InvalidUrl(f"not a URL: {redact_url(str(url))!r}")
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidUrl("a URL must begin with http:// or https:// and name a host", url=url)
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise InvalidUrl("a URL must not hold spaces, control characters or backslashes", url=url)
    return parts


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """What the HTTP client needs. ``timeout``: seconds without a byte; ``max_body``: bytes of a body of unknown size
    that are held in memory at most; ``max_redirects``: hops."""

    timeout: float = 30.0
    connect_timeout: float = 10.0
    retry: RetryConfig = field(default_factory=RetryConfig)
    compression: bool = True
    user_agent: str = field(default_factory=lambda: f"holotensor-net/{version()}")
    max_body: int = GIB
    max_redirects: int = 5

    def __post_init__(self) -> None:
        _positive(self, "timeout", "connect_timeout")
        _flags(self, "compression")
        _transport(self)
        _whole(self, "max_body")
        _whole(self, "max_redirects", least=0)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler needs. ``max_concurrent``: the ceiling of the pool; ``chunk_size``: bytes of a piece, at most;
    ``max_bandwidth`` and ``min_bandwidth`` in bytes/s; ``max_requests_per_second`` of all workers together;
    ``memory_budget``: bytes in flight or undelivered; ``queue_limit``: fragments."""

    max_concurrent: int = 64
    chunk_size: int = 16 * MIB
    max_bandwidth: float | None = None
    min_bandwidth: float = MIB
    monitor_bandwidth: bool = True
    memory_budget: int = GIB
    queue_limit: int = 1_000_000
    max_requests_per_second: float | None = None

    def __post_init__(self) -> None:
        _whole(self, "max_concurrent", "chunk_size", "memory_budget", "queue_limit")
        _flags(self, "monitor_bandwidth")
        _positive(self, "min_bandwidth")
        _positive(self, "max_bandwidth", "max_requests_per_second", none=True)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What the cache needs. ``directory``: None for the platform's cache folder, False for no disk tier. Sizes in
    bytes. ``free_space_reserve``: what is left free of the disk, None for a twentieth of it, 1 GiB at most.
    ``verify_on_open``: hash each blob again when it is first opened. ``heuristic_freshness``: where a server does not
    say how long an answer is fresh, so much of the time since it was last modified, a week at most (RFC 9111 §4.2.2
    suggests 0.1); 0 asks the server each time."""

    directory: str | os.PathLike[str] | Literal[False] | None = None
    max_size: int = 10 * GIB
    memory_size: int = 256 * MIB
    offline: bool | None = None
    free_space_reserve: int | None = None
    verify_on_open: bool = False
    heuristic_freshness: float = 0.0

    def __post_init__(self) -> None:
        _folder(self, "directory")
        _share(self, "heuristic_freshness")
        _whole(self, "max_size")
        _whole(self, "memory_size", least=0)
        _whole(self, "free_space_reserve", least=0, none=True)
        _flags(self, "verify_on_open")
        _flags(self, "offline", none=True)

    @property
    def root(self) -> Path | None:
        """The folder of the disk tier, None if there is none: the setting, ``HOLOTENSOR_CACHE``,
        ``HOLOTENSOR_HOME``/cache, or the platform's cache folder."""
        if self.directory is False:
            return None
        if self.directory is not None:
            return Path(self.directory).expanduser()
        return default_cache_dir()

    @property
    def is_offline(self) -> bool:
        return offline(self.offline)


class _AsTheEnvironmentHasIt:
    """A field that, where it was given as None, reads as ``HOLOTENSOR_OFFLINE`` has it at that moment."""

    def __get__(self, owner: object | None, kind: type) -> bool | None:
        return None if owner is None else offline(vars(owner)["offline"])

    def __set__(self, owner: object, value: bool | None) -> None:
        vars(owner)["offline"] = value


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """All settings of a loader. Sizes in bytes, rates in bytes/s, times in seconds.

    ``timeout`` is idle time, not total; ``max_concurrent`` a ceiling; ``compression`` applies to whole bodies only;
    ``cache_dir``: None for the platform's cache folder, False for no disk cache; ``free_space_reserve``: bytes of the
    disk that the cache leaves free, None for a twentieth of the disk, 1 GiB at most; ``verify_on_open``: hash what the
    cache has once more in each process, when it is first opened, though its file's time says that nobody has written to
    it; ``heuristic_freshness``: where a server does not say how long an answer is fresh, so much of the time since it
    was last modified, a week at most (RFC 9111 §4.2.2 suggests 0.1), at the risk of old bytes; 0 asks each time;
    ``region``: the caller's, whose endpoints go first among those of equal priority; ``hedging``: ask a second time
    for what is slow, of the next endpoint (None), of the same one where there is no other (True), or never (False);
    ``min_bandwidth``: below it the loader asks its callers to throttle; ``max_bandwidth`` and
    ``max_requests_per_second``: of all workers and endpoints together, whatever they ask for; ``offline``: None, or
    not to set it, takes ``HOLOTENSOR_OFFLINE`` whenever it is read (False where that is not set);
    ``memory_budget``: bytes in flight and undelivered; spare memory, which was delivered and let go of, is given to the
    next fragments, and to the system once it lacks some, and makes no more of it together with what is in use.

    Raises ConfigurationError, naming field and value.
    """

    endpoints: tuple[CdnEndpoint, ...] = ()
    timeout: float = 30.0
    connect_timeout: float = 10.0
    max_concurrent: int = 64
    chunk_size: int = 16 * MIB
    retry: RetryConfig = field(default_factory=RetryConfig)
    compression: bool = True
    user_agent: str = field(default_factory=lambda: f"holotensor-net/{version()}")
    cache_dir: str | os.PathLike[str] | Literal[False] | None = None
    max_cache_size: int = 10 * GIB
    monitor_bandwidth: bool = True
    min_bandwidth: float = MIB
    max_bandwidth: float | None = None
    offline: bool | None = cast(Any, _AsTheEnvironmentHasIt())
    memory_budget: int = GIB
    region: str | None = None
    hedging: bool | None = None
    max_requests_per_second: float | None = None
    free_space_reserve: int | None = None
    verify_on_open: bool = False
    heuristic_freshness: float = 0.0

    def __post_init__(self) -> None:
        given: Any = (self.endpoints,) if isinstance(self.endpoints, str | CdnEndpoint) else self.endpoints
        if not isinstance(given, Iterable):
            _refuse(self, "endpoints", "CdnEndpoints")
        endpoints = tuple(e if isinstance(e, CdnEndpoint) else CdnEndpoint(e) for e in given)
        object.__setattr__(self, "endpoints", endpoints)
        _transport(self)
        _folder(self, "cache_dir")
        if not isinstance(self.region, str | None):
            _refuse(self, "region", "a name or None")
        _whole(self, "max_concurrent", "chunk_size", "max_cache_size", "memory_budget")
        _whole(self, "free_space_reserve", least=0, none=True)
        _flags(self, "compression", "monitor_bandwidth", "verify_on_open")
        _flags(self, "offline", "hedging", none=True)
        _share(self, "heuristic_freshness")
        _positive(self, "timeout", "connect_timeout", "min_bandwidth")
        _positive(self, "max_bandwidth", "max_requests_per_second", none=True)

    @property
    def client(self) -> ClientConfig:
        return ClientConfig(
            timeout=self.timeout,
            connect_timeout=self.connect_timeout,
            retry=self.retry,
            compression=self.compression,
            user_agent=self.user_agent,
            max_body=self.memory_budget,
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_concurrent=self.max_concurrent,
            chunk_size=self.chunk_size,
            max_bandwidth=self.max_bandwidth,
            min_bandwidth=self.min_bandwidth,
            monitor_bandwidth=self.monitor_bandwidth,
            memory_budget=self.memory_budget,
            max_requests_per_second=self.max_requests_per_second,
        )

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            directory=self.cache_dir,
            max_size=self.max_cache_size,
            memory_size=min(256 * MIB, self.memory_budget // 4),
            offline=vars(self)["offline"],
            free_space_reserve=self.free_space_reserve,
            verify_on_open=self.verify_on_open,
            heuristic_freshness=self.heuristic_freshness,
        )

    @classmethod
    def huggingface_hub(cls, token: str | None = None, **settings: Any) -> NetworkConfig:
        """The Hugging Face Hub; paths are ``owner/model/resolve/revision/file``. Token: argument,
        ``HOLOTENSOR_TOKEN``, ``HF_TOKEN``."""
        token = token or os.environ.get("HOLOTENSOR_TOKEN") or os.environ.get("HF_TOKEN") or None
        url = os.environ.get("HOLOTENSOR_ENDPOINT") or "https://huggingface.co"
        return cls(**{"endpoints": (CdnEndpoint(url, auth=token),), **settings})

    @classmethod
    def civitai(cls, token: str | None = None, **settings: Any) -> NetworkConfig:
        """Civitai; paths are ``api/download/models/ID``. Token: argument, ``HOLOTENSOR_TOKEN``."""
        token = token or os.environ.get("HOLOTENSOR_TOKEN") or None
        return cls(**{"endpoints": (CdnEndpoint("https://civitai.com", auth=token),), **settings})

    @classmethod
    def custom_cdn(cls, url: str, **settings: Any) -> NetworkConfig:
        """One server of your own. Token: ``HOLOTENSOR_TOKEN``."""
        token = os.environ.get("HOLOTENSOR_TOKEN") or None
        return cls(**{"endpoints": (CdnEndpoint(url, auth=token),), **settings})

    def with_default_endpoint(self) -> NetworkConfig:
        """This configuration, with ``HOLOTENSOR_ENDPOINT`` where it names no endpoint itself.

        Raises ConfigurationError if there is none either.
        """
        if self.endpoints:
            return self
        url = os.environ.get("HOLOTENSOR_ENDPOINT")
        if not url:
            raise ConfigurationError(
                "NetworkConfig.endpoints is empty: name a server, as in NetworkConfig.custom_cdn('https://cdn.example.com'),"
                " or set HOLOTENSOR_ENDPOINT"
            )
        return self.with_endpoint(CdnEndpoint(url, auth=os.environ.get("HOLOTENSOR_TOKEN") or None))

    def with_endpoint(self, endpoint: CdnEndpoint) -> NetworkConfig:
        """This configuration, for this endpoint alone; what the environment decides, it still does."""
        return type(self)(**{**vars(self), "endpoints": (endpoint,)})


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def offline(setting: bool | None = None) -> bool:
    """Whether the network must not be asked: the setting, else ``HOLOTENSOR_OFFLINE``."""
    return _flag("HOLOTENSOR_OFFLINE") if setting is None else setting


def progress_bars_disabled() -> bool:
    """Whether ``HOLOTENSOR_DISABLE_PROGRESS_BARS`` asks for silence."""
    return _flag("HOLOTENSOR_DISABLE_PROGRESS_BARS")


def verbosity() -> str:
    """The log level that ``HOLOTENSOR_VERBOSITY`` names (``DEBUG`` … ``ERROR``), ``WARNING`` by default."""
    level = os.environ.get("HOLOTENSOR_VERBOSITY", "").strip().upper()
    return level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "WARNING"


def default_cache_dir() -> Path:
    """``HOLOTENSOR_CACHE``, ``HOLOTENSOR_HOME``/cache, or the platform's cache folder (``XDG_CACHE_HOME`` on Linux)."""
    if cache := os.environ.get("HOLOTENSOR_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HOLOTENSOR_HOME"):
        return Path(home).expanduser() / "cache"
    import platformdirs

    return Path(platformdirs.user_cache_dir("holotensor-net", appauthor=False))
