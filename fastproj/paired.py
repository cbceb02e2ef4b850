"""Timing by paired rounds: ratios that hold on a noisy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Median seconds of one contender, and the median over rounds of its ratio to the first one's time."""

    seconds: float
    ratio: float


def paired_rounds(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Run every contender once a round, in an order that turns by one from round to round.

    The runs of a round lie close together, so that what else the machine does hits all alike; ratios are
    taken round by round against the first contender. Waits for the GPU where there is one.

    Raises ValueError where there is no contender or no round.
    """
    if not contenders or rounds < 1:
        raise ValueError(
            f"expected a contender and a round at least, got {list(contenders)} and {rounds} rounds"
        )
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = _now()
            contenders[name]()
            seconds = _now() - began
            if number >= warmup:
                times[name].append(seconds)
    first = times[names[0]]
    return {
        name: Timing(median(own), median(map(float.__truediv__, own, first))) for name, own in times.items()
    }


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
