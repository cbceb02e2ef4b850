"""Weighted sums of a linear layer's per-sample weight gradients: one GEMM over the tokens.

The rows of the product are K scaled copies of the narrower of x and delta, formed as it is loaded; the
wider one is read once for all K where the rows fit one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._compile import CompileCase


@dataclass(frozen=True)
class Tile:
    """How a program cuts the product: rows × wide columns, tokens at a time."""

    rows: int
    wide: int
    tokens: int
    warps: int
    stages: int


# By bytes per element, narrowest first: the first tile that holds all rows, else the last. They spill no
# register and fit the shared memory of every target: 64 KiB on gfx942, 99 KiB on sm_120.
TILES = {
    2: (Tile(16, 128, 64, 4, 3), Tile(32, 128, 64, 4, 3), Tile(64, 128, 32, 4, 4), Tile(128, 128, 32, 8, 2)),
    4: (Tile(16, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3)),
    8: (Tile(16, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}
# Two programs for each of the 132 processors of an H100. A constant, so that the order of the sum does not
# depend on the device.
PROGRAMS = 264
# A split writes a partial result; with fewer tokens than this it would write more than it reads.
TOKENS_PER_SPLIT = 256
SUM_BLOCK = 1024
TL_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
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
    NARROW_ALIGNMENT: tl.constexpr,
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
    row_exists, column_exists = row // NARROW < sums, column < wide_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDE), dtype=SUM)
    for step in range(0, positions_per_split, BLOCK_TOKENS):
        position = first + step + tl.arange(0, BLOCK_TOKENS)
        sample, token = position // tokens, position % tokens
        inside = (position < positions)[:, None]
        narrow_offset = sample.to(INDEX) * narrow_sample_stride + token.to(INDEX) * narrow_token_stride
        wide_offset = sample.to(INDEX) * wide_sample_stride + token.to(INDEX) * wide_token_stride
        narrow_offset = tl.multiple_of(narrow_offset, NARROW_ALIGNMENT)
        narrow_mask = inside & row_exists[None, :]
        narrow = tl.load(
            narrow_ptr + narrow_offset[:, None] + (row % NARROW)[None, :], mask=narrow_mask, other=0.0
        )
        weight = tl.load(
            weights_ptr + (row // NARROW)[None, :] * samples + sample[:, None], mask=narrow_mask, other=0.0
        )
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


@triton.jit
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
    sums, d_out, d_in = weights.shape[0], delta.shape[2], x.shape[2]
    result = torch.result_type(x, delta)
    out = torch.empty(sums, d_out, d_in, dtype=result, device=x.device)
    positions = x.shape[0] * x.shape[1]
    if out.numel() == 0 or positions == 0:
        return out.zero_()
    total_dtype = torch.float64 if result == torch.float64 else torch.float32
    tile = tile_for(result, sums * min(d_out, d_in))
    tiles = triton.cdiv(sums * min(d_out, d_in), tile.rows) * triton.cdiv(max(d_out, d_in), tile.wide)
    per_split = positions_per_split(positions, tiles, tile.tokens)
    splits = triton.cdiv(positions, per_split)
    partial = out if splits == 1 else torch.empty(splits, *out.shape, dtype=total_dtype, device=x.device)
    with torch.cuda.device_of(out):
        table = weights.to(total_dtype).contiguous()
        launch_weighted_sum(x, delta, table, partial, tile=tile, per_split=per_split)
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
                partial, out, out.numel(), splits, BLOCK=SUM_BLOCK, INDEX=index_dtype(partial), num_warps=4
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
        NARROW_ALIGNMENT=alignment(narrow),
        INDEX=index_dtype(narrow, wide, out),
        SUM=TL_DTYPES[weights.dtype],
        **product_options(torch.result_type(x, delta), tile),
    )


def sides(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """(narrow, wide, their strides in a (d_out, d_in) result): delta is narrow unless x is narrower."""
    # Columns must lie side by side for 128-bit loads; any other layout is copied.
    x = x if x.stride(2) == 1 else x.contiguous()
    delta = delta if delta.stride(2) == 1 else delta.contiguous()
    return (delta, x, x.shape[2], 1) if delta.shape[2] <= x.shape[2] else (x, delta, 1, x.shape[2])


def tile_for(dtype: torch.dtype, rows: int) -> Tile:
    """The tile of ``TILES`` for a product with this many rows."""
    tiles = TILES[dtype.itemsize]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def positions_per_split(positions: int, tiles: int, step: int) -> int:
    """How many positions a program sums: enough programs for the device, a multiple of ``step``."""
    splits = max(1, min(PROGRAMS // tiles, positions // TOKENS_PER_SPLIT))
    return triton.cdiv(triton.cdiv(positions, splits), step) * step


def product_options(dtype: torch.dtype, tile: Tile) -> dict[str, object]:
    """The options that a tile and the dtype of the product set, as keyword arguments of a kernel."""
    # The interpreter multiplies the bit patterns of bf16; products of bf16 in fp32 are the same numbers.
    interpreted = dtype == torch.bfloat16 and not isinstance(weighted_sum_kernel, triton.JITFunction)
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_WIDE": tile.wide,
        "BLOCK_TOKENS": tile.tokens,
        "OPERAND": tl.float32 if interpreted else TL_DTYPES[dtype],
        "PRECISION": fp32_precision(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def fp32_precision() -> str:
    """How fp32 operands are multiplied: "tf32" where ``torch.backends.cuda.matmul`` allows it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"  # torch before 2.9


