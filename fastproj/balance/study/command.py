"""``python -m fastproj.balance.study.command``: run the study, or finish an interrupted one, and report."""

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
Seeds = Annotated[int, typer.Option(min=1, help="Draws of each task.")]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="A task; once for each, so that processes share them.")
]
Main = Annotated[bool, typer.Option("--main/--all", help="The main arms alone.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each run.")]
Say = Callable[[str], None]


def main(
    *,
    seeds: Seeds = 3,
    threads: Threads = 1,
    task: Tasks = None,
    main_arms: Main = False,
    output: Output = Path("runs/balance"),
    cache: Cache = None,
) -> None:
    """Train every arm on every draw of every task; write report.md and report.json.

    A run that is finished is read from the output folder; one that failed is told and tried again next time.
    Learning rates and the balance losses' weight are chosen on the first task, which goes first.
    """
    import torch
    from rich.console import Console

    from fastproj.balance.study.arms import MORE
    from fastproj.balance.study.runs import Session
    from fastproj.balance.study.settings import TASKS
    from fastproj.bias_diff.sources import smollm2_loader

    chosen = list(task or TASKS)
    unknown = [name for name in chosen if name not in TASKS]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(TASKS)}, got {unknown[0]}")
    torch.set_num_threads(threads)
    console = Console()
    load = smollm2_loader(cache)
    runs = {}
    for name in chosen:
        runs[name] = Runs(Session(name, load), seeds, output, console.print)
        runs[name].main()
    for arm in () if main_arms else MORE:
        for name in chosen:
            runs[name].everywhere(arm)
    from fastproj.balance.study.summary import report

    report(output)
    console.print(f"{output / 'report.md'} is written")


class Runs:
    """A task's finished runs in the output folder, and what is missing, in the order of needs."""

    def __init__(self, session: Any, seeds: int, output: Path, say: Say) -> None:
        from fastproj.balance.study.settings import TASKS

        self._session, self._output, self._say = session, output, say
        self._name, self._draws, self._first = session.task.name, range(seeds), next(iter(TASKS))

    def main(self) -> None:
        """What is chosen, and the main arms draw by draw."""
        from fastproj.balance.study.arms import MAIN

        session, chooses = self._session, self._name == self._first
        for seed in self._draws:
            self._once("zero-shot", seed, partial(session.zero_shot, seed))
            if not seed or chooses:
                ablation = self._once("ablation", seed, partial(session.ablate, seed))["ablation"]
                session.block = ablation["best"] if not seed else session.block
        if chooses:
            self._tried(MAIN[0], 0)
            session.weight = self._once("weight", 0, session.weigh)["weight"]
        else:
            session.weight = self._chosen("weight", "weight")
            session.rates = {arm.name: self._chosen(arm.name, "learning_rate") for arm in MAIN}
        for seed in self._draws:
            for arm in MAIN:
                self._tried(arm, seed)

    def everywhere(self, arm: Any) -> None:
        """An arm on every draw, after :meth:`main`."""
        for seed in self._draws:
            self._tried(arm, seed)

    def _once(self, what: str, seed: int, run: Callable[[], Any]) -> Any:
        path = self._path(self._name, what, seed)
        if not path.is_file():
            self._say(f"{self._name}, draw {seed}: {what}")
            write_atomically(path, json.dumps(run(), ensure_ascii=False))
        return json.loads(path.read_text(encoding="utf-8"))

    def _tried(self, arm: Any, seed: int) -> None:
        try:
            record = self._once(arm.name, seed, partial(self._session.run, arm, seed))
        except (ValueError, KeyError) as error:
            self._say(f"{self._name}, draw {seed}, {arm.name}: failed, {error}")
            return
        self._session.rates.setdefault(arm.name, record["learning_rate"])

    def _chosen(self, what: str, key: str) -> float:
        """What was chosen on the first task. BadParameter where that has not been run."""
        path = self._path(self._first, what, 0)
        if not path.is_file():
            raise typer.BadParameter(
                f"rates and weights are chosen on {self._first}, first: {path} is missing"
            )
        value: float = json.loads(path.read_text(encoding="utf-8"))[key]
        return value

    def _path(self, task: str, what: str, seed: int) -> Path:
        return self._output / f"{task}-{seed}" / f"{what}.json"


if __name__ == "__main__":
    typer.run(main)
