"""Figures of where a bias begins hold what they are given, and fit into a page."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")

from fastproj import EarlyExit, LayerScores
from fastproj.balance.figures import MOST_PANELS, early_exit_figure, layer_figure
from fastproj.svg import FAINT, INK, SERIES, inline_svg

SCORES = LayerScores(
    torch.tensor([[0.0, 0.2, 0.5, 0.1], [0.1, 0.3, 0.9, 0.0]], dtype=torch.float64), ("a", "b", "c", "d")
)


def drawn(labels: int, seed: int = 0) -> EarlyExit:
    """Five layers of labels, of which the last no sample has and the first all have."""
    generator = torch.Generator().manual_seed(seed)
    contain, not_contain = torch.randn(2, 5, labels, generator=generator, dtype=torch.float64)
    contain[:, -1] = math.nan
    not_contain[:, 0] = math.nan
    return EarlyExit(contain, not_contain, tuple(f"label {c}" for c in range(labels)))


def lines(axis: object) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines}  # type: ignore[attr-defined]


def check_inline(figure: object) -> str:
    svg = inline_svg(figure)
    assert svg.startswith("<svg")
    assert not any(ink in svg for ink in (INK, FAINT, *SERIES))
    assert "var(--series-1)" in svg
    assert "nan" not in svg.lower()
    return svg


def test_scores_with_errors_and_the_largest_marked() -> None:
    figure = layer_figure(SCORES)
    (axis,) = figure.axes
    points, _, (bars,) = axis.containers[0]
    assert list(points.get_ydata()) == pytest.approx([0.05, 0.25, 0.7, 0.05])
    heights = [(top[1] - bottom[1]) / 2 for bottom, top in bars.get_segments()]
    assert heights == pytest.approx(SCORES.standard_error.tolist())
    marked = next(line for line in axis.lines if line.get_marker() == "D")
    assert (list(marked.get_xdata()), list(marked.get_ydata())) == ([2], [pytest.approx(0.7)])
    assert ">block 2<" in check_inline(figure)


@pytest.mark.parametrize(
    "values", [[[0.1, 0.3]], [[0.0, 0.0], [0.0, 0.0]], [[-1e-17, 2e-17], [0.0, 0.0]], [[3.0]]]
)
def test_scores_of_one_sample_one_block_or_nothing(values: list[list[float]]) -> None:
    scores = LayerScores(torch.tensor(values, dtype=torch.float64), ("a", "b")[: len(values[0])])
    assert f">block {scores.best}<" in check_inline(layer_figure(scores))


def test_a_panel_for_each_label_that_some_sample_has() -> None:
    exit, before = drawn(5), drawn(5, seed=1)
    figure = early_exit_figure(exit, before)
    assert [axis.get_title() for axis in figure.axes] == ["label 0", "label 1", "label 2", "label 3"]
    for label, axis in enumerate(figure.axes):
        found = lines(axis)
        for name, table in (
            ("have the label", exit.contain), ("have not", exit.not_contain),
            ("have the label, before", before.contain), ("have not, before", before.not_contain),
        ):  # fmt: skip
            assert found[name] == pytest.approx(table[:, label].tolist(), nan_ok=True)
    assert {line.get_linestyle() for line in figure.axes[0].lines if "before" in line.get_label()} == {"--"}
    assert ">have not, before<" in check_inline(figure)
    assert "before" not in check_inline(early_exit_figure(exit))


def test_many_labels_are_their_mean_and_range() -> None:
    exit = drawn(MOST_PANELS + 2)
    figure = early_exit_figure(exit)
    (axis,) = figure.axes

    def mean(table: Tensor, columns: slice) -> list[float]:
        return table[:, columns].mean(1).tolist()

    found = lines(axis)
    assert found["have the label"] == pytest.approx(mean(exit.contain, slice(0, -1)))
    assert found["have not"] == pytest.approx(mean(exit.not_contain, slice(1, -1)))
    bands = [band.get_paths()[0].get_extents() for band in axis.collections]
    assert [band.ymax for band in bands] == pytest.approx(
        [exit.contain[:, :-1].max().item(), exit.not_contain[:, 1:-1].max().item()]
    )
    check_inline(figure)
    assert len(early_exit_figure(exit, drawn(MOST_PANELS + 2, seed=1)).axes[0].lines) == 4


def test_eight_labels_still_have_panels() -> None:
    assert len(early_exit_figure(drawn(MOST_PANELS + 1)).axes) == MOST_PANELS


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"before: expected labels and layers .*label 2.*, got .*label 1"):
        early_exit_figure(drawn(3), drawn(2))
    with pytest.raises(ValueError, match="no sample has any"):
        early_exit_figure(drawn(1))


@pytest.mark.parametrize("draw", [lambda: layer_figure(SCORES), lambda: early_exit_figure(drawn(3))])
def test_matplotlib_is_asked_for(draw: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastproj-torch\[demo\]"):
        draw()  # type: ignore[operator]
