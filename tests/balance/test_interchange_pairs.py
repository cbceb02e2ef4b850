"""Pairs of runs: what stands behind a prompt, and which label is the wrong one."""

from __future__ import annotations

import math

import pytest
import tiny_text
import torch
from tiny_text import index, tokenizer
from torch import nn

from fastproj import InterchangePair, LabelWords, interchange_ablation, interchange_pairs, label_words
from fastproj.balance.prompts import Example, Prompt

PROMPT = Prompt("the {text} is")
NAMES = ("good", "bad", "artful")
WORDS = (" kind", " lazy", " rich cook")
FOX = Example("fox", (5, index("the"), index("fox"), index("is")), (0,))
MAN = Example("man", (5, index("the"), index("poor"), index("man"), index("is")), (2,))


def labels() -> LabelWords:
    return label_words(tokenizer(), NAMES, WORDS)


def saying(*words: str) -> nn.Module:
    """A model whose unembedding prefers words in this order, whatever came before."""
    model = tiny_text.gpt2()
    head = nn.Linear(32, tiny_text.VOCABULARY)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        for place, word in enumerate(words):
            head.bias[index(word)] = 10.0 - place
    model.lm_head = head
    return model


def behind(example: Example, *words: str) -> tuple[int, ...]:
    return (*example.prompt, *map(index, words))


def test_runs_by_hand() -> None:
    pairs = interchange_pairs(saying("rich", "kind", "lazy"), tokenizer(), [FOX, MAN], labels(), PROMPT)
    assert pairs == [
        InterchangePair(gold=behind(FOX, "kind", "is"), biased=behind(FOX, "rich", "cook", "is")),
        InterchangePair(gold=behind(MAN, "rich", "cook", "is"), biased=behind(MAN, "kind", "is")),
    ]
    assert [(pair.shared, pair.exchanged) for pair in pairs] == [(4, 2), (5, 2)]


def test_the_wrong_label_is_the_likeliest_of_the_others() -> None:
    for order, wrong in ((("kind", "lazy", "rich"), ["lazy"]), (("rich", "lazy", "kind"), ["rich", "cook"])):
        (pair,) = interchange_pairs(saying(*order), tokenizer(), [FOX], labels(), PROMPT)
        assert pair.biased == behind(FOX, *wrong, "is")


def test_of_several_labels_the_likeliest_is_the_right_one() -> None:
    several = Example("several", FOX.prompt, (0, 2))
    for order, right in ((("rich", "kind", "lazy"), ["rich", "cook"]), (("lazy", "kind", "rich"), ["kind"])):
        (pair,) = interchange_pairs(saying(*order), tokenizer(), [several], labels(), PROMPT)
        assert pair.gold == behind(several, *right, "is")
        assert pair.biased == behind(several, "lazy", "is")


def test_the_cue_begins_a_line_of_its_own() -> None:
    written: list[str] = []

    class Listening(type(tokenizer())):  # type: ignore[misc]
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            written.append(text)
            return super().__call__(text, **options)

    inner = tokenizer()
    listening = Listening(tokenizer_object=inner.backend_tokenizer, pad_token="[PAD]")
    interchange_pairs(saying("kind"), listening, [FOX], labels(), Prompt("Text: {text} \n Label: "))
    assert " kind\nLabel:" in written


def test_pairs_of_batches_of_any_size_can_be_ablated() -> None:
    model = tiny_text.gpt2()
    examples = [FOX, MAN, Example("again", FOX.prompt, (1,))]
    pairs = interchange_pairs(model, tokenizer(), examples, labels(), PROMPT, batch_size=1)
    assert pairs == interchange_pairs(model, tokenizer(), examples, labels(), PROMPT, batch_size=3)
    assert interchange_ablation(model, pairs, labels()).per_sample.shape == (3, 2)


def test_what_gives_no_pair_is_refused() -> None:
    model = tiny_text.gpt2()
    with pytest.raises(ValueError, match=r"expected a template with a cue behind its text, got 'A {text} '"):
        interchange_pairs(model, tokenizer(), [FOX], labels(), Prompt("A {text} "))
    for own in ((), (0, 1, 2)):
        example = Example("all", FOX.prompt, own)
        with pytest.raises(
            ValueError, match=f"expected an example with some of 3 labels, 'all' has {len(own)}"
        ):
            interchange_pairs(model, tokenizer(), [FOX, example], labels(), PROMPT)
    with pytest.raises(ValueError, match=r"expected .*example"):
        interchange_pairs(model, tokenizer(), [], labels(), PROMPT)
    clash = label_words(tokenizer(), NAMES, (" rich", " lazy", " rich cook"))
    with pytest.raises(ValueError, match="begin with the same token"):
        interchange_pairs(model, tokenizer(), [FOX], clash, PROMPT)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the model gives NaN"):
        interchange_pairs(model, tokenizer(), [FOX], labels(), PROMPT)
