"""Scores of samples against references: the operator against kept gradients and a loop, side by side.

Shapes are LoRA layers of SmolLM2-135M, BERT-base and a 7B model, and one dense layer; five references, after
Adam's step. The layer's own weight gradient is the floor: what a backward pass forms anyway. Compare within a
group: all contenders run there on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastproj.bench.bench_weighted_grad import DEVICES
from fastproj.bindings.per_sample_influence import per_sample_influence
from fastproj.reference.adam import AdamState, adam_update

REFERENCES = 5
# samples, tokens, d_out, d_in
LAYERS = {
    "SmolLM2-135M LoRA A": (16, 64, 16, 576),
    "SmolLM2-135M LoRA B": (16, 64, 576, 16),
    "BERT-base LoRA A": (32, 64, 8, 768),
    "7B LoRA A": (4, 256, 16, 4096),
    "SmolLM2-135M dense": (16, 64, 576, 576),
}
Scores = tuple[Tensor, Tensor]


def operator(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState) -> Scores:
    return per_sample_influence(x, delta, references, adam=adam)


def kept_gradients(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState) -> Scores:
    """All samples' gradients in memory, as einsum gives them."""
    updates = adam_update(torch.einsum("bto,bti->boi", delta, x), adam).flatten(1)
    return updates @ references.flatten(1).T, updates.square().sum(1)


def sample_by_sample(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState) -> Scores:
    flat = references.flatten(1)
    updates = [adam_update(delta_i.T @ x_i, adam).flatten() for x_i, delta_i in zip(x, delta, strict=True)]
    return torch.stack([flat @ u for u in updates]), torch.stack([u.dot(u) for u in updates])


def weight_gradient(x: Tensor, delta: Tensor, references: Tensor, adam: AdamState) -> Scores:
    """The floor: the layer's own gradient, which scores nobody."""
    gradient = delta.flatten(0, 1).T @ x.flatten(0, 1)
    return gradient, gradient


CONTENDERS = {"fastproj": operator, "kept gradients": kept_gradients, "sample loop": sample_by_sample}
FLOOR = "the layer's weight gradient"


def timed(function: Callable[..., Scores], device: str) -> Callable[..., Scores]:
    """The function, waiting for the device where its launches return early."""

    def run(*inputs: Any) -> Scores:
        out = function(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("contender", [*CONTENDERS, FLOOR])
def test_per_sample_influence(benchmark: Any, contender: str, layer: str, device: str) -> None:
    samples, tokens, d_out, d_in = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, d_in, generator=generator).to(device)
    delta = torch.randn(samples, tokens, d_out, generator=generator).to(device)
    tables = torch.rand(REFERENCES + 2, d_out, d_in, generator=generator).to(device)
    inputs = (x, delta, tables[2:], AdamState(tables[0], tables[1], 100))
    function = CONTENDERS.get(contender, weight_gradient)
    benchmark.group = f"per_sample_influence, {layer}, fp32, {device}, {torch.get_num_threads()} threads"
    if contender in CONTENDERS:
        # A fast wrong answer is no contender. fp32 sums over the weight, in different orders.
        torch.testing.assert_close(function(*inputs), kept_gradients(*inputs), rtol=1e-3, atol=1e-1)
    benchmark.pedantic(timed(function, device), args=inputs, rounds=15, iterations=3, warmup_rounds=2)
