"""What is asked of a model: labels with a word each, a prompt, and the samples that a command was given."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastproj.architectures import ARCHITECTURES
from fastproj.balance.adapter import load_balance_adapter
from fastproj.balance.adapter_folder import VECTOR
from fastproj.balance.head import causal_model
from fastproj.balance.labels import LabelWords, label_words
from fastproj.balance.predict import decided
from fastproj.balance.prompts import SEPARATOR, Example, Prompt, encode
from fastproj.bias_diff import commands as shared
from fastproj.bias_diff.likelihood import context_length
from fastproj.bias_diff.records import Records, read_records
from fastproj.latent.adapter_file import read_config


@dataclass(frozen=True)
class Samples:
    """Records of a file that have labels, and how errors call the file."""

    source: str
    records: Records

    @classmethod
    def read(cls, option: str, path: Path, columns: Mapping[str, Any]) -> Samples:
        """Raises what :func:`read_records` does, and ValueError for a file without labels."""
        records = read_records(path, **columns)
        if records.labels is None:
            raise ValueError(f"{option} {path}: expected labels in a column 'label', or give --label-column")
        return cls(f"{option} {path}", records)

    def label_names(self, multi_label: bool) -> tuple[str, ...]:
        """Names of the labels, the most frequent first, of equals the one that comes first.

        Raises ValueError for lists of labels where there should be one each.
        """
        cells = [cell for cell in self.records.labels or () if cell is not None]
        lists = [cell for cell in cells if isinstance(cell, (list, tuple))]
        if lists and not multi_label:
            raise ValueError(
                f"{self.source}: expected one label a record, got {lists[0]}: give --multi-label"
            )
        return tuple(name for name, _ in Counter(_names(cells, multi_label)).most_common())


@dataclass(frozen=True)
class Labels:
    """Names of labels and the words that stand for them, a space in front."""

    names: tuple[str, ...]
    words: tuple[str, ...]

    @classmethod
    def of(cls, options: Sequence[str] | None, samples: Samples, multi_label: bool) -> Labels:
        """Of ``NAME`` and ``NAME=word``; without any of them those of the samples.

        Raises ValueError for an empty name or word, and for fewer than two labels.
        """
        given = list(options or samples.label_names(multi_label))
        parted = [option.partition("=") if options else (option, "", "") for option in given]
        names = tuple(name.strip() if options else name for name, _, _ in parted)
        words = [word if equals else name for name, equals, word in parted]
        for option, name, word in zip(given, names, words, strict=True):
            if not (name and word.strip()):
                raise ValueError(f"--label: expected NAME or NAME=word, got {option!r}")
        if len(names) < 2:
            raise ValueError(f"expected two labels or more, got {', '.join(names) or 'none'}")
        return cls(names, tuple(f" {word.strip()}" for word in words))


def read_prompt(template: str) -> Prompt:
    r"""A prompt in which ``\n`` is a new line.

    Raises ValueError for a template without one ``{text}``, without words behind it, or with a space at its
    end: a label's word brings its own.
    """
    try:
        prompt = Prompt(template.replace("\\n", "\n"))
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from error
    if not prompt.cue.strip():
        raise ValueError(f"--prompt: expected words behind {{text}} that ask for the label, got {template!r}")
    if prompt.cue != prompt.cue.rstrip():
        raise ValueError(f"--prompt: expected no space at the end, labels bring their own, got {template!r}")
    return prompt


@dataclass(frozen=True)
class Task:
    """Labels as a model's tokenizer has them, the prompt, and how long it may get."""

    labels: LabelWords
    prompt: Prompt
    multi_label: bool
    max_length: int

    @classmethod
    def of(
        cls, loaded: shared.Loaded, labels: Labels, prompt: Prompt, multi_label: bool, max_length: int
    ) -> Task:
        """Prompts leave room in the model's context for an answer and for the cue asked again behind it.

        Raises ValueError for words that do not tell labels apart by their first token.
        """
        words = label_words(loaded.tokenizer, labels.names, labels.words)
        _require_distinct_first(words)
        again = [f"{word}\n{prompt.cue.strip()}" for word in labels.words]
        longest = max(map(len, label_words(loaded.tokenizer, labels.names, again).tokens))
        limit = context_length(loaded.model)
        length = max_length if limit is None else min(max_length, limit - longest)
        return cls(words, prompt, multi_label, length)

    def examples(self, samples: Samples, tokenizer: Any) -> list[Example]:
        """Raises ValueError, naming file and record, for labels that are missing or not among the task's."""
        try:
            return encode(
                samples.records,
                tokenizer,
                self.labels,
                self.prompt,
                max_length=self.max_length,
                multi_label=self.multi_label,
            )
        except ValueError as error:
            raise ValueError(f"{samples.source}: {error}") from error

    def members(self, examples: Sequence[Example]) -> Tensor:
        """Which labels each example has, (N, C) bool."""
        held = torch.zeros(len(examples), len(self.labels), dtype=torch.bool)
        for row, example in enumerate(examples):
            held[row, list(example.labels)] = True
        return held

    def said(self, scores: Tensor) -> Tensor:
        """The labels that scores (N, C) speak for, (N, C) bool."""
        chosen = decided(scores, multi_label=self.multi_label)
        return chosen if self.multi_label else chosen[:, None] == torch.arange(scores.shape[1])


