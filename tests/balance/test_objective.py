"""The objective: its terms against the operator, its shares under accumulation, and what the Trainer does."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_text
import torch
import torch.nn.functional as F
from tiny_text import index
from torch import Tensor

import fastproj
from fastproj.balance.labels import LabelWords, label_words

NAMES = ("rich", "poor", "kind")
LABELS = label_words(tiny_text.tokenizer(), NAMES)
LOGITS = torch.tensor([[4.0, 2.0, -1.0], [0.0, 5.0, 1.0], [2.0, 7.0, 3.0]], dtype=torch.float64)


def objective(**options: Any) -> fastproj.BalanceObjective:
    return fastproj.BalanceObjective(LABELS, **options)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 1, 1]), torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)],
    ids=["one label", "several"],
)
def test_the_loss_is_its_parts(labels: Tensor) -> None:
    terms = fastproj.balance_loss(LOGITS, labels)
    made = objective(alpha=0.5, beta=2.0, gamma=3.0)
    assert made.parts is None
    lm = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = made(LOGITS, labels, lm)
    assert loss.item() == pytest.approx(3.5 + 2 * terms.propensity.item() - 3 * terms.discrimination.item())
    assert loss.requires_grad
    assert made.parts is not None
    found = (made.parts.lm, made.parts.propensity, made.parts.discrimination)
    assert [value.item() for value in found] == [7.0, terms.propensity.item(), terms.discrimination.item()]
    assert not any(value.requires_grad for value in found)


def test_by_hand() -> None:
    # H^C = (4, 6) and H^N = (1, 2) over the two labels that there are: norms √2 + √½ and 5.
    loss = objective(beta=1.0, gamma=0.1)(LOGITS, torch.tensor([0, 1, 1]), torch.tensor(0.0))
    assert loss.item() == pytest.approx(2**0.5 + 0.5**0.5 - 0.5)


def test_a_factor_of_zero_leaves_a_term_out_even_where_it_is_not_finite() -> None:
    logits = LOGITS.clone()
    logits[0, 0] = torch.nan
    logits.requires_grad_()
    made = objective(beta=0.0, gamma=0.0)
    lm = LOGITS.sum().requires_grad_()
    loss = made(logits, torch.tensor([0, 1, 1]), lm)
    assert loss.item() == lm.item()
    assert made.parts is not None
    assert made.parts.propensity.isnan()
    assert torch.autograd.grad(loss, logits, allow_unused=True) == (None,)


def test_gamma_rewards_logits_without_end() -> None:
    losses = [
        objective(beta=0.0)(scale * LOGITS, torch.tensor([0, 1, 1]), torch.tensor(0.0)) for scale in (1, 1e6)
    ]
    assert losses[1].item() == pytest.approx(1e6 * losses[0].item())
    assert losses[1] < losses[0] < 0


def test_running_means_are_written_with_gradients_alone() -> None:
    made = objective(running=True)
    assert made.running is not None
    with torch.no_grad():
        made(LOGITS, torch.tensor([0, 1, 1]), torch.tensor(0.0))
    assert made.running.means.isnan().all()
    made(LOGITS, torch.tensor([0, 1, 1]), torch.tensor(0.0))
    assert made.running.means[0, :2].tolist() == [4.0, 6.0]
    assert set(made.running.state_dict()) == {"means"}
    fewer = made(LOGITS[:1], torch.tensor([0]), torch.tensor(0.0))
    # Label 1 is not in this batch and counts by its mean, so that there is something to hold label 0 against.
    assert fewer.item() != objective()(LOGITS[:1], torch.tensor([0]), torch.tensor(0.0)).item()


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_factors_that_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a factor from 0, got"):
        objective(**{name: value})


def test_words_that_begin_alike_are_refused() -> None:
    alike = LabelWords(("a", "b"), ("a", "b"), ((7, 8), (7, 9)))
    with pytest.raises(ValueError, match="begin with the same token"):
        fastproj.BalanceObjective(alike)


def answers() -> tuple[Tensor, Tensor]:
    """Logits (4, 5, V) and labels: three answers, at different places, and a row without one."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, tiny_text.VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.full((4, 5), -100)
    labels[0, 3] = index("poor")
    labels[1, 2:4] = torch.tensor([index("rich"), index("fox")])
    labels[2, 4] = index("poor")
    return logits, labels


