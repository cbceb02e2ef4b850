"""A task's runs: the model and its folded copies, the block, the learning rates, and every arm's numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastproj.balance.calibration import calibrated, contextual_prior, domain_prior
from fastproj.balance.early_exit import early_exit
from fastproj.balance.interchange import interchange_ablation, interchange_pairs
from fastproj.balance.labels import LabelWords, label_words
from fastproj.balance.metrics import classification
from fastproj.balance.predict import decided, predict
from fastproj.balance.prompts import Example, encode
from fastproj.balance.study.arms import (
    BALANCE,
    CONTEXTUAL,
    DOMAIN,
    LEARNING_RATES,
    MAIN,
    WEIGHTS,
    ZERO,
    Arm,
    adapted,
    fit,
    put_back,
    remove,
    state_of,
)
from fastproj.balance.study.settings import TASKS, Draw, draw
from fastproj.balance.training import BalanceTraining
from fastproj.bias_diff.encoding import pad_token
from fastproj.bias_diff.perplexity import perplexity
from fastproj.grasp.study.blocks import keep_upper

MOST_TOKENS = 64
EVALUATED = 16
ABLATED, EXITED = 48, 100
Record = dict[str, Any]
Load = Callable[[], tuple[Any, Any]]


class Session:
    """One task: its draws, and the model, whose lower blocks' outputs are kept where they are not trained.

    Attributes:
        block: the chosen one, counted in the whole model; set once it is known.
        rates: learning rates by arm, likewise.
        weight: β and γ, likewise.
    """

    def __init__(self, task: str, load: Load) -> None:
        self.task = TASKS[task]
        self._load = load
        self._models: dict[int, nn.Module] = {}
        self._draws: dict[int, Draw] = {}
        self.model, self.tokenizer = load()
        self.labels: LabelWords = label_words(self.tokenizer, self.task.names, self.task.words)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.blocks = int(self.model.config.num_hidden_layers)
        self.block: int | None = None
        self.rates: dict[str, float] = {}
        self.weight: float | None = None

    def zero_shot(self, seed: int) -> list[Record]:
        """The model as it is, and its scores calibrated in two ways."""
        data = self.draw(seed)
        test, validation = self.examples(data.test), self.examples(data.validation)
        scores, held = self._scores(self.model, test), self._scores(self.model, validation)
        options = (self.model, self.tokenizer, self.labels, self.task.prompt)
        priors = {
            ZERO: None,
            CONTEXTUAL: contextual_prior(*options),
            DOMAIN: domain_prior(*options, data.train.texts, seed=seed),
        }
        same = self._drift(self.model, data, test)
        return [
            {
                **self._head(name, seed),
                **self._measured(scores if prior is None else calibrated(scores, prior), test),
                "validation": self._measured(held if prior is None else calibrated(held, prior), validation)[
                    "measures"
                ],
                "prior": None if prior is None else prior.tolist(),
                "trained": 0,
                **(same if name == ZERO else {"perplexity": same["perplexity"]}),
            }
            for name, prior in priors.items()
        ]

    def ablate(self, seed: int) -> Record:
        """Interchange ablation of every block on training texts of a draw."""
        examples = self.examples(self.draw(seed).train)[:ABLATED]
        began = time.perf_counter()
        pairs = interchange_pairs(
            self.model, self.tokenizer, examples, self.labels, self.task.prompt, batch_size=EVALUATED
        )
        scores = interchange_ablation(self.model, pairs, self.labels)
        return {"task": self.task.name, "seed": seed, "ablation": {
            "best": scores.best,
            "mean": scores.mean.tolist(),
            "standard_error": scores.standard_error.tolist(),
            "best of halves": [int(half.mean(0).argmax()) for half in scores.per_sample.chunk(2)],
            "seconds": time.perf_counter() - began,
        }}  # fmt: skip

    def weigh(self) -> Record:
        """Macro F1 on validation texts of the first draw with each weight, at the plain arm's rate."""
        tried = {}
        for weight in WEIGHTS:
            tuned, _ = self._tuned(BALANCE, 0)
            try:
                trained = self._fit(tuned, BALANCE, 0, self.rates[MAIN[0].name], weight)
                tried[str(weight)] = {**self._validated(tuned, 0), **_summed(trained)}
            except ValueError as error:  # it has diverged
                tried[str(weight)] = {"macro_f1": 0.0, "error": str(error)}
            finally:
                remove(tuned, BALANCE)
        return {"task": self.task.name, "seed": 0, "weights": tried, "weight": float(_best(tried))}

    def run(self, arm: Arm, seed: int) -> Record:
        """Train an arm on a draw and measure it; where no learning rate is chosen, each is tried."""
        data = self.draw(seed)
        chosen = self.rates[arm.rates_of] if arm.rates_of else self.rates.get(arm.name, arm.rate)
        rates = LEARNING_RATES if chosen is None else (chosen,)
        weight = 0.0 if arm.losses == "plain" else _known(self.weight if arm.weight is None else arm.weight)
        tried: dict[str, Any] = {}
        kept: dict[str, tuple[dict[str, Tensor], Record]] = {}
        for rate in rates:
            began = time.perf_counter()
            tuned, block = self._tuned(arm, seed)
            try:
                trained = self._fit(tuned, arm, seed, rate, weight)
                seconds = time.perf_counter() - began
                tried[str(rate)] = self._validated(tuned, seed)
                kept[str(rate)] = state_of(tuned), {**_summed(trained), "seconds": seconds}
            except ValueError as error:  # it has diverged
                if len(rates) == 1:
                    raise
                tried[str(rate)] = {"macro_f1": -1.0, "error": str(error)}
            finally:
                remove(tuned, arm)
        best = _best(tried)
        state, summed = kept[best]
        tuned, block = self._tuned(arm, seed)
        try:
            put_back(tuned, state)
            test = self.examples(data.test)
            record = {
                **self._head(arm.name, seed),
                **self._measured(self._scores(tuned, test), test),
                **self._drift(tuned, data, test),
            }
        finally:
            remove(tuned, arm)
        count = sum(value.numel() for value in state.values())
        shares = [data.train.labels.count(name) / len(data.train) for name in self.labels.names]  # type: ignore[union-attr]
        return {
            **record, **summed, "validation": tried[best], "tried": tried, "learning_rate": float(best),
            "weight": weight, "block": None if arm.lora else block, "trained": count,
            "share": count / self.parameters, "training shares": shares,
        }  # fmt: skip

    def draw(self, seed: int) -> Draw:
        """A seed's draw."""
        if seed not in self._draws:
            self._draws[seed] = draw(self.task, seed)
        return self._draws[seed]

    def examples(self, records: Any) -> list[Example]:
        """Prompts and labels of texts."""
        return encode(records, self.tokenizer, self.labels, self.task.prompt, max_length=MOST_TOKENS)

    def place(self, arm: Arm, seed: int) -> int:
        """The block that an arm trains, counted in the whole model."""
        chosen = _known(self.block)
        if arm.place == "random":
            others = [block for block in range(1, self.blocks - 1) if block != chosen]
            return random.Random(f"{self.task.name}, {seed}").choice(others)
        return {"chosen": chosen, "first": 0, "last": self.blocks - 1}[arm.place]

    def _tuned(self, arm: Arm, seed: int) -> tuple[nn.Module, int]:
        """The model with the arm's adapter, and the block it trains; blocks below that are folded away."""
        if arm.lora:
            return adapted(self.model, arm, 0, seed), 0
        block = self.place(arm, seed)
        if block not in self._models:
            model = self._load()[0]
            self._models[block] = keep_upper(model, block, pad_token(self.tokenizer)) if block else model
        return adapted(self._models[block], arm, 0, seed), block

    def _fit(self, tuned: nn.Module, arm: Arm, seed: int, rate: float, weight: float) -> BalanceTraining:
        examples = self.examples(self.draw(seed).train)
        return fit(tuned, self.tokenizer, examples, self.labels, arm, rate=rate, weight=weight, seed=seed)

    def _validated(self, tuned: nn.Module, seed: int) -> Record:
        examples = self.examples(self.draw(seed).validation)
        found: Record = self._measured(self._scores(tuned, examples), examples)["measures"]
        return found

    def _scores(self, model: nn.Module, examples: list[Example]) -> Tensor:
        return predict(model, self.tokenizer, examples, self.labels, batch_size=EVALUATED)

    def _measured(self, scores: Tensor, examples: list[Example]) -> Record:
        gold = [example.labels[0] for example in examples]
        found = classification(decided(scores), gold, self.labels.names)
        return {"measures": found.to_dict(), "scores": _rounded(scores), "gold": gold}

    def _drift(self, model: nn.Module, data: Draw, test: list[Example]) -> Record:
        exits = early_exit(model, self.tokenizer, test[:EXITED], self.labels, batch_size=EVALUATED)
        value = perplexity(model, self.tokenizer, data.neutral.texts).value
        return {"perplexity": value, "early exit": exits.to_dict()}

    def _head(self, arm: str, seed: int) -> Record:
        return {"task": self.task.name, "seed": seed, "arm": arm}


def _known(value: Any) -> Any:
    if value is None:
        raise ValueError("expected a block and a weight, chosen before this arm is run; got none")
    return value


def _best(tried: dict[str, Any]) -> str:
    """The key with the largest macro F1, the first of equals."""
    return max(tried, key=lambda key: tried[key]["macro_f1"])


def _summed(trained: BalanceTraining) -> Record:
    """The course of a training, number by number."""
    return {
        name: [float(f"{getattr(step, name):.4g}") for step in trained.steps]
        for name in ("lm", "propensity", "discrimination")
    }


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in scores.tolist()]
