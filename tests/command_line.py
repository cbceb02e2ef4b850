"""Commands as a test calls them."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from fastproj.cli import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    """What a command that is used wrongly says, which must be one line."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, result.stderr
    return told[0]
