"""Linear combinations of gradient sets over many shards, in one launch."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005

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
    PER_ROW,
    alternating,
    bytes_a_turn,
    span_name,
    unaligned,
)
from fastproj.kernels._tiles import block_fields, combine_flat, combine_rows, set_pointers, shard_pointer

MOST_SETS = 16  # of a launch, whose registers hold an address and a coefficient for each
MOST_SETS_OF_ROWS = 6  # as many where each narrow row has coefficients of its own


@triton.jit
def row_coefficients(coefficients, rows, length, SETS: tl.constexpr):
    """Each narrow row's own coefficients, one vector per set."""
    c = ()
    for k in tl.static_range(SETS):
        c = c + (tl.load(coefficients + rows * SETS + k, mask=rows < length, other=0.0),)
    return c


@triton.jit(do_not_specialize=["shards"])
def _combine_kernel(
    addresses, blocks, coefficients, shards,
    DTYPES: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``out = Σ_k C[s,k] G_k`` over one block; narrow rows are segments of their own."""
    sets: tl.constexpr = len(DTYPES)
    shard, start, length, width, _, segment = block_fields(blocks, ALIGNED)
    pointers = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    target = shard_pointer(addresses, sets * shards, shard, start, OUT, ALIGNED)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        for row in range(0, length, ROWS):
            c = row_coefficients(coefficients + segment * sets, row + tl.arange(0, ROWS), length, sets)
            combine_rows(target, pointers, c, row, length, width, ROWS, COLUMNS, ACC)
    else:
        c = ()
        for k in tl.static_range(sets):
            c = c + (tl.load(coefficients + segment * sets + k),)
        combine_flat(target, pointers, c, length, CHUNK, ACC)


def combine(
    shards: list[Tensor], coefficients: Tensor, first: Sequence[int], rows: bool, out: list[Tensor]
) -> None:
    """``out = Σ_k C[s,k] G_k`` in one launch per dtype signature and alignment.

    ``shards[k*n + i]`` is shard i of set k; ``coefficients`` is (S, K) fp64. ``out`` may alias the shards
    element for element. More sets than ``MOST_SETS`` (``MOST_SETS_OF_ROWS``) pass by way of a sum of the
    first of them.
    """
    if not out:
        return
    n, (count, num_sets) = len(out), coefficients.shape
    most = MOST_SETS_OF_ROWS if rows else MOST_SETS
    if num_sets > most:
        wide = torch.float64 if any(shard.dtype == torch.float64 for shard in shards) else torch.float32
        begun = [torch.empty_like(shard, dtype=wide) for shard in out]
        combine(shards[: most * n], coefficients[:, :most], first, rows, begun)
        ones = coefficients.new_ones(count, 1)
        rest = torch.cat([ones, coefficients[:, most:]], dim=1)
        combine([*begun, *shards[most * n :]], rest, first, rows, out)
        return
    written = contiguous(out)
    sets = [contiguous(shards[k * n : (k + 1) * n]) for k in range(num_sets)]
    work = prepare([*sets, written], first, rows, count)
    coefficients = coefficients.contiguous()
    with on_device(coefficients):
        for group in work.plan.groups:
            _combine_kernel[(len(group.blocks),)](
                work.addresses, group.blocks, coefficients, work.shards,
                **combine_configuration(group.dtypes, group.columns, group.aligned),
                **launch_options(THREADS),
            )  # fmt: skip
    copy_back(out, written)


def combine_configuration(dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> dict[str, Any]:
    """The constants of the kernel for shards of these dtypes, one per set and the output's last."""
    chunk, _ = tile_of(dtypes[:-1], aligned)
    return {
        "DTYPES": device_dtypes(dtypes[:-1]), "OUT": device_dtypes(dtypes)[-1],
        "ACC": accumulation_dtype(dtypes), "CHUNK": chunk,
        "ROWS": chunk // columns if columns else 0, "COLUMNS": columns, "ALIGNED": aligned,
    }  # fmt: skip


def _case(sets: int, dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> CompileCase:
    own = alternating(dtypes, sets)
    return CompileCase(
        name=span_name(own, columns, aligned),
        kernel=_combine_kernel,
        signature={"addresses": "*i64", "blocks": "*i64", "coefficients": "*fp64", "shards": "i32"},
        constexprs=combine_configuration((*own, own[0]), columns, aligned),
        divisible_by_16=("addresses", "blocks", "coefficients"),
        threads=THREADS,
        bytes_a_turn=bytes_a_turn(sets, aligned),
        narrow_accesses={"row_coefficients": PER_ROW} if aligned else unaligned("_combine_kernel"),
    )


COMPILE_CASES = (
    *(
        _case(**choice)
        for choice in every_pair(
            dtypes=ALIKE,
            sets=(1, 2, 3, MOST_SETS_OF_ROWS),
            columns=(0, *COLUMN_CHOICES),
            aligned=(True, False),
        )
    ),
    *(_case(MOST_SETS, dtypes, 0, aligned) for dtypes in ALIKE for aligned in (True, False)),
    _case(3, MIXED, 16, True),
)
