"""Properties that the methods claim, on every family; those that they do not have, by an example."""

from __future__ import annotations

import pytest
import torch
from surgery_families import INDEPENDENT, combined, families, gram_of, methods, normal, round_robin
from torch import Tensor

from fastproj.surgery import (
    AGEM,
    GEM,
    IGEM,
    IMTLG,
    MGDA,
    OGD,
    CAGrad,
    DualProj,
    GradVac,
    Method,
    NashMTL,
    PCGrad,
    SafeGrad,
    UPGrad,
)

SIZES = (1, 2, 3, 8)
# Of the products of unit gradients with a combination whose size is that of the largest gradient: the square
# root of fp64's rounding where combinations cancel.
SLACK = 1e-7


def largest(gradients: Tensor) -> float:
    return float(gradients.norm(dim=1).max())


def units(gradients: Tensor) -> Tensor:
    return gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-300)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "method", [UPGrad(), DualProj(), MGDA(), CAGrad(1.5)], ids=lambda m: type(m).__name__
)
def test_non_conflicting(method: Method, size: int) -> None:
    for kind, gradients in families(size).items():
        out = combined(method, gradients)
        assert (units(gradients) @ out >= -SLACK * largest(gradients)).all(), kind


def test_what_makes_no_such_claim_conflicts() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [-1.0, -0.4]], dtype=torch.float64)
    for method in (PCGrad(order=round_robin(3)), CAGrad(0.1), IMTLG()):
        assert (gradients @ combined(method, gradients)).min() < -0.01, method


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(
    "method",
    [UPGrad(), DualProj(), MGDA(), CAGrad(), NashMTL(), IMTLG(), GradVac, PCGrad],
    ids=lambda m: getattr(m, "__name__", type(m).__name__),
)
def test_permutation_invariant(method: Method | type[Method], size: int) -> None:
    """PCGrad and GradVac are, once their orders are renamed with the tasks."""
    shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    order = round_robin(size)
    place = {task: new for new, task in enumerate(shuffle)}
    renamed = [[place[j] for j in order[task]] for task in shuffle]
    for kind, gradients in families(size).items():
        if kind == "1e-15 and 1e15" and isinstance(method, CAGrad):
            continue  # its values then differ by 1e-30 of the largest
        one, other = (
            (method(order=order), method(order=renamed)) if isinstance(method, type) else (method,) * 2
        )
        scale = size**0.5 if isinstance(method, NashMTL) else largest(gradients)
        before, after = combined(one, gradients), combined(other, gradients[shuffle])
        # Pareto-stationary points leave Nash-MTL what the Gram's precision allows, and not one answer.
        slack = 1e-5 if isinstance(method, NashMTL) and kind not in INDEPENDENT else 10 * SLACK
        assert (before - after).norm() <= slack * scale, kind


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_upgrad_is_linear_under_scaling(size: int) -> None:
    """``A(diag(a) G) + A(diag(b) G) = A(diag(a + b) G)`` for positive scales (Quinton & Rey, Section 2.2)."""
    for kind, gradients in families(size).items():
        a, b = normal(1, size, 1)[0].abs()[:, None] + 0.1, normal(1, size, 2)[0].abs()[:, None] + 0.1
        parts = combined(UPGrad(), a * gradients) + combined(UPGrad(), b * gradients)
        whole = combined(UPGrad(), (a + b) * gradients)
        assert (parts - whole).norm() <= SLACK * largest((a + b) * gradients), kind


@pytest.mark.parametrize("method", [DualProj(), MGDA(), CAGrad()], ids=lambda m: type(m).__name__)
def test_others_are_not_linear_under_scaling(method: Method) -> None:
    gradients = families(3)["conflicting"]
    a, b = torch.tensor([[1.0], [2.0], [0.1]]).double(), torch.tensor([[3.0], [0.2], [1.0]]).double()
    parts = combined(method, a * gradients) + combined(method, b * gradients)
    assert (parts - combined(method, (a + b) * gradients)).norm() > 1e-3 * largest(gradients)


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_common_scale_passes_through(size: int, scale: float) -> None:
    """All but Nash-MTL, which it does not touch, and a margin, which is a coefficient of its own."""
    for name, (method, _) in methods(size).items():
        one = combined(method, normal(size))
        if isinstance(method, GradVac):
            method.targets.reset()
        other = combined(method, scale * normal(size))
        expected = one if isinstance(method, NashMTL) else scale * one
        assert (other - expected).norm() <= 1e-9 * expected.norm(), name


