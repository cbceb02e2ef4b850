"""Results depend on the inputs alone, bit for bit: not on the run, the neighbours, the chip, and not on the
order of the shards where segments do not mix them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from devices import DEVICE, GPU_MARKS
from span_inputs import random_sets
from torch import Tensor

pytest.importorskip("triton")

from fastproj.kernels import _blocks, _project_out_plan
from fastproj.kernels.combine import combine
from fastproj.kernels.edge import edge
from fastproj.kernels.gram import gram
from fastproj.kernels.per_sample_grad import per_sample_grad
from fastproj.kernels.project_out import project_out
from fastproj.kernels.weighted_grad import weighted_grad
from fastproj.reference.basis import orthonormalize
from fastproj.reference.segments import Segments, segmentation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    *GPU_MARKS,
]

SHAPES = ((5000,), (40, 8), (3, 511), (2, 700), (1025,), (9, 33))
ORDER = (3, 0, 5, 2, 4, 1)
DTYPES = (torch.float32, torch.bfloat16)
APART = ("tensor", "row")


def sets_of(seed: int = 0, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    return [[shard.to(DEVICE) for shard in shards] for shards in random_sets(2, shapes, DTYPES, seed=seed)]


def permuted(sets: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[shards[i] for i in ORDER] for shards in sets]


def gram_of(sets: list[list[Tensor]], segments: Segments) -> Tensor:
    plan = segmentation(sets[0], segments)
    return gram([*sets[0], *sets[1]], 2, plan.first, plan.rows, plan.count)


def edge_of(sets: list[list[Tensor]], segments: Segments, variant: str = "paper") -> list[Tensor]:
    """The outputs, then the Gram and the coefficients."""
    plan, out = segmentation(sets[0], segments), [torch.empty_like(shard) for shard in sets[0]]
    stats = edge(sets[0], sets[1], out, plan.first, plan.rows, plan.count, 0.7, variant, False)
    return [*out, *stats]


def combine_of(sets: list[list[Tensor]], coefficients: Tensor, segments: Segments) -> list[Tensor]:
    plan, out = segmentation(sets[0], segments), [torch.empty_like(shard) for shard in sets[0]]
    combine([*sets[0], *sets[1]], coefficients, plan.first, plan.rows, out)
    return out


def order_of_segments(sets: list[list[Tensor]], segments: Segments) -> Tensor:
    """Where the permuted shards' segments were before."""
    plan = segmentation(sets[0], segments)
    ends = [*plan.first[1:], plan.count]
    pieces = [torch.arange(first, end) for first, end in zip(plan.first, ends, strict=True)]
    return torch.cat([pieces[i] for i in ORDER]).to(DEVICE)


