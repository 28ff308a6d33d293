"""Results of filters with a fixed state: computed once, by anyone."""

from .cache import StreamCache as StreamCache
from .keys import CacheKey as CacheKey
from .tiers import StreamCacheStats as StreamCacheStats
