"""PCGrad: each task's gradient without what conflicts with the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method
from fastproj.surgery._orders import Orders, check_orders, shuffled_all, visits
from fastproj.surgery._unit_gram import UnitGram


@dataclass(frozen=True)
class PCGrad(Method):
    """``out = Σ_i h_i``; ``h_i`` starts as ``g_i`` and, j by j, ``h_i ← h_i − min(0, ⟨h_i,g_j⟩)/|g_j|² g_j``.

    Task i visits the others in an order of its own, drawn anew at each call from the generator (as
    ``torch.randperm(K)`` for each task, itself left out), the same in all segments. ``order`` fixes it: a
    row for each task, of the other tasks' numbers.

    Granularity: global, one inner product over all shared parameters, as in the paper and in its TensorFlow
    code; loops over parameters that call it tensor by tensor compute something else.

    Differences elsewhere: the result depends on the order wherever K > 2, so that implementations agree only
    with equal draws; the sum is the paper's (Algorithm 1), some return the mean, ``1/K`` of it. In LibMTL a
    task visits itself as well, which projects ``h_i`` onto ``g_i``'s plane where the others have turned it
    against ``g_i``.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (NeurIPS 2020), Algorithm 1.
    Meaning: ``fastproj.reference.surgery.pcgrad``.
    """

    order: Orders | None = None

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        size = unit.norms.shape[-1]
        if self.order is not None:
            check_orders(self.order, size)
        if size == 1:
            return unit.coefficients(unit.norms)
        order = self.order if self.order is not None else shuffled_all(size, generator)
        own = torch.eye(size, dtype=unit.norms.dtype, device=unit.norms.device)
        # rows[s, i] are the coefficients of h_i/|g_i| in the unit gradients.
        rows = own.expand(len(unit.norms), size, size)
        for met in visits(order, unit.norms):
            inner = torch.sum(rows * (met @ unit.cosines), dim=-1, keepdim=True)
            rows = rows - inner.clamp_max(0) * met
        return unit.coefficients((unit.norms[:, :, None] * rows).sum(1))
