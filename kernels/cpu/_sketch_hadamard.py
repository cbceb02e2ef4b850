"""Block subsampled randomized Hadamard transform on the CPU: two products with a Hadamard matrix of 64 rows.

``H_4096 = H_64 ⊗ H_64``: a block as a 64×64 matrix X transforms to ``H_64 X H_64``, which GEMMs do faster
than twelve rounds of additions that read and write all elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastproj.kernels.cpu._philox import next_words, philox_from, philox_words

POSITION_SIGNS, ROW_SIGNS, ROW_SAMPLE = 5, 6, 7  # streams
BLOCK = 4096
BLOCKS_A_PIECE = 64  # over all samples: 1 MiB in fp32, which stays in L2 between operations
MOST_SAMPLES = 64  # that share a piece


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` as (B, k) for (B, n), fp32 or fp64, at absolute positions from ``offset`` on."""
    index = torch.from_numpy(sampled_rows(dimension, seed))
    sums = [_row_sums(part, dimension, seed, offset) for part in vectors.split(MOST_SAMPLES)]
    return torch.cat(sums).index_select(1, index).mul_(dimension**-0.5)


def sampled_rows(dimension: int, seed: int) -> np.ndarray:
    """The element of (groups, r) that each output takes: in a group, rows sampled without replacement."""
    group, output = np.divmod(np.arange(dimension), BLOCK)
    keys = philox_words(seed, ROW_SAMPLE, 0, 0, math.ceil(dimension / BLOCK))[group, 0]
    return group * BLOCK + permuted(output, keys)


def _row_sums(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``Σ_b σ[b] H D_b v_b`` for every group of outputs and all rows of H, (B, groups · r)."""
    groups = math.ceil(dimension / BLOCK)
    column_bits, row_bits = (
        [philox_from(seed, stream, group, BLOCK // 256 * (offset // BLOCK)) for group in range(groups)]
        for stream in (POSITION_SIGNS, ROW_SIGNS)
    )
    factor = hadamard(64, vectors.dtype)
    sums = vectors.new_zeros(vectors.shape[0], groups, BLOCK)
    for piece in block_pieces(vectors, offset, BLOCKS_A_PIECE):
        for group in range(groups):
            signed = piece * next_signs(column_bits[group], piece.shape[1], piece.dtype)
            half = (signed.reshape(-1, 64) @ factor).view(-1, 64, 64)
            transformed = (factor @ half).view(piece.shape)
            transformed *= next_signs(row_bits[group], piece.shape[1], piece.dtype)
            sums[:, group] += transformed.sum(1)
    return sums.flatten(1)


def block_pieces(vectors: Tensor, offset: int, most: int) -> Iterator[Tensor]:
    """The blocks in order as (B, blocks, r), at most so many over all samples; zeros fill up the ends."""
    samples, positions = vectors.shape
    step = max(1, most // max(1, samples)) * BLOCK
    for start in range(-(offset % BLOCK), positions, step):
        stop = min(start + step, positions)
        before, after = max(-start, 0), (start - stop) % BLOCK
        piece = vectors[:, start + before : stop]
        if before or after:
            piece = torch.nn.functional.pad(piece, (before, after))
        yield piece.unflatten(1, (-1, BLOCK))


def next_signs(bits: np.random.Generator, blocks: int, dtype: torch.dtype) -> Tensor:
    """±1 for each element of the next blocks, (blocks, r): +1 where the bit is set."""
    words = next_words(bits, blocks * BLOCK // 256)
    set_bits = np.unpackbits(words.view(np.uint8), bitorder="little").reshape(blocks, BLOCK)
    return torch.from_numpy(set_bits).to(dtype).mul_(2).sub_(1)


def permuted(slots: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where the permutation of each key (uint64) takes the slots, which broadcast: uint16."""
    moved: np.ndarray = slots.astype(np.uint16) ^ (keys & 0xFFF).astype(np.uint16)
    for turn in range(1, 5):
        moved *= (keys >> 12 * turn & 0xFFF | 1).astype(np.uint16)
        moved &= 0xFFF
        moved ^= moved >> 5
    return moved


def hadamard(size: int, dtype: torch.dtype) -> Tensor:
    """The Walsh–Hadamard matrix of ±1, ``H_2n = [[H_n, H_n], [H_n, −H_n]]``."""
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
