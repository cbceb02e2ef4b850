"""One backward pass gives the gradients that two give, in fp64 to 1e-12, under every condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_pass import assert_equal_to_two_passes, assert_same, captured, one_pass
from tiny_models import ARCHITECTURES, Tiny, bert, gpt2, padded, two_pass_oracle, with_lora, with_nonzero_b
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fastproj
from fastproj.capture.select import select_parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_on_all_linear_layers(architecture: str) -> None:
    assert_equal_to_two_passes(ARCHITECTURES[architecture]())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(architecture: str, reentrant: bool) -> None:
    tiny = ARCHITECTURES[architecture]()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny.model.enable_input_require_grads()
    assert_same(one_pass(tiny), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_under_the_same_masks(architecture: str) -> None:
    assert_equal_to_two_passes(ARCHITECTURES[architecture](dropout=0.3, lora_dropout=0.2))


def test_dropout_with_gradient_checkpointing() -> None:
    tiny = gpt2(dropout=0.3, lora_dropout=0.2)
    torch.manual_seed(9)
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.model.enable_input_require_grads()
    torch.manual_seed(9)
    assert_same(one_pass(tiny), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(architecture: str, side: str) -> None:
    assert_equal_to_two_passes(ARCHITECTURES[architecture](side=side))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_accumulation_over_uneven_micro_batches(architecture: str) -> None:
    tiny = ARCHITECTURES[architecture]()
    parameters = select_parameters(tiny.model, "lora")
    parts = [tiny.rows(0, 1), tiny.rows(1, 4)]
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    for part in parts:
        for name, (e, g) in two_pass_oracle(part, parameters).items():
            before = totals.get(name, (torch.zeros_like(e), torch.zeros_like(g)))
            totals[name] = (before[0] + e / 2, before[1] + g / 2)
    with fastproj.EDGE(tiny.model) as engine:
        for part in parts:
            (engine.loss(part.logits(), part.labels) / 2).backward()
        assert_same(captured(engine), totals)


def test_two_losses_in_one_backward() -> None:
    tiny = bert()
    parts = [tiny.rows(0, 2), tiny.rows(2, 4)]
    parameters = select_parameters(tiny.model, "lora")
    first, second = (two_pass_oracle(part, parameters) for part in parts)
    totals = {name: (e + second[name][0], g + second[name][1]) for name, (e, g) in first.items()}
    with fastproj.EDGE(tiny.model) as engine:
        losses = [engine.loss(part.logits(), part.labels) for part in parts]
        (losses[0] + losses[1]).backward()
        assert_same(captured(engine), totals)


def test_gradients_dropped_without_a_projection_start_anew() -> None:
    tiny = bert()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    with fastproj.EDGE(tiny.model) as engine:
        for _ in range(2):
            tiny.model.zero_grad()
            engine.loss(tiny.logits(), tiny.labels).backward()
        assert_same(captured(engine), expected)


def test_a_module_called_twice_in_one_forward() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self.shared(torch.tanh(self.shared(x)))
            return type("Output", (), {"logits": self.head(hidden)})

    torch.manual_seed(0)
    tiny = Tiny(Twice().double(), {"x": torch.randn(5, 6).double()}, torch.tensor([0, 1, 2, 1, 0]), False)
    assert_equal_to_two_passes(tiny, params="trainable")


def test_rslora() -> None:
    assert_equal_to_two_passes(bert(use_rslora=True))


def test_several_adapters_capture_the_active_one() -> None:
    tiny = bert()
    tiny.model.add_adapter("second", tiny.model.peft_config["default"])
    with_nonzero_b(tiny.model.double()).set_adapter("second")
    assert_equal_to_two_passes(tiny)
    assert any(".second." in name for name in one_pass(tiny))
    assert not any("lora" in name and ".default." in name for name in one_pass(tiny))


def test_heads_saved_beside_the_adapter_with_their_biases() -> None:
    tiny = bert()
    assert any(
        name.endswith("classifier.modules_to_save.default.bias")
        for name in one_pass(tiny, params="trainable")
    )
    assert_equal_to_two_passes(tiny, params="trainable")


def test_lora_with_trainable_biases_and_layer_norms() -> None:
    tiny = bert(bias="all")
    for name, parameter in tiny.model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(True)
        if "key" in name and "bias" in name:
            parameter.requires_grad_(False)  # softmax does not see it: its gradient is rounding alone
    assert_equal_to_two_passes(tiny, params="trainable")


def test_embeddings_and_tied_weights_of_a_fully_trained_language_model() -> None:
    tiny = gpt2()
    model = tiny.model.unload()
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_equal_to_two_passes(Tiny(model, tiny.inputs, tiny.labels, True), params="trainable")


def test_padding_index_of_an_embedding_gets_no_gradient() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4, padding_idx=0, scale_grad_by_freq=True)
            self.head = nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Any:
            return type("Output", (), {"logits": self.head(self.embed(ids).sum(1))})

    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 0], [2, 2, 3], [4, 0, 0]])
    assert_equal_to_two_passes(
        Tiny(Bag().double(), {"ids": ids}, torch.tensor([0, 1, 2]), False), "trainable"
    )


def test_pieces_of_the_model_in_eval_mode() -> None:
    tiny = bert(dropout=0.4)
    tiny.model.base_model.model.bert.encoder.layer[0].eval()
    assert_equal_to_two_passes(tiny)


def test_a_batch_of_one() -> None:
    assert_equal_to_two_passes(gpt2().rows(0, 1))


def test_a_sample_whose_labels_are_all_ignored() -> None:
    tiny = gpt2()
    tiny.labels[1] = -100
    assert_equal_to_two_passes(tiny)


def test_loss_scaling_reaches_both_sets() -> None:
    tiny = bert()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with fastproj.EDGE(tiny.model) as engine:
        scaler.scale(engine.loss(tiny.logits(), tiny.labels)).backward()
        scaled = {name: (e / 1024, g / 1024) for name, (e, g) in captured(engine).items()}
    assert_same(scaled, expected)


def test_compiled_model() -> None:
    tiny = bert()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    with fastproj.EDGE(tiny.model) as engine:
        compiled = torch.compile(tiny.model, backend="aot_eager")
        engine.loss(compiled(**tiny.inputs).logits, tiny.labels).backward()
        assert_same(captured(engine), expected)


def test_model_without_replaced_forwards_after_detach() -> None:
    tiny = bert()
    before = {name: set(vars(module)) for name, module in tiny.model.named_modules()}
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in tiny.model.parameters()]
    one_pass(tiny)
    assert {name: set(vars(module)) for name, module in tiny.model.named_modules()} == before
    assert [len(p._post_accumulate_grad_hooks or ()) for p in tiny.model.parameters()] == hooks


def test_lora_on_convolutions_of_gpt2_is_seen_as_linear_layers() -> None:
    ids, mask = padded()
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = with_lora(GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True)
    tiny = Tiny(model, {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100), True)
    assert_equal_to_two_passes(tiny)


def test_evaluation_between_forward_passes_changes_nothing() -> None:
    tiny = bert()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    with fastproj.EDGE(tiny.model) as engine:
        with torch.no_grad():
            tiny.rows(0, 3).logits()
        engine.loss(tiny.logits(), tiny.labels).backward()
        assert_same(captured(engine), expected)


def test_autocast_errs_no_more_than_two_passes_do() -> None:
    tiny = bert()
    exact = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    tiny.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
        with fastproj.EDGE(tiny.model) as engine:
            loss = engine.loss(tiny.logits(), tiny.labels)
            loss.backward()
            got = captured(engine)
    for which in (0, 1):
        mine = _distance(got, exact, which)
        # bf16 keeps 8 bits; both routes round the same operands, in products of another shape.
        assert mine <= 1.5 * _distance(rounded, exact, which)
        assert mine > 1e-6, "autocast was not on"


def _distance(
    got: dict[str, tuple[Tensor, Tensor]], exact: dict[str, tuple[Tensor, Tensor]], which: int
) -> float:
    error = sum(((got[name][which] - pair[which]) ** 2).sum() for name, pair in exact.items())
    return float(error / sum((pair[which] ** 2).sum() for pair in exact.values())) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_checkpoints(reentrant: bool) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self._again(self._both, x.requires_grad_())
            return type("Output", (), {"logits": self.head(hidden)})

        def _both(self, x: Tensor) -> Tensor:
            return self._again(self.inner, torch.tanh(self.outer(x)))

        def _again(self, function: Any, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    tiny = Tiny(Nested().double(), {"x": torch.randn(5, 6).double()}, torch.tensor([0, 1, 2, 1, 0]), False)
    pairs = {}
    parameters = select_parameters(tiny.model, "trainable")
    weights = torch.softmax(tiny.logits(), -1)[torch.arange(5), tiny.labels].detach() ** 0.7
    for which, weight in enumerate((torch.ones(5).double(), weights)):
        tiny.model.zero_grad()
        (weight * F.cross_entropy(tiny.logits(), tiny.labels, reduction="none")).mean().backward()
        for name, parameter in parameters.items():
            pairs.setdefault(name, [None, None])[which] = parameter.grad.clone()
    assert_same(one_pass(tiny, params="trainable"), {name: tuple(pair) for name, pair in pairs.items()})
