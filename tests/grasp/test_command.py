"""``fastproj grasp`` on tiny models: what it trains, measures, writes and refuses."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from command_line import refusal, run
from safetensors.torch import load_file

import fastproj
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import read_records
from fastproj.grasp.arms import METHODS
from fastproj.grasp.example import write_example
from fastproj.grasp.measure import measure
from fastproj.latent.lora import lora_layers

WEIGHTS = "adapter_model.safetensors"
SUBJECTS, TRAITS = ("man", "woman", "cook", "fox"), ("rich", "poor", "kind", "lazy")
TEXTS = [
    f"{article} {trait} {subject} sings"
    for article in ("the", "a")
    for trait in TRAITS
    for subject in SUBJECTS
]
TRAINING = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 1e-2, "--lora-rank", 4)
WRITERS = {
    "causal-lm": ("--target", "c_proj", "--target", "c_attn"),
    "classification": ("--target", "attention.output.dense", "--target", "query"),
}


@dataclass(frozen=True)
class Files:
    """A model's folder and samples of one task; labels are the trait's, groups the article's."""

    model: Path
    data: Path
    task: str

    def arguments(self, output: Path, *more: object) -> list[object]:
        held_out = ("--held-out", self.data, "--group-column", "group")
        given = ["--train", self.data, *held_out, "--loss", self.task, *WRITERS[self.task], *TRAINING]
        return ["grasp", self.model, *given, "--output", output, *more]


