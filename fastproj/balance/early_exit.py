"""Where labels part: label logits read off every layer's stream, with a label and without it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks, final_layers
from fastproj.balance.head import answer_positions, causal_model, final_hidden, token_logits
from fastproj.balance.labels import LabelWords
from fastproj.balance.prompts import Example, batch
from fastproj.bias_diff.encoding import by_length, pad_token
from fastproj.bias_diff.likelihood import context_length, evaluating
from fastproj.reference.balance_loss import propensity_and_discrimination


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """Mean label logits by layer and label, see :func:`early_exit`.

    Attributes:
        contain: ``H^C``, (L + 1, C) fp64 on the CPU: over samples that have the label, NaN where none has.
        not_contain: ``H^N``, likewise over samples that have not, NaN where all have.
        names: of the C labels.
    """

    contain: Tensor
    not_contain: Tensor
    names: tuple[str, ...]

    @property
    def propensity(self) -> Tensor:
        """``‖H^C − mean‖₂ + ‖H^N − mean‖₂`` of each layer, (L + 1,), over labels that some sample has.

        As :func:`fastproj.balance_loss` has it for a batch of all samples.
        """
        return self._norms()[:, 0]

    @property
    def discrimination(self) -> Tensor:
        """``‖H^C − H^N‖₂`` of each layer, (L + 1,), over labels that some samples have and some have not."""
        return self._norms()[:, 1]

    def _norms(self) -> Tensor:
        means = torch.stack([self.contain, self.not_contain], 1)
        counted = ~means[0].isnan()
        return torch.stack([torch.stack(propensity_and_discrimination(own, counted)) for own in means])

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with None for NaN."""
        return {
            "names": list(self.names),
            "contain": _cells(self.contain),
            "not_contain": _cells(self.not_contain),
            "propensity": self.propensity.tolist(),
            "discrimination": self.discrimination.tolist(),
        }


def early_exit(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: LabelWords,
    *,
    batch_size: int = 8,
) -> EarlyExit:
    """Means of ``z_c = w_cᵀ norm(h_l)`` over samples that have label c, and over those that have not.

    h_l is the residual stream at the last token of the prompt: for l = 0 in front of the first block, else
    behind block l − 1. norm is what the model puts behind its last block, w_c the unembedding of the label's
    first token, so that the last layer's logits are the model's own.

    Args:
        model: a causal language model of the table in ``fastproj/architectures.py``, with or without
            adapters; run in evaluation mode, its own given back.
        tokenizer: its own.
        examples: prompts with the labels of each, see :func:`fastproj.balance.prompts.encode`.
        labels: C of them; their first tokens may be alike.
        batch_size: prompts in a batch, of like lengths.

    Raises:
        ValueError: no example, batch_size below 1, a model of another kind, a prompt that is empty or passes
            its context, or NaN or Inf in the model.

    Source: early-exit reading as nostalgebraist 2020, "interpreting GPT: the logit lens"; means over samples
    with and without a label as Zhao, Yang and Chen, ACL 2025.
    """
    causal_model(model)
    _check(model, examples, batch_size)
    has = torch.tensor([[label in example.labels for label in range(len(labels))] for example in examples])
    sums = torch.zeros(2, len(blocks(model)) + 1, len(labels), dtype=torch.float64)
    with evaluating(model) as device:
        for chosen in by_length([len(example.prompt) for example in examples], batch_size):
            ids, mask = batch([examples[i] for i in chosen], pad_token(tokenizer), device)
            logits = _logits(model, ids, mask, labels)
            if not bool(torch.isfinite(logits).all()):
                names = ", ".join(repr(examples[i].id) for i in sorted(chosen))
                raise ValueError(f"the model gives NaN or Inf among the examples {names}")
            members = has[chosen]
            sums += torch.stack([(logits * kind).sum(1) for kind in (members, ~members)])
    counts = torch.stack([has.sum(0), (~has).sum(0)]).double()
    # 0/0 is NaN: a label that no sample has, or that all have.
    contain, not_contain = sums / counts[:, None]
    return EarlyExit(contain, not_contain, labels.names)


def _check(model: nn.Module, examples: Sequence[Example], batch_size: int) -> None:
    if not examples:
        raise ValueError("expected at least one example, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    limit = context_length(model)
    for example in examples:
        length = len(example.prompt)
        if not length or (limit is not None and length > limit):
            raise ValueError(f"expected a prompt of 1 to {limit} tokens, got {length} in {example.id!r}")


def _logits(model: nn.Module, ids: Tensor, mask: Tensor, labels: LabelWords) -> Tensor:
    """Label logits from every layer's stream, (L + 1, B, C) fp64 on the CPU."""
    with _streams(model, answer_positions(mask)) as taken:
        final_hidden(model, ids, mask, use_cache=False)
    end = torch.stack(taken)
    for layer in final_layers(model):
        end = layer(end)
    return token_logits(model, end, labels.first).cpu().double()


@contextmanager
def _streams(model: nn.Module, positions: Tensor) -> Iterator[list[Tensor]]:
    """While it holds, each run adds the stream at its rows' positions, (B, d), in front and behind blocks."""
    taken: list[Tensor] = []
    rows = torch.arange(len(positions), device=positions.device)

    def take(stream: Tensor) -> None:
        taken.append(stream[rows, positions].to(positions.device))

    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(inputs[0] if inputs else named["hidden_states"])

    def behind(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    every = list(blocks(model).values())
    # In front of anything that an adapter adds to the first block's input.
    handles = [every[0].register_forward_pre_hook(before, prepend=True, with_kwargs=True)]
    handles += [block.register_forward_hook(behind) for block in every]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _cells(table: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in table.tolist()]
