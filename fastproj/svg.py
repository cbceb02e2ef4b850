"""Figures as inline SVG that follow the page's light or dark colours."""

from __future__ import annotations

import io
import re
from typing import Any

# Drawn in these literal colours, then replaced by the CSS variables of templates/base.html.
INK, FAINT = "#010203", "#040506"
SERIES = ("#100001", "#100002", "#100003", "#100004", "#100005", "#100006")
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"} | {
    ink: f"var(--series-{number})" for number, ink in enumerate(SERIES, start=1)
}


def style_axis(axis: Any) -> None:
    """A matplotlib axis without a background, with a faint grid, in colours that the page replaces."""
    axis.patch.set_alpha(0)
    axis.grid(True, color=FAINT, linewidth=0.6)
    axis.tick_params(colors=INK, labelsize=9)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def inline_svg(figure: Any) -> str:
    """A matplotlib figure as an ``<svg>`` element as wide as its box, its colours those of the page."""
    import matplotlib

    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    # Text stays text: it is searchable, scales with the page and takes its font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastproj"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    # A page holds several figures: names that nothing refers to would only be given twice.
    referred = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in referred else "", svg)
    for ink, variable in VARIABLES.items():
        svg = svg.replace(ink, variable)
    return svg
