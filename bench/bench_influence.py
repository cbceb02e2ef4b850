"""Influence scores against training and other libraries; sketches against other projections.

Every figure comes from runs that lie side by side in one process, on one thread. Libraries that are not
installed beside the package (see ``bench/peers.py``) are left out::

    pytest bench/bench_influence.py --benchmark-only -s
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastproj
from fastproj.bench import peers
from fastproj.bench.report import publish
from fastproj.bench.scoring import (
    SAMPLES,
    WORKLOADS,
    Workload,
    adam_updates,
    adamw_after_a_step,
    cosines,
    flattened,
)
from fastproj.paired import paired_rounds
from fastproj.reference.sketch import KINDS

COMMAND = "pytest bench/bench_influence.py --benchmark-only -s"
Run = Callable[[], Tensor]
# What LESS and TRAK project to.
DIMENSION = 8192
# Vectors of a million, as the adapters of a small model have, and how many are projected in one call.
LENGTH, SKETCH, VECTORS = 10**6, 4096, 16
DENSE = ("rademacher", "gaussian")
ROUNDS = 9
# Of what takes seconds a sample, where no round changes the picture.
SLOW_ROUNDS = 2


@pytest.mark.parametrize("name", WORKLOADS)
def test_scoring(benchmark: Any, name: str) -> None:
    """From tokens to the scores of a batch's samples, or to their sketches where a contender makes those."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]()
    optimizer = adamw_after_a_step(workload)
    workload.step()
    gradients = {key: gradient.clone() for key, gradient in workload.gradients().items()}
    samples = workload.sample_gradients()
    results: dict[str, Tensor] = {}
    scores = own_scores(workload, optimizer) | other_scores(workload, optimizer, gradients)
    sketches = own_sketches(workload)
    quick = keeping(results, scores | sketches)
    loop = {"loop of backward passes": workload.sample_gradients}
    timings = paired_rounds({"training step": workload.step, **loop, **quick}, rounds=ROUNDS)
    slow = keeping(results, slow_scores(workload, gradients) | slow_sketches(workload))
    if slow:
        beside = paired_rounds({"training step": workload.step, **slow}, rounds=SLOW_ROUNDS, warmup=0)
        timings |= {label: beside[label] for label in slow}
    check_scores(results, workload, optimizer, samples, flattened(gradients.values()))
    rows = [
        {
            "contender": label,
            "samples per second": f"{SAMPLES / timing.seconds:.3g}",
            "of training's rate": f"{1 / timing.ratio:.3g}",
        }
        for label, timing in timings.items()
    ]
    rows += not_installed(rows[0])
    publish(benchmark, f"Influence scores, {name}, LoRA r=16, 1 thread", rows, COMMAND)
    benchmark.pedantic(scores["fastproj, exact"], rounds=3)


def own_scores(workload: Workload, optimizer: torch.optim.AdamW) -> dict[str, Run]:
    """The exact scorer, its probe the batch itself."""
    loader = [workload.batch]
    plain = fastproj.InfluenceScorer(workload.model, loss=workload.loss)
    adam = fastproj.InfluenceScorer(workload.model, optimizer, loss=workload.loss)
    references = plain.reference(loader)
    return {
        "fastproj, exact": lambda: plain.score(loader, references).values[:, 0],
        "fastproj, exact, Adam's update": lambda: adam.score(loader, references).values[:, 0],
    }


def own_sketches(workload: Workload) -> dict[str, Run]:
    """Sketches of every sample's gradient, of the kinds that are meant for long vectors."""
    scorer = fastproj.InfluenceScorer(workload.model, loss=workload.loss)

    def sketches(kind: str) -> Tensor:
        batches = scorer.sketch_batches([workload.batch], DIMENSION, kind=kind)
        return torch.cat([rows.values for rows in batches])

    return {f"fastproj, {kind} of {DIMENSION:,}": partial(sketches, kind) for kind in ("srht", "sjlt")}


def other_scores(
    workload: Workload, optimizer: torch.optim.AdamW, gradients: dict[str, Tensor]
) -> dict[str, Run]:
    """bergson without its projection: plain gradients, and divided by the root of Adam's second moment."""
    if not peers.has("bergson"):
        return {}
    moments = {key: optimizer.state[p]["exp_avg_sq"] for key, p in workload.parameters.items()}
    return {
        "bergson, exact": peers.bergson_scores(workload, gradients),
        "bergson, exact, over √v": peers.bergson_scores(workload, gradients, moments),
    }


def slow_scores(workload: Workload, gradients: dict[str, Tensor]) -> dict[str, Run]:
    """dattri without its projection."""
    if not peers.has("dattri"):
        return {}
    return {"dattri, exact": peers.dattri_scores(workload, flattened(gradients.values()))}


