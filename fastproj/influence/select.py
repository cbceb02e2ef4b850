"""Choosing the samples of the highest influence, over all references or for each in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastproj.influence.scores import Aggregate, Scores


@dataclass(frozen=True)
class Selection:
    """Samples in the order they were taken.

    ``indices`` (n,) int64 are rows of the scores, ``ids`` (n) theirs, ``scores`` (n,) fp32 their aggregated
    scores; ``threshold`` is the least of these. Only where the selection is not balanced has every sample
    that is left out a score of at most ``threshold``.
    """

    ids: tuple[str, ...]
    indices: Tensor
    scores: Tensor
    threshold: float

    def __len__(self) -> int:
        return len(self.ids)


def select(
    scores: Scores,
    *,
    fraction: float | None = None,
    count: int | None = None,
    aggregate: Aggregate = "mean",
    balanced: bool = False,
) -> Selection:
    """The n samples of the highest score, n = ``count`` or round(``fraction`` · N), at least 1.

    Unbalanced: the n largest of ``mean_j A[i, j]`` or ``max_j A[i, j]``, of equal ones the earlier row first.

    ``balanced``: every column of A (N, M) is centred and divided by its standard deviation over samples
    (a constant column becomes 0); then, from T = ∅, the sample of

        argmax_i max_j ( A[i, j] − mean_{k ∈ T} A[k, j] )

    joins T until it has n: the strongest sample for the reference that T serves worst. Of equal gains the
    earlier row is taken. ``aggregate`` then only gives the scores that the result carries. Time
    O(N·M·log N), memory O(N·M).

    Raises ValueError unless exactly one of ``fraction`` (in (0, 1]) and ``count`` (in 1…N) is given, where
    there is no sample or no reference, and where a score is NaN or infinite. Source: BIDS, Dai et al. 2025
    (arXiv:2501.12147).
    """
    wanted = _how_many(len(scores), fraction, count)
    _require_finite(scores.values)
    totals = scores.aggregate(aggregate)
    if balanced:
        indices = _balanced(scores.values, wanted)
    else:
        indices = torch.argsort(totals, descending=True, stable=True)[:wanted]
    chosen = totals[indices]
    ids = tuple(scores.ids[index] for index in indices.tolist())
    return Selection(ids, indices, chosen, float(chosen.min()))


def _how_many(samples: int, fraction: float | None, count: int | None) -> int:
    if (fraction is None) == (count is None):
        raise ValueError(f"expected one of fraction and count, got fraction={fraction}, count={count}")
    if samples == 0:
        raise ValueError("expected scores of at least one sample, got none")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"expected a fraction above 0 and up to 1, got {fraction}")
        return max(1, round(fraction * samples))
    if count is None or not 1 <= count <= samples:
        raise ValueError(f"expected a count from 1 to {samples}, the number of samples, got {count}")
    return count


def _require_finite(values: Tensor) -> None:
    missing, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    if missing or infinite:
        raise ValueError(
            f"expected finite scores, got {missing} NaN and {infinite} infinite ones of {values.numel()}"
        )


def _balanced(values: Tensor, wanted: int) -> Tensor:
    """Rows in the order BIDS takes them. Only the best row left for each reference can have the largest gain.

    Every column's rows, sorted, are a ring of links, so that taking a row unlinks it in all columns at once.
    """
    normalised = _normalise(values).numpy()
    samples, references = normalised.shape
    following, preceding = _rings(normalised)
    columns = np.arange(references)
    sums = np.zeros(references)
    picked = np.empty(wanted, dtype=np.int64)
    for taken in range(wanted):
        best = following[samples]
        gains = normalised[best, columns] - sums / max(taken, 1)
        row = best[gains == gains.max()].min()
        picked[taken] = row
        sums += normalised[row]
        before, after = preceding[row], following[row]
        following[before, columns] = after
        preceding[after, columns] = before
    return torch.from_numpy(picked)


def _rings(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per column the row after and before each row in falling order, (N + 1, M); row N is start and end."""
    samples, references = values.shape
    ends = np.full((1, references), samples)
    # Sorted by the negative, which keeps equal scores in row order.
    ring = np.concatenate([ends, np.argsort(-values, axis=0, kind="stable"), ends])
    following, preceding = np.empty_like(ring[1:]), np.empty_like(ring[1:])
    np.put_along_axis(following, ring[:-1], ring[1:], 0)
    np.put_along_axis(preceding, ring[1:], ring[:-1], 0)
    return following, preceding


def _normalise(values: Tensor) -> Tensor:
    """Each column centred and divided by its standard deviation over rows, in fp64; a constant one is 0."""
    exact = values.double()
    centred = exact - exact.mean(0)
    deviation = centred.square().mean(0).sqrt()
    constant = exact.amax(0) == exact.amin(0)
    return torch.where(constant, 0.0, centred / torch.where(constant, 1.0, deviation))
