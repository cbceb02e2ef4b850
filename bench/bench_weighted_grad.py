"""K weighted sums of per-sample gradients: the operator against einsum and loops, side by side.

The two sums are those of EDGE: plain (ones) and weighted by p_y^q. Shapes are LoRA layers of BERT-base and
of a 7B model, and one dense layer. Compare within a group: all contenders run there on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproj.bindings.weighted_grad import weighted_grad

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# samples, tokens, d_out, d_in
LAYERS = {
    "BERT-base LoRA A": (32, 64, 8, 768),
    "BERT-base LoRA B": (32, 64, 768, 8),
    "7B LoRA A": (4, 256, 16, 4096),
    "BERT-base dense": (32, 64, 768, 768),
}


def plain_gradient(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """The floor: the one sum that a backward pass forms anyway."""
    return delta.flatten(0, 1).T @ x.flatten(0, 1)


def einsum(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("kbto,bti->koi", weights[:, :, None, None] * delta, x)


def sum_by_sum(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """One GEMM for each sum, as a hook that knows the weights would do."""
    flat = x.flatten(0, 1)
    return torch.stack([(w[:, None, None] * delta).flatten(0, 1).T @ flat for w in weights])


def sample_by_sample(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    out = x.new_zeros(weights.shape[0], delta.shape[2], x.shape[2])
    for w, x_i, delta_i in zip(weights.unbind(1), x, delta, strict=True):
        out += w[:, None, None] * (delta_i.T @ x_i)
    return out


CONTENDERS = {
    "fastproj": weighted_grad,
    "einsum": einsum,
    "one GEMM a sum": sum_by_sum,
    "sample loop": sample_by_sample,
}


def timed(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """The function, waiting for the device where its launches return early."""

    def run(*inputs: Tensor) -> Tensor:
        out = function(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("contender", [*CONTENDERS, "plain gradient, K = 1"])
def test_weighted_grad(benchmark: Any, contender: str, layer: str, device: str) -> None:
    samples, tokens, d_out, d_in = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, d_in, generator=generator).to(device)
    delta = torch.randn(samples, tokens, d_out, generator=generator).to(device)
    weights = torch.stack([torch.ones(samples), torch.rand(samples, generator=generator)]).to(device)
    function = CONTENDERS.get(contender, plain_gradient)
    benchmark.group = f"weighted_grad, {layer}, fp32, {device}, {torch.get_num_threads()} threads"
    if contender in CONTENDERS:
        # A fast wrong answer is no contender. fp32 sums over samples and tokens, in different orders.
        torch.testing.assert_close(
            function(x, delta, weights), einsum(x, delta, weights), rtol=1e-4, atol=1e-3
        )
    benchmark.pedantic(
        timed(function, device), args=(x, delta, weights), rounds=15, iterations=3, warmup_rounds=2
    )
