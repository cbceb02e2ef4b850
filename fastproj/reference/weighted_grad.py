"""Weighted sums of a linear layer's per-sample weight gradients, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.reference.per_sample_grad import per_sample_grad


def weighted_grad(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t δ_it x_itᵀ``: form every sample's gradient, then add them up.

    ``x`` is (B, …, d_in), ``delta`` (B, …, d_out) and ``weights`` (K, B), or (B,) for K = 1; the result is
    (K, d_out, d_in), fp64. A weight of zero multiplies like any other: 0 · Inf is NaN.
    """
    weights = torch.atleast_2d(weights.to(torch.float64))
    gradients = per_sample_grad(x, delta)
    out = gradients.new_zeros(weights.shape[0], delta.shape[-1], x.shape[-1])
    for k in range(weights.shape[0]):
        for i in range(x.shape[0]):
            out[k] += weights[k, i] * gradients[i]
    return out
