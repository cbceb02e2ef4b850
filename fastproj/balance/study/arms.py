"""The arms of the study: what is trained, by which losses, and what is done to the scores instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fastproj.balance.adapter import add_balance_adapter, remove_balance_adapter
from fastproj.balance.labels import LabelWords
from fastproj.balance.objective import BalanceObjective
from fastproj.balance.prompts import Example
from fastproj.balance.training import BalanceConfig, BalanceTraining, train
from fastproj.bias_diff.training import add_adapter

RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EPOCHS, BATCH = 2, 16
LEARNING_RATES = (5e-5, 3e-4, 1e-3)
# β = γ, tried on the first draw of the first task.
WEIGHTS = (0.03, 0.1, 0.3)

Losses = Literal["plain", "balance", "propensity", "discrimination"]
Place = Literal["chosen", "first", "last", "random"]


@dataclass(frozen=True)
class Arm:
    """A trained arm.

    Attributes:
        lora: LoRA on all linear layers, otherwise one block's writers in full and the vector before it.
        rates_of: the arm whose learning rate it takes; where there is none, nor a ``rate`` of its own, it is
            chosen for this arm.
        weight: β = γ; where None the one that is chosen.
    """

    name: str
    losses: Losses = "plain"
    lora: bool = False
    place: Place = "chosen"
    rates_of: str | None = None
    weight: float | None = None
    rate: float | None = None
    epochs: int = EPOCHS


PLAIN = Arm("block, plain")
LORA = Arm("LoRA, plain", lora=True)
BALANCE = Arm("block, balance", "balance")
MAIN = (PLAIN, BALANCE, LORA)
MORE = (
    Arm("block, balance at 0.3", "balance", rates_of=BALANCE.name, weight=0.3),
    Arm("block, plain, twice as long", rates_of=PLAIN.name, epochs=2 * EPOCHS),
    Arm("block, balance, twice as long", "balance", rates_of=BALANCE.name, epochs=2 * EPOCHS),
    Arm("LoRA, plain at 0.0003", lora=True, rate=3e-4),
    Arm("block, propensity alone at 0.3", "propensity", rates_of=BALANCE.name, weight=0.3),
    Arm("block, discrimination alone at 0.3", "discrimination", rates_of=BALANCE.name, weight=0.3),
    Arm("last block, balance", "balance", place="last", rates_of=BALANCE.name),
    Arm("block, balance at 1", "balance", rates_of=BALANCE.name, weight=1.0),
    Arm("LoRA, balance at 0.3", "balance", lora=True, rates_of=LORA.name, weight=0.3),
    Arm("random block, balance", "balance", place="random", rates_of=BALANCE.name),
    Arm("first block, balance", "balance", place="first", rates_of=BALANCE.name),
)
ZERO, CONTEXTUAL, DOMAIN = "zero-shot", "contextual calibration", "domain-context calibration"
# A trained arm's scores, less the logarithm of each label's share of the training texts.
ADJUSTED = ", adjusted afterwards"


def adapted(model: nn.Module, arm: Arm, block: int, seed: int) -> nn.Module:
    """The model with what the arm trains; ``block`` is counted in this model."""
    if arm.lora:
        return add_adapter(model, rank=RANK, alpha=ALPHA, targets=TARGETS, seed=seed)
    return add_balance_adapter(model, block)


def remove(tuned: Any, arm: Arm) -> None:
    """Give the model back as it was."""
    if arm.lora:
        tuned.unload()
    else:
        remove_balance_adapter(tuned)


def fit(
    tuned: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: LabelWords,
    arm: Arm,
    *,
    rate: float,
    weight: float,
    seed: int,
) -> BalanceTraining:
    """Train an arm; the batches of a seed are the same for all of them."""
    beta = weight if arm.losses in ("balance", "propensity") else 0.0
    gamma = weight if arm.losses in ("balance", "discrimination") else 0.0
    config = BalanceConfig(epochs=arm.epochs, batch_size=BATCH, learning_rate=rate, seed=seed)
    return train(tuned, tokenizer, examples, labels, config, BalanceObjective(labels, beta=beta, gamma=gamma))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_back(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model the values of :func:`state_of`."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].data.copy_(value)
