"""Two measurements: ratios, verdicts, what only one has, and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_records import record, row
from rich.console import Console
from typer.testing import CliRunner

from fastproj.bench.harness.command import app
from fastproj.bench.harness.compare import compare, ratio_of
from fastproj.bench.harness.record import Row, write_record
from fastproj.bench.harness.tables import show_comparison


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (row(1.05e-3), "slower"),
        (row(0.95e-3), "faster"),
        (row(1.015e-3), "within noise"),  # 0.5 % of overlap
        (row(1.2e-3, spread=0.3), "within noise"),
        (row(0.8e-3, spread=0.3), "within noise"),
        (row(1e-3, spread=0.0), "within noise"),
        (row(2e-3, rounds=4), "too few rounds"),
        (row(0.5e-3, rounds=1), "too few rounds"),
        (row(1.05e-3, rounds=5), "slower"),
    ],
)
def test_a_verdict_needs_quartiles_that_lie_apart(after: Row, verdict: str) -> None:
    ratio = ratio_of(row(1e-3), after)
    assert ratio.verdict == verdict
    assert ratio.ratio == pytest.approx(after.seconds / 1e-3)


def test_rows_are_matched_by_all_that_names_them() -> None:
    one = record(row(), row(part="q_proj A"), row(dtype="bf16"), row(device="cpu"))
    other = record(row(dtype="bf16"), row(suite="gram"), row())
    comparison = compare(one, other)
    assert [ratio.before.dtype for ratio in comparison.ratios] == ["fp32", "bf16"]
    assert comparison.only_before == ("edge, small, q_proj A, cuda, fp32", "edge, small, cpu, fp32")
    assert comparison.only_after == ("gram, small, cuda, fp32",)
    assert comparison.warnings == ()


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ValueError, match="share no row"):
        compare(record(row()), record(row(suite="gram")))


def test_other_machines_and_other_routes_are_warned_about() -> None:
    other = record(
        row(route="eager", cache="sweep", copies=48),
        device="NVIDIA A100-SXM4-80GB",
        torch="2.12.0",
        rocm="7.1",
    )
    console = Console(record=True, width=200)
    show_comparison(compare(record(row()), other), console)
    shown = console.export_text()
    assert "device differs: NVIDIA H100 80GB HBM3 and NVIDIA A100-SXM4-80GB" in shown
    assert "torch differs: 2.13.0 and 2.12.0" in shown
    assert "rocm differs: None and 7.1" in shown
    assert "edge, small, cuda, fp32: timed with route graph and with route eager" in shown
    assert "edge, small, cuda, fp32: timed with cache turns and with cache sweep" in shown
    assert "edge, small, cuda, fp32: timed with copies 3 and with copies 48" in shown
    assert "driver differs" not in shown


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """B is 10 % slower in one row beyond doubt, 20 % in another within noise, and lacks a third."""
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_record(record(row(), row(suite="gram"), row(suite="combine")), before)
    write_record(record(row(1.1e-3), row(1.2e-3, spread=0.5, suite="gram")), after)
    return str(before), str(after)


@pytest.mark.parametrize(
    ("options", "code"), [([], 0), (["--fail-above", "1.05"], 1), (["--fail-above", "1.15"], 0)]
)
def test_exit_code(files: tuple[str, str], options: list[str], code: int) -> None:
    result = CliRunner().invoke(app, ["compare", *files, *options])
    assert result.exit_code == code, result.output
    assert "1.100" in result.stdout
    assert "within noise" in result.stdout
    assert "only in the first file: combine, small, cuda, fp32" in result.stdout
    assert ("more than 1.05" in result.stderr) == (code == 1)


def test_a_file_that_is_no_record_ends_it(files: tuple[str, str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", files[0], str(tmp_path / "absent.json")])
    assert result.exit_code == 1
    assert "absent.json" in result.stderr


def test_too_few_rounds_pass_no_limit(tmp_path: Path) -> None:
    """0.01 % of one round against another is no verdict, neither for nor against."""
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    write_record(record(row(spread=0.0, rounds=1)), before)
    write_record(record(row(1.0001e-3, spread=0.0, rounds=1)), after)
    result = CliRunner().invoke(app, ["compare", str(before), str(after)])
    assert result.exit_code == 0
    assert "too few rounds" in result.stdout
    assert "slower" not in result.output
    limited = CliRunner().invoke(app, ["compare", str(before), str(after), "--fail-above", "1.05"])
    assert limited.exit_code == 1
    assert "too few rounds to tell; measure with --rounds 5 or more" in limited.stderr
