"""Unlearning a selection by negative preference optimisation (NPO), with a retain term."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.bias_diff.encoding import by_length, encode, pad_token, padded, shuffled
from fastproj.bias_diff.likelihood import evaluating, model_kind, token_log_probabilities
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import make_optimizer, take_step

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class NPOConfig:
    """Everything but model and data that decides an unlearning.

    Attributes:
        beta: temperature β; as it goes to 0, NPO becomes gradient ascent on the forgotten samples.
        retain_weight: weight of the negative log-likelihood of retained samples.
        length_normalised: take the mean log-probability of a sample's tokens for their sum.
        epochs: passes over the forgotten samples.
        max_length: tokens of a text that count.
        max_norm: norm that the gradient is clipped to, None for no clipping.
        seed: of the order of samples and of dropout.
    """

    beta: float = 0.1
    retain_weight: float = 1.0
    length_normalised: bool = False
    epochs: int = 1
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    max_length: int = 128
    max_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.retain_weight < 0:
            raise ValueError(
                f"expected beta > 0 and retain_weight >= 0, got {self.beta} and {self.retain_weight}"
            )
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"expected epochs and batch_size of 1 or more, got {self.epochs}, {self.batch_size}"
            )


@dataclass(frozen=True)
class UnlearningStep:
    """One step, as it was before its update.

    Attributes:
        loss: ``npo + retain_weight · retain``.
        npo: the first term.
        retain: mean negative log-likelihood of a token of the retained batch; None where there is no such.
        log_ratio: mean of ``log π_θ/π_ref`` over the forgotten batch: it falls as they are forgotten.
    """

    step: int
    loss: float
    npo: float
    retain: float | None
    log_ratio: float


def npo_loss(log_probabilities: Tensor, reference: Tensor, beta: float) -> Tensor:
    """``−(2/β) mean log σ(−β (log π_θ − log π_ref))``, a scalar, ``(2/β) log 2`` where the two agree.

    log_probabilities and reference (B,). Raises ValueError where the shapes differ or β is not positive.
    Source: Zhang et al. 2024, "Negative Preference Optimization", eq. 3.
    """
    if log_probabilities.dim() != 1 or log_probabilities.shape != reference.shape:
        raise ValueError(
            f"expected two tensors (B,), got {tuple(log_probabilities.shape)} and {tuple(reference.shape)}"
        )
    if beta <= 0:
        raise ValueError(f"expected beta > 0, got {beta}")
    return -(2 / beta) * F.logsigmoid(-beta * (log_probabilities - reference)).mean()


def sequence_log_probabilities(
    model: nn.Module, ids: Tensor, mask: Tensor, *, length_normalised: bool = False
) -> Tensor:
    """``Σ_{t ≥ 1} log p(x_t | x_{<t})`` of each row of ids (B, T), or their mean, (B,); differentiable."""
    sums = token_log_probabilities(model, ids, mask).sum(1)
    return sums / (mask.sum(1) - 1) if length_normalised else sums


def reference_log_probabilities(
    model: nn.Module, rows: Rows, pad: int, *, batch_size: int, length_normalised: bool = False
) -> Tensor:
    """``log π_ref`` of each row under the model as it is, adapter included, without dropout, (N,)."""
    parts: list[tuple[list[int], Tensor]] = []
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad))
            parts.append(
                (chosen, sequence_log_probabilities(model, ids, mask, length_normalised=length_normalised))
            )
    values = torch.cat([part for _, part in parts])
    order = torch.tensor([row for chosen, _ in parts for row in chosen], device=values.device)
    return torch.empty_like(values).index_copy(0, order, values)


def unlearn(
    model: nn.Module,
    tokenizer: Any,
    forget: Records,
    retain: Records | None = None,
    config: NPOConfig | None = None,
    *,
    on_step: Callable[[int, int, float], None] | None = None,
) -> tuple[UnlearningStep, ...]:
    """Minimise ``−(2/β) E_forget log σ(−β log π_θ/π_ref) + λ · NLL(retain)`` over the trainable parameters.

    π_ref is the model as it comes in: with LoRA the trained adapter, not the base under it. Its
    log-probabilities are taken once, before the first step. Each step takes a batch of forgotten and one of
    retained samples, these anew from the start when they run out. ``on_step(step, steps, loss)`` is called
    after each step. The model is changed in place, by AdamW, and left in the mode it was in.

    Raises ValueError where the model is not causal or nothing in it is trainable, where retained samples are
    missing although ``retain_weight`` is not 0, and where one sample is in both sets.

    ``log π_ref`` is taken once and without dropout; π_θ has the model's dropout while it trains. With dropout
    the log-ratio therefore begins off zero, on average below it, as if a little were forgotten already: to
    compare the two strictly, train a model without dropout.
    """
    config = config or NPOConfig()
    _check(model, forget, retain, config)
    pad = pad_token(tokenizer)
    forgotten = _rows(forget, tokenizer, config)
    retained = _rows(retain, tokenizer, config) if retain is not None and config.retain_weight else []
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    reference = reference_log_probabilities(
        model, forgotten, pad, batch_size=config.batch_size, length_normalised=config.length_normalised
    )
    training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return _run(model, forgotten, retained, reference, pad, config, optimizer, on_step)
    finally:
        model.train(training)


def _run(
    model: nn.Module,
    forgotten: Rows,
    retained: Rows,
    reference: Tensor,
    pad: int,
    config: NPOConfig,
    optimizer: torch.optim.Optimizer,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[UnlearningStep, ...]:
    kept = _without_end(retained, config.batch_size, torch.Generator().manual_seed(config.seed + 1))
    generator = torch.Generator().manual_seed(config.seed)
    lengths = [len(row) for row in forgotten]
    plan = [b for _ in range(config.epochs) for b in shuffled(lengths, config.batch_size, generator)]
    history: list[UnlearningStep] = []
    for number, chosen in enumerate(plan, start=1):
        npo, log_ratio = _forget(model, [forgotten[i] for i in chosen], reference[chosen], pad, config)
        retain = _retain(model, next(kept), pad, config.retain_weight) if retained else None
        take_step(optimizer, config.learning_rate, config.max_norm)
        loss = npo + config.retain_weight * (retain or 0.0)
        history.append(UnlearningStep(number, loss, npo, retain, log_ratio))
        if on_step is not None:
            on_step(number, len(plan), loss)
    return tuple(history)


def _forget(
    model: nn.Module, rows: Rows, reference: Tensor, pad: int, config: NPOConfig
) -> tuple[float, float]:
    """Add the gradient of the NPO term; returns it and the mean log-ratio."""
    ids, mask = (part.to(reference.device) for part in padded(rows, pad))
    found = sequence_log_probabilities(model, ids, mask, length_normalised=config.length_normalised)
    loss = npo_loss(found, reference, config.beta)
    loss.backward()
    return float(loss.detach()), float((found.detach() - reference).mean())


def _retain(model: nn.Module, rows: Rows, pad: int, weight: float) -> float:
    """Add the gradient of ``weight`` times the mean negative log-likelihood; returns the latter.

    Apart from the NPO term's, so that only one graph is in memory at a time.
    """
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in padded(rows, pad))
    loss = -token_log_probabilities(model, ids, mask).sum() / mask[:, 1:].sum()
    (weight * loss).backward()
    return float(loss.detach())


def _without_end(rows: Rows, batch_size: int, generator: torch.Generator) -> Iterator[Rows]:
    lengths = [len(row) for row in rows]
    while rows:
        for chosen in shuffled(lengths, batch_size, generator):
            yield [rows[i] for i in chosen]


def _rows(records: Records, tokenizer: Any, config: NPOConfig) -> Rows:
    return [sample["input_ids"] for sample in encode(records, tokenizer, max_length=config.max_length)]


def _check(model: nn.Module, forget: Records, retain: Records | None, config: NPOConfig) -> None:
    if model_kind(model) != "causal":
        raise ValueError("NPO needs a causal language model, got a masked one")
    if not len(forget):
        raise ValueError("expected samples to forget, got none")
    if config.retain_weight and not (retain and len(retain)):
        raise ValueError("expected samples to retain; with none, set retain_weight to 0")
    both = sorted(set(forget.ids) & set(retain.ids)) if retain else []
    if both:
        raise ValueError(f"expected samples to be forgotten or retained, {both[0]!r} is both")
