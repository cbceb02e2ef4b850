"""Directions in words: planted tokens come up, lenses agree with the models' own norms, sentences rank."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import made_factors
import pytest
import tiny_text
import torch
from planted_direction import planted
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import fastproj
from fastproj import Basis, LatentFactors
from fastproj.latent.describe import Description, describe, token_text
from fastproj.latent.sentence_scores import sentence_scores
from fastproj.latent.token_lens import token_scores

WIDTH = 32
SENTENCES = ("the man is kind", "a fox sings", "the rich woman was lazy and poor then", "to be or not to be")


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "ffn_dim": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 5}
    config = OPTConfig(
        vocab_size=tiny_text.VOCABULARY, word_embed_proj_dim=WIDTH, init_std=tiny_text.SPREAD, **sizes, **ids
    )
    return OPTForCausalLM(config).eval()


def with_gains(model: nn.Module) -> Any:
    """The model with gains and biases of its norms unlike one and zero, so that leaving them out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.lower().endswith("norm"):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) * 3 + 0.2)
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return model


def along(direction: Tensor, side: str, key: str = "stream") -> LatentFactors:
    basis = Basis((direction.double() / direction.double().norm())[:, None])
    return made_factors.factors({key: basis}, side, "stream" if key == "stream" else "module")


def standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(correction=0)


def tokenizer_of(model: Any) -> Any:
    return tiny_text.tokenizer("bert" if model.config.model_type == "bert" else "causal")


def words(tokens: Any) -> list[str]:
    return [token.text for token in tokens]


