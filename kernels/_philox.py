"""Counter-based random bits on the device: Philox4x64-10, the generator that NumPy has for the CPU.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Bits are addressed, not drawn: the same
seed, stream, row and block give the same 256 bits everywhere. Streams keep apart what draws under one seed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, stream, row, block):
    """The 256 bits at (row, block) as four uint64 tensors, least significant first, of ``block``'s shape.

    ``block`` is an integer tensor of at least one axis; ``row`` may be a number or broadcast to it.
    """
    first = block.to(tl.uint64)
    zero = tl.zeros_like(first)
    return tl.philox(seed, first, zero + row, zero, zero + stream)
