"""Calls of the launchers of losses under the memory checker."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from memory_case import LAYOUTS, Case, sets_of
from span_inputs import DTYPES
from torch import Tensor

from fastproj.kernels.balance_loss import balance_loss, balance_loss_backward
from fastproj.kernels.cross_entropy import cross_entropy, cross_entropy_backward

# (samples, tokens, classes): two classes, less than a vector, tails of vectors, more than a program's turn.
LOGITS = ((3, 1, 2), (2, 3, 7), (2, 2, 33), (2, 3, 4099))


def cross_entropy_cases() -> Iterator[Case]:
    """Losses and gradients, with and without labels to ignore, and smoothed."""
    for (i, shape), (j, layout) in product(enumerate(LOGITS), enumerate(LAYOUTS)):
        dtype = DTYPES[(i + j) % len(DTYPES)]
        yield Case(
            f"cross_entropy {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
            partial(sets_of, 1, [shape], (dtype,)),
            partial(_cross_entropy, 0.1 * (i % 2), j % 2),
            layout,
        )


def _cross_entropy(smoothing: float, ignored: int, tensors: list[Tensor]) -> list[Tensor]:
    """Statistics and the gradient of the losses' sum; labels are 0, 1, 0, 1 …"""
    (logits,) = tensors
    labels = torch.arange(logits.shape[0] * logits.shape[1]).remainder(2).view(logits.shape[:2])
    # There is no label of 2: nothing is ignored then.
    options = (1 if ignored else 2, smoothing)
    losses, own, *statistics = cross_entropy(logits, labels, *options)
    ones = torch.ones_like(losses)
    return [losses, own, *statistics, cross_entropy_backward(ones, logits, labels, *statistics, *options)]


# (samples, labels): one of each, tails of tiles, a full one, several turns of samples, more labels than one.
LABELLED = ((1, 1), (5, 3), (40, 32), (19, 257), (3, 1030))


def balance_loss_cases() -> Iterator[Case]:
    """Losses and gradients: a label a sample or for each, with known means in half of them."""
    for (i, size), (j, layout) in product(enumerate(LABELLED), enumerate(LAYOUTS)):
        dtype, each = DTYPES[(i + j) % len(DTYPES)], (i + j) % 2 == 1
        yield Case(
            f"balance_loss {'x'.join(map(str, size))} {'each' if each else 'one'}, {dtype}".replace(
                "torch.", ""
            ),
            partial(_logits_and_means, size, dtype, i % 2 == 1),
            partial(_balance_loss, each),
            layout,
        )


def _logits_and_means(size: tuple[int, int], dtype: torch.dtype, known: bool) -> list[Tensor]:
    """Logits, and means of which some are known."""
    means = torch.full((2, size[1]), torch.nan, dtype=torch.float64)
    means[:, ::2] = 0.5
    return [*sets_of(1, [size], (dtype,)), *([means] if known else [])]


def _balance_loss(each: bool, tensors: list[Tensor]) -> list[Tensor]:
    """Losses, means, slopes and the gradient of the losses' sum; NaN of no mean made a number.

    The last sample has labels that do not count.
    """
    logits, *known = tensors
    if each:
        labels = torch.arange(logits.numel()).view(logits.shape).remainder(2).to(torch.int8)
    else:
        labels = torch.arange(logits.shape[0]).remainder(logits.shape[1])
    labels[-1] = -100
    *losses, means, slopes = balance_loss(logits, labels, known[0] if known else None, True, -100)
    ones = [torch.ones_like(loss) for loss in losses]
    grad = balance_loss_backward(*ones, slopes, labels, -100, logits.dtype)
    return [*losses, means.nan_to_num(-1.0), slopes, grad]
