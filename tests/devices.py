"""Where the tests run, and the mark of those that run kernels compiled for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# Compiled on a GPU, under triton's interpreter elsewhere.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Parameters carry these marks: without a GPU the same test runs in the interpreter and is no gpu test.
GPU_MARKS = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def on_gpu(test: Any) -> Any:
    """Decorate a test whose every run launches kernels on DEVICE: marked gpu where that is a GPU."""
    return pytest.mark.gpu(test) if GPU_MARKS else test
