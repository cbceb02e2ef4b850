"""What the gradients of a study did: when a projection can help, read off its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import TypeVar

from fastproj.demo.training import RunResult

Column = list[float | None]
Item = TypeVar("Item")


def gradient_markdown(results: Sequence[RunResult]) -> str:
    """One row per method, means over the last half of training and over seeds, as Markdown.

    The emphasis is how much a token-conflicting sample counts for each token-aligned one in the step that
    was taken: for the paper's form, ``(c − (α/2) w_conflicting) / (c − (α/2) w_aligned)`` with
    ``c = 1 + αρ/2``, w = p_y^q and ρ = |g|/|e|; for plain subtraction, ``(1 − α w_conflicting) /
    (1 − α w_aligned)``. At 1 the method is plain fine-tuning.
    """
    lines = [
        "| method | p_y^q aligned | conflicting | no token | cosine | bias share | emphasis |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == method]
        names = ("weight_aligned", "weight_conflicting", "weight_plain", "cosine", "bias_share")
        cells = [_format(_late_mean(runs, name)) for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} | {_format(_emphasis(runs))} |")
    note = (
        "Means over the last half of training and over seeds; the emphasis is the median over steps of how "
        "much a token-conflicting sample counts for each token-aligned one."
    )
    return "\n".join([*lines, "", note, ""])


def lag(results: Sequence[RunResult]) -> tuple[float, float] | None:
    """Median and 95th percentile of ``|ρ_{t-1} / ρ_t − 1|`` over steps: how far a lagged ratio strays.

    Read off runs whose ratio was exact and global; None where there is none.
    """
    changes = []
    for result in results:
        if result.settings.get("ratio") == "exact" and result.settings.get("segments") == "global":
            ratios = [_ratio(c, s) for c, s in zip(*_columns(result, "cosine", "bias_share"), strict=True)]
            changes += [abs(before / now - 1) for before, now in pairwise(ratios) if before and now]
    return (median(changes), quantiles(changes, n=20)[-1]) if len(changes) > 1 else None


def _columns(result: RunResult, *names: str) -> list[Column]:
    return [result.trace[name] for name in names]


def _ratio(cosine: float | None, share: float | None) -> float | None:
    """``ρ = |g|/|e|`` from ``|bias|/|e| = ½ρ√(2 − 2cos)``; None where the gradients are too close to tell."""
    if cosine is None or share is None or cosine > 1 - 1e-6:
        return None
    return 2 * share / math.sqrt(2 - 2 * cosine)


def _emphasis(runs: Sequence[RunResult]) -> float | None:
    values = []
    for run in runs:
        if run.settings.get("kind") != "edge" or run.settings.get("segments") != "global":
            continue
        alpha, variant = run.settings["alpha"], run.settings["variant"]
        names = ("cosine", "bias_share", "weight_aligned", "weight_conflicting")
        for cosine, share, aligned, conflicting in _late(zip(*_columns(run, *names), strict=True)):
            ratio = _ratio(cosine, share)
            if (
                ratio is None
                or aligned is None
                or conflicting is None
                or variant not in ("paper", "subtract")
            ):
                continue
            c, slope = (1 + alpha * ratio / 2, alpha / 2) if variant == "paper" else (1.0, alpha)
            values.append((c - slope * conflicting) / (c - slope * aligned))
    return median(values) if values else None


def _late_mean(runs: Sequence[RunResult], name: str) -> float | None:
    values = [value for run in runs for value in _late(run.trace[name]) if value is not None]
    return mean(values) if values else None


def _late(column: Iterable[Item]) -> list[Item]:
    rows = list(column)
    return rows[len(rows) // 2 :]


def _format(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
