"""SEAT: association of two sets of target sentences with two sets of attributes, in an encoder's vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastproj.bias_diff.encoding import by_length, pad_token, padded
from fastproj.bias_diff.likelihood import evaluating

# More partitions than these are sampled, as in the published code.
MOST_PARTITIONS = 100_000
_PARTITIONS_AT_ONCE = 4096
# Keys of the published files.
_SETS = ("targ1", "targ2", "attr1", "attr2")


@dataclass(frozen=True)
class SeatTest:
    """Words or sentences: targets X and Y, attributes A and B. ValueError where one of the sets is empty."""

    first_targets: tuple[str, ...]
    second_targets: tuple[str, ...]
    first_attributes: tuple[str, ...]
    second_attributes: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = [len(texts) for texts in self.sets]
        if not all(sizes):
            raise ValueError(f"expected four sets that are not empty, got sizes {sizes}")

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """X, Y, A, B."""
        return (self.first_targets, self.second_targets, self.first_attributes, self.second_attributes)


@dataclass(frozen=True)
class SeatResult:
    """Attributes:
    effect_size: above 0 where X is nearer to A, and Y to B, than the other way round.
    p_value: one-sided, of that.
    partitions: how many were counted, the observed one among them.
    exact: whether these are all there are.
    """

    effect_size: float
    p_value: float
    partitions: int
    exact: bool


def read_seat_test(path: Path) -> SeatTest:
    """A test of the published layout: JSON objects targ1, targ2, attr1, attr2, each with a list ``examples``.

    Raises ValueError where the file is no such JSON, or one is missing, empty or holds other than texts.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    sets = [_examples(data, name) for name in _SETS]
    missing = [name for name, texts in zip(_SETS, sets, strict=True) if not texts]
    if missing:
        raise ValueError(f"{path}: expected {', '.join(_SETS)} with examples, got none for {missing[0]}")
    return SeatTest(*sets)


def _examples(data: Any, name: str) -> tuple[str, ...]:
    """The texts of a set; none where the layout is another."""
    own = data.get(name) if isinstance(data, dict) else None
    texts = own.get("examples") if isinstance(own, dict) else None
    whole = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return tuple(texts) if texts is not None and whole else ()


def seat(
    model: nn.Module,
    tokenizer: Any,
    test: SeatTest,
    *,
    pooling: Literal["first", "mean"] = "mean",
    batch_size: int = 32,
    seed: int = 0,
) -> SeatResult:
    """Effect size and p-value of a test in the vectors that an encoder gives its texts.

    ``pooling``: the last layer's first token, or the mean over a text's tokens. Raises ValueError as
    :func:`embed` and :func:`seat_of_vectors`. Source: May et al. 2019 (NAACL); Caliskan et al. 2017.
    """
    texts = [text for texts in test.sets for text in texts]
    vectors = embed(model, tokenizer, texts, pooling=pooling, batch_size=batch_size)
    x, y, a, b = vectors.split([len(texts) for texts in test.sets])
    return seat_of_vectors(x, y, a, b, seed=seed)


def seat_of_vectors(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, most_partitions: int = MOST_PARTITIONS, seed: int = 0
) -> SeatResult:
    """``d = (mean_x s − mean_y s) / std_{X∪Y} s``, ``s(w) = mean_a cos(w, a) − mean_b cos(w, b)``, and its p.

    The deviation is the sample's (n − 1). p is the share of the partitions of X ∪ Y into sets as large as X
    and Y whose difference of means is at least the observed one: of all of them where they are no more than
    ``most_partitions``, otherwise of as many drawn by ``seed`` and the observed one.

    x (n, d), y (m, d), a (k, d), b (l, d). Raises ValueError for other shapes, a vector of zeros or with a
    value that is not finite, fewer than two targets, and targets that are all associated alike.
    """
    x, y, a, b = (_unit(vectors, x.shape[-1]) for vectors in (x, y, a, b))
    targets = torch.cat([x, y])
    association = (targets @ a.T).mean(1) - (targets @ b.T).mean(1)
    if len(association) < 2 or float(association.std()) <= _rounding(association):
        raise ValueError(
            "expected targets that are associated differently: the effect size divides by their spread"
        )
    difference = association[: len(x)].mean() - association[len(x) :].mean()
    reached, count, exact = _reached(association, len(x), most_partitions, seed)
    return SeatResult(float(difference / association.std()), reached / count, count, exact)


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: Literal["first", "mean"] = "mean",
    batch_size: int = 32,
) -> Tensor:
    """One vector a text from the last hidden layer, (N, d) fp64. ValueError for another pooling."""
    if pooling not in ("first", "mean"):
        raise ValueError(f"pooling: expected first or mean, got {pooling!r}")
    rows = tokenizer(list(texts))["input_ids"]
    parts: dict[int, Tensor] = {}
    with evaluating(model) as device:
        for chosen in by_length([len(row) for row in rows], batch_size):
            ids, mask = (p.to(device) for p in padded([rows[i] for i in chosen], pad_token(tokenizer)))
            outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            hidden = outputs.hidden_states[-1].double()
            share = mask[:, :, None] / mask.sum(1)[:, None, None]
            vectors = hidden[:, 0] if pooling == "first" else (hidden * share).sum(1)
            parts.update(zip(chosen, vectors.cpu(), strict=True))
    return torch.stack([parts[i] for i in range(len(rows))])


def _reached(association: Tensor, size: int, most: int, seed: int) -> tuple[int, int, bool]:
    """Partitions that reach the observed one, those counted, and whether they are all.

    The sum over the first set decides: with the total fixed, the difference of means grows with it.
    """
    number = len(association)
    # Sums in another order round differently; the observed partition must reach itself.
    needed = association[:size].sum() - number * _rounding(association)
    total = math.comb(number, size)
    if total <= most:
        every = combinations(range(number), size)
        reached = 0
        while chunk := list(islice(every, _PARTITIONS_AT_ONCE)):
            reached += int((association[torch.tensor(chunk)].sum(1) >= needed).sum())
        return reached, total, True
    generator = torch.Generator().manual_seed(seed)
    reached = 1
    for start in range(0, most, _PARTITIONS_AT_ONCE):
        rows = min(_PARTITIONS_AT_ONCE, most - start)
        drawn = torch.rand(rows, number, generator=generator).argsort(1)[:, :size]
        reached += int((association[drawn].sum(1) >= needed).sum())
    return reached, most + 1, False


def _rounding(association: Tensor) -> float:
    """What cosines, which are up to 1, round by in fp64, over the sums taken of them."""
    return 8 * torch.finfo(association.dtype).eps


def _unit(vectors: Tensor, width: int) -> Tensor:
    """Rows divided by their norms, in fp64; scaled first, so that squares neither vanish nor overflow."""
    if vectors.dim() != 2 or vectors.shape[1] != width or not len(vectors):
        raise ValueError(f"expected vectors (n, {width}), got {tuple(vectors.shape)}")
    exact = vectors.detach().cpu().double()
    largest = exact.abs().amax(1, keepdim=True)
    if not bool(exact.isfinite().all()) or not bool((largest > 0).all()):
        raise ValueError("expected finite vectors that are not zero: a cosine divides by their norm")
    scaled = exact / largest
    return scaled / scaled.norm(dim=1, keepdim=True)
