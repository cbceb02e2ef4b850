"""The baselines against the same formulas written by hand in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastproj.reference.recipes import published_step, shared_forward_step

# fp64 sums of a few dozen terms taken in another order: a few units of 2.2e-16 each.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-14}


class Toy(nn.Module):
    """Two adapter matrices, a head and its bias: one parameter of every kind that the recipes tell apart."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"lora_A": (3, 6), "lora_B": (5, 3), "head": (4, 5), "bias": (4,)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))
        self.frozen = nn.Parameter(torch.ones(6, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh((x * self.frozen) @ self.lora_A.T @ self.lora_B.T)
        return hidden @ self.head.T + self.bias


@pytest.fixture
def problem() -> tuple[Toy, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return Toy(), {"x": x}, torch.randint(0, 4, (7,), generator=generator)


def gradients(
    model: Toy, batch: dict[str, Tensor], labels: Tensor, weight_of: Callable[[float], float]
) -> dict[str, Tensor]:
    """``Σ_i w(p_i) ∇CE_i / B``, sample by sample."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    total = {name: torch.zeros_like(getattr(model, name)) for name in names}
    for i in range(len(labels)):
        logits = model(batch["x"][i : i + 1])[0]
        log_p = logits[labels[i]] - torch.logsumexp(logits, dim=0)
        weight = weight_of(float(log_p.detach().exp()))
        parts = torch.autograd.grad(-log_p, [getattr(model, name) for name in names])
        for name, part in zip(names, parts, strict=True):
            total[name] += weight * part / len(labels)
    return total


def released(e: Tensor, g: Tensor, alpha: float) -> Tensor:
    c = e / e.norm() + g / g.norm()
    if g.ndim == 1:
        return e - alpha * (g - (g @ c) * c)
    rows = [g[i] - sum(g[i][j] * c[i][j] for j in range(g.shape[1])) * c[i] for i in range(g.shape[0])]
    return e - alpha * torch.stack(rows)


@pytest.mark.parametrize("params", ["lora", "trainable"])
def test_published_step_is_the_released_formula(problem, params: str) -> None:
    model, batch, labels = problem
    alpha, q = 0.7, 0.6
    e = gradients(model, batch, labels, lambda p: 1.0)
    g = gradients(model, batch, labels, lambda p: q * p**q)

    loss = published_step(model, batch, labels, alpha=alpha, q=q, params=params)

    for name in e:
        projected = params == "trainable" or "lora_" in name
        expected = released(e[name], g[name], alpha) if projected else e[name]
        torch.testing.assert_close(getattr(model, name).grad, expected, **TOLERANCE)
    by_hand = nn.functional.cross_entropy(model(**batch), labels)
    torch.testing.assert_close(loss, by_hand.detach(), **TOLERANCE)
    assert model.frozen.grad is None


@pytest.mark.parametrize("params", ["lora", "trainable"])
def test_shared_forward_step_is_the_bisector_form(problem, params: str) -> None:
    model, batch, labels = problem
    alpha, q = 1.3, 0.7
    e = gradients(model, batch, labels, lambda p: 1.0)
    g = gradients(model, batch, labels, lambda p: p**q)
    chosen = [name for name in e if params == "trainable" or "lora_" in name]

    loss = shared_forward_step(model, batch, labels, alpha=alpha, q=q, params=params)

    flat_e = torch.cat([e[name].flatten() for name in chosen])
    flat_g = torch.cat([g[name].flatten() for name in chosen])
    bisector = flat_e / flat_e.norm() + flat_g / flat_g.norm()
    bias = flat_g - (flat_g @ bisector) / (bisector @ bisector) * bisector
    found = torch.cat([getattr(model, name).grad.flatten() for name in chosen])
    # Near-parallel e and g: the bisector form cancels, which costs it a digit or two.
    torch.testing.assert_close(found, flat_e - alpha * bias, rtol=1e-10, atol=1e-13)
    for name in e.keys() - set(chosen):
        torch.testing.assert_close(getattr(model, name).grad, e[name], **TOLERANCE)
    by_hand = nn.functional.cross_entropy(model(**batch), labels)
    torch.testing.assert_close(loss, by_hand.detach(), **TOLERANCE)


def test_gradients_from_before_do_not_leak_in(problem) -> None:
    model, batch, labels = problem
    for step in (published_step, shared_forward_step):
        model.zero_grad()
        step(model, batch, labels, params="trainable")
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        step(model, batch, labels, params="trainable")
        for name, expected in once.items():
            torch.testing.assert_close(getattr(model, name).grad, expected, rtol=0, atol=0)


def test_zero_gradients_stay_zero(problem) -> None:
    model, batch, labels = problem
    with torch.no_grad():
        model.lora_B.zero_()
        model.head.zero_()
    for step in (published_step, shared_forward_step):
        step(model, batch, labels)
        assert torch.count_nonzero(model.lora_A.grad) == 0
        assert torch.count_nonzero(model.lora_B.grad) == 0


def test_no_removal_leaves_the_plain_gradient(problem) -> None:
    model, batch, labels = problem
    e = gradients(model, batch, labels, lambda p: 1.0)
    for step in (published_step, shared_forward_step):
        step(model, batch, labels, alpha=0.0, params="trainable")
        for name, expected in e.items():
            torch.testing.assert_close(getattr(model, name).grad, expected, **TOLERANCE)


def test_published_step_draws_new_masks_for_its_second_forward(problem) -> None:
    model, batch, labels = problem
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    published_step(model, batch, labels)
    assert len(calls) == 2
    calls.clear()
    shared_forward_step(model, batch, labels)
    assert len(calls) == 1


@pytest.mark.parametrize("step", [published_step, shared_forward_step])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"q": 0.0}, "q: expected"),
        ({"q": 1.5}, "q: expected"),
        ({"params": "all"}, "'lora' or 'trainable'"),
    ],
)
def test_bad_settings_are_refused(problem, step, settings: dict, message: str) -> None:
    model, batch, labels = problem
    with pytest.raises(ValueError, match=message):
        step(model, batch, labels, **settings)


def test_a_model_with_nothing_to_project_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        published_step(nn.Linear(2, 2), {"input": torch.ones(1, 2)}, torch.zeros(1, dtype=torch.int64))


def test_confidence_one_half_gives_known_numbers() -> None:
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    batch, labels = {"input": torch.ones(1, 1, dtype=torch.float64)}, torch.tensor([0])
    shared_forward_step(model, batch, labels, alpha=2.0, q=1.0, params="trainable")
    # One sample: g = p e with p = 1/2, so cos = 1 and nothing is removed; e = (p − 1, p).
    torch.testing.assert_close(model.weight.grad, torch.tensor([[-0.5], [0.5]], dtype=torch.float64))
    published_step(model, batch, labels, alpha=1.0, q=1.0, params="trainable")
    # ê = ĝ = (−1, 1)/√2, c = (−√2, √2); each row loses (g_i c_i) c_i = 2 g_i, so r = −g, grad = e + e/2.
    expected = torch.tensor([[-0.75], [0.75]], dtype=torch.float64)
    torch.testing.assert_close(model.weight.grad, expected)
    assert math.isclose(float(published_step(model, batch, labels, params="trainable")), math.log(2))
