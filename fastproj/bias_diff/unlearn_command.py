"""``fastproj unlearn``: a model without what a selection taught it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastproj.bias_diff import commands as shared

if TYPE_CHECKING:
    from fastproj.bias_diff.records import Records

Selection = Annotated[Path, typer.Option(help="What fastproj select or the page wrote: the ids to unlearn.")]
Retrain = Annotated[
    bool, typer.Option("--retrain", help="Train a new adapter on MODEL without the selection instead.")
]
Beta = Annotated[float | None, typer.Option(help="Temperature of NPO, by default 0.1.")]
RetainWeight = Annotated[
    float | None, typer.Option(min=0, help="NPO's weight of the samples to keep, by default 1; 0 for none.")
]
LengthNormalised = Annotated[
    bool, typer.Option("--length-normalised", help="Mean log-probabilities of a sample's tokens.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the selection, or over the rest.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
LearningRate = Annotated[float | None, typer.Option(help="By default 1e-4, and 5e-4 for retraining.")]
Rank = Annotated[int, typer.Option(min=1, help="LoRA rank of a new adapter, where there is no --adapter.")]
Output = Annotated[Path, typer.Option(file_okay=False, help="Folder for the adapter (or model).")]
RECORD = "unlearning.json"


def unlearn(
    model: shared.Model,
    *,
    train: shared.Train,
    selection: Selection,
    adapter: shared.Adapter = None,
    retrain: Retrain = False,
    loss: shared.LossOption = shared.Loss.CAUSAL_LM,
    text_column: shared.TextColumn = "text",
    id_column: shared.IdColumn = None,
    label_column: shared.LabelColumn = None,
    beta: Beta = None,
    retain_weight: RetainWeight = None,
    length_normalised: LengthNormalised = False,
    epochs: Epochs = 1,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = None,
    max_length: shared.MaxLength = 512,
    rank: Rank = 16,
    seed: shared.Seed = 0,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    output: Output = Path("unlearned"),
    as_json: shared.AsJson = False,
) -> None:
    """Unlearn a selection by negative preference optimisation, or retrain without it.

    NPO changes the adapter (or, without one, the model) and holds on to the samples that were not selected.
    --retrain trains a new adapter, of --adapter's configuration where that is given, on those alone.
    """
    with shared.errors_in_one_line():
        shared.check_empty(output)
        if retrain and (beta is not None or retain_weight is not None or length_normalised):
            raise ValueError("--beta, --retain-weight and --length-normalised are NPO's: leave --retrain out")
        import torch

        from fastproj.bias_diff.records import read_records

        records = read_records(train, text_column=text_column, id_column=id_column, label_column=label_column)
        forget = frozenset(shared.read_selection(selection))
        if retrain and not len(records.without(forget)):
            raise ValueError(f"--retrain: {selection} leaves no sample to train on")
        common: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "max_length": max_length,
            "seed": seed,
            **({} if learning_rate is None else {"learning_rate": learning_rate}),
        }
        if retrain:
            work = _retraining(records.without(forget), adapter, rank, task=loss.value, **common)
            torch.manual_seed(seed)  # a classifier's head may be new
            loaded = shared.load_model(
                model, None, loss, device=device, dtype=dtype, trainable=True, new_head=True
            )
        else:
            if loss is not shared.Loss.CAUSAL_LM:
                raise ValueError(f"NPO needs a causal language model, got --loss {loss.value}: use --retrain")
            weight = 1.0 if retain_weight is None else retain_weight
            work = _npo(
                records.only(forget),
                records.without(forget) if weight else None,
                beta=0.1 if beta is None else beta,
                retain_weight=weight,
                length_normalised=length_normalised,
                **common,
            )
            loaded = shared.load_model(model, adapter, loss, device=device, dtype=dtype, trainable=True)
        changed, record = work(loaded)
        record |= {"forgotten": len(forget), "samples": len(records), "command": shared.command_line()}
        _save(changed, loaded.tokenizer, record, output)
    if as_json:
        typer.echo(json.dumps({**record, "output": str(output)}))
        return
    first, last = record["losses"][0], record["losses"][-1]
    verb = "left out" if retrain else "unlearned"
    typer.echo(
        f"{len(forget)} of {len(records)} samples {verb}; loss {first:.4g} at first, {last:.4g} at last"
    )
    typer.echo(f"written to {output}")


Work = Callable[[shared.Loaded], tuple[Any, dict[str, Any]]]


def _npo(forget: Records, retain: Records | None, **options: Any) -> Work:
    from fastproj.bias_diff.npo import NPOConfig
    from fastproj.bias_diff.npo import unlearn as run

    config = NPOConfig(**options)

    def work(loaded: shared.Loaded) -> tuple[Any, dict[str, Any]]:
        used = replace(config, max_length=shared.fitting_length(loaded, config.max_length))
        with shared.progress("unlearning") as show:
            steps = run(
                loaded.model,
                loaded.tokenizer,
                forget,
                retain,
                used,
                on_step=lambda step, total, _: show(step, total),
            )
        details = {"losses": [step.loss for step in steps], "log_ratios": [step.log_ratio for step in steps]}
        return loaded.model, {"method": "npo", "config": asdict(used), **details}

    return work


def _retraining(retain: Records, adapter: Path | None, rank: int, **options: Any) -> Work:
    from fastproj.bias_diff.training import FineTuneConfig, add_adapter, fine_tune

    config = FineTuneConfig(**options)

    def work(loaded: shared.Loaded) -> tuple[Any, dict[str, Any]]:
        used = replace(config, max_length=shared.fitting_length(loaded, config.max_length))
        if adapter is None:
            model = add_adapter(loaded.model, task=config.task, rank=rank, alpha=2 * rank, seed=config.seed)
        else:
            model = _adapter_like(loaded.model, adapter, config.seed)
        with shared.progress("retraining") as show:
            done = fine_tune(
                model, loaded.tokenizer, retain, used, on_step=lambda step, total, _: show(step, total)
            )
        return model, {"method": "retrain", "config": asdict(used), "losses": list(done.losses)}

    return work


def _adapter_like(model: Any, adapter: Path, seed: int) -> Any:
    """The model with a new adapter of the configuration of ``adapter``."""
    import torch
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # files of others fail in their own ways
        raise ValueError(f"adapter {adapter} cannot be loaded: {shared.one_line(error)}") from error
    config.inference_mode = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _save(model: Any, tokenizer: Any, record: dict[str, Any], output: Path) -> None:
    """The folder appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output.parent) as workshop:
        made = Path(workshop) / "made"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        made.replace(output)
