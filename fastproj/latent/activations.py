"""How far a direction tells sentences with a factor from sentences without it, in a model's activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.latent._capture import capture
from fastproj.latent.factors import LatentFactors

# A spread this small beside the values themselves is the rounding of fp32.
_ROUNDING = 1e-6


def activation_difference(
    model: nn.Module,
    tokenizer: Any,
    factors: LatentFactors,
    with_factor: Sequence[str],
    without: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Cohen's d along each direction: ``(z̄₁ − z̄₀)/s``, ``s² = ((n₁−1)s₁² + (n₀−1)s₀²)/(n₁+n₀−2)``.

    z of a sentence is the mean of ``xᵀd`` over its tokens. With pool="module", x is what the module reads or
    writes, by the side. With pool="stream" it is the residual stream that blocks give, or on the read side
    what each pooled module reads; there z is standardised over all sentences at each place, then averaged
    over places, so that late blocks, where the stream is large, do not drown the others. Pooled modules that
    read one tensor in turn, as layers of queries, keys and values do, are one place. The sign is that of the
    direction, which is arbitrary. Where no sentence differs from others, 0.

    The first token counts only where it is alone: it is [CLS], begin of text, or the word at which causal
    models park their attention, where the stream is many times as long as elsewhere and much the same in any
    sentence, so that means would tell short from long ones (Sun et al. 2024, "Massive Activations in Large
    Language Models").

    Args:
        model: with the names that the factors have, with or without an adapter around it; the naive fine-tune
            or the model before it. Its mode is given back.
        tokenizer: its own.
        factors: the directions.
        with_factor, without: the user's probe sentences, at least two of each.
        batch_size: sentences in a batch, of like lengths.
        max_length: tokens of a sentence that count, special ones included; by default the model's context.

    Returns:
        fp64 by the keys of ``factors.bases``; ±inf where groups differ and neither varies.

    Raises:
        ValueError: fewer sentences, an empty one, a module that the model lacks, widths that do not fit, or
            NaN in the model.
    """
    groups = (len(with_factor), len(without))
    if min(groups) < 2:
        raise ValueError(f"expected at least two sentences with the factor and two without, got {groups}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    sentences = [*with_factor, *without]
    found = capture(model, tokenizer, factors, sentences, batch_size=batch_size, max_length=max_length)
    pooled = factors.pool == "stream"
    return {
        key: _cohens_d(key, torch.stack([place.table() for place in places], 1), groups[0], pooled)
        for key, places in found.items()
    }


def _cohens_d(key: str, values: Tensor, n_with: int, standardise: bool) -> Tensor:
    """Of (sentences, places, rank), those with the factor first: (rank,)."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the model gives NaN or Inf along the directions of {key!r}")
    if standardise:
        spread = values.std(0, keepdim=True)
        size = values.square().mean(0, keepdim=True).sqrt()
        centred = values - values.mean(0, keepdim=True)
        values = torch.where(spread > _ROUNDING * size, centred / spread, 0.0)
    scores = values.mean(1)
    first, second = scores[:n_with], scores[n_with:]
    difference = first.mean(0) - second.mean(0)
    pooled = (first.var(0) * (len(first) - 1) + second.var(0) * (len(second) - 1)) / (len(scores) - 2)
    return torch.where(difference == 0, 0.0, difference / pooled.sqrt())
