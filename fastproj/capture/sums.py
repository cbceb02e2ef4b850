"""The plain and the weighted gradient sum of one layer call, from one stacked product."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_sums(x: Tensor, delta: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ_i δ_iᵀ x_i, Σ_i w_i δ_iᵀ x_i)``, both (d_out, d_in), from x (B, …, d_in) and δ (B, …, d_out).

    The narrow operand (LoRA's rank side) is stacked with its weighted copy, so that the wide one is read
    once and never copied. Both results may be transposed views of one buffer.
    """
    token_weights = per_token(weights, delta)
    x, delta = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
    if delta.shape[1] <= x.shape[1]:
        plain, weighted = _stacked(delta, token_weights, x)
        return plain, weighted
    plain, weighted = _stacked(x, token_weights, delta)
    return plain.t(), weighted.t()


def _stacked(narrow: Tensor, token_weights: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([narrow, narrow * token_weights], dim=1).t() @ wide
    return both[: narrow.shape[1]], both[narrow.shape[1] :]


def vector_sums(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ_i v_i, Σ_i w_i v_i)`` over samples and tokens of values (B, …, d)."""
    token_weights = per_token(weights, values)
    both = torch.cat([torch.ones_like(token_weights), token_weights], dim=1).t() @ values.reshape(
        -1, values.shape[-1]
    )
    return both[0], both[1]


def per_token(weights: Tensor, values: Tensor) -> Tensor:
    """Each sample's weight repeated over its tokens, (B·T, 1), in the dtype of (B, …, d) values."""
    tokens = values[0, ..., 0].numel() if values.dim() > 2 else 1
    return weights.to(values.dtype).view(-1, 1).expand(-1, tokens).reshape(-1, 1)
