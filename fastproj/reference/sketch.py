"""Random projections of per-sample vectors, in fp64: what each kind's matrix is, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
KINDS = tuple(HOMES)


def sketch(shards: Sequence[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    """``S_i = Σ_j P[:, offset + j] v_ij``: shards (B, n) laid end to end; the result is (B, k), fp64."""
    home, name = HOMES[kind]
    project: Callable[..., Tensor] = getattr(import_module(f"fastproj.reference.{home}"), name)
    out = torch.zeros(shards[0].shape[0], dimension, dtype=torch.float64, device=shards[0].device)
    for shard in shards:
        if shard.numel():
            out += project(shard.to(torch.float64), dimension, seed, offset)
        offset += shard.shape[1]
    return out
