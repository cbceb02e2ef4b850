"""The adapter of one block under what trains and reads it: Trainer, EDGE and InfluenceScorer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from one_pass import TOLERANCE, assert_equal_to_two_passes, assert_same, one_pass
from single_samples import batch_of, expected_scores, trained_adamw
from tiny_architectures import MODELS, VOCABULARY, tiny
from tiny_models import BATCH, Rows, Tiny, norms_in_fp64, padded, two_pass_oracle
from torch import nn
from transformers import Trainer, TrainingArguments

import fastproj
from fastproj.capture.select import select_parameters
from fastproj.influence.optimizer_state import adam_states

CAUSAL = sorted(set(MODELS) - {"bert", "roberta"})
RANKS = (None, 3)
# fp64 sums of products in another order, of at most 1e5 terms.
ROUNDING = 1e-10


def adapted(kind: str, rank: int | None, *, train: bool = False) -> Tiny:
    """In fp64, with an adapter whose every parameter is drawn, and a padded batch."""
    model = fastproj.add_balance_adapter(norms_in_fp64(tiny(kind)).double(), 1, rank=rank).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ids, mask = padded()
    ids = ids % (VOCABULARY - 2) + 2
    labels = ids.masked_fill(mask == 0, -100)
    return Tiny(model.train(train), {"input_ids": ids, "attention_mask": mask}, labels, True)


def tolerance(kind: str) -> float:
    """Gemma 2 caps its attention scores, for which the softmax is written out, in fp32."""
    return 1e-8 if kind == "gemma2" else TOLERANCE


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_edge_in_one_pass_is_edge_in_two(kind: str, rank: int | None) -> None:
    made = adapted(kind, rank, train=True)
    assert_equal_to_two_passes(made, params="trainable", tolerance=tolerance(kind))
    assert any("input_shift" in name for name in one_pass(made, params="trainable"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_edge_under_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    made = adapted(kind, None, train=True)
    for module in made.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    expected = two_pass_oracle(made, select_parameters(made.model, "trainable"))
    made.model.enable_input_require_grads()
    made.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(one_pass(made, params="trainable"), expected, tolerance(kind))


@pytest.mark.parametrize("with_adam", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_influence_is_that_of_single_backward_passes(kind: str, rank: int | None, with_adam: bool) -> None:
    made = adapted(kind, rank)
    scorer = fastproj.InfluenceScorer(made.model, params="trainable")
    adam = None
    if with_adam:
        optimizer = trained_adamw(scorer)
        scorer = fastproj.InfluenceScorer(made.model, optimizer, params="trainable")
        adam = adam_states(optimizer, made.model, scorer.parameters)
    halves = {"first": [batch_of(made.rows(0, 2))], "last": [batch_of(made.rows(2, 4))]}
    references = scorer.reference(halves)
    (rows,) = scorer.score_batches([batch_of(made)], references)
    assert rows.values.shape == (BATCH, 2)
    expected = expected_scores(made, references, adam)
    torch.testing.assert_close(rows.values, expected, rtol=ROUNDING, atol=ROUNDING)


def trained(made: Tiny, folder: Path, resume: Path | None = None) -> Trainer:
    """Four steps by the Trainer, saved after two and after four."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=0.01, per_device_train_batch_size=2, save_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, weight_decay=0.01,
    )  # fmt: skip
    trainer = Trainer(made.model, arguments, train_dataset=Rows(made, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def fresh(kind: str, rank: int | None) -> Tiny:
    """In fp32 and as training begins, without dropout."""
    made = adapted(kind, rank)
    model = fastproj.add_balance_adapter(tiny(kind), 1, rank=rank)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Tiny(model, made.inputs, made.labels, True)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trainer_trains_saves_and_resumes(kind: str, rank: int | None, tmp_path: Path) -> None:
    first = fresh(kind, rank)
    before = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    trained(first, tmp_path)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    second = fresh(kind, rank)
    trained(second, tmp_path, resume=tmp_path / "checkpoint-2")
    for (name, mine), theirs in zip(second.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    again = fastproj.load_balance_adapter(tiny(kind), tmp_path / "checkpoint-4")
    with torch.no_grad():
        want = first.model.eval()(**first.inputs).logits
        assert torch.equal(again(**first.inputs).logits, want)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_trainers_moments_are_matched_to_their_parameters(
    kind: str, rank: int | None, tmp_path: Path
) -> None:
    made = fresh(kind, rank)
    trainer = trained(made, tmp_path)
    selected = select_parameters(made.model, "trainable")
    saved = adam_states(tmp_path / "checkpoint-4", made.model, selected)
    optimizer = trainer.optimizer
    live = adam_states(getattr(optimizer, "optimizer", optimizer), made.model, selected)
    for name in selected:
        assert saved[name].step == live[name].step == 4
        assert torch.equal(saved[name].exp_avg, live[name].exp_avg), name
        assert torch.equal(saved[name].exp_avg_sq, live[name].exp_avg_sq), name
    checkpoints = [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    scorer = fastproj.InfluenceScorer(made.model, params="trainable", checkpoints=checkpoints)
    scores = scorer.score([batch_of(made)], scorer.reference([batch_of(made)]))
    assert scores.values.shape == (BATCH, 1)
    assert scores.values.isfinite().all()
