"""Cross entropy sample by sample, and the weights ``p_y^q``, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def token_losses(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Losses and ``log p_y`` of logits (B, T, V) against labels (B, T), each (B, T) in fp64.

    ``loss = (1 − ε)(−log p_y) + ε/V Σ_v (−log p_v)``; ``log p_y`` knows nothing of smoothing. Both are 0
    where the label is ``ignore_index``, whatever the logits are there. Differentiable.

    Raises ValueError for another label outside of 0 … V−1.
    """
    losses, log_probabilities = [], []
    for own_logits, own_labels in zip(logits.double(), labels, strict=True):
        for row, label in zip(own_logits, own_labels.tolist(), strict=True):
            if label == ignore_index:
                loss = log_probability = row[:0].sum()
            elif not 0 <= label < len(row):
                raise ValueError(f"labels must be in 0 … {len(row) - 1} or {ignore_index}, got {label}")
            else:
                log_softmax = torch.log_softmax(row, 0)
                loss = log_probability = log_softmax[label]
                if label_smoothing:
                    loss = (1 - label_smoothing) * log_probability + label_smoothing * log_softmax.mean()
            losses.append(-loss)
            log_probabilities.append(log_probability)
    if not losses:
        nothing = logits.new_zeros(labels.shape, dtype=torch.float64)
        return nothing, nothing.clone()
    return torch.stack(losses).view(labels.shape), torch.stack(log_probabilities).view(labels.shape)


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(losses, weights, counted) as ``fastproj.cross_entropy`` defines them, losses and weights in fp64.

    logits (B, C) with labels (B,), or logits (B, T, V) with labels (B, T). With ``shift`` logits at token t
    meet the label at t + 1.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = labels.dim() == 2
    if not tokens:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    losses, log_probabilities = token_losses(logits, labels, ignore_index, label_smoothing)
    counts = labels != ignore_index
    counted = counts.sum(1)
    weights = None
    if level == "token" and tokens:
        if q is not None:
            weights = torch.where(counts, log_probabilities.detach().mul(q).exp(), 0.0)
        return losses, weights, counted
    number = counted.clamp_min(1)
    if q is not None:
        mean = log_probabilities.detach().sum(1) / number
        weights = torch.where(counted > 0, mean.mul(q).exp(), 0.0)
    return losses.sum(1) / (number if reduction == "mean" else 1), weights, counted
