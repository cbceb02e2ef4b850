"""The audit as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastproj.bench.audit.audit import Audit, CodeRow, TrafficRow
from fastproj.bench.audit.units import microseconds, size
from fastproj.bench.audit.verdict import Finding

LOOK: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "title_justify": "left",
    "pad_edge": False,
    "show_edge": False,
    "padding": (0, 1, 0, 0),
}
CODE_CAPTION = (
    "The most registers, local and shared bytes (smem) of a kernel's cases; the fewest programs a processor "
    "holds and bytes it has in flight; cases whose loops are 128 bits wide or declare why not; of the matrix "
    "products those on tensor cores (mma) and those with asynchronous copies.\n"
)
TRAFFIC_CAPTION = (
    "Memory: bytes that the last cache cannot serve, and their ratio to the least possible, each input and "
    "output once. Accesses: all bytes that loads and stores ask for, over the same.\n"
)


def show_audit(result: Audit, console: Console) -> None:
    """Machine code, declared exceptions, traffic of each chip, then what is wrong."""
    for arch in dict.fromkeys(row.arch for row in result.code):
        console.print(_code_table(arch, [row for row in result.code if row.arch == arch]), "")
    console.print(CODE_CAPTION, style="dim", highlight=False)
    console.print(_declared_table(result.declared), "")
    for chip, workload in dict.fromkeys((row.chip, row.workload) for row in result.traffic):
        own = [row for row in result.traffic if (row.chip, row.workload) == (chip, workload)]
        console.print(_traffic_table(f"{chip}: {workload}", own), "")
    console.print(TRAFFIC_CAPTION, style="dim", highlight=False)
    for finding in result.findings:
        _show_finding(finding, console)
    for problem in result.problems:
        console.print(f"[red]✗[/] {escape(problem)}", highlight=False)
    cases, targets = sum(row.cases for row in result.code), len({row.arch for row in result.code})
    if result.green:
        console.print(f"[green]green[/]: {cases} compilations for {targets} targets keep to what is declared")
    else:
        wrong = len(result.findings) + len(result.problems)
        console.print(f"[red]{wrong} findings[/] in {cases} compilations for {targets} targets")


def _code_table(arch: str, rows: Sequence[CodeRow]) -> Table:
    table = Table(title=f"Machine code, {arch}", **LOOK)
    table.add_column("kernel", no_wrap=True)
    for name in ("cases", "regs", "local", "smem", "progs", "flight", "wide", "mma", "async"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.kernel,
            *(str(number) for number in (row.cases, row.registers, row.local_bytes)),
            f"{row.shared_bytes / 1024:.0f}K",
            str(row.programs),
            "–" if row.flying_bytes is None else f"{row.flying_bytes / 1024:.0f}K",
            str(row.wide),
            f"{row.matrix}/{row.matrix_products}" if row.matrix_products else "–",
            f"{row.asynchronous}/{row.matrix_products}" if row.matrix_products else "–",
            style="red" if row.findings else None,
        )
    return table


def _declared_table(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table("kernel", "rule", "why it cannot", title="Declared exceptions", **LOOK)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _traffic_table(title: str, rows: Sequence[TrafficRow]) -> Table:
    table = Table(title=title, **LOOK)
    table.add_column("operator", no_wrap=True)
    for name in ("launches", "memory", "× least", "accesses", "floor, µs", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.operator,
            str(row.launches),
            size(row.memory_bytes),
            f"{row.memory_ratio:.3f}",
            f"{row.access_ratio:.3f}",
            microseconds(row.floor_microseconds),
            row.bound,
        )
    return table


def _show_finding(finding: Finding, console: Console) -> None:
    where = f"{finding.kernel}, {finding.case}, {finding.arch}"
    console.print(
        f"[red]✗[/] [bold]{finding.rule}[/]: {escape(where)}: {escape(finding.message)}", highlight=False
    )
    for line in finding.lines:
        console.print(f"    {escape(line)}", style="dim", highlight=False, soft_wrap=True)
