"""Per-sample weight gradients of a linear layer, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_grad(x: Tensor, delta: Tensor) -> Tensor:
    """``out_i = Σ_t δ_it x_itᵀ``: one sample after the other, its tokens flattened.

    ``x`` is (B, …, d_in) and ``delta`` (B, …, d_out) with any number of token axes between, none included;
    the result is (B, d_out, d_in), fp64.
    """
    samples, d_in, d_out = x.shape[0], x.shape[-1], delta.shape[-1]
    tokens = x.shape[1:-1].numel()
    out = torch.zeros(samples, d_out, d_in, dtype=torch.float64, device=x.device)
    for i in range(samples):
        x_i = x[i].to(torch.float64).reshape(tokens, d_in)
        delta_i = delta[i].to(torch.float64).reshape(tokens, d_out)
        out[i] = delta_i.T @ x_i
    return out