CAUSAL: dict[str, tuple[Callable[[], Any], Callable[[Any], nn.Module]]] = {
    "llama": (tiny_text.llama, lambda model: model.model.norm),
    "gpt2": (tiny_text.gpt2, lambda model: model.transformer.ln_f),
    "opt": (opt, lambda model: model.model.decoder.final_layer_norm),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_written_tokens_are_the_derivative_of_the_models_own_logits(name: str) -> None:
    make, norm_of = CAUSAL[name]
    model = with_gains(make())
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    # Where x is orthogonal to d and has mean zero, a norm takes nothing from d but its mean.
    x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    centred = direction - direction.mean()
    x = x - x.mean()
    x = x - centred * (x @ centred) / (centred @ centred)

    def logits(at: Tensor) -> Tensor:
        return model.lm_head(norm_of(model)(at[None, None]))[0, 0]

    derivative = torch.autograd.functional.jvp(logits, x, direction)[1]
    factors = along(direction, "write")
    got = token_scores(model, factors, tiny_text.VOCABULARY)
    assert got.notes == ()
    # Sums of 32 products in fp32.
    torch.testing.assert_close(got.scores["stream"][:, 0], standardised(derivative), rtol=1e-4, atol=1e-5)


READERS = {
    "model.layers.1.self_attn.q_proj": (tiny_text.llama, "model.layers.1.input_layernorm"),
    "model.layers.0.mlp.up_proj": (tiny_text.llama, "model.layers.0.post_attention_layernorm"),
    "transformer.h.1.attn.c_attn": (tiny_text.gpt2, "transformer.h.1.ln_1"),
    "transformer.h.0.mlp.c_fc": (tiny_text.gpt2, "transformer.h.0.ln_2"),
    "model.decoder.layers.1.fc1": (opt, "model.decoder.layers.1.final_layer_norm"),
    "bert.encoder.layer.0.attention.self.query": (tiny_text.classifying_bert, "bert.embeddings.LayerNorm"),
    "bert.encoder.layer.1.attention.self.key": (
        tiny_text.classifying_bert,
        "bert.encoder.layer.0.output.LayerNorm",
    ),
    "bert.encoder.layer.1.intermediate.dense": (
        tiny_text.classifying_bert,
        "bert.encoder.layer.1.attention.output.LayerNorm",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_read_tokens_are_what_the_norm_in_front_makes_of_embeddings(name: str) -> None:
    make, norm = READERS[name]
    model = with_gains(make())
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        # No embedding is all zero here, not even that of padding, whose length no norm could change.
        embeddings += 0.01 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(4))
        want = model.get_submodule(norm)(embeddings[None])[0] @ (direction / direction.norm())
    got = token_scores(model, along(direction, "read", name), tiny_text.VOCABULARY)
    assert got.notes == ()
    # The norm adds 1e-5 to a variance of 1e-4 at the least: padding's. The others' is 0.25.
    own = [i for i in range(tiny_text.VOCABULARY) if i != 0]
    torch.testing.assert_close(
        standardised(got.scores[name][own, 0]), standardised(want[own]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", CAUSAL)
def test_a_planted_unembedding_row_is_the_token_written_most(name: str) -> None:
    model = with_gains(CAUSAL[name][0]())
    row = model.lm_head.weight[tiny_text.index("kind")]
    targets = {"llama": ["o_proj"], "gpt2": ["attn.c_proj"], "opt": ["out_proj"]}[name]
    tuned = planted(model, targets, row, "write")
    result = describe(tuned, tiny_text.tokenizer(), fastproj.identify(tuned, draws=0))
    (first,) = result.directions
    # The sign of a direction is arbitrary.
    assert "kind" in (words(first.positive_tokens)[0], words(first.negative_tokens)[0])
    assert (first.key, first.number, first.no_tokens) == ("stream", 0, "")
    scores = [token.score for token in first.positive_tokens]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)
    assert all(token.score < 0 for token in first.negative_tokens)


def test_a_planted_embedding_is_the_token_read_most_pooled_over_readers() -> None:
    model = tiny_text.llama()
    row = model.get_input_embeddings().weight[tiny_text.index("fox")]
    tuned = planted(model, ["q_proj", "up_proj"], row, "read")
    factors = fastproj.identify(tuned, side="read", rank=2, draws=0)
    result = describe(tuned, tiny_text.tokenizer(), factors, top=3, sentences=SENTENCES)
    first = result.directions[0]
    assert "fox" in (words(first.positive_tokens)[0], words(first.negative_tokens)[0])
    assert len(first.positive_tokens) == len(first.negative_tokens) == 3
    assert [d.number for d in result.directions] == [0, 1]


def test_encoders_write_by_their_input_embeddings_and_say_so() -> None:
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    for model in (tiny_text.classifying_bert(), tiny_text.encoding_bert()):
        got = token_scores(with_gains(model), along(direction, "write"), tiny_text.VOCABULARY)
        want = standardised(model.get_input_embeddings().weight.detach() @ direction)
        torch.testing.assert_close(got.scores["stream"][:, 0], want, rtol=1e-4, atol=1e-5)
        assert got.notes == ("The model has no unembedding: its input embeddings stand in for it.",)
    masked = token_scores(tiny_text.masked_bert(), along(direction, "write"), tiny_text.VOCABULARY)
    assert masked.notes == ("Layers of the head between the last block and the unembedding are left out.",)


def test_an_adapter_around_the_model_makes_no_difference_to_tokens_and_modes_come_back() -> None:
    model = tiny_text.gpt2()
    factors = made_factors.stream_factors(WIDTH)
    plain = describe(model, tiny_text.tokenizer(), factors, sentences=SENTENCES)
    tuned = planted(model, ["c_attn"], torch.ones(WIDTH), "read").train()
    tuned.base_model.model.transformer.h[0].eval()
    modes = [module.training for module in tuned.modules()]
    wrapped = describe(tuned, tiny_text.tokenizer(), factors, sentences=SENTENCES)
    assert [d.positive_tokens for d in wrapped.directions] == [d.positive_tokens for d in plain.directions]
    assert [module.training for module in tuned.modules()] == modes
    assert not any(module._forward_hooks for module in tuned.modules())
    assert all(parameter.grad is None for parameter in tuned.parameters())


def test_directions_of_another_space_have_no_tokens() -> None:
    tuned = planted(tiny_text.llama(), ["q_proj", "down_proj", "up_proj"], torch.ones(WIDTH), "write")
    factors = fastproj.identify(tuned, pool="module", draws=0)
    told = {d.key: d for d in describe(tuned, tiny_text.tokenizer(), factors, sentences=SENTENCES).directions}
    assert told["model.layers.0.mlp.up_proj"].no_tokens == "They have width 64, tokens 32."
    query = told["model.layers.0.self_attn.q_proj"]
    assert query.no_tokens == "What this module writes is not the residual stream."
    assert query.positive_tokens == query.negative_tokens == ()
    assert query.positive_sentences
    assert told["model.layers.1.mlp.down_proj"].positive_tokens


def by_hand(model: Any, tokenizer: Any, module: nn.Module, direction: Tensor, *, reads: bool) -> Tensor:
    """Scores at one place, a sentence at a time, without padding."""
    means, squares = [], []
    for sentence in SENTENCES:
        seen: list[Tensor] = []

        def hook(_: nn.Module, x: Any, y: Any, seen: list[Tensor] = seen) -> None:
            seen.append((x[0] if reads else y[0] if isinstance(y, tuple) else y).double())

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(sentence)["input_ids"]]))
        handle.remove()
        x = seen[0].reshape(-1, seen[0].shape[-1])[1:]  # the first token parks attention
        means.append((x @ direction).mean())
        squares.append(x.square().sum(1))
    return torch.stack(means) / torch.cat(squares).mean().sqrt()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("make", [tiny_text.llama, tiny_text.gpt2, tiny_text.classifying_bert])
