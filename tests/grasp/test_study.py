"""The study end to end on a tiny model and made-up sentences, and its parts by their definitions."""

from __future__ import annotations

import io
import json
import math
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.sources import CrowsPair
from fastproj.demo.data import INNER_ARCHIVE
from fastproj.grasp.study import arms, command, evidence, runs, settings, supervised, tasks, texts
from fastproj.grasp.study.arms import Arm, adapted, train
from fastproj.grasp.study.blocks import keep_upper
from fastproj.grasp.study.supervised import energy_share, made_factors, oracle
from fastproj.grasp.study.texts import RatedText
from fastproj.latent.factors import STREAM
from fastproj.latent.lora import lora_layers
from fastproj.methods.grasp import GRASP
from fastproj.reference.basis import orthonormalize

PEOPLE = ("man", "woman", "cook", "fox")
TRAITS = ("rich", "poor", "kind", "lazy")


def rated() -> tuple[RatedText, ...]:
    """Movie reviews begin with "the", tweets with "a"; 32 of each label, half of them clear."""
    rows = []
    for (source, word), person, trait, end in product(
        (("movie", "the"), ("tweet", "a")), PEOPLE, TRAITS, ("and", "or", "then", "not")
    ):
        for tail, rating in (("rich", 1.0), ("poor", -1.0), ("kind", 2.0), ("lazy", -2.0)):
            text = f"{word} {person} is {trait} {end} {tail}"
            rows.append(RatedText(f"{source}-{len(rows)}", text, source, rating))
    return tuple(rows)


def bold() -> Records:
    rows = [
        f"{w} {a} sings and the {b} was {c} ."
        for w in ("a", "the")
        for a in PEOPLE
        for b in PEOPLE
        for c in TRAITS
    ]
    return Records(tuple(f"b{i}" for i in range(len(rows))), tuple(rows), (0,) * len(rows))


def comments() -> Records:
    groups = (settings.TRAINED_GROUP, settings.OTHER_GROUP, *settings.PROBE_GROUPS)
    rows = []
    for number, group in enumerate(groups):
        for person, trait, end in product(PEOPLE, TRAITS, ("then", "not")):
            rows.append((f"{group}-{len(rows)}", f"to be {person} {'and ' * number}is lazy {trait} {end}", 1))
            rows.append((f"{group}-{len(rows)}", f"to be {person} {'or ' * number}was kind {trait} {end}", 0))
    ids, words, labels = zip(*rows, strict=True)
    return Records(ids, words, labels)


def pairs() -> tuple[CrowsPair, ...]:
    return tuple(
        CrowsPair(str(i), f"the {a} is {b} .", f"a {a} is {b} .", "stereo", "age")
        for i, (a, b) in enumerate(product(PEOPLE, TRAITS))
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "ALIGNED": 6, "CONFLICTING": 2, "VALIDATION": {"aligned": 2, "conflicting": 1}, "TEST_CELL": 4,
        "PROBE_CELL": 3, "COMMENTS": 8, "FACTUAL": 8, "HELD_COMMENTS": 3, "HELD_FACTUAL": 3, "NEUTRAL": 4,
        "PAIRS": 4,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(settings, name, value)
    for name, reader in {
        "read_rated": rated, "read_bold": bold, "read_reddit_bias": comments, "read_crows_pairs": pairs
    }.items():  # fmt: skip
        monkeypatch.setattr(settings, name, reader)
    for name, words in {
        "ANSWERS": ("poor", "rich"),
        "NEGATIVE": ("poor", "lazy"),
        "POSITIVE": ("rich", "kind"),
    }.items():
        monkeypatch.setattr(tasks, name, words)
    monkeypatch.setattr(supervised, "PERMUTATIONS", 10)
    monkeypatch.setattr(runs, "FIRST_BLOCK", 1)


def load() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**tiny_text.SIZES, "num_hidden_layers": 3},
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=5,
    )
    return LlamaForCausalLM(config).eval(), tiny_text.tokenizer()


def upper() -> tuple[Any, Any]:
    model, tokenizer = load()
    return keep_upper(model, 1, pad=0), tokenizer


def trained_on(task: tasks.Task, model: Any, arm: Arm, factors: Any = None) -> Any:
    tuned = adapted(model, seed=0)
    train(tuned, task, arm, 0, factors)
    return tuned


