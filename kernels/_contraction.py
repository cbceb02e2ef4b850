"""What the per-sample contractions share: tiles, layouts, and the cases that they compile to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES
from fastproj.kernels._cases import CompileCase, every_pair


@dataclass(frozen=True)
class Tile:
    """How a program cuts the product: rows × wide columns, tokens at a time."""

    rows: int
    wide: int
    tokens: int
    threads: int
    stages: int


# By bytes per element, narrowest first: the first tile that holds all rows, else the last.
TILES = {
    2: (
        Tile(16, 128, 64, 128, 3),
        Tile(32, 128, 64, 128, 3),
        Tile(64, 128, 32, 256, 4),
        Tile(128, 128, 32, 256, 4),
    ),
    4: (Tile(16, 64, 32, 128, 3), Tile(32, 64, 32, 128, 3), Tile(64, 64, 16, 256, 4)),
    8: (Tile(16, 32, 16, 128, 2),),
}
# For rows that break 128-bit loads and for two dtypes: these pass through registers, an element at a time.
SMALL_TILES = {2: (Tile(32, 64, 16, 128, 2),), 4: (Tile(32, 64, 16, 256, 2),), 8: TILES[8]}


def columns_together(tensor: Tensor) -> Tensor:
    """The tensor with its columns side by side, as 128-bit loads need them: copied from any other layout."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def sides(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """(narrow, wide, their strides in a (d_out, d_in) result): delta is narrow unless x is narrower."""
    return (delta, x, x.shape[2], 1) if delta.shape[2] <= x.shape[2] else (x, delta, 1, x.shape[2])


def tile_for(narrow: Tensor, wide: Tensor, rows: int) -> Tile:
    """The tile for a product of these operands with this many rows."""
    sizes = TILES if row_alignment(narrow, wide) > 1 else SMALL_TILES
    tiles = sizes[torch.result_type(narrow, wide).itemsize]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


def row_alignment(narrow: Tensor, wide: Tensor) -> int:
    """The elements of a 128-bit load where all rows consist of such loads and share a dtype, else 1.

    Triton finds out by itself about multiples of 16 alone; a LoRA of rank 8 would lose its wide loads.
    """
    elements = ALIGNMENT // narrow.element_size()
    lengths = (*narrow.stride()[:2], *wide.stride()[:2], narrow.shape[2], wide.shape[2])
    broken = any(length % elements for length in lengths)
    broken |= any(side.data_ptr() % ALIGNMENT for side in (narrow, wide))
    return 1 if broken or narrow.dtype != wide.dtype else elements


def product_options(kernel: Any, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    """The constants that a tile and the dtype of the product set."""
    # The interpreter multiplies the bit patterns of bf16; products of bf16 in fp32 are the same numbers.
    interpreted = dtype == torch.bfloat16 and not isinstance(kernel, triton.JITFunction)
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_WIDE": tile.wide,
        "BLOCK_TOKENS": tile.tokens,
        "OPERAND": tl.float32 if interpreted else DEVICE_DTYPES[dtype],
        "PRECISION": fp32_precision() if dtype == torch.float32 else "ieee",
    }


def fp32_precision() -> str:
    """How fp32 operands are multiplied: "tf32" where ``torch.backends.cuda.matmul`` allows it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"  # torch before 2.9


def index_dtype(*tensors: Tensor) -> tl.dtype:
    """int32 where every offset into these tensors fits it, else int64; masked lanes past the end may wrap."""
    extents = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return tl.int64 if max(extents) >= 2**31 else tl.int32


@dataclass(frozen=True)
class Product:
    """A choice of dtypes, tile and precision; x and delta promote to ``result``, which takes the tile."""

    narrow: torch.dtype
    wide: torch.dtype
    tile: Tile
    precision: str = "ieee"

    @property
    def result(self) -> torch.dtype:
        return torch.promote_types(self.narrow, self.wide)

    @property
    def total(self) -> torch.dtype:
        """What products are summed in."""
        return torch.float64 if self.result == torch.float64 else torch.float32


