"""A measurement on a GPU from options to record, all but the device itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch
from fake_gpu import MIB, FakeDevice, FakeNvml
from rich.console import Console
from triton.runtime.errors import OutOfResources

from fastproj.bench.harness import session
from fastproj.bench.harness.case import Case, WrongResultError
from fastproj.bench.harness.clock import CudaClock
from fastproj.bench.harness.gate import GateRefusedError, GateResult
from fastproj.bench.harness.measure import copy_subject
from fastproj.bench.harness.record import Record, read_record, write_record
from fastproj.bench.harness.session import Options, take
from fastproj.bench.harness.tables import show_record
from fastproj.bench.traffic.chips import CHIPS
from fastproj.bench.traffic.models import Traffic
from fastproj.bench.traffic.moves import Moves, Stream

COPY = 500e-6
START = "correctness suite: minutes on a GPU, where every kernel is compiled first"
GREEN = GateResult("-m pytest -m gpu", 12, 1, 3.0, "c" * 40, False)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    L2_cache_size=50 * MIB,
    multi_processor_count=132,
    uuid="12345678-1234-1234-1234-123456789abc",
)


class Machine:
    """Everything that a measurement meets, with cases of its own choice."""

    def __init__(self) -> None:
        self.device = FakeDevice(free=2**34)
        self.nvml = FakeNvml()
        self.events: list[str] = []
        self.cases: list[Case] = []
        self.gate: Exception | None = None
        self.copy_seconds: Callable[[], float] = lambda: COPY

    def run_gate(self, device: str, tests: Path | None) -> GateResult:
        self.events.append(f"gate on {device}")
        if self.gate:
            raise self.gate
        return GREEN

    def add(
        self,
        suite: str,
        size: int,
        seconds: float | Callable[[], float],
        launches: int = 1,
        error: Exception | None = None,
        again: int = 0,
    ) -> None:
        """A case that reads ``size`` bytes, and ``again`` of them twice where the L2 does not hold them.

        ``error`` is what its check raises.
        """
        streams = (
            Stream("kernel", "in", "load", size, size),
            Stream("kernel", "in", "load", again, again, resident=again, warm=True),
        )
        traffic = Traffic(suite, "w", Moves({"kernel": launches}, streams), size, 0, 1000, "fp32")

        def check() -> None:
            self.events.append(f"check {suite}")
            if error:
                raise error

        took = seconds if callable(seconds) else lambda: seconds
        subject = self.device.subject(size, took, launches=launches)
        self.cases.append(Case(suite, "w", "", "fp32", traffic, subject, check))

    def take(self, **options: object) -> Record:
        return take(Options("cuda", rounds=5, **options), "fastproj bench", self.events.append)  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    fake = Machine()
    monkeypatch.setitem(sys.modules, "pynvml", fake.nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: PROPERTIES)
    monkeypatch.setattr(session, "run_gate", fake.run_gate)
    monkeypatch.setattr(session, "cases", lambda suites, workloads, device: fake.cases)
    monkeypatch.setattr(session, "CudaDevice", lambda index, l2_bytes: fake.device)
    copy = fake.device.subject(2 * 2**28, lambda: fake.copy_seconds())  # noqa: PLW0108 - it is replaced later
    monkeypatch.setattr("fastproj.bench.harness.measure.copy_subject", lambda size, device: copy)
    yield fake
    assert fake.nvml.open == 0


def test_a_row_holds_time_bandwidth_floor_and_energy(machine: Machine, tmp_path: Path) -> None:
    chip, size = CHIPS["H100"], 2**29
    machine.add("gram", size, 400e-6, launches=2)
    record = machine.take()
    assert machine.events == [START, "gate on cuda", "copy bandwidth", "gram, w", "check gram"]
    (row,) = record.rows
    rate = 2 * 2**28 / COPY
    assert record.copy["bytes_per_second"] == pytest.approx(rate)
    assert (record.copy["route"], record.copy["cache"]) == ("eager", "turns")
    assert row.seconds == pytest.approx(400e-6)
    assert (row.route, row.copies, row.cache, row.launches) == ("eager", 1, "turns", 2)
    assert row.gigabytes_per_second == pytest.approx(size / 400e-6 / 1e9)
    assert row.of_copy == pytest.approx(size / 400e-6 / rate)
    floor = size / chip.memory_bytes_per_second
    assert (row.floor_seconds, row.bound) == (pytest.approx(floor), "memory")
    assert row.of_floor == pytest.approx(floor / 400e-6)
    assert row.energy_source == "energy counter"
    assert row.energy_joules is not None
    # The calls follow each other without a gap, so that energy is power × time of one.
    assert row.telemetry["during"]["power_watts"] == pytest.approx(row.energy_joules / row.seconds, rel=0.01)
    assert row.telemetry["before"]["temperature_celsius"] == 61
    assert row.missing == {}
    assert record.machine["capability"] == "sm_90"
    assert record.machine["power_limit_watts"] == 700
    assert (record.gate["passed"], record.gate["commit"]) == (12, "c" * 40)
    write_record(record, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record


def test_what_is_read_again_past_the_cache_is_counted(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6, again=2**29)
    machine.add("combine", 2**25, 400e-6, again=2**25)
    large, small = machine.take().rows
    assert (large.bytes_moved, large.bytes_least) == (2**30, 2**29)
    assert (small.bytes_moved, small.bytes_least) == (2**25, 2**25)


def test_an_unknown_chip_has_no_floor_and_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROPERTIES, "name", "NVIDIA T4")
    machine.add("gram", 2**29, 400e-6)
    (row,) = machine.take().rows
    assert row.floor_seconds is row.bound is row.of_floor is None
    assert row.missing == {"floor_seconds": "no roofline is known of NVIDIA T4"}


def test_a_board_without_counter_or_power_has_no_energy_and_says_so(machine: Machine) -> None:
    for function in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"):
        machine.nvml.fails[function] = pynvml.NVML_ERROR_NOT_SUPPORTED
    machine.add("gram", 2**29, 400e-6)
    (row,) = machine.take().rows
    assert row.energy_joules is None
    assert row.missing == {"energy_joules": "Not Supported"}
    assert row.telemetry["missing"]["energy_joules"] == "Not Supported"


def test_no_case_is_touched_after_a_red_suite(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6)
    machine.gate = GateRefusedError("2 tests failed")
    with pytest.raises(GateRefusedError, match="2 tests failed"):
        machine.take()
    assert machine.events == [START, "gate on cuda"]
    assert machine.device.built == 0


def test_a_wrong_result_ends_the_measurement_before_its_time_is_taken(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6, error=WrongResultError("gram: result 0 is off"))
    with pytest.raises(WrongResultError, match="gram: result 0 is off"):
        machine.take()
    assert machine.device.built == 1  # the copy's buffers


def test_a_call_that_does_not_fit_is_left_out_by_name(machine: Machine) -> None:
    machine.add("gram", 2**34, 1.0)
    machine.add("combine", 2**29, 400e-6)
    record = machine.take()
    assert [row.suite for row in record.rows] == ["combine"]
    assert set(record.skipped) == {"gram, w"}
    console = Console(record=True, width=120)
    show_record(record, console)
    shown = console.export_text()
    assert "gram, w: not timed, the inputs take 16.00 GiB" in shown
    assert "12 tests passed first" in shown
    assert "copy bandwidth 1073.7 GB/s" in shown


def test_throttling_is_told(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6)
    record = machine.take()
    row = record.rows[0]
    row.telemetry["during"]["throttle_reasons"] = ["GpuIdle", "SwPowerCap"]
    console = Console(record=True, width=120)
    show_record(record, console)
    assert "clocks were held back by SwPowerCap" in console.export_text()


def test_the_clock_leaves_the_whole_last_cache_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """MI300X: what its driver calls L2 is a die's own; the cache before the memory is larger."""
    asked: list[int] = []
    monkeypatch.setattr(session, "CudaDevice", lambda index, l2_bytes: asked.append(l2_bytes))
    machine = {"device": "AMD Instinct MI300X", "l2_bytes": 4 * MIB, "memory_bytes": 192 * 2**30}
    setting = session.setting_for(Options("cuda"), machine, 0, None)  # type: ignore[arg-type]
    assert asked == [setting.l2_bytes] == [CHIPS["MI300X"].l2_bytes]
    assert setting.chip == CHIPS["MI300X"]
    assert isinstance(setting.clock, CudaClock)
    larger = session.setting_for(Options("cuda"), {**machine, "l2_bytes": 512 * MIB}, 0, None)  # type: ignore[arg-type]
    assert asked[1] == larger.l2_bytes == 512 * MIB
    assert larger.chip == replace(CHIPS["MI300X"], l2_bytes=512 * MIB)


