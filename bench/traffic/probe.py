"""The traffic model held against what the kernels do: every access of interpreted launches, counted.

Each operator's launcher runs on small inputs under triton's interpreter, which shows its loads and stores.
Bytes and launches of each kernel must equal the model's exactly. ``python -m fastproj.bench.traffic.probe``,
with TRITON_INTERPRET=1, prints the results as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastproj.bench.traffic.balance_loss import balance_loss_moves
from fastproj.bench.traffic.contraction import per_sample_moves, weighted_moves
from fastproj.bench.traffic.cross_entropy import cross_entropy_moves
from fastproj.bench.traffic.influence import influence_moves
from fastproj.bench.traffic.moves import DTYPES, KernelCount, Moves
from fastproj.bench.traffic.projected_adamw import projected_adamw_moves
from fastproj.bench.traffic.recorder import Access, Launch, observed_accesses
from fastproj.bench.traffic.sketch import WIDTH, dense_moves, hadamard_moves, kronecker_moves, sparse_moves
from fastproj.bench.traffic.span import combine_moves, edge_moves, gram_moves
from fastproj.bench.traffic.subspace import project_out_moves
from fastproj.kernels import (
    balance_loss,
    combine,
    cross_entropy,
    edge,
    gram,
    per_sample_grad,
    project_out,
    weighted_grad,
)
from fastproj.kernels.per_sample_influence import per_sample_influence
from fastproj.kernels.projected_adamw import projected_adamw
from fastproj.kernels.sketch import sketch
from fastproj.reference.segments import Segments, segmentation

# Ragged tails, a vector, narrow rows in whole and in part, rows and shards of several blocks.
SHAPES = ((16, 33), (40, 16), (5,), (9, 3), (2, 5000), (3, 700))
# (vectors, length, rank): on chip and in chunks, ragged and whole, one of several blocks.
SUBSPACES = ((16, 40, 3), (5, 300, 40), (130, 65, 1), (33, 64, 2), (8, 1030, 2))
# (samples, tokens, d_in, d_out): LoRA A and B, tokens in one range and in several, rows in several tiles.
BATCHES = ((2, 520, 150, 5), (3, 7, 4, 40), (2, 40, 70, 68))


@dataclass(frozen=True)
class Probe:
    """A launcher's call and the model's word on it; ``expected`` element accesses a shard element, if any."""

    operator: str
    name: str
    call: Callable[[], object]
    moves: Moves
    expected: int | None = None


@dataclass(frozen=True)
class ProbeResult:
    """What a probe's kernels did, by kernel, beside the model; ``problem`` says where the two differ."""

    operator: str
    probe: str
    counted: dict[str, KernelCount]
    modelled: dict[str, KernelCount]
    problem: str | None


def count(call: Callable[[], object]) -> dict[str, KernelCount]:
    """Run ``call`` and count launches and bytes of each kernel that it launches.

    Raises RuntimeError where kernels are compiled and not interpreted.
    """
    launches: Counter[str] = Counter()
    moved: Counter[tuple[str, Literal["load", "store"]]] = Counter()

    def launched(launch: Launch) -> None:
        launches[launch.kernel] += 1

    def observe(access: Access) -> None:
        moved[access.kernel, access.kind] += access.addresses.size * access.itemsize

    with observed_accesses(observe, launched):
        call()
    return {name: KernelCount(n, moved[name, "load"], moved[name, "store"]) for name, n in launches.items()}


def judge(probe: Probe) -> ProbeResult:
    """Run one probe and compare."""
    counted, modelled = count(probe.call), probe.moves.by_kernel()
    nothing = KernelCount(0, 0, 0)
    differences = [
        f"{kernel} {words}"
        for kernel in {**modelled, **counted}
        if (words := _difference(counted.get(kernel, nothing), modelled.get(kernel, nothing)))
    ]
    problem = None
    if differences:
        problem = f"{probe.operator} on {probe.name}: {'; '.join(differences)}{_excess(probe, counted)}"
    return ProbeResult(probe.operator, probe.name, counted, modelled, problem)


