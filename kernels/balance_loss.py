"""Propensity and discrimination of label logits: one program reads a whole batch whose labels fit its tile.

Of more labels a program reads each tile's share, and one more launch takes the norms over all of them.
"""

# Device code has no types.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: SIM108

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastproj.kernels._balance_loss_norms import (
    ANYWHERE,
    COLUMNS,
    THREADS,
    members,
    norms_kernel,
    store_losses,
    store_slopes,
    vectors_of,
)
from fastproj.kernels._balance_loss_norms import CASES as NORMS_CASES
from fastproj.kernels._blocks import ALIGNMENT, DEVICE_DTYPES, launch_options, on_device
from fastproj.kernels._cases import CompileCase, every_pair

# Labels of a tile, and samples of it: a batch gets the narrowest that holds its labels, or the last.
TILES = {32: 16, 256: 8, COLUMNS: 4}
TURNS = 8  # tiles of a gradient that a program writes with the slopes that it has read
MOST_LABELS = 2**29  # the last of four rows of slopes begins at three times as many, in int32

# A batch may have any size, and labels any layout: none makes a variant of its own.
NUMBERS = ("samples", "ignore_index", "label_row_stride", "label_column_stride")


@triton.jit
def entries(
    labels_ptr, row, column, samples, num_labels, ignore_index, row_stride, column_stride,
    EACH: tl.constexpr,
):  # fmt: skip
    """Whether samples have labels, whether they have them not, and whether what is said is neither.

    None of the three where nothing counts. EACH says that there is a label for each entry, and not a sample.
    """
    at = labels_ptr + row[:, None] * row_stride
    inside = row[:, None] < samples
    if EACH:
        at += column[None, :].to(tl.int64) * column_stride
        inside &= column[None, :] < num_labels
    # In int64, as −100 would be 156 beside bytes.
    value = tl.load(at, mask=inside, other=0).to(tl.int64)
    counts = inside & (value != ignore_index)
    if EACH:
        wrong = counts & ((value < 0) | (value > 1))
        has = counts & (value == 1)
    else:
        counts &= column[None, :] < num_labels
        wrong = counts & ((value < 0) | (value >= num_labels))
        has = counts & (value == column[None, :])
    return has, counts & ~has & ~wrong, wrong


@triton.jit
def logits_of(logits_ptr, row, column, samples, num_labels, row_stride, column_stride):
    """The logits of a tile, in fp64; what does not count is read too, as whole loads ask for."""
    at = logits_ptr + row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
    inside = (row[:, None] < samples) & (column[None, :] < num_labels)
    value = tl.load(at, mask=inside, other=0.0)
    return value.to(tl.float64)


@triton.jit
def mean_or_known(total, count, known_ptr, column, inside, KNOWN: tl.constexpr):
    """The mean of ``count`` numbers; of none, what is known, or NaN."""
    if KNOWN:
        otherwise = tl.load(known_ptr + column, mask=inside, other=float("nan"))
    else:
        otherwise = float("nan")
    return tl.where(count > 0, total / tl.maximum(count, 1), otherwise)


@triton.jit
def mean_of(values, there):
    """The mean of the values that are there; of none 0."""
    return tl.sum(tl.where(there, values, 0.0), axis=0) / tl.maximum(tl.sum(there.to(tl.int32), axis=0), 1)


