"""Validation of gradient sets, shared by the span projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastproj.bindings._library import KERNEL_DTYPES
from fastproj.reference.segments import Segmentation, Segments, segmentation


@dataclass(frozen=True)
class GradientSets:
    """K gradient sets without their missing shards, flattened set by set as the operators take them."""

    shards: list[Tensor]
    num_sets: int
    present: tuple[int, ...]
    length: int
    first: list[int]
    rows: bool
    count: int

    def restore(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Put one set's tensors back where they came from, None where every set had None."""
        out: list[Tensor | None] = [None] * self.length
        for position, tensor in zip(self.present, tensors, strict=True):
            out[position] = tensor
        return out


def gradient_sets(
    sets: Sequence[Sequence[Tensor | None]], segments: Segments, names: Sequence[str] | None = None
) -> GradientSets:
    """Check K gradient sets against each other and drop the positions where all of them have None.

    Raises TypeError for what is not a floating-point tensor, ValueError for sets of different lengths and
    shards of different shape or device, or None in some sets only.
    """
    names = names or [f"set {k}" for k in range(len(sets))]
    sets = [_as_list(shards, name) for shards, name in zip(sets, names, strict=True)]
    if not sets:
        raise ValueError("expected at least one gradient set, got none")
    lengths = [len(shards) for shards in sets]
    if len(set(lengths)) > 1:
        described = ", ".join(f"{name} has {length}" for name, length in zip(names, lengths, strict=True))
        raise ValueError(f"gradient sets must have the same number of shards: {described}")
    present = tuple([i for i, at in enumerate(zip(*sets, strict=True)) if _fit(at) or _check(i, at, names)])
    plan = segmentation(sets[0], segments)
    shards = [cast(Tensor, s[i]) for s in sets for i in present]
    if len({shard.device for shard in shards}) > 1:
        raise ValueError(f"all shards must be on one device, got {sorted({str(s.device) for s in shards})}")
    first = [plan.first[i] for i in present]
    return GradientSets(shards, len(sets), present, lengths[0], first, plan.rows, plan.count)


def _as_list(shards: Sequence[Tensor | None], name: str) -> list[Tensor | None]:
    if isinstance(shards, Tensor) or not isinstance(shards, Sequence):
        raise TypeError(f"{name} must be a list of tensors, got {type(shards).__name__}")
    return list(shards)


def _fit(shards: Sequence[Tensor | None]) -> bool:
    """Whether the shards at one position are all there and fit each other: the quick way through."""
    head = shards[0]
    if not isinstance(head, Tensor):
        return False
    shape = head.shape
    return all(
        isinstance(shard, Tensor)
        and shard.shape == shape
        and shard.dtype in KERNEL_DTYPES
        and shard.layout == torch.strided
        and not hasattr(shard, "device_mesh")
        for shard in shards
    )


def _check(index: int, shards: Sequence[Tensor | None], names: Sequence[str]) -> bool:
    """Whether shard ``index`` is there in every set; raises where the sets do not fit each other."""
    for shard, name in zip(shards, names, strict=True):
        if shard is None:
            continue
        if not isinstance(shard, Tensor):
            raise TypeError(f"shard {index} of {name} must be a tensor or None, got {type(shard).__name__}")
        if shard.dtype not in KERNEL_DTYPES:
            raise TypeError(f"shard {index} of {name} must be fp32, bf16, fp16 or fp64, got {shard.dtype}")
        if shard.layout != torch.strided:
            raise TypeError(f"shard {index} of {name} must be dense, got {shard.layout}")
        if hasattr(shard, "device_mesh"):
            raise TypeError(f"shard {index} of {name} must be a plain tensor, got a DTensor: pass to_local()")
    missing = [name for shard, name in zip(shards, names, strict=True) if shard is None]
    if missing and len(missing) < len(shards):
        raise ValueError(
            f"shard {index} is None in {', '.join(missing)} only; it must be None in all sets or in none"
        )
    shapes = [tuple(shard.shape) for shard in shards if shard is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"shard {index} has different shapes in the sets: {', '.join(map(str, shapes))}")
    return not missing


def split_sets(shards: Sequence[Tensor], num_sets: int) -> list[list[Tensor]]:
    """The flattened shards as one list per set."""
    n = len(shards) // num_sets
    return [list(shards[k * n : (k + 1) * n]) for k in range(num_sets)]


def requires_grad(shards: Sequence[Tensor]) -> bool:
    """Whether autograd has to see this call."""
    return torch.is_grad_enabled() and any(shard.requires_grad for shard in shards)


def plan_of(first: Sequence[int], rows: bool, count: int) -> Segmentation:
    """The operators' plain arguments as the reference takes them."""
    return Segmentation(tuple(first), rows, count)
