"""The interchange ablation against whole runs one by one, and those against exchanges written out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_architectures import BLOCKS, MODELS, VOCABULARY, adapted, tiny
from torch import Tensor, nn

import fastproj
from fastproj import InterchangePair, LabelWords, LayerScores, interchange_ablation
from fastproj.architectures import ARCHITECTURES, architecture_of, blocks
from fastproj.balance import interchange
from fastproj.balance.naive_interchange import naive_interchange

ENCODERS = ("bert", "roberta")
CAUSAL = sorted(set(ARCHITECTURES) - set(ENCODERS))
LABELS = LabelWords(("joy", "anger", "fear"), (" joy", " anger", " fear"), ((3,), (7, 2), (11,)))
GOLD = (2, 3, 4, 5, 6, 7, 8)
# Runs with their exchanges by hand: position of the gold run from position of the biased one.
EXCHANGES: list[tuple[InterchangePair, dict[int, int]]] = [
    (InterchangePair(GOLD, (2, 3, 4, 9, 6, 7, 8)), {3: 3, 4: 4, 5: 5, 6: 6}),
    (InterchangePair(GOLD, (2, 3, 4, 9, 6, 7)), {4: 3, 5: 4, 6: 5}),
    (InterchangePair((2, 3, 4, 9, 6), GOLD), {3: 5, 4: 6}),
    (InterchangePair(GOLD, (9, 3, 4, 5, 6, 7, 8)), {position: position for position in range(7)}),
    (InterchangePair((2, 3, 4), (2, 3, 9)), {2: 2}),
    (InterchangePair((2, 3), (2, 3, 4)), {1: 2}),
    (InterchangePair((2, 3, 4), (2, 3)), {2: 1}),
    (InterchangePair((2, 3), (2, 3)), {1: 1}),
    (InterchangePair((5,), (6,)), {0: 0}),
    (InterchangePair((5,), (6, 7, 8)), {0: 2}),
]
PAIRS = [pair for pair, _ in EXCHANGES]
# Label logits of order one in fp32, where two orders of summation differ by some 1e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def spread(model: nn.Module, size: float = 0.5) -> nn.Module:
    """Weights far from zero, so that an exchange makes a difference."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=size)
    return model.eval()


def windowed(kind: str, window: int) -> nn.Module:
    """A model whose first block sees only so many tokens; every one of Mistral's."""
    prefix, head, sizes = MODELS[kind]
    options = {**sizes, "sliding_window": window, "pad_token_id": 0}
    if kind != "mistral":
        options["layer_types"] = ["sliding_attention", "full_attention"]
    if kind.startswith("qwen"):
        options["use_sliding_window"] = True
    config = getattr(transformers, f"{prefix}Config")(**options)
    return spread(getattr(transformers, f"{prefix.removesuffix('Text')}{head}")(config))


def by_hand(model: nn.Module, pair: InterchangePair, exchange: dict[int, int]) -> Tensor:
    """Scores (L,), each position of an exchange set from its own, in a hook for each block."""
    name = architecture_of(model).writers[0]
    writers = [block.get_submodule(name) for block in blocks(model).values()]
    columns = list(LABELS.first)

    def answer(ids: Sequence[int], writer: nn.Module, hook: Callable[..., Tensor | None]) -> Tensor:
        handle = writer.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids)])).logits[0, -1, columns]
        handle.remove()
        return logits.double().softmax(-1)

    scores = []
    for writer in writers:
        kept: list[Tensor] = []
        answer(pair.biased, writer, lambda _, __, out, kept=kept: kept.append(out.clone()))

        def patch(_: nn.Module, __: object, out: Tensor, kept: list[Tensor] = kept) -> Tensor:
            for into, taken in exchange.items():
                out[0, into] = kept[0][0, taken]
            return out

        gold = answer(pair.gold, writer, lambda *_: None)
        scores.append((gold * (gold / answer(pair.gold, writer, patch)).log()).sum())
    return torch.stack(scores)


