"""Cache blocking: shards cut into pieces that stay in L2 between the operations on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Two fp32 sets of this many elements fill half of a 2 MiB L2 and amortise ATen's cost per call.
CHUNK = 131_072


def multiply_dtype(shards: Sequence[Tensor]) -> torch.dtype:
    """fp64 where any of the shards is fp64, else fp32."""
    return torch.float64 if any(shard.dtype == torch.float64 for shard in shards) else torch.float32


def flat_chunks(shards: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The shards at one position, flattened in logical order and cut in step."""
    flat = [shard.reshape(-1) for shard in shards]
    if flat[0].numel() <= CHUNK:
        yield tuple(flat)
        return
    yield from zip(*(tensor.split(CHUNK) for tensor in flat), strict=True)


def row_matrix(shard: Tensor) -> Tensor:
    """Rows against the rest; a vector is one row."""
    return shard.reshape(1, -1) if shard.dim() < 2 else shard.reshape(shard.shape[0], -1)


def positions(shards: Sequence[Tensor], num_sets: int) -> Iterator[tuple[Tensor, ...]]:
    """The shards at each position, one from every set."""
    n = len(shards) // num_sets
    return zip(*(shards[k * n : (k + 1) * n] for k in range(num_sets)), strict=True)
