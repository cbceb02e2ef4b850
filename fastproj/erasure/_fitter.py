"""What the fitters have in common: samples in, their moments kept, two fits made one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastproj.erasure._moments import Moments, merged, moments
from fastproj.erasure.eraser import Eraser

# A predictor that explains less than the rounding of fp64 of the variance, R² = ρ², explains nothing.
NEGLIGIBLE = torch.finfo(torch.float64).eps ** 0.5


class Fitter(ABC):
    """Keeps the moments of what :meth:`update` was given; ``classes`` says what z is, see there."""

    _square = True

    def __init__(self, classes: int | None) -> None:
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
            raise TypeError(f"classes must be a whole number or None, got {type(classes).__name__}")
        if classes is not None and classes < 2:
            raise ValueError(f"classes must be 2 or more, got {classes}")
        self.classes = classes
        self._moments: Moments | None = None

    @property
    def count(self) -> int:
        """How many samples there were."""
        return 0 if self._moments is None else self._moments.count

    def update(self, x: Tensor, z: Tensor) -> None:
        """Take samples in.

        Args:
            x: activations (…, d) of any floating-point dtype; one of fp64 is kept as precise.
            z: with ``classes``, the label of each sample, (…,), whole numbers from 0; without, numbers or
                bools, (…,) or (…, k). The shapes before d and k must be those of x.

        Where this raises, nothing was taken in. No samples change nothing. Waits for the device, once.

        Raises:
            TypeError: x is no floating-point tensor; labels are no whole numbers; without ``classes``, z is
                of whole numbers, which could be labels.
            ValueError: shapes that do not fit each other or what came before; labels out of range; NaN, Inf,
                or values whose squares are beyond fp64.
        """
        rows = as_rows(x)
        concepts = as_concepts(z, x.shape[:-1], self.classes)
        if rows.device != concepts.device:
            raise ValueError(f"x and z must be on one device, got {rows.device} and {concepts.device}")
        if len(rows):
            self._take(moments(rows, concepts, square=self._square))

    def merge(self, other: Fitter) -> None:
        """Take in all that another fitter of this kind was given; the other stays as it is.

        Raises TypeError for another kind, ValueError for other classes or shapes.
        """
        if type(other) is not type(self):
            raise TypeError(f"expected another {type(self).__name__}, got {type(other).__name__}")
        if other.classes != self.classes:
            raise ValueError(f"expected a fit of classes={self.classes}, got classes={other.classes}")
        if other._moments is not None:
            self._take(other._moments)

    @property
    @abstractmethod
    def eraser(self) -> Eraser:
        """What the samples so far give."""

    def _take(self, new: Moments) -> None:
        known = self._moments
        if known is not None and known.cross.shape != new.cross.shape:
            raise ValueError(
                f"expected x of {known.cross.shape[0]} features and z of {known.cross.shape[1]}, "
                f"got {new.cross.shape[0]} and {new.cross.shape[1]}"
            )
        together = new if known is None else merged(known, new)
        if not together.finite:
            raise ValueError("expected finite samples, got NaN, Inf or values whose squares are beyond fp64")
        self._moments = together

    def _fitted(self) -> Moments:
        """The moments, once they can be used; those of constants are 0 exactly."""
        if self._moments is None:
            raise ValueError("expected samples before an eraser: call update first")
        if self.classes is not None and int(self._moments.varies_z.sum()) < 2:
            raise ValueError(
                f"expected samples of two classes or more, got {self._moments.count} of one class only"
            )
        return self._moments.exact


def as_rows(x: Any) -> Tensor:
    """Activations (…, d) as (n, d), their dtype kept. TypeError and ValueError as :meth:`Fitter.update`."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor, got {_kind(x)}")
    if x.dim() < 2 or not x.shape[-1]:
        raise ValueError(f"x must be (…, d), samples of d features, got {tuple(x.shape)}")
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def as_concepts(z: Any, samples: torch.Size, classes: int | None) -> Tensor:
    """Labels as their indicators, or numbers, as (n, k) in fp64. Raises as :meth:`Fitter.update`."""
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    whole = not z.dtype.is_floating_point and not z.dtype.is_complex
    if classes is None:
        if z.dtype.is_complex or (whole and z.dtype != torch.bool):
            raise TypeError(
                f"z must be floating point or bool, got {z.dtype}: for labels say how many classes there "
                "are, classes=K; numbers that are no labels are to be converted"
            )
        if z.shape != samples and z.shape[:-1] != samples:
            raise ValueError(f"z must be {tuple(samples)} or have one more dimension, got {tuple(z.shape)}")
        width = 1 if z.shape == samples else z.shape[-1]
        return z.reshape(samples.numel(), width).to(torch.float64)
    if not whole:
        raise TypeError(f"labels must be whole numbers, got {z.dtype}")
    if z.shape != samples:
        raise ValueError(f"expected one label for each sample, {tuple(samples)}, got {tuple(z.shape)}")
    labels = z.reshape(-1).long()
    if labels.numel() and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    return F.one_hot(labels, classes).to(torch.float64)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
