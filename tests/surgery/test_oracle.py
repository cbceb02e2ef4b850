"""Every method against its reference, which works on the vectors themselves."""

from __future__ import annotations

import pytest
import torch
from surgery_families import INDEPENDENT, combined, families, methods, normal, round_robin
from torch import Tensor

from fastproj.reference import surgery as reference
from fastproj.surgery import IMTLG, CAGrad, GradVac, PCGrad

SIZES = (1, 2, 3, 4)
CASES = [(size, name) for size in SIZES for name in methods(size)]
# What a method's reference has no answer to, or has not one answer alone.
UNDEFINED = {
    "IMTLG": {"opposite", "equal", "one zero", "rank 1", "rank 2", "zero", "1e-15 and 1e15", "conflicting"},
    "NashMTL": {"opposite", "equal", "one zero", "rank 1", "rank 2", "zero", "conflicting", "1e-15 and 1e15"},
    "CAGrad": {"1e-15 and 1e15"},
}


def largest(gradients: Tensor) -> float:
    return float(gradients.norm(dim=1).max())


@pytest.mark.parametrize(("size", "name"), CASES)
def test_agrees_with_the_vectors(size: int, name: str) -> None:
    for kind, gradients in families(size).items():
        if size > 1 and kind in UNDEFINED.get(name, ()):
            continue
        if name == "NashMTL" and kind == "zero":
            continue
        method, oracle = methods(size)[name]
        got, want = combined(method, gradients), oracle(gradients)
        # A Gram matrix in fp64 knows angles to 1e-16, lengths that cancel to its square root; the reference's
        # own slack is 1e-9 of the gradients. The bargaining solution is no longer or shorter than √K.
        scale = size**0.5 if name == "NashMTL" else largest(gradients)
        assert (got - want).norm() <= (1e-6 if name == "CAGrad" else 1e-8) * scale, kind


@pytest.mark.parametrize("size", [2, 3])
def test_imtl_g_projects_equally(size: int) -> None:
    for kind in (*INDEPENDENT, "1e-15 and 1e15"):
        gradients = families(size)[kind]
        out = combined(IMTLG(), gradients)
        cosines = gradients @ out / (gradients.norm(dim=1) * out.norm())
        # The condition number of these cosines is below 10.
        torch.testing.assert_close(cosines, cosines[:1].expand(size), rtol=1e-12, atol=1e-14)


def test_imtl_g_of_opposite_gradients_is_zero() -> None:
    gradients = normal(1)
    assert not combined(IMTLG(), torch.cat([gradients, -3 * gradients])).any()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.5])
def test_cagrad_reaches_the_best_value_in_its_ball(size: int, c: float) -> None:
    """Where several directions are optimal their value is still one."""
    for kind, gradients in families(size).items():
        if kind == "1e-15 and 1e15":  # the reference's slack is above the smallest gradient's products
            continue
        got, want, mean = combined(CAGrad(c), gradients), reference.cagrad(gradients, c), gradients.mean(0)
        scale = largest(gradients) * float(mean.norm())
        assert (gradients @ got).min() >= (gradients @ want).min() - 1e-7 * scale, kind
        # Lengths of combinations are known to the square root of fp64's rounding.
        assert (got - mean).norm() <= c * mean.norm() * (1 + 1e-7) + 1e-7 * largest(gradients), kind


def test_cagrad_on_scales_far_apart_is_better_than_its_mean() -> None:
    gradients = families(3)["1e-15 and 1e15"]
    mean, out = gradients.mean(0), combined(CAGrad(0.5), gradients)
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    assert (out - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-9)
    assert float(unit[-1] @ out) > float(unit[-1] @ mean)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_gradvac_learns_its_targets_step_by_step(size: int) -> None:
    method, order = GradVac(beta=0.3, order=round_robin(size)), round_robin(size)
    targets = torch.zeros(size, size, dtype=torch.float64)
    for step in range(6):
        gradients = normal(size, 6, step) + 0.5
        want, targets = reference.gradvac(gradients, targets, 0.3, order)
        got = combined(method, gradients)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)  # thirty products of order 1 at most
        torch.testing.assert_close(method.targets.values, targets[None], rtol=1e-10, atol=1e-10)


def test_gradvac_brings_the_cosine_to_its_target() -> None:
    gradients = normal(2)
    method = GradVac(beta=0.0, order=[[1], [0]])
    method.targets.values = torch.full((1, 2, 2), 0.6, dtype=torch.float64)
    first, second = gradients
    one = combined(method, gradients)
    turned = one - (reference.gradvac(gradients, method.targets.values[0], 0.0, [[1], [0]])[0] - one)
    assert torch.equal(method.targets.values, torch.full((1, 2, 2), 0.6, dtype=torch.float64))
    h = reference.gradvac(torch.stack([first, second]), method.targets.values[0], 0.0, [[1], []])[0] - second
    assert abs(float(h @ second / (h.norm() * second.norm())) - 0.6) < 1e-12
    torch.testing.assert_close(turned, one, rtol=1e-10, atol=1e-10)


def test_pcgrad_depends_on_the_order_of_more_than_two_tasks() -> None:
    gradients = families(3)["conflicting"]
    forward, backward = [[1, 2], [2, 0], [0, 1]], [[2, 1], [0, 2], [1, 0]]
    one, other = (combined(PCGrad(order=o), gradients) for o in (forward, backward))
    assert (one - other).norm() > 1e-3 * one.norm()
    pair = families(2)["conflicting"]
    assert torch.equal(combined(PCGrad(), pair), combined(PCGrad(order=[[1], [0]]), pair))
