"""Rows and cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from fastproj.demo.tables import mean_interval


def header(names: Sequence[str]) -> list[str]:
    """A table's first two lines."""
    return [row(names), "|" + "---|" * len(names)]


def row(cells: Sequence[str]) -> str:
    """A table's line."""
    return f"| {' | '.join(cells)} |"


def cell(values: Sequence[float], digits: int, signed: bool = False) -> str:
    """Mean and bootstrap interval; – for no values, the mean alone of one."""
    if not values:
        return "–"
    form = f"{'+' if signed else ''}.{digits}f"
    mean = format(sum(values) / len(values), form)
    if len(values) < 2:
        return mean
    low, high = mean_interval(values)
    return f"{mean} [{format(low, form)}, {format(high, form)}]"


def percent(values: Sequence[float]) -> str:
    """:func:`cell` in per cent."""
    return cell([100 * value for value in values], 1)
