"""Labels as a language model says them: the words behind a prompt, and their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What stands in front of a word when its tokens are taken, as a cue such as "Label:" does.
CONTEXT = ":"


@dataclass(frozen=True)
class LabelWords:
    """C labels, each with the word that stands for it and the word's tokens.

    Attributes:
        names: what the data call the labels.
        words: what the model says, as it is written behind the prompt: ``" joy"``.
        tokens: token ids of each word, one or more.

    Raises ValueError for no labels, lengths that differ, a word without tokens, and names or rows of tokens
    that occur twice.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        lengths = [len(self.names), len(self.words), len(self.tokens)]
        if not self.names or len(set(lengths)) > 1:
            raise ValueError(f"expected as many names as words and tokens, one at least, got {lengths}")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise ValueError(f"expected every label once, got {repeated[0]!r} more often")
        for name, word, row in zip(self.names, self.words, self.tokens, strict=True):
            if not row:
                raise ValueError(f"the word {word!r} of label {name!r} has no tokens")
        same = _clash(self.tokens)
        if same is not None:
            one, other = (self.names[label] for label in same)
            tokens = list(self.tokens[same[0]])
            raise ValueError(f"labels {one!r} and {other!r} have the same tokens, {tokens}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def first(self) -> tuple[int, ...]:
        """The first token of each word."""
        return tuple(row[0] for row in self.tokens)

    @property
    def distinct_first(self) -> bool:
        """Whether the first token alone tells the labels apart."""
        return _clash(self.first) is None

    def require_distinct_first(self) -> None:
        """ValueError, with two labels that share their first token, where there are such."""
        same = _clash(self.first)
        if same is not None:
            one, other = (self.words[label] for label in same)
            raise ValueError(
                f"the words {one!r} and {other!r} begin with the same token, {self.first[same[0]]}: choose "
                "other words, or form='mean'"
            )

    def index(self, name: str) -> int:
        """The number of a label, from 0. ValueError, with the known ones, for an unknown name."""
        if name not in self.names:
            raise ValueError(f"expected a label of {', '.join(self.names)}, got {name!r}")
        return self.names.index(name)


def label_words(tokenizer: Any, names: Sequence[str], words: Sequence[str] | None = None) -> LabelWords:
    """The labels with their words, by default a space and the name, and the words' tokens.

    Tokens are those that a word has behind a colon, taken from the tokens of both together. To most
    tokenizers that is the word alone; to those of sentencepiece, which put a space in front of every text,
    ``" joy"`` alone would be two spaces, ``["▁", "▁joy"]``, where behind a prompt it is ``["▁joy"]``. A word
    whose first characters would become one token with the colon is split alone. No special tokens are added.

    Raises ValueError as :class:`LabelWords`.
    """
    names = tuple(names)
    words = tuple(f" {name}" for name in names) if words is None else tuple(words)
    return LabelWords(names, words, tuple(_continuation(tokenizer, word) for word in words))


def _continuation(tokenizer: Any, word: str) -> tuple[int, ...]:
    context, both, alone = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (CONTEXT, CONTEXT + word, word)
    )
    return both[len(context) :] if both[: len(context)] == context else alone


def _clash(values: Sequence[Any]) -> tuple[int, int] | None:
    """The first two places with the same value; None where all differ."""
    seen: dict[Any, int] = {}
    for place, value in enumerate(values):
        if value in seen:
            return seen[value], place
        seen[value] = place
    return None
