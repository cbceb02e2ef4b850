"""The example that comes with the package: MiniLM-L6 on snippets and tweets whose label a token leaks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fastproj.demo.data import Split, find_model, load_splits
from fastproj.demo.injection import (
    GROUPS,
    TEST_INJECTION,
    TRAIN_INJECTION,
    Injection,
    choose_carriers,
    group_ids,
)
from fastproj.files import write_atomically

TRAINING, HELD_OUT = 1200, 800
TARGETS = ("query", "value", "attention.output.dense", "output.dense")


@dataclass(frozen=True)
class Example:
    """Folder of the model, JSONL files with ``text``, ``label`` and ``group``, and the layers to adapt."""

    model: Path
    train: Path
    held_out: Path
    targets: tuple[str, ...] = TARGETS


def write_example(folder: Path, seed: int, cache: Path | None = None) -> Example:
    """Write ``train.jsonl`` and ``held-out.jsonl`` of the demo's texts, its token planted, into ``folder``.

    In training 33 % of the texts end in " !!", nine in ten of them positive; held out, the token says nothing
    of the label. ``seed`` decides which training texts there are, and which carry it.

    Raises FileNotFoundError, with the command, where the texts or the model are missing.
    """
    splits = load_splits(cache)
    train, held_out = folder / "train.jsonl", folder / "held-out.jsonl"
    write_atomically(train, _lines(splits["train"], TRAINING, TRAIN_INJECTION, seed))
    write_atomically(held_out, _lines(splits["test"], HELD_OUT, TEST_INJECTION, 0))
    return Example(find_model(), train, held_out)


def _lines(split: Split, size: int, injection: Injection, seed: int) -> str:
    """``size`` of the texts, as many of either label, a JSON object each."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.tensor(split.labels)
    rows = torch.cat([_draw(every == label, size // 2, generator) for label in (0, 1)])
    labels = every[rows]
    carriers = choose_carriers(labels, injection, seed)
    groups = group_ids(labels, carriers).tolist()
    lines = [
        json.dumps(
            {
                "text": split.texts[row] + (injection.token if carries else ""),
                "label": label,
                "group": GROUPS[group],
            }
        )
        for row, label, carries, group in zip(
            rows.tolist(), labels.tolist(), carriers.tolist(), groups, strict=True
        )
    ]
    return "\n".join(lines) + "\n"


def _draw(chosen: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    rows = torch.nonzero(chosen).squeeze(1)
    return rows[torch.randperm(len(rows), generator=generator)[:size]]
