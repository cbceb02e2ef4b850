"""Erasers: low-rank factors of a projection that takes a concept out, and what they are applied to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastproj.bindings.project_out import (
    SIDES,
    Side,
    project_out,
    project_out_,
    project_out_stream,
)
from fastproj.methods._constraint import SIDE_OF
from fastproj.reference.basis import Basis
from fastproj.reference.project_out import as_matrix


class Eraser(ABC):
    """``r(x) = x − L Rᵀ (x − μ)`` with ``RᵀL = I``: a projection, whatever x is, of what L spans away.

    :class:`OrthogonalEraser` has ``L = R``, :class:`ObliqueEraser` has not. Both are frozen dataclasses whose
    factors are fp32 or fp64 tensors. Half and single precision are computed in fp32 and rounded once, fp64 in
    fp64. d×d matrices are never formed.

    Attributes:
        left: L, (d, k): what is taken away lies in its span.
        right: R, (d, k): what is measured, ``Rᵀx``, and constant afterwards.
        mean: μ, (d,), or None for 0.
    """

    left: Tensor
    right: Tensor
    mean: Tensor | None

    @property
    def dimension(self) -> int:
        """d, the length of the activations."""
        return self.left.shape[0]

    @property
    def rank(self) -> int:
        """k, the number of directions; 0 where there was nothing to erase."""
        return self.left.shape[1]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``x − L Rᵀ (x − μ)`` of activations (…, d), in their dtype; μ is 0 where ``mean`` is None.

        Differentiable in x. NaN or Inf leave nothing finite in their own activation, and touch no other.
        Raises TypeError where x is no floating-point tensor, ValueError for another length or device.
        """

    @abstractmethod
    def gradient(self, delta: Tensor) -> Tensor:
        """``δ − R Lᵀ δ``, (…, d): what the eraser's own backward pass makes of the gradient of its output.

        Put on a gradient alone, with the activations as they are, nothing learns along L. Errors as above.
        """

    @abstractmethod
    def project(self, shards: Sequence[Tensor | None], *, side: Side) -> list[Tensor | None]:
        """``G − (G L) Rᵀ`` (right: what reads the activations) or ``G − L (Rᵀ G)`` (left: what writes them).

        Shards are weights or their gradients, as :func:`fastproj.project_out` takes them, whose errors these
        are. A weight from the right gives ``W r(x)``, but for a constant; from the left ``r(W x)``.
        """

    @abstractmethod
    def project_(self, shards: Sequence[Tensor | None], *, side: Side) -> None:
        """:meth:`project`, each shard in its own memory; not differentiable."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """The same eraser elsewhere, or in fp32 or fp64."""

    @torch.no_grad()
    def fold_(self, linear: nn.Linear, *, side: str) -> None:
        """Give a linear layer the eraser for good, at no further cost.

        - ``side="read"``: it becomes ``x ↦ W r(x) + b``: ``W ← W − (W L) Rᵀ``, ``b ← b + W L Rᵀ μ``;
        - ``side="write"``: it becomes ``x ↦ r(W x + b)``: ``W ← W − L (Rᵀ W)``, ``b ← b − L Rᵀ (b − μ)``.

        Raises TypeError for another module, ValueError for another side or width, and where the constant that
        belongs to it is not 0 and the layer has no bias.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
        if side not in SIDE_OF:
            raise ValueError(f"side must be one of {tuple(SIDE_OF)}, got {side!r}")
        weight, bias = linear.weight, linear.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        shift = None if self.mean is None else self._shift(self.mean, weight.device, wide)
        if side == "read" and shift is not None:
            _check_width(linear.in_features, self.dimension, "reads")
            shift = weight.to(wide) @ shift
        if shift is not None and bias is None and bool(shift.any()):
            raise ValueError("expected a layer with a bias for an eraser with a mean, got one without")
        self.project_([weight], side=SIDE_OF[side])
        if bias is None:
            return
        moved = bias.to(wide)
        if side == "write":
            left, right = (part.to(bias.device, wide) for part in (self.left, self.right))
            moved = moved - left @ (right.mT @ moved)
        bias.copy_(moved if shift is None else moved + shift)

    def save(self, path: str | Path) -> None:
        """Write the factors to one safetensors file, whole or not at all. Raises OSError where that fails."""
        from fastproj.erasure.eraser_file import write

        write(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Eraser:
        """Read what :meth:`save` wrote, onto the CPU; nothing is unpickled.

        Raises FileNotFoundError where there is no file, ValueError, with the path, for one that is damaged,
        is of another version, or whose factors do not fit, are not finite or make no projection.
        """
        from fastproj.erasure.eraser_file import read

        return read(Path(path))

    def _shift(self, mean: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``L Rᵀ μ``, (d,), rounded once."""
        left, right = self.left.double(), self.right.double()
        return (left @ (right.mT @ mean.double())).to(device, dtype)


@dataclass(frozen=True, eq=False)
class OrthogonalEraser(Eraser):
    """``r(x) = x − V Vᵀ (x − μ)``: :func:`fastproj.project_out`'s projection, around a mean or around 0.

    Attributes:
        basis: V, at most 64 directions.
        mean: μ, (d,), or None for 0.
        left, right: V itself.

    Raises TypeError for other types, ValueError for a mean of another shape, dtype or device.
    """

    basis: Basis
    mean: Tensor | None = None
    left: Tensor = field(init=False, repr=False)
    right: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Basis):
            raise TypeError(f"basis must be a Basis, got {type(self.basis).__name__}")
        _check_mean(self.mean, self.basis.matrix)
        object.__setattr__(self, "left", self.basis.matrix)
        object.__setattr__(self, "right", self.basis.matrix)

    def select(self, columns: Sequence[int]) -> OrthogonalEraser:
        """The directions at ``columns`` alone, in that order. ValueError for one twice or absent."""
        chosen = list(columns)
        if len(set(chosen)) < len(chosen) or not all(0 <= column < self.rank for column in chosen):
            raise ValueError(f"expected different columns from 0 to {self.rank - 1}, got {chosen}")
        return replace(self, basis=Basis(self.basis.matrix[:, chosen]))

    def __call__(self, x: Tensor) -> Tensor:
        if self.mean is None:
            return project_out_stream(x, self.basis)
        wide = _wide(x, self.left)
        mean = self.mean.to(wide.dtype)
        return (project_out_stream(wide - mean, self.basis) + mean).to(x.dtype)

    def gradient(self, delta: Tensor) -> Tensor:
        return project_out_stream(delta, self.basis)

    def project(self, shards: Sequence[Tensor | None], *, side: Side) -> list[Tensor | None]:
        return project_out(shards, self.basis, side=side)

    def project_(self, shards: Sequence[Tensor | None], *, side: Side) -> None:
        project_out_(shards, self.basis, side=side)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> OrthogonalEraser:
        mean = None if self.mean is None else self.mean.to(device=device, dtype=dtype)
        return OrthogonalEraser(self.basis.to(device, dtype), mean)


@dataclass(frozen=True, eq=False)
class ObliqueEraser(Eraser):
    """``r(x) = x − L Rᵀ (x − μ)``, two thin matrix products: what is measured is not what is taken away.

    Attributes:
        left: L, (d, k), fp32 or fp64.
        right: R, (d, k), of the same dtype, on the same device, with ``RᵀL = I``; the constructor does not
            check that.
        mean: μ, (d,), or None for 0.

    Raises TypeError for other types, ValueError for shapes, dtypes and devices that do not fit.
    """

    left: Tensor
    right: Tensor
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        for name, factor in (("left", self.left), ("right", self.right)):
            if not isinstance(factor, Tensor) or factor.dtype not in (torch.float32, torch.float64):
                came = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                raise TypeError(f"{name} must be an fp32 or fp64 tensor, got {came}")
        left, right = self.left, self.right
        if left.dim() != 2 or left.shape != right.shape or left.shape[1] > left.shape[0]:
            raise ValueError(
                f"left and right must be (d, k), k ≤ d, got {tuple(left.shape)} and {tuple(right.shape)}"
            )
        if (left.dtype, left.device) != (right.dtype, right.device):
            raise ValueError(
                f"left and right must be alike, got {left.dtype} on {left.device} and {right.dtype} on "
                f"{right.device}"
            )
        if left.requires_grad or right.requires_grad:
            raise ValueError("an eraser is a constant: detach its factors")
        _check_mean(self.mean, left)

    def __call__(self, x: Tensor) -> Tensor:
        wide = _wide(x, self.left)
        centred = wide if self.mean is None else wide - self.mean.to(wide.dtype)
        return (wide - _part(centred, self.right, self.left)).to(x.dtype)

    def gradient(self, delta: Tensor) -> Tensor:
        wide = _wide(delta, self.left)
        return (wide - _part(wide, self.left, self.right)).to(delta.dtype)

    def project(self, shards: Sequence[Tensor | None], *, side: Side) -> list[Tensor | None]:
        if side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, got {side!r}")
        return [None if shard is None else self._projected(shard, side) for shard in shards]

    def project_(self, shards: Sequence[Tensor | None], *, side: Side) -> None:
        if torch.is_grad_enabled() and any(shard is not None and shard.requires_grad for shard in shards):
            raise ValueError("project_ is not differentiable; call it under torch.no_grad(), or project")
        for shard, projected in zip(shards, self.project(shards, side=side), strict=True):
            if shard is not None and projected is not None:
                shard.copy_(projected)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ObliqueEraser:
        left, right = (part.to(device=device, dtype=dtype) for part in (self.left, self.right))
        mean = None if self.mean is None else self.mean.to(device=device, dtype=dtype)
        return ObliqueEraser(left, right, mean)

    def _projected(self, shard: Tensor, side: Side) -> Tensor:
        if not isinstance(shard, Tensor) or not shard.dtype.is_floating_point:
            came = shard.dtype if isinstance(shard, Tensor) else type(shard).__name__
            raise TypeError(f"shards must be floating-point tensors, got {came}")
        matrix = as_matrix(shard, side == "left")
        if side == "right":
            wide = _wide(matrix, self.left)
            projected = wide - _part(wide, self.left, self.right)
        else:
            wide = _wide(matrix.mT, self.left)
            projected = (wide - _part(wide, self.right, self.left)).mT
        return projected.reshape(shard.shape).to(shard.dtype)


def _part(rows: Tensor, measured: Tensor, taken: Tensor) -> Tensor:
    """``(x M) Tᵀ`` of rows x, in their precision, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ measured.to(rows.dtype)) @ taken.to(rows.dtype).mT


def _wide(x: Tensor, factor: Tensor) -> Tensor:
    """x in the precision that it is computed in, once its length and device are the factor's."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(
            f"expected a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if not x.dim() or x.shape[-1] != factor.shape[0]:
        raise ValueError(f"the eraser is of length {factor.shape[0]}, got shape {tuple(x.shape)}")
    if x.device != factor.device:
        raise ValueError(f"the eraser is on {factor.device}, what it is applied to on {x.device}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_mean(mean: Tensor | None, factor: Tensor) -> None:
    if mean is None:
        return
    if not isinstance(mean, Tensor):
        raise TypeError(f"mean must be a tensor or None, got {type(mean).__name__}")
    if mean.shape != factor.shape[:1] or (mean.dtype, mean.device) != (factor.dtype, factor.device):
        raise ValueError(
            f"mean must be ({factor.shape[0]},) of {factor.dtype} on {factor.device}, got "
            f"{tuple(mean.shape)} of {mean.dtype} on {mean.device}"
        )


def _check_width(came: int, dimension: int, does: str) -> None:
    if came != dimension:
        raise ValueError(
            f"the eraser is of length {dimension}, but the layer {does} vectors of length {came}"
        )
