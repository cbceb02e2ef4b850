"""The command line. Each command imports what it needs when it runs, so that ``--help`` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastproj import __version__
from fastproj.balance.balance_command import balance
from fastproj.balance.layers_command import layers
from fastproj.bench.audit.command import audit
from fastproj.bench.harness.command import app as bench
from fastproj.bias_diff.evaluate_command import evaluate
from fastproj.bias_diff.report_command import report
from fastproj.bias_diff.score_command import score
from fastproj.bias_diff.select_command import select
from fastproj.bias_diff.unlearn_command import unlearn
from fastproj.grasp.command import grasp
from fastproj.latent.identify_command import identify

app = typer.Typer(
    name="fastproj",
    help="A projection engine for debiased fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.command()(audit)
app.add_typer(bench, name="bench")
for command in (score, select, unlearn, evaluate, report, identify, grasp, layers, balance):
    app.command()(command)

Alphas = Annotated[str | None, typer.Option("--alpha", metavar="A,B,C", help="Strengths of EDGE to compare.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs per method, each with its own seed.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps of a run.")]
Output = Annotated[Path, typer.Option(help="Folder for the report and the finished runs.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of the downloaded texts; else $FASTPROJ_CACHE, then ./.cache.")
]


def parse_alphas(text: str | None) -> tuple[float, ...] | None:
    """Read ``"0.5,1,2"`` as (0.5, 1.0, 2.0); None stays None. Raises BadParameter for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}") from error


@app.command()
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show devices, the backend of every operator and why, versions, and what is missing."""
    from rich.console import Console

    from fastproj.doctor import diagnose, show

    diagnosis = diagnose()
    if as_json:
        typer.echo(diagnosis.to_json())
    else:
        show(diagnosis, Console())
    raise typer.Exit(0 if diagnosis.healthy else 1)


@app.command()
def demo(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter run of about a minute.")] = False,
    seeds: Seeds = 1,
    alpha: Alphas = None,
    steps: Steps = None,
    output: Output = Path("runs/demo"),
    cache: Cache = None,
) -> None:
    """Fine-tune a real model on text with a planted token: plain fine-tuning against EDGE."""
    alphas = parse_alphas(alpha)
    from fastproj.demo.demo import run_demo

    run_demo(quick=quick, seeds=seeds, alphas=alphas, steps=steps, output=output, cache=cache)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def study(context: typer.Context) -> None:
    """Run many seeds and methods, or finish an interrupted study (options: fastproj study --help)."""
    from fastproj.demo.study import main

    command = typer.Typer(add_completion=False)
    command.command()(main)
    command(args=context.args, prog_name="fastproj study")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
