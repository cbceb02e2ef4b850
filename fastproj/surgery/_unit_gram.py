"""A Gram matrix as norms and cosines: what every method solves on, whatever the gradients' scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# K gradients count as dependent where they are to so many roundings for each of them.
_ROUNDINGS = 4
# Of a least-squares solution: normal equations square the condition number, refinements take it back.
_REFINEMENTS = 3


@dataclass(frozen=True)
class UnitGram:
    """``C[s,a,b] = ⟨ĝ_a, ĝ_b⟩`` of unit gradients ``ĝ = g/|g|``, with the norms kept apart.

    ``norms`` is (S, K). ``cosines``, (S, K, K), is ``L Lᵀ`` of ``factor``, a pivoted Cholesky factor without
    the pivots below ``tolerance``: positive semidefinite whatever the rounding of the Gram matrix was. A
    gradient of norm 0 is orthogonal to all others and to itself. ``finite``, (S,), tells which segments
    are to be solved at all: the others stand here as if their gradients were orthonormal.
    """

    norms: Tensor
    cosines: Tensor
    factor: Tensor
    finite: Tensor
    tolerance: float

    @property
    def present(self) -> Tensor:
        """Which gradients are not zero, (S, K)."""
        return self.norms > 0

    def coefficients(self, of_unit_gradients: Tensor) -> Tensor:
        """Coefficients of the gradients from those of the unit gradients, ``c_k = x_k/|g_k|``."""
        return torch.where(self.present, of_unit_gradients / torch.where(self.present, self.norms, 1.0), 0.0)


def unit_gram(gram: Tensor, precision: float) -> UnitGram:
    """Norms and cosines of Gram matrices (S, K, K) in fp64 whose entries are good to ``precision``."""
    size = gram.shape[-1]
    finite = torch.isfinite(gram).all(-1).all(-1)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    gram = torch.where(finite[:, None, None], 0.5 * (gram + gram.mT), identity)
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
    cosines = (gram * inverse[:, :, None] * inverse[:, None, :]).clamp(-1, 1)
    tolerance = _ROUNDINGS * precision * size
    factor = semidefinite_factor(cosines, tolerance)
    return UnitGram(norms, factor @ factor.mT, factor, finite, tolerance)


def semidefinite_factor(matrix: Tensor, tolerance: float) -> Tensor:
    """L with ``L Lᵀ`` = matrix, by Cholesky with diagonal pivots; columns of pivots below tolerance are 0."""
    size = matrix.shape[-1]
    columns = []
    for _ in range(size):
        value, pivot = matrix.diagonal(dim1=-2, dim2=-1).max(-1, keepdim=True)
        column = matrix.gather(-1, pivot[..., None].expand(*pivot.shape[:-1], size, 1))[..., 0]
        kept = value > tolerance
        column = torch.where(kept, column / torch.where(kept, value, 1.0).sqrt(), 0.0)
        columns.append(column)
        matrix = matrix - column[..., :, None] * column[..., None, :]
    return torch.stack(columns, dim=-1)


def pseudo_solve(factor: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁺ b``: of the x that bring ``L Lᵀ x`` closest to b, the shortest.

    factor is L, (..., K, K), from :func:`semidefinite_factor`: its columns are independent, or 0. right is b,
    (..., K).
    """
    empty = (factor == 0).all(-2)
    normal = torch.linalg.cholesky_ex(factor.mT @ factor + torch.diag_embed(empty.to(factor.dtype))).L

    def solve(target: Tensor) -> Tensor:
        return torch.cholesky_solve(target, normal)

    b = right[..., None]
    y = solve(factor.mT @ b)  # L y is the part of b that L reaches
    for _ in range(_REFINEMENTS):
        y = y + solve(factor.mT @ (b - factor @ y))
    v = solve(y)  # Lᵀ x = y, with x = L v
    for _ in range(_REFINEMENTS):
        v = v + solve(y - factor.mT @ (factor @ v))
    return (factor @ v)[..., 0]