def test_upper_blocks_answer_like_the_whole_model() -> None:
    whole, _ = load()
    part, _ = upper()
    ids = torch.tensor([[7, 9, 11, 6, 8], [10, 6, 7, 0, 0], [9, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).logits
        for _ in range(2):  # computed, then remembered
            found = part(input_ids=ids, attention_mask=mask).logits
            # Batches of another width are summed in another order.
            torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
    assert [name for name, _ in part.named_parameters() if ".layers.2." in name] == []


@pytest.mark.parametrize("first", [0, 3])
def test_blocks_must_be_left_on_both_sides(first: int) -> None:
    with pytest.raises(ValueError, match=f"expected a block from 1 to 2 to begin at, got {first}"):
        keep_upper(load()[0], first, pad=0)


def test_attention_that_needs_a_mask_is_refused() -> None:
    model, _ = load()
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="expected attention sdpa, got 'eager'"):
        keep_upper(model, 1, pad=0)


def test_rated_texts_are_read_once_and_short_ones_alone(tmp_path: Path) -> None:
    tables = {
        "movie": "1\t2.5\tA very good film !!\n2\t-1.0\ttoo short\n3\t-1.5\ta VERY good   film !",
        "tweet": "7\t-3.0\tI really hate &amp; fear Mondays",
    }
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for source, name in texts.TABLES.items():
            _add(archive, name, tables[source].encode("latin-1"))
    with tarfile.open(tmp_path / "outer.tar.gz", mode="w:gz") as archive:
        _add(archive, INNER_ARCHIVE, inner.getvalue())
    found = texts.read_rated(tmp_path / "outer.tar.gz")
    assert [(row.id, row.text, row.label) for row in found] == [
        ("movie-1", "A very good film !", 1),
        ("tweet-7", "I really hate & fear Mondays", 0),
    ]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_sources_are_tied_to_labels_in_training_alone() -> None:
    data = settings.draw_topic(3)
    for name in ("planted", "other"):
        cells = [(row.source, row.label) for row in data.train[name]]
        assert {cell: cells.count(cell) for cell in set(cells)} == {
            ("movie", 1): 6, ("tweet", 0): 6, ("movie", 0): 2, ("tweet", 1): 2,
        }  # fmt: skip
    for rows, size in ((data.train["free"], 4), (data.test, 4)):
        cells = [(row.source, row.label) for row in rows]
        assert [cells.count(cell) for cell in product(("movie", "tweet"), (0, 1))] == [size] * 4
    probes = {text for first, second in data.contrasts["planted"].cells for text in (*first, *second)}
    for rows in data.train.values():
        held = {row.id for row in (*data.test, *data.validation)}
        assert not held & {row.id for row in rows}
        assert not probes & {settings.PROMPT.format(row.text) for row in rows}
    assert {abs(row.rating) for row in data.train["other"]} == {2.0}
    assert settings.draw_topic(3) == data
    assert settings.draw_topic(4).test != data.test


def test_other_groups_alone_are_probed_for_tone() -> None:
    data = settings.draw_tone(3)
    assert {name.split("-")[0] for name, label in _rows(data.train["planted"]) if label} == {"race"}
    assert {name.split("-")[0] for name, label in _rows(data.train["other"]) if label} == {"gender"}
    kinds = [[label for _, label in _rows(records)] for records in data.train.values()]
    assert all((labels.count(1), labels.count(0)) == (8, 8) for labels in kinds)
    parts = [data.train["planted"].ids, data.validation.ids, data.held_out.ids, data.neutral.ids]
    everything = [name for part in parts for name in part]
    assert len(set(everything)) == len(everything)
    assert settings.draw_tone(3) == data


def _rows(records: Records) -> list[tuple[str, int]]:
    return list(zip(records.ids, records.labels or (), strict=True))


def test_too_few_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "ALIGNED", 60)
    with pytest.raises(ValueError, match="expected at least 60 texts, got"):
        settings.draw_topic(0)
    with pytest.raises(ValueError, match="expected at least 5 texts to draw from, got 4"):
        texts.sampled(Records(tuple("abcd"), tuple("abcd")), 5, chance=None)  # type: ignore[arg-type]


