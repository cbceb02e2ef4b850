"""Each rule finds what breaks it and nothing else; occupancy and bytes in flight by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from fastproj.bench.audit.machine_code import Access, Reading
from fastproj.bench.audit.occupancy import PROCESSORS, busy_bytes, resident_programs
from fastproj.bench.audit.verdict import bytes_in_flight, declared, findings
from fastproj.kernels._cases import CompileCase

WIDE = Access("load", 128, ("walk", "kernel"), "kernel.py:3", "LDG.E.128 R4, [R2.64]")
NARROW = Access("load", 16, ("walk", "kernel"), "kernel.py:4", "LDG.E.U16 R4, [R2.64]")
COPY = Access("asynchronous copy", 128, ("kernel",), "kernel.py:5", "LDGSTS.E.128 [R2], [R4.64]")
FINE = Reading(64, 0, 0, False, 0, (WIDE,), ())
PRODUCT = Reading(64, 0, 32768, True, 16, (WIDE, COPY), ())


def case(**fields: Any) -> CompileCase:
    return CompileCase("in fp32", SimpleNamespace(__name__="kernel"), {}, {}, **fields)


def rules(own: CompileCase, reading: Reading, arch: str = "sm_90") -> list[str]:
    return [finding.rule for finding in findings(own, arch, reading)]


@pytest.mark.parametrize("arch", PROCESSORS)
@pytest.mark.parametrize("reading", [FINE, PRODUCT])
def test_what_keeps_its_word_is_green(reading: Reading, arch: str) -> None:
    assert findings(case(), arch, reading) == []


def test_local_memory_is_shown() -> None:
    (finding,) = findings(case(), "sm_90", replace(FINE, local_bytes=8, spills=("STL [R1], R3",) * 9))
    assert (finding.kernel, finding.case, finding.arch) == ("kernel", "in fp32", "sm_90")
    assert finding.rule == "local memory"
    assert "8 bytes of local memory" in finding.message
    assert finding.lines == ("STL [R1], R3",) * 6


def test_narrow_accesses_are_shown_unless_their_function_is_declared() -> None:
    reading = replace(FINE, accesses=(WIDE, NARROW))
    (finding,) = findings(case(), "sm_90", reading)
    assert finding.rule == "access width"
    assert finding.message == "1 accesses of [16] bits in loops of ['walk'], where 128 are possible"
    assert finding.lines == ("kernel.py:4  LDG.E.U16 R4, [R2.64]",)
    assert rules(case(narrow_accesses={"walk": "too short"}), reading) == []
    assert rules(case(narrow_accesses={"kernel": "too short"}), reading) == []
    assert rules(case(narrow_accesses={"other": "too short"}), reading) == ["access width"]


def test_a_kernel_without_a_loop_that_was_seen_is_not_green() -> None:
    assert rules(case(), replace(FINE, accesses=())) == ["access width"]


def test_products_need_tensor_cores_and_asynchronous_copies() -> None:
    assert rules(case(), replace(PRODUCT, tensor_core_instructions=0)) == ["tensor cores"]
    assert (
        rules(case(without_tensor_cores={"sm_": "fp32"}), replace(PRODUCT, tensor_core_instructions=0)) == []
    )
    assert rules(
        case(without_tensor_cores={"sm_120": "fp64"}), replace(PRODUCT, tensor_core_instructions=0)
    ) == ["tensor cores"]
    assert rules(case(multiplies=True), FINE) == ["tensor cores"]
    waiting = replace(PRODUCT, accesses=(WIDE,))
    (finding,) = findings(case(), "sm_80", waiting)
    assert finding.rule == "asynchronous copies"
    assert finding.lines == ("kernel.py:3  LDG.E.128 R4, [R2.64]",)
    assert rules(case(num_stages=1), waiting) == []
    assert rules(case(without_asynchronous_copies="halves"), waiting) == []
    assert rules(case(), waiting, "gfx942") == []


def test_too_little_in_flight_is_found() -> None:
    """128 threads of 168 registers: three programs of 65,536; of 8 KiB each they keep an H200 from idling."""
    heavy = replace(FINE, registers=168)
    assert 4.8e12 * 700e-9 / 132 < 3 * 8704
    assert rules(case(bytes_a_turn=8704), heavy) == []
    (finding,) = findings(case(bytes_a_turn=8192), "sm_90", heavy)
    assert finding.rule == "occupancy"
    assert "168 registers" in finding.message
    assert "room for 3 programs" in finding.message
    assert "24576 bytes on their way where 25454 keep the memory busy" in finding.message
    assert rules(case(bytes_a_turn=None), heavy) == []
    assert rules(case(), replace(FINE, shared_bytes=300_000)) == ["occupancy"]


def test_pipelined_loops_are_ahead_by_their_stages() -> None:
    """65,536 registers and 228 KiB hold six programs here; AMD's loops are one stage ahead."""
    own = case(bytes_a_turn=1000, num_stages=4)
    assert bytes_in_flight(own, "sm_90", PRODUCT) == 6 * 1000 * 3
    assert bytes_in_flight(own, "gfx942", PRODUCT) == 2 * 1000
    assert bytes_in_flight(own, "sm_90", FINE) == 8 * 1000
    assert bytes_in_flight(case(), "sm_90", FINE) is None


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "programs"),
    [
        ("sm_90", 32, 0, 128, 16),  # 2048 threads
        ("sm_90", 64, 0, 128, 8),
        ("sm_90", 65, 0, 128, 7),  # taken by eights
        ("sm_90", 255, 0, 256, 1),
        ("sm_90", 32, 100_000, 128, 2),  # 228 KiB, one more KiB reserved for each
        ("sm_90", 32, 232_448, 128, 1),
        ("sm_90", 32, 232_449, 128, 0),
        ("sm_80", 32, 163 * 1024, 128, 1),
        ("sm_120", 16, 0, 128, 12),  # 1536 threads
        ("sm_120", 16, 0, 32, 24),
        ("gfx942", 128, 0, 128, 8),  # 4 SIMDs × 512 / 128 waves of 64
        ("gfx942", 64, 32768, 128, 2),
        ("gfx942", 512, 0, 256, 1),
        ("gfx942", 136, 0, 128, 6),  # 512 / 136 are three waves of each SIMD, though 15 fit all four
    ],
)
def test_resident_programs_by_hand(
    arch: str, registers: int, shared: int, threads: int, programs: int
) -> None:
    assert resident_programs(arch, registers=registers, shared_bytes=shared, threads=threads) == programs


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of .*'sm_90'.* got 'sm_1'"):
        resident_programs("sm_1", registers=1, shared_bytes=0, threads=32)


def test_busy_bytes_are_those_of_the_hungriest_chip() -> None:
    assert busy_bytes("sm_90") == int(4.8e12 * 700e-9 / 132)  # the H200's, not the H100's


def test_declared_exceptions_come_with_their_reasons() -> None:
    own = case(narrow_accesses={"walk": "too short"}, without_tensor_cores={"sm_": "fp32 is exact"})
    assert declared(own) == [
        ("kernel", "access width", "too short"),
        ("kernel", "tensor cores", "fp32 is exact"),
    ]
