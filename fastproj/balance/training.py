"""Training on label words: hidden states once, the vocabulary at the answers' positions alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastproj.balance.head import final_hidden, token_logits
from fastproj.balance.labels import LabelWords
from fastproj.balance.objective import BalanceObjective
from fastproj.balance.prompts import Example
from fastproj.bias_diff.encoding import pad_token, padded, shuffled
from fastproj.bias_diff.training import FineTuneConfig, learning_rate_factor, make_optimizer, take_step
from fastproj.bindings.cross_entropy import cross_entropy
from fastproj.methods.gce import IGNORE_INDEX


@dataclass(frozen=True)
class BalanceConfig:
    """Everything but model, data and objective that decides a training.

    Batch and learning rate are the paper's; the rest is as in
    :class:`fastproj.bias_diff.training.FineTuneConfig`.
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 5e-5
    schedule: Literal["constant", "linear"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.fine_tune()

    def fine_tune(self) -> FineTuneConfig:
        """The same for a plain fine-tune. ValueError for what it refuses."""
        return FineTuneConfig(**asdict(self))


@dataclass(frozen=True)
class BalanceStep:
    """A step's loss and what it was made of."""

    loss: float
    lm: float
    propensity: float
    discrimination: float


@dataclass(frozen=True)
class BalanceTraining:
    """What a training did: one of each for every step, and the optimiser as the last one left it."""

    steps: tuple[BalanceStep, ...]
    learning_rates: tuple[float, ...]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and answer, several a sample where it has several labels.

    Attributes:
        ids, mask: (R, T), padded at the right.
        rows, positions, targets: (n,), the places that a token is predicted from, and that token; −100 behind
            the prompt of a sample without a label.
        behind: (B,), which of these stands directly behind each sample's prompt.
        labels: classes (B,) or members (B, C).
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    behind: Tensor
    labels: Tensor


def train(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: LabelWords,
    config: BalanceConfig | None = None,
    objective: BalanceObjective | None = None,
    *,
    multi_label: bool = False,
    on_step: Callable[[int, int, BalanceStep], None] | None = None,
) -> BalanceTraining:
    """Minimise ``α L_LM + β propensity − γ discrimination`` over the trainable parameters by AdamW.

    ``L_LM`` is the mean cross entropy of the tokens of the batch's label words behind their prompts; a sample
    with several labels answers with each of them, one without any has no answer. The other terms see the
    logits of the labels' first tokens behind each prompt. Without an objective the loss is ``L_LM`` and the
    other terms are measured alone. Parameters change in place. Batches hold prompts of similar length, in an
    order that the seed decides. ``on_step(step, steps, parts)`` is called after each step. The model is left
    in the mode it was in, the caller's random state untouched.

    Raises ValueError where no parameter is trainable, there is no example, an example has not one label (or,
    with ``multi_label``, labels that there are not), the objective's labels are others, or a step's loss is
    not finite: the parameters are then as the step before left them.
    """
    config = config or BalanceConfig()
    objective = objective or BalanceObjective(labels, beta=0.0, gamma=0.0)
    if objective.labels != labels:
        raise ValueError(
            f"expected an objective for labels {', '.join(labels.names)}, got one for "
            f"{', '.join(objective.labels.names)}"
        )
    _check(examples, labels, multi_label)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.betas, config.eps)
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return _train(
                model, pad_token(tokenizer), examples, config, objective, optimizer, multi_label, on_step
            )
    finally:
        model.train(training)


def _train(
    model: nn.Module,
    pad: int,
    examples: Sequence[Example],
    config: BalanceConfig,
    objective: BalanceObjective,
    optimizer: torch.optim.Optimizer,
    multi_label: bool,
    on_step: Callable[[int, int, BalanceStep], None] | None,
) -> BalanceTraining:
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(example.prompt) for example in examples]
    total = config.epochs * math.ceil(len(examples) / config.batch_size)
    device = next(model.parameters()).device
    schedule = config.fine_tune()
    steps: list[BalanceStep] = []
    rates: list[float] = []
    for _ in range(config.epochs):
        for chosen in shuffled(lengths, config.batch_size, generator):
            rates.append(config.learning_rate * learning_rate_factor(len(steps), total, schedule))
            batch = collate([examples[row] for row in chosen], objective.labels, pad, multi_label)
            loss = batch_loss(model, batch, objective, device)
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"step {len(steps) + 1}: the loss is {float(loss.detach())}; a smaller gamma, now "
                    f"{objective.gamma}, or learning rate, now {rates[-1]:g}, may keep it finite"
                )
            loss.backward()
            take_step(optimizer, rates[-1], config.max_norm)
            steps.append(_step(loss, objective))
            if on_step is not None:
                on_step(len(steps), total, steps[-1])
    return BalanceTraining(tuple(steps), tuple(rates), optimizer)


def collate(examples: Sequence[Example], labels: LabelWords, pad: int, multi_label: bool = False) -> Batch:
    """A batch of examples as :func:`batch_loss` takes it."""
    rows: list[list[int]] = []
    places: list[tuple[int, int, int]] = []
    behind: list[int] = []
    for example in examples:
        behind.append(len(places))
        last = len(example.prompt) - 1
        for label in example.labels:
            word = labels.tokens[label]
            places += [(len(rows), last + at, token) for at, token in enumerate(word)]
            rows.append([*example.prompt, *word[:-1]])
        if not example.labels:
            places.append((len(rows), last, IGNORE_INDEX))
            rows.append([*example.prompt])
    ids, mask = padded(rows, pad)
    row, position, target = torch.tensor(places).T
    if multi_label:
        held = torch.zeros(len(examples), len(labels), dtype=torch.bool)
        for at, example in enumerate(examples):
            held[at, list(example.labels)] = True
    else:
        held = torch.tensor([example.labels[0] for example in examples])
    return Batch(ids, mask, row, position, target, torch.tensor(behind), held)


def batch_loss(
    model: nn.Module, batch: Batch, objective: BalanceObjective, device: torch.device | None = None
) -> Tensor:
    """The objective's loss of a batch, a scalar with a gradient."""
    device = device or batch.ids.device
    hidden = final_hidden(model, batch.ids.to(device), batch.mask.to(device))
    logits = token_logits(model, hidden[batch.rows.to(device), batch.positions.to(device)], None)
    targets = batch.targets.to(device)
    count = int((batch.targets != IGNORE_INDEX).sum())
    lm = cross_entropy(logits, targets).losses.sum() / max(count, 1)
    first = torch.tensor(objective.labels.first, device=device)
    label_logits = logits[batch.behind.to(device)].index_select(1, first)
    return objective(label_logits, batch.labels.to(device), lm)


def _check(examples: Sequence[Example], labels: LabelWords, multi_label: bool) -> None:
    if not examples:
        raise ValueError("expected at least one example, got none")
    for example in examples:
        if not multi_label and len(example.labels) != 1:
            raise ValueError(
                f"expected one label for {example.id!r}, got {len(example.labels)}: several need multi_label"
            )
        wrong = [label for label in example.labels if not 0 <= label < len(labels)]
        if wrong:
            raise ValueError(f"expected labels of {example.id!r} from 0 to {len(labels) - 1}, got {wrong[0]}")


def _step(loss: Tensor, objective: BalanceObjective) -> BalanceStep:
    parts = objective.parts
    if parts is None:
        raise ValueError("expected an objective that says what its loss was made of, got none")
    return BalanceStep(
        float(loss.detach()), float(parts.lm), float(parts.propensity), float(parts.discrimination)
    )
