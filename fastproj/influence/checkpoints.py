"""Saved states of a fine-tune: adapter weights, optimiser state and the learning rate that they stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights and, where Adam's update is wanted, ``optimizer.pt``.

    ``learning_rate`` weighs the checkpoint's influence: ``Σ_t η̄_t cos(…)``.
    """

    folder: Path
    learning_rate: float

    @classmethod
    def read(cls, folder: str | Path, learning_rate: float | None = None) -> Checkpoint:
        """A checkpoint of transformers' Trainer, or any folder of an adapter's or a model's safetensors.

        The learning rate is the mean of those that ``trainer_state.json`` logged in the epoch that ends here,
        unless it is given. Raises FileNotFoundError where there are no weights, ValueError where no learning
        rate is to be found.
        """
        folder = Path(folder)
        if not any((folder / name).is_file() for name in (ADAPTER, WEIGHTS)):
            raise FileNotFoundError(f"expected {ADAPTER} or {WEIGHTS} in {folder}, there is neither")
        rate = _logged_rate(folder) if learning_rate is None else learning_rate
        if rate is None:
            raise ValueError(f"{folder} has no trainer_state.json with learning rates: give learning_rate")
        return cls(folder, rate)

    @property
    def optimizer(self) -> Path | None:
        """The optimiser's state, if it was saved."""
        file = self.folder / "optimizer.pt"
        return file if file.is_file() else None

    @property
    def is_adapter(self) -> bool:
        """Whether there are an adapter's weights alone, not a whole model's."""
        return (self.folder / ADAPTER).is_file()

    def load(self, model: nn.Module) -> None:
        """Give the model, or its active adapter, these weights. Raises ValueError where they do not fit."""
        try:
            unexpected, unfilled = self._load_adapter(model) if self.is_adapter else self._load_whole(model)
        except (KeyError, RuntimeError) as error:  # PEFT's for weights it lacks, torch's for other shapes
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.folder} does not fit {type(model).__name__}: {reason}") from error
        if unexpected or unfilled:
            raise ValueError(
                f"{self.folder} does not fit {type(model).__name__}: {len(unexpected)} weights too many, "
                f"{len(unfilled)} too few, such as {(unexpected + unfilled)[0]!r}"
            )

    def _load_adapter(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of weights that the model has no place for, and of its own that were not given."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        active = getattr(model, "active_adapter", "default")
        name = active if isinstance(active, str) else "default"
        result = set_peft_model_state_dict(model, load_file(self.folder / ADAPTER), adapter_name=name)
        trainable = {own for own, parameter in model.named_parameters() if parameter.requires_grad}
        own = [
            key for key in result.missing_keys if key in trainable or ("lora_" in key and f".{name}." in key)
        ]
        return list(result.unexpected_keys), own

    def _load_whole(self, model: nn.Module) -> tuple[list[str], list[str]]:
        from safetensors.torch import load_file

        result = model.load_state_dict(load_file(self.folder / WEIGHTS), strict=False)
        return list(result.unexpected_keys), _without_tied(model, result.missing_keys)


def require_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise ValueError where some have an optimiser's state and some have not: their scores do not add up."""
    bare = [checkpoint.folder for checkpoint in checkpoints if checkpoint.optimizer is None]
    if bare and len(bare) < len(checkpoints):
        raise ValueError(f"expected optimizer.pt in every checkpoint or in none, there is none in {bare[0]}")


def _without_tied(model: nn.Module, missing: list[str]) -> list[str]:
    """Missing names whose tensor no other name of the model shares; safetensors saves tied weights once."""
    every = model.state_dict(keep_vars=True)
    names: dict[int, int] = {}
    for tensor in every.values():
        names[id(tensor)] = names.get(id(tensor), 0) + 1
    return [name for name in missing if names[id(every[name])] == 1]


def _logged_rate(folder: Path) -> float | None:
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    state = json.loads(file.read_text())
    end = state.get("epoch") or 0.0
    logged = [
        entry["learning_rate"]
        for entry in state.get("log_history", [])
        if "learning_rate" in entry and end - 1 < entry.get("epoch", 0.0) <= end
    ]
    return sum(logged) / len(logged) if logged else None


@contextmanager
def weights_restored(model: nn.Module, *, whole: bool = False) -> Iterator[None]:
    """Give every trainable parameter its value back at the end; ``whole``, frozen ones and buffers too."""
    kept: list[tuple[Tensor, Tensor]] = [
        (p, p.detach().clone()) for p in model.parameters() if p.requires_grad
    ]
    if whole:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        kept += [(own, own.detach().to("cpu", copy=True)) for own in (*frozen, *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
