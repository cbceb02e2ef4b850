"""transformers' Conv1D, a linear layer whose weight is (d_in, d_out), as one pass sees it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from one_pass import assert_equal_to_two_passes, assert_same, captured, one_pass
from single_samples import batch_of, expected_scores, one_by_one, trained_adamw
from tiny_models import Tiny, gpt2, two_pass_oracle
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastproj
from fastproj.capture.attach import CapturedForward
from fastproj.capture.functions import conv1d
from fastproj.capture.select import captured_kind, select_parameters
from fastproj.influence.optimizer_state import adam_states
from fastproj.reference.adam import adam_update

# fp64 sums of products in another order, of at most 1e5 terms.
ROUNDING = 1e-10


def convolutions(side: str = "right", dropout: float = 0.0) -> Tiny:
    """GPT-2 with nothing trainable but its Conv1D layers: all linear layers of its blocks."""
    tiny = gpt2(side, dropout)
    model = tiny.model.unload().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.requires_grad_(True)
    # The attention does not see a shift of all keys: the gradient of that bias is rounding alone.
    for block in model.transformer.h:
        block.attn.c_attn.bias.requires_grad_(False)
    return Tiny(model, tiny.inputs, tiny.labels, True)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 2, 2, 3), (0, 4, 3), (1, 1, 3)], ids=str)
def test_the_product_is_that_of_transformers(shape: tuple[int, ...]) -> None:
    layer = Conv1D(6, 3)
    x = torch.randn(shape)
    assert torch.equal(conv1d(x, layer.weight, layer.bias), layer(x))


def test_a_transposed_input_is_taken_as_it_is() -> None:
    layer = Conv1D(6, 3).double()
    x = torch.randn(2, 3, 4).double().transpose(1, 2)
    assert not x.is_contiguous()
    assert torch.equal(conv1d(x, layer.weight, layer.bias), layer(x.contiguous()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gpt2_trained_in_full(side: str, dropout: float) -> None:
    tiny = convolutions(side, dropout)
    assert_equal_to_two_passes(tiny, params="trainable")
    shapes = {name: tuple(e.shape) for name, (e, _) in one_pass(tiny, params="trainable").items()}
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (32, 128)
    assert len(shapes) == 2 * 7


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tiny = convolutions()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "trainable"))
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny.model.enable_input_require_grads()
    assert_same(one_pass(tiny, params="trainable"), expected)


def test_gradient_accumulation() -> None:
    tiny = convolutions()
    parameters = select_parameters(tiny.model, "trainable")
    parts = [tiny.rows(0, 1), tiny.rows(1, 4)]
    first, second = (two_pass_oracle(part, parameters) for part in parts)
    totals = {name: (e + second[name][0], g + second[name][1]) for name, (e, g) in first.items()}
    with fastproj.EDGE(tiny.model, params="trainable") as engine:
        for part in parts:
            engine.loss(part.logits(), part.labels).backward()
        assert_same(captured(engine), totals)


def test_a_layer_called_twice_and_on_single_tokens() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = Conv1D(6, 6), Conv1D(3, 6)

        def forward(self, x: Tensor) -> Any:
            hidden = self.shared(torch.tanh(self.shared(x)))
            return type("Output", (), {"logits": self.head(hidden)})

    torch.manual_seed(0)
    model = Twice().double()
    nn.init.normal_(model.shared.weight)
    tiny = Tiny(model, {"x": torch.randn(5, 6).double()}, torch.tensor([0, 1, 2, 1, 0]), False)
    assert_equal_to_two_passes(tiny, params="trainable")


@pytest.mark.parametrize("with_adam", [True, False])
def test_influence_is_that_of_single_backward_passes(with_adam: bool) -> None:
    tiny = convolutions()
    scorer = fastproj.InfluenceScorer(tiny.model, params="trainable")
    adam = None
    if with_adam:
        optimizer = trained_adamw(scorer)
        scorer = fastproj.InfluenceScorer(tiny.model, optimizer, params="trainable")
        adam = adam_states(optimizer, tiny.model, scorer.parameters)
    references = scorer.reference({"first": [batch_of(tiny.rows(0, 2))], "last": [batch_of(tiny.rows(2, 4))]})
    (rows,) = scorer.score_batches([batch_of(tiny)], references)
    expected = expected_scores(tiny, references, adam)
    torch.testing.assert_close(rows.values, expected, rtol=ROUNDING, atol=ROUNDING)


def test_sketches_are_those_of_the_parameters_own_layout() -> None:
    tiny = convolutions()
    scorer = fastproj.InfluenceScorer(tiny.model, params="trainable")
    optimizer = trained_adamw(scorer)
    scorer = fastproj.InfluenceScorer(tiny.model, optimizer, params="trainable")
    adam = adam_states(optimizer, tiny.model, scorer.parameters)
    (rows,) = scorer.sketch_batches([batch_of(tiny)], 16, seed=3)
    for row, gradients in enumerate(one_by_one(tiny, scorer.parameters)):
        updates = [adam_update(gradient, adam[name])[None] for name, gradient in gradients.items()]
        expected = fastproj.sketch(updates, 16, seed=3, kind="srht")[0]
        torch.testing.assert_close(rows.values[row], expected, rtol=ROUNDING, atol=ROUNDING)


def test_autocast_errs_no_more_than_two_passes_do() -> None:
    tiny = convolutions()
    parameters = select_parameters(tiny.model, "trainable")
    exact = two_pass_oracle(tiny, parameters)
    tiny.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = two_pass_oracle(tiny, parameters)
        got = one_pass(tiny, params="trainable")
    for which in (0, 1):
        mine, theirs = (
            sum(float((own[name][which] - pair[which]).square().sum()) for name, pair in exact.items()) ** 0.5
            for own in (got, rounded)
        )
        # bf16 keeps 8 bits; both routes round the same operands, in products of another shape.
        assert 0 < mine <= 1.5 * theirs


def test_copies_have_their_own_forward_and_pickles_are_refused() -> None:
    tiny = convolutions()
    before = tiny.logits()
    with fastproj.EDGE(tiny.model, params="trainable"):
        copied = copy.deepcopy(tiny.model)
        with pytest.raises(TypeError, match="detach"):
            pickle.dumps(tiny.model)
    assert torch.equal(copied(**tiny.inputs).logits, before)
    modules = [*tiny.model.modules(), *copied.modules()]
    assert not any(isinstance(module.forward, CapturedForward) for module in modules)


def test_layers_made_from_it_are_no_captured_layers() -> None:
    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert captured_kind(Conv1D(2, 2)) == "Conv1D"
    assert captured_kind(Scaled(2, 2)) is None
    with pytest.raises(ValueError, match=r"Scaled has trainable parameters; one pass captures .*, Conv1D"):
        fastproj.EDGE(nn.Sequential(Scaled(2, 2)), params="trainable", shift=False)
