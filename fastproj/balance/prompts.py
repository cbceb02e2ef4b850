"""Texts inside a prompt that asks for a label, as token ids, and rows of them as padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.balance.labels import LabelWords
from fastproj.bias_diff.encoding import padded
from fastproj.bias_diff.likelihood import start_token
from fastproj.bias_diff.records import Records

_PLACE = "{text}"
# Between the labels of a record that has several, where they are one string.
SEPARATOR = "|"


@dataclass(frozen=True)
class Prompt:
    """What stands around a text: its ``template`` has one ``{text}``, the answer follows at its end.

    Raises ValueError for a template without, or with more than one, ``{text}``.
    """

    template: str = "Text: {text}\nLabel:"

    def __post_init__(self) -> None:
        if self.template.count(_PLACE) != 1:
            raise ValueError(f"expected a template with one {_PLACE}, got {self.template!r}")

    @property
    def before(self) -> str:
        """What stands in front of the text."""
        return self.template.partition(_PLACE)[0]

    @property
    def cue(self) -> str:
        """What stands behind the text and asks for the label."""
        return self.template.partition(_PLACE)[2]

    def fill(self, text: str) -> str:
        """The prompt with this text; braces inside the text are left alone."""
        return self.before + text + self.cue


@dataclass(frozen=True)
class Example:
    """A prompt's token ids and its labels' numbers: one of them, or any number where labels are several."""

    id: str
    prompt: tuple[int, ...]
    labels: tuple[int, ...]


def encode(
    records: Records,
    tokenizer: Any,
    labels: LabelWords,
    prompt: Prompt,
    *,
    max_length: int = 128,
    multi_label: bool = False,
) -> list[Example]:
    """One example a record, its prompt of at most ``max_length`` tokens as :func:`prompt_tokens` has it.

    Labels of records are names, written as ``str`` writes them; with ``multi_label`` a list of them, or one
    string with ``|`` in between: an empty list is a record with no label.

    Raises ValueError for a record without known labels, an unknown name, and as :func:`prompt_tokens`.
    """
    cells = records.labels or (None,) * len(records)
    members = []
    for name, cell in zip(records.ids, cells, strict=True):
        try:
            members.append(_members(cell, labels, multi_label))
        except ValueError as error:
            raise ValueError(f"record {name!r}: {error}") from error
    rows = prompt_tokens(records.texts, tokenizer, prompt, max_length=max_length)
    return [Example(*parts) for parts in zip(records.ids, rows, members, strict=True)]


def prompt_tokens(
    texts: Sequence[str], tokenizer: Any, prompt: Prompt, *, max_length: int = 128
) -> list[tuple[int, ...]]:
    """Token ids of the prompt around each text, behind the tokenizer's start token where it has one.

    The prompt is split as a whole, without special tokens of the tokenizer's own. Of a prompt that passes
    ``max_length`` tokens the text's last tokens are left out; what stands around the text stays.

    Raises ValueError where no token of such a text would be left, and where the tokenizer, being no fast one,
    cannot tell which tokens are the text's.
    """
    start = start_token(tokenizer)
    head = () if start is None else (start,)
    room = max_length - len(head)
    rows = tokenizer([prompt.fill(text) for text in texts], add_special_tokens=False)["input_ids"]
    return [
        (*head, *(row if len(row) <= room else _cut(text, tokenizer, prompt, room)))
        for text, row in zip(texts, rows, strict=True)
    ]


def batch(examples: Sequence[Example], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Prompts filled up at the right with ``pad``: ids and mask (B, T) int64. ValueError for no examples."""
    if not examples:
        raise ValueError("expected at least one example, got none")
    ids, mask = padded([example.prompt for example in examples], pad)
    return ids.to(device), mask.to(device)


def _cut(text: str, tokenizer: Any, prompt: Prompt, room: int) -> list[int]:
    """The prompt's tokens without those last ones of the text that there is no room for."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"a prompt passes {room} tokens, and only a fast tokenizer can cut its text: got a "
            f"{type(tokenizer).__name__}; raise max_length"
        )
    found = tokenizer(prompt.fill(text), add_special_tokens=False, return_offsets_mapping=True)
    row: list[int] = found["input_ids"]
    begin = len(prompt.before)
    end = begin + len(text)
    own = [place for place, (_, stop) in enumerate(found["offset_mapping"]) if begin < stop <= end]
    excess = len(row) - room
    if excess >= len(own):
        raise ValueError(
            f"expected a max_length that leaves room for a text inside its prompt, which alone takes "
            f"{len(row) - len(own)} tokens, got room for {room}"
        )
    return row[: own[-excess]] + row[own[-1] + 1 :]


def _members(cell: Any, labels: LabelWords, multi_label: bool) -> tuple[int, ...]:
    if cell is None:
        raise ValueError("expected a label, got none")
    several = isinstance(cell, (list, tuple, set, frozenset))
    if not multi_label:
        if several:
            raise ValueError(f"expected one label, got {list(cell)}: with several a record is multi_label")
        return (labels.index(str(cell)),)
    names = cell if several else [part.strip() for part in str(cell).split(SEPARATOR)]
    return tuple(sorted({labels.index(str(name)) for name in names}))
