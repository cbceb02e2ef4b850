"""Gram matrices of gradient sets over many shards: partial products per block, then one sum per segment."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import Group, Work, accumulation_dtype, contiguous, on_device, prepare
from fastproj.kernels._compile import CompileCase
from fastproj.kernels._tiles import block_fields, flat_products, row_products, set_pointers

MOST_SETS = 8
# (elements, warps) of a tile by number of sets: (sets + pairs) · elements / threads values live in registers.
TILES = {
    1: (2048, 4),
    2: (1024, 4),
    3: (1024, 4),
    4: (512, 4),
    5: (512, 4),
    6: (512, 4),
    7: (256, 4),
    8: (256, 4),
}
REDUCE_FEW = (64, 8)  # (segments, slots) of a tile where segments have few slots each
REDUCE_MANY = (1, 1024)


@triton.jit(do_not_specialize=["shards", "slots"])
def _partial_kernel(
    addresses, blocks, partials, shards, slots,
    DTYPES: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``partials[ab, slot] = Σ x_a x_b`` over one block; a narrow row has a slot of its own."""
    slots = slots.to(tl.int64)
    shard, start, length, width, slot, _ = block_fields(blocks, ALIGNED, EVEN and COLUMNS == 0)
    pointers = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        if ALIGNED:
            width = tl.multiple_of(width, 16)
        for row in range(0, length, ROWS):
            sums = row_products(pointers, row, length, width, ROWS, COLUMNS, ACC)
            rows = row + tl.arange(0, ROWS)
            for pair in tl.static_range(len(sums)):
                tl.store(partials + pair * slots + slot + rows, sums[pair], mask=rows < length)
    else:
        sums = flat_products(pointers, length, CHUNK, ACC)
        for pair in tl.static_range(len(sums)):
            tl.store(partials + pair * slots + slot, sums[pair])


