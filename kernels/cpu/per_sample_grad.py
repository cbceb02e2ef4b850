"""Per-sample weight gradients of a linear layer: one batched GEMM, or an outer product for one token."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_grad(x: Tensor, delta: Tensor) -> Tensor:
    """``out_i = Σ_t δ_it x_itᵀ`` as (B, d_out, d_in), from x (B, T, d_in) and delta (B, T, d_out)."""
    result = torch.result_type(x, delta)
    # Half-precision GEMMs crawl on processors without matrix instructions for them; fp32 runs well on all
    # and rounds once.
    compute = torch.float64 if result == torch.float64 else torch.float32
    x, delta = x.to(compute), delta.to(compute)
    # A batched GEMM over one token packs operands it uses once; a broadcast product streams them.
    out = delta.mT * x if x.shape[1] == 1 else torch.bmm(delta.mT, x)
    return out.to(result)
