"""Gradient surgery of K sets of LoRA gradients: one call against TorchJD, loops and plain foreach::

pytest bench/bench_surgery.py --benchmark-only -s

TorchJD is measured where it is installed: ``pip install torchjd quadprog qpsolvers``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.bench.harness.case import WrongResultError
from fastproj.bench.report import publish
from fastproj.bench.surgery_contenders import (
    Orders,
    Sets,
    by_parameter,
    flatten_and_loop,
    foreach,
    has_torchjd,
    peak_memory,
    smollm2_shapes,
    torchjd_jac_to_grad,
    with_jacobians,
)
from fastproj.bench.workloads import WORKLOADS, gradient_set
from fastproj.integrations.torchjd import aggregator
from fastproj.paired import Timing, paired_rounds
from fastproj.surgery import PCGrad, UPGrad

COMMAND = "pytest bench/bench_surgery.py --benchmark-only -s"
SHAPES = {
    "SmolLM2-135M, r=8 on all linear layers": smollm2_shapes(),
    "Llama-2-7B, r=16 on all linear layers": WORKLOADS["Llama-2-7B, r=16 on all linear layers"],
}
# Loops over stacked gradients hold each set four times: eight of the larger model are 5 GB.
CASES = [(name, k) for name in SHAPES for k in (2, 4, 8, 16) if not (k > 8 and name.startswith("Llama"))]
FEW = 10**7  # elements a set, below which there are more rounds


def conflicting_sets(shapes: list[tuple[int, int]], num_sets: int) -> Sets:
    """Normal gradients of which each opposes the one before it: half of it is taken off."""
    sets = [gradient_set(shapes, seed) for seed in range(num_sets)]
    for own, before in zip(sets[1:], sets, strict=False):
        torch._foreach_add_(own, before, alpha=-0.5)
    return sets


@pytest.mark.parametrize(("workload", "num_sets"), CASES)
def test_pcgrad(benchmark: Any, workload: str, num_sets: int) -> None:
    torch.set_num_threads(1)
    sets = conflicting_sets(SHAPES[workload], num_sets)
    orders: Orders = [[(i + 1 + t) % num_sets for t in range(num_sets - 1)] for i in range(num_sets)]
    method = PCGrad(order=orders)
    out = [torch.empty_like(shard) for shard in sets[0]]
    contenders: dict[str, Callable[[], list[Any]]] = {
        "fastproj.project": partial(fastproj.project, sets, method),
        "fastproj.project, out=": partial(fastproj.project, sets, method, out=out),
        "plain foreach": partial(foreach, sets, orders),
    }
    slow: dict[str, Callable[[], list[Any]]] = {
        "flatten and loop": partial(flatten_and_loop, sets, orders),
    }
    if has_torchjd():
        # Its own PCGrad draws its orders; the time of one does not depend on them.
        own = import_module("torchjd.aggregation").PCGrad()
        parameters = with_jacobians(sets)
        for optimize in (False, True):
            name = f"torchjd jac_to_grad{', Gramian path' if optimize else ''}"
            check(torchjd_jac_to_grad(parameters, aggregator(method), optimize)(), sets, method, name)
            slow[name] = torchjd_jac_to_grad(parameters, own, optimize)
    for name, run in contenders.items():
        check(run(), sets, method, name)
    check(slow["flatten and loop"](), sets, method, "flatten and loop")
    slow["loop over parameters"] = partial(by_parameter, sets, orders)  # another method: one Gram for each
    timings = timed(contenders, slow, sum(shard.numel() for shard in sets[0]))
    publish(benchmark, f"PCGrad of {num_sets} sets, {workload}, cpu, 1 thread", rows(timings, sets), COMMAND)
    benchmark.pedantic(contenders["fastproj.project"], rounds=3)


@pytest.mark.parametrize(("workload", "num_sets"), CASES)
def test_upgrad(benchmark: Any, workload: str, num_sets: int) -> None:
    torch.set_num_threads(1)
    sets = conflicting_sets(SHAPES[workload], num_sets)
    contenders: dict[str, Callable[[], list[Any]]] = {
        "fastproj.project": partial(fastproj.project, sets, UPGrad()),
    }
    slow: dict[str, Callable[[], list[Any]]] = {}
    if has_torchjd():
        own = import_module("torchjd.aggregation").UPGrad()
        parameters = with_jacobians(sets)
        for optimize in (False, True):
            name = f"torchjd jac_to_grad{', Gramian path' if optimize else ''}"
            slow[name] = torchjd_jac_to_grad(parameters, own, optimize)
            check(slow[name](), sets, UPGrad(), name)
    check(contenders["fastproj.project"](), sets, UPGrad(), "fastproj.project")
    timings = timed(contenders, slow, sum(shard.numel() for shard in sets[0]))
    publish(benchmark, f"UPGrad of {num_sets} sets, {workload}, cpu, 1 thread", rows(timings, sets), COMMAND)
    benchmark.pedantic(contenders["fastproj.project"], rounds=3)


def check(got: list[Tensor], sets: Sets, method: Any, name: str) -> None:
    """A fast wrong answer is no contender: each against coefficients from a Gram matrix in fp64."""
    gram = torch.zeros(len(sets), len(sets), dtype=torch.float64)
    for at in zip(*sets, strict=True):
        flat = torch.stack([shard.view(-1) for shard in at]).double()
        gram += flat @ flat.mT
    weights = method.coefficients(gram[None])[0].tolist()
    error = square = 0.0
    for value, at in zip(got, zip(*sets, strict=True), strict=True):
        want = sum(weight * shard.double() for weight, shard in zip(weights, at, strict=True))
        error += float((value.double() - want).square().sum())
        square += float(want.square().sum())
    # Sums over 40 million products in fp32 are off by some tenths of a per cent, TorchJD's solver by 1e-4.
    if not error <= (1e-2) ** 2 * square:
        raise WrongResultError(f"{name} is off by {math.sqrt(error / square) if square else math.inf:.1e}")


def timed(
    contenders: dict[str, Callable[[], Any]], slow: dict[str, Callable[[], Any]], elements: int
) -> dict[str, tuple[Timing, int | None]]:
    """Time and growth in memory; the slow ones take fewer rounds against the first of the others."""
    first = next(iter(contenders))
    timings = paired_rounds(contenders, rounds=31 if elements < FEW else 7)
    if slow:
        both = {first: contenders[first], **slow}
        beside = paired_rounds(both, rounds=5 if elements < FEW else 2, warmup=int(elements < FEW))
        timings |= {name: beside[name] for name in slow}
    return {name: (t, peak_memory({**contenders, **slow}[name])) for name, t in timings.items()}


def rows(timings: dict[str, tuple[Timing, int | None]], sets: Sets) -> list[dict[str, str]]:
    """The table's rows; memory against that of the gradient sets."""
    inputs = sum(shard.numel() * shard.element_size() for own in sets for shard in own)
    return [
        {
            "contender": name,
            "ms": f"{t.seconds * 1e3:.2f}",
            "× fastproj": f"{t.ratio:.2f}",
            "memory, of the inputs": "" if grown is None else f"{grown / inputs:.2f}",
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        for name, (t, grown) in timings.items()
    ]
