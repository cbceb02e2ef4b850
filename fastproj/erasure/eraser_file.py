"""An eraser in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproj.erasure.eraser import Eraser, ObliqueEraser, OrthogonalEraser
from fastproj.reference.basis import Basis
from fastproj.tensor_file import check_header, check_none_left, read_tensors, taken, write_tensors

VERSION = 1
_HEADER = "fastproj.erasure"
_WHAT = "an eraser"
# Columns that went through fp32 are orthonormal to a few of its roundings, 6e-8 each, and 1e-6 in all.
_ROUNDING = 1e-5


def write(eraser: Eraser, path: Path) -> None:
    """Write an eraser to ``path``, whole or not at all."""
    orthogonal = isinstance(eraser, OrthogonalEraser)
    tensors = {"left": eraser.left} if orthogonal else {"left": eraser.left, "right": eraser.right}
    if eraser.mean is not None:
        tensors["mean"] = eraser.mean
    kind = "orthogonal" if orthogonal else "oblique"
    write_tensors(path, _HEADER, {"version": VERSION, "kind": kind}, tensors)


def read(path: Path) -> Eraser:
    """An eraser from ``path``. Raises FileNotFoundError and ValueError as ``Eraser.load``."""
    header, tensors = read_tensors(path, _HEADER, _WHAT)
    try:
        return _checked(header, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(found: Any, tensors: dict[str, Tensor]) -> Eraser:
    kind = check_header(found, _HEADER, VERSION, _WHAT).get("kind")
    mean = tensors.pop("mean", None)
    left = taken(tensors, "left")
    eraser: Eraser
    if kind == "orthogonal":
        eraser = OrthogonalEraser(Basis(left), mean)
    elif kind == "oblique":
        eraser = ObliqueEraser(left, taken(tensors, "right"), mean)
    else:
        raise ValueError(f"expected an orthogonal or an oblique eraser, got {kind!r}")
    check_none_left(tensors)
    if mean is not None and not bool(torch.isfinite(mean).all()):
        raise ValueError("expected a finite mean, got NaN or Inf")
    _check_projection(eraser)
    return eraser


def _check_projection(eraser: Eraser) -> None:
    """``RᵀL = I`` to the rounding of the products that make it up; NaN is refused too."""
    left, right = eraser.left.double(), eraser.right.double()
    off = (right.mT @ left - torch.eye(eraser.rank, dtype=torch.float64)).abs()
    size = right.abs().mT @ left.abs()
    if eraser.rank and not bool((off <= _ROUNDING * size.clamp_min(1)).all()):
        raise ValueError("expected factors of a projection, RᵀL = I")
