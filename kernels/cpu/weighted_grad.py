"""Weighted sums of a linear layer's per-sample weight gradients: one GEMM, stacked on the narrow side."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_grad(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t δ_it x_itᵀ`` as (K, d_out, d_in).

    x is (B, T, d_in), delta (B, T, d_out), weights (K, B). Only the narrower of x and delta is written K
    times over; the wider one, if contiguous, is an operand of the GEMM where it lies.
    """
    result = torch.result_type(x, delta)
    # Half-precision GEMMs crawl on processors without matrix instructions for them; fp32 runs well on all
    # and rounds once.
    compute = torch.float64 if result == torch.float64 else torch.float32
    x, delta, weights = x.to(compute), delta.to(compute), weights.to(compute)
    if delta.shape[-1] <= x.shape[-1]:
        out = _stacked_product(delta, x, weights)
    else:
        out = _stacked_product(x, delta, weights).mT
    return out.to(result).contiguous()


def _stacked_product(narrow: Tensor, wide: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t narrow_it wide_itᵀ`` as (K, narrow columns, wide columns)."""
    samples, tokens, columns = narrow.shape
    scaled = weights.T[:, None, :, None] * narrow[:, :, None, :]
    stacked = scaled.reshape(samples * tokens, weights.shape[0] * columns)
    product = stacked.T @ wide.reshape(samples * tokens, wide.shape[-1])
    return product.reshape(weights.shape[0], columns, wide.shape[-1])
