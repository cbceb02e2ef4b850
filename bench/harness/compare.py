"""Two measurements side by side: ratios, and whether they stand out of the spread."""

from __future__ import annotations

from dataclasses import dataclass

from fastproj.bench.harness.record import Record, Row

# What has to agree for a ratio to speak of the code alone.
SAME = (
    *("device", "capability", "driver", "power_limit_watts"),
    *("cuda", "rocm", "torch", "triton", "python", "threads"),
)
# And in how a row was timed.
SAME_TIMING = ("route", "cache", "copies")
# Quartiles of fewer rounds lie on top of each other, and any difference would stand out of them.
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """Seconds of ``after`` over those of ``before``, and a verdict.

    "slower", "faster", "within noise" where the quartile ranges meet, or "too few rounds" to tell.
    """

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

    @property
    def unjudged(self) -> tuple[Ratio, ...]:
        """The ratios of rows with too few rounds."""
        return tuple(ratio for ratio in self.ratios if ratio.verdict == "too few rounds")


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
        (*_differences(before, after), *_other_timings([(first[key], second[key]) for key in common])),
    )


def ratio_of(before: Row, after: Row) -> Ratio:
    """The ratio of medians, and the verdict from the quartiles.

    These hold what a run saw of the machine; load that came between two runs is in neither.
    """
    if min(before.rounds, after.rounds) < LEAST_ROUNDS:
        verdict = "too few rounds"
    elif after.low > before.high:
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


def _other_timings(pairs: list[tuple[Row, Row]]) -> list[str]:
    """Rows that were not timed in the same way."""
    return [
        f"{one.name}: timed with {name} {getattr(one, name)} and with {name} {getattr(other, name)}"
        for one, other in pairs
        for name in SAME_TIMING
        if getattr(one, name) != getattr(other, name)
    ]
