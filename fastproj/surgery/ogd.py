"""OGD: a gradient without what lies in the span of stored directions, and the basis that stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.bindings.combine import combine
from fastproj.bindings.gram import gram
from fastproj.reference.segments import Segments
from fastproj.surgery._method import MOST_SETS, Method
from fastproj.surgery._unit_gram import UnitGram, pseudo_solve, semidefinite_factor
from fastproj.surgery.project import precision_of, project


@dataclass(frozen=True)
class OGD(Method):
    """``out = g − V(VᵀV)⁺Vᵀg``: g is set 0, the columns of V are the other sets, orthonormal or not.

    Granularity: global, as in the paper: directions are vectors over all parameters.

    Differences elsewhere: codes that subtract ``⟨g,v⟩ v`` in turn assume the v orthonormal, which
    Gram-Schmidt in fp32 leaves them only roughly; here the Gram matrix of the v is solved with.

    Source: Farajtabar et al., "Orthogonal Gradient Descent for Continual Learning" (AISTATS 2020), eq. 6.
    Meaning: ``fastproj.reference.surgery.ogd``.
    """

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        norm = unit.norms[:, :1]
        if unit.norms.shape[-1] == 1:
            return torch.ones_like(norm)
        factor = semidefinite_factor(unit.cosines[:, 1:, 1:], unit.tolerance)
        within = pseudo_solve(factor, unit.cosines[:, 1:, 0])
        ours = unit.coefficients(torch.cat([norm, -norm * within], dim=-1))
        return torch.cat([torch.ones_like(norm), ours[:, 1:]], dim=-1)


class OGDBasis:
    """The growing basis of OGD: stored gradients, each orthogonalised against those before it, at norm 1.

    ``project_out(g)`` is ``g`` without its part in their span. A gradient that lies in the span already is
    stored as zeros, which change nothing: whether it does is never asked of the device.

    Args:
        segments: over which directions are orthogonal, as in :func:`fastproj.gram`.

    At most 63 directions, each of the parameters' size and in fp32 at least.
    """

    def __init__(self, *, segments: Segments = "global") -> None:
        self.segments = segments
        self.sets: list[list[Tensor | None]] = []

    def __len__(self) -> int:
        return len(self.sets)

    @torch.no_grad()
    def add(self, shards: Sequence[Tensor | None]) -> None:
        """Store one more direction, scaled to norm 1; projected twice, for once leaves its rounding errors.

        Raises ValueError where 63 are stored, and as :func:`fastproj.gram` does.
        """
        if len(self.sets) == MOST_SETS - 1:
            raise ValueError(f"a basis holds at most {MOST_SETS - 1} directions")
        own = [None if shard is None else _wide(shard) for shard in shards]
        before = gram([own], segments=self.segments)[:, 0]
        for _ in range(2 if self.sets else 0):
            own = self.project_out(own)
        after = gram([own], segments=self.segments)[:, 0]
        # What two projections leave of a dependent gradient is rounding error: less than this share of it.
        threshold = 16 * precision_of([shard for shard in own if shard is not None]) * (1 + len(self.sets))
        kept = after > threshold**2 * before
        scale = torch.where(kept, torch.where(kept, after, 1.0).rsqrt(), 0.0)
        self.sets.append(combine([own], scale, segments=self.segments))

    @torch.no_grad()
    def project_out(self, shards: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``g − Σ_v ⟨g,v⟩ v`` over the stored directions, in the shards' dtypes."""
        projected = project([shards, *self.sets], OGD(), segments=self.segments)
        return [
            None if value is None or shard is None else value.to(shard.dtype)
            for value, shard in zip(projected, shards, strict=True)
        ]


def _wide(shard: Tensor) -> Tensor:
    """fp64 stays, the rest becomes fp32."""
    return shard.detach().to(torch.float64 if shard.dtype == torch.float64 else torch.float32)
