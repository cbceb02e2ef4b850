"""Gram matrices of gradient sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings._sets import gradient_sets, plan_of, split_sets
from fastproj.reference.gram import gram as reference_gram
from fastproj.reference.segments import Segments


def gram(sets: Sequence[Sequence[Tensor | None]], *, segments: Segments = "global") -> Tensor:
    """``M[s,a,b] = Σ_{shards in s} ⟨G_a, G_b⟩``: inner products of K gradient sets, segment by segment.

    Args:
        sets: K lists of n shards each. Shards at one position share shape and device; dtypes may be fp32,
            bf16, fp16 or fp64 and may differ between shards and sets. A position that is None in every
            set counts nothing.
        segments: ``"global"`` (S = 1), ``"tensor"`` (S = n), ``"row"`` (S = all rows; a vector is one row)
            or one id per shard, covering 0 … S−1.

    Returns:
        (S, K, K) in fp64 on the shards' device: squares of fp32 gradients do not fit fp32. Products of
        half and single precision shards are taken in fp32, scaled or repeated in fp64 where they would
        leave its range, and summed in a fixed order: equal inputs give equal bits, where 16-byte alignment
        is equal too.

    Raises:
        TypeError: a shard is not a dense fp32, bf16, fp16 or fp64 tensor; segment ids are not integers.
        ValueError: lengths, shapes or devices differ, a shard is None in some sets only, or the segments
            are unknown.

    Differentiable in every shard. Meaning: ``fastproj.reference.gram``.
    """
    checked = gradient_sets(sets, segments)
    if not checked.shards:
        return torch.zeros(checked.count, checked.num_sets, checked.num_sets, dtype=torch.float64)
    result: Tensor = torch.ops.fastproj.gram(
        checked.shards, checked.num_sets, checked.first, checked.rows, checked.count
    )
    return result


def from_reference(
    shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int
) -> Tensor:
    """The reference under the operator's plain arguments."""
    return reference_gram(split_sets(shards, num_sets), plan_of(first, rows, count))


def _dispatch(shards: list[Tensor], num_sets: int, first: list[int], rows: bool, count: int) -> Tensor:
    function = implementation("gram", shards[0].device.type)
    result: Tensor = function(shards, num_sets, first, rows, count)
    return result


def _fake(shards: list[Tensor], num_sets: int, first: list[int], rows: bool, count: int) -> Tensor:
    return shards[0].new_empty(count, num_sets, num_sets, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shards, ctx.num_sets, ctx.first, ctx.rows, _ = inputs
    ctx.save_for_backward(*shards)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dG_a = Σ_b (D_ab + D_ba) G_b``: one combination of all sets for each set."""
    shards = list(ctx.saved_tensors)
    symmetric = grad + grad.transpose(1, 2)
    grads: list[Tensor] = []
    for a in range(ctx.num_sets):
        combined = torch.ops.fastproj.combine(shards, symmetric[:, a], ctx.first, ctx.rows)
        own = split_sets(shards, ctx.num_sets)[a]
        grads += [value.to(shard.dtype) for value, shard in zip(combined, own, strict=True)]
    return grads, None, None, None, None


define("gram(Tensor[] shards, int num_sets, int[] first, bool rows, int count) -> Tensor", _dispatch, _fake)
torch.library.register_autograd("fastproj::gram", _backward, setup_context=_setup_context, lib=LIBRARY)
