"""Per-sample gradients: the operator against einsum and a loop over samples, side by side.

Compare within a group: all contenders run there on the same tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastproj.bench.bench_weighted_grad import DEVICES, timed
from fastproj.bindings.per_sample_grad import per_sample_grad

# samples, tokens, d_out, d_in
LAYERS = {
    "BERT-base LoRA A": (32, 64, 8, 768),
    "BERT-base LoRA B": (32, 64, 768, 8),
    "classifier head, one token": (32, 1, 2, 768),
    "7B LoRA A": (4, 256, 16, 4096),
}


def einsum(x: Tensor, delta: Tensor) -> Tensor:
    return torch.einsum("bto,bti->boi", delta, x)


def sample_by_sample(x: Tensor, delta: Tensor) -> Tensor:
    return torch.stack([delta_i.T @ x_i for x_i, delta_i in zip(x, delta, strict=True)])


CONTENDERS = {"fastproj": per_sample_grad, "einsum": einsum, "sample loop": sample_by_sample}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_per_sample_grad(benchmark: Any, contender: str, layer: str, device: str) -> None:
    samples, tokens, d_out, d_in = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, d_in, generator=generator).to(device)
    delta = torch.randn(samples, tokens, d_out, generator=generator).to(device)
    function = CONTENDERS[contender]
    benchmark.group = f"per_sample_grad, {layer}, fp32, {device}, {torch.get_num_threads()} threads"
    # A fast wrong answer is no contender. fp32 sums over tokens, in different orders.
    torch.testing.assert_close(function(x, delta), einsum(x, delta), rtol=1e-4, atol=1e-4)
    benchmark.pedantic(timed(function, device), args=(x, delta), rounds=15, iterations=3, warmup_rounds=2)
