"""Kronecker random projections in fp64: ``P = L ⊗ R / √k`` over positions as a matrix of 1,024 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.reference._sketch_dense import sign_matrix

LEFT, RIGHT = 3, 4  # streams
WIDTH = 1024


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``S[a k₂ + b] = Σ_j L[a, j div 1024] R[b, j mod 1024] v_j / √k``."""
    left_rows, right_rows = factors(dimension)
    positions = torch.arange(offset, offset + vectors.shape[1])
    last = (offset + vectors.shape[1] - 1) // WIDTH
    left = sign_matrix(seed, LEFT, left_rows, range(offset // WIDTH, last + 1))
    right = sign_matrix(seed, RIGHT, right_rows, range(WIDTH))
    columns = left[:, None, positions // WIDTH - offset // WIDTH] * right[None, :, positions % WIDTH]
    return vectors @ columns.reshape(dimension, -1).to(vectors.device).T / dimension**0.5


def factors(dimension: int) -> tuple[int, int]:
    """k = k₁ k₂ with k₁ ≤ k₂ as near to each other as k divides."""
    left = max(d for d in range(1, int(dimension**0.5) + 1) if dimension % d == 0)
    return left, dimension // left
