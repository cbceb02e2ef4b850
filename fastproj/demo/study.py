"""A study: many runs in worker processes, each kept as soon as it is finished, and the table over them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastproj.demo.gradients import gradient_markdown
from fastproj.demo.methods import Method, parse_method
from fastproj.demo.tables import Table, tabulate, to_markdown
from fastproj.demo.training import RunResult, TrainingConfig, run, run_key
from fastproj.files import write_atomically

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEFAULT_METHODS = (
    "erm",
    "edge:alpha=1",
    "edge:alpha=2",
    "edge:alpha=8",
    "edge:alpha=2,q=0.3",
    "tensor:alpha=2",
    "lagged:alpha=2",
    "released",
    "subtract",
    "naive",
)


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    name: str
    method: Method
    seed: int
    config: TrainingConfig
    cache: Path | None = None

    def path(self, output: Path) -> Path:
        """Where its result is kept: a name that changes with anything that decides the result."""
        label = "".join(c if c.isalnum() or c in ".=-" else "_" for c in self.name)
        return (
            output / "runs" / f"{label}-seed{self.seed}-{run_key(self.method, self.seed, self.config)}.json"
        )


Runner = Callable[[Job], RunResult]


def perform(job: Job) -> RunResult:
    """Make one run."""
    return run(job.name, job.method, job.seed, job.config, job.cache)


def run_study(
    output: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
    workers: int = 1,
    *,
    config: TrainingConfig | None = None,
    cache: Path | None = None,
    on_finished: Callable[[RunResult, int, int], None] | None = None,
    runner: Runner = perform,
) -> list[RunResult]:
    """Make every (method, seed) run that ``output`` does not hold yet; write the table and return all runs.

    Each finished run is written at once, and whole or not at all, to ``output/runs``. A second call with the
    same arguments makes only what is missing, so an interruption costs the runs in flight and no other.
    ``output/table.md``, ``output/table.json`` and ``output/gradients.md`` cover the runs asked for.

    Args:
        output: folder of the study.
        methods: as ``parse_method`` reads them, for example ``"edge:alpha=2,q=0.5"``.
        seeds: every method is run under each; seed by seed, so that an unfinished study is balanced.
        steps: of a run; None keeps the configuration's.
        workers: processes, one thread each; 1 works in this process with the threads it has.
        config: everything else that decides a run.
        cache: folder of the downloaded texts.
        on_finished: called with each fresh result, how many are finished and how many there are.
        runner: makes one run.

    Raises:
        ValueError: no method, no seed, fewer than one worker, or a method that ``parse_method`` refuses.
    """
    if not methods or not seeds or workers < 1:
        raise ValueError(
            "study: expected at least one method, one seed and one worker, "
            f"got {len(methods)}, {len(seeds)} and {workers}"
        )
    config = config or TrainingConfig()
    config = config if steps is None else replace(config, steps=steps)
    parsed = {name: parse_method(name) for name in methods}
    jobs = [Job(name, method, seed, config, cache) for seed in seeds for name, method in parsed.items()]
    pending = [job for job in jobs if not job.path(output).is_file()]
    finished = len(jobs) - len(pending)
    for job, result in _results(pending, workers, runner):
        write_atomically(job.path(output), result.to_json())
        finished += 1
        if on_finished is not None:
            on_finished(result, finished, len(jobs))
    # The name is how this study calls the run; the file may have been made under another name.
    results = [
        replace(RunResult.from_json(job.path(output).read_text(encoding="utf-8")), method=job.name)
        for job in jobs
    ]
    write_table(output, tabulate(results))
    write_atomically(output / "gradients.md", gradient_markdown(results))
    return results


def write_table(output: Path, table: Table) -> None:
    """Write ``table.md`` and ``table.json``."""
    write_atomically(output / "table.md", to_markdown(table))
    write_atomically(output / "table.json", json.dumps(table, indent=2))


def _results(jobs: Sequence[Job], workers: int, runner: Runner) -> Iterator[tuple[Job, RunResult]]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, runner(job)
        return
    # Spawned interpreters read these before they load torch; one thread each, so that workers do not fight.
    for variable in THREAD_VARIABLES:
        os.environ[variable] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(runner, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2,3,4",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by spaces, such as 'erm edge:alpha=2,q=0.5'.")
    ] = " ".join(DEFAULT_METHODS),
    steps: Annotated[int | None, typer.Option(help="Training steps of a run.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Folder of the downloaded texts.")] = None,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
) -> None:
    """Run a study, or finish one, and print its table."""

    def tell(result: RunResult, finished: int, total: int) -> None:
        test = result.test
        typer.echo(
            f"{finished}/{total} {result.method} seed {result.seed}: overall {test.overall:.3f}, "
            f"worst group {test.worst:.3f}, {result.seconds:.0f} s"
        )

    results = run_study(
        out,
        methods.split(),
        [int(seed) for seed in seeds.split(",")],
        steps,
        workers,
        config=TrainingConfig(device=device),
        cache=cache,
        on_finished=tell,
    )
    typer.echo(to_markdown(tabulate(results)))


if __name__ == "__main__":
    typer.run(main)
