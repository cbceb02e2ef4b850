"""LEACE: the least change of activations after which no linear predictor finds a concept in them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.erasure._fitter import NEGLIGIBLE, Fitter
from fastproj.erasure._moments import Moments
from fastproj.erasure.eraser import ObliqueEraser

# Eigenvalues of a correlation matrix are rounded by so many d·eps at most, as measured on dependent features.
_SLACK = 8


class LEACE(Fitter):
    """``r(x) = x − Σ_xz (Σ_xzᵀ Σ_xx⁺ Σ_xz)⁺ Σ_xzᵀ Σ_xx⁺ (x − μ)``, fitted batch by batch.

    Afterwards ``Cov(r(x), z) = 0``, so no linear predictor of z, under any convex loss, does better than a
    constant; of all affine maps of which that is so, it changes x least, in the mean square under any inner
    product. It is the paper's ``W⁺ (W Σ_xz)(W Σ_xz)⁺ W`` with ``W = (Σ_xx^½)⁺``, written without W.

    Computed in standardised features and concepts, so that no unit of either makes a difference. In factors,
    ``L`` spans ``Σ_xz`` itself, and ``RᵀL = I`` is solved for, so that what is erased is erased to rounding,
    however badly conditioned Σ_xx is. Constant features are left alone. Off the span of the samples, where
    the paper takes one of many answers, R is one in standardised features.

    Args:
        classes: how many labels there are; None for z that are numbers. See :meth:`update`.
        affine: take away around the mean μ, which stays as it is; without, around 0, which shifts it.
        shrinkage: estimate Σ_xx for the choice of R as ``a S + (1 − a) (tr S / d) I``, with the
            asymptotically optimal a from 0 to 1, for few samples of many features; what is erased from the
            samples is erased still, their change is no longer the least.
        tolerance: canonical correlations of x and z up to which they count as uncorrelated.

    ``.eraser`` is an :class:`ObliqueEraser` in fp64 of rank ≤ k, for labels below the number of those seen;
    ValueError where there were no samples, labels of one class only, or a spread whose square underflows.

    Without shrinkage no direction's variance grows, ``Cov(r(x)) ≤ Cov(x)``.

    Differs from ``LeaceFitter`` of concept-erasure 0.2.4, whose ``shrinkage=False`` it equals on
    well-conditioned data: there singular values of ``W Σ_xz`` below 0.01 *in units of z* are not erased, so
    that z scaled by 1e-3 is not erased at all; eigenvalues of Σ_xx count relative to the largest, so that
    features of small units keep the concept; its default shrinkage adds an epsilon to fourth powers of x,
    which at small units is all that counts, and has no bounds, so that features that are uncorrelated and of
    equal variance leave no usable covariance; labels given as integers are taken for numbers, so that of
    several classes the linear trend alone is erased; samples of one class give an eraser of nothing; and sums
    are in the precision of x and begin at 0, so that activations in fp32 far from 0 keep some of the concept.

    Source: Belrose et al. 2023 (arXiv:2306.03819), theorems 4.2 and 4.3; shrinkage by Bodnar, Gupta and
    Parolya 2014 (arXiv:1308.2608), the bounds ours.
    """

    def __init__(
        self,
        classes: int | None = None,
        *,
        affine: bool = True,
        shrinkage: bool = False,
        tolerance: float = NEGLIGIBLE,
    ) -> None:
        super().__init__(classes)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
        self.affine, self.shrinkage, self.tolerance = affine, shrinkage, tolerance

    @property
    def eraser(self) -> ObliqueEraser:
        fitted = self._fitted()
        left, right = _factors(fitted, self.shrinkage, self.tolerance)
        return ObliqueEraser(left, right, fitted.mean_x.clone() if self.affine else None)


def _factors(fitted: Moments, shrinkage: bool, tolerance: float) -> tuple[Tensor, Tensor]:
    """L and R, (d, k) each, columns of L of unit length, ``RᵀL = I``."""
    covariance = fitted.squares / fitted.count
    if bool(((covariance.diagonal() == 0) & fitted.varies_x).any()):
        raise ValueError("expected features whose variance fp64 can hold, got a spread below 1e-161")
    if shrinkage:
        covariance = shrunk(covariance, fitted.count)
    units = _roots(covariance.diagonal())
    across = fitted.cross / fitted.count / units[:, None] / _roots(fitted.square_z / fitted.count)
    values, vectors = torch.linalg.eigh(_symmetric(covariance / units[:, None] / units))
    kept = values > values[-1] * len(values) * _SLACK * torch.finfo(torch.float64).eps
    whiten = vectors[:, kept] / values[kept].sqrt()
    u, correlations, vh = torch.linalg.svd(whiten.mT @ across, full_matrices=False)
    found = correlations > tolerance
    left = units[:, None] * (across @ vh[found].mT)
    right = (whiten @ u[:, found]) / units[:, None]
    lengths = _lengths(left)
    left, right = left / lengths, right * lengths
    # What was cut off as rounding, and rounding itself, would leave as much of the concept.
    return left, torch.linalg.solve(left.mT @ right, right, left=False)


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """``a S + (1 − a) (tr S / d) I`` with ``a = 1 − (tr S)²/n / (‖S‖² − (tr S)²/d)``, from 0 to 1.

    S is the covariance (d, d), of n samples. Source: Bodnar, Gupta and Parolya 2014 (arXiv:1308.2608).
    """
    dimension = len(covariance)
    trace = covariance.diagonal().sum()
    if not bool(trace > 0):
        return covariance
    unit = covariance / trace
    spread = unit.square().sum() - 1 / dimension
    weight = (1 - 1 / (count * spread)).clamp(0, 1) if bool(spread > 0) else spread.new_zeros(())
    identity = torch.eye(dimension, dtype=covariance.dtype, device=covariance.device)
    return weight * covariance + (1 - weight) * trace / dimension * identity


def _roots(variances: Tensor) -> Tensor:
    """Standard deviations, 1 for what is constant."""
    return torch.where(variances > 0, variances, 1.0).sqrt()


def _lengths(columns: Tensor) -> Tensor:
    """Euclidean lengths whose squares stay in range."""
    largest = columns.abs().amax(0) if columns.numel() else columns.new_ones(columns.shape[1])
    return largest * torch.linalg.vector_norm(columns / largest, dim=0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
