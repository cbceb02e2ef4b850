"""Projection of shards onto the complement of a subspace: each vector without its part along k directions.

Short vectors lie whole in a program's registers while one direction after the other is taken out of them
(modified Gram–Schmidt), so every element is read once and written once. Long ones pass through twice, a chunk
at a time: for their coefficients, then to be projected.
"""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: SIM300

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import (
    ALIGNMENT,
    DEVICE_DTYPES,
    accumulation_dtype,
    contiguous,
    copy_back,
    launch_options,
    on_device,
)
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._project_out_plan import (
    CHUNK_RANKS,
    CHUNK_VECTORS,
    FIELDS,
    LENGTHS,
    Group,
    length_on_chip,
    prepare,
    tile_elements,
)
from fastproj.kernels._span_cases import unaligned
from fastproj.kernels._tiles import rounded, shard_pointer

THREADS_ON_CHIP = 256
THREADS_OF_CHUNKS = 64
STAGES = 5
SMALLEST_CHUNK = 16  # elements of a vector: the inner side of the smallest matrix product
LARGEST_CHUNK = 64
CHUNK_OF_DIRECTIONS = 1024  # elements of all directions together, a quarter as many in fp64
LEADING_BITS = tl.constexpr(-(2**13))  # of an fp32 number, all but the last 13


@triton.jit
def block_numbers(blocks, FIELDS: tl.constexpr):
    """What this program projects: shard, class of its length, number, vectors of the shard, length, rank."""
    row = blocks + tl.program_id(0).to(tl.int64) * FIELDS
    vectors = tl.load(row + 3).to(tl.int32)
    length = tl.load(row + 4).to(tl.int32)
    return (
        tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32), vectors, length,
        tl.load(row + 5).to(tl.int32),
    )  # fmt: skip


