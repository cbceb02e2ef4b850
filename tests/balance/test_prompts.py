"""Prompts as tokens: whole, cut in the text alone, with the labels of their records."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import WORDS, index
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastproj.balance.labels import label_words
from fastproj.balance.prompts import Example, Prompt, batch, encode, prompt_tokens
from fastproj.bias_diff.records import Records

TOKENIZER = tiny_text.tokenizer()
LABELS = label_words(TOKENIZER, ["kind", "lazy", "rich"])
PROMPT = Prompt("the {text} is")
START = 5


def records(*labels: Any) -> Records:
    names = tuple(f"r{number}" for number in range(len(labels)))
    return Records(names, tuple("a man sings" for _ in labels), labels)


def test_a_text_stands_inside_its_template() -> None:
    assert Prompt().fill("Hello.") == "Text: Hello.\nLabel:"
    assert Prompt("{text}").fill("a {text} {b} {") == "a {text} {b} {"
    prompt = Prompt("Say: {text} {so}")
    assert (prompt.before, prompt.cue) == ("Say: ", " {so}")


@pytest.mark.parametrize("template", ["", "Text: {Text}", "{text}{text}", "{ text }"])
def test_a_template_has_one_place(template: str) -> None:
    with pytest.raises(ValueError, match=r"one \{text\}, got"):
        Prompt(template)


def test_examples_by_hand() -> None:
    found = encode(records("lazy", "kind"), TOKENIZER, LABELS, PROMPT)
    prompt = (START, *(index(word) for word in ("the", "a", "man", "sings", "is")))
    assert found == [Example("r0", prompt, (1,)), Example("r1", prompt, (0,))]


def test_several_labels_are_a_list_or_one_string() -> None:
    table = records("rich|kind", ["kind", "lazy", "kind"], [], " lazy | rich ", ("rich",))
    found = encode(table, TOKENIZER, LABELS, PROMPT, multi_label=True)
    assert [example.labels for example in found] == [(0, 2), (0, 1), (), (1, 2), (2,)]


def test_labels_that_are_numbers_are_known_as_they_are_written() -> None:
    labels = label_words(TOKENIZER, ["0", "1"], [" kind", " lazy"])
    assert [row.labels for row in encode(records(1, "0"), TOKENIZER, labels, PROMPT)] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("cell", "multi_label", "message"),
    [
        (None, False, "'r0': expected a label, got none"),
        (None, True, "'r0': expected a label, got none"),
        ("glad", False, "'r0': expected a label of kind, lazy, rich, got 'glad'"),
        ("kind|glad", True, "got 'glad'"),
        ("kind||lazy", True, "got ''"),
        ("kind|lazy", False, "got 'kind|lazy'"),
        (["kind"], False, r"expected one label, got \['kind'\]: with several"),
    ],
)
def test_labels_that_are_unknown_are_refused(cell: Any, multi_label: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(records(cell), TOKENIZER, LABELS, PROMPT, multi_label=multi_label)


def test_records_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="'x': expected a label"):
        encode(Records(("x",), ("man",)), TOKENIZER, LABELS, PROMPT)


def test_a_prompt_begins_with_the_start_token_where_there_is_one() -> None:
    words = [index(word) for word in ("the", "man", "is")]
    assert prompt_tokens(["man"], TOKENIZER, PROMPT) == [(START, *words)]
    assert prompt_tokens(["man"], tiny_text.tokenizer(start=False), PROMPT) == [tuple(words)]


def test_a_prompt_never_ends_with_an_end_token() -> None:
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(("<s>", "</s>", *WORDS))}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert tokenizer("man")["input_ids"][-1] == 1
    assert prompt_tokens(["man"], tokenizer, PROMPT) == [
        (0, *(WORDS.index(w) + 2 for w in ("the", "man", "is")))
    ]


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.integers(4, 14), st.booleans())
def test_a_long_text_is_cut_and_its_cue_is_not(words: list[str], room: int, start: bool) -> None:
    prompt = Prompt("the fox {text} and then .")
    (row,) = prompt_tokens(
        [" ".join(words)], tiny_text.tokenizer(start=start), prompt, max_length=room + 2 + start
    )
    kept = words[: max(0, room + 2 - 5)]
    expected = ["the", "fox", *kept, "and", "then", "."]
    assert row == (*((START,) if start else ()), *map(index, expected))


def test_a_long_text_is_cut_between_characters_of_several_bytes() -> None:
    inner = Tokenizer(
        models.BPE(dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True)), [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    prompt = Prompt("ä {text}\nö:")
    (whole,) = prompt_tokens(["füße ☂☂"], tokenizer, prompt)
    for length in range(len(whole) - 1, 8, -1):
        (row,) = prompt_tokens(["füße ☂☂"], tokenizer, prompt, max_length=length)
        assert len(row) == length
        assert row == whole[: length - 4] + whole[-4:]


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    assert len(prompt_tokens(["man man"], TOKENIZER, PROMPT, max_length=4)[0]) == 4
    with pytest.raises(ValueError, match="which alone takes 2 tokens, got room for 2"):
        prompt_tokens(["man man"], TOKENIZER, PROMPT, max_length=3)
    with pytest.raises(ValueError, match="leaves room for a text"):
        prompt_tokens(["man"], TOKENIZER, PROMPT, max_length=0)


class SlowTokenizer(PreTrainedTokenizerFast):
    """One that knows no offsets."""

    is_fast = False


def test_a_tokenizer_without_offsets_cuts_nothing() -> None:
    slow = SlowTokenizer(tokenizer_object=TOKENIZER.backend_tokenizer, bos_token="<s>")
    assert prompt_tokens(["man"], slow, PROMPT, max_length=4) == prompt_tokens(["man"], TOKENIZER, PROMPT)
    with pytest.raises(ValueError, match="only a fast tokenizer can cut its text: got a SlowTokenizer"):
        prompt_tokens(["man man"], slow, PROMPT, max_length=4)


def test_batches_are_padded_at_the_right() -> None:
    ids, mask = batch([Example("x", (7, 8, 9), (0,)), Example("y", (6,), ())], 3, "cpu")
    assert torch.equal(ids, torch.tensor([[7, 8, 9], [6, 3, 3]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert batch([Example("x", (7,), ())], 3, torch.device("meta"))[0].device.type == "meta"
    with pytest.raises(ValueError, match="at least one example"):
        batch([], 0, "cpu")
