"""A thing to time: what it is, the traffic of one call, and the check to pass before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.bench.harness.clock import Subject
from fastproj.bench.traffic.moves import DTYPES, Traffic
from fastproj.bench.workloads import Shape

# fp32 sums over blocks of thousands of products; a coefficient, two or three products and their sum.
SUMMED, ROUNDED = 1e-5, 8 * torch.finfo(torch.float32).eps
CHECKED_SAMPLES, CHECKED_SHARDS = 3, 4


class WrongResultError(RuntimeError):
    """A timed call does not give what the reference gives."""


@dataclass(frozen=True)
class Case:
    """One row to come: what to time, the traffic of one call, and the check to pass before."""

    suite: str
    workload: str
    part: str
    dtype: str
    traffic: Traffic
    subject: Subject
    check: Callable[[], None]


def gradients(shapes: Sequence[Shape], dtype: str, seed: int, device: str) -> list[Tensor]:
    """One gradient set of standard normal values, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=device, dtype=DTYPES[dtype]) for s in shapes]


def require_close(suite: str, got: Sequence[Tensor], want: Sequence[Tensor], allowed: float | Tensor) -> None:
    """Raises WrongResultError where a value is further from the reference than ``allowed``, or is NaN."""
    for index, (value, expected) in enumerate(zip(got, want, strict=True)):
        off = (value.double().cpu() - expected).abs()
        if not bool((off <= allowed).all()):
            raise WrongResultError(
                f"{suite}: result {index} is off by {off.max().item():.3g} from the fp64 reference: not timed"
            )
