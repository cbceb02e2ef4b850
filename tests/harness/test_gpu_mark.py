"""What ``pytest -m gpu`` selects where a GPU is, and says where none is. Nothing is run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastproj.bindings import OPERATORS

ROOT = Path(__file__).parents[2]
# Collection asks only whether there is a GPU.
COLLECT = """
import sys, torch, pytest
torch.cuda.is_available = lambda: sys.argv[1] == "gpu"
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def collect(device: str, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of a collection on a machine with or without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COLLECT, device, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_gpu_tests_are_those_that_run_kernels_on_the_gpu() -> None:
    files = [f"tests/test_{operator}.py" for operator in OPERATORS]
    code, output = collect("gpu", "-m", "gpu", *files, "tests/test_edge_operator.py", "tests/harness")
    assert code == 0, output
    selected = [line for line in output.splitlines() if "::" in line]
    for file in files:
        own = [line for line in selected if line.startswith(file)]
        assert any("triton" in line for line in own), file
    assert [line for line in selected if "[cpu" in line or "-cpu" in line] == []
    assert any("test_edge_operator.py::test_opcheck" in line for line in selected)
    assert any("test_on_gpu.py::test_every_operator_on_the_gpu" in line for line in selected)


def test_asking_for_gpu_tests_without_a_gpu_is_an_error_of_use() -> None:
    code, output = collect("none", "-m", "gpu and not slow", "tests/test_gram.py")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "there is no CUDA or ROCm device" in output


def test_leaving_gpu_tests_out_is_no_such_error() -> None:
    code, output = collect("none", "-m", "not gpu", "tests/harness/test_on_gpu.py")
    assert code == 0, output
    assert "test_the_program_is_right_without_a_gpu_too" in output
    assert "test_every_operator_on_the_gpu" not in output
