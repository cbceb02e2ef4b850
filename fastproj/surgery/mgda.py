"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method
from fastproj.surgery._nonnegative_qp import nonnegative_qp
from fastproj.surgery._unit_gram import UnitGram


@dataclass(frozen=True)
class MGDA(Method):
    """``out = Σ_k w_k g_k``, ``w = argmin |Σ_k w_k g_k|²`` over ``w ≥ 0``, ``Σ w = 1``: the min-norm point.

    Solved without the constraint ``Σ w = 1``: the μ ≥ 0 that minimises ``|Σ μ_k g_k|² + (1 − Σ μ_k)²`` is
    ``w/(1 + |Σ w_k g_k|²)`` for the same w, in any unit of length. The unit is the shortest gradient, and μ
    are coefficients of unit gradients, so that 1e-15 and 1e15 meet in one Gram matrix. Gradients of norm 0
    share the weight between them.

    Non-conflicting, permutation-invariant; not linear under scaling; weakly stationary: it is 0 at every
    Pareto-stationary point, strongly stationary or not.
    Granularity: global.

    Differences elsewhere: TorchJD takes at most 100 steps of Frank-Wolfe, whose error falls as one over their
    number; some codes normalise gradients by their norm or loss first (Sener & Koltun, 2018), which is
    another method: scale the gradients to have it.

    Source: Désidéri, "Multiple-gradient descent algorithm" (2012). The form without constraint: ours.
    Meaning: ``fastproj.reference.surgery.mgda``.
    """

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        zero = (~unit.present).to(unit.norms.dtype)
        shortest = torch.where(unit.present, unit.norms, torch.inf).amin(-1, keepdim=True)
        ratio = torch.where(unit.present, shortest / torch.where(unit.present, unit.norms, 1.0), 0.0)
        matrix = unit.cosines + ratio[..., :, None] * ratio[..., None, :]
        weights = nonnegative_qp(matrix, -ratio) * ratio
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        any_zero = zero.sum(-1, keepdim=True)
        return torch.where(any_zero > 0, zero / any_zero.clamp_min(1.0), weights)
