"""Projection and AdamW on the CPU: pack by pack, the combined gradient in a buffer that stays in cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from fastproj.kernels.cpu._chunks import PACK, Pack, multiply_dtype, packs, positions, row_matrix
from fastproj.kernels.cpu.combine import combine_pack, combine_rows

STATE_LISTS = 3  # parameters and both moments
# Elements of a pack: the gradient alone is read again, out of the last cache at worst, and torch's step costs
# as much per call as 20,000 elements of it.
STEP_PACK = 4 * PACK


@torch.no_grad()
def projected_adamw(
    shards: list[Tensor],
    coefficients: Tensor,
    first: Sequence[int],
    rows: bool,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """AdamW's step along ``Σ_k C[s,k] G_k``, in place. See ``fastproj.projected_adamw_``."""
    if found_inf is not None and found_inf.item() != 0:
        return
    options = {
        "lr": lr.item(), "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
        "amsgrad": False, "maximize": False,
    }  # fmt: skip
    lists = (params, exp_avgs, exp_avg_sqs)
    # torch's step goes through memory in order, whatever the strides say.
    staged = [[tensor.contiguous() for tensor in own] for own in lists]
    flat = [*(tensor for own in staged for tensor in own), *shards]
    num_sets = coefficients.shape[1]
    if rows:
        for start, step, at in zip(first, steps, positions(flat, STATE_LISTS + num_sets), strict=True):
            _step_rows(coefficients, start, step, at, options)
    else:
        _step_packs(coefficients.tolist(), flat, first, steps, options)
    for own, values in zip(lists, staged, strict=True):
        for tensor, value in zip(own, values, strict=True):
            if tensor is not value:
                tensor.copy_(value)


def _step_packs(
    coefficients: Sequence[Sequence[float]],
    flat: list[Tensor],
    first: Sequence[int],
    steps: Sequence[Tensor],
    options: dict[str, Any],
) -> None:
    buffers: dict[torch.dtype, Tensor] = {}
    num_sets = len(coefficients[0]) if coefficients else 0
    for pack in packs(flat, STATE_LISTS + num_sets, first, STEP_PACK):
        # Where dtypes are mixed, each shard may have a mixture of its own.
        alike = pack.uniform or all(len({tensor.dtype for tensor in own}) == 1 for own in pack.sets)
        parts = [slice(None)] if alike else [slice(j, j + 1) for j in range(len(pack.members))]
        for chosen in parts:
            pieces = [own[chosen] for own in pack.sets]
            state, sets = pieces[:STATE_LISTS], pieces[STATE_LISTS:]
            dtype = _gradient_dtype([own[0] for own in state], pack.dtype)
            if dtype not in buffers:
                buffers[dtype] = torch.empty(STEP_PACK, dtype=dtype)
            size = sum(tensor.numel() for tensor in state[0])
            gradient = buffers[dtype][:size]
            gradients = list(_unflatten_dense_tensors(gradient, state[0]))
            own, members = coefficients[pack.segment], pack.members[chosen]
            if pack.uniform:
                combine_pack(own, Pack(pack.segment, dtype, True, [gradients, *sets], members))
            else:
                _combine_wide(own, gradient, sets, pack.dtype)
            _step(state, gradients, [steps[i] for i in members], options)


def _combine_wide(
    coefficients: Sequence[float], gradient: Tensor, sets: Sequence[list[Tensor]], dtype: torch.dtype
) -> None:
    """``gradient ← Σ_k c_k x_k`` in ``dtype``, rounded once; each set is laid out in one vector."""
    terms = [(c, own) for c, own in zip(coefficients, sets, strict=True) if c != 0]
    total, wide = torch.zeros_like(gradient, dtype=dtype), torch.empty_like(gradient, dtype=dtype)
    for c, own in terms:
        torch._foreach_copy_(list(_unflatten_dense_tensors(wide, own)), own)
        total.add_(wide, alpha=c)
    gradient.copy_(total)


def _gradient_dtype(state: Sequence[Tensor], dtype: torch.dtype) -> torch.dtype:
    """What the combined gradient is rounded to: the state's dtype, as torch's step asks, where it is one.

    Where it is several, or narrower than fp64 beside sets in fp64, all is widened to ``dtype`` instead.
    """
    kinds = {tensor.dtype for tensor in state}
    return kinds.pop() if len(kinds) == 1 and dtype == torch.float32 else dtype


def _step(
    state: Sequence[list[Tensor]], gradients: list[Tensor], steps: list[Tensor], options: dict[str, Any]
) -> None:
    """torch's own step in the gradients' dtype, and one rounding of what is kept in another."""
    dtype = gradients[0].dtype
    if all(own[0].dtype == dtype for own in state):
        torch._fused_adamw_(state[0], gradients, state[1], state[2], [], steps, **options)
        return
    wide = [[tensor.to(dtype) for tensor in own] for own in state]
    torch._fused_adamw_(wide[0], gradients, wide[1], wide[2], [], steps, **options)
    for own, values in zip(state, wide, strict=True):
        torch._foreach_copy_(own, values)


def _step_rows(
    coefficients: Tensor, start: int, step: Tensor, at: Sequence[Tensor], options: dict[str, Any]
) -> None:
    """One shard whose rows are segments of their own, as many rows at a time as fill a pack."""
    if not at[0].numel():
        return
    matrices = [row_matrix(tensor) for tensor in at]
    number, width = matrices[0].shape
    dtype, taken = _gradient_dtype(at[:STATE_LISTS], multiply_dtype(at)), max(1, STEP_PACK // width)
    for row in range(0, number, taken):
        pieces = [matrix[row : row + taken] for matrix in matrices]
        gradient = torch.empty(pieces[0].shape, dtype=dtype)
        combine_rows(coefficients, start + row, gradient, pieces[STATE_LISTS:])
        _step([[piece] for piece in pieces[:STATE_LISTS]], [gradient], [step], options)
