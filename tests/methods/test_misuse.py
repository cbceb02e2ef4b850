"""EDGE used in ways that could go wrong silently: each is right, or an error that says what to do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_pass import assert_same, captured
from tiny_models import Tiny, bert, gpt2, two_pass_oracle
from torch import Tensor, nn

import fastproj
from fastproj.capture.select import select_parameters


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Small(nn.Module):
    """Two linear layers; ``mix`` and ``direct`` do what one pass cannot see by shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.mix, self.direct = False, False
        self.double()

    def forward(self, x: Tensor) -> Output:
        hidden = torch.tanh(self.inner(x))
        if self.mix:
            hidden = F.batch_norm(hidden, None, None, training=True)
        return Output(self.head(hidden))


def small() -> Tiny:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, generator=generator).double()
    return Tiny(Small(), {"x": x}, torch.tensor([0, 1, 2, 1]), False)


def other_batch(tiny: Tiny) -> Tiny:
    return Tiny(tiny.model, {"x": tiny.inputs["x"].flip(0) * 2 + 1}, tiny.labels.roll(1), False)


def oracle(tiny: Tiny) -> dict[str, tuple[Tensor, Tensor]]:
    return two_pass_oracle(tiny, select_parameters(tiny.model, "trainable"))


def engine_for(tiny: Tiny, **options: Any) -> fastproj.EDGE:
    return fastproj.EDGE(tiny.model, params="trainable", **options)


def test_a_deep_copy_of_an_attached_model_stands_on_its_own() -> None:
    tiny = small()
    with engine_for(tiny):
        copied = copy.deepcopy(tiny.model)
        before = copied(**tiny.inputs).logits.clone()
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.add_(1)
        assert torch.equal(copied(**tiny.inputs).logits, before)
        assert not torch.allclose(tiny.logits(), before)


def test_pickling_an_attached_model_says_detach() -> None:
    tiny = small()
    with engine_for(tiny), pytest.raises(TypeError, match=r"detach\(\) it before pickling"):
        pickle.dumps(tiny.model)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_two_forward_passes_before_their_losses_are_an_error(steps_before: int) -> None:
    tiny = small()
    with engine_for(tiny) as engine:
        for _ in range(steps_before):
            engine.loss(tiny.logits(), tiny.labels).backward()
            tiny.model.zero_grad()
        first = tiny.logits()
        tiny.logits()
        with pytest.raises(RuntimeError, match="sample weights are not known"):
            engine.loss(first, tiny.labels).backward()


def test_two_losses_of_one_forward_pass_are_an_error() -> None:
    tiny = small()
    with engine_for(tiny) as engine:
        logits = tiny.logits()
        engine.loss(logits, tiny.labels)
        with pytest.raises(RuntimeError, match="no forward pass since the last loss"):
            engine.loss(logits, tiny.labels.roll(1))


def test_a_forward_pass_without_a_loss_is_given_up() -> None:
    tiny = small()
    expected = oracle(tiny)
    with engine_for(tiny) as engine:
        tiny.rows(0, 3).logits()
        engine.loss(tiny.logits(), tiny.labels).backward()
        assert_same(captured(engine), expected)


@pytest.mark.parametrize("first_backward", ["dropped", "autograd.grad"])
def test_gradients_of_a_repeated_backward_are_counted_once(first_backward: str) -> None:
    tiny = small()
    expected = oracle(tiny)
    with engine_for(tiny) as engine:
        loss = engine.loss(tiny.logits(), tiny.labels)
        if first_backward == "dropped":
            loss.backward(retain_graph=True)
            tiny.model.zero_grad()
        else:
            torch.autograd.grad(loss, list(tiny.model.parameters()), retain_graph=True)
        loss.backward()
        assert_same(captured(engine), expected)


def test_zeroing_in_place_after_a_projection_starts_anew() -> None:
    tiny = small()
    expected = oracle(tiny)
    with engine_for(tiny) as engine:
        for _ in range(2):
            engine.loss(tiny.logits(), tiny.labels).backward()
            engine.project_()
            tiny.model.zero_grad(set_to_none=False)
        engine.loss(tiny.logits(), tiny.labels).backward()
        assert_same(captured(engine), expected)


def test_zeroing_in_place_without_a_projection_is_an_error() -> None:
    tiny = small()
    with engine_for(tiny) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        tiny.model.zero_grad(set_to_none=False)
        with pytest.raises(RuntimeError, match="set_to_none=True"):
            engine.loss(tiny.logits(), tiny.labels).backward()


def test_adding_to_projected_gradients_is_an_error() -> None:
    tiny = small()
    with engine_for(tiny) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        engine.project_()
        with pytest.raises(RuntimeError, match="projected already"):
            engine.loss(tiny.logits(), tiny.labels).backward()


