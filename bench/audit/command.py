"""``fastproj audit``. Heavy imports wait until the command runs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastproj.files import require_writable, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from fastproj.bench.audit.compilation import Job

Operators = Annotated[list[str] | None, typer.Option("--operator", help="An operator; may be repeated.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="sm_80, sm_90, sm_100, sm_120, gfx942; may be repeated."),
]
Chips = Annotated[
    list[str] | None, typer.Option("--chip", help="Chip for the roofline tables (H100, …); may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, every chip included.")]
Html = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, help="Also write a page with a roofline per chip.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that compile; by default one per usable core.")
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of readings; else audit/ in $FASTPROJ_CACHE, then in ./.cache.")
]


def audit(
    *,
    operator: Operators = None,
    target: Targets = None,
    chip: Chips = None,
    as_json: AsJson = False,
    html: Html = None,
    workers: Workers = None,
    cache: Cache = None,
) -> None:
    """Compile every kernel for GPUs that need not be here; check its machine code; count its traffic.

    Leaves with 1 where a kernel breaks what it declares.
    """
    from fastproj.bindings._library import has_triton

    if not has_triton():
        raise typer.BadParameter("triton is not installed: there is nothing to compile with")
    if html is not None:
        _check_page(html)
    from rich.console import Console

    from fastproj.bench.audit.audit import audit as run
    from fastproj.bench.audit.compilation import TARGETS, operators
    from fastproj.bench.audit.show import show_audit
    from fastproj.bench.traffic.chips import CHIPS, find_chip

    with _Progress(Console(stderr=True)) as progress:
        try:
            asked = [find_chip(name) for name in chip or (CHIPS if as_json or html else ["H100"])]
            result = run(
                operator or operators(),
                target or tuple(TARGETS),
                asked,
                cache_dir=cache or Path(os.environ.get("FASTPROJ_CACHE", ".cache")) / "audit",
                workers=workers or len(os.sched_getaffinity(0)),
                begin=progress.begin,
                progress=progress.advance,
            )
        except (ValueError, RuntimeError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from error
    if html is not None:
        from fastproj.bench.audit.page import render_page

        write_atomically(html, render_page(result, asked, shlex.join(["fastproj", *sys.argv[1:]])))
        typer.echo(f"written to {html}", err=True)
    if as_json:
        typer.echo(result.to_json())
    else:
        show_audit(result, Console())
    raise typer.Exit(0 if result.green else 1)


def _check_page(html: Path) -> None:
    """Raises BadParameter where a page could not be drawn or written in the end."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        wanted = f"{' and '.join(missing)}: pip install 'fastproj-torch[demo]'"
        raise typer.BadParameter(f"the page needs {wanted}", param_hint="--html")
    try:
        require_writable(html)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--html") from error


class _Progress:
    """A bar on the terminal for the cases that are compiled."""

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress

        self._bar = Progress(console=console, transient=True)
        self._task = self._bar.add_task("compiling", total=None)

    def begin(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def advance(self, job: Job) -> None:
        self._bar.update(self._task, advance=1, description=f"{job.module.rpartition('.')[2]} for {job.arch}")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
