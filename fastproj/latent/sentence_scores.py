"""How strongly sentences activate a direction, in what modules read or write, or in the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.latent._capture import Place, capture
from fastproj.latent.factors import LatentFactors


def sentence_scores(
    model: nn.Module,
    tokenizer: Any,
    factors: LatentFactors,
    sentences: Sequence[str],
    *,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """``Σ_t x_tᵀd / (T √E|x|²)`` of each sentence, by key of the bases, (sentences, rank) fp64.

    With pool="module", x is what the module reads or writes, by the side; with pool="stream" what blocks give
    or, on the read side, what each pooled module reads, and the score is the mean over these places. The root
    mean square, over all sentences at a place, makes early and late blocks count alike. Which modules are one
    place, and that first tokens are left out, is as in
    :func:`fastproj.latent.activations.activation_difference`.

    Raises ValueError for a sentence without tokens, a module that the model lacks or does not run, widths
    that do not fit, and NaN in the model.
    """
    found = capture(model, tokenizer, factors, sentences, batch_size=batch_size)
    return {key: torch.stack([_scores(place) for place in places]).mean(0) for key, places in found.items()}


def _scores(place: Place) -> Tensor:
    """(sentences, rank): means in units of the root mean square of |x|."""
    means = place.table()
    if not bool(torch.isfinite(means).all()):
        raise ValueError(f"the model gives NaN or Inf at {place.name!r}")
    return means / (place.squares / place.tokens) ** 0.5 if place.squares else means