def test_nash_mtl_does_not_see_the_scale_of_any_gradient() -> None:
    scales = torch.tensor([[1e-12], [1.0], [1e9]], dtype=torch.float64)
    gradients = normal(3)
    torch.testing.assert_close(
        combined(NashMTL(), scales * gradients), combined(NashMTL(), gradients), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_nash_mtl_meets_its_condition(size: int) -> None:
    for kind in INDEPENDENT:
        gradients = families(size)[kind]
        alpha = NashMTL().coefficients(gram_of(gradients))[0]
        assert (alpha > 0).all()
        products = alpha * (gram_of(gradients)[0] @ alpha)
        # The matrix has 4·K roundings added to its diagonal of 1.
        torch.testing.assert_close(products, torch.ones_like(products), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("method", [UPGrad(), DualProj()], ids=lambda m: type(m).__name__)
def test_strongly_stationary(method: Method, size: int) -> None:
    """Zero only where some positive combination of the gradients is 0: not where one gradient is 0 alone."""
    rows = normal(size)
    rows[-1] = -(torch.arange(1, size, dtype=torch.float64) @ rows[:-1])  # Σ positive · g = 0
    assert combined(method, rows).norm() <= 1e-5 * largest(rows)
    weakly = torch.stack(
        [rows[0], -rows[0], *rows[1:-1]]
    )  # 0 in the hull, but not by positive weights of all
    assert combined(method, weakly).norm() > 1e-2 * largest(rows)


def test_mgda_is_weakly_stationary() -> None:
    rows = normal(3)
    assert combined(MGDA(), torch.stack([rows[0], -rows[0], rows[1]])).norm() <= 1e-8 * largest(rows)
    assert combined(MGDA(), torch.stack([0 * rows[0], rows[1], rows[2]])).norm() == 0


def test_mgda_gives_convex_weights() -> None:
    for size in SIZES:
        for kind, gradients in families(size).items():
            weights = MGDA().coefficients(gram_of(gradients))[0]
            assert (weights >= 0).all(), kind
            assert abs(float(weights.sum()) - 1) < 1e-12, kind


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("method", [GEM(), IGEM(iterations=2000)], ids=lambda m: type(m).__name__)
def test_gem_conflicts_with_no_memory(method: Method, size: int) -> None:
    for kind, gradients in families(size).items():
        if isinstance(method, IGEM) and kind not in (*INDEPENDENT, "conflicting"):
            continue
        out = combined(method, gradients)
        assert (units(gradients[1:]) @ out >= -SLACK * float(gradients[0].norm())).all(), kind


def test_igem_is_closer_to_gem_with_each_step() -> None:
    gradients = families(8)["conflicting"]
    want = combined(GEM(), gradients)
    errors = [float((combined(IGEM(iterations=i), gradients) - want).norm()) for i in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ogd_is_orthogonal_to_all_directions_and_idempotent(size: int) -> None:
    for kind, gradients in families(size).items():
        out = combined(OGD(), gradients)
        assert (units(gradients[1:]) @ out).abs().max() <= SLACK * float(gradients[0].norm()), kind
        again = combined(OGD(), torch.cat([out[None], gradients[1:]]))
        assert (again - out).norm() <= SLACK * float(gradients[0].norm()), kind


@pytest.mark.parametrize("method", [PCGrad(), UPGrad(), AGEM(), GEM(), GEM(2.0), IGEM(), SafeGrad()])
def test_gradients_that_do_not_conflict_are_left_exactly_alone(method: Method) -> None:
    gradients = torch.tensor([[1.0, 0.25], [0.5, 3.0]], dtype=torch.float64)
    coefficients = method.coefficients(gram_of(gradients))[0].tolist()
    wanted = {PCGrad: [1.0, 1.0], UPGrad: [0.5, 0.5]}
    assert coefficients == wanted.get(type(method), [1.0, 0.0])


def test_rounding_in_fp32_leaves_every_method_finite_and_near() -> None:
    """Gram matrices good to 1e-7 only, of dependent gradients: answers are good to their square root."""
    for size in (2, 3):
        for kind, gradients in families(size).items():
            rough = gram_of(gradients).float() if kind not in ("1e-15 and 1e15", "1e15", "1e-15") else None
            for name, (method, _) in methods(size).items():
                if rough is None or (isinstance(method, (NashMTL, IMTLG)) and kind not in INDEPENDENT):
                    continue
                exact = combined(method, gradients)
                if isinstance(method, GradVac):
                    method.targets.reset()
                got = (method.coefficients(rough) @ gradients)[0]
                assert (got - exact).norm() <= 5e-3 * max(largest(gradients), float(exact.norm())), (
                    name,
                    kind,
                )
