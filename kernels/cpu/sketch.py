"""Random projections of per-sample vectors on the CPU: shard by shard, each kind in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

# Each function takes (vectors (B, n), dimension, seed, absolute offset) and returns (B, dimension).
HOMES = {
    "rademacher": ("_sketch_dense", "rademacher"),
    "gaussian": ("_sketch_dense", "gaussian"),
    "srht": ("_sketch_hadamard", "project"),
    "sjlt": ("_sketch_sparse", "project"),
    "kronecker": ("_sketch_kronecker", "project"),
}


@torch.no_grad()
def sketch(shards: list[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    """``S_i = P v_i`` as (B, k); see ``fastproj.sketch``."""
    home, name = HOMES[kind]
    project: Callable[..., Tensor] = getattr(import_module(f"fastproj.kernels.cpu.{home}"), name)
    double = any(shard.dtype == torch.float64 for shard in shards)
    out = torch.zeros(shards[0].shape[0], dimension, dtype=torch.float64 if double else torch.float32)
    for shard in shards:
        if shard.numel():
            # Half-precision products crawl on processors without instructions for them; fp32 holds halves.
            vectors = shard if shard.dtype == torch.float64 else shard.float()
            out += project(vectors, dimension, seed, offset)
        offset += shard.shape[1]
    return out
