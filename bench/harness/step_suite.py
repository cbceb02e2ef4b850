"""AdamW's step along a combination, timed as the operators of ``suites`` are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastproj
from fastproj.bench.harness.case import CHECKED_SHARDS, ROUNDED, Case, gradients, require_close
from fastproj.bench.harness.clock import Subject
from fastproj.bench.traffic.models import OPERATORS as MODELS
from fastproj.bench.traffic.moves import DTYPES
from fastproj.bench.traffic.projected_adamw import STATE
from fastproj.bench.traffic.workloads import Workload
from fastproj.bench.workloads import Shape
from fastproj.reference.projected_adamw import projected_adamw
from fastproj.reference.segments import segmentation

# A step moves a parameter by about the learning rate: repeated 1e5 times, it stays far from overflow.
RATE = 1e-4


@dataclass(frozen=True)
class StepCall:
    """A step on tensors of its own, in place: p, m and v; calling it returns them."""

    sets: list[list[Tensor]]
    coefficients: Tensor
    state: list[list[Tensor]]
    steps: list[Tensor]

    def __call__(self) -> list[Tensor]:
        params, exp_avgs, exp_avg_sqs = self.state
        fastproj.projected_adamw_(
            self.sets, self.coefficients, params, exp_avgs, exp_avg_sqs, self.steps, lr=RATE
        )
        return [tensor for own in self.state for tensor in own]

    def want(self) -> list[Tensor]:
        """What calling it is to give, from copies in fp64."""
        exact = [[tensor.double().cpu() for tensor in own] for own in (*self.sets, *self.state)]
        *sets, params, exp_avgs, exp_avg_sqs = exact
        plan, counts = segmentation(params, "global"), [step.item() for step in self.steps]
        stepped = projected_adamw(
            sets, self.coefficients.cpu(), plan, params, exp_avgs, exp_avg_sqs, counts, lr=RATE
        )
        return [tensor for own in stepped for tensor in own]


def step_case(workload: Workload, device: str) -> Case:
    """A whole workload's shards in one call, at the tenth step."""

    def prepare(shapes: Sequence[Shape], seed: int) -> StepCall:
        lists = workload.sets + STATE
        made = [gradients(shapes, workload.dtype, lists * seed + k, device) for k in range(lists)]
        sets, state = made[: workload.sets], made[workload.sets :]
        for square in state[-1]:
            square.abs_()
        values = [1.5, -0.5, *([0.25] * (workload.sets - 2))]
        coefficients = torch.tensor([values], dtype=torch.float64, device=device)
        return StepCall(sets, coefficients, state, [torch.full((), 10.0, device=device) for _ in shapes])

    def check() -> None:
        subject = prepare(workload.shards[:CHECKED_SHARDS], 0)
        want = subject.want()
        # A few roundings of values of order one, m and v among them, for one of p of the same order.
        largest = max(tensor.abs().max().item() for tensor in want)
        require_close("projected_adamw", subject(), want, ROUNDED * largest)

    touched = DTYPES[workload.dtype].itemsize * workload.elements * (workload.sets + STATE)
    touched += sum(torch.float32.itemsize for _ in workload.shards)
    traffic = MODELS["projected_adamw"](workload)
    subject = Subject(lambda seed: prepare(workload.shards, seed), touched, touched, traffic.launches)
    return Case("projected_adamw", workload.name, "", workload.dtype, traffic, subject, check)
