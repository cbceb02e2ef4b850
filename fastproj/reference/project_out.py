"""Projection onto the complement of a subspace, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_matrix(shard: Tensor, left: bool) -> Tensor:
    """The shard as a matrix: its first dimension against the rest.

    A vector is one row, or one column where it is projected from the left.
    """
    if shard.dim() < 2:
        return shard.reshape(-1, 1) if left else shard.reshape(1, -1)
    return shard.reshape(shard.shape[0], shard.shape[1:].numel())


def project_out(
    shards: Sequence[Tensor], bases: Sequence[Tensor], owner: Sequence[int], left: bool
) -> list[Tensor]:
    """``G − (G V) Vᵀ`` from the right, or ``G − U (Uᵀ G)`` from the left.

    Shard i is projected by ``bases[owner[i]]``, (d, k) with orthonormal columns, and left as it is where
    ``owner[i]`` is −1. The result is n fp64 tensors.
    """
    out = []
    for shard, index in zip(shards, owner, strict=True):
        matrix = as_matrix(shard.to(torch.float64), left)
        if index >= 0:
            basis = bases[index].to(torch.float64)
            matrix = matrix - basis @ (basis.mT @ matrix) if left else matrix - (matrix @ basis) @ basis.mT
        out.append(matrix.reshape(shard.shape))
    return out