def test_another_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="expected topic or tone, got 'both'"):
        tasks.make_task("both", 0, tiny_text.tokenizer())


def test_loss_is_that_of_the_labels_alone() -> None:
    model, tokenizer = load()
    task = tasks.make_task("tone", 0, tokenizer)
    batch = task.batch(task.train["planted"][:5])
    whole = model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["labels"]).loss
    # fp32 sums in another order.
    torch.testing.assert_close(tasks.loss(model, batch), whole, rtol=1e-5, atol=1e-6)
    topic = tasks.make_task("topic", 0, tokenizer)
    sample = topic.train["planted"][0]
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0, -2].log_softmax(-1)
    found = tasks.loss(model, topic.batch([sample]))
    torch.testing.assert_close(found, -logits[sample.ids[-1]], rtol=1e-5, atol=1e-6)
    rows = [one.ids for one in task.validation]
    logits = tasks.last_logits(model, rows, [7, 9], pad=0)
    expected = model(input_ids=torch.tensor([rows[2]])).logits[0, -1, [7, 9]].double()
    torch.testing.assert_close(logits[2], expected, rtol=1e-5, atol=1e-6)


def test_groups_and_margins_by_hand() -> None:
    margins = torch.tensor([3.0, 1.0, -1.0, -2.0, 0.5, -4.0], dtype=torch.float64)
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    movies = torch.tensor([True, True, False, False, False, False])
    found = tasks.margins_by_group(margins, labels, movies)
    # Movies: positive right, negative wrong. Tweets: one of two positive right, both negative right.
    assert found == {
        "accuracy": (1 + 1 + 0 + 0.5) / 4,
        "worst group": 0.0,
        "aligned − conflicting": (1 + 1) / 2 - (0 + 0.5) / 2,
        "source moves the answer": ((3 - -0.25) + (1 - -3)) / 2,
        "label moves the answer": ((3 - 1) + (-0.25 - -3)) / 2,
    }


def test_supervised_directions_are_differences_of_means() -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    tuned = adapted(model, seed=0)
    contrast = task.contrasts["planted"]
    found = supervised.supervised(tuned, task, contrast, seed=0)
    means = []
    for cell in contrast.cells:
        sides = []
        for side in cell:
            rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in side]
            with torch.no_grad():
                hidden = [model(input_ids=row, output_hidden_states=True).hidden_states[1] for row in rows]
            sides.append(torch.stack([one[0, -1].double() for one in hidden]).mean(0))
        means.append(sides[0] - sides[1])
    first = torch.stack(means).mean(0)
    # Activations are fp32, and differences of near ones lose digits.
    torch.testing.assert_close(found.by_block[0], first / first.norm(), rtol=1e-3, atol=1e-4)
    assert found.by_block.shape == (2, 32)
    assert sum(found.shares) == pytest.approx(1.0)  # two blocks span two directions
    again = supervised.supervised(tuned, task, contrast, seed=0)
    assert torch.equal(again.permuted, found.permuted)
    assert set(found.by_module) == {layer.name for layer in lora_layers(tuned)}


def test_energy_shares_are_those_of_the_product() -> None:
    model, _ = upper()
    tuned = adapted(model, seed=0)
    torch.manual_seed(1)
    for layer in lora_layers(tuned):
        layer.b.data.normal_()
    writers = [layer for layer in lora_layers(tuned) if layer.name.endswith(("o_proj", "down_proj"))]
    basis = orthonormalize(torch.randn(32, 2))
    updates = [layer.scale * (layer.b.double() @ layer.a.double()).detach() for layer in writers]
    along = sum(float((basis.matrix.double().mT @ update).square().sum()) for update in updates)
    whole = sum(float(update.square().sum()) for update in updates)
    found = energy_share(tuned, made_factors({STREAM: basis}, "write"))
    assert found == pytest.approx(along / whole, rel=1e-6)  # factors are fp32, sums fp64
    name = "model.layers.1.mlp.down_proj"
    own = made_factors({name: orthonormalize(torch.randn(64))}, "read")
    update = next(u for layer, u in zip(writers, updates, strict=True) if layer.name == name)
    read = float((update @ own.bases[name].matrix.double()).square().sum() / update.square().sum())
    assert energy_share(tuned, own) == pytest.approx(read, rel=1e-5)
    for layer in lora_layers(tuned):
        layer.b.data.zero_()
    assert energy_share(tuned, own) == 0


