"""Figures of where a bias begins, in the colours that :func:`fastproj.svg.inline_svg` gives a page's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastproj.balance.early_exit import EarlyExit
from fastproj.balance.interchange import LayerScores
from fastproj.svg import INK, SERIES, style_axis

CONTAIN, NOT_CONTAIN = SERIES[0], SERIES[1]
# More labels than this are drawn as their mean with the range between them.
MOST_PANELS = 8
_COLUMNS = 4


def layer_figure(scores: LayerScores) -> Any:
    """Mean KL of each block's exchange with its standard error, the largest marked, as a matplotlib figure.

    Raises ModuleNotFoundError, with what to install, where matplotlib is not there.
    """
    figure, (axis,) = _axes(1, columns=1)
    means, errors = scores.mean.tolist(), scores.standard_error.nan_to_num(0.0).tolist()
    numbers = list(range(len(means)))
    axis.vlines(numbers, 0, means, color=SERIES[0], linewidth=1.2)
    axis.errorbar(numbers, means, errors, color=SERIES[0], fmt="o", markersize=3.5, capsize=2, elinewidth=0.8)
    best = scores.best
    axis.plot([best], [means[best]], "D", color=SERIES[1], markersize=6, zorder=3)
    top = (best, means[best] + errors[best])
    axis.annotate(
        f"block {best}", top, (0, 6), textcoords="offset points", color=INK, fontsize=9, ha="center"
    )
    # Room for the name of the best; a model without any difference has an axis too.
    highest = max(mean + error for mean, error in zip(means, errors, strict=True))
    axis.set_ylim(min(0.0, *means), 1.15 * highest if highest > 0 else 1.0)
    axis.set_xlabel("block", color=INK)
    axis.set_ylabel("KL(gold ‖ patched), nats", color=INK)
    _whole_numbers(axis)
    return figure


def early_exit_figure(exit: EarlyExit, before: EarlyExit | None = None) -> Any:
    """Mean logits by layer over samples that have a label and that have not, as a matplotlib figure.

    A panel for each label that some sample has; of more than eight, the mean over labels with the range
    between them. ``before``, drawn dashed, is the same model's before a change.

    Raises ValueError where ``before`` has other labels or layers, or no sample has any label, and
    ModuleNotFoundError, with what to install, where matplotlib is not there.
    """
    if before is not None and (before.names, before.contain.shape) != (exit.names, exit.contain.shape):
        raise ValueError(
            f"before: expected labels and layers {exit.names}, {tuple(exit.contain.shape)}, got "
            f"{before.names}, {tuple(before.contain.shape)}"
        )
    present = [c for c in range(len(exit.names)) if not bool(exit.contain[0, c].isnan())]
    if not present:
        raise ValueError("expected samples with labels, no sample has any")
    drawn = [(exit, "-")] if before is None else [(exit, "-"), (before, "--")]
    if len(present) > MOST_PANELS:
        return _ranges(drawn, present)
    figure, axes = _axes(len(present), columns=min(_COLUMNS, len(present)))
    for axis, label in zip(axes, present, strict=True):
        for one, style in drawn:
            for means, colour, name in _both(one):
                axis.plot(means[:, label].tolist(), style, color=colour, label=_named(name, style))
        axis.set_title(exit.names[label], color=INK, fontsize=10)
    _finish(figure, axes)
    return figure


def _ranges(drawn: Sequence[tuple[EarlyExit, str]], present: Sequence[int]) -> Any:
    figure, axes = _axes(1, columns=1)
    for one, style in drawn:
        for means, colour, name in _both(one):
            known = means[:, present]
            known = known[:, ~known[0].isnan()]
            if not known.shape[1]:
                continue
            layers = list(range(len(known)))
            axes[0].plot(layers, known.mean(1).tolist(), style, color=colour, label=_named(name, style))
            if style == "-":
                low, high = known.amin(1).tolist(), known.amax(1).tolist()
                axes[0].fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    _finish(figure, axes)
    return figure


def _both(one: EarlyExit) -> list[tuple[Tensor, str, str]]:
    return [(one.contain, CONTAIN, "have the label"), (one.not_contain, NOT_CONTAIN, "have not")]


def _named(name: str, style: str) -> str:
    return name if style == "-" else f"{name}, before"


def _finish(figure: Any, axes: Sequence[Any]) -> None:
    for axis in axes:
        axis.set_xlabel("layer", color=INK)
        _whole_numbers(axis)
    axes[0].set_ylabel("mean logit", color=INK)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _axes(count: int, columns: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib. Install with:\npython -m pip install 'fastproj-torch[demo]'"
        ) from error
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.4, 2.4 * columns), 3.2 if rows == 1 else 2.4 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axis in axes:
        style_axis(axis)
    return figure, axes
