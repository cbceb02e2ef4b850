"""The plain and the weighted gradient sum of one layer call, from one product.

``weights`` is (2, B): ones and the sample weights.
"""

from __future__ import annotations

from torch import Tensor

from fastproj.bindings._library import implementation


def linear_sums(x: Tensor, delta: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ_i δ_iᵀ x_i, Σ_i w_i δ_iᵀ x_i)``, both (d_out, d_in), from x (B, …, d_in) and δ (B, …, d_out).

    Calls weighted_grad's implementation past its operator: no tracer sees a backward pass, and there is
    one call a layer.
    """
    weighted_grad = implementation("weighted_grad", x.device.type)
    plain, weighted = weighted_grad(with_token_axis(x), with_token_axis(delta), weights)
    return plain, weighted


def with_token_axis(values: Tensor) -> Tensor:
    """(B, T, d): one token where there is no token axis, one axis where there are several."""
    return values if values.dim() == 3 else values.reshape(values.shape[0], -1, values.shape[-1])


def vector_sums(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(Σ_i v_i, Σ_i w_i v_i)`` over samples and tokens of values (B, …, d)."""
    plain, weighted = weights.to(values.dtype) @ with_token_axis(values).sum(1)
    return plain, weighted


def per_token(weights: Tensor, values: Tensor) -> Tensor:
    """Each sample's weight (B,) repeated over its tokens, (B·T, 1), in the dtype of (B, …, d) values."""
    tokens = values[0, ..., 0].numel() if values.dim() > 2 else 1
    return weights.to(values.dtype).view(-1, 1).expand(-1, tokens).reshape(-1, 1)
