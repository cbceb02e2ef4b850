"""Chips as their makers publish them: what a roofline is drawn from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30
TERA = 1e12
# Drivers keep a little of the memory for themselves; variants differ by a fifth and more.
MEMORY_KEPT = 0.05
# Variants that the size of the memory does not tell apart, HBM2(e) where the chip of the table has HBM3.
VARIANTS = {"PCIe", "NVL", "Laptop", "MIG", "GH200", "D", "HBM2", "HBM2e"}


@dataclass(frozen=True)
class Chip:
    """One accelerator: peak rates, dense (without structured sparsity), at the boost clock.

    ``architecture`` is the compiler's name of it, ``memory_bytes_per_second`` that of the device memory.
    ``matrix_flops`` gives FLOP/s by dtype: "bf16", "fp16", "tf32" (sums in fp32) and "fp64" with matrix
    instructions where there are any, "fp32" with vector ones, as exact fp32 products have no matrix unit.
    ``l2_bytes`` is the last cache in front of the memory, ``processors`` the SMs or compute units in use,
    ``memory_bytes`` the device memory by its maker's name ("80GB" are 80 GiB, but for what the driver keeps),
    and ``source`` the document the figures stand in.
    """

    name: str
    architecture: str
    memory_bytes_per_second: float
    matrix_flops: Mapping[str, float]
    l2_bytes: int
    processors: int
    memory_bytes: int
    source: str


def _rates(half: float, tf32: float, fp32: float, fp64: float) -> dict[str, float]:
    """TFLOP/s as FLOP/s; bf16 and fp16 run alike on all of these chips."""
    rates = {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32, "fp64": fp64}
    return {dtype: rate * TERA for dtype, rate in rates.items()}


_HOPPER = _rates(half=989.4, tf32=494.7, fp32=66.9, fp64=66.9)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "A100", "sm_80", 2.039e12, _rates(312, 156, 19.5, 19.5), 40 * MIB, 108, 80 * GIB,
            "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)",
        ),
        Chip(
            "H100", "sm_90", 3.35e12, _HOPPER, 50 * MIB, 132, 80 * GIB,
            "NVIDIA H100 Tensor Core GPU Architecture whitepaper and datasheet (80 GB SXM)",
        ),
        Chip(
            "H200", "sm_90", 4.8e12, _HOPPER, 50 * MIB, 132, 141 * GIB,
            "NVIDIA H200 Tensor Core GPU datasheet (SXM); rates and L2 as the H100's, the same die",
        ),
        # The L2 is what the driver reports for both dies together.
        Chip(
            "B200", "sm_100", 8.0e12, _rates(2250, 1125, 75, 37), 126 * MIB, 148, 180 * GIB,
            "NVIDIA HGX B200 specifications, an eighth of the board's, half of what it gives with sparsity",
        ),
        # Not among the audited targets; kernels are compiled for sm_89 where one is.
        Chip(
            "RTX 4090", "sm_89", 1.008e12, _rates(165.2, 82.6, 82.6, 1.29), 72 * MIB, 128, 24 * GIB,
            "NVIDIA Ada GPU Architecture whitepaper (FP32 accumulation)",
        ),
        Chip(
            "RTX 5090", "sm_120", 1.792e12, _rates(209.5, 104.8, 104.8, 1.64), 96 * MIB, 170, 32 * GIB,
            "NVIDIA RTX Blackwell GPU Architecture whitepaper (FP32 accumulation)",
        ),
        # The Infinity Cache, which stands before the memory for all eight dies; each has an L2 of 4 MiB.
        Chip(
            "MI300X", "gfx942", 5.3e12, _rates(1307.4, 653.7, 163.4, 163.4), 256 * MIB, 304, 192 * GIB,
            "AMD Instinct MI300X data sheet and CDNA 3 whitepaper",
        ),
    )
}  # fmt: skip


def find_chip(name: str) -> Chip:
    """The chip of this name, upper or lower case.

    Raises ValueError that lists the known names for any other.
    """
    for known, chip in CHIPS.items():
        if known.lower() == name.lower():
            return chip
    raise ValueError(f"expected the name of a known chip ({', '.join(CHIPS)}), got {name!r}")


def chip_of(device_name: str, total_memory: int | None = None) -> Chip | None:
    """The chip of a device by the name that its driver gives it ("NVIDIA H100 80GB HBM3"), or None.

    ``total_memory`` is what the driver says the device has, in bytes. A variant with figures of its own
    (PCIe, NVL, a laptop's, another memory by name or by size) is none of these chips.
    """
    words = device_name.replace("-", " ").split()
    if not VARIANTS.isdisjoint(words):
        return None
    padded = f" {' '.join(words)} "
    chip = next((chip for name, chip in CHIPS.items() if f" {name} " in padded), None)
    if chip is None:
        return None
    sizes = [int(word[:-2]) * GIB for word in words if re.fullmatch(r"\d+GB", word)]
    if total_memory is not None:
        sizes.append(total_memory)
    same = all(abs(size - chip.memory_bytes) <= MEMORY_KEPT * chip.memory_bytes for size in sizes)
    return chip if same else None
