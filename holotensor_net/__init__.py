"""Stream model weights from web servers: the important tensors first, verified, cached, resumable.

::

    import holotensor_net

    with holotensor_net.open_model("https://cdn.example.com/model.safetensors.index.json") as model:
        for name, array in model.stream():
            ...

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import CacheConfig as CacheConfig
    from .config import CdnEndpoint as CdnEndpoint
    from .config import ClientConfig as ClientConfig
    from .config import NetworkConfig as NetworkConfig
    from .config import RetryConfig as RetryConfig
    from .config import SchedulerConfig as SchedulerConfig
    from .engine.bandwidth import BandwidthMonitor as BandwidthMonitor
    from .engine.fetcher import Fetcher as Fetcher
    from .engine.loader import LoaderStats as LoaderStats
    from .engine.loader import NetworkLoader as NetworkLoader
    from .engine.priority import PrioritizedFragment as PrioritizedFragment
    from .engine.priority import PriorityQueue as PriorityQueue
    from .engine.scheduler import Scheduler as Scheduler
    from .engine.streaming import StreamingLoader as StreamingLoader
    from .errors import CacheError as CacheError
    from .errors import Cancelled as Cancelled
    from .errors import ChecksumMismatch as ChecksumMismatch
    from .errors import ConfigurationError as ConfigurationError
    from .errors import ConnectionFailed as ConnectionFailed
    from .errors import DeadlineExceeded as DeadlineExceeded
    from .errors import FormatError as FormatError
    from .errors import HttpError as HttpError
    from .errors import InsufficientDisk as InsufficientDisk
    from .errors import InvalidUrl as InvalidUrl
    from .errors import NetworkError as NetworkError
    from .errors import NotFound as NotFound
    from .errors import ObjectChanged as ObjectChanged
    from .errors import OfflineError as OfflineError
    from .errors import ProtocolError as ProtocolError
    from .errors import RangeNotSupported as RangeNotSupported
    from .errors import RateLimited as RateLimited
    from .errors import RetriesExhausted as RetriesExhausted
    from .errors import StalledTransfer as StalledTransfer
    from .errors import Timeout as Timeout
    from .model.remote import LoadPlan as LoadPlan
    from .model.remote import LoadReport as LoadReport
    from .model.remote import RemoteModel as RemoteModel
    from .model.remote import open_model as open_model
    from .storage.cache import CacheEntry as CacheEntry
    from .storage.cache import CacheStats as CacheStats
    from .storage.cache import FragmentCache as FragmentCache
    from .stream_cache.cache import StreamCache as StreamCache
    from .stream_cache.keys import CacheKey as CacheKey
    from .stream_cache.tiers import StreamCacheStats as StreamCacheStats
    from .transport.client import HttpClient as HttpClient
    from .values import HeadInfo as HeadInfo
    from .values import LoadFailure as LoadFailure
    from .values import LoadRequest as LoadRequest
    from .values import LoadResult as LoadResult
    from .values import LoadSuccess as LoadSuccess
    from .values import Priority as Priority
    from .values import RangeRequest as RangeRequest
    from .values import Result as Result
    from .values import Validator as Validator
    from .values import fragment_id_of as fragment_id_of

_ROOMS = {
    "config": ("CacheConfig", "CdnEndpoint", "ClientConfig", "NetworkConfig", "RetryConfig", "SchedulerConfig"),
    "engine.bandwidth": ("BandwidthMonitor",),
    "engine.fetcher": ("Fetcher",),
    "engine.loader": ("LoaderStats", "NetworkLoader"),
    "engine.priority": ("PrioritizedFragment", "PriorityQueue"),
    "engine.scheduler": ("Scheduler",),
    "engine.streaming": ("StreamingLoader",),
    "errors": (
        "CacheError",
        "Cancelled",
        "ChecksumMismatch",
        "ConfigurationError",
        "ConnectionFailed",
        "DeadlineExceeded",
        "FormatError",
        "HttpError",
        "InsufficientDisk",
        "InvalidUrl",
        "NetworkError",
        "NotFound",
        "ObjectChanged",
        "OfflineError",
        "ProtocolError",
        "RangeNotSupported",
        "RateLimited",
        "RetriesExhausted",
        "StalledTransfer",
        "Timeout",
    ),
    "model.remote": ("LoadPlan", "LoadReport", "RemoteModel", "open_model"),
    "storage.cache": ("CacheEntry", "CacheStats", "FragmentCache"),
    "stream_cache.cache": ("StreamCache",),
    "stream_cache.keys": ("CacheKey",),
    "stream_cache.tiers": ("StreamCacheStats",),
    "transport.client": ("HttpClient",),
    "values": (
        "HeadInfo",
        "LoadFailure",
        "LoadRequest",
        "LoadResult",
        "LoadSuccess",
        "Priority",
        "RangeRequest",
        "Result",
        "Validator",
        "fragment_id_of",
    ),
}

_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "__version__",
    *sorted(_HOME),
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from .config import version

        return version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
