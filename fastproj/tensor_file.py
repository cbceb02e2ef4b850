"""Tensors by name in one safetensors file, with the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastproj.files import write_atomically


def write_tensors(path: Path, key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, and the header under ``key``, whole or not at all. OSError where that fails."""
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(own, metadata={key: json.dumps(header)}))


def read_tensors(path: Path, key: str, what: str) -> tuple[Any, dict[str, Tensor]]:
    """Header and tensors, onto the CPU; the header is None where there is none under ``key``.

    Raises FileNotFoundError where there is no file, ValueError, with the path, for one that is damaged;
    ``what`` says what it was expected to be a file of.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"expected a file of {what} at {path}, there is none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        return json.loads(metadata.get(key, "null")), tensors
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is no JSON: {error}") from error


def check_header(header: Any, key: str, version: int, what: str) -> dict[str, Any]:
    """The header, once it is one of this version. ValueError otherwise."""
    if not isinstance(header, dict):
        raise ValueError(f"expected a file of {what}, its header has no {key!r}")
    if header.get("version") != version:
        raise ValueError(f"expected version {version}, got {header.get('version')!r}")
    return header


def taken(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, out of the dictionary. ValueError where there is none."""
    if name not in tensors:
        raise ValueError(f"expected a tensor {name!r}, there is none")
    return tensors.pop(name)


def check_none_left(tensors: Mapping[str, Tensor]) -> None:
    """ValueError where a tensor was not taken."""
    if tensors:
        raise ValueError(f"expected no tensor {next(iter(tensors))!r}")
