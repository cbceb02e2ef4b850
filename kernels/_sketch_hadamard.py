"""Block subsampled randomized Hadamard transform: a block of 4,096 positions transforms in one program.

A program owns a vector, a group of up to 4,096 outputs and a span of blocks. It adds up all rows of the
signed transforms; which of them are outputs is seen to once, where a second launch adds the spans in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, launch_options
from fastproj.kernels._cases import CompileCase
from fastproj.kernels._philox import philox_words

BLOCK = 4096
THREADS = 128
PROGRAMS = 64  # of a vector, so that a sketch does not depend on the batch that it is made in
OUTPUTS, TERMS = 64, 16  # of a program that adds spans: its outputs, and what it adds to each at a time
SLOTS = tl.constexpr(BLOCK)
POSITION_SIGNS, ROW_SIGNS = tl.constexpr(5), tl.constexpr(6)  # streams
ROW_SAMPLE = tl.constexpr(7)


@triton.jit
def load_block(vectors_ptr, sample, sample_stride, start, positions, SUM: tl.constexpr):
    """A block from position ``start`` of a vector on, which may lie before it: zeros outside."""
    # The launcher sees to it that vectors begin and end at multiples of 16 bytes, in memory and in a block.
    VECTOR: tl.constexpr = 128 // vectors_ptr.dtype.element_ty.primitive_bitwidth  # noqa: N806
    # One comparison for each load rather than for each element: that is what registers are short of.
    row = tl.arange(0, SLOTS // VECTOR) * VECTOR
    low = tl.multiple_of(tl.maximum(-start, 0).to(tl.int32), VECTOR)
    high = tl.multiple_of(tl.minimum(positions - start, SLOTS).to(tl.int32), VECTOR)
    first = tl.multiple_of(sample.to(tl.int64) * sample_stride + start, VECTOR)
    element = row[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = ((row >= low) & (row < high))[:, None]
    tile = tl.load((vectors_ptr + first) + element, mask=inside, other=0.0).to(SUM)
    return tl.reshape(tile, [SLOTS])


@triton.jit
def bits_of_two_sets(word0, word1, word2, word3):
    """The words of two sets of 16 Philox counters: 4,096 bits for each, as 128 numbers of 32."""
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    halves = tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32))
    return tl.split(tl.trans(tl.reshape(halves, [2, 128])))


@triton.jit
def signed(block, bits):
    """The block with + where the bit of an element is set and − where it is not."""
    tile = tl.reshape(block, [128, 32])
    bit = (bits[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return tl.reshape(tl.where(bit != 0, tile, -tile), [SLOTS])


@triton.jit
def hadamard_transform(block):
    """``H v`` by butterflies of four; each turn rotates the digits of an index, six bring them back."""
    # Not unrolled: the layouts of unrolled turns take forty registers more.
    for _ in range(6):
        even, odd = tl.split(tl.reshape(block, [SLOTS // 4, 2, 2]))
        sums0, sums1 = tl.split(even + odd)
        differences0, differences1 = tl.split(even - odd)
        sums = tl.join(sums0 + sums1, sums0 - sums1)
        differences = tl.join(differences0 + differences1, differences0 - differences1)
        digits = tl.reshape(tl.join(sums, differences), [SLOTS // 4, 4])
        block = tl.reshape(tl.trans(digits), [SLOTS])
    return block


@triton.jit
def permuted(slot, key):
    """Where the permutation of ``key`` (uint64) takes the slots, which broadcast."""
    moved = slot ^ (key & 0xFFF).to(tl.int32)
    for turn in tl.static_range(1, 5):
        factor = ((key >> (12 * turn)) & 0xFFF).to(tl.int32) | 1
        moved = (moved * factor) & 0xFFF
        moved ^= moved >> 5
    return moved


@triton.jit(do_not_specialize=["seed", "offset", "positions", "sample_stride", "blocks", "span", "groups"])
def hadamard_kernel(
    vectors_ptr,
    partials_ptr,
    seed,
    offset,
    positions,
    sample_stride,
    blocks,
    span,
    groups,
    SUM: tl.constexpr,
):
    """``partials[i, span, g] = Σ_{b in span} σ_g[b] H D_g[b] v_i[b]``, all rows of H."""
    spans, program = tl.cdiv(blocks, span), tl.program_id(0).to(tl.int64)
    group, part, sample = program % groups, program // groups % spans, program // groups // spans
    first_block = offset.to(tl.int64) // SLOTS
    counter = tl.arange(0, 32) % 16
    stream = tl.where(tl.arange(0, 32) < 16, POSITION_SIGNS, ROW_SIGNS).to(tl.uint64)
    total = tl.zeros([SLOTS], dtype=SUM)
    for number in range(part * span, tl.minimum((part + 1) * span, blocks)):
        block_number = first_block + number
        block = load_block(vectors_ptr, sample, sample_stride, block_number * SLOTS - offset, positions, SUM)
        at = block_number * 16 + counter
        word0, word1, word2, word3 = philox_words(seed, stream, group.to(tl.uint64), at)
        position_bits, row_bits = bits_of_two_sets(word0, word1, word2, word3)
        total += signed(hadamard_transform(signed(block, position_bits)), row_bits)
    tl.store(partials_ptr + program * SLOTS + tl.arange(0, SLOTS), total)


@triton.jit(do_not_specialize=["seed", "spans", "groups", "dimension"])
def sampled_rows_kernel(
    partials_ptr, out_ptr, seed, spans, groups, dimension, OUTPUTS: tl.constexpr, TERMS: tl.constexpr
):
    """``out[i, o] = Σ_span partials[i, span, row of o] / √k``, rows sampled without replacement."""
    tiles = tl.cdiv(dimension, OUTPUTS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    output_exists = output < dimension
    group = output // SLOTS
    key, _, _, _ = philox_words(seed, ROW_SAMPLE, 0, group)
    element = group * SLOTS + permuted(output % SLOTS, key)
    total = tl.zeros([OUTPUTS], dtype=out_ptr.dtype.element_ty)
    for first in range(0, spans, TERMS):
        span = first + tl.arange(0, TERMS)
        at = (sample * spans + span)[None, :] * groups * SLOTS + element[:, None]
        mask = output_exists[:, None] & (span < spans)[None, :]
        total += tl.sum(tl.load(partials_ptr + at, mask=mask, other=0.0), axis=1)
    scale = 1.0 / tl.sqrt(dimension.to(tl.float64))
    tl.store(out_ptr + sample * dimension + output, total * scale.to(total.dtype), mask=output_exists)


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` as (B, k) in fp32, or fp64, for (B, n) at absolute positions from ``offset`` on."""
    vectors, offset = aligned(vectors, offset)
    samples, positions = vectors.shape
    groups = triton.cdiv(dimension, BLOCK)
    work = spans_of(offset, positions, groups)
    sums = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    partials = torch.empty(samples, work.spans, groups, BLOCK, dtype=sums, device=vectors.device)
    out = torch.empty(samples, dimension, dtype=sums, device=vectors.device)
    hadamard_kernel[(samples * work.spans * groups,)](
        vectors,
        partials,
        seed,
        offset,
        positions,
        vectors.stride(0),
        work.blocks,
        work.span,
        groups,
        SUM=DEVICE_DTYPES[sums],
        **launch_options(threads_of(vectors.dtype)),
    )
    sampled_rows_kernel[(samples * triton.cdiv(dimension, OUTPUTS),)](
        partials, out, seed, work.spans, groups, dimension, OUTPUTS, TERMS, **launch_options(THREADS)
    )
    return out


