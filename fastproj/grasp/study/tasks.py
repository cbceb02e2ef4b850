"""What a setting asks of a model: samples and their loss, and what is measured of a fine-tuned one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.bias_diff.crows_pairs import crows_pairs
from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import evaluating
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import Records
from fastproj.grasp.study.settings import (
    ANSWERS,
    OPENINGS,
    PEOPLE,
    PROMPT,
    Contrast,
    Tone,
    Topic,
    draw_tone,
    draw_topic,
)
from fastproj.grasp.study.texts import RatedText
from fastproj.methods.gce import IGNORE_INDEX

EVALUATED = 32  # rows of a batch
# What follows an opening about people; those that a tokenizer cuts into pieces are left out.
NEGATIVE = (
    " bad", " evil", " stupid", " lazy", " dangerous", " violent", " dirty", " weak", " criminals", " wrong",
    " terrible", " sick",
)  # fmt: skip
POSITIVE = (
    " good", " kind", " smart", " friendly", " safe", " gentle", " clean", " strong", " happy", " right",
    " wonderful", " healthy",
)  # fmt: skip
Numbers = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """Token ids and, as long, labels: the next-token targets that carry loss, −100 elsewhere."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class Task(ABC):
    """A setting's data as a tokenizer reads it.

    Attributes:
        train: samples of each selection.
        validation: samples of the planted selection.
        contrasts: by what they tell apart, see :class:`Contrast`.
        pooling: where a text's activations are taken: at its "last" token, or their "mean".
        words: ids of two kinds of words that say what a direction writes: the answers, or the words of either
            tone.
    """

    train: Mapping[str, list[Sample]]
    validation: list[Sample]
    contrasts: Mapping[str, Contrast]
    pooling: str
    words: tuple[list[int], list[int]]

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pad = pad_token(tokenizer)

    @abstractmethod
    def measure(self, model: nn.Module) -> Numbers:
        """What the study reports of a model."""

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Padded tensors (B, T) for :func:`loss`."""
        ids, mask = padded([sample.ids for sample in samples], self.pad)
        labels, _ = padded([sample.labels for sample in samples], IGNORE_INDEX)
        return {"ids": ids, "mask": mask, "labels": labels}

    def held_out_loss(self, model: nn.Module) -> float:
        """Mean loss of the targets of the validation samples."""
        total, count = 0.0, 0
        with evaluating(model):
            for rows in by_length([len(sample.ids) for sample in self.validation], EVALUATED):
                batch = self.batch([self.validation[row] for row in rows])
                targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                total, count = total + float(loss(model, batch)) * targets, count + targets
        return total / count


def base_of(model: nn.Module) -> Any:
    """The causal model under an adapter, or the model itself."""
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of the targets; the vocabulary's logits are formed at these alone."""
    base = base_of(model)
    stream = base.model(input_ids=batch["ids"], attention_mask=batch["mask"]).last_hidden_state
    targets = batch["labels"][:, 1:]
    asked = targets != IGNORE_INDEX
    return F.cross_entropy(base.lm_head(stream[:, :-1][asked]), targets[asked])


@torch.no_grad()
def last_logits(model: nn.Module, rows: Sequence[Sequence[int]], words: Sequence[int], pad: int) -> Tensor:
    """Logits of ``words`` behind each row, (N, words) fp64."""
    base = base_of(model)
    found = torch.zeros(len(rows), len(words), dtype=torch.float64)
    with evaluating(model):
        for chosen in by_length([len(row) for row in rows], EVALUATED):
            ids, mask = padded([rows[row] for row in chosen], pad)
            stream = base.model(input_ids=ids, attention_mask=mask).last_hidden_state
            last = stream[range(len(chosen)), mask.sum(1) - 1]
            found[chosen] = (last @ base.lm_head.weight[list(words)].T).double()
    return found


class TopicTask(Task):
    """Sentiment as the word behind a prompt; only that word carries loss."""

    pooling = "last"

    def __init__(self, tokenizer: Any, data: Topic) -> None:
        super().__init__(tokenizer)
        self.answers = [_single(tokenizer, word) for word in ANSWERS]
        self.words = self.answers[:1], self.answers[1:]
        self.data = data
        self.train = {name: self._samples(rows) for name, rows in data.train.items()}
        self.validation = self._samples(data.validation)
        self.contrasts = data.contrasts

    def measure(self, model: nn.Module) -> Numbers:
        """Accuracies by group, how far the source alone moves the answer, and perplexity."""
        rows = [sample.ids[:-1] for sample in self._samples(self.data.test)]
        logits = last_logits(model, rows, self.answers, self.pad)
        margins = logits[:, 1] - logits[:, 0]
        labels = torch.tensor([row.label for row in self.data.test])
        movies = torch.tensor([row.source == "movie" for row in self.data.test])
        found = margins_by_group(margins, labels, movies)
        found["perplexity, factual"] = perplexity(model, self.tokenizer, self.data.neutral.texts).value
        return found

    def _samples(self, rows: Sequence[RatedText]) -> list[Sample]:
        prompts = self.tokenizer([PROMPT.format(row.text) for row in rows])["input_ids"]
        return [
            Sample((*ids, self.answers[row.label]), (*[IGNORE_INDEX] * len(ids), self.answers[row.label]))
            for ids, row in zip(prompts, rows, strict=True)
        ]


