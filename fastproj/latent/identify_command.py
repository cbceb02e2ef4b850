"""``fastproj identify``: what a fine-tune came to lean on, by the weights of its adapter, and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastproj.bias_diff import commands as shared

if TYPE_CHECKING:
    from torch import Tensor

    from fastproj.latent.factors import LatentFactors


class Side(str, Enum):
    """Whether directions are of what modules read or of what they write."""

    READ = "read"
    WRITE = "write"


class Pool(str, Enum):
    """Where directions are looked for."""

    MODULE = "module"
    STREAM = "stream"


class Weighting(str, Enum):
    """How much each module counts in the stream."""

    ENERGY = "energy"
    RELATIVE = "relative"
    UNIFORM = "uniform"


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the fine-tune's PEFT adapter.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or name of the model before the fine-tune, to tell directions in words; else the folder "
        "that the adapter names, where there is one."
    ),
]
SideOption = Annotated[Side, typer.Option(help="What modules read, or what they write.")]
Rank = Annotated[int, typer.Option(min=1, max=64, help="Directions to find.")]
PoolOption = Annotated[Pool, typer.Option(help="Of the residual stream, or of each module.")]
WeightingOption = Annotated[Weighting, typer.Option(help="Of the modules in the stream.")]
Adapter = Annotated[str | None, typer.Option(metavar="NAME", help="Which of several adapters in DIR.")]
LossOption = Annotated[
    shared.Loss | None, typer.Option(help="What the model was trained to do; else as the adapter says.")
]
Sentences = Annotated[
    Path | None, typer.Option(help="Sentences to rank: JSONL, CSV or Parquet, or .txt with one a line.")
]
With = Annotated[Path | None, typer.Option("--with", help="Probe sentences that have the factor, alike.")]
Without = Annotated[Path | None, typer.Option("--without", help="Probe sentences that have it not.")]
Against = Annotated[
    list[Path] | None, typer.Option(metavar="DIR", help="Adapter of another fine-tune; may be repeated.")
]
Draws = Annotated[int, typer.Option(min=0, help="Of the permutation test; 0 makes none.")]
Top = Annotated[int, typer.Option(min=1, help="Tokens and sentences to show on each side.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sentences in a batch.")]
Output = Annotated[Path, typer.Option(dir_okay=False, help="File of the directions, for fastproj grasp.")]
Page = Annotated[Path | None, typer.Option(dir_okay=False, help="The page; else beside --output.")]


def identify(
    folder: Folder,
    *,
    model: Model = None,
    side: SideOption = Side.WRITE,
    rank: Rank = 1,
    pool: PoolOption = Pool.STREAM,
    weighting: WeightingOption = Weighting.ENERGY,
    adapter: Adapter = None,
    loss: LossOption = None,
    sentences: Sentences = None,
    with_factor: With = None,
    without: Without = None,
    text_column: shared.TextColumn = "text",
    against: Against = None,
    draws: Draws = 100,
    seed: shared.Seed = 0,
    top: Top = 10,
    batch_size: BatchSize = 16,
    device: shared.Device = None,
    dtype: shared.Dtype = shared.Precision.FLOAT32,
    output: Output = Path("factors.safetensors"),
    html: Page = None,
    as_json: shared.AsJson = False,
) -> None:
    """Find the directions that a fine-tune leans on: their energy against chance, layers, words, a page.

    With --against, or with --with and --without, directions are put in the order that these suggest.
    """
    with shared.errors_in_one_line():
        from fastproj.files import require_writable, write_atomically
        from fastproj.latent.page import render_page
        from fastproj.latent.words import find_model, in_words, read_texts

        page = html or output.with_suffix(".html")
        probes = [path for path in (sentences, with_factor, without) if path is not None]
        _keep_inputs({"--output": output, "--html": page}, [folder, *(against or ())], probes)
        for path in (output, page):
            require_writable(path)
        texts = read_texts(sentences, with_factor, without, text_column)
        options = {"side": side.value, "rank": rank, "pool": pool.value, "weighting": weighting.value}
        factors, recurrence = _find(folder, adapter, against or [], options, draws, seed)
        source = find_model(
            folder, adapter, model, loss=loss, device=device, dtype=dtype, needed=texts.need_model
        )
        if source is not None:
            _keep_model({"--output": output, "--html": page}, Path(source.name))
        findings = in_words(factors, recurrence, source, texts, top=top, batch_size=batch_size)
        rendered = render_page(findings, command=shared.command_line())
        findings.factors.save(output)
        write_atomically(page, rendered)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "html": str(page), **findings.to_dict()}))
    else:
        from fastproj.latent.console import show

        show(findings)
        typer.echo(f"written to {output} and {page}")


def _keep_inputs(outputs: Mapping[str, Path], adapters: Sequence[Path], probes: Sequence[Path]) -> None:
    """Raises ValueError where an output would take the place of an input, or of another output."""
    read = {path.resolve() for path in probes}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        read |= {
            path.resolve() for folder in adapters for path in (*folder.glob(name), *folder.glob(f"*/{name}"))
        }
    for option, path in outputs.items():
        if path.resolve() in read:
            raise ValueError(f"{option}: {path} is what is read")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise ValueError(f"--output and --html: expected different files, got {outputs['--output']} twice")


def _keep_model(outputs: Mapping[str, Path], model: Path) -> None:
    """Raises ValueError where an output would take the place of a file of the model."""
    for option, path in outputs.items():
        if path.resolve().parent == model.resolve() and path.exists():
            raise ValueError(f"{option}: {path} is a file of the model")


def _find(
    folder: Path, adapter: str | None, against: Sequence[Path], options: dict[str, Any], draws: int, seed: int
) -> tuple[LatentFactors, Mapping[str, Tensor] | None]:
    from fastproj.latent.evidence import recurrence
    from fastproj.latent.identify import identify

    factors = identify(folder, adapter=adapter, draws=draws, seed=seed, **options)
    others = []
    for other in against:
        try:
            others.append(identify(other, draws=0, **options))
        except ValueError as error:
            raise ValueError(f"--against {other}: {error}") from error
    return factors, recurrence(factors, others) if others else None
