"""Latent factors in one safetensors file: tensors by name, the rest as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastproj.files import write_atomically
from fastproj.reference.basis import Basis

if TYPE_CHECKING:
    from fastproj.latent.factors import LatentFactors

VERSION = 1
_HEADER = "fastproj.latent"
# Names of the tables that have tensors by key of the bases, and their axes after the rank.
_TABLES = ("shares", "agreement", "p_values", "null_shares")
# Columns that went through fp32 are orthonormal to a few of its roundings, 6e-8 each, and 1e-6 in all.
_ORTHONORMAL = 1e-5
_ROUNDING = 1e-9


def write(factors: LatentFactors, path: Path) -> None:
    """Write factors to ``path``, whole or not at all. ValueError for what :func:`read` would refuse."""
    from safetensors.torch import save

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
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(own, metadata={_HEADER: json.dumps(header)}))


def read(path: Path) -> LatentFactors:
    """Factors from ``path``. Raises FileNotFoundError and ValueError as ``LatentFactors.load``."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of latent factors at {path}, there is none")
    header, tensors = _contents(path)
    try:
        return _checked(header, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _contents(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        return json.loads(metadata.get(_HEADER, "null")), tensors
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is no JSON: {error}") from error


def _checked(header: Any, tensors: dict[str, Tensor]) -> LatentFactors:
    from fastproj.latent.factors import LatentFactors

    if not isinstance(header, dict):
        raise ValueError(f"expected a file of latent factors, its header has no {_HEADER!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION}, got {header.get('version')!r}")
    modules, keys, names = (_names(header, field) for field in ("modules", "bases", "spectra"))
    fields: dict[str, Any] = {"side": header.get("side"), "pool": header.get("pool")}
    fields |= {table: {key: _taken(tensors, f"{table}/{key}") for key in keys} for table in _TABLES}
    factors = LatentFactors(
        bases={key: _basis(_taken(tensors, f"basis/{key}"), key) for key in keys},
        spectra={name: _taken(tensors, f"spectra/{name}") for name in names},
        modules=modules,
        **fields,
    )
    if tensors:
        raise ValueError(f"expected no tensor {next(iter(tensors))!r}")
    _check_tables(factors)
    return factors


def _names(header: dict[str, Any], field: str) -> tuple[str, ...]:
    names = header.get(field)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names as {field!r}, got {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"expected different names as {field!r}")
    return tuple(names)


def _taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"expected a tensor {name!r}, there is none")
    return tensors.pop(name)


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
