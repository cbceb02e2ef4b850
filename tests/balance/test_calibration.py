"""What a prompt says without a text, against one run a content, and what is left when it is taken away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastproj.balance import calibration
from fastproj.balance.calibration import CONTENT_FREE, calibrated, contextual_prior, domain_prior
from fastproj.balance.label_logits import label_logits
from fastproj.balance.labels import label_words
from fastproj.balance.prompts import Prompt, prompt_tokens

TOKENIZER = tiny_text.tokenizer()
LABELS = label_words(TOKENIZER, ["kind", "lazy", "rich man"])
PROMPT = Prompt("the {text} is")
TEXTS = ("a man sings", "the poor cook is a lazy fox", "woman")


def one_at_a_time(model: nn.Module, contents: Any, form: Any) -> Tensor:
    rows = []
    for content in contents:
        ids = torch.tensor([[5, *TOKENIZER(PROMPT.fill(content))["input_ids"]]])
        with torch.no_grad():
            logits = label_logits(model, ids, torch.ones_like(ids), LABELS, form=form)
        rows.append(logits[0].double().softmax(0))
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("form", ["first", "mean"])
@pytest.mark.parametrize("contents", [CONTENT_FREE, ("a", "the man", "fox and fox"), ("",)])
def test_contents_one_at_a_time(contents: Any, form: Any) -> None:
    model = tiny_text.gpt2().train()
    found = contextual_prior(model, TOKENIZER, LABELS, PROMPT, contents=contents, form=form)
    assert model.training
    assert (found.dtype, found.shape) == (torch.float64, (3,))
    # fp32 logits of a few units, in another batch.
    torch.testing.assert_close(found, one_at_a_time(model.eval(), contents, form), rtol=1e-5, atol=1e-6)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_many_contents_are_taken_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text.llama()
    contents = ["a", "the man", "fox", "a rich fox sings", "lazy"]
    whole = contextual_prior(model, TOKENIZER, LABELS, PROMPT, contents=contents)
    monkeypatch.setattr(calibration, "_BATCH", 2)
    parts = contextual_prior(model, TOKENIZER, LABELS, PROMPT, contents=contents)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def contents_of(monkeypatch: pytest.MonkeyPatch, texts: Any, **options: Any) -> list[str]:
    """The contents that a domain prior asks for."""
    asked: list[str] = []

    def keep(contents: list[str], *others: Any, **named: Any) -> Any:
        asked.extend(contents)
        return prompt_tokens(contents, *others, **named)

    monkeypatch.setattr(calibration, "prompt_tokens", keep)
    domain_prior(tiny_text.llama(), TOKENIZER, LABELS, PROMPT, texts, **options)
    return asked


def test_random_words_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of(monkeypatch, TEXTS)
    assert len(contents) == 20
    words = [word for text in TEXTS for word in text.split()]
    # 11 words in 3 texts.
    assert {len(content.split()) for content in contents} == {4}
    drawn = [word for content in contents for word in content.split()]
    assert set(drawn) <= set(words)
    assert len(set(drawn)) > 5
    assert contents_of(monkeypatch, TEXTS) == contents
    assert contents_of(monkeypatch, TEXTS, seed=1) != contents
    assert contents_of(monkeypatch, ["man", "man man man"], draws=2) == ["man man", "man man"]
    assert contents_of(monkeypatch, ["fox", "", " "], draws=1) == ["fox"]


def test_words_are_drawn_as_often_as_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = contents_of(monkeypatch, ["fox " * 9 + "man"], draws=100)
    share = " ".join(contents).split().count("fox") / 1000
    # 1000 draws of probability 0.9: ten standard deviations are 0.095.
    assert abs(share - 0.9) < 0.095


@pytest.mark.parametrize("form", ["first", "mean"])
def test_the_prior_of_a_domain_is_that_of_its_contents(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    model = tiny_text.gpt2()
    contents = contents_of(monkeypatch, TEXTS, draws=7, seed=3)
    found = domain_prior(model, TOKENIZER, LABELS, PROMPT, TEXTS, draws=7, seed=3, form=form)
    torch.testing.assert_close(found, one_at_a_time(model, contents, form), rtol=1e-5, atol=1e-6)


def test_the_callers_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    domain_prior(tiny_text.llama(), TOKENIZER, LABELS, PROMPT, TEXTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_calibrated_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), but without a text the first label has 4/5 of it.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
    prior = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    wanted = torch.tensor([[0.5 / 0.8, 0.25 / 0.1, 0.25 / 0.1]], dtype=torch.float64).log()
    torch.testing.assert_close(calibrated(logits, prior), wanted)
    assert calibrated(logits.to(torch.bfloat16), prior.float()).dtype == torch.float64


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.data())
def test_the_largest_is_that_of_the_ratio(row: list[float], data: st.DataObject) -> None:
    prior = torch.tensor(data.draw(st.lists(st.floats(0.01, 1), min_size=len(row), max_size=len(row))))
    logits = torch.tensor([row], dtype=torch.float64)
    found = calibrated(logits, prior)
    ratio = logits.softmax(1) / prior.double()
    torch.testing.assert_close(found.exp(), ratio, rtol=1e-9, atol=1e-30)
    # A constant of the row makes no difference, nor does an even prior.
    torch.testing.assert_close(calibrated(logits + 7, prior), found)
    even = calibrated(logits, torch.full((len(row),), 1 / len(row)))
    torch.testing.assert_close(even.log_softmax(1), logits.log_softmax(1))


def test_impossible_priors_are_refused() -> None:
    logits = torch.zeros(2, 3)
    for wrong in ([0.5, 0.5, 0.0], [1.0, -1.0, 1.0], [math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0]):
        with pytest.raises(ValueError, match="a prior of positive numbers"):
            calibrated(logits, torch.tensor(wrong))
    for shape in ((2,), (3, 1)):
        with pytest.raises(ValueError, match=r"logits \(B, C\) and a prior \(C,\)"):
            calibrated(logits, torch.ones(shape))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3,\)"):
        calibrated(logits[0], torch.ones(3))


def test_what_cannot_be_asked_is_refused() -> None:
    model = tiny_text.llama()
    with pytest.raises(ValueError, match="at least one content"):
        contextual_prior(model, TOKENIZER, LABELS, PROMPT, contents=())
    for texts, draws in (((), 1), (("", " \n"), 1), (TEXTS, 0)):
        with pytest.raises(ValueError, match="texts with words and 1 draw or more"):
            domain_prior(model, TOKENIZER, LABELS, PROMPT, texts, draws=draws)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN for texts without content"):
        contextual_prior(model, TOKENIZER, LABELS, PROMPT)