@triton.jit(do_not_specialize=(*NUMBERS, "present_only"))
def balance_loss_kernel(
    logits_ptr, labels_ptr, known_ptr, means_ptr, counts_ptr, slopes_ptr, propensity_ptr, discrimination_ptr,
    samples, num_labels, logit_row_stride, logit_column_stride, label_row_stride, label_column_stride,
    ignore_index, present_only,
    EACH: tl.constexpr, KNOWN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The means of a tile of labels; losses and slopes where these are all of them, as WHOLE says.

    Else ``counts`` takes the numbers of samples that the means are over.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_labels
    total = tl.zeros([COLUMNS], tl.float64)
    total_not = tl.zeros([COLUMNS], tl.float64)
    count = tl.zeros([COLUMNS], tl.int32)
    count_not = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, samples, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        has, has_not, wrong = entries(
            labels_ptr, row, column, samples, num_labels, ignore_index, label_row_stride, label_column_stride,
            EACH,
        )  # fmt: skip
        value = logits_of(logits_ptr, row, column, samples, num_labels, logit_row_stride, logit_column_stride)
        # A label that is none is on both sides, and makes NaN of them.
        value = tl.where(wrong, float("nan"), value)
        has |= wrong
        has_not |= wrong
        total += tl.sum(tl.where(has, value, 0.0), axis=0)
        total_not += tl.sum(tl.where(has_not, value, 0.0), axis=0)
        count += tl.sum(has.to(tl.int32), axis=0)
        count_not += tl.sum(has_not.to(tl.int32), axis=0)

    means = mean_or_known(total, count, known_ptr, column, inside, KNOWN)
    means_not = mean_or_known(total_not, count_not, known_ptr + num_labels, column, inside, KNOWN)
    tl.store(means_ptr + column, means, mask=inside)
    tl.store(means_ptr + num_labels + column, means_not, mask=inside)
    if WHOLE:
        present, absent, both = members(means, means_not, count, count_not, present_only)
        centre, centre_not = mean_of(means, present), mean_of(means_not, absent)
        vector, vector_not, gap = vectors_of(means, means_not, present, absent, both, centre, centre_not)
        norm = tl.sqrt(tl.sum(vector * vector, axis=0))
        norm_not = tl.sqrt(tl.sum(vector_not * vector_not, axis=0))
        norm_of_gap = tl.sqrt(tl.sum(gap * gap, axis=0))
        store_losses(propensity_ptr, discrimination_ptr, norm, norm_not, norm_of_gap)
        store_slopes(
            slopes_ptr, column, num_labels, vector, vector_not, gap, norm, norm_not, norm_of_gap,
            count, count_not, present, absent, both,
        )  # fmt: skip
    else:
        tl.store(counts_ptr + column, count, mask=inside)
        tl.store(counts_ptr + num_labels + column, count_not, mask=inside)


@triton.jit
def scaled(grad_ptr, slopes_ptr, column, num_labels):
    """A loss's gradient times its slopes on both sides."""
    grad = tl.load(grad_ptr).to(tl.float64)
    inside = column < num_labels
    slope = tl.load(slopes_ptr + column, mask=inside, other=0.0)
    slope_not = tl.load(slopes_ptr + num_labels + column, mask=inside, other=0.0)
    return grad * slope, grad * slope_not


@triton.jit
def store_gradient(out_ptr, row, column, samples, num_labels, value):
    inside = (row[:, None] < samples) & (column[None, :] < num_labels)
    tl.store(out_ptr + row[:, None] * num_labels + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def balance_loss_backward_kernel(
    propensity_grad_ptr, discrimination_grad_ptr, slopes_ptr, labels_ptr, out_ptr,
    samples, num_labels, label_row_stride, label_column_stride, ignore_index,
    EACH: tl.constexpr, PROPENSITY: tl.constexpr, DISCRIMINATION: tl.constexpr,
    TURNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of TURNS tiles of logits, one below the other, of the losses that have one."""
    across = tl.cdiv(num_labels, COLUMNS)
    start = tl.program_id(0) // across * (TURNS * ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    slope = tl.zeros([COLUMNS], tl.float64)
    slope_not = tl.zeros([COLUMNS], tl.float64)
    if PROPENSITY:
        own, own_not = scaled(propensity_grad_ptr, slopes_ptr, column, num_labels)
        slope += own
        slope_not += own_not
    if DISCRIMINATION:
        own, own_not = scaled(discrimination_grad_ptr, slopes_ptr + 2 * num_labels, column, num_labels)
        slope += own
        slope_not += own_not
    if out_ptr.dtype.element_ty != tl.float64:
        # On the way to a half: no instruction takes fp64 to bf16.
        slope, slope_not = slope.to(tl.float32), slope_not.to(tl.float32)
    for first in range(start, tl.minimum(start + TURNS * ROWS, samples), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        has, has_not, wrong = entries(
            labels_ptr, row, column, samples, num_labels, ignore_index, label_row_stride, label_column_stride,
            EACH,
        )  # fmt: skip
        value = tl.where(has, slope[None, :], tl.where(has_not, slope_not[None, :], 0.0))
        value = tl.where(wrong, float("nan"), value).to(out_ptr.dtype.element_ty)
        store_gradient(out_ptr, row, column, samples, num_labels, value)


def balance_loss(
    logits: Tensor, labels: Tensor, known: Tensor | None, present_only: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Propensity, discrimination, means (2, C) and slopes (2, 2, C) of logits (B, C).

    Means are NaN where neither the batch nor ``known`` has one. ``slopes[k, s, c]`` is the derivative of loss
    k by the logit of c in a sample that has label c (s = 0) or has not (s = 1). A label out of range makes
    NaN of all that it takes part in.
    """
    samples, number = logits.shape
    if number > MOST_LABELS:
        raise ValueError(f"expected at most {MOST_LABELS} labels, got {number}")
    tile = _tile(number)
    whole = number <= tile["COLUMNS"]
    means = torch.empty(2, number, dtype=torch.float64, device=logits.device)
    slopes = means.new_empty(2, 2, number)
    # A batch in one tile needs no counts from one launch to the next.
    counts = means if whole else torch.empty(2, number, dtype=torch.int32, device=logits.device)
    losses = [torch.empty((), dtype=_total(logits.dtype), device=logits.device) for _ in range(2)]
    with on_device(logits):
        balance_loss_kernel[(triton.cdiv(number, tile["COLUMNS"]),)](
            logits, _bytes(labels), means if known is None else known.contiguous(), means, counts, slopes,
            *losses, samples, number, *logits.stride(), *_strides(labels), ignore_index, int(present_only),
            EACH=labels.dim() == 2, KNOWN=known is not None, WHOLE=whole, **tile, **launch_options(THREADS),
        )  # fmt: skip
        if not whole:
            norms_kernel[(1,)](
                means, counts, slopes, *losses, number, int(present_only),
                COLUMNS=COLUMNS, **launch_options(THREADS),
            )  # fmt: skip
    return losses[0], losses[1], means, slopes


def balance_loss_backward(
    propensity_grad: Tensor | None,
    discrimination_grad: Tensor | None,
    slopes: Tensor,
    labels: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient (B, C) in ``dtype``: each logit's slopes times the gradients of the losses."""
    samples, number = labels.shape[0], slopes.shape[2]
    out = torch.empty(samples, number, dtype=dtype, device=slopes.device)
    if samples:
        tile = _tile(number)
        # In place of a gradient that there is none of goes a pointer that is not read.
        grads = [slopes if grad is None else grad for grad in (propensity_grad, discrimination_grad)]
        programs = triton.cdiv(samples, TURNS * tile["ROWS"]) * triton.cdiv(number, tile["COLUMNS"])
        with on_device(slopes):
            balance_loss_backward_kernel[(programs,)](
                *grads, slopes.contiguous(), _bytes(labels), out, samples, number, *_strides(labels),
                ignore_index, EACH=labels.dim() == 2, PROPENSITY=propensity_grad is not None,
                DISCRIMINATION=discrimination_grad is not None, TURNS=TURNS, **tile,
                **launch_options(THREADS),
            )  # fmt: skip
    return out


def _tile(number: int) -> dict[str, int]:
    """The narrowest tile that holds all labels, or the widest."""
    columns = next((columns for columns in TILES if columns >= number), COLUMNS)
    return {"ROWS": TILES[columns], "COLUMNS": columns}


def _bytes(labels: Tensor) -> Tensor:
    """Labels as integers: those of bool are read as the bytes that they are."""
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def _strides(labels: Tensor) -> tuple[int, int]:
    """From sample to sample and from label to label; labels of (B,) have nothing in this direction."""
    return (labels.stride(0), labels.stride(1) if labels.dim() == 2 else 0)


def _total(dtype: torch.dtype) -> torch.dtype:
    """What losses are rounded to."""
    return torch.float64 if dtype == torch.float64 else torch.float32


LABEL_TYPES = ("i64", "u8", "i32", "i16", "i8")
A_LABEL = "a label a sample, or a byte an entry"
# Device functions whose accesses are narrow by their nature, and those of logits and gradients.
NARROW = {
    "balance_loss_kernel": ({"entries": A_LABEL}, "logits_of"),
    "balance_loss_backward_kernel": ({"entries": A_LABEL}, "store_gradient"),
}


def _case(
    kernel: Any, name: str, dtype: torch.dtype, constants: dict[str, Any], aligned: bool, **types: str
) -> CompileCase:
    """``types`` are those of pointers that are not of fp64; ``aligned`` rows consist of 128-bit loads."""
    pointers = {n: f"*{types.get(n, 'fp64')}" for n in kernel.arg_names if n.endswith("_ptr")}
    numbers = [n for n in kernel.arg_names if n.islower() and n not in pointers and n not in constants]
    whole = (*pointers, *(n for n in ("num_labels", "logit_row_stride") if n in numbers))
    narrow, rows = NARROW[kernel.__name__]
    share = constants["ROWS"] * constants["COLUMNS"] // THREADS * dtype.itemsize
    if not aligned:
        narrow = narrow | {rows: ANYWHERE}
    elif share < ALIGNMENT:
        narrow = narrow | {rows: "a thread's share of a small tile is less than 128 bits"}
    return CompileCase(
        name=name.replace("torch.", ""),
        kernel=kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constexprs=constants,
        divisible_by_16=whole if aligned else (),
        threads=THREADS,
        narrow_accesses=narrow,
    )


def _forward_cases() -> Iterator[CompileCase]:
    tiles = [(columns, True) for columns in TILES] + [(COLUMNS, False)]
    choices = every_pair(
        dtype=list(DEVICE_DTYPES), tile=tiles, each=(True, False), known=(False, True), aligned=(True, False)
    )
    for index, choice in enumerate(choices):
        dtype, (columns, whole), each = choice["dtype"], choice["tile"], choice["each"]
        label = LABEL_TYPES[index % len(LABEL_TYPES)]
        constants = {"EACH": each, "KNOWN": choice["known"], "WHOLE": whole, "ROWS": TILES[columns]}
        constants |= {"COLUMNS": columns, "logit_column_stride": 1}
        words = (
            f"{columns} labels{'' if whole else ' at a time'}, {label} {'an entry' if each else 'a sample'}"
        )
        yield _case(
            balance_loss_kernel, f"{dtype}, {words}{', known' if choice['known'] else ''}", dtype, constants,
            choice["aligned"], logits_ptr=str(DEVICE_DTYPES[dtype]), labels_ptr=label, counts_ptr="i32",
            propensity_ptr=str(DEVICE_DTYPES[_total(dtype)]),
            discrimination_ptr=str(DEVICE_DTYPES[_total(dtype)]),
        )  # fmt: skip


def _backward_cases() -> Iterator[CompileCase]:
    losses = {"propensity": (True, False), "discrimination": (False, True), "both": (True, True)}
    choices = every_pair(
        dtype=list(DEVICE_DTYPES), columns=list(TILES), each=(True, False), loss=list(losses),
        aligned=(True, False),
    )  # fmt: skip
    for index, choice in enumerate(choices):
        dtype, columns, each = choice["dtype"], choice["columns"], choice["each"]
        label = LABEL_TYPES[index % len(LABEL_TYPES)]
        total = str(DEVICE_DTYPES[_total(dtype)])
        constants: dict[str, Any] = dict(
            zip(("PROPENSITY", "DISCRIMINATION"), losses[choice["loss"]], strict=True)
        )
        constants |= {"EACH": each, "TURNS": TURNS, "ROWS": TILES[columns], "COLUMNS": columns}
        yield _case(
            balance_loss_backward_kernel,
            f"gradient of {choice['loss']}, {dtype}, {columns} labels, "
            f"{label} {'an entry' if each else 'a sample'}",
            dtype, constants, choice["aligned"], propensity_grad_ptr=total, discrimination_grad_ptr=total,
            labels_ptr=label, out_ptr=str(DEVICE_DTYPES[dtype]),
        )  # fmt: skip


COMPILE_CASES = (*_forward_cases(), *_backward_cases(), *NORMS_CASES)