def _difference(counted: KernelCount, modelled: KernelCount) -> str:
    """ "runs 2 times and not 1, reads 4,224 bytes more than the model", or "" where they agree."""
    words = []
    if counted.launches != modelled.launches:
        words.append(f"runs {counted.launches} times and not {modelled.launches}")
    for verb, got, want in (
        ("reads", counted.read_bytes, modelled.read_bytes),
        ("writes", counted.written_bytes, modelled.written_bytes),
    ):
        if got != want:
            words.append(
                f"{verb} {abs(got - want):,} bytes {'more' if got > want else 'less'} than the model"
            )
    return ", ".join(words)


def _excess(probe: Probe, counted: dict[str, KernelCount]) -> str:
    """All accesses beside those allowed: in units of N shard elements where the probe has shards."""
    got = sum(one.read_bytes + one.written_bytes for one in counted.values())
    allowed = probe.moves.bytes("load") + probe.moves.bytes("store")
    if probe.expected is None:
        return f": {got / allowed:.2f} × the bytes that are allowed"
    data = probe.moves.bytes("load", "sets") + probe.moves.bytes("store", "out")
    n = data / probe.expected
    return f": {(got - allowed + data) / n:.1f} N accesses where {probe.expected} N + O(blocks) are allowed"


def probes() -> Iterator[Probe]:
    """Every operator on every kind of input that changes what its launches touch."""
    for segments in ("global", "tensor", "row"):
        yield from span_probes(SHAPES, ("fp32",), segments)
    for dtype in ("bf16", "fp16", "fp64"):
        yield from span_probes(SHAPES[:4], (dtype,), "tensor")
    yield from span_probes(SHAPES[:4], ("fp32", "bf16", "fp32"), "row")
    for segments, dtypes in (("global", ("fp32",)), ("row", ("fp32", "bf16")), ("tensor", ("fp64",))):
        yield from step_probes(SHAPES, dtypes, segments)
    for dtype in DTYPES:
        yield from subspace_probes(SUBSPACES, dtype)
    for dtype in DTYPES:
        for batch in BATCHES:
            yield from contraction_probes(batch, dtype)
            yield from influence_probes(batch, dtype)
    for dtype in DTYPES:
        yield from sketch_probes(3, 1501, 300, dtype)
    yield from sketch_probes(33, 1024, 4, "fp32")
    # The first and the last of three blocks in part, of which neither begins or ends with a whole load.
    for dtype in ("fp32", "bf16"):
        yield from block_sketch_probes(2, 9000, 1001, dtype)
    for dtype in DTYPES:
        for classes in (5, 4099):
            yield from cross_entropy_probes(2, 3, classes, dtype)
        # A tile of labels and more than one, samples of one program of the gradient and of two.
        for samples, labels in ((16, 28), (33, 2100), (0, 5)):
            yield from balance_loss_probes(samples, labels, dtype)


def span_probes(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], segments: Segments, sets: int = 2
) -> Iterator[Probe]:
    """The span projections over shards of these shapes; shard i of each set has dtype ``dtypes[i % len]``."""
    generator = torch.Generator().manual_seed(0)
    lists = [
        [
            torch.randn(shape, generator=generator).to(DTYPES[dtypes[i % len(dtypes)]])
            for i, shape in enumerate(shapes)
        ]
        for _ in range(sets)
    ]
    flat, out = [shard for shards in lists for shard in shards], [torch.empty_like(s) for s in lists[0]]
    plan = segmentation(lists[0], segments)
    where = (plan.first, plan.rows, plan.count)
    weights = torch.ones(plan.count, sets, dtype=torch.float64)
    name = f"{' and '.join(dict.fromkeys(dtypes))}, {sets} sets, segments {segments}"
    one, two = gram_moves(lists, plan), combine_moves(lists, out, plan)

    def gram_and_combine() -> None:
        gram.gram(flat, sets, *where)
        combine.combine(flat, weights, *where[:2], out)

    yield Probe("gram + combine", name, gram_and_combine, one + two, 2 * sets + 1)
    if sets == 2:
        erm, gce = lists
        for variant in ("paper", "released") if plan.rows else ("paper",):
            call = partial(edge.edge, erm, gce, out, *where, alpha=0.5, variant=variant, skip_nonfinite=False)
            yield Probe("edge", f"{name}, {variant}", call, edge_moves(lists, out, plan, variant), 5)


