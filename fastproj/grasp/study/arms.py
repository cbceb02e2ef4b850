"""The arms of the study: ways to fine-tune on the same texts, or to change what the naive fine-tune left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastproj.bias_diff.encoding import shuffled
from fastproj.bias_diff.training import add_adapter, make_optimizer, take_step
from fastproj.files import write_atomically
from fastproj.grasp.study.settings import SELECTIONS
from fastproj.grasp.study.tasks import Sample, Task, loss
from fastproj.latent.factors import LatentFactors
from fastproj.methods.ablation import Ablation
from fastproj.methods.grasp import GRASP, Mode

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, MOST_NORM = 2, 8, 7e-4, 0.01, 1.0
# Of every token's norm, at every block.
STEERING = 0.02

Method = Literal["none", "plain", "write", "read", "stream", "ablate", "remove", "steer +", "steer −", "keep"]
Source = Literal["none", "identified", "probes", "oracle", "random"]
GRASP_MODES: dict[str, Mode] = {"write": "write", "read": "read", "stream": "stream"}
TRAINED: tuple[str, ...] = ("plain", *GRASP_MODES, "ablate")


@dataclass(frozen=True)
class Arm:
    """A way to a model: what is done, with directions from where, on which selection of texts."""

    name: str
    method: Method
    source: Source = "none"
    selection: str = SELECTIONS[0]
    epochs: int = EPOCHS
    keeps: str = ""

    @property
    def side(self) -> Literal["read", "write"]:
        """The side of its directions, or of the modules that it keeps."""
        return "read" if "read" in (self.method, self.keeps) else "write"


# Those before, which the others need; then the others, those that say most first.
FIRST = (
    Arm("pretrained", "none"),
    Arm("naive", "plain"),
    Arm("naive, other selection", "plain", selection="other"),
)
ARMS = (
    Arm("write", "write", "identified"),
    Arm("stream", "stream", "identified"),
    Arm("read", "read", "identified"),
    Arm("oracle read", "read", "oracle"),
    Arm("oracle write", "write", "oracle"),
    Arm("oracle stream", "stream", "oracle"),
    Arm("naive, half as long", "plain", epochs=EPOCHS // 2),
    Arm("stream, random directions", "stream", "random"),
    Arm("trained without the factor", "plain", selection="free"),
    Arm("ablated in training", "ablate", "identified"),
    Arm("removed afterwards", "remove", "identified"),
    Arm("oracle removed afterwards", "remove", "oracle"),
    Arm("naive, only what writes the stream", "keep", keeps="write"),
    Arm("naive, only what reads the stream", "keep", keeps="read"),
    Arm("steered +", "steer +", "identified"),
    Arm("steered −", "steer −", "identified"),
    Arm("write, random directions", "write", "random"),
    Arm("write, chosen by probes", "write", "probes"),
)


@dataclass(frozen=True)
class Trained:
    """What training did: the losses of its steps, seconds, and how far ΔW is from its constraint."""

    losses: tuple[float, ...]
    seconds: float
    violation: float | None


def adapted(model: nn.Module, seed: int) -> nn.Module:
    """The model with a new adapter; ``.unload()`` gives the model back."""
    return add_adapter(model, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=seed)


def train(model: nn.Module, task: Task, arm: Arm, seed: int, factors: LatentFactors | None = None) -> Trained:
    """Fine-tune an adapter on the arm's selection by its method; batches are the same for all arms."""
    began = time.perf_counter()
    optimizer = make_optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
    samples = task.train[arm.selection]
    around: AbstractContextManager[Any] = nullcontext()
    if arm.method == "ablate":
        around = Ablation(model, _needed(arm, factors))
    elif arm.method in GRASP_MODES:
        around = GRASP(model, _needed(arm, factors), GRASP_MODES[arm.method])
    violation = None
    with around as engine:
        if isinstance(engine, GRASP):
            engine.hold(optimizer)
        losses = _steps(model, task, samples, optimizer, seed, arm.epochs)
        if isinstance(engine, GRASP):
            violation = engine.violation()
    return Trained(tuple(losses), time.perf_counter() - began, violation)


def _needed(arm: Arm, factors: LatentFactors | None) -> LatentFactors:
    if factors is None:
        raise ValueError(f"arm {arm.name!r} needs directions, got none")
    return factors


def _steps(
    model: nn.Module,
    task: Task,
    samples: list[Sample],
    optimizer: torch.optim.Optimizer,
    seed: int,
    epochs: int,
) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(sample.ids) for sample in samples]
    losses = []
    training = model.training
    model.train()
    for _ in range(epochs):
        for rows in shuffled(lengths, BATCH, generator):
            value = loss(model, task.batch([samples[row] for row in rows]))
            value.backward()
            take_step(optimizer, LEARNING_RATE, MOST_NORM)
            losses.append(float(value.detach()))
    model.train(training)
    return losses


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by name, copies."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of :func:`adapter_state` back. KeyError for an adapter of other modules."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write an adapter's tensors as safetensors."""
    from safetensors.torch import save

    write_atomically(path, save({name: value.contiguous() for name, value in state.items()}))


def load_state(path: Path) -> dict[str, Tensor]:
    """Read what :func:`save_state` wrote."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(path)
    return state
