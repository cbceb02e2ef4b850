"""What one backward pass leaves, against what two plain ones give."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import Tiny, two_pass_oracle
from torch import Tensor

import fastproj
from fastproj.capture.select import select_parameters

# Both routes add the same fp64 products in another order: some thousands of roundings of 1.1e-16.
TOLERANCE = 1e-12


def captured(engine: fastproj.EDGE) -> dict[str, tuple[Tensor, Tensor]]:
    """(e, g) that the backward passes so far have left."""
    found = {}
    for name, parameter in engine._parameters.items():
        weighted = engine._second_set.get(parameter)
        assert (parameter.grad is None) == (weighted is None)
        if parameter.grad is not None and weighted is not None:
            found[name] = (parameter.grad.clone(), weighted.clone())
    return found


def assert_same(
    got: dict[str, tuple[Tensor, Tensor]],
    expected: dict[str, tuple[Tensor, Tensor]],
    tolerance: float = TOLERANCE,
) -> None:
    assert got.keys() == expected.keys()
    assert got
    for name, pair in expected.items():
        for mine, theirs in zip(got[name], pair, strict=True):
            assert theirs.abs().max() > 0, name
            error = (mine - theirs).abs().max() / theirs.abs().max()
            assert error <= tolerance, f"{name}: {error:.1e}"


def one_pass(tiny: Tiny, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    tiny.model.zero_grad()
    with fastproj.EDGE(tiny.model, **options) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        return captured(engine)


def assert_equal_to_two_passes(tiny: Tiny, params: str = "lora", tolerance: float = TOLERANCE) -> None:
    torch.manual_seed(9)
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, params))
    torch.manual_seed(9)
    assert_same(one_pass(tiny, params=params), expected, tolerance)
