"""``fastproj select``: the samples of the highest influence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastproj.bias_diff import commands as shared

Scores = Annotated[Path, typer.Argument(metavar="SCORES.parquet", help="Scores of fastproj score.")]
Fraction = Annotated[float | None, typer.Option(help="Share of all samples; 0.35 where no --count is given.")]
Count = Annotated[int | None, typer.Option(help="Number of samples.")]
Balanced = Annotated[
    bool, typer.Option("--balanced", help="Normalise each probe's scores, take for the least served in turn.")
]
Output = Annotated[Path, typer.Option(dir_okay=False, help="JSON, or a text file (.txt) of an id a line.")]
PUBLISHED_FRACTION = 0.35


def select(
    scores: Scores,
    *,
    fraction: Fraction = None,
    count: Count = None,
    aggregate: shared.AggregateOption = shared.Aggregate.MEAN,
    balanced: Balanced = False,
    output: Output = Path("selection.json"),
    as_json: shared.AsJson = False,
) -> None:
    """Select the samples with the highest scores, strongest first."""
    with shared.errors_in_one_line():
        if output.suffix.lower() not in (".json", ".txt"):
            raise ValueError(f"--output: expected a name that ends in .json or .txt, got {output}")
        shared.keep_inputs(output, scores)
        from fastproj.files import write_atomically
        from fastproj.influence.scores import Scores as Table
        from fastproj.influence.select import select as choose

        if fraction is None and count is None:
            fraction = PUBLISHED_FRACTION
        table = Table.load(scores)
        selection = choose(
            table, fraction=fraction, count=count, aggregate=aggregate.value, balanced=balanced
        )
        record = {
            "ids": list(selection.ids),
            "samples": len(table),
            "threshold": selection.threshold,
            "aggregate": aggregate.value,
            "balanced": balanced,
            "scores": str(scores),
        }
        text = "".join(f"{name}\n" for name in selection.ids)
        write_atomically(
            output, text if output.suffix.lower() == ".txt" else json.dumps(record, indent=1) + "\n"
        )
    if as_json:
        typer.echo(json.dumps({**record, "output": str(output)}))
        return
    share = 100 * len(selection) / len(table)
    lowest = f"the lowest {aggregate.value} score among them is {selection.threshold:.4g}"
    typer.echo(f"{len(selection)} of {len(table)} samples ({share:.1f} %): {lowest}")
    typer.echo(f"written to {output}")
