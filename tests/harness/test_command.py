"""``fastproj bench`` from end to end on the CPU, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastproj.bench.harness import session
from fastproj.bench.harness.command import app
from fastproj.bench.harness.record import read_record
from fastproj.bench.harness.suites import SUITES

QUICK = ["--device", "cpu", "--quick", "--rounds", "5"]


@pytest.fixture
def green(tmp_path: Path) -> list[str]:
    """Options that replace the project's suite by one test that passes."""
    (tmp_path / "test_it.py").write_text("def test_one(): pass\n", encoding="utf-8")
    return ["--tests", str(tmp_path)]


def test_a_quick_run_on_the_cpu(green: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out" / "record.json"
    wide = {"COLUMNS": "200"}  # names are cut on a narrow terminal
    result = CliRunner().invoke(app, [*QUICK, *green, "--output", str(path)], env=wide)
    assert result.exit_code == 0, result.output
    record = read_record(path)
    assert {row.suite for row in record.rows} == set(SUITES)
    assert record.gate["passed"] == 1
    assert record.options["tests"] == green[1]
    assert record.machine["torch"] == torch.__version__
    assert (record.copy["route"], record.copy["cache"]) == ("wall", "as left")
    assert "correctness suite: minutes on a GPU" in result.stderr
    assert record.machine["missing"]["driver"] == "the CPU has no NVML"
    for row in record.rows:
        assert (row.device, row.route, row.rounds) == ("cpu", "wall", 5)
        assert 0 < row.low <= row.seconds <= row.high
        assert row.gigabytes_per_second == pytest.approx(row.bytes_moved / row.seconds / 1e9)
        rate = record.copy["bytes_per_second"]
        assert row.of_copy == pytest.approx(row.bytes_moved / row.seconds / rate)
        assert row.floor_seconds is row.of_floor is row.energy_joules is None
        assert set(row.missing) == {"bytes_moved", "floor_seconds", "energy_joules"}
        assert row.suite in result.stdout
    again = CliRunner().invoke(app, ["compare", str(path), str(path), "--fail-above", "1"])
    assert again.exit_code == 0, again.output
    assert again.stdout.count("within noise") == len(record.rows)


def test_suites_can_be_chosen(green: list[str], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    chosen = ["--suite", "combine", "--suite", "gram", "--workload", "qwen"]
    result = CliRunner().invoke(app, [*QUICK, *green, *chosen, "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert [row.suite for row in read_record(path).rows] == ["combine", "gram"]


@pytest.mark.parametrize(
    ("text", "message"), [("def test_one(): assert False\n", "1 tests failed"), ("", "no test ran")]
)
def test_no_speed_after_a_red_suite(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test_it.py").write_text(text, encoding="utf-8")
    path = tmp_path / "record.json"
    result = CliRunner().invoke(app, [*QUICK, "--tests", str(tmp_path), "--output", str(path)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""
    assert "GB/s" not in result.output
    assert not path.exists()


@pytest.mark.parametrize("options", [["--suite", "sums"], ["--workload", "GPT"]])
def test_unknown_names_are_told_before_anything_runs(
    options: list[str], green: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "run_gate", None)
    result = CliRunner().invoke(app, [*QUICK, *green, *options])
    assert result.exit_code == 1
    assert "expected" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["file/record.json", "."])
def test_a_record_that_cannot_be_written_is_told_before_anything_runs(
    name: str, green: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, and in the place of a folder."""
    monkeypatch.setattr(session, "run_gate", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(app, [*QUICK, *green, "--output", str(tmp_path / name)])
    assert result.exit_code == 2, result.output
    assert "--output" in result.stderr


def test_without_a_gpu_the_way_to_the_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "no CUDA or ROCm device here" in said
    assert "--device cpu measures" in said


def test_a_device_that_does_not_exist_is_refused() -> None:
    assert CliRunner().invoke(app, ["--device", "tpu"]).exit_code == 2
    assert CliRunner().invoke(app, [*QUICK, "--rounds", "0"]).exit_code == 2
