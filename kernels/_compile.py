"""Ahead-of-time compilation of the kernels: what to compile, and what the machine code says.

Needs no GPU. Must run in a process without TRITON_INTERPRET, where ``triton.jit`` compiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, with what its machine code must keep to.

    ``signature`` names the types of the run-time arguments, ``constexprs`` every ``tl.constexpr``;
    ``divisible_by_16`` are the arguments that the launcher's specialisation would find so.
    ``vector_accesses`` asks for 128-bit global loads and stores, ``vector_loads_only`` for the loads alone.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    vector_accesses: bool = False
    vector_loads_only: bool = False
    tensor_cores: bool = False
    max_registers: int = 255
    max_shared: int = 49152
    quick: bool = True


@dataclass(frozen=True)
class CompiledReport:
    """What the assembler made of a case; ``spilled`` is local memory in bytes a thread.

    The instruction counts are those of 128-bit global loads and stores and of matrix instructions.
    """

    registers: int
    spilled: int
    shared: int
    vector_loads: int
    vector_stores: int
    tensor_core_instructions: int
    assembly: str = field(repr=False)


def compile_case(case: CompileCase, arch: str) -> CompiledReport:
    """Compile ``case`` for one of ``TARGETS`` and read the machine code.

    Raises ValueError for an unknown ``arch``.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {tuple(TARGETS)}, got {arch!r}")
    target = TARGETS[arch]
    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    ordered = {name: signature[name] for name in case.kernel.arg_names}
    position = {name: (index,) for index, name in enumerate(ordered)}
    attributes = {position[name]: [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, ordered, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, shared: int) -> CompiledReport:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _output_of(tools / "nvdisasm", file.name)
    return CompiledReport(
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        shared=shared,
        vector_loads=len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", assembly)),
        vector_stores=len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128\b", assembly)),
        tensor_core_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA|DMMA)\b", assembly)),
        assembly=assembly,
    )


def _read_amdgcn(assembly: str, shared: int) -> CompiledReport:
    return CompiledReport(
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        spilled=_number(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        shared=shared,
        vector_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        vector_stores=len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly)),
        tensor_core_instructions=len(re.findall(r"\bv_mfma_\w+", assembly)),
        assembly=assembly,
    )


def _output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found.group(1))