def test_sentences_score_as_one_by_one(make: Callable[[], Any], batch_size: int) -> None:
    model = make()
    tokenizer = tokenizer_of(model)
    factors = made_factors.stream_factors(WIDTH, rank=1)
    direction = factors.bases["stream"].matrix[:, 0]
    got = sentence_scores(model, tokenizer, factors, SENTENCES, batch_size=batch_size)["stream"][:, 0]
    blocks = fastproj.architectures.blocks(model).values()
    want = torch.stack([by_hand(model, tokenizer, b, direction, reads=False) for b in blocks]).mean(0)
    # Scores up to 1 from activations in fp32, in batches of other shapes.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_a_module_reads_and_writes_is_taken_by_the_side() -> None:
    tuned = planted(tiny_text.llama(), ["down_proj"], torch.ones(WIDTH), "write")
    module = tuned.get_base_model().model.layers[1].mlp.down_proj
    for side, width in (("read", 64), ("write", WIDTH)):
        direction = torch.randn(width, generator=torch.Generator().manual_seed(5)).double()
        factors = along(direction, side, "model.layers.1.mlp.down_proj")
        got = sentence_scores(tuned, tiny_text.tokenizer(), factors, SENTENCES)
        want = by_hand(
            tuned, tiny_text.tokenizer(), module, direction / direction.norm(), reads=side == "read"
        )
        torch.testing.assert_close(got["model.layers.1.mlp.down_proj"][:, 0], want, rtol=1e-4, atol=1e-5)


def test_modules_that_read_one_tensor_are_one_place() -> None:
    model, tokenizer = tiny_text.llama(), tiny_text.tokenizer()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    names = [f"model.layers.1.self_attn.{name}_proj" for name in ("v", "k", "q")]
    factors = replace(
        made_factors.stream_factors(WIDTH, side="read", rank=1),
        modules=(*names, "model.layers.1.mlp.up_proj"),
    )
    direction = factors.bases["stream"].matrix[:, 0]
    got = sentence_scores(model, tokenizer, factors, SENTENCES)["stream"][:, 0]
    places = [by_hand(model, tokenizer, m, direction, reads=True) for m in (attention.q_proj, mlp.up_proj)]
    torch.testing.assert_close(got, torch.stack(places).mean(0), rtol=1e-4, atol=1e-5)
    # Directions of its own make each module a place.
    alike = made_factors.factors(dict.fromkeys(names, factors.bases["stream"]), "read", "module")
    each = sentence_scores(model, tokenizer, alike, SENTENCES)
    for name in names:
        torch.testing.assert_close(each[name][:, 0], places[0], rtol=1e-4, atol=1e-5)


def test_the_sentence_with_the_token_that_is_read_comes_first() -> None:
    model = tiny_text.gpt2()
    tokenizer = tiny_text.tokenizer()
    name = "transformer.h.0.attn.c_attn"
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight[tiny_text.index("cook")]
        direction = model.transformer.h[0].ln_1(embedding)
    given = [*SENTENCES, "the cook sings to the cook"]
    (only,) = describe(model, tokenizer, along(direction, "read", name), sentences=given).directions
    assert only.positive_sentences[0].text == given[-1]
    assert only.positive_sentences[0].number == 4
    assert words(only.positive_tokens)[0] == "cook"
    numbers = [s.number for s in (*only.positive_sentences, *only.negative_sentences)]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    scores = [s.score for s in (*only.positive_sentences, *only.negative_sentences)]
    assert sum(scores) == pytest.approx(0, abs=1e-9)
    assert sum(score**2 for score in scores) == pytest.approx(5)


