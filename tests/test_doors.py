"""The doors: every name of the interface is there, is what the interface says, and costs nothing until it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from typing import Any

import pytest

import holotensor_net
from holotensor_net import prelude

# The sections of the interface, and what each class must offer: methods and properties by name.
CONFIGURATION: dict[str, str] = {
    "CdnEndpoint": "url priority region supports_range max_connections headers auth verify proxies",
    "RetryConfig": "max_retries initial_backoff max_backoff multiplier jitter deadline",
    "NetworkConfig": "endpoints timeout connect_timeout max_concurrent chunk_size retry compression user_agent"
    " cache_dir max_cache_size monitor_bandwidth min_bandwidth max_bandwidth offline memory_budget"
    " client scheduler cache huggingface_hub civitai custom_cdn",
    "ClientConfig": "",
    "SchedulerConfig": "",
    "CacheConfig": "",
}
REQUESTS_AND_RESULTS: dict[str, str] = {
    "Priority": "CRITICAL HIGH NORMAL LOW IDLE",
    "RangeRequest": "start stop header_value length",
    "LoadRequest": "fragment_id path priority importance expected_size byte_range checksum deadline",
    "fragment_id_of": "",
    "LoadSuccess": "fragment_id is_success data duration from_cache error",
    "LoadFailure": "fragment_id is_success data duration from_cache error",
    "LoadResult": "",
    "NetworkError": "is_retryable",
    **dict.fromkeys(
        (
            *("HttpError", "ConnectionFailed", "Timeout", "StalledTransfer", "InvalidUrl", "NotFound"),
            *("ChecksumMismatch", "ProtocolError", "RangeNotSupported", "ObjectChanged", "CacheError"),
            *("RetriesExhausted", "RateLimited", "ConfigurationError", "DeadlineExceeded", "InsufficientDisk"),
            *("OfflineError", "FormatError", "Cancelled"),
        ),
        "is_retryable",
    ),
}
ENGINE: dict[str, str] = {
    "NetworkLoader": "load load_range enqueue enqueue_many stream update_priority cancel stats sync close"
    " __enter__ __exit__",
    "StreamingLoader": "start __iter__ __next__ next cancel __enter__ __exit__",
    "Scheduler": "enqueue enqueue_many next queue_len active completed failed bandwidth should_throttle update_priority"
    " stats clear",
    "PriorityQueue": "push pop peek __len__ __contains__ clear update_priority get_by_priority",
    "PrioritizedFragment": "effective_priority",
    "BandwidthMonitor": "record current_bandwidth average_bandwidth total_bytes estimate_time",
    "HttpClient": "fetch fetch_range head",
    "HeadInfo": "",
    "Fetcher": "",
}
CACHE: dict[str, str] = {
    "FragmentCache": "get put __contains__ get_entry needs_revalidation stats clear sync verify prune __iter__",
    "CacheEntry": "fragment_id size etag last_modified cached_at last_accessed access_count eviction_score",
    "CacheStats": "entries disk_size memory_size hits misses evictions hit_rate",
}
INTERFACE = CONFIGURATION | REQUESTS_AND_RESULTS | ENGINE | CACHE


def has(value: Any, member: str) -> bool:
    return hasattr(value, member) or member in {field.name for field in fields(value)}


@pytest.mark.parametrize("name", INTERFACE)
def test_each_name_of_the_interface_is_at_the_door_with_all_its_members(name: str) -> None:
    value = getattr(holotensor_net, name)
    assert name in holotensor_net.__all__
    assert [member for member in INTERFACE[name].split() if not has(value, member)] == []


@pytest.mark.parametrize("name", [name for name in holotensor_net.__all__ if name != "__version__"])
def test_what_is_at_the_door_is_what_its_room_exports(name: str) -> None:
    value = getattr(holotensor_net, name)
    home = sys.modules[f"holotensor_net.{holotensor_net._HOME[name]}"]
    assert value is getattr(home, name)
    assert name in home.__all__


def test_the_door_is_in_order() -> None:
    assert sorted(holotensor_net.__all__) == sorted(set(holotensor_net.__all__))
    assert set(holotensor_net.__all__) <= set(dir(holotensor_net))


def test_what_a_type_checker_sees_is_what_there_is() -> None:
    source = inspect.getsource(holotensor_net)
    seen = {line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from .") and " as " in line}
    assert seen == set(holotensor_net.__all__) - {"__version__"}


def test_what_is_not_there_is_missed_by_name() -> None:
    with pytest.raises(AttributeError, match="'holotensor_net' has no attribute 'nonsense'"):
        _ = holotensor_net.nonsense


def test_the_version_is_a_string() -> None:
    assert isinstance(holotensor_net.__version__, str)
    assert holotensor_net.__version__


def test_the_prelude_is_part_of_the_interface() -> None:
    assert set(prelude.__all__) <= set(holotensor_net.__all__)
    assert all(getattr(prelude, name) is getattr(holotensor_net, name) for name in prelude.__all__)


# Defaults of what users call; configurations are tested in their own room.
SIGNATURES: dict[str, dict[str, Any]] = {
    "NetworkLoader.load": {"request": MISSING},
    "NetworkLoader.load_range": {"request": MISSING, "start": MISSING, "stop": MISSING},
    "NetworkLoader.enqueue_many": {"requests": MISSING},
    "NetworkLoader.update_priority": {"fragment_id": MISSING, "priority": MISSING},
    "NetworkLoader.cancel": {"fragment_id": MISSING},
    "StreamingLoader": {"loader": MISSING, "path_prefix": "", "buffer": 256},
    "StreamingLoader.start": {"requests": MISSING},
    "StreamingLoader.next": {"timeout": None},
    "BandwidthMonitor.record": {"bytes": MISSING, "duration": MISSING},
    "BandwidthMonitor.estimate_time": {"bytes": MISSING},
    "PriorityQueue.get_by_priority": {"min_priority": MISSING},
    "HttpClient.fetch": {"path": MISSING},
    "HttpClient.head": {"path": MISSING},
    "FragmentCache.prune": {"max_size": MISSING},
    "CacheEntry.eviction_score": {"now": MISSING},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_calls_take_what_the_interface_says(name: str) -> None:
    owner, _, method = name.partition(".")
    value = getattr(holotensor_net, owner)
    parameters = inspect.signature(getattr(value, method) if method else value).parameters
    told = {
        key: MISSING if parameter.default is parameter.empty else parameter.default
        for key, parameter in parameters.items()
        if key != "self"
    }
    assert told == SIGNATURES[name]


IMPORT = """
import sys, threading
before = set(sys.modules)
def refuse(event, args):
    assert event != "socket.__new__", (event, args)
    assert event != "open" or "w" not in str(args[1]), (event, args)
sys.addaudithook(refuse)
import holotensor_net
names = dir(holotensor_net)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = loaded & {"numpy", "requests", "urllib3", "tenacity", "cachetools", "blake3", "concurrent"}
assert not heavy, heavy
assert threading.active_count() == 1
"""

PRELUDE = """
from holotensor_net.prelude import *
assert NetworkLoader and open_model and Priority.CRITICAL == 0
import sys
assert "numpy" not in sys.modules
"""


@pytest.mark.parametrize("script", [IMPORT, PRELUDE], ids=["package", "prelude"])
def test_importing_costs_next_to_nothing(script: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
