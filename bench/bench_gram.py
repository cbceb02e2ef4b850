"""Gram matrices of gradient sets: the operator against a stacked product and against loops, in one run::

pytest bench/bench_gram.py --benchmark-only -s
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


def stacked_product(sets: list[list[Tensor]]) -> Tensor:
    """Flatten, concatenate and stack the sets, then one matrix product."""
    flat = torch.stack([torch.cat([shard.flatten() for shard in own]) for own in sets])
    return flat @ flat.T


def pairwise_loop(sets: list[list[Tensor]]) -> Tensor:
    """A dot product for each pair of sets and each shard."""
    out = torch.zeros(len(sets), len(sets))
    for a, left in enumerate(sets):
        for b, right in enumerate(sets):
            out[a, b] = sum((x * y).sum() for x, y in zip(left, right, strict=True))
    return out


@pytest.mark.parametrize("device", ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
@pytest.mark.parametrize("num_sets", [2, 4])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_gram(benchmark: Any, workload: str, num_sets: int, device: str) -> None:
    torch.set_num_threads(1)
    sets = [gradient_set(WORKLOADS[workload], seed, device) for seed in range(num_sets)]
    expected = fastproj.gram(sets)[0].to(torch.float32)
    for other in (stacked_product, pairwise_loop):
        # One fp32 sum over 40 million products, as the others keep it, is off by some tenths of a per cent;
        # off the diagonal sums cancel against norms of that size.
        scale = expected.diagonal().max().item()
        torch.testing.assert_close(other(sets).to(device), expected, rtol=1e-2, atol=1e-2 * scale)
    contenders = {
        "fastproj.gram": lambda: fastproj.gram(sets),
        "stacked product": lambda: stacked_product(sets),
        "pairwise loop": lambda: pairwise_loop(sets),
    }
    timings = paired_rounds(contenders, rounds=15)
    rows = [
        {"contender": name, "ms": f"{t.seconds * 1e3:.2f}", "× fastproj": f"{t.ratio:.2f}"}
        for name, t in timings.items()
    ]
    title = f"Gram of {num_sets} sets, {workload}, {device}, 1 thread"
    publish(benchmark, title, rows, "pytest bench/bench_gram.py --benchmark-only -s")
    benchmark.pedantic(contenders["fastproj.gram"], rounds=5)
