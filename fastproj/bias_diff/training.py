"""A plain fine-tune: the warm-up that the scores are taken from, and the retraining without a selection."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastproj.bias_diff.encoding import Task, encode, mask_token, pad_token, padded, shuffled
from fastproj.bias_diff.records import Records
from fastproj.methods.gce import IGNORE_INDEX

# BERT's: of the tokens that are asked for, 80 % are masked, 10 % replaced, 10 % left as they are.
ASKED, MASKED, REPLACED = 0.15, 0.8, 0.1
_PEFT_TASKS: dict[Task, str | None] = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": None,
    "classification": "SEQ_CLS",
}


@dataclass(frozen=True)
class FineTuneConfig:
    """Everything but model and data that decides a fine-tune.

    Attributes:
        schedule: ``"constant"`` learning rate after the warm-up, or ``"linear"`` decay to zero.
        warmup: share of the steps over which the learning rate rises linearly.
        max_length: tokens of a text that count.
        max_norm: norm that the gradient is clipped to, None for no clipping.
        seed: of the order of samples, of masks and of dropout.
    """

    task: Task = "causal-lm"
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 5e-4
    schedule: Literal["constant", "linear"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_length: int = 128
    max_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"expected epochs and batch_size of 1 or more, got {self.epochs}, {self.batch_size}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: expected a share of the steps from 0 to 1, got {self.warmup}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"schedule: expected constant or linear, got {self.schedule!r}")


@dataclass(frozen=True)
class FineTune:
    """What a fine-tune did.

    Attributes:
        losses, learning_rates: one of each for every step.
        checkpoints: folders that it wrote, one an epoch.
        optimizer: with the moments that the last step left.
    """

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    checkpoints: tuple[Path, ...]
    optimizer: torch.optim.Optimizer


def add_adapter(
    model: nn.Module,
    *,
    task: Task = "causal-lm",
    rank: int = 16,
    alpha: int = 32,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """The model with a new LoRA adapter ``ΔW = (alpha/rank)·B·A``, A drawn from ``seed`` and B zero.

    ``targets`` names the layers, by default PEFT's for the architecture: the projections of queries and
    values, or what holds them.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=_PEFT_TASKS[task],
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=None if targets is None else list(targets),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def fine_tune(
    model: nn.Module,
    tokenizer: Any,
    records: Records,
    config: FineTuneConfig | None = None,
    *,
    folder: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    hold: Callable[[torch.optim.Optimizer], object] | None = None,
) -> FineTune:
    """Minimise each batch's mean cross entropy over the model's trainable parameters, in place, by AdamW.

    Batches hold texts of similar length, in an order that the seed decides. With ``folder`` every epoch ends
    in ``folder/checkpoint-<step>``, as :func:`save_checkpoint` writes it. ``on_step(step, steps, loss)`` is
    called after each step, ``hold(optimizer)`` once before the first, as :meth:`fastproj.GRASP.hold` has it.
    The model is left in the mode it was in, the caller's random state untouched.

    Raises ValueError where no parameter is trainable, or a text or label does not suit the task.
    """
    config = config or FineTuneConfig()
    samples = encode(records, tokenizer, task=config.task, max_length=config.max_length)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, config.betas, config.eps)
    if hold is not None:
        hold(optimizer)
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return _train(model, tokenizer, samples, config, optimizer, folder, on_step)
    finally:
        model.train(training)


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, whose names its state keeps. ValueError where there are none."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError(
            "the model has no trainable parameter: add an adapter, or load one with is_trainable=True"
        )
    return torch.optim.AdamW(named, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
    learning_rates: Sequence[float],
    steps_per_epoch: int,
) -> None:
    """Write the adapter (or model), ``optimizer.pt`` and ``trainer_state.json``, as the Trainer lays them.

    The optimiser's state is its ``state_dict``, which loads with ``weights_only=True`` and names its
    parameters; the log holds loss and learning rate of every step so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)  # type: ignore[operator]  # PEFT's and transformers' alike
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    log = [
        {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "learning_rate": rate}
        for step, (loss, rate) in enumerate(zip(losses, learning_rates, strict=True), start=1)
    ]
    state = {"global_step": len(log), "epoch": len(log) / steps_per_epoch, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def learning_rate_factor(step: int, steps: int, config: FineTuneConfig) -> float:
    """Share of the full learning rate in step 0 … steps − 1: ``(step + 1)/w`` in the w warm-up steps, then 1,
    or ``(steps − step)/(steps − w)`` where it decays."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return (steps - step) / (steps - warm) if config.schedule == "linear" else 1.0


def _train(
    model: nn.Module,
    tokenizer: Any,
    samples: list[dict[str, Any]],
    config: FineTuneConfig,
    optimizer: torch.optim.Optimizer,
    folder: Path | None,
    on_step: Callable[[int, int, float], None] | None,
) -> FineTune:
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(sample["input_ids"]) for sample in samples]
    per_epoch = math.ceil(len(samples) / config.batch_size)
    steps = config.epochs * per_epoch
    losses: list[float] = []
    rates: list[float] = []
    checkpoints: list[Path] = []
    for _ in range(config.epochs):
        for rows in shuffled(lengths, config.batch_size, generator):
            rate = config.learning_rate * learning_rate_factor(len(losses), steps, config)
            batch = _batch([samples[row] for row in rows], tokenizer, config.task, generator)
            losses.append(_step(model, batch, optimizer, rate, config.max_norm))
            rates.append(rate)
            if on_step is not None:
                on_step(len(losses), steps, losses[-1])
        if folder is not None:
            checkpoints.append(folder / f"checkpoint-{len(losses)}")
            save_checkpoint(checkpoints[-1], model, optimizer, losses, rates, per_epoch)
    return FineTune(tuple(losses), tuple(rates), tuple(checkpoints), optimizer)


def _step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_norm: float | None,
) -> float:
    device = next(model.parameters()).device
    loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
    loss.backward()
    take_step(optimizer, rate, max_norm)
    return float(loss.detach())


def take_step(optimizer: torch.optim.Optimizer, rate: float, max_norm: float | None) -> None:
    """Clip the gradients, step at this learning rate, drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if max_norm is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    optimizer.zero_grad()


def _batch(
    samples: Sequence[Mapping[str, Any]], tokenizer: Any, task: Task, generator: torch.Generator
) -> dict[str, Tensor]:
    ids, mask = padded([sample["input_ids"] for sample in samples], pad_token(tokenizer))
    if task == "classification":
        labels = torch.tensor([sample["labels"] for sample in samples])
    elif task == "masked-lm":
        ids, labels = mask_tokens(ids, mask, tokenizer, generator)
    else:
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mask_tokens(
    ids: Tensor, mask: Tensor, tokenizer: Any, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, T) of masked language modelling: 15 % of the tokens that are not special, at least
    one a row, are asked for; of these 80 % become the mask, 10 % a random token (Devlin et al. 2019).

    Raises ValueError where the tokenizer has no mask token.
    """
    hidden = mask_token(tokenizer)
    ordinary = (mask == 1) & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    draws = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, 2.0)
    asked = ordinary & ((draws < ASKED) | (draws == draws.amin(1, keepdim=True)))
    kind = torch.rand(ids.shape, generator=generator)
    other = torch.randint(len(tokenizer), ids.shape, generator=generator)
    changed = torch.where(asked & (kind < MASKED), hidden, ids)
    changed = torch.where(asked & (kind >= MASKED) & (kind < MASKED + REPLACED), other, changed)
    return changed, ids.masked_fill(~asked, IGNORE_INDEX)
