"""Adam's update direction: what torch's own optimiser does, LESS's variant, slopes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.reference.adam import AdamState, adam_slope, adam_update

VARIANTS = pytest.mark.parametrize("variant", ["adam", "less"])


def state(shape: tuple[int, ...], variant: Any = "adam", seed: int = 0, **others: Any) -> AdamState:
    generator = torch.Generator().manual_seed(seed)
    exp_avg = torch.randn(shape, generator=generator, dtype=torch.float64) / 10
    exp_avg_sq = torch.rand(shape, generator=generator, dtype=torch.float64) / 10
    return AdamState(
        **({"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": 3, "variant": variant} | others)
    )


def gradient(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    steps=st.integers(0, 4),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.0, 0.95, 0.999]),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_update_is_the_step_that_torch_takes(steps: int, beta1: float, beta2: float, eps: float) -> None:
    parameter = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(beta1, beta2), eps=eps)
    for seed in range(steps):
        parameter.grad = gradient(3, 4, seed=seed)
        optimizer.step()
    own = optimizer.state[parameter]
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    # Copies: torch updates its moments in place.
    m, v = (own.get(name, zeros).clone() for name in ("exp_avg", "exp_avg_sq"))
    before, parameter.grad = parameter.detach().clone(), gradient(3, 4, seed=99)
    optimizer.step()
    got = adam_update(parameter.grad, AdamState(m, v, steps, beta1, beta2, eps))
    # A subtraction of parameters near 5 loses a digit; two roots and quotients beside it, fp64.
    torch.testing.assert_close(got, before - parameter.detach(), rtol=1e-12, atol=1e-13)


def test_less_has_epsilon_in_the_root_and_corrects_nothing() -> None:
    adam = AdamState(torch.tensor([2.0]), torch.tensor([0.0]), 7, 0.5, 0.75, 3 / 16, "less")
    # m = ½·2 + ½·½ = 1¼ and v = ¼·¼ = 1/16, so that the root of v + ε is ½.
    assert adam_update(torch.tensor([0.5]), adam).item() == 2.5


@VARIANTS
def test_leading_axes_are_samples(variant: str) -> None:
    adam, gradients = state((2, 3), variant), gradient(4, 5, 2, 3)
    together = adam_update(gradients, adam)
    assert together.shape == gradients.shape
    for i in range(4):
        for j in range(5):
            assert torch.equal(together[i, j], adam_update(gradients[i, j], adam))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_the_gradients(dtype: torch.dtype) -> None:
    assert adam_update(gradient(2, 3).to(dtype), state((2, 3))).dtype == dtype


def test_nothing_seen_and_no_gradient_is_no_update() -> None:
    zeros = torch.zeros(2, 3)
    assert torch.equal(adam_update(zeros, AdamState(zeros, zeros, 0)), zeros)
    # 0/0, as torch's optimiser has it.
    assert adam_update(zeros, AdamState(zeros, zeros, 0, eps=0.0)).isnan().all()


@VARIANTS
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_slope_is_the_derivative(variant: str, step: int) -> None:
    adam, at = state((3, 4), variant, step=step), gradient(2, 3, 4).requires_grad_()
    (want,) = torch.autograd.grad(adam_update(at, adam).sum(), at)
    # The same few operations in another order, fp64.
    torch.testing.assert_close(adam_slope(at, adam), want, rtol=1e-12, atol=1e-13)


@VARIANTS
def test_slope_where_nothing_was_seen(variant: str) -> None:
    zeros = torch.zeros(1, dtype=torch.float64)
    slope = adam_slope(zeros, AdamState(zeros, zeros, 0, eps=0.25, variant=variant))  # type: ignore[arg-type]
    # m̂ = g on the first step: g/ε near 0; "less" has (1 − β1) g / √ε.
    assert slope.item() == pytest.approx(4.0 if variant == "adam" else 0.1 / 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg": [1.0]}, TypeError, "exp_avg must be a tensor, got list"),
        ({"exp_avg_sq": None}, TypeError, "exp_avg_sq must be a tensor, got NoneType"),
        ({"exp_avg": torch.zeros(3, 2)}, ValueError, r"one shape.* got \(3, 2\) and \(2, 3\)"),
        ({"step": torch.tensor(3)}, TypeError, r"step must be an int.*tensor\(3\)"),
        ({"step": True}, TypeError, "step must be an int.*True"),
        ({"step": -1}, ValueError, "step must be 0 or more.*-1"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, ValueError, r"beta2 must be in \[0, 1\), got -0.1"),
        ({"beta2": float("nan")}, ValueError, "beta2 must be in"),
        ({"eps": -1e-8}, ValueError, "eps must be 0 or more, got -1e-08"),
        ({"eps": float("nan")}, ValueError, "eps must be 0 or more, got nan"),
        ({"variant": "adamw"}, ValueError, r"variant must be one of \('adam', 'less'\), got 'adamw'"),
    ],
)
def test_bad_states_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        state((2, 3), **change)


@pytest.mark.parametrize("shape", [(3, 2), (3,), (2, 4)])
def test_gradients_of_another_parameter_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(…, \*\(2, 3\)\), got"):
        adam_update(gradient(*shape), state((2, 3)))


def test_public_name() -> None:
    assert fastproj.AdamState is AdamState
