"""Accuracies with bootstrap intervals: of one run over its test samples, of a study over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.demo.training import GroupCounts, RunResult

Table = dict[str, Any]
Interval = tuple[float, float]
METRICS = ("overall", "worst")
DRAWS = 10_000
LEVEL = 0.95


def run_intervals(counts: GroupCounts, draws: int = DRAWS, level: float = LEVEL) -> dict[str, Interval]:
    """Percentile bootstrap intervals of overall and worst-group accuracy over one run's test samples.

    Samples are drawn again with replacement within each group, so the number of right ones in a group of n
    with accuracy a is Binomial(n, a). The minimum over groups is taken in each draw. It tells how well this
    one model is measured, not how another seed would have come out.
    """
    filled = [(n, c) for n, c in zip(counts.count, counts.correct, strict=True) if n]
    sizes = torch.tensor([n for n, _ in filled], dtype=torch.float64)
    right = torch.tensor([c for _, c in filled], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = torch.binomial(sizes.expand(draws, -1), (right / sizes).expand(draws, -1))
    return {
        "overall": _percentiles(drawn.sum(dim=1) / sizes.sum(), level),
        "worst": _percentiles((drawn / sizes).min(dim=1).values, level),
    }


def mean_interval(values: Sequence[float], draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of the mean of ``values``, resampled with replacement."""
    tensor = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(tensor), (draws, len(tensor)), generator=generator)
    return _percentiles(tensor[index].mean(dim=1), level)


def tabulate(results: Sequence[RunResult], baseline: str = "erm") -> Table:
    """One row per method: means over seeds on test and validation, and differences from ``baseline``.

    Differences are taken seed by seed, over the seeds that both methods have; an interval is a bootstrap over
    those seeds, None where there are fewer than two. ``wins`` counts seeds on which the method did better.

    Returns:
        ``{"baseline", "level", "rows": [{"method", "seeds", "test": {metric: {"mean", "interval",
        "difference", "difference_interval", "wins", "pairs"}}, "validation": ...}]}`` for the metrics
        ``overall`` and ``worst``.
    """
    by_method: dict[str, dict[int, RunResult]] = {}
    for result in results:
        by_method.setdefault(result.method, {})[result.seed] = result
    reference = by_method.get(baseline, {})
    rows = []
    for method, runs in by_method.items():
        row: dict[str, Any] = {"method": method, "seeds": sorted(runs)}
        for split in ("test", "validation"):
            row[split] = {
                metric: _cell(
                    _values(runs, split, metric),
                    {} if method == baseline else _values(reference, split, metric),
                )
                for metric in METRICS
            }
        rows.append(row)
    return {"baseline": baseline, "level": LEVEL, "rows": rows}


def to_markdown(table: Table, split: str = "test") -> str:
    """The table of one split, in per cent, as Markdown."""
    baseline = table["baseline"]
    lines = [
        f"| method | seeds | overall | worst group | worst group − {baseline} | better on "
        f"| overall − {baseline} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        overall, worst = row[split]["overall"], row[split]["worst"]
        lines.append(
            f"| {row['method']} | {len(row['seeds'])} | {_mean(overall)} | {_mean(worst)} "
            f"| {_difference(worst)} | {_wins(worst)} | {_difference(overall)} |"
        )
    note = (
        f"Accuracy in per cent on the {split} split; brackets are {table['level']:.0%} bootstrap intervals "
        "over seeds. With few seeds such intervals are too narrow."
    )
    return "\n".join([*lines, "", note, ""])


def _values(runs: dict[int, RunResult], split: str, metric: str) -> dict[int, float]:
    return {seed: getattr(getattr(result, split), metric) for seed, result in runs.items()}


def _cell(values: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    numbers = list(values.values())
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    return {
        "mean": sum(numbers) / len(numbers),
        "interval": mean_interval(numbers) if len(numbers) > 1 else None,
        "difference": sum(differences) / len(differences) if differences else None,
        "difference_interval": mean_interval(differences) if len(differences) > 1 else None,
        "wins": sum(difference > 0 for difference in differences),
        "pairs": len(differences),
    }


def _percentiles(draws: Tensor, level: float) -> Interval:
    tail = (1 - level) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _mean(cell: dict[str, Any]) -> str:
    return f"{100 * cell['mean']:.1f}{_bracket(cell['interval'])}"


def _difference(cell: dict[str, Any]) -> str:
    if cell["difference"] is None:
        return "–"
    return f"{100 * cell['difference']:+.1f}{_bracket(cell['difference_interval'], signed=True)}"


def _wins(cell: dict[str, Any]) -> str:
    return f"{cell['wins']} of {cell['pairs']}" if cell["pairs"] else "–"


def _bracket(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (f"{100 * end:{'+' if signed else ''}.1f}" for end in interval)
    return f" [{low}, {high}]"
