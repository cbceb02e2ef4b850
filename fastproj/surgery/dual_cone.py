"""UPGrad and DualProj: the nearest directions along which no task's loss rises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method, check_preference, preference_weights
from fastproj.surgery._nonnegative_qp import nonnegative_qp
from fastproj.surgery._unit_gram import UnitGram


@dataclass(frozen=True)
class UPGrad(Method):
    """``out = Σ_i u_i π(g_i)``, where ``π(v)`` is the point of ``{d: ⟨d,g_k⟩ ≥ 0 for all k}`` nearest to v.

    By duality ``π(g_i) = g_i + Σ_k λ_k g_k`` with ``λ = argmin_{λ≥0} ½ λᵀMλ + λᵀM_i``: K programmes that
    share one matrix. The weights u are those of ``preference``, ``1/K`` each where it is None.

    Non-conflicting, permutation-invariant, linear under scaling of a gradient, strongly stationary: tested.
    Granularity: global.

    Differences elsewhere: TorchJD adds 1e-4 to the diagonal of the Gram matrix, normalised to trace 1, which
    lets projections conflict by about that much; and a Gram matrix of trace below 1e-4 (gradients of norm
    0.01) counts as zero there, which leaves the mean as it is, conflicts included.

    Source: Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization" (2024), Section 2.2, Prop. 1.
    Meaning: ``fastproj.reference.surgery.upgrad``.
    """

    preference: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_preference(self.preference)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        weighted = preference_weights(self.preference, unit) * unit.norms
        added = nonnegative_qp(unit.cosines[:, None], unit.cosines)
        return unit.coefficients(weighted + (weighted[:, :, None] * added).sum(1))


@dataclass(frozen=True)
class DualProj(Method):
    """``out = π(Σ_i u_i g_i)``, with π and ``preference`` as for :class:`UPGrad`: one programme, not K.

    Non-conflicting, permutation-invariant, strongly stationary; not linear under scaling: tested.
    Granularity: global. Differences elsewhere: as for :class:`UPGrad`.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory" (NeurIPS 2017), eq. 11, as TorchJD uses it.
    Meaning: ``fastproj.reference.surgery.dual_proj``.
    """

    preference: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_preference(self.preference)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        weighted = preference_weights(self.preference, unit) * unit.norms
        largest = weighted.amax(-1, keepdim=True)
        scaled = weighted / torch.where(largest > 0, largest, 1.0)
        added = nonnegative_qp(unit.cosines, (unit.cosines @ scaled[..., None])[..., 0])
        return unit.coefficients(weighted + largest * added)
