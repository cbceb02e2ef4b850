"""Projection and AdamW in one sweep: the combined gradient lives and dies in registers, tile by tile."""

# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import (
    COLUMN_CHOICES,
    THREADS,
    accumulation_dtype,
    address_table,
    contiguous,
    copy_back,
    device_dtypes,
    keep,
    launch_options,
    on_device,
    prepare,
    tile_of,
    upload,
)
from fastproj.kernels._cases import CompileCase, every_pair
from fastproj.kernels._span_cases import (
    ALIKE,
    PER_ROW,
    alternating,
    bytes_a_turn,
    span_name,
    unaligned,
)
from fastproj.kernels._tiles import (
    block_fields,
    load_tiles,
    rounded,
    row_offsets,
    set_pointers,
    split_coefficient,
    weighted_sum,
)
from fastproj.kernels.combine import combine, row_coefficients

STATE_LISTS = 3  # lists that are read and written: parameters and both moments
MOST_SETS = 16  # of a launch, whose registers hold an address and a coefficient for each, and the state's
MOST_SETS_OF_ROWS = 6  # as many where each narrow row has coefficients of its own


@triton.jit
def step_constants(step, lr, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, ACC: tl.constexpr):
    """What AdamW multiplies with at this step, worked out in fp64 and rounded once.

    The share of p that is kept, ``lr/(1 − β1ᵗ)``, ``√(1 − β2ᵗ)``, ε, and both β beside what is left of 1.
    """
    # The interpreter hands these over as Python numbers, which would make fp32 of what meets no fp64.
    one = step * 0.0 + 1.0
    rate = lr * one / (1.0 - tl.exp2(step * log_beta1))
    root = tl.sqrt(1.0 - tl.exp2(step * log_beta2))
    return (
        (1.0 - lr * (weight_decay * one)).to(ACC), rate.to(ACC), root.to(ACC), (eps * one).to(ACC),
        (beta1 * one).to(ACC), (1.0 - beta1 * one).to(ACC),
        (beta2 * one).to(ACC), (1.0 - beta2 * one).to(ACC),
    )  # fmt: skip


