"""Per-sample weight gradients of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import KERNEL_DTYPES, LIBRARY, define, implementation
from fastproj.reference.per_sample_grad import per_sample_grad as reference_per_sample_grad


def per_sample_grad(x: Tensor, delta: Tensor) -> Tensor:
    """``out_i = Σ_t δ_it x_itᵀ``: the gradient of a linear layer's weight, sample by sample.

    Args:
        x: activations that the layer read, (B, …, d_in); the axes between are tokens, none (B, d_in) to many.
        delta: gradients of the layer's output, (B, …, d_out), of the same leading shape.

    Returns:
        (B, d_out, d_in) in ``torch.result_type(x, delta)``. fp32, bf16 and fp16 inputs are multiplied and
        summed in fp32 and rounded once, fp64 in fp64. On a GPU, fp32 products are exact unless
        ``torch.backends.cuda.matmul`` allows TF32.

    Raises:
        TypeError: an input is not a dense fp32, bf16, fp16 or fp64 tensor.
        ValueError: leading shapes or devices differ, or an input has fewer than two axes.

    Zero samples give an empty result, zero tokens give zeros. What is not finite in one sample stays in its
    gradient. Differentiable in x and delta. Meaning: ``fastproj.reference.per_sample_grad``. Source: the
    chain rule of ``y = x Wᵀ``; per-sample form after Goodfellow, "Efficient per-example gradient
    computations", 2015.
    """
    check_layer(x, delta)
    result: Tensor = torch.ops.fastproj.per_sample_grad(flatten_tokens(x), flatten_tokens(delta))
    return result


def check_layer(x: Tensor, delta: Tensor) -> None:
    """Check that x and delta can be the input and output gradient of one linear layer."""
    for name, tensor in (("x", x), ("delta", delta)):
        check_dense(name, tensor)
        if tensor.dim() < 2:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} must be (samples, …, features), at least two axes, got shape {shape}")
    if x.shape[:-1] != delta.shape[:-1]:
        raise ValueError(
            "x and delta must agree on samples and tokens, all axes but the last: "
            f"got x {tuple(x.shape)} and delta {tuple(delta.shape)}"
        )
    if x.device != delta.device:
        raise ValueError(f"x and delta must be on one device, got {x.device} and {delta.device}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a dense tensor of a floating-point type the kernels read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}")


def flatten_tokens(tensor: Tensor) -> Tensor:
    """(B, …, d) as (B, T, d): a view wherever the strides allow one."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def from_reference(x: Tensor, delta: Tensor) -> Tensor:
    """The reference in the operator's result dtype."""
    return reference_per_sample_grad(x, delta).to(torch.result_type(x, delta))


def _dispatch(x: Tensor, delta: Tensor) -> Tensor:
    result: Tensor = implementation("per_sample_grad", x.device.type)(x, delta)
    return result


def _fake(x: Tensor, delta: Tensor) -> Tensor:
    shape = (x.shape[0], delta.shape[2], x.shape[2])
    return x.new_empty(shape, dtype=torch.result_type(x, delta))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``dx_it = D_iᵀ δ_it`` and ``dδ_it = D_i x_it``."""
    x, delta = ctx.saved_tensors
    dtype = accumulation_dtype(x, delta)
    grad = grad.to(dtype)
    grad_x = torch.bmm(delta.to(dtype), grad).to(x.dtype) if ctx.needs_input_grad[0] else None
    grad_delta = torch.bmm(x.to(dtype), grad.mT).to(delta.dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_delta


define("per_sample_grad(Tensor x, Tensor delta) -> Tensor", _dispatch, _fake)
torch.library.register_autograd(
    "fastproj::per_sample_grad", _backward, setup_context=_setup_context, lib=LIBRARY
)
