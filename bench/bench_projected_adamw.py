"""Projection and AdamW in one sweep, against the two one after the other, in one run::

pytest bench/bench_projected_adamw.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastproj
from fastproj.bench.report import publish
from fastproj.bench.traffic.projected_adamw import separate_bytes
from fastproj.bench.traffic.span import set_bytes
from fastproj.bench.workloads import WORKLOADS, gradient_set
from fastproj.bindings.edge import closed_form
from fastproj.optim import ProjectedAdamW
from fastproj.paired import paired_rounds

COMMAND = "pytest bench/bench_projected_adamw.py --benchmark-only -s"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE = 1e-4


class Edge:
    """EDGE's coefficients of two gradient sets."""

    granularity = "global"

    def coefficients(self, gram: Tensor, **_: Any) -> Tensor:
        return closed_form(gram, [], 1.0, "paper", "propagate")


class Step:
    """Parameters, a gradient in each, a second set, and an optimiser over them, all of its own."""

    def __init__(self, workload: str, dtype: torch.dtype, device: str, fused_step: bool) -> None:
        erm, self.gce, values = (
            [shard.to(dtype) for shard in gradient_set(WORKLOADS[workload], seed, device)]
            for seed in range(3)
        )
        self.parameters = [nn.Parameter(value) for value in values]
        self.erm = erm
        self.optimizer: Any = (
            ProjectedAdamW(self.parameters, lr=RATE, project=Edge())
            if fused_step
            else torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        )
        self.out = [] if fused_step else [torch.empty_like(shard) for shard in erm]

    def give(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def one_sweep(self) -> None:
        self.give(self.erm)
        self.optimizer.step(sets=[self.gce])

    def projection_then_step(self) -> None:
        """Gram, coefficients, and a combination in a buffer that stays; e is left as it is."""
        sets = [self.erm, self.gce]
        fastproj.combine(sets, Edge().coefficients(fastproj.gram(sets)), out=self.out)
        self.give(self.out)
        self.optimizer.step()

    def flattened_projection_then_step(self) -> None:
        """The projection as it is often written: everything in one vector, and back."""
        e, g = (torch.cat([shard.reshape(-1) for shard in own]) for own in (self.erm, self.gce))
        ratio = torch.linalg.vector_norm(g) / torch.linalg.vector_norm(e)
        projected = (1 + ratio / 2) * e - g / 2
        sizes = [shard.numel() for shard in self.erm]
        parts = zip(projected.split(sizes), self.erm, strict=True)
        self.give([part.view(shard.shape) for part, shard in parts])
        self.optimizer.step()


def check_agreement(ours: Step, other: Step, tolerance: float) -> None:
    """By the moments after one step: a parameter's first step is of one size, and hides a wrong scale."""
    for name in ("exp_avg", "exp_avg_sq"):
        got, want = (
            [step.optimizer.state[parameter][name] for parameter in step.parameters] for step in (ours, other)
        )
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_step(benchmark: Any, workload: str, dtype: str, device: str) -> None:
    torch.set_num_threads(1)
    ours, theirs, loop = (Step(workload, DTYPES[dtype], device, own) for own in (True, False, False))
    contenders: dict[str, Callable[[], object]] = {
        "ProjectedAdamW": ours.one_sweep,
        "projection, then AdamW(fused=True)": theirs.projection_then_step,
        "flattened projection, then AdamW(fused=True)": loop.flattened_projection_then_step,
    }
    for call in contenders.values():
        call()
    check_agreement(ours, theirs, 4 * torch.finfo(DTYPES[dtype]).eps)
    # One sum in the dtype itself over up to 40 million squares.
    check_agreement(ours, loop, 1e-2 if dtype == "fp32" else 5e-2)
    small = sum(shard.numel() for shard in ours.erm) < 10**6
    timings = paired_rounds(contenders, rounds=101 if small else 15)
    state: list[list[Tensor]] = [[parameter.detach() for parameter in ours.parameters]] * 3
    sets = [ours.erm, ours.gce]
    # The Gram reads both sets once more, whichever way it goes on.
    moved = {"ProjectedAdamW": 2 * set_bytes(sets) + 2 * set_bytes(state)}
    moved["projection, then AdamW(fused=True)"] = set_bytes(sets) + separate_bytes(sets, state, ours.erm)
    rows = [
        {
            "contender": name,
            "ms": f"{timing.seconds * 1e3:.2f}",
            "× fastproj": f"{timing.ratio:.2f}",
            "least MB": f"{moved[name] / 1e6:.0f}" if name in moved else "",
        }
        for name, timing in timings.items()
    ]
    publish(benchmark, f"Projection and AdamW, {workload}, {dtype}, {device}, 1 thread", rows, COMMAND)
    benchmark.pedantic(ours.one_sweep, rounds=5)
