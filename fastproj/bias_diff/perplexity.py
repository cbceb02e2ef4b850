"""Perplexity of a causal language model on held-out texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastproj.bias_diff.encoding import pad_token
from fastproj.bias_diff.likelihood import context_length, log_likelihoods, model_kind, started


@dataclass(frozen=True)
class Perplexity:
    """``exp(−log_likelihood / tokens)``, and the two it comes from."""

    log_likelihood: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity; infinite where it passes the range of fp64."""
        mean = -self.log_likelihood / self.tokens
        return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """``exp(−Σ log p(x_t | x_{<t}) / number of tokens)`` over the tokens of all texts together.

    Every text begins anew, its first token predicted after the tokenizer's begin (or end) of text; without
    either it does not count. A text of more than ``context`` tokens (by default the model's) is read in
    windows ``stride`` tokens apart (by default half of it), each token scored in the first that has it.

    Raises ValueError where the model is not causal, there is no text or no token to score, or not
    1 ≤ stride < context.
    """
    if model_kind(model) != "causal":
        raise ValueError("perplexity needs a causal language model, got a masked one")
    if not texts:
        raise ValueError("expected at least one text, got none")
    rows = started(tokenizer, texts)
    if context is None:
        context = context_length(model) or max(2, *map(len, rows))
    if stride is None:
        stride = max(1, context // 2)
    if not 1 <= stride < context:
        raise ValueError(f"expected 1 <= stride < context, got stride {stride} and context {context}")
    spans = [(row, *span) for row in rows for span in windows(len(row), context, stride)]
    tokens = sum(end - first for _, _, first, end in spans)
    if not tokens:
        raise ValueError("expected texts with at least one token to score, got none")
    sums = log_likelihoods(
        model,
        [row[begin:end] for row, begin, _, end in spans],
        [first - begin for _, begin, first, _ in spans],
        pad=pad_token(tokenizer),
        batch_size=batch_size,
    )
    return Perplexity(float(sums.sum()), tokens)


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows over a row, whose token 0 is never scored."""
    first = 1
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        if first < end:
            yield begin, first, end
            first = end
        if end == length:
            return
