"""``fastproj bench``: measure, and compare two measurements. Heavy imports wait until a command runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="bench",
    help="Time every operator on this machine, tests first; compare two such measurements.",
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

NO_GPU = (
    "no CUDA or ROCm device here. --device cpu measures the CPU's own route by the wall clock, which says "
    "nothing about the kernels"
)

Device = Annotated[str, typer.Option(help="cuda (ROCm too) or cpu.")]
Suites = Annotated[list[str] | None, typer.Option("--suite", help="An operator; may be repeated.")]
Workloads = Annotated[list[str] | None, typer.Option("--workload", help="Part of a name; may be repeated.")]
Quick = Annotated[bool, typer.Option("--quick", help="Smallest workload, small batch, few rounds.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Rounds to take medians over.")]
Output = Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file for the whole record.")]
Tests = Annotated[Path | None, typer.Option(help="Tests to pass first, in place of the project's own.")]
Before = Annotated[Path, typer.Argument(metavar="A.json", help="The measurement to compare with.")]
After = Annotated[Path, typer.Argument(metavar="B.json", help="The measurement to judge.")]
Limit = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Exit with 1 where B takes more than this many times A, beyond the noise, or where rounds are "
        "too few to tell.",
    ),
]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    *,
    device: Device = "cuda",
    suite: Suites = None,
    workload: Workloads = None,
    quick: Quick = False,
    rounds: Rounds = None,
    output: Output = None,
    tests: Tests = None,
) -> None:
    """Run the correctness suite, then time every operator. A red suite ends it: no speed is shown."""
    if context.invoked_subcommand is not None:
        return
    check_device(device)
    check_output(output)
    from rich.console import Console

    from fastproj.bench.harness.case import WrongResultError
    from fastproj.bench.harness.gate import GateRefusedError
    from fastproj.bench.harness.record import write_record
    from fastproj.bench.harness.session import Options, take
    from fastproj.bench.harness.tables import show_record

    options = Options(device, tuple(suite or ()), tuple(workload or ()), quick, rounds, tests)
    try:
        record = take(options, shlex.join(["fastproj", *sys.argv[1:]]), say)
    except (GateRefusedError, WrongResultError, ValueError) as error:
        fail(str(error))
    show_record(record, Console())
    if output is not None:
        write_record(record, output)
        say(f"written to {output}")


@app.command()
def compare(before: Before, after: After, *, fail_above: Limit = None) -> None:
    """Ratios of two measurements, row by row, told apart from the noise."""
    from rich.console import Console

    from fastproj.bench.harness.compare import LEAST_ROUNDS
    from fastproj.bench.harness.compare import compare as compare_records
    from fastproj.bench.harness.record import read_record
    from fastproj.bench.harness.tables import show_comparison

    try:
        comparison = compare_records(read_record(before), read_record(after))
    except ValueError as error:
        fail(str(error))
    show_comparison(comparison, Console())
    if fail_above is None:
        return
    slower = comparison.slower_than(fail_above)
    for ratio in slower:
        say(f"{ratio.after.name}: {ratio.ratio:.3f} times as long, more than {fail_above}")
    for ratio in comparison.unjudged:
        say(f"{ratio.after.name}: too few rounds to tell; measure with --rounds {LEAST_ROUNDS} or more")
    raise typer.Exit(1 if slower or comparison.unjudged else 0)


def check_device(device: str) -> None:
    """Raises BadParameter for a device that is unknown or not here."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"expected cuda or cpu, got {device!r}", param_hint="--device")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(NO_GPU, param_hint="--device")


def check_output(output: Path | None) -> None:
    """Raises BadParameter for a file that could not be written when all has been measured."""
    from fastproj.files import require_writable

    try:
        if output is not None:
            require_writable(output)
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written: {error}", param_hint="--output") from error


def say(line: str) -> None:
    """What happens meanwhile goes to stderr; stdout is for tables."""
    typer.echo(line, err=True)


def fail(reason: str) -> NoReturn:
    """Say why there is no result, and leave with 1."""
    say(reason)
    raise typer.Exit(1)
