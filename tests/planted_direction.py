"""Tiny models with an adapter that reads or writes one direction, and hardly anything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastproj.bias_diff.training import add_adapter

NOISE = 1e-3


def planted(
    model: nn.Module, targets: list[str], direction: Tensor, side: str, *, seed: int = 0, **options: Any
) -> nn.Module:
    """The model with an adapter on ``targets`` whose ΔW lies along ``direction`` on one side."""
    adapted = add_adapter(model, targets=targets, rank=3, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    unit = direction.detach() / direction.detach().norm()
    with torch.no_grad():
        for module in adapted.modules():
            if not hasattr(module, "lora_A"):
                continue
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.copy_(torch.randn(a.shape, generator=generator) * NOISE)
            b.copy_(torch.randn(b.shape, generator=generator) * NOISE)
            a[0], b[:, 0] = (
                torch.randn(a.shape[1], generator=generator),
                torch.randn(b.shape[0], generator=generator),
            )
            if side == "read" and a.shape[1] == len(unit):
                a[0] = unit
            if side == "write" and b.shape[0] == len(unit):
                b[:, 0] = unit
    return adapted
