"""Two measurements side by side: ratios, and whether they stand out of the spread."""

from __future__ import annotations

from dataclasses import dataclass

from fastproj.bench.harness.record import Record, Row

# What has to agree for a ratio to speak of the code alone.
SAME = ("device", "capability", "driver", "power_limit_watts", "cuda", "torch", "triton", "python", "threads")


@dataclass(frozen=True)
class Ratio:
    """Seconds of ``after`` over those of ``before``; "within noise" where the quartile ranges meet."""

    before: Row
    after: Row
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Ratios of the rows that both have; the names of the others; what differs between the machines."""

    ratios: tuple[Ratio, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    warnings: tuple[str, ...]

    def slower_than(self, limit: float) -> tuple[Ratio, ...]:
        """The ratios above ``limit`` that are no noise."""
        return tuple(ratio for ratio in self.ratios if ratio.verdict == "slower" and ratio.ratio > limit)


def compare(before: Record, after: Record) -> Comparison:
    """Match rows by their keys. Raises ValueError where no row is in both."""
    first, second = ({row.key: row for row in record.rows} for record in (before, after))
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("the two files share no row: nothing to compare")
    return Comparison(
        tuple(ratio_of(first[key], second[key]) for key in common),
        tuple(row.name for key, row in first.items() if key not in second),
        tuple(row.name for key, row in second.items() if key not in first),
        (*_differences(before, after), *_other_routes([(first[key], second[key]) for key in common])),
    )


def ratio_of(before: Row, after: Row) -> Ratio:
    """The ratio of medians, and the verdict from the quartiles.

    These hold what a run saw of the machine; load that came between two runs is in neither.
    """
    if after.low > before.high:
        verdict = "slower"
    elif after.high < before.low:
        verdict = "faster"
    else:
        verdict = "within noise"
    return Ratio(before, after, after.seconds / before.seconds, verdict)


def _differences(before: Record, after: Record) -> list[str]:
    """What of the machine or its software is not the same."""
    pairs = ((name, before.machine.get(name), after.machine.get(name)) for name in SAME)
    return [f"{name} differs: {one} and {other}" for name, one, other in pairs if one != other]


def _other_routes(pairs: list[tuple[Row, Row]]) -> list[str]:
    """Rows that were not timed in the same way."""
    return [
        f"{one.name}: timed by route {one.route} and by route {other.route}"
        for one, other in pairs
        if one.route != other.route
    ]
