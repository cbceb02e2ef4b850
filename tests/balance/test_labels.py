"""Words of labels and their tokens, under tokenizers of several families."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import tiny_text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fastproj
from fastproj.balance.labels import LabelWords, label_words

JOY = ["▁", ":", "▁joy", "joy", "▁sad", "ness"]


def of_spaces() -> PreTrainedTokenizerFast:
    """As sentencepiece: a space is "▁", and one more is put in front of every text."""
    scores = [(piece, -1.0 - 0.1 * place) for place, piece in enumerate(["<unk>", *JOY])]
    inner = Tokenizer(models.Unigram(scores, unk_id=0))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def of_bytes(*texts: str) -> PreTrainedTokenizerFast:
    """As GPT-2: a space belongs to the word behind it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_words_are_a_space_and_the_name() -> None:
    found = label_words(tiny_text.tokenizer(), ["kind", "lazy"])
    assert found == LabelWords(
        ("kind", "lazy"),
        (" kind", " lazy"),
        ((tiny_text.index("kind"),), (tiny_text.index("lazy"),)),
    )
    assert len(found) == 2


def test_words_of_ones_own() -> None:
    found = label_words(tiny_text.tokenizer(), ["good", "bad"], [" kind man", " lazy"])
    assert found.words == (" kind man", " lazy")
    assert found.tokens[0] == (tiny_text.index("kind"), tiny_text.index("man"))
    assert found.first == (tiny_text.index("kind"), tiny_text.index("lazy"))


def test_no_token_is_added_to_a_word() -> None:
    tokenizer = tiny_text.tokenizer("bert")
    assert tokenizer(" kind")["input_ids"] == [2, tiny_text.index("kind"), 3]
    assert label_words(tokenizer, ["kind"]).tokens == ((tiny_text.index("kind"),),)


def test_a_space_in_front_of_every_text_is_no_part_of_a_word() -> None:
    tokenizer = of_spaces()
    pieces = ["▁", "▁joy"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" joy")["input_ids"]) == pieces
    found = label_words(tokenizer, ["joy", "sadness"])
    assert [tokenizer.convert_ids_to_tokens(row) for row in found.tokens] == [["▁joy"], ["▁sad", "ness"]]
    # They are what follows the prompt in the tokens of both together.
    for word, row in zip(found.words, found.tokens, strict=True):
        assert tokenizer("joy:" + word)["input_ids"] == [*tokenizer("joy:")["input_ids"], *row]


def test_bytes_are_split_as_they_are_alone() -> None:
    tokenizer = of_bytes(" joy joy joy", " sadness sadness")
    found = label_words(tokenizer, ["joy", "sadness", "ärger"])
    assert [tokenizer.decode(row) for row in found.tokens] == [" joy", " sadness", " ärger"]
    assert found.tokens == tuple(tuple(tokenizer(word)["input_ids"]) for word in found.words)


def test_a_word_that_grows_together_with_the_colon_is_split_alone() -> None:
    tokenizer = of_bytes(":) :) :) :)")
    assert len(tokenizer(":)")["input_ids"]) == 1
    assert label_words(tokenizer, ["glad"], [")"]).tokens == (tuple(tokenizer(")")["input_ids"]),)


def test_labels_are_known_by_name() -> None:
    labels = LabelWords(("x", "y"), ("x", "y"), ((1,), (2,)))
    assert [labels.index(name) for name in ("x", "y")] == [0, 1]
    with pytest.raises(ValueError, match="expected a label of x, y, got 'z'"):
        labels.index("z")
    with pytest.raises(FrozenInstanceError):
        labels.names = ()  # type: ignore[misc]


def test_labels_with_one_first_token() -> None:
    labels = LabelWords(("x", "y", "z"), (" x", " y", " z"), ((1, 2), (3,), (1, 4)))
    assert not labels.distinct_first
    with pytest.raises(ValueError, match=r"' x' and ' z' begin with the same token, 1: .*form='mean'"):
        labels.require_distinct_first()
    apart = LabelWords(("x", "y"), (" x", " y"), ((1, 2), (2, 1)))
    assert apart.distinct_first
    apart.require_distinct_first()


@pytest.mark.parametrize(
    ("names", "words", "tokens", "message"),
    [
        ((), (), (), r"one at least, got \[0, 0, 0\]"),
        (("x",), ("x", "y"), ((1,), (2,)), r"as many names as words and tokens.*got \[1, 2, 2\]"),
        (("x", "x"), ("x", "y"), ((1,), (2,)), "every label once, got 'x'"),
        (("x", "y"), ("x", ""), ((1,), ()), "the word '' of label 'y' has no tokens"),
        (("x", "y"), ("x", "y"), ((1, 2), (1, 2)), r"'x' and 'y' have the same tokens, \[1, 2\]"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(
    names: tuple[str, ...], words: tuple[str, ...], tokens: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LabelWords(names, words, tokens)


def test_words_unknown_to_the_tokenizer_are_the_same() -> None:
    with pytest.raises(ValueError, match="'joy' and 'grief' have the same tokens"):
        label_words(tiny_text.tokenizer(), ["joy", "grief"])
    with pytest.raises(ValueError, match="as many names as words"):
        label_words(tiny_text.tokenizer(), ["kind", "lazy"], [" kind"])


def test_the_package_exports_them() -> None:
    assert fastproj.LabelWords is LabelWords
    assert fastproj.label_words is label_words
