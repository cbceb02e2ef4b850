"""Propensity and discrimination of label logits with their gradient: the operator against masks and means.

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

# samples, labels
BATCHES = {
    "GoEmotions": (16, 28),
    "77 intents": (16, 77),
    "many samples": (1024, 28),
    "many labels": (64, 4096),
}
LABELS = ("one a sample", "each")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operator(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return fastproj.balance_loss(logits, labels)


def masks_and_means(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it from the paper: a one-hot mask, masked means, and the labels present."""
    values = logits.float()
    has = (F.one_hot(labels, logits.shape[1]) if labels.dim() == 1 else labels).bool()
    present, absent = has.sum(0), (~has).sum(0)
    contain = (values * has).sum(0) / present.clamp_min(1)
    contain_not = (values * ~has).sum(0) / absent.clamp_min(1)
    both = (present > 0) & (absent > 0)
    first, second = contain[present > 0], contain_not[both]
    propensity = (first - first.mean()).norm() + (second - second.mean()).norm()
    return propensity, (contain - contain_not)[both].norm()


CONTENDERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "fastproj": operator,
    "masks and means": masks_and_means,
}


def batch(name: str, labels: str, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """Logits, and a label a sample or each with a probability of a tenth."""
    samples, number = BATCHES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, number, generator=generator).to(device, DTYPES[dtype])
    if labels == "each":
        said = torch.rand(samples, number, generator=generator) < 0.1
    else:
        said = torch.randint(0, number, (samples,), generator=generator)
    return logits.requires_grad_(), said.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_balance_loss(
    benchmark: Any, contender: str, name: str, labels: str, dtype: str, device: str
) -> None:
    logits, said = batch(name, labels, dtype, device)
    losses = CONTENDERS[contender]

    def gradient(logits: Tensor, said: Tensor) -> Tensor:
        propensity, discrimination = losses(logits, said)
        return torch.autograd.grad(propensity - 0.5 * discrimination, logits)[0]

    threads = torch.get_num_threads()
    benchmark.group = f"balance_loss, {name}, {labels}, {dtype}, {device}, {threads} threads"
    # A fast wrong answer is no contender. fp32 means of a thousand logits, then a rounding of the gradient.
    exact = logits.detach().double().cpu().requires_grad_()
    wants = fastproj.balance_loss(exact, said.cpu())
    for got, want in zip(losses(logits, said), wants, strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)
    (want,) = torch.autograd.grad(wants.propensity - 0.5 * wants.discrimination, exact)
    torch.testing.assert_close(gradient(logits, said).double().cpu(), want, rtol=1e-2, atol=1e-6)
    benchmark.pedantic(timed(gradient, device), args=(logits, said), rounds=9, iterations=20, warmup_rounds=2)
