"""SafeGrad's conflict removal: a task's gradient without what works against alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastproj.surgery._method import Method, check_number
from fastproj.surgery._unit_gram import UnitGram


@dataclass(frozen=True)
class SafeGrad(Method):
    """``out = g − min(0, ⟨g,a⟩)/⟨a,a⟩ a + ρ a``; set 0 is g, the user task's gradient, set 1 a, alignment's.

    Where the two conflict g is projected onto the plane orthogonal to a; elsewhere it stays. a = 0 leaves g.

    Args:
        alignment: ρ, how much of the alignment gradient is followed as well; 0 is conflict removal alone.

    Granularity: global.

    The other half of SafeGrad, a KL divergence from the aligned model as the loss that a comes from, is the
    caller's. The weight ρ is ours: the paper's abstract, which is what this follows, names the projection.

    Source: Yi et al., "Gradient Surgery for Safe LLM Fine-Tuning" (2025).
    Meaning: ``fastproj.reference.surgery.safegrad``.
    """

    sets_needed: ClassVar[tuple[int, int]] = (2, 2)
    alignment: float = 0.0

    def __post_init__(self) -> None:
        check_number("alignment", self.alignment, 0.0)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        conflict = unit.cosines[:, 0, 1].clamp_max(0)
        removed = unit.coefficients(torch.stack([unit.norms[:, 0], -conflict * unit.norms[:, 0]], dim=-1))[
            :, 1
        ]
        return torch.stack([torch.ones_like(removed), removed + self.alignment], dim=-1)
