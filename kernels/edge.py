"""EDGE over many shards in two launches: products of e and g, then coefficients and combination in one."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import (
    COLUMN_CHOICES,
    THREADS,
    accumulation_dtype,
    contiguous,
    copy_back,
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
    alternating,
    bytes_a_turn,
    span_name,
    unaligned,
)
from fastproj.kernels._tiles import (
    block_fields,
    combine_flat,
    combine_rows,
    set_pointers,
    shard_pointer,
    slot_range,
    slot_sums,
)
from fastproj.kernels.gram import launch_partials

REDUCE = 512
VARIANTS = ("paper", "released", "naive", "subtract")


@triton.jit
def edge_coefficients(ee, eg, gg, shard_ee, shard_gg, alpha, skip, VARIANT: tl.constexpr):
    """(c_e, c_g) with ``out = c_e e + c_g g`` in fp64, as ``fastproj.reference.edge_coefficients`` says.

    ``shard_ee`` and ``shard_gg`` are the squared norms over the whole shard where VARIANT is "released" and
    those of the segment elsewhere.
    """
    one = tl.zeros_like(ee) + 1.0
    # The interpreter hands alpha over as a Python number, which would make fp32 of what meets no fp64.
    alpha = alpha * one
    if VARIANT == "paper":
        usable = (ee > 0) & (gg > 0)
        ratio = tl.sqrt(tl.where(usable, gg, 1.0)) / tl.sqrt(tl.where(usable, ee, 1.0))
        c_e = tl.where(usable, 1 + alpha / 2 * ratio, one)
        c_g = tl.where(usable, -alpha / 2, 0.0)
    elif VARIANT == "naive":
        usable = gg > 0
        c_e = one
        c_g = tl.where(usable, -alpha * eg / tl.where(usable, gg, 1.0), 0.0)
    elif VARIANT == "subtract":
        c_e = one
        c_g = -alpha
    else:
        inverse_e = tl.where(shard_ee > 0, 1 / tl.sqrt(tl.where(shard_ee > 0, shard_ee, 1.0)), 0.0)
        inverse_g = tl.where(shard_gg > 0, 1 / tl.sqrt(tl.where(shard_gg > 0, shard_gg, 1.0)), 0.0)
        t = eg * inverse_e + gg * inverse_g
        c_e = 1 + alpha * t * inverse_e
        c_g = -alpha + alpha * t * inverse_g
    # x − x is 0 for finite x only.
    finite = (shard_ee - shard_ee) + (shard_gg - shard_gg) + (eg - eg) == 0
    nan = one * float("nan")
    c_e = tl.where(finite, c_e, tl.where(skip != 0, one, nan))
    return c_e, tl.where(finite, c_g, tl.where(skip != 0, 0.0, nan))


@triton.jit
def row_sums(partials, slots, rows, inside):
    """Squared norms and inner product of each narrow row."""
    ee = tl.load(partials + rows, mask=inside, other=0.0)
    eg = tl.load(partials + slots + rows, mask=inside, other=0.0)
    return ee, eg, tl.load(partials + 2 * slots + rows, mask=inside, other=0.0)


@triton.jit
def store_stats(gram, coefficients, segment, ee, eg, gg, c_e, c_g, mask):
    """Gram and coefficients of the segments: what EdgeStats holds."""
    tl.store(gram + segment * 4, ee, mask=mask)
    tl.store(gram + segment * 4 + 1, eg, mask=mask)
    tl.store(gram + segment * 4 + 2, eg, mask=mask)
    tl.store(gram + segment * 4 + 3, gg, mask=mask)
    tl.store(coefficients + segment * 2, c_e, mask=mask)
    tl.store(coefficients + segment * 2 + 1, c_g, mask=mask)


@triton.jit(do_not_specialize=["shards", "slots", "skip"])
def _apply_kernel(
    addresses, blocks, partials, gram, coefficients, shards, slots, alpha: tl.float64, skip,
    DTYPES: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, VARIANT: tl.constexpr,
    CHUNK: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add up the partial products of the block's segment, solve for its coefficients, combine the block."""
    slots = slots.to(tl.int64)
    shard, start, length, width, slot, segment = block_fields(blocks, ALIGNED)
    pointers = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    target = shard_pointer(addresses, 2 * shards, shard, start, OUT, ALIGNED)
    if VARIANT == "released":
        shard_low, shard_high = slot_range(blocks, 8)
        shard_ee, _, shard_gg = slot_sums(partials, slots, shard_low, shard_high, 3, REDUCE)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        for row in range(0, length, ROWS):
            rows = row + tl.arange(0, ROWS)
            inside = rows < length
            ee, eg, gg = row_sums(partials + slot, slots, rows, inside)
            if VARIANT == "released":
                c_e, c_g = edge_coefficients(ee, eg, gg, shard_ee, shard_gg, alpha, skip, VARIANT)
            else:
                c_e, c_g = edge_coefficients(ee, eg, gg, ee, gg, alpha, skip, VARIANT)
            store_stats(gram, coefficients, segment + rows, ee, eg, gg, c_e, c_g, inside)
            combine_rows(target, pointers, (c_e, c_g), row, length, width, ROWS, COLUMNS, ACC)
    else:
        low, high = slot_range(blocks, 6)
        ee, eg, gg = slot_sums(partials, slots, low, high, 3, REDUCE)
        if VARIANT == "released":
            c_e, c_g = edge_coefficients(ee, eg, gg, shard_ee, shard_gg, alpha, skip, VARIANT)
        else:
            c_e, c_g = edge_coefficients(ee, eg, gg, ee, gg, alpha, skip, VARIANT)
        store_stats(gram, coefficients, segment, ee, eg, gg, c_e, c_g, slot == low)
        combine_flat(target, pointers, (c_e, c_g), length, CHUNK, ACC)


