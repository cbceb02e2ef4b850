"""NPO: its loss and gradient against the formula, its reference, and that it forgets what it is given."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import BigramForCausalLM, tokenizer
from torch import Tensor, nn

from fastproj.bias_diff.npo import NPOConfig, npo_loss, reference_log_probabilities, unlearn
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import FineTuneConfig, add_adapter, fine_tune

FORGET = Records(("f0", "f1", "f2"), ("the poor man is lazy .", "a rich woman", "fox and fox and fox"))
RETAIN = Records(("r0", "r1", "r2", "r3"), ("the cook sings", "a man was kind .", "to be or not", "the fox"))


def log_probabilities(model: nn.Module, records: Records) -> Tensor:
    """One sentence at a time, by transformers' own loss."""
    rows = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in records.texts]
    return torch.stack([-model(input_ids=r, labels=r).loss * (r.shape[1] - 1) for r in rows])


def lengths(records: Records) -> Tensor:
    return torch.tensor([len(tokenizer()(text)["input_ids"]) - 1 for text in records.texts])


def warmed(make: Any) -> nn.Module:
    """A model whose adapter has learnt what is to be forgotten."""
    model = add_adapter(make(), rank=4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fine_tune(model, tokenizer(), FORGET, FineTuneConfig(epochs=5, learning_rate=0.02))
    return model


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=5), st.floats(0.01, 5))
def test_the_loss_is_the_formula(ratios: list[float], beta: float) -> None:
    found = npo_loss(torch.tensor(ratios, dtype=torch.float64), torch.zeros(len(ratios)).double(), beta)
    terms = [2 / beta * math.log1p(math.exp(beta * r)) for r in ratios]
    # fp64, one logarithm and one exponential.
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)


def test_the_gradient_is_a_reweighted_ascent() -> None:
    log_p = torch.tensor([0.3, -2.0, 40.0, 0.0], dtype=torch.float64, requires_grad=True)
    npo_loss(log_p, torch.zeros(4).double(), 0.5).backward()
    # dL/d log π = 2 σ(β log π/π_ref) / N: 1/N where nothing is forgotten yet, so that step is plain ascent.
    expected = [2 / (1 + math.exp(-0.5 * r)) / 4 for r in (0.3, -2.0, 40.0, 0.0)]
    assert log_p.grad is not None
    torch.testing.assert_close(log_p.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert log_p.grad[3] == 0.25


def test_extreme_ratios_stay_finite() -> None:
    for ratio, expected in ((1e30, 2e30), (-1e30, 0.0), (1e-30, 2 / 0.1 * math.log(2))):
        log_p = torch.tensor([ratio], requires_grad=True)
        loss = npo_loss(log_p, torch.zeros(1), 0.1)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert log_p.grad is not None
        assert bool(log_p.grad.isfinite().all())


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("make", [tiny_text.gpt2, tiny_text.llama], ids=["gpt2", "llama"])
def test_the_reference_is_the_trained_adapter(make: Any, normalised: bool) -> None:
    model = warmed(make)
    rows = [tokenizer()(text)["input_ids"] for text in FORGET.texts]
    found = reference_log_probabilities(model, rows, 0, batch_size=2, length_normalised=normalised)
    divisor = lengths(FORGET) if normalised else 1
    with torch.no_grad():
        adapted = log_probabilities(model, FORGET) / divisor
        with model.disable_adapter():  # type: ignore[operator]
            base = log_probabilities(model, FORGET) / divisor
    # fp32 losses of a few dozen nats.
    torch.testing.assert_close(found, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, base, rtol=1e-2)
    assert not found.requires_grad


@pytest.mark.parametrize("normalised", [False, True])
def test_steps_by_hand(normalised: bool) -> None:
    model = warmed(tiny_text.llama)
    other = copy.deepcopy(model)
    config = NPOConfig(
        beta=0.3, retain_weight=0.7, learning_rate=0.01, epochs=2, length_normalised=normalised, max_norm=0.5
    )
    history = unlearn(model, tokenizer(), FORGET, RETAIN, config)
    divisor = lengths(FORGET) if normalised else 1
    reference = (log_probabilities(other, FORGET) / divisor).detach()
    chosen = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.0)
    for step in history:
        ratio = log_probabilities(other, FORGET) / divisor - reference
        npo = (2 / 0.3 * torch.log1p(torch.exp(0.3 * ratio))).mean()
        retain = -log_probabilities(other, RETAIN).sum() / lengths(RETAIN).sum()
        (npo + 0.7 * retain).backward()
        nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        # fp32 losses, summed in another order.
        assert step.npo == pytest.approx(npo.item(), rel=1e-4)
        assert step.retain == pytest.approx(retain.item(), rel=1e-4)
        assert step.loss == pytest.approx((npo + 0.7 * retain).item(), rel=1e-4)
        assert step.log_ratio == pytest.approx(ratio.mean().item(), abs=1e-3)
    assert len(history) == 2
    # At the start both models are one: (2/β) log 2.
    assert history[0].npo == pytest.approx(2 / 0.3 * math.log(2), rel=1e-4)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        # Adam's first steps turn a rounding of tiny gradients into a share of the learning rate.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_it_forgets_and_retains() -> None:
    model = warmed(tiny_text.gpt2)
    with torch.no_grad():
        before = log_probabilities(model, FORGET).sum(), log_probabilities(model, RETAIN).sum()
    history = unlearn(
        model, tokenizer(), FORGET, RETAIN, NPOConfig(epochs=15, batch_size=2, learning_rate=0.01)
    )
    with torch.no_grad():
        after = log_probabilities(model, FORGET).sum(), log_probabilities(model, RETAIN).sum()
    assert after[0] < before[0] - 5
    assert after[1] > before[1]
    assert history[-1].log_ratio < -1
    assert history[-1].npo < history[0].npo
    assert [step.step for step in history] == list(range(1, 31))


