"""How many programs a processor holds at once, from what each of them takes."""

from __future__ import annotations

from dataclasses import dataclass

from fastproj.bench.traffic.chips import CHIPS


@dataclass(frozen=True)
class Processor:
    """What one SM (CU on AMD's chips) has: registers of each of its four parts, shared bytes in all and for
    one program, and the most threads and programs.
    """

    registers: int
    shared_bytes: int
    shared_per_program: int
    threads: int
    programs: int
    warp: int
    reserved_shared: int = 1024
    register_step: int = 8


MEMORY_LATENCY = 700e-9  # seconds under load, about what microbenchmarks of these chips find

PARTS = 4  # of a processor, each with warps and registers of its own

# Compute capabilities 8.0, 9.0, 10.0 and 12.0 in the CUDA programming guide; CDNA 3 in AMD's instruction set
# reference: 4 SIMDs of 512 registers a lane and 8 waves each, 64 KiB of local data share.
PROCESSORS = {
    "sm_80": Processor(16384, 164 * 1024, 163 * 1024, 2048, 32, 32),
    "sm_90": Processor(16384, 228 * 1024, 227 * 1024, 2048, 32, 32),
    "sm_100": Processor(16384, 228 * 1024, 227 * 1024, 2048, 32, 32),
    "sm_120": Processor(16384, 100 * 1024, 99 * 1024, 1536, 24, 32),
    "gfx942": Processor(64 * 512, 64 * 1024, 64 * 1024, 2048, 16, 64, 0),
}


def resident_programs(arch: str, *, registers: int, shared_bytes: int, threads: int) -> int:
    """How many programs of ``threads`` threads, ``registers`` each, fit one processor; 0 where none does.

    Raises ValueError for an unknown ``arch``.
    """
    if arch not in PROCESSORS:
        raise ValueError(f"arch must be one of {tuple(PROCESSORS)}, got {arch!r}")
    has = PROCESSORS[arch]
    if shared_bytes > has.shared_per_program:
        return 0
    step = has.register_step
    taken = -(-max(registers, 1) // step) * step * has.warp
    by_registers = PARTS * (has.registers // taken) // (threads // has.warp)
    by_shared = has.shared_bytes // (shared_bytes + has.reserved_shared) if shared_bytes else has.programs
    return min(has.programs, has.threads // threads, by_registers, by_shared)


def busy_bytes(arch: str) -> int:
    """Bytes that one processor must have on their way for its chip's memory never to wait (Little's law).

    Bandwidth times latency over processors, of the chip of this architecture that needs most.
    """
    needed = [
        chip.memory_bytes_per_second * MEMORY_LATENCY / chip.processors
        for chip in CHIPS.values()
        if chip.architecture == arch
    ]
    return int(max(needed))
