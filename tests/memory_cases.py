"""Calls of every launcher under the memory checker: ragged lengths, narrow rows, empty shards, tails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
from memory_case import ALIGNED, LAYOUTS, UNALIGNED, Case, sets_of, with_outputs
from memory_loss_cases import balance_loss_cases, cross_entropy_cases
from span_inputs import DTYPES
from torch import Tensor

from fastproj.kernels.combine import combine
from fastproj.kernels.edge import edge
from fastproj.kernels.gram import MOST_SETS, gram
from fastproj.kernels.per_sample_grad import per_sample_grad
from fastproj.kernels.per_sample_influence import per_sample_influence
from fastproj.kernels.project_out import project_out
from fastproj.kernels.projected_adamw import MOST_SETS as MOST_STEP_SETS
from fastproj.kernels.projected_adamw import projected_adamw
from fastproj.kernels.sketch import sketch
from fastproj.kernels.weighted_grad import weighted_grad
from fastproj.reference.basis import orthonormalize
from fastproj.reference.segments import Segmentation, Segments, segmentation

# One element to each side of a tile and of a block, scalars, narrow rows of every kind, empty shards.
SHAPES = (
    *((1,), (1023,), (1024,), (1025,), (4097,), (), (0,), (3, 0)),
    *((5, 3), (40, 8), (33, 16), (9, 33), (3, 511), (2, 512), (2, 3, 4), (2, 5000)),
)
FEW = ((1025,), (40, 8), (3, 511), (0,), (4097,))
SMALL = ((257,), (9, 33), (0,))
IDS = tuple(i * 3 % 5 for i in range(len(SHAPES)))
SEGMENTS: tuple[Segments, ...] = ("global", "tensor", "row", IDS)
MIXED = (torch.float32, torch.bfloat16, torch.float16)
# (vectors, length, rank): one of each, tails of every class of length, more than one program, chunks and what
# of them is left, wide loads and none.
SUBSPACES = (
    (1, 1, 1),
    (5, 3, 2),
    (130, 65, 1),
    (16, 72, 3),
    (9, 300, 2),
    (8, 304, 40),
    (19, 33, 0),
    (17, 40, 33),
)
# (samples, tokens, d_in, d_out): one position, tails of every tile, several splits, tiles side by side.
LAYERS = ((1, 1, 1, 1), (3, 1, 5, 3), (2, 37, 40, 8), (5, 33, 7, 30), (2, 520, 40, 8), (1, 35, 130, 70))


def _gram(num_sets: int, plan: Segmentation, tensors: list[Tensor]) -> list[Tensor]:
    return [gram(tensors, num_sets, plan.first, plan.rows, plan.count)]


def _combine(num_sets: int, plan: Segmentation, tensors: list[Tensor]) -> list[Tensor]:
    """Out of place where there are tensors beyond the sets, else into the first set; one coefficient is 0."""
    n = len(plan.first)
    coefficients = torch.linspace(-1, 2, plan.count * num_sets, dtype=torch.float64)
    coefficients[-1] = 0
    out = tensors[num_sets * n :] or tensors[:n]
    combine(tensors[: num_sets * n], coefficients.reshape(plan.count, num_sets), plan.first, plan.rows, out)
    return out


def _edge(variant: str, plan: Segmentation, tensors: list[Tensor]) -> list[Tensor]:
    n = len(plan.first)
    out = tensors[2 * n :] or tensors[:n]
    erm, gce = tensors[:n], tensors[n : 2 * n]
    stats = edge(erm, gce, out, plan.first, plan.rows, plan.count, 0.7, variant, False)
    return [*out, *stats]


def _plan(shapes: Sequence[tuple[int, ...]], segments: Segments) -> Segmentation:
    return segmentation([torch.empty(shape, device="meta") for shape in shapes], segments)


def span_cases() -> Iterator[Case]:
    """Gram, combination and EDGE over many shards."""
    signatures = [(str(dtype).removeprefix("torch."), (dtype,)) for dtype in DTYPES] + [("mixed", MIXED)]
    for (i, segments), (j, layout), turn in product(enumerate(SEGMENTS), enumerate(LAYOUTS), range(2)):
        # A Latin square: every dtype meets every segmentation and every layout, mixed ones each of both once.
        if turn and i != j:
            continue
        name, dtypes = signatures[len(DTYPES) if turn else (i + j) % len(DTYPES)]
        plan, kind = _plan(SHAPES, segments), "ids" if isinstance(segments, tuple) else segments
        sets = partial(sets_of, 2, SHAPES, dtypes)
        outputs = partial(with_outputs, 2, SHAPES, dtypes)
        if not turn:
            yield Case(f"gram {kind} {name}", sets, partial(_gram, 2, plan), layout)
        if turn or j in {i, (i + 1) % len(LAYOUTS)}:
            variant = ("paper", "naive", "released", "subtract")[i]
            yield Case(f"edge {variant} {kind} {name}", outputs, partial(_edge, variant, plan), layout)
        yield Case(f"combine {kind} {name}", outputs, partial(_combine, 2, plan), layout)
    for num_sets, segments in product((1, 3, MOST_SETS, MOST_SETS + 1), ("global", "row")):
        shapes = FEW if num_sets <= 3 else SMALL
        plan, sets = _plan(shapes, segments), partial(sets_of, num_sets, shapes, MIXED)
        name = f"{num_sets} sets {segments}"
        yield Case(f"gram of {name}", sets, partial(_gram, num_sets, plan), UNALIGNED)
        yield Case(f"combine in place {name}", sets, partial(_combine, num_sets, plan), LAYOUTS[2])
    edges = product(("paper", "naive", "subtract", "released"), ("tensor", "row"), LAYOUTS)
    for number, (variant, segments, layout) in enumerate(edges):
        # A third of them meets every variant, segmentation and layout; "released" knows rows alone.
        if number % 3 == 1 and (variant, segments) != ("released", "tensor"):
            plan, sets = _plan(FEW, segments), partial(sets_of, 2, FEW, (torch.float32,))
            yield Case(f"edge in place {variant} {segments}", sets, partial(_edge, variant, plan), layout)


def step_cases() -> Iterator[Case]:
    """AdamW's step along a combination, in place, of few and of more sets than a launch takes."""
    for (i, segments), (j, layout) in product(enumerate(SEGMENTS), enumerate(LAYOUTS)):
        if j not in {i, (i + 1) % len(LAYOUTS)}:
            continue
        dtypes = (DTYPES[(i + j) % len(DTYPES)],) if i == j else MIXED
        plan, kind = _plan(SHAPES, segments), "ids" if isinstance(segments, tuple) else segments
        name = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        lists, run = partial(_state, 2, SHAPES, dtypes), partial(_step, 2, plan)
        yield Case(f"projected_adamw {kind} {name}", lists, run, layout)
    for num_sets, segments in product((1, MOST_STEP_SETS + 1), ("global", "row")):
        plan, lists = _plan(SMALL, segments), partial(_state, num_sets, SMALL, MIXED)
        run = partial(_step, num_sets, plan)
        yield Case(f"projected_adamw of {num_sets} sets {segments}", lists, run, UNALIGNED)


