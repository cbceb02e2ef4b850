"""The interchange ablation as its definition has it, run by run: what the fast path must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.balance.interchange import (
    InterchangePair,
    LayerScores,
    attention_writers,
    check_ablation,
    divergences,
)
from fastproj.balance.labels import LabelWords
from fastproj.bias_diff.likelihood import evaluating

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


def naive_interchange(
    model: nn.Module, samples: Sequence[InterchangePair], labels: LabelWords
) -> LayerScores:
    """As :func:`fastproj.balance.interchange.interchange_ablation`, by L + 2 whole runs for each sample.

    No cache, no batch, no padding, and the model's own logits.
    """
    writers = attention_writers(model)
    check_ablation(model, samples, labels)
    scores = []
    with evaluating(model) as device:
        for number, pair in enumerate(samples):
            answers = _runs(model, list(writers.values()), pair, device)
            scores.append(divergences(answers[:, list(labels.first)], number))
    return LayerScores(torch.stack(scores), tuple(writers))


def _runs(
    model: nn.Module, writers: Sequence[nn.Module], pair: InterchangePair, device: torch.device
) -> Tensor:
    """Logits at the end of the gold run and of those patched at each block, (L + 1, vocabulary)."""
    gold, biased = (torch.tensor([list(run)], device=device) for run in (pair.gold, pair.biased))
    last = pair.exchanged
    given: dict[nn.Module, Tensor] = {}

    def keep(writer: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
        given[writer] = output[:, -last:].clone()

    def patch(writer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :-last], given[writer]], 1)

    _hooked(model, biased, writers, keep)
    answers = [_hooked(model, gold, [], keep)]
    answers += [_hooked(model, gold, [writer], patch) for writer in writers]
    return torch.stack(answers)


def _hooked(model: nn.Module, ids: Tensor, writers: Sequence[nn.Module], hook: Hook) -> Tensor:
    """The last position's logits of a run with a hook on some modules."""
    handles = [writer.register_forward_hook(hook) for writer in writers]
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
