"""Tables of what the losses did in training, and of label logits before it and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastproj.balance.study.arms import ZERO
from fastproj.balance.study.tables import cell, header, row

Record = dict[str, Any]
Arms = Mapping[str, Mapping[int, Record]]
TERMS = ("lm", "propensity", "discrimination")
SIDES = ("contain", "not_contain")
# Steps at either end that a course is averaged over.
ENDS = 8


def course_table(arms: Arms) -> list[str]:
    """Means of each term over the first and the last steps."""
    lines = header(["training", *(f"{term}, {end}" for term in TERMS for end in ("first", "last"))])
    for name, own in arms.items():
        records = [record for record in own.values() if "lm" in record]
        if not records:
            continue
        cells = []
        for term in TERMS:
            for part in (slice(None, ENDS), slice(-ENDS, None)):
                values = [steps for record in records for steps in record[term][part]]
                cells.append(f"{sum(values) / len(values):.2f}")
        lines.append(row([name, *cells]))
    return lines if len(lines) > 2 else ["No arm is trained yet."]


def exit_tables(arms: Arms, names: Sequence[str]) -> list[str]:
    """Label logits read off the stream: at the end by label, and what they differ by along the blocks."""
    before = arms.get(ZERO, {})
    lines = ["Mean logit of each label at the end, over test texts that have it / have it not:", ""]
    lines += header(["arm", *names, "propensity", "discrimination"])
    for name, own in arms.items():
        exits = [record["early exit"] for record in own.values() if "early exit" in record]
        if exits:
            cells = [
                " / ".join(_mean([found[side][-1][at] for found in exits]) for side in SIDES)
                for at in range(len(names))
            ]
            cells += [cell([found[key][-1] for found in exits], 1) for key in TERMS[1:]]
            lines.append(row([name, *cells]))
    places = _places(before)
    lines += ["", "Propensity / discrimination of the stream behind a block, means over draws:", ""]
    lines += header(["arm", *(f"behind {place - 1}" for place in places)])
    for name, own in arms.items():
        found = [(seed, record) for seed, record in own.items() if "early exit" in record and seed in before]
        if found:
            cells = [
                " / ".join(
                    _mean([_at(record, before[seed], key, place) for seed, record in found])
                    for key in ("propensity", "discrimination")
                )
                for place in places
            ]
            lines.append(row([name, *cells]))
    return lines


def _places(before: Mapping[int, Record]) -> list[int]:
    """Every fifth layer of the whole model, counted from the stream in front of its first block."""
    if not before:
        return []
    count = len(next(iter(before.values()))["early exit"]["propensity"])
    return sorted({*range(5, count, 5), count - 1})


def _at(record: Record, before: Record, key: str, place: int) -> float:
    """A layer's number; below the block that an arm trains nothing has changed."""
    own, whole = record["early exit"][key], before["early exit"][key]
    folded = len(whole) - len(own)
    value: float = whole[place] if place < folded else own[place - folded]
    return value


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{sum(known) / len(known):.1f}" if known else "–"
