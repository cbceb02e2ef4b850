"""Log-probabilities of tokens: under a causal model after those before, under a masked one with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastproj.bias_diff.encoding import by_length, padded
from fastproj.methods._edge_options import predicts_next_token
from fastproj.methods.gce import IGNORE_INDEX, cross_entropy

ModelKind = Literal["causal", "masked"]
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions")


def model_kind(model: nn.Module) -> ModelKind:
    """By the class under any adapter. ValueError for a model that is neither causal nor masked."""
    base: Any = model
    if hasattr(model, "get_base_model"):
        base = base.get_base_model()
    if predicts_next_token(model):
        return "causal"
    if type(base).__name__.endswith("ForMaskedLM"):
        return "masked"
    raise ValueError(
        f"expected a causal or masked language model (…ForCausalLM, …ForMaskedLM), got {type(base).__name__}"
    )


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model's configuration allows in a row; None where it names no such number."""
    config: Any = model.config
    for name in _CONTEXT_NAMES:
        length = getattr(config, name, None)
        if length is not None:
            return int(length)
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, the mode given back at the end; yields the model's device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training


def start_token(tokenizer: Any) -> int | None:
    """What a first token is predicted after: begin of text, or end of the one before; None without either."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return None


def started(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text behind :func:`start_token`, where there is one and the tokenizer adds none."""
    start = start_token(tokenizer)
    rows = tokenizer(list(texts))["input_ids"]
    return [row if start is None or row[:1] == [start] else [start, *row] for row in rows]


def token_log_probabilities(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """``log p(x_t | x_{<t})`` for t = 1 … T − 1, (B, T − 1), 0 where the token is padding.

    ids and mask (B, T), padded at the right; differentiable, fp32 or better.
    """
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return -cross_entropy(logits, labels, shift=True).terms


def log_likelihoods(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    pad: int,
    batch_size: int,
) -> Tensor:
    """``Σ_{t ≥ max(start, 1)} log p(x_t | x_{<t})`` of each row under a causal model, (N,) fp64.

    Raises ValueError for a row that is empty or longer than the model's context, and for NaN in the model.
    """
    _check_lengths(model, rows)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad))
            terms = token_log_probabilities(model, ids, mask).cpu().double()
            first = torch.tensor([[starts[i]] for i in chosen])
            counted = torch.arange(1, ids.shape[1]) >= first
            sums[chosen] = (terms * counted).sum(1)
    return _known(sums)


def masked_log_probabilities(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    positions: Sequence[int],
    targets: Sequence[int],
    *,
    pad: int,
    batch_size: int,
) -> Tensor:
    """``log p(target | row)`` at one position of each row, which holds the mask there, (N,) fp64.

    Raises ValueError for a row that is empty or longer than the model's context, and for NaN in the model.
    """
    _check_lengths(model, rows)
    found = torch.zeros(len(rows), dtype=torch.float64)
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad))
            logits = model(input_ids=ids, attention_mask=mask).logits
            asked = logits[range(len(chosen)), [positions[i] for i in chosen]].cpu().double()
            wanted = torch.tensor([[targets[i]] for i in chosen])
            found[chosen] = asked.log_softmax(-1).gather(1, wanted).squeeze(1)
    return _known(found)


def _known(values: Tensor) -> Tensor:
    unknown = int(values.isnan().sum())
    if unknown:
        raise ValueError(f"the model gives NaN for {unknown} of {len(values)} rows")
    return values


def _check_lengths(model: nn.Module, rows: Sequence[Sequence[int]]) -> None:
    limit = context_length(model)
    for number, row in enumerate(rows):
        if not row or (limit is not None and len(row) > limit):
            raise ValueError(f"expected 1 to {limit} tokens in a row, got {len(row)} in row {number}")
