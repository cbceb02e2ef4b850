"""The adapter of one block: what trains, what the vector does, and that it comes and goes without a trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_architectures import BLOCKS, MODELS, VOCABULARY, WIDTH, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import fastproj
from fastproj.architectures import architecture_of, blocks
from fastproj.balance.adapter import InputShift, remove_balance_adapter

CAUSAL = sorted(set(MODELS) - {"bert", "roberta"})
RANKS = (None, 3)
PREFIX = "base_model.model."
IDS = torch.arange(2, 14).view(2, 6)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def drawn(model: nn.Module) -> nn.Module:
    """Every trainable parameter moved, as training would move it."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def adapted(kind: str, layer: int = 1, **options: Any) -> nn.Module:
    return drawn(fastproj.add_balance_adapter(tiny(kind).eval(), layer, **options))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_what_trains_is_the_writers_of_the_block_and_the_vector(
    kind: str, rank: int | None, shift: bool
) -> None:
    model = tiny(kind)
    block = list(blocks(model))[1]
    expected = {f"{PREFIX}{block}.input_shift.vector.modules_to_save.default.weight"} if shift else set()
    for writer in architecture_of(model).writers:
        inside = model.get_submodule(f"{block}.{writer}").state_dict() if rank is None else ("A", "B")
        form = "modules_to_save.default.{}" if rank is None else "lora_{}.default.weight"
        expected |= {f"{PREFIX}{block}.{writer}.{form.format(name)}" for name in inside}
    assert trainable(fastproj.add_balance_adapter(model, 1, rank=rank, shift=shift)) == expected


@pytest.mark.parametrize("rank", RANKS)
def test_a_block_whose_number_ends_in_the_same_digit_stays_frozen(rank: int | None) -> None:
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2, vocab_size=30
    )
    model = fastproj.add_balance_adapter(LlamaForCausalLM(config), 1, rank=rank)
    assert {name.split(".layers.")[1].split(".")[0] for name in trainable(model)} == {"1"}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_new_adapter_changes_nothing_and_a_disabled_one_neither(kind: str, rank: int | None) -> None:
    model = tiny(kind).eval()
    before = logits(model)
    model = fastproj.add_balance_adapter(model, 1, rank=rank)
    assert torch.equal(logits(model), before)
    drawn(model)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)


def test_a_disabled_vector_keeps_the_sign_of_zero() -> None:
    shift = InputShift(3, torch.zeros(1))
    shift.vector.disable_adapters = True
    minus = torch.full((1, 1, 3), -0.0)
    assert torch.signbit(shift(minus)).all()


@pytest.mark.parametrize("layer", range(BLOCKS))
@pytest.mark.parametrize("kind", CAUSAL)
def test_the_vector_is_added_to_the_blocks_input(kind: str, layer: int) -> None:
    base = tiny(kind).double().eval()
    model = fastproj.add_balance_adapter(copy.deepcopy(base), layer)
    vector = blocks(model)[list(blocks(base))[layer]].input_shift.vector.weight
    explicit = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        vector.copy_(explicit[:, None])
    explicit.requires_grad_(True)

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + explicit, *args[1:])

    list(blocks(base).values())[layer].register_forward_pre_hook(add)
    want, got = logits(base), logits(model)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    # The same sums in another order; norms and softmax of some architectures run in fp32.
    torch.testing.assert_close(vector.grad[:, 0], explicit.grad, rtol=1e-5, atol=1e-6)


