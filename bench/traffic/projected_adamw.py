"""Traffic of projection and AdamW in one sweep, beside that of the two one after the other.

The sweep reads K sets and p, m and v, and writes these three. A combination writes G as well, and AdamW reads
it again: ``separate_bytes`` is what that comes to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.span import NUMBER, PLACE_FIELDS, Sets, launch_of, set_bytes, tables
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._blocks import prepare
from fastproj.reference.segments import Segmentation, Segments, segmentation

STATE = 3  # lists: p, m and v
STEP = 4  # bytes of a step count
# Of AdamW: two for p's decay, three for m, four for v, and six for the step along them.
ADAMW_FLOPS = 2 + 3 + 4 + 6


def projected_adamw_moves(sets: Sets, state: Sets, plan: Segmentation) -> Moves:
    """What ``kernels.projected_adamw`` moves for these contiguous sets and lists p, m and v."""
    work = prepare([*sets, *state], plan.first, plan.rows, plan.count)
    kernel, lists = "_projected_adamw_kernel", len(sets) + STATE
    streams: list[Stream] = []
    for launch in map(launch_of, work.plan.groups):
        read = (launch.flat + launch.rows) * len(sets) * NUMBER
        distinct = min(read, plan.count * len(sets) * NUMBER)
        programs, steps = launch.programs, work.shards * (NUMBER + STEP)
        counted, controls = programs * (NUMBER + STEP), programs * 2 * NUMBER
        own = launch.elements * sum(launch.itemsizes[:-STATE])
        kept = launch.elements * sum(launch.itemsizes[-STATE:])
        streams += tables(kernel, work, launch, programs * PLACE_FIELDS, lists)
        streams += [
            Stream(kernel, "coefficients", "load", read, distinct, distinct),
            Stream(kernel, "steps", "load", counted, min(counted, steps), steps),
            Stream(kernel, "controls", "load", controls, 2 * NUMBER, 2 * NUMBER),
            Stream(kernel, "sets", "load", own, own),
            Stream(kernel, "state", "load", kept, kept),
            Stream(kernel, "state", "store", kept, kept),
        ]
    return Moves({kernel: len(work.plan.groups)}, tuple(streams))


def separate_bytes(sets: Sets, state: Sets, combined: Sequence[Tensor]) -> int:
    """Least bytes of a combination into ``combined`` and of AdamW along it."""
    return set_bytes(sets) + 2 * set_bytes([combined]) + 2 * set_bytes(state)


def projected_adamw(workload: Workload, segments: Segments = "global") -> Traffic:
    """A step along ``Σ_k C[s,k] G_k`` of the workload's K sets; p, m and v are inputs and outputs."""
    element, k = torch.empty((), dtype=DTYPES[workload.dtype]), workload.sets
    lists = [[element.expand(shape) for shape in workload.shards] for _ in range(k + STATE)]
    sets, state = lists[:k], lists[k:]
    plan = segmentation(sets[0], segments)
    return Traffic(
        operator="projected_adamw",
        workload=workload.name,
        moves=projected_adamw_moves(sets, state, plan),
        least_read_bytes=set_bytes(lists) + plan.count * k * NUMBER + len(sets[0]) * STEP,
        least_written_bytes=set_bytes(state),
        flops=(2 * k + ADAMW_FLOPS) * workload.elements,
        rate="fp64" if workload.dtype == "fp64" else "fp32",
    )
