"""One run of ``fastproj bench`` from options to record: tests, bandwidth, cases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastproj.bench.harness.clock import Clock, CudaClock, WallClock
from fastproj.bench.harness.device import CudaDevice
from fastproj.bench.harness.gate import run_gate
from fastproj.bench.harness.machine import describe_machine
from fastproj.bench.harness.measure import Setting, copy_bandwidth, measure
from fastproj.bench.harness.record import Record
from fastproj.bench.harness.suites import SUITES, cases, select_workloads
from fastproj.bench.harness.telemetry import Telemetry, open_telemetry
from fastproj.bench.traffic.chips import chip_of

# Long against the tenths of a second at which boards renew their energy counter; quick runs go without.
SUSTAINED_SECONDS, QUICK_SUSTAINED_SECONDS = 1.5, 0.1
ROUNDS, QUICK_ROUNDS = 31, 7


@dataclass(frozen=True)
class Options:
    """What the user asked for; empty tuples stand for the defaults of the device."""

    device: str
    suites: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    quick: bool = False
    rounds: int | None = None
    tests: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The options as JSON has them."""
        tests = None if self.tests is None else str(self.tests)
        return {
            **asdict(self),
            "suites": list(self.suites),
            "workloads": list(self.workloads),
            "tests": tests,
        }


def take(options: Options, command: str, progress: Callable[[str], None]) -> Record:
    """Measure what the options name, on the current CUDA device or the CPU.

    Raises ValueError for unknown names before anything runs, GateRefusedError where the tests are not green,
    WrongResultError where a timed call is wrong.
    """
    suites = options.suites or SUITES
    workloads = select_workloads(options.workloads, options.device, options.quick)
    planned = list(cases(suites, workloads, options.device))
    progress("correctness suite: minutes on a GPU, where every kernel is compiled first")
    gate = run_gate(options.device, options.tests)
    index = torch.cuda.current_device() if options.device == "cuda" else None
    with closing(open_telemetry(index)) as telemetry:
        machine = describe_machine(index, telemetry)
        setting = setting_for(options, machine, index, telemetry)
        progress("copy bandwidth")
        copy = copy_bandwidth(setting, options.quick)
        rows, skipped = measure(setting, planned, copy["bytes_per_second"], progress)
    return Record(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        options=options.to_json(),
        machine=machine,
        gate=gate.to_json(),
        copy=copy,
        rows=tuple(rows),
        skipped=skipped,
    )


def clock_of(index: int | None, l2_bytes: int) -> Clock:
    """Events on CUDA device ``index`` with a cache of ``l2_bytes``; the wall for the CPU, which is None."""
    return WallClock() if index is None else CudaClock(CudaDevice(index, l2_bytes))


def setting_for(
    options: Options, machine: dict[str, Any], index: int | None, telemetry: Telemetry
) -> Setting:
    """The setting of all cases, from the options and the machine's description."""
    on_gpu = index is not None
    chip = chip_of(machine["device"], machine["memory_bytes"]) if on_gpu else None
    # A cache in front of the memory that the driver does not count as L2 must be left cold too.
    l2_bytes = max(machine["l2_bytes"] or 0, chip.l2_bytes if chip else 0)
    # Bytes moved and the floor are to speak of the same cache.
    chip = replace(chip, l2_bytes=l2_bytes) if chip else None
    return Setting(
        device=options.device,
        clock=clock_of(index, l2_bytes),
        telemetry=telemetry,
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
        sustained_seconds=QUICK_SUSTAINED_SECONDS if options.quick else SUSTAINED_SECONDS,
        l2_bytes=l2_bytes if on_gpu else None,
        chip=chip,
        chip_reason=f"no roofline is known of {machine['device']}" if on_gpu else "no roofline of the CPU",
    )
