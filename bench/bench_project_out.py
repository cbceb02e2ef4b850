"""Subspace projections of single workloads: the operator against the obvious ways, in one run::

pytest bench/bench_project_out.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj import Basis
from fastproj.bench.report import publish
from fastproj.bindings.project_out import Side
from fastproj.paired import paired_rounds

COMMAND = "pytest bench/bench_project_out.py --benchmark-only -s"
RANKS = (1, 4, 16)


@dataclass(frozen=True)
class Case:
    """So many shards of one shape, each with a basis of its own."""

    count: int
    shape: tuple[int, int]
    side: Side
    dtype: torch.dtype = torch.float32

    def make(self, rank: int, device: str) -> tuple[list[Tensor], list[Basis]]:
        """Standard normal shards and random directions."""
        generator = torch.Generator().manual_seed(0)
        length = self.shape[0] if self.side == "left" else self.shape[1]
        shards = [torch.randn(self.shape, generator=generator) for _ in range(self.count)]
        bases = [
            fastproj.orthonormalize(torch.randn(length, rank, generator=generator)) for _ in range(self.count)
        ]
        return [shard.to(device, self.dtype) for shard in shards], [basis.to(device) for basis in bases]


CASES = {
    "stream gradient (8, 128, 2048), rows": Case(1, (1024, 2048), "right"),
    "stream gradient (8, 128, 2048) in bf16, rows": Case(1, (1024, 2048), "right", torch.bfloat16),
    "dense weight (2048, 2048), columns": Case(1, (2048, 2048), "left"),
    "36 LoRA shards (8, 384), rows": Case(36, (8, 384), "right"),
    "36 LoRA shards (384, 8), columns": Case(36, (384, 8), "left"),
}


def allocating(shards: list[Tensor], bases: list[Basis], side: Side) -> list[Tensor]:
    """The formula, shard by shard, in fp32."""
    out = []
    for shard, basis in zip(shards, bases, strict=True):
        wide, v = shard.float(), basis.matrix
        projected = wide - v @ (v.T @ wide) if side == "left" else wide - (wide @ v) @ v.T
        out.append(projected.to(shard.dtype))
    return out


def in_place(shards: list[Tensor], bases: list[Basis], side: Side) -> None:
    """The formula, shard by shard, in fp32, in the shards' memory."""
    for shard, basis in zip(shards, bases, strict=True):
        wide, v = shard.float(), basis.matrix
        wide -= v @ (v.T @ wide) if side == "left" else (wide @ v) @ v.T
        if wide is not shard:
            shard.copy_(wide)


def expanded(shards: list[Tensor], projectors: list[Tensor], side: Side) -> list[Tensor]:
    """``G (I − V Vᵀ)`` with the d×d matrix made beforehand, in the shards' own dtype."""
    return [p @ g if side == "left" else g @ p for g, p in zip(shards, projectors, strict=True)]


@pytest.mark.parametrize("device", ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
@pytest.mark.parametrize("name", CASES)
def test_project_out(benchmark: Any, name: str, device: str) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    rows = [row for rank in RANKS for row in compared(case, rank, device)]
    publish(benchmark, f"Projection of {name}, {device}, 1 thread", rows, COMMAND)
    shards, bases = case.make(1, device)
    benchmark.pedantic(lambda: fastproj.project_out_(shards, bases, side=case.side), rounds=5)


def compared(case: Case, rank: int, device: str) -> list[dict[str, str]]:
    """One row for each contender; projections repeat on the same shards, which costs the same each time."""
    shards, bases = case.make(rank, device)
    side = case.side
    projectors = [
        (torch.eye(basis.dimension, device=device) - basis.matrix @ basis.matrix.T).to(case.dtype)
        for basis in bases
    ]
    check_agreement(case, shards, bases, projectors)
    contenders: dict[str, Callable[[], object]] = {
        "fastproj.project_out_": lambda: fastproj.project_out_(shards, bases, side=side),
        "fastproj.project_out": lambda: fastproj.project_out(shards, bases, side=side),
        "loop, in place": lambda: in_place(shards, bases, side),
        "loop, allocating": lambda: allocating(shards, bases, side),
    }
    timings = paired_rounds(contenders, rounds=201 if case.count > 1 else 41)
    # Apart from the others: its matrices push out of the caches what the next contender needs.
    timings["loop, d×d projector"] = paired_rounds(
        {"first": contenders["fastproj.project_out_"], "other": lambda: expanded(shards, projectors, side)},
        rounds=3,
        warmup=1,
    )["other"]
    return [
        {
            "contender": label,
            "rank": str(rank),
            "ms": f"{timing.seconds * 1e3:.3g}",
            "× fastproj": f"{timing.ratio:.2f}",
        }
        for label, timing in timings.items()
    ]


def check_agreement(case: Case, shards: list[Tensor], bases: list[Basis], projectors: list[Tensor]) -> None:
    """A fast wrong answer is no contender: each against the formula in fp64."""
    expected = []
    for shard, basis in zip(shards, bases, strict=True):
        wide, v = shard.double(), basis.matrix.double()
        expected.append(wide - v @ (v.T @ wide) if case.side == "left" else wide - (wide @ v) @ v.T)
    written = [[shard.clone() for shard in shards] for _ in range(2)]
    fastproj.project_out_(written[0], bases, side=case.side)
    in_place(written[1], bases, case.side)
    # Values of order one, rounded once (bf16 to 2⁻⁸), after sums of 2,048 products in fp32.
    once = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    for got in (
        *written,
        fastproj.project_out(shards, bases, side=case.side),
        allocating(shards, bases, case.side),
    ):
        close(got, expected, once)
    # The projector too is rounded to bf16, in each of 2,048 products.
    close(expanded(shards, projectors, case.side), expected, 5 * once)


def close(got: Any, expected: list[Tensor], tolerance: float) -> None:
    """Shard by shard, in fp64."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