def _state(num_sets: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The sets, then p, m and v."""
    lists = sets_of(num_sets + 3, shapes, dtypes)
    n = len(shapes)
    return [*lists[:-n], *(square.abs() for square in lists[-n:])]


def _step(num_sets: int, plan: Segmentation, tensors: list[Tensor]) -> list[Tensor]:
    n = len(plan.first)
    flat, state = (
        tensors[: num_sets * n],
        [tensors[k * n : (k + 1) * n] for k in range(num_sets, num_sets + 3)],
    )
    coefficients = torch.linspace(-1, 2, plan.count * num_sets, dtype=torch.float64)
    steps, lr = [torch.tensor(float(i + 1)) for i in range(n)], torch.tensor(0.1, dtype=torch.float64)
    projected_adamw(
        flat, coefficients.reshape(plan.count, num_sets), plan.first, plan.rows, *state, steps,
        lr, 0.9, 0.999, 1e-8, 0.1, None,
    )  # fmt: skip
    return [tensor for own in state for tensor in own]


def _layer(dims: tuple[int, int, int, int], dtype: torch.dtype, num_sums: int) -> list[Tensor]:
    samples, tokens, d_in, d_out = dims
    generator = torch.Generator().manual_seed(0)
    shapes = ((samples, tokens, d_in), (samples, tokens, d_out), (num_sums, samples))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def contraction_cases() -> Iterator[Case]:
    """Weighted sums and per-sample gradients of a layer, delta narrower than x and the reverse."""
    for (i, dims), (j, layout) in product(enumerate(LAYERS), enumerate(LAYOUTS)):
        for dtype in DTYPES if layout is ALIGNED else (DTYPES[(i + j) % len(DTYPES)],):
            name = f"{'x'.join(map(str, dims))} {str(dtype).removeprefix('torch.')}"
            num_sums = 1 + 2 * ((i + j) % 2)
            yield Case(
                f"weighted_grad {num_sums} sums {name}",
                partial(_layer, dims, dtype, num_sums),
                lambda tensors: [weighted_grad(*tensors)],
                layout,
            )
            yield Case(
                f"per_sample_grad {name}",
                partial(_layer, dims, dtype, 1),
                lambda tensors: [per_sample_grad(*tensors[:2])],
                layout,
            )


def influence_cases() -> Iterator[Case]:
    """Products with references: Adam's moments beside them in every other case."""
    for (i, dims), (j, layout) in product(enumerate(LAYERS), enumerate(LAYOUTS)):
        dtype, adam = DTYPES[(i + j) % len(DTYPES)], (i // 2 + j) % 2 == 1
        name = f"{'x'.join(map(str, dims))} {str(dtype).removeprefix('torch.')}"
        yield Case(
            f"per_sample_influence {'Adam' if adam else 'plain'} {name}",
            partial(_layer_and_tables, dims, dtype, adam),
            _influence,
            layout,
        )


def _layer_and_tables(dims: tuple[int, int, int, int], dtype: torch.dtype, adam: bool) -> list[Tensor]:
    """x, delta, three references, and the moments where there are any, fp32."""
    generator, (_, _, d_in, d_out) = torch.Generator().manual_seed(1), dims
    shapes = [(3, d_out, d_in), *([(d_out, d_in)] * (2 * adam))]
    tables = [torch.rand(shape, generator=generator) for shape in shapes]
    return [*_layer(dims, dtype, 1)[:2], *tables]


def _influence(tensors: list[Tensor]) -> list[Tensor]:
    constants = (3, 0.9, 0.999, 1e-8, "adam") if len(tensors) > 3 else ()
    return [per_sample_influence(*tensors, *constants)]


# (samples, positions, dimension): one of each, tails of tiles and groups, several chunks and sample tiles.
VECTORS = ((1, 1, 1), (3, 33, 300), (2, 1504, 5), (35, 520, 2))


def sketch_cases() -> Iterator[Case]:
    """Random projections with dense factors."""
    kinds = ("rademacher", "gaussian", "kronecker")
    for (i, size), (j, layout) in product(enumerate(VECTORS), enumerate(LAYOUTS)):
        samples, positions, dimension = size
        dtype, kind = DTYPES[(i + j) % len(DTYPES)], kinds[(2 * i + j) % len(kinds)]
        yield Case(
            f"sketch {kind} {'x'.join(map(str, size))} {str(dtype).removeprefix('torch.')}",
            partial(sets_of, 1, [(samples, positions)], (dtype,)),
            partial(_sketch, dimension, kind),
            layout,
        )


def structured_sketch_cases() -> Iterator[Case]:
    """Random projections block by block of 4,096: both ends of the vectors within a block."""
    sizes = {"srht": (2, 4500, 300), "sjlt": (2, 4500, 64)}
    for (i, (kind, size)), layout in product(enumerate(sizes.items()), LAYOUTS[:2]):
        samples, positions, dimension = size
        for dtype in (DTYPES[i], torch.float64):
            yield Case(
                f"sketch {kind} {samples}x{positions}x{dimension} {str(dtype).removeprefix('torch.')}",
                partial(sets_of, 1, [(samples, positions)], (dtype,)),
                partial(_sketch, dimension, kind),
                layout,
            )


def _sketch(dimension: int, kind: str, tensors: list[Tensor]) -> list[Tensor]:
    return [sketch(tensors, dimension, 7, kind, 5)]


def subspace_cases() -> Iterator[Case]:
    """Projections onto complements: rows and columns, into tensors of their own and in place."""
    for (j, layout), left, in_place in product(enumerate(LAYOUTS), (False, True), (False, True)):
        dtypes = (DTYPES[(j + left) % len(DTYPES)],) if in_place else DTYPES
        side = "columns" if left else "rows"
        yield Case(
            f"project_out {side}{' in place' if in_place else ''}",
            partial(_subspaces, left, dtypes),
            partial(_project_out, left, in_place),
            layout,
        )


def _subspaces(left: bool, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Shards, outputs of NaN for them, and a basis (k, d) for each."""
    sizes = [(vectors, length) for vectors, length, _ in SUBSPACES]
    shapes = [(length, vectors) if left else (vectors, length) for vectors, length in sizes]
    sets = with_outputs(1, shapes, dtypes)
    generator = torch.Generator().manual_seed(2)
    return sets + [
        orthonormalize(torch.randn(length, rank, generator=generator)).matrix.mT
        for _, length, rank in SUBSPACES
    ]


def _project_out(left: bool, in_place: bool, tensors: list[Tensor]) -> list[Tensor]:
    n = len(SUBSPACES)
    shards, out, bases = tensors[:n], tensors[n : 2 * n], [basis.mT for basis in tensors[2 * n :]]
    owner = [-1 if i == 2 else i for i in range(n)]
    project_out(shards, bases, owner, left, shards if in_place else out)
    return shards if in_place else out


CASES = (
    *span_cases(),
    *subspace_cases(),
    *contraction_cases(),
    *influence_cases(),
    *sketch_cases(),
    *structured_sketch_cases(),
    *cross_entropy_cases(),
    *step_cases(),
    *balance_loss_cases(),
)
