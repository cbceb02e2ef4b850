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
    next ρ; where a step has several backward passes or calls, their Grams are added. A segment that has
    never had a ratio (one of its gradients was zero) keeps e.
    """

    def __init__(self, segment_of: Mapping[nn.Parameter, int], count: int, alpha: float) -> None:
        self._segment_of = dict(segment_of)
        self._count = count
        self._alpha = alpha
        self._coefficients: Tensor | None = None
        self._gram: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether there was a step before: the first, which has none, is exact."""
        return self._coefficients is not None

    def consume(self, parameter: nn.Parameter, plain: Tensor, weighted: Tensor) -> Tensor:
        """Count both sums of one call and return their combination for ``parameter.grad``."""
        if self._coefficients is None:
            raise RuntimeError("the first step has no ratio before it")
        if self._gram is None:
            self._gram = torch.zeros(self._count, 2, 2, dtype=torch.float64, device=plain.device)
        segment = self._segment_of[parameter]
        self._gram[segment] += _pair_gram(plain, weighted)
        c_e, c_g = self._coefficients[segment].to(plain.dtype)
        # A fresh tensor: a view would keep both sums alive in .grad.
        return (plain * c_e).add_(weighted.mul_(c_g))

    def learn(self, stats: EdgeStats) -> None:
        """Take the next coefficients from what a step saw; a segment with no usable ratio keeps its own."""
        usable = (stats.erm_norm > 0) & (stats.gce_norm > 0) & ~stats.nonfinite
        ratio = stats.gce_norm / torch.where(usable, stats.erm_norm, 1.0)
        fresh = torch.stack([1 + self._alpha / 2 * ratio, torch.full_like(ratio, -self._alpha / 2)], dim=1)
        if self._coefficients is None:
            self._coefficients = torch.stack([torch.ones_like(ratio), torch.zeros_like(ratio)], dim=1)
        self._coefficients = torch.where(usable[:, None], fresh, self._coefficients)

    def forget(self) -> None:
        """The gradients of the running step were dropped."""
        self._gram = None

    def finish(self) -> EdgeStats:
        """End a step: what its gradients were, with the coefficients that were used.

        The Gram is summed over layer calls and micro-batches; that of (e, g) where there is one of each.
        """
        if self._gram is None or self._coefficients is None:
            raise RuntimeError(
                "project_() found no gradient: call backward() on the loss of this engine first"
            )
        stats = EdgeStats(self._gram, self._coefficients)
        self._gram = None
        self.learn(stats)
        return stats


def _pair_gram(plain: Tensor, weighted: Tensor) -> Tensor:
    """The 2×2 Gram of one call's two sums, fp64."""
    dtype = torch.promote_types(plain.dtype, torch.float32)
    e, g = plain.reshape(-1).to(dtype), weighted.reshape(-1).to(dtype)
    crossed = torch.dot(e, g)
    return torch.stack([torch.dot(e, e), crossed, crossed, torch.dot(g, g)]).to(torch.float64).view(2, 2)
