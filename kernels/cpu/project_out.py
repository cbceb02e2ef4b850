"""Projection onto the complement of a subspace on the CPU: two matrix products, in the output's memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

# Shards of so many elements at most are multiplied together: ATen's cost per call outweighs two copies.
SMALL = 8_192
# Elements of a block that is still in cache, as fp32 within 2 MiB, when the second product reads it.
BLOCK = 524_288
# Of the long dimension in the left product, which the threads share: BLAS leaves it to one of them.
MOST_PIECES = 16

Members = list[tuple[Tensor, Tensor, Tensor]]  # shard, basis, target


@torch.no_grad()
def project_out(
    shards: list[Tensor], bases: list[Tensor], owner: Sequence[int], left: bool, out: list[Tensor]
) -> None:
    """``G − (G V) Vᵀ`` or ``G − U (Uᵀ G)``; ``out`` may be the shards. See ``fastproj.project_out``.

    Half precision is projected in fp32 and rounded once, fp64 in fp64.
    """
    converted: dict[tuple[int, torch.dtype], Tensor] = {}
    groups: dict[tuple[torch.Size, torch.Size], Members] = {}
    for shard, index, target in zip(shards, owner, out, strict=True):
        size = shard.numel()
        if index < 0 or not size:
            if target is not shard:
                target.copy_(shard)
            continue
        basis, own = bases[index], shard.dtype
        dtype = torch.float64 if own == torch.float64 else torch.float32
        if basis.dtype != dtype:
            key = (index, dtype)
            basis = converted[key] if key in converted else converted.setdefault(key, basis.to(dtype))
        if size <= SMALL and own == dtype and shard.dim() == 2:
            groups.setdefault((shard.shape, basis.shape), []).append((shard, basis, target))
        else:
            _project(shard, basis, left, target)
    for members in groups.values():
        _project_together(members, left)


def _project(shard: Tensor, basis: Tensor, left: bool, target: Tensor) -> None:
    """One shard, its memory passed over once where BLAS would pass over it twice, or through fp32."""
    matrix = _as_matrix(shard, left)
    written = matrix if target is shard else _as_matrix(target, left)
    if matrix.numel() <= BLOCK or ((left or basis.shape[1] > 1) and written.dtype == basis.dtype):
        _project_block(matrix, basis, left, written)
    else:
        step = max(1, BLOCK // basis.shape[0])
        for part, place in zip(matrix.split(step, int(left)), written.split(step, int(left)), strict=True):
            _project_block(part, basis, left, place)
    if written.data_ptr() != target.data_ptr():
        target.copy_(written.view(target.shape))


def _as_matrix(tensor: Tensor, left: bool) -> Tensor:
    """The first dimension against the rest, a vector as one row (left: one column); a view if it can be."""
    if tensor.dim() == 2:
        return tensor
    if tensor.dim() == 1:
        return tensor.unsqueeze(int(left))
    return tensor.reshape(tensor.shape[0], -1)


def _project_block(matrix: Tensor, basis: Tensor, left: bool, target: Tensor) -> None:
    wide = target if target.dtype == basis.dtype else matrix.to(basis.dtype)
    if wide is target and target.data_ptr() != matrix.data_ptr():
        target.copy_(matrix)
    if left:
        wide.addmm_(basis, _left_product(basis, wide), alpha=-1)
    else:
        wide.addmm_(wide @ basis, basis.mT, alpha=-1)
    if wide is not target:
        target.copy_(wide)


def _left_product(basis: Tensor, matrix: Tensor) -> Tensor:
    """``Uᵀ G``, (k, n); where there are several threads as a sum over pieces of the long dimension."""
    pieces = gcd(basis.shape[0], MOST_PIECES)
    if basis.shape[1] < 2 or pieces < 2 or torch.get_num_threads() < 2:
        return basis.mT @ matrix
    rows = matrix.unflatten(0, (pieces, -1))
    return torch.bmm(basis.unflatten(0, (pieces, -1)).mT, rows).sum(0)


def _project_together(members: Members, left: bool) -> None:
    """Small shards of one shape, whose bases have one rank, stacked and copied back."""
    at_once = BLOCK // members[0][0].numel()
    for start in range(0, len(members), at_once):
        shards, bases, targets = zip(*members[start : start + at_once], strict=True)
        stacked = torch.stack(shards)
        columns = torch.stack([basis.mT for basis in bases])
        if left:
            stacked.baddbmm_(columns.mT, torch.bmm(columns, stacked), alpha=-1)
        else:
            stacked.baddbmm_(torch.bmm(stacked, columns.mT), columns, alpha=-1)
        torch._foreach_copy_(targets, stacked.unbind())
