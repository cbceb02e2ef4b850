"""Where samples cannot be told apart, one pass refuses by name, and two passes are taken when allowed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_pass import assert_equal_to_two_passes, assert_same, captured, one_pass
from tiny_models import Tiny, bert, gpt2, two_pass_oracle
from torch import Tensor, nn

import fastproj
from fastproj.capture.select import select_parameters


def test_two_losses_in_one_backward_under_checkpointing_are_refused() -> None:
    tiny = bert()
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.model.enable_input_require_grads()
    with fastproj.EDGE(tiny.model) as engine:
        losses = [engine.loss(part.logits(), part.labels) for part in (tiny.rows(0, 2), tiny.rows(2, 4))]
        with pytest.raises(RuntimeError, match="each loss needs its own backward"):
            (losses[0] + losses[1]).backward()


def test_dora_is_refused_by_name_and_taken_in_two_passes() -> None:
    tiny = bert(use_dora=True)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*DoRA"):
        fastproj.EDGE(tiny.model)
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    with fastproj.EDGE(tiny.model, passes="auto") as engine:
        logits = tiny.logits()
        with pytest.warns(UserWarning, match="two backward"):
            loss = engine.loss(logits, tiny.labels)
        loss.backward()
        assert_same(captured(engine), expected)


class Normalised(nn.Module):
    """A batch norm between two linear layers: in training mode samples meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"logits": self.head(self.norm(self.inner(x)))})


def _normalised() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Normalised().double(), {"x": torch.randn(4, 6).double()}, torch.tensor([0, 1, 2, 1]), False)


def test_batch_norm_in_training_mode_is_refused_by_name() -> None:
    tiny = _normalised()
    with fastproj.EDGE(tiny.model, params="trainable") as engine:
        logits = tiny.logits()
        with pytest.raises(ValueError, match=r"norm \(BatchNorm1d in training mode mixes samples\)"):
            engine.loss(logits, tiny.labels)


def test_batch_norm_in_eval_mode_goes_in_one_pass() -> None:
    tiny = _normalised()
    tiny.model.norm.eval()
    assert_equal_to_two_passes(tiny, params="trainable")


def test_batch_norm_takes_two_passes_when_allowed() -> None:
    tiny = _normalised()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "trainable"))
    with fastproj.EDGE(tiny.model, params="trainable", passes="auto") as engine:
        logits = tiny.logits()
        with pytest.warns(UserWarning, match="BatchNorm1d in training mode"):
            loss = engine.loss(logits, tiny.labels)
        loss.backward()
        assert_same(captured(engine), expected)


def test_a_broadcast_position_embedding_is_refused_by_name() -> None:
    tiny = gpt2()
    tiny.model.base_model.model.transformer.wpe.weight.requires_grad_(True)
    with fastproj.EDGE(tiny.model, params="trainable") as engine:
        logits = tiny.logits()
        with pytest.raises(ValueError, match=r"transformer\.wpe \(its input has first dimension 1"):
            engine.loss(logits, tiny.labels)


def test_a_flattened_batch_is_refused_by_name() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": self.head(self.inner(x.flatten(0, 1)).view(x.shape)[:, 0])})

    model = Flattening().double()
    with fastproj.EDGE(model, params="trainable") as engine:
        logits = model(torch.randn(4, 3, 6).double()).logits
        with pytest.raises(ValueError, match=r"inner \(its input has first dimension 12"):
            engine.loss(logits, torch.tensor([0, 1, 2, 1]))


def test_a_weight_read_outside_its_layer_is_refused_by_name() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": self.head(F.linear(self.inner(x), self.inner.weight))})

    model = Direct().double()
    with fastproj.EDGE(model, params="trainable") as engine:
        logits = model(torch.randn(4, 6).double()).logits
        with pytest.raises(ValueError, match=r"inner\.weight \(is read by \w+ outside its layer\)"):
            engine.loss(logits, torch.tensor([0, 1, 2, 1]))


def test_attention_that_owns_its_weights_is_refused_by_name() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    with pytest.raises(ValueError, match=r"attention \(MultiheadAttention"):
        fastproj.EDGE(Attending(), params="trainable")


def test_backward_without_the_engines_loss_is_an_error() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model), pytest.raises(RuntimeError, match="sample weights are not known"):
        tiny.logits().sum().backward()


def test_a_second_engine_on_the_same_layers_is_refused() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model), pytest.raises(ValueError, match="already has a replaced forward"):
        fastproj.EDGE(tiny.model)


def test_no_warning_is_given_in_one_pass() -> None:
    tiny = bert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_pass(tiny)


def test_lora_on_embeddings_is_refused_by_name_and_taken_in_two_passes() -> None:
    tiny = gpt2(target_modules=["wte", "c_attn"])
    for name, parameter in tiny.model.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ValueError, match=r"lora_embedding_A \(ParameterDict has trainable parameters"):
        fastproj.EDGE(tiny.model)
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    assert any("lora_embedding_A" in name for name in expected)
    with fastproj.EDGE(tiny.model, passes="auto") as engine:
        logits = tiny.logits()
        with pytest.warns(UserWarning, match="two backward"):
            loss = engine.loss(logits, tiny.labels)
        loss.backward()
        assert_same(captured(engine), expected)