def step_probes(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], segments: Segments, sets: int = 2
) -> Iterator[Probe]:
    """AdamW's step along a combination; shard i of every list has dtype ``dtypes[i % len]``."""
    lists = [
        [torch.ones(shape, dtype=DTYPES[dtypes[i % len(dtypes)]]) for i, shape in enumerate(shapes)]
        for _ in range(sets + 3)
    ]
    flat, (p, m, v) = [shard for shards in lists[:sets] for shard in shards], lists[sets:]
    plan = segmentation(lists[0], segments)
    weights = torch.ones(plan.count, sets, dtype=torch.float64)
    steps, lr = [torch.ones(()) for _ in shapes], torch.tensor(1e-3, dtype=torch.float64)
    lists_and_counts = (flat, weights, plan.first, plan.rows, p, m, v, steps)
    call = partial(projected_adamw, *lists_and_counts, lr, 0.9, 0.999, 1e-8, 0.01, None)
    name = f"{' and '.join(dict.fromkeys(dtypes))}, {sets} sets, segments {segments}"
    yield Probe("projected_adamw", name, call, projected_adamw_moves(lists[:sets], [p, m, v], plan))


def subspace_probes(sizes: Sequence[tuple[int, int, int]], dtype: str) -> Iterator[Probe]:
    """Projections of shards of these (vectors, length, rank), rows and columns; the last two share a basis.

    That of the last, where its vectors are as long as those of the one before.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == "fp64" else torch.float32
    bases = [torch.randn(k, d, generator=generator, dtype=wide) / d for _, d, k in sizes]
    if len(sizes) > 1 and sizes[-1][1] == sizes[-2][1]:
        bases[-2] = bases[-1]
    for left in (False, True):
        shards = [
            torch.randn((n, m) if not left else (m, n), generator=generator).to(DTYPES[dtype])
            for n, m, _ in sizes
        ]
        call = partial(
            project_out.project_out, shards, [basis.mT for basis in bases], range(len(sizes)), left, shards
        )
        name = f"{dtype}, {'columns' if left else 'rows'} of {len(sizes)} shards"
        moves = project_out_moves(shards, bases, shards, left)
        yield Probe("project_out", name, call, moves)


def contraction_probes(batch: tuple[int, int, int, int], dtype: str, sums: int = 2) -> Iterator[Probe]:
    """The contractions on one batch (samples, tokens, d_in, d_out)."""
    samples, tokens, d_in, d_out = batch
    x, delta = _activations((samples, tokens, d_in), (samples, tokens, d_out), DTYPES[dtype])
    weights = torch.rand(sums, samples)
    name = f"{dtype}, {samples} × {tokens} tokens, {d_in} to {d_out}"
    yield Probe(
        "weighted_grad",
        f"{name}, {sums} sums",
        lambda: weighted_grad.weighted_grad(x, delta, weights),
        weighted_moves(x, delta, sums),
    )
    yield Probe(
        "per_sample_grad",
        name,
        lambda: per_sample_grad.per_sample_grad(x, delta),
        per_sample_moves(x, delta),
    )


def sketch_probes(samples: int, positions: int, dimension: int, dtype: str) -> Iterator[Probe]:
    """The dense kinds of random projections on (samples, positions), and products of two for whole rows."""
    vectors = torch.randn(samples, positions, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    size = (samples, positions, dimension, DTYPES[dtype])
    moves = {"rademacher": dense_moves(*size, normal=False), "gaussian": dense_moves(*size, normal=True)}
    if positions % WIDTH == 0:
        moves["kronecker"] = kronecker_moves(*size)
    for kind, moved in moves.items():
        name = f"{dtype}, {kind}, {samples} × {positions} to {dimension}"
        yield Probe("sketch", name, partial(sketch, [vectors], dimension, 0, kind, 0), moved)


def block_sketch_probes(samples: int, positions: int, offset: int, dtype: str) -> Iterator[Probe]:
    """Random projections by blocks of 4,096 positions, of (samples, positions) from ``offset`` on."""
    vectors = torch.randn(samples, positions, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    for kind, dimension, model in (("srht", 300, hadamard_moves), ("sjlt", 64, sparse_moves)):
        name = f"{dtype}, {kind}, {samples} × {positions} from {offset} on to {dimension}"
        moves = model(samples, positions, dimension, DTYPES[dtype], offset)
        yield Probe("sketch", name, partial(sketch, [vectors], dimension, 0, kind, offset), moves)


def influence_probes(batch: tuple[int, int, int, int], dtype: str, references: int = 2) -> Iterator[Probe]:
    """Products with references on one batch (samples, tokens, d_in, d_out), after Adam's step and without."""
    samples, tokens, d_in, d_out = batch
    x, delta = _activations((samples, tokens, d_in), (samples, tokens, d_out), DTYPES[dtype])
    tables, moments = torch.ones(references, d_out, d_in), torch.ones(d_out, d_in)
    for adam in (False, True):
        state = (moments, moments, 1, 0.9, 0.999, 1e-8, "adam") if adam else ()
        yield Probe(
            "per_sample_influence",
            f"{dtype}, {samples} × {tokens} tokens, {d_in} to {d_out}, {'Adam' if adam else 'plain'}",
            partial(per_sample_influence, x, delta, tables, *state),
            influence_moves(x, delta, references, adam),
        )


