"""Our methods inside TorchJD, and its weightings on our Gram matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery_families import combined, families, gram_of, methods, normal
from torch import Tensor, nn

import fastproj
from fastproj.integrations.torchjd import TorchJDWeighting, aggregator, jac_to_grad, weighting
from fastproj.surgery import MGDA, PCGrad, UPGrad


class HalfOfEach:
    """A weighting that needs no TorchJD: called on one Gramian, gives its rows' weights."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, gramian: Tensor) -> Tensor:
        self.seen.append(tuple(gramian.shape))
        return torch.full_like(gramian[0], 0.5)


def with_jac(rows: int, seed: int = 0) -> list[nn.Parameter]:
    """Parameters with the field that ``torchjd.autojac.backward`` fills."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    for i, parameter in enumerate(parameters):
        jac = normal(rows, max(parameter.numel(), 1), seed + i).float().view(rows, *parameter.shape)
        parameter.jac = jac  # type: ignore[attr-defined]
    return parameters


def test_a_weighting_is_called_for_each_segment() -> None:
    own = HalfOfEach()
    sets = [[normal(2), normal(3)], [normal(2, seed=1), normal(3, seed=1)]]
    out = fastproj.project(sets, TorchJDWeighting(own), segments="tensor")
    assert own.seen == [(2, 2), (2, 2)]
    for value, a, b in zip(out, *sets, strict=True):
        torch.testing.assert_close(value, 0.5 * a + 0.5 * b, rtol=1e-15, atol=1e-15)  # in one rounding or two


def test_what_is_not_finite_reaches_no_weighting() -> None:
    own = HalfOfEach()
    sets = [[normal(2), normal(3) * torch.nan], [normal(2, seed=1), normal(3, seed=1)]]
    out = fastproj.project(sets, TorchJDWeighting(own), segments="tensor")
    assert own.seen == [(2, 2)]
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize("retain", [False, True])
def test_jacobians_land_in_grad(retain: bool) -> None:
    parameters = with_jac(3)
    jacs = [parameter.jac for parameter in parameters]
    matrix = torch.cat([jac.reshape(3, -1) for jac in jacs], dim=1)
    want = combined(UPGrad(), matrix)
    parameters[0].grad = torch.ones(3, 4)
    jac_to_grad(parameters, UPGrad(), retain_jac=retain)
    assert [hasattr(parameter, "jac") for parameter in parameters] == [retain] * 3
    got = torch.cat([parameter.grad.flatten() for parameter in parameters])
    got[:12] -= 1.0  # added to what was there
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)  # Gram and sums of order 1 in fp32


def test_jacobians_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        jac_to_grad([], PCGrad())
    with pytest.raises(ValueError, match=r"tensors \[1\] have no \.jac"):
        jac_to_grad([with_jac(2)[0], nn.Parameter(torch.zeros(2))], PCGrad())
    with pytest.raises(ValueError, match=r"one number of rows, got \[2, 3\]"):
        jac_to_grad([with_jac(2)[0], with_jac(3)[1]], PCGrad())


@pytest.fixture
def torchjd() -> Any:
    return pytest.importorskip("torchjd", reason="TorchJD is not installed")


@pytest.mark.parametrize("name", methods(3))
def test_a_method_aggregates_jacobians(torchjd: Any, name: str) -> None:
    for kind, gradients in families(3).items():
        own, other = methods(3)[name][0], methods(3)[name][0]
        got, want = aggregator(own)(gradients), combined(other, gradients)
        assert (got - want).norm() <= 1e-12 * float(want.norm()), kind
        again = methods(3)[name][0]
        weights = weighting(again)(gram_of(gradients)[0])
        assert torch.equal(weights @ gradients, got), kind


def test_an_aggregator_is_one_of_theirs(torchjd: Any) -> None:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

    made = aggregator(MGDA())
    assert isinstance(made, GramianWeightedAggregator)
    assert isinstance(made.gramian_weighting, Weighting)
    assert made(torch.eye(2)).dtype == torch.float32
    assert "MGDA" in repr(made)


@pytest.mark.parametrize("optimize", [False, True])
def test_their_autojac_steps_with_our_aggregator_and_our_jac_to_grad_is_it(
    torchjd: Any, optimize: bool
) -> None:
    from torchjd.autojac import backward
    from torchjd.autojac import jac_to_grad as theirs

    def gradients(land: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        out = net(torch.randn(6, 4))
        backward([out[:, 0].square().mean(), (out.sum(1) - 1).square().mean()])
        land(list(net.parameters()))
        return [parameter.grad for parameter in net.parameters()]

    want = gradients(lambda p: theirs(p, aggregator(UPGrad()), optimize_gramian_computation=optimize))
    got = gradients(lambda p: jac_to_grad(p, UPGrad()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # Gramians of fp32, summed in another order


def test_their_autogram_engine_takes_our_weighting(torchjd: Any) -> None:
    from torchjd.autogram import Engine

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    engine, x = Engine(net, batch_dim=0), torch.randn(5, 4)
    losses = net(x)[:, 0].square()
    gramian = engine.compute_gramian(losses)
    weights = weighting(UPGrad())(gramian)
    losses.backward(weights)
    sets = [list(torch.autograd.grad(net(x)[i, 0].square(), list(net.parameters()))) for i in range(5)]
    for parameter, want in zip(net.parameters(), fastproj.project(sets, UPGrad()), strict=True):
        torch.testing.assert_close(
            parameter.grad, want, rtol=1e-3, atol=1e-5
        )  # Gramians of fp32 on both sides


@pytest.mark.parametrize("name", ["UPGradWeighting", "MGDAWeighting", "MeanWeighting", "IMTLGWeighting"])
def test_their_weightings_run_on_our_gram(torchjd: Any, name: str) -> None:
    from torchjd import aggregation

    own = getattr(aggregation, name)()
    gradients = families(3)["conflicting"]
    (got,) = fastproj.project([[row] for row in gradients], TorchJDWeighting(own))
    torch.testing.assert_close(got, own(gram_of(gradients)[0]) @ gradients, rtol=1e-9, atol=1e-12)
