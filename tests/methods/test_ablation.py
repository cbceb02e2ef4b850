"""What GRASP is compared with: ablation of activations, steering, removal from the weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from made_factors import module_factors, stream_factors
from tiny_models import Tiny, bert, gpt2, llama
from torch import Tensor

from fastproj.architectures import blocks
from fastproj.latent.lora import lora_layers
from fastproj.methods.ablation import Ablation, Steering, remove

WIDTH = 32


@contextmanager
def block_outputs(tiny: Tiny) -> Any:
    """The residual stream behind each block, as what comes after sees it."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [block.register_forward_hook(keep) for block in blocks(tiny.model).values()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_ablation_takes_the_directions_out_of_every_block(make: Any) -> None:
    tiny = make()
    basis = stream_factors(WIDTH).bases["stream"].matrix
    plain = tiny.logits().detach()
    with Ablation(tiny.model, stream_factors(WIDTH)), block_outputs(tiny) as seen:
        changed = tiny.logits()
        assert len(seen) == 2
        assert max(float((stream @ basis).abs().max()) for stream in seen) < 1e-12
        changed.sum().backward()
    assert not torch.allclose(changed.detach(), plain)
    assert torch.equal(tiny.logits().detach(), plain)


def test_ablation_of_chosen_blocks() -> None:
    tiny = llama()
    basis = stream_factors(WIDTH).bases["stream"].matrix
    with Ablation(tiny.model, stream_factors(WIDTH), chosen=[1]), block_outputs(tiny) as seen:
        tiny.logits()
        assert float((seen[0] @ basis).abs().max()) > 1e-3
        assert float((seen[1] @ basis).abs().max()) < 1e-12


def test_ablation_is_differentiable_as_finite_differences_are() -> None:
    """Training under ablation follows the ablated model's own loss."""
    tiny = llama()
    parameter = lora_layers(tiny.model)[0].b
    with Ablation(tiny.model, stream_factors(WIDTH)):
        tiny.logits().square().sum().backward()
        gradient, step = parameter.grad[0, 0].item(), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 0] += sign * step
                values.append(float(tiny.logits().square().sum()))
                parameter[0, 0] -= sign * step
    # Central differences are off by their step squared, and by rounding over it.
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_steering_adds_a_share_of_each_tokens_norm() -> None:
    tiny = llama()
    direction = stream_factors(WIDTH).bases["stream"].matrix[:, 0]
    with block_outputs(tiny) as plain:
        tiny.logits()
    with Steering(tiny.model, stream_factors(WIDTH), -0.25, chosen=[1]), block_outputs(tiny) as steered:
        tiny.logits()
    assert torch.equal(plain[0], steered[0])
    want = plain[1] - 0.25 * plain[1].norm(dim=-1, keepdim=True) * direction
    torch.testing.assert_close(steered[1], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", ["stream", "module"])
@pytest.mark.parametrize("side", ["read", "write"])
def test_remove_takes_the_directions_out_of_the_adapter(side: str, pool: str) -> None:
    tiny = llama()
    found = stream_factors(WIDTH, side=side) if pool == "stream" else module_factors(tiny.model, side=side)
    deltas = {x.name: x.b.detach() @ x.a.detach() for x in lora_layers(tiny.model)}
    remove(tiny.model, found)
    changed = 0
    for layer in lora_layers(tiny.model):
        before, after = deltas[layer.name], (layer.b @ layer.a).detach()
        basis = found.basis_of(layer.name, before.shape[1 if side == "read" else 0])
        if basis is None:
            assert torch.equal(before, after)
            continue
        changed += 1
        v = basis.matrix
        want = before - before @ v @ v.T if side == "read" else before - v @ (v.T @ before)
        torch.testing.assert_close(after, want, rtol=1e-10, atol=1e-12)
    assert changed == {"stream": {"read": 10, "write": 4}[side], "module": 14}[pool]


def test_bad_input() -> None:
    tiny = llama()
    with pytest.raises(ValueError, match="residual stream"):
        Ablation(tiny.model, stream_factors(WIDTH, side="read"))
    with pytest.raises(ValueError, match="residual stream"):
        Steering(tiny.model, module_factors(tiny.model), 0.1)
    with pytest.raises(ValueError, match="blocks from 0 to 1"):
        Ablation(tiny.model, stream_factors(WIDTH), chosen=[2])
    for build in (Ablation, lambda model, found: Steering(model, found, 0.1)):
        with pytest.raises(ValueError, match="width, 32, got length 7"):
            build(tiny.model, stream_factors(7))
