"""Cross entropy token by token: a program streams one row of logits, and once more for its gradient."""

# Device code has no types.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: SIM108

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, launch_options, on_device
from fastproj.kernels._cases import CompileCase

THREADS = 256  # of a program
LOADS = 2  # of 128 bits, of a thread in one turn
MOST_CLASSES = 2**30  # device code counts along a row in int32

# Rows may begin anywhere: no hint of the launcher's specialisation is needed, and none makes another variant.
NUMBERS = ("tokens", "classes", "sample_stride", "token_stride", "skew", "ignore_index")
POINTERS = ("logits_ptr", "labels_ptr", "losses_ptr", "log_probabilities_ptr")
STATISTICS = ("maxima_ptr", "log_sums_ptr")
OF_BACKWARD = ("grad_ptr", "logits_ptr", "labels_ptr", *STATISTICS)


@triton.jit
def in_dtype(number, DTYPE: tl.constexpr):
    """A scalar in DTYPE; the interpreter hands numbers over as Python's, which have none."""
    return (tl.zeros([1], tl.float64) + number).sum(axis=0).to(DTYPE)


@triton.jit
def row_parts(position, tokens, classes, sample_stride, token_stride, skew, VECTOR: tl.constexpr):
    """Where row ``position`` begins, its elements before the first whole vector, and those in whole ones.

    The beginning counts from the last 16-byte boundary before the logits; vectors begin at such boundaries.
    """
    first = position // tokens * sample_stride + position % tokens * token_stride + skew
    head = tl.minimum(((VECTOR - first % VECTOR) % VECTOR).to(tl.int32), classes)
    return first, head, (classes - head) // VECTOR * VECTOR


@triton.jit
def edge_columns(head, whole, classes, VECTOR: tl.constexpr):
    """Columns before and after the whole vectors of a row; ``classes`` or more where there is none."""
    edge = tl.arange(0, 2 * VECTOR)
    return tl.where(edge < VECTOR, tl.where(edge < head, edge, classes), head + whole + edge - VECTOR)


