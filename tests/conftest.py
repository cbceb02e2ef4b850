"""What every test stands on: no network, one thread, repeatable examples, the interpreter without a GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import HealthCheck, settings

# triton reads this once, when it is imported; importing torch does not import triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# One thread makes sums repeatable and leaves the other cores to parallel runs.
torch.set_num_threads(1)

# A first example may compile or import for seconds, which says nothing about the property.
settings.register_profile(
    "fastproj",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastproj")
