"""Dot products and norms of per-sample gradients, or of Adam's updates for them, off the chip only as sums.

A program contracts one tile of one sample's gradient, turns it into the update where it lies, in registers,
and reduces it against every reference. A second launch adds the tiles' sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._adam import Update, update_of
from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, THREADS, launch_options
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._contraction import (
    TILES,
    TURNED,
    WITHOUT_TENSOR_CORES,
    Product,
    Tile,
    product_options,
)

MOST_ELEMENTS = 2**30  # of one sample's gradient and of its activations, whose offsets are int32
SUM_BLOCK = 512
# A thread holds its share of a sum, of both moments and of a reference at once: tiles small enough for that.
INFLUENCE_TILES = {2: (TILES[2][0], Tile(64, 64, 64, 256, 3)), 4: TILES[4][::2], 8: TILES[8]}


@triton.jit
def constant(number, SUM: tl.constexpr):
    """A number of the launch in the dtype of the sum; the interpreter hands it over as a Python float."""
    return (tl.full((), 1.0, tl.float64) * number).to(SUM)


@triton.jit
def keep(out_ptr, place, values):
    """The sum over a tile, as one number."""
    tl.store(out_ptr + place, tl.sum(tl.sum(values, 1), 0))


@triton.jit(do_not_specialize=["tokens", "num_references"])
def influence_kernel(
    narrow_ptr,
    wide_ptr,
    references_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    out_ptr,
    tokens,
    wide_columns,
    num_references,
    narrow_sample_stride,
    narrow_token_stride,
    wide_sample_stride,
    wide_token_stride,
    moment: tl.float64,
    square: tl.float64,
    inside: tl.float64,
    outside: tl.float64,
    scale: tl.float64,
    NARROW: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ADAM: tl.constexpr,
    SUM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out[i, m, tile] = ⟨u_i, R_m⟩`` and ``out[i, M, tile] = ‖u_i‖²`` over one tile of a weight's elements.

    The weight is (NARROW, wide_columns). Rows of all operands are padded to multiples of ROW_ALIGNMENT, so
    that they consist of 128-bit loads.
    """
    wide_tiles = tl.cdiv(wide_columns, BLOCK_WIDE)
    tiles = tl.cdiv(NARROW, BLOCK_ROWS) * wide_tiles
    sample, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile // wide_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile % wide_tiles * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    padded = tl.cdiv(wide_columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
    row_loads = row < (NARROW + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    column_loads = column < padded
    narrow_sample = narrow_ptr + tl.multiple_of(sample * narrow_sample_stride, ROW_ALIGNMENT)
    wide_sample = wide_ptr + tl.multiple_of(sample * wide_sample_stride, ROW_ALIGNMENT)
    update = tl.zeros((BLOCK_ROWS, BLOCK_WIDE), dtype=SUM)
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        inside_sample = (token < tokens)[:, None]
        narrow_offset = tl.multiple_of(token * narrow_token_stride, ROW_ALIGNMENT)
        wide_offset = tl.multiple_of(token * wide_token_stride, ROW_ALIGNMENT)
        narrow = tl.load(
            narrow_sample + (narrow_offset[:, None] + row[None, :]),
            mask=inside_sample & row_loads[None, :],
            other=0.0,
        )
        wide = tl.load(
            wide_sample + (wide_offset[:, None] + column[None, :]),
            mask=inside_sample & column_loads[None, :],
            other=0.0,
        )
        update = tl.dot(
            tl.trans(narrow.to(OPERAND)), wide.to(OPERAND), update, input_precision=PRECISION, out_dtype=SUM
        )
    place = row[:, None] * padded + column[None, :]
    loads = (row < NARROW)[:, None] & column_loads[None, :]
    if ADAM:
        m = tl.load(exp_avg_ptr + place, mask=loads, other=0.0)
        v = tl.load(exp_avg_sq_ptr + place, mask=loads, other=0.0)
        root = tl.sqrt(v * constant(square, SUM) + constant(inside, SUM) + update * update)
        update = (m * constant(moment, SUM) + update) / (root + constant(outside, SUM)) * constant(scale, SUM)
    # What lies beyond the layer would be 0/0 with ε = 0, and Inf · 0 beside a row that is not finite.
    update = tl.where((row < NARROW)[:, None] & (column < wide_columns)[None, :], update, 0.0)
    # One number a reference, the square norm after them; the tiles' side by side.
    first = sample * (num_references + 1) * tiles + tile
    keep(out_ptr, first + tl.cast(num_references, tl.int64) * tiles, update * update)
    for number in range(num_references):
        start = tl.cast(number, tl.int64) * (NARROW * padded)
        reference = tl.load(references_ptr + start + place, mask=loads, other=0.0)
        keep(out_ptr, first + tl.cast(number, tl.int64) * tiles, update * reference)


@triton.jit(do_not_specialize=["tiles"])
def sum_tiles_kernel(partial_ptr, out_ptr, tiles, BLOCK: tl.constexpr):
    """``out[n] = Σ_tile partial[n, tile]``: lane by lane, then over the lanes."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + n * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(out_ptr + n, tl.sum(total, 0))


def per_sample_influence(
    x: Tensor,
    delta: Tensor,
    references: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    *constants: Any,
) -> Tensor:
    """``⟨u_i, R_m⟩`` and, in the last column, ``‖u_i‖²``: (B, M + 1) in fp32, fp64 where x or delta is.

    x is (B, T, d_in), delta (B, T, d_out), references (M, d_out, d_in); moments are (d_out, d_in) with step,
    β1, β2, ε and variant after them, or None for plain gradients. Rows that do not consist of aligned 128-bit
    loads, and two dtypes, are copied first; so are references and moments where x is the narrower side.
    """
    result = torch.result_type(x, delta)
    total = torch.float64 if result == torch.float64 else torch.float32
    samples, columns = x.shape[0], references.shape[0] + 1
    out = torch.empty(samples, columns, dtype=total, device=x.device)
    if not samples or not x.shape[2] * delta.shape[2]:
        return out.zero_()
    delta_is_narrow = delta.shape[2] <= x.shape[2]
    sides = (delta, x) if delta_is_narrow else (x, delta)
    rows, width = sides[0].shape[2], sides[1].shape[2]
    check_extent(rows * width, x.shape[1] * width)
    tile = influence_tile(result, rows)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.wide)
    partial = out if tiles == 1 else torch.empty(samples, columns, tiles, dtype=total, device=x.device)
    with torch.cuda.device_of(out):
        elements = ALIGNMENT // result.itemsize
        narrow, wide = (loadable(side.to(result), elements) for side in sides)
        update = update_of(exp_avg, exp_avg_sq, *constants)
        tables = [
            whole_loads((table if delta_is_narrow else table.mT).to(total), elements)
            for table in ((references, update.exp_avg, update.exp_avg_sq) if update else (references,) * 3)
        ]
        launch_influence(narrow, wide, tables, partial, update, tile, (rows, width))
        if tiles > 1:
            sum_tiles_kernel[(out.numel(),)](partial, out, tiles, BLOCK=SUM_BLOCK, **launch_options(THREADS))
    return out


def launch_influence(
    narrow: Tensor,
    wide: Tensor,
    tables: Sequence[Tensor],
    out: Tensor,
    update: Update | None,
    tile: Tile,
    weight: tuple[int, int],
) -> None:
    """Write every tile's sums to ``out``, (B, M + 1) of one tile or (B, M + 1, tiles).

    ``tables`` are the references and the moments (references again without them), laid out as the tile of the
    ``weight``, (rows of the narrow side, columns of the wide one).
    """
    tiles = triton.cdiv(weight[0], tile.rows) * triton.cdiv(weight[1], tile.wide)
    adam = (
        (update.moment, update.square, update.inside, update.outside, update.scale) if update else [0.0] * 5
    )
    influence_kernel[(narrow.shape[0] * tiles,)](
        narrow,
        wide,
        *tables,
        out,
        narrow.shape[1],
        weight[1],
        tables[0].shape[0],
        *narrow.stride()[:2],
        *wide.stride()[:2],
        *adam,
        NARROW=weight[0],
        ROW_ALIGNMENT=ALIGNMENT // narrow.element_size(),
        ADAM=update is not None,
        SUM=DEVICE_DTYPES[out.dtype],
        **product_options(influence_kernel, narrow.dtype, tile),
        **launch_options(tile.threads, tile.stages),
    )


def influence_tile(result: torch.dtype, rows: int) -> Tile:
    """The first tile that holds all rows, else the last."""
    tiles = INFLUENCE_TILES[result.itemsize]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def loadable(side: Tensor, elements: int) -> Tensor:
    """(B, T, d) with rows that begin and end at multiples of ``elements``: the tensor itself, or a copy."""
    lengths = (*side.stride()[:2], side.shape[2])
    whole = side.stride(2) == 1 and not any(length % elements for length in lengths)
    near = side.shape[1] * side.stride(1) < 2**31  # offsets into a sample are int32
    aligned = side.data_ptr() % ALIGNMENT == 0
    return side if whole and near and aligned else whole_loads(side.contiguous(), elements)


def whole_loads(table: Tensor, elements: int) -> Tensor:
    """The tensor contiguous, its rows filled up with zeros to a multiple of ``elements``."""
    fill = -table.shape[-1] % elements
    if not fill and table.is_contiguous() and table.data_ptr() % ALIGNMENT == 0:
        return table
    return torch.nn.functional.pad(table, (0, fill)).contiguous()


def check_extent(gradient: int, activations: int) -> None:
    """Raise ValueError where device code, which counts both in int32, could not find all of a sample."""
    for what, numel in (("gradient", gradient), ("activations", activations)):
        if numel > MOST_ELEMENTS:
            raise ValueError(f"expected at most {MOST_ELEMENTS} elements in a sample's {what}, got {numel}")


def _choices() -> Iterator[tuple[Product, bool]]:
    for itemsize, tiles in INFLUENCE_TILES.items():
        dtypes = [dtype for dtype in DEVICE_DTYPES if dtype.itemsize == itemsize]
        precisions = ("ieee", "tf32") if itemsize == 4 else ("ieee",)
        for choice in every_pair(tile=tiles, dtype=dtypes, precision=precisions, adam=(True, False)):
            dtype = choice["dtype"]
            yield Product(dtype, dtype, choice["tile"], choice["precision"]), choice["adam"]


def _influence_case(product: Product, adam: bool) -> CompileCase:
    """For strides that are no multiples of 16, a rank of 8: only the kernel's hints allow wide loads."""
    tile, dtype = product.tile, product.result
    sums = ("references_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "out_ptr")
    pointers = dict.fromkeys(("narrow_ptr", "wide_ptr"), f"*{DEVICE_DTYPES[dtype]}")
    pointers |= dict.fromkeys(sums, f"*{DEVICE_DTYPES[product.total]}")
    numbers = [name for name in influence_kernel.arg_names if name.islower() and name not in pointers]
    doubles = dict.fromkeys(("moment", "square", "inside", "outside", "scale"), "fp64")
    narrow_accesses = {"keep": "one number a tile and reference"}
    if dtype.itemsize == 8 or product.precision == "tf32":
        narrow_accesses["influence_kernel"] = TURNED
    return CompileCase(
        name=f"{dtype} {product.precision}, {tile.rows} rows, {'Adam' if adam else 'plain'}".replace(
            "torch.", ""
        ),
        kernel=influence_kernel,
        signature=pointers | dict.fromkeys(numbers, "i32") | doubles,
        constexprs={
            "NARROW": tile.rows,
            "ROW_ALIGNMENT": ALIGNMENT // dtype.itemsize,
            "ADAM": adam,
            "SUM": DEVICE_DTYPES[product.total],
        }
        | product_options(influence_kernel, dtype, tile)
        | {"PRECISION": product.precision},
        divisible_by_16=tuple(pointers),
        threads=tile.threads,
        num_stages=tile.stages,
        bytes_a_turn=tile.tokens * (tile.wide + tile.rows) * dtype.itemsize,
        narrow_accesses=narrow_accesses,
        without_tensor_cores=WITHOUT_TENSOR_CORES.get(f"{dtype} {product.precision}", {}),
        multiplies=True,
    )


def _sum_case(dtype: torch.dtype) -> CompileCase:
    pointers = dict.fromkeys(("partial_ptr", "out_ptr"), f"*{DEVICE_DTYPES[dtype]}")
    return CompileCase(
        name=f"sum of tiles, {dtype}".replace("torch.", ""),
        kernel=sum_tiles_kernel,
        signature=pointers | {"tiles": "i32"},
        constexprs={"BLOCK": SUM_BLOCK},
        divisible_by_16=tuple(pointers),
        narrow_accesses={"sum_tiles_kernel": "a number a tile, of which a row may have any number"},
    )


COMPILE_CASES = (
    *(_influence_case(product, adam) for product, adam in _choices()),
    *(_sum_case(dtype) for dtype in (torch.float32, torch.float64)),
)
