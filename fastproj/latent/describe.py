"""What a direction is about, in words: tokens that it writes or reads, and sentences that activate it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastproj.latent.factors import LatentFactors
from fastproj.latent.sentence_scores import sentence_scores
from fastproj.latent.token_lens import standardised, token_scores

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
_WORD_START = ("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")


@dataclass(frozen=True)
class Token:
    """A token, its text as the tokenizer decodes it, and its score in standard deviations of all tokens."""

    id: int
    text: str
    score: float


@dataclass(frozen=True)
class Sentence:
    """A sentence by its number among those given, from 0, and its score in standard deviations of them."""

    number: int
    text: str
    score: float


@dataclass(frozen=True)
class Direction:
    """Direction ``number``, from 0, of basis ``key``: what lies on its positive and its negative side.

    ``no_tokens`` says why there are none; "" where there are. Each list begins with its strongest.
    """

    key: str
    number: int
    positive_tokens: tuple[Token, ...]
    negative_tokens: tuple[Token, ...]
    no_tokens: str
    positive_sentences: tuple[Sentence, ...]
    negative_sentences: tuple[Sentence, ...]


@dataclass(frozen=True)
class Description:
    """All directions, in the order of their bases; ``notes`` are whole sentences on what was left out."""

    side: str
    directions: tuple[Direction, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), allow_nan=False)


def describe(
    model: nn.Module,
    tokenizer: Any,
    factors: LatentFactors,
    *,
    sentences: Sequence[str] = (),
    top: int = 10,
    batch_size: int = 16,
) -> Description:
    """The tokens that each direction d writes, ``W_U (g ∘ d)``, or reads, ``ê (g ∘ d)``, and its sentences.

    **Write side.** What d adds to the logits, as a logit lens has it: W_U is the unembedding, g the gain of
    the last norm, and where that is a LayerNorm d loses its mean first, as the norm would take it. The length
    that the norm divides by is the same for all tokens. Raw logits, not cosines: they are what the softmax
    sees, and d promotes a token with a short row the less. Encoders have no unembedding, so their input
    embeddings stand in; layers of a masked head before its unembedding, and in Gemma 2 and 3 the norm behind
    each writer, are left out. ``notes`` says which of these holds.

    **Read side.** What of token e a module would read if the stream held e alone: ``ê`` is its input
    embedding at length one, without its mean in models with LayerNorm, as the norm in front of the module has
    it, and g that norm's gain; the mean gain where modules are pooled. Hence cosines, but for the gain.

    **Sentences** are ranked by :func:`fastproj.latent.sentence_scores.sentence_scores`, those above the mean
    on the positive side, others on the negative. Which side is which is arbitrary, as is the sign of d.

    Scores are standardised, over the vocabulary or the sentences: 6 means the same for any direction, and a
    shift of all logits, or of all sentences, says nothing. Directions of another space than the stream, such
    as those between the layers of an MLP or of queries, have no tokens; ``no_tokens`` says so.

    Args:
        model: the fine-tune, with its adapter or without, or the model before it, with the module names that
            the factors have. Its mode and hooks are given back; nothing needs a gradient.
        tokenizer: its own.
        factors: of :func:`fastproj.identify`.
        sentences: the user's, two or more; without any, none are ranked.
        top: at most how many tokens and sentences on each side.
        batch_size: sentences in a batch, of like lengths.

    Raises:
        ValueError: ``top`` or ``batch_size`` below 1; a single sentence, or one without tokens; a module that
            the model lacks; on the write side, an architecture that is not known; NaN in the model.
        TypeError: a string as ``sentences``.

    Source: the lens, nostalgebraist 2020, of weights, Dar et al. 2023 (arXiv:2209.02535); scores are ours.
    """
    _check(sentences, top, batch_size)
    embeddings: Any = model
    tokens = min(len(tokenizer), embeddings.get_input_embeddings().weight.shape[0])
    lens = token_scores(model, factors, tokens)
    reactions = {}
    if sentences:
        found = sentence_scores(model, tokenizer, factors, sentences, batch_size=batch_size)
        reactions = {key: standardised(scores) for key, scores in found.items()}
    directions = []
    for key in factors.bases:
        for number in range(factors.rank):
            words = [_tokens(tokenizer, side) for side in _ends(lens.scores.get(key), number, top)]
            texts = [_sentences(sentences, side) for side in _ends(reactions.get(key), number, top)]
            directions.append(
                Direction(
                    key,
                    number,
                    positive_tokens=words[0],
                    negative_tokens=words[1],
                    no_tokens=lens.missing.get(key, ""),
                    positive_sentences=texts[0],
                    negative_sentences=texts[1],
                )
            )
    return Description(factors.side, tuple(directions), lens.notes)


def _check(sentences: Sequence[str], top: int, batch_size: int) -> None:
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if isinstance(sentences, str):
        raise TypeError("sentences: expected a sequence of strings, got one string")
    if len(sentences) == 1:
        raise ValueError("sentences: expected two or more, to hold against each other, got one")


Scored = list[tuple[int, float]]


def _ends(scores: Tensor | None, number: int, top: int) -> tuple[Scored, Scored]:
    """The highest above zero and the lowest below it, (row, score), of column ``number``."""
    if scores is None:
        return [], []
    column = scores[:, number]
    sides = []
    for sign in (1, -1):
        found = (column * sign).topk(min(top, len(column)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        sides.append([(row, sign * score) for row, score in pairs if score > 0])
    return sides[0], sides[1]


def _tokens(tokenizer: Any, scored: Scored) -> tuple[Token, ...]:
    return tuple(Token(row, token_text(tokenizer, row), score) for row, score in scored)


def _sentences(sentences: Sequence[str], scored: Scored) -> tuple[Sentence, ...]:
    return tuple(Sentence(row, sentences[row], score) for row, score in scored)


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it is read, a space before it kept; as the vocabulary has it where it is no whole text."""
    written = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token]))
    if not text or _UNDECODABLE in text:
        return written
    return f" {text}" if written.startswith(_WORD_START) and not text.startswith(" ") else text
