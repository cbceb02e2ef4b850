"""The measurement itself: memory bandwidth first, then every case, each with telemetry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from fastproj.bench.harness.case import Case, WrongResultError
from fastproj.bench.harness.clock import Clock, DoesNotFitError, Subject
from fastproj.bench.harness.device import Call
from fastproj.bench.harness.record import Row
from fastproj.bench.harness.telemetry import Telemetry, energy_per_call
from fastproj.bench.traffic.chips import Chip
from fastproj.bench.traffic.models import roofline

COPY_BYTES = 2**28
QUICK_COPY_BYTES = 2**26


@dataclass(frozen=True)
class Setting:
    """Where and how all cases are timed.

    ``device`` is "cuda" or "cpu"; ``l2_bytes`` and ``chip`` are None where there is no such thing or it is
    not known, and ``chip_reason`` then says why. The chip has the same ``l2_bytes``. ``sustained_seconds`` is
    how long a call is repeated under telemetry.
    """

    device: str
    clock: Clock
    telemetry: Telemetry
    rounds: int
    sustained_seconds: float
    l2_bytes: int | None
    chip: Chip | None
    chip_reason: str


def copy_subject(size: int, device: str) -> Subject:
    """A copy of ``size`` bytes from one buffer into another."""

    def build(seed: int) -> Call:
        source = torch.full((size // 4,), float(seed), device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Subject(build, footprint=2 * size, resident=2 * size, launches=1)


def copy_bandwidth(setting: Setting, quick: bool) -> dict[str, Any]:
    """Bytes a second of a large copy, read and written counted; buffers of several times the L2.

    The clocks are brought to where they stay first, as they are for the rows that are held against this.
    """
    size = max(QUICK_COPY_BYTES if quick else COPY_BYTES, 4 * (setting.l2_bytes or 0))
    prepared = setting.clock.prepare(copy_subject(size, setting.device))
    prepared.sustain(setting.sustained_seconds)
    timing = prepared.measure(setting.rounds)
    return {
        "bytes_per_second": 2 * size / timing.seconds,
        "bytes": size,
        "seconds": timing.seconds,
        "low": timing.low,
        "high": timing.high,
        "route": timing.route,
        "route_reason": timing.reason,
        "cache": timing.cache,
    }


def measure(
    setting: Setting, cases: Iterable[Case], copy_rate: float, progress: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """A row for each case, its check first, and why others were left out; ``progress`` is told each name.

    A case that memory does not hold, or that does not compile or launch, costs no other case its row.
    Raises WrongResultError for the first case that does not give what the reference gives.
    """
    rows, skipped = [], {}
    for case in cases:
        name = ", ".join(filter(None, (case.suite, case.workload, case.part)))
        progress(name)
        try:
            case.check()
            rows.append(measure_case(setting, case, copy_rate))
        except WrongResultError:
            raise
        except (DoesNotFitError, RuntimeError, TritonError) as error:
            skipped[name] = str(error).strip().partition("\n")[0] or type(error).__name__
    return rows, skipped


def measure_case(setting: Setting, case: Case, copy_rate: float) -> Row:
    """Repeat one case under telemetry, which also brings the clocks to where they stay, then time it."""
    prepared = setting.clock.prepare(case.subject)
    with setting.telemetry.window() as window:
        calls, seconds = prepared.sustain(setting.sustained_seconds)
    timing = prepared.measure(setting.rounds)
    joules, energy_source = energy_per_call(window, calls, seconds, prepared.idle)
    moved, missing = moved_bytes(setting, case)
    floor = roofline(case.traffic, setting.chip) if setting.chip else None
    if floor is None:
        missing["floor_seconds"] = setting.chip_reason
    if joules is None:
        missing["energy_joules"] = energy_source
    return Row(
        suite=case.suite,
        workload=case.workload,
        part=case.part,
        device=setting.device,
        dtype=case.dtype,
        seconds=timing.seconds,
        low=timing.low,
        high=timing.high,
        rounds=timing.rounds,
        copies=timing.copies,
        cache=timing.cache,
        route=timing.route,
        route_reason=timing.reason,
        host_seconds=timing.host_seconds,
        launches=case.traffic.launches,
        bytes_moved=moved,
        bytes_least=case.traffic.least_bytes,
        flops=case.traffic.flops,
        gigabytes_per_second=moved / timing.seconds / 1e9,
        of_copy=moved / timing.seconds / copy_rate,
        floor_seconds=floor.floor_seconds if floor else None,
        bound=floor.bound if floor else None,
        of_floor=floor.floor_seconds / timing.seconds if floor else None,
        energy_joules=joules,
        energy_source=energy_source,
        telemetry=window.to_json(None if joules is None else joules * calls / seconds),
        missing=missing,
    )


def moved_bytes(setting: Setting, case: Case) -> tuple[int, dict[str, str]]:
    """What passes between memory and L2 by the model of the launches; on the CPU the least possible."""
    if setting.l2_bytes is None:
        reason = "the traffic model is of the GPU's launches: bytes_moved is bytes_least here"
        return case.traffic.least_bytes, {"bytes_moved": reason}
    return case.traffic.memory_bytes(setting.l2_bytes), {}