def expected(logits: Tensor, labels: Tensor, made: fastproj.BalanceObjective) -> Tensor:
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    columns = [index(name) for name in NAMES]
    behind = torch.stack([logits[0, 2], logits[1, 1], logits[2, 3]])[:, columns]
    terms = fastproj.balance_loss(behind, torch.tensor([1, 0, 1]))
    return lm + made.beta * terms.propensity - made.gamma * terms.discrimination


def test_compute_loss_finds_answers_and_their_labels() -> None:
    logits, labels = answers()
    made = objective(beta=0.3, gamma=0.2)
    found = made.compute_loss({"logits": logits}, labels)
    torch.testing.assert_close(found, expected(logits, labels, made))
    torch.testing.assert_close(made.compute_loss({"logits": logits}, labels, torch.tensor(4)), found)
    # A label of position 0 is predicted from nothing, and is no answer.
    labels[3, 0] = index("kind")
    torch.testing.assert_close(made.compute_loss({"logits": logits}, labels), found)


def test_parts_of_a_batch_have_their_share() -> None:
    logits, labels = answers()
    made = objective(beta=0.3, gamma=0.2)
    whole = made.compute_loss({"logits": logits[:2]}, labels[:2], 3)
    assert made.parts is not None
    propensity, discrimination, lm = made.parts.propensity, made.parts.discrimination, made.parts.lm
    torch.testing.assert_close(whole, lm + 0.3 * propensity - 0.2 * discrimination)
    part = made.compute_loss({"logits": logits[:2]}, labels[:2], 6)
    torch.testing.assert_close(part, whole / 2)


def test_rows_without_an_answer_give_no_loss() -> None:
    logits, labels = answers()
    found = objective().compute_loss({"logits": logits[3:].requires_grad_()}, labels[3:])
    assert found.item() == 0.0


def test_what_compute_loss_refuses() -> None:
    logits, labels = answers()
    with pytest.raises(ValueError, match=r"expected logits \(B, T, V\) and labels \(B, T\), got \(4, 5"):
        objective().compute_loss({"logits": logits}, labels[:, :4])
    labels[0, 3] = index("fox")
    with pytest.raises(ValueError, match=rf"begin with one of the tokens .*, got {index('fox')}"):
        objective().compute_loss({"logits": logits}, labels)
    assert objective().classes(torch.tensor([-100, index("kind")])).tolist() == [-100, 2]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Prompts of three words with an answer."""

    texts = ("the man is rich", "a woman is poor", "the cook is kind", "the fox is poor")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = torch.tensor(tiny_text.tokenizer()(self.texts[row % 4])["input_ids"])
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_the_trainer(accumulation: int, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, other = tiny_text.llama().double(), tiny_text.llama().double()
    made = objective(beta=0.2, gamma=0.1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", per_device_train_batch_size=4 // accumulation, report_to=[],
        gradient_accumulation_steps=accumulation, save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), compute_loss_func=made.compute_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    own = objective(beta=0.2, gamma=0.1)
    for _ in range(2):
        rows = [Rows()[row] for row in range(4)]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        size = 4 // accumulation
        for begin in range(0, 4, size):
            part = {name: value[begin : begin + size] for name, value in batch.items()}
            output = other(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            labels = part["labels"][:, -1]
            lm = F.cross_entropy(output.logits[:, -2], labels)
            behind = output.logits[:, -2][:, [index(name) for name in NAMES]]
            (own(behind, own.classes(labels), lm) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        # Norms are taken in fp32 whatever the model's dtype.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_outputs_of_transformers_are_taken_as_they_are() -> None:
    from transformers.modeling_outputs import CausalLMOutput

    logits, labels = answers()
    found = objective().compute_loss(CausalLMOutput(logits=logits), labels)
    torch.testing.assert_close(found, objective().compute_loss({"logits": logits}, labels))
    with pytest.raises(TypeError):
        objective().compute_loss(SimpleNamespace(logits=logits), labels)  # type: ignore[arg-type]
