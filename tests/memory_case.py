"""A launcher's call under the memory checker, and where its inputs lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from memory_checker import Guards, Observation, checked
from span_inputs import random_sets
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where inputs lie: elements off their alignment (each ``every``-th of them), elements between rows."""

    name: str
    offset: int = 0
    every: int = 1
    gap: int = 0

    def place(self, tensors: Sequence[Tensor], guards: Guards) -> list[Tensor]:
        return [
            guards.place(tensor, offset=self.offset if i % self.every == 0 else 0, gap=self.gap)
            for i, tensor in enumerate(tensors)
        ]


ALIGNED, UNALIGNED = Layout("aligned"), Layout("unaligned", offset=1)
LAYOUTS = (ALIGNED, UNALIGNED, Layout("every third unaligned", offset=1, every=3), Layout("gaps", gap=5))


@dataclass(frozen=True, eq=False)
class Case:
    """A launcher's call over inputs: its results, among them what it wrote in place."""

    name: str
    inputs: Callable[[], list[Tensor]]
    run: Callable[[list[Tensor]], list[Tensor]]
    layout: Layout

    def __str__(self) -> str:
        return f"{self.name}-{self.layout.name}".replace(" ", "_")


@dataclass(frozen=True)
class Outcome:
    """The results over plain tensors and over guarded ones, and what the checker saw of the latter.

    Both lie alike, as sums of aligned tensors take an order of their own.
    """

    plain: list[Tensor]
    guarded: list[Tensor]
    seen: Observation


@cache
def outcome(case: Case) -> Outcome:
    """Run once over fresh tensors and once under the checker; both files of tests read it."""
    plain = case.run(case.layout.place(case.inputs(), Guards(poisoned=False)))
    guards = Guards()
    placed = case.layout.place(case.inputs(), guards)
    guarded, seen = checked(lambda: case.run(placed), placed, guards)
    return Outcome(plain, guarded, seen)


def sets_of(num_sets: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [shard for shards in random_sets(num_sets, shapes, dtypes) for shard in shards]


def with_outputs(
    num_sets: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """The sets, and outputs of NaN for them: an element that nobody writes shows."""
    sets = sets_of(num_sets, shapes, dtypes)
    return sets + [torch.full_like(shard, torch.nan) for shard in sets[: len(shapes)]]
