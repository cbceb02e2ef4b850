"""A measurement on a GPU from options to record, all but the device itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch
from fake_gpu import MIB, FakeDevice, FakeNvml
from rich.console import Console

from fastproj.bench.harness import session
from fastproj.bench.harness.clock import CudaClock
from fastproj.bench.harness.gate import GateRefusedError, GateResult
from fastproj.bench.harness.measure import copy_subject
from fastproj.bench.harness.record import Record, read_record, write_record
from fastproj.bench.harness.session import Options, take
from fastproj.bench.harness.suites import Case, WrongResultError
from fastproj.bench.harness.tables import show_record
from fastproj.bench.traffic.chips import CHIPS
from fastproj.bench.traffic.models import Traffic
from fastproj.bench.traffic.moves import Moves, Stream

COPY = 500e-6
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

    def run_gate(self, device: str, tests: Path | None) -> GateResult:
        self.events.append(f"gate on {device}")
        if self.gate:
            raise self.gate
        return GREEN

    def add(
        self, suite: str, size: int, seconds: float, launches: int = 1, wrong: bool = False, again: int = 0
    ) -> None:
        """A case that reads ``size`` bytes, and ``again`` of them twice where the L2 does not hold them."""
        streams = (
            Stream("kernel", "in", "load", size, size),
            Stream("kernel", "in", "load", again, again, resident=again, warm=True),
        )
        traffic = Traffic(suite, "w", Moves({"kernel": launches}, streams), size, 0, 1000, "fp32")

        def check() -> None:
            self.events.append(f"check {suite}")
            if wrong:
                raise WrongResultError(f"{suite}: result 0 is off")

        subject = self.device.subject(size, lambda: seconds, launches=launches)
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
    copy = fake.device.subject(2 * 2**28, lambda: COPY)
    monkeypatch.setattr("fastproj.bench.harness.measure.copy_subject", lambda size, device: copy)
    yield fake
    assert fake.nvml.open == 0


def test_a_row_holds_time_bandwidth_floor_and_energy(machine: Machine, tmp_path: Path) -> None:
    chip, size = CHIPS["H100"], 2**29
    machine.add("gram", size, 400e-6, launches=2)
    record = machine.take()
    assert machine.events == ["correctness suite", "gate on cuda", "copy bandwidth", "gram, w", "check gram"]
    (row,) = record.rows
    rate = 2 * 2**28 / COPY
    assert record.copy["bytes_per_second"] == pytest.approx(rate)
    assert row.seconds == pytest.approx(400e-6)
    assert (row.route, row.copies, row.cold, row.launches) == ("eager", 1, True, 2)
    assert row.gigabytes_per_second == pytest.approx(size / 400e-6 / 1e9)
    assert row.of_copy == pytest.approx(size / 400e-6 / rate)
    floor = size / chip.memory_bytes_per_second
    assert (row.floor_seconds, row.bound) == (pytest.approx(floor), "memory")
    assert row.of_floor == pytest.approx(floor / 400e-6)
    assert row.energy_source == "energy counter"
    assert row.energy_joules is not None
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
    assert machine.events == ["correctness suite", "gate on cuda"]
    assert machine.device.built == 0


def test_a_wrong_result_ends_the_measurement_before_its_time_is_taken(machine: Machine) -> None:
    machine.add("gram", 2**29, 400e-6, wrong=True)
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
    machine = {"device": "AMD Instinct MI300X", "l2_bytes": 4 * MIB}
    setting = session.setting_for(Options("cuda"), machine, 0, None)  # type: ignore[arg-type]
    assert asked == [setting.l2_bytes] == [CHIPS["MI300X"].l2_bytes]
    assert isinstance(setting.clock, CudaClock)


def test_the_copy_copies() -> None:
    subject = copy_subject(4096, "cpu")
    target = subject.build(3)()
    assert isinstance(target, torch.Tensor)
    assert target.tolist() == [3.0] * 1024
    assert subject.footprint == 2 * 4096
