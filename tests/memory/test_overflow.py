"""Offsets beyond 2³¹ elements: the launchers choose int64, work lists stay exact, and far values are found.

Tensors here are on the "meta" device, or views of memory that is reserved and never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import DEVICE, on_gpu
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from fastproj.kernels import _blocks, combine, per_sample_grad, project_out, weighted_grad
from fastproj.kernels import _project_out_plan as project_out_plan
from fastproj.kernels.gram import launch_partials
from fastproj.kernels.weighted_grad import index_dtype
from fastproj.reference.basis import orthonormalize

INT32 = 2**31
LARGEST_TILE = 2048  # elements that a lane's offset may lie past the end of a block

LAYER_70B = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192)) + ((28672, 8192),) * 2 + ((8192, 28672),)
FLAT_LISTS = {
    "2³³ elements": ((1, 2**33),),
    "2⁴² elements in one shard": ((1, 2**42),),
    "2⁴² elements in shards of 2³⁶": ((1, 2**36),) * 64,
    "all but one of 2⁴²": ((1, 2**42 - 1),),
    "Llama 3.1 70B, dense": (*((128256, 8192),) * 2, *LAYER_70B * 80),
}
ROW_LISTS = {
    "wide rows": ((5, 2**33 + 7), (3, 2**31 - 1), (1, 2**40)),
    "narrow rows and others": ((2**16 + 1, 3), (2**15, 511), (2**15, 512), (1, 2**42)),
    "a layer of Llama 3.1 70B": LAYER_70B,
}


def plan_of(shapes: Sequence[tuple[int, int]], rows: bool) -> _blocks.Plan:
    """The work list over fp32 shards of (rows, width), each row a segment where ``rows`` says so."""
    if not rows:
        shapes = tuple((1, number * width) for number, width in shapes)
    first = [sum(number for number, _ in shapes[:i]) if rows else 0 for i in range(len(shapes))]
    count = sum(number for number, _ in shapes) if rows else 1
    n = len(shapes)
    signature = ((torch.float32,),) * n
    return _blocks._plan.__wrapped__(
        tuple(shapes), tuple(first), rows, count, signature, (True,) * n, torch.device("cpu")
    )


def assert_blocks_are_exact(plan: _blocks.Plan, sizes: Sequence[int]) -> None:
    """Every element lies in one block, and every offset inside a block is an int32."""
    blocks = torch.cat([group.blocks for group in plan.groups])
    assert blocks.dtype == torch.int64
    blocks = blocks[blocks[:, 2] > 0]
    narrow = blocks[:, 3] != _blocks.FLAT
    elements = blocks[:, 2] * torch.where(narrow, blocks[:, 3], 1)
    assert int(elements.max()) + LARGEST_TILE <= INT32
    assert int(blocks[:, 2].max()) + LARGEST_TILE <= INT32
    assert int(blocks[:, 3].max()) < INT32
    for shard, size in enumerate(sizes):
        own = blocks[:, 0] == shard
        start, order = blocks[own, 1].sort()
        end = start + elements[own][order]
        assert int(start[0]) == 0
        assert torch.equal(start[1:], end[:-1])
        assert int(end[-1]) == size


@pytest.mark.parametrize("name", FLAT_LISTS)
def test_work_list_of_flat_shards(name: str) -> None:
    shapes = FLAT_LISTS[name]
    assert_blocks_are_exact(plan_of(shapes, False), [number * width for number, width in shapes])


@pytest.mark.parametrize("name", ROW_LISTS)
def test_work_list_of_rows(name: str) -> None:
    shapes = ROW_LISTS[name]
    plan = plan_of(shapes, True)
    assert_blocks_are_exact(plan, [number * width for number, width in shapes])
    assert plan.slots == int(plan.bounds[-1]) < INT32


@pytest.mark.parametrize(
    ("number", "width", "piece"),
    [
        (2**20 + 1, 3, _blocks.SMALLEST_PIECE),
        (2**33 + 1, 3, 2**25),
        (2**31 - 5, 511, _blocks.LARGEST_PIECE),
        (2**40, 16, _blocks.LARGEST_PIECE),
        (2**36, 0, _blocks.LARGEST_PIECE),
    ],
)
def test_blocks_of_narrow_rows(number: int, width: int, piece: int) -> None:
    """One shard's blocks; the segments of so many rows would themselves take tens of gigabytes."""
    table, slots_of_row = _blocks._cut(0, 0, number, width, 0, piece)
    assert slots_of_row == 1
    assert int(table[:, 2].sum()) == number
    assert torch.equal(table[1:, 1], (table[:-1, 2] * width).cumsum(0))
    assert int((table[:, 2] * width).max()) + LARGEST_TILE <= INT32
    assert torch.equal(table[:, 4] * width, table[:, 1])