def slow_sketches(workload: Workload) -> dict[str, Run]:
    """Dense projections of gradients, by those libraries that are installed."""
    every = {
        "dattri": ("dattri, dense", peers.dattri_sketches),
        "bergson": ("bergson, dense", peers.bergson_sketches),
        "trak": ("loop with traker, dense", peers.loop_with_traker),
    }
    return {
        f"{label} to {DIMENSION:,}": run(workload, DIMENSION)
        for module, (label, run) in every.items()
        if peers.has(module)
    }


def keeping(results: dict[str, Tensor], runs: Mapping[str, Run]) -> dict[str, Callable[[], None]]:
    """The runs, each leaving its last result under its label: what was timed is what is checked."""

    def keep(label: str) -> None:
        results[label] = runs[label]()

    return {label: partial(keep, label) for label in runs}


def not_installed(row: Mapping[str, str]) -> list[dict[str, str]]:
    """A row of a table's columns for each library that is missing."""
    return [
        {**dict.fromkeys(row, "–"), "contender": f"{project}: not installed"} for project in peers.missing()
    ]


def check_scores(
    results: dict[str, Tensor],
    workload: Workload,
    optimizer: torch.optim.AdamW,
    samples: Tensor,
    reference: Tensor,
) -> None:
    """A fast wrong answer is no contender: each against a loop of backward passes, contracted in fp64."""
    expected = cosines(samples, reference)
    for label, got in results.items():
        if got.dim() == 2:
            check_cosines(label, samples, got)
        elif "Adam" in label:
            updates = cosines(adam_updates(workload, optimizer, samples), reference)
            torch.testing.assert_close(got.double(), updates, rtol=0, atol=1e-5)
        elif "√v" not in label:
            # dattri's gradients go through fp32 sums of vectors a million long.
            tolerance = 1e-3 if "dattri" in label else 1e-5
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def check_cosines(label: str, vectors: Tensor, sketches: Tensor) -> None:
    """Cosines of sketches within six of their standard deviations, at most ``√(2/k)``, of the vectors'."""
    unit, own = (F.normalize(each.double()) for each in (vectors, sketches))
    worst = float((own @ own.T - unit @ unit.T).abs().max())
    allowed = 6 * (2 / sketches.shape[1]) ** 0.5
    if worst > allowed:
        raise ValueError(f"{label}: a cosine is off by {worst:.3f}, expected {allowed:.3f} at most")


def test_sketching(benchmark: Any) -> None:
    """Sixteen vectors of a million elements to 4,096."""
    torch.set_num_threads(1)
    vectors = torch.randn(VECTORS, LENGTH, generator=torch.Generator().manual_seed(0))
    results: dict[str, Tensor] = {}
    quick, slow = quick_projections(vectors), slow_projections(vectors)
    timings = paired_rounds(keeping(results, quick), rounds=ROUNDS)
    timings |= paired_rounds(keeping(results, slow), rounds=SLOW_ROUNDS, warmup=0)
    for label, got in results.items():
        check_cosines(label, vectors, got)
    # Medians, and the faster of traker's distributions: no round holds both a quick and a slow contender.
    traker = [timing.seconds for label, timing in timings.items() if label.startswith("traker")]
    rows = [
        {
            "contender": label,
            "ms per vector": f"{timing.seconds / VECTORS * 1e3:.3g}",
            "traker's time over it": f"{min(traker) / timing.seconds:.3g}" if traker else "–",
        }
        for label, timing in sorted(timings.items(), key=lambda item: item[1].seconds)
    ]
    rows += not_installed(rows[0])
    publish(benchmark, f"Sketches of {VECTORS} vectors, {LENGTH:,} to {SKETCH:,}, 1 thread", rows, COMMAND)
    benchmark.pedantic(quick["fastproj, srht"], rounds=3)


def own_projections(vectors: Tensor, kinds: tuple[str, ...]) -> dict[str, Run]:
    """``fastproj.sketch``, kind by kind."""
    return {
        f"fastproj, {kind}": partial(fastproj.sketch, vectors, SKETCH, seed=0, kind=kind) for kind in kinds
    }


def quick_projections(vectors: Tensor) -> dict[str, Run]:
    """Those that cost little more than to read the vectors."""
    found = own_projections(vectors, tuple(kind for kind in KINDS if kind not in DENSE))
    if peers.has("sklearn"):
        found["scikit-learn, sparse, its matrix kept"] = peers.sklearn_projection(vectors, SKETCH)
    return found


def slow_projections(vectors: Tensor) -> dict[str, Run]:
    """Dense ones, with both distributions, and scikit-learn's with the making of its matrix."""
    found = own_projections(vectors, DENSE)
    if peers.has("sklearn"):
        found["scikit-learn, sparse, made anew"] = partial(peers.sklearn_made_anew, vectors, SKETCH)
    for kind in ("rademacher", "normal"):
        for module, projection in peers.DENSE.items():
            if peers.has(module):
                found[f"{peers.PEERS[module]}, {kind}"] = projection(vectors, SKETCH, kind)
    return found
