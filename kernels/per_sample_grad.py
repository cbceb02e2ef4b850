"""Per-sample weight gradients of a linear layer: a batched GEMM over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import DEVICE_DTYPES, launch_options
from fastproj.kernels._cases import CompileCase
from fastproj.kernels._contraction import (
    Product,
    columns_together,
    contraction_case,
    contraction_choices,
    index_dtype,
    product_options,
    row_alignment,
    sides,
    tile_for,
)

MOST_ELEMENTS = 2**30  # of one sample's gradient, whose offsets device code counts in int32


@triton.jit(do_not_specialize=["tokens"])
def outer_sum_kernel(
    narrow_ptr,
    wide_ptr,
    out_ptr,
    tokens,
    wide_columns,
    narrow_sample_stride,
    narrow_token_stride,
    wide_sample_stride,
    wide_token_stride,
    sample_stride,
    narrow_stride,
    wide_stride,
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
    """One tile of ``out[i, c, w] = Σ_t narrow[i, t, c] wide[i, t, w]``."""
    wide_tiles = tl.cdiv(wide_columns, BLOCK_WIDE)
    tiles = tl.cdiv(NARROW, BLOCK_ROWS) * wide_tiles
    sample, tile = (tl.program_id(0) // tiles).to(INDEX), tl.program_id(0) % tiles
    row = tile // wide_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile % wide_tiles * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    row_exists, column_exists = row < NARROW, column < wide_columns // ROW_ALIGNMENT * ROW_ALIGNMENT
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDE), dtype=SUM)
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        inside = (token < tokens)[:, None]
        narrow_offset = sample * narrow_sample_stride + token.to(INDEX) * narrow_token_stride
        narrow_offset = tl.multiple_of(narrow_offset, ROW_ALIGNMENT)
        wide_offset = sample * wide_sample_stride + token.to(INDEX) * wide_token_stride
        wide_offset = tl.multiple_of(wide_offset, ROW_ALIGNMENT)
        narrow = tl.load(
            narrow_ptr + narrow_offset[:, None] + row[None, :], mask=inside & row_exists[None, :], other=0.0
        )
        wide = tl.load(
            wide_ptr + wide_offset[:, None] + column[None, :], mask=inside & column_exists[None, :], other=0.0
        )
        total = tl.dot(
            tl.trans(narrow.to(OPERAND)), wide.to(OPERAND), total, input_precision=PRECISION, out_dtype=SUM
        )
    # The launcher sees to it that one sample's gradient stays within int32; all of them together need not.
    out_offset = (row * narrow_stride)[:, None] + (column * wide_stride)[None, :]
    out_mask = row_exists[:, None] & column_exists[None, :]
    tl.store(out_ptr + sample * sample_stride + out_offset, total.to(out_ptr.dtype.element_ty), mask=out_mask)


def per_sample_grad(x: Tensor, delta: Tensor) -> Tensor:
    """``out_i = Σ_t δ_it x_itᵀ`` as (B, d_out, d_in), from x (B, T, d_in) and delta (B, T, d_out)."""
    samples, tokens, d_in = x.shape
    result = torch.result_type(x, delta)
    out = torch.empty(samples, delta.shape[2], d_in, dtype=result, device=x.device)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    if out[0].numel() > MOST_ELEMENTS:
        raise ValueError(
            f"expected at most {MOST_ELEMENTS} elements in a sample's gradient, got {out[0].numel()}"
        )
    narrow, wide, narrow_stride, wide_stride = sides(columns_together(x), columns_together(delta))
    tile = tile_for(narrow, wide, narrow.shape[2])
    tiles = triton.cdiv(narrow.shape[2], tile.rows) * triton.cdiv(wide.shape[2], tile.wide)
    with torch.cuda.device_of(out):
        outer_sum_kernel[(samples * tiles,)](
            narrow,
            wide,
            out,
            tokens,
            wide.shape[2],
            *narrow.stride()[:2],
            *wide.stride()[:2],
            out.stride(0),
            narrow_stride,
            wide_stride,
            NARROW=narrow.shape[2],
            ROW_ALIGNMENT=row_alignment(narrow, wide),
            INDEX=index_dtype(narrow, wide, out),
            SUM=DEVICE_DTYPES[torch.float64 if result == torch.float64 else torch.float32],
            **product_options(outer_sum_kernel, result, tile),
            **launch_options(tile.threads, tile.stages),
        )
    return out


def _case(product: Product, aligned: bool, delta_is_narrow: bool, index: tl.dtype) -> CompileCase:
    return contraction_case(
        outer_sum_kernel,
        product,
        columns=product.tile.rows,
        aligned=aligned,
        delta_is_narrow=delta_is_narrow,
        index=index,
        out=product.result,
    )


COMPILE_CASES = tuple(_case(**choice) for choice in contraction_choices())
