"""The methods beside their public implementations: equal on shared families, or different as documented.

TorchJD 0.18 with quadprog, qpsolvers, cvxpy, clarabel and ecos; skipped where they are not installed. What
Avalanche and LibMTL do is written out here in their order of operations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery_families import combined, families, normal
from torch import Tensor

import fastproj
from fastproj.surgery import AGEM, GEM, IMTLG, MGDA, CAGrad, DualProj, GradVac, NashMTL, PCGrad, UPGrad

SIZES = (2, 3, 5)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("torchjd.aggregation", reason="TorchJD is not installed")


@pytest.fixture(scope="module")
def projector() -> Any:
    """TorchJD's projector with as little regularisation as quadprog stands, and no threshold."""
    pytest.importorskip("quadprog", reason="quadprog, TorchJD's solver, is not installed")
    pytest.importorskip("torchjd", reason="TorchJD is not installed")
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-11)


def largest(gradients: Tensor) -> float:
    return float(gradients.norm(dim=1).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_dual_cone_methods_equal_torchjd(theirs: Any, projector: Any, name: str, size: int) -> None:
    ours = {"UPGrad": UPGrad, "DualProj": DualProj}[name]()
    for kind, gradients in families(size).items():
        if kind in ("zero", "1e-15 and 1e15"):  # 0/0 without its threshold; below its regularisation
            continue
        want = getattr(theirs, name)(projector=projector)(gradients)
        # A regularisation of 1e-11 moves combinations that cancel by its square root.
        assert (combined(ours, gradients) - want).norm() <= 1e-5 * largest(gradients), kind


def test_torchjd_leaves_conflicts_of_its_regularisation(theirs: Any, projector: Any) -> None:
    gradients = torch.tensor([[4.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    conflict = [
        float((gradients @ out).min())
        for out in (theirs.DualProj()(gradients), combined(DualProj(), gradients))
    ]
    assert conflict[0] < -1e-5
    assert conflict[1] > -1e-11


def test_torchjd_leaves_small_gradients_as_they_are(theirs: Any, projector: Any) -> None:
    gradients = 1e-3 * torch.tensor([[1.0, 0.2], [-1.0, 0.2]], dtype=torch.float64)
    for name, ours in (("UPGrad", UPGrad()), ("DualProj", DualProj())):
        out = getattr(theirs, name)()(torch.cat([gradients, gradients[:1]]))
        assert torch.allclose(out, torch.cat([gradients, gradients[:1]]).mean(0)), name
        assert (gradients @ out).min() < 0
        assert (gradients @ combined(ours, torch.cat([gradients, gradients[:1]]))).min() > -1e-15


@pytest.mark.parametrize("size", SIZES)
def test_pcgrad_equals_torchjd_with_equal_draws(theirs: Any, size: int) -> None:
    for kind, gradients in families(size).items():
        for seed in range(3):
            torch.manual_seed(seed)
            want = theirs.PCGrad()(gradients)
            torch.manual_seed(seed)
            got = combined(PCGrad(), gradients)
            assert (got - want).norm() <= 1e-9 * largest(gradients), kind


@pytest.mark.parametrize("size", SIZES)
def test_gradvac_equals_torchjd_with_equal_draws(theirs: Any, size: int) -> None:
    """Over several steps, its targets carried along; without its eps, which is added to denominators."""
    for kind in ("normal", "conflicting", "agreeing", "1e15", "1e-15"):
        one, other = theirs.GradVac(beta=0.3, eps=0.0), GradVac(beta=0.3)
        for seed in range(4):
            gradients = families(size, seed)[kind]
            torch.manual_seed(seed)
            want = one(gradients)
            torch.manual_seed(seed)
            assert (combined(other, gradients) - want).norm() <= 1e-8 * largest(gradients), kind


def test_torchjds_gradvac_takes_small_gradients_for_orthogonal(theirs: Any) -> None:
    gradients = 1e-6 * families(2)["conflicting"]
    one, other = theirs.GradVac(), GradVac()
    assert (one(gradients) - gradients.sum(0)).norm() <= 1e-2 * gradients.sum(0).norm()
    want = 1e-6 * combined(GradVac(), families(2)["conflicting"])
    torch.testing.assert_close(combined(other, gradients), want, rtol=1e-9, atol=0)
    assert (one.gramian_weighting._phi_t.abs() < 1e-3).all()
    assert float(other.targets.values[0, 0, 1]) < -0.2


@pytest.mark.parametrize("size", SIZES)
def test_mgda_is_torchjds_with_more_steps(theirs: Any, size: int) -> None:
    """Frank-Wolfe's error falls as one over its steps; ours is never longer."""
    for kind, gradients in families(size).items():
        if kind == "1e-15 and 1e15":
            continue
        got = combined(MGDA(), gradients)
        short = theirs.MGDA()(gradients)
        long = theirs.MGDA(epsilon=1e-12, max_iters=20_000)(gradients) if size < 5 else None
        assert got.norm() <= short.norm() * (1 + 1e-9) + 1e-9 * largest(gradients), kind
        if long is not None:
            assert (got - long).norm() <= 2e-2 * largest(gradients), kind


def test_torchjds_mgda_stops_early(theirs: Any) -> None:
    gradients = families(5)["conflicting"]
    short, got = theirs.MGDA()(gradients), combined(MGDA(), gradients)
    # All products with the point of least norm are at least its square.
    assert (gradients @ got).min() >= got.square().sum() * (1 - 1e-9)
    assert (gradients @ short).min() < short.square().sum() * (1 - 1e-4)
    assert (short - got).norm() > 1e-3 * got.norm()


@pytest.mark.parametrize("size", SIZES)
def test_imtl_g_equals_torchjd_on_independent_gradients(theirs: Any, size: int) -> None:
    for kind in ("normal", "agreeing", "1e-15"):
        gradients = families(size)[kind]
        assert (combined(IMTLG(), gradients) - theirs.IMTLG()(gradients)).norm() <= 1e-9 * largest(
            gradients
        ), kind


def test_torchjds_imtl_g_weighs_dependent_gradients_by_their_norms(theirs: Any) -> None:
    """Three gradients of a plane cannot all have one projection: scaling one changes its compromise."""
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.3]], dtype=torch.float64)
    scales = torch.tensor([[1.0], [1.0], [20.0]], dtype=torch.float64)
    ours = [combined(IMTLG(), g) for g in (gradients, scales * gradients)]
    other = [theirs.IMTLG()(g) for g in (gradients, scales * gradients)]
    assert abs(float(torch.cosine_similarity(*ours, dim=0)) - 1) < 1e-9
    assert float(torch.cosine_similarity(*other, dim=0)) < 1 - 1e-3


def test_torchjds_imtl_g_is_zero_on_long_gradients(theirs: Any) -> None:
    gradients = families(3)["1e15"]
    assert not theirs.IMTLG()(gradients).any()
    torch.testing.assert_close(
        combined(IMTLG(), gradients), 1e15 * combined(IMTLG(), normal(3)), rtol=1e-9, atol=0
    )


def test_torchjds_imtl_g_drops_short_gradients(theirs: Any) -> None:
    gradients = normal(2) * torch.tensor([[1.0], [1e-9]], dtype=torch.float64)
    cosines = [
        gradients @ out / gradients.norm(dim=1)
        for out in (theirs.IMTLG()(gradients), combined(IMTLG(), gradients))
    ]
    assert abs(float(cosines[0][1] / cosines[0][0]) - 1) > 0.5
    assert abs(float(cosines[1][1] / cosines[1][0]) - 1) < 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_cagrad_equals_torchjd(theirs: Any, c: float, size: int) -> None:
    pytest.importorskip("cvxpy", reason="cvxpy, TorchJD's solver, is not installed")
    for kind in ("normal", "agreeing", "conflicting", "equal", "1e15"):
        gradients = families(size)[kind]
        want = theirs.CAGrad(c=c, norm_eps=0.0)(gradients)
        # The solver stops at 1e-8 of the objective, whose minimum is flat.
        assert (combined(CAGrad(c), gradients) - want).norm() <= 1e-3 * largest(gradients), kind


def test_torchjds_cagrad_is_zero_on_small_gradients(theirs: Any) -> None:
    pytest.importorskip("cvxpy", reason="cvxpy, TorchJD's solver, is not installed")
    gradients = 1e-4 * normal(2)
    assert not theirs.CAGrad(c=0.5)(gradients).any()
    torch.testing.assert_close(
        combined(CAGrad(), gradients), 1e-4 * combined(CAGrad(), normal(2)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [2, 3])
def test_nash_mtl_equals_torchjd_before_it_is_clipped(theirs: Any, size: int) -> None:
    pytest.importorskip("ecos", reason="ecos, TorchJD's solver, is not installed")
    for kind in ("normal", "agreeing"):
        gradients = families(size)[kind]
        want = theirs.NashMTL(n_tasks=size, max_norm=0.0, optim_niter=50)(gradients)
        got = combined(NashMTL(), gradients)
        # Its programmes stop when α moves by less than 1e-3.
        torch.testing.assert_close(got, want, rtol=0, atol=5e-3)
        clipped = theirs.NashMTL(n_tasks=size, optim_niter=50)(gradients)
        torch.testing.assert_close(clipped, got / size**0.5, rtol=0, atol=5e-3)


def per_parameter_a_gem(gradients: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
    """Parameter by parameter, as Avalanche's first A-GEM plugin went about it."""
    out = []
    for g, r in zip(gradients, reference, strict=True):
        inner = torch.dot(g.flatten(), r.flatten())
        out.append(g - inner / torch.dot(r.flatten(), r.flatten()) * r if inner < 0 else g)
    return out


def test_a_gem_by_tensor_is_another_method_than_a_gem() -> None:
    """The whole gradient agrees with the memory; one parameter's does not, and one of the two acts on it."""
    g = [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])]
    r = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    whole = fastproj.project([g, r], AGEM())
    assert all(torch.equal(a, b) for a, b in zip(whole, g, strict=True))
    by_tensor = fastproj.project([g, r], AGEM(), segments="tensor")
    for a, b in zip(by_tensor, per_parameter_a_gem(g, r), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # a few products in fp32
    assert torch.equal(by_tensor[1], torch.tensor([0.0, 2.0]))


def test_the_authors_gem_keeps_conflicts_of_small_gradients() -> None:
    """Their dual has 1e-3 added to the diagonal of the memories' Gram, at whatever scale that is."""
    gradients = 1e-2 * torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    g, memory = gradients
    v = max(0.0, float(-memory @ g / (memory @ memory + 1e-3)))
    theirs = g + v * memory
    ours = combined(GEM(), gradients)
    assert float(theirs @ memory) < 0.5 * float(g @ memory)  # still more than half as negative
    assert abs(float(ours @ memory)) < 1e-15


def libmtl_pcgrad(gradients: Tensor, orders: list[list[int]]) -> Tensor:
    """LibMTL's loop: orders are of all tasks, the task itself included."""
    projected = gradients.clone()
    for i, order in enumerate(orders):
        for j in order:
            inner = torch.dot(projected[i], gradients[j])
            if inner < 0:
                projected[i] -= inner * gradients[j] / gradients[j].norm().pow(2)
    return projected.sum(0)


def test_libmtls_pcgrad_is_ours_until_a_task_turns_against_itself() -> None:
    orders = [[1, 2, 0], [2, 0, 1], [0, 1, 2]]
    others = [[j for j in own if j != i] for i, own in enumerate(orders)]
    same = families(3)["conflicting"]
    torch.testing.assert_close(
        libmtl_pcgrad(same, orders), combined(PCGrad(order=others), same), rtol=1e-9, atol=1e-9
    )
    angles = torch.deg2rad(torch.tensor([0.0, 150.0, -130.0], dtype=torch.float64))
    turned = torch.stack([angles.cos(), angles.sin()], dim=1)
    ours, theirs = combined(PCGrad(order=others), turned), libmtl_pcgrad(turned, orders)
    assert (ours - theirs).norm() > 1e-2
