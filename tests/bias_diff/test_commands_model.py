"""``fastproj unlearn``, ``evaluate`` and ``report`` on a tiny fine-tune: what they write, say and refuse."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from bias_diff_files import PROBE, Files, make_files
from command_line import refusal, run
from peft import PeftModel
from safetensors.torch import load_file

from fastproj.bias_diff.npo import sequence_log_probabilities
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import read_records
from fastproj.bias_diff.seat import read_seat_test, seat
from fastproj.influence.scores import Scores

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def selection(files: Files, tmp_path: Path) -> Path:
    """Six of the eight biased samples, and two others."""
    others = sorted(set(read_records(files.train).ids) - files.biased)
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"ids": sorted(files.biased)[:6] + others[:2]}))
    return path


@pytest.fixture
def scores(files: Files, tmp_path: Path) -> Path:
    """Of every sample, in another order than the data's; biased ones score 1 and 2, others 0 and −1."""
    ids = tuple(reversed(read_records(files.train).ids))
    high = torch.tensor([[1.0, 2.0] if name in files.biased else [0.0, -1.0] for name in ids])
    Scores(ids, ("one", "two"), high).save(tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def unlearning(files: Files, selection: Path, output: Path, *more: object) -> list[object]:
    data = ["--train", files.train, "--selection", selection, "--output", output]
    return ["unlearn", files.model, "--adapter", files.adapter, *data, *more]


def probe_log_probability(files: Files, adapter: Path) -> float:
    """Mean log-probability of the probe's sentences under the model with an adapter."""
    base = tiny_text.gpt2().from_pretrained(files.model)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.tensor([tiny_text.tokenizer()(text)["input_ids"] for text in PROBE])
    with torch.no_grad():
        return float(sequence_log_probabilities(model, ids, torch.ones_like(ids)).mean())


def test_npo_makes_the_probe_less_likely(files: Files, selection: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "unlearned"
    before = load_file(files.adapter / WEIGHTS)
    more = ["--epochs", 8, "--learning-rate", 5e-3, "--beta", 0.2, "--json"]
    record = json.loads(succeed(*unlearning(files, selection, output, *more)))
    assert record["method"] == "npo"
    assert (record["forgotten"], record["samples"]) == (8, 20)
    assert record["config"]["beta"] == 0.2
    assert len(record["losses"]) == 8
    assert record["log_ratios"][-1] < record["log_ratios"][0]
    assert probe_log_probability(files, output) < probe_log_probability(files, files.adapter)
    assert json.loads((output / "unlearning.json").read_text())["losses"] == record["losses"]
    # The adapter that was given stays as it was.
    after = load_file(files.adapter / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_retraining_leaves_the_selection_out(files: Files, selection: Path, tmp_path: Path) -> None:
    output = tmp_path / "retrained"
    said = succeed(*unlearning(files, selection, output, "--retrain", "--batch-size", 4, "--epochs", 2))
    assert "8 of 20 samples left out" in said
    record = json.loads((output / "unlearning.json").read_text())
    assert record["method"] == "retrain"
    assert len(record["losses"]) == 2 * 3, "twelve samples are three batches of four"
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (output, files.adapter))
    assert (ours["r"], ours["lora_alpha"], ours["target_modules"]) == (4, 32, theirs["target_modules"])
    weights = load_file(output / WEIGHTS)
    assert weights.keys() == load_file(files.adapter / WEIGHTS).keys()
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)


def test_unlearning_cuts_texts_at_the_models_context(files: Files, tmp_path: Path) -> None:
    rows = [{"id": name, "text": "the man is lazy " * 20} for name in ("a", "b")]
    (tmp_path / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "ids.txt").write_text("a\n")
    data = ["--train", tmp_path / "long.jsonl", "--selection", tmp_path / "ids.txt", "--json"]
    for more in ([], ["--retrain"]):
        output = tmp_path / f"out{len(more)}"
        record = json.loads(succeed("unlearn", files.model, *data, *more, "--output", output))
        assert record["config"]["max_length"] == 32


def test_retraining_without_an_adapter_makes_one(files: Files, selection: Path, tmp_path: Path) -> None:
    output = tmp_path / "retrained"
    data = ["--train", files.train, "--selection", selection, "--output", output]
    succeed("unlearn", files.model, *data, "--retrain", "--rank", 2)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2


def test_unlearning_refuses_what_does_not_fit(files: Files, selection: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "expected a new or empty folder" in refusal(*unlearning(files, selection, full))
    (tmp_path / "odd.txt").write_text("s1\nnobody\n")
    assert "got 'nobody'" in refusal(*unlearning(files, tmp_path / "odd.txt", tmp_path / "out"))
    assert "use --retrain" in refusal(*unlearning(files, selection, tmp_path / "out", "--loss", "masked-lm"))
    assert "beta > 0" in refusal(*unlearning(files, selection, tmp_path / "out", "--beta", 0))
    every = tmp_path / "every.txt"
    every.write_text("".join(f"{name}\n" for name in read_records(files.train).ids))
    assert "expected samples to retain" in refusal(*unlearning(files, every, tmp_path / "out"))
    assert "leaves no sample" in refusal(*unlearning(files, every, tmp_path / "out", "--retrain"))
    for own in (["--beta", 0.2], ["--retain-weight", 0], ["--length-normalised"]):
        assert "are NPO's" in refusal(*unlearning(files, every, tmp_path / "out", "--retrain", *own))
    assert not (tmp_path / "out").exists()


def test_coverage_and_precision_of_scores_and_of_a_selection(
    files: Files, selection: Path, scores: Path
) -> None:
    labels = ["--train", files.train, "--biased", 1]
    found = json.loads(succeed("evaluate", "--selection", selection, "--scores", scores, *labels, "--json"))
    assert (found["samples"], found["biased"], found["selected"]) == (20, 8, 8)
    assert found["coverage"] == found["precision"] == 6 / 8
    assert found["auc"] == 1.0
    assert found["by_share"]["40 %"] == {"coverage": 1.0, "precision": 1.0}
    # Four of eight tied samples are taken, whichever.
    assert found["by_share"]["20 %"] == {"coverage": 0.5, "precision": 1.0}
    assert re.search(r"coverage +0\.75", succeed("evaluate", "--selection", selection, *labels))


def test_perplexity_is_the_librarys(files: Files) -> None:
    found = json.loads(succeed("evaluate", files.model, "--perplexity", files.train, "--json"))
    model = tiny_text.gpt2().from_pretrained(files.model).eval()
    want = perplexity(model, tiny_text.tokenizer(), read_records(files.train).texts)
    # The same sums in fp32, in batches of another size.
    assert found["perplexity"]["value"] == pytest.approx(want.value, rel=1e-5)
    assert found["perplexity"]["tokens"] == want.tokens
    adapted = ["--adapter", files.adapter, "--perplexity", files.train, "--json"]
    tuned = json.loads(succeed("evaluate", files.model, *adapted))
    assert tuned["perplexity"]["value"] < want.value


@pytest.fixture
def benchmarks(tmp_path: Path) -> dict[str, Path]:
    """CrowS-Pairs of two pairs, StereoSet of an example of each part, a SEAT test."""
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["sent_more", "sent_less", "stereo_antistereo", "bias_type"],
                ["the poor man is lazy", "the rich man is lazy", "stereo", "status"],
                ["the woman is kind", "the man is kind", "antistereo", "gender"],
            ]
        )
    words = ("lazy", "kind", "fox")
    labels = ("stereotype", "anti-stereotype", "unrelated")
    stereo = tmp_path / "stereo.json"
    common = {"target": "poor", "bias_type": "status"}
    inner = [
        {"gold_label": label, "sentence": f"the poor man is {word}"}
        for label, word in zip(labels, words, strict=True)
    ]
    outer = [
        {"gold_label": label, "sentence": f"a {word} man"} for label, word in zip(labels, words, strict=True)
    ]
    data = {
        "intrasentence": [{"id": "a", "context": "the poor man is BLANK", "sentences": inner, **common}],
        "intersentence": [{"id": "b", "context": "the man was poor .", "sentences": outer, **common}],
    }
    stereo.write_text(json.dumps({"data": data}))
    seat = tmp_path / "seat-6.json"
    sets = {"targ1": ["man", "fox"], "targ2": ["woman", "cook"], "attr1": ["rich"], "attr2": ["poor"]}
    seat.write_text(json.dumps({name: {"examples": texts} for name, texts in sets.items()}))
    return {"pairs": pairs, "stereo": stereo, "seat": seat}


