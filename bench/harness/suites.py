"""What is timed: every operator at named workloads, each checked against the reference first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import fastproj
from fastproj.bench.harness.case import (
    CHECKED_SAMPLES,
    CHECKED_SHARDS,
    ROUNDED,
    SUMMED,
    Case,
    gradients,
    require_close,
)
from fastproj.bench.harness.clock import Subject
from fastproj.bench.harness.losses import balance_loss_case, cross_entropy_case
from fastproj.bench.harness.step_suite import step_case
from fastproj.bench.traffic.contraction import per_sample_grad_call, weighted_grad_call
from fastproj.bench.traffic.influence import REFERENCES, per_sample_influence_call
from fastproj.bench.traffic.models import OPERATORS as MODELS
from fastproj.bench.traffic.moves import DTYPES
from fastproj.bench.traffic.sketch import DIMENSION, sketch_call
from fastproj.bench.traffic.subspace import RANK
from fastproj.bench.traffic.workloads import WORKLOADS, Contraction, Workload
from fastproj.bench.workloads import Shape
from fastproj.bindings.project_out import Side
from fastproj.reference.adam import AdamState
from fastproj.reference.combine import combine as reference_combine
from fastproj.reference.edge import edge as reference_edge
from fastproj.reference.gram import gram as reference_gram
from fastproj.reference.per_sample_grad import per_sample_grad as reference_per_sample
from fastproj.reference.per_sample_influence import per_sample_influence as reference_influence
from fastproj.reference.project_out import project_out as reference_project_out
from fastproj.reference.segments import segmentation
from fastproj.reference.sketch import sketch as reference_sketch
from fastproj.reference.weighted_grad import weighted_grad as reference_weighted

SUITES = (
    *("gram", "combine", "edge", "project_out", "weighted_grad", "per_sample_grad"),
    *("per_sample_influence", "sketch", "cross_entropy", "balance_loss", "projected_adamw"),
)
SUMS = 2
# A projection in place adds at most α |g| to e, and short calls are repeated up to about 1e5 times: e stays
# within some hundred times what it was, far from overflow.
ALPHA = 1e-3
QUICK_SAMPLES, QUICK_TOKENS = 2, 128
# Tokens enough for partial results, which the timed calls take too.
CHECKED_TOKENS = 400
CHECKED_POSITIONS = 1500


def select_workloads(names: Sequence[str], device: str, quick: bool) -> list[Workload]:
    """The workloads whose names contain one of ``names``, upper or lower case; quick ones with a small batch.

    Without names: all on a GPU, the smallest on the CPU or where ``quick``. Raises ValueError for a name that
    no workload contains.
    """
    for name in names:
        if not any(name.lower() in known.lower() for known in WORKLOADS):
            raise ValueError(f"expected a part of a workload's name ({'; '.join(WORKLOADS)}), got {name!r}")
    chosen = [w for known, w in WORKLOADS.items() if any(name.lower() in known.lower() for name in names)]
    if not names:
        every = sorted(WORKLOADS.values(), key=lambda workload: workload.elements)
        chosen = every[:1] if quick or device == "cpu" else every
    if quick:
        chosen = [replace(workload, samples=QUICK_SAMPLES, tokens=QUICK_TOKENS) for workload in chosen]
    # bf16 products are what GPUs are made for; CPUs without a unit for them would be timed on conversions.
    dtype = "fp32" if device == "cpu" else "bf16"
    return [replace(workload, activation_dtype=dtype) for workload in chosen]


def cases(suites: Sequence[str], workloads: Sequence[Workload], device: str) -> Iterator[Case]:
    """Every suite at every workload. Raises ValueError for a suite that does not exist."""
    unknown = sorted(set(suites) - set(SUITES))
    if unknown:
        raise ValueError(f"expected suites among {', '.join(SUITES)}, got {', '.join(unknown)}")
    for suite in suites:
        for workload in workloads:
            if suite in SPAN:
                yield span_case(suite, workload, device)
            elif suite == "project_out":
                yield project_out_case(workload, device)
            elif suite == "cross_entropy":
                yield cross_entropy_case(workload, device)
            elif suite == "balance_loss":
                yield balance_loss_case(workload, device)
            elif suite == "sketch":
                yield sketch_case(workload, device)
            elif suite == "projected_adamw":
                yield step_case(workload, device)
            else:
                case = influence_case if suite == "per_sample_influence" else contraction_case
                yield from (
                    case(suite, workload, contraction, device)
                    for contraction in distinct(workload.contractions)
                )


def distinct(contractions: Sequence[Contraction]) -> list[Contraction]:
    """The first contraction of each shape, once a step."""
    by_shape: dict[tuple[int, int], Contraction] = {}
    for contraction in contractions:
        by_shape.setdefault((contraction.d_in, contraction.d_out), replace(contraction, calls=1))
    return list(by_shape.values())


@dataclass(frozen=True)
class SpanCall:
    """A projection inside the span on sets of its own; calling it gives what ``want`` computes in fp64.

    ``rounding`` is the error allowed, relative to the largest value of the result.
    """

    sets: list[list[Tensor]]
    call: Callable[[], list[Tensor]]
    want: Callable[[list[list[Tensor]]], list[Tensor]]
    rounding: float


def _gram(sets: list[list[Tensor]]) -> SpanCall:
    def want(exact: list[list[Tensor]]) -> list[Tensor]:
        return [reference_gram(exact, segmentation(exact[0], "global"))]

    return SpanCall(sets, lambda: [fastproj.gram(sets)], want, SUMMED)


def _combine(sets: list[list[Tensor]]) -> SpanCall:
    values = [1.5, -0.5, *([0.25] * (len(sets) - 2))]
    coefficients = torch.tensor([values], dtype=torch.float64, device=sets[0][0].device)
    out = [torch.empty_like(shard) for shard in sets[0]]

    def call() -> list[Tensor]:
        fastproj.combine(sets, coefficients, out=out)
        return out

    def want(exact: list[list[Tensor]]) -> list[Tensor]:
        return reference_combine(exact, coefficients.cpu(), segmentation(exact[0], "global"))

    return SpanCall(sets, call, want, ROUNDED)


def _edge(sets: list[list[Tensor]]) -> SpanCall:
    def call() -> list[Tensor]:
        fastproj.edge_(sets[0], sets[1], alpha=ALPHA)
        return sets[0]

    def want(exact: list[list[Tensor]]) -> list[Tensor]:
        erm, gce = exact
        return reference_edge(erm, gce, segmentation(erm, "global"), alpha=ALPHA)

    return SpanCall(sets, call, want, ROUNDED)


SPAN: dict[str, Callable[[list[list[Tensor]]], SpanCall]] = {
    "gram": _gram,
    "combine": _combine,
    "edge": _edge,
}


def span_case(suite: str, workload: Workload, device: str) -> Case:
    """A whole workload's shards in one call."""

    def prepare(shapes: Sequence[Shape], seed: int) -> SpanCall:
        sets = [
            gradients(shapes, workload.dtype, workload.sets * seed + k, device) for k in range(workload.sets)
        ]
        return SPAN[suite](sets)

    def check() -> None:
        subject = prepare(workload.shards[:CHECKED_SHARDS], 0)
        exact = [[shard.double().cpu() for shard in shards] for shards in subject.sets]
        want = subject.want(exact)
        largest = max(shard.abs().max().item() for shard in want)
        require_close(suite, subject.call(), want, subject.rounding * largest)

    size = DTYPES[workload.dtype].itemsize * workload.elements
    touched = size * (workload.sets + (suite == "combine"))
    traffic = MODELS[suite](workload)
    subject = Subject(lambda seed: prepare(workload.shards, seed).call, touched, touched, traffic.launches)
    return Case(suite, workload.name, "", workload.dtype, traffic, subject, check)


