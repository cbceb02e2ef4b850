"""Per-sample weight gradients of a linear layer: a batched GEMM over the tokens."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._compile import CompileCase
from fastproj.kernels.weighted_grad import TL_DTYPES, alignment, index_dtype, product_options, sides, tile_for


@triton.jit
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
    NARROW_ALIGNMENT: tl.constexpr,
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
    row_exists, column_exists = row < NARROW, column < wide_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDE), dtype=SUM)
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        inside = (token < tokens)[:, None]
        narrow_offset = sample * narrow_sample_stride + token.to(INDEX) * narrow_token_stride
        narrow_offset = tl.multiple_of(narrow_offset, NARROW_ALIGNMENT)
        wide_offset = sample * wide_sample_stride + token.to(INDEX) * wide_token_stride
        narrow = tl.load(
            narrow_ptr + narrow_offset[:, None] + row[None, :], mask=inside & row_exists[None, :], other=0.0
        )
        wide = tl.load(
            wide_ptr + wide_offset[:, None] + column[None, :], mask=inside & column_exists[None, :], other=0.0
        )
        total = tl.dot(
            tl.trans(narrow.to(OPERAND)), wide.to(OPERAND), total, input_precision=PRECISION, out_dtype=SUM
        )
    out_offset = (
        sample * sample_stride
        + (row.to(INDEX) * narrow_stride)[:, None]
        + (column.to(INDEX) * wide_stride)[None, :]
    )
    out_mask = row_exists[:, None] & column_exists[None, :]
    tl.store(out_ptr + out_offset, total.to(out_ptr.dtype.element_ty), mask=out_mask)


def per_sample_grad(x: Tensor, delta: Tensor) -> Tensor:
    """``out_i = Σ_t δ_it x_itᵀ`` as (B, d_out, d_in), from x (B, T, d_in) and delta (B, T, d_out)."""
    samples, tokens, d_in = x.shape
    result = torch.result_type(x, delta)
    out = torch.empty(samples, delta.shape[2], d_in, dtype=result, device=x.device)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    narrow, wide, narrow_stride, wide_stride = sides(x, delta)
    tile = tile_for(result, narrow.shape[2])
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
            NARROW_ALIGNMENT=alignment(narrow),
            INDEX=index_dtype(narrow, wide, out),
            SUM=TL_DTYPES[torch.float64 if result == torch.float64 else torch.float32],
            **product_options(result, tile),
        )
    return out


def _case(
    name: str, dtype: torch.dtype, columns: int, *, quick: bool, max_shared: int = 49152
) -> CompileCase:
    """A narrow side ``columns`` wide that is delta, so that the wide side lies contiguous in the result."""
    tile = tile_for(dtype, columns)
    options = product_options(dtype, tile) | {"PRECISION": "ieee"}
    counts = dict.fromkeys(outer_sum_kernel.arg_names[3:-9], "i32")
    del counts["wide_stride"]
    pointers = dict.fromkeys(("narrow_ptr", "wide_ptr", "out_ptr"), f"*{TL_DTYPES[dtype]}")
    strides = ("wide_sample_stride", "wide_token_stride", "sample_stride", "narrow_stride")
    return CompileCase(
        name=name,
        kernel=outer_sum_kernel,
        signature=pointers | counts,
        constexprs={
            "wide_stride": 1,
            "NARROW": columns,
            "NARROW_ALIGNMENT": math.gcd(16, columns),
            "INDEX": tl.int32,
            "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        }
        | {key: value for key, value in options.items() if key.isupper()},
        divisible_by_16=(*pointers, "wide_columns", *strides),
        num_warps=tile.warps,
        num_stages=tile.stages,
        tensor_cores=dtype.itemsize == 2,
        max_shared=max_shared,
        quick=quick,
    )


COMPILE_SIGNATURES = (
    _case("bf16, rank 8", torch.bfloat16, 8, quick=True),
    _case("fp32, rank 8", torch.float32, 8, quick=True),
    _case("bf16, 768 columns", torch.bfloat16, 768, quick=False, max_shared=65536),
    _case("fp32, 768 columns", torch.float32, 768, quick=False),
    _case("fp64, rank 8", torch.float64, 8, quick=False),
)
