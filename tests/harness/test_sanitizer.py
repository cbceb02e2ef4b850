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
    program = str(Path(every_kernel.__file__))
    command = [checker, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "every operator ran on cuda" in done.stdout