def project_out_case(workload: Workload, device: str) -> Case:
    """A workload's shards out of directions of their own: each A from the right, each B from the left."""
    traffic = MODELS["project_out"](workload)

    def prepare(shapes: Sequence[Shape], seed: int) -> dict[Side, tuple[list[Tensor], list[fastproj.Basis]]]:
        shards = gradients(shapes, workload.dtype, seed, device)
        wide = "fp64" if workload.dtype == "fp64" else "fp32"
        vectors = gradients([(max(shape), RANK) for shape in shapes], wide, seed + 1, device)
        bases = [fastproj.orthonormalize(own) for own in vectors]
        return {"right": (shards[::2], bases[::2]), "left": (shards[1::2], bases[1::2])}

    def project(sides: dict[Side, tuple[list[Tensor], list[fastproj.Basis]]]) -> list[Tensor]:
        calls = (fastproj.project_out(*own, side=side) for side, own in sides.items())
        return [shard for projected in calls for shard in projected if shard is not None]

    def check() -> None:
        sides = prepare(workload.shards[:CHECKED_SHARDS], 0)
        want: list[Tensor] = []
        for side, (shards, bases) in sides.items():
            exact = [shard.double().cpu() for shard in shards]
            matrices = [basis.matrix.double().cpu() for basis in bases]
            want += reference_project_out(exact, matrices, range(len(exact)), side == "left")
        largest = max(shard.abs().max().item() for shard in want)
        require_close("project_out", project(sides), want, SUMMED * largest)

    subject = Subject(
        lambda seed: partial(project, prepare(workload.shards, seed)),
        traffic.least_bytes, traffic.least_bytes, traffic.launches,
    )  # fmt: skip
    return Case("project_out", workload.name, "", workload.dtype, traffic, subject, check)


def contraction_case(suite: str, workload: Workload, contraction: Contraction, device: str) -> Case:
    """One linear map of the workload's batch in one call."""
    dtype = workload.activation_dtype
    small = replace(contraction, samples=CHECKED_SAMPLES, tokens=CHECKED_TOKENS)
    if suite == "weighted_grad":
        traffic = weighted_grad_call(contraction, dtype, SUMS)
        outputs = SUMS
    else:
        traffic = per_sample_grad_call(contraction, dtype)
        outputs = contraction.samples
    inputs = contraction.samples * contraction.tokens * (contraction.d_in + contraction.d_out)
    touched = DTYPES[dtype].itemsize * (inputs + outputs * contraction.d_in * contraction.d_out)
    subject = Subject(
        lambda seed: _contraction(suite, layer(contraction, dtype, seed, device)),
        touched, touched, traffic.launches,
    )  # fmt: skip
    part = f"{contraction.name}, {contraction.samples} × {contraction.tokens} tokens"

    def check() -> None:
        check_contraction(suite, layer(small, dtype, 0, device))

    return Case(suite, workload.name, part, dtype, traffic, subject, check)


