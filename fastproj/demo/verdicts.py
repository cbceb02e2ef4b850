"""What a demo's numbers say, in sentences, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastproj.demo.figures import smooth
from fastproj.demo.methods import describe
from fastproj.demo.tables import Table
from fastproj.demo.training import RunResult
from fastproj.paired import Timing


def verdicts(results: Sequence[RunResult], table: Table, costs: Mapping[str, Timing]) -> list[str]:
    """Plain sentences: worst group and overall against the baseline, what one may conclude, cosine, cost."""
    sentences = [_comparison(row) for row in table["rows"] if row["method"] != table["baseline"]]
    if len({result.seed for result in results}) == 1:
        sentences.append(
            "One run proves nothing: another seed often moves the worst group by more than the choice of "
            "method does. Compare over seeds with: fastproj demo --seeds 5"
        )
    first = min(result.seed for result in results)
    sentences += [text for result in results if result.seed == first for text in _gradients(result)]
    others = [f"{name} {cost.ratio:.2f} times" for name, cost in list(costs.items())[1:]]
    if others:
        sentences.append(f"A step costs, against plain fine-tuning: {', '.join(others)}.")
    return sentences


def _comparison(row: Mapping[str, Any]) -> str:
    worst, overall = row["test"]["worst"], row["test"]["overall"]
    name = describe(row["method"])
    if worst["difference"] is None:
        return f"{name}: worst group {100 * worst['mean']:.1f} %; no plain run to compare with."
    points = 100 * worst["difference"]
    outcome = "the same as" if abs(points) < 0.05 else "better than" if points > 0 else "worse than"
    text = (
        f"{name} did {outcome} plain fine-tuning in its worst group: {100 * worst['mean']:.1f} %, "
        f"{points:+.1f} points; "
        f"overall {100 * overall['mean']:.1f} %, {100 * overall['difference']:+.1f} points."
    )
    interval = worst["difference_interval"]
    if interval is None:
        return text
    settled = interval[0] > 0 or interval[1] < 0
    return (
        f"{text} Over {worst['pairs']} seeds the worst-group difference lies between "
        f"{100 * interval[0]:+.1f} and {100 * interval[1]:+.1f} points (95 % bootstrap), which "
        f"{'excludes' if settled else 'includes'} zero; it was better on {worst['wins']} of them."
    )


def _gradients(result: RunResult) -> list[str]:
    cosine = [value for value in result.trace["cosine"] if value is not None]
    share = [value for value in result.trace["bias_share"] if value is not None]
    if not cosine or not share:
        return []
    smoothed, shares = smooth(cosine), smooth(share)
    return [
        f"Under {describe(result.method)} the cosine between the plain and the amplified gradient went from "
        f"{smoothed[0]:.2f} to {smoothed[-1]:.2f} (least {min(smoothed):.2f}, smoothed), and the bias share "
        f"from {shares[0]:.2f} to {shares[-1]:.2f}."
    ]
