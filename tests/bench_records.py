"""Records of measurements that never were."""

from __future__ import annotations

from typing import Any

from fastproj.bench.harness.record import Record, Row
from fastproj.bench.harness.telemetry import Telemetry, Window

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "capability": "sm_90",
    "driver": "580.65.06",
    "torch": "2.13.0",
    "triton": "3.8.0",
}


def row(seconds: float = 1e-3, spread: float = 0.01, **changes: Any) -> Row:
    """A row whose quartiles lie ``spread`` of the median to either side."""
    nothing = Telemetry(absent="no NVML").snapshot()
    values: dict[str, Any] = {
        "suite": "edge",
        "workload": "small",
        "part": "",
        "device": "cuda",
        "dtype": "fp32",
        "seconds": seconds,
        "low": seconds * (1 - spread),
        "high": seconds * (1 + spread),
        "rounds": 31,
        "copies": 3,
        "cache": "turns",
        "route": "graph",
        "route_reason": "short",
        "host_seconds": 2e-5,
        "launches": 2,
        "bytes_moved": 10**9,
        "bytes_least": 10**9,
        "flops": 10,
        "gigabytes_per_second": 1e3,
        "of_copy": 0.5,
        "floor_seconds": 5e-4,
        "bound": "memory",
        "of_floor": 0.5,
        "energy_joules": None,
        "energy_source": "no NVML",
        "telemetry": Window(nothing, [nothing], nothing).to_json(None),
        "missing": {"energy_joules": "no NVML"},
    }
    return Row(**{**values, **changes})


def record(*rows: Row, **machine: Any) -> Record:
    """A record of these rows on MACHINE with changes."""
    return Record(
        date="2026-01-01T00:00:00+00:00",
        command="fastproj bench",
        options={"device": "cuda"},
        machine={**MACHINE, **machine},
        gate={"passed": 3, "seconds": 1.0},
        copy={"bytes_per_second": 2e12},
        rows=rows,
        skipped={},
    )
