"""Difference of means: the directions between the classes' means, taken out orthogonally."""

from __future__ import annotations

import torch

from fastproj.erasure._fitter import NEGLIGIBLE, Fitter
from fastproj.erasure._moments import Moments
from fastproj.erasure.eraser import OrthogonalEraser
from fastproj.reference.basis import Basis

# Means of fp64 are rounded by so many eps of the largest value at most, merged or not.
_ROUNDINGS = 64


class DifferenceOfMeans(Fitter):
    """``r(x) = x − V Vᵀ (x − μ)``, V an orthonormal basis of the class means less the mean of all.

    Of two classes V is ``(m₁ − m₀) / ‖m₁ − m₀‖``; of K, K − 1 directions or fewer, the longest first.
    For z that are numbers V spans ``Σ_xz``, to which the differences of means belong. Afterwards
    ``Cov(r(x), z) = 0`` as after :class:`LEACE`, at the cost of more change, but of no covariance to fit, and
    no activation grows.

    Args:
        classes: how many labels there are; None for z that are numbers. Classes without samples do not count.
        affine: take away around the mean of all, which stays as it is; without, around 0.
        tolerance: lengths beside that of the first direction up to which a direction counts as rounding.

    ``.eraser`` is an :class:`OrthogonalEraser` in fp64, of rank 0 where the means are equal to rounding.
    ValueError where there were no samples, labels of one class only, or more than 64 directions.

    Differs from concept-erasure 0.2.4's ``method="orth"``, which it equals otherwise: there directions of
    ``Σ_xz`` shorter than 0.01 *in units of x and z* are not erased, and longer ones are even where they are
    rounding, as of large units.

    Source: Belrose et al. 2023 (arXiv:2306.03819), theorem 3.1; for two classes, Bolukbasi et al. 2016
    (arXiv:1607.06520).
    """

    _square = False

    def __init__(
        self, classes: int | None = None, *, affine: bool = False, tolerance: float = NEGLIGIBLE
    ) -> None:
        super().__init__(classes)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
        self.affine, self.tolerance = affine, tolerance

    @property
    def eraser(self) -> OrthogonalEraser:
        fitted = self._fitted()
        mean = fitted.mean_x.clone() if self.affine else None
        return OrthogonalEraser(self._directions(fitted), mean)

    def _directions(self, fitted: Moments) -> Basis:
        seen = fitted.varies_z
        cross = fitted.cross[:, seen]
        if self.classes is None:
            # A share of 1/√(n Σ z²) is the covariance with z in units of its standard deviation.
            differences = cross / (fitted.count * fitted.square_z[seen]).sqrt()
        else:
            differences = cross / (fitted.count * fitted.mean_z[seen])
        size = torch.maximum(fitted.high_x.abs(), fitted.low_x.abs())
        size = torch.where(fitted.varies_x, size, 0.0)
        largest = size.max()
        if not bool(largest > 0) or not differences.shape[1]:
            return Basis(cross.new_zeros(len(cross), 0))
        rounding = _ROUNDINGS * torch.finfo(torch.float64).eps * torch.linalg.vector_norm(size / largest)
        u, lengths, _ = torch.linalg.svd(differences / largest, full_matrices=False)
        found = (lengths > rounding) & (lengths > self.tolerance * lengths[0])
        return Basis(torch.where(fitted.varies_x[:, None], u[:, found], 0.0))
