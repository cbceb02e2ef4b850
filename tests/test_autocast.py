"""Autocast is for a model's products: operators give the same under it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.bindings import OPERATORS


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def stepped() -> list[Tensor]:
    """Parameters and moments after a step of AdamW."""
    p, m, v = drawn(30, 4, seed=3), drawn(30, 4, seed=4), drawn(30, 4, seed=5).square()
    sets, steps = [[drawn(30, 4)], [drawn(30, 4, seed=1)]], [torch.tensor(3.0)]
    fastproj.projected_adamw_(sets, torch.full((30, 2), 0.3), [p], [m], [v], steps, lr=0.1, segments="row")
    return [p, m, v]


X, DELTA = drawn(4, 9, 30), drawn(4, 9, 20, seed=1)
SETS = [[drawn(300, 40)], [drawn(300, 40, seed=1)]]
CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "gram": lambda: [fastproj.gram(SETS, segments="row")],
    "combine": lambda: fastproj.combine(SETS, torch.full((300, 2), 0.3), segments="row"),
    "edge": lambda: fastproj.edge(*SETS, segments="row"),
    "project_out": lambda: fastproj.project_out(
        SETS[0], fastproj.orthonormalize(drawn(40, 2, seed=2)), side="right"
    ),
    "weighted_grad": lambda: [fastproj.weighted_grad(X, DELTA, torch.full((2, 4), 0.3))],
    "per_sample_grad": lambda: [fastproj.per_sample_grad(X, DELTA)],
    "per_sample_influence": lambda: [*fastproj.per_sample_influence(X, DELTA, drawn(2, 20, 30, seed=2))],
    "sketch": lambda: [fastproj.sketch([drawn(4, 500)], 64, seed=0, kind="srht")],
    "cross_entropy": lambda: [fastproj.cross_entropy(drawn(4, 9), torch.arange(4)).losses],
    "balance_loss": lambda: [*fastproj.balance_loss(drawn(4, 9), torch.arange(4))],
    "projected_adamw": stepped,
}


def test_every_operator_is_called() -> None:
    assert set(CALLS) == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_changes_no_result(operator: str) -> None:
    plain = CALLS[operator]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = CALLS[operator]()
    for value, expected in zip(under, plain, strict=True):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
