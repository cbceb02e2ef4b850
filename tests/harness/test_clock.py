"""How a call is timed: copies, graphs, medians, on a device that is not there."""

from __future__ import annotations

import gc
from itertools import count, cycle

import pytest
from fake_gpu import MIB, FakeDevice
from hypothesis import given
from hypothesis import strategies as st

from fastproj.bench.harness.clock import (
    MOST_COPIES,
    CudaClock,
    Subject,
    WallClock,
    copies_for,
    spread,
    wants_graph,
)

pytest.importorskip("triton")

from fastproj.kernels import _blocks

sizes = st.integers(1, 2**36)


@given(footprint=sizes, l2=st.integers(0, 2**28), free=st.integers(0, 2**38))
def test_copies_exceed_twice_the_cache_as_barely_as_can_be(footprint: int, l2: int, free: int) -> None:
    if free // 2 < footprint:
        with pytest.raises(ValueError, match="half of the free memory"):
            copies_for(footprint, footprint, l2, free)
        return
    rotation = copies_for(footprint, footprint, l2, free)
    assert 1 <= rotation.copies <= MOST_COPIES
    assert rotation.copies * footprint <= free // 2
    assert rotation.cold == (rotation.copies * footprint > 2 * l2)
    assert not rotation.cold or (rotation.copies - 1) * footprint <= 2 * l2


def test_one_copy_is_enough_where_it_alone_exceeds_twice_the_cache() -> None:
    assert copies_for(101 * MIB, 101 * MIB, 50 * MIB, 2**36).copies == 1
    assert copies_for(100 * MIB, 100 * MIB, 50 * MIB, 2**36).copies == 2


def test_what_bounds_the_copies_is_named() -> None:
    tables = copies_for(1, 1, MIB, 2**36)
    assert (tables.copies, tables.cold) == (MOST_COPIES, False)
    assert "tables" in tables.reason
    assert "memory allow 3 copies of 11" in copies_for(10 * MIB, 10 * MIB, 50 * MIB, 60 * MIB).reason


def test_every_copy_finds_its_table_again() -> None:
    """Each copy has a table of addresses of its own, which the kernels drop when too many came after it."""
    assert _blocks.address_table.cache_parameters()["maxsize"] > MOST_COPIES


@pytest.mark.parametrize(("footprint", "resident"), [(0, 1), (1, 0), (-1, 5)])
def test_sizes_must_be_positive(footprint: int, resident: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        copies_for(footprint, resident, MIB, MIB)


@pytest.mark.parametrize(
    ("host", "floor", "graph"),
    [
        *((0.28e-3, 5e-6, True), (0.92e-3, 100e-6, True), (2.4e-3, 1978e-6, True)),
        *((20e-6, 1e-3, False), (20e-6, 41e-6, False), (20e-6, 39e-6, True)),
    ],
)
def test_graphs_are_for_calls_that_the_host_could_hold_back(host: float, floor: float, graph: bool) -> None:
    """The first three are the workloads: what validation and launches cost, and the floors on an H100."""
    assert wants_graph(host, floor) == graph


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_a_short_call_is_replayed_from_cold_copies() -> None:
    """8 MiB each: thirteen copies pass 100 MiB; each is a graph of its own, and none is ever found cached."""
    device = FakeDevice()
    prepared = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 20e-6, launches=2))
    timing = prepared.measure(5)
    assert (timing.route, timing.copies, timing.cache) == ("graph", 13, "turns")
    assert device.captures == device.built == 13
    assert timing.seconds == pytest.approx(20e-6)
    assert timing.low == pytest.approx(timing.high)
    assert timing.host_seconds == pytest.approx(20e-6)
    assert "the host takes 20 µs a call, the device 20 µs: launches would be timed" in timing.reason
    assert prepared.idle is None


def test_a_graph_outlives_no_tensor_of_its_call() -> None:
    """A graph keeps nothing alive, and the clock alone knows the call."""
    device = FakeDevice()
    prepared = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 20e-6, launches=2))
    assert prepared.measure(1).route == "graph"
    gc.collect()
    assert prepared.sustain(1e-3)[0] >= 13


@pytest.mark.parametrize(("host", "seconds"), [(0.28e-3, 5e-6), (0.92e-3, 100e-6), (2.4e-3, 1978e-6)])
def test_a_slow_host_is_out_of_the_way(host: float, seconds: float) -> None:
    """Validation costs more than launches do, whatever their number, and the GPU works on between replays."""
    device = FakeDevice(launch=host / 2)
    prepared = CudaClock(device).prepare(device.subject(8 * MIB, lambda: seconds, launches=2))
    timing = prepared.measure(3)
    assert timing.route == "graph"
    assert timing.seconds == pytest.approx(seconds)
    assert timing.host_seconds == pytest.approx(host)
    assert prepared.idle is None
    calls, took = prepared.sustain(0.01)
    assert took == pytest.approx(calls * seconds, rel=0.05)


def test_the_device_idles_where_the_host_is_slower_and_no_graph_can_be() -> None:
    device = FakeDevice(launch=200e-6, refusal="no")
    prepared = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 30e-6))
    assert prepared.measure(1).route == "eager"
    assert "route eager, a call takes the host 200 µs to issue and the device 30 µs" in str(prepared.idle)


