"""One fine-tune, done over in the ways that are compared: GRASP's modes and what else takes a factor out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import FineTuneConfig, fine_tune
from fastproj.latent.factors import LatentFactors, Side
from fastproj.methods.ablation import Ablation, Steering, remove
from fastproj.methods.grasp import GRASP, Mode

MODES: dict[str, Mode] = {"read": "read", "write": "write", "stream": "stream"}
# What a method trains with, or does to the naive fine-tune instead.
TRAINED = ("plain", *MODES, "ablate")
AFTERWARDS = ("remove", "steer")
METHODS = (*TRAINED, *AFTERWARDS)


def side_of(method: str) -> Side:
    """The side that a method's directions must be found on."""
    return "read" if method == "read" else "write"


@dataclass(frozen=True)
class Trained:
    """What a fine-tune did: losses by step, seconds, and the constraint's violation where there was one."""

    losses: tuple[float, ...]
    seconds: float
    violation: float | None


def train(
    method: str,
    model: nn.Module,
    tokenizer: Any,
    records: Records,
    config: FineTuneConfig,
    factors: Mapping[Side, LatentFactors],
    on_step: Callable[[int, int, float], None] | None = None,
) -> Trained:
    """Fine-tune the model's new adapter: ``"plain"``, in one of GRASP's modes, or ``"ablate"``, with the
    directions out of the residual stream while it trains (concept ablation fine-tuning).

    ``factors`` are by side. Raises ValueError for another method, and what :class:`fastproj.GRASP` and
    :class:`fastproj.methods.ablation.Ablation` refuse.
    """
    if method not in TRAINED:
        raise ValueError(f"method: expected one of {', '.join(TRAINED)}, got {method!r}")
    grasp = GRASP(model, factors[side_of(method)], MODES[method]) if method in MODES else None
    around: AbstractContextManager[Any] = grasp or nullcontext()
    if method == "ablate":
        around = Ablation(model, factors["write"])
    began = time.perf_counter()
    with around:
        hold = None if grasp is None else grasp.hold
        done = fine_tune(model, tokenizer, records, config, on_step=on_step, hold=hold)
    seconds = time.perf_counter() - began
    return Trained(done.losses, seconds, None if grasp is None else grasp.violation())


@contextmanager
def afterwards(
    method: str, model: nn.Module, factors: Mapping[Side, LatentFactors], strength: float
) -> Iterator[nn.Module]:
    """The naive fine-tune with ``"remove"``, its adapter without the directions (for good), or ``"steer"``, a
    push of ``strength`` along the first of them at every block while the context lasts.

    Raises ValueError for another method.
    """
    if method == "remove":
        remove(model, factors["write"])
        yield model
    elif method == "steer":
        with Steering(model, factors["write"], strength):
            yield model
    else:
        raise ValueError(f"method: expected one of {', '.join(AFTERWARDS)}, got {method!r}")
