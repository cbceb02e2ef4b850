"""Gram matrices of gradient sets over many shards: partial products per block, then one sum per segment."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import (
    COLUMN_CHOICES,
    THREADS,
    Work,
    accumulation_dtype,
    contiguous,
    device_dtypes,
    launch_options,
    on_device,
    prepare,
    tile_of,
)
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._span_cases import (
    ALIKE,
    MIXED,
    PARTIALS,
    PER_ROW,
    SCALED_AGAIN,
    alternating,
    bytes_a_turn,
    span_name,
    unaligned,
)
from fastproj.kernels._tiles import block_fields, flat_products, row_products, set_pointers

MOST_SETS = 8  # of a launch, whose registers hold a sum for each pair
MOST_SETS_OF_ROWS = 6  # as many where sums are of rows, in fp64
REDUCE_FEW = (64, 8)  # (segments, slots) of a tile where segments have few slots each
REDUCE_MANY = (1, 1024)


@triton.jit
def store_row_sums(partials, slots, sums, rows, length):
    """A partial sum of each pair for each narrow row."""
    for pair in tl.static_range(len(sums)):
        tl.store(partials + pair * slots + rows, sums[pair], mask=rows < length)


@triton.jit(do_not_specialize=["shards", "slots"])
def _partial_kernel(
    addresses, blocks, partials, shards, slots,
    DTYPES: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``partials[ab, slot] = Σ x_a x_b`` over one block; a narrow row has a slot of its own."""
    slots = slots.to(tl.int64)
    shard, start, length, width, slot, _ = block_fields(blocks, ALIGNED)
    pointers = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        for row in range(0, length, ROWS):
            sums = row_products(pointers, row, length, width, ROWS, COLUMNS, ACC)
            store_row_sums(partials + slot, slots, sums, row + tl.arange(0, ROWS), length)
    else:
        sums = flat_products(pointers, length, CHUNK, VECTOR, ACC)
        for pair in tl.static_range(len(sums)):
            tl.store(partials + pair * slots + slot, sums[pair])


