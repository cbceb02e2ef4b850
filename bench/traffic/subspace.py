"""Traffic of projections onto complements of subspaces, from the work lists that their launcher prepares.

Vectors on chip are read once and written once, and each program reads all directions. Vectors that are taken
in chunks are read twice, directions as well. The second read is off a cache that holds what the programs
under way take at once: ``AT_ONCE`` of the largest vectors' blocks, whatever the chip. Directions are read
by all programs of a shard, and of all shards that share a basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic, total
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._project_out_plan import CHUNK_VECTORS, FIELDS, Group, prepare, tile_elements

NUMBER = 8  # bytes of an int64 table entry
ADDRESSES = 3  # of a program: shard, basis and result
RANK = 4  # directions of each module that a step is kept out of
AT_ONCE = 264  # programs: two on each processor of an H100


def project_out_moves(
    shards: Sequence[Tensor], bases: Sequence[Tensor], out: Sequence[Tensor], left: bool
) -> Moves:
    """What ``kernels.project_out`` moves; nothing is read of the tensors here but their shapes.

    ``bases`` holds a (k, d) for each shard, the same tensor where they share one.
    """
    work = prepare(shards, bases, out, left)
    table = work.shards * ADDRESSES * NUMBER
    return total(_group_moves(group, bases, table) for group in work.groups)


def _group_moves(group: Group, bases: Sequence[Tensor], table: int) -> Moves:
    size = group.dtype.itemsize
    kernel = "_project_on_chip_kernel" if group.lengths else "_project_chunks_kernel"
    shard, kind, number, vectors, length, rank = group.blocks.unbind(1)
    side = torch.full_like(shard, CHUNK_VECTORS)
    if group.lengths:
        side = tile_elements(group.dtype) // torch.tensor(group.lengths)[kind]
    elements = torch.minimum(vectors - number * side, side) * length
    data, passes = int(elements.sum()) * size, 1 if group.lengths else 2
    waiting = 0 if group.lengths else min(data, AT_ONCE * int(elements.max()) * size)
    direction_bytes = max(4, size)
    own = {id(bases[i]): bases[i].numel() * direction_bytes for i in shard.unique().tolist()}
    directions, programs = passes * int((rank * length).sum()) * direction_bytes, len(shard)
    distinct = min(directions, sum(own.values()))
    addresses = programs * ADDRESSES * NUMBER
    streams = (
        Stream(kernel, "blocks", "load", programs * FIELDS * NUMBER, programs * FIELDS * NUMBER),
        Stream(kernel, "addresses", "load", addresses, min(addresses, table), table),
        Stream(kernel, "directions", "load", directions, distinct, max(own.values())),
        Stream(kernel, "shards", "load", passes * data, data, waiting),
        Stream(kernel, "out", "store", data, data),
    )
    return Moves({kernel: 1}, streams)


def project_out(workload: Workload) -> Traffic:
    """One set of the workload's LoRA gradients out of RANK directions of each module.

    Each A from the right, each B from the left, a basis of its own for each: the two calls of a step that
    learns nothing along directions of the inputs and of the outputs.
    """
    element = torch.empty((), dtype=DTYPES[workload.dtype])
    wide = torch.empty((), dtype=torch.float64 if workload.dtype == "fp64" else torch.float32)
    shards = [element.expand(shape) for shape in workload.shards]
    moves, read, flops = [], 0, 0
    # A (r × d_in) and B (d_out × r) take turns.
    for left, own in ((False, shards[::2]), (True, shards[1::2])):
        bases = [wide.expand(RANK, shard.shape[0 if left else 1]) for shard in own]
        moves.append(project_out_moves(own, bases, own, left))
        read += sum(basis.numel() * basis.itemsize for basis in bases)
        flops += 4 * RANK * sum(shard.numel() for shard in own)
    data = workload.elements * element.itemsize
    return Traffic(
        "project_out",
        workload.name,
        total(moves),
        least_read_bytes=data + read,
        least_written_bytes=data,
        flops=flops,
        rate="fp64" if workload.dtype == "fp64" else "fp32",
    )