@triton.jit(do_not_specialize=["slots", "count"])
def _segment_sum_kernel(
    partials, bounds, gram, slots, count,
    SETS: tl.constexpr, SEGMENTS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """``gram[s,a,b] = gram[s,b,a] = Σ_{slots of s} partials[ab]`` in a fixed order, SEGMENTS at a time."""
    slots = slots.to(tl.int64)
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    inside = segment < count
    low = tl.load(bounds + segment, mask=inside, other=0)
    high = tl.load(bounds + segment + 1, mask=inside, other=0)
    longest = tl.max(high - low, axis=0)
    for a in tl.static_range(SETS):
        for b in tl.static_range(a, SETS):
            pair = partials + (a * SETS - a * (a - 1) // 2 + b - a) * slots
            sums = tl.zeros([SEGMENTS], tl.float64)
            for at in range(0, longest, REDUCE):
                slot = low[:, None] + (at + tl.arange(0, REDUCE))[None, :]
                tile = tl.load(pair + slot, mask=slot < high[:, None], other=0.0)
                sums += tl.sum(tile, axis=1)
            entry = gram + segment * (SETS * SETS)
            tl.store(entry + a * SETS + b, sums, mask=inside)
            tl.store(entry + b * SETS + a, sums, mask=inside)


def gram(shards: list[Tensor], num_sets: int, first: Sequence[int], rows: bool, count: int) -> Tensor:
    """``M[s,a,b] = Σ_{shards in s} ⟨G_a, G_b⟩`` as (S, K, K) fp64.

    ``shards[k*n + i]`` is shard i of set k. Two launches for up to ``MOST_SETS`` sets and shards of one dtype
    signature and alignment; more sets take a pair of half-lists at a time.
    """
    n = len(shards) // num_sets
    sets = [contiguous(shards[k * n : (k + 1) * n]) for k in range(num_sets)]
    if num_sets <= MOST_SETS:
        return _gram(sets, first, rows, count)
    out = torch.empty(count, num_sets, num_sets, dtype=torch.float64, device=shards[0].device)
    for members in _pairs_of_halves(num_sets):
        index = torch.tensor(members, device=out.device)
        out[:, index[:, None], index[None, :]] = _gram([sets[k] for k in members], first, rows, count)
    return out


def _pairs_of_halves(num_sets: int) -> Iterator[list[int]]:
    half = MOST_SETS // 2
    parts = [list(range(k, min(k + half, num_sets))) for k in range(0, num_sets, half)]
    return (left + right for left, right in combinations(parts, 2))


def _gram(sets: list[list[Tensor]], first: Sequence[int], rows: bool, count: int) -> Tensor:
    work = prepare(sets, first, rows, count, tile_of(len(sets))[0])
    out = torch.empty(count, len(sets), len(sets), dtype=torch.float64, device=sets[0][0].device)
    with on_device(out):
        partials = launch_partials(work, len(sets))
        segments, reduce = REDUCE_MANY if work.plan.slots > 32 * count else REDUCE_FEW
        if count:
            _segment_sum_kernel[(triton.cdiv(count, segments),)](
                partials, work.plan.bounds, out, work.plan.slots, count, len(sets), segments, reduce
            )
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
        chunk, warps = partial_tile(group, num_sets)
        rows = chunk // group.columns if group.columns else 0
        _partial_kernel[(len(group.blocks),)](
            work.addresses, group.blocks, partials, work.shards, work.plan.slots,
            DTYPES=group.device_dtypes[:num_sets], ACC=accumulation_dtype(group.dtypes[:num_sets]),
            CHUNK=chunk, ROWS=rows, COLUMNS=group.columns, ALIGNED=group.aligned, EVEN=group.even,
            num_warps=warps,
        )  # fmt: skip
    return partials


def tile_of(num_sets: int) -> tuple[int, int]:
    """(elements, warps) of a tile over ``num_sets`` sets."""
    return TILES[min(num_sets, MOST_SETS)]


def partial_tile(group: Group, num_sets: int) -> tuple[int, int]:
    """As ``tile_of``, with half the elements where they take two registers each."""
    chunk, warps = tile_of(num_sets)
    return (chunk // 2 if torch.float64 in group.dtypes[:num_sets] else chunk), warps


def _case(
    name: str, dtypes: tuple[tl.dtype, ...], columns: int = 0, aligned: bool = True, quick: bool = True
) -> CompileCase:
    chunk, warps = TILES[len(dtypes)]
    wide = tl.float64 in dtypes
    chunk = chunk // 2 if wide else chunk
    return CompileCase(
        name=name,
        kernel=_partial_kernel,
        signature={
            "addresses": "*i64", "blocks": "*i64", "partials": "*fp64", "shards": "i32", "slots": "i32",
        },
        constexprs={
            "DTYPES": dtypes, "ACC": tl.float64 if wide else tl.float32, "CHUNK": chunk,
            "ROWS": chunk // columns if columns else 0, "COLUMNS": columns,
            "ALIGNED": aligned, "EVEN": aligned,
        },
        divisible_by_16=("addresses", "blocks", "partials"),
        num_warps=warps,
        vector_loads_only=aligned and len(dtypes) < 4,
        max_registers=160,
        quick=quick,
    )  # fmt: skip


COMPILE_SIGNATURES = (
    _case("partials fp32", (tl.float32, tl.float32)),
    _case("partials fp32 with narrow rows", (tl.float32, tl.float32), columns=16),
    _case("partials bf16", (tl.bfloat16, tl.bfloat16), quick=False),
    _case("partials bf16 and fp32", (tl.bfloat16, tl.float32), quick=False),
    _case("partials fp64", (tl.float64, tl.float64), quick=False),
    _case("partials fp32 unaligned", (tl.float32, tl.float32), aligned=False, quick=False),
    _case("partials of eight sets", (tl.float32,) * 8, quick=False),
    CompileCase(
        name="segment sums",
        kernel=_segment_sum_kernel,
        signature={"partials": "*fp64", "bounds": "*i64", "gram": "*fp64", "slots": "i32", "count": "i32"},
        constexprs={"SETS": 2, "SEGMENTS": REDUCE_FEW[0], "REDUCE": REDUCE_FEW[1]},
        divisible_by_16=("partials", "bounds", "gram"),
        quick=False,
    ),
)
