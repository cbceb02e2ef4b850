"""What ``fastproj layers`` and ``fastproj balance`` found, as the terminal, JSON and the page show it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastproj.balance.early_exit import EarlyExit
from fastproj.balance.interchange import LayerScores
from fastproj.balance.labels import LabelWords
from fastproj.balance.metrics import Classification

ZERO_SHOT = "zero-shot"
# How each method is told, by its name.
METHODS = {
    ZERO_SHOT: "the model as it is",
    "balance": "one block's writers and a vector in front of it, trained with the balance loss",
    "layer": "the same parameters, trained with the language model's loss alone",
    "lora": "LoRA on every linear layer of every block, trained with the language model's loss alone",
    "cc": "contextual calibration: scores less what prompts without content give; nothing is trained",
    "dc": "domain-context calibration: likewise, with random words of the training texts",
}


@dataclass(frozen=True)
class Row:
    """A method and what came out, on the test samples.

    Attributes:
        predicted: by label, the share of the samples that it was said of.
        perplexity: of held-out texts; None without any.
        trained: number of trained parameters, ``share`` of the model's own.
        learning_rate, seconds, losses: of the training; None where there was none. ``losses`` are means over
            the last tenth of the steps.
        validation: measures of validation samples by learning rate, or what went wrong.
        prior: of a calibration, by label.
    """

    method: str
    measures: Classification
    predicted: dict[str, float]
    perplexity: float | None
    trained: int = 0
    share: float = 0.0
    learning_rate: float | None = None
    seconds: float | None = None
    losses: dict[str, float] | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    prior: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "measures": self.measures.to_dict(), "perplexity": finite(self.perplexity)}


@dataclass(frozen=True, eq=False)
class Findings:
    """All that is known of a model and its labels; empty or None where it was not asked for.

    Attributes:
        model: folder or name, ``adapter`` that of its adapter.
        scores: the interchange ablation, of the samples with the ids ``ablated``.
        exit: label logits by layer of the model as it is, over ``exited`` samples; ``exits`` after training,
            by method.
        layer: the block that is trained, chosen by ``scores`` where there are any; ``training`` what else
            decides a training.
        rows: methods in order, the model as it is first; ``samples`` were tested, ``gold`` the share of them
            that has each label.
    """

    model: str
    labels: LabelWords
    template: str
    multi_label: bool
    adapter: str | None = None
    scores: LayerScores | None = None
    ablated: tuple[str, ...] = ()
    exit: EarlyExit | None = None
    exited: int = 0
    exits: dict[str, EarlyExit] = field(default_factory=dict)
    layer: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    samples: int = 0
    gold: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without any text of a sample."""
        labels = zip(self.labels.names, self.labels.words, self.labels.tokens, strict=True)
        return {
            "model": self.model,
            "adapter": self.adapter,
            "labels": [{"name": name, "word": word, "tokens": list(row)} for name, word, row in labels],
            "prompt": self.template,
            "multi_label": self.multi_label,
            "interchange": None if self.scores is None else {**self.scores.to_dict(), "ids": self.ablated},
            "early_exit": None if self.exit is None else {**self.exit.to_dict(), "samples": self.exited},
            "early_exit_after": {method: found.to_dict() for method, found in self.exits.items()},
            "layer": self.layer,
            "training": self.training,
            "samples": self.samples,
            "gold": self.gold,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class LayerRow:
    """A layer's stream: the block that gives it (None in front of the first), KL, and norms of its logits."""

    block: int | None
    best: bool
    mean: float | None
    error: float | None
    propensity: float | None
    discrimination: float | None


def layer_rows(findings: Findings) -> Iterator[LayerRow]:
    """A row in front of the first block and one for each block."""
    scores, exit = findings.scores, findings.exit
    size = exit.contain.shape[0] if exit is not None else 1 + len(scores.modules) if scores else 0
    means = [] if scores is None else scores.mean.tolist()
    errors = [] if scores is None else scores.standard_error.tolist()
    norms = [None] * size, [None] * size
    propensity, discrimination = (
        norms if exit is None else (exit.propensity.tolist(), exit.discrimination.tolist())
    )
    for layer in range(size):
        block = layer - 1
        known = scores is not None and block >= 0
        yield LayerRow(
            block if block >= 0 else None,
            scores is not None and block == scores.best,
            means[block] if known else None,
            errors[block] if known else None,
            propensity[layer],
            discrimination[layer],
        )


def layer_verdict(scores: LayerScores) -> str:
    """Which block's exchange moves the labels most, and how sure that is."""
    best, means, errors = scores.best, scores.mean, scores.standard_error
    text = f"Exchanging block {best} moves the labels most: KL {_plus(means[best], errors[best])} nats"
    if len(means) < 2:
        return f"{text}."
    order = means.argsort(descending=True).tolist()
    second = next(block for block in order if block != best)
    gap = scores.per_sample[:, best] - scores.per_sample[:, second]
    error = float(gap.std(0)) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
    verdict = (
        f"{text}; block {second} comes next, {_plus(float(gap.mean()), error)} below it on the same samples"
    )
    close = not math.isnan(error) and float(gap.mean()) < 2 * error
    return f"{verdict}: too close to tell the two apart." if close else f"{verdict}."


def row_verdicts(rows: tuple[Row, ...]) -> list[str]:
    """What each method did to the model's own numbers, a sentence each."""
    before, *others = rows
    return [_changes(before, row) for row in others]


def _changes(before: Row, row: Row) -> str:
    old, new = before.measures, row.measures
    text = (
        f"{row.method}: weighted F1 {old.weighted_f1:.3f} → {new.weighted_f1:.3f}, the worst label’s "
        f"{_worst(old)} → {_worst(new)}"
    )
    if before.perplexity is not None and row.perplexity is not None:
        text += f", perplexity {fluency(before.perplexity)} → {fluency(row.perplexity)}"
    return f"{text}."


def _worst(measures: Classification) -> str:
    """The worst F1 and the label it is of; how many more there are that have the same."""
    scores, support = measures.per_label_f1, measures.support
    alike = sum(scores[name] == measures.worst_f1 for name in scores if support[name])
    more = f" and {alike - 1} more" if alike > 1 else ""
    return f"{measures.worst_f1:.3f} ({measures.worst_label}{more})"


def fluency(perplexity: float | None) -> str:
    """A perplexity for reading; "–" where none was measured."""
    if perplexity is None:
        return "–"
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.3g}"


def finite(value: float | None) -> float | str | None:
    """A number for JSON: infinity as a string, NaN as None."""
    if value is None or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _plus(mean: Any, error: Any) -> str:
    value = f"{float(mean):.3g}"
    return value if math.isnan(float(error)) else f"{value} ± {float(error):.2g}"