def test_every_block_is_counted_in_int32_at_any_size() -> None:
    assert _blocks.LARGEST_PIECE + LARGEST_TILE <= INT32
    assert _blocks.LARGEST_PIECE % _blocks.PIECE_STEP == 0


def meta(*shape: int, stride: Sequence[int] | None = None) -> Tensor:
    tensor = torch.empty(1, dtype=torch.bfloat16, device="meta")
    return tensor.new_empty_strided(shape, stride) if stride else tensor.new_empty(shape)


@pytest.mark.parametrize(
    ("tensor", "want"),
    [
        (meta(1, 2**21, 2**10), tl.int32),  # the last offset is 2³¹ − 1
        (meta(1, 2**21 + 1, 2**10), tl.int64),
        (meta(2, 1, 1, stride=(INT32 - 1, 1, 1)), tl.int32),
        (meta(2, 1, 1, stride=(INT32, 1, 1)), tl.int64),
        (meta(3, 1, 1, stride=(2**30, 1, 1)), tl.int64),
        (meta(2, 2, 1, stride=(2**30, 2**30, 1)), tl.int64),  # neither stride by itself
        (meta(2**40, 1, 1, stride=(0, 1, 1)), tl.int32),  # expanded
        (meta(1, 1, 8, stride=(2**40, 2**40, 1)), tl.int32),  # strides that nobody takes
    ],
)
def test_index_dtype(tensor: Tensor, want: tl.dtype) -> None:
    assert index_dtype(tensor) == want
    assert index_dtype(meta(4), tensor) == want
    assert index_dtype(tensor, meta(4)) == want


class Launches:
    """Stands in for a kernel and keeps the constants of its launches."""

    def __init__(self) -> None:
        self.constants: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **constants: self.constants.append(constants)


