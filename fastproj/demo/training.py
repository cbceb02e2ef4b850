"""One run: MiniLM with LoRA fine-tuned by one method under one seed, and what it did, as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.demo.data import Split, find_model, load_splits
from fastproj.demo.encoding import Encoded, encode, evaluation_batches, tokenize, training_batches
from fastproj.demo.injection import GROUPS, TEST_INJECTION, TRAIN_INJECTION, Injection, choose_carriers
from fastproj.demo.methods import Method, Outcome, attach

# Raised when a change of code changes results, so that a resumed study never mixes the two.
FORMAT = 1
# Validation and test carry their token on the same samples in every run: methods and seeds meet one test set.
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class TrainingConfig:
    """Everything but method and seed that decides a run.

    Attributes:
        schedule: ``"linear"`` decay of the learning rate to zero, or ``"constant"``.
        eval_every: steps between points of the accuracy curve, 0 for none.
        curve_samples: validation samples, drawn evenly from the groups, that the curve uses.
        device: where to train.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-3
    schedule: str = "linear"
    weight_decay: float = 0.01
    max_length: int = 48
    rank: int = 8
    lora_alpha: int = 16
    targets: tuple[str, ...] = ("query", "value")
    train_injection: Injection = TRAIN_INJECTION
    test_injection: Injection = TEST_INJECTION
    eval_every: int = 50
    curve_samples: int = 256
    device: str = "cpu"


@dataclass(frozen=True)
class GroupCounts:
    """Samples and correct predictions of each group, in the order of ``GROUPS``."""

    count: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def overall(self) -> float:
        """Share of correct predictions."""
        return sum(self.correct) / sum(self.count)

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Share of correct predictions in each group; NaN for an empty one."""
        return tuple(c / n if n else float("nan") for c, n in zip(self.correct, self.count, strict=True))

    @property
    def worst(self) -> float:
        """Least accuracy of a group that has samples."""
        return min(c / n for c, n in zip(self.correct, self.count, strict=True) if n)


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        method, settings, seed, config: what was run; ``method`` is the name it was asked for by.
        trace: per step ``loss``, ``cosine``, ``bias_share`` (means over segments; None where unknown) and the
            mean of p_y^q over samples whose token agrees with the label (``weight_aligned``), contradicts it
            (``weight_conflicting``), or is absent (``weight_plain``).
        curve: (step, counts) on the validation subset.
        validation, test: counts at the end.
        seconds: of the training loop without evaluation.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    config: dict[str, Any]
    trace: dict[str, list[float | None]]
    curve: tuple[tuple[int, GroupCounts], ...]
    validation: GroupCounts
    test: GroupCounts
    seconds: float

    def to_json(self) -> str:
        """The run as strict JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> RunResult:
        """The run that ``to_json`` wrote."""
        raw = json.loads(text)
        raw["curve"] = tuple((step, _counts(counts)) for step, counts in raw["curve"])
        return RunResult(**{**raw, "validation": _counts(raw["validation"]), "test": _counts(raw["test"])})


@dataclass
class Trace:
    """Per-step records, kept on the device until the run is over so that no step waits for it."""

    records: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, outcome: Outcome, labels: Tensor, carriers: Tensor, target: int) -> None:
        """Record one step of a batch."""
        record = {"loss": outcome.loss}
        if outcome.cosine is not None and outcome.bias_share is not None:
            record["cosine"] = outcome.cosine.mean()
            record["bias_share"] = outcome.bias_share.mean()
        if outcome.weights is not None:
            agrees = labels == target
            for name, mask in (
                ("weight_aligned", carriers & agrees),
                ("weight_conflicting", carriers & ~agrees),
                ("weight_plain", ~carriers),
            ):
                record[name] = (outcome.weights * mask).sum() / mask.sum()
        self.records.append(record)

    def columns(self) -> dict[str, list[float | None]]:
        """One list per quantity, None where it was not known at a step."""
        names = ("loss", "cosine", "bias_share", "weight_aligned", "weight_conflicting", "weight_plain")
        return {name: [_number(record.get(name)) for record in self.records] for name in names}


def configuration(method: Method, seed: int, config: TrainingConfig) -> dict[str, Any]:
    """All that decides a run's result."""
    return {"format": FORMAT, "method": asdict(method), "seed": seed, "config": asdict(config)}


