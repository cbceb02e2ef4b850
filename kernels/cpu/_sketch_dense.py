"""Dense random projections on the CPU: bits to entries by a table, a block that stays in L2, one GEMM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastproj.kernels._normal import GRID, levels, variance
from fastproj.kernels.cpu._philox import next_words, philox_from

RADEMACHER, GAUSSIAN = 1, 2  # streams
GROUP = 256  # rows of P that share Philox blocks: as many at a position as an entry has bits
POSITIONS = 1024  # of a block of P, which with a group's rows in fp32 fills half of a 2 MiB L2


@dataclass(frozen=True)
class Entries:
    """How bits become entries: a code of so many bytes is looked up and gives a row of the table."""

    code: type[np.unsignedinteger]
    bits: int  # of an entry
    table: np.ndarray


@cache
def sign_entries(dtype: torch.dtype) -> Entries:
    """A byte is eight signs, its lowest bit first; a bit that is set is +1."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return Entries(np.uint8, 1, _of_dtype(2 * bits.astype(np.float64) - 1, dtype))


@cache
def normal_entries(dtype: torch.dtype) -> Entries:
    """Two bytes are a sign, where the highest bit is set +1, and the number of a quantile."""
    upper = np.array(levels()) / GRID
    return Entries(np.uint16, 16, _of_dtype(np.concatenate([-upper, upper])[:, None], dtype))


def _of_dtype(table: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return table.astype(np.float64 if dtype == torch.float64 else np.float32)


def rademacher(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` with entries ±1/√k: (B, k) for (B, n) at absolute positions from ``offset`` on."""
    entries = sign_entries(vectors.dtype)
    return product(vectors, dimension, seed, offset, RADEMACHER, entries).mul_(dimension**-0.5)


def gaussian(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` with rounded normal entries of variance 1/k."""
    entries = normal_entries(vectors.dtype)
    scale = (dimension * variance()) ** -0.5
    return product(vectors, dimension, seed, offset, GAUSSIAN, entries).mul_(scale)


def product(vectors: Tensor, dimension: int, seed: int, offset: int, stream: int, entries: Entries) -> Tensor:
    """``Σ_j E[:, offset + j] v_j`` with entries E that are not scaled."""
    samples, positions = vectors.shape
    out = torch.zeros(samples, dimension, dtype=vectors.dtype)
    width = entries.table.shape[1]
    for row in range(0, dimension, GROUP):
        bits = philox_from(seed, stream, row // GROUP, offset * entries.bits)
        rows = min(GROUP, dimension - row)
        codes_used = -(-rows // width)
        block = np.empty((min(POSITIONS, positions), codes_used, width), dtype=entries.table.dtype)
        for first in range(0, positions, POSITIONS):
            piece = vectors[:, first : first + POSITIONS]
            words = next_words(bits, piece.shape[1] * entries.bits)
            codes = words.view(entries.code).reshape(piece.shape[1], GROUP // width)
            matrix = block[: piece.shape[1]]
            np.take(entries.table, codes[:, :codes_used], axis=0, out=matrix, mode="clip")
            flat = torch.from_numpy(matrix.reshape(piece.shape[1], -1))
            out[:, row : row + rows].addmm_(piece, flat[:, :rows])
    return out
