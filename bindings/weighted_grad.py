"""Weighted sums of a linear layer's per-sample weight gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings.per_sample_grad import accumulation_dtype, check_dense, check_layer, flatten_tokens
from fastproj.reference.weighted_grad import weighted_grad as reference_weighted_grad


def weighted_grad(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t δ_it x_itᵀ``: K weighted sums of the per-sample gradients of a linear layer.

    Args:
        x: activations that the layer read, (B, …, d_in); the axes between are tokens, none (B, d_in) to many.
        delta: gradients of the layer's output, (B, …, d_out), of the same leading shape.
        weights: one weight per sample and sum, (K, B); a vector (B,) is K = 1. Any of the dtypes below.

    Returns:
        (K, d_out, d_in) in ``torch.result_type(x, delta)``, K = 1 included; the dtype of the weights has no
        say. fp32, bf16 and fp16 inputs are summed in fp32 and rounded once, fp64 in fp64; weights are taken
        in the dtype of the sum. x and delta are read once for all K.
        On a GPU the weighted side is rounded to the result's dtype before the product, as a layer's own
        backward would, and fp32 products are exact unless ``torch.backends.cuda.matmul`` allows TF32.
        Equal inputs give equal bits, where 16-byte alignment is equal too.

    Raises:
        TypeError: an input is not a dense fp32, bf16, fp16 or fp64 tensor.
        ValueError: leading shapes, numbers of samples or devices differ, or an input has too few axes.

    A weight of zero multiplies like any other, so 0 · Inf is NaN: it does not hide a broken sample. Zero
    samples or tokens give zeros. Differentiable in all three. Meaning: ``fastproj.reference.weighted_grad``.
    Source: the chain rule of ``y = x Wᵀ``, linear in each sample's loss.
    """
    check_layer(x, delta)
    check_weights(weights, x)
    table = weights.unsqueeze(0) if weights.dim() == 1 else weights
    result: Tensor = torch.ops.fastproj.weighted_grad(flatten_tokens(x), flatten_tokens(delta), table)
    return result


def check_weights(weights: Tensor, x: Tensor) -> None:
    """Check that there is one weight for each sample of x."""
    check_dense("weights", weights)
    samples = x.shape[0]
    if weights.dim() not in (1, 2) or weights.shape[-1] != samples:
        raise ValueError(
            f"weights must be ({samples},) or (K, {samples}), one for each sample of x, "
            f"got shape {tuple(weights.shape)}"
        )
    if weights.device != x.device:
        raise ValueError(f"weights and x must be on one device, got {weights.device} and {x.device}")


def from_reference(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """The reference in the operator's result dtype."""
    return reference_weighted_grad(x, delta, weights).to(torch.result_type(x, delta))


def _dispatch(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    result: Tensor = implementation("weighted_grad", x.device.type)(x, delta, weights)
    return result


def _fake(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    shape = (weights.shape[0], delta.shape[2], x.shape[2])
    return x.new_empty(shape, dtype=torch.result_type(x, delta))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``dx_it = Σ_k w_ki D_kᵀ δ_it``, ``dδ_it = Σ_k w_ki D_k x_it``, ``dw_ki = Σ_t δ_itᵀ D_k x_it``.

    The K gradients D_k are stacked, so that the products with δ and with x take one GEMM each.
    """
    x, delta, weights = ctx.saved_tensors
    dtype = accumulation_dtype(x, delta)
    stacked = grad.to(dtype).flatten(0, 1)
    tokens = delta.to(dtype).unsqueeze(2)
    scale = weights.to(dtype).T[:, None, :, None]
    grad_x = grad_delta = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_x = ((scale * tokens).flatten(2) @ stacked).to(x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        products = (x.to(dtype) @ stacked.T).unflatten(2, (weights.shape[0], delta.shape[2]))
        grad_delta = (scale * products).sum(2).to(delta.dtype)
        grad_weights = (products * tokens).sum((1, 3)).T.to(weights.dtype)
    return grad_x, grad_delta, grad_weights


define("weighted_grad(Tensor x, Tensor delta, Tensor weights) -> Tensor", _dispatch, _fake)
torch.library.register_autograd(
    "fastproj::weighted_grad", _backward, setup_context=_setup_context, lib=LIBRARY
)
