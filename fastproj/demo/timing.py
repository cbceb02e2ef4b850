"""What a step of each method costs, measured side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from fastproj.demo.encoding import Encoded, training_batches
from fastproj.demo.methods import Method, attach


@dataclass(frozen=True)
class StepCost:
    """Median seconds of a step, and the median over rounds of its ratio to the first method's step."""

    seconds: float
    ratio: float


def step_costs(
    models: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    samples: Encoded,
    *,
    batch_size: int = 32,
    rounds: int = 15,
    warmup: int = 2,
) -> dict[str, StepCost]:
    """Time forward, backward and projection of each method: in every round each takes one step on one batch.

    Methods of a round meet the same batch within seconds of each other, so what else the machine does hits
    all alike, and ratios are taken round by round. The order is turned by one from round to round. The
    optimiser, the same for all, is left out, which makes the ratios larger than a user would see.

    Args:
        models: one model per method, alike in everything.
        methods: the first is what ratios refer to.
        samples: to draw batches from.
        batch_size: of a step.
        rounds: measured.
        warmup: rounds before the first measured one.

    Raises:
        ValueError: ``models`` and ``methods`` have different names, or there is no round.
    """
    if models.keys() != methods.keys() or rounds < 1:
        raise ValueError(
            f"step_costs: expected one model per method and at least one round, "
            f"got models {list(models)}, methods {list(methods)}, rounds {rounds}"
        )
    names = list(methods)
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        steps = {name: stack.enter_context(attach(models[name], methods[name])) for name in names}
        batches = training_batches(samples.lengths, batch_size, warmup + rounds, seed=0)
        for number, index in enumerate(batches):
            batch, labels = samples.batch(index)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = _now()
                steps[name](batch, labels)
                seconds = _now() - began
                models[name].zero_grad()
                if number >= warmup:
                    times[name].append(seconds)
    return {name: _cost(times[name], times[names[0]]) for name in names}


def _cost(seconds: list[float], reference: list[float]) -> StepCost:
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    return StepCost(_median(seconds), _median(ratios))


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
