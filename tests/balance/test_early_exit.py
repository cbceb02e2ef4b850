"""Label logits of every layer against single prompts, the model's own, and the loss that takes them."""

from __future__ import annotations

import json
import math

import pytest
import tiny_text
import torch
from tiny_architectures import BLOCKS, VOCABULARY, WIDTH, adapted, tiny
from tiny_text import tokenizer
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import fastproj
from fastproj import EarlyExit, LabelWords, early_exit
from fastproj.architectures import ARCHITECTURES, final_layers
from fastproj.balance.prompts import Example

ENCODERS = ("bert", "roberta")
CAUSAL = sorted(set(ARCHITECTURES) - set(ENCODERS))
LABELS = LabelWords(
    ("joy", "anger", "fear", "none"), (" joy", " anger", " fear", " none"), ((3,), (7, 2), (11,), (12,))
)
PROMPTS = [(2, 3, 4, 5, 6, 7), (8,), (4, 9, 4), (2, 3, 11, 12), (13, 14, 2, 2, 3)]
CLASSES = [0, 1, 0, 2, 1]
EXAMPLES = [Example(str(i), PROMPTS[i], (CLASSES[i],)) for i in range(len(PROMPTS))]
# Logits of order one in fp32, where two orders of summation differ by some 1e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def spread(model: nn.Module) -> nn.Module:
    """Weights far from zero, so that layers differ."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def narrow_opt(without_norm: bool) -> nn.Module:
    """As OPT-350m: embeddings narrower than blocks, norms behind them, no final one."""
    config = OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=8, ffn_dim=24, num_hidden_layers=BLOCKS, num_attention_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=16, do_layer_norm_before=not without_norm,
        _remove_final_layer_norm=without_norm, pad_token_id=0,
    )  # fmt: skip
    return spread(OPTForCausalLM(config))


def alone(model: nn.Module) -> Tensor:
    """Label logits of each prompt by itself from each layer, (L + 1, N, C), the last the model's own."""
    rows = []
    for prompt in PROMPTS:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
            layers = []
            for stream in out.hidden_states[:-1]:
                end = stream
                for layer in final_layers(model):
                    end = layer(end)
                layers.append(model.get_output_embeddings()(end)[0, -1])
            cap = getattr(model.config, "final_logit_softcapping", None)
            if cap is not None:
                layers = [torch.tanh(logits / cap) * cap for logits in layers]
            rows.append(torch.stack([*layers, out.logits[0, -1]])[:, list(LABELS.first)])
    return torch.stack(rows, 1).double()


