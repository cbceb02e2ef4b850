"""What speaks for a direction beyond one adapter's weights: other fine-tunes, activations, held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.latent.activations import activation_difference
from fastproj.latent.factors import LatentFactors

__all__ = [
    "Match",
    "activation_difference",
    "choose_rank",
    "match",
    "rank_directions",
    "recurrence",
    "suspicion",
]


@dataclass(frozen=True)
class Match:
    """How close directions come to a given one: ``|cos|`` of each, and of their span, ``√Σ cos²``."""

    cosines: tuple[float, ...]
    span: float


def recurrence(factors: LatentFactors, others: Sequence[LatentFactors]) -> dict[str, Tensor]:
    """How much of each direction other fine-tunes found too: the mean over others of ``‖V_otherᵀ d‖²``.

    From 0, in none of their spans, to 1, in all; by chance k/d, for k directions of length d. A task's own
    directions differ between tasks of unlike difficulty, and noise between seeds and ranks; what recurs over
    both is a factor of the model or of the data that they share.

    Args:
        factors: those to score.
        others: of other fine-tunes of the same model: other seeds, ranks, tasks; of any number of directions.

    Returns:
        (rank,) fp64 by the keys of ``factors.bases``.

    Raises:
        ValueError: no others; another side or pool; a module that others have not, or of another width.
    """
    if not others:
        raise ValueError("others: expected factors of at least one other fine-tune, got none")
    for other in others:
        if (other.side, other.pool) != (factors.side, factors.pool):
            raise ValueError(
                f"others: expected side={factors.side!r} and pool={factors.pool!r}, got {other.side!r} and "
                f"{other.pool!r}"
            )
    return {
        key: torch.stack([_recovered(key, basis.matrix, other) for other in others]).mean(0)
        for key, basis in factors.bases.items()
    }


def _recovered(key: str, directions: Tensor, other: LatentFactors) -> Tensor:
    """``‖V_otherᵀ d‖²`` of each direction, (rank,)."""
    if key not in other.bases:
        raise ValueError(f"others: expected directions of {key!r}, there are none in one of them")
    theirs = other.bases[key].matrix
    if theirs.shape[0] != directions.shape[0]:
        raise ValueError(
            f"others: expected directions of length {directions.shape[0]} for {key!r}, got {theirs.shape[0]}"
        )
    return (theirs.cpu().double().mT @ directions.cpu().double()).square().sum(0).clamp_max(1)


def rank_directions(
    factors: LatentFactors,
    *,
    recurrence: Mapping[str, Tensor] | None = None,
    difference: Mapping[str, Tensor] | None = None,
) -> LatentFactors:
    """The same directions in the order of :func:`suspicion`. Arguments and errors are its own."""
    return factors.reordered(suspicion(factors, recurrence=recurrence, difference=difference))


def suspicion(
    factors: LatentFactors,
    *,
    recurrence: Mapping[str, Tensor] | None = None,
    difference: Mapping[str, Tensor] | None = None,
) -> dict[str, list[int]]:
    """Columns of each basis, most suspect first, by ``recurrence · |difference|``; one may be absent.

    What is worth removing recurs and also tells the sentences apart, hence the product; ties keep their
    order. The score is ours.

    Args:
        factors: those to order.
        recurrence: from :func:`recurrence`.
        difference: from :func:`activation_difference`.

    Raises ValueError where neither is given, or one lacks a key, has another shape or holds NaN.
    """
    given = {"recurrence": recurrence, "difference": difference}
    tables = {name: table for name, table in given.items() if table is not None}
    if not tables:
        raise ValueError("expected recurrence, difference or both to rank by, got neither")
    columns = {}
    for key in factors.bases:
        score = torch.ones(factors.rank, dtype=torch.float64)
        for name, table in tables.items():
            score = score * _scores_of(name, table, key, factors.rank).abs()
        score = torch.where(score.isnan(), 0.0, score)  # none of an infinite difference is nothing
        columns[key] = score.argsort(descending=True, stable=True).tolist()
    return columns


def _scores_of(name: str, table: Mapping[str, Tensor], key: str, rank: int) -> Tensor:
    if key not in table:
        raise ValueError(f"{name}: expected scores of {key!r}, there are none")
    scores = table[key].detach().cpu().double()
    if tuple(scores.shape) != (rank,) or bool(scores.isnan().any()):
        raise ValueError(f"{name}: expected {rank} numbers for {key!r}, got {scores.tolist()}")
    return scores


def choose_rank(evaluate: Callable[[int], float], most: int, tolerance: float) -> tuple[int, list[float]]:
    """The most directions to remove that cost no more than ``tolerance`` of a held-out score.

    The largest k from 0 to ``most`` with ``score(k) ≥ score(0) − tolerance``. Scores of fewer directions may
    lie below that: removal need not hurt in order, and k is held to what k gives.

    Args:
        evaluate: the score with the first k directions removed, higher is better, on data that no training
            saw; called once for each k.
        most: directions that there are.
        tolerance: in units of the score, 0 or more.

    Returns:
        k, and the scores of 0, 1, …, ``most``.

    Raises ValueError for a negative ``most`` or tolerance, and for a score of NaN.
    """
    if most < 0:
        raise ValueError(f"most: expected 0 or more directions, got {most}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected 0 or more, got {tolerance}")
    scores = []
    for k in range(most + 1):
        score = float(evaluate(k))
        if math.isnan(score):
            raise ValueError(f"expected a score with {k} directions removed, got NaN")
        scores.append(score)
    kept = [k for k, score in enumerate(scores) if score >= scores[0] - tolerance]
    return kept[-1], scores


def match(factors: LatentFactors, direction: Tensor) -> dict[str, Match]:
    """How close factors come to a direction known by other means, as of a probe or of mean activations.

    direction (d,), of any length but zero; by the keys of those bases whose vectors are as long. Raises
    TypeError for another thing than a floating-point tensor, ValueError for one of another shape, zero or not
    finite, and where no basis has its width.
    """
    if not isinstance(direction, Tensor) or not direction.dtype.is_floating_point:
        came = direction.dtype if isinstance(direction, Tensor) else type(direction).__name__
        raise TypeError(f"direction: expected a floating-point tensor, got {came}")
    wide = direction.detach().cpu().double()
    if wide.dim() != 1 or not bool(torch.isfinite(wide).all()) or not bool(wide.any()):
        raise ValueError(f"direction: expected (d,), finite and not zero, got {tuple(wide.shape)}")
    wide = wide / wide.abs().max()  # squares of 1e±300 stay in range
    unit = wide / torch.linalg.vector_norm(wide)
    found = {}
    for key, basis in factors.bases.items():
        if basis.dimension == len(unit):
            cosines = (basis.matrix.cpu().double().mT @ unit).abs().clamp_max(1)
            span = min(1.0, float(torch.linalg.vector_norm(cosines)))
            found[key] = Match(tuple(cosines.tolist()), span)
    if not found:
        widths = sorted({basis.dimension for basis in factors.bases.values()})
        raise ValueError(f"direction: expected a length of {', '.join(map(str, widths))}, got {len(unit)}")
    return found
