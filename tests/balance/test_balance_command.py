"""``fastproj balance`` on a tiny model: what it trains, measures, writes and refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from balance_files import LABELS, TEXTS, Files, make_files, repeated, report, written
from command_line import refusal, run
from peft import PeftModel
from safetensors.torch import load_file

import fastproj
from fastproj.balance import comparison
from fastproj.balance.adapter import remove_balance_adapter
from fastproj.balance.calibration import calibrated, contextual_prior, domain_prior
from fastproj.balance.findings import METHODS, ZERO_SHOT
from fastproj.balance.metrics import classification
from fastproj.balance.predict import decided, predict
from fastproj.balance.prompts import Prompt, encode
from fastproj.bias_diff.perplexity import perplexity
from fastproj.bias_diff.records import read_records

EVERY = tuple(name for name in METHODS if name != ZERO_SHOT)
PROMPT = Prompt("{text} is")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


def by_method(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in found["rows"]}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def measured(files: Files, tuned: Callable[[Any], Any], names: list[str]) -> tuple[dict[str, Any], float]:
    """Measures and perplexity of the model on disk, changed by ``tuned``."""
    from transformers import AutoModelForCausalLM

    model = tuned(AutoModelForCausalLM.from_pretrained(files.model))
    tokenizer = tiny_text.tokenizer()
    labels = fastproj.label_words(tokenizer, names)
    examples = encode(read_records(files.test), tokenizer, labels, PROMPT)
    scores = predict(model, tokenizer, examples, labels)
    gold = [example.labels[0] for example in examples]
    value = perplexity(model, tokenizer, read_records(files.held_out).texts).value
    return classification(decided(scores), gold, names).to_dict(), value


def test_every_method_is_measured_alike_and_read_back(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    options = ("--held-out", files.held_out, "--epochs", 2, *repeated("--method", EVERY))
    found = report(*files.balance(output, *options))
    rows = by_method(found)
    assert list(rows) == [ZERO_SHOT, *EVERY]
    names = [label["name"] for label in found["labels"]]
    assert set(names) == set(LABELS)
    assert found["layer"] == found["interchange"]["best"]
    assert len(found["interchange"]["per_sample"]) == 6
    assert found["samples"] == 24
    assert found["gold"] == pytest.approx({"rich": 0.5, "poor": 0.25, "kind": 0.25})
    loads: dict[str, Callable[[Any], Any]] = {
        ZERO_SHOT: lambda model: model,
        "balance": lambda model: fastproj.load_balance_adapter(model, output / "balance"),
        "layer": lambda model: fastproj.load_balance_adapter(model, output / "layer"),
        "lora": lambda model: PeftModel.from_pretrained(model, str(output / "lora")),
    }
    for name, load in loads.items():
        measures, value = measured(files, load, names)
        assert rows[name]["measures"] == measures, name
        assert rows[name]["perplexity"] == pytest.approx(value, rel=1e-5), name
        predicted = rows[name]["predicted"]
        assert sum(predicted.values()) == pytest.approx(1)
    for name in ("cc", "dc"):
        assert rows[name]["perplexity"] == rows[ZERO_SHOT]["perplexity"]
        assert sum(rows[name]["prior"].values()) == pytest.approx(1)
        assert rows[name]["trained"] == 0
    assert rows["balance"]["trained"] == rows["layer"]["trained"] > 0
    assert rows["lora"]["share"] > 0
    assert rows["balance"]["predicted"] != rows[ZERO_SHOT]["predicted"]
    assert set(found["early_exit_after"]) == {"balance", "layer", "lora"}
    assert {path.name for path in output.iterdir()} == {
        "balance", "layer", "lora", "report.html", "report.json",
    }  # fmt: skip
    assert not list(output.rglob("*.bin"))


def test_the_model_is_fresh_for_every_method(llama: Files, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    one, two = (
        by_method(report(*llama.balance(folder, "--layer", 1, *repeated("--method", methods))))
        for folder, methods in zip(folders, (EVERY, EVERY[::-1]), strict=True)
    )
    assert list(two) == [ZERO_SHOT, *EVERY[::-1]]
    for name in one:
        found, again = ({k: v for k, v in own[name].items() if k != "seconds"} for own in (one, two))
        assert found == again
    weights = {
        name: [weights_in(folder / name) for folder in folders] for name in ("balance", "layer", "lora")
    }
    for name, (found, again) in weights.items():
        assert found.keys() == again.keys()
        assert all(torch.equal(found[key], again[key]) for key in found), name
    balanced, plain = weights["balance"][0], weights["layer"][0]
    assert balanced.keys() == plain.keys()
    assert not all(torch.equal(balanced[key], plain[key]) for key in balanced)


def test_layer_is_balance_without_its_terms(llama: Files, tmp_path: Path) -> None:
    plain = ("--layer", 0, "--beta", 0, "--gamma", 0, *repeated("--method", ("balance", "layer")))
    rows = by_method(report(*llama.balance(tmp_path, *plain)))
    keys = ("measures", "losses", "trained", "learning_rate")
    assert all(rows["balance"][key] == rows["layer"][key] for key in keys)
    one, two = (weights_in(tmp_path / name) for name in ("balance", "layer"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_calibrations_are_those_of_the_package(llama: Files, tmp_path: Path) -> None:
    found = report(*llama.balance(tmp_path, *repeated("--method", ("cc", "dc")), "--seed", 4))
    assert found["layer"] is None
    assert found["interchange"] is None  # no block is trained, so none is looked for
    model, tokenizer = tiny_text.llama(48), tiny_text.tokenizer()
    names = [label["name"] for label in found["labels"]]
    labels = fastproj.label_words(tokenizer, names)
    examples = encode(read_records(llama.test), tokenizer, labels, PROMPT)
    scores, gold = predict(model, tokenizer, examples, labels), [one.labels[0] for one in examples]
    priors = {
        "cc": contextual_prior(model, tokenizer, labels, PROMPT),
        "dc": domain_prior(model, tokenizer, labels, PROMPT, read_records(llama.train).texts, seed=4),
    }
    rows = by_method(found)
    for name, prior in priors.items():
        assert list(rows[name]["prior"].values()) == pytest.approx(prior.tolist(), rel=1e-5)
        want = classification(decided(calibrated(scores, prior)), gold, names).to_dict()
        assert rows[name]["measures"] == want


def test_learning_rates_are_chosen_by_validation_and_a_diverging_one_is_left(
    llama: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = comparison.train

    def diverges(
        model: Any, tokenizer: Any, examples: Any, labels: Any, config: Any, *more: Any, **named: Any
    ) -> Any:
        if config.learning_rate == 1.0:
            raise ValueError("step 2: the loss is nan")
        return trained(model, tokenizer, examples, labels, config, *more, **named)

    monkeypatch.setattr(comparison, "train", diverges)
    rates = repeated("--learning-rate", (1e-9, 1.0))
    options = ("--validation", llama.test, "--layer", 1, *repeated("--method", ("balance", "lora")))
    rows = by_method(report(*llama.balance(tmp_path, *rates, *options)))
    for name in ("balance", "lora"):
        tried = rows[name]["validation"]
        assert list(tried) == ["0.01", "1e-09", "1"]
        scores = {rate: measures.get("macro_f1", -1.0) for rate, measures in tried.items()}
        assert scores[f"{rows[name]['learning_rate']:g}"] == max(scores.values())
    assert rows["balance"]["validation"]["1"] == {"error": "step 2: the loss is nan"}
    kept = rows["balance"]["validation"][f"{rows['balance']['learning_rate']:g}"]
    assert kept == rows["balance"]["measures"]  # the same samples, the same parameters


def test_several_labels_a_sample(llama: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ["--train", llama.several, "--test", llama.several, "--prompt", "{text} is", "--multi-label"]
    methods = repeated("--method", ("balance", "cc"))
    more = ["--samples", 5, "--learning-rate", 1e-2, "--output", output, *methods]
    found = report("balance", llama.model, *given, *more)
    rows = by_method(found)
    assert found["multi_label"] is True
    assert found["gold"]["lazy"] == pytest.approx(54 / 73)
    assert rows["balance"]["measures"]["support"]["lazy"] == 54
    assert sum(rows["balance"]["predicted"].values()) > 1
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "none missing" in page


def test_rank_and_the_table_and_the_page(llama: Files, tmp_path: Path) -> None:
    result = run(*llama.balance(tmp_path / "out", "--rank", 2, "--held-out", llama.held_out))
    assert result.exit_code == 0, result.output
    for word in ("zero-shot", "weighted", "F1 by label", "perplexity", "written to", "Exchanging block"):
        assert word in " ".join(result.stdout.split())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for word in (
        "Methods",
        "F1 by label",
        "Predicted share",
        "Exchange of attention",
        "Label logits by layer",
    ):
        assert word in page
    assert not [text for text in TEXTS if text in page]
    config = json.loads((tmp_path / "out" / "balance" / "adapter_config.json").read_text())
    assert config["r"] == 2
    row = json.loads((tmp_path / "out" / "report.json").read_text())["rows"][1]
    tuned = fastproj.load_balance_adapter(tiny_text.llama(48), tmp_path / "out" / "balance", trainable=True)
    assert row["trained"] == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    size = sum(p.numel() for p in tiny_text.llama(48).parameters())
    assert row["share"] == pytest.approx(row["trained"] / size)


def test_what_is_done_is_kept_when_a_later_method_fails(
    llama: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = comparison.train

    def fails(model: Any, *arguments: Any, **named: Any) -> Any:
        if "self_attn.q_proj.lora_A" in "".join(name for name, _ in model.named_parameters()):
            raise ValueError("step 3: the loss is nan")
        return trained(model, *arguments, **named)

    monkeypatch.setattr(comparison, "train", fails)
    methods = repeated("--method", ("balance", "lora", "cc"))
    told = refusal(*llama.balance(tmp_path / "out", "--layer", 0, *methods))
    assert told == "Error: lora: step 3: the loss is nan"
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(by_method(kept)) == [ZERO_SHOT, "balance"]
    assert "balance" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    fastproj.load_balance_adapter(tiny_text.llama(48), tmp_path / "out" / "balance")


def test_a_model_that_does_not_come_back_is_no_comparison(
    llama: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoils(adapted: Any) -> Any:
        model = remove_balance_adapter(adapted)
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)
        return model

    monkeypatch.setattr(comparison, "remove_balance_adapter", spoils)
    result = run(*llama.balance(tmp_path / "out", "--layer", 0))
    assert result.exit_code == 1
    assert "not what it was before balance" in result.stderr


def test_all_rates_diverging_is_an_error(llama: Files, tmp_path: Path) -> None:
    samples = ["--train", llama.train, "--test", llama.test, "--validation", llama.test]
    given = [*samples, "--prompt", "{text} is"]
    # Beyond what fp32 holds, whatever the rate.
    options = ["--gamma", 1e38, *repeated("--learning-rate", (1e-3, 1e-2))]
    told = refusal("balance", llama.model, *given, "--layer", 0, *options, "--output", tmp_path / "out")
    assert "balance: no learning rate of 0.001, 0.01 kept the loss finite" in told


def test_refusals_come_before_any_work(llama: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"

    def begins(*_: Any, **__: Any) -> Any:
        raise AssertionError("work has begun")

    monkeypatch.setattr(comparison, "predict", begins)
    monkeypatch.setattr(comparison, "train", begins)
    other = written(tmp_path / "other.jsonl", [{"text": "the fox", "label": "lazy"}])
    empty = written(tmp_path / "empty.jsonl", [{"text": "the fox", "label": []}])
    assert "new or empty" in refusal(*llama.balance(llama.folder))
    assert "from 0 to 1, got 2" in refusal(*llama.balance(output, "--layer", 2))
    assert "got 'last'" in refusal(*llama.balance(output, "--layer", "last"))
    assert "got '-1'" in refusal(*llama.balance(output, "--layer", -1))
    assert "--validation: give that" in refusal(*llama.balance(output, "--learning-rate", 1e-3))
    assert "beta: expected a factor" in refusal(*llama.balance(output, "--beta", "inf"))
    told = refusal(*llama.balance(output, "--test", other))
    assert told.startswith(f"Error: --test {other}: record '0': expected a label of")
    assert told.endswith("got 'lazy'")
    assert "--validation" in refusal(*llama.balance(output, "--validation", other))
    assert "no such file" in refusal(*llama.balance(output, "--held-out", tmp_path / "no.jsonl"))
    several = ("--multi-label", "--train", llama.several)
    assert "--test: expected a sample with a label" in refusal(
        *llama.balance(output, *several, "--test", empty)
    )
    assert "two labels or more" in refusal(*llama.balance(output, "--train", other))
    same = repeated("--label", ["rich=man kind", "poor=man lazy", "kind"])
    assert "same token" in refusal(*llama.balance(output, *same))
    for option in ("--epochs", "--rank", "--batch-size", "--samples"):
        assert run(*llama.balance(output, option, 0)).exit_code == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "fastproj-torch[demo]" in refusal(*llama.balance(output))
    assert not output.exists()
