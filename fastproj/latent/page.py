"""The page of latent factors: one HTML file without a script, which needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastproj.latent.factors import LatentFactors
from fastproj.latent.findings import (
    Findings,
    Row,
    counted,
    grid,
    in_order,
    percent,
    places,
    shown,
    signed,
    verdict,
)

HERE = Path(__file__).parent
TEMPLATES = (HERE, HERE.parent / "templates")
TITLE = "Latent factors of a fine-tune"
# Bases that the page opens on; others are a click away.
OPEN = 12
# Of a figure, in the units of its viewBox.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 180, 44, 8, 12, 26
BAR = 160
_TICKS = 6


@dataclass(frozen=True)
class Panel:
    """Singular values of one kind of module: (x, y, whether it is the largest) and marks of the axes."""

    kind: str
    words: str
    points: list[tuple[float, float, bool]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


@dataclass(frozen=True)
class Bar:
    """A share beside the 5 % to 95 % of the null, along :data:`BAR`; no null where none was drawn."""

    at: float
    null: tuple[float, float, float] | None


def render_page(findings: Findings, *, title: str = TITLE, command: str = "") -> str:
    """The page as HTML: shares against chance, layers, singular values, tokens and sentences.

    Whatever a model, an adapter or a user wrote is escaped, and what does not print is made visible.
    Sentences stay folded until the reader asks for them; ``command`` is what made the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "shown": shown, "signed": signed, "counted": counted}
    environment.filters["breakable"] = lambda name: Markup(".<wbr>").join(name.split("."))
    rows = findings.rows
    grids = [grid(row.agreement) for row in rows]
    split = OPEN * findings.factors.rank
    return environment.get_template("page.html").render(
        title=shown(title),
        command=shown(command),
        findings=findings,
        factors=findings.factors,
        verdict=verdict(findings),
        rows=list(zip(rows, bars(rows), strict=True)),
        sections=list(zip(rows, grids, strict=True)),
        split=split,
        blocks=in_order(number for cells in grids for row in cells.values() for number in row),
        panels=panels(findings.factors),
        has_sentences=any(row.words and row.words.positive_sentences for row in rows),
        bar=BAR,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
    )


def bars(rows: Sequence[Row]) -> list[Bar]:
    """All on one scale, whose end is the largest share or null share."""
    shares = [value for row in rows for value in (row.share, *row.null) if not math.isnan(value)]
    end = max(shares, default=0.0) or 1.0
    found = []
    for row in rows:
        at, *null = (round(BAR * value / end, 1) for value in (row.share, *row.null))
        found.append(Bar(at, None if math.isnan(null[0]) else (null[0], null[1], null[2])))
    return found


def panels(factors: LatentFactors) -> list[Panel]:
    """A panel a kind of module, all on the same axes."""
    kinds: dict[str, list[tuple[int | None, list[float]]]] = {}
    for name, (kind, number) in places(factors.spectra).items():
        kinds.setdefault(kind, []).append((number, factors.spectra[name].tolist()))
    numbers = in_order(number for modules in kinds.values() for number, _ in modules)
    top = max((value for modules in kinds.values() for _, values in modules for value in values), default=0.0)
    top = top or 1.0

    def x(number: int | None) -> float:
        return round(LEFT + (numbers.index(number) + 0.5) * (WIDTH - LEFT - RIGHT) / len(numbers), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP), 1)

    across = [(x(n), "–" if n is None else str(n)) for n in numbers[:: -(-len(numbers) // _TICKS) or 1]]
    up = [(y(part * top), f"{part * top:.2g}") for part in (0.0, 0.5, 1.0)]
    return [
        Panel(
            kind,
            f"Singular values of {kind} in {counted(len(modules), 'block')}, the largest of all {top:.3g}",
            [(x(number), y(v), place == 0) for number, values in modules for place, v in enumerate(values)],
            across,
            up,
        )
        for kind, modules in kinds.items()
    ]