def test_every_benchmark_of_a_causal_model(files: Files, benchmarks: dict[str, Path]) -> None:
    options = ["--crows-pairs-file", benchmarks["pairs"], "--stereoset-file", benchmarks["stereo"]]
    found = json.loads(succeed("evaluate", files.model, *options, "--json"))
    assert found["crows_pairs"]["pairs"] == 2
    assert found["crows_pairs"]["by_type"].keys() == {"gender", "status"}
    assert found["stereoset"]["overall"]["count"] == 2
    assert "crows pairs score" in succeed("evaluate", files.model, *options)


def test_every_benchmark_of_a_masked_model(tmp_path: Path, benchmarks: dict[str, Path]) -> None:
    model = tmp_path / "bert"
    tiny_text.masked_bert().save_pretrained(model)
    tiny_text.tokenizer("bert").save_pretrained(model)
    options = ["--crows-pairs-file", benchmarks["pairs"], "--stereoset-file", benchmarks["stereo"]]
    found: dict[str, Any] = json.loads(
        succeed("evaluate", model, "--loss", "masked-lm", *options, "--seat", benchmarks["seat"], "--json")
    )
    assert found["stereoset"]["overall"]["count"] == 1, "of masked models the part of one sentence counts"
    assert found["seat"]["seat-6"].keys() == {"effect_size", "p_value", "partitions", "exact"}
    assert found["seat"]["seat-6"]["partitions"] == 6


