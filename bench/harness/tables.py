"""Measurements and comparisons as tables for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastproj.bench.harness.compare import Comparison, Ratio
from fastproj.bench.harness.record import Record, Row

COLOURS = {"faster": "green", "slower": "red", "within noise": "dim", "too few rounds": "yellow"}


def show_record(record: Record, console: Console) -> None:
    """The machine, the tests that ran, the bandwidth, and a table of calls for each workload."""
    machine, gate = record.machine, record.gate
    console.print(
        f"{machine['device']} · torch {machine['torch']} · triton {machine['triton']}", markup=False
    )
    console.print(f"{gate['passed']} tests passed first, in {gate['seconds']:.0f} s", highlight=False)
    console.print(f"copy bandwidth {record.copy['bytes_per_second'] / 1e9:.1f} GB/s", highlight=False)
    for workload, rows in by_workload(record.rows).items():
        table = _table(workload, "dtype", "µs", "spread", "route", "GB/s", "of copy", "of floor", "mJ")
        for row in rows:
            table.add_row(*record_cells(row))
        console.print(table)
    for note in (*(f"{name}: not timed, {why}" for name, why in record.skipped.items()), *notes(record.rows)):
        console.print(f"• {note}", markup=False, highlight=False, soft_wrap=True)


def by_workload(rows: tuple[Row, ...]) -> dict[str, list[Row]]:
    """The rows of each workload, in the order of the record."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.workload, []).append(row)
    return groups


def _table(title: str, *columns: str) -> Table:
    """A table of calls; what they are called may wrap, numbers may not."""
    table = Table("call", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def record_cells(row: Row) -> tuple[str, ...]:
    """One row's cells; a dash where there is no value. The spread is half the range of the quartiles."""
    return (
        _call(row),
        row.dtype,
        f"{row.seconds * 1e6:.1f}",
        f"{(row.high - row.low) / 2 / row.seconds:.1%}",
        row.route,
        f"{row.gigabytes_per_second:.1f}",
        f"{row.of_copy:.2f}",
        _number(row.of_floor, "{:.2f}"),
        _number(None if row.energy_joules is None else row.energy_joules * 1e3, "{:.3g}"),
    )


def _call(row: Row) -> str:
    return ", ".join(filter(None, (row.suite, row.part)))


def notes(rows: tuple[Row, ...]) -> list[str]:
    """Why values are missing and which throttle reasons were met, each said once."""
    said = [f"{name}: {reason}" for row in rows for name, reason in row.missing.items()]
    for row in rows:
        slowed = set(row.telemetry["during"].get("throttle_reasons") or ()) - {"GpuIdle"}
        if slowed:
            said.append(f"{row.name}: clocks were held back by {', '.join(sorted(slowed))}")
    return list(dict.fromkeys(said))


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Warnings, a line for each ratio, and the rows that only one side has."""
    for warning in comparison.warnings:
        console.print(f"[yellow]warning[/]: {warning}", highlight=False, soft_wrap=True)
    groups: dict[str, list[Ratio]] = {}
    for ratio in comparison.ratios:
        groups.setdefault(f"{ratio.before.workload}, {ratio.before.device}", []).append(ratio)
    for title, ratios in groups.items():
        table = _table(title, "dtype", "before, µs", "after, µs", "after / before", "verdict")
        for ratio in ratios:
            one, other = ratio.before, ratio.after
            times = f"{one.seconds * 1e6:.1f}", f"{other.seconds * 1e6:.1f}", f"{ratio.ratio:.3f}"
            table.add_row(_call(one), one.dtype, *times, ratio.verdict, style=COLOURS[ratio.verdict])
        console.print(table)
    for side, names in (("first", comparison.only_before), ("second", comparison.only_after)):
        for name in names:
            console.print(f"• only in the {side} file: {name}", markup=False, highlight=False, soft_wrap=True)
