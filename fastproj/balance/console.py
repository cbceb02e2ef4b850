"""What ``fastproj layers`` and ``fastproj balance`` found, in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastproj.balance.findings import Findings, fluency, layer_rows, layer_verdict, row_verdicts
from fastproj.balance.page import number
from fastproj.latent.findings import shown


def show_layers(findings: Findings, console: Console | None = None) -> None:
    """Print KL and label logits by layer. Names of labels are printed as text, without control characters."""
    console = console or Console()
    table = Table(title="Layers", title_justify="left")
    table.add_column("block")
    for head in ("KL, nats", "±", "propensity", "discrimination"):
        table.add_column(head, justify="right")
    for row in layer_rows(findings):
        name = "in front" if row.block is None else f"{row.block}{' ◀' if row.best else ''}"
        cells = (row.mean, row.error, row.propensity, row.discrimination)
        table.add_row(name, *map(number, cells), style="bold" if row.best else None)
    console.print(table)
    console.print(Text(f"labels: {', '.join(map(shown, findings.labels.names))}"))
    if findings.scores is not None:
        console.print(Text(f"{layer_verdict(findings.scores)} {len(findings.ablated)} samples."))


def show_methods(findings: Findings, console: Console | None = None) -> None:
    """Print the methods' measures, F1 by label, and what became of the model's own numbers; likewise."""
    console = console or Console()
    table = Table(title="Methods", title_justify="left")
    table.add_column("method")
    # Of two lines, so that 80 columns are enough.
    for head in ("weighted\nF1", "worst\nF1", "its\nlabel", "accuracy", "perplexity", "trained"):
        table.add_column(head, justify="right")
    for row in findings.rows:
        measures = row.measures
        table.add_row(
            row.method,
            f"{measures.weighted_f1:.3f}",
            f"{measures.worst_f1:.3f}",
            Text(shown(measures.worst_label)),
            f"{measures.accuracy:.3f}",
            fluency(row.perplexity),
            f"{100 * row.share:.2f} %",
        )
    console.print(table)
    console.print(_by_label(findings))
    if findings.scores is not None:
        console.print(Text(layer_verdict(findings.scores)))
    for verdict in row_verdicts(findings.rows):
        console.print(Text(shown(verdict)))


def _by_label(findings: Findings) -> Table:
    table = Table(title="F1 by label", title_justify="left")
    table.add_column("label", overflow="fold")
    table.add_column("samples", justify="right")
    for row in findings.rows:
        table.add_column(row.method, justify="right")
    for name, support in findings.rows[0].measures.support.items():
        scores = (f"{row.measures.per_label_f1[name]:.3f}" for row in findings.rows)
        table.add_row(Text(shown(name)), str(support), *scores)
    return table
