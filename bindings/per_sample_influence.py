"""Dot products of a linear layer's per-sample gradients with references, and square norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings.per_sample_grad import accumulation_dtype, check_dense, check_layer, flatten_tokens
from fastproj.reference.adam import AdamState, adam_slope, adam_update
from fastproj.reference.per_sample_influence import per_sample_influence as reference_per_sample_influence


def per_sample_influence(
    x: Tensor, delta: Tensor, references: Tensor, *, adam: AdamState | None = None
) -> tuple[Tensor, Tensor]:
    """``⟨u_i, R_m⟩`` and ``‖u_i‖²`` with ``u_i = Σ_t δ_it x_itᵀ``, or Adam's update for that gradient.

    With ``adam``, ``u_i = m̂ / (√v̂ + ε)``, where ``m = β1 m_t + (1 − β1) g_i`` and
    ``v = β2 v_t + (1 − β2) g_i²`` are bias-corrected for step t + 1: the direction in which sample i alone
    would move the weight.

    Args:
        x: activations that the layer read, (B, …, d_in); the axes between are tokens, none (B, d_in) to many.
        delta: gradients of the layer's output, (B, …, d_out), of the same leading shape.
        references: M gradients of the layer's weight, (M, d_out, d_in); M may be 0. Any of the dtypes below.
        adam: moments and constants of the weight's optimiser; see ``fastproj.AdamState``. None for plain
            gradients.

    Returns:
        (dots (B, M), square norms (B,)), fp32, or fp64 where x or delta is fp64. In that dtype products are
        summed, moments and references read and Adam's step taken, without rounding the gradient to that of
        the inputs. On a GPU, fp32 products of x and delta are exact unless ``torch.backends.cuda.matmul``
        allows TF32. Equal inputs give equal bits.

    Raises:
        TypeError: an input is not a dense fp32, bf16, fp16 or fp64 tensor, or ``adam`` no AdamState.
        ValueError: shapes or devices do not fit one layer.

    No sample's gradient is written to memory: pieces of it live and die on chip (a GPU) or in the cache (a
    CPU). What fp32 cannot hold is as in any fp32 arithmetic: square norms beyond 3.4e38 are Inf, and where
    ``g²`` is, Adam's step is 0, as the optimiser's own would be; squares below 1e-45 are 0. fp64 inputs
    reach beyond. Zero tokens are gradients of 0. What is not finite in one sample stays in its row.
    Differentiable in x, delta and references, not in the moments.
    Meaning: ``fastproj.reference.per_sample_influence``. Source: Xia et al., "LESS", ICML 2024, section 3,
    without its random projection.
    """
    check_layer(x, delta)
    check_references(references, x, delta)
    moments: tuple[Tensor | None, Tensor | None] = (None, None)
    constants: tuple[int, float, float, float, str] = (0, 0.0, 0.0, 0.0, "adam")
    if adam is not None:
        check_adam(adam, x, delta)
        moments = (adam.exp_avg, adam.exp_avg_sq)
        constants = (adam.step, adam.beta1, adam.beta2, adam.eps, adam.variant)
    products: Tensor = torch.ops.fastproj.per_sample_influence(
        flatten_tokens(x), flatten_tokens(delta), references, *moments, *constants
    )
    return products[:, :-1], products[:, -1]


def per_sample_dot(x: Tensor, delta: Tensor, references: Tensor, *, adam: AdamState | None = None) -> Tensor:
    """``⟨u_i, R_m⟩`` as (B, M): the dot products of ``per_sample_influence``, which see."""
    return per_sample_influence(x, delta, references, adam=adam)[0]


def per_sample_sqnorm(x: Tensor, delta: Tensor, *, adam: AdamState | None = None) -> Tensor:
    """``‖u_i‖²`` as (B,): the square norms of ``per_sample_influence``, which see."""
    check_layer(x, delta)
    references = x.new_empty(0, delta.shape[-1], x.shape[-1])
    return per_sample_influence(x, delta, references, adam=adam)[1]


def check_references(references: Tensor, x: Tensor, delta: Tensor) -> None:
    """Check that the references are gradients of the layer's weight."""
    check_dense("references", references)
    weight = (delta.shape[-1], x.shape[-1])
    if references.dim() != 3 or references.shape[1:] != weight:
        raise ValueError(
            f"references must be (M, {weight[0]}, {weight[1]}), gradients of the layer's weight, "
            f"got shape {tuple(references.shape)}"
        )
    if references.device != x.device:
        raise ValueError(f"references and x must be on one device, got {references.device} and {x.device}")