def alignment(tensor: Tensor) -> int:
    """The largest power of two up to 16 that divides the strides of samples and tokens.

    Triton finds out by itself about 16 alone; a LoRA of rank 8 would lose its wide loads.
    """
    return math.gcd(16, *tensor.stride()[:2])


def index_dtype(*tensors: Tensor) -> tl.dtype:
    """int32 where every offset into these tensors fits it, else int64; masked lanes past the end may wrap."""
    extents = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return tl.int64 if max(extents) >= 2**31 else tl.int32


def _sum_case(
    name: str, dtype: torch.dtype, columns: int, *, quick: bool, max_shared: int = 49152
) -> CompileCase:
    """K = 2 sums into partial results, the narrow side ``columns`` wide."""
    tile = tile_for(dtype, 2 * columns)
    options = product_options(dtype, tile) | {"PRECISION": "ieee"}
    total = tl.float64 if dtype == torch.float64 else tl.float32
    counts = dict.fromkeys(weighted_sum_kernel.arg_names[4:-9], "i32")
    del counts["wide_stride"]
    pointers = {f"{side}_ptr": f"*{TL_DTYPES[dtype]}" for side in ("narrow", "wide")}
    pointers |= {"weights_ptr": f"*{total}", "out_ptr": f"*{total}"}
    strides = ("wide_sample_stride", "wide_token_stride", "split_stride", "sum_stride", "narrow_stride")
    return CompileCase(
        name=name,
        kernel=weighted_sum_kernel,
        signature=pointers | counts,
        constexprs={
            "wide_stride": 1,
            "NARROW": columns,
            "NARROW_ALIGNMENT": math.gcd(16, columns),
            "INDEX": tl.int32,
            "SUM": total,
        }
        | {key: value for key, value in options.items() if key.isupper()},
        divisible_by_16=(*pointers, "wide_columns", *strides, "positions_per_split"),
        num_warps=tile.warps,
        num_stages=tile.stages,
        # Where no scaling stands between, a load goes straight to shared memory and is not counted.
        vector_loads_only=dtype.itemsize == 2 and columns < 64,
        tensor_cores=dtype.itemsize == 2,
        max_shared=max_shared,
        quick=quick,
    )


COMPILE_SIGNATURES = (
    _sum_case("bf16, rank 8", torch.bfloat16, 8, quick=True),
    _sum_case("bf16, 768 columns", torch.bfloat16, 768, quick=True, max_shared=65536),
    _sum_case("fp32, rank 8", torch.float32, 8, quick=True),
    _sum_case("fp16, rank 16", torch.float16, 16, quick=False, max_shared=65536),
    _sum_case("fp32, 768 columns", torch.float32, 768, quick=False, max_shared=65536),
    _sum_case("fp64, rank 8", torch.float64, 8, quick=False),
    CompileCase(
        name="sum of splits, bf16",
        kernel=sum_splits_kernel,
        signature={"partial_ptr": "*fp32", "out_ptr": "*bf16", "numel": "i32", "splits": "i32"},
        constexprs={"BLOCK": SUM_BLOCK, "INDEX": tl.int32},
        divisible_by_16=("partial_ptr", "out_ptr", "numel"),
        vector_accesses=True,
        max_registers=64,
    ),
)
