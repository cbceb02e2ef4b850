"""Kronecker random projections: a dense projection of rows, then one of columns, each with few positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.kernels._sketch_dense import product

LEFT, RIGHT = 3, 4  # streams
WIDTH = 1024  # columns of the matrix that positions are laid out in


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``S = L V Rᵀ / √k`` as (B, k₁ k₂) for V (B, rows, 1024), whose first and last row may be cut."""
    samples, positions = vectors.shape
    before = offset % WIDTH
    after = -(before + positions) % WIDTH
    if before or after:
        vectors = torch.nn.functional.pad(vectors, (before, after))
    rows = vectors.shape[1] // WIDTH
    left_rows, right_rows = factors(dimension)
    inner = product(vectors.reshape(samples * rows, WIDTH), right_rows, seed, 0, RIGHT)
    columns = inner.view(samples, rows, right_rows).mT.reshape(samples * right_rows, rows)
    turned = product(columns, left_rows, seed, offset // WIDTH, LEFT)
    return turned.view(samples, right_rows, left_rows).mT.reshape(samples, dimension).mul_(dimension**-0.5)


def factors(dimension: int) -> tuple[int, int]:
    """k = k₁ k₂ with k₁ ≤ k₂ as near to each other as k divides."""
    left = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0)
    return left, dimension // left
