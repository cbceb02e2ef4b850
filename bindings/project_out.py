"""Projection of gradient shards onto the complement of a subspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fastproj.bindings._library import LIBRARY, define, implementation
from fastproj.bindings._sets import GradientSets, gradient_sets, requires_grad
from fastproj.bindings.combine import check_aliases
from fastproj.reference.basis import Basis, orthonormalize
from fastproj.reference.project_out import project_out as reference_project_out
from fastproj.reference.segments import row_shape

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")
Span = Basis | Tensor


def project_out(
    shards: Sequence[Tensor | None], basis: Span | Sequence[Span | None], *, side: Side
) -> list[Tensor | None]:
    """``G − (G V) Vᵀ`` (right) or ``G − U (Uᵀ G)`` (left) for every shard G: what lies outside the subspace.

    Args:
        shards: n tensors, fp32, bf16, fp16 or fp64, of any strides; None is passed through. A shard counts
            as a matrix, its first dimension against the rest; a vector is one row (right) or column (left).
        basis: one :class:`fastproj.Basis` for all shards, or one for each (None leaves its shard as it is).
            A plain tensor (d, k) or (d,) is orthonormalised in this call; do it once by
            :func:`fastproj.orthonormalize` where speed or ``torch.compile(fullgraph=True)`` matters.
        side: ``"right"`` projects rows, whose length must be d; ``"left"`` columns.

    Returns:
        n new tensors of the shards' shapes and dtypes, None where the shard is None. Half and single
        precision are projected in fp32 and rounded once, fp64 in fp64. NaN or Inf leave nothing finite in
        their own row (right) or column (left), and touch no other.

    Raises:
        TypeError: shards that are no floating-point tensors, or DTensors; a basis of another type.
        ValueError: an unknown side; a number of bases other than n; a basis whose d, or device, is not its
            shard's; and what :func:`fastproj.orthonormalize` refuses.

    Differentiable in the shards, in which it is linear, and not in the basis.
    Meaning: ``fastproj.reference.project_out``.
    """
    checked, bases, owner = _check(shards, basis, side)
    if not checked.shards:
        return checked.restore([])
    projected: list[Tensor] = torch.ops.fastproj.project_out(checked.shards, bases, owner, side == "left")
    return checked.restore(projected)


def project_out_(shards: Sequence[Tensor | None], basis: Span | Sequence[Span | None], *, side: Side) -> None:
    """``G ← G − (G V) Vᵀ`` (right) or ``G ← G − U (Uᵀ G)`` (left), each shard in its own memory.

    Arguments and errors are those of :func:`project_out`; a tensor may not stand at two positions.
    Not differentiable: ValueError where autograd would have to record it.
    """
    checked, bases, owner = _check(shards, basis, side)
    if requires_grad(checked.shards):
        raise ValueError("project_out_ is not differentiable; call it under torch.no_grad(), or project_out")
    if checked.shards:
        pointers = [shard.data_ptr() for shard in checked.shards if shard.numel()]
        if len(set(pointers)) < len(pointers):
            check_aliases(checked.shards, checked.shards, "shards")
        torch.ops.fastproj.project_out_(checked.shards, bases, owner, side == "left")


def project_out_stream(delta: Tensor, basis: Span) -> Tensor:
    """``δ − (δ V) Vᵀ`` for the gradient of a residual stream, token by token.

    ``delta`` is (…, d), usually (B, T, d); ``basis`` spans directions of length d. Dtypes, errors and
    differentiability are those of :func:`project_out` from the right.
    """
    if not isinstance(delta, Tensor) or not delta.dim():
        came = "a scalar" if isinstance(delta, Tensor) else type(delta).__name__
        raise TypeError(f"delta must be a tensor of one dimension or more, got {came}")
    flat = delta.reshape(-1, delta.shape[-1]) if delta.numel() else delta.reshape(0, delta.shape[-1])
    projected = cast(Tensor, project_out([flat], basis, side="right")[0])
    return projected.reshape(delta.shape)


def _check(
    shards: Sequence[Tensor | None], basis: Span | Sequence[Span | None], side: str
) -> tuple[GradientSets, list[Tensor], list[int]]:
    """The shards that are there, the distinct bases, and which of them (or −1) projects each shard."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    checked = gradient_sets([shards], "global", names=["shards"])
    spans: Sequence[Span | None]
    if isinstance(basis, (Basis, Tensor)):
        one = _as_basis(basis)
        spans = [one] * checked.length
    elif isinstance(basis, Sequence) and not isinstance(basis, str):
        spans = basis
    else:
        raise TypeError(f"basis must be a Basis, a tensor or a list of them, got {type(basis).__name__}")
    if len(spans) != checked.length:
        raise ValueError(f"expected one basis, or one for each of {checked.length} shards, got {len(spans)}")
    bases: list[Tensor] = []
    owner: list[int] = []
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    long_dimension = 0 if side == "left" else 1
    device = checked.shards[0].device if checked.shards else None
    for position, shard in zip(checked.present, checked.shards, strict=True):
        span = spans[position]
        if span is None:
            owner.append(-1)
            continue
        number = numbers.get(id(span))
        if number is None:
            number = numbers[id(span)] = len(bases)
            bases.append(_as_basis(span).matrix)
            # No shard has the size of a basis that is elsewhere: the full check then says so.
            sizes.append(bases[-1].shape[0] if bases[-1].device == device else -1)
        owner.append(number)
        if shard.dim() != 2 or shard.size(long_dimension) != sizes[number]:
            _check_fit(position, shard, bases[number], side)
    return checked, bases, owner


