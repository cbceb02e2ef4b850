"""ProjectedAdamW beside projection and ``torch.optim.AdamW``, step after step."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import bert
from torch import Tensor, nn

import fastproj
from fastproj.capture import select_parameters
from fastproj.optim import ProjectedAdamW
from fastproj.surgery import AGEM, NashMTL, PCGrad, UPGrad

SHAPES = ((16, 33), (5,), (7, 9), (0, 3), (2, 700), ())
# fp32 in both, and the same formula: a few roundings of a parameter of order one at each of a few steps.
CLOSE = {"rtol": 3e-6, "atol": 1e-6}


class Fixed:
    """Coefficients that do not look at the Gram."""

    granularity = "tensor"

    def __init__(self, *values: float) -> None:
        self.values = values

    def coefficients(self, gram: Tensor, **_: Any) -> Tensor:
        return torch.tensor([self.values], dtype=torch.float64, device=gram.device).repeat(len(gram), 1)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def groups(own: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two with options of their own."""
    return [
        {"params": own[:2], "lr": 1e-2, "betas": (0.8, 0.99)},
        {"params": own[2:], "lr": 3e-3, "weight_decay": 0.0},
    ]


def give(own: list[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for parameter, grad in zip(own, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()


def assert_same(left: list[nn.Parameter], right: list[nn.Parameter], **close: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), **(close or CLOSE))


def both_steps(
    ours: ProjectedAdamW, own: list[nn.Parameter], theirs: torch.optim.Optimizer, other: list[nn.Parameter],
    step: int, missing: Sequence[int] = (), plain: Sequence[int] = (),
) -> None:  # fmt: skip
    """One step with 1.5 e − 0.5 g; ``missing`` parameters have no gradients, ``plain`` ones no g."""
    e: list[Tensor | None] = [*gradients(2 * step)]
    g: list[Tensor | None] = [*gradients(2 * step + 1)]
    for i in missing:
        e[i] = g[i] = None
    for i in plain:
        g[i] = None
    give(own, e)
    give(other, [a if a is None or b is None else 1.5 * a - 0.5 * b for a, b in zip(e, g, strict=True)])
    ours.step(sets=[g])
    theirs.step()


def test_equals_adamw_along_the_combination() -> None:
    own, other = parameters(), parameters()
    ours = ProjectedAdamW(groups(own), project=Fixed(1.5, -0.5))
    theirs = torch.optim.AdamW(groups(other))
    for step, (missing, plain) in enumerate([((), ()), ((1,), ()), ((), (0, 4)), ((0, 1), (2,)), ((), ())]):
        both_steps(ours, own, theirs, other, step, missing, plain)
        assert_same(own, other)
    assert [ours.state[p]["step"].item() for p in own] == [4, 3, 5, 5, 5, 5]
    assert own[0].grad is not None
    assert torch.equal(own[0].grad, gradients(8)[0])


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": False}], ids=str)
def test_state_goes_into_adamw_and_comes_back(options: dict[str, Any]) -> None:
    """Swapped in mid-training, saved and loaded without unpickling: the two go on as they were."""
    own, other = parameters(), parameters()
    ours = ProjectedAdamW(groups(own), project=Fixed(1.5, -0.5))
    theirs = torch.optim.AdamW(groups(other), **options)
    for step in range(6):
        both_steps(ours, own, theirs, other, step)
        states = []
        for optimizer in (ours, theirs):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            states.append(torch.load(file, weights_only=True))
        assert {*states[0]["state"][0]} == {*states[1]["state"][0]}
        assert states[0]["param_groups"][0].keys() == states[1]["param_groups"][0].keys()
        ours.load_state_dict(states[1])
        theirs.load_state_dict(states[0])
    assert_same(own, other)


def test_steps_of_a_foreign_state_are_counted_on() -> None:
    """An older AdamW kept its steps as numbers."""
    own = parameters()
    ours = ProjectedAdamW(own, project=Fixed(1.0, 0.0))
    give(own, gradients(0))
    ours.step(sets=[gradients(1)])
    state = ours.state_dict()
    for entry in state["state"].values():
        entry["step"] = 1
    state["param_groups"][0].update(fused=None, foreach=True)
    ours.load_state_dict(state)
    assert [ours.state[p]["step"].dtype for p in own] == [torch.float32] * len(own)
    ours.step(sets=[gradients(1)])
    assert ours.state[own[0]]["step"].item() == 2


@pytest.mark.parametrize("method", [AGEM(), UPGrad(), NashMTL(), PCGrad()], ids=lambda m: type(m).__name__)
def test_methods_of_surgery(method: Any) -> None:
    own, other = parameters(), parameters()
    ours = ProjectedAdamW(groups(own), project=method, generator=torch.Generator().manual_seed(3))
    theirs, generator = torch.optim.AdamW(groups(other)), torch.Generator().manual_seed(3)
    for step in range(3):
        e, g = gradients(2 * step), gradients(2 * step + 1)
        give(own, e)
        give(other, fastproj.surgery.project([e, g], method, generator=generator))
        ours.step(sets=[g])
        theirs.step()
    assert_same(own, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Half precision: G, m and v are rounded to it in both, in orders of their own, and so are p's steps."""
    own, other = parameters(dtype), parameters(dtype)
    ours = ProjectedAdamW(own, lr=1e-2, eps=1e-4, project=Fixed(1.5, -0.5))
    theirs = torch.optim.AdamW(other, lr=1e-2, eps=1e-4, fused=True)
    for step in range(3):
        e, g = gradients(2 * step, dtype), gradients(2 * step + 1, dtype)
        give(own, e)
        give(other, [1.5 * a - 0.5 * b for a, b in zip(e, g, strict=True)])
        ours.step(sets=[g])
        theirs.step()
    eps = torch.finfo(dtype).eps
    assert_same(own, other, rtol=6 * eps, atol=6 * eps)


@pytest.mark.parametrize(
    "options", [{}, {"segments": "tensor", "alpha": 0.5}, {"variant": "released"}], ids=str
)
def test_edge_brings_its_second_set(options: dict[str, Any]) -> None:
    """In place of ``project_()``: parameters and statistics are those of projecting first."""
    ours, theirs = bert(), bert()
    own, other = ([p for p in tiny.model.parameters() if p.requires_grad] for tiny in (ours, theirs))
    with fastproj.EDGE(ours.model, **options) as engine, fastproj.EDGE(theirs.model, **options) as beside:
        fused = ProjectedAdamW(own, lr=1e-2, project=engine)
        plain = torch.optim.AdamW(other, lr=1e-2)
        for _ in range(3):
            for tiny, one, optimizer in ((ours, engine, fused), (theirs, beside, plain)):
                optimizer.zero_grad()
                one.loss(tiny.logits(), tiny.labels).backward()
            beside.project_()
            fused.step()
            plain.step()
        # The optimiser's parameters are more than the engine's, and have segments of nothing.
        seen, want = (one.stats.coefficients[one.stats.erm_norm > 0] for one in (engine, beside))
        torch.testing.assert_close(seen, want, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="no gradient"):
            fused.step()
    # The first step of Adam is lr in size whatever the gradient, which magnifies the rounding of small ones.
    assert_same(own, other, rtol=1e-5, atol=1e-5)


def test_edge_refuses_what_does_not_fit() -> None:
    tiny = bert()
    own = [p for p in tiny.model.parameters() if p.requires_grad]
    with fastproj.EDGE(tiny.model) as engine:
        optimizer = ProjectedAdamW(own[1:], project=engine)
        engine.loss(tiny.logits(), tiny.labels).backward()
        with pytest.raises(RuntimeError, match="does not have all parameters"):
            optimizer.step()
        with pytest.raises(ValueError, match="EDGE brings its own gradient sets"):
            optimizer.step(sets=[[None] * (len(own) - 1)])
    with fastproj.EDGE(tiny.model, segments=[0] * len(select_parameters(tiny.model, "lora"))) as engine:
        optimizer = ProjectedAdamW(own, project=engine)
        tiny.model.zero_grad()
        engine.loss(tiny.logits(), tiny.labels).backward()
        with pytest.raises(ValueError, match="in the order of this engine's parameters"):
            optimizer.step()
    with fastproj.EDGE(tiny.model, variant="released") as engine:
        optimizer = ProjectedAdamW(own, project=engine, segments="tensor")
        tiny.model.zero_grad()
        engine.loss(tiny.logits(), tiny.labels).backward()
        with pytest.raises(ValueError, match="rows for segments"):
            optimizer.step()
    with fastproj.EDGE(tiny.model, ratio="lagged") as engine:
        optimizer = ProjectedAdamW(own, project=engine)
        with pytest.raises(RuntimeError, match="call project_"):
            optimizer.step()


def test_scaled_gradients() -> None:
    """GradScaler's scale is taken out again; what it found is heard, and so is what it cannot see in g."""
    own, other = parameters(), parameters()
    ours, theirs = ProjectedAdamW(own, lr=1e-2, project=NashMTL()), torch.optim.AdamW(other, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    e, g = gradients(0), gradients(1)
    give(own, [1024 * grad for grad in e])
    give(other, fastproj.surgery.project([e, g], NashMTL()))
    scaler.step(ours, sets=[[1024 * grad for grad in g]])
    scaler.update()
    theirs.step()
    assert_same(own, other)

    before = copy.deepcopy(ours.state_dict())["state"]
    for bad, scale in (([e, "inf"], 512.0), ([g, "inf"], 512.0)):
        first, second = [1024 * grad for grad in e], [1024 * grad for grad in g]
        (first if bad[0] is e else second)[0][0, 0] = torch.inf
        give(own, first)
        scaler.step(ours, sets=[second])
        scaler.update()
        assert scaler.get_scale() == scale
    after = ours.state_dict()["state"]
    assert_same(own, other)
    for i, entry in before.items():
        assert all(torch.equal(value, after[i][name]) for name, value in entry.items())


def test_closures_and_schedulers() -> None:
    own = parameters()
    optimizer = ProjectedAdamW(own, lr=0.1, weight_decay=0.0, project=Fixed(1.0, 0.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in own]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.sum() for p in own)
        loss.backward()
        return loss

    want = sum(p.sum() for p in own).item()
    assert optimizer.step(closure, sets=[gradients(1)]).item() == want
    scheduler.step()
    optimizer.step(closure, sets=[gradients(1)])
    # Along ones, each step is the learning rate.
    for p, start in zip(own, before, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.15, rtol=1e-5, atol=1e-5)


def test_a_learning_rate_in_a_tensor_and_maximize() -> None:
    own, other = parameters(), parameters()
    ours = ProjectedAdamW(own, lr=torch.tensor(1e-2), maximize=True, project=Fixed(1.5, -0.5))
    theirs = torch.optim.AdamW(other, lr=1e-2, maximize=True)
    for step in range(2):
        both_steps(ours, own, theirs, other, step)
    assert_same(own, other)


def test_influence_scores_read_its_state() -> None:
    """It is an AdamW to whoever looks at optimisers."""
    from fastproj.influence.optimizer_state import adam_states

    model = nn.Linear(3, 2)
    optimizer = ProjectedAdamW(model.parameters(), project=Fixed(1.0, 0.0))
    model(torch.ones(3)).sum().backward()
    optimizer.step(sets=[[torch.zeros(2, 3), torch.zeros(2)]])
    states = adam_states(optimizer, model, dict(model.named_parameters()))
    assert states["weight"].step == 1
    assert torch.equal(states["weight"].exp_avg, optimizer.state[model.weight]["exp_avg"])


def stepped(**options: Any) -> tuple[ProjectedAdamW, list[nn.Parameter]]:
    own = parameters()
    optimizer = ProjectedAdamW(own, project=Fixed(1.5, -0.5), **options)
    give(own, gradients(0))
    optimizer.step(sets=[gradients(1)])
    return optimizer, own


def test_nothing_to_do() -> None:
    optimizer, own = stepped()
    before = [p.detach().clone() for p in own]
    optimizer.zero_grad()
    optimizer.step(sets=[[None] * len(own)])
    assert all(torch.equal(p.detach(), start) for p, start in zip(own, before, strict=True))


def test_bad_options() -> None:
    own = parameters()
    with pytest.raises(TypeError, match=r"coefficients\(gram\).*got int"):
        ProjectedAdamW(own, project=3)
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        ProjectedAdamW([{"params": own, "amsgrad": True}], project=Fixed(1.0))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ProjectedAdamW(own, lr=-1.0, project=Fixed(1.0))
    with pytest.raises(TypeError, match="betas must be numbers, got Tensor"):
        ProjectedAdamW(own, betas=(torch.tensor(0.9), torch.tensor(0.9)), project=Fixed(1.0))
    optimizer, own = stepped()
    amsgrad = torch.optim.AdamW(own, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        optimizer.load_state_dict(amsgrad.state_dict())
    assert not optimizer.param_groups[0]["amsgrad"]


def test_bad_sets() -> None:
    optimizer, own = stepped()
    with pytest.raises(TypeError, match=r"expected step\(sets=...\).*Fixed"):
        optimizer.step()
    with pytest.raises(TypeError, match="set 1 must be a list of tensors, got Tensor"):
        optimizer.step(sets=[torch.ones(3)])
    with pytest.raises(ValueError, match="each of 6 parameters, got 1"):
        optimizer.step(sets=[[None]])
    with pytest.raises(ValueError, match="shard 0 is None in set 2 only"):
        optimizer.step(sets=[gradients(1), [None, *gradients(1)[1:]]])
    own[2].grad = None
    with pytest.raises(ValueError, match=r"shard 2 is None in \.grad only"):
        optimizer.step(sets=[gradients(1)])
    with pytest.raises(ValueError, match=r"coefficients must be \(S, K\)"):
        stepped()[0].step(sets=[gradients(1), gradients(2)])


def test_a_state_that_does_not_fit() -> None:
    """The sweep goes by addresses, so that it must not start."""
    optimizer, own = stepped()
    before = own[0].detach().clone()
    optimizer.state[own[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg and exp_avg_sq must be \(16, 33\).* got \(3,\)"):
        optimizer.step(sets=[gradients(1)])
    assert torch.equal(own[0].detach(), before)
    optimizer, own = stepped()
    optimizer.state[own[0]]["exp_avg"] = torch.zeros(16, 33, device="meta")
    with pytest.raises(ValueError, match="must be on cpu as their parameter is, got meta"):
        optimizer.step(sets=[gradients(1)])
