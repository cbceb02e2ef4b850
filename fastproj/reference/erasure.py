"""Concept erasure on whole data and dense d×d matrices, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def leace(x: Tensor, z: Tensor) -> Tensor:
    """``P = I − W⁺ (W Σ_xz)(W Σ_xz)⁺ W`` with ``W = (Σ_xx^½)⁺``, (d, d): of x − μ a row, ``(x − μ) Pᵀ``.

    x is (n, d), z (n, k). Source: Belrose et al. 2023 (arXiv:2306.03819), theorem 4.3.
    """
    x, z = _centred(x), _centred(z)
    values, vectors = torch.linalg.eigh(x.mT @ x / len(x))
    kept = values > values[-1] * len(values) * 8 * torch.finfo(torch.float64).eps
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, 1 / torch.where(kept, root, 1.0), 0.0)
    whiten = vectors @ torch.diag(inverse) @ vectors.mT
    unwhiten = vectors @ torch.diag(root) @ vectors.mT
    across = whiten @ (x.mT @ z / len(x))
    return _identity(x) - unwhiten @ across @ torch.linalg.pinv(across, rtol=1e-8) @ whiten


def difference_of_means(x: Tensor, labels: Tensor) -> Tensor:
    """``P = I − D D⁺``, the columns of D the class means less that of all, (d, d); labels (n,)."""
    wide = _centred(x)
    differences = torch.stack([wide[labels == label].mean(0) for label in labels.unique()], dim=1)
    return _identity(wide) - differences @ torch.linalg.pinv(differences, rtol=1e-8)


def inlp(x: Tensor, z: Tensor, iterations: int) -> Tensor:
    """``P ← P (I − w w⁺)``, w the least-squares predictor of z from ``P x``, so many times over, (d, d).

    x is (n, d), z (n, k). Source: Ravfogel et al. 2020 (arXiv:2004.07667), algorithm 1, by least squares.
    """
    x, z = _centred(x), _centred(z)
    projection = _identity(x)
    for _ in range(iterations):
        weights = torch.linalg.pinv(x @ projection, rtol=1e-10) @ z
        projection = projection @ (_identity(x) - weights @ torch.linalg.pinv(weights, rtol=1e-8))
    return projection


def principal_directions(x: Tensor, rank: int) -> Tensor:
    """The first right singular vectors of x less its mean, (d, rank); signs are arbitrary."""
    return torch.linalg.svd(_centred(x), full_matrices=False).Vh[:rank].mT


def safe_lora(a: Tensor, b: Tensor, base: Tensor, aligned: Tensor, rank: int | None) -> tuple[Tensor, float]:
    """``(C B, cos(C B A, B A))`` with ``V = W_aligned − W_base``.

    ``C = V Vᵀ / ‖V‖_F``, or with a rank ``C = U Uᵀ``, U the first left singular vectors of V.
    Source: Hsu et al. 2024 (arXiv:2405.16833), section 3.2; the rank is ours.
    """
    a, b = a.to(torch.float64), b.to(torch.float64)
    v = aligned.to(torch.float64) - base.to(torch.float64)
    if rank is None:
        matrix = v @ v.mT / torch.linalg.matrix_norm(v)
    else:
        u = torch.linalg.svd(v).U[:, :rank]
        matrix = u @ u.mT
    before, after = (b @ a).flatten(), (matrix @ b @ a).flatten()
    return matrix @ b, float(before @ after / (before.norm() * after.norm()))


def _centred(rows: Tensor) -> Tensor:
    wide = rows.to(torch.float64)
    return wide - wide.mean(0)


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
