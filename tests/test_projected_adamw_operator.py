"""AdamW's step along a combination as people call it: options, torch.compile, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import on_gpu
from span_inputs import Family, device_of, moved, random_sets
from step_inputs import LORA, OPTIONS, counts_of, random_coefficients, random_state, run
from torch import Tensor

import fastproj


@on_gpu
def test_maximize_and_grad_scale() -> None:
    family, state = Family(random_sets(2, LORA), "global"), random_state(LORA, [torch.float32])
    coefficients = random_coefficients(family)
    steps = counts_of(state)
    want = run("public", family, -coefficients, state, steps)
    scaled = Family([[shard * 1024 for shard in own] for own in family.sets], "global")
    scale = torch.tensor([1024.0], device=device_of("public"))
    got = run("public", scaled, coefficients, state, steps, maximize=True, grad_scale=scale)
    for own, expected in zip(got, want, strict=True):
        for value, other in zip(own, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


@on_gpu
def test_a_learning_rate_on_the_device() -> None:
    family, state = Family(random_sets(2, LORA), "global"), random_state(LORA, [torch.float32])
    coefficients, steps = random_coefficients(family), counts_of(state)
    want = run("public", family, coefficients, state, steps, lr=0.25)
    got = run("public", family, coefficients, state, steps, lr=torch.tensor(0.25, device=device_of("public")))
    for own, expected in zip(got, want, strict=True):
        for value, other in zip(own, expected, strict=True):
            assert torch.equal(value, other)


def test_missing_shards() -> None:
    one = torch.ones(2)
    state = [[None, torch.ones(2)], [None, torch.zeros(2)], [None, torch.zeros(2)]]
    ones = torch.ones(1, 1, dtype=torch.float64)
    fastproj.projected_adamw_([[None, one]], ones, *state, [None, torch.ones(())], lr=0.5, weight_decay=0.0)
    assert state[0][1].tolist() == pytest.approx([0.5, 0.5])
    fastproj.projected_adamw_([[None]], ones, [None], [None], [None], [None], lr=0.5)


def arguments(device: torch.device) -> tuple[Any, ...]:
    """Those of the operator, for two shards by rows."""
    sets, state = random_sets(2, [(3, 2), (4,)]), random_state([(3, 2), (4,)], [torch.float32])
    flat = [shard.to(device) for own in sets for shard in own]
    here = [[tensor.to(device) for tensor in own] for own in state]
    steps = [torch.ones((), device=device) for _ in range(2)]
    coefficients = torch.ones(4, 2, dtype=torch.float64, device=device)
    lr = torch.tensor(0.1, dtype=torch.float64)
    return (flat, coefficients, [0, 3], True, *here, steps, lr, 0.9, 0.99, 1e-8, 0.1, False, None, None)


@on_gpu
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastproj.projected_adamw_.default, arguments(device_of("public")))


@on_gpu
def test_compiles_without_graph_break() -> None:
    family, state = Family(random_sets(2, LORA), "global"), random_state(LORA, [torch.float32])
    coefficients, steps = random_coefficients(family), counts_of(state)
    want = run("public", family, coefficients, state, steps)
    sets, here = [moved(own, "public") for own in family.sets], [moved(own, "public") for own in state]
    given, counts = coefficients.to(device_of("public")), moved(steps, "public")

    def step(p: list[Tensor], m: list[Tensor], v: list[Tensor]) -> None:
        fastproj.projected_adamw_(sets, given, p, m, v, counts, **OPTIONS)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*here)
    for own, expected in zip(here, want, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(own, expected, strict=True))


def good() -> dict[str, Any]:
    """Arguments of which each test spoils one."""
    p, m, v, g = torch.ones(4, 2).unbind()
    return {
        "sets": [[g]], "coefficients": torch.ones(1, 1), "params": [p], "exp_avgs": [m], "exp_avg_sqs": [v],
        "steps": [torch.ones(())], "lr": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be in \[0, inf\), got -1"),
        ({"lr": float("nan")}, ValueError, "lr must be in"),
        ({"lr": "1"}, TypeError, "lr must be a number, got str"),
        ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
        ({"lr": torch.ones(1, dtype=torch.int32)}, TypeError, "lr must be a floating-point tensor"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1"),
        ({"beta2": True}, TypeError, "beta2 must be a number, got bool"),
        ({"eps": -1e-8}, ValueError, "eps must be in"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be in"),
        ({"grad_scale": 2.0}, TypeError, "grad_scale must be a floating-point tensor, got float"),
        ({"found_inf": torch.ones(2)}, ValueError, "found_inf must have one element"),
        ({"coefficients": torch.ones(1, 2)}, ValueError, r"\(1, 1\), got \(1, 2\)"),
        ({"params": []}, ValueError, "params must have one tensor per shard: expected 1, got 0"),
        ({"params": [None]}, TypeError, r"params\[0\] must be a tensor"),
        ({"params": torch.ones(2)}, TypeError, "params must be a list of tensors, got Tensor"),
        ({"exp_avgs": [torch.ones(3)]}, ValueError, r"exp_avgs\[0\] must be \(2,\)"),
        ({"exp_avgs": [torch.ones(2, device="meta")]}, ValueError, "on meta"),
        ({"exp_avg_sqs": [torch.ones(2, dtype=torch.int64)]}, TypeError, r"exp_avg_sqs\[0\] must be dense"),
        ({"steps": [torch.ones((), dtype=torch.int64)]}, TypeError, r"steps\[0\] must be fp32"),
        ({"steps": [torch.ones(2)]}, ValueError, r"steps\[0\] must be one number"),
        ({"sets": [[torch.ones(2, dtype=torch.int32)]]}, TypeError, "int32"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fastproj.projected_adamw_(**{**good(), **options})


def test_what_is_written_stands_alone() -> None:
    given = good()
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] shares memory with params\[0\]; both are written"):
        fastproj.projected_adamw_(**{**given, "exp_avgs": given["params"]})
    with pytest.raises(
        ValueError, match=r"shard 0 of set 0 shares memory with params\[0\], which is written"
    ):
        fastproj.projected_adamw_(**{**given, "sets": [given["params"]]})
