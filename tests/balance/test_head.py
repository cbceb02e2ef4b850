"""Hidden states and logits of a few tokens against the whole model, through adapters of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_architectures
import tiny_text
import torch
from causal_models import CAUSAL, CLOSE, causal, prompts
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForCausalLM

from fastproj.balance.head import answer_positions, causal_model, decoder, final_hidden, token_logits

TOKENS = (3, 29, 7, 3)


def check_against_the_model(model: nn.Module) -> None:
    """Values, and the gradient of every parameter that has one."""
    ids, mask = prompts()
    real = mask.bool()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = model(input_ids=ids, attention_mask=mask).logits[..., TOKENS]
    hidden = final_hidden(model, ids, mask)
    assert hidden.shape[:2] == ids.shape
    found = token_logits(model, hidden, TOKENS)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(found[real], wanted[real], **CLOSE)
    torch.testing.assert_close(token_logits(model, hidden, None)[..., TOKENS][real], wanted[real], **CLOSE)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = [
        torch.autograd.grad((logits * weight)[real].sum(), parameters, allow_unused=True)
        for logits in (found, wanted)
    ]
    for one, other in zip(*pairs, strict=True):
        if other is not None:
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=CLOSE["rtol"], atol=CLOSE["atol"] * max(scale, 1))


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_of_the_head_give_the_models_logits(name: str) -> None:
    check_against_the_model(causal(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt of narrow embeddings"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["lm_head"]},
    ],
    ids=["layers", "head", "head in full"],
)
def test_an_adapter_counts_wherever_it_sits(name: str, options: dict[str, Any]) -> None:
    model = causal(name)
    ids, mask = prompts()
    before = token_logits(model, final_hidden(model, ids, mask), TOKENS).detach()
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(token_logits(wrapped, final_hidden(wrapped, ids, mask), TOKENS), before)
    check_against_the_model(wrapped)
    with wrapped.disable_adapter():
        found = token_logits(wrapped, final_hidden(wrapped, ids, mask), TOKENS)
        torch.testing.assert_close(found, before, **CLOSE)


def test_the_softcap_is_applied_and_matters() -> None:
    model = causal("gemma2")
    hidden = 100 * final_hidden(model, *prompts())
    found = token_logits(model, hidden, TOKENS)
    assert float(found.detach().abs().max()) <= 3.0
    model.config.final_logit_softcapping = None
    assert float(token_logits(model, hidden, TOKENS).detach().abs().max()) > 3.0


@pytest.mark.parametrize("width", [1, 4])
def test_shapes_of_hidden_states_and_tokens(width: int) -> None:
    model = causal("llama")
    hidden = torch.randn(2, 3, width, 16, dtype=torch.float64)
    for tokens in (TOKENS, torch.tensor(TOKENS), torch.tensor(TOKENS, dtype=torch.int32), list(TOKENS)):
        assert token_logits(model, hidden, tokens).shape == (2, 3, width, 4)
    assert token_logits(model, hidden[:0], TOKENS).shape == (0, 3, width, 4)
    assert token_logits(model, hidden, ()).shape == (2, 3, width, 0)
    turned = hidden.transpose(0, 1)
    assert torch.equal(token_logits(model, turned, TOKENS), token_logits(model, turned.contiguous(), TOKENS))


def test_a_head_with_a_bias() -> None:
    model = causal("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(30, dtype=torch.float64))
    check_against_the_model(model)


def doubled_by_a_hook(head: nn.Module) -> None:
    head.register_forward_hook(lambda _, __, output: 2 * output)


def doubled_in_front(head: nn.Module) -> None:
    head.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def doubled_by_its_forward(head: Any) -> None:
    plain = head.forward
    head.forward = lambda hidden: 2 * plain(hidden)


@pytest.mark.parametrize("double", [doubled_by_a_hook, doubled_in_front, doubled_by_its_forward])
def test_what_is_attached_to_the_head_is_run(double: Callable[[nn.Module], None]) -> None:
    model = causal("llama")
    hidden = final_hidden(model, *prompts())
    before = token_logits(model, hidden, TOKENS)
    double(model.lm_head)
    torch.testing.assert_close(token_logits(model, hidden, TOKENS), 2 * before)
    check_against_the_model(model)


def test_only_rows_asked_for_are_multiplied() -> None:
    model = causal("llama")
    hidden = final_hidden(model, *prompts())
    with torch.no_grad():
        model.lm_head.weight[[*range(3), *range(4, 7), *range(8, 29)]] = torch.nan
    assert bool(token_logits(model, hidden, TOKENS).isfinite().all())


def test_options_reach_the_model() -> None:
    model = causal("gpt2")
    ids, mask = prompts("left")
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found = final_hidden(model, ids, mask, position_ids=places, use_cache=False)
    right = final_hidden(model, *prompts())
    # The first prompt has no padding, the second has its two tokens at the other end.
    torch.testing.assert_close(found[1, -2:], final_hidden(model, ids[1:2, -2:], mask[1:2, -2:])[0], **CLOSE)
    torch.testing.assert_close(found[0], right[0], **CLOSE)


def test_the_decoder_of_an_adapted_model_is_the_models_own() -> None:
    model = causal("gpt2")
    assert decoder(model) is model.transformer
    wrapped = get_peft_model(model, LoraConfig(r=2))
    assert decoder(wrapped) is model.transformer
    assert causal_model(wrapped) is model


def test_models_that_are_no_causal_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="causal language model, got a BertForMaskedLM"):
        causal_model(tiny_text.masked_bert())
    config = RobertaConfig(**tiny_text.SIZES, is_decoder=True)
    with pytest.raises(ValueError, match="causal language model, got a RobertaForCausalLM"):
        causal_model(RobertaForCausalLM(config))
    with pytest.raises(ValueError, match="causal or masked language model"):
        final_hidden(tiny_architectures.tiny("llama", bare=True), *prompts())
    with pytest.raises(ValueError, match="expected a model of type"):
        token_logits(nn.Linear(2, 2), torch.zeros(1, 2), TOKENS)


def test_tokens_that_an_adapter_puts_in_front_are_refused() -> None:
    model = get_peft_model(causal("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="inside the model's layers, got PREFIX_TUNING"):
        final_hidden(model, *prompts())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_answers_stand_at_the_last_token(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 1]], dtype=dtype)
    assert answer_positions(mask).tolist() == [1, 2, 0, 2, 2]


def test_a_row_of_padding_alone_has_no_answer() -> None:
    with pytest.raises(ValueError, match="a row of padding alone"):
        answer_positions(torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match="a row of padding alone"):
        answer_positions(torch.zeros(2, 0))
    empty: Tensor = answer_positions(torch.zeros(0, 3))
    assert empty.shape == (0,)
