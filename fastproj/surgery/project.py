"""One call for every method: Gram, coefficients, combination."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.bindings._sets import gradient_sets
from fastproj.bindings.combine import combine
from fastproj.reference.segments import Segments
from fastproj.surgery._method import Method


@torch.no_grad()
def project(
    sets: Sequence[Sequence[Tensor | None]],
    method: Method,
    *,
    segments: Segments | None = None,
    generator: torch.Generator | None = None,
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """``out = Σ_k C[s,k] G_k`` with the coefficients that ``method`` finds on the Gram matrix of the sets.

    Args:
        sets: K lists of n shards each, as in :func:`fastproj.gram`; what the K sets are (tasks, or a gradient
            and its references) the method says.
        method: one of ``fastproj.surgery``, such as ``PCGrad()`` or ``UPGrad()``.
        segments: as in :func:`fastproj.gram`; the method's own ``granularity`` where left out.
        generator: for the methods that draw an order of tasks; torch's default one where left out.
        out: as in :func:`fastproj.combine`; ``sets[0]``, for one, saves the memory of a gradient set.

    Returns:
        n tensors, each of the dtype its shards promote to (or ``out``); None where every set has None.
        A segment whose Gram is not finite becomes NaN.

    Raises:
        TypeError: as in :func:`fastproj.gram`, or ``method`` is not a method.
        ValueError: as in :func:`fastproj.gram` and :func:`fastproj.combine`; the method takes another number
            of sets.

    Not differentiable: runs under no_grad. Nothing waits for the device.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of fastproj.surgery, such as PCGrad(), got {method!r}")
    segments = method.granularity if segments is None else segments
    checked = gradient_sets(sets, segments)
    if not checked.shards:
        return checked.restore([]) if out is None else list(out)
    matrix = torch.ops.fastproj.gram(
        checked.shards, checked.num_sets, checked.first, checked.rows, checked.count
    )
    coefficients = method.coefficients(matrix, precision=precision_of(checked.shards), generator=generator)
    if out is not None:
        return combine(sets, coefficients, segments=segments, out=out)
    return checked.restore(
        torch.ops.fastproj.combine(checked.shards, coefficients, checked.first, checked.rows)
    )


def precision_of(shards: Sequence[Tensor]) -> float:
    """To how much of the norms :func:`fastproj.gram` is good: fp32 rounding, unless all shards are fp64."""
    exact = all(shard.dtype == torch.float64 for shard in shards)
    return torch.finfo(torch.float64 if exact else torch.float32).eps
