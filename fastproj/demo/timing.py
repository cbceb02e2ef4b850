"""What a step of each method costs, measured side by side in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from fastproj.demo.encoding import Encoded, training_batches
from fastproj.demo.methods import Method, Step, attach
from fastproj.paired import Timing, paired_rounds


def step_costs(
    models: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    samples: Encoded,
    *,
    batch_size: int = 32,
    rounds: int = 15,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time forward, backward and projection of each method: in every round each takes one step on one batch.

    The optimiser, the same for all, is left out, which makes the ratios larger than a user would see.

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
    with ExitStack() as stack:
        contenders = {}
        for name, method in methods.items():
            batches = training_batches(samples.lengths, batch_size, warmup + rounds, seed=0)
            step = stack.enter_context(attach(models[name], method))
            contenders[name] = _contender(models[name], step, map(samples.batch, batches))
        return paired_rounds(contenders, rounds=rounds, warmup=warmup)


def _contender(model: nn.Module, step: Step, batches: Iterator[tuple[Any, Any]]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        step(*next(batches))

    return run
