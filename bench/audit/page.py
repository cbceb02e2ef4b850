"""The audit's page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import fastproj
from fastproj.bench.audit.audit import Audit, TrafficRow
from fastproj.bench.audit.roofline import roofline_figure
from fastproj.bench.audit.units import microseconds, size
from fastproj.bench.traffic.chips import Chip

TEMPLATES = (Path(__file__).parent, Path(fastproj.__file__).parent / "templates")

Row = TypeVar("Row")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ChipSection:
    """One chip: its plot, what the plot is called where it is not seen, and its rows by workload."""

    chip: Chip
    svg: str
    words: str
    workloads: dict[str, list[TrafficRow]]


def render_page(result: Audit, chips: Sequence[Chip], command: str) -> str:
    """The page as HTML; ``command`` is what made it. A chip without rows gets no section.

    Raises ValueError for a row of a chip that is not among ``chips``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    unknown = {row.chip for row in result.traffic} - {chip.name for chip in chips}
    if unknown:
        raise ValueError(
            f"expected rows of {[chip.name for chip in chips]} alone, got some of {sorted(unknown)}"
        )
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "size": size,
        "microseconds": microseconds,
        "ratio": lambda value: f"{value:.3f}×",
    }
    return environment.get_template("page.html").render(
        result=result,
        verdict=verdict(result),
        code=_grouped(result.code, lambda row: (row.kernel, row.operator)),
        sections=[section for chip in chips if (section := _section(result, chip))],
        command=command,
    )


def verdict(result: Audit) -> str:
    """The result in one sentence."""
    if result.green:
        targets = ", ".join(dict.fromkeys(row.arch for row in result.code))
        cases = sum(row.cases for row in result.code)
        return (
            f"Green: the machine code of all {cases} compilations, for {targets}, keeps to what its case "
            f"declares, and no operator moves more than it may."
        )
    parts = []
    if result.findings:
        kernels = list(dict.fromkeys(finding.kernel for finding in result.findings))
        parts.append(
            f"{_counted(len(result.findings), 'finding')} in the machine code of {', '.join(kernels)}"
        )
    if result.problems:
        parts.append(f"{_counted(len(result.problems), 'problem')} of launchers or traffic")
    return f"Not green: {' and '.join(parts)}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _section(result: Audit, chip: Chip) -> ChipSection | None:
    rows = [row for row in result.traffic if row.chip == chip.name]
    if not rows:
        return None
    limited = sum(row.bound == "memory" for row in rows)
    words = (
        f"Roofline of the {chip.name}: attainable FLOP/s over arithmetic intensity. {limited} of {len(rows)} "
        f"pairs of operator and workload stand on the memory roof. The table below has the numbers."
    )
    workloads = _grouped(rows, lambda row: row.workload)
    return ChipSection(chip, roofline_figure(rows, chip), words, workloads)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by their key, keys in the order of their first rows."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
