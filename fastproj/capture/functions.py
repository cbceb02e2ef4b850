"""Layers as autograd functions whose backward also forms the weighted gradient sum.

A function instead of hooks: nothing extra is kept alive between forward and backward, so gradient
checkpointing saves what it should, and both sums come from one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastproj.capture.sums import linear_sums, per_token, vector_sums

Consume = Callable[[nn.Parameter, Tensor, Tensor], Tensor]


@dataclass
class ForwardPass:
    """One forward pass of the model and what its backward needs to know, filled in by the loss.

    ``weights`` is (2, B), ones and the sample weights, or None for an ordinary backward pass.
    ``consume(parameter, plain, weighted)`` takes both sums of a call and returns the gradient to accumulate
    in ``parameter.grad``.
    """

    closed: bool = False
    weights: Tensor | None = None
    consume: Consume | None = None

    def sums(
        self, layer: Layer, batch: int, form: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor] | None:
        """Both sums by ``form``, or None where this is an ordinary backward pass."""
        if not self.closed:
            raise RuntimeError(
                f"backward reached {layer.name!r} before sample weights were known: compute the loss "
                "with the engine's loss() after the forward pass and call backward() on what it returns"
            )
        if self.weights is None:
            return None
        if batch != self.weights.shape[1]:
            raise ValueError(
                f"{layer.name!r} was called with first dimension {batch}, expected the batch of "
                f"{self.weights.shape[1]} samples"
            )
        return form(self.weights)

    def gradient(self, parameter: nn.Parameter, sums: tuple[Tensor, Tensor]) -> Tensor:
        """What goes to ``parameter.grad``, in the dtype of the product."""
        if self.consume is None:
            raise RuntimeError("sample weights were set without a consumer")
        return self.consume(parameter, *sums)


@dataclass(frozen=True)
class Layer:
    """A captured module under the name that the model gives it."""

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]


class CapturedLinear(torch.autograd.Function):
    """``y = x Wᵀ + b``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, forward_pass: ForwardPass
    ) -> Tensor:
        """Plain ``F.linear``; keeps x and W, as autograd's own would."""
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.forward_pass = layer, forward_pass
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """``δW`` for x; ``Σ δ_iᵀ x_i`` and ``Σ w_i δ_iᵀ x_i`` for W."""
        x, weight = ctx.saved_tensors
        module = ctx.layer.module
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = _times(delta, weight) if needs_x else None
        grad_weight = grad_bias = None
        if needs_weight:
            sums = ctx.forward_pass.sums(ctx.layer, x.shape[0], lambda w: linear_sums(x, delta, w))
            grad_weight = (
                delta.reshape(-1, delta.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
                if sums is None
                else ctx.forward_pass.gradient(module.weight, sums)
            )
        if needs_bias:
            sums = ctx.forward_pass.sums(ctx.layer, x.shape[0], lambda w: vector_sums(delta, w))
            grad_bias = (
                delta.reshape(-1, delta.shape[-1]).sum(0)
                if sums is None
                else ctx.forward_pass.gradient(module.bias, sums)
            )
        return grad_x, grad_weight, grad_bias, None, None


def _times(delta: Tensor, weight: Tensor) -> Tensor:
    """``δW`` as one matrix product over all tokens."""
    return (delta.reshape(-1, delta.shape[-1]) @ weight).view(*delta.shape[:-1], weight.shape[1])


class CapturedEmbedding(torch.autograd.Function):
    """``y = W[indices]``."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, layer: Layer, forward_pass: ForwardPass) -> Tensor:
        """Plain ``F.embedding``."""
        ctx.save_for_backward(indices)
        ctx.layer, ctx.forward_pass = layer, forward_pass
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Rows of δ, and of w·δ, added up by index."""
        (indices,) = ctx.saved_tensors
        module = ctx.layer.module

        def gather(values: Tensor) -> Tensor:
            padding = -1 if module.padding_idx is None else module.padding_idx
            return torch.ops.aten.embedding_dense_backward(
                values, indices, module.num_embeddings, padding, module.scale_grad_by_freq
            )

        def form(weights: Tensor) -> tuple[Tensor, Tensor]:
            return gather(delta), gather(delta * per_token(weights[1], delta).view(*delta.shape[:-1], 1))

        sums = ctx.forward_pass.sums(ctx.layer, indices.shape[0], form)
        grad = gather(delta) if sums is None else ctx.forward_pass.gradient(module.weight, sums)
        return None, grad, None, None


class CapturedScale(torch.autograd.Function):
    """``y = x ⊙ γ + β`` over the last dimensions: the affine part of a layer norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, layer: Layer, forward_pass: ForwardPass
    ) -> Tensor:
        """Scale and shift."""
        ctx.save_for_backward(x, scale)
        ctx.layer, ctx.forward_pass = layer, forward_pass
        return x * scale if shift is None else x * scale + shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """``δ ⊙ γ`` for x; sums of δ ⊙ x for γ and of δ for β."""
        x, scale = ctx.saved_tensors
        module = ctx.layer.module
        needs_x, needs_scale, needs_shift = ctx.needs_input_grad[:3]

        def total(values: Tensor, parameter: nn.Parameter) -> Tensor:
            flat = values.reshape(values.shape[0], -1, parameter.numel())
            sums = ctx.forward_pass.sums(ctx.layer, x.shape[0], lambda w: vector_sums(flat, w))
            if sums is None:
                return flat.sum((0, 1)).view(parameter.shape)
            shaped = (sums[0].view(parameter.shape), sums[1].view(parameter.shape))
            return ctx.forward_pass.gradient(parameter, shaped)

        return (
            delta * scale if needs_x else None,
            total(delta * x, module.weight) if needs_scale else None,
            total(delta, module.bias) if needs_shift else None,
            None,
            None,
        )
