"""What sentences do along directions where a model reads or writes: means over tokens, place by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.architectures import blocks
from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import context_length, evaluating
from fastproj.latent.factors import STREAM, LatentFactors


@dataclass(eq=False)
class Place:
    """Where activations x are taken, and what was found there.

    Attributes:
        key: of the basis whose directions these are.
        name: of the module or block.
        module: itself.
        directions: (width, rank).
        reads: whether x is what the module reads, or what it gives.
        means: by sentence, means of ``xᵀd`` over the tokens that count, (rank,) fp64 on the CPU.
        squares, tokens: ``Σ|x|²`` over all tokens that count, and their number.
        distinct: whether x was ever another tensor than at the place before, with the same directions.
    """

    key: str
    name: str
    module: nn.Module
    directions: Tensor
    reads: bool
    means: dict[int, Tensor] = field(default_factory=dict)
    squares: float = 0.0
    tokens: int = 0
    distinct: bool = False

    def measured(self, activations: Tensor, kept: Tensor) -> _Batch:
        """Of (B, T, d), (B·T, d), or (B, d) of one token; kept (B, T) bool."""
        width = self.directions.shape[0]
        if activations.shape[-1] != width:
            raise ValueError(
                f"expected activations of width {width} at {self.name!r}, got {activations.shape[-1]}"
            )
        wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
        if wide.dim() == 2 and wide.shape[0] == kept.shape[0]:
            wide, kept = wide[:, None], kept.new_ones(len(kept), 1)
        wide = torch.where(kept[..., None], wide.reshape(*kept.shape, width), 0.0)
        along = (wide @ self.directions.to(wide)).sum(1) / kept.sum(1, keepdim=True)
        squares = float(wide.square().sum(dtype=torch.float64))
        return _Batch(along.cpu().double(), squares, int(kept.sum()))

    def add(self, batch: _Batch, rows: Sequence[int]) -> None:
        """Keep a batch's numbers, those of the sentences ``rows``."""
        self.means |= dict(zip(rows, batch.means.unbind(0), strict=True))
        self.squares += batch.squares
        self.tokens += batch.tokens

    def table(self) -> Tensor:
        """Means of all sentences in order, (sentences, rank)."""
        return torch.stack([self.means[number] for number in range(len(self.means))])


class _Batch(NamedTuple):
    """Of one batch at one place, see :class:`Place`; means (B, rank)."""

    means: Tensor
    squares: float
    tokens: int


def capture(
    model: nn.Module,
    tokenizer: Any,
    factors: LatentFactors,
    sentences: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None = None,
) -> dict[str, list[Place]]:
    """The places at which the directions of each basis are looked for, with what all sentences do there.

    Which places and which tokens count is told at :func:`fastproj.latent.activations.activation_difference`.

    Raises ValueError for a sentence without tokens, a module that the model lacks or does not run, and widths
    that do not fit.
    """
    places = _places(model, factors)
    rows = _encode(model, tokenizer, sentences, max_length)
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (part.to(device) for part in padded([rows[i] for i in chosen], pad_token(tokenizer)))
            kept = mask != 0
            kept[:, 0] = kept.sum(1) == 1
            with _taking(places, kept, chosen):
                model(input_ids=ids, attention_mask=mask)
            for place in places:
                if chosen[0] not in place.means:
                    raise ValueError(f"the model does not run {place.name!r} on sentences")
    found: dict[str, list[Place]] = {}
    for place in places:
        if place.distinct:
            found.setdefault(place.key, []).append(place)
    return found


def _places(model: nn.Module, factors: LatentFactors) -> list[Place]:
    reads = factors.side == "read"
    matrices = {key: basis.matrix for key, basis in factors.bases.items()}
    if factors.pool == "stream" and not reads:
        return [Place(STREAM, name, block, matrices[STREAM], False) for name, block in blocks(model).items()]
    names = factors.modules if factors.pool == "stream" else factors.bases
    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(base.named_modules())
    places = []
    for name in names:
        if name not in modules:
            raise ValueError(f"expected a model with a module {name!r}, {type(base).__name__} has none")
        key = STREAM if factors.pool == "stream" else name
        places.append(Place(key, name, modules[name], matrices[key], reads))
    return places


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
def _taking(places: Sequence[Place], kept: Tensor, rows: Sequence[int]) -> Iterator[None]:
    """While it holds, what the model reads and gives is measured at the places."""
    # The tensor itself is held, as one that is freed may leave its identity to the next.
    last: tuple[str, Tensor, _Batch] | None = None

    def taker(place: Place) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal last
            taken = inputs[0] if place.reads else output
            taken = taken[0] if isinstance(taken, tuple) else taken
            if last is None or not place.reads or last[0] != place.key or last[1] is not taken:
                last = place.key, taken, place.measured(taken, kept)
                place.distinct = True
            place.add(last[2], rows)

        return hook

    handles = [place.module.register_forward_hook(taker(place)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
