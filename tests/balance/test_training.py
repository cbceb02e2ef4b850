"""Training on label words against the same steps by hand, and what a batch is made of."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_architectures
import tiny_text
import torch
from torch import Tensor, nn

import fastproj
from fastproj.architectures import ARCHITECTURES
from fastproj.balance.labels import LabelWords, label_words
from fastproj.balance.prompts import Example, Prompt, encode
from fastproj.balance.training import (
    BalanceConfig,
    BalanceStep,
    batch_loss,
    collate,
    train,
)
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import add_adapter

TOKENIZER = tiny_text.tokenizer()
LABELS = label_words(TOKENIZER, ("rich", "poor", "kind"))
TEXTS = ("the man", "a woman sings", "the cook and the fox", "fox", "a man , a woman", "to be or not")
RECORDS = Records(tuple(f"t{i}" for i in range(6)), TEXTS, ("rich", "poor", "poor", "kind", "rich", "poor"))
EXAMPLES = encode(RECORDS, TOKENIZER, LABELS, Prompt("{text} is"))
# Words of several tokens, beginning with different ones; ids of the tiny architectures' vocabulary.
LONG = LabelWords(("a", "b", "c"), (" a", " b", " c"), ((3, 4, 5), (6,), (7, 8)))
SEVERAL = [
    Example("one", (1, 2, 9, 10), (0, 2)),
    Example("none", (1, 11), ()),
    Example("another", (1, 12, 13), (1,)),
]
CAUSAL = [kind for kind in ARCHITECTURES if kind not in ("bert", "roberta")]


def objective(labels: LabelWords = LABELS, **options: Any) -> fastproj.BalanceObjective:
    return fastproj.BalanceObjective(labels, **{"beta": 0.3, "gamma": 0.2, **options})


def naive(
    model: nn.Module, examples: list[Example], labels: LabelWords, made: Any, members: Tensor
) -> Tensor:
    """Row by row, with the whole vocabulary everywhere."""
    losses, behind = [], []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
        behind.append(logits[list(labels.first)])
        for label in example.labels:
            row = [*example.prompt, *labels.tokens[label]]
            every = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            begin = len(example.prompt)
            losses += [-every[at - 1, row[at]] for at in range(begin, len(row))]
    lm = torch.stack(losses).mean()
    terms = fastproj.balance_loss(torch.stack(behind), members)
    return lm + made.beta * terms.propensity - made.gamma * terms.discrimination


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_batch_loss_is_that_of_whole_rows(kind: str) -> None:
    model = tiny_architectures.tiny(kind).eval()
    members = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    made = objective(LONG)
    found = batch_loss(model, collate(SEVERAL, LONG, 0, multi_label=True), made)
    expected = naive(model, SEVERAL, LONG, made, members)
    # fp32: logits of single rows and of padded batches are rounded differently.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_batch() -> None:
    batch = collate(SEVERAL, LONG, pad=0, multi_label=True)
    assert batch.ids.tolist() == [
        [1, 2, 9, 10, 3, 4], [1, 2, 9, 10, 7, 0], [1, 11, 0, 0, 0, 0], [1, 12, 13, 0, 0, 0],
    ]  # fmt: skip
    assert batch.mask.sum(1).tolist() == [6, 5, 2, 3]
    assert batch.rows.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert batch.positions.tolist() == [3, 4, 5, 3, 4, 1, 2]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8, -100, 6]
    assert batch.behind.tolist() == [0, 5, 6]
    assert batch.labels.tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    assert collate(EXAMPLES[:2], LABELS, 0).labels.tolist() == [0, 1]


def test_samples_without_labels_alone_have_no_language_loss() -> None:
    model = tiny_architectures.tiny("llama").eval()
    made = objective(LONG)
    loss = batch_loss(model, collate(SEVERAL[1:2], LONG, 0, multi_label=True), made)
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_steps_by_hand() -> None:
    model, other = (add_adapter(tiny_text.llama(), rank=4, seed=3) for _ in range(2))
    made, own = objective(), objective()
    config = BalanceConfig(batch_size=6, learning_rate=0.01, weight_decay=0.1, max_norm=0.5, epochs=3)
    seen: list[tuple[int, int, BalanceStep]] = []
    done = train(model, TOKENIZER, EXAMPLES, LABELS, config, made, on_step=lambda *parts: seen.append(parts))
    chosen = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=0.01, weight_decay=0.1)
    losses = []
    labels = torch.tensor([example.labels[0] for example in EXAMPLES])
    for _ in range(3):
        loss = naive(other.eval(), EXAMPLES, LABELS, own, labels)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(chosen, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    # fp32 sums in another order; Adam's first steps turn a rounding of tiny gradients into part of a step.
    assert [step.loss for step in done.steps] == pytest.approx(losses, rel=1e-4)
    assert [(at, total) for at, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert tuple(step for _, _, step in seen) == done.steps
    assert done.learning_rates == (0.01,) * 3
    for step in done.steps:
        whole = step.lm + 0.3 * step.propensity - 0.2 * step.discrimination
        assert step.loss == pytest.approx(whole, rel=1e-5)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_seed_decides_everything_and_the_callers_state_is_left() -> None:
    def trained(seed: int) -> tuple[tuple[BalanceStep, ...], nn.Module]:
        model = add_adapter(tiny_text.llama(), dropout=0.2, seed=0).eval()
        torch.manual_seed(11)
        before = torch.random.get_rng_state()
        done = train(model, TOKENIZER, EXAMPLES, LABELS, BalanceConfig(batch_size=2, seed=seed), objective())
        assert torch.equal(before, torch.random.get_rng_state())
        return done.steps, model

    one, model = trained(0)
    assert one == trained(0)[0]
    assert one != trained(1)[0]
    assert not model.training


def test_without_an_objective_the_terms_are_measured_alone() -> None:
    model = add_adapter(tiny_text.llama(), seed=0)
    done = train(model, TOKENIZER, EXAMPLES, LABELS, BalanceConfig(batch_size=6))
    (step,) = done.steps
    assert step.loss == step.lm
    assert step.propensity > 0
    assert step.discrimination > 0
    labels = torch.tensor([example.labels[0] for example in EXAMPLES])
    plain = naive(tiny_text.llama(), EXAMPLES, LABELS, objective(beta=0.0, gamma=0.0), labels)
    assert step.loss == pytest.approx(plain.item(), rel=1e-5)


def test_the_balance_terms_do_what_they_are_for() -> None:
    def last(beta: float, gamma: float) -> BalanceStep:
        model = add_adapter(tiny_text.llama(), rank=8, seed=0)
        config = BalanceConfig(batch_size=6, learning_rate=1e-2, epochs=20)
        made = fastproj.BalanceObjective(LABELS, alpha=0.0, beta=beta, gamma=gamma)
        return train(model, TOKENIZER, EXAMPLES, LABELS, config, made).steps[-1]

    first = last(0.0, 0.0)
    assert last(1.0, 0.0).propensity < 0.5 * first.propensity
    assert last(0.0, 1.0).discrimination > 2 * first.discrimination


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    model = add_adapter(tiny_text.llama(), seed=0).eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name)[:] = torch.inf
    with pytest.raises(
        ValueError, match=r"step 1: the loss is nan; a smaller gamma, now 0.2, or learning rate"
    ):
        train(model, TOKENIZER, EXAMPLES, LABELS, BalanceConfig(), objective())
    assert not model.training


def test_what_is_refused() -> None:
    model = add_adapter(tiny_text.llama(), seed=0)
    with pytest.raises(ValueError, match="expected at least one example"):
        train(model, TOKENIZER, [], LABELS)
    with pytest.raises(ValueError, match="expected one label for 'x', got 2: several need multi_label"):
        train(model, TOKENIZER, [Example("x", (1,), (0, 1))], LABELS)
    with pytest.raises(ValueError, match="expected labels of 'x' from 0 to 2, got 3"):
        train(model, TOKENIZER, [Example("x", (1,), (3,))], LABELS)
    other = label_words(TOKENIZER, ("man", "woman"))
    with pytest.raises(ValueError, match="an objective for labels rich, poor, kind, got one for man, woman"):
        train(model, TOKENIZER, EXAMPLES, LABELS, objective=fastproj.BalanceObjective(other))
    with pytest.raises(ValueError, match="no trainable parameter"):
        train(tiny_text.llama().requires_grad_(False), TOKENIZER, EXAMPLES, LABELS)
    with pytest.raises(ValueError, match="expected epochs and batch_size of 1 or more, got 0, 16"):
        BalanceConfig(epochs=0)
    bert = tiny_architectures.tiny("bert")
    with pytest.raises(ValueError, match="expected a causal language model"):
        train(bert, TOKENIZER, EXAMPLES, LABELS)


def test_the_papers_batch_and_learning_rate() -> None:
    config = BalanceConfig()
    assert (config.batch_size, config.learning_rate) == (16, 5e-5)
    assert (config.fine_tune().batch_size, config.fine_tune().learning_rate) == (16, 5e-5)