@triton.jit
def tile_places(row, column, rows, columns, ALIGNED: tl.constexpr):
    """Offsets and mask of a tile of a matrix of rows × columns."""
    # Hints stay with a value only inside the function that makes it.
    if ALIGNED:
        columns = columns // 8 * 8
    at = (row.to(tl.int64) * columns)[:, None] + column[None, :]
    return at, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def vector_places(vector, element, vectors, length, LEFT: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets and mask of these elements of these vectors, which are columns where LEFT, else rows."""
    if LEFT:
        at, inside = tile_places(element, vector, length, vectors, ALIGNED)
    else:
        at, inside = tile_places(vector, element, vectors, length, ALIGNED)
    return at, inside


@triton.jit
def load_direction(basis, j, length, LENGTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Direction j, with zeros beyond its end."""
    if ALIGNED:
        length = length // 8 * 8
    element = tl.arange(0, LENGTH)
    start = tl.cast(j, tl.int64) * length
    return tl.load(basis + start + element, mask=element < length, other=0.0)


@triton.jit
def project_on_chip(
    source, target, basis, number, vectors, length, rank,
    LENGTH: tl.constexpr, TILE: tl.constexpr, LEFT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``x ← x − (x·v_j) v_j``, j ascending, for each of TILE // LENGTH whole vectors x.

    In fp64 the products are with x as it came: a basis of fp32 is orthonormal to its own rounding alone.
    """
    along: tl.constexpr = 0 if LEFT else 1
    vector = number * (TILE // LENGTH) + tl.arange(0, TILE // LENGTH)
    at, inside = vector_places(vector, tl.arange(0, LENGTH), vectors, length, LEFT, ALIGNED)
    tile = tl.load(source + at, mask=inside, other=0.0).to(ACC)
    whole = tile
    for j in range(rank):
        direction = tl.expand_dims(load_direction(basis, j, length, LENGTH, ALIGNED), 1 - along)
        if ACC == tl.float32:
            whole = tile
        tile -= tl.sum(whole * direction, axis=along, keep_dims=True) * direction
    tl.store(target + at, rounded(tile, target.dtype.element_ty), mask=inside)


@triton.jit
def _project_on_chip_kernel(
    addresses, blocks, shards,
    DTYPE: tl.constexpr, ACC: tl.constexpr, FIELDS: tl.constexpr, LENGTHS: tl.constexpr, TILE: tl.constexpr,
    LEFT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A block of short vectors, whose class of length is one of LENGTHS."""
    shard, kind, number, vectors, length, rank = block_numbers(blocks, FIELDS)
    source = shard_pointer(addresses, 0, shard, 0, DTYPE, ALIGNED)
    basis = shard_pointer(addresses, shards, shard, 0, ACC, ALIGNED)
    target = shard_pointer(addresses, 2 * shards, shard, 0, DTYPE, ALIGNED)
    for i in tl.static_range(len(LENGTHS)):
        if kind == i:
            project_on_chip(
                source, target, basis, number, vectors, length, rank, LENGTHS[i], TILE, LEFT, ALIGNED, ACC
            )


@triton.jit
def load_directions(basis, element, length, rank, RANK: tl.constexpr, ALIGNED: tl.constexpr):
    """These elements of all directions, (RANK, elements), with zeros for directions that there are not."""
    at, inside = tile_places(tl.arange(0, RANK), element, rank, length, ALIGNED)
    return tl.load(basis + at, mask=inside, other=0.0)


@triton.jit
def exact_dot(a, b, total, CUT_A: tl.constexpr, CUT_B: tl.constexpr):
    """``total + a b`` on tensor cores to the precision of fp32, or of fp64.

    These read 11 significant bits of an fp32 number. What is CUT is cut in two there: the product of both
    rests is below the rounding of the sum, and what is not CUT has no rest.
    """
    if total.dtype == tl.float64:
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float64)
    else:
        a_upper = a
        b_upper = b
        if CUT_A:
            a_upper = (a.to(tl.int32, bitcast=True) & LEADING_BITS).to(tl.float32, bitcast=True)
        if CUT_B:
            b_upper = (b.to(tl.int32, bitcast=True) & LEADING_BITS).to(tl.float32, bitcast=True)
            total = tl.dot(a_upper, b - b_upper, total, input_precision="tf32")
        if CUT_A:
            total = tl.dot(a - a_upper, b_upper, total, input_precision="tf32")
        total = tl.dot(a_upper, b_upper, total, input_precision="tf32")
    return total


@triton.jit
def add_coefficients(total, chunk, directions, LEFT: tl.constexpr, CUT: tl.constexpr):
    """``total + G V`` of a chunk of G: (vectors, RANK), or its transpose where LEFT."""
    if LEFT:
        total = exact_dot(directions, chunk, total, True, CUT)
    else:
        total = exact_dot(chunk, tl.trans(directions), total, CUT, True)
    return total


@triton.jit
def part_inside(coefficients, directions, LEFT: tl.constexpr, ACC: tl.constexpr):
    """``(G V) Vᵀ`` of a chunk, laid out as the chunk."""
    if LEFT:
        zero = tl.zeros([directions.shape[1], coefficients.shape[1]], ACC)
        out = exact_dot(tl.trans(directions), coefficients, zero, True, True)
    else:
        zero = tl.zeros([coefficients.shape[0], directions.shape[1]], ACC)
        out = exact_dot(coefficients, directions, zero, True, True)
    return out


@triton.jit
def load_chunk(pointers, inside, ACC: tl.constexpr):
    """Elements of vectors, zeros where there are none."""
    chunk = tl.load(pointers, mask=inside, other=0.0)
    return chunk.to(ACC)


@triton.jit
def store_chunk(pointers, chunk, inside):
    """The chunk, rounded once."""
    tl.store(pointers, rounded(chunk, pointers.dtype.element_ty), mask=inside)


@triton.jit
def _project_chunks_kernel(
    addresses, blocks, shards,
    DTYPE: tl.constexpr, ACC: tl.constexpr, FIELDS: tl.constexpr, VECTORS: tl.constexpr, CHUNK: tl.constexpr,
    RANK: tl.constexpr, LEFT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``x ← x − Σ_j (x·v_j) v_j`` for a block of long vectors x: the products first, then the difference."""
    shard, _, number, vectors, length, rank = block_numbers(blocks, FIELDS)
    source = shard_pointer(addresses, 0, shard, 0, DTYPE, ALIGNED)
    basis = shard_pointer(addresses, shards, shard, 0, ACC, ALIGNED)
    target = shard_pointer(addresses, 2 * shards, shard, 0, DTYPE, ALIGNED)
    vector = number * VECTORS + tl.arange(0, VECTORS)
    shape: tl.constexpr = (RANK, VECTORS) if LEFT else (VECTORS, RANK)
    coefficients = tl.zeros(shape, ACC)
    for start in range(0, length, CHUNK):
        element = start + tl.arange(0, CHUNK)
        at, inside = vector_places(vector, element, vectors, length, LEFT, ALIGNED)
        chunk = load_chunk(source + at, inside, ACC)
        directions = load_directions(basis, element, length, rank, RANK, ALIGNED)
        coefficients = add_coefficients(coefficients, chunk, directions, LEFT, ACC == DTYPE)
    for start in range(0, length, CHUNK):
        element = start + tl.arange(0, CHUNK)
        at, inside = vector_places(vector, element, vectors, length, LEFT, ALIGNED)
        chunk = load_chunk(source + at, inside, ACC)
        directions = load_directions(basis, element, length, rank, RANK, ALIGNED)
        store_chunk(target + at, chunk - part_inside(coefficients, directions, LEFT, ACC), inside)


def project_out(
    shards: list[Tensor], bases: list[Tensor], owner: Sequence[int], left: bool, out: list[Tensor]
) -> None:
    """``G − (G V) Vᵀ``, or ``G − U (Uᵀ G)`` from the left, in at most two launches per dtype and alignment.

    ``bases[owner[i]]``, (d, k), projects shard i; where ``owner[i]`` is −1 or k is 0, it is copied. ``out``
    may be the shards themselves.
    """
    projected = [
        i for i, shard in enumerate(shards) if owner[i] >= 0 and shard.numel() and bases[owner[i]].shape[1]
    ]
    _copy_others(shards, out, set(projected))
    if not projected:
        return
    sources = contiguous([shards[i] for i in projected])
    targets = [out[i] for i in projected]
    written = contiguous(targets)
    directions = _directions(sources, bases, [owner[i] for i in projected])
    work = prepare(sources, directions, written, left)
    with on_device(sources[0]):
        for group in work.groups:
            launch(group, work.addresses, left)
    copy_back(targets, written)


def launch(group: Group, addresses: Tensor, left: bool) -> None:
    """One launch over the blocks of a group."""
    shards = addresses.shape[1]
    if group.lengths:
        _project_on_chip_kernel[(len(group.blocks),)](
            addresses, group.blocks, shards,
            **on_chip_configuration(group.dtype, group.lengths, left, group.aligned),
            **launch_options(THREADS_ON_CHIP),
        )  # fmt: skip
    else:
        _project_chunks_kernel[(len(group.blocks),)](
            addresses, group.blocks, shards,
            **chunk_configuration(group.dtype, group.rank, left, group.aligned),
            **launch_options(THREADS_OF_CHUNKS, STAGES),
        )  # fmt: skip


def _copy_others(shards: Sequence[Tensor], out: Sequence[Tensor], projected: set[int]) -> None:
    """Shards that nothing projects keep their values, wherever these go."""
    others = [i for i, target in enumerate(out) if i not in projected and target is not shards[i]]
    if others:
        torch._foreach_copy_([out[i] for i in others], [shards[i] for i in others])


def _directions(shards: Sequence[Tensor], bases: Sequence[Tensor], owner: Sequence[int]) -> list[Tensor]:
    """Each shard's basis with its directions side by side, (k, d), in the dtype it is projected in."""
    made: dict[tuple[int, torch.dtype], Tensor] = {}
    for shard, index in zip(shards, owner, strict=True):
        dtype = torch.float64 if shard.dtype == torch.float64 else torch.float32
        if (index, dtype) not in made:
            made[index, dtype] = bases[index].to(dtype).mT.contiguous()
    return [
        made[index, torch.float64 if shard.dtype == torch.float64 else torch.float32]
        for shard, index in zip(shards, owner, strict=True)
    ]


def on_chip_configuration(
    dtype: torch.dtype, lengths: tuple[int, ...], left: bool, aligned: bool
) -> dict[str, Any]:
    """The constants of the kernel for shards of this dtype whose vectors are of these classes of length."""
    return {
        "DTYPE": DEVICE_DTYPES[dtype], "ACC": accumulation_dtype((dtype,)), "FIELDS": FIELDS,
        "LENGTHS": lengths, "TILE": tile_elements(dtype), "LEFT": left, "ALIGNED": aligned,
    }  # fmt: skip


def chunk_configuration(dtype: torch.dtype, rank: int, left: bool, aligned: bool) -> dict[str, Any]:
    """The constants of the kernel for long vectors of this dtype and up to ``rank`` directions."""
    chunk = min(LARGEST_CHUNK, CHUNK_OF_DIRECTIONS // rank // (4 if dtype == torch.float64 else 1))
    # Where nothing is aligned, each element costs a thread an address.
    chunk = max(SMALLEST_CHUNK, chunk if aligned else 0)
    return {
        "DTYPE": DEVICE_DTYPES[dtype], "ACC": accumulation_dtype((dtype,)), "FIELDS": FIELDS,
        "VECTORS": CHUNK_VECTORS, "CHUNK": chunk, "RANK": rank, "LEFT": left, "ALIGNED": aligned,
    }  # fmt: skip


SHORT = "a short direction out of the cache: a thread takes a number or two of it, as there are no more"
LEFT_SO = (
    "AMD's matrix unit leaves a lane four neighbours of fp32 or two of fp64, which are stored as they lie"
)
FEW = "64 directions leave room for 16 elements of 16 vectors: of half precision 8 bytes a thread"
TURNED = "tensor cores read fp64 direction by direction: the copy turns the chunk, an element at a time"


def _name(dtype: torch.dtype, left: bool, aligned: bool, what: str) -> str:
    side = "columns" if left else "rows"
    return f"{dtype} {side} {what}{'' if aligned else ', unaligned'}".removeprefix("torch.")


def _on_chip_case(dtype: torch.dtype, lengths: tuple[int, ...], left: bool, aligned: bool) -> CompileCase:
    shortest = lengths[0] * (8 if dtype == torch.float64 else 4)
    short = {"load_direction": SHORT} if shortest < THREADS_ON_CHIP * ALIGNMENT else {}
    return CompileCase(
        name=_name(dtype, left, aligned, f"of {', '.join(map(str, lengths))}"),
        kernel=_project_on_chip_kernel,
        signature={"addresses": "*i64", "blocks": "*i64", "shards": "i32"},
        constexprs=on_chip_configuration(dtype, lengths, left, aligned),
        divisible_by_16=("addresses", "blocks"),
        threads=THREADS_ON_CHIP,
        bytes_a_turn=tile_elements(dtype) * dtype.itemsize if aligned else None,
        narrow_accesses=short if aligned else unaligned("_project_on_chip_kernel"),
    )


def _chunk_case(dtype: torch.dtype, rank: int, left: bool, aligned: bool) -> CompileCase:
    constants = chunk_configuration(dtype, rank, left, aligned)
    narrow = {} if dtype == torch.float32 else {"store_chunk": LEFT_SO}
    if dtype == torch.float64:
        narrow["load_directions"] = TURNED
    elif constants["CHUNK"] * CHUNK_VECTORS * dtype.itemsize < THREADS_OF_CHUNKS * ALIGNMENT:
        narrow["load_chunk"] = FEW
    # Directions that weigh more than twice the vectors set the pace, from a cache, and not the memory.
    busy = aligned and rank * (8 if dtype == torch.float64 else 4) <= 2 * CHUNK_VECTORS * dtype.itemsize
    return CompileCase(
        name=_name(dtype, left, aligned, f"in chunks, {rank} directions"),
        kernel=_project_chunks_kernel,
        signature={"addresses": "*i64", "blocks": "*i64", "shards": "i32"},
        constexprs=constants,
        divisible_by_16=("addresses", "blocks"),
        threads=THREADS_OF_CHUNKS,
        num_stages=STAGES,
        multiplies=True,
        bytes_a_turn=constants["CHUNK"] * CHUNK_VECTORS * dtype.itemsize if busy else None,
        narrow_accesses=narrow if aligned else unaligned("_project_chunks_kernel"),
        without_tensor_cores={"sm_120": "it has none for fp64"} if dtype == torch.float64 else {},
    )


def _lengths(dtype: torch.dtype, left: bool) -> tuple[int, ...]:
    """The classes of vectors that shards of this dtype have on chip."""
    return tuple(length for length in LENGTHS if length_on_chip(length, 1, left, dtype))


COMPILE_CASES = (
    *(
        _on_chip_case(dtype, (length,), left, True)
        for left in (False, True)
        for dtype in DEVICE_DTYPES
        for length in _lengths(dtype, left)
    ),
    # Several classes in one launch, and each of them where nothing is aligned, in one dtype or another.
    *(
        _on_chip_case(dtype, _lengths(dtype, left), left, True)
        for left in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        _on_chip_case(dtype, _lengths(dtype, left), left, False)
        for dtype in DEVICE_DTYPES
        for left in (False, True)
    ),
    *(
        _chunk_case(**choice)
        for choice in every_pair(
            dtype=tuple(DEVICE_DTYPES), rank=CHUNK_RANKS, left=(False, True), aligned=(True, False)
        )
    ),
)