def drawn_evenly(examples: Sequence[Example], number: int, labels: int, seed: int) -> list[Example]:
    """At most ``number`` of the examples, drawn from one label after the other, in the order they came in.

    Only examples with some of the ``labels`` and not all of them: the others have no right or no wrong label
    to be led to. Raises ValueError where there are none such.
    """
    chance = random.Random(seed)
    left = [row for row, example in enumerate(examples) if 0 < len(example.labels) < labels]
    if not left:
        raise ValueError("expected a sample with some of the labels and not all of them, got none")
    chance.shuffle(left)
    queues = [iter([row for row in left if label in examples[row].labels]) for label in range(labels)]
    chosen: set[int] = set()
    while queues and len(chosen) < number:
        for queue in list(queues):
            row = next((row for row in queue if row not in chosen), None)
            if row is None:
                queues.remove(queue)
            elif len(chosen) < number:
                chosen.add(row)
    return [examples[row] for row in sorted(chosen)]


def load(
    name: str, adapter: Path | None = None, *, device: str | None, dtype: shared.Precision
) -> shared.Loaded:
    """A causal language model of :mod:`fastproj.architectures`, with any adapter of ``fastproj balance``.

    Raises ValueError for a model of another kind, before its weights are read, and as
    :func:`fastproj.bias_diff.commands.load_model` and :func:`fastproj.load_balance_adapter`.
    """
    _check_kind(name)
    balanced = adapter is not None and _has_vector(adapter)
    loaded = shared.load_model(
        name,
        None if balanced else adapter,
        shared.Loss.CAUSAL_LM,
        device=device,
        dtype=dtype,
        trainable=False,
    )
    causal_model(loaded.model)
    if adapter is None or not balanced:
        return loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for who runs a command
        return replace(loaded, model=load_balance_adapter(loaded.model, adapter))


def _check_kind(name: str) -> None:
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except Exception:  # load_model says, in its words, what cannot be loaded
        return
    known = [known for known, architecture in ARCHITECTURES.items() if architecture.causal]
    if kind not in known:
        raise ValueError(f"model {name}: expected one of type {', '.join(known)}, got {kind}")


def _has_vector(adapter: Path) -> bool:
    """Whether an adapter has the vector that PEFT alone would pass over."""
    try:
        saved = read_config(adapter).get("modules_to_save")
    except (ValueError, OSError):  # load_model takes kinds that this does not, or says what is wrong
        return False
    return isinstance(saved, list) and any(str(module).endswith(f".{VECTOR}") for module in saved)


def _names(cells: Sequence[Any], multi_label: bool) -> Iterator[str]:
    for cell in cells:
        if not multi_label:
            yield str(cell)
        elif isinstance(cell, str):
            yield from (part.strip() for part in cell.split(SEPARATOR))
        else:
            yield from map(str, cell if isinstance(cell, (list, tuple)) else [cell])


def _require_distinct_first(labels: LabelWords) -> None:
    owners: dict[int, str] = {}
    for name, token in zip(labels.names, labels.first, strict=True):
        if token in owners:
            raise ValueError(
                f"the words of labels {owners[token]!r} and {name!r} begin with the same token: give one of "
                "them another word, as --label NAME=word"
            )
        owners[token] = name
