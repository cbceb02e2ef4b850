"""What AdamW's step along a combination is tried on, and the ways to take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from span_inputs import Family, device_of, function_of, moved, random_sets, strided
from torch import Tensor

import fastproj
from fastproj.reference.projected_adamw import projected_adamw

LORA = ((16, 96), (80, 16), (24,))
OPTIONS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
State = list[list[Tensor]]


def random_state(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], seed: int = 5, scale: float = 1.0
) -> State:
    """p, m and v; squares around one, so that a step magnifies no rounding."""
    params, exp_avgs, squares = random_sets(3, shapes, dtypes, seed=seed, scale=scale)
    return [params, exp_avgs, [square.square() + scale * scale for square in squares]]


def counts_of(state: State) -> list[Tensor]:
    """Every parameter at a step of its own."""
    return [torch.tensor(float(1 + 7 * i)) for i in range(len(state[0]))]


def run(
    path: str, family: Family, coefficients: Tensor, state: State, steps: list[Tensor], **options: Any
) -> State:
    """p, m and v after the step by one of PATHS, back on the CPU."""
    options = {**OPTIONS, **options}
    sets = [moved(own, path) for own in family.sets]
    # Copies, strided where the state is.
    here = [[t.clone() if t.is_contiguous() else strided([t])[0] for t in moved(own, path)] for own in state]
    coefficients, steps = coefficients.to(device_of(path)), moved(steps, path)
    if path == "public":
        fastproj.projected_adamw_(sets, coefficients, *here, steps, segments=family.segments, **options)
    else:
        lr = torch.tensor(options["lr"], dtype=torch.float64)
        names = ("beta1", "beta2", "eps", "weight_decay")
        found_inf = options.get("found_inf")
        function_of(path, "projected_adamw")(
            [shard for own in sets for shard in own], coefficients, family.plan.first, family.plan.rows,
            *here, steps, lr, *(options[name] for name in names), found_inf,
        )  # fmt: skip
    return [[tensor.cpu() for tensor in own] for own in here]


def random_coefficients(family: Family, seed: int = 0) -> Tensor:
    """(S, K), a quarter of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(family.plan.count, len(family.sets), generator=generator, dtype=torch.float64)
    return values * (torch.rand(values.shape, generator=generator) > 0.25)


def wanted(family: Family, coefficients: Tensor, state: State, steps: list[Tensor], **options: Any) -> State:
    """What the reference says, in fp64."""
    counts, options = [step.item() for step in steps], {**OPTIONS, **options}
    return [*projected_adamw(family.sets, coefficients, family.plan, *state, counts, **options)]
