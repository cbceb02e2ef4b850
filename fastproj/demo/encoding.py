"""Texts as token ids, encoded once for all runs, and batches of texts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.demo.injection import group_ids

# Batches are cut from pools of this many batches sorted by length: less padding, and still a shuffle.
POOL_BATCHES = 8


@dataclass(frozen=True)
class Encoded:
    """N samples ready to be batched.

    Attributes:
        ids: (N, L) int64 token ids, padded on the right.
        lengths: (N,) int64 numbers of tokens.
        labels: (N,) int64 class ids.
        carriers: (N,) bool, whether the sample carries the planted token.
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor
    carriers: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def groups(self) -> Tensor:
        """(N,) int64 group of each sample."""
        return group_ids(self.labels, self.carriers)

    def select(self, index: Tensor) -> Encoded:
        """The samples at ``index``."""
        return Encoded(self.ids[index], self.lengths[index], self.labels[index], self.carriers[index])

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the samples at ``index``, cut at the longest of them, and their labels."""
        lengths = self.lengths[index]
        ids = self.ids[index, : int(lengths.max())]
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}, self.labels[index]

    def to(self, device: torch.device | str) -> Encoded:
        """The same samples on ``device``; lengths stay on the CPU, where batches are formed."""
        return Encoded(self.ids.to(device), self.lengths, self.labels.to(device), self.carriers.to(device))


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and at full length."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def encode(
    tokenizer: Any,
    bodies: Sequence[Sequence[int]],
    labels: Tensor,
    carriers: Tensor,
    token: str,
    max_length: int,
) -> Encoded:
    """``[CLS] body [token] [SEP]`` for each sample, the body cut so that a carrier keeps its token.

    Args:
        tokenizer: of the model; a BERT-like one.
        bodies: token ids of the texts, from ``tokenize``.
        labels: (N,) int64.
        carriers: (N,) bool.
        token: text of the planted token.
        max_length: tokens of the longest sample, special ones included.
    """
    planted = tokenize(tokenizer, [token])[0]
    ids = torch.full((len(bodies), max_length), tokenizer.pad_token_id)
    lengths = torch.empty(len(bodies), dtype=torch.int64)
    for row, (body, carries) in enumerate(zip(bodies, carriers.tolist(), strict=True)):
        tail = [*planted, tokenizer.sep_token_id] if carries else [tokenizer.sep_token_id]
        sequence = [tokenizer.cls_token_id, *body[: max_length - 1 - len(tail)], *tail]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        lengths[row] = len(sequence)
    return Encoded(ids, lengths, labels, carriers)


def training_batches(lengths: Tensor, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` index tensors (batch_size,), epoch after epoch without replacement, like lengths together.

    Raises:
        ValueError: fewer samples than one batch.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"training: expected at least {batch_size} samples, got {len(lengths)}")
    generator = torch.Generator().manual_seed(seed)
    produced = 0
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        for pool in order.split(POOL_BATCHES * batch_size):
            batches = [b for b in pool[lengths[pool].argsort()].split(batch_size) if len(b) == batch_size]
            for position in torch.randperm(len(batches), generator=generator).tolist():
                if produced == steps:
                    return
                yield batches[position]
                produced += 1


def evaluation_batches(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Index tensors that cover every sample once, in order of length."""
    yield from lengths.argsort().split(batch_size)
