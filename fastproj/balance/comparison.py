"""A model as it is, and the ways of making it treat labels alike, each measured on the same samples."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import architecture_of, blocks
from fastproj.balance.adapter import add_balance_adapter, remove_balance_adapter
from fastproj.balance.calibration import calibrated, contextual_prior, domain_prior
from fastproj.balance.early_exit import EarlyExit, early_exit
from fastproj.balance.findings import ZERO_SHOT, Findings, Row
from fastproj.balance.interchange import LayerScores, interchange_ablation, interchange_pairs
from fastproj.balance.metrics import Classification, classification
from fastproj.balance.objective import BalanceObjective
from fastproj.balance.predict import predict
from fastproj.balance.prompts import Example
from fastproj.balance.task import Samples, Task, drawn_evenly
from fastproj.balance.training import BalanceConfig, BalanceTraining, train
from fastproj.bias_diff import commands as shared
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.training import add_adapter

CALIBRATIONS = ("cc", "dc")
BATCH = 16
# Test samples whose scores must come back once an adapter is gone, and how closely by the model's precision:
# sums of another order round differently.
WITNESSES = 8
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
CLOSE_IN_HALF = 0.1


@dataclass(frozen=True)
class Data:
    """Samples to train, test and validate with, the training texts, and texts to measure perplexity on."""

    train: list[Example]
    test: list[Example]
    validation: list[Example]
    train_texts: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(
        cls,
        task: Task,
        tokenizer: Any,
        train: Samples,
        test: Samples,
        validation: Samples | None,
        held_out: tuple[str, ...],
    ) -> Data:
        """Raises ValueError, naming the file, for labels that do not suit the task."""
        return cls(
            task.examples(train, tokenizer),
            task.examples(test, tokenizer),
            [] if validation is None else task.examples(validation, tokenizer),
            train.records.texts,
            held_out,
        )


@dataclass(frozen=True)
class Recipe:
    """How methods train: the loss's factors, ranks (None in full), and learning rates to choose from."""

    alpha: float
    beta: float
    gamma: float
    rank: int | None
    lora_rank: int
    rates: tuple[float, ...]
    config: BalanceConfig


@dataclass(frozen=True)
class _Best:
    """The training that is kept: what it trained, in its own values."""

    state: dict[str, Tensor]
    training: BalanceTraining
    rate: float
    seconds: float


def interchange(
    loaded: shared.Loaded, task: Task, samples: Sequence[Example], rows_per_forward: int | None
) -> LayerScores:
    """The ablation of samples, with its progress shown. Raises ValueError as :func:`interchange_ablation`."""
    pairs = interchange_pairs(
        loaded.model, loaded.tokenizer, samples, task.labels, task.prompt, batch_size=BATCH
    )
    with shared.progress("samples exchanged", len(pairs)) as show:
        return interchange_ablation(
            loaded.model, pairs, task.labels, rows_per_forward=rows_per_forward, on_sample=show
        )