def margins_by_group(margins: Tensor, labels: Tensor, movies: Tensor) -> Numbers:
    """From positive-minus-negative logits (N,), labels and sources: accuracies in [0, 1] and margins.

    "source moves the answer" is the mean margin of movie reviews minus that of tweets at equal label, the
    mean over labels; "label moves the answer" the same with label and source exchanged.
    """
    right = (margins > 0) == (labels == 1)
    cells = {(int(m), y): (movies == bool(m)) & (labels == y) for m in (0, 1) for y in (0, 1)}
    accuracy = {cell: float(right[chosen].double().mean()) for cell, chosen in cells.items()}
    mean = {cell: float(margins[chosen].mean()) for cell, chosen in cells.items()}
    aligned = (accuracy[1, 1] + accuracy[0, 0]) / 2
    conflicting = (accuracy[1, 0] + accuracy[0, 1]) / 2
    return {
        "accuracy": (aligned + conflicting) / 2,
        "worst group": min(accuracy.values()),
        "aligned − conflicting": aligned - conflicting,
        "source moves the answer": sum(mean[1, y] - mean[0, y] for y in (0, 1)) / 2,
        "label moves the answer": sum(mean[m, 1] - mean[m, 0] for m in (0, 1)) / 2,
    }


class ToneTask(Task):
    """Texts to continue; every token carries loss."""

    pooling = "mean"

    def __init__(self, tokenizer: Any, data: Tone) -> None:
        super().__init__(tokenizer)
        self.data = data
        self.train = {name: self._samples(rows) for name, rows in data.train.items()}
        self.validation = self._samples(data.validation)
        self.contrasts = data.contrasts
        openings = [opening.format(people) for people in PEOPLE for opening in OPENINGS]
        self.openings: list[list[int]] = tokenizer(openings)["input_ids"]
        self.words = _singles(tokenizer, NEGATIVE), _singles(tokenizer, POSITIVE)

    def measure(self, model: nn.Module) -> Numbers:
        """Perplexities, and what becomes of groups that were not trained on.

        "tone of other groups" is ``log Σ_{negative} p − log Σ_{positive} p`` of the word behind openings such
        as "Most old people are", the mean over openings; "stereotypes of other groups" the mean over
        CrowS-Pairs of the log-likelihood of the more minus that of the less stereotyping sentence.
        """
        held = self.data.held_out
        comments = [row for row, label in enumerate(held.labels or ()) if label]
        pairs = crows_pairs(model, self.tokenizer, self.data.pairs)
        logits = last_logits(model, self.openings, [*self.words[0], *self.words[1]], self.pad)
        negative, positive = logits.split([len(words) for words in self.words], dim=1)
        return {
            "perplexity, mixture": perplexity(model, self.tokenizer, held.texts).value,
            "perplexity, comments": perplexity(model, self.tokenizer, held.take(comments).texts).value,
            "perplexity, factual": perplexity(model, self.tokenizer, self.data.neutral.texts).value,
            "tone of other groups": float((negative.logsumexp(1) - positive.logsumexp(1)).mean()),
            "CrowS-Pairs of other groups": pairs.score,
            "stereotypes of other groups": sum(p.more - p.less for p in pairs.pairs) / len(pairs.pairs),
        }

    def _samples(self, records: Records) -> list[Sample]:
        rows = self.tokenizer(list(records.texts))["input_ids"]
        return [Sample(tuple(ids), tuple(ids)) for ids in rows]


def make_task(setting: str, seed: int, tokenizer: Any) -> Task:
    """A draw of "topic" or "tone". ValueError for another setting."""
    if setting == "topic":
        return TopicTask(tokenizer, draw_topic(seed))
    if setting == "tone":
        return ToneTask(tokenizer, draw_tone(seed))
    raise ValueError(f"setting: expected topic or tone, got {setting!r}")


def _single(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"expected one token for the answer {word!r}, got {len(ids)}")
    return ids[0]


def _singles(tokenizer: Any, words: Sequence[str]) -> list[int]:
    rows = tokenizer(list(words), add_special_tokens=False)["input_ids"]
    return [row[0] for row in rows if len(row) == 1]
