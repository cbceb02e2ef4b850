"""Traffic of the per-sample contractions, from the decisions of their launchers.

Counted is every load and store: the narrow operand by each tile along the wide one (and each of the K sums),
the wide one by each tile of rows, the weights beside every narrow element, partial results of splits. x and
delta are contiguous, as the launchers copy what is not; the cast of the K × B weights is not ours to count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic, total
from fastproj.bench.traffic.workloads import Contraction, Workload
from fastproj.kernels._contraction import sides, tile_for
from fastproj.kernels.weighted_grad import positions_per_split

SUM_DTYPES = {torch.float64: torch.float64}  # else fp32


def weighted_moves(x: Tensor, delta: Tensor, sums: int) -> Moves:
    """What ``kernels.weighted_grad`` moves for K = ``sums``; only shapes and dtypes of x and delta matter."""
    narrow, wide, *_ = sides(x, delta)
    result = torch.result_type(x, delta)
    sum_bytes = SUM_DTYPES.get(result, torch.float32).itemsize
    positions, rows = x.shape[0] * x.shape[1], sums * narrow.shape[2]
    numel = rows * wide.shape[2]
    if not numel or not positions:
        return Moves({}, ())
    tile = tile_for(narrow, wide, rows)
    row_tiles, wide_tiles = -(-rows // tile.rows), -(-wide.shape[2] // tile.wide)
    per_split = positions_per_split(positions, row_tiles * wide_tiles, tile.tokens)
    splits = -(-positions // per_split)
    kernel, table = "weighted_sum_kernel", sums * x.shape[0] * sum_bytes
    written = splits * numel * (result.itemsize if splits == 1 else sum_bytes)
    streams = (
        _operand(kernel, "narrow", narrow, times=sums * wide_tiles),
        _operand(kernel, "wide", wide, times=row_tiles),
        Stream(kernel, "weights", "load", positions * rows * wide_tiles * sum_bytes, table, table),
        Stream(kernel, "out" if splits == 1 else "partials", "store", written, written),
    )
    moves = Moves({kernel: 1}, streams)
    return moves if splits == 1 else moves + _sum_of_splits(written, numel * result.itemsize)


def _sum_of_splits(partials: int, out: int) -> Moves:
    kernel = "sum_splits_kernel"
    return Moves(
        {kernel: 1},
        (
            Stream(kernel, "partials", "load", partials, partials, partials, warm=True),
            Stream(kernel, "out", "store", out, out),
        ),
    )


def per_sample_moves(x: Tensor, delta: Tensor) -> Moves:
    """What ``kernels.per_sample_grad`` moves; only shapes and dtypes of x and delta matter."""
    narrow, wide, *_ = sides(x, delta)
    result = torch.result_type(x, delta)
    written = x.shape[0] * x.shape[2] * delta.shape[2] * result.itemsize
    if not written or not x.shape[1]:
        return Moves({}, ())
    tile = tile_for(narrow, wide, narrow.shape[2])
    row_tiles, wide_tiles = -(-narrow.shape[2] // tile.rows), -(-wide.shape[2] // tile.wide)
    kernel = "outer_sum_kernel"
    streams = (
        _operand(kernel, "narrow", narrow, times=wide_tiles),
        _operand(kernel, "wide", wide, times=row_tiles),
        Stream(kernel, "out", "store", written, written),
    )
    return Moves({kernel: 1}, streams)


def _operand(kernel: str, name: str, tensor: Tensor, times: int) -> Stream:
    distinct = tensor.numel() * tensor.itemsize
    return Stream(kernel, name, "load", distinct * times, distinct, distinct if times > 1 else 0)


def activations(call: Contraction, dtype: str) -> tuple[Tensor, Tensor]:
    """x (B, T, d_in) and delta (B, T, d_out) of a contraction, without storage."""
    batch = (call.samples, call.tokens)
    x = torch.empty(*batch, call.d_in, dtype=DTYPES[dtype], device="meta")
    return x, torch.empty(*batch, call.d_out, dtype=DTYPES[dtype], device="meta")


def weighted_grad_call(call: Contraction, dtype: str, sums: int) -> Traffic:
    """``Σ_i w_ki δ_iᵀ x_i`` of one linear map in every block; weights are fp32 (fp64 with fp64)."""
    x, delta = activations(call, dtype)
    numel = call.samples * call.tokens * (call.d_in + call.d_out)
    weights = sums * call.samples * SUM_DTYPES.get(x.dtype, torch.float32).itemsize
    return Traffic(
        operator="weighted_grad",
        workload=call.name,
        moves=weighted_moves(x, delta, sums).repeated(call.calls),
        least_read_bytes=(numel * x.itemsize + weights) * call.calls,
        least_written_bytes=sums * call.d_in * call.d_out * x.itemsize * call.calls,
        flops=2 * sums * call.samples * call.tokens * call.d_in * call.d_out * call.calls,
        rate=dtype,
    )


def per_sample_grad_call(call: Contraction, dtype: str) -> Traffic:
    """``δ_iᵀ x_i`` of one linear map in every block."""
    x, delta = activations(call, dtype)
    return Traffic(
        operator="per_sample_grad",
        workload=call.name,
        moves=per_sample_moves(x, delta).repeated(call.calls),
        least_read_bytes=(x.numel() + delta.numel()) * x.itemsize * call.calls,
        least_written_bytes=call.samples * call.d_in * call.d_out * x.itemsize * call.calls,
        flops=2 * call.samples * call.tokens * call.d_in * call.d_out * call.calls,
        rate=dtype,
    )


def weighted_grad(workload: Workload, sums: int = 2) -> Traffic:
    """K weighted sums for each contraction of the workload: EDGE's two in one backward pass."""
    dtype = workload.activation_dtype
    return _together(workload, [weighted_grad_call(call, dtype, sums) for call in workload.contractions])


def per_sample_grad(workload: Workload) -> Traffic:
    """The gradient of each sample for each contraction of the workload."""
    dtype = workload.activation_dtype
    return _together(workload, [per_sample_grad_call(call, dtype) for call in workload.contractions])


def _together(workload: Workload, calls: list[Traffic]) -> Traffic:
    return Traffic(
        operator=calls[0].operator,
        workload=workload.name,
        moves=total(call.moves for call in calls),
        least_read_bytes=sum(call.least_read_bytes for call in calls),
        least_written_bytes=sum(call.least_written_bytes for call in calls),
        flops=sum(call.flops for call in calls),
        rate=calls[0].rate,
    )