def contraction_choices(**others: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Configurations of a contraction: dtypes, tiles, precisions and layouts, and what else it chooses."""
    layout = {"delta_is_narrow": (True, False), "index": (tl.int32, tl.int64), **others}
    for aligned, sizes in ((True, TILES), (False, SMALL_TILES)):
        for itemsize, tiles in sizes.items():
            dtypes = [dtype for dtype in DEVICE_DTYPES if dtype.itemsize == itemsize]
            precisions = ("ieee", "tf32") if itemsize == 4 else ("ieee",)
            for choice in every_pair(tile=tiles, dtype=dtypes, precision=precisions, **layout):
                dtype = choice.pop("dtype")
                product = Product(dtype, dtype, choice.pop("tile"), choice.pop("precision"))
                yield {"product": product, "aligned": aligned, **choice}
    mixed = Product(torch.float32, torch.bfloat16, SMALL_TILES[4][0])
    for choice in every_pair(**layout):
        yield {"product": mixed, "aligned": True, **choice}


UNALIGNED_ROWS = "the rows of the tokens do not begin at multiples of 16 bytes"
TWO_DTYPES = "16 bytes of the wider dtype are 8 of the other, which is loaded alike"
TURNED = "tensor cores read fp64 and tf32 token by token: the copy turns the rows, an element at a time"
HALVES_IN_SINGLES = "an asynchronous copy moves 4 bytes at least, an unaligned half is 2"
WITHOUT_TENSOR_CORES = {
    "torch.float32 ieee": {"sm_": "tensor cores take fp32 as tf32, for the user to allow"},
    "torch.float64 ieee": {"sm_120": "it has none for fp64"},
}


def contraction_case(
    kernel: Any,
    product: Product,
    *,
    columns: int,
    aligned: bool,
    delta_is_narrow: bool,
    index: tl.dtype,
    out: torch.dtype,
    narrow_accesses: Mapping[str, str] = MappingProxyType({}),
) -> CompileCase:
    """``kernel`` for a narrow side of about ``columns``; unaligned layouts have one column less."""
    tile, side = product.tile, "delta" if delta_is_narrow else "x"
    kinds = " and ".join(dict.fromkeys((str(product.narrow), str(product.wide))))
    kind = f"{product.result} {product.precision}"
    dtypes = {
        "narrow_ptr": product.narrow,
        "wide_ptr": product.wide,
        "weights_ptr": product.total,
        "out_ptr": out,
    }
    pointers = {name: f"*{DEVICE_DTYPES[dtypes[name]]}" for name in kernel.arg_names if name in dtypes}
    one = "wide_stride" if delta_is_narrow else "narrow_stride"
    numbers = [name for name in kernel.arg_names if name.islower() and name not in pointers and name != one]
    strides = [name for name in numbers if name.endswith(("_stride", "_columns"))]
    narrow_accesses = dict(narrow_accesses)
    whole = aligned and product.narrow == product.wide
    if not whole:
        narrow_accesses[kernel.__name__] = UNALIGNED_ROWS if not aligned else TWO_DTYPES
    elif product.result.itemsize == 8 or product.precision == "tf32":
        narrow_accesses[kernel.__name__] = TURNED
    return CompileCase(
        name=f"{kinds} {product.precision}, {tile.rows} rows, narrow {side}, {index}"
        f"{'' if aligned else ', unaligned'}, to {out}".replace("torch.", ""),
        kernel=kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constexprs={
            one: 1,
            "NARROW": columns - (not aligned),
            "ROW_ALIGNMENT": ALIGNMENT // product.narrow.itemsize if whole else 1,
            "INDEX": index,
            "SUM": DEVICE_DTYPES[product.total],
        }
        | product_options(kernel, product.result, tile)
        | {"PRECISION": product.precision},
        # A narrow x is one of rank 8: only the kernel's own hints say that its rows allow wide loads.
        divisible_by_16=(*pointers, *(strides if aligned and delta_is_narrow else ())),
        threads=tile.threads,
        num_stages=tile.stages,
        bytes_a_turn=tile.tokens * (tile.wide + columns) * product.wide.itemsize if whole else None,
        narrow_accesses=narrow_accesses,
        without_tensor_cores=WITHOUT_TENSOR_CORES.get(kind, {}),
        multiplies=True,
        without_asynchronous_copies=(
            HALVES_IN_SINGLES if not aligned and product.wide.itemsize == 2 else None
        ),
    )
