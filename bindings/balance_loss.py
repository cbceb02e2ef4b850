"""Label propensity and discrimination of a batch's label logits, with one pass for their gradient."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.bindings._library import LIBRARY, backend_for, define, implementation
from fastproj.bindings.per_sample_grad import accumulation_dtype, check_dense
from fastproj.reference.balance_loss import (
    label_means,
    memberships,
    propensity_and_discrimination,
    remembered,
)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class BalanceLoss(NamedTuple):
    """Two losses of a batch's label logits, each without dimensions.

    ``propensity`` is to be small: labels alike in their mean logits. ``discrimination`` is to be large: each
    label's mean logit apart between samples that have the label and samples that have not.
    """

    propensity: Tensor
    discrimination: Tensor


class RunningMeans(nn.Module):
    """Mean logits of labels over the batches so far, for labels that a batch lacks.

    Args:
        num_labels: C, one at least.
        momentum: share of what is remembered that stays when a batch brings a mean, in [0, 1).

    The buffer ``means`` (2, C) fp64 holds H^C and H^N, NaN for what has not been seen; it is in the state
    dict and follows the logits to their device. A first mean is taken as it is, later ones by
    ``momentum · old + (1 − momentum) · new``; one that is not finite is passed over. In evaluation mode the
    memory is read and not written. Raises ValueError for numbers outside of these ranges. Source: ours.
    """

    means: Tensor

    def __init__(self, num_labels: int, momentum: float = 0.9) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.num_labels, self.momentum = num_labels, momentum
        self.register_buffer("means", torch.full((2, num_labels), torch.nan, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"{self.num_labels}, momentum={self.momentum}"

    def on(self, device: torch.device) -> Tensor:
        """The means on ``device``, in fp64 whatever the module was cast to."""
        if self.means.device != device or self.means.dtype != torch.float64:
            self.means = self.means.to(device, torch.float64)
        return self.means

    @torch.no_grad()
    def update(self, means: Tensor) -> None:
        """Take in a batch's means (2, C), among which those that were remembered change nothing."""
        old = self.on(means.device)
        new = torch.where(old.isnan(), means, torch.lerp(old, means, 1 - self.momentum))
        old.copy_(torch.where(means.isfinite(), new, old))


def balance_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    present_only: bool = True,
    running: RunningMeans | None = None,
    ignore_index: int = -100,
) -> BalanceLoss:
    """``‖H^C − mean(H^C)‖₂ + ‖H^N − mean(H^N)‖₂`` and ``‖H^C − H^N‖₂`` of a batch's label logits.

    ``H^C_c`` is the mean logit of label c over the samples that have it, ``H^N_c`` over those that have not;
    S_C is the labels that some sample has, S_N those that some sample has not. The first norm, about its
    mean, is over S_C, the second over S_N; together they are the propensity. The third, over the labels in
    both, is the discrimination.

    Args:
        logits: (B, C), a logit of each label for each sample.
        labels: the label of each sample, (B,) integers; or which labels it has, (B, C) bool or 0-1 integers.
        present_only: H^N too only over labels that some sample has.
        running: means of earlier batches. A label of which the batch has no H^C (H^N) counts with the one
            remembered, a constant, if there is one; afterwards the memory takes in the batch's. None for no
            memory.
        ignore_index: a value that does not count: of (B,) the whole sample, of (B, C) the entry.

    Returns:
        :class:`BalanceLoss`: propensity and discrimination, fp32, or fp64 where the logits are fp64. Sums and
        norms are taken in fp64. A norm over no label is 0.

    Raises:
        TypeError: logits are not dense fp32, bf16, fp16 or fp64, labels are not integers (or, of (B, C),
            bool), or ``running`` is not :class:`RunningMeans`.
        ValueError: shapes or devices differ, there are no labels, ``running`` is of another number of them,
            or, on the CPU, a label is out of range. On a GPU the host does not wait to see one: both losses
            and the gradient are NaN, and the memory stays as it is.

    Example:
        >>> import torch
        >>> import fastproj
        >>> logits = torch.tensor([[4.0, 2.0], [0.0, 5.0], [2.0, 7.0]])
        >>> loss = fastproj.balance_loss(logits, torch.tensor([0, 1, 1]))

        H^C = (4, (5 + 7)/2) = (4, 6) and H^N = ((0 + 2)/2, 2) = (1, 2). About their means these are (−1, 1)
        and (−½, ½), whose norms are √2 and √½; H^C − H^N = (3, 4).

        >>> [round(value.item(), 4) for value in loss]
        [2.1213, 5.0]

    Differentiable in the logits, any number of times; where a norm is exactly 0 its gradient is 0, a
    subgradient. What is not finite in a label that counts is in the losses; a logit in no mean that counts
    does no harm. Training minimises ``α L_LM + β propensity − γ discrimination``.
    Meaning: ``fastproj.reference.balance_loss``. Source: Zhao, Yang & Chen, "Debiasing the Fine-Grained
    Classification Task in LLMs with Bias-Aware PEFT", ACL 2025; several labels a sample, what is ignored and
    the memory are ours.
    """
    _check(logits, labels)
    known = None
    if running is not None:
        _check_running(running, logits)
        known = running.on(logits.device)
    propensity, discrimination, means, _ = torch.ops.fastproj.balance_loss(
        logits, labels, known, present_only, ignore_index
    )
    if running is not None and running.training:
        running.update(means.detach())
    return BalanceLoss(propensity, discrimination)


