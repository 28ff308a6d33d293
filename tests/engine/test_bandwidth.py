import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holotensor_net.engine.bandwidth import BandwidthMonitor

MB = 1_000_000


def monitor_of(*records, window=2.0):
    monitor = BandwidthMonitor(window=window)
    for size, seconds in records:
        monitor.record(size, seconds)
    return monitor


def test_nothing_is_known_at_first():
    monitor = BandwidthMonitor()
    assert monitor.current_bandwidth == 0
    assert monitor.average_bandwidth == 0
    assert monitor.total_bytes == 0
    assert monitor.estimate_time(1) == math.inf


def test_average_is_total_bytes_over_total_seconds():
    monitor = monitor_of((10 * MB, 1.0), (50 * MB, 2.0))
    assert monitor.average_bandwidth == pytest.approx(20 * MB)
    assert monitor.total_bytes == 60 * MB


def test_current_follows_a_new_rate_within_two_windows_and_average_does_not():
    monitor = monitor_of(*[(50 * MB, 1.0)] * 30, *[(5 * MB, 1.0)] * 4)
    assert monitor.current_bandwidth < 12 * MB
    assert monitor.average_bandwidth > 40 * MB


def test_a_lump_in_a_moment_weighs_as_its_bytes_and_its_moment():
    steady = [(MB, 0.1)] * 100
    monitor = monitor_of(*steady, (MB // 10, 1e-6))
    assert monitor.current_bandwidth == pytest.approx(10 * MB, rel=0.02)


@pytest.mark.parametrize("duration", [0, 0.0, -1.0, -1e-9])
def test_bytes_without_a_duration_join_the_measurement_before(duration):
    monitor = monitor_of((MB, 1.0), (MB, duration))
    assert monitor.average_bandwidth == pytest.approx(2 * MB)
    assert monitor.total_bytes == 2 * MB
    assert MB < monitor.current_bandwidth < 4 * MB


def test_bytes_without_any_duration_are_counted_and_give_no_rate():
    monitor = monitor_of((MB, 0))
    assert monitor.total_bytes == MB
    assert monitor.current_bandwidth == monitor.average_bandwidth == 0
    assert monitor.estimate_time(MB) == math.inf


def test_time_is_estimated_at_the_current_rate():
    monitor = monitor_of(*[(MB, 1.0)] * 20, *[(2 * MB, 1.0)] * 40)
    assert monitor.estimate_time(20 * MB) == pytest.approx(10.0, rel=1e-3)
    assert monitor.estimate_time(0) == 0


@pytest.mark.parametrize(
    ("size", "duration"), [(-1, 1.0), (1, math.nan), (1, math.inf), (1, -math.inf)], ids=["size", "nan", "inf", "-inf"]
)
def test_what_cannot_be_measured_is_refused_and_not_counted(size, duration):
    monitor = BandwidthMonitor()
    with pytest.raises(ValueError, match="must be"):
        monitor.record(size, duration)
    assert monitor.total_bytes == 0


def test_fewer_than_no_bytes_cannot_be_estimated():
    with pytest.raises(ValueError, match="0 or more"):
        BandwidthMonitor().estimate_time(-1)


@pytest.mark.parametrize("window", [0, -1, math.inf, math.nan])
def test_a_window_is_a_finite_time(window):
    with pytest.raises(ValueError, match="window"):
        BandwidthMonitor(window=window)


durations = st.floats(0.001, 100.0)


@given(rate=st.floats(1.0, 1e10), parts=st.lists(durations, min_size=1, max_size=20))
def test_a_steady_rate_is_found_however_it_is_cut_into_records(rate, parts):
    monitor = BandwidthMonitor()
    for seconds in parts:
        monitor.record(rate * seconds, seconds)
    assert monitor.current_bandwidth == pytest.approx(rate)
    assert monitor.average_bandwidth == pytest.approx(rate)


@given(
    before=st.lists(st.tuples(st.integers(0, 10**12), durations), max_size=5),
    size=st.integers(0, 10**12),
    seconds=durations,
    parts=st.integers(1, 20),
)
def test_one_long_record_weighs_what_its_parts_would(before, size, seconds, parts):
    whole = monitor_of(*before, (size, seconds))
    cut = monitor_of(*before, *[(size / parts, seconds / parts)] * parts)
    assert whole.current_bandwidth == pytest.approx(cut.current_bandwidth, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 10**12), st.floats(0.01, 100.0)), min_size=1))
def test_the_current_rate_lies_between_the_slowest_and_the_fastest_record(records):
    rates = [size / seconds for size, seconds in records]
    current = monitor_of(*records).current_bandwidth
    assert min(rates) * (1 - 1e-9) <= current <= max(rates) * (1 + 1e-9)


def test_the_round_trip_is_the_least_of_late():
    monitor = BandwidthMonitor()
    assert monitor.round_trip == 0
    for seconds in (0.2, 0.02, 0.5, math.nan, 0.0, -1.0, math.inf):
        monitor.record_round_trip(seconds)
    assert monitor.round_trip == 0.02
    for _ in range(130):
        monitor.record_round_trip(0.1)
    assert monitor.round_trip == 0.1


def test_no_record_of_eight_threads_is_lost():
    monitor = BandwidthMonitor()
    threads = [threading.Thread(target=lambda: [monitor.record(3, 0.5) for _ in range(2000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert monitor.total_bytes == 8 * 2000 * 3
    assert monitor.average_bandwidth == pytest.approx(6.0)
