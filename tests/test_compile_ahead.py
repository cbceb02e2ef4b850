"""Every kernel compiles for real GPUs on a machine without one, and its machine code keeps to its budget.

Runs this file in a process of its own, because under TRITON_INTERPRET nothing compiles.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton")

import fastproj.kernels
from fastproj.kernels._compile import CompileCase, compile_case

NVIDIA = ("sm_80", "sm_90")
AMD = "gfx942"
OPERATORS = tuple(
    module.name
    for module in pkgutil.iter_modules(fastproj.kernels.__path__)
    if not module.ispkg and not module.name.startswith("_")
)
Report = dict[str, dict[str, Any]]


def quick_cases() -> Iterator[tuple[str, CompileCase]]:
    """The main configurations of each operator; the benchmark suite's audit compiles the others."""
    for operator in OPERATORS:
        for case in import_module(f"fastproj.kernels.{operator}").COMPILE_SIGNATURES:
            if case.quick:
                yield f"{operator}: {case.name}", case


def architectures(operator: str, seen: set[str]) -> tuple[str, ...]:
    """NVIDIA's for every case, AMD's for an operator's first."""
    first = operator not in seen
    seen.add(operator)
    return (*NVIDIA, AMD) if first else NVIDIA


def compile_quick_cases() -> Report:
    """What the assembler made of each case on each architecture, without the assembly."""
    report: Report = {}
    seen: set[str] = set()
    for name, case in quick_cases():
        for arch in architectures(name.split(":")[0], seen):
            report[f"{name} on {arch}"] = asdict(compile_case(case, arch)) | {"assembly": ""}
    return report


@pytest.fixture(scope="module")
def report() -> Report:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    worker = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=environment
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    loaded: Report = json.loads(worker.stdout)
    return loaded


CASES = dict(quick_cases())


def test_every_operator_has_a_quick_case() -> None:
    assert {name.split(":")[0] for name in CASES} == set(OPERATORS)


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("name", CASES)
def test_machine_code_keeps_to_its_budget(report: Report, name: str, arch: str) -> None:
    case, compiled = CASES[name], report[f"{name} on {arch}"]
    assert compiled["spilled"] == 0
    assert compiled["registers"] <= case.max_registers
    assert compiled["shared"] <= case.max_shared
    if case.vector_accesses or case.vector_loads_only:
        assert compiled["vector_loads"] > 0
    if case.vector_accesses:
        assert compiled["vector_stores"] > 0
    if case.tensor_cores:
        assert compiled["tensor_core_instructions"] > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_amd(report: Report, operator: str) -> None:
    (compiled,) = [
        value for name, value in report.items() if name.startswith(f"{operator}: ") and name.endswith(AMD)
    ]
    assert compiled["registers"] > 0
    assert compiled["spilled"] == 0


if __name__ == "__main__":
    json.dump(compile_quick_cases(), sys.stdout)