def run_key(method: Method, seed: int, config: TrainingConfig) -> str:
    """Hash of the full configuration: the name of the run's file."""
    text = json.dumps(configuration(method, seed, config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def run(
    name: str,
    method: Method,
    seed: int,
    config: TrainingConfig,
    cache: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> RunResult:
    """Train MiniLM by ``method`` under ``seed`` and evaluate it.

    The seed decides the initial adapter and head, which training samples carry the token and the order of
    batches; methods under one seed share all three. ``on_step(step, loss)`` is called after each step.
    """
    data = prepare(config, seed, cache)
    model = load_model(config, seed)
    trace, curve, seconds = train(model, data["train"], data["validation"], method, seed, config, on_step)
    return RunResult(
        method=name,
        settings=asdict(method),
        seed=seed,
        # Through JSON, so that a fresh run equals one read back.
        config=json.loads(json.dumps(asdict(config))),
        trace=trace,
        curve=curve,
        validation=evaluate(model, data["validation"]),
        test=evaluate(model, data["test"]),
        seconds=seconds,
    )


def train(
    model: nn.Module,
    samples: Encoded,
    validation: Encoded,
    method: Method,
    seed: int,
    config: TrainingConfig,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, list[float | None]], tuple[tuple[int, GroupCounts], ...], float]:
    """Fine-tune ``model`` in place; return the trace, the accuracy curve and the seconds of training."""
    optimizer, scheduler = _optimizer(model, config)
    subset = _even_subset(validation, config.curve_samples)
    trace, curve, seconds = Trace(), [], 0.0
    model.train()
    with attach(model, method) as step:
        batches = training_batches(samples.lengths, config.batch_size, config.steps, seed)
        for number, index in enumerate(batches, start=1):
            began = time.perf_counter()
            batch, labels = samples.batch(index)
            outcome = step(batch, labels)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            trace.add(outcome, labels, samples.carriers[index], config.train_injection.target)
            seconds += time.perf_counter() - began
            if on_step is not None:
                on_step(number, float(outcome.loss))
            if config.eval_every and number % config.eval_every == 0:
                curve.append((number, evaluate(model, subset)))
    return trace.columns(), tuple(curve), seconds


def evaluate(model: nn.Module, samples: Encoded, batch_size: int = 64) -> GroupCounts:
    """Count correct predictions in each group. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    right = torch.zeros(len(samples), dtype=torch.bool, device=samples.labels.device)
    with torch.inference_mode():
        for index in evaluation_batches(samples.lengths, batch_size):
            batch, labels = samples.batch(index)
            right[index] = model(**batch).logits.argmax(dim=-1) == labels
    model.train(training)
    groups = samples.groups
    count = torch.bincount(groups, minlength=len(GROUPS))
    correct = torch.bincount(groups[right], minlength=len(GROUPS))
    return GroupCounts(tuple(count.tolist()), tuple(correct.tolist()))


def prepare(config: TrainingConfig, seed: int, cache: Path | None = None) -> dict[str, Encoded]:
    """The three splits with the token planted: in training by ``seed``, elsewhere always alike."""
    tokenizer, splits, bodies = _tokenized(cache)
    encoded = {}
    for name, split in splits.items():
        injection = config.train_injection if name == "train" else config.test_injection
        labels = torch.tensor(split.labels)
        carriers = choose_carriers(labels, injection, seed if name == "train" else HELD_OUT_SEED)
        samples = encode(tokenizer, bodies[name], labels, carriers, injection.token, config.max_length)
        encoded[name] = samples.to(config.device)
    return encoded


def load_model(config: TrainingConfig, seed: int) -> nn.Module:
    """MiniLM-L6 with a new two-class head and LoRA, both drawn from ``seed``; without dropout."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    # The head is new by design: the report that it is missing from the checkpoint would only alarm.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _adapted(config)


def _adapted(config: TrainingConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        find_model(),
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(config.targets),
    )
    return get_peft_model(base, adapter).to(config.device)


@lru_cache(maxsize=1)
def _tokenized(cache: Path | None) -> tuple[Any, dict[str, Split], dict[str, list[list[int]]]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    splits = load_splits(cache)
    return tokenizer, splits, {name: tokenize(tokenizer, split.texts) for name, split in splits.items()}


def _optimizer(
    model: nn.Module, config: TrainingConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    factors: dict[str, Callable[[int], float]] = {
        "linear": lambda step: 1 - step / config.steps,
        "constant": lambda step: 1.0,
    }
    if config.schedule not in factors:
        raise ValueError(f"schedule: expected one of {', '.join(factors)}, got {config.schedule!r}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors[config.schedule])


def _even_subset(samples: Encoded, size: int) -> Encoded:
    groups = samples.groups
    share = max(1, size // len(GROUPS))
    return samples.select(
        torch.cat([torch.nonzero(groups == g).squeeze(1)[:share] for g in range(len(GROUPS))])
    )


def _counts(raw: dict[str, list[int]]) -> GroupCounts:
    return GroupCounts(tuple(raw["count"]), tuple(raw["correct"]))


def _number(value: Tensor | None) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def quick_config(config: TrainingConfig) -> TrainingConfig:
    """The same run cut to a fraction: for a first look, not for a result."""
    return replace(config, steps=80, eval_every=20, curve_samples=128)