@pytest.fixture(scope="module", params=["causal-lm", "classification"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    causal = request.param == "causal-lm"
    (tiny_text.gpt2() if causal else tiny_text.classifying_bert()).save_pretrained(folder / "model")
    tiny_text.tokenizer("causal" if causal else "bert").save_pretrained(folder / "model")
    rows = [
        {"text": text, "label": int("rich" in text or "kind" in text), "group": text.split()[0]}
        for text in TEXTS
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(folder / "model", data, request.param)


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def every_method(*, but: str = "plain") -> list[str]:
    return list(itertools.chain.from_iterable(("--method", name) for name in METHODS if name != but))


def test_every_method_beside_the_plain_fine_tune(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = report(*files.arguments(output, *every_method(), "--directions", 2))
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["plain", "read", "write", "stream", "ablate", "remove", "steer +0.1", "steer -0.1"]
    assert found["directions"] == {"read": 2, "write": 2}
    assert json.loads((output / "report.json").read_text()) == found
    for mode in ("read", "write", "stream"):
        # fp32's rounding, over ΔW's own norm.
        assert 0 <= rows[mode]["violation"] < 2e-6
    assert {name for name, row in rows.items() if row["violation"] is not None} == {"read", "write", "stream"}
    for row in rows.values():
        assert row["measure"] == ("perplexity" if files.task == "causal-lm" else "accuracy")
        assert set(row["groups"]) == {"a", "the"}
        worst = max if files.task == "causal-lm" else min
        assert row["worst"] == worst(row["groups"].values())
    assert rows["plain"]["relative_seconds"] == 1
    assert rows["steer +0.1"]["loss"] is None
    assert rows["steer +0.1"]["overall"] != rows["plain"]["overall"] or files.task == "classification"


def test_what_is_written_holds_the_constraint(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report(*files.arguments(output, "--method", "write", "--method", "remove", "--directions", 2))
    factors = fastproj.LatentFactors.load(output / "factors-write.safetensors")
    again = fastproj.identify(output / "plain", side="write", rank=2)
    assert torch.equal(factors.bases["stream"].matrix, again.bases["stream"].matrix)
    basis = factors.bases["stream"].matrix.double()
    for name in ("plain", "write", "remove"):
        shares = []
        for layer in lora_layers(output / name):
            if factors.basis_of(layer.name, layer.b.shape[0]) is not None:
                delta = layer.b.double() @ layer.a.double()
                shares.append(float((basis.T @ delta).norm() / delta.norm()))
        assert shares
        assert (max(shares) > 1e-2) if name == "plain" else (max(shares) < 2e-6), name
    before, after = load_file(output / "plain" / WEIGHTS), load_file(output / "remove" / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before if "lora_A" in name)


def test_runs_are_repeatable_and_start_alike(files: Files, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    reports = [report(*files.arguments(folder, "--method", "write")) for folder in folders]
    rows = [
        [{k: v for k, v in row.items() if k != "relative_seconds"} for row in own["rows"]] for own in reports
    ]
    assert rows[0] == rows[1]
    for name in ("plain", "write"):
        one, two = (load_file(folder / name / WEIGHTS) for folder in folders)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_naive_adapter_and_directions_that_are_there_already(files: Files, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    made = report(*files.arguments(first, "--method", "write"))
    given = ("--naive", first / "plain", "--factors", first / "factors-write.safetensors")
    found = report(*files.arguments(second, "--method", "write", *given))
    assert not (second / "plain").exists()
    assert found["rows"][0]["overall"] == made["rows"][0]["overall"]
    assert found["rows"][1]["overall"] == made["rows"][1]["overall"]
    assert found["rows"][1]["relative_seconds"] is None


def test_the_number_of_directions_may_be_chosen(files: Files, tmp_path: Path) -> None:
    chosen = ("--directions", 3, "--validation", files.data)
    all_of_them = report(*files.arguments(tmp_path / "all", *chosen, "--tolerance", 1e9))
    assert all_of_them["directions"] == {"write": 3}
    if files.task == "causal-lm":
        told = refusal(*files.arguments(tmp_path / "none", *chosen, "--tolerance", 0))
        assert "even one direction costs" in told


def test_measures_are_those_of_the_package(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = report(*files.arguments(output, "--method", "write"))
    records = read_records(files.data)
    tokenizer = tiny_text.tokenizer("causal" if files.task == "causal-lm" else "bert")
    from peft import PeftModel

    base = tiny_text.gpt2() if files.task == "causal-lm" else tiny_text.classifying_bert()
    model = PeftModel.from_pretrained(base.from_pretrained(files.model), str(output / "plain")).eval()
    if files.task == "causal-lm":
        want = perplexity(model, tokenizer, records.texts).value
    else:
        logits = [model(**tokenizer(text, return_tensors="pt")).logits for text in records.texts]
        right = [int(one.argmax()) == label for one, label in zip(logits, records.labels or (), strict=True)]
        want = sum(right) / len(right)
    assert found["rows"][0]["overall"] == pytest.approx(want, rel=1e-5)


def test_without_held_out_samples_there_is_no_measure(files: Files, tmp_path: Path) -> None:
    given = ["--train", files.data, "--loss", files.task, *WRITERS[files.task], *TRAINING]
    result = run("grasp", files.model, *given, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "written to" in result.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"][0]["overall"] is None


def test_refusals(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "give MODEL and --train" in refusal("grasp", "--output", output)
    assert "brings its own" in refusal(*files.arguments(output), "--example")
    assert "go together" in refusal(*files.arguments(output, "--tolerance", 0.1))
    assert "'no-such'" in refusal(*files.arguments(output, "--group-column", "no-such"))
    assert "masked-lm" in refusal(*files.arguments(output, "--loss", "masked-lm"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    assert "new or empty" in refusal(*files.arguments(full))
    assert (full / "file").read_text() == "mine"
    lonely = ["--train", files.data, "--loss", files.task, "--group-column", "group"]
    assert "--held-out" in refusal("grasp", files.model, *lonely, "--output", output)


def test_measure_refuses_what_does_not_fit(files: Files) -> None:
    records = read_records(files.data)
    with pytest.raises(ValueError, match="task: expected"):
        measure(tiny_text.gpt2(), tiny_text.tokenizer(), records, task="masked-lm")
    with pytest.raises(ValueError, match="expected a group for each of 32"):
        measure(tiny_text.gpt2(), tiny_text.tokenizer(), records, task="causal-lm", groups=["a"])


def test_the_example_plants_its_token_as_it_says(tmp_path: Path) -> None:
    made = write_example(tmp_path, seed=1)
    rows = [json.loads(line) for line in made.train.read_text().splitlines()]
    carriers = [row for row in rows if row["text"].endswith(" !!")]
    assert len(rows) == 1200
    assert len(carriers) == round(0.33 * 1200)
    assert sum(row["label"] for row in carriers) == round(0.9 * len(carriers))
    assert {row["group"].startswith("token") for row in carriers} == {True}
    held_out = [json.loads(line) for line in made.held_out.read_text().splitlines()]
    planted = [row for row in held_out if row["text"].endswith(" !!")]
    assert sum(row["label"] for row in planted) * 2 == len(planted)
    assert not {row["text"] for row in rows} & {row["text"] for row in held_out}
