"""Dense random projections: entries made in registers where they are multiplied, never stored.

P is cut into groups of 256 rows. A program owns a group, a chunk of positions and a tile of samples; what the
chunks give is added in their order by a second launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, launch_options
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._contraction import HALVES_IN_SINGLES, WITHOUT_TENSOR_CORES
from fastproj.kernels._normal import CODE_BITS, GRID, levels, variance
from fastproj.kernels._philox import philox_words

RADEMACHER, GAUSSIAN = 1, 2  # streams
GROUP = 256  # rows of P that share Philox blocks: as many at a position as an entry has bits
STAGES = 2
PROGRAMS = 1024
SHORTEST_CHUNK = 256  # positions
MOST_POSITIONS = 2**30  # of a launch, which counts them in int32
SUM_BLOCK, SUM_THREADS = 1024, 128
LEVEL_DTYPES = {torch.float64: torch.float64}  # else bytes


@triton.jit
def normal_entries(codes, table_ptr, ENTRY: tl.constexpr):
    """Quantiles in units of 1/32: a code's highest bit is their sign, set for +, the others their number."""
    upper = tl.load(table_ptr + (codes & 0x7FFF)).to(ENTRY)
    return tl.where((codes >> 15) != 0, upper, -upper)


@triton.jit
def random_entries(seed, stream, group, position, table_ptr, BITS: tl.constexpr, ENTRY: tl.constexpr):
    """Rows of a group at some positions, not scaled: (positions, 256), exact in every floating-point type."""
    block = position[:, None] * BITS + tl.arange(0, BITS)[None, :]
    word0, word1, word2, word3 = philox_words(seed, stream, group, block)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32))
    halves = tl.reshape(halves, (position.shape[0], BITS * 8, 1))
    shift = (tl.arange(0, 32 // BITS) * BITS).to(tl.uint32)
    codes = tl.reshape((halves >> shift[None, None, :]) & ((1 << BITS) - 1), (position.shape[0], 256))
    if BITS == 1:
        entries = tl.where(codes != 0, 1.0, -1.0).to(ENTRY)
    else:
        entries = normal_entries(codes, table_ptr, ENTRY)
    return entries


@triton.jit
def upper_digits(values):
    """The leading eight of the 24 binary digits of fp32 numbers, which bf16 holds."""
    return (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def exact_dot(values, entries, total, PARTS: tl.constexpr, SUM: tl.constexpr):
    """``total + values entries`` in full precision: fp32 values as three times eight digits."""
    if PARTS == 1:
        total = tl.dot(values.to(entries.dtype), entries, total, out_dtype=SUM, input_precision="ieee")
    else:
        for _ in tl.static_range(PARTS):
            upper = upper_digits(values)
            total = tl.dot(upper.to(entries.dtype), entries, total, out_dtype=SUM, input_precision="ieee")
            # Infinity less infinity is no rest.
            values = tl.where(values == upper, 0.0, values - upper)
    return total


@triton.jit(do_not_specialize=["seed", "stream", "offset", "samples", "positions", "dimension", "tiles"])
def dense_sketch_kernel(
    vectors_ptr,
    table_ptr,
    partials_ptr,
    seed,
    stream,
    offset,
    samples,
    positions,
    dimension,
    tiles,
    sample_stride,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTRY: tl.constexpr,
    SUM: tl.constexpr,
):
    """``partials[chunk, i, r] = Σ_{j in chunk} E[r, offset + j] v[i, j]`` for 256 rows r and a tile of i."""
    groups, part = tl.cdiv(dimension, 256), tl.program_id(1)
    group, sample_tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    sample = sample_tile * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES)
    sample_exists = (sample < samples)[:, None]
    # Elements of a 128-bit load: the launcher has seen that samples begin and end with whole ones.
    vector: tl.constexpr = 128 // vectors_ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    row_offset = tl.multiple_of(sample.to(tl.int64) * sample_stride, vector)[:, None]
    whole = positions // vector * vector
    total = tl.zeros((BLOCK_SAMPLES, 256), dtype=SUM)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(positions, BLOCK_POSITIONS))):
        position = tile * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
        inside = sample_exists & (position < whole)[None, :]
        values = tl.load(vectors_ptr + row_offset + position[None, :], mask=inside, other=0.0)
        where = offset.to(tl.int64) + position
        entries = random_entries(seed, stream, group, where, table_ptr, BITS, ENTRY)
        total = exact_dot(values, entries, total, PARTS, SUM)
    row = group * 256 + tl.arange(0, 256)
    out_offset = (part.to(tl.int64) * samples + sample)[:, None] * dimension + row[None, :]
    tl.store(partials_ptr + out_offset, total, mask=sample_exists & (row < dimension)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def sum_chunks_kernel(partials_ptr, out_ptr, numel, chunks, BLOCK: tl.constexpr):
    """``out = Σ_c partials[c]`` in the order of the chunks."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < numel
    total = tl.zeros((BLOCK,), dtype=out_ptr.dtype.element_ty)
    at = element
    for _ in range(chunks):
        total += tl.load(partials_ptr + at, mask=inside, other=0.0)
        at += numel
    tl.store(out_ptr + element, total, mask=inside)


def rademacher(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` with entries ±1/√k: (B, k) for (B, n) at absolute positions from ``offset`` on."""
    return product(vectors, dimension, seed, offset, RADEMACHER).mul_(dimension**-0.5)


def gaussian(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` with rounded normal entries of variance 1/k."""
    return product(vectors, dimension, seed, offset, GAUSSIAN).mul_((dimension * variance()) ** -0.5 / GRID)


def product(vectors: Tensor, dimension: int, seed: int, offset: int, stream: int) -> Tensor:
    """``Σ_j E[:, offset + j] v_j`` with entries that are not scaled, in fp32 or fp64."""
    pieces = vectors.split(MOST_POSITIONS, dim=1)
    out = _product(pieces[0], dimension, seed, offset, stream)
    for number, piece in enumerate(pieces[1:], start=1):
        out += _product(piece, dimension, seed, offset + number * MOST_POSITIONS, stream)
    return out


def _product(vectors: Tensor, dimension: int, seed: int, offset: int, stream: int) -> Tensor:
    if vectors.stride(1) != 1:
        vectors = vectors.contiguous()
    samples, positions = vectors.shape
    tile, groups = TILES[vectors.dtype], triton.cdiv(dimension, GROUP)
    tiles = tiles_per_chunk(positions, dimension, tile)
    chunks = triton.cdiv(positions, tiles * tile.positions)
    sums = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    partials = torch.empty(chunks, samples, dimension, dtype=sums, device=vectors.device)
    dense_sketch_kernel[(groups * triton.cdiv(samples, tile.samples), chunks)](
        vectors,
        level_table(vectors.device, vectors.dtype),
        partials,
        seed,
        stream,
        offset,
        samples,
        positions,
        dimension,
        tiles,
        vectors.stride(0),
        ALIGNED=is_aligned(vectors),
        **configuration(dense_sketch_kernel, vectors.dtype, stream == GAUSSIAN),
        **launch_options(threads_for(vectors.dtype, stream == GAUSSIAN), STAGES),
    )
    if chunks == 1:
        return partials[0]
    out = torch.empty(samples, dimension, dtype=sums, device=vectors.device)
    sum_chunks_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
        partials, out, out.numel(), chunks, BLOCK=SUM_BLOCK, **launch_options(SUM_THREADS)
    )
    return out


@dataclass(frozen=True)
class Tile:
    """What a program multiplies at once: samples × positions, with the 256 rows of a group."""

    samples: int
    positions: int


TILES = {
    torch.float32: Tile(32, 32),
    torch.bfloat16: Tile(32, 32),
    torch.float16: Tile(32, 32),
    torch.float64: Tile(16, 16),
}


def tiles_per_chunk(positions: int, dimension: int, tile: Tile) -> int:
    """Tiles of a program along positions: enough programs for any device, whatever the batch."""
    chunks = max(1, min(PROGRAMS // triton.cdiv(dimension, GROUP), positions // SHORTEST_CHUNK))
    return triton.cdiv(triton.cdiv(positions, tile.positions), chunks)


def threads_for(dtype: torch.dtype, normal: bool) -> int:
    """Of a program: signs have few Philox blocks, which more threads would only make twice."""
    return 256 if normal or dtype == torch.float64 else 128


def is_aligned(vectors: Tensor) -> bool:
    """Whether every sample begins at a multiple of 16 bytes and ends at one."""
    elements = ALIGNMENT // vectors.element_size()
    return not (vectors.data_ptr() % ALIGNMENT or vectors.stride(0) % elements or vectors.shape[1] % elements)


def configuration(kernel: Any, dtype: torch.dtype, normal: bool) -> dict[str, Any]:
    """The constants that the vectors' dtype and the kind of entries set."""
    entry = torch.bfloat16 if dtype == torch.float32 else dtype
    # The interpreter multiplies the bit patterns of bf16; products of bf16 in fp32 are the same numbers.
    interpreted = entry == torch.bfloat16 and not isinstance(kernel, triton.JITFunction)
    return {
        "BITS": CODE_BITS if normal else 1,
        "PARTS": 3 if dtype == torch.float32 else 1,
        "BLOCK_SAMPLES": TILES[dtype].samples,
        "BLOCK_POSITIONS": TILES[dtype].positions,
        "ENTRY": tl.float32 if interpreted else DEVICE_DTYPES[entry],
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@cache
def level_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The upper quantiles in units of 1/32: 32 KB, or 256 KB for fp64, that stay in the first-level cache."""
    # Out of bytes the compiler does not multiply in fp64.
    return torch.tensor(levels(), dtype=LEVEL_DTYPES.get(dtype, torch.uint8)).to(device)


def _case(dtype: torch.dtype, normal: bool, aligned: bool) -> CompileCase:
    constants = configuration(dense_sketch_kernel, dtype, normal)
    tile = TILES[dtype]
    pointers = {
        "vectors_ptr": f"*{DEVICE_DTYPES[dtype]}",
        "table_ptr": "*fp64" if dtype == torch.float64 else "*u8",
        "partials_ptr": f"*{constants['SUM']}",
    }
    numbers = dict.fromkeys(("stream", "samples", "positions", "dimension", "tiles", "sample_stride"), "i32")
    name = f"{'normal' if normal else 'signs'}, {dtype}{'' if aligned else ', unaligned'}"
    narrow = {"normal_entries": "looked up in a table of 32 KB, which the first-level cache holds"}
    if tile.samples * tile.positions * dtype.itemsize < ALIGNMENT * threads_for(dtype, normal):
        narrow["dense_sketch_kernel"] = "the tile has fewer bytes: it is entries that take the time"
    if not aligned:
        narrow["dense_sketch_kernel"] = "samples do not begin and end at multiples of 16 bytes"
    tensor_cores = WITHOUT_TENSOR_CORES["torch.float64 ieee"] if dtype == torch.float64 else {}
    return CompileCase(
        name=name.replace("torch.", ""),
        kernel=dense_sketch_kernel,
        signature={**pointers, **numbers, "seed": "i64", "offset": "i64"},
        constexprs={"ALIGNED": aligned, **constants},
        divisible_by_16=(*pointers, *(("sample_stride",) if aligned else ())),
        threads=threads_for(dtype, normal),
        multiplies=True,
        narrow_accesses=narrow,
        num_stages=STAGES,
        without_tensor_cores=tensor_cores,
        without_asynchronous_copies=HALVES_IN_SINGLES if not aligned and dtype.itemsize == 2 else None,
    )


COMPILE_CASES = (
    *(
        _case(**choice)
        for choice in every_pair(dtype=tuple(DEVICE_DTYPES), normal=(False, True), aligned=(True, False))
    ),
    *(
        CompileCase(
            name=f"sum of chunks, {dtype}".replace("torch.", ""),
            kernel=sum_chunks_kernel,
            signature={
                "partials_ptr": f"*{DEVICE_DTYPES[dtype]}",
                "out_ptr": f"*{DEVICE_DTYPES[dtype]}",
                "numel": "i32",
                "chunks": "i32",
            },
            constexprs={"BLOCK": SUM_BLOCK},
            divisible_by_16=("partials_ptr", "out_ptr", "numel"),
            threads=SUM_THREADS,
        )
        for dtype in (torch.float32, torch.float64)
    ),
)