def test_a_chip_with_other_memory_is_not_held_to_the_table(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PROPERTIES, "total_memory", 64 * 2**30)
    machine.add("gram", 2**29, 400e-6)
    assert set(machine.take().rows[0].missing) == {"floor_seconds"}


def test_bytes_and_floor_speak_of_one_cache(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver's L2 of 60 MiB keeps is read once, though the table's of 50 would not keep it."""
    monkeypatch.setattr(PROPERTIES, "L2_cache_size", 60 * MIB)
    machine.add("gram", 2**29, 400e-6, again=55 * MIB)
    (row,) = machine.take().rows
    assert row.bytes_moved == 2**29
    assert row.floor_seconds == pytest.approx(row.bytes_moved / CHIPS["H100"].memory_bytes_per_second)


def test_the_copy_is_measured_on_warm_clocks(machine: Machine) -> None:
    """A copy takes twice its time until the device has worked for a while."""
    started = machine.device
    machine.copy_seconds = lambda: COPY if started.ready > 1.0 else 2 * COPY
    machine.add("gram", 2**29, 400e-6)
    assert machine.take().copy["seconds"] == pytest.approx(COPY)


def test_an_idle_device_gives_no_energy(machine: Machine) -> None:
    machine.device.launch, machine.device.refusal = 1e-3, "not now"
    machine.add("gram", 2**29, 400e-6)
    (row,) = machine.take().rows
    assert row.energy_joules is row.telemetry["during"]["power_watts"] is None
    assert "the device idles" in row.missing["energy_joules"]
    assert row.seconds == pytest.approx(400e-6)


def test_a_quick_run_is_too_short_for_the_energy_counter(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6)
    (row,) = machine.take(quick=True).rows
    assert row.energy_joules is row.telemetry["during"]["power_watts"] is None
    assert "needs calls for 1 s" in row.missing["energy_joules"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        OutOfResources(300_000, 232_448, "shared memory"),
    ],
)
@pytest.mark.parametrize("when", ["checked", "timed"])
def test_a_call_that_fails_costs_no_other_its_row(machine: Machine, error: Exception, when: str) -> None:
    def fail() -> float:
        raise error

    machine.add("gram", 2**29, 400e-6)
    if when == "checked":
        machine.add("edge", 2**29, 400e-6, error=error)
    else:
        machine.add("edge", 2**29, fail)
    machine.add("combine", 2**29, 400e-6)
    record = machine.take()
    assert [row.suite for row in record.rows] == ["gram", "combine"]
    assert record.skipped == {"edge, w": str(error).split("\n", maxsplit=1)[0]}


def test_the_copy_copies() -> None:
    subject = copy_subject(4096, "cpu")
    target = subject.build(3)()
    assert isinstance(target, torch.Tensor)
    assert target.tolist() == [3.0] * 1024
    assert subject.footprint == 2 * 4096
