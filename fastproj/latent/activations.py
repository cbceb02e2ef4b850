"""How far a direction tells sentences with a factor from sentences without it, in a model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import context_length, evaluating
from fastproj.latent.factors import STREAM, LatentFactors
from fastproj.reference.basis import Basis

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
    over places, so that late blocks, where the stream is large, do not drown the others. The sign is
    that of the direction, which is arbitrary. Where no sentence differs from others, 0.

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
    places = _places(model, factors)
    rows = _encode(model, tokenizer, [*with_factor, *without], max_length)
    means: dict[str, list[Tensor]] = {key: [torch.empty(0)] * len(rows) for key in factors.bases}
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad_token(tokenizer)))
            for key, found in _projected(model, places, ids, mask).items():
                for number, values in zip(chosen, found.unbind(0), strict=True):
                    means[key][number] = values
    pooled = factors.pool == "stream"
    return {key: _cohens_d(key, torch.stack(values), groups[0], pooled) for key, values in means.items()}


@dataclass(frozen=True, eq=False)
class _Place:
    """Where activations are taken: what a module reads or gives, and the directions there."""

    key: str
    name: str
    module: nn.Module
    basis: Basis
    reads: bool

    def projections(self, activations: Tensor, mask: Tensor) -> Tensor:
        """Means of ``xᵀd`` over a sentence's tokens, (B, rank), of (B, T, d), (B·T, d), or (B, d) of one."""
        if activations.shape[-1] != self.basis.dimension:
            raise ValueError(
                f"expected activations of width {self.basis.dimension} at {self.name!r}, got "
                f"{activations.shape[-1]}"
            )
        wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
        along = wide @ self.basis.matrix.to(wide)
        if along.dim() == 2 and along.shape[0] == mask.shape[0]:
            return along
        kept = mask.unsqueeze(-1) != 0
        return torch.where(kept, along.reshape(*mask.shape, -1), 0.0).sum(1) / kept.sum(1)


def _places(model: nn.Module, factors: LatentFactors) -> list[_Place]:
    reads = factors.side == "read"
    if factors.pool == "stream" and not reads:
        basis = factors.bases[STREAM]
        return [_Place(STREAM, name, block, basis, False) for name, block in blocks(model).items()]
    keys = {name: STREAM if factors.pool == "stream" else name for name in factors.modules}
    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(base.named_modules())
    missing = [name for name in keys if name not in modules]
    if missing:
        raise ValueError(f"expected a model with a module {missing[0]!r}, {type(base).__name__} has none")
    return [_Place(key, name, modules[name], factors.bases[key], reads) for name, key in keys.items()]


def _encode(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], max_length: int | None
) -> list[list[int]]:
    context = context_length(model)
    length = min((n for n in (max_length, context) if n is not None), default=None)
    rows: list[list[int]] = tokenizer(list(sentences), truncation=length is not None, max_length=length)[
        "input_ids"
    ]
    for sentence, row in zip(sentences, rows, strict=True):
        if not row:
            raise ValueError(f"expected sentences with tokens, got {sentence!r}")
    return rows


@contextmanager
def _captured(places: Sequence[_Place], mask: Tensor) -> Iterator[dict[int, Tensor]]:
    """Projections at each place, by its number, filled while the model runs."""
    found: dict[int, Tensor] = {}

    def hook_of(number: int, place: _Place) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            taken = inputs[0] if place.reads else output
            found[number] = place.projections(taken[0] if isinstance(taken, tuple) else taken, mask)

        return hook

    handles = [place.module.register_forward_hook(hook_of(n, place)) for n, place in enumerate(places)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _projected(model: nn.Module, places: Sequence[_Place], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """(B, places, rank) by key, fp64 on the CPU."""
    with _captured(places, mask) as found:
        model(input_ids=ids, attention_mask=mask)
    by_key: dict[str, list[Tensor]] = {}
    for number, place in enumerate(places):
        if number not in found:
            raise ValueError(f"the model does not run {place.name!r} on sentences")
        by_key.setdefault(place.key, []).append(found[number].cpu().double())
    return {key: torch.stack(values, 1) for key, values in by_key.items()}


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
