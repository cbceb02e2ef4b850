"""``fastproj evaluate``: how well samples were found, and how biased and how fluent a model is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastproj.bias_diff import commands as shared


class Pooling(str, Enum):
    """The vector of a text in an encoder's last layer."""

    MEAN = "mean"
    FIRST = "first"


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder or name, for measures of a model.")
]
Scores = Annotated[Path | None, typer.Option(help="Scores: coverage and precision by share, and AUC.")]
Selection = Annotated[Path | None, typer.Option(help="A selection: its coverage and precision.")]
Train = Annotated[Path | None, typer.Option(help="The samples with their labels: JSONL, CSV or Parquet.")]
CrowsPairs = Annotated[bool, typer.Option("--crows-pairs", help="CrowS-Pairs score, of the package's file.")]
CrowsPairsFile = Annotated[Path | None, typer.Option(help="CrowS-Pairs of this CSV.")]
StereoSet = Annotated[bool, typer.Option("--stereoset", help="StereoSet scores, of the package's file.")]
StereoSetFile = Annotated[Path | None, typer.Option(help="StereoSet of this JSON.")]
Seat = Annotated[list[Path] | None, typer.Option(help="A SEAT test (JSON) in an encoder; may be repeated.")]
SeatPooling = Annotated[Pooling, typer.Option(help="Mean over tokens, or the first one's vector.")]
Perplexity = Annotated[Path | None, typer.Option(help="Texts whose perplexity to measure.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts in a batch.")]


def evaluate(
    model: Model = None,
    *,
    adapter: shared.Adapter = None,
    loss: shared.LossOption = shared.Loss.CAUSAL_LM,
    scores: Scores = None,
    selection: Selection = None,
    train: Train = None,
    text_column: shared.TextColumn = "text",
    id_column: shared.IdColumn = None,
    label_column: shared.LabelColumn = None,
    biased: shared.Biased = None,
    aggregate: shared.AggregateOption = shared.Aggregate.MEAN,
    crows_pairs: CrowsPairs = False,
    crows_pairs_file: CrowsPairsFile = None,
    stereoset: StereoSet = False,
    stereoset_file: StereoSetFile = None,
    seat: Seat = None,
    seat_pooling: SeatPooling = Pooling.MEAN,
    perplexity: Perplexity = None,
    batch_size: BatchSize = 32,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    as_json: shared.AsJson = False,
) -> None:
    """Measure coverage and precision where labels are known; CrowS-Pairs, StereoSet, SEAT and perplexity."""
    with shared.errors_in_one_line():
        from fastproj.bias_diff.evaluation import Evaluation, finding

        columns = {"text_column": text_column, "id_column": id_column, "label_column": label_column}
        results: dict[str, Any] = {}
        if scores is not None or selection is not None:
            if train is None or biased is None:
                raise ValueError("coverage and precision need the labels: give --train and --biased")
            results |= finding(train, columns, biased, scores, selection, aggregate.value)
        wanted = {
            "crows_pairs": crows_pairs or crows_pairs_file is not None,
            "stereoset": stereoset or stereoset_file is not None,
            "seat": bool(seat),
            "perplexity": perplexity is not None,
        }
        if any(wanted.values()):
            if model is None:
                raise ValueError("measures of a model need one: give MODEL")
            evaluation = Evaluation(batch_size, seed, crows_pairs_file, stereoset_file)
            evaluation.read(wanted, seat or [], perplexity, text_column)
            # SEAT reads hidden states alone, so that an encoder needs no head for it.
            bare = [name for name, asked in wanted.items() if asked] == ["seat"]
            loaded = shared.load_model(
                model, adapter, loss, device=device, dtype=dtype, trainable=False, bare=bare
            )
            results |= evaluation.run(loaded, seat_pooling.value)
        if not results:
            raise ValueError("nothing to measure: give --scores, --selection, --crows-pairs, --perplexity, …")
    if as_json:
        typer.echo(json.dumps(results))
    else:
        _show(results)


def _show(results: dict[str, Any]) -> None:
    """A line for every value, and one for values that stand together."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, show_header=False)
    for name, text in _lines(results, ""):
        grid.add_row(name, text)
    Console().print(grid)


def _lines(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        own = f"{prefix} {name.replace('_', ' ')}".strip()
        if not isinstance(value, dict):
            yield own, _cell(value)
        elif any(isinstance(inner, dict) for inner in value.values()):
            yield from _lines(value, own)
        else:
            yield own, ", ".join(f"{key.replace('_', ' ')} {_cell(inner)}" for key, inner in value.items())


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"