@pytest.mark.parametrize(
    ("x", "delta", "sums", "want_sum", "want_each"),
    [
        (meta(8, 2048, 4096), meta(8, 2048, 16), 2, tl.int32, tl.int32),
        (meta(65, 8192, 4096), meta(65, 8192, 16), 2, tl.int64, tl.int64),  # x
        (meta(65, 8192, 16), meta(65, 8192, 4096), 2, tl.int64, tl.int64),  # delta
        (meta(40, 4, 8192), meta(40, 4, 8192), 1, tl.int32, tl.int64),  # the result of each sample
        (meta(2, 4, 4096), meta(2, 4, 4096), 200, tl.int64, tl.int32),  # many sums
        (meta(3, 4, 16, stride=(2**30, 16, 1)), meta(3, 4, 8), 1, tl.int64, tl.int64),  # far apart
    ],
)
def test_launchers_choose_int64(
    x: Tensor,
    delta: Tensor,
    sums: int,
    want_sum: tl.dtype,
    want_each: tl.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sum_launches, each_launches, split_launches = Launches(), Launches(), Launches()
    monkeypatch.setattr(weighted_grad, "weighted_sum_kernel", sum_launches)
    monkeypatch.setattr(weighted_grad, "sum_splits_kernel", split_launches)
    monkeypatch.setattr(per_sample_grad, "outer_sum_kernel", each_launches)
    weighted_grad.weighted_grad(x, delta, meta(sums, x.shape[0]))
    per_sample_grad.per_sample_grad(x, delta)
    assert [launch["INDEX"] for launch in sum_launches.constants] == [want_sum]
    assert [launch["INDEX"] for launch in each_launches.constants] == [want_each]


@pytest.fixture(scope="module")
def reserved() -> Tensor:
    """More than 2³¹ bf16 elements that nobody has touched, so that almost none of them take memory."""
    return torch.empty(INT32 + 2**22, dtype=torch.bfloat16, device=DEVICE)


@on_gpu
@pytest.mark.parametrize("far", ["samples", "tokens"])
@pytest.mark.parametrize("narrow", ["x", "delta"])
@pytest.mark.parametrize("name", ["weighted_grad", "per_sample_grad"])
def test_contractions_find_far_values(name: str, narrow: str, far: str, reserved: Tensor) -> None:
    """Three samples or three tokens 2³⁰ elements apart, against the same values side by side."""
    shape = (3, 2) if far == "samples" else (2, 3)
    stride = (2**30 + 16, 64) if far == "samples" else (64, 2**30 + 16)
    columns = (8, 24) if narrow == "x" else (24, 8)
    near = [torch.randn(*shape, d, generator=torch.Generator().manual_seed(d)) for d in columns]
    x, delta = (tensor.to(DEVICE, torch.bfloat16) for tensor in near)
    far_x = reserved.as_strided(x.shape, (*stride, 1)).copy_(x)
    far_delta = reserved.as_strided(delta.shape, (*stride, 1), 32).copy_(delta)
    assert index_dtype(far_x) == index_dtype(far_delta) == tl.int64
    weights = torch.rand(2, shape[0], device=DEVICE)
    if name == "weighted_grad":
        got = weighted_grad.weighted_grad(far_x, far_delta, weights)
        want = weighted_grad.weighted_grad(x, delta, weights)
    else:
        got, want = (
            per_sample_grad.per_sample_grad(far_x, far_delta),
            per_sample_grad.per_sample_grad(x, delta),
        )
    assert want.any(dim=0).all()
    assert torch.equal(got, want)


def last_block_alone(work: _blocks.Work) -> _blocks.Work:
    """The interpreter cannot walk 2³¹ elements; the last few show where they are looked for."""
    (group,) = work.plan.groups
    blocks = group.blocks[group.blocks[:, 1].argmax()][None]
    return replace(work, plan=replace(work.plan, groups=(replace(group, blocks=blocks.contiguous()),)))


def far_shard(reserved: Tensor) -> tuple[Tensor, Tensor]:
    """A shard whose last block begins beyond 2³¹ and is short; and that block."""
    piece = 2**21 + 2 * _blocks.PIECE_STEP
    shard = reserved[: 1023 * piece + 5001]
    assert 1023 * piece > INT32
    return shard, shard[1023 * piece :]


@on_gpu
def test_combination_finds_a_far_block(reserved: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, tail = far_shard(reserved)
    values = torch.randn(len(tail), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    tail.copy_(values)
    seen = []

    def prepare(*args: Any, **kwargs: Any) -> _blocks.Work:
        seen.append(last_block_alone(_blocks.prepare(*args, **kwargs)))
        return seen[-1]

    monkeypatch.setattr(combine, "prepare", prepare)
    coefficients = torch.tensor([[0.5, -2.5]], dtype=torch.float64, device=DEVICE)
    combine.combine([shard, shard], coefficients, (0,), False, [shard])
    assert seen[0].plan.groups[0].blocks[0, 1:3].tolist() == [shard.numel() - len(tail), len(tail)]
    assert torch.equal(tail, -2 * values)


@on_gpu
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_products_find_a_far_block(reserved: Tensor) -> None:
    shard, tail = far_shard(reserved)
    tail.fill_(0.5)
    work = last_block_alone(_blocks.prepare([[shard], [shard]], (0,), False, 1))
    partials = launch_partials(work, 2)
    assert partials[:, -1].tolist() == [len(tail) / 4] * 3


@on_gpu
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("length", "rank"), [(64, 2), (1024, 33)])
def test_subspace_projections_find_a_far_block(
    left: bool, length: int, rank: int, reserved: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On chip and in chunks, in a shard of more than 2³¹ elements and alone."""
    vectors = reserved.numel() // length
    shard = reserved.view(length, vectors) if left else reserved.view(vectors, length)
    basis = orthonormalize(torch.randn(length, rank, generator=torch.Generator().manual_seed(1))).matrix
    on_chip = project_out_plan.length_on_chip(length, rank, left, shard.dtype)
    side = project_out_plan.tile_elements(shard.dtype) // on_chip if on_chip else 16
    tail = shard[:, -side:] if left else shard[-side:]
    near = torch.randn(tail.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    tail.copy_(near)

    def prepare(*args: Any) -> project_out_plan.Work:
        work = project_out_plan.prepare(*args)
        (group,) = work.groups
        return replace(work, groups=(replace(group, blocks=group.blocks[-1:].contiguous()),))

    project_out.project_out([near], [basis.to(DEVICE)], [0], left, [near])
    monkeypatch.setattr(project_out, "prepare", prepare)
    project_out.project_out([shard], [basis.to(DEVICE)], [0], left, [shard])
    assert torch.equal(tail, near)
    assert near.any()


def test_more_than_int32_counts_is_refused() -> None:
    """Token numbers, and offsets into one sample's gradient, are int32 in device code."""
    many = weighted_grad.MOST_POSITIONS + 1
    x, delta = (torch.empty(1, many, width, device="meta") for width in (3, 2))
    with pytest.raises(ValueError, match=f"at most {many - 1} tokens in a batch, got {many}"):
        weighted_grad.weighted_grad(x, delta, torch.empty(1, 1, device="meta"))
    side = 2**15
    x, delta = (torch.empty(1, 4, width, device="meta") for width in (side, side + 1))
    with pytest.raises(ValueError, match=f"elements in a sample's gradient, got {side * (side + 1)}"):
        per_sample_grad.per_sample_grad(x, delta)
