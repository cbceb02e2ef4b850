"""Traffic of the span projections, from the very work lists that their launchers prepare.

Counted is every load and store: the shards ("sets"), the result ("out"), and the rest: the block table, the
pointer table, partial sums, the Gram and the coefficients. The rest grows with the blocks and not with the
elements: n ≤ ``most_blocks``, each of which reads at most 10 + K + 1 table entries. Where EDGE's second
launch adds up a segment's partial sums in each of the segment's blocks, that is up to 3 n² more, off a cache.
Not counted: blocks that the Gram reads twice, because fp32 overflowed or underflowed there, and sets that are
not read, because their coefficient is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._blocks import BLOCKS, FLAT, Group, Work, prepare
from fastproj.kernels.gram import MOST_SETS
from fastproj.reference.segments import Segmentation, Segments, segmentation

NUMBER = 8  # bytes of an int64 table entry and of an fp64 sum
PLACE_FIELDS = 6  # of a block: shard, start, length, row width, slot, segment
RANGE_FIELDS = 2  # the slots of its segment, or of its shard

Sets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Launch:
    """A launch over one group of blocks: how many programs, and what they find there."""

    programs: int
    rows: int  # narrow ones, each with sums and coefficients of its own
    flat: int  # blocks that belong to one segment
    leading: int  # flat blocks that are the first of their segment
    slots_read: int  # slots of their segments, over all flat blocks
    shard_slots_read: int  # slots of their shards, over all blocks
    elements: int
    itemsizes: tuple[int, ...]  # by list: the sets, then the result


def most_blocks(shards: int) -> int:
    """The most blocks of ``shards`` shards where segments are not rows: each shard ends with a ragged one."""
    return BLOCKS + shards


def launch_of(group: Group) -> Launch:
    """What the launch over a group finds in its blocks."""
    blocks = group.blocks
    flat = blocks[:, 3] == FLAT
    elements = blocks[:, 2] * torch.where(flat, 1, blocks[:, 3])
    return Launch(
        programs=len(blocks),
        rows=int(blocks[~flat, 2].sum()),
        flat=int(flat.sum()),
        leading=int((blocks[flat, 4] == blocks[flat, 6]).sum()),
        slots_read=int((blocks[flat, 7] - blocks[flat, 6]).sum()),
        shard_slots_read=int((blocks[:, 9] - blocks[:, 8]).sum()),
        elements=int(elements.sum()),
        itemsizes=tuple(dtype.itemsize for dtype in group.dtypes),
    )


def tables(kernel: str, work: Work, launch: Launch, fields: int, lists: int) -> tuple[Stream, Stream]:
    """Reads of the block table and of the shards' addresses."""
    table, addresses, distinct = (
        fields * NUMBER,
        launch.programs * lists * NUMBER,
        work.shards * lists * NUMBER,
    )
    return (
        Stream(kernel, "blocks", "load", table, table),
        Stream(kernel, "addresses", "load", addresses, min(addresses, distinct), distinct),
    )


def _sets(kernel: str, sets: Sets, launch: Launch, *, warm: bool) -> Stream:
    accessed = launch.elements * sum(launch.itemsizes[: len(sets)])
    return Stream(kernel, "sets", "load", accessed, accessed, set_bytes(sets), warm)


def _out(kernel: str, launch: Launch) -> Stream:
    accessed = launch.elements * launch.itemsizes[-1]
    return Stream(kernel, "out", "store", accessed, accessed)


def set_bytes(sets: Sets) -> int:
    """Bytes of all shards of these lists."""
    return sum(shard.numel() * shard.itemsize for shards in sets for shard in shards)


def _partials(sets: Sets, work: Work) -> Moves:
    """The first launches of the Gram and of EDGE: products of each block and each narrow row."""
    kernel, pairs = "_partial_kernel", len(sets) * (len(sets) + 1) // 2
    streams: list[Stream] = []
    for launch in map(launch_of, work.plan.groups):
        written = pairs * (launch.flat + launch.rows) * NUMBER
        streams += tables(kernel, work, launch, launch.programs * PLACE_FIELDS, len(sets))
        streams += [
            _sets(kernel, sets, launch, warm=False),
            Stream(kernel, "partials", "store", written, written),
        ]
    return Moves({kernel: len(work.plan.groups)}, tuple(streams))


def gram_moves(sets: Sets, plan: Segmentation) -> Moves:
    """What ``kernels.gram`` moves for these contiguous sets; nothing is read of them here but their shapes.

    Raises ValueError for more than ``MOST_SETS`` sets, which take several passes.
    """
    if len(sets) > MOST_SETS:
        raise ValueError(f"expected at most {MOST_SETS} gradient sets, got {len(sets)}")
    work = prepare(sets, plan.first, plan.rows, plan.count)
    kernel, entries, pairs = "_segment_sum_kernel", len(sets) ** 2, len(sets) * (len(sets) + 1) // 2
    sums, bounds = work.plan.slots * NUMBER, (plan.count + 1) * NUMBER
    written = entries * plan.count * NUMBER
    streams = (
        Stream(kernel, "bounds", "load", 2 * entries * plan.count * NUMBER, bounds, bounds),
        Stream(kernel, "partials", "load", entries * sums, pairs * sums, pairs * sums, warm=True),
        Stream(kernel, "gram", "store", written, written),
    )
    return _partials(sets, work) + Moves({kernel: min(1, plan.count)}, streams)