def test_hidden_states_given_by_name_are_shifted() -> None:
    model = adapted("llama", shift=True)
    block = blocks(model)["model.layers.1"]
    vector = block.input_shift.vector.weight[:, 0]
    seen: list[Tensor] = []
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden = torch.randn(2, 3, WIDTH)
    embeddings = model.base_model.model.model.rotary_emb(hidden, torch.arange(3)[None])
    block(hidden_states=hidden, position_embeddings=embeddings)
    torch.testing.assert_close(seen[0], hidden + vector)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_checkpointing_changes_no_gradient(kind: str, rank: int | None, reentrant: bool) -> None:
    # Fused attention may sum its gradients in another order when it runs again.
    with sdpa_kernel(SDPBackend.MATH):
        model = adapted(kind, rank=rank).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        gradients = []
        for checkpointed in (False, True):
            if checkpointed:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(0)
            model.zero_grad()
            logits(model).square().sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    assert set(plain) == trainable(model)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_is_that_without_one(kind: str) -> None:
    model = adapted(kind)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY - 1}
    cached, plain = (
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=cache, **options)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("rank", RANKS)
def test_copies_and_pickles_are_whole_and_apart(rank: int | None) -> None:
    model = adapted("llama", rank=rank)
    want = logits(model)
    base = logits(tiny("llama").eval())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        assert torch.equal(logits(remove_balance_adapter(other)), base)
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_removal_leaves_the_model_as_it_was(kind: str, rank: int | None, shift: bool) -> None:
    model = adapted(kind, rank=rank, shift=shift)
    untouched = tiny(kind).eval()
    removed = remove_balance_adapter(model)
    assert [(n, type(m)) for n, m in removed.named_modules()] == [
        (n, type(m)) for n, m in untouched.named_modules()
    ]
    for (name, mine), theirs in zip(removed.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert all(not module._forward_pre_hooks for module in removed.modules())
    assert torch.equal(logits(removed), logits(untouched))
    assert trainable(fastproj.add_balance_adapter(removed, 0, rank=rank))


def test_a_merged_adapter_is_unmerged_before_it_is_removed() -> None:
    model = adapted("llama", rank=3)
    model.merge_adapter()
    # Merging and taking out again rounds twice, in fp32.
    torch.testing.assert_close(
        logits(remove_balance_adapter(model)), logits(tiny("llama").eval()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_model_keeps_the_vector(kind: str, rank: int | None) -> None:
    model = adapted(kind, rank=rank)
    want = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    with pytest.raises(ValueError, match="without an adapter"):
        fastproj.add_balance_adapter(merged, 1)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, rank: int | None) -> None:
    base = tiny("llama").to(dtype).eval()
    before = logits(base)
    model = fastproj.add_balance_adapter(base, 1, rank=rank)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_full = rank is None and "input_shift" not in name
            lora_of_fp64 = rank is not None and "lora_" in name and dtype == torch.float64
            if not lora_of_fp64:  # PEFT's own: fp32 however wide the model
                assert parameter.dtype == (dtype if in_full else wide), name
    got = logits(drawn(model))
    assert got.dtype == before.dtype == dtype
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-30, 1e30])
def test_the_vector_holds_any_value(value: float) -> None:
    shift = InputShift(2, torch.zeros(1))
    with torch.no_grad():
        shift.vector.weight.fill_(value)
    hidden = torch.tensor([[[1.0, -1.0], [0.0, 2.0]]])
    assert torch.equal(shift(hidden).nan_to_num(), (hidden + value).nan_to_num())


def test_an_empty_batch_passes_through_the_vector() -> None:
    assert InputShift(3, torch.zeros(1))(torch.zeros(0, 5, 3)).shape == (0, 5, 3)


def test_the_seed_decides_what_is_drawn() -> None:
    first, same, other = (
        fastproj.add_balance_adapter(tiny("llama"), 0, rank=2, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    key = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[key], same[key])
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("rank", RANKS)
def test_the_callers_random_state_stays(rank: int | None) -> None:
    model = tiny("llama")
    before = torch.random.get_rng_state()
    fastproj.add_balance_adapter(model, 0, rank=rank)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_alpha_is_twice_the_rank_unless_it_is_given() -> None:
    for given, alpha in ((None, 6), (1.5, 1.5)):
        model = fastproj.add_balance_adapter(tiny("llama"), 0, rank=3, alpha=given)
        assert model.peft_config["default"].lora_alpha == alpha


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layer": 2}, ValueError, r"layer must be in 0\.\.1 for 2 blocks, got 2"),
        ({"layer": -1}, ValueError, "got -1"),
        ({"layer": True}, TypeError, "layer must be an integer, got True"),
        ({"layer": 1.0}, TypeError, r"layer must be an integer, got 1\.0"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, r"rank must be an integer or None, got 2\.0"),
        ({"alpha": 4.0}, ValueError, r"alpha=4\.0 needs a rank"),
        ({"rank": 2, "alpha": 0.0}, ValueError, "alpha must be positive"),
        ({"rank": 2, "alpha": float("nan")}, ValueError, "alpha must be positive"),
    ],
    ids=str,
)
def test_bad_options_are_refused_and_leave_the_model_alone(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = tiny("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        fastproj.add_balance_adapter(model, **{"layer": 1, **options})
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_encoders_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"expected a causal language model \(gemma, .*an encoder"):
        fastproj.add_balance_adapter(tiny(kind), 0)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="got a Linear without a model_type"):
        fastproj.add_balance_adapter(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="with its head, got LlamaModel"):
        fastproj.add_balance_adapter(tiny("llama", bare=True), 0)
    with pytest.raises(ValueError, match="without an adapter"):
        fastproj.add_balance_adapter(adapted("llama"), 0)
    with pytest.raises(ValueError, match="an adapter of PEFT"):
        remove_balance_adapter(tiny("llama"))


def test_quantised_writers_need_a_rank() -> None:
    model = tiny("llama")
    writer = model.model.layers[1].mlp.down_proj
    writer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"down_proj' to train it in full, got torch\.uint8 in a Linear: give"
    ):
        fastproj.add_balance_adapter(model, 1)
    assert not hasattr(model.model.layers[1], "input_shift")
