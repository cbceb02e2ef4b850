"""Traffic of per-sample influence, from the decisions of its launcher.

Counted is every load and store: the narrow operand by each tile along the wide one, the wide one by each tile
of rows, moments and references by each sample, the partial sums of tiles. All rows are filled up to multiples
of 16 bytes. What the launcher copies first is not ours to count: rows that were not, tables that it turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.bench.traffic.contraction import SUM_DTYPES, activations
from fastproj.bench.traffic.moves import Moves, Stream, Traffic, total
from fastproj.bench.traffic.workloads import Contraction, Workload
from fastproj.kernels._blocks import ALIGNMENT
from fastproj.kernels._contraction import sides
from fastproj.kernels.per_sample_influence import influence_tile

REFERENCES = 4


def influence_moves(x: Tensor, delta: Tensor, references: int, adam: bool) -> Moves:
    """What ``kernels.per_sample_influence`` moves; only shapes and dtypes of x and delta matter."""
    narrow, wide, *_ = sides(x, delta)
    result = torch.result_type(x, delta)
    size = SUM_DTYPES.get(result, torch.float32).itemsize
    if not narrow.shape[2] or not len(x):
        return Moves({}, ())
    weight = narrow.shape[2] * _filled(wide, result)
    tile = influence_tile(result, narrow.shape[2])
    row_tiles, wide_tiles = -(-narrow.shape[2] // tile.rows), -(-wide.shape[2] // tile.wide)
    tiles, sums, tokens = row_tiles * wide_tiles, len(x) * (references + 1), x.shape[0] * x.shape[1]
    kernel, written = "influence_kernel", sums * tiles * size
    streams = (
        _repeated(kernel, "narrow", tokens * _filled(narrow, result) * result.itemsize, wide_tiles),
        _repeated(kernel, "wide", tokens * _filled(wide, result) * result.itemsize, row_tiles),
        _repeated(kernel, "references", references * weight * size, len(x)),
        _repeated(kernel, "moments", 2 * adam * weight * size, len(x)),
        Stream(kernel, "out" if tiles == 1 else "partials", "store", written, written),
    )
    moves = Moves({kernel: 1}, streams)
    return moves if tiles == 1 else moves + _sum_of_tiles(sums, tiles, size)


def _filled(side: Tensor, dtype: torch.dtype) -> int:
    """The columns of a side as they are loaded."""
    elements = ALIGNMENT // dtype.itemsize
    return -(-side.shape[2] // elements) * elements


def _sum_of_tiles(sums: int, tiles: int, size: int) -> Moves:
    kernel, partials = "sum_tiles_kernel", sums * tiles * size
    return Moves(
        {kernel: 1},
        (
            Stream(kernel, "partials", "load", partials, partials, partials, warm=True),
            Stream(kernel, "out", "store", sums * size, sums * size),
        ),
    )


def _repeated(kernel: str, name: str, distinct: int, times: int) -> Stream:
    return Stream(kernel, name, "load", distinct * times, distinct, distinct if times > 1 else 0)


def per_sample_influence_call(
    call: Contraction, dtype: str, references: int = REFERENCES, adam: bool = True
) -> Traffic:
    """Products with M references and square norms, of Adam's updates, for one linear map in every block."""
    x, delta = activations(call, dtype)
    size = SUM_DTYPES.get(x.dtype, torch.float32).itemsize
    tables = (references + 2 * adam) * call.d_in * call.d_out * size
    # A product of the contraction, then one for each reference and the norm; Adam's step is not counted.
    products = call.tokens + references + 1
    return Traffic(
        operator="per_sample_influence",
        workload=call.name,
        moves=influence_moves(x, delta, references, adam).repeated(call.calls),
        least_read_bytes=((x.numel() + delta.numel()) * x.itemsize + tables) * call.calls,
        least_written_bytes=call.samples * (references + 1) * size * call.calls,
        flops=2 * call.samples * products * call.d_in * call.d_out * call.calls,
        rate=dtype,
    )


def per_sample_influence(workload: Workload) -> Traffic:
    """Scores of each sample against ``REFERENCES`` references for each contraction of the workload."""
    calls = [per_sample_influence_call(call, workload.activation_dtype) for call in workload.contractions]
    return Traffic(
        operator="per_sample_influence",
        workload=workload.name,
        moves=total(call.moves for call in calls),
        least_read_bytes=sum(call.least_read_bytes for call in calls),
        least_written_bytes=sum(call.least_written_bytes for call in calls),
        flops=sum(call.flops for call in calls),
        rate=workload.activation_dtype,
    )
