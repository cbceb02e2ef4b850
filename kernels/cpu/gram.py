"""Gram of gradient sets on the CPU: chunk by chunk, so that every set is read from memory once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import flat_chunks, multiply_dtype, positions, row_matrix

# Squares outside this range have met fp32's overflow or underflow; fp64 holds all products of fp32.
SAFE_SQUARE = (1e-30, 1e30)


@torch.no_grad()
def gram(shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int) -> Tensor:
    """``M[s,a,b] = Σ ⟨G_a, G_b⟩``, (S, K, K) in fp64; see ``fastproj.gram``."""
    if rows:
        return _row_gram(shards, num_sets, first, count)
    totals = [[0.0] * (num_sets * num_sets) for _ in range(count)]
    for segment, at in zip(first, positions(shards, num_sets), strict=True):
        dtype = multiply_dtype(at)
        total = totals[segment]
        for chunk in flat_chunks(at):
            for index, value in enumerate(_chunk_gram(chunk, dtype)):
                total[index] += value
    return torch.tensor(totals, dtype=torch.float64).view(count, num_sets, num_sets)


def _chunk_gram(chunk: Sequence[Tensor], dtype: torch.dtype) -> list[float]:
    """The K×K inner products of one chunk, in fp64 where fp32 would leave its range."""
    values = _inner_products([piece.to(dtype) for piece in chunk])
    k = len(chunk)
    low, high = SAFE_SQUARE
    if dtype == torch.float32 and not all(low < values[a * k + a] < high for a in range(k)):
        values = _inner_products([piece.to(torch.float64) for piece in chunk])
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
