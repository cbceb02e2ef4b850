"""CAGrad: the direction near the mean gradient that helps the task it helps least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.surgery._method import Method, check_number
from fastproj.surgery._nonnegative_qp import nonnegative_qp
from fastproj.surgery._unit_gram import UnitGram

_STAGES = 14  # the barrier's weight goes from 1 to 1e-13
_STEPS = 5  # of Newton's method in each
_CLOSE = 0.25  # full steps where the Newton decrement is below
_TRIALS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # between the step that must descend and the longest one there is
_LARGEST = 1e12  # entry of a Newton matrix, next to its identity, of which Cholesky keeps enough digits


@dataclass(frozen=True)
class CAGrad(Method):
    """``out = argmax_d min_k ⟨g_k, d⟩`` over ``|d − ḡ| ≤ c|ḡ|``, where ḡ is the mean of the gradients.

    By duality ``out = ḡ + c|ḡ| g_w/|g_w|`` with ``g_w = Σ w_k g_k`` and w the minimum of
    ``⟨g_w, ḡ⟩ + c|ḡ||g_w|`` over the simplex. Found by Newton's method on a barrier whose weight falls by
    ten, stage by stage, in coefficients of unit gradients. At a Pareto-stationary point the best value may be
    0, which many d of the ball have: then it is the one nearest to ḡ, which is that of :class:`DualProj`.
    Values count as 0 within the square root of the Gram's precision.

    Args:
        c: radius of the ball, in |ḡ|; 0 gives the mean. The paper has c < 1 converge to its minima.

    Non-conflicting for c ≥ 1; permutation-invariant; not linear under scaling: tested.
    Granularity: global, shared parameters as one vector.

    Differences elsewhere: LibMTL and the authors' code divide the result by ``1 + c²`` (``rescale=1``) and
    stop at the precision of SciPy's SLSQP; TorchJD returns 0, not ḡ, where ``|g_w|`` is below 1e-4 of the
    gradients, and where the gradients' norms are below 0.01.

    Source: Liu et al., "Conflict-Averse Gradient Descent" (NeurIPS 2021), eq. 3, Algorithm 1.
    Meaning: ``fastproj.reference.surgery.cagrad``.
    """

    c: float = 0.5

    def __post_init__(self) -> None:
        check_number("c", self.c, 0.0)

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        size = unit.norms.shape[-1]
        longest = unit.norms.amax(-1, keepdim=True)
        scaled = unit.norms / torch.where(longest > 0, longest, 1.0)
        mean = scaled / size
        along = _times(unit.cosines, mean)
        length = (mean * along).sum(-1, keepdim=True).clamp_min(0).sqrt()
        slope = along / torch.where(length > 0, length, 1.0)
        shortest = torch.where(unit.present, scaled, torch.inf).amin(-1, keepdim=True)
        # Σ w = 1 in coefficients of unit gradients; a zero gradient takes weight and adds nothing.
        constraint = torch.where(unit.present, shortest / torch.where(unit.present, scaled, 1.0), 1.0)
        added, value = _least(unit, slope, constraint, self.c)
        nearest = nonnegative_qp(unit.cosines, slope)
        moved = (nearest * _times(unit.cosines, nearest)).sum(-1, keepdim=True).clamp_min(0).sqrt()
        stationary = (value <= unit.tolerance**0.5) & (moved <= self.c)
        added = torch.where(stationary, nearest, added)
        return unit.coefficients(longest * (mean + length * added))


def _least(unit: UnitGram, slope: Tensor, constraint: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """``c p/|Σ p_k ĝ_k|``, p ≥ 0 the minimum of ``⟨slope,p⟩ + c|Σ p_k ĝ_k|`` at ``⟨constraint,p⟩ = 1``.

    Also a lower bound of that minimum over ``Σ p_k``, (S, 1).
    """
    identity = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    p = torch.ones_like(slope) / constraint.sum(-1, keepdim=True)
    reached, going = torch.ones_like(p[:, :1]), torch.ones_like(p[:, :1], dtype=torch.bool)
    for stage in range(_STAGES):
        weight = 10.0**-stage
        for _ in range(_STEPS):
            following, sound = _newton(p, unit, slope, constraint, identity, c, weight)
            # Past the last digits of a flat problem there is no step to take, and no lower weight.
            going = going & sound
            p, reached = torch.where(going, following, p), torch.where(going, weight, reached)
    image, _, pull = _norm_pull(p, unit, c, reached)
    length = (p * image).sum(-1, keepdim=True).clamp_min(0).sqrt()
    gap = (p.shape[-1] + 2) * reached  # of a barrier: its parameter, K for p ≥ 0 and 2 for the norm's cone
    value = (p * slope).sum(-1, keepdim=True) + c * length - gap
    return pull * p, value / p.sum(-1, keepdim=True)


def _norm_pull(p: Tensor, unit: UnitGram, c: float, weight: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """``Cp``, and root and κ with ``κCp`` the gradient of ``c√(pᵀCp + tolerance)`` smoothed by the barrier.

    The smoothed norm is ``min_σ cσ − weight·log(σ² − pᵀCp − tolerance)``, the cone's own barrier: up to a
    constant ``root − weight·log(weight + root)``.
    """
    image = _times(unit.cosines, p)
    square = (p * image).sum(-1, keepdim=True).clamp_min(0) + unit.tolerance
    root = (weight**2 + c**2 * square).sqrt()
    return image, root, c**2 / (weight + root)


def _newton(
    p: Tensor, unit: UnitGram, slope: Tensor, constraint: Tensor, identity: Tensor, c: float, weight: float
) -> tuple[Tensor, Tensor]:
    """A Newton step on ``⟨slope,p⟩ + smoothed norm − weight·Σ log p`` along ``⟨constraint,p⟩ = 1``.

    Also whether the Newton matrix is one that Cholesky's method can be relied on for, (S, 1).
    """
    image, root, pull = _norm_pull(p, unit, c, weight)
    scaled = p / weight**0.5
    bent = scaled * image * (pull / root**0.5)
    normal = p * constraint
    hessian = identity + pull[..., None] * scaled[..., :, None] * unit.cosines * scaled[..., None, :]
    hessian = hessian - bent[..., :, None] * bent[..., None, :]
    # The norm does not bend along p; the constraint's square does, and changes no step that keeps to it.
    hessian = hessian + normal[..., :, None] * normal[..., None, :] / weight
    factor, failed = torch.linalg.cholesky_ex(hessian, check_errors=False)
    right = 1 - p * (slope + pull * image) / weight
    both = torch.cholesky_solve(torch.stack([right, normal], dim=-1), factor)
    free, held = both[..., 0], both[..., 1]
    multiplier = (normal * free).sum(-1, keepdim=True) / (normal * held).sum(-1, keepdim=True)
    step = free - multiplier * held
    decrement = (step * (right - multiplier * normal)).sum(-1, keepdim=True).clamp_min(0).sqrt()
    moved = _best_length(p, step, decrement, unit, slope, c, weight)
    return moved, (failed == 0)[..., None] & (pull < _LARGEST * weight)


def _best_length(
    p: Tensor, step: Tensor, decrement: Tensor, unit: UnitGram, slope: Tensor, c: float, weight: float
) -> Tensor:
    """``p (1 + t·step)`` for the best t of those tried; t = 1 near the minimum, where values are rounding."""
    longest = 0.99 / (-step).amax(-1, keepdim=True).clamp_min(0.99)
    # A self-concordant function falls at least up to here; the longest step may be shorter only by rounding.
    sure = torch.minimum(1 / (1 + decrement), longest)
    lengths = torch.stack([sure + share * (longest - sure) for share in _TRIALS])
    tried = p * (1 + lengths * step)
    _, root, _ = _norm_pull(tried, unit, c, weight)
    # The terms of p itself are taken off factor by factor, so that what is left has its own digits.
    logs = torch.log1p(lengths * step).sum(-1, keepdim=True)
    values = ((tried - p) * slope).sum(-1, keepdim=True) + root - weight * ((weight + root).log() + logs)
    best = values.argmin(0, keepdim=True)
    chosen = tried.gather(0, best.expand(1, *p.shape))[0]
    return torch.where(decrement < _CLOSE, p * (1 + step), chosen)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
