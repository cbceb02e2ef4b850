"""What a study says of its gradients, on numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastproj.demo.gradients import gradient_markdown, lag
from fastproj.demo.training import GroupCounts, RunResult

COUNTS = GroupCounts((1, 1, 1, 1), (1, 1, 1, 1))
SETTINGS = {
    "kind": "edge",
    "alpha": 2.0,
    "q": 0.7,
    "segments": "global",
    "variant": "paper",
    "ratio": "exact",
}


def run(ratios: list[float], **settings: Any) -> RunResult:
    """A run with these |g|/|e| at a cosine of 0.5, where |bias|/|e| is half of them."""
    steps = len(ratios)
    trace: dict[str, list[float | None]] = {
        "loss": [0.5] * steps,
        "cosine": [0.5] * steps,
        "bias_share": [ratio / 2 for ratio in ratios],
        "weight_aligned": [0.9] * steps,
        "weight_conflicting": [None, *[0.4] * (steps - 1)],
        "weight_plain": [0.7] * steps,
    }
    method = settings.pop("method", "edge:alpha=2")
    return RunResult(method, {**SETTINGS, **settings}, 0, {}, trace, (), COUNTS, COUNTS, 1.0)


def test_emphasis_is_the_ratio_of_the_two_weights_in_the_step() -> None:
    # c = 1 + 0.8, so a conflicting sample weighs 1.8 − 0.4 and an aligned one 1.8 − 0.9.
    row = gradient_markdown([run([0.8, 0.8, 0.8, 0.8])]).splitlines()[2]
    assert row == "| edge:alpha=2 | 0.90 | 0.40 | 0.70 | 0.50 | 0.40 | 1.56 |"
    subtracted = gradient_markdown([run([0.8] * 4, method="subtract", variant="subtract", alpha=0.8)])
    assert f"{(1 - 0.8 * 0.4) / (1 - 0.8 * 0.9):.2f}" in subtracted.splitlines()[2]


def test_methods_without_the_closed_form_have_no_emphasis() -> None:
    assert gradient_markdown([run([0.8] * 4, variant="released")]).splitlines()[2].endswith("| – |")


def test_lag_is_the_relative_change_from_step_to_step() -> None:
    strayed = lag([run([0.5, 1.0, 0.5, 1.0, 0.5])])
    assert strayed is not None
    assert strayed[0] == pytest.approx(0.75)  # half of the changes are 1/2, half are 1
    assert lag([run([0.5] * 5, ratio="lagged")]) is None
    assert math.isclose(lag([run([0.7] * 9)])[0], 0.0, abs_tol=1e-12)
