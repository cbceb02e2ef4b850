"""The GRASP study end to end on a tiny model and made-up sentences: draws, runs, tables."""

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
from grasp_study_texts import install, load
from typer.testing import CliRunner

from fastproj.bias_diff.records import Records
from fastproj.demo.data import INNER_ARCHIVE
from fastproj.grasp.study import arms, command, evidence, settings, summary, tasks, texts


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


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
    cells = zip(data.contrasts["planted"].cells, data.contrasts["held out"].cells, strict=True)
    for probe, held in cells:
        assert all(not set(one) & set(other) for one, other in zip(probe, held, strict=True))
        assert [len(side) for side in held] == [4, 4]


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


@pytest.mark.parametrize(
    ("at", "expected"),
    [(1.0, 5.0), (1.5, 6.0), (2.0, 7.0), (3.0, 3.0), (4.0, -1.0), (0.9, None), (4.1, None)],
)
def test_drift_is_interpolated_between_stops(at: float, expected: float | None) -> None:
    assert summary.interpolated(at, [1.0, 2.0, 4.0], [5.0, 7.0, -1.0]) == expected
    assert summary.interpolated(-at, [-1.0, -2.0, -4.0], [5.0, 7.0, -1.0]) == expected


def test_stops_at_one_place_are_no_division_by_zero() -> None:
    assert summary.interpolated(1.0, [1.0, 1.0], [2.0, 3.0]) == 2.0


def run(arguments: list[str]) -> Any:
    import typer

    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.slow
def test_a_study_runs_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastproj.bias_diff.sources.smollm2_loader", lambda cache: load)
    out = tmp_path / "out"
    arguments = ["--seeds", "2", "--output", str(out), "--cache", str(tmp_path)]
    assert run([*arguments, "--setting", "topic"]).exit_code == 0
    assert "## Tone" not in (out / "report.md").read_text(encoding="utf-8")
    assert run(arguments).exit_code == 0
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "writes both kinds of words" in report
    assert "blocks, own taken out" in report
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
    monkeypatch.setattr("fastproj.bias_diff.sources.smollm2_loader", lambda cache: pytest.fail)
    (out / "report.md").unlink()
    assert run(arguments).exit_code == 0
    assert (out / "report.md").read_text(encoding="utf-8") == report


def test_the_command_refuses_another_setting(tmp_path: Path) -> None:
    assert run(["--setting", "both", "--cache", str(tmp_path)]).exit_code == 2
