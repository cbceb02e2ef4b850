"""Work lists of the span projections: which program reads which piece of which shard.

A shard is cut into blocks: flat runs of at most a piece of elements, about ``BLOCKS`` of them over all shards
whatever the chip, so that sums are added in the same order everywhere; or runs of narrow rows, many rows a
block. Each flat block owns a slot for its partial sums, each narrow row one of its own, and the slots of a
segment lie side by side. Shards that differ in dtypes or alignment go to different groups: a launch each.

Tables live on the device. Both caches hold pure functions of their keys, so a stale entry cannot be met:
addresses are looked up by the addresses themselves at every call. A table is whole before anybody gets it, on
whatever stream, and a CUDA graph may be captured once its tables are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton.language as tl
from torch import Tensor

BLOCKS = 1024
SMALLEST_PIECE = 4096
LARGEST_PIECE = 2**30  # device code counts the elements of a block in int32
PIECE_STEP = 2048  # a multiple of every tile, so that only the last block of a shard or a row is ragged
NARROW_BELOW = 512  # rows of fewer elements share a program
COLUMN_CHOICES = (8, 16, 64)  # columns of a tile of narrow rows
ALIGNMENT = 16  # bytes of a 128-bit access
ROW_ALIGNMENT = 8  # elements: where rows begin at multiples of it, none breaks a 128-bit access
THREADS = 128  # of a program
VECTORS = {1: 4, 2: 2}  # 128-bit loads of a thread per set; with more sets than these one
LARGEST_TILE = 2048  # elements
FLAT = -8  # row width that marks a flat block; a multiple of ROW_ALIGNMENT like every other

DEVICE_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

# A CUDA graph reads these tables at every replay, long after the caches below have let go of them.
_CAPTURED: list[object] = []


@dataclass(frozen=True)
class Group:
    """The blocks of one launch: a row of ten int64 fields each.

    shard, first element, length (elements; rows where narrow), row width (FLAT where flat), slot, segment,
    slot range of the segment (two), slot range of the shard (two).
    """

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    columns: int
    blocks: Tensor


@dataclass(frozen=True)
class Plan:
    """All launches over one list of shards; segment s owns slots bounds[s] … bounds[s+1]−1."""

    groups: tuple[Group, ...]
    slots: int
    bounds: Tensor


@dataclass(frozen=True)
class Work:
    """A plan and the shards' addresses, (lists, n) int64 on the device."""

    plan: Plan
    addresses: Tensor
    shards: int


def prepare(lists: Sequence[Sequence[Tensor]], first: Sequence[int], rows: bool, count: int) -> Work:
    """The work list over ``lists`` of n contiguous tensors each: the sets, and the output if there is one.

    It holds their addresses and not the tensors, which the caller keeps alive until the launches are queued.
    """
    shapes = tuple(_row_shape(shard, rows) for shard in lists[0])
    addresses = tuple(tuple(shard.data_ptr() for shard in shards) for shards in lists)
    dtypes = tuple(zip(*((shard.dtype for shard in shards) for shards in lists), strict=True))
    aligned = tuple(
        all(address % ALIGNMENT == 0 for address in at) and (number == 1 or width % ROW_ALIGNMENT == 0)
        for at, (number, width) in zip(zip(*addresses, strict=True), shapes, strict=True)
    )
    device = lists[0][0].device
    plan = _plan(shapes, tuple(first), rows, count, dtypes, aligned, device)
    work = Work(plan, address_table(addresses, device), len(shapes))
    if device.type == "cuda":
        keep(work, (work.addresses, plan.bounds, *(group.blocks for group in plan.groups)))
    return work


def keep(work: object, tables: Sequence[Tensor]) -> None:
    """Let none of a work list's tables be freed that the current stream has yet to read.

    Nor one that a graph, which is captured on it, will read at every replay.
    """
    with on_device(tables[0]):
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(work)
            return
        stream = torch.cuda.current_stream()
        for table in tables:
            table.record_stream(stream)


def contiguous(shards: Sequence[Tensor]) -> list[Tensor]:
    """The shards, copied where they are strided."""
    return [shard if shard.is_contiguous() else shard.contiguous() for shard in shards]


