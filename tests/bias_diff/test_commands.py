"""``fastproj score`` and ``select`` on a tiny fine-tune: what they write, resume and refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from bias_diff_files import PROBE, Files, make_files
from click.testing import Result
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastproj.bias_diff.commands import one_line, read_selection
from fastproj.bias_diff.records import read_records
from fastproj.bias_diff.score_command import parse_probes, parse_sketch
from fastproj.bias_diff.training import add_adapter
from fastproj.cli import app
from fastproj.influence.batches import TokenBatches
from fastproj.influence.scorer import InfluenceScorer
from fastproj.influence.scores import Scores
from fastproj.influence.select import select
from fastproj.influence.store import SketchStore
from fastproj.influence.writer import ScoreWriter


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(code: int, *arguments: object) -> str:
    """What a command that leaves with ``code`` says, which must be one line on what is wrong."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, result.stderr
    assert "Traceback" not in result.output
    return told[0]


def by_hand(files: Files, optimizer: Path | None, *, normalize: bool = True) -> dict[str, float]:
    """Scores of every sample against the probe, one sample a batch, by the library."""
    base = tiny_text.gpt2().from_pretrained(files.model)
    model = PeftModel.from_pretrained(base, str(files.adapter), is_trainable=True)
    tokenizer = tiny_text.tokenizer()
    scorer = InfluenceScorer(model, optimizer)
    probes = [{"input_ids": tokenizer(text)["input_ids"]} for text in PROBE]
    references = scorer.reference(TokenBatches(probes, pad_token_id=0, max_samples=1))
    records = read_records(files.train)
    samples = [
        {"id": name, "input_ids": tokenizer(text)["input_ids"]}
        for name, text in zip(records.ids, records.texts, strict=True)
    ]
    scores = scorer.score(
        TokenBatches(samples, pad_token_id=0, max_samples=1), references, normalize=normalize
    )
    return dict(zip(scores.ids, scores.values[:, 0].tolist(), strict=True))