@dataclass
class Comparison:
    """Measures a model as it is, then each method on it, the model being as it was before the next.

    ``findings`` grows with each of them; ``keep`` is called with it each time, so that what is done is kept
    whatever comes after. Adapters are written to ``output``, one a method.
    """

    loaded: shared.Loaded
    task: Task
    data: Data
    recipe: Recipe
    findings: Findings
    output: Path
    keep: Callable[[Findings], None]
    _scores: Tensor = field(init=False)
    _witness: Tensor = field(init=False)
    _parameters: int = field(init=False)

    def check(self, methods: Sequence[str], layer: int | None) -> None:
        """Raises ValueError for what training would refuse: a layer, factors, samples without a label."""
        count = len(blocks(self.loaded.model))
        if layer is not None and not 0 <= layer < count:
            raise ValueError(f"--layer: expected auto or a block from 0 to {count - 1}, got {layer}")
        self._objective("balance")
        if len(self.recipe.rates) > 1 and not self.data.validation:
            raise ValueError("several learning rates are chosen from by --validation: give that, too")
        if not set(methods) <= set(CALIBRATIONS) and not any(one.labels for one in self.data.train):
            raise ValueError("--train: expected a sample with a label, got none")
        for option, examples in (("--test", self.data.test), ("--validation", self.data.validation)):
            if examples and not any(one.labels for one in examples):
                raise ValueError(f"{option}: expected a sample with a label, got none")

    def zero_shot(self) -> None:
        """Measure the model as it is."""
        test, model = self.data.test, self.loaded.model
        self._scores = self._predict(model, test)
        self._witness = self._predict(model, test[:WITNESSES])
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        gold = self.task.members(test).double().mean(0).tolist()
        self._found(
            exit=self._exit(model),
            exited=len(test),
            samples=len(test),
            gold=dict(zip(self.task.labels.names, gold, strict=True)),
            rows=(self._row(ZERO_SHOT, self._scores, model),),
        )

    def choose_layer(self, samples: int, rows_per_forward: int | None) -> None:
        """Take the block with the largest mean KL over training samples, drawn evenly by label."""
        seed = self.recipe.config.seed
        drawn = drawn_evenly(self.data.train, samples, len(self.task.labels), seed)
        scores = interchange(self.loaded, self.task, drawn, rows_per_forward)
        self._found(scores=scores, ablated=tuple(one.id for one in drawn), layer=scores.best)

    def run(self, method: str) -> None:
        """Add a method's row. Raises ValueError where its loss does not stay finite, RuntimeError where the
        model is not what it was afterwards."""
        if method in CALIBRATIONS:
            self._found(rows=(*self.findings.rows, self._calibrate(method)))
            return
        best, tried = self._choose(method)
        adapted = self._adapted(method)
        try:
            _put_back(adapted, best.state)
            # Of the adapter alone: PEFT would ask a hub whether the vocabulary has grown.
            adapted.save_pretrained(str(self.output / method), save_embedding_layers=False)
            row = self._trained_row(method, adapted, best, tried)
            exit = self._exit(adapted)
        finally:
            self._remove(method, adapted)
        self._check_restored(method)
        self._found(rows=(*self.findings.rows, row), exits={**self.findings.exits, method: exit})

    def _found(self, **changes: Any) -> None:
        self.findings = replace(self.findings, **changes)
        self.keep(self.findings)

    def _calibrate(self, method: str) -> Row:
        model, tokenizer, task = self.loaded.model, self.loaded.tokenizer, self.task
        if method == "cc":
            prior = contextual_prior(model, tokenizer, task.labels, task.prompt)
        else:
            texts, seed = self.data.train_texts, self.recipe.config.seed
            prior = domain_prior(model, tokenizer, task.labels, task.prompt, texts, seed=seed)
        row = self._row(method, calibrated(self._scores, prior), None)
        shares = dict(zip(self.task.labels.names, prior.tolist(), strict=True))
        # The model itself is as it was, and so is its perplexity.
        return replace(row, prior=shares, perplexity=self.findings.rows[0].perplexity)

    def _choose(self, method: str) -> tuple[_Best, dict[str, Any]]:
        """The training with the learning rate whose macro F1 on validation samples is best."""
        kept: _Best | None = None
        best = -1.0
        tried: dict[str, Any] = {}
        for rate in self.recipe.rates:
            adapted = self._adapted(method)
            try:
                found = self._train(method, adapted, rate)
                measures = self._validated(adapted)
            except ValueError as error:
                if len(self.recipe.rates) == 1:
                    raise ValueError(f"{method}: {error}") from error
                tried[f"{rate:g}"] = {"error": shared.one_line(error)}
                continue
            finally:
                self._remove(method, adapted)
            if measures is not None:
                tried[f"{rate:g}"] = measures.to_dict()
            goodness = 0.0 if measures is None else measures.macro_f1
            if goodness > best:
                kept, best = found, goodness
        if kept is None:
            raise ValueError(f"{method}: no learning rate of {', '.join(tried)} kept the loss finite")
        return kept, tried

    def _train(self, method: str, adapted: nn.Module, rate: float) -> _Best:
        began = time.perf_counter()
        with shared.progress(f"{method}, learning rate {rate:g}") as show:
            done = train(
                adapted,
                self.loaded.tokenizer,
                self.data.train,
                self.task.labels,
                replace(self.recipe.config, learning_rate=rate),
                self._objective(method),
                multi_label=self.task.multi_label,
                on_step=lambda step, total, _: show(step, total),
            )
        seconds = time.perf_counter() - began
        state = {n: p.detach().cpu().clone() for n, p in adapted.named_parameters() if p.requires_grad}
        return _Best(state, done, rate, seconds)

    def _objective(self, method: str) -> BalanceObjective:
        """The balance loss, or its parts measured beside the language model's loss alone."""
        if method != "balance":
            return BalanceObjective(self.task.labels, beta=0.0, gamma=0.0)
        recipe = self.recipe
        return BalanceObjective(self.task.labels, alpha=recipe.alpha, beta=recipe.beta, gamma=recipe.gamma)

    def _adapted(self, method: str) -> Any:
        """The model with the method's adapter, which changes nothing yet."""
        model, seed = self.loaded.model, self.recipe.config.seed
        if method == "lora":
            architecture, rank = architecture_of(model), self.recipe.lora_rank
            targets = (*architecture.readers, *architecture.writers)
            with quiet():
                return add_adapter(model, rank=rank, alpha=2 * rank, targets=targets, seed=seed)
        if self.findings.layer is None:
            raise ValueError(f"{method}: expected a block to train, none was chosen")
        with quiet():
            return add_balance_adapter(model, self.findings.layer, rank=self.recipe.rank, seed=seed)

    @staticmethod
    def _remove(method: str, adapted: Any) -> None:
        if method == "lora":
            adapted.unload()
        else:
            remove_balance_adapter(adapted)

    def _check_restored(self, method: str) -> None:
        now = self._predict(self.loaded.model, self.data.test[:WITNESSES])
        close = CLOSE.get(next(self.loaded.model.parameters()).dtype, CLOSE_IN_HALF)
        if not torch.allclose(now, self._witness, rtol=0, atol=close):
            raise RuntimeError(
                f"the model is not what it was before {method}: what follows would not compare"
            )

    def _trained_row(self, method: str, adapted: nn.Module, best: _Best, tried: Mapping[str, Any]) -> Row:
        row = self._row(method, self._predict(adapted, self.data.test), adapted)
        trained = sum(value.numel() for value in best.state.values())
        steps = best.training.steps
        last = steps[-max(1, len(steps) // 10) :]
        names = ("lm", "propensity", "discrimination")
        return replace(
            row,
            trained=trained,
            share=trained / self._parameters,
            learning_rate=best.rate,
            seconds=best.seconds,
            losses={name: sum(getattr(step, name) for step in last) / len(last) for name in names},
            validation=dict(tried),
        )

    def _row(self, method: str, scores: Tensor, model: nn.Module | None) -> Row:
        predicted = self.task.said(scores).double().mean(0).tolist()
        drift = None
        if model is not None and self.data.held_out:
            drift = perplexity(model, self.loaded.tokenizer, self.data.held_out).value
        return Row(
            method=method,
            measures=self._measured(scores, self.data.test),
            predicted=dict(zip(self.task.labels.names, predicted, strict=True)),
            perplexity=drift,
        )

    def _measured(self, scores: Tensor, examples: Sequence[Example]) -> Classification:
        return classification(self.task.said(scores), self.task.members(examples), self.task.labels.names)

    def _validated(self, model: nn.Module) -> Classification | None:
        examples = self.data.validation
        return self._measured(self._predict(model, examples), examples) if examples else None

    def _predict(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return predict(model, self.loaded.tokenizer, examples, self.task.labels, batch_size=BATCH)

    def _exit(self, model: nn.Module) -> EarlyExit:
        return early_exit(model, self.loaded.tokenizer, self.data.test, self.task.labels, batch_size=BATCH)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PEFT says of its own work: GPT-2's transposed layers, deprecations in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield


def _put_back(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
