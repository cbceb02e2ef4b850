"""The roofline plot of a chip (Williams et al. 2009) as inline SVG, with the operators on the workloads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastproj.bench.audit.audit import TrafficRow
from fastproj.bench.traffic.chips import TERA, Chip
from fastproj.svg import INK, SERIES, inline_svg, style_axis

ROOFS = {"bf16": "bf16 matrix", "fp32": "fp32 vector"}  # what activations and gradient sets are computed in
MARKERS = ("o", "s", "^", "D", "v", "p")
SMALLEST, LARGER = 5.0, 3.5  # marker of the first workload, and by how much each next one is larger; points
SIZE = (7.2, 5.2)  # of the figure, in inches
AREA = (0.085, 0.25, 0.9, 0.74)  # left, bottom, width and height of the axes in the figure
FONT = 8.5
LINE = 1.35 * FONT  # from one label to the next, in points
CLEAR = 0.75 * FONT  # from the middle of a label to a roof, in points
NEAR = 1.08  # intensities within this factor share a label


@dataclass(frozen=True)
class Point:
    """Where operators on workloads stand: ``intensity`` in FLOP/byte, ``tera`` the attainable TFLOP/s."""

    intensity: float
    tera: float
    text: str


def intensity(row: TrafficRow) -> float:
    """Arithmetic intensity: FLOPs over memory traffic, in FLOP/byte."""
    return row.flops / row.memory_bytes


def attainable(row: TrafficRow) -> float:
    """FLOP/s that the chip's roof lets through at this intensity: FLOPs over the floor."""
    return row.flops / (row.floor_microseconds * 1e-6)


def short_names(workloads: Sequence[str]) -> dict[str, str]:
    """The model of each workload, or its whole name where two share a model."""
    shortened = {name: name.partition(",")[0] for name in workloads}
    return shortened if len(set(shortened.values())) == len(shortened) else {name: name for name in workloads}


def labelled_points(rows: Sequence[TrafficRow]) -> list[Point]:
    """One point for all rows that stand in the same place, from the highest down.

    Its text says which operators and workloads they are.
    """
    names = short_names(list(dict.fromkeys(row.workload for row in rows)))
    clusters: list[list[TrafficRow]] = []
    for row in sorted(rows, key=intensity):
        first = clusters[-1][0] if clusters else None
        near = first and max(intensity(row) / intensity(first), attainable(row) / attainable(first)) < NEAR
        if near:
            clusters[-1].append(row)
        else:
            clusters.append([row])
    points = [
        Point(
            max(intensity(row) for row in members),
            max(attainable(row) for row in members) / TERA,
            _text(members, names),
        )
        for members in clusters
    ]
    return sorted(points, key=lambda point: (-point.tera, -point.intensity))


def _text(rows: Sequence[TrafficRow], names: Mapping[str, str]) -> str:
    """``operator, operator: workload, workload``; operators with the same workloads together."""
    by_operator: dict[str, list[str]] = {}
    for row in rows:
        by_operator.setdefault(row.operator, []).append(row.workload)
    groups: dict[str, list[str]] = {}
    for operator, workloads in by_operator.items():
        where = ", ".join(name for workload, name in names.items() if workload in workloads)
        everywhere = len(workloads) == len(names) > 1
        groups.setdefault("all workloads" if everywhere else where, []).append(operator)
    return "; ".join(f"{', '.join(operators)}: {where}" for where, operators in groups.items())


def label_heights(points: Sequence[float], roofs: Sequence[float]) -> list[float]:
    """Heights of labels, in points of print, for points given from the highest down.

    Each label is at its point or below it, a line under the label before, and clear of every roof. Below
    is where there is room: the labels stand right of their points, and nothing is drawn under a roof.
    """
    heights: list[float] = []
    for point in points:
        height = min([point, *(previous - LINE for previous in heights[-1:])])
        for roof in sorted(roofs, reverse=True):
            if abs(height - roof) < CLEAR:
                height = roof - CLEAR
        heights.append(height)
    return heights


