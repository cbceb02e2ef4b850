"""Linear combinations of gradient sets over many shards, in one launch."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import accumulation_dtype, contiguous, copy_back, on_device, prepare
from fastproj.kernels._compile import CompileCase
from fastproj.kernels._tiles import block_fields, combine_flat, combine_rows, set_pointers, shard_pointer

CHUNK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["shards"])
def _combine_kernel(
    addresses, blocks, coefficients, shards,
    DTYPES: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out = Σ_k C[s,k] G_k`` over one block; narrow rows are segments of their own."""
    sets: tl.constexpr = len(DTYPES)
    shard, start, length, width, _, segment = block_fields(blocks, ALIGNED, EVEN and COLUMNS == 0)
    pointers = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    target = shard_pointer(addresses, sets * shards, shard, start, OUT, ALIGNED)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        if ALIGNED:
            width = tl.multiple_of(width, 16)
        for row in range(0, length, ROWS):
            rows = row + tl.arange(0, ROWS)
            c = ()
            for k in tl.static_range(sets):
                c = c + (tl.load(coefficients + (segment + rows) * sets + k, mask=rows < length, other=0.0),)
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
    element for element.
    """
    if not out:
        return
    n, (count, num_sets) = len(out), coefficients.shape
    written = contiguous(out)
    sets = [contiguous(shards[k * n : (k + 1) * n]) for k in range(num_sets)]
    work = prepare([*sets, written], first, rows, count, CHUNK)
    coefficients = coefficients.contiguous()
    with on_device(coefficients):
        for group in work.plan.groups:
            _combine_kernel[(len(group.blocks),)](
                work.addresses, group.blocks, coefficients, work.shards,
                DTYPES=group.device_dtypes[:-1], OUT=group.device_dtypes[-1],
                ACC=accumulation_dtype(group.dtypes), CHUNK=CHUNK,
                ROWS=CHUNK // group.columns if group.columns else 0, COLUMNS=group.columns,
                ALIGNED=group.aligned, EVEN=group.even, num_warps=NUM_WARPS,
            )  # fmt: skip
    copy_back(out, written)


def _case(name: str, dtypes: tuple[tl.dtype, ...], columns: int = 0, quick: bool = True) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=_combine_kernel,
        signature={"addresses": "*i64", "blocks": "*i64", "coefficients": "*fp64", "shards": "i32"},
        constexprs={
            "DTYPES": dtypes, "OUT": dtypes[0], "ACC": tl.float64 if tl.float64 in dtypes else tl.float32,
            "CHUNK": CHUNK, "ROWS": CHUNK // columns if columns else 0, "COLUMNS": columns,
            "ALIGNED": True, "EVEN": True,
        },
        divisible_by_16=("addresses", "blocks", "coefficients"),
        num_warps=NUM_WARPS,
        vector_accesses=True,
        quick=quick,
    )  # fmt: skip


COMPILE_SIGNATURES = (
    _case("fp32, three sets", (tl.float32,) * 3),
    _case("bf16, two sets, narrow rows", (tl.bfloat16, tl.bfloat16), columns=16, quick=False),
    _case("fp64, two sets", (tl.float64, tl.float64), quick=False),
    _case("fp32, eight sets", (tl.float32,) * 8, quick=False),
)
