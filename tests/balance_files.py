"""A tiny causal model on disk, samples whose label its person tells, and how the two commands are run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_text
from command_line import run

PEOPLE = {"man": "rich", "woman": "poor", "cook": "kind", "fox": "rich"}
LABELS = ("rich", "poor", "kind")
TEXTS = [
    f"{article} {person} {verb}{end}"
    for article in ("the", "a")
    for verb in ("sings", "was", "and the fox")
    for end in ("", " then", " not")
    for person in PEOPLE
]


@dataclass(frozen=True)
class Files:
    """A model's folder, samples with one label each and with several, and texts without any."""

    folder: Path
    model: Path
    train: Path
    test: Path
    several: Path
    held_out: Path

    def layers(self, output: Path, *more: object) -> list[object]:
        return [
            "layers",
            self.model,
            "--data",
            self.train,
            "--prompt",
            "{text} is",
            "--output",
            output,
            *more,
        ]

    def balance(self, output: Path, *more: object) -> list[object]:
        given = ["--train", self.train, "--test", self.test, "--prompt", "{text} is", "--samples", 6]
        training = ["--batch-size", 8, "--learning-rate", 1e-2]
        return ["balance", self.model, *given, *training, "--output", output, *more]


def make_files(folder: Path, *, kind: str = "llama") -> Files:
    """72 samples, every third of them to test with."""
    model = getattr(tiny_text, kind)(48)
    model.save_pretrained(folder / "model")
    tiny_text.tokenizer().save_pretrained(folder / "model")
    rows = [{"text": text, "label": PEOPLE[text.split()[1]]} for text in TEXTS]
    several = [
        {"text": row["text"], "label": [row["label"], "lazy"] if number % 4 else [row["label"]]}
        for number, row in enumerate(rows)
    ]
    several.append({"text": "the fox sings and sings", "label": []})
    return Files(
        folder,
        folder / "model",
        written(folder / "train.jsonl", (row for number, row in enumerate(rows) if number % 3)),
        written(folder / "test.jsonl", rows[::3]),
        written(folder / "several.jsonl", several),
        written(folder / "held-out.jsonl", ({"text": text} for text in TEXTS[:5])),
    )


def written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def report(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON, which must be what it wrote."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    output = Path(str(arguments[list(arguments).index("--output") + 1]))
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == found
    return found


def repeated(option: str, values: Sequence[object]) -> list[object]:
    """``--option A --option B``."""
    return [part for value in values for part in (option, value)]
