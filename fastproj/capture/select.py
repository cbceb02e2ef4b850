"""Which parameters are captured, and what stands in the way of one pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CAPTURED_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.LayerNorm)
CONV1D = "Conv1D"
PARAMS = ("lora", "trainable")


@dataclass(frozen=True)
class Obstacle:
    """A module through which one pass cannot see single samples, and why."""

    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.reason})"


def select_parameters(model: nn.Module, params: str) -> dict[str, nn.Parameter]:
    """The trainable parameters under their names: those of LoRA adapters, or all.

    Raises ValueError for an unknown ``params`` and where nothing is selected.
    """
    if params not in PARAMS:
        raise ValueError(f"params must be one of {PARAMS}, got {params!r}")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if params == "trainable":
        selected = trainable
    else:
        selected = {name: p for name, p in trainable.items() if _is_lora(name)}
    if not selected:
        hint = (
            "; params='trainable' takes every trainable parameter" if params == "lora" and trainable else ""
        )
        kind = "trainable LoRA parameter" if params == "lora" else "trainable parameter"
        raise ValueError(f"{type(model).__name__} has no {kind}{hint}")
    return selected


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def find_obstacles(model: nn.Module, selected: dict[str, nn.Parameter]) -> list[Obstacle]:
    """Modules that own selected parameters but are no captured layer."""
    chosen = {id(parameter) for parameter in selected.values()}
    obstacles = []
    for name, module in model.named_modules():
        if any(id(p) in chosen for p in module.parameters(recurse=False)):
            reason = _why_not(module)
            if reason:
                obstacles.append(Obstacle(name, reason))
    return obstacles


def _why_not(module: nn.Module) -> str | None:
    if "Dora" in type(module).__name__:
        return "DoRA normalises over the whole weight"
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if captured_kind(module) is None:
        supported = ", ".join((*(kind.__name__ for kind in CAPTURED_TYPES), CONV1D))
        return f"{type(module).__name__} has trainable parameters; one pass captures {supported}"
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
        return "sparse gradients and max_norm are not captured"
    return None


def captured_kind(module: nn.Module) -> str | None:
    """The name of the captured type that a module is exactly, None for any other.

    transformers, whose Conv1D is one, is not imported for it: where it is not loaded there is none.
    """
    own = type(module)
    captured = own in CAPTURED_TYPES or own is _of_transformers("pytorch_utils", CONV1D)
    return own.__name__ if captured else None


def flattening_modules(model: nn.Module) -> tuple[str, ...]:
    """Modules that call layers with the tokens of all samples as rows, sample after sample: blocks of OPT."""
    block = _of_transformers("models.opt.modeling_opt", "OPTDecoderLayer")
    return tuple(name for name, module in model.named_modules() if type(module) is block)


def _of_transformers(file: str, name: str) -> Any:
    return getattr(sys.modules.get(f"transformers.{file}"), name, None)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that mix samples while they are in training mode."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