def test_without_a_retain_term() -> None:
    seen: list[tuple[int, int, float]] = []
    history = unlearn(
        BigramForCausalLM(), tokenizer(), FORGET, config=NPOConfig(retain_weight=0.0, batch_size=1),
        on_step=lambda *step: seen.append(step),
    )  # fmt: skip
    assert [step.retain for step in history] == [None] * 3
    assert seen == [(step.step, 3, step.npo) for step in history]


def test_the_seed_decides_the_run_and_modes_are_given_back() -> None:
    def run(seed: int) -> tuple[float, ...]:
        model = add_adapter(tiny_text.llama(), dropout=0.3).eval()
        before = torch.random.get_rng_state()
        steps = unlearn(
            model, tokenizer(), FORGET, RETAIN, NPOConfig(batch_size=1, seed=seed, learning_rate=0.1)
        )
        assert torch.equal(before, torch.random.get_rng_state())
        assert not model.training
        return tuple(step.loss for step in steps)

    assert run(0) == run(0) != run(1)


def test_what_cannot_be_unlearned_is_refused() -> None:
    model, words = BigramForCausalLM(), tokenizer()
    with pytest.raises(ValueError, match="causal language model"):
        unlearn(tiny_text.masked_bert(), tokenizer("bert"), FORGET, RETAIN)
    with pytest.raises(ValueError, match="samples to retain"):
        unlearn(model, words, FORGET)
    with pytest.raises(ValueError, match="samples to forget"):
        unlearn(model, words, Records((), ()), RETAIN)
    with pytest.raises(ValueError, match="'f0' is both"):
        unlearn(model, words, FORGET, FORGET)
    with pytest.raises(ValueError, match="no trainable parameter"):
        unlearn(BigramForCausalLM().requires_grad_(False), words, FORGET, RETAIN)
    with pytest.raises(ValueError, match="beta > 0"):
        NPOConfig(beta=0)
    with pytest.raises(ValueError, match="beta > 0"):
        npo_loss(torch.zeros(1), torch.zeros(1), -1.0)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(1,\)"):
        npo_loss(torch.zeros(2), torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="epochs"):
        NPOConfig(epochs=0)
