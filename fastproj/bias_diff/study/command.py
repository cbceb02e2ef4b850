"""``python -m fastproj.bias_diff.study.command``: run the study, or finish an interrupted one, and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from fastproj.files import write_atomically

Output = Annotated[Path, typer.Option(help="Folder of the finished runs; the report goes beside them.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the converted model; else $FASTPROJ_CACHE.")]
Seeds = Annotated[int, typer.Option(min=1, help="Draws of each setting.")]
Debiased = Annotated[int, typer.Option(min=0, help="Draws of each setting that are also debiased.")]
Setting = Annotated[
    str | None, typer.Option(help="One setting alone, so that another process takes the other.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each run.")]


def main(
    *,
    seeds: Seeds = 5,
    debiased: Debiased = 3,
    threads: Threads = 1,
    setting: Setting = None,
    output: Output = Path("runs/bias-diff"),
    cache: Cache = None,
) -> None:
    """Rank the biased samples in both settings, remove or unlearn them, and write report.md and report.json.

    A run that is finished is read from the output folder.
    """
    import torch
    from rich.console import Console

    from fastproj.bias_diff.sources import smollm2_loader
    from fastproj.bias_diff.study.runs import debias, rank
    from fastproj.bias_diff.study.settings import SETTINGS
    from fastproj.bias_diff.study.summary import summary

    torch.set_num_threads(threads)
    console = Console()
    load = smollm2_loader(cache)
    settings = SETTINGS if setting is None else (setting,)
    ranked: dict[Path, dict[str, Any]] = {}
    measured: list[dict[str, Any]] = []
    for seed, name in product(range(seeds), settings):
        folder = output / f"{name}-{seed}"
        console.print(f"{name}, draw {seed}: ranking")
        ranked[folder] = _once(folder / "rank.json", partial(rank, name, seed, load, folder / "warm-up"))
    for seed, name in product(range(min(debiased, seeds)), settings):
        folder = output / f"{name}-{seed}"
        console.print(f"{name}, draw {seed}: debiasing")
        run = partial(debias, name, seed, load, folder, ranked[folder])
        measured.append(_once(folder / "debias.json", run))
    everything = {"ranked": list(ranked.values()), "debiased": measured}
    write_atomically(output / "report.json", json.dumps(everything, indent=1))
    write_atomically(output / "report.md", summary(everything["ranked"], measured))
    console.print(f"{output / 'report.md'} is written")


def _once(path: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record at ``path``, made where it is not there."""
    if not path.is_file():
        write_atomically(path, json.dumps(run(), indent=1))
    record: dict[str, Any] = json.loads(path.read_text())
    return record


if __name__ == "__main__":
    typer.run(main)
