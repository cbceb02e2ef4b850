"""The study end to end on a tiny model and made-up texts: runs, what is gone on from, tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from balance_study_texts import FIRST, SECOND, install, load
from typer.testing import CliRunner

from fastproj.balance.study import arms, command, runs, summary


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.setattr("fastproj.bias_diff.sources.smollm2_loader", lambda cache: load)


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def session(name: str = FIRST.name) -> runs.Session:
    made = runs.Session(name, load)
    made.block, made.weight = 2, 0.5
    made.rates = {arm.name: 3e-3 for arm in arms.MAIN}
    return made


@pytest.mark.slow
def test_a_study_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--output", str(out), "--cache", str(tmp_path)]
    assert run(*options, "--seeds", "1", "--main").exit_code == 0
    first = json.loads((out / "ratings-0" / f"{arms.PLAIN.name}.json").read_text(encoding="utf-8"))
    assert run(*options, "--seeds", "2", "--task", "ratings").exit_code == 0
    again = json.loads((out / "ratings-0" / f"{arms.PLAIN.name}.json").read_text(encoding="utf-8"))
    assert again == first
    report = (out / "report.md").read_text(encoding="utf-8")
    for text in ("## Ratings", "## Groups", *(f"| {name} | 2 |" for name in summary.ORDER)):
        assert text in report
    assert "nan" not in report
    record = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = {(r["task"], r["seed"], r["arm"]): r for r in record["runs"]}
    assert len(found) == 2 * len(summary.ORDER) + 3 + 2 * len(arms.MAIN)
    for own in found.values():
        assert math.isfinite(own["perplexity"])
        assert len(own["said"]) == len(own["gold"]) == 20
        assert "scores" not in own
    (weighed,) = [r for r in record["choices"] if "weight" in r]
    assert weighed["task"] == "ratings"
    scores = {float(weight): tried["macro_f1"] for weight, tried in weighed["weights"].items()}
    assert scores[weighed["weight"]] == max(scores.values())
    assert found["ratings", 1, arms.BALANCE.name]["weight"] == weighed["weight"]
    chosen = found["ratings", 0, arms.PLAIN.name]
    assert list(chosen["tried"]) == ["0.0001", "0.003"]
    assert chosen["validation"]["macro_f1"] == max(t["macro_f1"] for t in chosen["tried"].values())
    assert list(found["ratings", 1, arms.PLAIN.name]["tried"]) == [str(chosen["learning_rate"])]
    for name in ("block, propensity alone at 0.3", "random block, balance"):
        rate = found["ratings", 0, arms.BALANCE.name]["learning_rate"]
        assert found["ratings", 0, name]["learning_rate"] == rate


def test_the_weights_come_from_the_first_task(tmp_path: Path) -> None:
    result = run("--output", str(tmp_path), "--cache", str(tmp_path), "--seeds", "1", "--task", "groups")
    assert result.exit_code == 2
    assert "rates and weights are chosen on ratings" in " ".join(result.output.split())
    result = run("--output", str(tmp_path), "--cache", str(tmp_path), "--task", "others")
    assert "expected some of ratings, groups, got others" in " ".join(result.output.split())


def test_a_run_that_fails_is_told_and_left_for_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("step 3: the loss is nan")

    monkeypatch.setattr(runs, "fit", fails)
    made, told = session(), []
    command.Runs(made, 1, tmp_path, told.append).main()
    assert [line for line in told if "failed" in line]
    assert sorted(path.stem for path in tmp_path.glob("ratings-0/*")) == ["ablation", "weight", "zero-shot"]


def test_an_arm_leaves_the_models_as_they_were() -> None:
    made = session()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    prompts = made.examples(made.draw(0).test)
    scores = made._scores(made.model, prompts)
    for arm in (arms.BALANCE, arms.LORA, *(arm for arm in arms.MORE if arm.place == "first")):
        record = made.run(arm, 0)
        assert record["trained"] > 0
        assert record["block"] == {"chosen": None if arm.lora else 2, "first": 0}[arm.place]
    assert before.keys() == made.model.state_dict().keys()
    assert torch.equal(made._scores(made.model, prompts), scores)
    # Folded or not, the model is the same one.
    torch.testing.assert_close(made._scores(made._models[2], prompts), scores, rtol=1e-4, atol=1e-4)


def test_a_random_block_is_another_one() -> None:
    made = session()
    random = next(arm for arm in arms.MORE if arm.place == "random")
    assert {made.place(random, seed) for seed in range(5)} == {1}
    assert [made.place(arm, 0) for arm in arms.MORE if arm.place in ("last", "first")] == [3, 0]
    made.block = None
    with pytest.raises(ValueError, match="chosen before this arm is run"):
        made.place(arms.PLAIN, 0)


def test_calibrations_are_of_the_same_scores() -> None:
    zero, contextual, domain = session(SECOND.name).zero_shot(0)
    assert [record["arm"] for record in (zero, contextual, domain)] == list(summary.ORDER[:3])
    scores = [torch.tensor(record["scores"]) for record in (zero, contextual, domain)]
    for record, own in ((contextual, scores[1]), (domain, scores[2])):
        # The records' scores have four decimals.
        expected = scores[0] - torch.tensor(record["prior"]).log().float()
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-3)
