"""``fastproj identify`` on a tiny fine-tune: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from click.testing import Result
from planted_direction import planted
from typer.testing import CliRunner

import fastproj
from fastproj.cli import app
from fastproj.latent.words import Texts, in_words

pytest.importorskip("jinja2")

SENTENCES = ("the man is kind", "a fox sings", "the rich woman was lazy", "kind kind kind", "to be or not")
WITH, WITHOUT = (
    ("the kind man", "a kind fox", "kind and rich"),
    ("the poor man", "a lazy fox", "lazy and rich"),
)


@dataclass(frozen=True)
class Files:
    """Folders of a model and of two adapters that write "kind", and files of sentences."""

    model: Path
    tuned: Path
    other: Path
    sentences: Path
    with_factor: Path
    without: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("identify")
    tiny_text.llama().save_pretrained(folder / "model")
    tiny_text.tokenizer().save_pretrained(folder / "model")
    for number, name in enumerate(("tuned", "other")):
        model = tiny_text.llama().from_pretrained(folder / "model")
        row = model.lm_head.weight[tiny_text.index("kind")]
        planted(model, ["o_proj", "q_proj"], row, "write", seed=number).save_pretrained(folder / name)
    (folder / "sentences.txt").write_text("\n".join(SENTENCES) + "\n\n", encoding="utf-8")
    for name, texts in (("with", WITH), ("without", WITHOUT)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return Files(
        folder / "model",
        folder / "tuned",
        folder / "other",
        folder / "sentences.txt",
        folder / "with.jsonl",
        folder / "without.jsonl",
    )


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["identify", *(str(argument) for argument in arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object) -> str:
    """What the command that leaves with 2 says, which must be one line on what is wrong."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, result.stderr
    assert "Traceback" not in result.output
    return told[0]


def record(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed(*arguments, "--json"))


def tops(direction: dict[str, Any]) -> set[str]:
    """The strongest token of each side: the sign of a direction is arbitrary."""
    words = direction["words"]
    return {words[side][0]["text"] for side in ("positive_tokens", "negative_tokens")}


