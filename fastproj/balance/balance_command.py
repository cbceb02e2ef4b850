"""``fastproj balance``: a classifier by label words, before and after ways of treating its labels alike."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastproj.balance import layers_command as shown
from fastproj.bias_diff import commands as shared


class Method(str, Enum):
    """What is trained, or done to the scores instead."""

    BALANCE = "balance"
    LAYER = "layer"
    LORA = "lora"
    CC = "cc"
    DC = "dc"


Test = Annotated[Path, typer.Option(help="Samples to measure with, alike.")]
Validation = Annotated[Path | None, typer.Option(help="Samples that learning rates are chosen by, alike.")]
HeldOut = Annotated[Path | None, typer.Option(help="Texts whose perplexity to measure, alike.")]
Layer = Annotated[
    str, typer.Option(metavar="auto|N", help="Block to train, from 0; auto takes what fastproj layers would.")
]
Methods = Annotated[
    list[Method] | None,
    typer.Option(
        "--method",
        help="balance trains one block, layer the same without the balance loss, lora all linear layers; cc "
        "and dc calibrate scores. May be repeated; by default balance.",
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Of the block's adapter; by default trained in full.")]
LoraRank = Annotated[int, typer.Option(min=1, help="Of lora.")]
Alpha = Annotated[float, typer.Option(min=0, help="Weight of the language model's loss.")]
Beta = Annotated[float, typer.Option(min=0, help="Weight of propensity, which is to fall.")]
Gamma = Annotated[float, typer.Option(min=0, help="Weight of discrimination, which is to rise.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training samples.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a training batch.")]
LearningRates = Annotated[
    list[float] | None,
    typer.Option(
        "--learning-rate",
        min=0,
        help="Of AdamW, by default 5e-5. May be repeated: each method takes the one with the best macro F1 "
        "on --validation.",
    ),
]
WeightDecay = Annotated[float, typer.Option(min=0, help="Of AdamW.")]
Output = Annotated[
    Path, typer.Option(file_okay=False, help="A new or empty folder, for adapters and report.")
]


def balance(
    model: shared.Model,
    *,
    train: shared.Train,
    test: Test,
    validation: Validation = None,
    held_out: HeldOut = None,
    text_column: shared.TextColumn = "text",
    label_column: shared.LabelColumn = None,
    id_column: shared.IdColumn = None,
    label: shown.Label = None,
    prompt: shown.Template = shown.PROMPT,
    multi_label: shown.MultiLabel = False,
    layer: Layer = "auto",
    samples: shown.Samples = shown.SAMPLES,
    rows_per_forward: shown.RowsPerForward = None,
    method: Methods = None,
    rank: Rank = None,
    lora_rank: LoraRank = 16,
    alpha: Alpha = 1.0,
    beta: Beta = 0.1,
    gamma: Gamma = 0.1,
    epochs: Epochs = 1,
    batch_size: BatchSize = 16,
    learning_rate: LearningRates = None,
    weight_decay: WeightDecay = 0.0,
    max_length: shared.MaxLength = 128,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    output: Output = Path("runs/balance"),
    as_json: shared.AsJson = False,
) -> None:
    """Train a block so that labels are treated alike; measure the model before, after, and other ways.

    F1 by label, the worst label's, and perplexity, on the same samples for all. Adapters, a report and a page
    are written as each method is done.
    """
    with shared.errors_in_one_line():
        from fastproj.balance.comparison import Comparison, Data, Recipe
        from fastproj.balance.findings import Findings
        from fastproj.balance.page import require_matplotlib
        from fastproj.balance.task import Labels, Samples, Task, load, read_prompt
        from fastproj.balance.training import BalanceConfig
        from fastproj.bias_diff.records import read_records

        shared.check_empty(output)
        require_matplotlib()
        number = _number(layer)
        template = read_prompt(prompt)
        columns = {"text_column": text_column, "id_column": id_column, "label_column": label_column}
        config = BalanceConfig(epochs=epochs, batch_size=batch_size, weight_decay=weight_decay, seed=seed)
        read, tested = Samples.read("--train", train, columns), Samples.read("--test", test, columns)
        validated = None if validation is None else Samples.read("--validation", validation, columns)
        texts = () if held_out is None else read_records(held_out, text_column=text_column).texts
        labels = Labels.of(label, read, multi_label)
        loaded = load(model, device=device, dtype=dtype)
        task = Task.of(loaded, labels, template, multi_label, max_length)
        wanted = [choice.value for choice in dict.fromkeys(method or [Method.BALANCE])]
        blocks_trained = any(name in ("balance", "layer") for name in wanted)
        comparison = Comparison(
            loaded=loaded,
            task=task,
            data=Data.of(task, loaded.tokenizer, read, tested, validated, texts),
            recipe=Recipe(
                alpha=alpha,
                beta=beta,
                gamma=gamma,
                rank=rank,
                lora_rank=lora_rank,
                rates=tuple(dict.fromkeys(learning_rate or [config.learning_rate])),
                config=config,
            ),
            findings=Findings(
                model=model,
                labels=task.labels,
                template=template.template,
                multi_label=multi_label,
                layer=number if blocks_trained else None,
                training={
                    "samples": len(read.records),
                    **{"epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay},
                    **{"alpha": alpha, "beta": beta, "gamma": gamma},
                    **{"rank": rank, "lora_rank": lora_rank, "seed": seed},
                },
            ),
            output=output,
            keep=lambda findings: shown.write(findings, output),
        )
        comparison.check(wanted, number)
        comparison.zero_shot()
        if blocks_trained and number is None:
            comparison.choose_layer(samples, rows_per_forward)
        for name in wanted:
            comparison.run(name)
        findings = comparison.findings
    if as_json:
        typer.echo(json.dumps(shown.report(findings)))
    else:
        from fastproj.balance.console import show_methods

        show_methods(findings)
        typer.echo(f"written to {output}")


def _number(layer: str) -> int | None:
    """The block's number; None for ``auto``."""
    if layer == "auto":
        return None
    if not layer.isdecimal():
        raise ValueError(f"--layer: expected auto or the number of a block from 0, got {layer!r}")
    return int(layer)
