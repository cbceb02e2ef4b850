"""A GPU that is not there: a device with a queue, a clock and a cache, and NVML answering from a table."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from fastproj.bench.harness.clock import Subject
from fastproj.bench.harness.device import CaptureRefusedError

MIB = 2**20
SWEEP = 100e-6
REPLAY = 2e-6
RECORD = 3e-6


class FakeMoment:
    """Passed when the device has done what was queued before."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.time = -1.0

    def record(self) -> None:
        self._device.host += RECORD
        self.time = max(self._device.ready, self._device.host)

    def seconds_until(self, later: Any) -> float:
        assert self._device.ready <= self._device.host, "read before the device was waited for"
        return float(later.time - self.time)


class FakeDevice:
    """Host and device run side by side: a launch costs the host ``launch`` seconds, and kernels queue up.

    A kernel whose data the cache still holds takes its warm time. ``refusal`` is what a capture fails with
    after ``refused_from`` that did not; the stream it was tried on is of no use from then on.
    """

    def __init__(
        self,
        l2: int = 50 * MIB,
        free: int = 2**34,
        launch: float = 10e-6,
        refusal: str | None = None,
        refused_from: int = 0,
    ) -> None:
        self.l2, self.free, self.launch = l2, free, launch
        self.refusal, self.refused_from = refusal, refused_from
        self.host = self.ready = 0.0
        self.sweeps = self.captures = self.built = self.depth = 0
        self._replaying = self._spoilt = False
        self._cache: dict[int, int] = {}

    def l2_bytes(self) -> int:
        return self.l2

    def free_bytes(self) -> int:
        return self.free

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self.ready)

    def moment(self) -> FakeMoment:
        return FakeMoment(self)

    @contextmanager
    def working(self) -> Iterator[None]:
        self.depth += 1
        self._spoilt = False
        try:
            yield
        finally:
            self.depth -= 1
        self.synchronize()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        if self.refusal is not None and self.captures >= self.refused_from:
            self._spoilt = True
            raise CaptureRefusedError(self.refusal)
        self.captures += 1
        # As a graph does, it knows the addresses of the call's tensors and keeps none of them alive.
        known = weakref.ref(call)

        def replay() -> None:
            captured = known()
            assert captured is not None, "replayed after the call's tensors were freed"
            self.host += REPLAY
            self._replaying = True
            captured()
            self._replaying = False

        return replay

    def evict(self) -> None:
        self.sweeps += 1
        self._cache.clear()
        self._run(SWEEP)

    def sweep_seconds(self) -> float:
        return SWEEP

    def _run(self, seconds: float) -> None:
        self.ready = max(self.ready, self.host) + seconds

    def subject(
        self, footprint: int, cold: Callable[[], float], warm: float = 1e-6, launches: int = 1
    ) -> Subject:
        """Copies whose call takes ``cold()`` seconds, or ``warm`` where the cache holds the copy."""

        def build(seed: int) -> Callable[[], None]:
            self.built += 1

            def call() -> None:
                assert self.depth, "outside of the timed stream"
                assert not self._spoilt, "on the stream of a failed capture"
                if not self._replaying:
                    self.host += launches * self.launch
                hit = seed in self._cache
                self._cache.pop(seed, None)
                self._cache[seed] = footprint
                while sum(self._cache.values()) > self.l2:
                    del self._cache[next(iter(self._cache))]
                self._run(warm if hit else cold())

            return call

        return Subject(build, footprint, footprint, launches)


class FakeNvml:
    """pynvml with real constants and errors over one board; ``fails`` maps a function to NVML's code."""

    def __init__(self, **fails: int) -> None:
        self.fails = fails
        self.millijoules = 1_000_000
        self.open = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvml") and not name.startswith("nvmlClocks"):
            raise AssertionError(f"{name} is not expected to be called")
        return getattr(pynvml, name)

    def _answer(self, name: str, value: Any) -> Any:
        if name in self.fails:
            raise pynvml.NVMLError(self.fails[name])
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("nvmlInit", None)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return str(self._answer("nvmlDeviceGetHandleByUUID", f"handle of {uuid}"))

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:  # noqa: N802
        return str(self._answer("nvmlDeviceGetHandleByPciBusId", f"handle of {address}"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.millijoules += 500
        return int(self._answer("nvmlDeviceGetTotalEnergyConsumption", self.millijoules))


def _answers(name: str, value: Any) -> Callable[..., Any]:
    def function(self: FakeNvml, *arguments: Any) -> Any:
        return self._answer(name, value(*arguments) if callable(value) else value)

    return function


class _Memory:
    used = 3 * 2**30


BOARD: dict[str, Any] = {
    "nvmlDeviceGetClockInfo": lambda handle, kind: {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[
        kind
    ],
    "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {
        pynvml.NVML_CLOCK_SM: 1990,
        pynvml.NVML_CLOCK_MEM: 3202,
    }[kind],
    "nvmlDeviceGetPowerUsage": 450_000,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap
    | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "nvmlDeviceGetCurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonGpuIdle,
    "nvmlDeviceGetMemoryInfo": _Memory(),
    "nvmlSystemGetDriverVersion": "580.65.06",
    "nvmlDeviceGetPersistenceMode": 1,
}
for _name, _value in BOARD.items():
    setattr(FakeNvml, _name, _answers(_name, _value))
