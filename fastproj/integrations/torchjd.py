"""Where TorchJD meets gradient surgery: our methods as its aggregators, its weightings on our Gram matrices.

TorchJD is imported at the first use of what needs it; ``pip install torchjd``, 0.18 and later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastproj.reference.segments import Segments
from fastproj.surgery._method import Method
from fastproj.surgery._unit_gram import UnitGram
from fastproj.surgery.project import project


def weighting(method: Method, *, generator: torch.Generator | None = None) -> Any:
    """A ``torchjd.aggregation.Weighting`` that gives the method's coefficients for a Gramian (m, m).

    For TorchJD's autogram engine, and inside :func:`aggregator`. Weights are solved for in fp64 and come in
    the Gramian's dtype; not differentiable. Raises ImportError where TorchJD is not installed.
    """
    return _classes()[0](method, generator)


def aggregator(method: Method, *, generator: torch.Generator | None = None) -> Any:
    """A ``torchjd.aggregation.GramianWeightedAggregator`` of the method, for ``torchjd.autojac``.

    TorchJD forms the Gramian and combines the rows, in the Jacobian's dtype; :func:`jac_to_grad` does both by
    this package's operators instead.
    """
    return _classes()[1](method, generator)


@dataclass(frozen=True)
class TorchJDWeighting(Method):
    """A TorchJD weighting as a method: ``fastproj.project(sets, TorchJDWeighting(UPGradWeighting()))``.

    ``weighting`` is any ``torchjd.aggregation.Weighting`` of a Gramian. It is called on the Gram matrix of
    each segment in turn, in fp64, and the host waits for the device. NaN stands for a segment that is not
    finite.
    """

    weighting: Any

    @torch.no_grad()
    def coefficients(
        self, gram: Tensor, *, precision: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """(S, K) in fp64; see :meth:`fastproj.surgery.Method.coefficients`."""
        self._check(gram)
        rows = [self._of_segment(own) for own in gram.to(torch.float64)]
        return torch.stack(rows) if rows else gram.new_zeros(gram.shape[:2], dtype=torch.float64)

    def _of_segment(self, gram: Tensor) -> Tensor:
        if not bool(torch.isfinite(gram).all()):
            return gram.new_full((len(gram),), torch.nan)
        weights: Tensor = self.weighting(gram)
        return weights

    def _solve(self, unit: UnitGram, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError("a TorchJD weighting takes the Gram matrix itself")


@torch.no_grad()
def jac_to_grad(
    tensors: Iterable[Tensor],
    method: Method,
    *,
    segments: Segments | None = None,
    generator: torch.Generator | None = None,
    retain_jac: bool = False,
) -> None:
    """Combine the ``.jac`` fields that ``torchjd.autojac`` left and add the result to ``.grad``.

    What ``torchjd.autojac.jac_to_grad`` does, without concatenating the Jacobians and with segments: rows of
    the Jacobians are the gradient sets, :func:`fastproj.project` combines them.

    Args:
        tensors: parameters with ``.jac`` of (m, *shape), the same m in all.
        method: one of ``fastproj.surgery``.
        segments, generator: as in :func:`fastproj.project`.
        retain_jac: leave the ``.jac`` fields where they are.

    Raises:
        ValueError: no tensors; one without ``.jac``; different numbers of rows.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("expected at least one tensor, got none")
    missing = [i for i, tensor in enumerate(tensors) if getattr(tensor, "jac", None) is None]
    if missing:
        raise ValueError(
            f"tensors {missing} have no .jac: call torchjd.autojac.backward or mtl_backward first"
        )
    jacobians: list[Tensor] = [tensor.jac for tensor in tensors]  # type: ignore[attr-defined]
    rows = {jacobian.shape[0] for jacobian in jacobians}
    if len(rows) > 1:
        raise ValueError(f"the .jac fields must have one number of rows, got {sorted(rows)}")
    sets = list(zip(*(jacobian.unbind(0) for jacobian in jacobians), strict=True))
    combined = project(sets, method, segments=segments, generator=generator)
    for tensor, gradient in zip(tensors, combined, strict=True):
        tensor.grad = gradient if tensor.grad is None or gradient is None else tensor.grad + gradient
        if not retain_jac:
            del tensor.jac  # type: ignore[attr-defined]


@cache
def _classes() -> tuple[Any, Any]:
    """The weighting and the aggregator, which inherit from TorchJD's own."""
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

    class MethodWeighting(Weighting):
        """A method's coefficients as the weights of a Gramian's rows."""

        def __init__(self, method: Method, generator: torch.Generator | None) -> None:
            super().__init__()
            self.method = method
            self.generator = generator

        @torch.no_grad()
        def forward(self, gramian: Tensor, /) -> Tensor:
            weights = self.method.coefficients(gramian[None], generator=self.generator)[0]
            return weights.to(gramian.dtype)

    class MethodAggregator(GramianWeightedAggregator):
        """A method as an aggregator of Jacobians."""

        def __init__(self, method: Method, generator: torch.Generator | None) -> None:
            super().__init__(MethodWeighting(method, generator))
            self.method = method

        @torch.no_grad()
        def forward(self, matrix: Tensor, /) -> Tensor:
            vector: Tensor = super().forward(matrix)
            return vector

        def __repr__(self) -> str:
            return f"aggregator({self.method!r})"

    return MethodWeighting, MethodAggregator
