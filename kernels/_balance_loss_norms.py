"""From mean logits of labels to losses and slopes: device code, and a kernel for any number of labels."""

# Device code has no types.
# mypy: disallow-untyped-defs=False
# ruff: noqa: PLR0124

from __future__ import annotations

import triton
import triton.language as tl

from fastproj.kernels._cases import CompileCase

THREADS = 128  # of a program
COLUMNS = 1024  # means of a tile
ANYWHERE = "rows of any number of labels begin anywhere"


@triton.jit
def members(means, means_not, count, count_not, present_only):
    """Where there is an H^C, where there is an H^N that counts, and where there are both.

    A mean of none that is a number was known before.
    """
    present = (count > 0) | (means == means)
    absent = (count_not > 0) | (means_not == means_not)
    both = present & absent
    return present, both | (absent & (present_only == 0)), both


@triton.jit
def vectors_of(means, means_not, present, absent, both, centre, centre_not):
    """Both means about their centres and the gap between them, 0 where they do not count."""
    return (
        tl.where(present, means - centre, 0.0),
        tl.where(absent, means_not - centre_not, 0.0),
        tl.where(both, means - means_not, 0.0),
    )


@triton.jit
def slope_of(vector, norm, count, there):
    """The derivative of a norm by one of ``count`` logits whose mean is in its vector; 0 at a norm of 0."""
    unit = tl.where(norm == 0, 0.0, vector / tl.where(norm == 0, 1.0, norm))
    return tl.where(there & (count > 0), unit / tl.maximum(count, 1), 0.0)


@triton.jit
def store_slopes(
    slopes_ptr, column, num_labels, vector, vector_not, gap, norm, norm_not, norm_of_gap, count, count_not,
    present, absent, both,
):  # fmt: skip
    inside = column < num_labels
    row = slopes_ptr + column
    tl.store(row, slope_of(vector, norm, count, present), mask=inside)
    tl.store(row + num_labels, slope_of(vector_not, norm_not, count_not, absent), mask=inside)
    tl.store(row + 2 * num_labels, slope_of(gap, norm_of_gap, count, both), mask=inside)
    tl.store(row + 3 * num_labels, slope_of(-gap, norm_of_gap, count_not, both), mask=inside)


@triton.jit
def store_losses(propensity_ptr, discrimination_ptr, norm, norm_not, norm_of_gap):
    tl.store(propensity_ptr, (norm + norm_not).to(propensity_ptr.dtype.element_ty))
    tl.store(discrimination_ptr, norm_of_gap.to(discrimination_ptr.dtype.element_ty))


@triton.jit
def tile_of_means(means_ptr, counts_ptr, column, num_labels):
    """Means and counts of both sides, as the first launch left them; past the end there are none."""
    inside = column < num_labels
    return (
        tl.load(means_ptr + column, mask=inside, other=float("nan")),
        tl.load(means_ptr + num_labels + column, mask=inside, other=float("nan")),
        tl.load(counts_ptr + column, mask=inside, other=0),
        tl.load(counts_ptr + num_labels + column, mask=inside, other=0),
    )


@triton.jit(do_not_specialize=("present_only",))
def norms_kernel(
    means_ptr, counts_ptr, slopes_ptr, propensity_ptr, discrimination_ptr, num_labels, present_only,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Losses and slopes of any number of labels, tile by tile: their centres, their norms, their slopes."""
    lane = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    total_not = tl.zeros([COLUMNS], tl.float64)
    number = tl.zeros([COLUMNS], tl.int32)
    number_not = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, num_labels, COLUMNS):
        means, means_not, count, count_not = tile_of_means(means_ptr, counts_ptr, first + lane, num_labels)
        present, absent, both = members(means, means_not, count, count_not, present_only)
        total += tl.where(present, means, 0.0)
        total_not += tl.where(absent, means_not, 0.0)
        number += present.to(tl.int32)
        number_not += absent.to(tl.int32)
    centre = tl.sum(total, axis=0) / tl.maximum(tl.sum(number, axis=0), 1)
    centre_not = tl.sum(total_not, axis=0) / tl.maximum(tl.sum(number_not, axis=0), 1)

    square = tl.zeros([COLUMNS], tl.float64)
    square_not = tl.zeros([COLUMNS], tl.float64)
    square_of_gap = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, num_labels, COLUMNS):
        means, means_not, count, count_not = tile_of_means(means_ptr, counts_ptr, first + lane, num_labels)
        present, absent, both = members(means, means_not, count, count_not, present_only)
        vector, vector_not, gap = vectors_of(means, means_not, present, absent, both, centre, centre_not)
        square += vector * vector
        square_not += vector_not * vector_not
        square_of_gap += gap * gap
    norm = tl.sqrt(tl.sum(square, axis=0))
    norm_not = tl.sqrt(tl.sum(square_not, axis=0))
    norm_of_gap = tl.sqrt(tl.sum(square_of_gap, axis=0))
    store_losses(propensity_ptr, discrimination_ptr, norm, norm_not, norm_of_gap)

    for first in range(0, num_labels, COLUMNS):
        means, means_not, count, count_not = tile_of_means(means_ptr, counts_ptr, first + lane, num_labels)
        present, absent, both = members(means, means_not, count, count_not, present_only)
        vector, vector_not, gap = vectors_of(means, means_not, present, absent, both, centre, centre_not)
        store_slopes(
            slopes_ptr, first + lane, num_labels, vector, vector_not, gap, norm, norm_not, norm_of_gap,
            count, count_not, present, absent, both,
        )  # fmt: skip


def _case(total: str) -> CompileCase:
    types = {"counts_ptr": "*i32", "propensity_ptr": f"*{total}", "discrimination_ptr": f"*{total}"}
    pointers = {n: types.get(n, "*fp64") for n in norms_kernel.arg_names if n.endswith("_ptr")}
    return CompileCase(
        name=f"norms, {total}",
        kernel=norms_kernel,
        signature=pointers | {"num_labels": "i32", "present_only": "i32"},
        constexprs={"COLUMNS": COLUMNS},
        divisible_by_16=tuple(pointers),
        threads=THREADS,
        narrow_accesses={"tile_of_means": ANYWHERE, "store_slopes": ANYWHERE},
    )


CASES = tuple(_case(total) for total in ("fp32", "fp64"))
