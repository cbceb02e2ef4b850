"""Linear combinations of gradient sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings._sets import GradientSets, gradient_sets, plan_of, requires_grad, split_sets
from fastproj.reference.combine import combine as reference_combine
from fastproj.reference.segments import Segments


def combine(
    sets: Sequence[Sequence[Tensor | None]],
    coefficients: Tensor,
    *,
    segments: Segments = "global",
    out: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """``out = Σ_k C[s,k] G_k``, where s is the segment of the element.

    Args:
        sets: K lists of n shards each, as in :func:`fastproj.gram`.
        coefficients: (S, K), floating point, on the shards' device. A coefficient of exactly zero leaves
            its set out, non-finite values included.
        segments: as in :func:`fastproj.gram`.
        out: n tensors of the shards' shapes that receive the result; may be one of the sets. Not
            differentiable.

    Returns:
        n tensors, each of the dtype its shards promote to (or ``out``); None where every set has None.
        Half and single precision multiply in fp32, fp64 in fp64, and the result is rounded once.

    Raises:
        TypeError: as in :func:`fastproj.gram`, or the coefficients are not a floating-point tensor.
        ValueError: as in :func:`fastproj.gram`; the coefficients are not (S, K) or not on the shards'
            device; ``out`` does not fit the shards or is asked for under autograd.

    Differentiable in every shard and in the coefficients. Meaning: ``fastproj.reference.combine``.
    """
    checked = gradient_sets(sets, segments)
    check_coefficients(coefficients, checked)
    if out is None:
        tensors = _allocate_and_combine(checked, coefficients) if checked.shards else []
        return checked.restore(tensors)
    if requires_grad([*checked.shards, coefficients]):
        raise ValueError(
            "combine(out=...) is not differentiable; call it under torch.no_grad() or without out"
        )
    targets = _check_out(out, checked)
    if targets:
        torch.ops.fastproj.combine_out(checked.shards, coefficients, checked.first, checked.rows, targets)
    return list(out)


def _allocate_and_combine(checked: GradientSets, coefficients: Tensor) -> list[Tensor]:
    result: list[Tensor] = torch.ops.fastproj.combine(
        checked.shards, coefficients, checked.first, checked.rows
    )
    return result


def check_coefficients(coefficients: Tensor, checked: GradientSets) -> None:
    if not isinstance(coefficients, Tensor) or not coefficients.dtype.is_floating_point:
        came = coefficients.dtype if isinstance(coefficients, Tensor) else type(coefficients).__name__
        raise TypeError(f"coefficients must be a floating-point tensor, got {came}")
    expected = (checked.count, checked.num_sets)
    if tuple(coefficients.shape) != expected:
        raise ValueError(f"coefficients must be (S, K) = {expected}, got {tuple(coefficients.shape)}")
    if checked.shards and coefficients.device != checked.shards[0].device:
        raise ValueError(
            f"coefficients are on {coefficients.device}, the shards on {checked.shards[0].device}"
        )


def _check_out(out: Sequence[Tensor | None], checked: GradientSets) -> list[Tensor]:
    both = gradient_sets(
        [list(out), checked.restore(split_sets(checked.shards, checked.num_sets)[0])],
        "global",
        names=["out", "set 0"],
    )
    targets = split_sets(both.shards, 2)[0]
    check_aliases(targets, checked.shards, "out")
    return targets


def check_aliases(targets: Sequence[Tensor], shards: Sequence[Tensor], name: str) -> None:
    """Check that writing each target changes no shard but the one at its own position, read in step.

    Compares where tensors begin; ones that overlap in part are not looked for.
    """
    n = len(targets)
    pointers = {tensor.data_ptr() for tensor in (*targets, *shards) if tensor.numel()}
    if len(pointers) == sum(tensor.numel() > 0 for tensor in (*targets, *shards)):
        return
    place = {target.data_ptr(): i for i, target in enumerate(targets) if target.numel()}
    if len(place) < sum(target.numel() > 0 for target in targets):
        raise ValueError(f"{name} holds the same tensor at two positions")
    for index, shard in enumerate(shards):
        position = place.get(shard.data_ptr()) if shard.numel() else None
        if position is None:
            continue
        if position != index % n or shard.stride() != targets[position].stride():
            raise ValueError(
                f"{name}[{position}] shares memory with shard {index % n} of set {index // n}; it may only "
                "be that shard itself, in the same layout, at its own position"
            )


def result_dtype(shards: Sequence[Tensor]) -> torch.dtype:
    """The dtype that the shards at one position promote to."""
    return reduce(torch.promote_types, (shard.dtype for shard in shards))


def _empty_results(shards: list[Tensor], num_sets: int) -> list[Tensor]:
    positions = zip(*split_sets(shards, num_sets), strict=True)
    return [torch.empty(at[0].shape, dtype=result_dtype(at), device=at[0].device) for at in positions]


def from_reference(
    shards: list[Tensor], coefficients: Tensor, first: Sequence[int], rows: bool, out: list[Tensor]
) -> None:
    """The reference under the operator's plain arguments."""
    plan = plan_of(first, rows, coefficients.shape[0])
    for target, value in zip(
        out, reference_combine(split_sets(shards, coefficients.shape[1]), coefficients, plan), strict=True
    ):
        target.copy_(value)


def _dispatch_out(
    shards: list[Tensor], coefficients: Tensor, first: list[int], rows: bool, out: list[Tensor]
) -> None:
    implementation("combine", shards[0].device.type)(shards, coefficients.to(torch.float64), first, rows, out)


def _dispatch(shards: list[Tensor], coefficients: Tensor, first: list[int], rows: bool) -> list[Tensor]:
    out = _empty_results(shards, coefficients.shape[1])
    _dispatch_out(shards, coefficients, first, rows, out)
    return out


def _fake(shards: list[Tensor], coefficients: Tensor, first: list[int], rows: bool) -> list[Tensor]:
    return _empty_results(shards, coefficients.shape[1])


def _fake_out(
    shards: list[Tensor], coefficients: Tensor, first: list[int], rows: bool, out: list[Tensor]
) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    shards, coefficients, ctx.first, ctx.rows = inputs
    ctx.save_for_backward(coefficients, *shards)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """``dG_k = C_k h`` and ``dC[s,k] = ⟨h, G_k⟩_s``, for the gradient h of the result."""
    coefficients, *shards = ctx.saved_tensors
    num_sets = coefficients.shape[1]
    sets = split_sets(shards, num_sets)
    shard_grads: list[Tensor] = []
    for k, own in enumerate(sets):
        scaled = torch.ops.fastproj.combine(grads, coefficients[:, k : k + 1], ctx.first, ctx.rows)
        shard_grads += [value.to(shard.dtype) for value, shard in zip(scaled, own, strict=True)]
    inner = torch.ops.fastproj.gram(
        [*grads, *shards], num_sets + 1, ctx.first, ctx.rows, coefficients.shape[0]
    )
    return shard_grads, inner[:, 0, 1:].to(coefficients.dtype), None, None


define("combine(Tensor[] shards, Tensor coefficients, int[] first, bool rows) -> Tensor[]", _dispatch, _fake)
define(
    "combine_out(Tensor[] shards, Tensor coefficients, int[] first, bool rows, Tensor(a!)[] out) -> ()",
    _dispatch_out,
    _fake_out,
)
torch.library.register_autograd("fastproj::combine", _backward, setup_context=_setup_context, lib=LIBRARY)
