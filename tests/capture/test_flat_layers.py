"""OPT calls the layers of its MLP with the tokens of all samples as rows: samples are still told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_pass import assert_equal_to_two_passes, assert_same, one_pass
from single_samples import batch_of, expected_scores
from tiny_models import VOCABULARY, Tiny, padded, two_pass_oracle, with_lora
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import fastproj
from fastproj.capture.select import flattening_modules, select_parameters


def opt(side: str = "right", dropout: float = 0.0, norm_before: bool = True, **options: Any) -> Tiny:
    torch.manual_seed(0)
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=16, dropout=dropout, do_layer_norm_before=norm_before,
    )  # fmt: skip
    model = with_lora(OPTForCausalLM(config), **options)
    ids, mask = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    return Tiny(model, {"input_ids": ids, "attention_mask": mask}, labels, True)


def with_norms(norm_before: bool) -> Tiny:
    """LayerNorms trained too: the last of a block is called with rows only where it comes before the MLP."""
    tiny = opt(norm_before=norm_before)
    for module in tiny.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return tiny


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_lora_on_all_linear_layers(side: str, dropout: float) -> None:
    tiny = opt(side, dropout)
    assert_equal_to_two_passes(tiny)
    assert any("fc1.lora_A" in name for name in one_pass(tiny))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    tiny = opt()
    expected = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    tiny.model.enable_input_require_grads()
    assert_same(one_pass(tiny), expected)


@pytest.mark.parametrize("norm_before", [True, False])
def test_layer_norms(norm_before: bool) -> None:
    tiny = with_norms(norm_before)
    assert_equal_to_two_passes(tiny, params="trainable")
    assert any("final_layer_norm.weight" in name for name in one_pass(tiny, params="trainable"))


@pytest.mark.parametrize("rows", [(0, 1), (1, 3)], ids=str)
def test_batches_of_one_and_of_two(rows: tuple[int, int]) -> None:
    assert_equal_to_two_passes(opt().rows(*rows))


@pytest.mark.parametrize("norm_before", [True, False])
def test_influence_is_that_of_single_backward_passes(norm_before: bool) -> None:
    tiny = with_norms(norm_before)
    tiny.model.eval()
    scorer = fastproj.InfluenceScorer(tiny.model, params="trainable")
    references = scorer.reference({"first": [batch_of(tiny.rows(0, 2))], "last": [batch_of(tiny.rows(2, 4))]})
    (rows,) = scorer.score_batches([batch_of(tiny)], references)
    # fp64 sums of products in another order.
    torch.testing.assert_close(rows.values, expected_scores(tiny, references, None), rtol=1e-10, atol=1e-10)


def test_rows_that_are_no_whole_number_a_sample_are_refused_by_name() -> None:
    tiny = opt(target_modules=["fc1"])
    with fastproj.EDGE(tiny.model) as engine:
        logits = tiny.logits()
        with pytest.raises(ValueError, match=r"fc1\.lora_A\.default \(its input has first dimension 28, not"):
            engine.loss(logits[:3], tiny.labels[:3])


def test_only_blocks_of_opt_are_known_to_do_so() -> None:
    found = flattening_modules(opt().model)
    assert found == tuple(f"base_model.model.model.decoder.layers.{number}" for number in (0, 1))
    assert flattening_modules(nn.Sequential(nn.Linear(2, 2))) == ()
