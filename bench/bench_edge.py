"""EDGE: the projection against memory bandwidth and hand-written ones, the step against plain training.

Every figure is a ratio of runs that lie side by side in one process::

    pytest bench/bench_edge.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.bench.baselines import Triad, clone_and_unflatten, flatten_and_concatenate, foreach
from fastproj.bench.report import publish
from fastproj.bench.steps import MODELS, step_contenders
from fastproj.bench.workloads import WORKLOADS, gradient_set
from fastproj.paired import paired_rounds
from fastproj.reference.recipes import row_by_row

Projection = Callable[[list[Tensor], list[Tensor]], object]
COMMAND = "pytest bench/bench_edge.py --benchmark-only -s"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Each set read for the Gram, each read again and one written for the combination, in fp32.
BYTES_PER_ELEMENT = 5 * 4
# Too long for any cache, as STREAM asks; a small workload of its own may well fit one.
TRIAD_ELEMENTS = 40_000_000


OTHERS: tuple[Projection, ...] = (foreach, flatten_and_concatenate, clone_and_unflatten)


def published(erm: list[Tensor], gce: list[Tensor], alpha: float = 1.0) -> None:
    """The authors' loop over rows; another formula, timed for what it costs."""
    for e, g in zip(erm, gce, strict=True):
        e.copy_(row_by_row(e, g, alpha))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_projection(benchmark: Any, workload: str, threads: int, device: str) -> None:
    """Contenders share the sets: a projection's time does not depend on the values."""
    if threads > 1 and device != "cpu":
        pytest.skip("threads are the CPU's")
    torch.set_num_threads(threads)
    erm, gce = (gradient_set(WORKLOADS[workload], seed, device) for seed in (0, 1))
    check_agreement(erm, gce)
    elements = sum(shard.numel() for shard in erm)
    triad = Triad(TRIAD_ELEMENTS, device)
    contenders: dict[str, Callable[[], object]] = {
        "fastproj.edge_": lambda: fastproj.edge_(erm, gce, alpha=1e-3),
        "memory triad": triad,
        "foreach": partial(foreach, erm, gce, 1e-3),
        "flatten and concatenate": partial(flatten_and_concatenate, erm, gce, 1e-3),
        "clone and unflatten": partial(clone_and_unflatten, erm, gce, 1e-3),
    }
    small = elements < 10**6
    timings = paired_rounds(contenders, rounds=101 if small else 15)
    slow = paired_rounds(
        {
            "fastproj.edge_": contenders["fastproj.edge_"],
            "published row loop": partial(published, erm, gce, 1e-3),
        },
        rounds=5 if small else 1,
        warmup=0,
    )
    timings["published row loop"] = slow["published row loop"]
    memory = triad.bytes / timings["memory triad"].seconds
    rows = []
    for name, timing in timings.items():
        moved = triad.bytes if name == "memory triad" else elements * BYTES_PER_ELEMENT
        rate = moved / timing.seconds
        rows.append(
            {
                "contender": name,
                "ms": f"{timing.seconds * 1e3:.2f}",
                "× fastproj": f"{timing.ratio:.2f}",
                "of triad bandwidth": f"{rate / memory:.2f}"
                if name in ("fastproj.edge_", "memory triad")
                else "",
            }
        )
    publish(benchmark, f"EDGE projection, {workload}, {device}, {threads} threads", rows, COMMAND)
    benchmark.pedantic(contenders["fastproj.edge_"], rounds=5)


def check_agreement(erm: list[Tensor], gce: list[Tensor]) -> None:
    """A fast wrong answer is no contender: each against the closed form in fp64."""
    norms = [torch.stack([shard.double().norm() for shard in own]).norm() for own in (erm, gce)]
    ratio = norms[1] / norms[0]
    expected = [
        ((1 + ratio / 2) * e.double() - g.double() / 2).float() for e, g in zip(erm, gce, strict=True)
    ]
    # The package sums in blocks; the others keep one fp32 sum over up to 40 million products.
    for contender in (fastproj.edge_, *OTHERS):
        tolerance = 1e-2 if contender in OTHERS else 1e-5
        got = [shard.clone() for shard in erm]
        contender(got, gce)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_training_step(benchmark: Any, name: str) -> None:
    """Forward, backward and projection; the optimiser, the same for all, is left out."""
    torch.set_num_threads(1)
    contenders = step_contenders(name)
    timings = paired_rounds(contenders, rounds=15)
    rows = [
        {"contender": contender, "ms": f"{t.seconds * 1e3:.0f}", "× ERM step": f"{t.ratio:.3f}"}
        for contender, t in timings.items()
    ]
    publish(benchmark, f"Training step, {name}, 1 thread", rows, COMMAND)
    benchmark.pedantic(contenders["EDGE, one pass"], rounds=3)