def test_the_device_idles_between_replays_that_are_shorter_than_their_launch() -> None:
    device = FakeDevice()
    prepared = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 1e-6))
    assert "route graph" in str(prepared.idle)


def test_events_of_short_calls_do_not_let_the_device_wait() -> None:
    """46 copies: what the host needs for events, more than for replays, is queued ahead of too."""
    device = FakeDevice()
    timing = CudaClock(device).prepare(device.subject(int(2.2 * MIB), lambda: 2e-6)).measure(3)
    assert (timing.route, timing.copies) == ("graph", 46)
    assert timing.seconds == pytest.approx(2e-6)


def test_a_long_call_is_timed_as_it_is() -> None:
    device = FakeDevice()
    prepared = CudaClock(device).prepare(device.subject(512 * MIB, lambda: 3e-3, launches=2))
    timing = prepared.measure(3)
    assert (timing.route, timing.copies, device.captures) == ("eager", 1, 0)
    assert timing.seconds == pytest.approx(3e-3)


@pytest.mark.parametrize("free", [2**34, 40 * MIB])
def test_the_cache_is_swept_where_copies_do_not_fill_it(free: int) -> None:
    """Few copies, for the tables or for memory, stay in the cache: without a sweep the warm time shows."""
    device = FakeDevice(free=free)
    timing = CudaClock(device).prepare(device.subject(MIB, lambda: 20e-6)).measure(3)
    assert timing.copies == min(MOST_COPIES, free // 2 // MIB)
    assert timing.seconds == pytest.approx(20e-6)
    assert device.sweeps >= 3 * timing.copies
    assert timing.cache == "sweep"
    assert "sweep" in timing.reason


@pytest.mark.parametrize("first", [0, 5])
def test_a_capture_that_fails_leaves_the_eager_route_and_its_reason(first: int) -> None:
    """The first or a later one; nothing runs on the stream it failed on."""
    device = FakeDevice(refusal="operation not permitted when stream is capturing", refused_from=first)
    timing = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 20e-6, launches=2)).measure(3)
    assert (timing.route, device.captures) == ("eager", first)
    assert "not permitted" in timing.reason
    # The device had work until all was queued, so that it never waited for the host's 20 µs a call.
    assert timing.seconds == pytest.approx(20e-6)


def test_the_device_never_waits_for_a_slow_host() -> None:
    device = FakeDevice(launch=200e-6, refusal="no")
    timing = CudaClock(device).prepare(device.subject(8 * MIB, lambda: 30e-6)).measure(3)
    assert timing.seconds == pytest.approx(30e-6)
    assert timing.host_seconds == pytest.approx(200e-6)


def test_a_round_is_the_mean_of_its_turn_and_the_figure_their_median() -> None:
    device = FakeDevice()
    times = cycle([1e-3, 2e-3])
    prepared = CudaClock(device).prepare(device.subject(64 * MIB, lambda: next(times)))
    assert prepared.measure(1).seconds == pytest.approx(1.5e-3)
    slow = count(1)
    one = CudaClock(device).prepare(device.subject(512 * MIB, lambda: next(slow) * 1e-3))
    began = next(slow) + 1
    timing = one.measure(5)
    assert timing.seconds == pytest.approx((began + 2) * 1e-3)
    assert (timing.low, timing.high) == (pytest.approx((began + 1) * 1e-3), pytest.approx((began + 3) * 1e-3))


def test_sustained_work_lasts_about_as_long_as_asked() -> None:
    device = FakeDevice()
    prepared = CudaClock(device).prepare(device.subject(512 * MIB, lambda: 3e-3))
    calls, seconds = prepared.sustain(0.3)
    assert calls == pytest.approx(100, abs=2)
    assert seconds == pytest.approx(calls * 3e-3, rel=0.01)


def test_sustained_work_is_no_shorter_than_asked_where_calls_become_faster() -> None:
    """The energy counter needs the time."""
    device = FakeDevice()
    pace = 3e-3
    prepared = CudaClock(device).prepare(device.subject(512 * MIB, lambda: pace))
    pace = 1e-3
    calls, seconds = prepared.sustain(0.3)
    assert 0.3 <= seconds < 0.32
    assert calls == pytest.approx(seconds / 1e-3, rel=0.01)  # launches of the first call of each batch


def test_no_round_is_refused() -> None:
    device = FakeDevice()
    with pytest.raises(ValueError, match="at least one"):
        CudaClock(device).prepare(device.subject(512 * MIB, lambda: 3e-3)).measure(0)


def test_the_wall_clock_repeats_short_calls_within_a_round() -> None:
    time = 0.0
    calls = 0

    def call() -> None:
        nonlocal time, calls
        time += 1e-3
        calls += 1

    prepared = WallClock(lambda: time).prepare(Subject(lambda seed: call, 1, 1, 1))
    before = calls
    timing = prepared.measure(4)
    assert (timing.route, timing.copies, timing.cache, timing.host_seconds) == ("wall", 1, "as left", None)
    assert prepared.idle is None
    assert timing.seconds == pytest.approx(1e-3)
    assert calls - before == 4 * 20
    assert prepared.sustain(0.01) == (pytest.approx(10, abs=1), pytest.approx(0.01, abs=1.1e-3))
