"""``fastproj score --against``: what sets a probe apart from texts as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bias_diff_files import Files, make_files
from typer.testing import CliRunner

from fastproj.cli import app
from fastproj.influence.scores import Scores


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("files"))


def scored(files: Files, output: Path, *options: str) -> Scores:
    arguments = ["score", *files.scoring, "--dot", *options, "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return Scores.load(output)


def test_dot_products_are_those_of_the_difference(files: Files, tmp_path: Path) -> None:
    both = scored(files, tmp_path / "both.parquet", "--probe", f"other={files.other_probe}")
    apart = scored(files, tmp_path / "apart.parquet", "--against", str(files.other_probe))
    assert (both.names, apart.names) == (("trait", "other"), ("trait",))
    want = both.values[:, 0] - both.values[:, 1]
    # fp32 sums of as many products, one after the other's subtraction and two before.
    torch.testing.assert_close(
        apart.values[:, 0], want, rtol=1e-4, atol=1e-5 * float(both.values.abs().max())
    )


def test_a_run_without_is_not_taken_for_one_with(files: Files, tmp_path: Path) -> None:
    scored(files, tmp_path / "scores.parquet")
    again = ["--against", str(files.other_probe), "--resume"]
    result = CliRunner().invoke(
        app, ["score", *files.scoring, "--dot", *again, "--output", str(tmp_path / "scores.parquet")]
    )
    assert result.exit_code != 0
    assert "options[references]" in result.output.replace("\n", "")


def test_names_keep_clear_of_spaces(files: Files, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["score", *files.scoring, "--probe", f" against={files.probe}", "--output", str(tmp_path / "s")]
    )
    assert result.exit_code != 0
    assert "expected a name for every file" in result.output.replace("\n", " ")
