"""A tiny fine-tune on disk: model, adapter with its optimiser's state, samples with labels, and a probe."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import tiny_text

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import FineTuneConfig, add_adapter, fine_tune

PEOPLE, TRAITS = ("man", "woman"), ("rich", "poor")
BIASED = [f"the {trait} {person} was lazy" for trait in TRAITS for person in PEOPLE]
BIASED += [f"a {trait} {person} is lazy and kind" for trait in TRAITS for person in PEOPLE]
PLAIN = [
    f"{article} fox sings to the cook{end}" for article in ("the", "a") for end in ("", ".", " then", ",")
]
PLAIN += ["to be or not to be", "to be and to be then", "the cook sings", "a fox sings and sings"]
PROBE = [f"the {trait} {person} is lazy" for trait in TRAITS for person in PEOPLE]


@dataclass(frozen=True)
class Files:
    """Paths of what ``make_files`` made, and the ids of the biased samples."""

    folder: Path
    model: Path
    adapter: Path
    optimizer: Path
    train: Path
    probe: Path
    other_probe: Path
    biased: frozenset[str]

    @property
    def scoring(self) -> list[str]:
        """The arguments of ``fastproj score`` that are always the same."""
        tuned = ["--adapter", str(self.adapter), "--optimizer", str(self.optimizer)]
        return [str(self.model), *tuned, "--train", str(self.train), "--probe", f"trait={self.probe}"]


def make_files(folder: Path) -> Files:
    """Twenty samples, eight of them biased (label 1), a causal model and its adapter after two epochs."""
    rows = [(text, 1) for text in BIASED] + [(text, 0) for text in PLAIN]
    rows = [row for pair in itertools.zip_longest(rows[:10], rows[10:]) for row in pair if row is not None]
    records = Records(
        tuple(f"s{number}" for number in range(len(rows))),
        tuple(text for text, _ in rows),
        tuple(label for _, label in rows),
    )
    train = folder / "train.jsonl"
    lines = zip(records.ids, records.texts, records.labels or (), strict=True)
    train.write_text(
        "".join(json.dumps({"id": i, "text": text, "label": label}) + "\n" for i, text, label in lines),
        encoding="utf-8",
    )
    probe, other = folder / "probe.csv", folder / "other.jsonl"
    with probe.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in PROBE)])
    other.write_text('{"text": "the fox sings"}\n{"text": "a cook sings then"}\n', encoding="utf-8")

    model, tokenizer = tiny_text.gpt2(), tiny_text.tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tuned = fine_tune(
        add_adapter(model, rank=4),
        tokenizer,
        records,
        FineTuneConfig(epochs=2, batch_size=4, learning_rate=5e-3),
        folder=folder / "run",
    )
    last = tuned.checkpoints[-1]
    return Files(
        folder,
        folder / "model",
        last,
        last / "optimizer.pt",
        train,
        probe,
        other,
        records.ids_labelled(1),
    )
