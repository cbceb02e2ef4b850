"""INLP: linear predictors of a concept one after another, each one's directions taken out before the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastproj.erasure._fitter import NEGLIGIBLE, Fitter, as_rows
from fastproj.erasure._moments import Moments
from fastproj.erasure.eraser import OrthogonalEraser
from fastproj.reference.basis import MOST_RANK, Basis

# Eigenvalues of a covariance and what is left of a direction are rounded by so many d·eps at most.
_SLACK = 8

Classifier = Callable[[Tensor], Tensor | None]


class INLP(Fitter):
    """Iterative null-space projection: ``P ← P`` less the row space of the best predictor of z from ``P x``.

    The predictor is linear least squares, so that one pass over the samples is enough for all iterations:
    ``w = argmin E|wᵀ(x − μ) − (z − z̄)|²`` with ``Vᵀw = 0`` for the directions V so far, and V takes in the
    span of w. It ends early where no predictor is left. For another classifier, :func:`nullspace_projection`.

    Args:
        iterations: how many predictors, 1 or more.
        classes: how many labels there are; None for z that are numbers.
        affine: take away around the mean, which stays as it is; without, as the paper, around 0.
        tolerance: multiple correlations of z and its prediction up to which there is no predictor.

    ``.eraser`` is an :class:`OrthogonalEraser` in fp64, its directions in the order of the iterations; of
    labels each finds one less than the classes seen. ValueError where there were no samples, labels of one
    class only, or where there would be more than 64 directions.

    Differs from the authors' published code, which trains a support vector machine, on a part of the samples
    drawn at random, returns in one version the product of the projections, no projection where the
    classifier's weights are not orthogonal to those before, and skips a classifier below a least accuracy.

    Source: Ravfogel et al. 2020 (arXiv:2004.07667), algorithm 1; least squares from moments is ours.
    """

    def __init__(
        self,
        iterations: int,
        classes: int | None = None,
        *,
        affine: bool = False,
        tolerance: float = NEGLIGIBLE,
    ) -> None:
        super().__init__(classes)
        _check_iterations(iterations)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
        self.iterations, self.affine, self.tolerance = iterations, affine, tolerance

    @property
    def eraser(self) -> OrthogonalEraser:
        fitted = self._fitted()
        found = _least_squares(fitted, self.iterations, self.tolerance)
        return OrthogonalEraser(Basis(found), fitted.mean_x.clone() if self.affine else None)


@torch.no_grad()
def nullspace_projection(x: Tensor, classifier: Classifier, iterations: int) -> OrthogonalEraser:
    """``P ← P`` less the row space of ``classifier(P x)``, ``iterations`` times: INLP by any classifier.

    Args:
        x: activations (…, d).
        classifier: trains on activations (n, d), in fp64, and gives its weights (k, d) or (d,); None ends.
        iterations: 1 or more.

    The directions of each classifier are made orthogonal to those before, which weights of a regularised one
    need not be; weights within what was removed are rounding and add none.

    Raises TypeError where x or the weights are no floating-point tensor, ValueError for other shapes, weights
    that are not finite and more than 64 directions. Source: Ravfogel et al. 2020 (arXiv:2004.07667).
    """
    _check_iterations(iterations)
    rows = as_rows(x).to(torch.float64)
    found = rows.new_zeros(rows.shape[1], 0)
    for _ in range(iterations):
        weights = classifier(rows - (rows @ found) @ found.mT)
        if weights is None:
            break
        if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
            raise TypeError(f"the classifier must give its weights or None, got {type(weights).__name__}")
        columns = weights.detach().to(found).reshape(-1, weights.shape[-1]).mT
        if len(columns) != len(found) or not bool(torch.isfinite(columns).all()):
            raise ValueError(
                f"expected finite weights (k, {len(found)}) of the classifier, got {tuple(weights.shape)}"
            )
        u, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        largest = sizes.max() if sizes.numel() else sizes.new_zeros(())
        found = _extended(found, u[:, sizes > NEGLIGIBLE * largest])
    return OrthogonalEraser(Basis(found))


def _least_squares(fitted: Moments, iterations: int, tolerance: float) -> Tensor:
    """The directions (d, k), in coordinates along the eigenvectors of Σ_xx, where it is diagonal."""
    squares = fitted.squares
    largest = squares.diagonal().max()
    scale = torch.where(largest > 0, largest, 1.0)
    values, vectors = torch.linalg.eigh(squares / scale)
    kept = values > values[-1] * len(values) * _SLACK * torch.finfo(torch.float64).eps
    kept &= values > 0
    values, vectors = values[kept], vectors[:, kept]
    seen = fitted.varies_z & (fitted.square_z > 0)
    across = vectors.mT @ (fitted.cross[:, seen] / scale.sqrt() / fitted.square_z[seen].sqrt())
    found = values.new_zeros(len(values), 0)
    for _ in range(iterations):
        inner = found / values[:, None]
        weights = across / values[:, None]
        weights = weights - inner @ torch.linalg.solve(found.mT @ inner, found.mT @ weights)
        _, correlations, vh = torch.linalg.svd(values.sqrt()[:, None] * weights, full_matrices=False)
        new = weights @ vh[correlations > tolerance].mT
        rank = found.shape[1]
        found = _extended(found, new / torch.linalg.vector_norm(new, dim=0))
        if found.shape[1] == rank:
            break
    return torch.where(fitted.varies_x[:, None], vectors @ found, 0.0)


def _extended(found: Tensor, new: Tensor) -> Tensor:
    """The orthonormal columns with those of ``new``, of unit length, made orthogonal to them; none twice."""
    left = new - found @ (found.mT @ new)
    lengths = torch.linalg.vector_norm(left, dim=0)
    left = (left / lengths)[:, lengths > NEGLIGIBLE]
    left = left - found @ (found.mT @ left)  # the rounding of what the first time took away
    u, sizes, _ = torch.linalg.svd(left, full_matrices=False)
    out = torch.cat([found, u[:, sizes > NEGLIGIBLE]], dim=1)
    if out.shape[1] > MOST_RANK:
        raise ValueError(f"expected {MOST_RANK} directions at most, got {out.shape[1]}: ask fewer iterations")
    return out


def _check_iterations(iterations: int) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be a whole number, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