@pytest.mark.parametrize(("pair", "exchange"), EXCHANGES)
def test_what_is_exchanged_is_aligned_at_the_end(pair: InterchangePair, exchange: dict[int, int]) -> None:
    assert pair.exchanged == len(exchange)
    assert min(exchange) == len(pair.gold) - pair.exchanged
    assert min(exchange.values()) == len(pair.biased) - pair.exchanged
    assert pair.gold[: pair.shared] == pair.biased[: pair.shared]
    assert pair.shared + pair.exchanged == min(len(pair.gold), len(pair.biased))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loop_of_whole_runs_is_what_the_hand_writes(kind: str) -> None:
    model = spread(tiny(kind))
    found = naive_interchange(model, PAIRS, LABELS).per_sample
    expected = torch.stack([by_hand(model, pair, exchange) for pair, exchange in EXCHANGES])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_architecture_as_whole_runs_say(kind: str) -> None:
    model = spread(tiny(kind))
    found, expected = (run(model, PAIRS, LABELS) for run in (interchange_ablation, naive_interchange))
    assert found.modules == expected.modules
    assert list(found.modules) == [f"{place}.{architecture_of(model).writers[0]}" for place in blocks(model)]
    assert found.per_sample.dtype == torch.float64
    torch.testing.assert_close(found.per_sample, expected.per_sample, **CLOSE)
    # Scores of the two blocks differ by far more than that, so that one taken for the other would be seen.
    first, second = expected.per_sample.T
    assert (first - second).abs().max() > 1000 * CLOSE["atol"]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_wrong_layer_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(tiny(kind))
    expected = naive_interchange(model, PAIRS, LABELS).per_sample
    right = interchange.attention_writers

    def reversed_writers(model: nn.Module) -> dict[str, nn.Module]:
        found = right(model)
        return dict(zip(found, reversed(found.values()), strict=True))

    monkeypatch.setattr(interchange, "attention_writers", reversed_writers)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(interchange_ablation(model, PAIRS, LABELS).per_sample, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("window", [2, 3, 5])
def test_blocks_that_see_a_window(kind: str, window: int) -> None:
    long = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    pairs = [InterchangePair((*long, 3, 4, 5), (*long, 9, 4, 5)), InterchangePair((*long, 3), (*long, 9, 4))]
    model = windowed(kind, window)
    expected = naive_interchange(model, pairs, LABELS).per_sample
    torch.testing.assert_close(interchange_ablation(model, pairs, LABELS).per_sample, expected, **CLOSE)
    whole = naive_interchange(windowed(kind, 100), pairs, LABELS).per_sample
    assert (whole - expected).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize("rows", [1, 2, 3, BLOCKS + 1, BLOCKS + 2, 100])
@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])
def test_batches_of_any_size_say_the_same(kind: str, rows: int) -> None:
    model = spread(tiny(kind))
    found = interchange_ablation(model, PAIRS, LABELS, rows_per_forward=rows).per_sample
    torch.testing.assert_close(found, interchange_ablation(model, PAIRS, LABELS).per_sample, **CLOSE)


RUNS = st.lists(st.integers(1, 4), min_size=1, max_size=9).map(tuple)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.builds(InterchangePair, RUNS, RUNS), min_size=1, max_size=3), st.integers(1, BLOCKS + 2))
def test_pairs_of_any_lengths(pairs: list[InterchangePair], rows: int) -> None:
    model = windowed("mistral", 4)
    found = interchange_ablation(model, pairs, LABELS, rows_per_forward=rows).per_sample
    torch.testing.assert_close(found, naive_interchange(model, pairs, LABELS).per_sample, **CLOSE)


@pytest.mark.parametrize("kind", CAUSAL)
def test_identical_runs_give_nothing(kind: str) -> None:
    model = spread(tiny(kind))
    same = [InterchangePair(GOLD, GOLD), InterchangePair((4,), (4,))]
    found = interchange_ablation(model, same, LABELS).per_sample
    # log p of order one in fp32, and the KL of distributions that differ by its rounding is quadratic in it.
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-11)


def test_the_shared_tokens_go_through_the_model_once() -> None:
    model = spread(tiny("llama"))
    sizes: list[tuple[int, ...]] = []
    first = next(iter(blocks(model).values()))
    handle = first.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape[:2])))
    interchange_ablation(model, PAIRS[:1], LABELS)
    assert sizes == [(1, 3), (BLOCKS + 2, 4)]
    sizes.clear()
    interchange_ablation(model, PAIRS[3:4], LABELS)
    assert sizes == [(BLOCKS + 2, 7)]
    handle.remove()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_adapters_count_as_merged_ones_do(kind: str) -> None:
    model = adapted(kind, noise=0.5)
    found = interchange_ablation(model, PAIRS, LABELS)
    torch.testing.assert_close(found.per_sample, naive_interchange(model, PAIRS, LABELS).per_sample, **CLOSE)
    merged = model.merge_and_unload()
    expected = interchange_ablation(merged, PAIRS, LABELS)
    assert found.modules == expected.modules
    # Products of weights summed in another order: rounding of logits that adapters make some tens large.
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_balance_adapter_s_own_layers_are_exchanged(rank: int | None) -> None:
    model = fastproj.add_balance_adapter(spread(tiny("llama")), 1, rank=rank)
    before = interchange_ablation(model, PAIRS, LABELS).per_sample
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    found = interchange_ablation(model, PAIRS, LABELS).per_sample
    torch.testing.assert_close(found, naive_interchange(model, PAIRS, LABELS).per_sample, **CLOSE)
    assert (found - before).abs().max() > 100 * CLOSE["atol"]


