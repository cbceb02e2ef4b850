"""GradVac: each task's gradient turned towards the others, up to cosines that are learnt on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastproj.surgery._method import Method, check_number
from fastproj.surgery._orders import Orders, check_orders, shuffled_others, visits
from fastproj.surgery._unit_gram import UnitGram


class GradVacTargets:
    """``φ̂[s,i,j]``, the running mean of the cosine that task i meets at task j: (S, K, K) fp64, from 0.

    ``values`` is None before the first call. It lives on the gradients' device and is checkpointed as the
    tensor that it is.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def reset(self) -> None:
        """Start from zeros again."""
        self.values = None

    def read(self, like: Tensor) -> Tensor:
        """The targets for segments and tasks like those of ``like``, (S, K, K)."""
        if self.values is None:
            return torch.zeros_like(like)
        if self.values.shape != like.shape:
            raise ValueError(
                f"the targets are of {tuple(self.values.shape)} (segments, tasks, tasks), the Gram is "
                f"{tuple(like.shape)}; call reset() where tasks or segments change"
            )
        return self.values.to(like)


@dataclass(frozen=True)
class GradVac(Method):
    """``out = Σ_i h_i``; ``h_i`` starts as ``g_i``; j by j, where ``φ = cos(h_i, g_j)`` is below ``φ̂_ij``::

        h_i ← h_i + |h_i| (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (|g_j| √(1−φ̂²)) g_j

    which brings ``cos(h_i, g_j)`` to φ̂; then ``φ̂ ← (1−β) φ̂ + β φ`` in either case. Orders are drawn as for
    :class:`PCGrad`, here as ``torch.randperm(K − 1)`` over the other tasks. Where φ̂ = 1 no finite step gets
    there, and none is taken.

    Args:
        beta: β, how fast the targets move, in [0, 1].
        order: as for :class:`PCGrad`.
        targets: the state. Give one object to one training run.

    Granularity: global, as TorchJD and LibMTL have it by default; the paper prefers one segment per layer.

    Differences elsewhere: LibMTL moves φ̂ only where ``φ < φ̂``, so that it can only fall from its start at 0;
    both add 1e-8 to the denominators, which takes gradients smaller than that for orthogonal.

    Source: Wang et al., "Gradient Vaccine" (ICLR 2021), Algorithm 1, eq. 2, 3.
    Meaning: ``fastproj.reference.surgery.gradvac``.
    """

    beta: float = 0.5
    order: Orders | None = None
    targets: GradVacTargets = field(default_factory=GradVacTargets)

    def __post_init__(self) -> None:
        check_number("beta", self.beta, 0.0, 1.0)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        size = unit.norms.shape[-1]
        if self.order is not None:
            check_orders(self.order, size)
        if size == 1:
            return unit.coefficients(unit.norms)
        order = self.order if self.order is not None else shuffled_others(size, generator)
        own = torch.eye(size, dtype=unit.norms.dtype, device=unit.norms.device)
        rows = own.expand(len(unit.norms), size, size)
        before = targets = self.targets.read(unit.cosines)
        for met in visits(order, unit.norms):
            cosine, length = self._meet(rows, met, unit)
            target = torch.sum(targets * met, dim=-1, keepdim=True)
            rows = rows + _step(cosine, target, length) * met
            targets = targets + self.beta * (cosine - target) * met
        # A segment with NaN or Inf in it teaches nothing.
        self.targets.values = torch.where(unit.finite[:, None, None], targets, before)
        return unit.coefficients((unit.norms[:, :, None] * rows).sum(1))

    @staticmethod
    def _meet(rows: Tensor, met: Tensor, unit: UnitGram) -> tuple[Tensor, Tensor]:
        """``cos(h_i, g_j)`` and ``|h_i|/|g_i|`` of every task with the one that it visits, (S, K, 1) each."""
        inner = torch.sum(rows * (met @ unit.cosines), dim=-1, keepdim=True)
        length = torch.sum(rows * (rows @ unit.cosines), dim=-1, keepdim=True).clamp_min(0).sqrt()
        usable = length > 0
        return torch.where(usable, inner / torch.where(usable, length, 1.0), 0.0).clamp(-1, 1), length


def _step(cosine: Tensor, target: Tensor, length: Tensor) -> Tensor:
    """How much of the unit gradient brings the cosine to its target, where it is below."""
    sine, target_sine = (1 - cosine.square()).sqrt(), (1 - target.square()).clamp_min(0).sqrt()
    below = (cosine < target) & (target_sine > 0)
    step = length * (target * sine - cosine * target_sine) / torch.where(below, target_sine, 1.0)
    return torch.where(below, step, 0.0)