@triton.jit(do_not_specialize=["slots", "count", "sets"])
def _segment_sum_kernel(
    partials, bounds, gram, slots, count, sets, SEGMENTS: tl.constexpr, REDUCE: tl.constexpr
):  # fmt: skip
    """``gram[s,a,b] = Σ_{slots of s} partials[ab]`` in a fixed order: SEGMENTS of them, one entry (a, b)."""
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    a, b = tl.program_id(1) // sets, tl.program_id(1) % sets
    low_set, high_set = tl.minimum(a, b), tl.maximum(a, b)
    pair = (low_set * sets - low_set * (low_set - 1) // 2 + high_set - low_set).to(tl.int64)
    inside = segment < count
    low = tl.load(bounds + segment, mask=inside, other=0)
    high = tl.load(bounds + segment + 1, mask=inside, other=0)
    sums = tl.zeros([SEGMENTS], tl.float64)
    for at in range(0, tl.max(high - low, axis=0), REDUCE):
        slot = low[:, None] + (at + tl.arange(0, REDUCE))[None, :]
        tile = tl.load(partials + pair * slots + slot, mask=slot < high[:, None], other=0.0)
        sums += tl.sum(tile, axis=1)
    tl.store(gram + (segment * sets + a) * sets + b, sums, mask=inside)


def gram(shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int) -> Tensor:
    """``M[s,a,b] = Σ_{shards in s} ⟨G_a, G_b⟩`` as (S, K, K) fp64.

    ``shards[k*n + i]`` is shard i of set k. Two launches for up to ``MOST_SETS`` sets and shards of one dtype
    signature and alignment; more sets take a pair of half-lists at a time.
    """
    n = len(shards) // num_sets
    sets = [contiguous(shards[k * n : (k + 1) * n]) for k in range(num_sets)]
    most = MOST_SETS_OF_ROWS if rows else MOST_SETS
    if num_sets <= most:
        return _gram(sets, first, rows, count)
    out = torch.empty(count, num_sets, num_sets, dtype=torch.float64, device=shards[0].device)
    for members in _pairs_of_halves(num_sets, most // 2):
        index = torch.tensor(members, device=out.device)
        out[:, index[:, None], index[None, :]] = _gram([sets[k] for k in members], first, rows, count)
    return out


def _pairs_of_halves(num_sets: int, half: int) -> Iterator[list[int]]:
    parts = [list(range(k, min(k + half, num_sets))) for k in range(0, num_sets, half)]
    return (left + right for left, right in combinations(parts, 2))


def _gram(sets: list[list[Tensor]], first: Sequence[int], rows: bool, count: int) -> Tensor:
    work = prepare(sets, first, rows, count)
    out = torch.empty(count, len(sets), len(sets), dtype=torch.float64, device=sets[0][0].device)
    with on_device(out):
        partials = launch_partials(work, len(sets))
        segments, reduce = REDUCE_MANY if work.plan.slots > 32 * count else REDUCE_FEW
        if count:
            _segment_sum_kernel[(triton.cdiv(count, segments), len(sets) ** 2)](
                partials, work.plan.bounds, out, work.plan.slots, count, len(sets), segments, reduce,
                **launch_options(THREADS),
            )  # fmt: skip
    return out


def launch_partials(work: Work, num_sets: int) -> Tensor:
    """The products of each block, (K(K+1)/2, slots) fp64: the first of the two launches.

    The first ``num_sets`` lists of ``work`` are the sets.
    """
    device = work.addresses.device
    partials = torch.empty(
        num_sets * (num_sets + 1) // 2, work.plan.slots, dtype=torch.float64, device=device
    )
    for group in work.plan.groups:
        _partial_kernel[(len(group.blocks),)](
            work.addresses, group.blocks, partials, work.shards, work.plan.slots,
            **partial_configuration(group.dtypes[:num_sets], group.columns, group.aligned),
            **launch_options(THREADS),
        )  # fmt: skip
    return partials


def partial_configuration(dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> dict[str, Any]:
    """The constants of the kernel for shards of these dtypes, one per set: whole 128-bit loads a thread."""
    chunk, vector = tile_of(dtypes, aligned)
    return {
        "DTYPES": device_dtypes(dtypes), "ACC": accumulation_dtype(dtypes), "CHUNK": chunk, "VECTOR": vector,
        "ROWS": chunk // columns if columns else 0, "COLUMNS": columns, "ALIGNED": aligned,
    }  # fmt: skip


def _case(sets: int, dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> CompileCase:
    own = alternating(dtypes, sets)
    return CompileCase(
        name=f"partials, {span_name(own, columns, aligned)}",
        kernel=_partial_kernel,
        signature={
            "addresses": "*i64", "blocks": "*i64", "partials": "*fp64", "shards": "i32", "slots": "i32",
        },
        constexprs=partial_configuration(own, columns, aligned),
        divisible_by_16=("addresses", "blocks", "partials"),
        threads=THREADS,
        bytes_a_turn=bytes_a_turn(sets, aligned),
        narrow_accesses=(
            {**SCALED_AGAIN, "store_row_sums": PER_ROW} if aligned else unaligned("_partial_kernel")
        ),
    )  # fmt: skip


COMPILE_CASES = (
    *(
        _case(**choice)
        for choice in every_pair(
            dtypes=ALIKE,
            sets=range(1, MOST_SETS_OF_ROWS + 1),
            columns=(0, *COLUMN_CHOICES),
            aligned=(True, False),
        )
    ),
    *(
        _case(sets, dtypes, 0, aligned)
        for sets, aligned in ((MOST_SETS - 1, True), (MOST_SETS, True), (MOST_SETS, False))
        for dtypes in ALIKE
    ),
    _case(2, MIXED, 0, True),
    _case(4, MIXED, 16, False),
    *(
        CompileCase(
            name=f"segment sums, {segments} × {reduce}",
            kernel=_segment_sum_kernel,
            signature={
                "partials": "*fp64",
                "bounds": "*i64",
                "gram": "*fp64",
                "slots": "i32",
                "count": "i32",
                "sets": "i32",
            },
            constexprs={"SEGMENTS": segments, "REDUCE": reduce},
            divisible_by_16=("partials", "bounds", "gram"),
            threads=THREADS,
            narrow_accesses={"_segment_sum_kernel": PARTIALS},
        )
        for segments, reduce in (REDUCE_FEW, REDUCE_MANY)
    ),
)
