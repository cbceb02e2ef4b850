"""LoRA gradient sets of real models, as shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, int]


def lora_shapes(layers: int, rank: int, linears: Sequence[Shape]) -> list[Shape]:
    """A (r × d_in) and B (d_out × r) of every linear layer (d_in, d_out) of every block."""
    block = [shape for d_in, d_out in linears for shape in ((rank, d_in), (d_out, rank))]
    return block * layers


WORKLOADS: dict[str, list[Shape]] = {
    "RoBERTa-base, r=8 on query, key and value": lora_shapes(12, 8, [(768, 768)] * 3),
    "Llama-2-7B, r=16 on all linear layers": lora_shapes(
        32, 16, [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    ),
}


def gradient_set(shapes: Sequence[Shape], seed: int, device: str = "cpu") -> list[Tensor]:
    """Standard normal gradients of these shapes, fp32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]