def layer(samples: int = 4, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((samples, tokens, 40), (samples, tokens, 8), (2, samples))
    x, delta, weights = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return x.bfloat16(), delta.bfloat16(), weights


def project_out_of(order: Sequence[int], left: bool) -> list[Tensor]:
    """Shards in this order: those with vectors of 304 out of 40 directions, in chunks, others out of one."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for shape in ((16, 40), (8, 304), (304, 8), (3, 511)):
        length = shape[0 if left else 1]
        vectors = torch.randn(length, 40 if length == 304 else 1, generator=generator)
        shard = torch.randn(shape, generator=generator)
        made.append((shard.to(DEVICE), orthonormalize(vectors).matrix.to(DEVICE)))
    shards, bases = ([made[i][part] for i in order] for part in range(2))
    out = [torch.empty_like(shard) for shard in shards]
    project_out(shards, bases, range(len(shards)), left, out)
    return out


def everything() -> list[Tensor]:
    """Each launcher once, over inputs made anew."""
    sets = sets_of()
    coefficients = torch.linspace(-1, 2, 2 * len(SHAPES), dtype=torch.float64, device=DEVICE).reshape(-1, 2)
    x, delta, weights = layer()
    return [
        gram_of(sets, "global"),
        gram_of(sets, "row"),
        *edge_of(sets, "global"),
        *edge_of(sets, "row", "released"),
        *combine_of(sets, coefficients, "tensor"),
        *project_out_of(range(4), False),
        *project_out_of(range(4), True),
        weighted_grad(x, delta, weights),
        per_sample_grad(x, delta),
    ]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_runs_agree_whatever_lies_around() -> None:
    """Other addresses, dirty memory from the allocator, tables made anew."""
    first = everything()
    assert all(tensor.isfinite().all() for tensor in first)
    dirt = [torch.full((number * 700,), torch.nan, device=DEVICE) for number in range(1, 20)]
    del dirt[::2]
    _blocks._plan.cache_clear()
    _project_out_plan._groups.cache_clear()
    _blocks.address_table.cache_clear()
    assert_same(everything(), first)


@pytest.mark.parametrize("segments", APART)
def test_shard_order_without_effect_on_the_gram_of_each(segments: str) -> None:
    sets = sets_of()
    want = gram_of(sets, segments)[order_of_segments(sets, segments)]
    assert torch.equal(gram_of(permuted(sets), segments), want)


@pytest.mark.parametrize(
    ("segments", "variant"),
    [(segments, variant) for segments in APART for variant in ("paper", "naive", "subtract")]
    + [("row", "released")],
)
def test_shard_order_without_effect_on_edge(segments: str, variant: str) -> None:
    sets = sets_of()
    *out, products, coefficients = edge_of(sets, segments, variant)
    at = order_of_segments(sets, segments)
    got = edge_of(permuted(sets), segments, variant)
    assert_same(got, [*(out[i] for i in ORDER), products[at], coefficients[at]])


@pytest.mark.parametrize("segments", APART)
def test_shard_order_without_effect_on_combinations(segments: str) -> None:
    sets = sets_of()
    count = segmentation(sets[0], segments).count
    coefficients = torch.randn(count, 2, dtype=torch.float64, device=DEVICE)
    out = combine_of(sets, coefficients, segments)
    got = combine_of(permuted(sets), coefficients[order_of_segments(sets, segments)], segments)
    assert_same(got, [out[i] for i in ORDER])


@pytest.mark.parametrize("left", [False, True])
def test_shard_order_without_effect_on_subspace_projections(left: bool) -> None:
    order, want = (2, 0, 3, 1), project_out_of(range(4), left)
    assert_same(project_out_of(order, left), [want[i] for i in order])


def test_shard_order_in_one_segment_changes_the_order_of_the_sum_alone() -> None:
    """The blocks' products are the same numbers; in fp64 they are added in the order of the shards."""
    sets = sets_of()
    one, other = gram_of(sets, "global"), gram_of(permuted(sets), "global")
    root = one.diagonal(dim1=1, dim2=2).sqrt()
    # Seven blocks in two orders: six roundings each, of sums no larger than the product of the norms.
    allowed = 2 * 6 * torch.finfo(torch.float64).eps * root[:, :, None] * root[:, None, :]
    assert ((one - other).abs() <= allowed).all()


def test_other_segments_do_not_matter() -> None:
    """A shard's results are the same among others, as long as blocks are of the smallest size."""
    sets = sets_of()
    assert sum(shard.numel() for shard in sets[0]) < _blocks.BLOCKS * _blocks.SMALLEST_PIECE
    *out, products, coefficients = edge_of(sets, "tensor")
    for i in range(len(SHAPES)):
        alone = edge_of([[shards[i]] for shards in sets], "tensor")
        assert_same(alone, [out[i], products[i : i + 1], coefficients[i : i + 1]])


def test_other_samples_do_not_matter() -> None:
    x, delta, _ = layer()
    whole = per_sample_grad(x, delta)
    for i in range(len(x)):
        assert torch.equal(per_sample_grad(x[i : i + 1], delta[i : i + 1])[0], whole[i])
    order = [2, 0, 3, 1]
    assert torch.equal(per_sample_grad(x[order], delta[order]), whole[order])


def test_sample_order_changes_the_order_of_the_weighted_sum_alone() -> None:
    """The sum runs over the samples in their order, in fp32: close, and not equal bit for bit."""
    x, delta, weights = layer()
    order = [2, 0, 3, 1]
    one, other = weighted_grad(x, delta, weights), weighted_grad(x[order], delta[order], weights[:, order])
    magnitude = torch.einsum("ki,ita,itb->kab", weights.abs(), delta.abs().float(), x.abs().float())
    # Of bf16 one rounding may fall the other way; below it 1,200 fp32 terms are added in another order.
    allowed = torch.finfo(torch.bfloat16).eps * one.abs() + 1200 * torch.finfo(torch.float32).eps * magnitude
    assert ((one - other).abs() <= allowed).all()


def test_the_chip_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and splits are functions of shapes, so that a sum has one order on every chip."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the launcher asked which chip it runs on")

    want = everything()
    for question in ("get_device_properties", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, question, refuse)
    _blocks._plan.cache_clear()
    _project_out_plan._groups.cache_clear()
    assert_same(everything(), want)
