"""Traffic of the balance loss: one launch for the losses and one for the gradient, which reads no logits.

More labels than a tile takes are read by a program a tile, and one more launch goes over their means.
"""

from __future__ import annotations

import torch
import triton

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.workloads import Workload
from fastproj.kernels._balance_loss_norms import COLUMNS
from fastproj.kernels.balance_loss import TILES, TURNS

LABELS = 28  # of GoEmotions
LABEL = 8  # bytes of one
WIDE = 8  # bytes of a mean and of a slope
COUNT = 4  # bytes of a number of samples
PASSES = 3  # over means and counts: their centres, their norms, their slopes
# A logit on its side of one label: a comparison and a sum.
FLOPS = 2


def balance_loss_moves(
    samples: int, labels: int, dtype: torch.dtype, *, label_bytes: int = LABEL, each: bool, known: bool
) -> Moves:
    """What ``kernels.balance_loss`` moves for logits (samples, labels), a label a sample or ``each``."""
    columns = next((columns for columns in TILES if columns >= labels), COLUMNS)
    tiles, whole = triton.cdiv(labels, columns), labels <= columns
    loss, norms, gradient = "balance_loss_kernel", "norms_kernel", "balance_loss_backward_kernel"
    logits, row = samples * labels * dtype.itemsize, labels * WIDE
    said = samples * (labels if each else 1) * label_bytes
    read = said if each else said * tiles
    losses = 2 * total_bytes(dtype)
    programs = triton.cdiv(samples, TURNS * TILES[columns])
    last = loss if whole else norms
    streams = [
        Stream(loss, "logits", "load", logits, logits),
        Stream(loss, "labels", "load", read, said, said),
        Stream(loss, "known", "load", 2 * row * known, 2 * row * known),
        Stream(loss, "means", "store", 2 * row, 2 * row),
        Stream(last, "losses", "store", losses, losses),
        Stream(last, "slopes", "store", 4 * row, 4 * row),
    ]
    if not whole:
        counts = 2 * labels * COUNT
        streams += [
            Stream(loss, "counts", "store", counts, counts),
            Stream(norms, "means", "load", PASSES * 2 * row, 2 * row, 2 * row + counts, warm=True),
            Stream(norms, "counts", "load", PASSES * counts, counts, 2 * row + counts, warm=True),
        ]
    if samples:
        streams += [
            Stream(gradient, "labels", "load", read, said, said, warm=True),
            Stream(gradient, "slopes", "load", programs * 4 * row, 4 * row, 4 * row, warm=True),
            Stream(gradient, "grads", "load", programs * tiles * losses, losses, losses),
            Stream(gradient, "out", "store", logits, logits),
        ]
    return Moves({loss: 1, norms: int(not whole), gradient: int(samples > 0)}, tuple(streams))


def total_bytes(dtype: torch.dtype) -> int:
    """Bytes of a loss: of fp64 where the logits are fp64, else of fp32."""
    return 8 if dtype == torch.float64 else 4


def balance_loss_call(samples: int, labels: int, dtype: str, workload: str) -> Traffic:
    """The losses of ``samples`` with a label each, and the gradient of their logits."""
    logits, losses = samples * labels * DTYPES[dtype].itemsize, 2 * total_bytes(DTYPES[dtype])
    return Traffic(
        operator="balance_loss",
        workload=workload,
        moves=balance_loss_moves(samples, labels, DTYPES[dtype], each=False, known=False),
        least_read_bytes=logits + samples * LABEL + losses,
        least_written_bytes=logits + losses,
        flops=FLOPS * samples * labels,
        rate="fp64",
    )


def balance_loss(workload: Workload) -> Traffic:
    """One batch of the workload's samples, each with one of 28 labels."""
    return balance_loss_call(workload.samples, LABELS, workload.activation_dtype, workload.name)
