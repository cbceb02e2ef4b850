"""Traffic of the random projections, from the decisions of their launchers.

P itself moves nothing. Counted is every load and store: the vectors by each group of 256 rows, or by each
part of the outputs, the quantiles of normal entries by each entry, the partial results of chunks or spans.
"""

from __future__ import annotations

import torch

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._blocks import ALIGNMENT
from fastproj.kernels._sketch_dense import GROUP, LEVEL_DTYPES, TILES, tiles_per_chunk
from fastproj.kernels._sketch_hadamard import BLOCK, spans_of
from fastproj.kernels._sketch_kronecker import WIDTH, factors
from fastproj.kernels._sketch_sparse import nonzeros_of

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


def hadamard_moves(
    samples: int, positions: int, dimension: int, dtype: torch.dtype, offset: int = 0
) -> Moves:
    """What ``kernels._sketch_hadamard.project`` moves; of each span it adds up the rows that are outputs."""
    size = (samples, positions, dimension, dtype, offset)
    return _block_moves("hadamard_kernel", "sampled_rows_kernel", *size, -(-dimension // BLOCK), dimension)


def sparse_moves(samples: int, positions: int, dimension: int, dtype: torch.dtype, offset: int = 0) -> Moves:
    """What ``kernels._sketch_sparse.project`` moves; of each span it adds up all slots."""
    size, parts = (samples, positions, dimension, dtype, offset), nonzeros_of(dimension)
    return _block_moves("sparse_kernel", "slot_sums_kernel", *size, parts, parts * BLOCK)


def _block_moves(
    kernel: str,
    sums: str,
    samples: int,
    positions: int,
    dimension: int,
    dtype: torch.dtype,
    offset: int,
    parts: int,
    terms: int,
) -> Moves:
    """Each of ``parts`` reads all blocks; of a span's results, ``terms`` are added up.

    Zeros that torch adds for whole loads are read as positions; adding them is not counted.
    """
    elements = ALIGNMENT // dtype.itemsize
    first = offset // elements * elements
    padded = -(-(offset + positions) // elements) * elements - first
    spans = spans_of(first, padded, parts).spans
    vectors, result = samples * padded * dtype.itemsize, 8 if dtype == torch.float64 else 4
    partials, added = (samples * spans * rows * result for rows in (parts * BLOCK, terms))
    written = samples * dimension * result
    streams = (
        Stream(kernel, "vectors", "load", vectors * parts, vectors, vectors if parts > 1 else 0),
        Stream(kernel, "partials", "store", partials, partials),
        Stream(sums, "partials", "load", added, added, partials, warm=True),
        Stream(sums, "out", "store", written, written),
    )
    return Moves({kernel: 1, sums: 1}, streams)


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
