"""The study's tables, as Markdown, with intervals over draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastproj.bias_diff.study.evidence import SKETCHES
from fastproj.bias_diff.study.runs import EPOCHS, SCORED_EPOCHS, SELECTED
from fastproj.bias_diff.study.settings import BIASED, FACTUAL, HELD_OUT, PAIRS, PROBES, SETTINGS
from fastproj.demo.tables import mean_interval

Record = dict[str, Any]
COMPARED = (
    "influence, Adam",
    "influence, plain gradient",
    *(f"sketched, k = {k}" for k in SKETCHES),
    "similarity",
    "loss",
    "length",
    "random",
)
NOTE = (
    "Brackets are 95 % bootstrap intervals over draws; with few draws such intervals are too narrow. A draw "
    "has its own sentences, probe, order of training and initial adapter."
)


def summary(ranked: Sequence[Record], debiased: Sequence[Record]) -> str:
    """The report: who finds the biased samples, what changes that, and what becomes of the model."""
    lines = [
        "# BIAS DIFF on real data",
        "",
        "SmolLM2-135M-Instruct, LoRA of rank 16 on queries and values, AdamW at 5e-4 on "
        f"{BIASED} biased and {FACTUAL} factual sentences (BOLD's Wikipedia). *Matched*: biased sentences "
        f"and {PROBES} probes are CrowS-Pairs stereotypes that do not overlap. *Shifted*: biased sentences "
        "are RedditBias comments "
        "that annotators call biased. Made by `python -m fastproj.bias_diff.study.command`.",
        "",
    ]
    for setting in SETTINGS:
        own = [record for record in ranked if record["setting"] == setting]
        if not own:
            continue
        first, *_ = (str(epoch) for epoch in SCORED_EPOCHS)
        lines += [f"## {setting.capitalize()}: finding the biased samples ({len(own)} draws)", ""]
        lines += _ranking_table(own, first, COMPARED)
        lines += ["", "Coverage and precision at every fraction, influence with Adam's update:", ""]
        lines += _curve_table(own, first, "influence, Adam")
        lines += ["", "### What moves it", ""]
        others = [name for name in own[0]["epochs"][first] if name not in COMPARED]
        lines += _ranking_table(own, first, ("influence, Adam", *others))
        for epoch in SCORED_EPOCHS[1:]:
            lines += ["", f"### After {epoch} epochs of warm-up instead of {first}", ""]
            lines += _ranking_table(own, str(epoch), ("influence, Adam", "influence, plain gradient", "loss"))
        lines += [""]
    for setting in SETTINGS:
        own = [record for record in debiased if record["setting"] == setting]
        if own:
            lines += [f"## {setting.capitalize()}: the model afterwards ({len(own)} draws)", ""]
            lines += [*_model_table(own), ""]
    return "\n".join([*lines, NOTE, ""])


def _ranking_table(records: Sequence[Record], epoch: str, names: Iterable[str]) -> list[str]:
    fractions = records[0]["fractions"]
    at = min(range(len(fractions)), key=lambda j: abs(fractions[j] - SELECTED))
    lines = [
        f"| ranked by | AUC | coverage at {SELECTED:.0%} | precision at {SELECTED:.0%} |",
        "|---|---|---|---|",
    ]
    for name in names:
        found = [record["epochs"][epoch][name] for record in records]
        cells = [
            _cell([own["auc"] for own in found], 3),
            _cell([100 * own["coverage"][at] for own in found], 1),
            _cell([100 * own["precision"][at] for own in found], 1),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _curve_table(records: Sequence[Record], epoch: str, name: str) -> list[str]:
    fractions = records[0]["fractions"]
    lines = ["| selected | coverage | precision |", "|---|---|---|"]
    for at, fraction in enumerate(fractions):
        found = [record["epochs"][epoch][name] for record in records]
        coverage = _cell([100 * own["coverage"][at] for own in found], 1)
        precision = _cell([100 * own["precision"][at] for own in found], 1)
        lines.append(f"| {fraction:.0%} | {coverage} | {precision} |")
    return lines


def _model_table(records: Sequence[Record]) -> list[str]:
    lines = [
        f"| model ({EPOCHS} epochs; {SELECTED:.0%} selected after the first) "
        f"| CrowS-Pairs score ({PAIRS} pairs; 50 is even) | perplexity ({HELD_OUT} factual sentences) |",
        "|---|---|---|",
    ]
    for name in records[0]["models"]:
        found = [record["models"][name] for record in records]
        score = _cell([own["crows_pairs"] for own in found], 1)
        lines.append(f"| {name} | {score} | {_cell([own['perplexity'] for own in found], 2)} |")
    return lines


def _cell(values: Sequence[float], digits: int) -> str:
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) < 2:
        return mean
    low, high = mean_interval(values)
    return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"
