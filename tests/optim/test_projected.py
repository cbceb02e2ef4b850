"""``fastproj.ProjectedOptimizer`` around every class of torch.optim that takes dense gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastproj
from fastproj.surgery import AGEM, GEM, PCGrad, UPGrad

CLASSES = [
    name
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")
]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def losses(net: nn.Module, step: int) -> list[Tensor]:
    """Two tasks that pull apart, step by step other data."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator)
    out = net(x)
    return [(out[:, 0] - out[:, 1] - 1).square().mean(), (out[:, 1] - out[:, 0] - 1).square().mean()]


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def make(name: str, net: nn.Module) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(net.parameters(), lr=0.01)


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_is_the_optimisers_own_on_the_projected_gradient(name: str) -> None:
    ours, plain = model(), model()
    wrapped, other = fastproj.ProjectedOptimizer(make(name, ours), project=UPGrad()), make(name, plain)
    for step in range(3):
        first, second = losses(ours, step)
        second.backward(retain_graph=True)
        wrapped.keep()
        first.backward()
        wrapped.step()
        wrapped.zero_grad()
        sets = [gradients(plain, loss) for loss in losses(plain, step)]
        for parameter, gradient in zip(plain.parameters(), fastproj.project(sets, UPGrad()), strict=True):
            parameter.grad = gradient
        other.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        # The same gradients but for how the combination is written out: one rounding of fp32, which second
        # moments divide by themselves.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_the_state_is_that_of_the_optimiser_alone(name: str) -> None:
    net = model()
    wrapped = fastproj.ProjectedOptimizer(make(name, net), project=lambda g: None)
    losses(net, 0)[0].backward()
    wrapped.step()
    state = wrapped.state_dict()
    bare = make(name, net)
    bare.load_state_dict(copy.deepcopy(state))
    assert bare.state_dict().keys() == state.keys()
    again = fastproj.ProjectedOptimizer(make(name, net), project=PCGrad())
    again.load_state_dict(bare.state_dict())
    for one, other in zip(wrapped.state.values(), again.state.values(), strict=True):
        for key in one:
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])), key


def test_it_steps_under_schedulers_and_when_the_wrapped_one_is_called() -> None:
    net = model()
    seen: list[int] = []
    wrapped = fastproj.ProjectedOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), project=seen_by(seen))
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped.optimizer, 1, gamma=0.1)
    losses(net, 0)[0].backward()
    wrapped.optimizer.step()
    scheduler.step()
    assert seen == [4]
    assert wrapped.param_groups[0]["lr"] == pytest.approx(0.1)


def seen_by(seen: list[int]) -> Callable[[list[Tensor | None]], None]:
    """A projection that counts the gradients it is given and leaves them."""
    return lambda g: seen.append(len(g))


def test_a_function_replaces_gradients_or_changes_them_in_place() -> None:
    def halve(g: list[Tensor | None]) -> list[Tensor | None]:
        return [None if one is None else 0.5 * one for one in g]

    def halve_(g: list[Tensor | None]) -> None:
        for one in g:
            if one is not None:
                one.mul_(0.5)

    results = []
    for function in (halve, halve_):
        net = model()
        wrapped = fastproj.ProjectedOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), project=function)
        before = [p.detach().clone() for p in net.parameters()]
        loss = losses(net, 0)[0]
        want = gradients(net, loss)
        loss.backward()
        wrapped.step()
        results.append([b - a.detach() for a, b in zip(net.parameters(), before, strict=True)])
        for moved, gradient in zip(results[-1], want, strict=True):
            torch.testing.assert_close(
                moved, 0.5 * gradient, rtol=1e-5, atol=1e-6
            )  # a difference of fp32 weights


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_of_a_closure_are_projected_at_each_call(by_name: bool) -> None:
    net, calls, seen = model(), [], []
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)
    wrapped = fastproj.ProjectedOptimizer(optimizer, project=lambda g: seen.append(len(g)))

    def closure() -> Tensor:
        calls.append(1)
        wrapped.zero_grad()
        loss = losses(net, 0)[0]
        loss.backward()
        return loss

    if by_name:
        optimizer.step(closure=closure)
    else:
        wrapped.step(closure)
    assert len(calls) == len(seen) > 1


def test_kept_gradients_last_for_one_step() -> None:
    net = model()
    wrapped = fastproj.ProjectedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), project=AGEM())
    first, second = losses(net, 0)
    second.backward(retain_graph=True)
    wrapped.keep()
    assert all(p.grad is None for p in net.parameters())
    first.backward()
    wrapped.step()
    losses(net, 1)[0].backward()
    with pytest.raises(ValueError, match="AGEM takes 2 to 64 gradient sets, got 1"):
        wrapped.step()


def test_a_parameter_that_one_loss_does_not_reach_counts_zeros() -> None:
    shared, head = nn.Parameter(torch.tensor([1.0, 0.0])), nn.Parameter(torch.tensor([2.0]))
    idle = nn.Parameter(torch.tensor([3.0]))
    wrapped = fastproj.ProjectedOptimizer(torch.optim.SGD([shared, head, idle], lr=1.0), project=GEM())
    (-shared[0]).backward()
    wrapped.keep()
    (shared.sum() * head[0]).backward()
    wrapped.step()
    # g = (2, 2 | 1) conflicts with the memory (−1, 0 | 0): its first entry goes.
    torch.testing.assert_close(shared.detach(), torch.tensor([1.0, -2.0]), rtol=0, atol=1e-6)  # fp32
    torch.testing.assert_close(head.detach(), torch.tensor([1.0]), rtol=0, atol=1e-6)
    assert idle.grad is None


def test_segments_and_generator_reach_the_method() -> None:
    nets = [model() for _ in range(2)]
    wraps = [
        fastproj.ProjectedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), project=UPGrad(), segments=how)
        for net, how in zip(nets, ("global", "tensor"), strict=True)
    ]
    for net, wrapped in zip(nets, wraps, strict=True):
        first, second = losses(net, 0)
        second.backward(retain_graph=True)
        wrapped.keep()
        first.backward()
        wrapped.step()
    assert not torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_remove_leaves_the_optimiser_as_it_was() -> None:
    net, seen = model(), []
    wrapped = fastproj.ProjectedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), project=seen_by(seen))
    wrapped.remove()
    losses(net, 0)[0].backward()
    wrapped.optimizer.step()
    assert seen == []


def test_misuse_is_told() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Sequential"):
        fastproj.ProjectedOptimizer(net, project=PCGrad())  # type: ignore[arg-type]
    for bad in (PCGrad, "PCGrad"):
        with pytest.raises(TypeError, match="a method of"):
            fastproj.ProjectedOptimizer(optimizer, project=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="belong to a method"):
        fastproj.ProjectedOptimizer(optimizer, project=lambda g: g, segments="tensor")
    wrapped = fastproj.ProjectedOptimizer(optimizer, project=PCGrad())
    with pytest.raises(RuntimeError, match="found no gradient"):
        wrapped.keep()
    with pytest.raises(RuntimeError, match="no gradient to project"):
        wrapped.step()
    wrapped.remove()
    short = fastproj.ProjectedOptimizer(optimizer, project=lambda g: g[:1])
    losses(net, 0)[0].backward()
    with pytest.raises(RuntimeError, match="expected 4, got 1"):
        short.step()
    with pytest.raises(RuntimeError, match="a function gets"):
        short.keep()
