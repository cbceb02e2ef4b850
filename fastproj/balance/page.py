"""The page of ``fastproj layers`` and ``fastproj balance``: one HTML file without a script or a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastproj.balance.early_exit import EarlyExit
from fastproj.balance.figures import early_exit_figure, layer_figure
from fastproj.balance.findings import (
    METHODS,
    ZERO_SHOT,
    Findings,
    Row,
    fluency,
    layer_rows,
    layer_verdict,
    row_verdicts,
)
from fastproj.latent.findings import counted, percent, shown
from fastproj.svg import inline_svg

HERE = Path(__file__).parent
TEMPLATES = (HERE, HERE.parent / "templates")
LAYERS_TITLE, BALANCE_TITLE = "Where labels part", "Labels before and after"
# Of a bar at its longest, and of one bar and the gap below it, in pixels.
BAR, THICK, PITCH = 160, 7, 9
LONGEST_TITLE = 24  # characters of a label above a panel


@dataclass(frozen=True)
class LabelRow:
    """A label's numbers, a bar's length for each method along :data:`BAR`, and where the gold share lies."""

    name: str
    support: int
    values: tuple[float, ...]
    bars: tuple[float, ...]
    gold: float | None
    mark: float | None


@dataclass(frozen=True)
class Picture:
    """A figure as ``<svg>``, what it shows in words, and the width below which it is scrolled, in rem."""

    heading: str
    words: str
    svg: str
    width: int


def require_matplotlib() -> None:
    """Raises ModuleNotFoundError, with what to install, where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the page needs matplotlib. Install with:\npython -m pip install 'fastproj-torch[demo]'"
        ) from error


def render_page(findings: Findings, *, title: str | None = None, command: str = "") -> str:
    """The page as HTML: methods and labels where there are rows, KL and label logits by layer.

    Whatever a model, a file or a user wrote is escaped, and what does not print is made visible. Texts of
    samples are not shown; ``command`` is what made the page. Raises ModuleNotFoundError without matplotlib.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "counted": counted, "percent": percent}
    environment.filters |= {"number": number, "fluency": fluency}
    rows = findings.rows
    verdicts = row_verdicts(rows) if rows else []
    if findings.scores is not None:
        verdicts.append(layer_verdict(findings.scores))
    return environment.get_template("page.html").render(
        title=shown(title or (BALANCE_TITLE if rows else LAYERS_TITLE)),
        command=shown(command),
        findings=findings,
        verdicts=verdicts,
        rows=rows,
        told=METHODS,
        f1=label_rows(rows, "f1", findings.gold),
        predicted=label_rows(rows, "predicted", findings.gold),
        layers=list(layer_rows(findings)),
        exchange=None if findings.scores is None else exchange_picture(findings),
        exits=exit_pictures(findings),
        bar=BAR,
        thick=THICK,
        pitch=PITCH,
    )


def label_rows(rows: Sequence[Row], what: str, gold: Mapping[str, float]) -> list[LabelRow]:
    """F1 ("f1") of each label by method, on a scale to 1, or predicted shares, on one to the largest."""
    if not rows:
        return []
    tables = [row.measures.per_label_f1 if what == "f1" else row.predicted for row in rows]
    end = 1.0 if what == "f1" else max(*(max(table.values()) for table in (*tables, gold)), 1e-12)
    found = []
    for name, support in rows[0].measures.support.items():
        values = tuple(table[name] for table in tables)
        own = None if what == "f1" else gold[name]
        found.append(
            LabelRow(
                name,
                support,
                values,
                tuple(round(BAR * value / end, 1) for value in values),
                own,
                None if own is None else round(BAR * own / end, 1),
            )
        )
    return found


def exchange_picture(findings: Findings) -> Picture:
    """KL by block."""
    scores = findings.scores
    if scores is None:
        raise ValueError("expected an interchange ablation, got none")
    words = f"Mean KL by block, with standard errors. {layer_verdict(scores)}"
    return Picture("", words, _svg(layer_figure(scores)), 30)


def exit_pictures(findings: Findings) -> list[Picture]:
    """Label logits by layer: the model's own, or beside it after each method that trained."""
    before = findings.exit
    if before is None or bool(before.contain[0].isnan().all()):
        return []
    drawn = _drawn(before)
    if not findings.exits:
        heading = ZERO_SHOT if findings.rows else ""
        return [_exit_picture(heading, before, _svg(early_exit_figure(drawn)))]
    return [
        _exit_picture(method, after, _svg(early_exit_figure(_drawn(after), drawn)))
        for method, after in findings.exits.items()
    ]


def _exit_picture(heading: str, exit: EarlyExit, svg: str) -> Picture:
    words = (
        "Mean logit of each label by layer, over samples that have it and samples that have not. At the last "
        f"layer propensity is {number(float(exit.propensity[-1]))} and discrimination "
        f"{number(float(exit.discrimination[-1]))}."
    )
    return Picture(heading, words, svg, 44)


def _drawn(exit: EarlyExit) -> EarlyExit:
    """With names that a figure has room for, in which matplotlib finds no mathematics."""
    names = (shown(name) for name in exit.names)
    short = (name if len(name) <= LONGEST_TITLE else f"{name[: LONGEST_TITLE - 1]}…" for name in names)
    return replace(exit, names=tuple(name.replace("$", r"\$") for name in short))


def _svg(figure: Any) -> str:
    with warnings.catch_warnings():
        # Text stays text: the page's font has the characters that matplotlib's lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return inline_svg(figure)


def number(value: float | None) -> str:
    """Three digits for reading, a true minus; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3g}".replace("-", "−")