def aligned(vectors: Tensor, offset: int) -> tuple[Tensor, int]:
    """Vectors and offset for 128-bit loads: zeros added at both ends where their places break these."""
    elements = ALIGNMENT // vectors.element_size()
    before, after = offset % elements, -(offset + vectors.shape[1]) % elements
    lies_well = vectors.stride(1) == 1 and vectors.data_ptr() % ALIGNMENT == 0
    if before or after or not lies_well or vectors.stride(0) % elements:
        vectors = torch.nn.functional.pad(vectors, (before, after)).contiguous()
    return vectors, offset - before


def threads_of(dtype: torch.dtype) -> int:
    """Threads of a program that reads blocks: wide loads of halves put more of a block into each thread."""
    return 2 * THREADS if dtype.itemsize == 2 else THREADS


@dataclass(frozen=True)
class Spans:
    """How the blocks of a vector are dealt out: ``span`` blocks to each of ``spans`` programs."""

    blocks: int
    span: int
    spans: int


def spans_of(offset: int, positions: int, groups: int) -> Spans:
    """At most so many spans that a vector's groups and spans make ``PROGRAMS`` programs."""
    blocks = triton.cdiv(offset % BLOCK + positions, BLOCK)
    span = triton.cdiv(blocks, max(1, PROGRAMS // groups))
    return Spans(blocks, span, triton.cdiv(blocks, span))


def transform_case(kernel: Any, dtype: torch.dtype, parts: str) -> CompileCase:
    """A kernel that adds up what becomes of blocks of ``dtype``; ``parts`` counts parts of a sketch."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return CompileCase(
        name=f"{kernel.__name__}, {dtype}".replace("torch.", ""),
        kernel=kernel,
        signature={
            "vectors_ptr": f"*{DEVICE_DTYPES[dtype]}",
            "partials_ptr": f"*{DEVICE_DTYPES[sums]}",
            **dict.fromkeys(("seed", "offset", "positions", "sample_stride"), "i64"),
            **dict.fromkeys(("blocks", "span", parts), "i32"),
        },
        constexprs={"SUM": DEVICE_DTYPES[sums]},
        divisible_by_16=("vectors_ptr", "partials_ptr"),
        threads=threads_of(dtype),
        # Blocks of halves keep the arithmetic busy, not the memory.
        bytes_a_turn=BLOCK * dtype.itemsize if dtype.itemsize >= 4 else None,
    )


def sum_case(kernel: Any, dtype: torch.dtype, constants: Mapping[str, int]) -> CompileCase:
    """A kernel that adds spans up."""
    pointers = dict.fromkeys(("partials_ptr", "out_ptr"), f"*{DEVICE_DTYPES[dtype]}")
    numbers = {name: "i32" for name in kernel.arg_names if name.islower() and name not in pointers}
    return CompileCase(
        name=f"{kernel.__name__}, {dtype}".replace("torch.", ""),
        kernel=kernel,
        signature={**pointers, **numbers, **({"seed": "i64"} if "seed" in numbers else {})},
        constexprs=constants,
        divisible_by_16=tuple(pointers),
        threads=THREADS,
        narrow_accesses={kernel.__name__: "one element from each span: few bytes, read once"},
    )


CASES: tuple[CompileCase, ...] = (
    transform_case(hadamard_kernel, torch.float32, "groups"),
    transform_case(hadamard_kernel, torch.bfloat16, "groups"),
    transform_case(hadamard_kernel, torch.float64, "groups"),
    sum_case(sampled_rows_kernel, torch.float32, {"OUTPUTS": OUTPUTS, "TERMS": TERMS}),
)
