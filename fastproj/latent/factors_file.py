"""Latent factors in one safetensors file: tensors by name, the rest as JSON in its header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastproj.reference.basis import Basis
from fastproj.tensor_file import check_header, check_none_left, read_tensors, taken, write_tensors

if TYPE_CHECKING:
    from fastproj.latent.factors import LatentFactors

VERSION = 1
_HEADER = "fastproj.latent"
_WHAT = "latent factors"
# Names of the tables that have tensors by key of the bases, and their axes after the rank.
_TABLES = ("shares", "agreement", "p_values", "null_shares")
# Columns that went through fp32 are orthonormal to a few of its roundings, 6e-8 each, and 1e-6 in all.
_ORTHONORMAL = 1e-5
_ROUNDING = 1e-9


def write(factors: LatentFactors, path: Path) -> None:
    """Write factors to ``path``, whole or not at all. ValueError for what :func:`read` would refuse."""
    _check_tables(factors)
    tensors = {f"basis/{key}": basis.matrix for key, basis in factors.bases.items()}
    tensors |= {f"spectra/{name}": values for name, values in factors.spectra.items()}
    for table in _TABLES:
        tensors |= {f"{table}/{key}": value for key, value in getattr(factors, table).items()}
    header = {
        "version": VERSION,
        "side": factors.side,
        "pool": factors.pool,
        "modules": list(factors.modules),
        "bases": list(factors.bases),
        "spectra": list(factors.spectra),
    }
    write_tensors(path, _HEADER, header, tensors)


def read(path: Path) -> LatentFactors:
    """Factors from ``path``. Raises FileNotFoundError and ValueError as ``LatentFactors.load``."""
    header, tensors = read_tensors(path, _HEADER, _WHAT)
    try:
        return _checked(header, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(found: Any, tensors: dict[str, Tensor]) -> LatentFactors:
    from fastproj.latent.factors import LatentFactors

    header = check_header(found, _HEADER, VERSION, _WHAT)
    modules, keys, names = (_names(header, field) for field in ("modules", "bases", "spectra"))
    fields: dict[str, Any] = {"side": header.get("side"), "pool": header.get("pool")}
    fields |= {table: {key: taken(tensors, f"{table}/{key}") for key in keys} for table in _TABLES}
    factors = LatentFactors(
        bases={key: _basis(taken(tensors, f"basis/{key}"), key) for key in keys},
        spectra={name: taken(tensors, f"spectra/{name}") for name in names},
        modules=modules,
        **fields,
    )
    check_none_left(tensors)
    _check_tables(factors)
    return factors


def _names(header: dict[str, Any], field: str) -> tuple[str, ...]:
    names = header.get(field)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names as {field!r}, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"expected different names as {field!r}")
    return tuple(names)


def _basis(matrix: Tensor, key: str) -> Basis:
    basis = Basis(matrix)
    wide = basis.matrix.double()
    off = wide.mT @ wide - torch.eye(basis.rank, dtype=torch.float64)
    # Asked so that NaN is refused too.
    if basis.rank and not bool(off.abs().max() <= _ORTHONORMAL):
        raise ValueError(f"expected orthonormal directions in the basis of {key!r}")
    return basis


def _check_tables(factors: LatentFactors) -> None:
    """Shapes, dtypes and ranges of all that is no basis."""
    for name, values in factors.spectra.items():
        _check_tensor(f"spectra/{name}", values, (values.numel(),))
        if not bool(torch.isfinite(values).all() and (values >= 0).all() and (values.diff() <= 0).all()):
            raise ValueError(f"expected singular values of {name!r}, finite and descending")
    strangers = set(factors.modules) - set(factors.spectra)
    if factors.pool == "module":
        strangers |= set(factors.bases) - set(factors.spectra)
    if strangers:
        raise ValueError(f"expected singular values of every module, there are none of {min(strangers)!r}")
    shapes = {"shares": (), "agreement": (len(factors.modules),), "p_values": (), "null_shares": (3,)}
    for table, inner in shapes.items():
        if set(getattr(factors, table)) != set(factors.bases):
            raise ValueError(f"expected {table} of every basis, got those of {list(getattr(factors, table))}")
        for key, values in getattr(factors, table).items():
            _check_tensor(f"{table}/{key}", values, (factors.rank, *inner))
            unknown = values.isnan() if table != "shares" else torch.zeros_like(values, dtype=torch.bool)
            inside = (values >= 0) & (values <= 1 + _ROUNDING)
            if not bool((inside | unknown).all()):
                raise ValueError(f"expected numbers from 0 to 1 in '{table}/{key}'")


def _check_tensor(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.dtype != torch.float64 or tuple(values.shape) != shape:
        raise ValueError(
            f"expected fp64 of shape {shape} as {name!r}, got {values.dtype} of {tuple(values.shape)}"
        )
