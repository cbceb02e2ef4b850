"""Kronecker random projections on the CPU: a GEMM for each factor, both made once a call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.kernels.cpu._philox import philox_words
from fastproj.kernels.cpu._sketch_dense import GROUP, sign_entries

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
    right = signs(seed, RIGHT, right_rows, 0, WIDTH, vectors.dtype)
    left = signs(seed, LEFT, left_rows, offset // WIDTH, rows, vectors.dtype)
    inner = vectors.reshape(samples * rows, WIDTH) @ right
    product = left.T @ inner.view(samples, rows, right_rows)
    return product.reshape(samples, dimension).mul_(dimension**-0.5)


def factors(dimension: int) -> tuple[int, int]:
    """k = k₁ k₂ with k₁ ≤ k₂ as near to each other as k divides."""
    left = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0)
    return left, dimension // left


def signs(seed: int, stream: int, rows: int, first: int, columns: int, dtype: torch.dtype) -> Tensor:
    """±1 for the columns ``first`` … ``first + columns − 1``, transposed: (columns, rows)."""
    table = sign_entries(dtype).table
    groups = [
        table[philox_words(seed, stream, group, first, columns).view(np.uint8)].reshape(columns, GROUP)
        for group in range(-(-rows // GROUP))
    ]
    return torch.from_numpy(np.concatenate(groups, axis=1)[:, :rows])
