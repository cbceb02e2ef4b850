"""EDGE under Hugging Face's Trainer, against the same steps by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Rows, Tiny, bert, gpt2
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fastproj

STEPS, LEARNING_RATE, CLIP = 3, 0.1, 0.05


def trained(tiny: Tiny, engine: Any, folder: Path, accumulation: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=LEARNING_RATE, optim="sgd", max_grad_norm=CLIP,
        lr_scheduler_type="constant", per_device_train_batch_size=4 // accumulation, logging_steps=1,
        gradient_accumulation_steps=accumulation, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(
        tiny.model,
        arguments,
        train_dataset=Rows(tiny, STEPS),
        compute_loss_func=engine.compute_loss,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def by_hand(tiny: Tiny, engine: fastproj.EDGE) -> list[float]:
    chosen = [p for p in tiny.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=LEARNING_RATE)
    cosines = []
    for _ in range(STEPS):
        engine.loss(tiny.logits(), tiny.labels).backward()
        cosines.append(engine.project_().cosine.item())
        nn.utils.clip_grad_norm_(chosen, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return cosines


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [bert, gpt2])
def test_trainer_takes_the_steps_of_a_loop_by_hand(build: Any, accumulation: int, tmp_path: Path) -> None:
    first, second = build(), build()
    for tiny in (first, second):
        if tiny.shift:
            tiny.labels[:, 0] = -100  # no token predicts it; trainers differ in whether they count it
    with fastproj.EDGE(first.model, alpha=0.5) as engine:
        trainer = trained(first, engine, tmp_path, accumulation, callbacks=[engine.callback()])
    with fastproj.EDGE(second.model, alpha=0.5) as engine:
        cosines = by_hand(second, engine)
    for (name, mine), theirs in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        # fp64 sums in another order where the batch is taken in two halves.
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=name)
    logged = [entry["edge_cosine"] for entry in trainer.state.log_history if "edge_cosine" in entry]
    assert logged == pytest.approx(cosines, rel=1e-9)
    assert all(0 < entry["edge_bias_share"] < 10 for entry in trainer.state.log_history if "loss" in entry)


def test_callback_without_the_loss_says_what_is_missing(tmp_path: Path) -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model) as engine:
        callback = engine.callback()
        with pytest.raises(RuntimeError, match="compute_loss_func"):
            trained(tiny, _PlainLoss(), tmp_path, 1, callbacks=[callback])


class _PlainLoss:
    """A loss that knows nothing of the engine, on a model whose layers it has taken."""

    def compute_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"].detach(), labels).requires_grad_() * 1.0