def check_adam(adam: AdamState, x: Tensor, delta: Tensor) -> None:
    """Check that the moments are those of the layer's weight."""
    if not isinstance(adam, AdamState):
        raise TypeError(f"adam must be an AdamState or None, got {type(adam).__name__}")
    weight = (delta.shape[-1], x.shape[-1])
    for name, moment in (("exp_avg", adam.exp_avg), ("exp_avg_sq", adam.exp_avg_sq)):
        check_dense(f"adam.{name}", moment)
        if moment.shape != weight:
            raise ValueError(
                f"adam.{name} must be {weight}, (d_out, d_in) of the layer, got {tuple(moment.shape)}"
            )
        if moment.device != x.device:
            raise ValueError(f"adam.{name} and x must be on one device, got {moment.device} and {x.device}")


def from_reference(
    x: Tensor,
    delta: Tensor,
    references: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    *constants: Any,
) -> Tensor:
    """The reference in the operator's form and dtype."""
    adam = _adam(exp_avg, exp_avg_sq, *constants)
    dots, sqnorms = reference_per_sample_influence(x, delta, references, adam)
    return torch.cat([dots, sqnorms[:, None]], dim=1).to(accumulation_dtype(x, delta))


def _adam(exp_avg: Tensor | None, exp_avg_sq: Tensor | None, *constants: Any) -> AdamState | None:
    """The operator's arguments as the state that they came from."""
    return None if exp_avg is None or exp_avg_sq is None else AdamState(exp_avg, exp_avg_sq, *constants)


def _dispatch(x: Tensor, delta: Tensor, references: Tensor, *adam: Any) -> Tensor:
    result: Tensor = implementation("per_sample_influence", x.device.type)(x, delta, references, *adam)
    return result


def _fake(x: Tensor, delta: Tensor, references: Tensor, *adam: Any) -> Tensor:
    return x.new_empty((x.shape[0], references.shape[0] + 1), dtype=accumulation_dtype(x, delta))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.constants = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With ``p_im`` and ``s_i`` the gradients of dots and square norms:

    ``du_i = Σ_m p_im R_m + 2 s_i u_i``, ``dR_m = Σ_i p_im u_i``, ``dg_i = du_i ⊙ ∂u/∂g``, and from it
    ``dx_it = dg_iᵀ δ_it``, ``dδ_it = dg_i x_it``. The updates are formed anew, all of them in memory.
    """
    x, delta, references, *moments = ctx.saved_tensors
    dtype = accumulation_dtype(x, delta)
    adam = _adam(*moments, *ctx.constants)
    gradients = torch.ops.fastproj.per_sample_grad(x.to(dtype), delta.to(dtype))
    updates = gradients if adam is None else adam_update(gradients, adam)
    dots, sqnorms = grad[:, :-1], grad[:, -1, None, None]
    d_gradients = torch.einsum("bm,moi->boi", dots, references.to(dtype)) + 2 * sqnorms * updates
    if adam is not None:
        d_gradients = d_gradients * adam_slope(gradients, adam)
    d_x = torch.bmm(delta.to(dtype), d_gradients).to(x.dtype)
    d_delta = torch.bmm(x.to(dtype), d_gradients.mT).to(delta.dtype)
    d_references = None
    if ctx.needs_input_grad[2]:
        d_references = torch.einsum("bm,boi->moi", dots, updates).to(references.dtype)
    return d_x, d_delta, d_references, *[None] * 7


define(
    "per_sample_influence(Tensor x, Tensor delta, Tensor references, Tensor? exp_avg, Tensor? exp_avg_sq, "
    "int step, float beta1, float beta2, float eps, str variant) -> Tensor",
    _dispatch,
    _fake,
)
torch.library.register_autograd(
    "fastproj::per_sample_influence", _backward, setup_context=_setup_context, lib=LIBRARY
)
