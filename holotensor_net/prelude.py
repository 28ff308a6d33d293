"""What a notebook needs: ``from holotensor_net.prelude import *``."""

from __future__ import annotations

from .config import CdnEndpoint, NetworkConfig, RetryConfig
from .engine.loader import NetworkLoader
from .engine.streaming import StreamingLoader
from .errors import NetworkError
from .model.remote import RemoteModel, open_model
from .stream_cache.cache import StreamCache
from .stream_cache.keys import CacheKey
from .values import LoadFailure, LoadRequest, LoadResult, LoadSuccess, Priority, RangeRequest

__all__ = [
    "CacheKey",
    "CdnEndpoint",
    "LoadFailure",
    "LoadRequest",
    "LoadResult",
    "LoadSuccess",
    "NetworkConfig",
    "NetworkError",
    "NetworkLoader",
    "Priority",
    "RangeRequest",
    "RemoteModel",
    "RetryConfig",
    "StreamCache",
    "StreamingLoader",
    "open_model",
]
