"""IMTL-G: the combination on which all gradients have the same projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method
from fastproj.surgery._unit_gram import UnitGram, pseudo_solve


@dataclass(frozen=True)
class IMTLG(Method):
    """``out = Σ_k α_k g_k`` with ``Σ α_k = 1`` and ``⟨out, ĝ_k⟩`` equal for all k, ``ĝ = g/|g|``.

    ``α_k ∝ x_k/|g_k|`` with ``x = C⁺1`` and C the matrix of cosines: where the gradients are dependent, the
    x that comes closest to equal projections, and of these the shortest. α is 0 where x is, as for opposite
    gradients. It may be negative. Gradients of norm 0 get 0.

    Permutation-invariant; not non-conflicting: tested.
    Granularity: global. In the paper the gradients are those of the shared representation, which is
    cheaper; pass them instead of the parameters' to have that.

    Differences elsewhere: TorchJD takes ``M⁺`` of the Gram matrix itself, which weighs the equations by the
    gradients' norms where they cannot all hold and drops gradients that are 1e-8 of the longest; there
    α is 0 as soon as ``|Σ x|`` < 1e-12, which long gradients meet by their scale alone.

    Source: Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021), Section 3.1.
    Meaning: ``fastproj.reference.surgery.imtl_g``.
    """

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        x = pseudo_solve(unit.factor, unit.present.to(unit.norms.dtype))
        # Without solution x is rounding error, which no division should make a weight of.
        x = torch.where(x.abs() > unit.tolerance, x, 0.0)
        shortest = torch.where(unit.present, unit.norms, torch.inf).amin(-1, keepdim=True)
        weights = unit.coefficients(x * torch.where(torch.isfinite(shortest), shortest, 0.0))
        total = weights.sum(-1, keepdim=True)
        usable = total.abs() > unit.tolerance * weights.abs().sum(-1, keepdim=True)
        return torch.where(usable, weights / torch.where(usable, total, 1.0), 0.0)
