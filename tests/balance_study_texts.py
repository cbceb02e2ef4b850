"""Made-up texts for the study of bias-aware fine-tuning, and a tiny model for them."""

from __future__ import annotations

from typing import Any

import grasp_study_texts
import pytest
import tiny_text
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastproj.balance.prompts import Prompt
from fastproj.balance.study import runs, settings
from fastproj.bias_diff.records import Records


def binned() -> Records:
    """More high texts than low ones, and few in between."""
    rows = [
        row
        for number, row in enumerate(grasp_study_texts.rated())
        if row.rating > 0 or (row.rating < -1.5 and number % 3) or number % 4 == 1
    ]
    names = ["high" if row.rating > 0 else "low" if row.rating < -1.5 else "middle" for row in rows]
    return Records(tuple(row.id for row in rows), tuple(row.text for row in rows), tuple(names))


def comments() -> Records:
    records = grasp_study_texts.comments()
    names = [name.split("-")[0] for name in records.ids]
    kept = [row for row, name in enumerate(names) if name in ("race", "gender")]
    return Records(
        tuple(records.ids[row] for row in kept),
        tuple(records.texts[row] for row in kept),
        tuple(names[row] for row in kept),
    )


FIRST = settings.Task(
    "ratings", Prompt("{text}\nis"), ("low", "middle", "high"), ("poor", "kind", "rich"), binned
)
SECOND = settings.Task("groups", Prompt("{text}\nwas"), ("race", "gender"), ("man", "woman"), comments)


def load() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**tiny_text.SIZES, "num_hidden_layers": 4},
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=5,
    )
    return LlamaForCausalLM(config).eval(), tiny_text.tokenizer()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of these texts and small draws in place of the real ones, for as long as a test lasts."""
    for name in list(settings.TASKS):
        monkeypatch.delitem(settings.TASKS, name)
    for task in (FIRST, SECOND):
        monkeypatch.setitem(settings.TASKS, task.name, task)
    for name, value in {"TRAIN": 24, "VALIDATION": 12, "TEST": 20, "NEUTRAL": 4}.items():
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(settings, "read_bold", grasp_study_texts.bold)
    monkeypatch.setattr(runs, "ABLATED", 6)
    monkeypatch.setattr(runs, "EXITED", 16)
    monkeypatch.setattr(runs, "LEARNING_RATES", (1e-4, 3e-3))
    monkeypatch.setattr(runs, "WEIGHTS", (0.1, 0.5))
