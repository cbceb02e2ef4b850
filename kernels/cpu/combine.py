"""Linear combination of gradient sets on the CPU: chunk by chunk, in the output's own memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import flat_chunks, multiply_dtype, positions, row_matrix


@torch.no_grad()
def combine(
    shards: list[Tensor], coefficients: Tensor, first: Sequence[int], rows: bool, out: list[Tensor]
) -> None:
    """``out = Σ_k C[s,k] G_k``; ``out`` may be one of the sets. See ``fastproj.combine``."""
    values = None if rows else coefficients.tolist()
    for start, target, at in zip(first, out, positions(shards, coefficients.shape[1]), strict=True):
        if not target.numel():
            continue
        dtype = multiply_dtype([target, *at])
        if values is None:
            _combine_rows(coefficients, start, target, at, dtype)
        elif target.is_contiguous():
            for chunk in flat_chunks([target, *at]):
                _combine_chunk(values[start], chunk[0], chunk[1:], dtype)
        else:
            _combine_chunk(values[start], target, at, dtype)


def _combine_chunk(
    coefficients: Sequence[float], target: Tensor, sets: Sequence[Tensor], dtype: torch.dtype
) -> None:
    terms = [(c, shard) for c, shard in zip(coefficients, sets, strict=True) if c != 0]
    if not terms:
        target.zero_()
        return
    if all(shard.dtype == target.dtype == dtype for _, shard in terms) and not _aliases_later(target, terms):
        total = torch.mul(terms[0][1], terms[0][0], out=target)
        for c, shard in terms[1:]:
            total.add_(shard, alpha=c)
        return
    total = terms[0][1].to(dtype) * terms[0][0]
    for c, shard in terms[1:]:
        total.add_(shard.to(dtype), alpha=c)
    target.copy_(total)


def _aliases_later(target: Tensor, terms: Sequence[tuple[float, Tensor]]) -> bool:
    """Whether writing the first term into the target would destroy a later one."""
    return any(shard.data_ptr() == target.data_ptr() for _, shard in terms[1:])


def _combine_rows(
    coefficients: Tensor, start: int, target: Tensor, sets: Sequence[Tensor], dtype: torch.dtype
) -> None:
    matrices = [row_matrix(shard).to(dtype) for shard in sets]
    columns = coefficients[start : start + matrices[0].shape[0]].to(dtype)
    total = torch.zeros_like(matrices[0])
    for k, matrix in enumerate(matrices):
        c = columns[:, k : k + 1]
        total.add_(torch.where(c == 0, 0.0, c * matrix))
    target.copy_(total.view(target.shape))