def test_sentences_of_one_token_and_beyond_the_context_are_scored() -> None:
    model = tiny_text.gpt2(context=8)
    given = ["fox", "the man is lazy " * 20, "a fox"]
    scores = sentence_scores(model, tiny_text.tokenizer(), made_factors.stream_factors(WIDTH), given)
    assert scores["stream"].shape == (3, 2)
    assert bool(scores["stream"].isfinite().all())


def test_sentences_that_are_alike_are_on_neither_side() -> None:
    factors = made_factors.stream_factors(WIDTH)
    result = describe(tiny_text.llama(), tiny_text.tokenizer(), factors, sentences=["a fox"] * 3)
    assert all(not d.positive_sentences and not d.negative_sentences for d in result.directions)


def test_embeddings_beyond_the_tokenizer_are_no_tokens() -> None:
    torch.manual_seed(0)
    more = GPT2Config(n_layer=1, n_embd=WIDTH, n_head=2, vocab_size=tiny_text.VOCABULARY + 9, n_positions=32)
    model = GPT2LMHeadModel(more).eval()
    (first, _) = describe(
        model, tiny_text.tokenizer(), made_factors.stream_factors(WIDTH), top=1000
    ).directions
    listed = [token.id for token in (*first.positive_tokens, *first.negative_tokens)]
    assert sorted(listed) == list(range(tiny_text.VOCABULARY))


def test_sixteen_bits_and_embeddings_of_zero() -> None:
    model = tiny_text.llama().to(torch.bfloat16)
    row = model.lm_head.weight[tiny_text.index("kind")].detach().float()
    (told,) = describe(model, tiny_text.tokenizer(), along(row, "write"), sentences=SENTENCES).directions
    assert words(told.positive_tokens)[0] == "kind"
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (told,) = describe(model, tiny_text.tokenizer(), along(row, "write")).directions
    assert told.positive_tokens == told.negative_tokens == ()


def test_json_holds_everything() -> None:
    factors = made_factors.stream_factors(WIDTH)
    result = describe(tiny_text.llama(), tiny_text.tokenizer(), factors, sentences=SENTENCES, top=2)
    assert isinstance(result, Description)
    told = json.loads(result.to_json())
    assert set(told) == {"side", "directions", "notes"}
    assert told["directions"][1]["positive_tokens"][0]["text"] == result.directions[1].positive_tokens[0].text


class Bytes:
    """Tokens of a byte-level vocabulary and of one by sentencepiece."""

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["\u0120the", "\u2581the", "\u00c3", "x", "<pad>"][token]

    def decode(self, tokens: list[int]) -> str:
        return [" the", "the", "\ufffd", "x", ""][tokens[0]]


def test_tokens_are_told_as_they_are_read() -> None:
    assert [token_text(Bytes(), token) for token in range(5)] == [" the", " the", "\u00c3", "x", "<pad>"]


def nan_embeddings() -> nn.Module:
    model = tiny_text.llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_text.llama, {"top": 0}, "top: expected at least 1, got 0"),
        (tiny_text.llama, {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        (
            tiny_text.llama,
            {"sentences": ["one"]},
            "expected two or more, to hold against each other, got one",
        ),
        (tiny_text.llama, {"sentences": ["a fox", ""]}, "expected sentences with tokens, got ''"),
        (nan_embeddings, {}, "hold NaN or Inf"),
        (nan_embeddings, {"sentences": SENTENCES}, "hold NaN or Inf"),
    ],
)
def test_what_does_not_fit_is_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    factors = made_factors.stream_factors(WIDTH)
    with pytest.raises(ValueError, match=re.escape(message)):
        describe(make(), tiny_text.tokenizer(), factors, **options)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="got one string"):
        describe(
            tiny_text.llama(), tiny_text.tokenizer(), made_factors.stream_factors(WIDTH), sentences="a fox"
        )
    foreign = along(torch.ones(WIDTH), "read", "model.layers.7.self_attn.q_proj")
    with pytest.raises(ValueError, match=re.escape("expected a model with a module 'model.layers.7.")):
        describe(tiny_text.llama(), tiny_text.tokenizer(), foreign)
    model = tiny_text.llama()
    model.config.model_type = "none"
    with pytest.raises(ValueError, match="expected a model of type"):
        describe(model, tiny_text.tokenizer(), made_factors.stream_factors(WIDTH))
    wide = made_factors.stream_factors(WIDTH + 1)
    with pytest.raises(ValueError, match=r"expected activations of width 33 at 'model\.layers\.0', got 32"):
        describe(tiny_text.llama(), tiny_text.tokenizer(), wide, sentences=SENTENCES)
