"""``fastproj grasp``: a fine-tune done over without new reliance on a latent factor, beside other ways."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastproj.bias_diff import commands as shared
from fastproj.latent.identify_command import Pool, PoolOption

if TYPE_CHECKING:
    from fastproj.grasp.comparison import Row


class Method(str, Enum):
    """What the fine-tune is done with, or what is done to the naive one."""

    READ = "read"
    WRITE = "write"
    STREAM = "stream"
    ABLATE = "ablate"
    REMOVE = "remove"
    STEER = "steer"


Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or name of the model.")]
Train = Annotated[Path | None, typer.Option(help="Training samples: JSONL, CSV or Parquet.")]
HeldOut = Annotated[Path | None, typer.Option(help="Samples to measure with, alike.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column of the held-out samples' groups.")]
ExampleOption = Annotated[
    bool, typer.Option("--example", help="Model and data of the demo, instead of MODEL and files.")
]
Methods = Annotated[list[Method] | None, typer.Option("--method", help="May be repeated; by default write.")]
Naive = Annotated[Path | None, typer.Option(help="Adapter of the naive fine-tune; else it is made first.")]
Factors = Annotated[
    Path | None, typer.Option(help="Directions by fastproj identify; else found in the naive adapter.")
]
Directions = Annotated[int, typer.Option(min=1, max=64, help="Directions to keep clear of.")]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Take as many directions, up to --directions, as cost the naive adapter at most this much of "
        "its score; needs --validation.",
    ),
]
Validation = Annotated[Path | None, typer.Option(help="Samples that --tolerance is held against.")]
Strength = Annotated[float, typer.Option(help="Of steering, a share of a token's norm, in both signs.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training samples.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
LearningRate = Annotated[float, typer.Option(min=0, help="Of AdamW, at its highest: it rises, then falls.")]
WeightDecay = Annotated[float, typer.Option(min=0, help="Of AdamW.")]
LoraRank = Annotated[int, typer.Option(min=1, help="Of the adapters.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="A kind of layer to adapt; may be repeated.")
]
Output = Annotated[Path, typer.Option(file_okay=False, help="Folder of adapters, directions and the report.")]


def grasp(
    model: Model = None,
    *,
    train: Train = None,
    held_out: HeldOut = None,
    group_column: GroupColumn = None,
    example: ExampleOption = False,
    method: Methods = None,
    naive: Naive = None,
    factors: Factors = None,
    directions: Directions = 1,
    pool: PoolOption = Pool.STREAM,
    tolerance: Tolerance = None,
    validation: Validation = None,
    strength: Strength = 0.1,
    loss: shared.LossOption = shared.Loss.CAUSAL_LM,
    text_column: shared.TextColumn = "text",
    id_column: shared.IdColumn = None,
    label_column: shared.LabelColumn = None,
    epochs: Epochs = 1,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.01,
    max_length: shared.MaxLength = 128,
    lora_rank: LoraRank = 8,
    target: Targets = None,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    output: Output = Path("runs/grasp"),
    as_json: shared.AsJson = False,
) -> None:
    """Fine-tune plainly, find what it came to lean on, and do it over in the ways that --method names.

    read, write and stream are GRASP's; ablate trains with the directions out of the residual stream; remove
    and steer change the plain fine-tune afterwards. The plain one is measured with them.
    """
    with shared.errors_in_one_line():
        from fastproj.bias_diff.training import FineTuneConfig
        from fastproj.grasp.comparison import Comparison, Data, Search

        shared.check_empty(output)
        targets = tuple(target) if target else None
        if example:
            if model is not None or train is not None or held_out is not None:
                raise ValueError("--example brings its own MODEL, --train and --held-out")
            from fastproj.grasp.example import write_example

            made = write_example(output, seed)
            model, train, held_out, group_column = str(made.model), made.train, made.held_out, "group"
            loss, targets = shared.Loss.CLASSIFICATION, targets or made.targets
        if model is None or train is None:
            raise ValueError("give MODEL and --train, or --example")
        if (tolerance is None) != (validation is None):
            raise ValueError("--tolerance and --validation go together")
        columns = {"text_column": text_column, "id_column": id_column, "label_column": label_column}
        comparison = Comparison(
            model=model,
            loss=loss,
            device=device,
            dtype=dtype,
            data=Data.read(train, held_out, validation, group_column, columns),
            search=Search(directions, pool.value, factors, tolerance),
            config=FineTuneConfig(
                task=loss.value,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                schedule="linear",
                warmup=0.1,
                weight_decay=weight_decay,
                max_length=max_length,
                seed=seed,
            ),
            rank=lora_rank,
            targets=targets,
            strength=strength,
            output=output,
        )
        wanted = [choice.value for choice in dict.fromkeys(method or [Method.WRITE])]
        rows = comparison.run(wanted, naive)
        report = {
            "command": shared.command_line(),
            "directions": comparison.directions,
            "rows": [asdict(row) for row in rows],
        }
        (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _show(rows, output)


def _show(rows: list[Row], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    measure = rows[0].measure or ""
    table = Table(title="The fine-tune, done over", title_justify="left")
    table.add_column("method")
    for name in ("loss", measure, "worst group", "violation", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            _cell(row.loss, ".3f"),
            _cell(row.overall, ".3f"),
            _cell(row.worst, ".3f"),
            _cell(row.violation, ".1e"),
            _cell(row.relative_seconds, ".2f"),
        )
    console = Console()
    console.print(table)
    console.print(
        "loss: of the last tenth of the steps. violation: ‖ΔW V‖/‖ΔW‖ (read) or ‖Uᵀ ΔW‖/‖ΔW‖, the largest of "
        "all modules. time: of training, the plain one's being 1."
    )
    console.print(f"written to {output}", highlight=False)


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)
