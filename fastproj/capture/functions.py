"""Layers as autograd functions whose backward also forms the weighted gradient sum.

A function instead of hooks: nothing extra is kept alive between forward and backward, so gradient
checkpointing saves what it should, and both sums come from one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastproj.capture.sums import linear_sums, per_token, vector_sums

Consume = Callable[[nn.Parameter, Tensor, Tensor], Tensor]


class Sink(Protocol):
    """What takes the gradients of single samples apart while backward passes through."""

    def contract(self, parameter: nn.Parameter, x: Tensor | None, delta: Tensor) -> None:
        """A call's share of sample i is ``Σ_t δ_it x_itᵀ``; x is None where the parameter is a vector: 1."""

    def scatter(self, parameter: nn.Parameter, indices: Tensor, delta: Tensor) -> None:
        """A call's share of sample i has ``Σ δ_it`` over the tokens of an index in that index's row."""

    def finish(self) -> None:
        """The backward pass is over; calls that it did not come to have no share in the loss."""


@dataclass
class ForwardPass:
    """One forward pass of the model and what its backward needs to know, filled in by the loss.

    ``weights`` is (2, B), ones and the sample weights, or None for an ordinary backward pass.
    ``consume(parameter, plain, weighted)`` takes both sums of a call and returns the gradient to accumulate
    in ``parameter.grad``. ``calls`` has each called layer's batch (−1 where its calls differ), ``flat`` the
    layers that were called with (B·T, d), ``reached`` says that a layer ran under no_grad, ``epsilon`` is
    that of the coarsest dtype a layer multiplied in. ``reads`` counts the calls that read a parameter. With
    a ``sink`` the backward pass hands it what sample gradients are made of, for a batch of ``samples``, and
    accumulates nothing.
    """

    closed: bool = False
    weights: Tensor | None = None
    consume: Consume | None = None
    calls: dict[str, int] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    reached: bool = False
    epsilon: float = 0.0
    reads: Counter[nn.Parameter] = field(default_factory=Counter)
    sink: Sink | None = None
    samples: int = 0

    def use(self, weights: Tensor | None, consume: Consume | None) -> None:
        """Say what a backward pass does from now on, for sample weights (B,)."""
        self.closed, self.consume = True, consume
        self.weights = None if weights is None else torch.stack([torch.ones_like(weights), weights])

    def observe(self, sink: Sink, samples: int) -> None:
        """Say that a backward pass hands the sample gradients of a batch to ``sink`` from now on."""
        self.closed, self.sink, self.samples = True, sink, samples

    def by_sample(self, layer: Layer, values: Tensor) -> Tensor:
        """A call's values as (B, …, d): rows of a layer that is called flat are taken apart into samples."""
        batch = self.samples if self.weights is None else self.weights.shape[1]
        if not layer.is_flat(values) or not batch or values.shape[0] % batch:
            return values
        return values.view(batch, -1, values.shape[-1])

    def sink_for(self, layer: Layer, batch: int) -> Sink | None:
        """The sink, if this pass has one."""
        if self.sink is not None:
            _check_batch(layer, batch, self.samples)
        return self.sink

    def gradient(
        self,
        layer: Layer,
        parameter: nn.Parameter,
        batch: int,
        form: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor | None:
        """What goes to ``parameter.grad``, or None where this is an ordinary backward pass.

        ``form`` makes both sums, shaped as the parameter, of the weights (2, B).
        """
        if not self.closed:
            raise RuntimeError(
                f"backward reached {layer.name!r} in a forward pass whose sample weights are not known: call "
                "the engine's loss() once after each forward pass, and backward() on what it returns"
            )
        if self.weights is None or self.consume is None:
            return None
        _check_batch(layer, batch, self.weights.shape[1])
        device_type = self.weights.device.type
        if not torch.is_autocast_enabled(device_type):
            return self.consume(parameter, *form(self.weights))
        with torch.autocast(device_type, enabled=False):  # a backward pass in there would sum in its dtype
            return self.consume(parameter, *form(self.weights))


@dataclass(frozen=True)
class Layer:
    """A captured module under the name that the model gives it.

    ``may_be_flat`` says that the model calls it with the tokens of all samples as rows, sample after sample.
    """

    name: str
    module: nn.Module
    may_be_flat: bool = False

    def is_flat(self, values: Tensor) -> bool:
        """Whether these are (B·T, d)."""
        return self.may_be_flat and values.dim() == 2


def _check_batch(layer: Layer, batch: int, samples: int) -> None:
    if batch != samples:
        raise ValueError(
            f"{layer.name!r} was called with first dimension {batch}, expected the batch of {samples} samples"
        )


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
        """``δW`` for x; ``Σ δ_iᵀ x_i`` and ``Σ w_i δ_iᵀ x_i`` for W, ``Σ δ_i`` and ``Σ w_i δ_i`` for b."""
        return _linear_backward(ctx, delta, transposed=False)


class CapturedConv1D(torch.autograd.Function):
    """``y = x W + b``: the linear layer of transformers' GPT-2, whose weight is (d_in, d_out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: Layer, forward_pass: ForwardPass
    ) -> Tensor:
        """The layer's own product; keeps x and W, as autograd's own would."""
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.forward_pass = layer, forward_pass
        return conv1d(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """``δWᵀ`` for x; ``Σ x_iᵀ δ_i`` and ``Σ w_i x_iᵀ δ_i`` for W; for b as a linear layer."""
        return _linear_backward(ctx, delta, transposed=True)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W + b``, bit for bit as transformers' Conv1D forms it."""
    return torch.addmm(bias, _rows(x), weight).view(*x.shape[:-1], weight.shape[1])


def _linear_backward(ctx: Any, delta: Tensor, *, transposed: bool) -> tuple[Tensor | None, ...]:
    """``δW`` for x, ``Σ δ_iᵀ x_i`` for W, ``Σ δ_i`` for b; both for Wᵀ where the layer holds that."""
    x, weight = ctx.saved_tensors
    layer, forward_pass, module = ctx.layer, ctx.forward_pass, ctx.layer.module
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = _times(delta, weight.t() if transposed else weight) if needs_x else None
    x, delta = forward_pass.by_sample(layer, x), forward_pass.by_sample(layer, delta)
    left, right = (x, delta) if transposed else (delta, x)
    grad_weight = grad_bias = None
    sink = forward_pass.sink_for(layer, x.shape[0])
    if sink is not None:
        if needs_weight:
            sink.contract(module.weight, right, left)
        if needs_bias:
            sink.contract(module.bias, None, delta)
        return grad_x, None, None, None, None
    if needs_weight:
        grad_weight = forward_pass.gradient(
            layer, module.weight, x.shape[0], lambda w: linear_sums(right, left, w)
        )
        if grad_weight is None:
            grad_weight = _rows(left).t() @ _rows(right)
    if needs_bias:
        grad_bias = forward_pass.gradient(layer, module.bias, x.shape[0], lambda w: vector_sums(delta, w))
        if grad_bias is None:
            grad_bias = _rows(delta).sum(0)
    return grad_x, grad_weight, grad_bias, None, None


def _rows(values: Tensor) -> Tensor:
    """Samples and tokens as rows."""
    return values.reshape(-1, values.shape[-1])


def _times(delta: Tensor, weight: Tensor) -> Tensor:
    """``δW`` as one matrix product over all tokens."""
    return (_rows(delta) @ weight).view(*delta.shape[:-1], weight.shape[1])


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
        sink = ctx.forward_pass.sink_for(ctx.layer, indices.shape[0])
        if sink is not None:
            if module.scale_grad_by_freq:
                raise RuntimeError(
                    f"{ctx.layer.name!r} has scale_grad_by_freq, which counts over the whole batch"
                )
            padded = None if module.padding_idx is None else (indices == module.padding_idx).unsqueeze(-1)
            sink.scatter(module.weight, indices, delta if padded is None else delta.masked_fill(padded, 0))
            return None, None, None, None

        def gather(values: Tensor) -> Tensor:
            padding = -1 if module.padding_idx is None else module.padding_idx
            return torch.ops.aten.embedding_dense_backward(
                values, indices, module.num_embeddings, padding, module.scale_grad_by_freq
            )

        def form(weights: Tensor) -> tuple[Tensor, Tensor]:
            return gather(delta), gather(delta * per_token(weights[1], delta).view(*delta.shape[:-1], 1))

        grad = ctx.forward_pass.gradient(ctx.layer, module.weight, indices.shape[0], form)
        return None, gather(delta) if grad is None else grad, None, None


class CapturedLayerNorm(torch.autograd.Function):
    """``y = x̂ ⊙ γ + β`` with x̂ the normalised input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, layer: Layer, forward_pass: ForwardPass
    ) -> Tensor:
        """Plain layer norm; keeps x and the statistics, as autograd's own would."""
        module: Any = layer.module
        out, mean, rstd = torch.native_layer_norm(x, module.normalized_shape, scale, shift, module.eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.layer, ctx.forward_pass = layer, forward_pass
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Layer norm's own gradient for x; sums of δ ⊙ x̂ for γ and of δ for β."""
        x, scale, mean, rstd = ctx.saved_tensors
        module = ctx.layer.module
        needs_x, needs_scale, needs_shift = ctx.needs_input_grad[:3]
        grad_x = None
        if needs_x:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                delta.contiguous(), x, module.normalized_shape, mean, rstd, scale, None, [True, False, False]
            )[0]
        batch = ctx.forward_pass.by_sample(ctx.layer, x).shape[0]
        sink = ctx.forward_pass.sink_for(ctx.layer, batch)

        def total(values: Tensor, parameter: nn.Parameter) -> Tensor | None:
            flat = values.reshape(batch, -1, parameter.numel())
            if sink is not None:
                sink.contract(parameter, None, flat)
                return None

            def form(weights: Tensor) -> tuple[Tensor, Tensor]:
                plain, weighted = vector_sums(flat, weights)
                return plain.view(parameter.shape), weighted.view(parameter.shape)

            grad = ctx.forward_pass.gradient(ctx.layer, parameter, batch, form)
            return (flat.sum((0, 1)).view(parameter.shape) if grad is None else grad).to(parameter.dtype)

        return (
            grad_x,
            total(delta.to(mean.dtype) * (x.to(mean.dtype) - mean) * rstd, module.weight)
            if needs_scale
            else None,
            total(delta.to(mean.dtype), module.bias) if needs_shift else None,
            None,
            None,
        )
