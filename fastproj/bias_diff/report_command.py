"""``fastproj report``: one page on which to review what was scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastproj.bias_diff import commands as shared
from fastproj.bias_diff.report import TITLE
from fastproj.bias_diff.select_command import PUBLISHED_FRACTION, Scores

Train = Annotated[
    Path | None, typer.Option(help="The samples that were scored, for their texts: JSONL, CSV or Parquet.")
]
Selection = Annotated[Path | None, typer.Option(help="What fastproj select wrote; else the top --fraction.")]
Fraction = Annotated[float, typer.Option(help="Share of the samples that the page opens on.")]
Title = Annotated[str, typer.Option(help="Title of the page.")]
Output = Annotated[Path, typer.Option(dir_okay=False, help="The page.")]


def report(
    scores: Scores,
    *,
    train: Train = None,
    text_column: shared.TextColumn = "text",
    id_column: shared.IdColumn = None,
    label_column: shared.LabelColumn = None,
    biased: shared.Biased = None,
    selection: Selection = None,
    fraction: Fraction = PUBLISHED_FRACTION,
    aggregate: shared.AggregateOption = shared.Aggregate.MEAN,
    title: Title = TITLE,
    output: Output = Path("report.html"),
    as_json: shared.AsJson = False,
) -> None:
    """Make an offline page: scores by threshold, the samples, coverage and precision, the selection."""
    with shared.errors_in_one_line():
        from fastproj.bias_diff.report import render_report
        from fastproj.files import require_writable, write_atomically
        from fastproj.influence.scores import Scores as Table

        shared.keep_inputs(output, scores, train, selection)
        require_writable(output)
        if train is None and biased is not None:
            raise ValueError("--biased names a label in the samples: give them with --train")
        table = Table.load(scores)
        texts, labels = None, None
        if train is not None:
            from fastproj.bias_diff.records import read_records

            records = read_records(
                train, text_column=text_column, id_column=id_column, label_column=label_column
            )
            texts = [records.texts[row] for row in shared.in_order_of(table.ids, records, train)]
            if biased is not None:
                marked = records.ids_labelled(biased)
                labels = [name in marked for name in table.ids]
        page = render_report(
            table,
            texts=texts,
            labels=labels,
            selected=None if selection is None else shared.read_selection(selection),
            aggregate=aggregate.value,
            fraction=fraction,
            command=shared.command_line(),
            title=title,
        )
        write_atomically(output, page)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "samples": len(table), "bytes": len(page)}))
    else:
        typer.echo(f"written to {output}")
