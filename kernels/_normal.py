"""A normal distribution in whole numbers, the same on every machine: 2¹⁶ quantiles on a grid of 1/32."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

CODE_BITS = 16
GRID = 32  # levels of a unit: up to 138 of them, which every floating-point type holds exactly


@cache
def levels() -> tuple[int, ...]:
    """``round(32 Φ⁻¹((2¹⁵ + i + ½) / 2¹⁶))`` for i = 0 … 2¹⁵ − 1: the upper half of the quantiles.

    No quantile lies so near to a rounding boundary that fp64 could put it on either side.
    """
    normal, half = NormalDist(), 2 ** (CODE_BITS - 1)
    return tuple(round(GRID * normal.inv_cdf((half + i + 0.5) / (2 * half))) for i in range(half))


@cache
def variance() -> float:
    """The variance of the rounded quantiles, a little above 1."""
    return sum(level * level for level in levels()) / len(levels()) / GRID**2
