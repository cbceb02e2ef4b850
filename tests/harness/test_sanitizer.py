"""Every kernel under CUDA's memory checkers, where a GPU and the CUDA toolkit are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import every_kernel
import pytest

FOUND = 7  # exit code for errors that the checker finds


def checked(checker: str, tool: str) -> list[str]:
    """The program under a checker. Libraries probe for symbols that are not there and for peers: the errors
    that these calls return are handled, and are none of the kernels'.
    """
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    return [checker, *options, sys.executable, str(Path(every_kernel.__file__))]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_kernel_errs_under_the_checker(tool: str) -> None:
    """Out-of-bounds and misaligned accesses; races on shared memory."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    # Without torch's pool each tensor is an allocation of its own, whose end the checker knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = checked(checker, tool)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "every operator ran on cuda" in done.stdout


def test_errors_that_calls_of_libraries_return_do_not_count() -> None:
    command = checked("compute-sanitizer", "memcheck")
    assert command[command.index("--report-api-errors") + 1] == "no"
    assert command.index("--report-api-errors") < command.index(sys.executable)
