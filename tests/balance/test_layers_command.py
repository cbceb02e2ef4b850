"""``fastproj layers`` on a tiny model: what it finds, writes and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_text
import torch
from balance_files import LABELS, TEXTS, Files, make_files, repeated, report, written
from command_line import refusal, run

import fastproj
from fastproj.balance.naive_interchange import naive_interchange
from fastproj.balance.prompts import Example, Prompt, encode
from fastproj.balance.task import Labels, Samples, drawn_evenly, read_prompt
from fastproj.bias_diff.records import Records, read_records


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("layers"))


def test_a_run_finds_what_the_package_does(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    found = report(*files.layers(output, "--samples", 7, "--seed", 3))
    model, tokenizer = tiny_text.llama(48), tiny_text.tokenizer()
    labels, prompt = fastproj.label_words(tokenizer, LABELS), Prompt("{text} is")
    # The most frequent first: two people are rich.
    assert found["labels"][0]["name"] == "rich"
    labels = fastproj.label_words(tokenizer, [label["name"] for label in found["labels"]])
    records = read_records(files.train)
    chosen = records.only(found["interchange"]["ids"])
    examples = encode(chosen, tokenizer, labels, prompt)
    assert len(examples) == 7
    pairs = fastproj.interchange_pairs(model, tokenizer, examples, labels, prompt)
    expected = naive_interchange(model, pairs, labels)
    # fp32 logits of other batches round at about 1e-6 of them.
    torch.testing.assert_close(
        torch.tensor(found["interchange"]["per_sample"], dtype=torch.float64),
        expected.per_sample,
        rtol=1e-4,
        atol=1e-5,
    )
    assert found["interchange"]["best"] == expected.best
    exit = fastproj.early_exit(model, tokenizer, examples, labels)
    own = torch.tensor(found["early_exit"]["contain"], dtype=torch.float64)
    torch.testing.assert_close(own, exit.contain, rtol=1e-4, atol=1e-4)
    assert found["early_exit"]["samples"] == 7
    assert found["prompt"] == "{text} is"
    assert found["rows"] == []


def test_the_page_and_the_table_hold_every_layer_and_no_text(files: Files, tmp_path: Path) -> None:
    result = run(*files.layers(tmp_path, "--samples", 4))
    assert result.exit_code == 0, result.output
    assert "KL, nats" in result.stdout
    assert "discrimination" in result.stdout
    assert "Exchanging block" in result.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "Exchange of attention outputs" in page
    assert "F1" not in page
    assert not [text for text in TEXTS if text in page]


def test_labels_may_be_several_and_have_other_words(files: Files, tmp_path: Path) -> None:
    several = ["layers", files.model, "--data", files.several, "--prompt", r"{text}\n is", "--multi-label"]
    found = report(*several, "--samples", 9, "--output", tmp_path / "several")
    assert {label["name"] for label in found["labels"]} == {*LABELS, "lazy"}
    assert found["prompt"] == "{text}\n is"
    assert str(len(TEXTS)) not in found["interchange"]["ids"]  # the record that has no label
    named = repeated("--label", ["kind", "rich=woman", "poor"])
    found = report(*files.layers(tmp_path / "words", "--samples", 2, *named))
    assert [(label["name"], label["word"]) for label in found["labels"]] == [
        ("kind", " kind"),
        ("rich", " woman"),
        ("poor", " poor"),
    ]
    assert found["labels"][1]["tokens"] == [tiny_text.index("woman")]


def test_rows_of_a_batch_change_nothing(files: Files, tmp_path: Path) -> None:
    options = ("--samples", 3, "--rows-per-forward")
    one, two = (report(*files.layers(tmp_path / str(rows), *options, rows)) for rows in (1, 4))
    torch.testing.assert_close(
        torch.tensor(one["interchange"]["mean"]),
        torch.tensor(two["interchange"]["mean"]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_adapters_are_taken_with_their_vector(files: Files, tmp_path: Path) -> None:
    model = fastproj.add_balance_adapter(tiny_text.llama(48), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "input_shift" in name and parameter.requires_grad:
                parameter.copy_(torch.linspace(-1, 1, 32)[:, None])
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = report(*files.layers(tmp_path / "plain", "--samples", 3))
    found = report(*files.layers(tmp_path / "out", "--samples", 3, "--adapter", tmp_path / "adapter"))
    assert found["adapter"] == str(tmp_path / "adapter")
    assert found["early_exit"]["contain"][1] == pytest.approx(plain["early_exit"]["contain"][1], rel=1e-5)
    assert found["early_exit"]["contain"][2] != pytest.approx(plain["early_exit"]["contain"][2], rel=1e-3)
    (tmp_path / "empty").mkdir()
    told = refusal(*files.layers(tmp_path / "none", "--adapter", tmp_path / "empty"))
    assert "adapter_config.json" in told


def test_refusals(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "new or empty" in refusal(*files.layers(files.folder))
    assert "no such file" in refusal(
        "layers", files.model, "--data", tmp_path / "no.jsonl", "--output", output
    )
    assert "--label-column" in refusal("layers", files.model, "--data", files.held_out, "--output", output)
    assert "one {text}" in refusal(*files.layers(output, "--prompt", "is"))
    assert "ask for the label" in refusal(*files.layers(output, "--prompt", "is {text} "))
    assert "no space at the end" in refusal(*files.layers(output, "--prompt", "{text} is "))
    assert "NAME=word" in refusal(*files.layers(output, "--label", "rich="))
    assert "two labels or more, got rich" in refusal(*files.layers(output, "--label", "rich"))
    told = refusal(*files.layers(output, *repeated("--label", ["rich", "poor"])))
    assert "record" in told
    assert "'kind'" in told
    same = repeated("--label", ["rich=man kind", "poor=man lazy", "kind"])
    told = refusal(*files.layers(output, *same))
    assert "'rich' and 'poor' begin with the same token" in told
    assert "--multi-label" in refusal("layers", files.model, "--data", files.several, "--output", output)
    assert "cannot be loaded" in refusal("layers", tmp_path, "--data", files.train, "--output", output)
    assert not output.exists()


def test_an_encoder_is_refused_before_it_is_read(files: Files, tmp_path: Path) -> None:
    tiny_text.masked_bert().config.save_pretrained(tmp_path / "bert")
    told = refusal("layers", tmp_path / "bert", "--data", files.train, "--output", tmp_path / "out")
    assert "expected one of type gemma" in told
    assert told.endswith("got bert")


def test_without_matplotlib_nothing_is_begun(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "fastproj-torch[demo]" in refusal(*files.layers(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_of_short_context_cuts_texts_not_runs(tmp_path: Path) -> None:
    files = make_files(tmp_path, kind="gpt2")
    long = written(
        tmp_path / "long.jsonl",
        [{"text": "the fox sings and " * 20, "label": "rich"}, {"text": "a cook", "label": "kind"}],
    )
    found = report("layers", files.model, "--data", long, "--prompt", "{text} is", "--output", tmp_path / "o")
    assert len(found["interchange"]["per_sample"]) == 2
    assert all(value >= -1e-6 for value in found["interchange"]["mean"])  # KL, to fp32's rounding


def examples(*labels: tuple[int, ...]) -> list[Example]:
    return [Example(str(number), (1, 2), own) for number, own in enumerate(labels)]


def test_samples_are_drawn_evenly_by_label() -> None:
    rows = examples(*[(0,)] * 20, *[(1,)] * 3, (2,))
    drawn = drawn_evenly(rows, 9, 3, seed=0)
    counts = [sum(row.labels == (label,) for row in drawn) for label in range(3)]
    assert counts == [5, 3, 1]
    assert [int(row.id) for row in drawn] == sorted(int(row.id) for row in drawn)
    assert drawn == drawn_evenly(rows, 9, 3, seed=0)
    assert drawn != drawn_evenly(rows, 9, 3, seed=1)
    assert drawn_evenly(rows, 100, 3, seed=0) == rows
    assert len(drawn_evenly(rows, 1, 3, seed=0)) == 1


def test_samples_with_all_labels_or_none_are_not_drawn() -> None:
    rows = examples((), (0, 1), (0,), (0, 1))
    assert [row.id for row in drawn_evenly(rows, 5, 2, seed=0)] == ["2"]
    with pytest.raises(ValueError, match="some of the labels and not all"):
        drawn_evenly(rows[:2], 5, 2, seed=0)


def test_labels_of_the_data_come_by_frequency() -> None:
    single = Samples("x", Records(tuple("abcd"), tuple("abcd"), ("b", 1, 1, None)))
    assert single.label_names(False) == ("1", "b")
    strings = Samples("x", Records(tuple("abc"), tuple("abc"), ("b | c", "c", None)))
    assert strings.label_names(True) == ("c", "b")
    lists = Samples("x", Records(tuple("abc"), tuple("abc"), (["b"], [], ["c", "b"])))
    assert lists.label_names(True) == ("b", "c")
    # Not an option: "=" is a part of the name.
    equals = Samples("x", Records(tuple("ab"), tuple("ab"), ("a=b", "c")))
    assert Labels.of(None, equals, False).words == (" a=b", " c")
    assert Labels.of(["joy = very happy ", "fear"], equals, False) == Labels(
        ("joy", "fear"), (" very happy", " fear")
    )


def test_a_prompt_has_new_lines() -> None:
    assert read_prompt(r"Text: {text}\nLabel:") == Prompt("Text: {text}\nLabel:")
