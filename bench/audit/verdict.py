"""Machine code held against what its case declares: findings, each with the lines that show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastproj.bench.audit.machine_code import Access, Reading
from fastproj.bench.audit.occupancy import busy_bytes, resident_programs
from fastproj.kernels._blocks import launch_options
from fastproj.kernels._cases import CompileCase

WIDE = 128
SHOWN = 6


@dataclass(frozen=True)
class Finding:
    """One rule that a kernel breaks on one target; ``lines`` are the instructions that break it."""

    kernel: str
    case: str
    arch: str
    rule: str
    message: str
    lines: tuple[str, ...] = ()


def findings(case: CompileCase, arch: str, reading: Reading) -> list[Finding]:
    """All that is wrong with a case on a target; empty where its machine code keeps to what it declares."""
    broken = (
        *_local_memory(reading),
        *_occupancy(case, arch, reading),
        *_access_width(case, reading),
        *_matrix_products(case, arch, reading),
    )
    return [Finding(case.kernel.__name__, case.name, arch, *own) for own in broken]


def declared(case: CompileCase) -> list[tuple[str, str, str]]:
    """(kernel, rule, reason) of what a case declares that it cannot keep to."""
    kernel = case.kernel.__name__
    reasons = [("access width", reason) for reason in case.narrow_accesses.values()]
    reasons += [("tensor cores", reason) for reason in case.without_tensor_cores.values()]
    if case.without_asynchronous_copies is not None:
        reasons.append(("asynchronous copies", case.without_asynchronous_copies))
    return [(kernel, rule, reason) for rule, reason in reasons]


def residents(case: CompileCase, arch: str, reading: Reading) -> int:
    """Programs that a processor holds at once."""
    return resident_programs(
        arch, registers=reading.registers, shared_bytes=reading.shared_bytes, threads=case.threads
    )


def bytes_in_flight(case: CompileCase, arch: str, reading: Reading) -> int | None:
    """What the programs on one processor have asked of memory at any time, in bytes.

    A pipelined loop is ahead of itself by all its stages but one.
    """
    if case.bytes_a_turn is None:
        return None
    stages = launch_options(case.threads, case.num_stages, amd=arch.startswith("gfx"))["num_stages"]
    return (
        residents(case, arch, reading) * case.bytes_a_turn * (max(1, stages - 1) if reading.multiplies else 1)
    )


Broken = Iterator[tuple[str, str, tuple[str, ...]]]


def _local_memory(reading: Reading) -> Broken:
    if reading.local_bytes or reading.spills:
        message = f"{reading.local_bytes} bytes of local memory a thread, where registers should do"
        yield "local memory", message, reading.spills[:SHOWN]


def _occupancy(case: CompileCase, arch: str, reading: Reading) -> Broken:
    held, flying = residents(case, arch, reading), bytes_in_flight(case, arch, reading)
    needed = busy_bytes(arch)
    if held == 0 or (flying is not None and flying < needed):
        message = (
            f"{reading.registers} registers a thread and {reading.shared_bytes} bytes of shared memory leave "
            f"room for {held} programs on a processor, with {flying} bytes on their way where {needed} keep "
            f"the memory busy"
        )
        yield "occupancy", message, ()


def _access_width(case: CompileCase, reading: Reading) -> Broken:
    if not reading.accesses:
        yield "access width", "no loop that reads or writes global memory was found", ()
    wrong = [
        access
        for access in reading.accesses
        if access.bits < WIDE and not case.narrow_accesses.keys() & access.functions
    ]
    if wrong:
        sizes = sorted({access.bits for access in wrong})
        functions = sorted({access.functions[0] for access in wrong if access.functions})
        message = f"{len(wrong)} accesses of {sizes} bits in loops of {functions}, where {WIDE} are possible"
        yield "access width", message, _listed(wrong)


def _matrix_products(case: CompileCase, arch: str, reading: Reading) -> Broken:
    if case.multiplies and not reading.multiplies:
        yield "tensor cores", "no matrix product is left in the kernel", ()
    if not reading.multiplies:
        return
    excused = arch.startswith(tuple(case.without_tensor_cores))
    if not reading.tensor_core_instructions and not excused:
        yield "tensor cores", "a matrix product without one tensor-core instruction", ()
    # gfx942 has no asynchronous copy of 128 bits; its loads are told apart by their wait counters.
    pipelined = case.num_stages > 1 and not arch.startswith("gfx")
    if pipelined and not reading.copies_asynchronously and case.without_asynchronous_copies is None:
        loads = [access for access in reading.accesses if access.kind == "load"]
        yield "asynchronous copies", "a pipelined loop that waits for its loads", _listed(loads)


def _listed(accesses: list[Access]) -> tuple[str, ...]:
    return tuple(f"{access.source}  {access.text}" for access in accesses[:SHOWN])
