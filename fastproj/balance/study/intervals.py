"""F1 of many resamples at once, and bootstrap intervals of differences between two arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastproj.demo.tables import LEVEL, Interval

RESAMPLES = 2000
Measure = Literal["weighted_f1", "worst_f1", "macro_f1", "accuracy"]


@dataclass(frozen=True)
class Answers:
    """What an arm said of a draw's N test texts, and what is so; (N,) label numbers below ``labels``."""

    predicted: Sequence[int]
    gold: Sequence[int]
    labels: int

    @property
    def cells(self) -> Tensor:
        """(N, C²) fp64, one 1 a row at ``gold · C + predicted``."""
        place = torch.tensor(self.gold) * self.labels + torch.tensor(self.predicted)
        return torch.nn.functional.one_hot(place, self.labels**2).double()


def measured(confusion: Tensor, measure: Measure) -> Tensor:
    """A measure of confusion matrices (…, C, C), rows gold and columns predicted, as (…).

    The worst F1 is that of labels with support.
    """
    right = confusion.diagonal(dim1=-2, dim2=-1)
    support, said = confusion.sum(-1), confusion.sum(-2)
    if measure == "accuracy":
        return right.sum(-1) / support.sum(-1)
    f1 = 2 * right / (support + said).clamp_min(1)
    if measure == "worst_f1":
        return torch.where(support > 0, f1, torch.inf).amin(-1)
    if measure == "macro_f1":
        return f1.mean(-1)
    return (f1 * support).sum(-1) / support.sum(-1)


def paired_interval(
    one: Sequence[Answers], other: Sequence[Answers], measure: Measure, level: float = LEVEL
) -> Interval:
    """Percentile bootstrap interval of the mean over draws of ``one − other``.

    Draws are drawn again with replacement, then the texts of each, the same for both arms. Source: the usual
    bootstrap of two stages; that both stages are resampled makes it wider than over draws alone.

    Raises ValueError for no draws, or answers about other texts.
    """
    if not one or [a.gold for a in one] != [b.gold for b in other]:
        raise ValueError(
            f"expected two arms' answers to the same texts, got {len(one)} and {len(other)} draws"
        )
    generator = torch.Generator().manual_seed(0)
    differences = []
    for first, second in zip(one, other, strict=True):
        size, shape = len(first.gold), (RESAMPLES, first.labels, first.labels)
        chosen = torch.randint(size, (RESAMPLES, size), generator=generator)
        counts = torch.zeros(RESAMPLES, size, dtype=torch.float64)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
        both = [measured((counts @ answers.cells).view(shape), measure) for answers in (first, second)]
        differences.append(both[0] - both[1])
    table = torch.stack(differences)
    drawn = torch.randint(len(table), (len(table), RESAMPLES), generator=generator)
    means = table.gather(0, drawn).mean(0)
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high
