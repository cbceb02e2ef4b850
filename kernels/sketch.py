"""Random projections of per-sample vectors: shard by shard, each kind in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from fastproj.kernels import _sketch_dense, _sketch_hadamard, _sketch_sparse

# Each function takes (vectors (B, n) of any dtype, dimension, seed, absolute offset); returns (B, dimension).
HOMES = {
    "rademacher": ("_sketch_dense", "rademacher"),
    "gaussian": ("_sketch_dense", "gaussian"),
    "srht": ("_sketch_hadamard", "project"),
    "sjlt": ("_sketch_sparse", "project"),
    "kronecker": ("_sketch_kronecker", "project"),
}


def sketch(shards: list[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    """``S_i = P v_i`` as (B, k), in fp32 or fp64; see ``fastproj.sketch``."""
    home, name = HOMES[kind]
    project: Callable[..., Tensor] = getattr(import_module(f"fastproj.kernels.{home}"), name)
    double = any(shard.dtype == torch.float64 for shard in shards)
    dtype, device = torch.float64 if double else torch.float32, shards[0].device
    out = torch.zeros(shards[0].shape[0], dimension, dtype=dtype, device=device)
    with torch.cuda.device_of(out):
        for shard in shards:
            if shard.numel():
                out += project(shard, dimension, seed, offset)
            offset += shard.shape[1]
    return out


COMPILE_CASES = (
    *_sketch_dense.COMPILE_CASES,
    *_sketch_hadamard.CASES,
    *_sketch_sparse.CASES,
)
