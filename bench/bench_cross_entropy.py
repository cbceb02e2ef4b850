"""Cross entropy of samples and its gradient: the operator against torch's, side by side.

Compare within a group: all contenders run there on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastproj
from fastproj.bench.bench_weighted_grad import DEVICES, timed

# samples, tokens, classes
BATCHES = {
    "GPT-2's vocabulary": (4, 64, 50_257),
    "SmolLM2's vocabulary": (4, 64, 49_152),
    "a classifier": (256, 1, 3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operator(logits: Tensor, labels: Tensor) -> Tensor:
    return fastproj.cross_entropy(logits, labels).losses


def torch_in_fp32(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers and torch have it: logits upcast as a whole."""
    terms = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return terms.view(labels.shape).mean(1)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fastproj": operator,
    "torch": torch_in_fp32,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_cross_entropy(benchmark: Any, contender: str, batch: str, dtype: str, device: str) -> None:
    samples, tokens, classes = BATCHES[batch]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, tokens, classes, generator=generator).to(device, DTYPES[dtype])
    labels = torch.randint(0, classes, (samples, tokens), generator=generator).to(device)
    logits.requires_grad_()
    losses = CONTENDERS[contender]

    def gradient(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.autograd.grad(losses(logits, labels).sum(), logits)[0]

    benchmark.group = f"cross_entropy, {batch}, {dtype}, {device}, {torch.get_num_threads()} threads"
    # A fast wrong answer is no contender. fp32 sums over a vocabulary, then a rounding of the gradient.
    torch.testing.assert_close(losses(logits, labels), torch_in_fp32(logits, labels), rtol=1e-5, atol=1e-5)
    (want,) = torch.autograd.grad(torch_in_fp32(logits, labels).sum(), logits)
    torch.testing.assert_close(gradient(logits, labels), want, rtol=1e-2, atol=1e-6)
    benchmark.pedantic(
        timed(gradient, device), args=(logits, labels), rounds=7, iterations=1, warmup_rounds=1
    )