def copy_back(out: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Carry results to the strided outputs that were written through a copy."""
    for target, value in zip(out, written, strict=True):
        if value is not target:
            target.copy_(value)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, as triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def device_dtypes(dtypes: Sequence[torch.dtype]) -> tuple[tl.dtype, ...]:
    """The same dtypes in the words of device code."""
    return tuple(DEVICE_DTYPES[dtype] for dtype in dtypes)


def tile_of(dtypes: Sequence[torch.dtype], aligned: bool) -> tuple[int, int]:
    """(elements, neighbours in one thread) of a tile over sets of these dtypes: whole 128-bit loads."""
    vector = ALIGNMENT // min(dtype.itemsize for dtype in dtypes) if aligned else 1
    return min(THREADS * vector * VECTORS.get(len(dtypes), 1), LARGEST_TILE), vector


def launch_options(threads: int, stages: int = 3, *, amd: bool | None = None) -> dict[str, int]:
    """Warps and pipeline stages of a program, by default for the GPU that torch is built for.

    AMD's warps have 64 threads, and loads there wait in registers: a third stage only fills shared memory.
    """
    if amd is None:
        amd = torch.version.hip is not None
    return {"num_warps": threads // (64 if amd else 32), "num_stages": min(stages, 2) if amd else stages}


def accumulation_dtype(dtypes: Sequence[torch.dtype]) -> tl.dtype:
    """fp64 where one of them is fp64, else fp32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def _row_shape(shard: Tensor, rows: bool) -> tuple[int, int]:
    """(rows, elements in a row) as segments see them: one row unless segments are rows."""
    if not rows:
        return 1, shard.numel()
    if shard.dim() < 2:
        return (1, shard.numel()) if shard.numel() else (0, 0)
    number = shard.shape[0]
    return number, (shard.numel() // number if number else 0)


@lru_cache(maxsize=64)
def address_table(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Addresses by list and shard, int64 on the device."""
    return upload(torch.tensor(addresses, dtype=torch.int64), device)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """To the device on a stream of its own, which alone is waited for: what runs elsewhere goes on.

    Raises RuntimeError while a CUDA graph is captured, which would replay the copy of a table long gone.
    """
    if device.type == "cpu":
        return table
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "expected a first call with the same tensors before a CUDA graph is captured, and results "
                "written to given tensors (edge_, project_out_, combine's out), as new ones have new "
                "addresses"
            )
        stream = _upload_stream(device)
        with torch.cuda.stream(stream):
            uploaded = table.pin_memory().to(device, non_blocking=True)
        stream.synchronize()
    return uploaded


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache(maxsize=32)
def _plan(
    shapes: tuple[tuple[int, int], ...],
    first: tuple[int, ...],
    rows: bool,
    count: int,
    dtypes: tuple[tuple[torch.dtype, ...], ...],
    aligned: tuple[bool, ...],
    device: torch.device,
) -> Plan:
    """Cut the shards into blocks and sort these into launches."""
    total = sum(number * width for number, width in shapes)
    piece = min(max(SMALLEST_PIECE, -(-total // BLOCKS)), LARGEST_PIECE)
    piece = -(-piece // PIECE_STEP) * PIECE_STEP
    tables: dict[tuple[tuple[torch.dtype, ...], bool], list[Tensor]] = {}
    slots_of_segment = torch.zeros(count, dtype=torch.int64)
    slot = 0
    for shard, segment, (number, width) in _runs(shapes, first, rows, count):
        table, slots_of_row = _cut(shard, segment, number, width, slot, piece)
        slots_of_segment[segment : segment + number] += slots_of_row
        slot += number * slots_of_row
        table[:, 9] = slot
        tables.setdefault((dtypes[shard], aligned[shard]), []).append(table)
    bounds = torch.cat([slots_of_segment.new_zeros(1), slots_of_segment.cumsum(0)])
    groups = tuple(_group(torch.cat(cut), bounds, *signature, device) for signature, cut in tables.items())
    return Plan(groups, slot, upload(bounds, device))


def _runs(
    shapes: tuple[tuple[int, int], ...], first: tuple[int, ...], rows: bool, count: int
) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(shard, segment, (rows, width)) in the order of the slots: segment by segment.

    A segment without elements gets an empty run of shard 0, so that each segment has a block that reports.
    """
    order = sorted(range(len(shapes)), key=first.__getitem__)
    if rows:
        yield from ((shard, first[shard], shapes[shard]) for shard in order if shapes[shard][0])
        return
    position = 0
    for segment in range(count):
        empty = True
        while position < len(order) and first[order[position]] == segment:
            shard = order[position]
            if shapes[shard][1]:
                yield shard, segment, shapes[shard]
                empty = False
            position += 1
        if empty:
            yield 0, segment, (1, 0)


def _cut(shard: int, segment: int, number: int, width: int, slot: int, piece: int) -> tuple[Tensor, int]:
    """The blocks of ``number`` rows of one shard that are segments of their own, and the slots of a row.

    The fields of the segment's slot range and the end of the shard's are left to the caller.
    """
    if number > 1 and width < NARROW_BELOW:
        step = max(1, piece // max(width, 1))
        row = torch.arange(0, number, step)
        slots_of_row, start, row_width = 1, row * width, width
        length, own_slot = (number - row).clamp(max=step), slot + row
    else:
        slots_of_row = max(1, -(-width // piece))
        index = torch.arange(number * slots_of_row)
        row, inside = index // slots_of_row, index % slots_of_row * piece
        start, row_width = row * width + inside, FLAT
        length, own_slot = (width - inside).clamp(max=piece), slot + index
    table = torch.empty(len(row), 10, dtype=torch.int64)
    for field, value in enumerate((shard, start, length, row_width, own_slot, segment + row, 0, 0, slot, 0)):
        table[:, field] = torch.as_tensor(value)
    return table, slots_of_row


def _group(
    blocks: Tensor, bounds: Tensor, dtypes: tuple[torch.dtype, ...], aligned: bool, device: torch.device
) -> Group:
    """One launch: fill in the segments' slot ranges and read off what its kernels may take for granted."""
    blocks[:, 6] = bounds[blocks[:, 5]]
    blocks[:, 7] = bounds[blocks[:, 5] + 1]
    narrow = blocks[:, 3] != FLAT
    return Group(
        dtypes,
        aligned,
        _columns(int(blocks[narrow, 3].max())) if narrow.any() else 0,
        upload(blocks, device),
    )


def _columns(width: int) -> int:
    """The fewest columns that hold a row at once, or the most there are."""
    return next((columns for columns in COLUMN_CHOICES if columns >= width), COLUMN_CHOICES[-1])
