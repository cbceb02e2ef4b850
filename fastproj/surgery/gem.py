"""GEM, its fixed-budget form and A-GEM: a gradient that does not undo what memories hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastproj.surgery._method import MOST_SETS, Method, check_number
from fastproj.surgery._nonnegative_qp import nonnegative_qp
from fastproj.surgery._unit_gram import UnitGram


@dataclass(frozen=True)
class AGEM(Method):
    """``out = g − min(0, ⟨g,r⟩)/⟨r,r⟩ r``: g is set 0, and r the mean of the other sets.

    One reference gradient, or several whose mean it is; r = 0 leaves g.
    Granularity: global, one inner product over all parameters, as in the paper.

    Differences elsewhere: Avalanche projected parameter by parameter up to 2021 (``segments="tensor"`` gives
    that), which removes conflicts that the whole gradient does not have and leaves ``⟨out,r⟩`` above 0.

    Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (ICLR 2019), eq. 11.
    Meaning: ``fastproj.reference.surgery.a_gem``.
    """

    sets_needed: ClassVar[tuple[int, int]] = (2, MOST_SETS)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        norms = unit.norms[:, 1:]
        longest = norms.amax(-1, keepdim=True)
        mean = norms / torch.where(longest > 0, longest, 1.0)
        inner = (unit.cosines[:, 0, 1:] * mean).sum(-1, keepdim=True).clamp_max(0)
        square = (mean * (unit.cosines[:, 1:, 1:] @ mean[..., None])[..., 0]).sum(-1, keepdim=True)
        # Memories that cancel to the precision of their inner products have no mean to project on.
        usable = square > unit.tolerance
        added = -torch.where(usable, inner / torch.where(usable, square, 1.0), 0.0) * mean
        return _with_memories(unit, added)


@dataclass(frozen=True)
class GEM(Method):
    """The gradient nearest to g with ``⟨out, g_k⟩ ≥ 0`` for every memory; g is set 0, memories the others.

    ``out = g + Σ_k v_k g_k`` with ``v = argmin ½ vᵀMv + Σ_k v_k ⟨g_k, g⟩`` over ``v ≥ margin``, where M is
    the Gram of the memories. g stays as it is where it conflicts with none.

    Args:
        margin: least of each v where there is a conflict, which favours the memories; 0 is the projection.
            A coefficient of gradients, as in the authors' code, so its strength depends on their scale.

    Granularity: global.

    Differences elsewhere: the authors' code, and Avalanche's after it, add 1e-3 to the diagonal of M
    whatever its scale: memories with gradients of norm 0.03 and less are hardly seen, and conflicts stay.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory" (NeurIPS 2017), eq. 11.
    Meaning: ``fastproj.reference.surgery.gem``.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        check_number("margin", self.margin, 0.0)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        matrix, inner, least = _dual(unit, self.margin)
        if not inner.shape[-1]:
            return unit.coefficients(unit.norms)
        shifted = inner + (matrix @ least[..., None])[..., 0]
        added = least + nonnegative_qp(matrix, shifted)
        return _with_memories(unit, torch.where((inner < 0).any(-1, keepdim=True), added, 0.0))


@dataclass(frozen=True)
class IGEM(Method):
    """:class:`GEM` after a fixed number of projected gradient steps on v, from ``v = margin``.

    ``v ← max(margin, v − η (Mv + ⟨g_k, g⟩))`` in coefficients of unit gradients, with η one over the largest
    row sum of their cosines' magnitudes, which bounds the largest eigenvalue: no scale sets the step, and
    the objective falls at each. Approximate: what is left of a conflict falls geometrically where the
    memories are independent.

    Args:
        margin: as for :class:`GEM`.
        iterations: how many steps, at least 1.

    Granularity: global.

    Source: Tekmen, Yin & Tong, "GEM-Style Constraints for PEFT with Dual Gradient Projection in LoRA" (2026),
    which fixes the budget and takes such steps on the device. Step length and coordinates: ours.
    Meaning: ``fastproj.reference.surgery.i_gem``.
    """

    margin: float = 0.0
    iterations: int = 50

    def __post_init__(self) -> None:
        check_number("margin", self.margin, 0.0)
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise TypeError(f"iterations must be an integer, got {type(self.iterations).__name__}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        matrix, inner, least = _dual(unit, self.margin)
        if not inner.shape[-1]:
            return unit.coefficients(unit.norms)
        bound = matrix.abs().sum(-1).amax(-1, keepdim=True)
        step = 1 / torch.where(bound > 0, bound, 1.0)
        v = least
        for _ in range(self.iterations):
            v = torch.maximum(least, v - step * ((matrix @ v[..., None])[..., 0] + inner))
        return _with_memories(unit, torch.where((inner < 0).any(-1, keepdim=True), v, 0.0))


def _dual(unit: UnitGram, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of the memories, theirs with g, and the margin, all for a g and memories of norm 1."""
    norm = unit.norms[:, :1]
    least = torch.where(norm > 0, margin * unit.norms[:, 1:] / torch.where(norm > 0, norm, 1.0), 0.0)
    return unit.cosines[:, 1:, 1:], unit.cosines[:, 1:, 0], least


def _with_memories(unit: UnitGram, added: Tensor) -> Tensor:
    """Coefficients of ``g + |g| Σ_k added_k ĝ_k``."""
    norm = unit.norms[:, :1]
    ours = unit.coefficients(torch.cat([norm, norm * added], dim=-1))
    # g of norm 0 keeps its coefficient of 1, which is what "left as it is" means.
    return torch.cat([torch.ones_like(norm), ours[:, 1:]], dim=-1)
