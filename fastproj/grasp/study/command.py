"""``python -m fastproj.grasp.study.command``: run the study, or finish an interrupted one, and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastproj.files import write_atomically

Output = Annotated[Path, typer.Option(help="Folder of the finished runs; the report goes beside them.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the converted model; else $FASTPROJ_CACHE.")]
Seeds = Annotated[int, typer.Option(min=1, help="Draws of each setting.")]
Setting = Annotated[
    str | None, typer.Option(help="topic or tone alone, so that another process takes the other.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each run.")]


def main(
    *,
    seeds: Seeds = 3,
    threads: Threads = 1,
    setting: Setting = None,
    output: Output = Path("runs/grasp"),
    cache: Cache = None,
) -> None:
    """Plant a factor, look for it in a naive fine-tune, constrain it; write report.md and report.json.

    A run that is finished is read from the output folder; the report is about all that is there.
    """
    import torch
    from rich.console import Console

    from fastproj.bias_diff.sources import smollm2_loader
    from fastproj.grasp.study.runs import Session
    from fastproj.grasp.study.settings import SETTINGS

    if setting is not None and setting not in SETTINGS:
        raise typer.BadParameter(f"expected one of {', '.join(SETTINGS)}, got {setting}")
    torch.set_num_threads(threads)
    console = Console()
    load = smollm2_loader(cache)
    for name in SETTINGS if setting is None else (setting,):
        run_setting(Session(name, seeds, load, output), output, console.print)
    report(output)
    console.print(f"{output / 'report.md'} is written")


def run_setting(session: Any, output: Path, say: Callable[[str], None]) -> None:
    """All arms over all seeds, in the order of what they need and of what they say."""
    from fastproj.grasp.study.arms import ARMS, FIRST

    name, seeds = session.setting, range(session.seeds)

    def once(what: str, seed: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = output / f"{name}-{seed}" / f"{what}.json"
        if not path.is_file():
            say(f"{name}, draw {seed}: {what}")
            write_atomically(path, json.dumps(run(), indent=1, ensure_ascii=False))
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    losses = {
        (arm.name, seed): once(arm.name, seed, partial(session.run, arm, seed))["validation"]
        for seed in seeds
        for arm in FIRST
    }
    for seed in seeds:
        gains = losses["pretrained", seed], losses["naive", seed]
        found = once(f"identified in {session.seeds}", seed, partial(session.identify, seed, gains))
        session.ranks[seed] = {side: found[side]["rank"] for side in ("write", "read")}
    for seed in seeds:
        once("more", seed, partial(session.more, seed))
    for arm in ARMS:
        for seed in seeds:
            once(arm.name, seed, partial(session.run, arm, seed))


def report(output: Path) -> None:
    """Write report.json, every record of the folder, and report.md, its tables."""
    from fastproj.grasp.study.summary import summary

    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*-*/*.json"))]
    runs = [record for record in records if "arm" in record]
    most = max((record["seeds"] for record in records if "seeds" in record), default=0)
    found = [record for record in records if record.get("seeds") == most]
    more = {(record["setting"], record["seed"]): record for record in records if "decodable" in record}
    for record in found:
        own = more.get((record["setting"], record["seed"]), {})
        record["write"]["words"] = own.get("words")
        record["decodable"] = own.get("decodable")
    everything = {"runs": runs, "identified": found}
    write_atomically(output / "report.json", json.dumps(everything, indent=1, ensure_ascii=False))
    write_atomically(output / "report.md", summary(runs, found))


if __name__ == "__main__":
    typer.run(main)
