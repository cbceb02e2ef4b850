"""Predictions against one run a prompt, and what is decided from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastproj.balance.label_logits import label_logits
from fastproj.balance.labels import label_words
from fastproj.balance.predict import decided, predict
from fastproj.balance.prompts import Example, Prompt, encode
from fastproj.bias_diff.records import Records

TOKENIZER = tiny_text.tokenizer()
LABELS = label_words(TOKENIZER, ["kind", "lazy", "rich man"])
TEXTS = ("man", "a woman sings and then the cook is poor", "fox", "the cook", "a lazy man or fox")
EXAMPLES = encode(
    Records(tuple("vwxyz"), TEXTS, ("kind", "lazy", "kind", "rich man", "lazy")),
    TOKENIZER,
    LABELS,
    Prompt("the {text} is"),
)
PRIOR = torch.tensor([0.7, 0.2, 0.1])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("form", ["first", "mean"])
@pytest.mark.parametrize("model", [tiny_text.gpt2(), tiny_text.llama()], ids=["gpt2", "llama"])
def test_prompts_one_at_a_time(model: nn.Module, form: Any, batch_size: int) -> None:
    found = predict(model, TOKENIZER, EXAMPLES, LABELS, form=form, batch_size=batch_size)
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (5, 3), "cpu")
    assert not found.requires_grad
    for example, row in zip(EXAMPLES, found, strict=True):
        ids = torch.tensor([example.prompt])
        logits = label_logits(model, ids, torch.ones_like(ids), LABELS, form=form)[0].detach()
        # fp32 logits of a few units, in batches of another shape.
        torch.testing.assert_close(row, logits.double().log_softmax(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("form", ["first", "mean"])
def test_a_prior_is_taken_away(form: Any) -> None:
    model = tiny_text.gpt2()
    plain = predict(model, TOKENIZER, EXAMPLES, LABELS, form=form)
    found = predict(model, TOKENIZER, EXAMPLES, LABELS, form=form, prior=PRIOR)
    torch.testing.assert_close(found, plain - PRIOR.double().log())


def test_the_model_is_left_in_its_mode() -> None:
    model = tiny_text.gpt2().train()
    found = predict(model, TOKENIZER, EXAMPLES, LABELS)
    assert model.training
    # Without dropout, though the model was in training.
    torch.testing.assert_close(found, predict(model.eval(), TOKENIZER, EXAMPLES, LABELS))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_named(value: float) -> None:
    model = tiny_text.llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_text.index("fox")] = value
    with pytest.raises(ValueError, match="the model gives NaN for 2 of 5 examples"):
        predict(model, TOKENIZER, EXAMPLES, LABELS)


def test_what_cannot_be_predicted_is_refused() -> None:
    model = tiny_text.gpt2(12)
    longest = max(EXAMPLES, key=lambda example: len(example.prompt))
    assert len(longest.prompt) == 12
    one = label_words(TOKENIZER, ["kind", "lazy"])
    assert predict(model, TOKENIZER, [longest], one, form="mean").shape == (1, 2)
    # The second token of "rich man" is asked for behind the first, which is the 13th.
    with pytest.raises(ValueError, match=r"1 to 12 tokens, 2 of a label counted, got 12 in 'w'"):
        predict(model, TOKENIZER, EXAMPLES, LABELS, form="mean")
    with pytest.raises(ValueError, match="got 0 in 'e'"):
        predict(model, TOKENIZER, [Example("e", (), (0,))], one)
    with pytest.raises(ValueError, match="a batch_size of 1 or more, got 0, 16"):
        predict(model, TOKENIZER, [], one)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"a batch_size of 1 or more, got 5, {size}"):
            predict(model, TOKENIZER, EXAMPLES, one, batch_size=size)
    with pytest.raises(ValueError, match=r"a prior \(C,\)"):
        predict(tiny_text.gpt2(), TOKENIZER, EXAMPLES, LABELS, prior=PRIOR[:2])


SCORES = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.1, 0.1, 0.8]]).log()


def test_decisions_by_hand() -> None:
    assert decided(SCORES).tolist() == [0, 0, 2]
    several = decided(SCORES, multi_label=True)
    assert several.dtype == torch.bool
    # More than a third.
    assert several.tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    more = decided(SCORES, multi_label=True, threshold=0.25)
    assert more.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert decided(SCORES, multi_label=True, threshold=0.9).tolist() == [
        [True, False, False],
        [True, False, False],
        [False, False, True],
    ]
    # Scores that are no log-probabilities yet, as those behind a prior, are shares after a softmax.
    assert torch.equal(decided(SCORES + 5, multi_label=True), several)
    assert decided(torch.zeros(2, 4), multi_label=True).tolist() == [[True, False, False, False]] * 2


@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=4))
def test_one_label_is_always_said(rows: list[list[float]]) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    largest, several = decided(scores), decided(scores, multi_label=True)
    assert bool(several[range(len(rows)), largest].all())
    assert bool(((scores.softmax(1) > 1 / 3) <= several).all())


def test_scores_that_decide_nothing_are_refused() -> None:
    for wrong in (SCORES[0], SCORES[:, :0], SCORES * math.nan):
        with pytest.raises(ValueError, match=r"scores \(N, C\) without NaN"):
            decided(wrong)
    for threshold in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="threshold: expected a share"):
            decided(SCORES, multi_label=True, threshold=threshold)
    assert decided(SCORES[:0]).shape == (0,)
