"""Gram of gradient sets on the CPU: pack by pack, so that every set is read from memory once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fastproj.kernels.cpu._chunks import GATHER, Pack, multiply_dtype, packs, positions, row_matrix

# Squares outside this range have met fp32's overflow or underflow; fp64 holds all products of fp32.
SAFE_SQUARE = (1e-30, 1e30)


@torch.no_grad()
def gram(shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int) -> Tensor:
    """``M[s,a,b] = Σ ⟨G_a, G_b⟩``, (S, K, K) in fp64; see ``fastproj.gram``."""
    if rows:
        return _row_gram(shards, num_sets, first, count)
    totals = [[0.0] * (num_sets * num_sets) for _ in range(count)]
    for pack in packs(shards, num_sets, first, GATHER):
        total = totals[pack.segment]
        for index, value in enumerate(_pack_gram(pack)):
            total[index] += value
    return torch.tensor(totals, dtype=torch.float64).view(count, num_sets, num_sets)


def _pack_gram(pack: Pack) -> list[float]:
    """The K×K inner products of one pack, in fp64 where fp32 would leave its range."""
    vectors = [own[0].reshape(-1) if len(own) == 1 else _flatten_dense_tensors(own) for own in pack.sets]
    values = _inner_products([vector.to(pack.dtype) for vector in vectors])
    k = len(vectors)
    low, high = SAFE_SQUARE
    if pack.dtype == torch.float32 and not all(low < values[a * k + a] < high for a in range(k)):
        values = _inner_products([vector.to(torch.float64) for vector in vectors])
    return values


def _inner_products(pieces: Sequence[Tensor]) -> list[float]:
    k = len(pieces)
    values = [0.0] * (k * k)
    for a in range(k):
        for b in range(a, k):
            values[a * k + b] = values[b * k + a] = torch.dot(pieces[a], pieces[b]).item()
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
