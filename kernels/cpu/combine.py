"""Linear combination of gradient sets on the CPU: pack by pack, in the output's own memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.kernels.cpu._chunks import PACK, Pack, multiply_dtype, packs, positions, row_matrix

# Within these a step of gradient descent with weight decay keeps the digits of both terms: below the scale,
# ``t − (1 − scale)·t`` cancels.
SMALLEST_SCALE = 0.5
LARGEST_DECAY = 1e3
SMALLEST_FACTOR = 1e-20


@torch.no_grad()
def combine(
    shards: list[Tensor], coefficients: Tensor, first: Sequence[int], rows: bool, out: list[Tensor]
) -> None:
    """``out = Σ_k C[s,k] G_k``; ``out`` may be one of the sets. See ``fastproj.combine``."""
    num_sets = coefficients.shape[1]
    if rows:
        for start, target, at in zip(first, out, positions(shards, num_sets), strict=True):
            combine_rows(coefficients, start, target, at)
        return
    values = coefficients.tolist()
    # A big target is written through a flat view, which needs its memory in order.
    staged = [
        t if t.numel() <= PACK or t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype) for t in out
    ]
    for pack in packs([*staged, *shards], num_sets + 1, first):
        combine_pack(values[pack.segment], pack)
    for target, written in zip(out, staged, strict=True):
        if target is not written:
            target.copy_(written)


def combine_pack(coefficients: Sequence[float], pack: Pack) -> None:
    targets, *sets = pack.sets
    terms = [(c, pieces) for c, pieces in zip(coefficients, sets, strict=True) if c != 0]
    if not terms:
        torch._foreach_zero_(targets)
        return
    if not pack.uniform or _is_read_again(targets, terms):
        _combine_through_buffer(targets, terms, pack.dtype)
        return
    (scale, pieces), *others = terms
    copied = [(t, p) for t, p in zip(targets, pieces, strict=True) if t.data_ptr() != p.data_ptr()]
    if copied:
        torch._foreach_copy_([t for t, _ in copied], [p for _, p in copied])
    if len(others) == 1 and _fits_one_sweep(scale, others[0][0], [*targets, *others[0][1]]):
        _scale_and_add(targets, others[0][1], scale, others[0][0])
        return
    if scale != 1:
        torch._foreach_mul_(targets, scale)
    for c, pieces in others:
        torch._foreach_add_(targets, pieces, alpha=c)


def _fits_one_sweep(scale: float, c: float, tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`_scale_and_add` keeps its precision, and memory is in the order that it expects."""
    in_range = (
        scale >= SMALLEST_SCALE
        and SMALLEST_FACTOR < abs(c) < 1 / SMALLEST_FACTOR
        and abs(1 - scale) < LARGEST_DECAY * abs(c)
    )
    return in_range and all(tensor.is_contiguous() for tensor in tensors)


def _scale_and_add(targets: list[Tensor], pieces: list[Tensor], scale: float, c: float) -> None:
    """``t ← scale·t + c·p`` in one sweep over memory, where a multiplication and an addition take two.

    It is a step of plain gradient descent with weight decay: ``t ← t − lr (p + decay·t)``.
    """
    torch._fused_sgd_(
        targets,
        pieces,
        [],
        weight_decay=(1 - scale) / -c,
        momentum=0.0,
        lr=-c,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _is_read_again(targets: Sequence[Tensor], terms: Sequence[tuple[float, list[Tensor]]]) -> bool:
    """Whether writing the first term into the targets would destroy a later one."""
    written = {target.data_ptr() for target in targets}
    return any(piece.data_ptr() in written for _, pieces in terms[1:] for piece in pieces)


def _combine_through_buffer(
    targets: Sequence[Tensor], terms: Sequence[tuple[float, list[Tensor]]], dtype: torch.dtype
) -> None:
    """Multiply in ``dtype`` and round once."""
    for j, target in enumerate(targets):
        total = terms[0][1][j].to(dtype) * terms[0][0]
        for c, pieces in terms[1:]:
            total.add_(pieces[j].to(dtype), alpha=c)
        target.copy_(total)


def combine_rows(coefficients: Tensor, start: int, target: Tensor, sets: Sequence[Tensor]) -> None:
    if not target.numel():
        return
    dtype = multiply_dtype([target, *sets])
    matrices = [row_matrix(shard).to(dtype) for shard in sets]
    columns = coefficients[start : start + matrices[0].shape[0]].to(dtype)
    total = torch.zeros_like(matrices[0])
    for k, matrix in enumerate(matrices):
        c = columns[:, k : k + 1]
        total.add_(torch.where(c == 0, 0.0, c * matrix))
    target.copy_(total.view(target.shape))