def cross_entropy_probes(samples: int, tokens: int, classes: int, dtype: str) -> Iterator[Probe]:
    """Losses of (samples, tokens) and the gradient of their logits; every third label is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, tokens, classes, generator=generator).to(DTYPES[dtype])
    labels = torch.arange(samples * tokens).remainder(classes)
    labels[::3] = -100
    labels = labels.view(samples, tokens)

    def call() -> None:
        losses, _, maxima, log_sums = cross_entropy.cross_entropy(logits, labels, -100, 0.1)
        cross_entropy.cross_entropy_backward(losses, logits, labels, maxima, log_sums, -100, 0.1)

    rows = samples * tokens
    moves = cross_entropy_moves(rows, rows - -(-rows // 3), classes, DTYPES[dtype])
    yield Probe("cross_entropy", f"{dtype}, {samples} × {tokens} tokens, {classes} classes", call, moves)


def balance_loss_probes(samples: int, number: int, dtype: str) -> Iterator[Probe]:
    """Losses of (samples, number) and their gradient: a label a sample, and each with means known before."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(samples, number, generator=generator).to(DTYPES[dtype])
    known = torch.zeros(2, number, dtype=torch.float64)
    for labels in (torch.arange(samples) % number, logits > 0):
        each = labels.dim() == 2

        def call(labels: Tensor = labels, known: Tensor | None = known if each else None) -> None:
            first, second, _, slopes = balance_loss.balance_loss(logits, labels, known, True, -100)
            balance_loss.balance_loss_backward(first, second, slopes, labels, -100, logits.dtype)

        size = labels.element_size()
        moves = balance_loss_moves(samples, number, logits.dtype, label_bytes=size, each=each, known=each)
        name = f"{dtype}, {samples} samples, {number} labels, {'each' if each else 'one a sample'}"
        yield Probe("balance_loss", name, call, moves)


def _activations(
    x: tuple[int, int, int], delta: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x, generator=generator).to(dtype), torch.randn(delta, generator=generator).to(dtype)


def probe_all() -> list[ProbeResult]:
    """Run all probes.

    Raises RuntimeError where kernels are compiled and not interpreted.
    """
    return [judge(probe) for probe in probes()]


if __name__ == "__main__":
    print(json.dumps([asdict(result) for result in probe_all()], indent=1))
