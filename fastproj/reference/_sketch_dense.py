"""Dense random projections in fp64: the entry of every row and column, and the whole product.

P is cut into groups of 256 rows. A column of a group takes its random bits from as many Philox blocks of 256
bits as an entry has bits b: the blocks b·j … b·j + b − 1 in row g, for column j of group g. Entry after entry
they are read from the lowest bit up.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fastproj.reference._philox import philox_words

RADEMACHER, GAUSSIAN = 1, 2  # streams
GROUP = 256
BITS = {RADEMACHER: 1, GAUSSIAN: 16}  # of an entry


def rademacher(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v``, entries ±1/√k."""
    positions = range(offset, offset + vectors.shape[1])
    signs = sign_matrix(seed, RADEMACHER, dimension, positions)
    return vectors @ signs.to(vectors.device).T / dimension**0.5


def gaussian(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v``, entries ``x/√(k Var x)`` with x a normal quantile rounded to a multiple of 1/32."""
    codes = _codes(seed, GAUSSIAN, dimension, range(offset, offset + vectors.shape[1]))
    upper = torch.tensor(upper_quantiles(), dtype=torch.float64)
    values = torch.cat([-upper, upper])[codes].to(vectors.device)
    return vectors @ values.T / (dimension * upper.square().mean().item()) ** 0.5


def sign_matrix(seed: int, stream: int, rows: int, columns: range) -> Tensor:
    """±1 as (rows, columns): +1 where the bit is set."""
    return 2.0 * _codes(seed, stream, rows, columns).to(torch.float64) - 1


def _codes(seed: int, stream: int, rows: int, columns: range) -> Tensor:
    """The bits of every entry as a number, (rows, columns)."""
    bits = BITS.get(stream, 1)
    group = np.arange(-(-rows // GROUP), dtype=np.uint64)[:, None, None]
    column = np.array(columns, dtype=np.uint64)[:, None]
    blocks = column * np.uint64(bits) + np.arange(bits, dtype=np.uint64)
    words = philox_words(seed, stream, group, blocks)[..., None]
    shift = np.arange(0, 64, bits, dtype=np.uint64)
    codes = (words >> shift) & np.uint64(2**bits - 1)
    matrix = codes.reshape(len(group), len(columns), GROUP).transpose(0, 2, 1).reshape(-1, len(columns))
    return torch.from_numpy(matrix[:rows].astype(np.int64))


@cache
def upper_quantiles() -> tuple[float, ...]:
    """``round(32 Φ⁻¹((2¹⁵ + i + ½) / 2¹⁶)) / 32`` for i = 0 … 2¹⁵ − 1."""
    normal = NormalDist()
    return tuple(round(32 * normal.inv_cdf((32768 + i + 0.5) / 65536)) / 32 for i in range(32768))
