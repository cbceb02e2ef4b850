"""Dot products of a linear layer's per-sample gradients with references, and square norms, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.reference.adam import AdamState, adam_update
from fastproj.reference.per_sample_grad import per_sample_grad


def per_sample_influence(
    x: Tensor, delta: Tensor, references: Tensor, adam: AdamState | None = None
) -> tuple[Tensor, Tensor]:
    """``⟨u_i, R_m⟩`` as (B, M) and ``‖u_i‖²`` as (B,): every sample's gradient, its update, its products.

    ``u_i`` is ``Σ_t δ_it x_itᵀ``, or Adam's update for it. ``x`` is (B, …, d_in), ``delta`` (B, …, d_out),
    ``references`` (M, d_out, d_in); both results are fp64.
    """
    updates = per_sample_grad(x, delta)
    if adam is not None:
        updates = adam_update(updates, adam)
    dots = updates.new_zeros(x.shape[0], references.shape[0])
    sqnorms = updates.new_zeros(x.shape[0])
    for i, update in enumerate(updates):
        sqnorms[i] = torch.sum(update * update)
        for m, reference in enumerate(references.to(torch.float64)):
            dots[i, m] = torch.sum(update * reference)
    return dots, sqnorms