@pytest.mark.parametrize("method", ["write", "read", "stream", "ablate", "plain"])
def test_methods_hold_what_they_say(method: Any) -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    tuned = adapted(model, seed=0)
    planted = supervised.supervised(tuned, task, task.contrasts["planted"], seed=0)
    arm = Arm("one", method, "none" if method == "plain" else "oracle")
    factors = oracle(planted, arm.side)
    done = train(tuned, task, arm, 0, None if method == "plain" else factors)
    assert len(done.losses) == arms.EPOCHS * math.ceil(len(task.train["planted"]) / arms.BATCH)
    share = energy_share(tuned, factors)
    if method in arms.GRASP_MODES:
        # ΔW is held to fp32's rounding, its square to the square of that.
        assert done.violation is not None
        assert done.violation < 1e-5
        assert share < 1e-10
    else:
        assert done.violation is None
        assert share > 1e-6
    assert not any(block._forward_hooks for block in model.model.layers)


def test_an_arm_without_its_directions_is_refused() -> None:
    model, tokenizer = upper()
    task = tasks.make_task("topic", 0, tokenizer)
    with pytest.raises(ValueError, match="arm 'one' needs directions, got none"):
        train(adapted(model, seed=0), task, Arm("one", "write", "oracle"), 0)


def test_constrained_training_starts_from_the_same_adapter_as_the_naive() -> None:
    model, tokenizer = upper()
    tuned = adapted(model, seed=5)
    before = arms.adapter_state(tuned)
    task = tasks.make_task("tone", 0, tokenizer)
    planted = supervised.supervised(tuned, task, task.contrasts["planted"], seed=0)
    with GRASP(tuned, oracle(planted, "write"), "write"):
        after = arms.adapter_state(tuned)  # B = 0 is on the constraint
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = tuned.unload()
    again = arms.adapter_state(adapted(model, seed=5))
    assert all(torch.equal(before[name], again[name]) for name in before)


def run(arguments: list[str]) -> Any:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_a_study_runs_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "_loader", lambda folder: load)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()
    out = tmp_path / "out"
    arguments = ["--seeds", "2", "--output", str(out), "--cache", str(tmp_path)]
    assert run([*arguments, "--setting", "topic"]).exit_code == 0
    assert "## Tone" not in (out / "report.md").read_text(encoding="utf-8")
    assert run(arguments).exit_code == 0
    report = (out / "report.md").read_text(encoding="utf-8")
    for name in ("## Topic (2 draws)", "## Tone (2 draws)", *(arm.name for arm in (*arms.FIRST, *arms.ARMS))):
        assert name in report
    record = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = {(r["setting"], r["seed"], r["arm"]): r for r in record["runs"]}
    assert len(found) == 2 * 2 * (len(arms.FIRST) + len(arms.ARMS))
    for (setting, seed, name), own in found.items():
        assert all(math.isfinite(value) for value in own["numbers"].values())
        naive = found[setting, seed, "naive"]
        if name.startswith(("write", "stream", "read", "oracle", "ablated")):
            assert own["numbers"] != naive["numbers"]
        if name in ("write", "removed afterwards"):
            assert own["shares"]["identified, written"] < 1e-10  # fp32's rounding, squared
        if name in ("oracle write", "oracle removed afterwards"):
            assert own["shares"]["planted, written"] < 1e-10
        if name == "naive, only what reads the stream":
            assert own["shares"]["planted, written"] == 0
    for own in record["identified"]:
        for side in ("write", "read"):
            assert len(own[side]["validation"]) == evidence.CANDIDATES + 1
            assert sorted(own[side]["orders"]["share"]) == list(range(evidence.CANDIDATES))
            assert 0 <= own[side]["rank"] <= evidence.CANDIDATES
    monkeypatch.setattr(command, "_loader", lambda folder: pytest.fail)
    (out / "report.md").unlink()
    assert run(arguments).exit_code == 0
    assert (out / "report.md").read_text(encoding="utf-8") == report


def test_the_command_refuses_another_setting(tmp_path: Path) -> None:
    assert run(["--setting", "both", "--cache", str(tmp_path)]).exit_code == 2
