"""What is read through NVML, and what becomes of what a board does not support."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch
from fake_gpu import FakeNvml

from fastproj.bench.harness import telemetry
from fastproj.bench.harness.telemetry import FIELDS, LIMITS, REASONS, Snapshot, Telemetry, Window

UUID = "12345678-1234-1234-1234-123456789abc"
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """NVML over one board that torch calls device 3."""
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid=UUID, pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: properties}.__getitem__)
    return nvml


def test_a_snapshot_has_every_field_in_its_unit(board: FakeNvml) -> None:
    opened = telemetry.open_telemetry(3)
    assert opened.snapshot() == Snapshot(
        {
            "sm_clock_mhz": 1980,
            "memory_clock_mhz": 3201,
            "power_watts": 450.0,
            "energy_joules": 1000.5,
            "temperature_celsius": 61,
            "throttle_reasons": ["SwPowerCap", "HwThermalSlowdown"],
            "memory_used_bytes": 3 * 2**30,
        },
        {},
    )
    assert opened.limits().values == {
        "driver": "580.65.06",
        "max_sm_clock_mhz": 1990,
        "max_memory_clock_mhz": 3202,
        "power_limit_watts": 700.0,
        "persistence_mode": True,
    }
    opened.close()
    assert board.open == 0


@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetClockInfo", {"sm_clock_mhz", "memory_clock_mhz"}),
        ("nvmlDeviceGetPowerUsage", {"power_watts"}),
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_joules"}),
        ("nvmlDeviceGetTemperature", {"temperature_celsius"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttle_reasons"}),
        ("nvmlDeviceGetMemoryInfo", {"memory_used_bytes"}),
    ],
)
def test_what_a_board_lacks_is_none_with_its_reason_and_hides_nothing_else(
    board: FakeNvml, function: str, fields: set[str]
) -> None:
    board.fails[function] = NOT_SUPPORTED
    snapshot = telemetry.open_telemetry(3).snapshot()
    assert snapshot.missing == dict.fromkeys(fields, "Not Supported")
    assert {name for name, value in snapshot.values.items() if value is None} == fields


def test_older_drivers_tell_throttle_reasons_under_their_older_name(board: FakeNvml) -> None:
    board.fails["nvmlDeviceGetCurrentClocksEventReasons"] = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
    assert telemetry.open_telemetry(3).snapshot().values["throttle_reasons"] == ["GpuIdle"]


def test_reasons_are_the_bits_of_nvml() -> None:
    assert {name: getattr(pynvml, f"nvmlClocksEventReason{name}") for name in REASONS} == REASONS
    assert sum(REASONS.values()) == pynvml.nvmlClocksEventReasonAll
    assert telemetry.decode_reasons(0) == []
    assert telemetry.decode_reasons(0x4 | 0x1000) == ["SwPowerCap", "unknown 0x1000"]


def test_the_board_is_found_by_uuid_and_not_by_number(board: FakeNvml) -> None:
    assert telemetry.open_telemetry(3)._handle == f"handle of GPU-{UUID}"


def test_the_board_is_found_by_its_address_where_the_uuid_is_not_known(board: FakeNvml) -> None:
    board.fails["nvmlDeviceGetHandleByUUID"] = pynvml.NVML_ERROR_NOT_FOUND
    assert telemetry.open_telemetry(3)._handle == "handle of 00000000:1B:00.0"


def test_a_board_that_nvml_does_not_know_has_no_telemetry(board: FakeNvml) -> None:
    for function in ("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId"):
        board.fails[function] = pynvml.NVML_ERROR_NOT_FOUND
    opened = telemetry.open_telemetry(3)
    assert opened.absent == "NVML does not know this device: Not Found"
    assert board.open == 0
    assert set(opened.snapshot().missing) == set(FIELDS)


def test_torch_without_uuid_or_address_leaves_no_way_to_find_it(
    board: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    assert "does not know" in str(telemetry.open_telemetry(3).absent)


def test_no_nvml_and_no_gpu_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(nvmlInit=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    absent = telemetry.open_telemetry(0)
    assert absent.absent == "NVML: NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry.open_telemetry(0).absent == "nvidia-ml-py is not installed"
    cpu = telemetry.open_telemetry(None)
    assert cpu.limits() == Snapshot(dict.fromkeys(LIMITS), dict.fromkeys(LIMITS, "the CPU has no NVML"))
    with cpu.window() as window:
        pass
    assert window.during == []


def test_a_window_samples_while_the_work_lasts(board: FakeNvml) -> None:
    with telemetry.open_telemetry(3).window(period=1e-3) as window:
        deadline = time.monotonic() + 10
        while len(window.during) < 3 and time.monotonic() < deadline:
            time.sleep(1e-3)
    assert len(window.during) >= 3
    described = window.to_json(power=321.0)
    assert described["samples"] == len(window.during)
    assert described["during"]["sm_clock_mhz"] == 1980
    # The board's readings, 450 W, are averages that reach back before the work.
    assert described["during"]["power_watts"] == 321
    assert "power_watts" not in telemetry.summary(window.during)
    assert described["during"]["throttle_reasons"] == ["HwThermalSlowdown", "SwPowerCap"]
    assert described["after"]["energy_joules"] > described["before"]["energy_joules"]
    seen = len(window.during)
    time.sleep(5e-3)
    assert len(window.during) == seen, "the thread goes on after the window"


def test_work_that_fails_ends_the_sampling_and_is_not_hidden(board: FakeNvml) -> None:
    opened = telemetry.open_telemetry(3)
    with pytest.raises(RuntimeError, match="broken"), opened.window(period=1e-3) as window:
        raise RuntimeError("broken")
    assert window.after is not None


def window_of(before: float | None, after: float | None) -> Window:
    """A closed window with these energies, and samples of a power that must not be used."""

    def snapshot(energy: float | None) -> Snapshot:
        missing = {} if energy is not None else {"energy_joules": "Not Supported"}
        return Snapshot({**dict.fromkeys(FIELDS), "power_watts": 300.0, "energy_joules": energy}, missing)

    return Window(snapshot(before), [snapshot(before)], snapshot(after))


@pytest.mark.parametrize(
    ("window", "seconds", "want"),
    [
        (window_of(100.0, 160.0), 2.0, "energy counter"),
        (window_of(100.0, 160.0), 1.0, "energy counter"),
        (window_of(100.0, 160.0), 0.1, "the energy counter needs calls for 1 s, and these took 0.1 s"),
        (window_of(100.0, 100.0), 2.0, "the energy counter stood still"),
        (window_of(None, None), 2.0, "Not Supported"),
        (window_of(100.0, None), 2.0, "Not Supported"),
    ],
)
def test_energy_of_a_call(window: Window, seconds: float, want: str) -> None:
    """By the counter over a second at least, or not at all."""
    joules = pytest.approx(0.6) if want == "energy counter" else None
    assert telemetry.energy_per_call(window, calls=100, seconds=seconds) == (joules, want)


def test_an_idle_device_has_no_energy_of_a_call() -> None:
    window = window_of(100.0, 160.0)
    assert telemetry.energy_per_call(window, 100, 2.0, "it waits") == (None, "it waits")


def test_energy_needs_a_closed_window_and_calls() -> None:
    with pytest.raises(ValueError, match="closed window"):
        telemetry.energy_per_call(Window(Telemetry(absent="no").snapshot()), 1, 1.0)
    with pytest.raises(ValueError, match="one call"):
        telemetry.energy_per_call(window_of(1.0, 2.0), 0, 1.0)
