"""Curves of a demo as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastproj.demo.injection import GROUPS
from fastproj.demo.methods import describe
from fastproj.demo.training import RunResult
from fastproj.svg import INK, SERIES, inline_svg, style_axis

SMOOTHING = 0.9

Curve = tuple[str, Sequence[float], Sequence[float]]


def loss_figure(results: Sequence[RunResult]) -> str:
    """Training loss over steps, smoothed."""
    return _lines([_trace_curve(result, "loss") for result in results], "training loss (smoothed)")


def trace_figure(results: Sequence[RunResult], name: str, label: str) -> str | None:
    """One quantity of the trace over steps, smoothed; None where no run knows it."""
    curves = [_trace_curve(result, name) for result in results]
    return _lines(curves, label) if any(steps for _, steps, _ in curves) else None


def weights_figure(result: RunResult) -> str:
    """Mean p_y^q of samples that the token agrees with, contradicts, or is absent from."""
    names = {
        "weight_aligned": "token agrees with the label",
        "weight_plain": "no token",
        "weight_conflicting": "token contradicts the label",
    }
    curves = [(text, *_trace_curve(result, name)[1:]) for name, text in names.items()]
    return _lines(curves, "mean p_y^q (smoothed)")


def groups_figure(results: Sequence[RunResult]) -> str | None:
    """Accuracy of each group on the validation subset, a panel per group; None without curve points."""
    results = [result for result in results if result.curve]
    if not results:
        return None
    figure, axes = _axes(len(GROUPS), columns=2)
    for group, axis in enumerate(axes):
        for number, result in enumerate(results):
            steps = [step for step, _ in result.curve]
            accuracies = [counts.accuracies[group] for _, counts in result.curve]
            axis.plot(steps, accuracies, color=SERIES[number % len(SERIES)], label=describe(result.method))
        axis.set_ylim(0, 1.02)
        axis.set_title(GROUPS[group], color=INK, fontsize=10)
        axis.set_xlabel("step", color=INK)
    _legend(axes[0])
    return inline_svg(figure)


def smooth(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential moving average with the start corrected: ``s_t = Σ keep^{t−i} v_i / Σ keep^{t−i}``."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def _trace_curve(result: RunResult, name: str) -> Curve:
    points = [(step, value) for step, value in enumerate(result.trace[name], start=1) if value is not None]
    return describe(result.method), [step for step, _ in points], smooth([value for _, value in points])


def _lines(curves: Sequence[Curve], label: str) -> str:
    figure, (axis,) = _axes(1, columns=1)
    # A run without the quantity keeps its colour unused, so that a method looks alike in every figure.
    for number, (name, steps, values) in enumerate(curves):
        if not steps:
            continue
        axis.plot(steps, values, color=SERIES[number % len(SERIES)], label=name)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(label, color=INK)
    _legend(axis)
    return inline_svg(figure)


def _axes(count: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(6.4, 3.2 if rows == 1 else 2.6 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axis in axes:
        style_axis(axis)
    return figure, axes


def _legend(axis: Any) -> None:
    axis.legend(frameon=False, labelcolor=INK, fontsize=9)
