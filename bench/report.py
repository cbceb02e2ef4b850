"""A table a benchmark leaves: in the terminal, in pytest-benchmark's JSON and under bench/results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def publish(benchmark: Any, title: str, rows: Sequence[Mapping[str, str]], command: str) -> None:
    """Print the rows and keep them in the benchmark's record.

    With FASTPROJ_BENCH_RESULTS set they are written to bench/results too.
    """
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(stderr=True, width=110).print(table)
    benchmark.extra_info.update({"table": [dict(row) for row in rows]})
    if os.environ.get("FASTPROJ_BENCH_RESULTS"):
        RESULTS.mkdir(exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in title.lower()).strip("_")
        record = {
            "title": title,
            "command": command,
            "machine": machine(),
            "rows": [dict(row) for row in rows],
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
