"""Principal directions of activations, or of what a fine-tune changed in them: what CAFT takes out."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.erasure._fitter import as_rows
from fastproj.erasure._moments import Moments, merged, moments
from fastproj.erasure.eraser import OrthogonalEraser
from fastproj.reference.basis import MOST_RANK, Basis


class PrincipalDirections:
    """``V`` of ``Σ = V Λ Vᵀ``: the directions along which x varies most, first the largest variance.

    CAFT takes x as the difference of two models' activations on the same texts, ``update(tuned, base)``,
    looks at what each direction means, and ablates those that should not be learnt, all through a fine-tune::

        fit = PrincipalDirections(20)
        fit.update(tuned_activations, base_activations)
        with StreamErasure(model, {12: fit.eraser.select([0, 3])}):
            ...  # train

    Args:
        rank: how many directions, 1 to 64.

    ``.eraser`` is an :class:`OrthogonalEraser` in fp64 around 0; ValueError where there were no samples or
    they vary along fewer directions. Signs are arbitrary: the entry of largest magnitude is positive.

    Differs from the authors' published code, which draws random vectors to find the directions, and rounds
    them to bf16 before it projects, so that some of each stays.

    Source: Casademunt et al. 2025 (arXiv:2507.16795), section 3.
    """

    def __init__(self, rank: int) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be a whole number, got {type(rank).__name__}")
        if not 1 <= rank <= MOST_RANK:
            raise ValueError(f"rank must be from 1 to {MOST_RANK}, got {rank}")
        self.rank = rank
        self._moments: Moments | None = None

    @property
    def count(self) -> int:
        """How many samples there were."""
        return 0 if self._moments is None else self._moments.count

    def update(self, x: Tensor, base: Tensor | None = None) -> None:
        """Take in activations (…, d), less those of ``base``, in fp64.

        Where this raises, nothing was taken in: TypeError where either is no floating-point tensor,
        ValueError for shapes that do not fit, and for what is not finite.
        """
        rows = as_rows(x).to(torch.float64)
        if base is not None:
            other = as_rows(base)
            if base.shape != x.shape:
                raise ValueError(
                    f"x and base must be of one shape, got {tuple(x.shape)} and {tuple(base.shape)}"
                )
            rows = rows - other.to(rows)
        if len(rows):
            self._take(moments(rows, rows[:, :0], square=True))

    def merge(self, other: PrincipalDirections) -> None:
        """Take in all that another was given. TypeError for another kind, ValueError for another width."""
        if not isinstance(other, PrincipalDirections):
            raise TypeError(f"expected PrincipalDirections, got {type(other).__name__}")
        if other._moments is not None:
            self._take(other._moments)

    @property
    def variances(self) -> Tensor:
        """Of the samples along each direction, descending, (rank,) in fp64."""
        return self._decomposed()[0]

    @property
    def eraser(self) -> OrthogonalEraser:
        return OrthogonalEraser(Basis(self._decomposed()[1]))

    def _take(self, new: Moments) -> None:
        if self._moments is not None and len(self._moments.mean_x) != len(new.mean_x):
            raise ValueError(f"expected x of {len(self._moments.mean_x)} features, got {len(new.mean_x)}")
        together = new if self._moments is None else merged(self._moments, new)
        if not together.finite:
            raise ValueError("expected finite samples, got NaN, Inf or values whose squares are beyond fp64")
        self._moments = together

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        square = None if self._moments is None else self._moments.exact.square_x
        if self._moments is None or square is None:
            raise ValueError("expected samples before an eraser: call update first")
        covariance = square / self._moments.count
        largest = covariance.diagonal().max()
        values, vectors = torch.linalg.eigh(covariance / torch.where(largest > 0, largest, 1.0))
        values, vectors = values.flip(0)[: self.rank], vectors.flip(1)[:, : self.rank]
        found = int((values > len(covariance) * torch.finfo(values.dtype).eps).sum())
        if found < self.rank:
            raise ValueError(f"expected samples that vary along {self.rank} directions, got {found}")
        first = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return values * largest, vectors * torch.sign(first) * self._moments.varies_x[:, None]
