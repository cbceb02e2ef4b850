"""The operator library: one place that defines, dispatches by device and says why."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

LIBRARY = torch.library.Library("fastproj", "DEF")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = (
    "gram",
    "combine",
    "edge",
    "project_out",
    "weighted_grad",
    "per_sample_grad",
    "per_sample_influence",
    "sketch",
    "cross_entropy",
    "projected_adamw",
    "balance_loss",
)
# How an operator's fast path on the CPU works, where it is not by matrix products alone.
CPU_WAYS = {
    "gram": "cache-blocked ATen",
    "combine": "cache-blocked ATen",
    "sketch": "NumPy's Philox and ATen",
    "cross_entropy": "ATen's log-softmax",
    "projected_adamw": "ATen's fused AdamW, cache-blocked",
    "balance_loss": "ATen's masked sums",
}


@dataclass(frozen=True)
class Backend:
    """Where an operator's implementation comes from and why it was chosen."""

    name: str
    reason: str
    module: str
    function: str


@cache
def has_triton() -> bool:
    """Whether triton can be imported; looks without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def backend_for(operator: str, device_type: str) -> Backend:
    """The backend that ``operator`` uses for tensors of ``device_type``.

    Raises ValueError for an operator that does not exist.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {OPERATORS}, got {operator!r}")
    if device_type == "cuda" and has_triton():
        return Backend("triton", "Triton kernel", f"fastproj.kernels.{operator}", operator)
    binding = f"fastproj.bindings.{operator}"
    if device_type == "cpu" and operator == "edge":
        return Backend("cpu", "gram's and combine's fast paths", binding, "from_parts")
    if device_type == "cpu":
        how = CPU_WAYS.get(operator, "ATen matrix products")
        return Backend("cpu", how, f"fastproj.kernels.cpu.{operator}", operator)
    why = "triton is not installed" if device_type == "cuda" else f"no kernel for {device_type}"
    function = "from_parts" if operator == "edge" else "from_reference"
    return Backend("reference", f"fp64 reference, slow: {why}", binding, function)


@cache
def implementation(operator: str, device_type: str) -> Callable[..., Any]:
    """The function that computes ``operator`` on ``device_type``; imported at its first use."""
    backend = backend_for(operator, device_type)
    function: Callable[..., Any] = getattr(importlib.import_module(backend.module), backend.function)
    return function


def _outside_autocast(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return function(*arguments)
        with torch.autocast(device_type, enabled=False):
            return function(*arguments)

    return run


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator whose one body serves every device, with its meta function.

    The body runs outside of autocast, which would round the products that some are made of.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _outside_autocast(function, key.lower()), key)
    torch.library.register_fake(f"fastproj::{name}", fake, lib=LIBRARY)
