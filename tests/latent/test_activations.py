"""Cohen's d of activations along directions, against plain forward passes of one sentence at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_text
import torch
from peft import LoraConfig, get_peft_model
from tiny_architectures import drawn
from torch import Tensor, nn
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from fastproj.architectures import blocks
from fastproj.latent.evidence import activation_difference
from fastproj.latent.factors import LatentFactors
from fastproj.latent.identify import identify
from fastproj.reference.basis import orthonormalize

WITH = ["the rich man sings", "a rich woman is kind .", "rich", "the fox is rich and lazy"]
WITHOUT = ["the poor man sings .", "poor", "a cook and a fox", "poor woman", "to be or not to be"]


def causal() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**tiny_text.SIZES, max_position_embeddings=16))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    return drawn(model, noise=0.1).train(), tiny_text.tokenizer()


def masked() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    config = tiny_text.BertConfig(**tiny_text.SIZES, max_position_embeddings=16)
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    model = get_peft_model(BertForMaskedLM(config), LoraConfig(r=2, target_modules=targets))
    return drawn(model, noise=0.1), tiny_text.tokenizer("bert")


def cohens_d(first: Tensor, second: Tensor) -> Tensor:
    n, m = len(first), len(second)
    pooled = ((n - 1) * first.var(0) + (m - 1) * second.var(0)) / (n + m - 2)
    return (first.mean(0) - second.mean(0)) / pooled.sqrt()


def single_passes(
    model: Any, tokenizer: Any, take: Callable[[Callable[[Tensor], None]], Any], directions: Tensor
) -> Tensor:
    """(sentences, rank): means over tokens but the first of what is hooked, each sentence run alone."""
    rows = []
    model.eval()
    for sentence in (*WITH, *WITHOUT):
        kept: list[Tensor] = []
        handle = take(kept.append)
        with torch.no_grad():
            model(input_ids=torch.tensor([tokenizer(sentence)["input_ids"]]))
        handle.remove()
        x = kept[0][0].double()
        rows.append((x[min(1, len(x) - 1) :] @ directions).mean(0))
    return torch.stack(rows)


def hooking(module: nn.Module, reads: bool) -> Callable[[Callable[[Tensor], None]], Any]:
    def take(keep: Callable[[Tensor], None]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
            keep(inputs[0] if reads else out[0] if isinstance(out, tuple) else out)

        return module.register_forward_hook(hook)

    return take


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("build", [causal, masked])
def test_differences_of_modules_are_those_of_single_passes(build: Any, side: Any) -> None:
    model, tokenizer = build()
    factors = identify(model, side=side, pool="module", rank=2, draws=0)
    found = activation_difference(model, tokenizer, factors, WITH, WITHOUT, batch_size=3)
    assert list(found) == list(factors.bases)
    modules = dict(model.get_base_model().named_modules())
    for name in list(factors.bases)[::5]:
        take = hooking(modules[name], side == "read")
        scores = single_passes(model, tokenizer, take, factors.bases[name].matrix)
        expected = cohens_d(scores[: len(WITH)], scores[len(WITH) :])
        # fp32 passes, padded in batches or alone.
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("build", [causal, masked])
def test_differences_of_the_stream_are_means_of_standardised_places(build: Any, side: Any) -> None:
    model, tokenizer = build()
    factors = identify(model, side=side, rank=3, draws=0)
    found = activation_difference(model, tokenizer, factors, WITH, WITHOUT, batch_size=4)["stream"]
    modules = dict(model.get_base_model().named_modules())
    # Keys and values read what queries do, the second layer of a gated MLP what its gate does.
    again = ("k_proj", "v_proj", "up_proj", "key", "value")
    readers = [name for name in factors.modules if not name.endswith(again)]
    assert side == "write" or len(readers) == 4
    places = blocks(model).values() if side == "write" else [modules[name] for name in readers]
    basis = factors.bases["stream"].matrix
    total = torch.zeros(len(WITH) + len(WITHOUT), 3, dtype=torch.float64)
    for place in places:
        scores = single_passes(model, tokenizer, hooking(place, side == "read"), basis)
        total += (scores - scores.mean(0)) / scores.std(0)
    torch.testing.assert_close(found, cohens_d(total[: len(WITH)], total[len(WITH) :]), rtol=1e-3, atol=1e-3)


def test_a_direction_that_tells_the_sentences_apart_is_far_ahead() -> None:
    """The difference of two words' embeddings, in a stream that blocks hardly touch, against a random one."""
    model, tokenizer = causal()
    with torch.no_grad():
        for block in blocks(model).values():
            for parameter in block.parameters():
                parameter.mul_(0.1)
    embedding = model.get_base_model().model.embed_tokens.weight.detach()  # type: ignore[operator,union-attr]
    rich, poor = embedding[tiny_text.index("rich")], embedding[tiny_text.index("poor")]
    told = torch.nn.functional.normalize((rich - poor).double(), dim=0)
    other = torch.randn(len(told), generator=torch.Generator().manual_seed(0)).double()
    plain = identify(model, rank=2, draws=0)
    bases = {"stream": orthonormalize(torch.stack([told, other], 1))}
    factors = LatentFactors("write", "stream", bases, plain.spectra, {}, {}, {}, {}, ())
    firsts = ["rich", "man rich", "the rich", "a rich woman"]
    seconds = [text.replace("rich", "poor") for text in firsts]
    found = activation_difference(model, tokenizer, factors, firsts, seconds)["stream"]
    assert float(found[0]) > 3
    assert abs(float(found[1])) < float(found[0]) / 2
    swapped = activation_difference(model, tokenizer, factors, seconds, firsts)["stream"]
    # The same sentences in another order of sums.
    torch.testing.assert_close(swapped, -found, rtol=1e-6, atol=1e-6)