def _check(logits: Tensor, labels: Tensor) -> None:
    check_dense("logits", logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    allowed = INTEGERS if labels.dim() == 1 else (*INTEGERS, torch.bool)
    if labels.dtype not in allowed:
        raise TypeError(f"labels must be integers (B,), or bool or 0-1 integers (B, C), got {labels.dtype}")
    if logits.dim() != 2 or labels.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            "expected logits (B, C) with labels (B,) or (B, C), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.shape[1] == 0:
        raise ValueError(f"expected at least one label, got logits of shape {tuple(logits.shape)}")
    if logits.device != labels.device:
        raise ValueError(f"logits and labels must be on one device, got {logits.device} and {labels.device}")


def _check_running(running: RunningMeans, logits: Tensor) -> None:
    if not isinstance(running, RunningMeans):
        raise TypeError(f"running must be RunningMeans or None, got {type(running).__name__}")
    if running.num_labels != logits.shape[1]:
        raise ValueError(
            f"running must be of as many labels as the logits, {logits.shape[1]}, got {running.num_labels}"
        )


def from_reference(
    logits: Tensor, labels: Tensor, known: Tensor | None, present_only: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference in the operator's dtypes, with the slopes that its gradient needs."""
    means, counts = label_means(logits, labels, ignore_index)
    means, counted = remembered(means, counts, known)
    with torch.enable_grad():
        leaf = means.clone().requires_grad_()
        losses = propensity_and_discrimination(leaf, counted, present_only)
        slopes = _slopes(losses, leaf, counts)
    propensity, discrimination = (loss.detach().to(accumulation_dtype(logits)) for loss in losses)
    return propensity, discrimination, means, slopes.detach()


def _slopes(losses: tuple[Tensor, Tensor], means: Tensor, counts: Tensor) -> Tensor:
    """(2, 2, C): the derivatives of both losses by a logit in each mean, differentiable themselves."""
    grads = [torch.autograd.grad(loss, means, create_graph=True)[0] for loss in losses]
    return _per_sample(torch.stack(grads), counts)


def _per_sample(grads: Tensor, counts: Tensor) -> Tensor:
    """The derivatives by a logit in each mean, of those by the means; 0 where a mean is of none."""
    # Clamped, as the derivative of a quotient by zero would be NaN even where it is not taken.
    return torch.where(counts > 0, grads / counts.clamp_min(1), 0.0)


def backward_from_reference(
    propensity_grad: Tensor | None,
    discrimination_grad: Tensor | None,
    slopes: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient in ``dtype``: each logit's slopes times the gradients of the losses."""
    sides = memberships(labels, slopes.shape[2], ignore_index)
    out = slopes.new_zeros(sides.shape[1:])
    for grad, slope in zip((propensity_grad, discrimination_grad), slopes, strict=True):
        if grad is not None:
            out += torch.where(sides, (slope * grad)[:, None], 0.0).sum(0)
    return out.to(dtype)


@cache
def _backward_implementation(device_type: str) -> Any:
    backend = backend_for("balance_loss", device_type)
    name = "backward_from_reference" if backend.name == "reference" else "balance_loss_backward"
    return getattr(import_module(backend.module), name)


def _dispatch(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = implementation("balance_loss", logits.device.type)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = forward(logits, *others)
    return results


def _dispatch_backward(
    propensity_grad: Tensor | None, discrimination_grad: Tensor | None, slopes: Tensor, *others: Any
) -> Tensor:
    backward = _backward_implementation(slopes.device.type)
    result: Tensor = backward(propensity_grad, discrimination_grad, slopes, *others)
    return result


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = (logits.new_empty((), dtype=accumulation_dtype(logits)) for _ in range(2))
    means, slopes = (
        logits.new_empty((*shape, logits.shape[1]), dtype=torch.float64) for shape in ((2,), (2, 2))
    )
    return first, second, means, slopes


def _fake_backward(
    propensity_grad: Tensor | None,
    discrimination_grad: Tensor | None,
    slopes: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    return slopes.new_empty((labels.shape[0], slopes.shape[2]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, ctx.present_only, ctx.ignore_index = inputs
    ctx.dtype = logits.dtype
    # A loss that is not used brings no gradient, and no zeros in its place.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(labels, *output[2:])


def _backward(
    ctx: Any,
    propensity_grad: Tensor | None,
    discrimination_grad: Tensor | None,
    means_grad: Tensor | None,
    slopes_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradient by the slopes; of means and slopes there is one only where it is differentiated again."""
    labels, means, slopes = ctx.saved_tensors
    out = None
    if propensity_grad is not None or discrimination_grad is not None:
        out = torch.ops.fastproj.balance_loss_backward(
            propensity_grad, discrimination_grad, slopes, labels, ctx.ignore_index, ctx.dtype
        )
    if slopes_grad is not None or means_grad is not None:
        further = _through_the_means(ctx, means_grad, slopes_grad, labels, means)
        out = further if out is None else out + further
    return out, None, None, None, None


def _through_the_means(
    ctx: Any, means_grad: Tensor | None, slopes_grad: Tensor | None, labels: Tensor, means: Tensor
) -> Tensor:
    """The gradient of ``⟨means_grad, means⟩ + ⟨slopes_grad, slopes⟩``, through the reference."""
    counts = memberships(labels, means.shape[1], ctx.ignore_index).sum(1)
    total = torch.zeros_like(means) if means_grad is None else means_grad
    if slopes_grad is not None:
        with torch.enable_grad():
            counted = (counts > 0) | ~means.isnan()
            losses = propensity_and_discrimination(means, counted, ctx.present_only)
            slopes = _slopes(losses, means, counts)
            total = total + torch.autograd.grad(slopes, means, slopes_grad, create_graph=True)[0]
    table = _per_sample(total, counts)
    one = table.new_ones(())
    # One loss whose slopes are these: the other has none.
    return torch.ops.fastproj.balance_loss_backward(
        one, None, torch.stack([table, torch.zeros_like(table)]), labels, ctx.ignore_index, ctx.dtype
    )


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    propensity_grad, discrimination_grad, slopes, labels, ctx.ignore_index, _ = inputs
    ctx.save_for_backward(propensity_grad, discrimination_grad, slopes, labels)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With s the sums of the incoming gradient over each mean's logits: ``⟨slopes, s⟩`` and ``grad · s``."""
    *grads, slopes, labels = ctx.saved_tensors
    sides = memberships(labels, slopes.shape[2], ctx.ignore_index)
    sums = torch.where(sides, grad.to(slopes.dtype), 0.0).sum(1)
    for_grads = [
        None if own is None else (slope * sums).sum().to(own.dtype)
        for own, slope in zip(grads, slopes, strict=True)
    ]
    for_slopes = [torch.zeros_like(sums) if own is None else own * sums for own in grads]
    return *for_grads, torch.stack(for_slopes), None, None, None


define(
    "balance_loss(Tensor logits, Tensor labels, Tensor? known, bool present_only, int ignore_index)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake,
)
define(
    "balance_loss_backward(Tensor? propensity_grad, Tensor? discrimination_grad, Tensor slopes,"
    " Tensor labels, int ignore_index, ScalarType dtype) -> Tensor",
    _dispatch_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "fastproj::balance_loss", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "fastproj::balance_loss_backward", _second_backward, setup_context=_setup_second_context, lib=LIBRARY
)
