"""EDGE without a second gradient set: the ratio |g|/|e| of the step before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastproj.bindings.edge import EdgeStats


class LaggedRatio:
    """``G_EDGE = (1 + αρ/2) e − (α/2) g`` formed inside each layer's backward, ρ from the step before.

    ``G_EDGE = Σ_i (c − (α/2) p_i^q) g_i`` with ``c = 1 + αρ/2`` and ρ = |g|/|e| of the parameter's segment.
    The Gram of (e, g) of the running step is summed on the side, layer call by layer call, and gives the
    next ρ; where a step has several backward passes or calls, their Grams are added.
    """

    def __init__(self, segment_of: Mapping[nn.Parameter, int], count: int, alpha: float) -> None:
        self._segment_of = dict(segment_of)
        self._count = count
        self._alpha = alpha
        self._ratio: Tensor | None = None
        self._gram: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether a ratio is known: the first step, which has none before it, is exact."""
        return self._ratio is not None

    def consume(self, parameter: nn.Parameter, plain: Tensor, weighted: Tensor) -> Tensor:
        """Count both sums of one call and return their combination for ``parameter.grad``."""
        if self._ratio is None:
            raise RuntimeError("no ratio from a step before")
        if self._gram is None:
            self._gram = torch.zeros(self._count, 2, 2, dtype=torch.float64, device=plain.device)
        segment = self._segment_of[parameter]
        self._gram[segment] += _pair_gram(plain, weighted)
        scale = (1 + self._alpha / 2 * self._ratio[segment]).to(plain.dtype)
        return (plain * scale).sub_(weighted, alpha=self._alpha / 2)

    def learn(self, stats: EdgeStats) -> None:
        """Take the ratio from an exact projection; a segment with no usable one keeps what it had."""
        usable = (stats.erm_norm > 0) & (stats.gce_norm > 0) & ~stats.nonfinite
        before = torch.zeros_like(stats.erm_norm) if self._ratio is None else self._ratio
        self._ratio = torch.where(usable, stats.gce_norm / stats.erm_norm, before)

    def finish(self) -> EdgeStats:
        """End a step: what its gradients were, with the coefficients that were used."""
        if self._gram is None or self._ratio is None:
            raise RuntimeError("project_() found no backward pass since the last step")
        c_g = torch.full_like(self._ratio, -self._alpha / 2)
        stats = EdgeStats(self._gram, torch.stack([1 + self._alpha / 2 * self._ratio, c_g], dim=1))
        self._gram = None
        self.learn(stats)
        return stats


def _pair_gram(plain: Tensor, weighted: Tensor) -> Tensor:
    """The 2×2 Gram of one call's two sums, fp64."""
    dtype = torch.promote_types(plain.dtype, torch.float32)
    both = torch.stack([plain.reshape(-1), weighted.reshape(-1)]).to(dtype)
    return (both @ both.t()).to(torch.float64)
