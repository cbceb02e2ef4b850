"""Block subsampled randomized Hadamard transform in fp64.

Balabanov, Beaupère, Grigori and Lederer, "Block subsampled randomized Hadamard transform for low-rank
approximation on distributed architectures", 2022, whose blocks are here the aligned runs of r = 4,096
positions. Outputs come in groups of r, each with signs and a sample of rows of its own:

    P[g r + i, b r + j] = σ_g[b, π_g(i)] H[π_g(i), j] D_g[b r + j] / √k

with H the Walsh–Hadamard matrix ±1, σ and D random signs and π_g a random permutation of the rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.reference._philox import philox_words

POSITION_SIGNS, ROW_SIGNS, ROW_SAMPLE = 5, 6, 7  # streams
BLOCK = 4096


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``S = P v`` as (B, k), fp64, for (B, n) at absolute positions from ``offset`` on."""
    first, blocks = whole_blocks(vectors, offset)
    device = vectors.device
    groups = []
    for group in range(-(-dimension // BLOCK)):
        outputs = np.arange(min(BLOCK, dimension - group * BLOCK))
        row = permuted(outputs, philox_words(seed, ROW_SAMPLE, 0, np.array([group]))[:, 0])
        columns = block_signs(seed, POSITION_SIGNS, group, first, blocks.shape[1]).to(device)
        rows = block_signs(seed, ROW_SIGNS, group, first, blocks.shape[1])[:, row].to(device)
        transformed = (blocks * columns) @ hadamard_rows(row).T.to(device)
        groups.append((transformed * rows).sum(1))
    return torch.cat(groups, dim=1) / dimension**0.5


def whole_blocks(vectors: Tensor, offset: int) -> tuple[int, Tensor]:
    """(number of the first block, the blocks as (B, blocks, r)), zeros around what is there, in fp64."""
    first, lead = divmod(offset, BLOCK)
    count = -(-(lead + vectors.shape[1]) // BLOCK)
    whole = vectors.new_zeros(vectors.shape[0], count * BLOCK, dtype=torch.float64)
    whole[:, lead : lead + vectors.shape[1]] = vectors
    return first, whole.unflatten(1, (count, BLOCK))


def hadamard_rows(row: np.ndarray) -> Tensor:
    """``H[i, j] = (−1)^(number of bits that i and j share)`` for these rows i, (rows, r)."""
    shared = row[:, None] & np.arange(BLOCK)
    for shift in (8, 4, 2, 1):
        shared = shared ^ (shared >> shift)
    return torch.from_numpy(1.0 - 2.0 * (shared & 1))


def block_signs(seed: int, stream: int, row: int, first: int, blocks: int) -> Tensor:
    """±1 for each element of these blocks, (blocks, r) in fp64: +1 where the bit is set.

    Element e of block b takes bit e mod 256 of the Philox block 16 b + e div 256.
    """
    numbers = np.arange(16 * first, 16 * (first + blocks), dtype=np.uint64)
    words = philox_words(seed, stream, row, numbers)[..., None]
    bits = (words >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(2.0 * bits.reshape(blocks, BLOCK) - 1)


def permuted(slot: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 … r − 1 takes the slots; ``slot`` and ``key`` (uint64) broadcast.

    Steps that have an inverse modulo 2¹²: the bits 0 … 11 of the key are added bit by bit; then, four times
    with the next twelve as an odd factor, a product and the addition of its own bits moved down by five.
    """
    key = np.asarray(key, dtype=np.uint64)
    moved = np.asarray(slot, dtype=np.int64) ^ (key % np.uint64(BLOCK)).astype(np.int64)
    for turn in range(1, 5):
        factor = (key >> np.uint64(12 * turn)) % np.uint64(BLOCK) | np.uint64(1)
        moved = moved * factor.astype(np.int64) % BLOCK
        moved ^= moved >> 5
    return moved
