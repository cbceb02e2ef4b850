"""All that is known of some latent factors, as the terminal, JSON and the page show it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.latent.describe import Description, Direction
from fastproj.latent.factors import STREAM, LatentFactors

# Where a block's number stands in a module's name, and what follows it.
_BLOCK = re.compile(r"^(?P<before>.*?)\.(?P<number>[0-9]{1,6})\.(?P<kind>.+)$", re.DOTALL)
SIGNIFICANT = 0.05

# Of modules: what they are within a block, then the number of the block, None outside of any.
Grid = dict[str, dict[int | None, float]]


@dataclass(frozen=True, eq=False)
class Findings:
    """Factors with what was found beside them; None where that was not asked for.

    ``recurrence`` and ``difference`` are by key of the bases, (rank,); ``notes`` whole sentences.
    """

    factors: LatentFactors
    description: Description | None = None
    recurrence: Mapping[str, Tensor] | None = None
    difference: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Keys of the bases, those first whose first direction exceeds chance most, by share over null."""

        def excess(key: str) -> float:
            share, chance = float(self.factors.shares[key][0]), float(self.factors.null_shares[key][0, 1])
            return share if math.isnan(chance) else share / max(chance, 1e-12)

        return sorted(self.factors.bases, key=excess, reverse=True)

    @property
    def rows(self) -> list[Row]:
        """A row a direction, in the order of :attr:`keys`."""
        described = self.description.directions if self.description else ()
        words = {(direction.key, direction.number): direction for direction in described}
        return [
            self._row(key, number, words.get((key, number)))
            for key in self.keys
            for number in range(self.factors.rank)
        ]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Notes, those of the description and one on modules that learnt nothing."""
        unchanged = len(self.factors.unchanged)
        own = (f"{counted(unchanged, 'module')} learnt nothing, ΔW = 0.",) if unchanged else ()
        return (*self.notes, *own, *(self.description.notes if self.description else ()))

    def _row(self, key: str, number: int, words: Direction | None) -> Row:
        factors = self.factors
        agreement = dict(zip(factors.modules, factors.agreement[key][number].tolist(), strict=True))
        return Row(
            key=key,
            number=number,
            share=float(factors.shares[key][number]),
            null=tuple(factors.null_shares[key][number].tolist()),
            p=float(factors.p_values[key][number]),
            recurrence=None if self.recurrence is None else float(self.recurrence[key][number]),
            difference=None if self.difference is None else float(self.difference[key][number]),
            agreement={name: share for name, share in agreement.items() if not math.isnan(share)},
            words=words,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON: NaN as None, infinity as a string."""
        factors = self.factors
        return {
            "side": factors.side,
            "pool": factors.pool,
            "rank": factors.rank,
            "modules": list(factors.modules),
            "unchanged": list(factors.unchanged),
            "directions": [_plain(asdict(row)) for row in self.rows],
            "spectra": {name: values.tolist() for name, values in factors.spectra.items()},
            "notes": list(self.all_notes),
        }


@dataclass(frozen=True)
class Row:
    """One direction: ``number`` from 0 in basis ``key``; see ``LatentFactors`` for the numbers.

    ``agreement`` is by module; ``words`` None where no model was there to describe it by.
    """

    key: str
    number: int
    share: float
    null: tuple[float, ...]
    p: float
    recurrence: float | None
    difference: float | None
    agreement: dict[str, float]
    words: Direction | None

    @property
    def name(self) -> str:
        """ "Direction 1", and of which module."""
        own = f"Direction {self.number + 1}"
        return own if self.key == STREAM else f"{shown(self.key)}, {own.lower()}"


def verdict(findings: Findings) -> str:
    """The result in a sentence or two, which say no more than the numbers do."""
    factors, rows = findings.factors, findings.rows
    verb, into = ("write", "into") if factors.side == "write" else ("read", "of")
    modules = counted(len(factors.modules), "module")
    if factors.pool == "stream":
        first = rows[0]
        text = f"The first direction holds {percent(first.share)} of what {modules} {verb} {into} the stream"
        if math.isnan(first.p):
            return f"{text}."
        chance = "more than" if first.share > first.null[2] else "no more than"
        return (
            f"{text}, {chance} 95 % of chance draws do (up to {percent(first.null[2])}; p = {first.p:.2g})."
        )
    firsts = [row for row in rows if row.number == 0]
    if any(math.isnan(row.p) for row in firsts):
        return f"Each of {modules} has directions of its own."
    standing = sum(row.p <= SIGNIFICANT for row in firsts)
    return (
        f"In {standing} of {modules} the first direction stands out at p ≤ {SIGNIFICANT}; by chance "
        f"{SIGNIFICANT * len(firsts):.0f} would."
    )


def places(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """What each module is within its block, and the block's number; None for one outside of any."""
    matches = {name: _BLOCK.match(name) for name in names}
    towers = {match["before"] for match in matches.values() if match}
    found: dict[str, tuple[str, int | None]] = {}
    for name, match in matches.items():
        if match is None:
            found[name] = shown(name), None
        else:
            kind = match["kind"] if len(towers) == 1 else f"{match['before']}.*.{match['kind']}"
            found[name] = shown(kind), int(match["number"])
    return found


def grid(values: Mapping[str, float]) -> Grid:
    """Values of modules by what they are in a block, and by block in order."""
    found: Grid = {}
    for name, (kind, number) in places(values).items():
        found.setdefault(kind, {})[number] = values[name]
    return {kind: {number: row[number] for number in in_order(row)} for kind, row in found.items()}


def in_order(numbers: Iterable[int | None]) -> list[int | None]:
    """Different blocks in their order; None, for modules outside of any, last."""
    return sorted(set(numbers), key=lambda number: (number is None, number or 0))


def norms(factors: LatentFactors) -> dict[str, float]:
    """``‖ΔW‖_F`` of each module."""
    return {name: float(torch.linalg.vector_norm(values)) for name, values in factors.spectra.items()}


def shown(text: str) -> str:
    """A text on one line, with spaces at its ends and whatever does not print made visible."""
    body = text.strip(" ")
    inner = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in body)
    left = len(text) - len(text.lstrip(" "))
    return "␣" * left + inner + "␣" * (len(text) - left - len(body))


def percent(share: float) -> str:
    """A share for reading; "–" for NaN."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def signed(value: float) -> str:
    """A score with its sign, a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
