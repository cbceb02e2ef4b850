"""How well a ranking finds the samples that carry a bias: coverage, precision, their curves, and AUC."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 5, 10, … 65 %: where coverage and precision are reported.
FRACTIONS = tuple(step / 20 for step in range(1, 14))


@dataclass(frozen=True)
class Curves:
    """Coverage and precision of the best ``counts[j]`` samples, ``fractions[j]`` of all."""

    fractions: tuple[float, ...]
    counts: tuple[int, ...]
    coverage: tuple[float, ...]
    precision: tuple[float, ...]


def coverage(selected: Collection[str], biased: Collection[str]) -> float:
    """``|selected ∩ biased| / |biased|``; ids count once. ValueError where nothing is biased."""
    return _share(selected, biased, "biased")


def precision(selected: Collection[str], biased: Collection[str]) -> float:
    """``|selected ∩ biased| / |selected|``; ids count once. ValueError where nothing is selected."""
    return _share(biased, selected, "selected")


def curves(
    scores: Tensor | Sequence[float],
    biased: Tensor | Sequence[bool],
    fractions: Sequence[float] = FRACTIONS,
) -> Curves:
    """Coverage and precision of the n samples of the highest score, n = round(fraction · N), at least 1.

    Of samples tied at the threshold the mean over all orders counts, so that no order of rows is rewarded:
    with h biased samples above it, and t tied samples of which b are biased, ``h + (n − above)·b/t`` biased
    ones are found.

    scores (N,) and biased (N,). Raises ValueError where these differ in length, no sample or every sample is
    biased, a score is NaN or a fraction not in (0, 1].
    """
    values, positive = _checked(scores, biased)
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong:
        raise ValueError(f"expected fractions above 0 and up to 1, got {wrong[0]}")
    counts = [max(1, round(fraction * len(values))) for fraction in fractions]
    found = [_found(values, positive, count) for count in counts]
    total = int(positive.sum())
    return Curves(
        tuple(fractions),
        tuple(counts),
        tuple(hits / total for hits in found),
        tuple(hits / count for hits, count in zip(found, counts, strict=True)),
    )


def auc(scores: Tensor | Sequence[float], biased: Tensor | Sequence[bool]) -> float:
    """``P(s_biased > s_other) + ½ P(s_biased = s_other)``: the area under the ROC curve.

    From midranks r: ``(Σ_biased r − n₊(n₊+1)/2) / (n₊ n₋)``, Mann & Whitney 1947. scores (N,), biased (N,).
    Raises ValueError as :func:`curves`.
    """
    values, positive = _checked(scores, biased)
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    midranks = (last - (sizes - 1) / 2)[group]
    n_biased = int(positive.sum())
    n_other = len(values) - n_biased
    excess = float(midranks[positive].sum()) - n_biased * (n_biased + 1) / 2
    return excess / (n_biased * n_other)


def _found(values: Tensor, positive: Tensor, count: int) -> float:
    """Biased samples among the ``count`` highest, the mean over orders of the tied ones."""
    threshold = values.topk(count).values[-1]
    above, tied = values > threshold, values == threshold
    open_places = count - int(above.sum())
    tied_share = int((tied & positive).sum()) / int(tied.sum())
    return int((above & positive).sum()) + open_places * tied_share


def _checked(scores: Tensor | Sequence[float], biased: Tensor | Sequence[bool]) -> tuple[Tensor, Tensor]:
    values = torch.as_tensor(scores).detach().cpu().double()
    positive = torch.as_tensor(biased).cpu().bool()
    if values.dim() != 1 or values.shape != positive.shape:
        raise ValueError(
            f"expected scores (N,) and biased (N,), got {tuple(values.shape)} and {tuple(positive.shape)}"
        )
    if bool(values.isnan().any()):
        raise ValueError(f"expected scores that can be ranked, got {int(values.isnan().sum())} NaN")
    if not 0 < int(positive.sum()) < len(values):
        raise ValueError(
            f"expected biased samples and others, got {int(positive.sum())} biased of {len(values)}"
        )
    return values, positive


def _share(found: Collection[str], whole: Collection[str], name: str) -> float:
    ids = set(whole)
    if not ids:
        raise ValueError(f"expected at least one {name} id, got none")
    return len(ids & set(found)) / len(ids)
