"""Cache blocking: gradient sets cut, or gathered, into packs that stay in L2 between operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Two fp32 sets of this many elements fill a quarter of a 2 MiB L2 and amortise ATen's cost per call.
PACK = 65_536


@dataclass(frozen=True)
class Pack:
    """Pieces of one segment, the same pieces from every set: ``sets[k][j]``.

    ``dtype`` is what the pack is multiplied in; ``uniform`` says that all its tensors have it. ``members``
    are the shards that the pieces are of.
    """

    segment: int
    dtype: torch.dtype
    uniform: bool
    sets: list[list[Tensor]]
    members: tuple[int, ...]


def packs(shards: Sequence[Tensor], num_sets: int, first: Sequence[int], size: int = PACK) -> Iterator[Pack]:
    """The sets in order, small shards together and big ones in flat pieces, ``size`` elements at most."""
    n = len(first)
    numels = tuple([shard.numel() for shard in shards[:n]])
    dtypes = tuple([shard.dtype for shard in shards])
    for segment, dtype, uniform, members in _groups(numels, dtypes, tuple(first), size):
        sets = [[shards[k * n + i] for i in members] for k in range(num_sets)]
        if numels[members[0]] <= size:
            yield Pack(segment, dtype, uniform, sets, members)
            continue
        for pieces in zip(*(own[0].reshape(-1).split(size) for own in sets), strict=True):
            yield Pack(segment, dtype, uniform, [[piece] for piece in pieces], members)


Group = tuple[int, torch.dtype, bool, tuple[int, ...]]


@lru_cache(maxsize=64)
def _groups(
    numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...], first: tuple[int, ...], size: int
) -> list[Group]:
    """Neighbouring shards of one segment and dtype that fit one pack; a big shard is a group of its own."""
    groups: list[tuple[tuple[int, torch.dtype, bool], list[int]]] = []
    room = 0
    for i, numel in enumerate(numels):
        if not numel:
            continue
        own = dtypes[i :: len(numels)]
        dtype = torch.float64 if torch.float64 in own else torch.float32
        kind = (first[i], dtype, all(other == dtype for other in own))
        if not groups or groups[-1][0] != kind or numel > room:
            groups.append((kind, []))
            room = size
        groups[-1][1].append(i)
        room -= numel
    return [(*kind, tuple(members)) for kind, members in groups]


def multiply_dtype(shards: Sequence[Tensor]) -> torch.dtype:
    """fp64 where any of the shards is fp64, else fp32."""
    return torch.float64 if any(shard.dtype == torch.float64 for shard in shards) else torch.float32


def row_matrix(shard: Tensor) -> Tensor:
    """Rows against the rest; a vector is one row."""
    return shard.reshape(1, -1) if shard.dim() < 2 else shard.reshape(shard.shape[0], -1)


def positions(shards: Sequence[Tensor], num_sets: int) -> Iterator[tuple[Tensor, ...]]:
    """The shards at each position, one from every set."""
    n = len(shards) // num_sets
    return zip(*(shards[k * n : (k + 1) * n] for k in range(num_sets)), strict=True)