def influence_case(suite: str, workload: Workload, contraction: Contraction, device: str) -> Case:
    """Scores of one linear map's samples against references, after Adam's step."""
    dtype = workload.activation_dtype
    small = replace(contraction, samples=CHECKED_SAMPLES, tokens=CHECKED_TOKENS)
    traffic = per_sample_influence_call(contraction, dtype)

    def tables(seed: int) -> tuple[Tensor, AdamState]:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (REFERENCES + 2, contraction.d_out, contraction.d_in)
        made = torch.rand(shape, generator=generator, device=device)
        return made[2:], AdamState(made[0], made[1], 100)

    def build(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
        (x, delta, _), (references, adam) = layer(contraction, dtype, seed, device), tables(seed)
        return lambda: fastproj.per_sample_influence(x, delta, references, adam=adam)

    def check() -> None:
        (x, delta, _), (references, adam) = layer(small, dtype, 0, device), tables(0)
        got = fastproj.per_sample_influence(x, delta, references, adam=adam)
        here = AdamState(adam.exp_avg.cpu(), adam.exp_avg_sq.cpu(), adam.step)
        want = reference_influence(x.cpu(), delta.cpu(), references.cpu(), here)
        # Updates are of order one, and all references positive: a share of the largest sum of magnitudes.
        magnitude = max(want[1].max().item(), references.sum(dim=(1, 2)).max().item())
        require_close(suite, got, want, SUMMED * magnitude)

    part = f"{contraction.name}, {contraction.samples} × {contraction.tokens} tokens"
    subject = Subject(build, traffic.least_bytes, traffic.least_bytes, traffic.launches)
    return Case(suite, workload.name, part, dtype, traffic, subject, check)


def sketch_case(workload: Workload, device: str) -> Case:
    """A Rademacher sketch of the per-sample gradients of one block of the model."""
    samples, positions = workload.samples, workload.elements // workload.model.layers
    traffic = sketch_call(samples, positions, workload.dtype, workload.name)

    def vectors(size: int, seed: int) -> Tensor:
        return gradients([(samples, size)], workload.dtype, seed, device)[0]

    def build(seed: int) -> Callable[[], Tensor]:
        made = vectors(positions, seed)
        return lambda: fastproj.sketch(made, DIMENSION, seed=seed)

    def check() -> None:
        made = vectors(CHECKED_POSITIONS, 0)
        got = fastproj.sketch(made, DIMENSION, seed=0)
        exact = made.double().cpu()
        want = reference_sketch([exact], DIMENSION, 0, "rademacher", 0)
        # Every entry has one size: rounding is that of a sum of absolute values.
        magnitude = exact.abs().sum(dim=1, keepdim=True) / DIMENSION**0.5
        require_close("sketch", [got], [want], SUMMED * magnitude)

    part = f"one block, {samples} × {positions} to {DIMENSION}"
    subject = Subject(build, traffic.least_bytes, traffic.least_bytes, traffic.launches)
    return Case("sketch", workload.name, part, workload.dtype, traffic, subject, check)


def layer(contraction: Contraction, dtype: str, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta and the weights of SUMS sums: ones, as plain training has them, and values in [0, 1]."""
    generator = torch.Generator(device).manual_seed(seed)
    batch = (contraction.samples, contraction.tokens)
    x, delta = (
        torch.randn(*batch, width, generator=generator, device=device, dtype=DTYPES[dtype])
        for width in (contraction.d_in, contraction.d_out)
    )
    weights = torch.rand(SUMS, contraction.samples, generator=generator, device=device)
    weights[0] = 1
    return x, delta, weights


def _contraction(suite: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    x, delta, weights = inputs
    if suite == "weighted_grad":
        return lambda: fastproj.weighted_grad(x, delta, weights)
    return lambda: fastproj.per_sample_grad(x, delta)


def check_contraction(suite: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raises WrongResultError where an element is off by more than rounding explains."""
    got = _contraction(suite, inputs)()
    x, delta, weights = (tensor.double().cpu() for tensor in inputs)
    if suite == "weighted_grad":
        want = reference_weighted(x, delta, weights)
        magnitude = reference_weighted(x.abs(), delta.abs(), weights.abs())
    else:
        want = reference_per_sample(x, delta)
        magnitude = reference_per_sample(x.abs(), delta.abs())
    positions = x.shape[0] * x.shape[1]
    # The weighted side and the result are rounded to the dtype, products and their sums to fp32.
    share = 1.5 * torch.finfo(got.dtype).eps + 2 * (positions + 2) * torch.finfo(torch.float32).eps
    require_close(suite, [got], [want], magnitude * share)