def roofline_figure(rows: Sequence[TrafficRow], chip: Chip) -> str:
    """The plot of one chip: x in FLOP/byte of memory traffic, y in attainable TFLOP/s, both logarithmic.

    Every row stands on the roof that bounds it. Raises ValueError without rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError(f"expected rows of traffic on {chip.name} to draw, got none")
    figure = Figure(figsize=SIZE)
    axis = figure.add_axes(AREA)
    style_axis(axis)
    points = labelled_points(rows)
    roofs = {name: chip.matrix_flops[rate] / TERA for rate, name in ROOFS.items()}
    _frame(axis, points, list(roofs.values()), chip)
    _roofs(axis, roofs, chip)
    _markers(axis, rows)
    _labels(axis, points, list(roofs.values()))
    _legend(figure, rows)
    return inline_svg(figure)


def _frame(axis: Any, points: Sequence[Point], roofs: Sequence[float], chip: Chip) -> None:
    """Logarithmic scales with room for the labels at the right and for the names of the roofs on top."""
    intensities = [point.intensity for point in points]
    left = min(1.0, *intensities) / 3  # the name of the memory's roof stands right of 1
    right = max(*(60 * intensity for intensity in intensities), 10 * max(roofs) / _bandwidth(chip))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(left * _bandwidth(chip) / 2, max(roofs) * 2)
    axis.minorticks_off()
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("arithmetic intensity, FLOP per byte of memory traffic", color=INK, fontsize=9)
    axis.set_ylabel("attainable TFLOP/s", color=INK, fontsize=9)


def _bandwidth(chip: Chip) -> float:
    """TFLOP/s that one FLOP/byte allows."""
    return chip.memory_bytes_per_second / TERA


def _roofs(axis: Any, roofs: Mapping[str, float], chip: Chip) -> None:
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    slope, highest = _bandwidth(chip), max(roofs.values())
    axis.plot([left, highest / slope], [left * slope, highest], color=INK, linewidth=1.2)
    # The memory's name runs along its roof, between the gradient sets' points and the contractions'.
    width, height = _print_size(axis)
    decades = math.log10(right / left), math.log10(top / bottom)
    angle = math.degrees(math.atan2(height / decades[1], width / decades[0]))
    axis.annotate(
        f"memory, {slope:.2f} TB/s",
        (1.3, 1.3 * slope),
        (-6, 6),
        textcoords="offset points",
        rotation=angle,
        rotation_mode="anchor",
        color=INK,
        fontsize=FONT,
    )
    for name, rate in roofs.items():
        ridge = rate / slope
        axis.plot([ridge, right], [rate, rate], color=INK, linewidth=1.2)
        axis.plot([left, ridge], [rate, rate], color=INK, linewidth=0.7, linestyle=(0, (1, 3)))
        axis.annotate(
            f"{name}, {rate:g} TFLOP/s",
            (left, rate),
            (3, 3),
            textcoords="offset points",
            color=INK,
            fontsize=FONT,
        )


def _markers(axis: Any, rows: Sequence[TrafficRow]) -> None:
    """Hollow, so that those of several workloads in one place are seen one around the other."""
    operators, workloads = _keys(rows)
    for row in rows:
        number = operators.index(row.operator)
        axis.plot(
            [intensity(row)],
            [attainable(row) / TERA],
            color=SERIES[number % len(SERIES)],
            **_marker(number, workloads.index(row.workload)),
        )


def _keys(rows: Sequence[TrafficRow]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(row.operator for row in rows)), list(
        dict.fromkeys(row.workload for row in rows)
    )


def _marker(operator: int, workload: int) -> dict[str, Any]:
    return {
        "marker": MARKERS[operator % len(MARKERS)],
        "markersize": SMALLEST + LARGER * workload,
        "fillstyle": "none",
        "markeredgewidth": 1.5,
        "linestyle": "none",
    }


def _print_size(axis: Any) -> tuple[float, float]:
    """Width and height of the axes in points of print."""
    return 72 * SIZE[0] * AREA[2], 72 * SIZE[1] * AREA[3]


def _labels(axis: Any, points: Sequence[Point], roofs: Sequence[float]) -> None:
    bottom, top = axis.get_ylim()
    a_decade = _print_size(axis)[1] / math.log10(top / bottom)

    def printed(tera: float) -> float:
        return a_decade * math.log10(tera / bottom)

    heights = label_heights([printed(p.tera) for p in points], [printed(roof) for roof in roofs])
    leader = {
        "arrowstyle": "-",
        "color": INK,
        "linewidth": 0.5,
        "shrinkA": 1,
        "shrinkB": 7,
        "relpos": (0, 0.5),
    }
    for point, height in zip(points, heights, strict=True):
        axis.annotate(
            point.text,
            (point.intensity, point.tera),
            (20, height - printed(point.tera)),
            textcoords="offset points",
            verticalalignment="center",
            color=INK,
            fontsize=FONT,
            arrowprops=leader,
        )


def _legend(figure: Any, rows: Sequence[TrafficRow]) -> None:
    """Under the axes, where it covers nothing: operators by shape and colour, workloads by size."""
    from matplotlib.lines import Line2D

    operators, workloads = _keys(rows)
    shapes = [
        Line2D([], [], color=SERIES[number % len(SERIES)], label=operator, **_marker(number, 1))
        for number, operator in enumerate(operators)
    ]
    sizes = [
        Line2D([], [], color=INK, label=workload, **_marker(0, number))
        for number, workload in enumerate(workloads)
    ]
    style = {"frameon": False, "labelcolor": INK, "fontsize": FONT, "borderaxespad": 0, "handletextpad": 0.4}
    figure.legend(handles=shapes, loc="lower left", bbox_to_anchor=(AREA[0], 0.01), ncols=2, **style)
    figure.legend(handles=sizes, loc="lower right", bbox_to_anchor=(AREA[0] + AREA[2], 0.01), **style)
