"""Weighted sums of a linear layer's per-sample weight gradients, by the cheaper of two orders of summing."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_grad(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t δ_it x_itᵀ`` as (K, d_out, d_in).

    x is (B, T, d_in), delta (B, T, d_out), weights (K, B). The wider of x and delta, if contiguous, is read
    where it lies, once for all K. Where a sample's gradient is smaller than its activations, tokens are
    summed first, for all K at once; else the narrower operand is written K times over for one GEMM.
    """
    result = torch.result_type(x, delta)
    # Half-precision GEMMs crawl on processors without matrix instructions for them; fp32 runs well on all
    # and rounds once.
    compute = torch.float64 if result == torch.float64 else torch.float32
    x, delta, weights = x.to(compute), delta.to(compute), weights.to(compute)
    narrow = min(x.shape[-1], delta.shape[-1])
    product = _tokens_first if 2 * narrow <= x.shape[1] else _stacked_product
    narrow_delta = delta.shape[-1] <= x.shape[-1]
    out = product(delta, x, weights) if narrow_delta else product(x, delta, weights).mT
    return out.to(result).contiguous()


def _tokens_first(narrow: Tensor, wide: Tensor, weights: Tensor) -> Tensor:
    """The per-sample gradients, then all K sums of them by one product."""
    gradients = torch.bmm(narrow.mT, wide)
    return (weights @ gradients.flatten(1)).view(weights.shape[0], *gradients.shape[1:])


def _stacked_product(narrow: Tensor, wide: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t narrow_it wide_itᵀ`` as (K, narrow columns, wide columns)."""
    samples, tokens, columns = narrow.shape
    # Sum by sum: one broadcast product would loop over a row of few columns at a time.
    stacked = narrow.new_empty(samples, tokens, weights.shape[0], columns)
    for k, row in enumerate(weights.unbind(0)):
        torch.mul(narrow, row[:, None, None], out=stacked[:, :, k])
    rows = stacked.reshape(samples * tokens, weights.shape[0] * columns)
    product = rows.T @ wide.reshape(samples * tokens, wide.shape[-1])
    return product.reshape(weights.shape[0], columns, wide.shape[-1])
