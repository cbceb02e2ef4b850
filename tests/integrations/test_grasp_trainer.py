"""GRASP under Hugging Face's Trainer, against the same steps by hand, and under Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from made_factors import stream_factors
from tiny_models import Rows, Tiny, bert
from torch import nn
from transformers import Trainer, TrainingArguments

import fastproj

WIDTH, STEPS, LEARNING_RATE, CLIP, DECAY = 32, 5, 1e-2, 0.05, 0.1


def by_trainer(tiny: Tiny, grasp: fastproj.GRASP, folder: Path, accumulation: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=LEARNING_RATE, weight_decay=DECAY,
        max_grad_norm=CLIP, lr_scheduler_type="constant", optim="adamw_torch",
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer = Trainer(tiny.model, arguments, train_dataset=Rows(tiny, STEPS), callbacks=[grasp.callback()])
    trainer.train()
    return trainer


def by_hand(tiny: Tiny, grasp: fastproj.GRASP, accumulation: int) -> None:
    chosen = [p for p in tiny.model.parameters() if p.requires_grad]
    decayed = [p for p in chosen if p.dim() > 1]
    others = [p for p in chosen if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    for _ in range(STEPS):
        for first in range(0, 4, 4 // accumulation):
            part = tiny.rows(first, first + 4 // accumulation)
            # The Trainer leaves the division to models that take keyword arguments; BERT does not divide.
            nn.functional.cross_entropy(part.logits(), part.labels).backward()
        nn.utils.clip_grad_norm_(chosen, CLIP)
        grasp.project_gradients_()
        optimizer.step()
        grasp.project_parameters_()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["read", "write", "stream"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_takes_the_same_steps(mode: str, accumulation: int, tmp_path: Path) -> None:
    side = "read" if mode == "read" else "write"
    models = []
    for run in ("trainer", "hand"):
        tiny = bert()
        with fastproj.GRASP(tiny.model, stream_factors(WIDTH, side=side), mode) as grasp:
            if run == "trainer":
                trainer = by_trainer(tiny, grasp, tmp_path, accumulation)
                assert trainer.state.log_history[-1]["grasp_violation"] == grasp.violation()
            else:
                by_hand(tiny, grasp, accumulation)
            # fp64 throughout.
            assert grasp.violation() < 1e-13
        models.append([p.detach().clone() for p in tiny.model.parameters() if p.requires_grad])
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_accelerate_wraps_the_optimizer() -> None:
    tiny = bert()
    with fastproj.GRASP(tiny.model, stream_factors(WIDTH), "write") as grasp:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        inner = torch.optim.AdamW([p for p in tiny.model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        model, optimizer = accelerator.prepare(tiny.model, inner)
        grasp.hold(optimizer)
        before = [p.detach().clone() for p in tiny.model.parameters() if p.requires_grad]
        for _ in range(4):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(**tiny.inputs).logits, tiny.labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        after = [p for p in tiny.model.parameters() if p.requires_grad]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert grasp.violation() < 1e-13