def test_sentences_of_other_lengths_alone_do_not_differ() -> None:
    """The same pairs of words once or three times, in a stream that is huge at the first token alone."""
    model, tokenizer = causal()
    base: Any = model.get_base_model()  # type: ignore[operator]
    direction = torch.nn.functional.normalize(base.model.embed_tokens.weight.detach().double().sum(0), dim=0)
    factors = replace(identify(model, draws=0), bases={"stream": orthonormalize(direction[:, None])})
    with torch.no_grad():
        for block in blocks(model).values():
            for parameter in block.parameters():
                parameter.zero_()

    def park(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        embedded[:, 0] += 1000 * direction.float()
        return embedded

    base.model.embed_tokens.register_forward_hook(park)
    short = [f"then {pair}" for pair in ("rich man", "poor man", "a fox", "lazy cook")]
    long = [text + 2 * text.removeprefix("then") for text in short]
    for side in ("left", "right"):  # batches are padded at the right all the same
        tokenizer.padding_side = side
        found = activation_difference(model, tokenizer, factors, short, long, batch_size=3)["stream"]
        # Equal means, summed over two tokens or six in fp32; with the first token, beyond 100.
        assert abs(float(found)) < 1e-4


def test_modes_gradients_and_hooks_are_as_before() -> None:
    model, tokenizer = causal()
    model.get_submodule("base_model.model.model.norm").eval()
    modes = [module.training for module in model.modules()]
    activation_difference(model, tokenizer, identify(model, draws=0), WITH, WITHOUT)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error() -> None:
    model, tokenizer = causal()
    factors = identify(model, draws=0)
    model.get_base_model().lm_head.register_forward_pre_hook(failing)  # type: ignore[operator,union-attr]
    with pytest.raises(RuntimeError, match="on purpose"):
        activation_difference(model, tokenizer, factors, WITH, WITHOUT)
    assert not any(module._forward_hooks for module in model.modules())


def failing(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_the_base_model_alone_has_the_same_places() -> None:
    model, tokenizer = causal()
    factors = identify(model, side="read", pool="module", draws=0)
    base = model.unload()  # type: ignore[operator]
    found = activation_difference(base, tokenizer, factors, WITH, WITHOUT)
    assert all(bool(torch.isfinite(values).all()) for values in found.values())


def test_sentences_that_do_not_differ_have_no_difference() -> None:
    model, tokenizer = causal()
    for pool in ("module", "stream"):
        factors = identify(model, pool=pool, draws=0)  # type: ignore[arg-type]
        found = activation_difference(model, tokenizer, factors, ["rich"] * 2, ["rich"] * 3)
        # Batches of other shapes may round otherwise, by which alone they differ.
        assert all(not bool(values.isnan().any()) for values in found.values())
        same = activation_difference(model, tokenizer, factors, ["rich"] * 2, ["rich"] * 2, batch_size=1)
        assert all(not bool(values.any()) for values in same.values())


def test_groups_of_one_sentence_repeated_are_infinitely_apart() -> None:
    model, tokenizer = causal()
    factors = identify(model, pool="module", draws=0)
    found = activation_difference(model, tokenizer, factors, ["rich"] * 2, ["poor"] * 2, batch_size=1)
    assert all(values.isinf().tolist() == [True] for values in found.values())


def test_what_passes_max_length_does_not_count() -> None:
    model, tokenizer = causal()
    factors = identify(model, draws=0)
    long = [f"{text} and then the lazy fox sings to the cook . the end" for text in (*WITH, *WITHOUT)]
    cut = activation_difference(model, tokenizer, factors, long[:4], long[4:], max_length=1)["stream"]
    first = [text.split()[0] for text in long]
    plain = activation_difference(model, tokenizer, factors, first[:4], first[4:])["stream"]
    # The same ids in the same batches.
    torch.testing.assert_close(cut, plain, rtol=1e-6, atol=1e-6)
    assert math.isfinite(
        float(activation_difference(model, tokenizer, factors, long[:4], long[4:])["stream"])
    )


@pytest.mark.parametrize(
    ("sentences", "options", "told"),
    [
        ((["rich"], WITHOUT), {}, r"at least two sentences .*, got \(1, 5\)"),
        ((WITH, []), {}, r"at least two sentences .*, got \(4, 0\)"),
        ((WITH, [*WITHOUT, ""]), {}, "expected sentences with tokens, got ''"),
        ((WITH, WITHOUT), {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_sentences_that_cannot_be_compared_are_refused(sentences: Any, options: Any, told: str) -> None:
    model, tokenizer = causal()
    with pytest.raises(ValueError, match=told):
        activation_difference(model, tokenizer, identify(model, draws=0), *sentences, **options)


def test_models_that_do_not_fit_are_refused() -> None:
    model, tokenizer = causal()
    other, _ = masked()
    modules = identify(model, pool="module", draws=0)
    with pytest.raises(
        ValueError, match=r"a module 'model\.layers\.0\.self_attn\.q_proj', BertForMaskedLM has"
    ):
        activation_difference(other, tokenizer, modules, WITH, WITHOUT)
    narrow = LlamaForCausalLM(LlamaConfig(**{**tiny_text.SIZES, "hidden_size": 16}))
    with pytest.raises(ValueError, match=r"activations of width 32 at 'model\.layers\.0', got 16"):
        activation_difference(narrow, tokenizer, identify(model, draws=0), WITH, WITHOUT)


def test_a_model_that_gives_nan_is_refused() -> None:
    model, tokenizer = causal()
    factors = identify(model, draws=0)
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer").weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or Inf along the directions of 'stream'"):
        activation_difference(model, tokenizer, factors, WITH, WITHOUT)
