"""Families of activations with labels that every fitter is tried on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES, CLASSES, SAMPLES = 7, 3, 120


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain(
    samples: int = SAMPLES, features: int = FEATURES, classes: int = CLASSES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Correlated activations (n, d), away from 0, whose mean depends on their label (n,)."""
    labels = torch.arange(samples) % classes
    means = 2 * normal(classes, features, seed=100 + seed)
    x = normal(samples, features, seed=seed) @ normal(features, features, seed=200 + seed)
    return x + means[labels] + 5.0, labels


def families() -> dict[str, tuple[Tensor, Tensor]]:
    """Samples by the kind of trouble in them."""
    x, labels = plain()
    units = torch.logspace(-12, 12, FEATURES, dtype=torch.float64)
    constant = x.clone()
    constant[:, 1], constant[:, 4] = 0.1, 0.0
    one_class_small = torch.where(torch.arange(SAMPLES) < 2, 2, labels % 2)
    return {
        "plain": (x, labels),
        "1e-15": (1e-15 * x, labels),
        "1e15": (1e15 * x, labels),
        "mixed units": (units * x, labels),
        "constant features": (constant, labels),
        "dependent features": (x[:, :4] @ normal(4, FEATURES, seed=3), labels),
        "equal features": (x[:, [0, 0, 1, 1, 2, 3, 3]], labels),
        "fewer samples than features": (x[:5], labels[:5]),
        "a rare class": (x, one_class_small),
        "a class missing": (x, labels % 2),
        "far from 0": (x + 1e6, labels),
    }


# Those that the dense reference solves to rounding.
WELL_CONDITIONED = ("plain", "1e-15", "1e15", "a rare class", "a class missing", "constant features")


def indicators(labels: Tensor, classes: int = CLASSES) -> Tensor:
    """Labels (n,) as (n, K)."""
    return F.one_hot(labels, classes).to(torch.float64)


def largest_correlation(x: Tensor, z: Tensor, like: Tensor) -> float:
    """The largest covariance of features of x and columns of z, by standard deviations of ``like`` and z."""
    x, z, like = (t.double() - t.double().mean(0) for t in (x, z, like))
    size = like.norm(dim=0)[:, None] * z.norm(dim=0)
    return float(((x.mT @ z).abs() / torch.where(size > 0, size, 1.0)).max())


def in_batches(samples: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The same samples in batches of these sizes, the rest last."""
    total = len(samples[0])
    sizes = [*sizes, total - sum(sizes)]
    return list(zip(*(t.split(sizes) for t in samples), strict=True))
