"""Propensity and discrimination of label logits on the CPU: one pass of the logits, and NumPy.

A batch of labels is small: each call of ATen would cost more than what it computes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import PACK


def balance_loss(
    logits: Tensor, labels: Tensor, known: Tensor | None, present_only: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Propensity, discrimination, means (2, C) and slopes (2, 2, C) of logits (B, C).

    Means are NaN where neither the batch nor ``known`` has one. ``slopes[k, s, c]`` is the derivative of loss
    k by the logit of c in a sample that has label c (s = 0) or has not (s = 1). Raises ValueError for a label
    out of range.
    """
    number = logits.shape[1]
    with np.errstate(all="ignore"):
        counts, sums = _sums(logits.detach(), labels, ignore_index)
        own = counts > 0
        means, there = sums / counts, own
        if known is not None:
            means = np.where(own, means, known.numpy())
            there = own | ~np.isnan(known.numpy())
        both = there[0] & there[1]
        counted = np.stack([there[0], both if present_only else there[1], both])
        # The vectors whose norms are taken: two about their means, and what lies between them.
        vectors = np.empty((3, number))
        centres = np.where(counted[:2], means, 0.0).sum(1) / counted[:2].sum(1)
        np.subtract(means, centres[:, None], out=vectors[:2])
        np.subtract(means[0], means[1], out=vectors[2])
        vectors[~counted] = 0.0
        norms = np.sqrt((vectors * vectors).sum(1))
        units = np.zeros((4, number))
        np.divide(vectors, norms[:, None], out=units[:3], where=counted & (norms != 0)[:, None])
        np.negative(units[2], out=units[3])
        slopes = np.zeros((2, 2, number))
        np.divide(units.reshape(2, 2, number), counts, out=slopes, where=own)
        dtype = np.float64 if logits.dtype == torch.float64 else np.float32
        losses = [np.array(loss, dtype) for loss in (norms[0] + norms[1], norms[2])]
    propensity, discrimination = (torch.from_numpy(loss) for loss in losses)
    return propensity, discrimination, torch.from_numpy(means), torch.from_numpy(slopes)


def balance_loss_backward(
    propensity_grad: Tensor | None,
    discrimination_grad: Tensor | None,
    slopes: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient (B, C) in ``dtype``: each logit's slopes times the gradients of the losses."""
    sides = np.zeros((2, slopes.shape[2]))
    with np.errstate(all="ignore"):
        for grad, slope in zip((propensity_grad, discrimination_grad), slopes.detach().numpy(), strict=True):
            if grad is not None:
                sides += grad.item() * slope
    has, has_not = torch.from_numpy(sides).to(dtype)
    if labels.dim() == 1:
        return _gradient_of_classes(has, has_not, labels.to(torch.int64), ignore_index)
    if labels.dtype != torch.bool:
        labels = labels.to(torch.int64)
    out = torch.where(labels == 1, has, has_not)
    return out.masked_fill_(labels == ignore_index, 0.0) if labels.dtype != torch.bool else out


def _gradient_of_classes(has: Tensor, has_not: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Each row the same but for its own label, and zeros where that does not count."""
    out = torch.empty(len(labels), len(has), dtype=has.dtype).copy_(has_not)
    ignored = labels == ignore_index
    if bool(ignored.any()):
        out[ignored] = 0.0
        rows = (~ignored).nonzero().squeeze(1)
        out[rows, labels[rows]] = has[labels[rows]]
        return out
    return out.scatter_(1, labels[:, None], has[labels][:, None])


def _sums(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """How many samples have each label and how many have it not, and the sums of their logits, all (2, C)."""
    number = logits.shape[1]
    counts, sums = np.zeros((2, number)), np.zeros((2, number))
    rows = max(1, PACK // number)
    one_pack = _sums_of_classes if labels.dim() == 1 else _sums_of_memberships
    for start in range(0, len(labels), rows):
        # In int64, as −100 would be 156 beside bytes; the logits in a copy that the sums may write to.
        label = labels[start : start + rows].to(torch.int64).numpy()
        values = logits[start : start + rows].to(torch.float64, copy=True).numpy()
        _check_labels(label, number, ignore_index)
        one_pack(values, label, ignore_index, counts, sums)
    return counts, sums


def _sums_of_classes(
    values: np.ndarray, labels: np.ndarray, ignore_index: int, counts: np.ndarray, sums: np.ndarray
) -> None:
    """Add a pack of samples with one label each: its own logit to one side, the others to the other."""
    kept = labels != ignore_index
    if not kept.all():
        values, labels = values[kept], labels[kept]
    number, rows = values.shape[1], np.arange(len(labels))
    own = values[rows, labels]
    values[rows, labels] = 0.0
    present = np.bincount(labels, minlength=number)
    counts[0] += present
    counts[1] += len(labels) - present
    sums[0] += np.bincount(labels, own, number)
    sums[1] += values.sum(0)


def _sums_of_memberships(
    values: np.ndarray, labels: np.ndarray, ignore_index: int, counts: np.ndarray, sums: np.ndarray
) -> None:
    """Add a pack of samples with any labels each."""
    ignored = labels == ignore_index
    counts[1] += len(labels)
    if ignored.any():
        labels = np.where(ignored, 0, labels)
        values[ignored] = 0.0
        counts[1] -= ignored.sum(0)
    present = labels.sum(0)
    counts[0] += present
    counts[1] -= present
    # −1 is all ones and 0 none: of a sample that has the label these are the bits of its logit, else of 0.
    bits = values.view(np.int64)
    own = bits & -labels
    sums[0] += own.view(np.float64).sum(0)
    sums[1] += (bits ^ own).view(np.float64).sum(0)


def _check_labels(labels: np.ndarray, number: int, ignore_index: int) -> None:
    highest = number - 1 if labels.ndim == 1 else 1
    if labels.size and (labels.min() < 0 or labels.max() > highest):
        wrong = labels[((labels < 0) | (labels > highest)) & (labels != ignore_index)]
        if wrong.size:
            raise ValueError(f"labels must be in 0 … {highest} or {ignore_index}, got {wrong[0]}")
