"""Numbers as people read them."""

from __future__ import annotations


def size(number: int) -> str:
    """Bytes in decimal units, three digits: 17.5 MB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            value = number / unit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return f"{number} B"


def microseconds(value: float) -> str:
    """Three digits, or all those before the point: 5.22, 130,499."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
