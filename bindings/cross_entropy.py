"""Cross entropy of every sample or token, and the weights that make generalised cross entropy of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, backend_for, define, implementation
from fastproj.bindings.per_sample_grad import accumulation_dtype, check_dense
from fastproj.reference.cross_entropy import token_losses

LEVELS = ("sequence", "token")
REDUCTIONS = ("mean", "sum")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class SampleLosses:
    """Cross entropy of a batch.

    ``losses`` is (B,), or (B, T) at level ``"token"``; ``weights``, of the same shape and detached, is
    ``p_y^q``, None where no q was asked for; ``counted`` (B,) int64 is how many labels of a sample count.
    """

    losses: Tensor
    weights: Tensor | None
    counted: Tensor


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    q: float | None = None,
    level: str = "sequence",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
) -> SampleLosses:
    """``ℓ = (1 − ε)(−log p_y) + ε/V Σ_v (−log p_v)`` with ``p = softmax(logits)``, and ``p_y^q``.

    Args:
        logits: (B, C) for classes or (B, T, V) for tokens.
        labels: integers, (B,) or (B, T).
        q: exponent of the weights, in (0, 1]; None for no weights.
        level: ``"sequence"`` reduces the tokens of a sample to one loss (B,), and takes for its p_y the
            geometric mean over them; ``"token"`` leaves (B, T). Classes know no difference.
        reduction: ``"mean"`` or ``"sum"`` over the tokens of a sample that count, at level ``"sequence"``.
        ignore_index: a label that does not count: its loss, weight and gradient are 0 and its logits are
            not read, so that what is not finite there stays there.
        label_smoothing: ε in [0, 1], as ``torch.nn.functional.cross_entropy`` defines it. p_y in the weights
            is the label's own probability without smoothing.
        shift: hold the logits at token t against the label at t + 1, as causal language models need it;
            T − 1 tokens are left. No logits are copied for it.

    Returns:
        :class:`SampleLosses`; losses and weights in fp32, fp64 where the logits are fp64. Sums are taken in
        that dtype. A sample without a label that counts has loss 0 and weight 0.

    Raises:
        TypeError: logits are not dense fp32, bf16, fp16 or fp64, or labels are not integers.
        ValueError: shapes or devices differ, there are no classes, an option is not one of those above, or,
            on the CPU, a label is out of range. On a GPU the host does not wait to see one: loss, weight
            and gradient of that token are NaN.

    Differentiable in the logits, twice. The vocabulary is read once, each row in pieces, and no copy of the
    logits is made; the gradient is written in one pass from the saved maximum and log-sum of each row.
    Logits of −Inf are classes of probability 0; NaN and +Inf make NaN of their own row alone.
    Meaning: ``fastproj.reference.cross_entropy``. Source: Zhang & Sabuncu 2018, eq. 6, for the weights:
    ``d/dθ (1 − p^q)/q = p^q · d(−log p)/dθ``; Szegedy et al. 2016, section 7, for smoothing.
    """
    _check(logits, labels)
    _check_options(q, level, reduction, label_smoothing)
    tokens = labels.dim() == 2
    if shift and not tokens:
        raise ValueError(f"shift needs logits (B, T, V), got shape {tuple(logits.shape)}")
    if not tokens:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    labels = labels.to(torch.int64)
    if shift:
        # Labels move and not the logits: a slice of these would be copied, and so would its gradient.
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], 1)
    losses, log_probabilities, _, _ = torch.ops.fastproj.cross_entropy(
        logits, labels, ignore_index, float(label_smoothing)
    )
    counts = labels != ignore_index
    counted = counts.sum(1)
    weights = None
    if level == "token" and tokens:
        if q is not None:
            weights = torch.where(counts, torch.exp(q * log_probabilities), 0.0)
        end = -1 if shift else None
        return SampleLosses(losses[:, :end], None if weights is None else weights[:, :end], counted)
    number = counted.clamp_min(1)
    if q is not None:
        weights = torch.where(counted > 0, torch.exp(q * (log_probabilities.sum(1) / number)), 0.0)
    return SampleLosses(losses.sum(1) / (number if reduction == "mean" else 1), weights, counted)


def _check(logits: Tensor, labels: Tensor) -> None:
    check_dense("logits", logits)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be integers (class or token ids), got {labels.dtype}")
    if logits.dim() not in (2, 3) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "expected logits (B, C) with labels (B,) or logits (B, T, V) with labels (B, T), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"expected at least one class, got logits of shape {tuple(logits.shape)}")
    if logits.device != labels.device:
        raise ValueError(f"logits and labels must be on one device, got {logits.device} and {labels.device}")


def _check_options(q: float | None, level: str, reduction: str, label_smoothing: float) -> None:
    if q is not None and not 0 < q <= 1:
        raise ValueError(f"q must be in (0, 1], got {q}")
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def from_reference(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference in the operator's dtype, with the maximum and the log-sum that its gradient needs."""
    losses, log_probabilities = token_losses(logits, labels, ignore_index, label_smoothing)
    ignored = (labels == ignore_index).unsqueeze(2)
    values = logits.double().masked_fill(ignored, 0.0)
    maxima = values.amax(2)
    log_sums = (values - maxima.unsqueeze(2)).exp().sum(2).log()
    dtype = accumulation_dtype(logits)
    return losses.to(dtype), log_probabilities.to(dtype), maxima.to(dtype), log_sums.to(dtype)


