"""How strongly sentences activate a direction, in what modules read or write, or in the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import context_length, evaluating
from fastproj.latent.factors import STREAM, LatentFactors


@dataclass(eq=False)
class _Place:
    """Where activations x are taken, and what was found there: means of ``xᵀd``, and ``Σ|x|²``."""

    key: str
    name: str
    module: nn.Module
    directions: Tensor
    reads: bool
    means: dict[int, Tensor] = field(default_factory=dict)
    squares: float = 0.0
    tokens: int = 0

    def take(self, activations: Tensor, kept: Tensor, rows: Sequence[int]) -> None:
        """Add a batch: (B, T, d), (B·T, d), or (B, d) of one token; kept (B, T)."""
        width = self.directions.shape[0]
        if activations.shape[-1] != width:
            raise ValueError(
                f"expected activations of width {width} at {self.name!r}, got {activations.shape[-1]}"
            )
        wide = activations.float()
        if wide.dim() == 2 and wide.shape[0] == kept.shape[0]:
            wide, kept = wide[:, None], kept.new_ones(len(rows), 1)
        wide = torch.where(kept[..., None], wide.reshape(*kept.shape, width), 0.0)
        along = (wide @ self.directions.to(wide)).sum(1) / kept.sum(1, keepdim=True)
        self.means |= dict(zip(rows, along.cpu().double().unbind(0), strict=True))
        self.squares += float(wide.square().sum(dtype=torch.float64))
        self.tokens += int(kept.sum())

    def scores(self, sentences: int) -> Tensor:
        """(sentences, rank): means in units of the root mean square of |x|."""
        if len(self.means) < sentences:
            raise ValueError(f"the model does not run {self.name!r} on sentences")
        means = torch.stack([self.means[number] for number in range(sentences)])
        if not bool(torch.isfinite(means).all()):
            raise ValueError(f"the model gives NaN or Inf at {self.name!r}")
        return means / (self.squares / self.tokens) ** 0.5 if self.squares else means


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
    mean square, over all sentences at a place, makes early and late blocks count alike.

    The first token counts only where it is alone: it is [CLS], begin of text, or the word at which causal
    models park their attention, where the stream is many times as long as elsewhere and much the same in any
    sentence, so that means would tell short from long ones (Sun et al. 2024, "Massive Activations in Large
    Language Models").

    Raises ValueError for a sentence without tokens, a module that the model lacks or does not run, widths
    that do not fit, and NaN in the model.
    """
    places = _places(model, factors)
    rows = _encode(model, tokenizer, sentences)
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad_token(tokenizer)))
            kept = mask != 0
            kept[:, 0] = kept.sum(1) == 1
            with _taking(places, kept, chosen):
                model(input_ids=ids, attention_mask=mask)
    scores: dict[str, list[Tensor]] = {}
    for place in places:
        scores.setdefault(place.key, []).append(place.scores(len(rows)))
    return {key: torch.stack(found).mean(0) for key, found in scores.items()}


def _places(model: nn.Module, factors: LatentFactors) -> list[_Place]:
    reads = factors.side == "read"
    matrices = {key: basis.matrix for key, basis in factors.bases.items()}
    if factors.pool == "stream" and not reads:
        return [_Place(STREAM, name, block, matrices[STREAM], False) for name, block in blocks(model).items()]
    names = factors.modules if factors.pool == "stream" else factors.bases
    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(base.named_modules())
    places = []
    for name in names:
        if name not in modules:
            raise ValueError(f"expected a model with a module {name!r}, {type(base).__name__} has none")
        key = STREAM if factors.pool == "stream" else name
        places.append(_Place(key, name, modules[name], matrices[key], reads))
    return places


def _encode(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> list[list[int]]:
    length = context_length(model)
    rows: list[list[int]] = tokenizer(list(sentences), truncation=length is not None, max_length=length)[
        "input_ids"
    ]
    for sentence, row in zip(sentences, rows, strict=True):
        if not row:
            raise ValueError(f"expected sentences with tokens, got {sentence!r}")
    return rows


@contextmanager
def _taking(places: Sequence[_Place], kept: Tensor, rows: Sequence[int]) -> Iterator[None]:
    """While it holds, what the model gives goes to the places."""

    def taker(place: _Place) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            taken = inputs[0] if place.reads else output
            place.take(taken[0] if isinstance(taken, tuple) else taken, kept, rows)

        return hook

    handles = [place.module.register_forward_hook(taker(place)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
