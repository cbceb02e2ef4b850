"""Dot products and norms of per-sample gradients or Adam's updates, pieces of which stay in the cache.

A piece is formed by one batched GEMM into a buffer, turned into the update in place, and reduced against all
references by another; no sample's gradient is written to memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastproj.kernels._adam import Update, update_of

# Two fp32 buffers of this many elements for each thread fill half of a 2 MiB L2.
PIECE = 131_072
# So many samples at least share each read of references and moments, where that leaves GEMMs rows enough.
SHARED, FEWEST_ROWS = 4, 16


def per_sample_influence(
    x: Tensor,
    delta: Tensor,
    references: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    *constants: Any,
) -> Tensor:
    """``⟨u_i, R_m⟩`` and, in the last column, ``‖u_i‖²``: (B, M + 1) in fp32, fp64 where x or delta is.

    x is (B, T, d_in), delta (B, T, d_out), references (M, d_out, d_in); moments are (d_out, d_in) with step,
    β1, β2, ε and variant after them, or None for plain gradients.
    """
    update = update_of(exp_avg, exp_avg_sq, *constants)
    compute = torch.float64 if torch.float64 in (x.dtype, delta.dtype) else torch.float32
    samples, d_out, d_in = x.shape[0], delta.shape[2], x.shape[2]
    out = torch.zeros(samples, references.shape[0] + 1, dtype=compute)
    if not out.numel() or not d_out * d_in:
        return out
    table = references.to(compute).flatten(1)
    moments = _moments(update, compute) if update is not None else None
    room = PIECE * torch.get_num_threads()
    rows = min(d_out, max(FEWEST_ROWS, room // (SHARED * d_in)))
    together = min(samples, max(1, room // (rows * d_in)))
    buffers = torch.empty(2, together * rows * d_in, dtype=compute)
    for some in _ranges(samples, together):
        x_some, delta_some = x[some].to(compute), delta[some].to(compute)
        for few in _ranges(d_out, rows):
            piece = slice(few.start * d_in, few.stop * d_in)
            gradient, spare = _shaped(buffers, x_some.shape[0], few.stop - few.start, d_in)
            _contract(x_some, delta_some[:, :, few], gradient)
            flat, spare = gradient.flatten(1), spare.flatten(1)
            if moments:
                m, v, outside = moments
                _direction(flat, m[piece], v[piece], outside, spare)
            out[some, :-1].addmm_(flat, table[:, piece].T)
            out[some, -1] += torch.mul(flat, flat, out=spare).sum(1)
    if update is not None:
        out[:, :-1] *= update.scale
        out[:, -1] *= update.scale**2
    return out


def _moments(update: Update, compute: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """What is added to every gradient and to its square, flat, and to the root."""
    m = update.exp_avg.to(compute).flatten() * update.moment
    v = update.exp_avg_sq.to(compute).flatten() * update.square
    return m, v.add_(update.inside), update.outside


def _ranges(length: int, step: int) -> Iterator[slice]:
    """Consecutive ranges of at most ``step`` that make up ``length``."""
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def _shaped(buffers: Tensor, samples: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The first and the last buffer's beginning as (samples, rows, columns)."""
    shape, numel = (samples, rows, columns), samples * rows * columns
    return buffers[0, :numel].view(shape), buffers[-1, :numel].view(shape)


def _contract(x: Tensor, delta: Tensor, out: Tensor) -> None:
    """``out_i = Σ_t δ_it x_itᵀ``."""
    if x.shape[1] == 1:
        # A batched GEMM over one token packs operands it uses once; a broadcast product streams them.
        torch.mul(delta.mT, x, out=out)
    else:
        torch.bmm(delta.mT, x, out=out)


def _direction(gradient: Tensor, m: Tensor, v: Tensor, outside: float, denominator: Tensor) -> None:
    """``g ← (m + g) / (√(v + g²) + outside)``, with a buffer for the denominator."""
    torch.addcmul(v, gradient, gradient, out=denominator).sqrt_()
    if outside:
        denominator.add_(outside)
    gradient.add_(m).div_(denominator)
