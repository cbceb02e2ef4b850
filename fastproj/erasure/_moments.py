"""First and second moments of activations and concepts, batch by batch, in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Of n samples of x (d features) and z (k of them).

    Attributes:
        count: n.
        mean_x, mean_z: (d,) and (k,).
        square_x: ``Σ (x − x̄)(x − x̄)ᵀ``, (d, d); None where it is not kept.
        square_z: ``Σ (z − z̄)²``, (k,).
        cross: ``Σ (x − x̄)(z − z̄)ᵀ``, (d, k).
        low_x, high_x, low_z, high_z: least and largest values: what is constant is so exactly.
    """

    count: int
    mean_x: Tensor
    mean_z: Tensor
    square_x: Tensor | None
    square_z: Tensor
    cross: Tensor
    low_x: Tensor
    high_x: Tensor
    low_z: Tensor
    high_z: Tensor

    @property
    def varies_x(self) -> Tensor:
        """Which features are not constant, (d,) bool."""
        return self.high_x > self.low_x

    @property
    def varies_z(self) -> Tensor:
        return self.high_z > self.low_z

    @property
    def squares(self) -> Tensor:
        """``square_x``. ValueError where it was not kept."""
        if self.square_x is None:
            raise ValueError(
                "expected moments of pairs of features, got those of each with the concepts alone"
            )
        return self.square_x

    @property
    def exact(self) -> Moments:
        """The same without the rounding that means left in the second moments of what is constant."""
        x, z = self.varies_x.to(self.cross.dtype), self.varies_z.to(self.cross.dtype)
        return replace(
            self,
            square_x=None if self.square_x is None else self.square_x * x[:, None] * x,
            square_z=self.square_z * z,
            cross=self.cross * x[:, None] * z,
        )

    @property
    def finite(self) -> bool:
        """Whether neither the samples nor their squares are NaN or Inf. Waits for the device."""
        tables = [self.cross, self.square_z, self.low_x, self.high_x, self.mean_x]
        tables += [] if self.square_x is None else [self.square_x]
        return all(bool(torch.isfinite(table).all()) for table in tables)


def moments(x: Tensor, z: Tensor, *, square: bool) -> Moments:
    """Of the rows of x (n, d) and z (n, k), n ≥ 1; ``square`` says whether ``square_x`` is kept."""
    x, z = x.detach().to(torch.float64), z.detach().to(torch.float64)
    mean_x, mean_z = x.mean(0), z.mean(0)
    around_x, around_z = x - mean_x, z - mean_z
    return Moments(
        count=len(x),
        mean_x=mean_x,
        mean_z=mean_z,
        square_x=around_x.mT @ around_x if square else None,
        square_z=around_z.square().sum(0),
        cross=around_x.mT @ around_z,
        low_x=x.amin(0),
        high_x=x.amax(0),
        low_z=z.amin(0),
        high_z=z.amax(0),
    )


def merged(one: Moments, other: Moments) -> Moments:
    """Moments of the samples of both, on the device of the first.

    ``M = M_a + M_b + (n_a n_b / n) δ δᵀ`` with δ the difference of means: Chan, Golub and LeVeque 1979.
    """
    device = one.mean_x.device
    count = one.count + other.count
    share = other.count / count
    x, z = other.mean_x.to(device) - one.mean_x, other.mean_z.to(device) - one.mean_z
    square = None
    if one.square_x is not None and other.square_x is not None:
        square = one.square_x + other.square_x.to(device) + one.count * share * torch.outer(x, x)
    return Moments(
        count=count,
        mean_x=one.mean_x + share * x,
        mean_z=one.mean_z + share * z,
        square_x=square,
        square_z=one.square_z + other.square_z.to(device) + one.count * share * z.square(),
        cross=one.cross + other.cross.to(device) + one.count * share * torch.outer(x, z),
        low_x=torch.minimum(one.low_x, other.low_x.to(device)),
        high_x=torch.maximum(one.high_x, other.high_x.to(device)),
        low_z=torch.minimum(one.low_z, other.low_z.to(device)),
        high_z=torch.maximum(one.high_z, other.high_z.to(device)),
    )