def edge(
    erm: list[Tensor],
    gce: list[Tensor],
    out: list[Tensor],
    first: Sequence[int],
    rows: bool,
    count: int,
    alpha: float,
    variant: str,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor]:
    """``out = c_e e + c_g g``; returns the Gram (S, 2, 2) and the coefficients of ``variant`` (S, 2), fp64.

    Two launches per dtype signature and alignment, and the host waits for neither. ``out`` may be ``erm``
    itself. "released" takes the row segmentation; the tensor of a row is its shard.
    """
    # The work list holds addresses alone: these names keep the copies of strided shards alive.
    sets, written = [contiguous(erm), contiguous(gce)], contiguous(out)
    work = prepare([*sets, written], first, rows, count)
    gram = torch.empty(count, 2, 2, dtype=torch.float64, device=out[0].device)
    coefficients = torch.empty(count, 2, dtype=torch.float64, device=out[0].device)
    with on_device(gram):
        partials = launch_partials(work, 2)
        for group in work.plan.groups:
            _apply_kernel[(len(group.blocks),)](
                work.addresses, group.blocks, partials, gram, coefficients, work.shards, work.plan.slots,
                float(alpha), int(skip_nonfinite),
                **apply_configuration(group.dtypes, variant, group.columns, group.aligned),
                **launch_options(THREADS),
            )  # fmt: skip
    copy_back(out, written)
    return gram, coefficients


def apply_configuration(
    dtypes: tuple[torch.dtype, ...], variant: str, columns: int, aligned: bool
) -> dict[str, Any]:
    """The constants of the second kernel for e, g and the output of these dtypes."""
    chunk, _ = tile_of(dtypes[:2], aligned)
    return {
        "DTYPES": device_dtypes(dtypes[:2]), "OUT": device_dtypes(dtypes)[2],
        "ACC": accumulation_dtype(dtypes), "VARIANT": variant, "CHUNK": chunk, "REDUCE": REDUCE,
        "ROWS": chunk // columns if columns else 0, "COLUMNS": columns, "ALIGNED": aligned,
    }  # fmt: skip


def _case(variant: str, dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> CompileCase:
    own = alternating(dtypes, 2)
    return CompileCase(
        name=f"{variant}, {span_name(own, columns, aligned)}",
        kernel=_apply_kernel,
        signature={
            "addresses": "*i64", "blocks": "*i64", "partials": "*fp64", "gram": "*fp64",
            "coefficients": "*fp64", "shards": "i32", "slots": "i32", "alpha": "fp64", "skip": "i32",
        },
        constexprs=apply_configuration((*own, own[0]), variant, columns, aligned),
        divisible_by_16=("addresses", "blocks", "partials", "gram", "coefficients"),
        threads=THREADS,
        bytes_a_turn=bytes_a_turn(2, aligned),
        narrow_accesses=(
            {"slot_sums": PARTIALS, "row_sums": PER_ROW, "store_stats": PER_ROW}
            if aligned
            else unaligned("_apply_kernel")
        ),
    )  # fmt: skip


COMPILE_CASES = (
    *(
        _case(**choice)
        for choice in every_pair(
            dtypes=ALIKE, variant=VARIANTS, columns=(0, *COLUMN_CHOICES), aligned=(True, False)
        )
    ),
    _case("paper", MIXED, 16, True),
)
