"""Counter-based random bits, round by round: Philox4x64-10.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox_words(seed: int, stream: int, row: np.ndarray | int, block: np.ndarray | int) -> np.ndarray:
    """The 256 bits at (row, block), which broadcast: uint64, (…, 4), least significant word first.

    The key is (seed, 0) and the counter (block, row, 0, stream).
    """
    counters = np.broadcast_arrays(block, row, 0, stream)
    c0, c1, c2, c3 = (np.array(counter, dtype=np.uint64) for counter in counters)
    keys = [seed, 0]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(keys[0]), low1, high0 ^ c3 ^ np.uint64(keys[1]), low0
        keys = [(key + step) % 2**64 for key, step in zip(keys, KEY_STEPS, strict=True)]
    return np.stack([c0, c1, c2, c3], axis=-1)


def _product(a: np.ndarray, multiplier: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of a product, from products of 32-bit halves."""
    b = np.uint64(multiplier)
    a_high, a_low, b_high, b_low = a >> HALF, a & LOW, b >> HALF, b & LOW
    middle = a_high * b_low + (a_low * b_low >> HALF)
    other = a_low * b_high + (middle & LOW)
    # Of the lower half the upper digits are meant to be lost.
    with np.errstate(over="ignore"):
        return a_high * b_high + (middle >> HALF) + (other >> HALF), a * b