def means(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of (L + 1, N, C) over those with and those without each label."""
    classes = torch.tensor(CLASSES)
    sides = []
    for has in (True, False):
        columns = [logits[:, (classes == c) == has, c].mean(1) for c in range(len(LABELS))]
        sides.append(torch.stack(columns, 1))
    return sides[0], sides[1]


@pytest.mark.parametrize(
    "model",
    [
        *(lambda kind=kind: spread(tiny(kind)) for kind in CAUSAL),
        lambda: narrow_opt(True),
        lambda: narrow_opt(False),
    ],
    ids=[*CAUSAL, "opt without norm", "narrow opt"],
)
def test_every_layer_is_what_single_prompts_give(model: object) -> None:
    built: nn.Module = model()  # type: ignore[operator]
    found = early_exit(built, tokenizer(), EXAMPLES, LABELS, batch_size=3)
    contain, not_contain = means(alone(built))
    assert found.contain.shape == (BLOCKS + 1, 4)
    assert found.contain.dtype == torch.float64
    torch.testing.assert_close(found.contain, contain, **CLOSE, equal_nan=True)
    torch.testing.assert_close(found.not_contain, not_contain, **CLOSE, equal_nan=True)
    assert found.contain[:, 3].isnan().all()
    assert not found.not_contain.isnan().any()
    # Layers differ by far more than that.
    assert (contain[0, 0] - contain[1, 0]).abs() > 1000 * CLOSE["atol"]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_adapters_count_and_the_last_layer_is_label_logits(kind: str) -> None:
    model = adapted(kind, noise=0.5)
    one = [Example("one", PROMPTS[0], (1,))]
    found = early_exit(model, tokenizer(), one, LABELS)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = fastproj.label_logits(model.eval(), ids, torch.ones_like(ids), LABELS)[0].double()
    last = torch.where(found.contain[-1].isnan(), found.not_contain[-1], found.contain[-1])
    torch.testing.assert_close(last, expected, **CLOSE)
    assert found.contain[-1].isnan().tolist() == [True, False, True, True]
    with model.disable_adapter():
        assert (early_exit(model, tokenizer(), one, LABELS).contain[-1, 1] - last[1]).abs() > 1e-3


def test_batches_training_mode_and_order_make_no_difference() -> None:
    model = tiny_text.gpt2()
    expected = early_exit(model, tokenizer(), EXAMPLES, LABELS, batch_size=8)
    model.train()
    model.transformer.h[0].eval()
    for batch_size in (1, 2, 5):
        found = early_exit(model, tokenizer(), EXAMPLES[::-1], LABELS, batch_size=batch_size)
        torch.testing.assert_close(found.contain, expected.contain, **CLOSE, equal_nan=True)
        torch.testing.assert_close(found.not_contain, expected.not_contain, **CLOSE, equal_nan=True)
    assert model.training
    assert not model.transformer.h[0].training


def test_a_shift_of_the_first_block_s_input_comes_behind_the_first_layer() -> None:
    model = spread(tiny("llama"))
    before = early_exit(model, tokenizer(), EXAMPLES, LABELS)
    wrapped = fastproj.add_balance_adapter(model, 0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "input_shift" in name and parameter.requires_grad:
                parameter.fill_(1.0)
    after = early_exit(wrapped, tokenizer(), EXAMPLES, LABELS)
    assert torch.equal(after.not_contain[0], before.not_contain[0])
    assert (after.not_contain[1] - before.not_contain[1]).abs().min() > 1e-3


@pytest.mark.parametrize("classes", [[0, 1, 0, 2, 1], [1, 1, 1, 1, 1], [3, 0, 3, 0, 0]])
def test_norms_of_a_layer_are_those_of_the_loss(classes: list[int]) -> None:
    model = tiny_text.gpt2()
    examples = [Example(str(i), PROMPTS[i], (label,)) for i, label in enumerate(classes)]
    found = early_exit(model, tokenizer(), examples, LABELS)
    own = alone(model)
    for layer in range(len(own)):
        expected = fastproj.balance_loss(own[layer], torch.tensor(classes))
        assert found.propensity[layer].item() == pytest.approx(expected.propensity.item(), rel=1e-5, abs=1e-5)
        assert found.discrimination[layer].item() == pytest.approx(
            expected.discrimination.item(), rel=1e-5, abs=1e-5
        )


def test_norms_by_hand() -> None:
    nan = math.nan
    contain = torch.tensor([[3.0, 5.0, 10.0, nan], [0.0, 0.0, 6.0, nan]], dtype=torch.float64)
    not_contain = torch.tensor([[0.0, 1.0, nan, 7.0], [4.0, -3.0, nan, 7.0]], dtype=torch.float64)
    found = EarlyExit(contain, not_contain, ("a", "b", "all", "none"))
    # H^C is 3, 5, 10 around 6, then 0, 0, 6 around 2; H^N of labels that some have is 0, 1, then 4, −3.
    spreads = [math.sqrt(9 + 1 + 16) + math.sqrt(0.5), math.sqrt(4 + 4 + 16) + math.sqrt(24.5)]
    assert found.propensity.tolist() == pytest.approx(spreads)
    # 3 − 0 and 5 − 1, then 0 − 4 and 0 + 3.
    assert found.discrimination.tolist() == pytest.approx([5, 5])
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["contain"] == [[3, 5, 10, None], [0, 0, 6, None]]
    assert told["not_contain"] == [[0, 1, None, 7], [4, -3, None, 7]]
    assert told["names"] == ["a", "b", "all", "none"]
    assert told["propensity"] == pytest.approx(spreads)
    assert told["discrimination"] == pytest.approx([5, 5])


def test_samples_of_several_labels_and_of_none() -> None:
    model = tiny_text.gpt2()
    examples = [Example("both", PROMPTS[0], (0, 1)), Example("none", PROMPTS[1], ())]
    found = early_exit(model, tokenizer(), examples, LABELS)
    own = alone(model)[:, :2]
    torch.testing.assert_close(found.contain[:, :2], own[:, 0, :2], **CLOSE)
    torch.testing.assert_close(found.not_contain[:, :2], own[:, 1, :2], **CLOSE)
    torch.testing.assert_close(found.not_contain[:, 2:], own[:, :, 2:].mean(1), **CLOSE)
    assert found.contain[:, 2:].isnan().all()


def test_labels_with_one_first_token_are_read_alike() -> None:
    model = tiny_text.gpt2()
    alike = LabelWords(("joy", "joyful"), (" joy", " joyful"), ((3,), (3, 4)))
    found = early_exit(model, tokenizer(), [Example("one", PROMPTS[0], (0,))], alike)
    assert torch.equal(found.contain[:, 0], found.not_contain[:, 1])


def test_bf16_models_are_read() -> None:
    model = spread(tiny("llama"))
    exact = early_exit(model, tokenizer(), EXAMPLES, LABELS)
    found = early_exit(model.to(torch.bfloat16), tokenizer(), EXAMPLES, LABELS)
    size = exact.not_contain.abs().max().item()
    # 8 bits in each of some ten operations in a row.
    torch.testing.assert_close(found.not_contain, exact.not_contain, rtol=0, atol=10 * size / 2**8)


def test_what_cannot_be_read_is_refused() -> None:
    model = tiny_text.gpt2(8)
    with pytest.raises(ValueError, match="expected at least one example, got none"):
        early_exit(model, tokenizer(), [], LABELS)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        early_exit(model, tokenizer(), EXAMPLES, LABELS, batch_size=0)
    for prompt in ((), (3,) * 9):
        with pytest.raises(
            ValueError, match=f"expected a prompt of 1 to 8 tokens, got {len(prompt)} in 'odd'"
        ):
            early_exit(model, tokenizer(), [Example("odd", prompt, (0,))], LABELS)
    for encoder in ENCODERS:
        with pytest.raises(ValueError, match="expected a causal language model"):
            early_exit(tiny(encoder), tokenizer(), EXAMPLES, LABELS)


def test_a_broken_model_is_named_and_left_as_it_was() -> None:
    model = tiny_text.gpt2().train()
    with torch.no_grad():
        model.transformer.wte.weight[9] = math.nan
    with pytest.raises(ValueError, match="the model gives NaN or Inf among the examples '2', '3'"):
        early_exit(model, tokenizer(), EXAMPLES, LABELS, batch_size=2)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