def test_training_and_checkpointing_make_no_difference() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": BLOCKS, "n_embd": 16, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = spread(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)))
    expected = interchange_ablation(model, PAIRS, LABELS).per_sample
    model.gradient_checkpointing_enable()
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(interchange_ablation(model, PAIRS, LABELS).per_sample, expected)
    assert model.training
    assert not model.transformer.h[0].training


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bf16_as_close_as_whole_runs_in_bf16(kind: str) -> None:
    model = spread(tiny(kind), 0.2).to(torch.bfloat16)
    found, loop = (run(model, PAIRS, LABELS).per_sample for run in (interchange_ablation, naive_interchange))
    exact = naive_interchange(model.to(torch.float64), PAIRS, LABELS).per_sample
    # Both round to 8 bits, in another order: each is off by about as much as the other.
    error = (loop - exact).abs().max()
    assert (found - exact).abs().max() <= 3 * error
    assert exact.abs().max() > 3 * error


def test_progress_is_told_sample_by_sample() -> None:
    told: list[tuple[int, int]] = []
    model = spread(tiny("gpt2"))
    found = interchange_ablation(model, PAIRS[:3], LABELS, on_sample=lambda *numbers: told.append(numbers))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.per_sample.shape == (3, BLOCKS)


def test_what_the_model_cannot_do_is_refused() -> None:
    model = spread(tiny("gpt2"))
    with pytest.raises(ValueError, match="expected at least one pair of runs, got none"):
        interchange_ablation(model, [], LABELS)
    with pytest.raises(ValueError, match="rows_per_forward: expected at least 1, got 0"):
        interchange_ablation(model, PAIRS, LABELS, rows_per_forward=0)
    with pytest.raises(ValueError, match="expected at most 16 tokens in a run, got 17 in pair 1"):
        interchange_ablation(model, [PAIRS[0], InterchangePair((3,), (2,) * 17)], LABELS)
    with pytest.raises(ValueError, match="expected runs of at least one token, got 1 and 0"):
        InterchangePair((3,), ())
    with pytest.raises(ValueError, match="expected two labels or more, got joy"):
        interchange_ablation(model, PAIRS, LabelWords(("joy",), (" joy",), ((3,),)))
    clash = LabelWords(("joy", "joyful"), (" joy", " joyful"), ((3,), (3, 4)))
    with pytest.raises(ValueError, match="' joy' and ' joyful' begin with the same token, 3"):
        interchange_ablation(model, PAIRS, clash)
    for encoder in ENCODERS:
        with pytest.raises(ValueError, match="expected a causal language model, got a "):
            interchange_ablation(tiny(encoder), PAIRS, LABELS)
    with pytest.raises(ValueError, match=r"expected a causal or masked language model .*, got LlamaModel"):
        interchange_ablation(tiny("llama", bare=True), PAIRS, LABELS)


@pytest.mark.parametrize("run", [interchange_ablation, naive_interchange])
def test_a_broken_model_is_named_and_left_as_it_was(run: Callable[..., LayerScores]) -> None:
    model = spread(tiny("llama")).train()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.nan
    with pytest.raises(ValueError, match="the model gives NaN or Inf for pair 1"):
        run(model, [InterchangePair((2, 3), (2, 4)), PAIRS[0]], LABELS)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_scores_by_hand() -> None:
    scores = LayerScores(
        torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 4.0]], dtype=torch.float64), ("a", "b", "c")
    )
    assert scores.mean.tolist() == [2, 4, 4]
    # Deviations 1, 2 and 0 either side: s = √2, √8, 0 and s/√2.
    assert scores.standard_error.tolist() == pytest.approx([1, 2, 0])
    assert scores.best == 1
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False)) == {
        "modules": ["a", "b", "c"],
        "best": 1,
        "mean": [2, 4, 4],
        "standard_error": pytest.approx([1, 2, 0]),
        "per_sample": [[1, 2, 4], [3, 6, 4]],
    }
    alone = LayerScores(scores.per_sample[:1], scores.modules)
    assert alone.standard_error.isnan().all()
    assert alone.to_dict()["standard_error"] == [None, None, None]
    assert alone.best == 2


def test_an_adapter_with_tokens_of_its_own_is_refused() -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(tiny("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="expected an adapter inside the model's layers, got PROMPT_TUNING"):
        interchange_ablation(model, PAIRS, LABELS)
    inside = get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True))
    assert interchange_ablation(inside, PAIRS, LABELS).modules[0] == "transformer.h.0.attn.c_proj"
