"""Counter-based random bits on the CPU: NumPy's Philox4x64-10, addressed as the device code addresses it."""

from __future__ import annotations

import numpy as np

WORDS = 4  # uint64 numbers of a block: 256 bits


def philox_words(seed: int, stream: int, row: int, first: int, blocks: int) -> np.ndarray:
    """The bits at (row, first … first + blocks − 1): uint64, (blocks, 4), least significant word first."""
    return next_words(philox_from(seed, stream, row, first), blocks)


def philox_from(seed: int, stream: int, row: int, first: int) -> np.random.Generator:
    """What gives the blocks from (row, first) on, one after the other."""
    # NumPy steps the counter before each block. Streams begin at 1, so the step back stays above zero.
    counter = (stream << 192) + (row << 64) + first - 1
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def next_words(bits: np.random.Generator, blocks: int) -> np.ndarray:
    """The next blocks: uint64, (blocks, 4)."""
    # All of uint64's range takes the words as they come, twice as fast as ``random_raw``.
    return bits.integers(0, 2**64, size=(blocks, WORDS), dtype=np.uint64)
