"""Orthonormal bases of subspaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_RANK = 64
# Unit vectors whose smallest singular value is within so many roundings of zero are dependent.
_ROUNDINGS = 8


@dataclass(frozen=True, eq=False)
class Basis:
    """``V`` with orthonormal columns, ``VᵀV = I``: a subspace of dimension k.

    ``matrix`` is (d, k), fp32 or fp64, its columns contiguous in memory. Made by :func:`orthonormalize`,
    which is what guarantees the orthonormality; the constructor checks shapes and dtypes alone.

    Raises:
        TypeError: the matrix is no fp32 or fp64 tensor.
        ValueError: it is not two-dimensional, has more columns than rows or than 64, or requires a gradient.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor):
            raise TypeError(f"a basis must be a tensor, got {type(self.matrix).__name__}")
        if self.matrix.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a basis must be fp32 or fp64, got {self.matrix.dtype}")
        _check_shape(self.matrix)
        if not self.matrix.mT.is_contiguous():
            object.__setattr__(self, "matrix", self.matrix.mT.contiguous().mT)

    @property
    def dimension(self) -> int:
        """d, the length of the vectors."""
        return self.matrix.shape[0]

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.matrix.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Basis:
        """The same basis elsewhere, or in fp32 or fp64."""
        return Basis(self.matrix.to(device=device, dtype=dtype))

    def first(self, rank: int) -> Basis:
        """The basis of the first ``rank`` columns alone. ValueError where there are fewer."""
        if not 0 <= rank <= self.rank:
            raise ValueError(f"expected a rank from 0 to {self.rank}, got {rank}")
        return Basis(self.matrix[:, :rank])


def orthonormalize(vectors: Tensor) -> Basis:
    """An orthonormal basis of the span of ``vectors``' columns: the Q of ``vectors = Q R``, signs kept.

    The j-th column of Q is the j-th vector without its part along those before it, so the first columns span
    what the first vectors span. Computed in fp64, rounded to fp32 unless the vectors are fp64.

    Args:
        vectors: (d, k) with k ≤ min(d, 64), or (d,) for one direction; fp32, bf16, fp16 or fp64. k = 0 is the
            basis of nothing.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another shape; NaN or Inf; columns that are linearly dependent to the precision of their
            dtype (the message says how many directions there are): nothing is padded or dropped.
    """
    if not isinstance(vectors, Tensor) or not vectors.dtype.is_floating_point:
        came = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
        raise TypeError(f"a basis must come from a floating-point tensor, got {came}")
    vectors = vectors.detach()
    columns = vectors[:, None] if vectors.dim() == 1 else vectors
    _check_shape(columns)
    wide = columns.to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("a basis must come from finite vectors, got NaN or Inf")
    # Powers of two change no direction, and keep the squares of 1e±300 in range.
    exponents = torch.frexp(wide.abs().amax(0, keepdim=True)).exponent if wide.numel() else 0
    q, r = torch.linalg.qr(torch.ldexp(wide, -torch.as_tensor(exponents, device=wide.device)))
    _check_rank(columns, r)
    out = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    return Basis((q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(out))


def _check_shape(matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"a basis must be (d, k), got {tuple(matrix.shape)}")
    most = min(matrix.shape[0], MOST_RANK)
    if matrix.shape[1] > most:
        raise ValueError(
            f"a basis of vectors of length {matrix.shape[0]} has at most {most} columns, "
            f"got {matrix.shape[1]}"
        )
    if matrix.requires_grad:
        raise ValueError("a basis is a constant: detach it, as projections are not differentiable in it")


def _check_rank(columns: Tensor, r: Tensor) -> None:
    """The columns, at unit length, must be independent beyond the rounding of their dtype."""
    if not columns.shape[1]:
        return
    precision = torch.finfo(columns.dtype).eps
    norms = torch.linalg.vector_norm(r, dim=0)
    scaled = r / torch.where(norms > 0, norms, 1.0)
    singular = torch.linalg.svdvals(scaled)
    tolerance = _ROUNDINGS * precision * columns.shape[1] ** 0.5
    rank = int((singular > tolerance).sum())
    if rank < columns.shape[1]:
        raise ValueError(
            f"expected {columns.shape[1]} linearly independent vectors, got {rank} independent directions "
            f"(smallest singular value of the unit vectors: {float(singular[-1]):.1e})"
        )
