"""GRASP in a training loop: the constraint on the parameters, whatever the optimiser does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_factors import factors, module_factors, stream_factors
from peft import LoraConfig, get_peft_model
from tiny_models import Tiny, bert, gpt2, llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastproj
from fastproj.latent.factors import LatentFactors
from fastproj.latent.lora import lora_layers
from fastproj.methods._constraint import Constraint

WIDTH, STEPS = 32, 100
# The whole of a projection's rounding in fp32, at most: 6e-8 for each of the sums, over ΔW's own norm.
ROUNDING = 2e-6
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
}


def single(tiny: Tiny) -> Tiny:
    """As one trains it: fp32 parameters, B back at zero."""
    tiny.model.float()
    for layer in lora_layers(tiny.model):
        nn.init.zeros_(layer.b)
    return tiny


def made(model: nn.Module, mode: str, pool: str = "stream") -> LatentFactors:
    side = "read" if mode == "read" else "write"
    return stream_factors(WIDTH, side=side) if pool == "stream" else module_factors(model, side=side)


def loss_of(tiny: Tiny) -> Tensor:
    logits = tiny.logits()
    labels = tiny.labels
    if tiny.shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def left_violations(model: nn.Module, basis: Tensor, names: tuple[str, ...], side: str) -> list[float]:
    """From ΔW itself, formed, and independently of the package."""
    found = []
    for layer in lora_layers(model):
        if layer.name in names:
            delta = layer.scale * layer.b.detach().double() @ layer.a.detach().double()
            along = delta @ basis if side == "read" else basis.T @ delta
            found.append(float(along.norm() / delta.norm()))
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["read", "write", "stream"])
def test_the_constraint_holds_after_a_hundred_steps(mode: str, optimizer: str) -> None:
    tiny = single(llama())
    found = made(tiny.model, mode)
    with fastproj.GRASP(tiny.model, found, mode) as grasp:
        stepper = OPTIMIZERS[optimizer](trainable(tiny.model))
        grasp.hold(stepper)
        first = float(loss_of(tiny).detach())
        for _ in range(STEPS):
            loss_of(tiny).backward()
            stepper.step()
            stepper.zero_grad()
        side = "read" if mode == "read" else "write"
        violations = left_violations(
            tiny.model, found.bases["stream"].matrix.double(), grasp.constrained, side
        )
        assert float(loss_of(tiny).detach()) < first
        assert len(violations) == {"read": 10, "write": 4, "stream": 4}[mode]
        assert max(violations) < ROUNDING
        assert grasp.violation() == pytest.approx(max(violations), rel=0.2, abs=1e-8)


@pytest.mark.parametrize("mode", ["read", "write"])
def test_without_the_projection_after_the_step_it_does_not_hold(mode: str) -> None:
    """What keeps the test above from holding by itself: Adam leaves the subspace of its gradients."""
    tiny = single(llama())
    with fastproj.GRASP(tiny.model, made(tiny.model, mode), mode) as grasp:
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        for _ in range(STEPS):
            loss_of(tiny).backward()
            grasp.project_gradients_()
            stepper.step()
            stepper.zero_grad()
        assert grasp.violation() > 1e-2


@pytest.mark.parametrize("mode", ["read", "write", "stream"])
def test_modules_of_their_own_directions(mode: str) -> None:
    tiny = single(gpt2())
    found = made(tiny.model, mode, "module")
    if mode == "stream":
        with pytest.raises(ValueError, match="residual stream"):
            fastproj.GRASP(tiny.model, found, mode)
        return
    with fastproj.GRASP(tiny.model, found, mode) as grasp:
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        grasp.hold(stepper)
        for _ in range(3):
            loss_of(tiny).backward()
            stepper.step()
            stepper.zero_grad()
        assert len(grasp.constrained) == len(lora_layers(tiny.model))
        assert 0 < grasp.violation() < ROUNDING


@pytest.mark.parametrize("mode", ["read", "write"])
def test_pretrained_content_stays(mode: str) -> None:
    """The frozen weights keep their bits, and along the direction (W + ΔW) v = W v."""
    tiny = single(llama())
    frozen = {n: p.detach().clone() for n, p in tiny.model.named_parameters() if not p.requires_grad}
    found = made(tiny.model, mode)
    with fastproj.GRASP(tiny.model, found, mode) as grasp:
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        grasp.hold(stepper)
        for _ in range(10):
            loss_of(tiny).backward()
            stepper.step()
            stepper.zero_grad()
    for name, parameter in tiny.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    basis = found.bases["stream"].matrix
    module = tiny.model.get_submodule(f"base_model.model.{grasp.constrained[0]}")
    weight = module.base_layer.weight.double()
    merged = weight + module.get_delta_weight("default").double()
    if mode == "read":
        torch.testing.assert_close(merged @ basis.double(), weight @ basis.double(), rtol=0, atol=1e-7)
    else:
        torch.testing.assert_close(basis.double().T @ merged, basis.double().T @ weight, rtol=0, atol=1e-7)
    assert float((merged - weight).detach().norm()) > 1e-2


def test_the_first_factor_starts_on_the_constraint() -> None:
    tiny = single(llama())
    found = made(tiny.model, "read")
    before = {layer.name: layer.a.detach().clone() for layer in lora_layers(tiny.model)}
    with fastproj.GRASP(tiny.model, found, "read") as grasp:
        basis = found.bases["stream"].matrix.float()
        for layer in lora_layers(tiny.model):
            if layer.name in grasp.constrained:
                assert float((layer.a.detach() @ basis).abs().max()) < 1e-6
                assert float((before[layer.name] @ basis).abs().max()) > 1e-2
            else:
                assert torch.equal(layer.a, before[layer.name])


def test_loss_scaling_accumulation_and_clipping() -> None:
    """A GradScaler that skips its first step, two micro-batches a step, clipped after unscaling."""
    tiny = single(llama())
    with fastproj.GRASP(tiny.model, made(tiny.model, "write"), "write") as grasp:
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        grasp.hold(stepper)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        for _ in range(20):
            for rows in ((0, 2), (2, 4)):
                scaler.scale(loss_of(tiny.rows(*rows)) / 2).backward()
            scaler.unscale_(stepper)
            nn.utils.clip_grad_norm_(trainable(tiny.model), 0.1)
            scaler.step(stepper)
            scaler.update()
            stepper.zero_grad()
        assert scaler.get_scale() < 2.0**127
        assert 0 < grasp.violation() < ROUNDING


def test_several_optimizers_project_their_own_parameters() -> None:
    tiny = single(llama())
    with fastproj.GRASP(tiny.model, made(tiny.model, "write"), "write") as grasp:
        held = [n for n in grasp.constrained if "o_proj" in n], [n for n in grasp.constrained if "down" in n]
        parameters = [
            [p for name, p in tiny.model.named_parameters() if any(n in name for n in own) and "lora" in name]
            for own in held
        ]
        steppers = [OPTIMIZERS["AdamW"](own) for own in parameters]
        grasp.hold(*steppers)
        loss_of(tiny).backward()
        steppers[0].step()
        moved = [layer for layer in lora_layers(tiny.model) if layer.name in held[0]]
        still = [layer for layer in lora_layers(tiny.model) if layer.name in held[1]]
        assert all(layer.b.abs().max() > 0 for layer in moved)
        assert all(layer.b.abs().max() == 0 for layer in still)
        steppers[1].step()
        assert 0 < grasp.violation() < ROUNDING
        other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        with pytest.raises(ValueError, match="none of the 4 constrained"):
            grasp.hold(steppers[0], other)


def test_stream_projects_the_gradient_at_block_outputs_and_leaves_the_forward() -> None:
    """down_proj writes what a block ends with: its gradient has nothing along them, o_proj's still has."""
    tiny = llama()
    found = stream_factors(WIDTH)
    basis = found.bases["stream"].matrix

    def along(module: str) -> list[float]:
        tiny.model.zero_grad()
        loss_of(tiny).backward()
        gradients = [layer.b.grad for layer in lora_layers(tiny.model) if layer.name.endswith(module)]
        return [float((basis.T @ gradient).norm() / gradient.norm()) for gradient in gradients]

    assert min(along("down_proj")) > 1e-2
    with fastproj.GRASP(tiny.model, found, "stream"):
        constrained = tiny.logits().detach()
        assert max(along("down_proj")) < 1e-14
        assert min(along("o_proj")) > 1e-3
    # The hooks are gone, what they ran on is not: the forward pass was the model's own.
    assert torch.equal(tiny.logits().detach(), constrained)
    assert min(along("down_proj")) > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_stream_under_gradient_checkpointing(reentrant: bool) -> None:
    tiny = llama()
    with fastproj.GRASP(tiny.model, stream_factors(WIDTH), "stream"):
        loss_of(tiny).backward()
        want = [p.grad.clone() for p in trainable(tiny.model)]
        tiny.model.zero_grad()
        tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny.model.enable_input_require_grads()
        loss_of(tiny).backward()
    for parameter, value in zip(trainable(tiny.model), want, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["read", "write", "stream"])