def test_clipping_any_parameter_before_the_projection_is_an_error() -> None:
    tiny = small()
    with engine_for(tiny) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        nn.utils.clip_grad_norm_(tiny.model.head.parameters(), 1e-3)
        with pytest.raises(RuntimeError, match="changed after backward"):
            engine.project_()


def test_lagged_ratio_forgets_gradients_that_were_dropped() -> None:
    tiny = small()
    with engine_for(tiny, ratio="lagged") as engine:
        for _ in range(2):
            engine.loss(tiny.logits(), tiny.labels).backward()
            norm = engine.project_().erm_norm.clone()
            tiny.model.zero_grad()
        (1000 * engine.loss(other_batch(tiny).logits(), tiny.labels)).backward()
        tiny.model.zero_grad()
        engine.loss(tiny.logits(), tiny.labels).backward()
        torch.testing.assert_close(engine.project_().erm_norm, norm)


def test_samples_that_meet_in_a_function_are_refused() -> None:
    tiny = small()
    tiny.model.mix = True
    with engine_for(tiny) as engine:
        logits = tiny.logits()
        with pytest.raises(ValueError, match="samples meet"):
            engine.loss(logits, tiny.labels)
    expected = oracle(tiny)
    with engine_for(tiny, passes="auto") as engine:
        logits = tiny.logits()
        with pytest.warns(UserWarning, match="samples meet"):
            loss = engine.loss(logits, tiny.labels)
        loss.backward()
        assert_same(captured(engine), expected)


def test_rows_of_logits_in_another_order_are_refused() -> None:
    tiny = small()
    order = torch.tensor([2, 0, 3, 1])
    with engine_for(tiny) as engine:
        logits = tiny.logits()
        with pytest.raises(ValueError, match="samples meet"):
            engine.loss(logits[order], tiny.labels[order])


def test_independent_dropout_ignores_evaluation_and_refuses_two_forwards() -> None:
    tiny = bert(dropout=0.3)
    with fastproj.EDGE(tiny.model, dropout="independent", passes="two") as engine:
        logits = tiny.logits()
        with torch.no_grad():
            tiny.rows(0, 2).logits()
        engine.loss(logits, tiny.labels).backward()
        engine.project_()
        tiny.model.zero_grad()
        logits = tiny.logits()
        tiny.logits()
        with pytest.raises(RuntimeError, match="there were 2 since the last"):
            engine.loss(logits, tiny.labels)


def test_a_failed_attach_leaves_nothing_behind() -> None:
    tiny = small()
    before = {name: set(vars(module)) for name, module in tiny.model.named_modules()}
    tiny.model.head.forward = tiny.model.head.forward
    with pytest.raises(ValueError, match="already has a replaced forward"):
        engine_for(tiny)
    del tiny.model.head.forward
    assert {name: set(vars(module)) for name, module in tiny.model.named_modules()} == before
    assert not any(p._post_accumulate_grad_hooks for p in tiny.model.parameters())


def test_a_detached_engine_says_so() -> None:
    tiny = small()
    engine = engine_for(tiny)
    engine.detach()
    with pytest.raises(RuntimeError, match="detached"):
        engine.loss(tiny.logits(), tiny.labels)


def test_an_exception_in_backward_does_not_spoil_the_next_step() -> None:
    tiny = small()
    expected = oracle(tiny)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("on purpose")

    with engine_for(tiny) as engine:
        loss = engine.loss(tiny.logits(), tiny.labels)
        handle = tiny.model.inner.weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            loss.backward()
        handle.remove()
        tiny.model.zero_grad()
        engine.loss(tiny.logits(), tiny.labels).backward()
        assert_same(captured(engine), expected)


def test_a_model_that_does_not_say_whether_it_shifts_is_asked() -> None:
    tiny = gpt2()
    model = tiny.model.unload().requires_grad_(True)
    model.__class__ = type("SomethingElse", (type(model),), {})
    with fastproj.EDGE(model, params="trainable", passes="two") as engine:
        logits = model(**tiny.inputs).logits
        with pytest.raises(ValueError, match="pass shift=True"):
            engine.loss(logits, tiny.labels)


def test_backward_inside_autocast_sums_in_full_precision() -> None:
    tiny = small()
    tiny.model.float()
    part = Tiny(tiny.model, {"x": tiny.inputs["x"].float()}, tiny.labels, False)
    expected = oracle(part)
    with engine_for(part) as engine:
        loss = engine.loss(part.logits(), part.labels)
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        got = captured(engine)
    for name in ("head.weight", "head.bias"):
        for mine, exact in zip(got[name], expected[name], strict=True):
            # fp32 sums of the same fp32 gradients; bf16 sums would be off by 1e-3.
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-7)