@pytest.mark.parametrize(("adam", "normalize"), [(True, True), (False, False)])
def test_scores_are_those_of_the_scorer(files: Files, tmp_path: Path, adam: bool, normalize: bool) -> None:
    output = tmp_path / "scores.parquet"
    plain = [a for a in files.scoring if a not in ("--optimizer", str(files.optimizer))]
    tuned = files.scoring if adam else plain
    choice = "--normalize" if normalize else "--dot"
    said = succeed("score", *tuned, "--batch-tokens", 40, choice, "--output", output)
    assert "20 samples scored against trait" in said
    scores = Scores.load(output)
    assert scores.names == ("trait",)
    want = by_hand(files, files.optimizer if adam else None, normalize=normalize)
    assert set(scores.ids) == set(want)
    # Sums in fp32 over batches of another size, of cosines up to 1 or dots of the same gradients.
    assert scores.values[:, 0].tolist() == pytest.approx([want[i] for i in scores.ids], rel=1e-3, abs=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.parquet"]


def test_several_probes_sketches_and_json(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    extra = ["--probe", files.other_probe, "--sketch", "rademacher:32", "--json"]
    said = succeed("score", *files.scoring, *extra, "--output", output)
    record = json.loads(said)
    assert record.pop("seconds") > 0
    store = tmp_path / "scores.sketches"
    assert record == {
        "output": str(output),
        "samples": 20,
        "names": ["trait", "other"],
        "sketches": str(store),
    }
    assert Scores.load(output).names == ("trait", "other")
    sketches = SketchStore(store)
    assert (len(sketches), sketches.dimension) == (20, 32)
    assert sketches.ids() == Scores.load(output).ids


def test_every_checkpoint_counts_by_its_learning_rate(files: Files, tmp_path: Path) -> None:
    states = sorted((files.folder / "run").iterdir())
    assert len(states) == 2
    options = [str(files.model), "--train", files.train, "--probe", files.probe]
    both = [argument for state in states for argument in ("--checkpoint", state)]
    succeed("score", *options, *both, "--output", tmp_path / "both.parquet")
    total = dict.fromkeys(Scores.load(tmp_path / "both.parquet").ids, 0.0)
    for number, state in enumerate(states):
        output = tmp_path / f"{number}.parquet"
        succeed("score", *options, "--checkpoint", state, "--output", output)
        one = Scores.load(output)
        total = {i: total[i] + v for i, v in zip(one.ids, one.values[:, 0].tolist(), strict=True)}
    both_scores = Scores.load(tmp_path / "both.parquet")
    assert both_scores.values[:, 0].tolist() == pytest.approx([total[i] for i in both_scores.ids], rel=1e-5)


class Interrupted(KeyboardInterrupt):
    """The user's Ctrl-C after some batches."""


def test_an_interrupted_run_goes_on_where_it_was(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    options = [*files.scoring, "--batch-tokens", 24]
    succeed("score", *options, "--output", whole)
    append, rows = ScoreWriter.append, []

    def counted(self: ScoreWriter, ids: Any, values: Any, *, start: int | None = None) -> None:
        if not rows and len(appended) == 2:
            raise Interrupted
        appended.append(len(ids))
        append(self, ids, values, start=start)

    appended: list[int] = []
    monkeypatch.setattr(ScoreWriter, "append", counted)
    assert run("score", *options, "--output", output).exit_code not in (0, 1, 2)
    before = sum(appended)
    assert not output.exists()
    assert "go on with --resume" in refusal(2, "score", *options, "--output", output)
    rows.append("no more interruptions")
    succeed("score", *options, "--output", output, "--resume")
    assert sum(appended) == 20, "rows that were there were computed again"
    assert 0 < before < 20
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.parquet", "whole.parquet"]


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.parquet"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "append", full)
        assert "No space left on device" in refusal(1, "score", *files.scoring, "--output", output)
    succeed("score", *files.scoring, "--output", output, "--resume")
    assert len(Scores.load(output)) == 20


def test_resuming_another_run_is_refused(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "scores.parquet"
    succeed("score", *files.scoring, "--output", output)
    before = output.read_bytes()
    assert "names is ('trait',) there" in refusal(
        2, "score", *files.scoring, "--probe", files.other_probe, "--output", output, "--resume"
    )
    assert "normalize" in refusal(2, "score", *files.scoring, "--dot", "--output", output, "--resume")
    assert output.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [output], "a refusal leaves nothing behind"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--text-column", "sentence"], "expected a column 'sentence'"),
        (["--probe", "trait=again.csv"], "each its own, got 'trait=again.csv'"),
        (["--sketch", "dense:0"], "expected KIND:K"),
        (["--adapter", "nowhere"], "adapter nowhere: expected a folder with adapter_config.json"),
        (["--optimizer", "nowhere.pt"], "nowhere.pt"),
        (["--params", "trainable", "--loss", "masked-lm"], "model"),
        (["--device", "toaster"], "device toaster"),
        (["--sketch", "sjlt:100"], "power of two"),
        (["--sketch", "srht:64", "--checkpoint", "anywhere"], "give no --checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(2, "score", *files.scoring, *changed)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_to_be_used_is_refused(files: Files, tmp_path: Path) -> None:
    data = ["--train", files.train, "--probe", files.probe, "--output", tmp_path / "s.parquet"]
    told = refusal(2, "score", files.model, "--adapter", files.adapter, "--less", *data)
    assert "--less is a form of Adam's update" in told
    (tmp_path / "s.sketches").mkdir()
    told = refusal(2, "score", *files.scoring, "--sketch", "srht:64", "--output", tmp_path / "s.parquet")
    assert "s.sketches is there already" in told


def test_references_of_other_weights_are_not_taken_for_these(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is ended after its probes and before its first row; another adapter follows."""
    output, whole = tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    first = files.folder / "run" / "checkpoint-5"
    data = ["--train", files.train, "--probe", files.probe]
    options = ["score", files.model, "--adapter", files.adapter, *data, "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(InfluenceScorer, "score", lambda *_, **__: (_ for _ in ()).throw(OSError("no disk")))
        assert "no disk" in refusal(1, "score", files.model, "--adapter", first, *data, "--output", output)
    assert list(tmp_path.glob("*.references-*"))
    succeed(*options, output, "--resume")
    succeed(*options, whole)
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [output, whole]


def test_texts_are_cut_at_the_models_context(files: Files, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the man is lazy " * 20}) + "\n")
    options = [*files.scoring, "--train", tmp_path / "long.jsonl", "--output", tmp_path / "scores.parquet"]
    assert "1 samples scored" in succeed("score", *options)


@pytest.mark.parametrize("change", ["fewer", "more"])
def test_an_adapter_of_another_model_is_refused(files: Files, tmp_path: Path, change: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(files.adapter, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(weights))
    if change == "fewer":
        del weights[name]
    else:
        weights[name.replace(".h.0.", ".h.9.")] = weights[name].clone()
    save_file(weights, adapter / "adapter_model.safetensors")
    data = ["--train", files.train, "--probe", files.probe, "--output", tmp_path / "s.parquet"]
    told = refusal(2, "score", files.model, "--adapter", adapter, *data)
    assert "is of another model: 1 weights" in told


def test_a_model_that_is_none_or_a_masked_one_is_refused_by_name(files: Files, tmp_path: Path) -> None:
    options = ["--train", files.train, "--probe", files.probe, "--output", tmp_path / "s.parquet"]
    assert f"model {tmp_path} cannot be loaded" in refusal(2, "score", tmp_path, *options)
    tiny_text.masked_bert().save_pretrained(tmp_path)
    tiny_text.tokenizer("bert").save_pretrained(tmp_path)
    assert "give --loss masked-lm" in refusal(2, "score", tmp_path, *options)


def test_a_head_that_would_be_random_is_refused_unless_the_adapter_brings_it(
    files: Files, tmp_path: Path
) -> None:
    tiny_text.encoding_bert().save_pretrained(tmp_path / "bert")
    tiny_text.tokenizer("bert").save_pretrained(tmp_path / "bert")
    data = ["--train", files.train, "--probe", files.train, "--loss", "classification"]
    told = refusal(2, "score", tmp_path / "bert", *data, "--output", tmp_path / "s.parquet")
    assert "no weights for classification" in told
    assert "classifier" in told
    model = tiny_text.classifying_bert()
    add_adapter(model, task="classification", rank=2).save_pretrained(tmp_path / "adapter")
    succeed(
        "score",
        tmp_path / "bert",
        "--adapter",
        tmp_path / "adapter",
        *data,
        "--output",
        tmp_path / "s.parquet",
    )
    assert len(Scores.load(tmp_path / "s.parquet")) == 20


def test_an_optimiser_of_another_model_is_refused(files: Files, tmp_path: Path) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    torch.save(other.state_dict(), tmp_path / "optimizer.pt")
    options = [*files.scoring, "--optimizer", tmp_path / "optimizer.pt", "--output", tmp_path / "s.parquet"]
    assert "parameters" in refusal(2, "score", *options)


def test_probes_and_sketches_are_read_from_words() -> None:
    assert parse_probes(["race=a/b.csv", "c/d.e.jsonl"]) == {
        "race": Path("a/b.csv"),
        "d.e": Path("c/d.e.jsonl"),
    }
    assert parse_sketch(None) is None
    assert parse_sketch("srht:4096") == ("srht", 4096)
    for wrong in ("srht", "srht:", "srht:-1", "srht:1.5", "none:8", ""):
        with pytest.raises(ValueError, match="expected KIND:K"):
            parse_sketch(wrong)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    values = torch.tensor([[0.5, -1.0], [0.1, 0.9], [0.4, 0.4], [-0.2, 0.0]])
    Scores(("a", "b", "c", "d"), ("first", "second"), values).save(tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["--count", "2"], ["b", "c"]),
        (["--fraction", "0.25", "--aggregate", "max"], ["b"]),
        (["--count", "3", "--aggregate", "max"], ["b", "a", "c"]),
        ([], ["b"]),
    ],
)
def test_select_takes_the_highest(scores: Path, tmp_path: Path, options: list[str], ids: list[str]) -> None:
    output = tmp_path / "selection.json"
    record = json.loads(succeed("select", scores, *options, "--output", output, "--json"))
    assert record["ids"] == ids
    assert record["output"] == str(output)
    assert json.loads(output.read_text())["ids"] == ids
    assert read_selection(output) == tuple(ids)


def test_a_balanced_selection_and_its_text_file(scores: Path, tmp_path: Path) -> None:
    said = succeed("select", scores, "--count", 2, "--balanced", "--output", tmp_path / "ids.txt")
    want = select(Scores.load(scores), count=2, balanced=True).ids
    assert (tmp_path / "ids.txt").read_text() == "".join(f"{name}\n" for name in want)
    assert read_selection(tmp_path / "ids.txt") == want
    assert "2 of 4 samples (50.0 %)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "5"], "expected a count from 1 to 4"),
        (["--count", "1", "--fraction", "0.5"], "expected one of fraction and count"),
        (["--fraction", "0"], "expected a fraction above 0"),
        (["--output", "selection.jsonl"], "ends in .json or .txt"),
        (["--output", "scores.parquet"], "ends in .json or .txt"),
    ],
)
def test_select_refuses_what_cannot_be(
    scores: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    before = scores.read_bytes()
    assert message in refusal(2, "select", scores, "--output", tmp_path / "selection.json", *options)
    assert scores.read_bytes() == before
    assert not (tmp_path / "selection.json").exists()


def test_select_refuses_what_is_no_table_of_scores(tmp_path: Path) -> None:
    assert "is no file" in refusal(2, "select", tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no scores")
    assert "no whole Parquet file" in refusal(2, "select", tmp_path / "text.parquet")


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "{"), ("b.json", "{}"), ("c.json", "[]"), ("d.txt", "\n"), ("e.jsonl", '{"ids": ["s1"]}')],
)
def test_selections_without_ids_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_selection(tmp_path / name)


def test_errors_fit_on_a_line() -> None:
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert len(one_line(ValueError("long " * 1000))) < 700


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from fastproj.cli import app
for command in ([], ["score"], ["select"], ["unlearn"], ["evaluate"], ["report"]):
    assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0
heavy = ("torch", "triton", "transformers", "peft", "datasets", "pyarrow", "jinja2", "numpy")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
