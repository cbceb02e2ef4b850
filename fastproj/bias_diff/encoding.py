"""Texts as token ids, and rows of ids as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastproj.bias_diff.records import Records

Task = Literal["causal-lm", "masked-lm", "classification"]
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "classification")
# Samples are drawn in random order, then sorted by length within this many batches, so that little is padded.
POOLED_BATCHES = 16


def encode(
    records: Records, tokenizer: Any, *, task: Task = "causal-lm", max_length: int = 128
) -> list[dict[str, Any]]:
    """One sample a record, ``{"id", "input_ids"}``, and ``"labels"``, a class index, for classification.

    Special tokens are the tokenizer's own; what passes ``max_length`` tokens is cut.

    Raises ValueError for an unknown task, labels that are missing or no class indices, and a text that leaves
    nothing to predict: fewer than two tokens for a causal model, none but special ones for the others.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    rows = tokenizer(list(records.texts), truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    for name, row in zip(records.ids, rows, strict=True):
        enough = len(row) >= 2 if task == "causal-lm" else any(token not in special for token in row)
        if not enough:
            raise ValueError(f"the text of {name!r} has too few tokens for {task}: {len(row)}")
    samples: list[dict[str, Any]] = [
        {"id": name, "input_ids": row} for name, row in zip(records.ids, rows, strict=True)
    ]
    if task == "classification":
        for sample, label in zip(samples, class_labels(records), strict=True):
            sample["labels"] = label
    return samples


def class_labels(records: Records) -> list[int]:
    """Labels as class indices. ValueError where one is missing or no whole number from 0."""
    labels = records.labels or (None,) * len(records)
    wrong = [i for i, label in enumerate(labels) if not str(label).isdecimal()]
    if wrong:
        raise ValueError(
            f"expected class indices 0, 1, … as labels, got {labels[wrong[0]]!r} for "
            f"{records.ids[wrong[0]]!r}"
        )
    return [int(str(label)) for label in labels]


def pad_token(tokenizer: Any) -> int:
    """Id to pad with, under a mask: the tokenizer's, or its end of text. ValueError where it has neither."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a padding nor an end token to pad with")


def mask_token(tokenizer: Any) -> int:
    """Id of the mask. ValueError where the tokenizer has none."""
    if tokenizer.mask_token_id is None:
        raise ValueError("a masked model's tokenizer must have a mask token, this one has none")
    return int(tokenizer.mask_token_id)


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows filled up at the right: ids (B, T) int64 and mask (B, T), 1 where an id is a row's own."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows by falling length, so that a batch that does not fit into memory is met at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def shuffled(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """One epoch: every row once, in random batches of rows of similar length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * POOLED_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        drawn = sorted(order[start : start + pool], key=lambda row: lengths[row])
        batches += [drawn[at : at + batch_size] for at in range(0, len(drawn), batch_size)]
    return [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