@triton.jit
def finite_or_zero(maximum):
    """What to subtract before exp: −Inf − −Inf would be NaN where there is no class yet but such of −Inf."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=(*POINTERS, *STATISTICS))
def cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, log_probabilities_ptr, maxima_ptr, log_sums_ptr,
    tokens, classes, sample_stride, token_stride, skew, ignore_index, label_smoothing: tl.float64,
    SMOOTHED: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss, ``log p_y``, maximum and log-sum of one row of logits."""
    position = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + position)
    counts = label != ignore_index
    first, head, whole = row_parts(position, tokens, classes, sample_stride, token_stride, skew, VECTOR)
    base = tl.multiple_of(logits_ptr - skew, 16)
    body = base + (first + VECTOR - 1) // VECTOR * VECTOR

    column = edge_columns(head, whole, classes, VECTOR)
    there = column < tl.where(counts, classes, 0)
    edges = tl.load(base + first + column, mask=there, other=float("-inf")).to(ACC)
    total_of_edges = tl.sum(tl.where(there, edges, 0.0), axis=0)
    vector = tl.arange(0, CHUNK // VECTOR) * VECTOR
    lanes = vector[:, None] + tl.arange(0, VECTOR)[None, :]
    maxima = tl.full([CHUNK // VECTOR], float("-inf"), ACC)
    sums = tl.zeros([CHUNK // VECTOR], ACC)
    total = tl.zeros([CHUNK // VECTOR], ACC)
    # A thread holds whole vectors, and a maximum and sums for their place: it meets no other before the end.
    for at in range(0, tl.where(counts, whole, 0), CHUNK):
        inside = (at + vector < whole)[:, None]
        tile = tl.load(body + at + lanes, mask=inside, other=float("-inf")).to(ACC)
        highest = tl.maximum(maxima, tl.max(tile, axis=1))
        shift = finite_or_zero(highest)
        sums = sums * tl.exp(maxima - shift) + tl.sum(tl.exp(tile - shift[:, None]), axis=1)
        maxima = highest
        if SMOOTHED:
            total += tl.sum(tl.where(inside, tile, 0.0), axis=1)

    maximum = finite_or_zero(tl.maximum(tl.max(maxima, axis=0), tl.max(edges, axis=0)))
    sum_of_all = tl.sum(sums * tl.exp(maxima - maximum), axis=0) + tl.sum(tl.exp(edges - maximum), axis=0)
    log_sum = tl.log(tl.where(counts, sum_of_all, 1.0))
    valid = counts & (label >= 0) & (label < classes)
    own = tl.load(base + first + label, mask=valid, other=float("nan")).to(ACC) - maximum
    loss = log_sum - own
    if SMOOTHED:
        epsilon = in_dtype(label_smoothing, ACC)
        mean = (tl.sum(total, axis=0) + total_of_edges) / classes - maximum
        loss = (1 - epsilon) * loss + epsilon * (log_sum - mean)
    tl.store(losses_ptr + position, tl.where(counts, loss, 0.0))
    tl.store(log_probabilities_ptr + position, tl.where(counts, own - log_sum, 0.0))
    tl.store(maxima_ptr + position, maximum)
    tl.store(log_sums_ptr + position, log_sum)


@triton.jit
def gradient(tile, hit, counts, scale, maximum, log_sum, on, off, DTYPE: tl.constexpr):
    """``g (p_v − on [v = y] − off)`` in DTYPE, 0 in a row that does not count."""
    value = scale * (tl.exp(tile - maximum - log_sum) - off - tl.where(hit, on, 0.0))
    return tl.where(counts, value, 0.0).to(DTYPE)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=OF_BACKWARD)
def cross_entropy_backward_kernel(
    grad_ptr, logits_ptr, labels_ptr, maxima_ptr, log_sums_ptr, out_ptr,
    tokens, classes, sample_stride, token_stride, skew, ignore_index, label_smoothing: tl.float64,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of one row of logits; ALIKE says that rows of both lie alike to 16-byte boundaries."""
    position = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + position)
    counts = label != ignore_index
    first, head, whole = row_parts(position, tokens, classes, sample_stride, token_stride, skew, VECTOR)
    base = tl.multiple_of(logits_ptr - skew, 16)
    body = base + (first + VECTOR - 1) // VECTOR * VECTOR
    out_row = out_ptr + position * classes
    if ALIKE:
        out_body = out_ptr + (position * classes + VECTOR - 1) // VECTOR * VECTOR
    else:
        out_body = out_row + head

    valid = (label >= 0) & (label < classes)
    scale = tl.where(valid, tl.load(grad_ptr + position), float("nan"))
    maximum = tl.load(maxima_ptr + position)
    log_sum = tl.load(log_sums_ptr + position)
    epsilon = in_dtype(label_smoothing, ACC)
    on = 1 - epsilon
    off = epsilon / classes
    out_dtype: tl.constexpr = out_ptr.dtype.element_ty

    column = edge_columns(head, whole, classes, VECTOR)
    read = column < tl.where(counts, classes, 0)
    edges = tl.load(base + first + column, mask=read, other=float("-inf")).to(ACC)
    edges = gradient(edges, column == label, counts, scale, maximum, log_sum, on, off, out_dtype)
    tl.store(out_row + column, edges, mask=column < classes)
    vector = tl.arange(0, CHUNK // VECTOR) * VECTOR
    neighbour = tl.arange(0, VECTOR)[None, :]
    for at in range(0, whole, CHUNK):
        lanes = at + vector[:, None] + neighbour
        inside = (at + vector < tl.where(counts, whole, 0))[:, None]
        tile = tl.load(body + lanes, mask=inside, other=float("-inf")).to(ACC)
        # Held against neighbours, the label costs a register a vector, and not one an element.
        hit = neighbour == (label.to(tl.int32) - head - at - vector)[:, None]
        value = gradient(tile, hit, counts, scale, maximum, log_sum, on, off, out_dtype)
        tl.store(out_body + lanes, value, mask=(at + vector < whole)[:, None])


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, ``log p_y``, maxima m and ``log Σ exp(x − m)`` of logits (B, T, V) against labels (B, T).

    Ignored rows are not read and give zeros; a label outside of 0 … V−1 gives NaN.
    """
    logits = _rows(logits)
    options = _options(logits.dtype)
    empty = [torch.empty(labels.shape, dtype=_total(logits.dtype), device=logits.device) for _ in range(4)]
    losses, log_probabilities, maxima, log_sums = empty
    if labels.numel():
        with on_device(logits):
            cross_entropy_kernel[(labels.numel(),)](
                logits, labels.contiguous(), losses, log_probabilities, maxima, log_sums,
                *_numbers(logits), ignore_index, label_smoothing,
                SMOOTHED=label_smoothing > 0, **options,
            )  # fmt: skip
    return losses, log_probabilities, maxima, log_sums


def cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    maxima: Tensor,
    log_sums: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """``g (p_v − (1 − ε) [v = y] − ε/V)`` as (B, T, V) in the dtype of the logits; 0 where ignored."""
    logits = _rows(logits)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if labels.numel():
        with on_device(logits):
            cross_entropy_backward_kernel[(labels.numel(),)](
                grad.contiguous(), logits, labels.contiguous(), maxima, log_sums, out,
                *_numbers(logits), ignore_index, label_smoothing,
                ALIKE=rows_alike(logits, out), **_options(logits.dtype),
            )  # fmt: skip
    return out


def rows_alike(logits: Tensor, out: Tensor) -> bool:
    """Whether every row of ``out`` begins as far from a 16-byte boundary as that of ``logits``."""
    vector = ALIGNMENT // logits.element_size()
    strides = zip(logits.shape[:2], logits.stride(), out.stride(), strict=False)
    steps = [a - b for extent, a, b in strides if extent > 1]
    return not any(step % vector for step in (*steps, _skew(logits) - _skew(out)))


def _rows(logits: Tensor) -> Tensor:
    """The logits with their classes side by side: copied from any other layout."""
    if logits.shape[2] > MOST_CLASSES:
        raise ValueError(f"expected at most {MOST_CLASSES} classes, got {logits.shape[2]}")
    return logits if logits.stride(2) == 1 or logits.shape[2] == 1 else logits.contiguous()


def _skew(tensor: Tensor) -> int:
    """Elements from the last 16-byte boundary to the tensor's first."""
    return tensor.data_ptr() % ALIGNMENT // tensor.element_size()


def _numbers(logits: Tensor) -> tuple[int, ...]:
    return logits.shape[1], logits.shape[2], *logits.stride()[:2], _skew(logits)


def _total(dtype: torch.dtype) -> torch.dtype:
    """What losses are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _options(dtype: torch.dtype) -> dict[str, Any]:
    """The constants that the dtype of the logits sets."""
    vector = ALIGNMENT // dtype.itemsize
    return {
        "CHUNK": THREADS * vector * LOADS,
        "VECTOR": vector,
        "ACC": DEVICE_DTYPES[_total(dtype)],
        **launch_options(THREADS),
    }


def _case(kernel: Any, dtype: torch.dtype, choice: str, chosen: bool) -> CompileCase:
    options = _options(dtype)
    constants = {name: options[name] for name in ("CHUNK", "VECTOR", "ACC")}
    types = {
        "labels_ptr": "*i64",
        "logits_ptr": f"*{DEVICE_DTYPES[dtype]}",
        "out_ptr": f"*{DEVICE_DTYPES[dtype]}",
    }
    pointers = {
        name: types.get(name, f"*{constants['ACC']}") for name in kernel.arg_names if name.endswith("_ptr")
    }
    unalike = choice == "ALIKE" and not chosen
    return CompileCase(
        name=f"{dtype}, {choice if chosen else f'not {choice}'}".replace("torch.", "").lower(),
        kernel=kernel,
        signature=pointers | dict.fromkeys(NUMBERS, "i32") | {"label_smoothing": "fp64"},
        constexprs=constants | {choice: chosen},
        divisible_by_16=("out_ptr",) if "out_ptr" in pointers else (),
        threads=THREADS,
        # In fp64 the exponentials set the pace, not the memory.
        bytes_a_turn=None if dtype == torch.float64 else constants["CHUNK"] * dtype.itemsize,
        narrow_accesses={kernel.__name__: "rows of logits and gradient lie differently"} if unalike else {},
    )


COMPILE_CASES = (
    *(_case(cross_entropy_kernel, dtype, "SMOOTHED", False) for dtype in DEVICE_DTYPES),
    *(_case(cross_entropy_kernel, dtype, "SMOOTHED", True) for dtype in (torch.bfloat16, torch.float64)),
    *(_case(cross_entropy_backward_kernel, dtype, "ALIKE", True) for dtype in DEVICE_DTYPES),
    *(
        _case(cross_entropy_backward_kernel, dtype, "ALIKE", False)
        for dtype in (torch.bfloat16, torch.float64)
    ),
)
