"""One loss for each sample of a batch, out of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings.cross_entropy import cross_entropy
from fastproj.methods.gce import IGNORE_INDEX
from fastproj.methods.second_forward import logits_of

LOSSES = ("causal-lm", "masked-lm", "classification")
SampleLoss = Callable[[Any, Mapping[str, Any]], Tensor]


def sample_loss(loss: str | SampleLoss, reduction: str = "mean") -> SampleLoss:
    """``(outputs, batch) → (B,)`` for a name in :data:`LOSSES`; a callable is taken as it is.

    "causal-lm" and "masked-lm" take the mean (or, with ``reduction="sum"``, the sum) over a sample's tokens
    that count: those with labels other than −100. Without labels a causal model is held against its own
    input, where ``attention_mask`` is 1.

    Raises ValueError for an unknown name or reduction.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES} or a callable of (outputs, batch), got {loss!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    causal = loss == "causal-lm"

    def losses(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        labels = _labels(batch, causal)
        terms = cross_entropy(logits_of(outputs), labels, reduction=reduction, shift=causal)
        return terms.losses

    return losses


def _labels(batch: Mapping[str, Any], causal: bool) -> Tensor:
    if "labels" in batch:
        labels: Tensor = batch["labels"]
        return labels
    if not causal or "input_ids" not in batch:
        raise ValueError(f"a batch needs 'labels', got the keys {sorted(batch)}")
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else torch.where(mask.bool(), ids, IGNORE_INDEX)


def loss_name(loss: str | SampleLoss, reduction: str) -> str:
    """What tells losses apart from one run to the next: for a callable its module and name."""
    if isinstance(loss, str):
        return f"{loss}, {reduction}"
    if isinstance(loss, partial):
        return f"{loss_name(loss.func, reduction)} with {loss.args!r}, {loss.keywords!r}"
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def check_losses(losses: Any, samples: int) -> Tensor:
    """The losses of a batch, if there is one for each sample. Raises TypeError or ValueError otherwise."""
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"the loss must be a tensor with a number for each sample, got {type(losses).__name__}"
        )
    if losses.shape != (samples,):
        raise ValueError(
            f"the loss must have one number for each of the {samples} samples, ({samples},), got shape "
            f"{tuple(losses.shape)}"
        )
    return losses