def _as_basis(span: Span) -> Basis:
    if isinstance(span, Basis):
        return span
    if isinstance(span, Tensor):
        return orthonormalize(span)
    raise TypeError(f"a basis must be a Basis or a tensor, got {type(span).__name__}")


def _check_fit(position: int, shard: Tensor, basis: Tensor, side: str) -> None:
    if not shard.dim():
        raise ValueError(f"shard {position} is a scalar, which has neither rows nor columns")
    rows, columns = row_shape(shard)
    if side == "left":
        length = shard.shape[0]
    else:
        length = columns if rows else shard[:1].numel() if shard.dim() < 2 else shard.shape[1:].numel()
    if length != basis.shape[0]:
        what = "columns" if side == "left" else "rows"
        raise ValueError(
            f"the basis of shard {position} has vectors of length {basis.shape[0]}, but the shard's {what} "
            f"have length {length}: shape {tuple(shard.shape)}"
        )
    if shard.device != basis.device:
        raise ValueError(f"the basis of shard {position} is on {basis.device}, the shard on {shard.device}")


def from_reference(
    shards: list[Tensor], bases: list[Tensor], owner: Sequence[int], left: bool, out: list[Tensor]
) -> None:
    """The reference under the operator's plain arguments."""
    for target, value in zip(out, reference_project_out(shards, bases, owner, left), strict=True):
        target.copy_(value)


def _dispatch_in_place(shards: list[Tensor], bases: list[Tensor], owner: list[int], left: bool) -> None:
    implementation("project_out", shards[0].device.type)(shards, bases, owner, left, shards)


def _dispatch(shards: list[Tensor], bases: list[Tensor], owner: list[int], left: bool) -> list[Tensor]:
    out = _fake(shards, bases, owner, left)
    implementation("project_out", shards[0].device.type)(shards, bases, owner, left, out)
    return out


def _fake(shards: list[Tensor], bases: list[Tensor], owner: list[int], left: bool) -> list[Tensor]:
    return [torch.empty(shard.shape, dtype=shard.dtype, device=shard.device) for shard in shards]


def _fake_in_place(shards: list[Tensor], bases: list[Tensor], owner: list[int], left: bool) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, bases, ctx.owner, ctx.left = inputs
    ctx.save_for_backward(*bases)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """A projection is its own transpose."""
    bases = list(ctx.saved_tensors)
    projected = torch.ops.fastproj.project_out(grads, bases, ctx.owner, ctx.left)
    return projected, [None] * len(bases), None, None


define("project_out(Tensor[] shards, Tensor[] bases, int[] owner, bool left) -> Tensor[]", _dispatch, _fake)
define(
    "project_out_(Tensor(a!)[] shards, Tensor[] bases, int[] owner, bool left) -> ()",
    _dispatch_in_place,
    _fake_in_place,
)
torch.library.register_autograd("fastproj::project_out", _backward, setup_context=_setup_context, lib=LIBRARY)
