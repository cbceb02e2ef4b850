"""Gradient sets that the span projections are tried on, the ways to call them, and what error is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from devices import DEVICE, GPU_MARKS
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bindings._library import implementation
from fastproj.reference.segments import Segmentation, Segments, per_element, row_shape, segmentation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON = pytest.param("triton", marks=GPU_MARKS)
PATHS = ("cpu", TRITON, pytest.param("public", marks=GPU_MARKS))
KERNELS = ("cpu", TRITON)

# LoRA factors, biases, scalars, rows on either side of the width below which they share a program, shards and
# rows of several blocks, empty ones.
SHAPES = (
    *(
        (16, 33),
        (40, 16),
        (16, 700),
        (5,),
        (2, 3, 4),
        (),
        (1,),
        (1500,),
        (0, 4),
        (3, 0),
        (0,),
        (7, 511),
        (1, 9),
    ),
    *((70, 130), (2, 5000), (300, 3)),
)


@dataclass(frozen=True, repr=False)
class Family:
    """K gradient sets of n shards and the segments to take them by."""

    sets: list[list[Tensor]]
    segments: Segments

    @property
    def flat(self) -> list[Tensor]:
        return [shard for shards in self.sets for shard in shards]

    @property
    def plan(self) -> Segmentation:
        return segmentation(self.sets[0], self.segments)

    def __repr__(self) -> str:
        """Shapes and dtypes: a falsifying example is read, not pasted."""
        sets = [
            [(tuple(s.shape), str(s.dtype).removeprefix("torch.")) for s in shards] for shards in self.sets
        ]
        return f"Family({sets}, segments={self.segments!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a dataclass otherwise is every field in full."""
        printer.text(repr(self))


def random_sets(
    num_sets: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    seed: int = 0,
    scale: float = 1.0,
) -> list[list[Tensor]]:
    """Normal values; set k's shard i has dtype ``dtypes[(k·n + i) % len]``. The sets overlap by a third."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sets = []
    for k in range(num_sets):
        own = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        sets.append(
            [
                ((a / 3 + b) * scale).to(dtypes[(k * len(shapes) + i) % len(dtypes)])
                for i, (a, b) in enumerate(zip(common, own, strict=True))
            ]
        )
    return sets


def strided(shards: Sequence[Tensor]) -> list[Tensor]:
    """The same values behind strides."""
    return [torch.stack([shard, torch.full_like(shard, 7.0)], dim=-1)[..., 0] for shard in shards]


def packed(shards: Sequence[Tensor]) -> list[Tensor]:
    """The same values as views into one flat buffer, off any alignment, as gradients lie in buckets."""
    buffer = torch.cat([torch.zeros(1, dtype=shards[0].dtype), *(shard.flatten() for shard in shards)])
    ends = torch.tensor([shard.numel() for shard in shards]).cumsum(0).tolist()
    return [
        buffer[1 + end - shard.numel() : 1 + end].view(shard.shape)
        for shard, end in zip(shards, ends, strict=True)
    ]


@st.composite
def families(draw: st.DrawFn, num_sets: int | None = None, row_only: bool = False) -> Family:
    """One to six shards of any shape, dtypes mixed within and across sets or all alike, any segments."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    sets = num_sets or draw(st.integers(1, 4))
    total = sets * len(shapes)
    alike = st.sampled_from(DTYPES).map(lambda dtype: [dtype])
    mixed = st.lists(st.sampled_from(DTYPES), min_size=total, max_size=total)
    dtypes = draw(st.one_of(alike, mixed))
    count = draw(st.integers(1, len(shapes)))
    ids = draw(st.permutations([i % count for i in range(len(shapes))]))
    segments = "row" if row_only else draw(st.sampled_from(["global", "tensor", "row", tuple(ids)]))
    return Family(random_sets(sets, shapes, dtypes, seed=draw(st.integers(0, 99))), segments)


def function_of(path: str, operator: str) -> Any:
    """The kernel of ``operator``: the CPU's fast path or the Triton launcher."""
    if path == "cpu":
        return implementation(operator, "cpu")
    return getattr(import_module(f"fastproj.kernels.{operator}"), operator)


def device_of(path: str) -> torch.device:
    """Where the path runs: the CPU's fast path always on the CPU."""
    return torch.device("cpu") if path == "cpu" else DEVICE


def moved(shards: Sequence[Tensor], path: str) -> list[Tensor]:
    return [shard.to(device_of(path)) for shard in shards]


def poisoned(shards: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
    """Output buffers full of NaN, so that an element nobody writes shows."""
    dtypes = dtypes or [shard.dtype for shard in shards]
    return [
        torch.full_like(shard, torch.nan, dtype=dtype) for shard, dtype in zip(shards, dtypes, strict=True)
    ]


def eager_gram(family: Family) -> Tensor:
    """Inner products in fp32 as anyone would write them, ``x @ y`` (fp64 where a shard is fp64).

    How far these are off is the processor's: its BLAS adds up thousands of products in as few as eight lanes.
    """
    plan, num_sets = family.plan, len(family.sets)
    out = torch.zeros(plan.count, num_sets, num_sets, dtype=torch.float64)
    for at, first in zip(zip(*family.sets, strict=True), plan.first, strict=True):
        dtype = torch.float64 if any(shard.dtype == torch.float64 for shard in at) else torch.float32
        rows = row_shape(at[0])[0] if plan.rows else 1
        matrices = [shard.to(dtype).reshape(rows, at[0].numel() // max(rows, 1)) for shard in at]
        for a, left in enumerate(matrices):
            for b, right in enumerate(matrices):
                for row in range(rows):
                    out[first + row, a, b] += float(left[row] @ right[row])
    return out


def eager_combine(family: Family, coefficients: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """``Σ_k c_k x_k`` with every product and sum rounded to the result's dtype."""
    plan, out = family.plan, []
    for at, first, dtype in zip(zip(*family.sets, strict=True), plan.first, dtypes, strict=True):
        total = torch.zeros_like(at[0], dtype=dtype)
        for k, shard in enumerate(at):
            column = per_element(coefficients[:, k], shard, first, plan.rows)
            total = total + column.to(dtype) * shard.to(dtype)
        out.append(total)
    return out


def accumulation_eps(shards: Sequence[Tensor]) -> float:
    """Products are taken in fp64 where every shard is fp64, and no worse than fp32 elsewhere."""
    return torch.finfo(torch.float64 if all(s.dtype == torch.float64 for s in shards) else torch.float32).eps


def assert_as_good_as_eager(
    got: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    magnitude: Sequence[Tensor],
    eps: float,
) -> None:
    """Errors stay within 4 × those of the same formula written eagerly in the shards' own precision.

    Eager code is lucky on few elements, hence the rest: one eps of the result's dtype for its one rounding
    (half in compiled code; the interpreter cuts bf16 off), and 8 ``eps`` (that of the accumulation) of
    ``magnitude`` = Σ|c_k x_k| for the products and the coefficients.
    """
    worst = max((_largest(e.double() - w) for e, w in zip(eager, exact, strict=True)), default=0.0)
    largest = max((_largest(m) for m in magnitude), default=0.0)
    for value, want in zip(got, exact, strict=True):
        assert value.shape == want.shape
        assert not value.isnan().any() or want.isnan().any()
        info = torch.finfo(value.dtype)
        allowed = 4 * worst + 8 * eps * largest + info.eps * _largest(want) + info.smallest_normal * info.eps
        assert _largest(value.cpu().double() - want) <= allowed


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
