"""``fastproj demo``: plain fine-tuning and EDGE on text with a planted token, from the same start."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid

from fastproj.demo.data import find_archive, find_model
from fastproj.demo.methods import Method, describe
from fastproj.demo.study import Job, run_study, write_atomically
from fastproj.demo.tables import run_intervals, tabulate
from fastproj.demo.timing import step_costs
from fastproj.demo.training import RunResult, TrainingConfig, load_model, prepare, quick_config, run
from fastproj.demo.verdicts import verdicts
from fastproj.paired import Timing

# The best mean worst group on the validation split: bench/results/edge_study.md.
DEFAULT_ALPHAS = (8.0,)
COST_METHODS = {
    "ERM": Method(kind="erm"),
    "EDGE, one backward pass": Method(),
    "published recipe": Method(kind="published"),
}


def run_demo(
    quick: bool = False,
    seeds: int = 1,
    alphas: Sequence[float] | None = None,
    steps: int | None = None,
    output: Path = Path("runs/demo"),
    cache: Path | None = None,
) -> Path:
    """Train, print what came out, and write the page; return its path.

    Finished runs are kept under ``output/runs`` and not made again.

    Args:
        quick: a shorter run of about a minute, for a first look.
        seeds: runs per method; more than one are made side by side, a process each.
        alphas: strengths of EDGE to compare; None takes the default.
        steps: of a run; None takes the default.
        output: folder of the page and the runs.
        cache: folder of the downloaded texts; None looks where ``find_archive`` does.

    Raises:
        FileNotFoundError: the texts or the model are missing.
        ModuleNotFoundError: jinja2 or matplotlib is missing.
        ValueError: fewer than one seed, or a negative α.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    _need_extras()
    find_archive(cache)
    find_model()
    config = quick_config(TrainingConfig()) if quick else replace(TrainingConfig(), eval_every=15)
    config = config if steps is None else replace(config, steps=steps)
    methods = ["erm", *(f"edge:alpha={alpha:g}" for alpha in (alphas or DEFAULT_ALPHAS))]
    console = Console()
    console.print(
        f"[bold]MiniLM-L6, LoRA, {config.steps} steps of {config.batch_size}[/bold], "
        f"{seeds} seed{'s' if seeds > 1 else ''}: {', '.join(map(describe, methods))}"
    )
    results = _train(console, output, methods, seeds, config, cache)
    with console.status("Timing a step of each recipe"):
        costs = _costs(config, cache, rounds=6 if quick else 15)
    return _conclude(console, results, costs, config, output)


def _train(
    console: Console, output: Path, methods: list[str], seeds: int, config: TrainingConfig, cache: Path | None
) -> list[RunResult]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        if seeds == 1:
            return run_study(
                output, methods, [0], config=config, cache=cache, runner=lambda job: _watched(progress, job)
            )
        task = progress.add_task("runs", total=len(methods) * seeds, note="")
        return run_study(
            output,
            methods,
            range(seeds),
            workers=os.cpu_count() or 1,
            config=config,
            cache=cache,
            on_finished=_run_counter(progress, task),
        )


def _watched(progress: Progress, job: Job) -> RunResult:
    task = progress.add_task(describe(job.name), total=job.config.steps, note="loading")

    def show(step: int, loss: float) -> None:
        progress.update(task, completed=step, note=f"loss {loss:.3f}")

    result = run(job.name, job.method, job.seed, job.config, job.cache, on_step=show)
    progress.update(task, note=f"worst group {100 * result.test.worst:.1f} %")
    return result


def _run_counter(progress: Progress, task: TaskID) -> Callable[[RunResult, int, int], None]:
    def show(result: RunResult, finished: int, total: int) -> None:
        note = f"{describe(result.method)}, seed {result.seed}: worst group {100 * result.test.worst:.1f} %"
        progress.update(task, completed=finished, total=total, note=note)

    return show


def _costs(config: TrainingConfig, cache: Path | None, rounds: int) -> dict[str, Timing]:
    models = {name: load_model(config, seed=0) for name in COST_METHODS}
    samples = prepare(config, 0, cache)["train"]
    return step_costs(models, COST_METHODS, samples, batch_size=config.batch_size, rounds=rounds)


def _conclude(
    console: Console,
    results: list[RunResult],
    costs: dict[str, Timing],
    config: TrainingConfig,
    output: Path,
) -> Path:
    from fastproj.demo.report import render_report

    table = tabulate(results)
    sentences = verdicts(results, table, costs)
    console.print(_accuracy_grid(results), _cost_grid(costs), *sentences, sep="\n")
    page = output / "report.html"
    write_atomically(page, render_report(results, table, costs, sentences, config))
    console.print(f"The curves are in {page}")
    return page


def _accuracy_grid(results: Sequence[RunResult]) -> Grid:
    grid = Grid("method", "seed", "overall", "worst group", title="Test accuracy, per cent [95 % bootstrap]")
    for result in results:
        intervals = run_intervals(result.test)
        cells = [
            f"{100 * value:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]"
            for value, (low, high) in (
                (result.test.overall, intervals["overall"]),
                (result.test.worst, intervals["worst"]),
            )
        ]
        grid.add_row(describe(result.method), str(result.seed), *cells)
    return grid


def _cost_grid(costs: dict[str, Timing]) -> Grid:
    grid = Grid("step", "milliseconds", "against ERM", title="Cost of a step, medians of paired rounds")
    for name, cost in costs.items():
        grid.add_row(name, f"{1000 * cost.seconds:.0f}", f"{cost.ratio:.2f}×")
    return grid


def _need_extras() -> None:
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {' and '.join(missing)}. Install with:\n"
            "python -m pip install 'fastproj-torch[demo]'"
        )
