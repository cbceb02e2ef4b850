"""EDGE (Li et al., CCL 2025, eq. 5-12), step by step in fp64, and the coefficients that equal it.

``edge`` follows the paper's bisector form and is the oracle. ``edge_coefficients`` is the closed form that
every fast path evaluates; the tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.reference.segments import Segmentation, row_shape, segment_views

VARIANTS = ("paper", "released", "naive", "subtract")


def edge(
    erm: Sequence[Tensor],
    gce: Sequence[Tensor],
    segmentation: Segmentation,
    *,
    alpha: float = 1.0,
    variant: str = "paper",
) -> list[Tensor]:
    """``e − α·bias`` with the bias of ``variant``, as fp64 tensors.

    paper:    ``b = e/|e| + g/|g|``, ``bias = g − (⟨g,b⟩/⟨b,b⟩) b``; 0 where e, g or b is 0
    naive:    ``bias = (⟨e,g⟩/⟨g,g⟩) g``; 0 where g is 0
    subtract: ``bias = g``
    released: per tensor ``c = e/‖e‖ + g/‖g‖`` (a term is 0 where its norm is), and each row i loses
              ``bias_i = g_i − (g_i·c_i) c_i``; the segmentation is not consulted
    """
    erm = [shard.to(torch.float64) for shard in erm]
    gce = [shard.to(torch.float64) for shard in gce]
    if variant == "released":
        return [e - alpha * _released_bias(e, g) for e, g in zip(erm, gce, strict=True)]
    if variant == "subtract":
        return [e - alpha * g for e, g in zip(erm, gce, strict=True)]
    bias_of = {"paper": _bisector_bias, "naive": _naive_bias}[variant]
    out = [shard.clone() for shard in erm]
    for members in _members(erm, gce, segmentation).values():
        bias = bias_of(torch.cat([e for e, _, _ in members]), torch.cat([g for _, g, _ in members]))
        offset = 0
        for e, _, (shard, row) in members:
            target = out[shard] if row is None else out[shard].reshape(row_shape(out[shard]))[row]
            target.copy_((e - alpha * bias[offset : offset + e.numel()]).reshape(target.shape))
            offset += e.numel()
    return out


def _members(
    erm: Sequence[Tensor], gce: Sequence[Tensor], segmentation: Segmentation
) -> dict[int, list[tuple[Tensor, Tensor, tuple[int, int | None]]]]:
    """The pieces (e, g, where they lie) of each segment."""
    members: dict[int, list[tuple[Tensor, Tensor, tuple[int, int | None]]]] = {}
    for shard, (e, g, first) in enumerate(zip(erm, gce, segmentation.first, strict=True)):
        pairs = zip(
            segment_views(e, first, segmentation.rows),
            segment_views(g, first, segmentation.rows),
            strict=True,
        )
        for row, ((segment, piece_e), (_, piece_g)) in enumerate(pairs):
            where = (shard, row if segmentation.rows else None)
            members.setdefault(segment, []).append((piece_e, piece_g, where))
    return members


def _bisector_bias(e: Tensor, g: Tensor) -> Tensor:
    e_norm, g_norm = torch.linalg.vector_norm(e), torch.linalg.vector_norm(g)
    if e_norm == 0 or g_norm == 0:
        return torch.zeros_like(g)
    bisector = e / e_norm + g / g_norm
    square = torch.dot(bisector, bisector)
    # ĝ = −ê makes the bisector 0/0; the limit of the closed form is the whole of g.
    return g.clone() if square == 0 else g - torch.dot(g, bisector) / square * bisector


def _naive_bias(e: Tensor, g: Tensor) -> Tensor:
    square = torch.dot(g, g)
    return torch.zeros_like(g) if square == 0 else torch.dot(e, g) / square * g


def _released_bias(e: Tensor, g: Tensor) -> Tensor:
    e_rows, g_rows = e.reshape(row_shape(e)), g.reshape(row_shape(g))
    e_norm, g_norm = torch.linalg.vector_norm(e), torch.linalg.vector_norm(g)
    c = e_rows * (0.0 if e_norm == 0 else 1 / e_norm) + g_rows * (0.0 if g_norm == 0 else 1 / g_norm)
    return (g_rows - (g_rows * c).sum(1, keepdim=True) * c).reshape(e.shape)


def edge_coefficients(
    gram: Tensor,
    *,
    alpha: float,
    variant: str,
    on_nonfinite: str = "propagate",
    tensor_of_segment: Tensor | None = None,
    tensors: int = 0,
) -> Tensor:
    """Coefficients (c_e, c_g) with ``out = c_e e + c_g g``, from the Gram of (e, g).

    paper:    ``c_e = 1 + α|g| / (2|e|)``, ``c_g = −α/2``; (1, 0) where |e| = 0 or |g| = 0
    naive:    ``c_e = 1``, ``c_g = −α⟨e,g⟩/⟨g,g⟩``; (1, 0) where |g| = 0
    subtract: ``(1, −α)``
    released: with t_i = ⟨e_i,g_i⟩/‖e‖ + ⟨g_i,g_i⟩/‖g‖ per row and norms per tensor,
              ``c_e = 1 + α t_i/‖e‖``, ``c_g = −α + α t_i/‖g‖``

    gram is (S, 2, 2); the result is (S, 2) in its dtype. ``released`` also needs ``tensor_of_segment``
    (S,), the tensor each row lies in, and the number of ``tensors``. A segment whose Gram is not finite
    gets NaN, or (1, 0) where ``on_nonfinite="skip"``. Differentiable in gram.
    """
    ee, eg, gg = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    one, zero = torch.ones_like(ee), torch.zeros_like(ee)
    if variant == "paper":
        usable = (ee > 0) & (gg > 0)
        ratio = torch.sqrt(torch.where(usable, gg, one)) / torch.sqrt(torch.where(usable, ee, one))
        c_e = torch.where(usable, 1 + (alpha / 2) * ratio, one)
        c_g = torch.where(usable, -alpha / 2 * one, zero)
    elif variant == "naive":
        usable = gg > 0
        c_e, c_g = one, torch.where(usable, -alpha * eg / torch.where(usable, gg, one), zero)
    elif variant == "subtract":
        c_e, c_g = one, -alpha * one
    elif variant == "released" and tensor_of_segment is not None:
        inverse_e = _inverse_norm(ee, tensor_of_segment, tensors)
        inverse_g = _inverse_norm(gg, tensor_of_segment, tensors)
        t = eg * inverse_e + gg * inverse_g
        c_e, c_g = 1 + alpha * t * inverse_e, -alpha + alpha * t * inverse_g
    else:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    finite = torch.isfinite(gram).all(-1).all(-1)
    if variant == "released" and tensor_of_segment is not None:
        finite = _all_rows(finite, tensor_of_segment, tensors)
    fallback = (one, zero) if on_nonfinite == "skip" else (one * torch.nan, one * torch.nan)
    return torch.stack([torch.where(finite, c_e, fallback[0]), torch.where(finite, c_g, fallback[1])], dim=1)


def _inverse_norm(row_squares: Tensor, tensor_of_segment: Tensor, tensors: int) -> Tensor:
    """1/‖·‖ of the tensor that each row lies in, 0 where the norm is 0."""
    squares = row_squares.new_zeros(tensors).index_add(0, tensor_of_segment, row_squares)[tensor_of_segment]
    usable = squares > 0
    return torch.where(usable, torch.rsqrt(torch.where(usable, squares, torch.ones_like(squares))), 0.0)


def _all_rows(finite: Tensor, tensor_of_segment: Tensor, tensors: int) -> Tensor:
    """Whether every row of the tensor that a row lies in is finite: they share its norm."""
    bad = torch.zeros(tensors, dtype=torch.int64, device=finite.device)
    return (bad.index_add(0, tensor_of_segment, (~finite).long()) == 0)[tensor_of_segment]