def backward_from_reference(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient in the dtype of the logits, by fp64 autograd through the reference."""
    with torch.enable_grad():
        values = logits.detach().double().requires_grad_()
        losses, _ = token_losses(values, labels, ignore_index, label_smoothing)
        (out,) = torch.autograd.grad(losses, values, grad.double())
    return out.to(logits.dtype)


@cache
def _backward_implementation(device_type: str) -> Any:
    backend = backend_for("cross_entropy", device_type)
    name = "backward_from_reference" if backend.name == "reference" else "cross_entropy_backward"
    return getattr(import_module(backend.module), name)


def _dispatch(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = implementation("cross_entropy", logits.device.type)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = forward(logits, labels, ignore_index, label_smoothing)
    return results


def _dispatch_backward(grad: Tensor, logits: Tensor, *others: Any) -> Tensor:
    result: Tensor = _backward_implementation(logits.device.type)(grad, logits, *others)
    return result


def _fake(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    first, second, third, fourth = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return first, second, third, fourth


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.options = inputs
    _, log_probabilities, maxima, log_sums = output
    ctx.mark_non_differentiable(log_probabilities, maxima, log_sums)
    ctx.save_for_backward(logits, labels, maxima, log_sums)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    out = torch.ops.fastproj.cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options)
    return out, None, None, None


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With u the gradient of ``g (p − t)``: ``Σ u (p − t)`` for g, ``g p (u − Σ p u)`` for the logits.

    The maximum and the log-sum are functions of the logits here.
    """
    scale, logits, labels, maxima, log_sums = ctx.saved_tensors
    counts = (labels != ctx.ignore_index).unsqueeze(2)
    valid = (labels >= 0) & (labels < logits.shape[2])
    dtype = scale.dtype
    shifted = logits.to(dtype) - maxima.unsqueeze(2) - log_sums.unsqueeze(2)
    p = torch.where(counts, shifted.exp(), 0.0)
    u = torch.where(counts, grad.to(dtype), 0.0)
    pu = (p * u).sum(2)
    own = u.gather(2, torch.where(valid, labels, 0).unsqueeze(2)).squeeze(2)
    for_scale = pu - (1 - ctx.label_smoothing) * own - ctx.label_smoothing * u.mean(2)
    for_logits = scale.unsqueeze(2) * p * (u - pu.unsqueeze(2))
    return for_scale, for_logits.to(logits.dtype), None, None, None, None, None


define(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _dispatch,
    _fake,
)
define(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor maxima, Tensor log_sums,"
    " int ignore_index, float label_smoothing) -> Tensor",
    _dispatch_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "fastproj::cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "fastproj::cross_entropy_backward", _second_backward, setup_context=_setup_second_context, lib=LIBRARY
)