def combine_moves(sets: Sets, out: Sequence[Tensor], plan: Segmentation, *, warm: bool = False) -> Moves:
    """What ``kernels.combine`` moves; ``warm`` where a launch before has read the sets."""
    work = prepare([*sets, out], plan.first, plan.rows, plan.count)
    kernel = "_combine_kernel"
    streams: list[Stream] = []
    for launch in map(launch_of, work.plan.groups):
        read = (launch.flat + launch.rows) * len(sets) * NUMBER
        distinct = min(read, plan.count * len(sets) * NUMBER)
        streams += tables(kernel, work, launch, launch.programs * PLACE_FIELDS, len(sets) + 1)
        streams += [
            Stream(kernel, "coefficients", "load", read, distinct, distinct),
            _sets(kernel, sets, launch, warm=warm),
            _out(kernel, launch),
        ]
    return Moves({kernel: len(work.plan.groups)}, tuple(streams))


def edge_moves(sets: Sets, out: Sequence[Tensor], plan: Segmentation, variant: str = "paper") -> Moves:
    """What ``kernels.edge`` moves for e and g; the second launch finds the sets warm and solves per block."""
    work = prepare([*sets, out], plan.first, plan.rows, plan.count)
    kernel = "_apply_kernel"
    streams: list[Stream] = []
    resident, released = 3 * work.plan.slots * NUMBER, variant == "released"
    for launch in map(launch_of, work.plan.groups):
        fields = launch.programs * (PLACE_FIELDS + released * RANGE_FIELDS) + launch.flat * RANGE_FIELDS
        slots = launch.rows + launch.slots_read + released * launch.shard_slots_read
        stats = (launch.leading + launch.rows) * (4 + 2) * NUMBER
        streams += tables(kernel, work, launch, fields, 3)
        streams += [
            Stream(kernel, "partials", "load", 3 * slots * NUMBER, resident, resident, warm=True),
            _sets(kernel, sets, launch, warm=True),
            Stream(kernel, "stats", "store", stats, stats),
            _out(kernel, launch),
        ]
    return _partials(sets, work) + Moves({kernel: len(work.plan.groups)}, tuple(streams))


@dataclass(frozen=True)
class _Call:
    """A workload's sets as tensors without storage of their own: a shape, a dtype, an aligned address."""

    sets: list[list[Tensor]]
    out: list[Tensor]
    plan: Segmentation
    rate: str

    @property
    def elements(self) -> int:
        return sum(shard.numel() for shard in self.out)


def _call(workload: Workload, segments: Segments) -> _Call:
    element = torch.empty((), dtype=DTYPES[workload.dtype])
    lists = [[element.expand(shape) for shape in workload.shards] for _ in range(workload.sets + 1)]
    rate = "fp64" if workload.dtype == "fp64" else "fp32"
    return _Call(lists[:-1], lists[-1], segmentation(lists[-1], segments), rate)


def gram(workload: Workload, segments: Segments = "global") -> Traffic:
    """``M[s,a,b] = Σ ⟨G_a, G_b⟩`` over the workload's K sets; the Gram is the output."""
    call, k = _call(workload, segments), workload.sets
    written = call.plan.count * k * k * NUMBER
    flops = k * (k + 1) * call.elements
    moves = gram_moves(call.sets, call.plan)
    return Traffic("gram", workload.name, moves, set_bytes(call.sets), written, flops, call.rate)


def combine(workload: Workload, segments: Segments = "global") -> Traffic:
    """``out = Σ_k C[s,k] G_k``; sets and coefficients are the inputs."""
    call, k = _call(workload, segments), workload.sets
    read = set_bytes(call.sets) + call.plan.count * k * NUMBER
    moves = combine_moves(call.sets, call.out, call.plan)
    flops = 2 * k * call.elements
    return Traffic("combine", workload.name, moves, read, set_bytes([call.out]), flops, call.rate)


def gram_and_combine(workload: Workload, segments: Segments = "global") -> Traffic:
    """A projection inside the span: Gram, then combination of the same sets, without what solves between."""
    one, two, call = gram(workload, segments), combine(workload, segments), _call(workload, segments)
    return replace(
        two,
        operator="gram + combine",
        moves=one.moves + combine_moves(call.sets, call.out, call.plan, warm=True),
        least_written_bytes=one.least_written_bytes + two.least_written_bytes,
        flops=one.flops + two.flops,
    )


def edge(workload: Workload, segments: Segments = "global", variant: str = "paper") -> Traffic:
    """EDGE of two sets: the combined gradient, the Gram (2 × 2) and two coefficients of each segment.

    Raises ValueError where the workload has other than two sets.
    """
    if workload.sets != 2:
        raise ValueError(f"expected a workload of 2 gradient sets, e and g, got {workload.sets}")
    call = _call(workload, segments)
    written = set_bytes([call.out]) + call.plan.count * (4 + 2) * NUMBER
    moves = edge_moves(call.sets, call.out, call.plan, variant)
    flops = (2 * 3 + 2 * 2) * call.elements
    return Traffic("edge", workload.name, moves, set_bytes(call.sets), written, flops, call.rate)
