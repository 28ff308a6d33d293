"""How fast bytes have been coming. It measures and decides nothing."""

from __future__ import annotations

import math
import threading

from ..errors import ConfigurationError

__all__ = ["BandwidthMonitor"]

_BLOCK = 64


class BandwidthMonitor:
    """Bytes and the seconds that they took, as a rate: lately, and over all.

    ``window``: seconds of transfer after which a measurement counts 1/e. Time that passes without a record is no
    measurement and ages nothing. Thread-safe: one lock guards the sums.
    """

    def __init__(self, *, window: float = 2.0) -> None:
        if not 0 < window < math.inf:
            raise ConfigurationError(f"BandwidthMonitor.window must be a number of seconds above 0, not {window!r}")
        self._window = window
        self._lock = threading.Lock()
        self._total_bytes = 0
        self._total_seconds = 0.0
        self._recent_bytes = 0.0
        self._recent_seconds = 0.0
        self._round_trips = [math.inf, math.inf]  # the least of this block of answers, and of the one before
        self._answers = 0

    def record(self, bytes: int, duration: float) -> None:
        """Count bytes that came within ``duration`` seconds. Without a duration they are added to the measurement
        before, as they came in the same breath.

        Raises ConfigurationError (a ValueError) for fewer than 0 bytes, or a duration that is no finite number.
        """
        if bytes < 0:
            raise ConfigurationError(f"bytes must be 0 or more, not {bytes!r}: record what arrived")
        if not math.isfinite(duration):
            raise ConfigurationError(f"duration must be a number of seconds, not {duration!r}")
        duration = max(0.0, duration)
        # The integral of the weight e^(−age/window) over the duration: one long record weighs what its parts would.
        age = duration / self._window
        weight = -math.expm1(-age) / age if age else 1.0
        with self._lock:
            self._total_bytes += bytes
            self._total_seconds += duration
            self._recent_bytes = self._recent_bytes * math.exp(-age) + bytes * weight
            self._recent_seconds = self._recent_seconds * math.exp(-age) + duration * weight

    def record_round_trip(self, seconds: float) -> None:
        """Count the seconds from a question to the first bytes of its answer."""
        if not 0 < seconds < math.inf:
            return
        with self._lock:
            self._answers += 1
            if self._answers % _BLOCK == 0:
                self._round_trips = [math.inf, self._round_trips[0]]
            self._round_trips[0] = min(self._round_trips[0], seconds)

    @property
    def round_trip(self) -> float:
        """The least seconds from a question to its answer, of the last hundred or so; 0 before anything is known.

        The least, as all the rest of what an answer may take is not the path's: connecting, queues, the server's disk.
        """
        with self._lock:
            least = min(self._round_trips)
            return least if least < math.inf else 0.0

    @property
    def current_bandwidth(self) -> float:
        """Bytes/s over the last seconds of transfer, weighted by time and so by bytes; 0 before anything is known."""
        with self._lock:
            return self._recent_bytes / self._recent_seconds if self._recent_seconds else 0.0

    @property
    def average_bandwidth(self) -> float:
        """Bytes/s over all records; 0 before anything is known."""
        with self._lock:
            return self._total_bytes / self._total_seconds if self._total_seconds else 0.0

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    def estimate_time(self, bytes: int) -> float:
        """Seconds that so many bytes will take at the current rate; infinite when nothing is known.

        Raises ConfigurationError (a ValueError) for fewer than 0 bytes.
        """
        if bytes < 0:
            raise ConfigurationError(f"bytes must be 0 or more, not {bytes!r}")
        rate = self.current_bandwidth
        return bytes / rate if rate else math.inf
