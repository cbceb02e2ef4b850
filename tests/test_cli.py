"""What the command line passes on, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import fastproj
from fastproj.cli import app, parse_alphas


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every demo that the command starts; none is run."""
    made: list[dict[str, Any]] = []
    module = ModuleType("fastproj.demo.demo")
    monkeypatch.setattr(module, "run_demo", lambda **arguments: made.append(arguments), raising=False)
    monkeypatch.setitem(sys.modules, "fastproj.demo.demo", module)
    return made


def test_demo_passes_its_options_on(calls: list[dict[str, Any]]) -> None:
    options = "--quick --seeds 3 --alpha 0.5,2 --steps 40 --output out --cache texts"
    result = CliRunner().invoke(app, ["demo", *options.split()])
    assert result.exit_code == 0, result.output
    assert calls == [
        {
            "quick": True,
            "seeds": 3,
            "alphas": (0.5, 2.0),
            "steps": 40,
            "output": Path("out"),
            "cache": Path("texts"),
        }
    ]


def test_demo_leaves_to_the_demo_what_is_not_given(calls: list[dict[str, Any]]) -> None:
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    (arguments,) = calls
    assert arguments["quick"] is False
    assert arguments["seeds"] == 1
    assert arguments["alphas"] is arguments["steps"] is arguments["cache"] is None


@pytest.mark.parametrize(
    "options", [["--alpha", "a,b"], ["--alpha", ""], ["--seeds", "0"], ["--steps", "-1"]]
)
def test_demo_refuses_what_it_cannot_read(options: list[str], calls: list[dict[str, Any]]) -> None:
    assert CliRunner().invoke(app, ["demo", *options]).exit_code == 2
    assert calls == []


def test_alphas_are_numbers_separated_by_commas() -> None:
    assert parse_alphas(None) is None
    assert parse_alphas("0.5,1, 2") == (0.5, 1.0, 2.0)


def test_study_hands_every_argument_to_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, int]] = []
    module = ModuleType("fastproj.demo.study")

    def main(out: str, workers: int = 2) -> None:
        """Stand-in for a study."""
        found.append((out, workers))

    monkeypatch.setattr(module, "main", main, raising=False)
    monkeypatch.setitem(sys.modules, "fastproj.demo.study", module)
    assert CliRunner().invoke(app, ["study", "here", "--workers", "4"]).exit_code == 0
    assert found == [("here", 4)]
    described = CliRunner().invoke(app, ["study", "--help"])
    assert described.exit_code == 0
    assert "Stand-in for a study." in described.output
    assert "--workers" in described.output


def test_version_is_the_packages() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip() == fastproj.__version__
