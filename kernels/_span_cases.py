"""Choices that all span projections share, for their compile cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, THREADS, VECTORS

ALIKE: tuple[tuple[torch.dtype, ...], ...] = tuple((dtype,) for dtype in DEVICE_DTYPES)
MIXED = (torch.bfloat16, torch.float32)
SCALED_AGAIN: Mapping[str, str] = {
    "scaled_flat_products": "read only where fp32 sums left their range, with a mask at every chunk",
}
PARTIALS = "partial sums: some kilobytes that the launch before has left in the L2 cache"
PER_ROW = "one fp64 number a narrow row, where the row itself is 16 bytes or more"


def bytes_a_turn(sets: int, aligned: bool) -> int | None:
    """What a program over so many sets asks of memory at once; unaligned ones ask for what they can."""
    return sets * VECTORS.get(sets, 1) * ALIGNMENT * THREADS if aligned else None


def unaligned(*functions: str) -> Mapping[str, str]:
    """Why the loops of these functions read narrowly where the launcher found no alignment."""
    return dict.fromkeys(functions, "a shard or its rows do not begin at multiples of 16 bytes")


def alternating(dtypes: Sequence[torch.dtype], sets: int) -> tuple[torch.dtype, ...]:
    """One dtype per set, taking turns."""
    return tuple(dtypes[k % len(dtypes)] for k in range(sets))


def span_name(dtypes: Sequence[torch.dtype], columns: int, aligned: bool) -> str:
    """What a configuration is called: its sets, the columns of its narrow rows, its alignment."""
    kinds = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    rows = f", rows in {columns} columns" if columns else ""
    return f"{len(dtypes)} × {kinds}{rows}{'' if aligned else ', unaligned'}"
