"""The whole audit: machine code on every target, accesses of every launcher, traffic and floors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastproj.bench.audit.compilation import Job, case_of, compile_all, jobs
from fastproj.bench.audit.machine_code import Reading
from fastproj.bench.audit.verdict import Finding, bytes_in_flight, declared, findings, residents
from fastproj.bench.traffic.chips import Chip
from fastproj.bench.traffic.models import OPERATORS, Traffic, roofline
from fastproj.bench.traffic.moves import DTYPES
from fastproj.bench.traffic.workloads import WORKLOADS, Workload

MOST_ACCESSES = 5  # of each element by projections: two sets read, read again, one written
MOST_TRAFFIC = 1.05  # of contractions, in the least possible


@dataclass(frozen=True)
class CodeRow:
    """All cases of one kernel on one target: the most that any of them takes, the least that any reaches.

    ``flying_bytes`` is what a processor has on its way from memory at least, None where no case asks for it.
    ``wide``, ``matrix`` and ``asynchronous`` count cases: those with 128-bit loop accesses alone but for what
    they declare, and of ``matrix_products`` those with tensor-core instructions and asynchronous copies.
    """

    operator: str
    kernel: str
    arch: str
    cases: int
    registers: int
    local_bytes: int
    shared_bytes: int
    programs: int
    flying_bytes: int | None
    wide: int
    matrix_products: int
    matrix: int
    asynchronous: int
    findings: int


@dataclass(frozen=True)
class TrafficRow:
    """One operator on one workload and one chip: bytes, their ratios to the least, floors in microseconds."""

    operator: str
    workload: str
    chip: str
    launches: int
    read_bytes: int
    written_bytes: int
    least_bytes: int
    access_ratio: float
    memory_bytes: int
    memory_ratio: float
    flops: int
    floor_microseconds: float
    least_microseconds: float
    bound: str


@dataclass(frozen=True)
class Audit:
    """All tables, and all that is wrong: ``problems`` are those of the launchers and of the traffic."""

    code: tuple[CodeRow, ...]
    findings: tuple[Finding, ...]
    declared: tuple[tuple[str, str, str], ...]
    traffic: tuple[TrafficRow, ...]
    problems: tuple[str, ...]

    @property
    def green(self) -> bool:
        return not self.findings and not self.problems

    def to_json(self) -> str:
        """One JSON object, ``green`` included."""
        return json.dumps({"green": self.green, **asdict(self)}, indent=1, ensure_ascii=False)


def audit(
    operators: Sequence[str],
    archs: Sequence[str],
    chips: Sequence[Chip],
    *,
    cache_dir: Path,
    workers: int,
    begin: Callable[[int], None] = lambda total: None,
    progress: Callable[[Job], None] = lambda job: None,
) -> Audit:
    """Compile, read, run and count; the probes run beside the compilation.

    Raises ValueError for an unknown operator or target and RuntimeError where a kernel does not compile or
    a launcher does not run.
    """
    todo = jobs(operators, archs)
    begin(len(todo))
    with _probes() as running:
        readings = compile_all(todo, cache_dir=cache_dir, workers=workers, progress=progress)
        problems = _probe_problems(running, operators)
    named = {name: model for name, model in OPERATORS.items() if set(name.split(" + ")) <= set(operators)}
    traffics = [(workload, model(workload)) for workload in WORKLOADS.values() for model in named.values()]
    return Audit(
        code=code_rows(readings),
        findings=tuple(f for job, own in readings.items() for f in findings(case_of(job), job.arch, own)),
        declared=tuple(dict.fromkeys(row for job in readings for row in declared(case_of(job)))),
        traffic=tuple(traffic_row(traffic, chip) for _, traffic in traffics for chip in chips),
        problems=(*problems, *(p for pair in traffics for p in traffic_problems(*pair, chips))),
    )


def code_rows(readings: Mapping[Job, Reading]) -> tuple[CodeRow, ...]:
    """A row for each kernel and target."""
    groups: dict[tuple[str, str, str], list[Job]] = {}
    for job in readings:
        operator = job.module.rpartition(".")[2]
        groups.setdefault((operator, case_of(job).kernel.__name__, job.arch), []).append(job)
    return tuple(_code_row(*key, {job: readings[job] for job in members}) for key, members in groups.items())


def _code_row(operator: str, kernel: str, arch: str, readings: Mapping[Job, Reading]) -> CodeRow:
    cases = {job: case_of(job) for job in readings}
    own = readings.values()
    flying = [bytes_in_flight(cases[job], arch, reading) for job, reading in readings.items()]
    found = [finding for job, reading in readings.items() for finding in findings(cases[job], arch, reading)]
    return CodeRow(
        operator,
        kernel,
        arch,
        cases=len(readings),
        registers=max(reading.registers for reading in own),
        local_bytes=max(reading.local_bytes for reading in own),
        shared_bytes=max(reading.shared_bytes for reading in own),
        programs=min(residents(cases[job], arch, reading) for job, reading in readings.items()),
        flying_bytes=min((number for number in flying if number is not None), default=None),
        wide=len(readings) - len({finding.case for finding in found if finding.rule == "access width"}),
        matrix_products=sum(reading.multiplies for reading in own),
        matrix=sum(reading.multiplies and reading.tensor_core_instructions > 0 for reading in own),
        asynchronous=sum(reading.multiplies and reading.copies_asynchronously for reading in own),
        findings=len(found),
    )


def traffic_row(traffic: Traffic, chip: Chip) -> TrafficRow:
    """The traffic of an operator on a workload as one chip sees it."""
    floor = roofline(traffic, chip)
    return TrafficRow(
        operator=traffic.operator,
        workload=traffic.workload,
        chip=chip.name,
        launches=traffic.launches,
        read_bytes=traffic.read_bytes,
        written_bytes=traffic.written_bytes,
        least_bytes=traffic.least_bytes,
        access_ratio=traffic.access_ratio,
        memory_bytes=traffic.memory_bytes(chip.l2_bytes),
        memory_ratio=traffic.memory_ratio(chip.l2_bytes),
        flops=traffic.flops,
        floor_microseconds=floor.floor_seconds * 1e6,
        least_microseconds=floor.least_seconds * 1e6,
        bound=floor.bound,
    )


def traffic_problems(workload: Workload, traffic: Traffic, chips: Sequence[Chip]) -> list[str]:
    """Where an operator moves more than the project allows itself."""
    about = f"{traffic.operator} on {workload.name}"
    if traffic.operator in ("gram + combine", "edge"):
        moved = traffic.moves.bytes("load", "sets") + traffic.moves.bytes("store", "out")
        accesses = moved / DTYPES[workload.dtype].itemsize / workload.elements
        if accesses > MOST_ACCESSES:
            return [f"{about}: {accesses:.2f} N accesses of the shards, where {MOST_ACCESSES} N are allowed"]
    if traffic.operator in ("weighted_grad", "per_sample_grad"):
        ratios = {chip.name: traffic.memory_ratio(chip.l2_bytes) for chip in chips}
        return [
            f"{about}, {chip}: {ratio:.3f} × the least possible bytes, where {MOST_TRAFFIC} × are allowed"
            for chip, ratio in ratios.items()
            if ratio > MOST_TRAFFIC
        ]
    return []


def _probes() -> subprocess.Popen[str]:
    """The launchers under the interpreter, in a process of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastproj.bench.traffic.probe"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _probe_problems(running: subprocess.Popen[str], operators: Sequence[str]) -> list[str]:
    out, errors = running.communicate()
    if running.returncode:
        raise RuntimeError(f"the launchers do not run under the interpreter: {errors[-2000:]}")
    results: list[dict[str, Any]] = json.loads(out)
    # EDGE's first launch is the Gram's.
    kernels = {*operators, *(("edge",) if "gram" in operators else ())}
    return [r["problem"] for r in results if r["problem"] and kernels & {*r["operator"].split(" + ")}]
