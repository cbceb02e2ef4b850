"""Adapters as PEFT saves them: a configuration in JSON and factors in safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Options under which a layer's change is no longer s·B·A, or not of a linear layer.
_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "lora_bias", "monteclora_config",
    "target_parameters", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_FACTOR = re.compile(r"^(?P<name>.+)\.lora_(?P<factor>[AB])\.weight$")


def read_adapter(folder: Path, adapter: str | None) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(name, A, B, scale) of each LoRA layer, sorted by name with numbers as numbers.

    Raises FileNotFoundError and ValueError as :func:`fastproj.latent.lora.lora_layers`.
    """
    chosen = adapter_folder(folder, adapter)
    config = read_config(chosen)
    tensors = read_weights(chosen)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.match(key)
        if match is not None:
            factors.setdefault(match["name"].removeprefix(PREFIX), {})[match["factor"]] = tensor
        elif ".lora_" in key:
            raise ValueError(f"{chosen}: expected plain LoRA on linear layers, got {key!r}")
    if not factors:
        raise ValueError(f"{chosen}: expected LoRA weights, there are none")
    for name in sorted(factors, key=_natural):
        pair = factors[name]
        if len(pair) < 2:
            raise ValueError(f"{chosen}: {name!r} has lora_{next(iter(pair))} alone")
        yield name, pair["A"], pair["B"], _scale(config, name, pair["A"], chosen)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by, under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def adapter_folder(folder: Path, adapter: str | None) -> Path:
    """The folder of the adapter asked for, else of the only one. Raises as :func:`read_adapter`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the folder of an adapter at {folder}, there is none")
    found = {"default": folder} if (folder / CONFIG).is_file() else {}
    for inner in sorted(folder.glob(f"*/{CONFIG}")):
        # The Trainer leaves those of earlier steps beside the last one: the folder's own adapter is meant.
        if not (found and _CHECKPOINT.fullmatch(inner.parent.name)):
            found[inner.parent.name] = inner.parent
    if not found:
        raise FileNotFoundError(f"expected {CONFIG} in {folder}, there is none")
    if adapter is not None:
        if adapter not in found:
            raise ValueError(f"{folder}: expected one of its adapters {', '.join(found)}, got {adapter!r}")
        return found[adapter]
    if len(found) > 1:
        raise ValueError(f"{folder} holds several adapters, name one of {', '.join(found)}")
    return next(iter(found.values()))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in an adapter's own folder. ValueError where it is none of plain LoRA."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        came = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected an adapter of type LORA, got {came!r}")
    odd = [option for option in _VARIANTS if config.get(option)]
    if odd or config.get("init_lora_weights") == "mica":
        raise ValueError(f"{path}: expected plain LoRA on linear layers, got {(odd or ['mica'])[0]}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's own folder.

    Raises FileNotFoundError where there are none, ValueError for a pickle and a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise ValueError(
                f"{folder / PICKLED} is a pickle, which can run code when it is read and so is not: save the "
                f"adapter as {WEIGHTS}"
            )
        raise FileNotFoundError(f"expected {WEIGHTS} in {folder}, there is none")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _scale(config: dict[str, Any], name: str, a: Tensor, folder: Path) -> float:
    """``alpha/r``, or ``alpha/√r`` in rsLoRA, with the configuration's patterns, as PEFT matches them."""
    rank = _of_pattern(config, "rank_pattern", "r", name, folder)
    alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", name, folder)
    if a.dim() != 2 or a.shape[0] != rank or rank <= 0:
        raise ValueError(f"{folder}: expected A of rank {rank} in {name!r}, got {tuple(a.shape)}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(config: dict[str, Any], patterns: str, default: str, name: str, folder: Path) -> float:
    """What the first pattern that matches the end of the name gives, else the configuration's own value."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{folder}: {patterns} must be a table, got {type(table).__name__}")
    try:
        keys = [key for key in table if re.match(rf"(.*\.)?({key})$", name)]
    except re.error as error:
        raise ValueError(f"{folder}: {patterns} holds no regular expression: {error}") from error
    value = table[keys[0]] if keys else config.get(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{folder}: {default} must be a number, got {value!r} for {name!r}")
    return value
