"""Perplexity where it is known, and windows that score each token once."""

from __future__ import annotations

import math

import pytest
import tiny_text
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import VOCABULARY, BigramForCausalLM, index, tokenizer
from torch import nn

from fastproj.bias_diff.perplexity import Perplexity, perplexity, windows

TEXTS = ("the man is kind", "fox", "a woman sings and then the cook is lazy , not kind or rich .")


@pytest.mark.parametrize("context", [None, 2, 5, 64])
def test_a_uniform_model_has_the_vocabularys_size(context: int | None) -> None:
    found = perplexity(BigramForCausalLM(), tokenizer(), TEXTS, context=context)
    # 4 + 1 + 14 words, the first of each after the start token.
    assert found.tokens == 20
    # fp64 sums of 20 equal terms.
    assert found.value == pytest.approx(VOCABULARY, rel=1e-6)


def test_long_texts_weigh_more() -> None:
    model = BigramForCausalLM()
    with torch.no_grad():
        model.table[:, index("fox")] = 3.0
    likely, other = (x - math.log(VOCABULARY - 1 + math.exp(3)) for x in (3.0, 0.0))
    found = perplexity(model, tokenizer(), ["fox fox fox", "man"])
    assert found.value == pytest.approx(math.exp(-(3 * likely + other) / 4), rel=1e-6)


@pytest.mark.parametrize("model", [tiny_text.gpt2(), tiny_text.llama()], ids=["gpt2", "llama"])
def test_the_models_own_loss(model: nn.Module) -> None:
    rows = [torch.tensor([[5, *tokenizer()(text)["input_ids"]]]) for text in TEXTS]
    sums = [model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows]
    found = perplexity(model, tokenizer(), TEXTS, batch_size=2)
    # transformers' loss, in fp32.
    assert found.value == pytest.approx(math.exp(sum(sums) / 20), rel=1e-4)


def test_windows_by_hand() -> None:
    model = tiny_text.gpt2(8)
    row = [5, *tokenizer()(TEXTS[2])["input_ids"]]
    expected = 0.0
    for begin, first, end in ((0, 1, 8), (4, 8, 12), (8, 12, 16)):
        with torch.no_grad():
            log_p = model(torch.tensor([row[begin:end]])).logits[0].double().log_softmax(-1)
        expected += sum(log_p[t - 1 - begin, row[t]].item() for t in range(first, end))
    assert len(row) == 16
    # fp32 logits of up to 10 in batches of another shape.
    assert perplexity(model, tokenizer(), TEXTS[2:]).log_likelihood == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_every_token_but_the_first_is_scored_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    scored = []
    for begin, first, end in windows(length, context, stride):
        assert begin < first < end <= begin + context
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_without_a_start_token_the_first_word_does_not_count() -> None:
    assert perplexity(BigramForCausalLM(), tokenizer(start=False), TEXTS).tokens == 17


def test_a_perplexity_beyond_fp64_is_infinite() -> None:
    assert Perplexity(-1e30, 1).value == math.inf
    assert Perplexity(0.0, 3).value == 1.0
    assert math.isnan(Perplexity(math.nan, 3).value)


def test_what_cannot_be_measured_is_refused() -> None:
    model = BigramForCausalLM()
    with pytest.raises(ValueError, match="causal language model"):
        perplexity(tiny_text.masked_bert(), tokenizer("bert"), TEXTS)
    with pytest.raises(ValueError, match="at least one token"):
        perplexity(model, tokenizer(start=False), ["fox"])
    with pytest.raises(ValueError, match="at least one text"):
        perplexity(model, tokenizer(), [])
    for context, stride in ((4, 4), (4, 0), (4, -1), (1, None), (0, None)):
        with pytest.raises(ValueError, match="1 <= stride < context"):
            perplexity(model, tokenizer(), TEXTS, context=context, stride=stride)
