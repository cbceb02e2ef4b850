"""Gradients of single samples by a backward pass each: what influence is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import BATCH, Tiny
from torch import Tensor

import fastproj
from fastproj.influence.references import References
from fastproj.reference.adam import AdamState, adam_update


def loss_name(tiny: Tiny) -> str:
    return "causal-lm" if tiny.shift else "classification"


def batch_of(tiny: Tiny) -> dict[str, Any]:
    return {**tiny.inputs, "labels": tiny.labels}


def one_by_one(tiny: Tiny, names: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Each sample's gradients of the named parameters, from a backward pass of its own, unpadded."""
    parameters = {name: p for name, p in tiny.model.named_parameters() if name in names}
    for row in range(BATCH):
        one = tiny.rows(row, row + 1)
        mask = one.inputs["attention_mask"][0].bool()
        logits = tiny.model(**{name: value[:, mask] for name, value in one.inputs.items()}).logits
        if tiny.shift:
            loss = F.cross_entropy(logits[0, :-1], one.labels[0, mask][1:])
        else:
            loss = F.cross_entropy(logits, one.labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        yield dict(zip(parameters, gradients, strict=True))


def trained_adamw(scorer: fastproj.InfluenceScorer) -> torch.optim.AdamW:
    """AdamW after two steps with gradients that have nothing to do with the model's."""
    optimizer = torch.optim.AdamW(scorer.parameters.values(), lr=1e-3, betas=(0.8, 0.95), eps=1e-6)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for parameter in scorer.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = 0.01 * noise.to(parameter.dtype)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def expected_scores(
    tiny: Tiny, references: References, adam: Mapping[str, AdamState] | None, normalize: bool = True
) -> Tensor:
    """The definition: flatten, take the update, take the cosine (or dot product)."""
    own = references.gradients[0]
    targets = torch.cat([gradient.flatten(1) for gradient in own.values()], 1)
    rows = []
    for gradients in one_by_one(tiny, own):
        updates = [g if adam is None else adam_update(g, adam[name]) for name, g in gradients.items()]
        flat = torch.cat([update.flatten() for update in updates])
        dots = targets @ flat
        rows.append(dots / (flat.norm() * targets.norm(dim=1)) if normalize else dots)
    return torch.stack(rows)
