"""Sparse Johnson–Lindenstrauss transform in gather form: no atomics, sums in a fixed order.

A program owns a vector, one of the s parts of the outputs and a span of runs of 4,096 positions. A run lies
in registers; every slot fetches its position through shared memory and adds it with a sign. The slots that
make an output are added up where a second launch adds the spans.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import DEVICE_DTYPES, launch_options
from fastproj.kernels._cases import CompileCase
from fastproj.kernels._philox import philox_words
from fastproj.kernels._sketch_hadamard import (
    BLOCK,
    OUTPUTS,
    SLOTS,
    TERMS,
    THREADS,
    aligned,
    bits_of_two_sets,
    load_block,
    permuted,
    signed,
    spans_of,
    sum_case,
    threads_of,
    transform_case,
)
from fastproj.kernels.cpu._sketch_sparse import nonzeros_of

KEYS, SLOT_SIGNS = tl.constexpr(8), tl.constexpr(9)  # streams


@triton.jit(do_not_specialize=["seed", "offset", "positions", "sample_stride", "blocks", "span", "parts"])
def sparse_kernel(
    vectors_ptr,
    partials_ptr,
    seed,
    offset,
    positions,
    sample_stride,
    blocks,
    span,
    parts,
    SUM: tl.constexpr,
):
    """``partials[i, span, a, t] = Σ_{run in span} σ_a[run, t] v_i[run, π_{run,a}(t)]``."""
    spans, program = tl.cdiv(blocks, span), tl.program_id(0).to(tl.int64)
    part, number_of_span, sample = program % parts, program // parts % spans, program // parts // spans
    first_run = offset.to(tl.int64) // SLOTS
    # Sixteen counters of signs, then that of the key.
    counter = tl.arange(0, 32)
    is_sign, slot = counter < 16, tl.arange(0, SLOTS)
    stream = tl.where(is_sign, SLOT_SIGNS, KEYS).to(tl.uint64)
    total = tl.zeros([SLOTS], dtype=SUM)
    for number in range(number_of_span * span, tl.minimum((number_of_span + 1) * span, blocks)):
        run = first_run + number
        values = load_block(vectors_ptr, sample, sample_stride, run * SLOTS - offset, positions, SUM)
        at = tl.where(is_sign, run * 16 + counter, run)
        word0, word1, word2, word3 = philox_words(seed, stream, part.to(tl.uint64), at)
        key = tl.sum(tl.where(counter == 16, word0, 0), axis=0)
        fetched = tl.gather(values, permuted(slot, key), axis=0)
        sign_bits, _ = bits_of_two_sets(word0, word1, word2, word3)
        total += signed(fetched, sign_bits)
    tl.store(partials_ptr + program * SLOTS + slot, total)


@triton.jit(do_not_specialize=["spans", "parts", "dimension"])
def slot_sums_kernel(
    partials_ptr, out_ptr, spans, parts, dimension, OUTPUTS: tl.constexpr, TERMS: tl.constexpr
):
    """``out[i, a L + o] = Σ_span Σ_{slots t of o} partials[i, span, a, t] / √s``."""
    tiles = tl.cdiv(dimension, OUTPUTS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    output_exists = output < dimension
    # Outputs and slots lie in the same order: parts, then outputs of a part with their slots.
    slots = parts * SLOTS // dimension
    total = tl.zeros([OUTPUTS], dtype=out_ptr.dtype.element_ty)
    for first in range(0, spans * slots, TERMS):
        term = first + tl.arange(0, TERMS)
        at = ((sample * spans + term // slots) * parts * SLOTS + term % slots)[None, :]
        mask = output_exists[:, None] & (term < spans * slots)[None, :]
        total += tl.sum(tl.load(partials_ptr + at + (output * slots)[:, None], mask=mask, other=0.0), axis=1)
    scale = 1.0 / tl.sqrt(parts.to(tl.float64))
    tl.store(out_ptr + sample * dimension + output, total * scale.to(total.dtype), mask=output_exists)


def project(vectors: Tensor, dimension: int, seed: int, offset: int) -> Tensor:
    """``P v`` as (B, k) in fp32, or fp64, for (B, n) at absolute positions from ``offset`` on.

    Raises ValueError for a k that does not cut runs into equal parts.
    """
    parts = nonzeros_of(dimension)
    vectors, offset = aligned(vectors, offset)
    samples, positions = vectors.shape
    work = spans_of(offset, positions, parts)
    sums = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    partials = torch.empty(samples, work.spans, parts, BLOCK, dtype=sums, device=vectors.device)
    out = torch.empty(samples, dimension, dtype=sums, device=vectors.device)
    sparse_kernel[(samples * work.spans * parts,)](
        vectors,
        partials,
        seed,
        offset,
        positions,
        vectors.stride(0),
        work.blocks,
        work.span,
        parts,
        SUM=DEVICE_DTYPES[sums],
        **launch_options(threads_of(vectors.dtype)),
    )
    slot_sums_kernel[(samples * triton.cdiv(dimension, OUTPUTS),)](
        partials, out, work.spans, parts, dimension, OUTPUTS, TERMS, **launch_options(THREADS)
    )
    return out


CASES: tuple[CompileCase, ...] = (
    transform_case(sparse_kernel, torch.float32, "parts"),
    transform_case(sparse_kernel, torch.bfloat16, "parts"),
    transform_case(sparse_kernel, torch.float64, "parts"),
    sum_case(slot_sums_kernel, torch.float32, {"OUTPUTS": OUTPUTS, "TERMS": TERMS}),
)
