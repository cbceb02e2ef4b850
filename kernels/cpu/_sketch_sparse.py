"""Sparse Johnson–Lindenstrauss transform on the CPU: signed sums of gathered rows, samples side by side.

An output sums slots of each run of positions. With samples side by side a slot is one row of a table, and
PyTorch's sum of embeddings adds rows up in their order, with a weight each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.kernels.cpu._philox import next_words, philox_from
from fastproj.kernels.cpu._sketch_hadamard import BLOCK, MOST_SAMPLES, block_pieces, next_signs, permuted

KEYS, SLOT_SIGNS = 8, 9  # streams
NONZEROS = 4  # in a column, or as many as keep k/s within a run
RUNS_A_PIECE = 128  # over all samples: 2 MiB in fp32


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` as (B, k) for (B, n), fp32 or fp64, at absolute positions from ``offset`` on.

    Raises ValueError for a k that does not cut runs into equal parts.
    """
    nonzeros = nonzeros_of(dimension)
    sums = [_signed_sums(part, nonzeros, dimension, seed, offset) for part in vectors.split(MOST_SAMPLES)]
    return torch.cat(sums).mul_(nonzeros**-0.5)


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


def _signed_sums(vectors: Tensor, nonzeros: int, dimension: int, seed: int, offset: int) -> Tensor:
    """The sums of every output's slots, (B, k)."""
    first = offset // BLOCK
    key_bits = [philox_from(seed, KEYS, part, first) for part in range(nonzeros)]
    sign_bits = [philox_from(seed, SLOT_SIGNS, part, first * BLOCK // 256) for part in range(nonzeros)]
    sums = vectors.new_zeros(dimension, vectors.shape[0])
    for piece in block_pieces(vectors, offset, min(16 * vectors.shape[0], RUNS_A_PIECE)):
        runs = piece.shape[1]
        keys = np.stack([next_words(bits, runs)[:, :1] for bits in key_bits])
        source = permuted(np.arange(BLOCK), keys) + np.arange(0, runs * BLOCK, BLOCK, dtype=np.int32)[:, None]
        signs = torch.stack([next_signs(bits, runs, piece.dtype) for bits in sign_bits])
        rows = _output_by_output(torch.from_numpy(source), dimension)
        sums += torch.nn.functional.embedding_bag(
            rows,
            piece.flatten(1).T.contiguous(),
            torch.arange(0, rows.numel(), rows.numel() // dimension, dtype=torch.int32),
            mode="sum",
            per_sample_weights=_output_by_output(signs, dimension),
        )
    return sums.T.contiguous()


def _output_by_output(slots: Tensor, dimension: int) -> Tensor:
    """(s, runs, r) in the order of the outputs, flat: an output's slots of all runs lie side by side."""
    return slots.unflatten(2, (dimension // slots.shape[0], -1)).transpose(1, 2).flatten()
