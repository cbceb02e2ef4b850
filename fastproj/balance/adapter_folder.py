"""What PEFT wrote of a balance adapter, read before a model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastproj.latent.adapter_file import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_folder,
    read_config,
    read_weights,
)

SHIFT = "input_shift"
VECTOR = f"{SHIFT}.vector"


@dataclass(frozen=True)
class SavedAdapter:
    """A balance adapter in a folder.

    Attributes:
        folder: where its two files are.
        block: the name of its block in a model without an adapter.
        writers: the names of its writers.
        rank: None where the writers are trained in full.
        shift: whether it has a vector.
        shapes: of the tensors in its file, by their names in a model without an adapter.
    """

    folder: Path
    block: str
    writers: tuple[str, ...]
    rank: int | None
    shift: bool
    shapes: dict[str, tuple[int, ...]]

    def check_shapes(self, model: nn.Module) -> None:
        """Raise ValueError where the tensors in the file are not those that the model takes."""
        expected = self._expected_shapes(model)
        for name in sorted(expected.keys() | self.shapes.keys()):
            if expected.get(name) != self.shapes.get(name):
                raise ValueError(
                    f"{self.folder / WEIGHTS}: expected {name!r} of shape {expected.get(name, 'none')}, got "
                    f"{self.shapes.get(name, 'none')}"
                )

    def _expected_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        config: Any = model.config
        if self.shift:
            found[f"{self.block}.{VECTOR}.weight"] = (config.hidden_size, 1)
        for name in self.writers:
            writer = model.get_submodule(name)
            if self.rank is None:
                found |= {f"{name}.{key}": tuple(value.shape) for key, value in writer.state_dict().items()}
            else:
                d_in, d_out = widths(writer)
                found[f"{name}.lora_A.weight"] = (self.rank, d_in)
                found[f"{name}.lora_B.weight"] = (d_out, self.rank)
        return found


def widths(layer: nn.Module) -> tuple[int, int]:
    """What a linear layer takes and gives; transformers' Conv1D is one by another name."""
    linear: Any = layer
    return (linear.nx, linear.nf) if hasattr(linear, "nx") else (linear.in_features, linear.out_features)


def read_folder(folder: Path, block_names: Sequence[str], writers: Sequence[str]) -> SavedAdapter:
    """The adapter in a folder, for a model with blocks of these names.

    Raises FileNotFoundError and ValueError as :func:`fastproj.load_balance_adapter`.
    """
    from peft.utils.constants import DUMMY_TARGET_MODULES

    chosen = adapter_folder(folder, None)
    config = read_config(chosen)
    saved = _names(config, "modules_to_save", chosen)
    in_full = config.get("target_modules") == DUMMY_TARGET_MODULES
    targets = [] if in_full else _names(config, "target_modules", chosen)
    shifted = [name.removesuffix(f".{VECTOR}") for name in saved if name.endswith(f".{VECTOR}")]
    wrote = [name for name in saved if not name.endswith(f".{VECTOR}")] if in_full else targets
    for block in block_names:
        own = tuple(f"{block}.{writer}" for writer in writers)
        whole = shifted in ([], [block]) and set(wrote) == set(own)
        if whole and len(saved) == len(shifted) + (len(own) if in_full else 0):
            rank = None if in_full else config.get("r")
            tensors = read_weights(chosen)
            shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in tensors.items()}
            return SavedAdapter(chosen, block, own, rank, bool(shifted), shapes)
    raise ValueError(
        f"{chosen / CONFIG}: expected the writers of one block of {block_names[0]!r} to {block_names[-1]!r} "
        f"and its {VECTOR!r}, got {', '.join(sorted({*saved, *targets})) or 'no module'}"
    )


def _names(config: dict[str, Any], key: str, folder: Path) -> list[str]:
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / CONFIG}: expected names of modules in {key!r}, got {names!r}")
    return names
