"""Gram of gradient sets on the CPU: pack by pack, so that every set is read from memory once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import Pack, multiply_dtype, packs, positions, row_matrix

# Squares outside this range have met fp32's overflow or underflow; fp64 holds all products of fp32.
SAFE_SQUARE = (1e-30, 1e30)


@torch.no_grad()
def gram(shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int) -> Tensor:
    """``M[s,a,b] = Σ ⟨G_a, G_b⟩``, (S, K, K) in fp64; see ``fastproj.gram``."""
    if rows:
        return _row_gram(shards, num_sets, first, count)
    totals = [[0.0] * (num_sets * num_sets) for _ in range(count)]
    for pack in packs(shards, num_sets, first):
        total = totals[pack.segment]
        for index, value in enumerate(_pack_gram(pack)):
            total[index] += value
    return torch.tensor(totals, dtype=torch.float64).view(count, num_sets, num_sets)


def _pack_gram(pack: Pack) -> list[float]:
    """The K×K inner products of one pack, in fp64 where fp32 would leave its range."""
    sets = pack.sets if pack.uniform else [[piece.to(pack.dtype) for piece in own] for own in pack.sets]
    values = _inner_products(sets)
    k = len(sets)
    low, high = SAFE_SQUARE
    if pack.dtype == torch.float32 and not all(low < values[a * k + a] < high for a in range(k)):
        values = _inner_products([[piece.to(torch.float64) for piece in own] for own in sets])
    return values


def _inner_products(sets: Sequence[Sequence[Tensor]]) -> list[float]:
    k = len(sets)
    flat = [[piece.reshape(-1) for piece in own] for own in sets]
    values = [0.0] * (k * k)
    for a in range(k):
        for b in range(a, k):
            products = [torch.dot(x, y).item() for x, y in zip(flat[a], flat[b], strict=True)]
            values[a * k + b] = values[b * k + a] = sum(products)
    return values


def _row_gram(shards: list[Tensor], num_sets: int, first: Sequence[int], count: int) -> Tensor:
    out = torch.zeros(count, num_sets, num_sets, dtype=torch.float64)
    for start, at in zip(first, positions(shards, num_sets), strict=True):
        if not at[0].numel():
            continue
        matrices = [row_matrix(shard) for shard in at]
        target = out[start : start + matrices[0].shape[0]]
        dtype = multiply_dtype(at)
        _row_products(matrices, dtype, target)
        squares = target.diagonal(dim1=1, dim2=2)
        low, high = SAFE_SQUARE
        if dtype == torch.float32 and not bool(((squares > low) & (squares < high)).all()):
            _row_products(matrices, torch.float64, target)
    return out


def _row_products(matrices: Sequence[Tensor], dtype: torch.dtype, target: Tensor) -> None:
    pieces = [matrix.to(dtype) for matrix in matrices]
    for a in range(len(pieces)):
        for b in range(a, len(pieces)):
            target[:, a, b] = target[:, b, a] = torch.linalg.vecdot(pieces[a], pieces[b])
