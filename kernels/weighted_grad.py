"""Weighted sums of a linear layer's per-sample weight gradients: one GEMM over the tokens.

The rows of the product are K scaled copies of the narrower of x and delta, formed as it is loaded; the
wider one is read once for all K where the rows fit one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import DEVICE_DTYPES, THREADS, launch_options
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._contraction import (
    Product,
    Tile,
    columns_together,
    contraction_case,
    contraction_choices,
    index_dtype,
    product_options,
    row_alignment,
    sides,
    tile_for,
)

# A program for each of the 132 processors of an H100. A constant, so that the order of the sum does not
# depend on the device.
PROGRAMS = 132
# A split writes a partial result, which must stay small beside the tokens that it reads.
TOKENS_PER_SPLIT = 512
MOST_POSITIONS = 2**30  # device code counts tokens in int32, and steps past the last one
SUM_BLOCK = 1024


@triton.jit
def weight_of(weights_ptr, sums, sample, samples, mask):
    """``weights[k, i]`` for the tokens of a tile and its rows."""
    return tl.load(weights_ptr + sums[None, :] * samples + sample[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["positions", "tokens", "samples", "sums", "positions_per_split"])
def weighted_sum_kernel(
    narrow_ptr,
    wide_ptr,
    weights_ptr,
    out_ptr,
    positions,
    tokens,
    samples,
    sums,
    wide_columns,
    narrow_sample_stride,
    narrow_token_stride,
    wide_sample_stride,
    wide_token_stride,
    split_stride,
    sum_stride,
    narrow_stride,
    wide_stride,
    positions_per_split,
    NARROW: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INDEX: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``out[split, k, c, w] = Σ weights[k, i] narrow[i, t, c] wide[i, t, w]``.

    A position is a token of a sample, i·T + t; row k·NARROW + c is column c under weights k.
    """
    wide_tiles = tl.cdiv(wide_columns, BLOCK_WIDE)
    row = tl.program_id(0) // wide_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % wide_tiles * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    first = tl.program_id(1) * positions_per_split
    row_exists = row // NARROW < sums
    column_exists = column < wide_columns // ROW_ALIGNMENT * ROW_ALIGNMENT
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDE), dtype=SUM)
    for step in range(0, positions_per_split, BLOCK_TOKENS):
        position = first + step + tl.arange(0, BLOCK_TOKENS)
        sample, token = position // tokens, position % tokens
        inside = (position < positions)[:, None]
        narrow_offset = sample.to(INDEX) * narrow_sample_stride + token.to(INDEX) * narrow_token_stride
        wide_offset = sample.to(INDEX) * wide_sample_stride + token.to(INDEX) * wide_token_stride
        narrow_offset = tl.multiple_of(narrow_offset, ROW_ALIGNMENT)
        wide_offset = tl.multiple_of(wide_offset, ROW_ALIGNMENT)
        narrow_mask = inside & row_exists[None, :]
        narrow = tl.load(
            narrow_ptr + narrow_offset[:, None] + (row % NARROW)[None, :], mask=narrow_mask, other=0.0
        )
        weight = weight_of(weights_ptr, row // NARROW, sample, samples, narrow_mask)
        wide = tl.load(
            wide_ptr + wide_offset[:, None] + column[None, :], mask=inside & column_exists[None, :], other=0.0
        )
        scaled = (narrow.to(SUM) * weight).to(OPERAND)
        total = tl.dot(tl.trans(scaled), wide.to(OPERAND), total, input_precision=PRECISION, out_dtype=SUM)
    out_offset = (
        tl.program_id(1).to(INDEX) * split_stride
        + ((row // NARROW).to(INDEX) * sum_stride + (row % NARROW).to(INDEX) * narrow_stride)[:, None]
        + (column.to(INDEX) * wide_stride)[None, :]
    )
    out_mask = row_exists[:, None] & column_exists[None, :]
    tl.store(out_ptr + out_offset, total.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(partial_ptr, out_ptr, numel, splits, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """``out[n] = Σ_s partial[s, n]``, s ascending."""
    offset = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    exists = offset < numel
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partial_ptr + tl.cast(split, INDEX) * numel + offset, mask=exists, other=0.0)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=exists)


def weighted_grad(x: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """``out_k = Σ_i w_ki Σ_t δ_it x_itᵀ`` as (K, d_out, d_in).

    x is (B, T, d_in), delta (B, T, d_out), weights (K, B). Partial sums over ranges of tokens are added in
    a fixed order by a second launch; both launches write the result's own layout.
    """
    x, delta = columns_together(x), columns_together(delta)
    sums, d_out, d_in = weights.shape[0], delta.shape[2], x.shape[2]
    result = torch.result_type(x, delta)
    out = torch.empty(sums, d_out, d_in, dtype=result, device=x.device)
    positions = x.shape[0] * x.shape[1]
    if out.numel() == 0 or positions == 0:
        return out.zero_()
    if positions > MOST_POSITIONS:
        raise ValueError(f"expected at most {MOST_POSITIONS} tokens in a batch, got {positions}")
    total_dtype = torch.float64 if result == torch.float64 else torch.float32
    tile = tile_for(*sides(x, delta)[:2], sums * min(d_out, d_in))
    tiles = triton.cdiv(sums * min(d_out, d_in), tile.rows) * triton.cdiv(max(d_out, d_in), tile.wide)
    per_split = positions_per_split(positions, tiles, tile.tokens)
    splits = triton.cdiv(positions, per_split)
    partial = out if splits == 1 else torch.empty(splits, *out.shape, dtype=total_dtype, device=x.device)
    with torch.cuda.device_of(out):
        table = weights.to(total_dtype).contiguous()
        launch_weighted_sum(x, delta, table, partial, tile=tile, per_split=per_split)
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
                partial,
                out,
                out.numel(),
                splits,
                BLOCK=SUM_BLOCK,
                INDEX=index_dtype(partial),
                **launch_options(THREADS),
            )
    return out


def launch_weighted_sum(
    x: Tensor, delta: Tensor, weights: Tensor, out: Tensor, *, tile: Tile, per_split: int
) -> None:
    """Write each split's share of the sums to ``out``, (K, d_out, d_in) or (splits, K, d_out, d_in)."""
    narrow, wide, narrow_stride, wide_stride = sides(x, delta)
    samples, tokens, columns = narrow.shape
    positions = samples * tokens
    tiles = triton.cdiv(weights.shape[0] * columns, tile.rows) * triton.cdiv(wide.shape[2], tile.wide)
    sum_stride = columns * wide.shape[2]
    weighted_sum_kernel[(tiles, triton.cdiv(positions, per_split))](
        narrow,
        wide,
        weights,
        out,
        positions,
        tokens,
        samples,
        weights.shape[0],
        wide.shape[2],
        *narrow.stride()[:2],
        *wide.stride()[:2],
        weights.shape[0] * sum_stride,
        sum_stride,
        narrow_stride,
        wide_stride,
        per_split,
        NARROW=columns,
        ROW_ALIGNMENT=row_alignment(narrow, wide),
        INDEX=index_dtype(narrow, wide, out),
        SUM=DEVICE_DTYPES[weights.dtype],
        **product_options(weighted_sum_kernel, torch.result_type(x, delta), tile),
        **launch_options(tile.threads, tile.stages),
    )


def positions_per_split(positions: int, tiles: int, step: int) -> int:
    """How many positions a program sums: enough programs for the device, a multiple of ``step``."""
    splits = max(1, min(PROGRAMS // tiles, positions // TOKENS_PER_SPLIT))
    return triton.cdiv(triton.cdiv(positions, splits), step) * step


def _sum_case(
    product: Product, aligned: bool, delta_is_narrow: bool, index: tl.dtype, split: bool
) -> CompileCase:
    """K = 2 sums, into partial results where ``split``."""
    return contraction_case(
        weighted_sum_kernel,
        product,
        columns=product.tile.rows // 2,
        aligned=aligned,
        delta_is_narrow=delta_is_narrow,
        index=index,
        out=product.total if split else product.result,
        narrow_accesses={"weight_of": "one weight a sample, held by the first-level cache"},
    )


def _split_case(dtype: torch.dtype, index: tl.dtype, aligned: bool) -> CompileCase:
    total = torch.float64 if dtype == torch.float64 else torch.float32
    return CompileCase(
        name=f"sum of splits, {dtype}, {index}{'' if aligned else ', unaligned'}",
        kernel=sum_splits_kernel,
        signature={
            "partial_ptr": f"*{DEVICE_DTYPES[total]}",
            "out_ptr": f"*{DEVICE_DTYPES[dtype]}",
            "numel": "i32",
            "splits": "i32",
        },
        constexprs={"BLOCK": SUM_BLOCK, "INDEX": index},
        divisible_by_16=("partial_ptr", "out_ptr", *(("numel",) if aligned else ())),
        bytes_a_turn=SUM_BLOCK * total.itemsize if aligned else None,
        narrow_accesses={} if aligned else {"sum_splits_kernel": "a result of an uneven number of elements"},
    )


COMPILE_CASES = (
    # Partial results in the dtype of the result are written as it is: one case for both.
    *{
        case.name: case
        for case in (_sum_case(**choice) for choice in contraction_choices(split=(True, False)))
    }.values(),
    *(
        _split_case(**choice)
        for choice in every_pair(
            dtype=tuple(DEVICE_DTYPES), index=(tl.int32, tl.int64), aligned=(True, False)
        )
    ),
)
