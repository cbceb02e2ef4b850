"""``fastproj score``: the influence of every training sample on probes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Annotated

import typer

from fastproj.bias_diff import commands as shared
from fastproj.files import require_writable

KINDS = ("rademacher", "gaussian", "srht", "sjlt", "kronecker")

Optimizer = Annotated[
    Path | None,
    typer.Option(help="optimizer.pt of the fine-tune, for Adam's updates; without it, plain gradients."),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option("--checkpoint", help="Sum over saved states of the fine-tune, by learning rate; repeat."),
]
Probes = Annotated[
    list[str],
    typer.Option("--probe", metavar="[NAME=]FILE", help="Sentences of a bias; repeat for several biases."),
]
ProbeColumn = Annotated[
    str | None, typer.Option(help="Column of the probes' texts; by default that of the samples'.")
]
Against = Annotated[
    Path | None,
    typer.Option(help="Texts as they should be: their mean gradient is taken off every probe's."),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch at most, padding counted.")]
Normalize = Annotated[bool, typer.Option("--normalize/--dot", help="Cosines, or dot products.")]
Less = Annotated[bool, typer.Option("--less", help="Adam's update as in LESS: ε in the root, uncorrected.")]
Output = Annotated[Path, typer.Option(dir_okay=False, help="Parquet file: ids and a score per probe.")]
Sketch = Annotated[
    str | None,
    typer.Option(metavar="KIND:K", help=f"Also keep every gradient as a sketch: {', '.join(KINDS)}."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was ended.")]
ParamsOption = Annotated[
    shared.Params | None, typer.Option(help="By default lora with an adapter, trainable without.")
]


def score(
    model: shared.Model,
    *,
    train: shared.Train,
    probe: Probes,
    adapter: shared.Adapter = None,
    optimizer: Optimizer = None,
    checkpoint: Checkpoints = None,
    loss: shared.LossOption = shared.Loss.CAUSAL_LM,
    params: ParamsOption = None,
    text_column: shared.TextColumn = "text",
    id_column: shared.IdColumn = None,
    label_column: shared.LabelColumn = None,
    probe_column: ProbeColumn = None,
    against: Against = None,
    max_length: shared.MaxLength = 512,
    batch_tokens: BatchTokens = 4096,
    normalize: Normalize = True,
    less: Less = False,
    output: Output = Path("scores.parquet"),
    sketch: Sketch = None,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    resume: Resume = False,
    as_json: shared.AsJson = False,
) -> None:
    """Score every training sample by its influence on bias probes, in one backward pass a batch.

    Killed at any moment, the same command with --resume goes on at the row where it was.
    """
    with shared.errors_in_one_line():
        files = parse_probes(probe)
        kind = parse_sketch(sketch)
        states = checkpoint or []
        check_options(kind, seed, states, less=less and optimizer is None)
        folder = None if kind is None else shared.sketch_folder(output)
        check_output(output, folder, resume=resume)
        from fastproj.bias_diff.records import read_records
        from fastproj.bias_diff.scoring import Scoring

        records = read_records(train, text_column=text_column, id_column=id_column, label_column=label_column)
        own = label_column if loss is shared.Loss.CLASSIFICATION else None
        column = probe_column or text_column
        probes = {
            name: read_records(file, text_column=column, label_column=own) for name, file in files.items()
        }
        contrast = None if against is None else read_records(against, text_column=column, label_column=own)
        first = adapter or next((path for path in states if (path / "adapter_config.json").is_file()), None)
        chosen = params or (shared.Params.TRAINABLE if first is None else shared.Params.LORA)
        scoring = Scoring(
            shared.load_model(model, first, loss, device=device, dtype=dtype, trainable=True),
            loss=loss.value,
            params=chosen.value,
            optimizer=optimizer,
            checkpoints=states,
            adam_variant="less" if less else "adam",
            max_length=max_length,
            batch_tokens=batch_tokens,
            normalize=normalize,
            seed=seed,
            against=contrast,
        )
        began = time.perf_counter()
        scores = scoring.run(records, probes, output, sketch=kind)
        seconds = time.perf_counter() - began
    if as_json:
        record = {"output": str(output), "samples": len(scores), "names": scores.names, "seconds": seconds}
        typer.echo(json.dumps({**record, "sketches": None if folder is None else str(folder)}))
        return
    typer.echo(f"{len(scores)} samples scored against {', '.join(scores.names)} in {seconds:.1f} s")
    typer.echo(f"written to {output}{'' if folder is None else f', sketches to {folder}'}")


def parse_probes(values: Sequence[str]) -> dict[str, Path]:
    """``["race=a.csv", "b.csv"]`` by name. Raises ValueError for a name given twice."""
    files: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        path = Path(file if equals else value)
        name = name if equals else path.stem
        if not name.strip() or name != name.strip() or name in files:
            raise ValueError(f"--probe: expected a name for every file, each its own, got {value!r}")
        files[name] = path
    return files


def parse_sketch(value: str | None) -> tuple[str, int] | None:
    """``"srht:4096"`` as ("srht", 4096); None stays None. Raises ValueError for anything else."""
    if value is None:
        return None
    kind, _, dimension = value.partition(":")
    if kind not in KINDS or not dimension.isdecimal() or int(dimension) < 1:
        raise ValueError(f"--sketch: expected KIND:K, KIND one of {', '.join(KINDS)}, got {value!r}")
    return kind, int(dimension)


def check_options(kind: tuple[str, int] | None, seed: int, states: Sequence[Path], *, less: bool) -> None:
    """Raises ValueError for what would be met only once all samples are scored, or not at all."""
    if kind is not None:
        from fastproj.bindings.sketch import check_numbers

        check_numbers(kind[1], seed, kind[0], 0)
        if states:
            raise ValueError("--sketch: sketches are of one state of the model, give no --checkpoint")
    if less and not states:
        raise ValueError("--less is a form of Adam's update: give --optimizer, or --checkpoint")


def check_output(output: Path, sketches: Path | None = None, *, resume: bool) -> None:
    """Raises ValueError where rows are there and none were asked for, OSError where none can be written."""
    leftovers = sorted(output.parent.glob(f"{escape(output.name)}.*")) if output.parent.is_dir() else []
    there = [path for path in (output, *leftovers, sketches) if path is not None and path.exists()]
    if there and not resume:
        raise ValueError(f"{there[0]} is there already: go on with --resume, or remove it")
    require_writable(output)
