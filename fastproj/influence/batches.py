"""Batches of samples of similar length under a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.methods.gce import IGNORE_INDEX

# What a sample may have for each token, and what padding has.
PER_TOKEN = {"attention_mask": 0, "token_type_ids": 0}


class TokenBatches:
    """Padded batches of at most ``max_tokens`` tokens, padding counted, longest samples first.

    Samples are mappings with ``input_ids`` and, where there are some, ``attention_mask`` (else all ones),
    ``token_type_ids``, ``labels`` (a list as long as the ids, or one class) and ``id``, else row numbers. The
    longest batch comes first, so that a batch that does not fit into memory is met at once. Iterating twice
    gives the same batches, as resuming needs it.

    Raises ValueError where there is no sample, a sample is empty, or the budget is not positive, and on
    iterating where a list is not as long as the ids.
    """

    def __init__(
        self,
        samples: Sequence[Mapping[str, Any]],
        *,
        pad_token_id: int,
        max_tokens: int = 4096,
        max_samples: int = 64,
    ) -> None:
        if max_tokens < 1 or max_samples < 1:
            raise ValueError(
                f"max_tokens and max_samples must be at least 1, got {max_tokens}, {max_samples}"
            )
        if not samples:
            raise ValueError("expected at least one sample, got none")
        lengths = [len(sample["input_ids"]) for sample in samples]
        if not all(lengths):
            raise ValueError(f"expected samples with input_ids, sample {lengths.index(0)} has none")
        self.samples = samples
        self.pad_token_id = pad_token_id
        self._batches = _batches(lengths, max_tokens, max_samples)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self._batches:
            yield self._collate(rows)

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        samples = [self.samples[row] for row in rows]
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "id": [str(sample.get("id", row)) for sample, row in zip(samples, rows, strict=True)],
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        }
        for key, value in PER_TOKEN.items():
            if key in samples[0]:
                batch[key] = _padded([self._per_token(row, key) for row in rows], value)
        if "labels" in samples[0]:
            if torch.as_tensor(samples[0]["labels"]).dim():
                batch["labels"] = _padded([self._per_token(row, "labels") for row in rows], IGNORE_INDEX)
            else:
                batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
        return batch

    def _per_token(self, row: int, key: str) -> Sequence[int]:
        values: Sequence[int] = self.samples[row][key]
        tokens = len(self.samples[row]["input_ids"])
        if len(values) != tokens:
            raise ValueError(
                f"expected {tokens} {key} in sample {row}, one for each token, got {len(values)}"
            )
        return values


def _batches(lengths: Sequence[int], max_tokens: int, max_samples: int) -> list[list[int]]:
    """Rows by falling length, cut where the longest times the number of rows would pass the budget."""
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        full = batches and (len(batches[-1]) == max_samples or longest * (len(batches[-1]) + 1) > max_tokens)
        if not batches or full:
            batches.append([])
            longest = lengths[row]
        batches[-1].append(row)
    return batches


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