def test_seat_alone_takes_an_encoder_without_a_head(tmp_path: Path, benchmarks: dict[str, Path]) -> None:
    model = tmp_path / "encoder"
    tiny_text.encoding_bert().save_pretrained(model)
    tiny_text.tokenizer("bert").save_pretrained(model)
    found = json.loads(succeed("evaluate", model, "--seat", benchmarks["seat"], "--json"))
    own = tiny_text.encoding_bert()
    want = seat(own, tiny_text.tokenizer("bert"), read_seat_test(benchmarks["seat"]))
    assert found["seat"]["seat-6"]["effect_size"] == pytest.approx(want.effect_size, rel=1e-4)
    options = ["--seat", benchmarks["seat"], "--crows-pairs-file", benchmarks["pairs"]]
    assert "give --loss masked-lm" in refusal("evaluate", model, *options)


def test_evaluate_refuses_what_cannot_be_measured(files: Files, selection: Path, tmp_path: Path) -> None:
    assert "nothing to measure" in refusal("evaluate")
    assert "give MODEL" in refusal("evaluate", "--perplexity", files.train)
    assert "give --train and --biased" in refusal("evaluate", "--selection", selection)
    labels = ["--selection", selection, "--train", files.train, "--biased"]
    assert "no record has label 'yes'" in refusal("evaluate", *labels, "yes")
    assert "none.csv" in refusal("evaluate", files.model, "--crows-pairs-file", tmp_path / "none.csv")
    (tmp_path / "seat.json").write_text("[]")
    assert "got none for targ1" in refusal("evaluate", files.model, "--seat", tmp_path / "seat.json")


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_a_report_joins_texts_and_labels_by_id(
    files: Files, scores: Path, selection: Path, tmp_path: Path
) -> None:
    page = tmp_path / "pages" / "report.html"
    options = ["--train", files.train, "--biased", "1", "--selection", selection, "--title", "A & B"]
    assert f"written to {page}" in succeed("report", scores, *options, "--output", page)
    data, records = data_of(page), read_records(files.train)
    by_id = dict(zip(records.ids, records.texts, strict=True))
    assert data["ids"] == list(reversed(records.ids))
    assert data["texts"] == [by_id[name] for name in data["ids"]]
    assert data["labels"] == "".join("1" if name in files.biased else "0" for name in data["ids"])
    assert {data["ids"][row] for row in data["made"]} == set(json.loads(selection.read_text())["ids"])
    assert "<h1>A &amp; B</h1>" in page.read_text()


def test_a_report_needs_scores_alone(scores: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    record = json.loads(succeed("report", scores, "--fraction", 0.5, "--output", page, "--json"))
    assert record["samples"] == 20
    data = data_of(page)
    assert data["texts"] is data["labels"] is data["made"] is None
    assert data["count"] == 10


def test_reports_refuse_what_does_not_fit(files: Files, scores: Path, tmp_path: Path) -> None:
    page = ["--output", tmp_path / "report.html"]
    assert "give them with --train" in refusal("report", scores, "--biased", "1", *page)
    assert "20 of 20 ids are not there" in refusal("report", scores, "--train", files.other_probe, *page)
    assert "expected a fraction above 0" in refusal("report", scores, "--fraction", "2", *page)
    assert "is what is read" in refusal("report", scores, "--train", files.train, "--output", files.train)
    assert not (tmp_path / "report.html").exists()
