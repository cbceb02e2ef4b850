"""How good a fine-tuned model is, over everything and group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastproj.bias_diff.encoding import by_length, encode, pad_token, padded
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import Records

Measure = Literal["accuracy", "perplexity"]
MEASURES: dict[str, Measure] = {"classification": "accuracy", "causal-lm": "perplexity"}


@dataclass(frozen=True)
class Measured:
    """A score of held-out samples, and of each of their groups: accuracy in [0, 1], or perplexity."""

    measure: Measure
    overall: float
    groups: dict[str, float]

    @property
    def worst(self) -> float | None:
        """The worst group's: the lowest accuracy, the highest perplexity; None without groups."""
        if not self.groups:
            return None
        return (min if self.measure == "accuracy" else max)(self.groups.values())

    @property
    def goodness(self) -> float:
        """The overall score so that more is better."""
        return self.overall if self.measure == "accuracy" else -self.overall


def measure(
    model: nn.Module,
    tokenizer: Any,
    records: Records,
    *,
    task: str,
    groups: Sequence[str] | None = None,
    max_length: int = 128,
    batch_size: int = 32,
) -> Measured:
    """Accuracy of a classifier, perplexity of a causal language model; ``groups`` names each record's group.

    The model is left in the mode it was in. Raises ValueError for another task, a number of groups other than
    of records, and records that do not suit the task.
    """
    if task not in MEASURES:
        raise ValueError(f"task: expected one of {', '.join(MEASURES)}, got {task!r}")
    if groups is not None and len(groups) != len(records):
        raise ValueError(f"expected a group for each of {len(records)} records, got {len(groups)}")
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(groups or ()):
        rows_of.setdefault(group, []).append(row)
    training = model.training
    model.eval()
    try:
        if MEASURES[task] == "accuracy":
            right = _right(model, tokenizer, records, max_length, batch_size)
            found = {group: sum(right[row] for row in rows) / len(rows) for group, rows in rows_of.items()}
            return Measured("accuracy", sum(right) / len(right), dict(sorted(found.items())))
        whole = perplexity(model, tokenizer, records.texts, batch_size=batch_size).value
        found = {
            group: perplexity(
                model, tokenizer, [records.texts[row] for row in rows], batch_size=batch_size
            ).value
            for group, rows in rows_of.items()
        }
        return Measured("perplexity", whole, dict(sorted(found.items())))
    finally:
        model.train(training)


@torch.no_grad()
def _right(
    model: nn.Module, tokenizer: Any, records: Records, max_length: int, batch_size: int
) -> list[bool]:
    """Whether each record is classified as labelled."""
    samples = encode(records, tokenizer, task="classification", max_length=max_length)
    device = next(model.parameters()).device
    right = [False] * len(samples)
    for rows in by_length([len(sample["input_ids"]) for sample in samples], batch_size):
        ids, mask = padded([samples[row]["input_ids"] for row in rows], pad_token(tokenizer))
        chosen = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.argmax(-1)
        for row, label in zip(rows, chosen.tolist(), strict=True):
            right[row] = label == samples[row]["labels"]
    return right
