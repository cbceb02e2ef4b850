"""Families of gradients that every method of gradient surgery is tried on, and the methods themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastproj.reference import surgery as reference
from fastproj.surgery import (
    AGEM,
    GEM,
    IGEM,
    IMTLG,
    MGDA,
    OGD,
    CAGrad,
    DualProj,
    GradVac,
    Method,
    NashMTL,
    PCGrad,
    SafeGrad,
    UPGrad,
)

LENGTH = 40
Oracle = Callable[[Tensor], Tensor]


def normal(size: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Standard normal gradients as rows, (K, n) fp64."""
    generator = torch.Generator().manual_seed(1000 * seed + size)
    return torch.randn(size, length, generator=generator, dtype=torch.float64)


def families(size: int, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of ``size`` tasks by the kind of trouble in them."""
    plain = normal(size, seed=seed)
    scaled = plain.clone()
    scaled[0] *= 1e15
    scaled[-1] *= 1e-15
    made = {
        "normal": plain,
        "conflicting": plain - 1.5 * plain.mean(0),
        "agreeing": plain + 1.0,
        "1e-15": 1e-15 * plain,
        "1e15": 1e15 * plain,
        "1e-15 and 1e15": scaled,
        "zero": torch.zeros_like(plain),
    }
    if size > 1:
        for name, row in (("opposite", -2 * plain[0]), ("equal", plain[0]), ("one zero", 0 * plain[0])):
            made[name] = plain.clone()
            made[name][1] = row
        made["rank 1"] = normal(1, size, seed + 50).mT * plain[:1]
        made["rank 2"] = normal(2, size, seed + 51).mT @ plain[:2]
    return made


INDEPENDENT = ("normal", "agreeing", "1e-15", "1e15")


def round_robin(size: int) -> list[list[int]]:
    """An order of tasks: task i begins with i + 1."""
    return [[(i + 1 + t) % size for t in range(size - 1)] for i in range(size)]


def means(size: int) -> Tensor:
    return torch.full((size,), 1 / size, dtype=torch.float64)


def methods(size: int) -> dict[str, tuple[Method, Oracle]]:
    """Every method for ``size`` gradients, with its reference."""
    order = round_robin(size)
    uneven = tuple(float(k % 3) + 0.5 for k in range(size))
    zeros = torch.zeros(size, size, dtype=torch.float64)
    made: dict[str, tuple[Method, Oracle]] = {
        "PCGrad": (PCGrad(order=order), lambda g: reference.pcgrad(g, order)),
        "GradVac": (GradVac(order=order), lambda g: reference.gradvac(g, zeros, 0.5, order)[0]),
        "UPGrad": (UPGrad(), lambda g: reference.upgrad(g, means(size))),
        "UPGrad, uneven": (
            UPGrad(preference=uneven),
            lambda g: reference.upgrad(g, torch.tensor(uneven, dtype=torch.float64)),
        ),
        "DualProj": (DualProj(), lambda g: reference.dual_proj(g, means(size))),
        "MGDA": (MGDA(), reference.mgda),
        "CAGrad": (CAGrad(), lambda g: reference.cagrad(g, 0.5)),
        "NashMTL": (NashMTL(), reference.nash_mtl),
        "IMTLG": (IMTLG(), reference.imtl_g),
        "GEM": (GEM(), reference.gem),
        "GEM, margin": (GEM(margin=0.5), lambda g: reference.gem(g, 0.5)),
        "IGEM": (IGEM(), lambda g: reference.i_gem(g, 0.0, 50)),
        "OGD": (OGD(), reference.ogd),
    }
    if size > 1:
        made["AGEM"] = (AGEM(), reference.a_gem)
    if size == 2:
        made["SafeGrad"] = (SafeGrad(alignment=0.3), lambda g: reference.safegrad(g, 0.3))
    return made


def gram_of(gradients: Tensor) -> Tensor:
    """(1, K, K) fp64."""
    wide = gradients.double()
    return (wide @ wide.mT)[None]


def combined(method: Method, gradients: Tensor) -> Tensor:
    """``Σ_k c_k g_k`` in fp64 with the coefficients that the method finds."""
    return (method.coefficients(gram_of(gradients)) @ gradients.double())[0]
