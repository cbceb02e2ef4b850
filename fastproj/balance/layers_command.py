"""``fastproj layers``: where labels part in a model, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastproj.bias_diff import commands as shared

if TYPE_CHECKING:
    from fastproj.balance.findings import Findings

DataOption = Annotated[Path, typer.Option("--data", help="Samples with labels: JSONL, CSV or Parquet.")]
Label = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=WORD]",
        help="A label, and the word that the model is to say for it; may be repeated. By default the labels "
        "of the data, the most frequent first, each its own word.",
    ),
]
Template = Annotated[
    str, typer.Option("--prompt", help=r"Around a text, with {text} in it; \n is a new line.")
]
Samples = Annotated[int, typer.Option(min=1, help="Samples to exchange, at most, drawn evenly by label.")]
MultiLabel = Annotated[
    bool, typer.Option("--multi-label", help="Labels are lists, or strings with | between them.")
]
RowsPerForward = Annotated[
    int | None, typer.Option(min=1, help="Rows of a batch in the exchange; by default two more than blocks.")
]
Output = Annotated[Path, typer.Option(file_okay=False, help="A new or empty folder, for report and page.")]
PROMPT, SAMPLES = r"Text: {text}\nLabel:", 64


def layers(
    model: shared.Model,
    *,
    data: DataOption,
    adapter: shared.Adapter = None,
    text_column: shared.TextColumn = "text",
    label_column: shared.LabelColumn = None,
    id_column: shared.IdColumn = None,
    label: Label = None,
    prompt: Template = PROMPT,
    multi_label: MultiLabel = False,
    samples: Samples = SAMPLES,
    max_length: shared.MaxLength = 128,
    rows_per_forward: RowsPerForward = None,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    output: Output = Path("runs/layers"),
    as_json: shared.AsJson = False,
) -> None:
    """Find the block whose attention moves labels most, and see label logits grow layer by layer.

    Each block's attention output is exchanged for that of a run led to the wrong label (interchange
    ablation); logits are read off every layer (early exit), with the label and without it.
    """
    with shared.errors_in_one_line():
        from fastproj.balance.comparison import BATCH, interchange
        from fastproj.balance.early_exit import early_exit
        from fastproj.balance.findings import Findings
        from fastproj.balance.page import require_matplotlib
        from fastproj.balance.task import Labels, Task, drawn_evenly, load, read_prompt
        from fastproj.balance.task import Samples as Read

        shared.check_empty(output)
        require_matplotlib()
        template = read_prompt(prompt)
        columns = {"text_column": text_column, "id_column": id_column, "label_column": label_column}
        read = Read.read("--data", data, columns)
        labels = Labels.of(label, read, multi_label)
        loaded = load(model, adapter, device=device, dtype=dtype)
        task = Task.of(loaded, labels, template, multi_label, max_length)
        examples = task.examples(read, loaded.tokenizer)
        drawn = drawn_evenly(examples, samples, len(task.labels), seed)
        scores = interchange(loaded, task, drawn, rows_per_forward)
        findings = Findings(
            model=model,
            labels=task.labels,
            template=template.template,
            multi_label=multi_label,
            adapter=None if adapter is None else str(adapter),
            scores=scores,
            ablated=tuple(example.id for example in drawn),
            exit=early_exit(loaded.model, loaded.tokenizer, drawn, task.labels, batch_size=BATCH),
            exited=len(drawn),
        )
        write(findings, output)
    if as_json:
        typer.echo(json.dumps(report(findings)))
    else:
        from fastproj.balance.console import show_layers

        show_layers(findings)
        typer.echo(f"written to {output}")


def report(findings: Findings) -> dict[str, Any]:
    """All of it for JSON, and the command that is running."""
    return {"command": shared.command_line(), **findings.to_dict()}


def write(findings: Findings, output: Path) -> None:
    """``report.json`` and ``report.html``, each in the place of what was there."""
    from fastproj.balance.page import render_page
    from fastproj.files import write_atomically

    write_atomically(output / "report.json", json.dumps(report(findings), indent=1) + "\n")
    write_atomically(output / "report.html", render_page(findings, command=shared.command_line()))
