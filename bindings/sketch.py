"""Random projections of per-sample vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings.per_sample_grad import accumulation_dtype, check_dense
from fastproj.reference._sketch_sparse import nonzeros_of
from fastproj.reference.sketch import KINDS
from fastproj.reference.sketch import sketch as reference_sketch

# Positions whose columns of P are made at once for the backward pass.
COLUMNS = 1024
SEEDS = 2**63
POSITIONS = 2**56


def sketch(
    shards: Tensor | Sequence[Tensor],
    dimension: int,
    *,
    seed: int,
    kind: str = "rademacher",
    offset: int = 0,
) -> Tensor:
    """``S_i = P v_i`` with a random P (k × n), ``E‖P v‖² = ‖v‖²``: short vectors that keep inner products.

    v_i is sample i of every shard, flattened and laid end to end from the absolute position ``offset`` on;
    a column of P is a pure function of (seed, kind, k, absolute position). So the same seed gives the same P
    on every device and chip, for any split into shards and calls, and sketches of pieces add up to that of
    the whole, to the rounding of sums. P is never stored.

    Args:
        shards: one tensor or a sequence of them, each (B, …), fp32, bf16, fp16 or fp64, on one device.
        dimension: k, the length of a sketch.
        seed: 0 … 2⁶³ − 1.
        kind: what P is.
            ``"rademacher"``: ±1/√k, independent. Var ‖Pv‖² ≤ 2‖v‖⁴/k.
            ``"gaussian"``: independent normal numbers rounded to a multiple of 1/32, at 2¹⁶ quantiles, scaled
            to variance 1/k exactly; none exceeds 4.4 standard deviations. An entry takes 16 random bits,
            where a sign takes one: on a CPU several times the time.
            ``"srht"``: signs, a Walsh–Hadamard transform and a sample of its rows, block by block.
            ``"sjlt"``: four entries ±1/2 in a column, the rest zero; k a power of two from 4 to 16,384, or a
            greater multiple of 4,096, with k/4,096 entries.
            ``"kronecker"``: ``L ⊗ R`` over positions as a matrix of 1,024 columns, k = k1·k2 as near to a
            square as k divides; signs in both. Cheap, and coarser than the others: Var ‖Pv‖² up to
            (2/k1 + 2/k2 + 4/k) ‖v‖⁴, where v is of rank one.
        offset: absolute position of the first shard's first element.

    Returns:
        (B, k) in fp32, or in fp64 where a shard is fp64. Halves are summed in fp32.

    Raises:
        TypeError: a shard is not a dense fp32, bf16, fp16 or fp64 tensor; a number is no integer.
        ValueError: no shards, samples or devices that differ, k < 1, a seed, an offset or a kind out of
            range, or a k that the kind does not allow.

    Differentiable in the shards; the backward pass makes P column by column, right and slow. What is not
    finite in one sample stays in its sketch. Meaning: ``fastproj.reference.sketch``. Sources: Achlioptas,
    "Database-friendly random projections", 2003; Ailon and Chazelle, "The fast Johnson–Lindenstrauss
    transform", 2009; Kane and Nelson, "Sparser Johnson–Lindenstrauss transforms", 2014.

    Coming from elsewhere, where each library draws numbers of its own:

    ======================  ========================================================================
    traker, fast_jl         P is not scaled: their ``P g`` is ``√k`` times as long as a sketch
    dattri                  scaled by 1/√k, as here
    LESS                    traker's projection of Adam's update; ε is inside the root and the moments are
                            not bias-corrected: ``AdamState(variant="less")`` before sketching
    cosine scores           the same under every scale
    ======================  ========================================================================
    """
    given = [shards] if isinstance(shards, Tensor) else list(shards)
    _check_shards(given)
    check_numbers(dimension, seed, kind, offset)
    # An axis of -1 cannot be told where there are no elements.
    flat = [shard.reshape(shard.shape[0], shard.shape[1:].numel()) for shard in given]
    result: Tensor = torch.ops.fastproj.sketch(flat, dimension, seed, kind, offset)
    return result


def _check_shards(shards: Sequence[Tensor]) -> None:
    if not shards:
        raise ValueError("expected at least one shard, got none")
    for index, shard in enumerate(shards):
        name = f"shard {index}"
        check_dense(name, shard)
        if shard.dim() < 1:
            raise ValueError(f"{name} must be (samples, …), at least one axis, got a scalar")
        if shard.shape[0] != shards[0].shape[0]:
            raise ValueError(
                f"shards must agree on samples, their first axis: got {shards[0].shape[0]} in shard 0 and "
                f"{shard.shape[0]} in {name}"
            )
        if shard.device != shards[0].device:
            raise ValueError(f"shards must be on one device, got {shards[0].device} and {shard.device}")


def check_numbers(dimension: int, seed: int, kind: str, offset: int) -> None:
    """Check what a random projection is made from."""
    for name, number in (("dimension", dimension), ("seed", seed), ("offset", offset)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    if not 0 <= offset < POSITIONS:
        raise ValueError(f"offset must be from 0 to 2**56 - 1, got {offset}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if kind == "sjlt":
        nonzeros_of(dimension)  # raises where there is no such number


def from_reference(shards: list[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    """The reference in the operator's result dtype."""
    return reference_sketch(shards, dimension, seed, kind, offset).to(accumulation_dtype(*shards))