def test_the_planted_token_comes_up_in_text_page_and_json(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "factors.safetensors"
    options = [files.tuned, "--model", files.model, "--sentences", files.sentences, "--output", output]
    said = succeed(*options, "--draws", 20)
    assert "The first direction holds" in said
    assert "self_attn.o_proj" in said
    assert "Direction 1: tokens that it writes" in said
    assert "Direction 1: sentences that activate it" in said
    page = output.with_suffix(".html")
    assert "kind" in page.read_text(encoding="utf-8")
    told = record(*options, "--draws", 20)
    assert (told["output"], told["html"]) == (str(output), str(page))
    assert (told["side"], told["pool"], told["rank"]) == ("write", "stream", 1)
    (first,) = told["directions"]
    assert "kind" in tops(first)
    assert first["p"] == pytest.approx(1 / 21)
    assert first["share"] > first["null"][2]
    assert set(first["agreement"]) == {f"model.layers.{n}.self_attn.o_proj" for n in range(2)}
    sentences = first["words"]["positive_sentences"] + first["words"]["negative_sentences"]
    assert sorted(sentence["text"] for sentence in sentences) == sorted(SENTENCES)
    assert set(told["spectra"]) == {f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in "oq"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["factors.html", "factors.safetensors"]
    own = fastproj.identify(files.tuned, draws=20)
    loaded = fastproj.LatentFactors.load(output)
    assert torch.equal(loaded.bases["stream"].matrix, own.bases["stream"].matrix)
    assert loaded.p_values["stream"].tolist() == own.p_values["stream"].tolist()


def test_the_model_that_the_adapter_names_is_taken_where_it_is_there(files: Files, tmp_path: Path) -> None:
    told = record(files.tuned, "--output", tmp_path / "f.safetensors", "--draws", 0)
    assert "kind" in tops(told["directions"][0])
    assert told["directions"][0]["p"] is None
    assert told["directions"][0]["null"] == [None] * 3
    assert told["notes"] == []


def without_base(files: Files, tmp_path: Path, base: str | None) -> Path:
    """A copy of the adapter that names another model."""
    copy = tmp_path / "adapter"
    shutil.copytree(files.tuned, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return copy


def test_without_a_model_the_weights_are_told_and_tokens_offered(files: Files, tmp_path: Path) -> None:
    adapter = without_base(files, tmp_path, None)
    options = [adapter, "--output", tmp_path / "f.safetensors", "--draws", 0]
    said = succeed(*options)
    assert "Give --model to see tokens and sentences." in said
    assert "tokens that it writes" not in said
    assert record(*options)["directions"][0]["words"] is None
    assert "sentences need the model" in refusal(*options, "--sentences", files.sentences)


def test_a_named_model_that_does_not_load_is_a_note_unless_it_was_asked_for(
    files: Files, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    adapter = without_base(files, tmp_path, str(tmp_path / "none"))
    options = [adapter, "--output", tmp_path / "f.safetensors", "--draws", 0]
    (note,) = record(*options)["notes"]
    assert note.startswith("The model that the adapter names tells no words: model ")
    assert "cannot be loaded" in refusal(*options, "--model", tmp_path / "none")
    assert "cannot be loaded" in refusal(*options, "--sentences", files.sentences)


@pytest.mark.parametrize(("side", "pool"), [("read", "stream"), ("read", "module"), ("write", "module")])
def test_other_sides_and_pools(files: Files, tmp_path: Path, side: str, pool: str) -> None:
    options = [
        "--side",
        side,
        "--pool",
        pool,
        "--rank",
        2,
        "--draws",
        5,
        "--output",
        tmp_path / "f.safetensors",
    ]
    told = record(files.tuned, *options)
    keys = ["stream"] if pool == "stream" else list(told["spectra"])
    assert sorted((d["key"], d["number"]) for d in told["directions"]) == sorted(
        (key, number) for key in keys for number in (0, 1)
    )
    said = succeed(files.tuned, *options)
    assert "Direction 1" in said or "direction 1" in said
    if (side, pool) == ("write", "module"):
        assert "no tokens. What this module writes is not the residual stream." in " ".join(said.split())


def test_evidence_is_told_and_puts_directions_in_order(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "f.safetensors"
    probes = ["--with", files.with_factor, "--without", files.without]
    options = [files.tuned, "--rank", 3, "--draws", 0, "--against", files.other, "--output", output]
    told = record(*options, *probes)
    scores = [d["recurrence"] * abs(d["difference"]) for d in told["directions"]]
    assert scores == sorted(scores, reverse=True)
    # By hand, in the order of the energy.
    factors = fastproj.identify(files.tuned, rank=3, draws=0)
    theirs = fastproj.identify(files.other, rank=3, draws=0).bases["stream"].matrix
    recurrence = (theirs.mT @ factors.bases["stream"].matrix).square().sum(0)
    by_share = sorted(told["directions"], key=lambda d: -d["share"])
    assert [d["recurrence"] for d in by_share] == pytest.approx(recurrence.tolist())
    assert by_share[0]["recurrence"] > 0.99
    loaded = fastproj.LatentFactors.load(output)
    assert loaded.shares["stream"].tolist() == [d["share"] for d in told["directions"]]
    said = succeed(*options, *probes)
    assert "recurs" in said
    assert "difference" in said


def test_evidence_stays_with_its_direction_when_the_order_changes(files: Files) -> None:
    factors = fastproj.identify(files.tuned, rank=3, draws=0)
    recurrence = {"stream": torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)}
    findings = in_words(factors, recurrence, None, Texts(), top=1, batch_size=1)
    assert findings.recurrence is not None
    assert findings.recurrence["stream"].tolist() == [0.9, 0.5, 0.1]
    assert torch.equal(findings.factors.shares["stream"], factors.shares["stream"][[1, 2, 0]])
    assert [row.recurrence for row in findings.rows] == [0.9, 0.5, 0.1]


def test_an_adapter_of_several_is_named(files: Files, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(files.tuned, both / "first")
    shutil.copytree(files.other, both / "second")
    options = ["--draws", 0, "--output", tmp_path / "f.safetensors"]
    assert "name one of first, second" in refusal(both, *options)
    assert "kind" in tops(record(both, "--adapter", "second", *options)["directions"][0])
    shutil.rmtree(both / "first")
    assert "kind" in tops(record(both, *options)["directions"][0])


def test_a_classifier_of_a_bare_encoder_is_told_by_its_task(tmp_path: Path) -> None:
    tiny_text.encoding_bert().save_pretrained(tmp_path / "bert")
    tiny_text.tokenizer("bert").save_pretrained(tmp_path / "bert")
    model = tiny_text.classifying_bert().from_pretrained(tmp_path / "bert")
    row = model.get_input_embeddings().weight[tiny_text.index("fox")]
    tuned = planted(model, ["attention.output.dense"], row, "write", task="classification")
    tuned.save_pretrained(tmp_path / "tuned")
    told = record(tmp_path / "tuned", "--draws", 0, "--output", tmp_path / "f.safetensors")
    assert "fox" in tops(told["directions"][0])
    assert told["notes"] == ["The model has no unembedding: its input embeddings stand in for it."]
    adapter = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    named = {"task_type": None, "auto_mapping": {"base_model_class": "BertForSequenceClassification"}}
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(adapter | named))
    told = record(tmp_path / "tuned", "--draws", 0, "--output", tmp_path / "f.safetensors")
    assert "fox" in tops(told["directions"][0])


def test_hostile_sentences_reach_neither_terminal_nor_page(files: Files, tmp_path: Path) -> None:
    hostile = "[bold red]x[/] \x1b[31m <script>window.owned = 1</script>"
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": hostile}) + '\n{"text": "a fox"}\n')
    options = [files.tuned, "--sentences", tmp_path / "s.jsonl", "--draws", 0]
    said = succeed(*options, "--output", tmp_path / "f.safetensors")
    assert "[bold red]" in said
    assert "\\x1b[31m" in said.replace("\n", "")
    assert "\x1b" not in said
    page = (tmp_path / "f.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 40], "rank: expected at most"),
        (["--pool", "module", "--weighting", "uniform"], "weighting is of pool='stream' alone"),
        (["--adapter", "none"], "got 'none'"),
        (["--with", "{with_factor}"], "--with and --without go together"),
        (["--sentences", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--sentences", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--sentences", "one.txt"], "expected two sentences or more, got 1"),
        (["--sentences", "latin.txt"], "expected text in UTF-8"),
        (["--sentences", "{with_factor}", "--text-column", "sentence"], "expected a column 'sentence'"),
        (["--against", "nowhere"], "nowhere"),
        (["--against", "{model}"], "adapter_config.json"),
        (["--device", "toaster"], "device toaster"),
        (["--model", "{tuned}"], "cannot be loaded"),
        (["--loss", "classification", "--model", "nowhere"], "nowhere"),
        (["--html", "f.safetensors"], "expected different files"),
        (["--output", "{tuned}/adapter_model.safetensors"], "adapter_model.safetensors is what is read"),
        (["--html", "{sentences}", "--sentences", "{sentences}"], "sentences.txt is what is read"),
        (["--html", "{model}/config.json", "--model", "{model}"], "config.json is a file of the model"),
        (["--html", "{model}/config.json"], "config.json is a file of the model"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("only one\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nno\n")
    before = {p: p.read_bytes() for p in files.tuned.iterdir()}
    given = [str(option).format(**vars(files)) for option in options]
    assert message in refusal(files.tuned, "--draws", 0, "--output", "f.safetensors", *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "one.txt"]
    assert {p: p.read_bytes() for p in files.tuned.iterdir()} == before


def test_a_folder_without_an_adapter_and_one_that_learnt_nothing_are_refused(
    files: Files, tmp_path: Path
) -> None:
    assert "expected the folder of an adapter" in refusal(tmp_path / "nowhere")
    assert "expected adapter_config.json" in refusal(files.model)
    from fastproj.bias_diff.training import add_adapter

    add_adapter(tiny_text.llama(), targets=["o_proj"]).save_pretrained(tmp_path / "fresh")
    assert "nothing was learnt" in refusal(tmp_path / "fresh", "--output", tmp_path / "f.safetensors")


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from fastproj.cli import app
assert CliRunner().invoke(app, ["identify", "--help"]).exit_code == 0
heavy = ("torch", "triton", "transformers", "peft", "datasets", "pyarrow", "jinja2", "numpy")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
