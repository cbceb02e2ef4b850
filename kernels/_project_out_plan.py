"""Work lists of the projection onto the complement of a subspace: which program takes which vectors.

A shard is a matrix, its first dimension against the rest, whose vectors are its rows (from the right) or its
columns (from the left). A block is a run of vectors side by side. Short ones are held on chip, padded to one
of ``LENGTHS``; of longer ones, and where the directions would be read more often than the vectors
themselves, a program takes a chunk at a time, twice. Shards that differ in dtype or alignment, and those two
ways, go to different launches.

Tables live on the device. As in ``_blocks``, both caches hold pure functions of their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastproj.kernels._blocks import ALIGNMENT, ROW_ALIGNMENT, address_table, keep, upload

FIELDS = 6  # of a block: shard, class of its length, number among the shard's, vectors, length, rank
LENGTHS = (64, 256, 1024, 2048, 4096, 8192)  # of vectors that are held on chip
TILE = 8192  # elements of such vectors in a program, a quarter as many in fp64
SMALLEST_SIDE = 4  # bytes of them side by side at least: fewer would ask too little of memory at once
SMALLEST_LEFT_SIDE = 32  # as much as memory gives at least, where columns lie side by side
# A program reads each direction once, from a cache: as many as weigh four times its vectors.
DIRECTIONS_PER_VECTOR = 4
CHUNK_VECTORS = 16  # of a program that takes chunks: the rows of the smallest matrix product
CHUNK_RANKS = (16, 32, 64)  # directions of such a program, padded
MOST_VECTORS = 2**30  # device code counts vectors and their elements in int32, and steps past the last one


@dataclass(frozen=True)
class Group:
    """The blocks of one launch, a row of ``FIELDS`` int64 each.

    ``lengths`` are the classes of vectors on chip, ascending, none where vectors are taken in chunks;
    ``rank`` then holds all their directions.
    """

    dtype: torch.dtype
    aligned: bool
    lengths: tuple[int, ...]
    rank: int
    blocks: Tensor


@dataclass(frozen=True)
class Work:
    """The launches over one list of shards, and the addresses (3, n) of shards, bases and results."""

    groups: tuple[Group, ...]
    addresses: Tensor
    shards: int


def vectors_of(shard: Tensor, left: bool) -> tuple[int, int]:
    """(number of vectors, elements in each): rows, or columns from the left; one for a vector."""
    rows = shard.shape[0] if shard.dim() > 1 else 1
    columns = shard.numel() // rows
    return (columns, rows) if left and shard.dim() > 1 else (rows, columns)


def prepare(shards: Sequence[Tensor], bases: Sequence[Tensor], out: Sequence[Tensor], left: bool) -> Work:
    """The work list over contiguous shards with elements, and a basis (k, d) with k > 0 for each.

    It holds addresses and not the tensors, which the caller keeps alive until the launches are queued.
    Raises ValueError for more vectors, or longer ones, than device code counts.
    """
    shapes = tuple((*vectors_of(shard, left), len(basis)) for shard, basis in zip(shards, bases, strict=True))
    most = max(max(number, length) for number, length, _ in shapes)
    if most > MOST_VECTORS:
        raise ValueError(f"expected at most {MOST_VECTORS} rows and columns in a shard, got {most}")
    addresses = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in (shards, bases, out))
    aligned = tuple(
        not any(address % ALIGNMENT for address in at)
        and length % ROW_ALIGNMENT == 0
        and (not left or number % ROW_ALIGNMENT == 0)
        for at, (number, length, _) in zip(zip(*addresses, strict=True), shapes, strict=True)
    )
    device = shards[0].device
    groups = _groups(shapes, left, tuple(shard.dtype for shard in shards), aligned, device)
    work = Work(groups, address_table(addresses, device), len(shapes))
    if device.type == "cuda":
        keep(work, (work.addresses, *(group.blocks for group in groups)))
    return work


def tile_elements(dtype: torch.dtype) -> int:
    """Elements of the vectors that a program holds on chip."""
    return TILE // 4 if dtype == torch.float64 else TILE


def length_on_chip(length: int, rank: int, left: bool, dtype: torch.dtype) -> int:
    """The class of vectors of this length on chip, or 0 where they are taken in chunks."""
    padded = next((padded for padded in LENGTHS if padded >= length), 0)
    side = tile_elements(dtype) // padded * dtype.itemsize if padded else 0
    direction = max(dtype.itemsize, 4)
    fits = side >= (SMALLEST_LEFT_SIDE if left else SMALLEST_SIDE)
    return padded if fits and rank * direction <= DIRECTIONS_PER_VECTOR * side else 0


@lru_cache(maxsize=32)
def _groups(
    shapes: tuple[tuple[int, int, int], ...],
    left: bool,
    dtypes: tuple[torch.dtype, ...],
    aligned: tuple[bool, ...],
    device: torch.device,
) -> tuple[Group, ...]:
    """Cut shards of (vectors, length, rank) into blocks and sort these into launches, the longest first."""
    members: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
    classes = [
        length_on_chip(length, rank, left, dtype)
        for (_, length, rank), dtype in zip(shapes, dtypes, strict=True)
    ]
    # What takes a program longest begins first: nobody waits for it in the end.
    for shard in sorted(range(len(shapes)), key=lambda shard: -shapes[shard][1]):
        signature = (dtypes[shard], aligned[shard], classes[shard] > 0)
        members.setdefault(signature, []).append(shard)
    groups = []
    for (dtype, own_aligned, on_chip), own in members.items():
        lengths = tuple(sorted({classes[shard] for shard in own})) if on_chip else ()
        most = max(shapes[shard][2] for shard in own)
        rank = 0 if on_chip else next(rank for rank in CHUNK_RANKS if rank >= most)
        tables = []
        for shard in own:
            side = tile_elements(dtype) // classes[shard] if on_chip else CHUNK_VECTORS
            kind = lengths.index(classes[shard]) if on_chip else 0
            tables.append(_cut(shard, kind, side, *shapes[shard]))
        groups.append(Group(dtype, own_aligned, lengths, rank, upload(torch.cat(tables), device)))
    return tuple(groups)


def _cut(shard: int, kind: int, side: int, vectors: int, length: int, rank: int) -> Tensor:
    """The blocks of one shard, ``side`` vectors each."""
    number = torch.arange(-(-vectors // side))
    table = torch.empty(len(number), FIELDS, dtype=torch.int64)
    for field, value in enumerate((shard, kind, number, vectors, length, rank)):
        table[:, field] = torch.as_tensor(value)
    return table
