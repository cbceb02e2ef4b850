"""Sparse Johnson–Lindenstrauss transform in fp64: s entries ±1/√s a column, one in each s-th of the rows.

Kane and Nelson, "Sparser Johnson–Lindenstrauss transforms", 2014, the block construction. Their hash
functions are here permutations of the aligned runs of r = 4,096 positions: output o of s-th a sums r/L slots
of every run, L = k/s, so that within a run all outputs get equally many positions:

    S[a L + o] = Σ_runs Σ_{slots t of o} σ_a[run, t] v[r run + π_{run,a}(t)] / √s,   o = t div (r/L)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.reference._philox import philox_words
from fastproj.reference._sketch_hadamard import BLOCK, block_signs, permuted, whole_blocks

KEYS, SLOT_SIGNS = 8, 9  # streams
NONZEROS = 4  # in a column, or as many as keep k/s within a run


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``S = P v`` as (B, k), fp64, for (B, n) at absolute positions from ``offset`` on.

    Raises ValueError for a k that does not cut runs into equal parts.
    """
    nonzeros = nonzeros_of(dimension)
    first, runs = whole_blocks(vectors, offset)
    numbers = np.arange(first, first + runs.shape[1], dtype=np.uint64)
    parts = []
    for part in range(nonzeros):
        keys = philox_words(seed, KEYS, part, numbers)[:, :1]
        source = torch.from_numpy(permuted(np.arange(BLOCK), keys)).to(vectors.device)
        slots = torch.gather(runs, 2, source.expand(runs.shape))
        slots *= block_signs(seed, SLOT_SIGNS, part, first, runs.shape[1]).to(vectors.device)
        parts.append(slots.sum(1).unflatten(1, (dimension // nonzeros, -1)).sum(2))
    return torch.cat(parts, dim=1) / nonzeros**0.5


def nonzeros_of(dimension: int) -> int:
    """s: 4 up to k = 16,384, then k/4,096."""
    length = dimension // NONZEROS
    if dimension % NONZEROS == 0 and 0 < length <= BLOCK and length & (length - 1) == 0:
        return NONZEROS
    if dimension > NONZEROS * BLOCK and dimension % BLOCK == 0:
        return dimension // BLOCK
    raise ValueError(
        f"for kind 'sjlt', dimension must be a power of two from {NONZEROS} to {NONZEROS * BLOCK}, "
        f"or a greater multiple of {BLOCK}, got {dimension}"
    )
