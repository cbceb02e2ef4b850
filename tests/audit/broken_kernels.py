"""Kernels with the faults that the audit is there for, compiled when this file is run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import triton
import triton.language as tl

from fastproj.bench.audit.compilation import compile_case
from fastproj.bench.audit.verdict import findings
from fastproj.kernels._cases import CompileCase
from fastproj.kernels._tiles import combine_flat, flat_products, set_pointers, shard_pointer


@triton.jit
def combine_kernel(addresses, coefficients, length, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A combination of two sets; without ALIGNED it forgets to say that its pointers are aligned."""
    pointers = set_pointers(addresses, 1, 0, 0, (tl.float32, tl.float32), ALIGNED)
    target = shard_pointer(addresses, 2, 0, 0, tl.float32, ALIGNED)
    c = (tl.load(coefficients), tl.load(coefficients + 1))
    combine_flat(target, pointers, c, length, 1024, tl.float32)


@triton.jit
def gram_kernel(addresses, partials, length, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The Gram of six sets; a long tile takes more registers than there are."""
    dtypes: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32)
    pointers = set_pointers(addresses, 1, 0, 0, dtypes, True)
    sums = flat_products(pointers, length, CHUNK, 4, tl.float32)
    for pair in tl.static_range(len(sums)):
        tl.store(partials + pair, sums[pair])


@triton.jit
def product_kernel(x, y, out, tokens, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of xᵀy, a turn of 32 tokens at a time."""
    rows, columns = tl.arange(0, 32), tl.arange(0, 64)
    total = tl.zeros((32, 64), dtype=tl.float32)
    for first in range(0, tokens, 32):
        token = first + tl.arange(0, 32)
        left = tl.load(x + token[:, None] * 32 + rows[None, :])
        right = tl.load(y + token[:, None] * 64 + columns[None, :])
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    tl.store(out + rows[:, None] * 64 + columns[None, :], total)


COMBINE = CompileCase(
    "scalar loads",
    combine_kernel,
    {"addresses": "*i64", "coefficients": "*fp64", "length": "i32"},
    {"ALIGNED": False},
    divisible_by_16=("addresses", "coefficients"),
)
GRAM = CompileCase(
    "a spill",
    gram_kernel,
    {"addresses": "*i64", "partials": "*fp64", "length": "i32"},
    {"CHUNK": 8192},
    divisible_by_16=("addresses", "partials"),
    narrow_accesses={"scaled_flat_products": "masked"},
)
PRODUCT = CompileCase(
    "no tensor cores",
    product_kernel,
    {"x": "*fp32", "y": "*fp32", "out": "*fp32", "tokens": "i32"},
    {"PRECISION": "ieee"},
    divisible_by_16=("x", "y", "out"),
)
HALVES = {"x": "*bf16", "y": "*bf16", "out": "*fp32", "tokens": "i32"}
CASES = (
    COMBINE,
    replace(COMBINE, name="scalar loads, mended", constexprs={"ALIGNED": True}),
    GRAM,
    replace(GRAM, name="a spill, mended", constexprs={"CHUNK": 512}),
    PRODUCT,
    replace(PRODUCT, name="no tensor cores, mended", signature=HALVES),
    replace(PRODUCT, name="loads that wait", signature=HALVES, num_stages=1),
)


def found(arch: str) -> dict[str, list[dict[str, Any]]]:
    """The findings of each case; the last is judged as the pipelined loop that it should be."""
    result = {}
    for case in CASES:
        promised = replace(case, num_stages=3)
        result[case.name] = [asdict(f) for f in findings(promised, arch, compile_case(case, arch))]
    return result


if __name__ == "__main__":
    print(json.dumps(found(sys.argv[1])))