@triton.jit
def step_tile(
    state, sets, factors, powers, constants, at, mask, MASKED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One tile of p, m and v, stepped along ``Σ_k c_k x_k``; each element is read before it is written."""
    gradient = weighted_sum(sets, factors, powers, at, mask, MASKED, ACC)
    p, m, v = load_tiles(state, at, mask, MASKED, ACC)
    kept, rate, root, eps, beta1, rest1, beta2, rest2 = constants
    m = beta1 * m + rest1 * gradient
    # In this order, as torch has it: (1 − β2) G² may be in range where G² is not.
    v = beta2 * v + rest2 * gradient * gradient
    p = kept * p - rate * (m / (tl.sqrt(v) / root + eps))
    stepped = (p, m, v)
    for k in tl.static_range(len(state)):
        value = rounded(stepped[k], state[k].dtype.element_ty)
        if MASKED:
            tl.store(state[k] + at, value, mask=mask)
        else:
            tl.store(state[k] + at, value)


@triton.jit
def step_flat(state, sets, coefficients, constants, length, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """The step of a flat block, whose elements share their coefficients."""
    factors = ()
    powers = ()
    for k in tl.static_range(len(sets)):
        factor, power = split_coefficient(coefficients[k], ACC)
        factors = factors + (factor,)
        powers = powers + (power,)
    offsets = tl.arange(0, CHUNK)
    full = length // CHUNK * CHUNK
    for start in range(0, full, CHUNK):
        step_tile(state, sets, factors, powers, constants, start + offsets, None, False, ACC)
    if full < length:
        tail = full + offsets
        step_tile(state, sets, factors, powers, constants, tail, tail < length, True, ACC)


@triton.jit
def step_rows(
    state, sets, coefficients, constants, row, length, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The step of ROWS narrow rows, each with its own coefficients."""
    factors = ()
    powers = ()
    for k in tl.static_range(len(sets)):
        factor, power = split_coefficient(coefficients[k], ACC)
        factors = factors + (factor[:, None],)
        powers = powers + (power[:, None],)
    for column in range(0, width, COLUMNS):
        at, mask = row_offsets(row, column, length, width, ROWS, COLUMNS)
        step_tile(state, sets, factors, powers, constants, at, mask, True, ACC)


@triton.jit(do_not_specialize=["shards"])
def _projected_adamw_kernel(
    addresses, blocks, coefficients, step_addresses, controls, shards,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    eps: tl.float64, weight_decay: tl.float64,
    DTYPES: tl.constexpr, STATE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """AdamW's step along ``Σ_k C[s,k] G_k`` over one block; narrow rows are segments of their own."""
    count: tl.constexpr = len(DTYPES)
    shard, start, length, width, _, segment = block_fields(blocks, ALIGNED)
    sets = set_pointers(addresses, shards, shard, start, DTYPES, ALIGNED)
    state = set_pointers(addresses + count * shards, shards, shard, start, STATE, ALIGNED)
    step = tl.load(tl.load(step_addresses + shard).to(tl.pointer_type(tl.float32))).to(tl.float64)
    rate = lr * tl.load(controls)
    constants = step_constants(
        step, rate, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, ACC
    )  # fmt: skip
    # Nothing of a step is taken in whose gradients there was Inf or NaN, if somebody has looked.
    length = length * (tl.load(controls + 1) == 0).to(tl.int32)
    narrow = width >= 0
    if COLUMNS > 0 and narrow:
        for row in range(0, length, ROWS):
            c = row_coefficients(coefficients + segment * count, row + tl.arange(0, ROWS), length, count)
            step_rows(state, sets, c, constants, row, length, width, ROWS, COLUMNS, ACC)
    else:
        c = ()
        for k in tl.static_range(count):
            c = c + (tl.load(coefficients + segment * count + k),)
        step_flat(state, sets, c, constants, length, CHUNK, ACC)


def projected_adamw(
    shards: list[Tensor],
    coefficients: Tensor,
    first: Sequence[int],
    rows: bool,
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None,
) -> None:
    """AdamW's step along ``Σ_k C[s,k] G_k``, in place: one launch per dtype signature and alignment.

    ``shards[k*n + i]`` is shard i of set k; ``coefficients`` is (S, K) fp64; ``steps`` are fp32 numbers on
    the device, and so may ``lr`` be. The host waits for none of them. More sets than ``MOST_SETS``
    (``MOST_SETS_OF_ROWS``) pass by way of a sum of the first of them.
    """
    n, (count, num_sets) = len(params), coefficients.shape
    most = MOST_SETS_OF_ROWS if rows else MOST_SETS
    if num_sets > most:
        wide = torch.float64 if any(shard.dtype == torch.float64 for shard in shards) else torch.float32
        begun = [torch.empty_like(shard, dtype=wide) for shard in shards[:n]]
        kept = num_sets - most + 1
        combine(shards[: kept * n], coefficients[:, :kept], first, rows, begun)
        shards = [*begun, *shards[kept * n :]]
        coefficients = torch.cat([coefficients.new_ones(count, 1), coefficients[:, kept:]], dim=1)
        num_sets = most
    # The work list holds addresses alone: these names keep the copies of strided shards alive.
    sets = [contiguous(shards[k * n : (k + 1) * n]) for k in range(num_sets)]
    lists = (params, exp_avgs, exp_avg_sqs)
    written = [contiguous(own) for own in lists]
    work = prepare([*sets, *written], first, rows, count)
    device = params[0].device
    step_addresses = address_table((tuple(step.data_ptr() for step in steps),), device)
    if device.type == "cuda":
        keep(step_addresses, (step_addresses,))
    coefficients = coefficients.contiguous()
    rate = float(lr) if lr.device.type == "cpu" else 1.0
    with on_device(coefficients):
        controls = _controls(lr, found_inf, device)
        for group in work.plan.groups:
            _projected_adamw_kernel[(len(group.blocks),)](
                work.addresses, group.blocks, coefficients, step_addresses, controls, work.shards,
                rate, beta1, beta2, _log2(beta1), _log2(beta2), eps, weight_decay,
                **step_configuration(group.dtypes, group.columns, group.aligned),
                **launch_options(THREADS),
            )  # fmt: skip
    for own, values in zip(lists, written, strict=True):
        copy_back(own, values)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


def _controls(lr: Tensor, found_inf: Tensor | None, device: torch.device) -> Tensor:
    """What only the device knows, (2,) fp64: a factor of the learning rate, and whether to skip the step."""
    neutral = _neutral_controls(device)
    if lr.device.type == "cpu" and found_inf is None:
        return neutral
    factor = neutral[0] if lr.device.type == "cpu" else lr.to(torch.float64).reshape(())
    found = neutral[1] if found_inf is None else found_inf.to(torch.float64).reshape(())
    return torch.stack([factor, found])


@cache
def _neutral_controls(device: torch.device) -> Tensor:
    return upload(torch.tensor([1.0, 0.0], dtype=torch.float64), device)


def step_configuration(dtypes: tuple[torch.dtype, ...], columns: int, aligned: bool) -> dict[str, Any]:
    """The constants of the kernel for shards of these dtypes: one per set, then those of p, m and v."""
    chunk, _ = tile_of(dtypes, aligned)
    names = device_dtypes(dtypes)
    return {
        "DTYPES": names[:-STATE_LISTS], "STATE": names[-STATE_LISTS:],
        "ACC": accumulation_dtype(dtypes), "CHUNK": chunk,
        "ROWS": chunk // columns if columns else 0, "COLUMNS": columns, "ALIGNED": aligned,
    }  # fmt: skip


def _case(
    sets: int,
    dtypes: tuple[torch.dtype, ...],
    columns: int,
    aligned: bool,
    state: tuple[torch.dtype, ...] | None = None,
) -> CompileCase:
    own, state = alternating(dtypes, sets), state or dtypes * STATE_LISTS
    kept = "" if state == dtypes * STATE_LISTS else f", {str(state[-1]).removeprefix('torch.')} moments"
    return CompileCase(
        name=f"{span_name(own, columns, aligned)}{kept}",
        kernel=_projected_adamw_kernel,
        signature={
            "addresses": "*i64", "blocks": "*i64", "coefficients": "*fp64", "step_addresses": "*i64",
            "controls": "*fp64", "shards": "i32", "lr": "fp64", "beta1": "fp64", "beta2": "fp64",
            "log_beta1": "fp64", "log_beta2": "fp64", "eps": "fp64", "weight_decay": "fp64",
        },
        constexprs=step_configuration((*own, *state), columns, aligned),
        divisible_by_16=("addresses", "blocks", "coefficients", "step_addresses", "controls"),
        threads=THREADS,
        bytes_a_turn=bytes_a_turn(sets + STATE_LISTS, aligned),
        narrow_accesses=(
            {"row_coefficients": PER_ROW} if aligned else unaligned("_projected_adamw_kernel")
        ),
    )  # fmt: skip


HALF_WITH_WIDE_MOMENTS = (torch.bfloat16, torch.float32, torch.float32)

COMPILE_CASES = (
    *(
        _case(**choice)
        for choice in every_pair(
            dtypes=ALIKE,
            sets=(1, 2, 3, MOST_SETS_OF_ROWS),
            columns=(0, *COLUMN_CHOICES),
            aligned=(True, False),
        )
    ),
    *(_case(MOST_SETS, dtypes, 0, aligned) for dtypes in ALIKE for aligned in (True, False)),
    _case(2, (torch.bfloat16,), 0, True, HALF_WITH_WIDE_MOMENTS),
    _case(2, (torch.bfloat16,), 16, True, HALF_WITH_WIDE_MOMENTS),
)
