"""What NVML tells of a GPU while it works: clocks, power, energy, temperature, throttling, memory.

Every field may be missing on one board or another; a missing one is None, and the reason is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

SAMPLE_SECONDS = 0.02
# Boards renew their energy counter about every tenth of a second.
SHORTEST_WINDOW = 1.0
# Bits of NVML's clock event reasons, in the names of its constants without their prefix.
REASONS = {
    "GpuIdle": 0x1,
    "ApplicationsClocksSetting": 0x2,
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
    "DisplayClockSetting": 0x100,
}


@dataclass(frozen=True)
class Snapshot:
    """Values of FIELDS at one time; ``missing`` says of each that is None why."""

    values: dict[str, Any]
    missing: dict[str, str]


@dataclass
class Window:
    """Snapshots before, during and after some work."""

    before: Snapshot
    during: list[Snapshot] = field(default_factory=list)
    after: Snapshot | None = None

    def to_json(self, power: float | None) -> dict[str, Any]:
        """Means over the samples taken during the work, the reasons met in any of them, and both ends.

        ``power`` is the work's mean in watts, by its energy: the board's own readings are averages over the
        last second on most boards since Ampere, and so speak of what was before the work as well.
        """
        return {
            "before": self.before.values,
            "during": {**summary(self.during), "power_watts": power},
            "after": self.after.values if self.after else None,
            "samples": len(self.during),
            "missing": self.before.missing,
        }


Reader = Callable[[Any, Any], Any]


def _throttle_reasons(nvml: Any, handle: Any) -> list[str]:
    """Older drivers know them under another name."""
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError as error:
        if error.value != nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return decode_reasons(bits)


def decode_reasons(bits: int) -> list[str]:
    """The names of the bits that are set; bits without a name are given as a number."""
    names = [name for name, bit in REASONS.items() if bits & bit]
    unknown = bits & ~sum(REASONS.values())
    return [*names, *([f"unknown {unknown:#x}"] if unknown else [])]


FIELDS: dict[str, Reader] = {
    "sm_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "power_watts": lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    "energy_joules": lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
    "temperature_celsius": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(
        handle, nvml.NVML_TEMPERATURE_GPU
    ),
    "throttle_reasons": _throttle_reasons,
    "memory_used_bytes": lambda nvml, handle: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
}
LIMITS: dict[str, Reader] = {
    "driver": lambda nvml, handle: nvml.nvmlSystemGetDriverVersion(),
    "max_sm_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
    "max_memory_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "power_limit_watts": lambda nvml, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
    "persistence_mode": lambda nvml, handle: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
}


class Telemetry:
    """Reads one GPU; ``absent`` says why nothing can be read, and is None where something can."""

    def __init__(self, nvml: Any = None, handle: Any = None, absent: str | None = None) -> None:
        self._nvml, self._handle, self.absent = nvml, handle, absent

    def read(self, readers: Mapping[str, Reader]) -> Snapshot:
        """Every field by itself: one that the board lacks hides no other."""
        values: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, reader in readers.items():
            values[name] = None
            if self.absent is not None:
                missing[name] = self.absent
                continue
            try:
                values[name] = reader(self._nvml, self._handle)
            except self._nvml.NVMLError as error:
                missing[name] = str(error)
        return Snapshot(values, missing)

    def snapshot(self) -> Snapshot:
        """FIELDS as they are now."""
        return self.read(FIELDS)

    def limits(self) -> Snapshot:
        """LIMITS: what the board may do at most."""
        return self.read(LIMITS)

    @contextmanager
    def window(self, period: float = SAMPLE_SECONDS) -> Iterator[Window]:
        """Sample from a thread every ``period`` seconds while the body works."""
        window = Window(self.snapshot())
        over = threading.Event()

        def sample() -> None:
            while not over.wait(period):
                window.during.append(self.snapshot())

        thread = threading.Thread(target=sample, daemon=True)
        if self.absent is None:
            thread.start()
        try:
            yield window
        finally:
            over.set()
            if self.absent is None:
                thread.join()
            window.after = self.snapshot()

    def close(self) -> None:
        """Let NVML go."""
        if self.absent is None:
            self._nvml.nvmlShutdown()
            self.absent = "closed"


def open_telemetry(index: int | None) -> Telemetry:
    """Telemetry of torch's CUDA device ``index``; None is the CPU, which has none."""
    if index is None:
        return Telemetry(absent="the CPU has no NVML")
    try:
        import pynvml as nvml
    except ImportError:
        return Telemetry(absent="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Telemetry(absent=f"NVML: {error}")
    try:
        return Telemetry(nvml, find_handle(nvml, *identity_of(index)))
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        return Telemetry(absent=f"NVML does not know this device: {error}")


def identity_of(index: int) -> tuple[str | None, str | None]:
    """(UUID, PCI address) of torch's CUDA device; its number is no use: the environment may renumber."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    parts: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    address = None if None in parts else "{:08X}:{:02X}:{:02X}.0".format(*parts)
    return None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}", address


def find_handle(nvml: Any, uuid: str | None, address: str | None) -> Any:
    """NVML's handle by UUID, else by PCI address. Raises NVMLError where neither is known to it."""
    if uuid is not None:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError:
            if address is None:
                raise
    if address is None:
        raise nvml.NVMLError(nvml.NVML_ERROR_NOT_FOUND)
    return nvml.nvmlDeviceGetHandleByPciBusId(address)


def summary(samples: list[Snapshot]) -> dict[str, Any]:
    """Mean of each number over the samples that have it and every throttle reason met, else None.

    Not of energy, which is a counter, nor of power (see ``Window.to_json``).
    """
    result: dict[str, Any] = {}
    for name in FIELDS:
        found = [sample.values[name] for sample in samples if sample.values[name] is not None]
        if name == "throttle_reasons":
            result[name] = sorted({reason for reasons in found for reason in reasons}) if found else None
        elif name not in ("energy_joules", "power_watts"):
            result[name] = fmean(found) if found else None
    return result


def energy_per_call(
    window: Window, calls: int, seconds: float, idle: str | None = None
) -> tuple[float | None, str]:
    """(joules a call by the difference of the energy counter, "energy counter"), or (None, why).

    ``seconds`` is what the calls took together, ``idle`` why the device waited between them, if it did: the
    energy is then that of waiting. Raises ValueError for a window that is open and for no call.
    """
    before, after = window.before, window.after
    if after is None or calls < 1:
        raise ValueError("expected a closed window and at least one call")
    ends = before.values["energy_joules"], after.values["energy_joules"]
    if None in ends:
        return None, {**before.missing, **after.missing}["energy_joules"]
    if idle is not None:
        return None, idle
    if seconds < SHORTEST_WINDOW:
        return (
            None,
            f"the energy counter needs calls for {SHORTEST_WINDOW:g} s, and these took {seconds:.2g} s",
        )
    if ends[1] <= ends[0]:
        return None, "the energy counter stood still"
    return (ends[1] - ends[0]) / calls, "energy counter"
