"""Traffic of cross entropy over a vocabulary: one launch for the losses, one for the gradient.

Rows whose label is ignored are not read, but their gradient is written. The loss reads the label's own logit
again, from a cache that has just seen the row.
"""

from __future__ import annotations

import torch

from fastproj.bench.traffic.moves import DTYPES, Moves, Stream, Traffic
from fastproj.bench.traffic.workloads import Workload

LABEL = 8  # bytes
VOCABULARIES = {"Qwen2.5-1.5B": 151_936, "Llama-3.1-8B": 128_256, "Llama-3.1-70B": 128_256}
# A logit: its difference to a maximum, an exponential and a sum; again, less the log-sum, and times g.
FLOPS = 3 + 4


def cross_entropy_moves(rows: int, counted: int, classes: int, dtype: torch.dtype) -> Moves:
    """What ``kernels.cross_entropy`` moves for ``rows`` tokens, of which ``counted`` are not ignored."""
    if not rows:
        return Moves({}, ())
    loss, gradient = "cross_entropy_kernel", "cross_entropy_backward_kernel"
    logits, row = counted * classes * dtype.itemsize, classes * dtype.itemsize
    labels, numbers = rows * LABEL, rows * total_bytes(dtype)
    own = counted * dtype.itemsize
    return Moves(
        {loss: 1, gradient: 1},
        (
            Stream(loss, "logits", "load", logits, logits),
            Stream(loss, "own logits", "load", own, own, row, warm=True),
            Stream(loss, "labels", "load", labels, labels),
            Stream(loss, "losses and statistics", "store", 4 * numbers, 4 * numbers),
            Stream(gradient, "logits", "load", logits, logits, logits, warm=True),
            Stream(gradient, "labels", "load", labels, labels, labels, warm=True),
            Stream(gradient, "statistics", "load", 2 * numbers, 2 * numbers, 2 * numbers, warm=True),
            Stream(gradient, "grad", "load", numbers, numbers),
            Stream(gradient, "out", "store", rows * row, rows * row),
        ),
    )


def total_bytes(dtype: torch.dtype) -> int:
    """Bytes of a loss: of fp64 where the logits are fp64, else of fp32."""
    return 8 if dtype == torch.float64 else 4


def cross_entropy_call(rows: int, classes: int, dtype: str, workload: str) -> Traffic:
    """The losses of ``rows`` tokens that all count, and the gradient of their logits."""
    logits, numbers = rows * classes * DTYPES[dtype].itemsize, rows * total_bytes(DTYPES[dtype])
    return Traffic(
        operator="cross_entropy",
        workload=workload,
        moves=cross_entropy_moves(rows, rows, classes, DTYPES[dtype]),
        least_read_bytes=logits + rows * LABEL + numbers,
        least_written_bytes=logits + numbers,
        flops=FLOPS * rows * classes,
        rate="fp64" if dtype == "fp64" else "fp32",
    )


def vocabulary(workload: Workload) -> int:
    """V of the workload's model. Raises ValueError where it is not known."""
    if workload.model.name not in VOCABULARIES:
        raise ValueError(f"expected a model among {', '.join(VOCABULARIES)}, got {workload.model.name}")
    return VOCABULARIES[workload.model.name]


def cross_entropy(workload: Workload) -> Traffic:
    """The whole batch of the workload, every token counting."""
    rows = workload.samples * workload.tokens
    return cross_entropy_call(rows, vocabulary(workload), workload.activation_dtype, workload.name)
