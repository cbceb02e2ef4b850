"""Cross entropy token by token on the CPU: rows of logits in packs that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import PACK


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ``log p_y``, maxima m and ``log Σ exp(x − m)`` of logits (B, T, V) against labels (B, T).

    Ignored rows are not read and give zeros. Raises ValueError for a label outside of 0 … V−1.
    """
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses, log_probabilities, maxima, log_sums = (
        torch.zeros(labels.numel(), dtype=compute) for _ in range(4)
    )
    scratch = torch.empty(_pack_rows(logits), logits.shape[2], dtype=compute)
    for rows, values, label in _packs(logits, labels, ignore_index):
        _check_labels(label, logits.shape[2], ignore_index)
        maximum = values.amax(1, keepdim=True).to(compute)
        shifted = torch.sub(values, maximum, out=scratch[: len(values)])
        own = shifted.gather(1, label[:, None]).squeeze(1)
        mean = shifted.mean(1) if label_smoothing else None
        log_sum = shifted.exp_().sum(1).log_()
        log_probabilities[rows] = own - log_sum
        losses[rows] = log_sum - own
        if mean is not None:
            losses[rows] = (1 - label_smoothing) * (log_sum - own) + label_smoothing * (log_sum - mean)
        maxima[rows], log_sums[rows] = maximum.squeeze(1), log_sum
    shape = labels.shape
    return losses.view(shape), log_probabilities.view(shape), maxima.view(shape), log_sums.view(shape)


def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """``g (p_v − (1 − ε) [v = y] − ε/V)`` as (B, T, V) in the dtype of the logits; 0 where ignored."""
    compute, classes = grad.dtype, logits.shape[2]
    out = torch.empty(logits.shape, dtype=logits.dtype)
    matrix = out.view(-1, classes)
    matrix.index_fill_(0, (labels.reshape(-1) == ignore_index).nonzero().squeeze(1), 0)
    scratch = torch.empty(_pack_rows(logits), classes, dtype=compute)
    scale, maxima, log_sums = (t.reshape(-1, 1) for t in (grad, maxima, log_sums))
    for rows, values, label in _packs(logits, labels, ignore_index):
        in_place = isinstance(rows, slice) and logits.dtype == compute
        target = matrix[rows] if in_place else scratch[: len(values)]
        torch.sub(values, maxima[rows], out=target)
        target.sub_(log_sums[rows]).exp_()
        if label_smoothing:
            target.sub_(label_smoothing / classes)
        target.scatter_add_(1, label[:, None], target.new_full((len(label), 1), label_smoothing - 1))
        target.mul_(scale[rows])
        if not in_place:
            matrix[rows] = target.to(logits.dtype)
    return out


def _pack_rows(logits: Tensor) -> int:
    """Rows that fill a pack for each thread, one at least."""
    rows = PACK * torch.get_num_threads() // max(1, logits.shape[2])
    return min(max(1, rows), logits.shape[0] * logits.shape[1])


def _packs(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """(rows among the B·T, logits, labels) of those that count, a pack for each thread at a time."""
    labels, first = labels.reshape(-1), 0
    joined = logits.stride(0) == logits.shape[1] * logits.stride(1)
    for matrix in (logits.flatten(0, 1),) if joined else logits.unbind():
        for values in matrix.split(max(1, _pack_rows(logits))):
            rows = slice(first, first + len(values))
            first = rows.stop
            counts = labels[rows] != ignore_index
            if not counts.any():
                continue
            if counts.all():
                yield rows, values, labels[rows]
            else:
                kept = counts.nonzero().squeeze(1)
                yield kept + rows.start, values.index_select(0, kept), labels[rows][kept]


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    lowest, highest = (int(label) for label in labels.aminmax())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"labels must be in 0 … {classes - 1} or {ignore_index}, got {wrong}")