@pytest.mark.parametrize("passes", ["one", "two"])
def test_after_edge(mode: str, passes: str) -> None:
    """EDGE's projection, then GRASP's: what both would give one after the other by hand."""
    tiny = bert()
    with (
        fastproj.GRASP(tiny.model, made(tiny.model, mode), mode) as grasp,
        fastproj.EDGE(tiny.model, alpha=0.7, passes=passes) as edge,
    ):
        edge.loss(tiny.logits(), tiny.labels).backward()
        edge.project_()
        by_hand = {c.layer.name: projected_by_hand(c) for c in grasp._held}
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        grasp.hold(stepper)
        stepper.step()
        for constraint in grasp._held:
            gradient = constraint.parameter.grad
            torch.testing.assert_close(gradient, by_hand[constraint.layer.name], rtol=1e-10, atol=1e-14)
        # The model is in fp64: the constraint holds to its rounding.
        assert 0 <= grasp.violation() < 1e-13


def projected_by_hand(constraint: Constraint) -> Tensor:
    gradient, basis = constraint.parameter.grad.clone(), constraint.basis.matrix.double()
    if constraint.side == "read":
        return gradient - gradient @ basis @ basis.T
    return gradient - basis @ (basis.T @ gradient)


def test_project_by_hand_equals_hold() -> None:
    results = []
    for by_hand in (True, False):
        tiny = single(llama())
        with fastproj.GRASP(tiny.model, made(tiny.model, "write"), "write") as grasp:
            stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
            if not by_hand:
                grasp.hold(stepper)
            for _ in range(5):
                loss_of(tiny).backward()
                if by_hand:
                    grasp.project_()
                stepper.step()
                if by_hand:
                    grasp.project_()
                stepper.zero_grad()
        results.append([p.detach().clone() for p in trainable(tiny.model)])
    # Projecting twice moves the last digit of what is projected already.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_detach_lets_go() -> None:
    tiny = single(llama())
    grasp = fastproj.GRASP(tiny.model, made(tiny.model, "stream"), "stream")
    stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
    grasp.hold(stepper)
    grasp.detach()
    loss_of(tiny).backward()
    stepper.step()
    assert grasp.violation() > 1e-3
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_half_precision_parameters() -> None:
    """bf16 holds the constraint as far as it can write it down."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    ).to(torch.bfloat16)
    with fastproj.GRASP(model, stream_factors(WIDTH), "write") as grasp:
        # Each entry of B is rounded to 2⁻⁹ of itself.
        assert 0 < grasp.violation() < 2.0**-8


def test_stream_without_adapted_writers_holds_nothing() -> None:
    tiny = llama(target_modules=["q_proj"])
    with fastproj.GRASP(tiny.model, stream_factors(WIDTH), "stream") as grasp:
        assert grasp.constrained == ()
        assert grasp.violation() == 0
        stepper = OPTIMIZERS["AdamW"](trainable(tiny.model))
        grasp.hold(stepper)
        loss_of(tiny).backward()
        stepper.step()


def test_a_module_of_unknown_role_is_no_part_of_the_stream() -> None:
    """Of the stream's width, but nothing says that it writes there."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixer(x)

    model = get_peft_model(Odd(), LoraConfig(r=2, target_modules=["mixer"]))
    with pytest.raises(ValueError, match="constrain none of the model's 1 adapted"):
        fastproj.GRASP(model, stream_factors(WIDTH), "write")


def test_bad_input() -> None:
    tiny = llama()
    with pytest.raises(ValueError, match="mode must be one of"):
        fastproj.GRASP(tiny.model, stream_factors(WIDTH), "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side='read'"):
        fastproj.GRASP(tiny.model, stream_factors(WIDTH), "read")
    with pytest.raises(ValueError, match="side='write'"):
        fastproj.GRASP(tiny.model, stream_factors(WIDTH, side="read"), "stream")
    with pytest.raises(ValueError, match="constrain none of the model's 14 adapted"):
        fastproj.GRASP(tiny.model, stream_factors(7), "write")
    with pytest.raises(ValueError, match="width, 32, got length 7"):
        fastproj.GRASP(tiny.model, stream_factors(7), "stream")
    with pytest.raises(ValueError, match="LoRA layers"):
        fastproj.GRASP(plain := tiny.model.unload(), stream_factors(WIDTH), "stream")
    assert not any(module._forward_hooks for module in plain.modules())
    tiny = llama()
    elsewhere = factors({"no.such.module": stream_factors(WIDTH).bases["stream"]}, "write", "module")
    with pytest.raises(ValueError, match=r"no\.such\.module"):
        fastproj.GRASP(tiny.model, elsewhere, "write")
