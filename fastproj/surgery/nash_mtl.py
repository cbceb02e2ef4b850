"""Nash-MTL: the bargaining solution, which every task gains from in proportion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method
from fastproj.surgery._unit_gram import UnitGram

_STEPS = 60
_CLOSE = 0.25  # full steps where the Newton decrement is below


@dataclass(frozen=True)
class NashMTL(Method):
    """``out = Σ_k α_k g_k``, ``α > 0``, ``Mα = 1/α``: the d of a ball that maximises ``Σ_k log⟨g_k, d⟩``.

    ``|out| = √K`` whatever the scale of the gradients. α is the minimum of ``½ αᵀMα − Σ log α_k``, a convex
    function, which damped Newton steps reach from anywhere; after each the whole of α is scaled to
    ``αᵀMα = K``. Where a convex combination of the gradients is 0 (a Pareto-stationary point) there is no
    solution, and α grows to what the Gram's precision allows. Gradients of norm 0 get 0.

    Permutation-invariant; scaling a gradient changes nothing: tested.
    Granularity: global.

    Differences elsewhere: the authors' code, and TorchJD after it, scale the result down to ``max_norm`` = 1,
    so that it is ``1/√K`` of this one; they solve a sequence of at most 20 convex programmes that begins
    where the last call ended, and keep what they had where one fails.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022), Claim 3.1, Algorithm 1.
    Meaning: ``fastproj.reference.surgery.nash_mtl``.
    """

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        identity = torch.eye(unit.norms.shape[-1], dtype=unit.norms.dtype, device=unit.norms.device)
        absent = torch.diag_embed((~unit.present).to(unit.norms.dtype))
        matrix = unit.cosines + absent + unit.tolerance * identity
        alpha = torch.ones_like(unit.norms)
        for _ in range(_STEPS):
            alpha = _newton(matrix, _scaled(matrix, alpha), identity)
        return unit.coefficients(_scaled(matrix, alpha))


def _scaled(matrix: Tensor, alpha: Tensor) -> Tensor:
    """The multiple of α that has ``αᵀMα = K``: the best one along its ray."""
    square = torch.sum(alpha * (matrix @ alpha[..., None])[..., 0], dim=-1, keepdim=True)
    return alpha * (alpha.shape[-1] / square).sqrt()


def _newton(matrix: Tensor, alpha: Tensor, identity: Tensor) -> Tensor:
    """One damped step on ``½ αᵀMα − Σ log α_k``, in multiples of α."""
    hessian = identity + alpha[..., :, None] * matrix * alpha[..., None, :]
    right = 1 - alpha * (matrix @ alpha[..., None])[..., 0]
    factor = torch.linalg.cholesky_ex(hessian, check_errors=False).L
    step = torch.cholesky_solve(right[..., None], factor)[..., 0]
    decrement = (step * right).sum(-1, keepdim=True).clamp_min(0).sqrt()
    return alpha * (1 + step * torch.where(decrement < _CLOSE, 1.0, 1 / (1 + decrement)))
