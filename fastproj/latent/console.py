"""Latent factors in a terminal: energy against chance, layers, tokens and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastproj.latent.describe import Sentence, Token
from fastproj.latent.findings import (
    Findings,
    Grid,
    Row,
    counted,
    grid,
    in_order,
    norms,
    percent,
    shown,
    signed,
    verdict,
)

# Directions that a terminal shows; all are in the page and in JSON.
MOST = 8
_LEVELS = "▁▂▃▄▅▆▇█"


def show(findings: Findings, console: Console | None = None) -> None:
    """Print findings. What a model or a user wrote is printed as text: no markup, no control characters."""
    console = console or Console()
    rows = findings.rows[:MOST]
    console.print(Text(verdict(findings)))
    console.print(_energy(rows, findings))
    cells = [(row, grid(row.agreement)) for row in rows]
    console.print(_layers("Layers that carry them, by the share of each one's own energy", cells, percent))
    changes = grid(norms(findings.factors))
    console.print(_layers("Change of each layer, ‖ΔW‖", [(None, changes)], lambda value: f"{value:.3g}"))
    for row in rows:
        _words(row, findings.factors.side, console)
    left = len(findings.rows) - len(rows)
    if left:
        console.print(f"{counted(left, 'more direction')} in the page and in --json.")
    for note in findings.all_notes:
        console.print(Text(shown(note)))


def _energy(rows: Sequence[Row], findings: Findings) -> Table:
    table = Table(title="Share of the energy, and of chance", title_justify="left")
    table.add_column("direction", overflow="fold")
    heads = ["share", "5 %", "50 %", "95 %", "p"]
    heads += [] if findings.recurrence is None else ["recurs"]
    heads += [] if findings.difference is None else ["difference"]
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        cells = [percent(row.share), *map(percent, row.null), "–" if math.isnan(row.p) else f"{row.p:.2g}"]
        cells += [] if row.recurrence is None else [f"{row.recurrence:.2f}"]
        cells += [] if row.difference is None else [signed(row.difference)]
        table.add_row(Text(row.name), *cells)
    return table


def _layers(title: str, grids: Sequence[tuple[Row | None, Grid]], form: Callable[[float], str]) -> Table:
    """A line for each kind of module, a column a block, scaled to the largest value of its direction."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    named = any(row is not None for row, _ in grids)
    if named:
        table.add_column("direction", overflow="fold")
    table.add_column("modules", overflow="fold")
    table.add_column("by block", overflow="fold")
    table.add_column("most, in block", justify="right", no_wrap=True)
    for row, cells in grids:
        numbers = in_order(number for kind in cells.values() for number in kind)
        top = max((value for kind in cells.values() for value in kind.values()), default=0.0)
        for place, (kind, values) in enumerate(cells.items()):
            most = max(values, key=lambda number: values[number])
            line = "".join(_level(values.get(number), top) for number in numbers)
            block = "–" if most is None else str(most)
            name = [] if row is None else [Text("" if place else row.name)]
            table.add_row(*name, Text(kind), line, f"{form(values[most])}, {block:>2}")
    return table


def _level(value: float | None, top: float) -> str:
    if value is None:
        return " "
    return _LEVELS[min(len(_LEVELS) - 1, int(value / top * len(_LEVELS)))] if top else _LEVELS[0]


def _words(row: Row, side: str, console: Console) -> None:
    if row.words is None:
        return
    if row.words.no_tokens:
        console.print(Text(f"{row.name}: no tokens. {row.words.no_tokens}"))
    else:
        lists = (row.words.positive_tokens, row.words.negative_tokens)
        console.print(_two_sided(f"{row.name}: tokens that it {side}s", lists))
    if row.words.positive_sentences or row.words.negative_sentences:
        lists_of_sentences = (row.words.positive_sentences, row.words.negative_sentences)
        console.print(_two_sided(f"{row.name}: sentences that activate it", lists_of_sentences))


def _two_sided(title: str, sides: tuple[Sequence[Token | Sentence], Sequence[Token | Sentence]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for name in ("positive", "negative"):
        table.add_column(name, overflow="fold")
        table.add_column("", justify="right", no_wrap=True)
    for place in range(max(map(len, sides))):
        cells: list[Text | str] = []
        for side in sides:
            here = side[place] if place < len(side) else None
            cells += ["", ""] if here is None else [Text(shown(here.text)), signed(here.score)]
        table.add_row(*cells)
    return table
