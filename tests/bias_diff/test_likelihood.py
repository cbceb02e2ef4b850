"""Log-probabilities of tokens against sums written out by hand, on models with and without a known answer."""

from __future__ import annotations

import math

import pytest
import tiny_text
import torch
from tiny_text import BagForMaskedLM, BigramForCausalLM, index, tokenizer
from torch import nn

from fastproj.bias_diff.likelihood import (
    context_length,
    evaluating,
    log_likelihoods,
    masked_log_probabilities,
    model_kind,
    start_token,
    started,
    token_log_probabilities,
)

ROWS = [[5, 6, 8, 10, 12], [5, 7], [5, 9, 11, 13, 14, 15, 16], [6, 6, 6]]
# Both in fp32, whose rounding over a few dozen additions of numbers around 10 stays below this.
CLOSE = {"rel": 1e-5, "abs": 1e-5}


@pytest.mark.parametrize("model", [tiny_text.gpt2(), tiny_text.llama()], ids=["gpt2", "llama"])
def test_padding_and_batches_do_not_count(model: nn.Module) -> None:
    together = log_likelihoods(model, ROWS, [1, 1, 3, 2], pad=0, batch_size=3)
    for row, start, found in zip(ROWS, [1, 1, 3, 2], together.tolist(), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        by_hand = sum(log_p[t - 1, row[t]].item() for t in range(start, len(row)))
        assert found == pytest.approx(by_hand, **CLOSE)


def test_masked_positions_one_by_one() -> None:
    model = tiny_text.masked_bert()
    found = masked_log_probabilities(model, ROWS, [1, 0, 6, 2], [9, 8, 7, 6], pad=0, batch_size=3)
    for row, position, target, value in zip(ROWS, [1, 0, 6, 2], [9, 8, 7, 6], found.tolist(), strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0, position].double().log_softmax(-1)
        assert value == pytest.approx(log_p[target].item(), **CLOSE)


def test_a_uniform_model_by_hand() -> None:
    model = BigramForCausalLM()
    found = log_likelihoods(model, ROWS, [0, 1, 2, 3], pad=0, batch_size=8)
    expected = torch.tensor([4, 1, 5, 0]) * -math.log(tiny_text.VOCABULARY)
    # fp64: a handful of roundings.
    torch.testing.assert_close(found, expected.double(), rtol=1e-7, atol=1e-7)


def test_padding_has_no_probability_and_no_gradient() -> None:
    model = BigramForCausalLM()
    nn.init.normal_(model.table)
    ids, mask = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    terms = token_log_probabilities(model, ids, mask)
    assert terms.dtype == torch.float64
    assert torch.equal(terms[0, 1:], torch.zeros(2, dtype=torch.float64))
    terms[0].sum().backward()
    assert model.table.grad is not None
    assert model.table.grad[5].abs().sum() > 0
    assert model.table.grad[[0, 6]].abs().sum() == 0


def test_kinds_of_models() -> None:
    assert model_kind(tiny_text.gpt2()) == model_kind(tiny_text.llama()) == "causal"
    assert model_kind(tiny_text.masked_bert()) == model_kind(BagForMaskedLM()) == "masked"
    with pytest.raises(ValueError, match="got BertForSequenceClassification"):
        model_kind(tiny_text.classifying_bert())
    assert context_length(tiny_text.gpt2(19)) == 19
    assert context_length(tiny_text.llama(21)) == 21
    assert context_length(BagForMaskedLM()) is None


def test_rows_that_are_empty_or_too_long_are_refused() -> None:
    model = tiny_text.gpt2(6)
    with pytest.raises(ValueError, match="expected 1 to 6 tokens in a row, got 7 in row 2"):
        log_likelihoods(model, ROWS, [1] * 4, pad=0, batch_size=8)
    with pytest.raises(ValueError, match="got 0 in row 0"):
        masked_log_probabilities(model, [[]], [0], [0], pad=0, batch_size=8)


def test_a_broken_model_is_named() -> None:
    model, masked = BigramForCausalLM(), BagForMaskedLM()
    with torch.no_grad():
        model.table[7] = masked.table[7] = math.nan
    with pytest.raises(ValueError, match="NaN for 1 of 2 rows"):
        log_likelihoods(model, [[5, 6, 8], [5, 7, 8]], [1, 1], pad=0, batch_size=8)
    with pytest.raises(ValueError, match="NaN for 1 of 2 rows"):
        masked_log_probabilities(masked, [[5, 6], [5, 7]], [0, 0], [1, 1], pad=0, batch_size=8)


def test_texts_begin_with_the_start_token_once() -> None:
    start = tokenizer()
    assert started(start, ["the man", "cook"]) == [[5, index("the"), index("man")], [5, index("cook")]]
    assert started(start, ["<s> the"]) == [[5, index("the")]]
    without = tokenizer(start=False)
    assert start_token(without) is None
    assert started(without, ["the man"]) == [[index("the"), index("man")]]


def test_modes_are_given_back() -> None:
    model = tiny_text.gpt2().train()
    model.transformer.h[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model.transformer.h[0].attn.training
    assert torch.is_grad_enabled()
