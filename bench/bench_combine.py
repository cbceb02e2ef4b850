"""Linear combinations of gradient sets: the operator against multi-tensor functions and a loop, in one run::

pytest bench/bench_combine.py --benchmark-only -s
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.bench.report import publish
from fastproj.bench.workloads import WORKLOADS, gradient_set
from fastproj.paired import paired_rounds


def multi_tensor(sets: list[list[Tensor]], coefficients: list[float], out: list[Tensor]) -> None:
    """One sweep over everything for each set."""
    torch._foreach_copy_(out, sets[0])
    torch._foreach_mul_(out, coefficients[0])
    for c, own in zip(coefficients[1:], sets[1:], strict=True):
        torch._foreach_add_(out, own, alpha=c)


def shard_loop(sets: list[list[Tensor]], coefficients: list[float], out: list[Tensor]) -> None:
    """The formula, shard by shard."""
    for target, *at in zip(out, *sets, strict=True):
        target.copy_(sum(c * shard for c, shard in zip(coefficients, at, strict=True)))


@pytest.mark.parametrize("device", ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
@pytest.mark.parametrize("num_sets", [2, 4])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_combine(benchmark: Any, workload: str, num_sets: int, device: str) -> None:
    torch.set_num_threads(1)
    sets = [gradient_set(WORKLOADS[workload], seed, device) for seed in range(num_sets)]
    values = [1.5, -0.5, 0.25, 2.0][:num_sets]
    coefficients = torch.tensor([values], dtype=torch.float64, device=device)
    out = [torch.empty_like(shard) for shard in sets[0]]
    expected = fastproj.combine(sets, coefficients)
    for other in (multi_tensor, shard_loop):
        other(sets, values, out)
        # A few fp32 roundings of values of order one.
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    contenders = {
        "fastproj.combine": lambda: fastproj.combine(sets, coefficients, out=out),
        "multi-tensor functions": lambda: multi_tensor(sets, values, out),
        "shard loop": lambda: shard_loop(sets, values, out),
    }
    timings = paired_rounds(contenders, rounds=15)
    rows = [
        {"contender": name, "ms": f"{t.seconds * 1e3:.2f}", "× fastproj": f"{t.ratio:.2f}"}
        for name, t in timings.items()
    ]
    title = f"Combination of {num_sets} sets, {workload}, {device}, 1 thread"
    publish(benchmark, title, rows, "pytest bench/bench_combine.py --benchmark-only -s")
    benchmark.pedantic(contenders["fastproj.combine"], rounds=5)
