"""Traffic of the dense random projections, from the decisions of their launchers.

P itself moves nothing. Counted is every load and store: the vectors by each group of 256 rows, the quantiles
of normal entries by each entry, the partial results of chunks.
"""

from __future__ import annotations

import torch

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._sketch_dense import GROUP, LEVEL_DTYPES, TILES, tiles_per_chunk
from fastproj.kernels._sketch_kronecker import WIDTH, factors

DIMENSION = 1024  # of the named workloads' sketches
LEVELS = 2**15


def dense_moves(samples: int, positions: int, dimension: int, dtype: torch.dtype, normal: bool) -> Moves:
    """What ``kernels._sketch_dense.product`` moves for vectors (samples, positions) of 2³⁰ at most."""
    tile, groups = TILES[dtype], -(-dimension // GROUP)
    tiles = -(-positions // tile.positions)
    chunks = -(-tiles // tiles_per_chunk(positions, dimension, tile))
    vectors = samples * positions * dtype.itemsize
    written = samples * dimension * (8 if dtype == torch.float64 else 4)
    kernel, sums = "dense_sketch_kernel", "sum_chunks_kernel"
    streams = [
        Stream(kernel, "vectors", "load", vectors * groups, vectors, vectors if groups > 1 else 0),
        Stream(kernel, "partials" if chunks > 1 else "out", "store", chunks * written, chunks * written),
    ]
    if normal:
        entry = LEVEL_DTYPES.get(dtype, torch.uint8).itemsize
        entries = tiles * tile.positions * groups * GROUP * -(-samples // tile.samples)
        streams.append(Stream(kernel, "quantiles", "load", entries * entry, LEVELS * entry, LEVELS * entry))
    if chunks == 1:
        return Moves({kernel: 1}, tuple(streams))
    partials = chunks * written
    streams.append(Stream(sums, "partials", "load", partials, partials, partials, warm=True))
    streams.append(Stream(sums, "out", "store", written, written))
    return Moves({kernel: 1, sums: 1}, tuple(streams))


def kronecker_moves(samples: int, positions: int, dimension: int, dtype: torch.dtype) -> Moves:
    """What ``kernels._sketch_kronecker.project`` moves for whole rows; torch copies besides."""
    left, right = factors(dimension)
    rows = -(-positions // WIDTH)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    first = dense_moves(samples * rows, WIDTH, right, dtype, normal=False)
    return first + dense_moves(samples * right, rows, left, sums, normal=False)


def sketch_call(samples: int, positions: int, dtype: str, workload: str) -> Traffic:
    """A Rademacher sketch of (samples, positions): the dense product, whose bits are not counted.

    fp32 is multiplied as three times eight digits in bf16, exactly.
    """
    return Traffic(
        operator="sketch",
        workload=workload,
        moves=dense_moves(samples, positions, DIMENSION, DTYPES[dtype], normal=False),
        least_read_bytes=samples * positions * DTYPES[dtype].itemsize,
        least_written_bytes=samples * DIMENSION * 4,
        flops=2 * samples * positions * DIMENSION * (3 if dtype == "fp32" else 1),
        rate="bf16" if dtype == "fp32" else dtype,
    )


def sketch(workload: Workload) -> Traffic:
    """The per-sample gradients of all of the workload's shards, as one vector each, sketched in one call."""
    return sketch_call(workload.samples, workload.elements, workload.dtype, workload.name)
