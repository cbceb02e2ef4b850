"""Latent factors of made-up directions, for what only asks where they point."""

from __future__ import annotations

import torch
from torch import nn

from fastproj import Basis, orthonormalize
from fastproj.latent.factors import LatentFactors
from fastproj.latent.lora import lora_layers


def directions(width: int, rank: int, seed: int = 0) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    return orthonormalize(torch.randn(width, rank, generator=generator, dtype=torch.float64))


def stream_factors(width: int, *, side: str = "write", rank: int = 2, seed: int = 0) -> LatentFactors:
    """Directions in a residual stream of ``width``."""
    return factors({"stream": directions(width, rank, seed)}, side, "stream")


def module_factors(model: nn.Module, *, side: str = "write", rank: int = 2) -> LatentFactors:
    """Directions of its own for each adapted module."""
    bases = {}
    for number, layer in enumerate(lora_layers(model)):
        width = layer.a.shape[1] if side == "read" else layer.b.shape[0]
        bases[layer.name] = directions(width, min(rank, width), number)
    return factors(bases, side, "module")


def factors(bases: dict[str, Basis], side: str, pool: str) -> LatentFactors:
    """The bases with evidence that says nothing."""
    ones = {name: torch.ones(basis.rank, dtype=torch.float64) for name, basis in bases.items()}
    return LatentFactors(
        side=side,
        pool=pool,
        bases=bases,
        spectra={},
        shares=ones,
        agreement={name: torch.ones(basis.rank, 0, dtype=torch.float64) for name, basis in bases.items()},
        p_values=ones,
        null_shares={name: torch.ones(basis.rank, 3, dtype=torch.float64) for name, basis in bases.items()},
        modules=(),
    )
