"""The demo's page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastproj.demo import figures
from fastproj.demo.injection import GROUPS
from fastproj.demo.methods import describe
from fastproj.demo.tables import Table, run_intervals
from fastproj.demo.training import RunResult, TrainingConfig
from fastproj.paired import Timing

TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True)
class Figure:
    """A drawing and what to read from it."""

    title: str
    text: str
    svg: str


def render_report(
    results: Sequence[RunResult],
    table: Table,
    costs: Mapping[str, Timing],
    verdicts: Sequence[str],
    config: TrainingConfig,
) -> str:
    """The page as HTML. Curves and group accuracies are those of the first seed; the table covers all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["describe"] = describe
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}"
    first = min(result.seed for result in results)
    shown = [result for result in results if result.seed == first]
    return environment.get_template("report.html").render(
        runs=[_run_row(result) for result in shown],
        groups=GROUPS,
        table=table,
        seeds=sorted({result.seed for result in results}),
        first_seed=first,
        costs=costs,
        verdicts=verdicts,
        config=config,
        figures=_figures(shown),
    )


def _run_row(result: RunResult) -> dict[str, Any]:
    return {
        "method": describe(result.method),
        "overall": result.test.overall,
        "worst": result.test.worst,
        "accuracies": result.test.accuracies,
        "intervals": run_intervals(result.test),
    }


def _figures(shown: Sequence[RunResult]) -> list[Figure]:
    drawn = [
        Figure("Training loss", "Cross entropy of the training batches.", figures.loss_figure(shown)),
        Figure(
            "Accuracy of each group",
            "On a validation subset. A model that leans on the token loses the group that the token "
            "contradicts (token, negative) and the positive texts without it.",
            figures.groups_figure(shown) or "",
        ),
        Figure(
            "Cosine between the two gradients",
            "Between the gradients of cross entropy and of its generalised form. The nearer to 1, the less "
            "there is to remove.",
            figures.trace_figure(shown, "cosine", "cos(e, g) (smoothed)") or "",
        ),
        Figure(
            "Bias share",
            "Length of what EDGE calls bias against the length of the plain gradient.",
            figures.trace_figure(shown, "bias_share", "|bias| / |e| (smoothed)") or "",
        ),
    ]
    drawn += [
        Figure(
            f"Sample weights under {describe(result.method)}",
            "Where samples that the token contradicts weigh less than the rest, the amplified gradient is "
            "mostly that of samples the token agrees with, which is what EDGE counts on.",
            figures.weights_figure(result),
        )
        for result in shown
        if any(value is not None for value in result.trace["weight_aligned"])
    ]
    return [figure for figure in drawn if figure.svg]