def _dispatch(shards: list[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    function = implementation("sketch", shards[0].device.type)
    result: Tensor = function(shards, dimension, seed, kind, offset)
    return result


def _fake(shards: list[Tensor], dimension: int, seed: int, kind: str, offset: int) -> Tensor:
    return shards[0].new_empty(shards[0].shape[0], dimension, dtype=accumulation_dtype(*shards))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shards, _, ctx.seed, ctx.kind, ctx.offset = inputs
    ctx.shards = [(shard.shape[1], shard.dtype) for shard in shards]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """``dv_i = Pᵀ dS_i``, shard by shard."""
    grads, offset = [], ctx.offset
    for positions, dtype in ctx.shards:
        back = torch.ops.fastproj.sketch_transposed(grad, positions, ctx.seed, ctx.kind, offset)
        grads.append(back.to(dtype))
        offset += positions
    return grads, None, None, None, None


def _transposed(grad: Tensor, positions: int, seed: int, kind: str, offset: int) -> Tensor:
    """``grad P`` for the columns from ``offset`` on: these are the sketches of unit vectors."""
    function = implementation("sketch", grad.device.type)
    out = grad.new_empty(grad.shape[0], positions)
    for first in range(0, positions, COLUMNS):
        units = torch.eye(min(COLUMNS, positions - first), dtype=grad.dtype, device=grad.device)
        columns = function([units], grad.shape[1], seed, kind, offset + first)
        out[:, first : first + COLUMNS] = grad @ columns.T
    return out


def _transposed_fake(grad: Tensor, positions: int, seed: int, kind: str, offset: int) -> Tensor:
    return grad.new_empty(grad.shape[0], positions)


def _transposed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, ctx.seed, ctx.kind, ctx.offset = inputs
    ctx.dimension = grad.shape[1]


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    back = torch.ops.fastproj.sketch([grad], ctx.dimension, ctx.seed, ctx.kind, ctx.offset)
    return back, None, None, None, None


define("sketch(Tensor[] shards, int dimension, int seed, str kind, int offset) -> Tensor", _dispatch, _fake)
define(
    "sketch_transposed(Tensor grad, int positions, int seed, str kind, int offset) -> Tensor",
    _transposed,
    _transposed_fake,
)
torch.library.register_autograd("fastproj::sketch", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd(
    "fastproj::sketch_transposed",
    _transposed_backward,
    setup_context=_transposed_context,
    lib=LIBRARY,
)
